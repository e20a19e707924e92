"""Word problems: the same for every seed, right, and apart.   python -m pytest tests/test_word_problems.py"""

import itertools
import json
import re
from collections import Counter

from rlt.errors import UserError
from rlt.grading import grade
from rlt.prompts import SOLUTION, THOUGHT
from rlt.rows import load_rows

import pytest
from conftest import call, data_file, ended

from data import word_problems as problems

ROW = {"start": 14, "steps": [7, -5, 3], "answer": "19"}
CHAIN = "14+7=21\n21-5=16\n16+3=19"
SIZES = {"train": (150, (3, 4, 5)), "val": (40, (3, 4, 5)), "test": (40, (3, 4, 5)), "easy": (60, (1, 2, 3)),
         "practice": (30, (2, 3))}


@pytest.fixture(scope="module")
def splits():
    return problems.make_rows()


def everything(splits):
    return list(itertools.chain(*(splits[split] for split in problems.SPLITS)))


def test_a_seed_gives_the_same_rows_and_another_one_others():
    assert problems.make_rows(3, SIZES) == problems.make_rows(3, SIZES)
    assert problems.make_rows(3, SIZES) != problems.make_rows(4, SIZES)


def test_splits_have_their_sizes_and_share_no_question(splits):
    assert {split: len(splits[split]) for split in problems.SPLITS} == {
        split: size for split, (size, _) in problems.SPLITS.items()}
    assert max(Counter(row["question"] for row in everything(splits)).values()) == 1
    assert [row["question"] for row in splits["chains"]] == [row["question"] for row in splits["train"]]
    assert not any("explanation" in row for split in ("train", "val", "test") for row in splits[split])


def test_every_chain_is_right_by_pythons_own_arithmetic(splits):
    for row in splits["chains"] + splits["easy"] + splits["practice"]:
        total = row["start"]
        for line, step in zip(row["explanation"].split("\n"), row["steps"], strict=True):
            left, right = line.split("=")
            assert re.fullmatch(r"\d+[+-]\d+", left) and left.startswith(str(total))
            assert eval(left) == int(right) == total + step
            total = int(right)
        assert str(total) == row["answer"] and row["solution"] == f"\\boxed{{{total}}}"
        assert problems.is_right_chain(row, row["explanation"]) and problems.right_steps(row, row["explanation"]) == 1
        assert not problems.leaks(row, row["explanation"])


def test_counts_stay_in_their_range(splits):
    for row in everything(splits):
        counts = list(itertools.accumulate(row["steps"], initial=row["start"]))
        assert all(1 <= count <= problems.LIMIT for count in counts)
        assert problems.START[0] <= row["start"] <= problems.START[1]
        assert all(problems.CHANGE[0] <= abs(step) <= problems.CHANGE[1] for step in row["steps"])


def test_a_question_holds_its_numbers_in_order_and_no_other(splits):
    for row in everything(splits):
        assert [int(n) for n in re.findall(r"\d+", row["question"])] == [row["start"], *map(abs, row["steps"])]
        assert not re.search(r"[{}]|  |\.\.", row["question"]) and row["question"].endswith("?")


def test_the_words_of_a_step_tell_its_sign():
    """An independent reading: every phrase of every scene is a gain or a loss, and no phrase is both."""
    for scene in problems.SCENES:
        assert len(scene["gain"]) > 3 and len(scene["lose"]) > 3 and not set(scene["gain"]) & set(scene["lose"])
        for phrase in (*scene["gain"], *scene["lose"], *scene["opening"]):
            assert phrase.count("{n}") == 1, phrase


def test_answers_are_hard_to_guess(splits):
    commonest = Counter(row["answer"] for row in splits["test"]).most_common(1)[0][1]
    assert commonest < 0.06 * len(splits["test"])


def test_the_grader_reads_the_solution(splits):
    for row in splits["test"][:5]:
        output = f"{THOUGHT[0]}\n\n1+1=2\n\n{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n{row['solution']}\n\n{SOLUTION[1]}"
        assert grade("gsm8k", output, row)
        assert not grade("gsm8k", output, row | {"answer": str(int(row["answer"]) + 1)})


