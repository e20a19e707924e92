"""Graders against adversarial outputs, pass@k against counting, the script on the toy.

python -m pytest tests/test_evaluate.py -v
"""
import itertools
import json
import math
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT, call, data_file

from evaluate import answer_of, gradable, grade, grade_all, over_questions, pass_at_k
from prompts import load_rows
from runs import read_jsonl

THOUGHT, DONE = "<|begin_of_thought|>", "<|end_of_thought|>"
OPEN, CLOSE = "<|begin_of_solution|>", "<|end_of_solution|>"
HANGS = r"\boxed{9^{9^{9}}}"  # math-verify works this number out


def row(**columns):
    return {"where": "rows.jsonl line 1", **columns}


# ---------------------------------------------------------------------------------------------------------
# finding the answer


@pytest.mark.parametrize("output, right", [
    (f"{THOUGHT} s1 x+=y 0 7 {DONE} {OPEN} 0 1 {CLOSE}", True),
    (f"{THOUGHT}\n\ns1\n\n{DONE}\n\n{OPEN}\n\n0 1\n\n{CLOSE}", True),
    (f"{OPEN} 0  1\n{CLOSE}", True),                               # no thought at all, odd blanks
    (f"s1 x+=y {DONE} {OPEN} 0 1 {CLOSE}", True),                  # the thought was opened in the prompt
    (f"{THOUGHT} a {DONE} {OPEN} 0 1 {CLOSE} and so on", True),
    (f"{THOUGHT} {OPEN} 0 1 {CLOSE} {DONE} {OPEN} 7 7 {CLOSE}", False),  # what follows it counts
    (f"{THOUGHT} {OPEN} 7 7 {CLOSE} {DONE} {OPEN} 0 1 {CLOSE}", True),
    (f"{THOUGHT} {OPEN} 0 1 {CLOSE}", False),                      # never stopped thinking
    (f"{THOUGHT} a {DONE} {OPEN} 0 1 {CLOSE} {THOUGHT} b", False),
    (f"{DONE} {OPEN} 0 1", False),                                 # cut off
    (f"{DONE} {CLOSE} 0 1 {OPEN}", False),
    (f"{DONE} 0 1", False),
    (f"{DONE} {OPEN} 0 1 {CLOSE} {OPEN} 0 1 {CLOSE}", False),      # one block, or it could list every answer
    (f"{DONE} {OPEN} 0 0 {OPEN} 0 1 {CLOSE}", False),
    (f"{DONE} {OPEN} 0 1 0 1 {CLOSE}", False),
    (f"{DONE} {OPEN} 0 10 {CLOSE}", False),
    (f"{DONE} {OPEN} {CLOSE}", False),
    (f"{DONE} {OPEN} 01 {CLOSE}", False),
    ("0 1", False),
    ("", False),
])
def test_toy(output, right):
    assert grade("toy", output, row(solution="0 1")) is right


@pytest.mark.parametrize("output, answer", [
    (r"so \boxed{5}", "5"),
    (r"\boxed{4} no, \boxed{5}", "5"),
    (r"\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed {5}", "5"),
    (r"\boxed{x = \boxed{5}}", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace needs no partner
    (r"\boxed{\text{a}\\{b}}", r"\text{a}\\{b}"),          # but after an escaped backslash it is a brace
    ("\\boxed{1\n+\n1}", "1\n+\n1"),
    (r"\boxed{}", None),
    (r"\boxed{ }", None),
    (r"\boxed{5} then \boxed{6", None),                    # cut off while it changed its mind
    (r"\boxed{\frac{1}{2}", None),
    (r"\boxed 5", None),
    ("5", None),
    (rf"{THOUGHT} \boxed{{5}}", None),
    (rf"{THOUGHT} \boxed{{5}} {DONE} so it is", None),
    (rf"{THOUGHT} \boxed{{4}} {DONE}{OPEN} \boxed{{5}} {CLOSE}", "5"),
])
def test_the_last_box(output, answer):
    assert answer_of("math500", output) == answer


@pytest.mark.parametrize("output, answer", [
    (r"I paid 3 for \boxed{72} of 90", "72"),
    ("steps\n#### 72", "72"),
    ("#### 1 is wrong\n#### 72 eggs, not 90", "72"),
    ("She pays $1,234.50.", "1,234.50"),
    ("from 3 to -72", "-72"),
    ("5-3", "3"),
    ("1,2,72", "72"),
    ("10,000,000", "10,000,000"),
    ("it is 72.", "72"),
    ("no number", None),
    (r"it is 7, so \boxed{7", None),  # a box that was cut off is not made good by some number
    ("", None),
])
def test_gsm8k_falls_back_to_a_number(output, answer):
    assert answer_of("gsm8k", output) == answer


# ---------------------------------------------------------------------------------------------------------
# judging it


@pytest.mark.parametrize("gold, answer, right", [
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"\dfrac12", True),
    (r"\frac{1}{2}", "1/2", True),
    (r"\frac{1}{3}", "0.3333", False),
    ("204", "204.0", True),
    ("204", "2040", False),
    ("025", "25", True),
    ("-5", "5", False),
    ("x=5", "5", True),
    (r"90^\circ", "90", True),
    (r"10,\!080", "10,080", True),
    (r"\$32,\!348", "32348", True),
    ("1,-2", "-2, 1", True),
    ("1,-2", "1", False),
    ("2k+2", "2(k+1)", True),
    ("p - q", "q - p", False),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", True),
    ("(-2,1)", "(1,-2)", False),
    ("(3,4]", "(3,4)", False),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{Evelyn}", r"\text{Carla}", False),
    (r"\text{(C)}", "C", True),
    (r"\text{(C)}", "(B)", False),
    ("42", "41, 42", False),       # no credit for naming many
    ("42", r"42 \text{ or } 43", False),
    ("42", r"\text{}", False),
    (r"\frac{3}{56}", r"\frac{3}{5}6", False),
])
def test_equivalence(gold, answer, right):
    assert grade("math500", rf"Therefore \boxed{{{answer}}}.", row(answer=gold)) is right


