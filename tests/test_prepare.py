"""Public data sets as our JSONL, and countdown's solver and generator.   python -m pytest tests/test_prepare.py"""

import hashlib
import itertools
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import call, data_file, ended

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
from rlt.grading import grade, with_choices  # noqa: E402
from rlt.rows import load_rows  # noqa: E402

from countdown import LEVELS, draw_problems, reachable, solve  # noqa: E402


def prepare(folder, name, *given, **columns):
    """The rows that `data/prepare.py name` writes; columns: of made rows to read, one row a place in the lists."""
    if columns:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        (folder / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ("--source", "source.jsonl", *given)
    call(folder, "data/prepare.py", name, *given)
    return [json.loads(line) for line in (folder / f"runs/data/{name}.jsonl").open()]


# -- countdown


def every_value(numbers):
    """All values of all expressions over all the numbers, negative ones too: an independent search, by pairs."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        others = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for value in [a + b, a - b, a * b, *([a / b] if b else [])]:
            found |= every_value([*others, value])
    return found


@pytest.mark.parametrize("nums", [[3, 8, 3, 8], [7, 7, 1], [1, 5, 5, 5], [2, 2, 2, 2], [4], [100, 93, 30]])
def test_the_solver_finds_all_that_can_be_reached_and_nothing_else(nums):
    expected = {value for value in every_value([Fraction(number) for number in nums]) if value >= 0}
    found = reachable(nums, fractions=True)
    assert found.keys() == expected
    for value, expression in found.items():
        if value.denominator == 1:
            assert grade("countdown", f"\\boxed{{{expression}}}", {"nums": nums, "target": int(value), "where": ""})
    assert {value for value in expected if value in reachable(nums)} == reachable(nums).keys()


def test_solutions_that_need_a_fraction_on_the_way():
    assert 24 not in reachable([3, 8, 3, 8])
    assert solve([3, 8, 3, 8], 24) == "8 / (3 - (8 / 3))"
    assert solve([1, 1], 3) is None


@pytest.mark.parametrize("level", LEVELS)
def test_problems_drawn_are_different_solvable_and_the_same_for_a_seed(level):
    problems = draw_problems(40, level, seed=0)
    assert problems == draw_problems(40, level, seed=0)
    assert not {str(problem) for problem in problems} & {str(problem) for problem in draw_problems(40, level, seed=1)}
    assert problems[:10] == draw_problems(10, level, seed=0)  # more of them are the same, and more
    assert len({(*sorted(problem["nums"]), problem["target"]) for problem in problems}) == 40
    for problem in problems:
        assert len(problem["nums"]) == level and all(1 <= number <= 99 for number in problem["nums"])
        assert 1 <= problem["target"] <= 100
        answer = f"\\boxed{{{problem['expression']}}}"
        assert grade("countdown", answer, problem | {"where": ""})


def test_countdown_is_drawn_here(tmp_path, capsys):
    rows = prepare(tmp_path, "countdown", "--limit", 5, "--level", 4, "--seed", 3)
    said = capsys.readouterr().out
    written = (tmp_path / "runs/data/countdown.jsonl").read_bytes()
    assert "5 rows from the generator, --level 4 --seed 3, 5 different questions, 0 with an explanation" in said
    assert hashlib.sha256(written).hexdigest() in said and "licence  MIT if drawn here" in said
    loaded = load_rows(tmp_path / "runs/data/countdown.jsonl")
    problems = [{column: row[column] for column in ("nums", "target")} for row in rows]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    plain = load_rows(tmp_path / "plain.jsonl", require_solution=False)
    assert [row["question"] for row in loaded] == [row["question"] for row in plain]
    assert all(grade("countdown", row["solution"], row) and row["level"] == 4 for row in loaded)


def test_public_countdown_rows_get_solutions(tmp_path):
    rows = prepare(tmp_path, "countdown", "--source", data_file("countdown_sample.jsonl"))
    assert len(rows) == 128 and all(grade("countdown", row["solution"], row | {"where": ""}) for row in rows)


def test_countdown_rows_as_published(tmp_path):
    [row] = prepare(tmp_path, "countdown", input=["30,100,93"], output=["23"])
    assert (row["nums"], row["target"], row["solution"]) == ([30, 100, 93], 23, "\\boxed{(30 + 93) - 100}")


# -- the other sets: made rows of their schemas


def test_stratos(tmp_path):
    answer = ("<|begin_of_thought|>\n\nFirst.\n\n<|end_of_thought|>\n\n"
              "<|begin_of_solution|>\n\nIt is \\boxed{4}.\n\n<|end_of_solution|>")
    turns = [{"from": "user", "value": "2 + 2?"}, {"from": "assistant", "value": answer}]
    assert prepare(tmp_path, "stratos", system=["Think."], conversations=[turns]) == [
        {"question": "2 + 2?", "solution": "It is \\boxed{4}.", "explanation": "First."}]


def test_gsm8k(tmp_path):
    answer = "48/2 = <<48/2=24>>24 clips.\nSo 1,000+24 = <<1000+24=1024>>1,024.\n#### 1,024"
    [row] = prepare(tmp_path, "gsm8k", question=["How many?"], answer=[answer])
    assert row == {"question": "Return your final response within \\boxed{}. How many?", "solution": "\\boxed{1,024}",
                   "explanation": "48/2 = 24 clips.\nSo 1,000+24 = 1,024.", "answer": "1,024"}
    assert grade("gsm8k", "\\boxed{1024}", row | {"where": ""})


def test_svamp_and_multiarith_are_graded_as_gsm8k(tmp_path):
    made = {"svamp": {"Body": ["He has 7 hats and sells 4."], "Question": ["How many are left?"], "Answer": ["3.0"]},
            "multiarith": {"sQuestion": [" He has 7 hats and sells 4. How many are left? "], "lSolutions": [[3.0]]}}
    for name, columns in made.items():
        [row] = prepare(tmp_path, name, **columns)
        assert row["question"].endswith("He has 7 hats and sells 4. How many are left?")
        assert grade("gsm8k", "So \\boxed{3}", row | {"where": ""}), name
        assert not grade("gsm8k", "So \\boxed{4}", row | {"where": ""}), name


def test_math500_and_both_years_of_aime(tmp_path, capsys):
    made = {"problem": ["p"], "solution": ["\\boxed{2}."], "answer": ["2"], "subject": ["Algebra"], "level": [3]}
    question = "Return your final response within \\boxed{}. p"
    assert prepare(tmp_path, "math500", **made) == [
        {"question": question, "solution": "\\boxed{2}.", "answer": "2", "level": 3, "subject": "Algebra"}]
    assert "published are 500 rows: this is a part of them" in capsys.readouterr().out
    made = {"id": [60], "problem": ["p"], "solution": ["s"], "answer": ["204"], "url": ["u"], "question": ["other"]}
    assert prepare(tmp_path, "aime24", **made) == [{"question": question, "solution": "s", "answer": "204"}]
    assert prepare(tmp_path, "aime25", problem_idx=[1], problem=["p"], answer=[70], problem_type=[["Algebra"]]) == [
        {"question": question, "solution": "\\boxed{70}", "answer": "70"}]


def test_gpqa_has_the_choices_in_the_order_of_evaluate(tmp_path):
    made = {"Question": ["Which?", "What?"], "Correct Answer": ["right", "1"], "Explanation": ["Because.", None]}
    made |= {f"Incorrect Answer {i}": [f"wrong {i}", f"{i + 1}"] for i in (1, 2, 3)}
    rows = prepare(tmp_path, "gpqa", **made)
    direct = [with_choices(row) for row in load_rows(tmp_path / "source.jsonl")]
    for row, expected in zip(rows, direct, strict=True):
        assert all(row[column] == expected[column] for column in ("question", "choices", "answer"))
        assert row["solution"] == f"\\boxed{{{row['answer']}}}"
        assert grade("gpqa", row["solution"], row | {"where": ""})
        assert with_choices(row) == row  # evaluate.py adds no second list
    assert rows[0]["explanation"] == "Because." and "explanation" not in rows[1]


@pytest.mark.parametrize(("name", "file", "count"), [
    ("gsm8k", "gsm8k_train_1k.jsonl", 1000), ("math500", "math500_first250.jsonl", 250),
    ("aime24", "aime24_first15.jsonl", 15)])
def test_public_rows_read_back_are_what_the_source_says(tmp_path, name, file, count):
    rows = prepare(tmp_path, name, "--source", data_file(file))
    source = load_rows(data_file(file))
    back = load_rows(tmp_path / f"runs/data/{name}.jsonl")
    assert len(rows) == len(back) == count
    for row, expected in zip(back, source, strict=True):
        assert row["question"] == expected["question"]
        whole = f"{row['explanation']}\n{row['solution']}" if name == "gsm8k" else row["solution"]
        assert whole == expected["solution"]
        assert row["answer"] == expected["answer"].rpartition("#### ")[2]


# -- mistakes


@pytest.mark.parametrize(("given", "message"), [
    (("nothing",), "invalid choice: 'nothing' (choose from 'stratos'"),
    (("math500", "--source", "missing.jsonl"), "missing.jsonl does not exist: expected a file"),
    (("math500", "--source", "taken.jsonl", "--level", 4), "--level and --seed are of the countdown problems"),
    (("math500", "--source", "taken.jsonl", "--out", "taken.jsonl"), "taken.jsonl exists already: delete it"),
    (("countdown", "--source", "taken.jsonl"), "line 1 has no solution: [1, 1] don't make 3. --skip-bad-rows"),
    (("gpqa", "--source", "gsm8k.jsonl"), "gsm8k.jsonl line 1 has no answer that --task gpqa can be graded by"),
    (("gpqa", "--source", "gsm8k.jsonl", "--skip-bad-rows"), "gsm8k.jsonl has no rows of gpqa: pass another --source"),
    (("math500", "--source", "unanswered.jsonl"), "unanswered.jsonl line 1 has no answer that --task math500"),
])
def test_mistakes_are_one_line(tmp_path, given, message):
    (tmp_path / "taken.jsonl").write_text('{"nums": [1, 1], "target": 3}\n{"nums": [1, 2], "target": 3}\n')
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "q", "answer": "#### 3"}\n')
    (tmp_path / "unanswered.jsonl").write_text('{"problem": "q", "solution": "s"}\n')
    stdout, stderr, code = ended(tmp_path, "data/prepare.py", *given)
    assert code == 2 and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "runs").exists()


def test_bad_rows_are_left_out_and_counted(tmp_path, capsys):
    [row] = prepare(tmp_path, "countdown", "--skip-bad-rows", nums=[[1, 1], [1, 2]], target=[3, 3])
    assert row["nums"] == [1, 2]
    assert "1 rows left out, the first: source.jsonl line 1 has no solution" in capsys.readouterr().out