@pytest.mark.parametrize("text", [
    CHAIN, CHAIN.replace("\n", ", then "), "She has 14 + 7 = 21 pencils.\nNow 21 - 5 = 16. At last 16 + 3 = 19.",
    "7+14=21\n21-5=16\n16+3=19", "14+7-5=16\n16+3=19", "14 + 7 - 5 + 3 = $19",
])
def test_right_chains(text):
    assert problems.is_right_chain(ROW, text)
    assert problems.right_steps(ROW, text) == 1 and not problems.leaks(ROW, text)
    assert not problems.leaks(ROW, text + "\nShe has 19.")


@pytest.mark.parametrize("text", [
    "", "19", "14+7=21\n21-5=16", "14+7=21\n21-5=16\n16+3=18", "14+7=21\n16+3=19", "21-5=16\n14+7=21\n16+3=19",
    "14+7=20\n20-5=16\n16+3=19", CHAIN + "\n19+1=20", "14+5=19", "5-21=16", "14+7=21\n5-21=16\n16+3=19",
])
def test_wrong_chains(text):
    assert not problems.is_right_chain(ROW, text)


def test_the_share_of_right_steps():
    assert problems.right_steps(ROW, CHAIN) == 1
    assert problems.right_steps(ROW, "14 + 7 = 21, so 16+3=19 and 21-5=17") == pytest.approx(2 / 3)
    assert problems.right_steps(ROW, "7+14=21") == pytest.approx(1 / 3)
    assert problems.right_steps(ROW, "") == 0


def test_what_gives_the_answer_away():
    assert problems.leaks(ROW, "The answer is 19.")
    assert problems.leaks(ROW, CHAIN.replace("16+3", "15+4"))
    assert not problems.leaks(ROW, CHAIN) and not problems.leaks(ROW, "14+7=21, so 190 it is")
    assert not problems.leaks(ROW | {"answer": "14"}, "She has 14.")  # in the question, too


def test_gsm8k_rows():
    row = {"question": "How much?", "answer": "She has 14+7=<<14+7=21>>21.\nIn all 2*21=<<2*21=42>>42.\n#### 1,042"}
    made = problems.from_gsm8k(row)
    assert made == {"question": "How much?", "solution": "\\boxed{1042}", "answer": "1042",
                    "explanation": "She has 14+7=21.\nIn all 2*21=42."}
    with pytest.raises(UserError, match="#### number"):
        problems.from_gsm8k({"question": "How much?", "answer": "42"})
    with pytest.raises(UserError, match="question and answer, this one has question, solution"):
        problems.from_gsm8k({"question": "How much?", "solution": "42"})


def test_the_script_writes_rows_that_the_others_read(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "How much?", "answer": "1+1=<<1+1=2>>2\\n#### 2"}\n' * 3)
    call(tmp_path, "data/word_problems.py", "--out", "rows", "--gsm8k", "gsm8k.jsonl", "--easy-rows", 50)
    names = {path.stem for path in (tmp_path / "rows").iterdir()}
    assert names == {"train", "val", "test", "easy", "practice", "chains", "warmup"}
    rows = load_rows(tmp_path / "rows/warmup.jsonl")
    assert len(rows) == 53 and all(row["explanation"] for row in rows)
    assert sum(row["question"] == "How much?" for row in rows) == 3
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_errors_are_one_line(tmp_path):
    (tmp_path / "rows").mkdir()
    for flag, error in ((("--out", "rows"), "rows exists already: delete it, or choose another --out."),
                        (("--gsm8k", "none.jsonl"), "--gsm8k none.jsonl: expected a file of GSM8K's train split.")):
        assert ended(tmp_path, "data/word_problems.py", *flag)[1:] == (f"word_problems.py: error: {error}\n", 2)


def test_real_gsm8k_rows_all_convert():
    for line in data_file("gsm8k_train_1k.jsonl").read_text().splitlines():
        row = problems.from_gsm8k(json.loads(line))
        assert "<<" not in row["explanation"] and "####" not in row["explanation"]