def test_grading_another_task_is_an_error():
    with pytest.raises(ValueError, match="task 'gpqa': expected one of toy, gsm8k"):
        grade("gpqa", "A", row(answer="A"))
    with pytest.raises(ValueError, match="rows.jsonl line 1 has no answer, which --task aime24 is graded by"):
        grade("aime24", r"\boxed{1}", row(solution="1"))
    with pytest.raises(ValueError, match="expected whole numbers"):
        grade("countdown", r"\boxed{1+2}", row(nums=["1", "2"], target=3))


@pytest.mark.parametrize("gold", ["", " ", r"\text{}"])
def test_a_gold_answer_that_cannot_be_read_is_never_right(gold, capsys):
    bad, good = row(answer=gold), row(answer="5")
    for output in (r"\boxed{\text{}}", r"\boxed{5}"):
        with pytest.raises(ValueError, match="leave that row out"):
            grade("math500", output, bad)
    assert gradable("math500", [bad, good, bad]) == [good]
    assert "2 of 3 rows" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no row has an answer that --task math500 can grade"):
        gradable("math500", [bad])


@pytest.mark.parametrize("output, right", [
    (r"\boxed{(3 + 4) * 2}", True),
    (r"\boxed{(3 + 4) * 2 = 14}", True),
    (r"\boxed{2 \times \left(4 + 3\right)}", True),
    (r"\boxed{(3+4) \cdot 2}", True),
    (r"\boxed{-(-(3 + 4) * 2)}", True),
    (f"{OPEN} ( 3 + 4 ) * 2 {CLOSE}", True),
    (r"\boxed{3 + 4 * 2}", False),           # the right numbers, another value
    (r"\boxed{14}", False),                  # the target itself is none of the numbers
    (r"\boxed{(3 + 4) * 2 * 1}", False),     # a number that was not given
    (r"\boxed{3 + 4 + 3 + 4}", False),       # used twice, and one not at all
    (r"\boxed{2 * 7}", False),
    (r"\boxed{(3 + 4) * 2 - 0}", False),
    (r"\boxed{34 + 2}", False),
    (r"\boxed{2 ** 3 + 4}", False),
    (r"\boxed{(3 + 4) * 2.0}", False),
    (r"\boxed{(3 + 4) * 0x2}", False),
    (r"\boxed{(3 + 4) * 2 # fine}", False),
    (r"\boxed{(3 + 4)(2)}", False),
    (r"\boxed{3 + 4, 2}", False),
    (r"\boxed{(3 + 4) / (2 - 2)}", False),
    (r"\boxed{__import__('os').system('exit')}", False),
    (r"\boxed{(lambda: 14)()}", False),
    (r"\boxed{14 = (3 + 4) * 2}", False),
    (r"\boxed{((((}", False),
    (r"\boxed{}", False),
    (r"\boxed{٣ + 4 * 2}", False),           # digits of other scripts are none here
    (rf"\boxed{{{'(' * 90}3{')' * 90}}}", False),
    (rf"\boxed{{{'-' * 190}3}}", False),
    (rf"\boxed{{{'-' * 10**4}3}}", False),
    (rf"\boxed{{{'9' * 10**5}}}", False),
    (r"\boxed{9**9**9**9**9}", False),
    ("(3 + 4) * 2", False),
])
def test_countdown(output, right):
    assert grade("countdown", output, row(nums=[2, 3, 4], target=14)) is right


