"""Rows: files, schemas, bad rows, leaks.   python -m pytest tests/test_rows.py"""

import json

from rlt.errors import UserError
from rlt.rows import leaks, load_rows
from rlt.tags import SOLUTION, THOUGHT

import pytest


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"question": "q", "answr": "a"}, 'has no "question" and "solution"; columns found: question, answr'),
        ({"question": "q", "solution": "  "}, "has an empty solution"),
        ({"question": "", "solution": "s"}, "has an empty question"),
        ({"question": "q", "solution": 3}, "has a solution of type int, expected text"),
        ({"question": "q", "solution": None}, "has a solution of type NoneType"),
        ('{"question": "q", "solu', "is not JSON"),
        ("[1, 2]", "holds a list, expected an object"),
        ({"question": "q", "answer": "no mark"}, 'has an answer without "#### number"'),
        ({"question": "q", "answer": "no number ####"}, 'has an answer without "#### number"'),
        ({"question": "", "answer": "#### 1"}, "has an empty question"),
        ({"problem": None, "solution": "s"}, "has a question of type NoneType"),
        ({"problem": " ", "solution": "s"}, "has an empty question"),
        ({"conversations": [{"from": "user", "value": "q"}]}, "has conversations without"),
        ({"conversations": None}, "has conversations without"),
        ({"nums": 5, "target": 5}, 'has no "question"'),
    ],
)
def test_bad_rows_are_named_and_can_be_skipped(tmp_path, capsys, bad, complaint):
    good = {"question": "q", "solution": "s"}
    path = write(tmp_path / "rows.jsonl", [good, "", bad, good])
    with pytest.raises(UserError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path} line 3 {complaint}")
    assert "--skip-bad-rows" in str(error.value)
    assert len(load_rows(path, skip_bad=True)) == 2
    assert "1 bad rows left out" in capsys.readouterr().out


def test_a_limit_counts_rows_of_the_source(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": str(i), "solution": "s"} for i in range(9)])
    assert [row["question"] for row in load_rows(path, limit=3)] == ["0", "1", "2"]
    assert len(load_rows(path, limit=100)) == 9


def test_json_parquet_and_named_columns(tmp_path):
    from datasets import Dataset

    rows = [{"frage": "q", "loesung": "s"}, {"frage": "r", "loesung": "t"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        loaded = load_rows(tmp_path / name, question_column="frage", solution_column="loesung")
        assert [(row["question"], row["solution"]) for row in loaded] == [("q", "s"), ("r", "t")]
        with pytest.raises(UserError, match='row 0 has no "answer"; columns found: frage, loesung'):
            load_rows(tmp_path / name, question_column="frage", solution_column="answer")
    with pytest.raises(UserError, match="expected a .jsonl, .json or .parquet file that exists"):
        load_rows(tmp_path / "missing.jsonl")


def test_stratos_conversations(tmp_path):
    answer = f"{THOUGHT[0]}\n\nHm.\n\nYes.\n\n{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n\\boxed{{1}}\n\n{SOLUTION[1]}"
    row = {"system": "S", "conversations": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": answer}]}
    [loaded] = load_rows(write(tmp_path / "rows.jsonl", [row]))
    assert (loaded["question"], loaded["explanation"], loaded["solution"]) == ("Q", "Hm.\n\nYes.", "\\boxed{1}")


def test_gsm8k_solutions_lose_their_calculator_marks_and_keep_the_answer(tmp_path):
    row = {"question": "Q", "answer": "He has 48/2 = <<48/2=24>>24.\n#### 1,024"}
    [loaded] = load_rows(write(tmp_path / "rows.jsonl", [row]))
    assert loaded["solution"] == "He has 48/2 = 24.\n\\boxed{1,024}"
    assert loaded["question"].endswith(" Q") and "\\boxed{}" in loaded["question"]


@pytest.mark.parametrize(
    ("explanation", "leak"),
    [
        ("ans 0 1 so well", True),
        ("ans 0 1 so", True),
        ("ans 0 1", True),
        ("0 1", True),
        ("s1 swap 3 7 s2 x*=3 0 1 s3 y*=7 0 1", False),  # it arrives early and stays there
        ("s1 swap 3 7 s2 x+=1 4 7 s3 swap 7 4 s4 x*=3 0 1", False),
        ("s1 swap 3 7", False),
        ("", False),
        ("x 0 12 and more of it", False),
    ],
)
def test_leaks(explanation, leak):
    assert leaks(explanation, "0 1") is leak