def test_countdown_is_exact():
    assert grade("countdown", r"\boxed{\frac{8}{3 - \frac{8}{3}}}", row(nums=[3, 8, 3, 8], target=24))
    assert grade("countdown", r"\boxed{8 / (3 - 8 / 3)}", row(nums=[3, 3, 8, 8], target=24))
    assert not grade("countdown", r"\boxed{7 * (1 / 7)}", row(nums=[1, 7], target=1))  # 7 twice
    assert grade("countdown", r"\boxed{(1 / 49) * 49}", row(nums=[49, 1, 49], target=1))  # not so in floats
    assert not grade("countdown", r"\boxed{7 // 2}", row(nums=[2, 7], target=3))


# ---------------------------------------------------------------------------------------------------------
# the public rows


@pytest.mark.parametrize("task, file, count", [
    ("gsm8k", "gsm8k_train_1k.jsonl", 1000), ("math500", "math500_first250.jsonl", 250),
    ("aime24", "aime24_first15.jsonl", 15)])
def test_every_gold_answer_is_right_for_its_row_and_wrong_for_the_next(task, file, count):
    rows = load_rows(data_file(file))
    outputs = [r["answer"] if task == "gsm8k" else rf"\boxed{{{r['answer']}}}" for r in rows]
    golds = [r["answer"].rpartition("####")[2].strip() for r in rows]
    next_is_the_same = [a == b or {a, b} == {"5", "x=5"} for a, b in zip(golds, golds[1:], strict=False)]
    grades = grade_all(task, outputs + outputs[1:], rows + rows[:-1], seconds=30)
    assert grades == [True] * count + next_is_the_same


def test_countdown_rows():
    """Each row is searched for a solution, which must be right there, and only there."""
    rows = load_rows(data_file("countdown_sample.jsonl"), solved=False)
    outputs = [rf"\boxed{{{solution(r['nums'], r['target'])}}}" for r in rows]
    assert [grade("countdown", *pair) for pair in zip(outputs, rows, strict=True)] == [True] * 128
    assert not any(grade("countdown", *pair) for pair in zip(outputs, rows[1:], strict=False))


def solution(numbers, target):
    for (a, b, c), p, q in itertools.product(itertools.permutations(numbers), "+-*/", "+-*/"):
        for text in (f"({a} {p} {b}) {q} {c}", f"{a} {p} ({b} {q} {c})"):
            try:
                if abs(eval(text) - target) < 1e-9:  # our own text
                    return text
            except ZeroDivisionError:
                pass


# ---------------------------------------------------------------------------------------------------------
# in processes


def test_an_answer_that_hangs_the_grader_is_given_up_alone():
    rows = [row(answer="5")] * 7
    outputs = [r"\boxed{5}", HANGS, r"\boxed{5}", r"\boxed{6}", HANGS, r"\boxed{5.0}", "ü\u2028\n\r\n\x00"]
    started = time.monotonic()
    grades = grade_all("math500", outputs, rows, seconds=1.0)
    assert grades == [True, None, True, False, None, True, False]
    assert time.monotonic() - started < 20


def test_grades_come_in_order_whatever_the_workers():
    rows = [row(solution=str(i)) for i in range(11)]
    outputs = [f"{OPEN} {i if i % 3 else 'x'} {CLOSE}" for i in range(11)]
    want = [bool(i % 3) for i in range(11)]
    for workers in (1, 2, 3, 16):
        assert grade_all("toy", outputs, rows, workers=workers) == want
    assert grade_all("toy", [], []) == []


def test_a_bad_row_is_an_error_in_a_process_too():
    with pytest.raises(ValueError, match="rows.jsonl line 1 has no answer"):
        grade_all("gsm8k", [r"\boxed{1}"] * 3, [row(answer="1"), row(solution="1"), row(answer="1")])
    with pytest.raises(RuntimeError, match="traceback"):
        grade_all("toy", [None], [row(solution="1")])


def test_importing_the_grader_is_quick():
    """rl_student and every grading process import this file: no torch, no sympy, no parser."""
    code = "import sys, evaluate; print([m for m in ('torch', 'transformers', 'sympy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------
# counting


def test_pass_at_k():
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c > n or k > n:
            with pytest.raises(ValueError, match="expected 0 <= c <= n and 1 <= k <= n"):
                pass_at_k(n, c, k)
            continue
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(statistics.fmean(map(any, draws)))
        product = 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1)) if n - c >= k else 1.0
        assert pass_at_k(n, c, k) == pytest.approx(product)
    assert pass_at_k(5000, 1, 5000) == 1.0 and pass_at_k(5000, 0, 4999) == 0.0
    assert pass_at_k(5000, 17, 1) == pytest.approx(17 / 5000)


def test_standard_error():
    """For yes and no it is the binomial one (with n - 1); a single question has none."""
    share = over_questions([1, 1, 1, 0])
    assert share == {"mean": 0.75, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 3))}
    assert over_questions([1]) == {"mean": 1, "standard_error": None}


# ---------------------------------------------------------------------------------------------------------
# the script


def test_script(toy, tmp_path, capsys):
    """Numbers are those of the samples it kept, and they don't change when it is called again."""
    flags = ("--limit", 5, "--max-new-tokens", 12, "--batch-size", 7)
    more = ("--samples", 4, "--temperature", 1, "--seed", 3, "--out", tmp_path)
    call(toy, "evaluate.py", "--model", "toy", "runs/toy", *flags, *more)
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "toy/eval_toy.json").read_text())
    samples = read_jsonl(tmp_path / "toy/eval_toy_samples.jsonl")
    assert samples == read_jsonl(tmp_path / "runs_toy/eval_toy_samples.jsonl") and len(samples) == 20
    assert [s["where"] for s in samples[::4]] == [s["where"] for s in samples[3::4]]
    rows = load_rows(toy / "runs/toy/test.jsonl", limit=5)
    for i, sample in enumerate(samples):
        assert sample["grade"] == grade("toy", sample["output"], rows[i // 4])
    right = [sum(s["grade"] for s in samples[at : at + 4]) for at in range(0, 20, 4)]
    assert result["questions"] == 5 and result["exact_match"]["mean"] == statistics.fmean(right) / 4
    assert result["pass_at"]["4"]["mean"] == statistics.fmean(map(bool, right))
    assert list(result["pass_at"]) == ["1", "2", "4"]
    assert result["truncated"] == statistics.fmean(not s["finished"] for s in samples)
    assert result["length"] == statistics.fmean(s["length"] for s in samples) <= 12
    assert result["flags"]["seed"] == 3 and result["timeouts"] == 0
    for word in ("exact match", "±", "pass@2", "pass@4", "truncated", "length", result["prompt_hash"]):
        assert word in shown

    call(toy, "evaluate.py", "--model", "toy", *flags)
    greedy = read_jsonl(toy / "runs/toy/eval_toy_samples.jsonl")  # beside the model
    assert len(greedy) == 5 and "pass@" not in capsys.readouterr().out


@pytest.mark.parametrize("flags, complaint", [
    (("--samples", 3), "--temperature 0 are all the same: pass 0.6, say"),
    (("--task", "gsm8k"), "--task gsm8k needs --data, rows with answer"),
    (("--task", "gpqa"), "invalid choice: 'gpqa'"),
    (("--samples", 0), "got 0, expected at least 1"),
    (("--temperature", -1), "got -1, expected at least 0"),
    (("--model", "runs/nobody"), "runs/nobody is no folder"),
    (("--model", "toy", "--max-new-tokens", 10**6), "context"),
])
def test_script_refuses(toy, capsys, flags, complaint):
    with pytest.raises((SystemExit, ValueError, FileNotFoundError)) as error:
        call(toy, "evaluate.py", *flags)
    assert complaint in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("task, file, grader", [
    ("gsm8k", "gsm8k_train_1k.jsonl", "math-verify"), ("countdown", "countdown_sample.jsonl", "fractions")])
def test_script_on_public_rows(tmp_path, capsys, tiny_model, qwen_tokenizer, task, file, grader):
    tiny_model(len(qwen_tokenizer)).save_pretrained(tmp_path / "model")
    qwen_tokenizer.save_pretrained(tmp_path / "model")
    call(tmp_path, "evaluate.py", "--task", task, "--data", data_file(file), "--model", tmp_path / "model",
         "--limit", 3, "--max-new-tokens", 8)
    result = json.loads((tmp_path / f"model/eval_{task}.json").read_text())
    assert grader in result["grader"] and grader in capsys.readouterr().out
    assert result["questions"] == 3 and result["truncated"] == 1.0 and result["length"] == 8
