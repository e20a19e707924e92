"""Graders against adversarial outputs, pass@k and what RL did against counting, the script on the toy.

python -m pytest tests/test_evaluate.py -v
"""
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time

import pytest
from conftest import ROOT, call, data_file, run_script
from prompts import Prompts, load_rows
from runs import read_jsonl

from evaluate import (
    answer_of,
    compare,
    gradable,
    grade,
    grade_all,
    over_questions,
    pass_at_k,
    pass_curve,
    read_alike,
    solved_sets,
)

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


def test_pass_curve():
    """Powers of two, and n itself: two questions with 1 and 3 right of 6."""
    curve = pass_curve([[0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 1]])
    assert list(curve) == [1, 2, 4, 6]
    assert curve[1]["mean"] == pytest.approx((1 / 6 + 3 / 6) / 2)
    assert curve[2]["mean"] == pytest.approx((1 / 3 + 12 / 15) / 2)  # pairs with a right one, of 15
    assert curve[4]["mean"] == pytest.approx((10 / 15 + 1) / 2)
    assert curve[6]["mean"] == 1
    assert list(pass_curve([[1]])) == [1] and list(pass_curve([[1] * 8])) == [1, 2, 4, 8]


# ---------------------------------------------------------------------------------------------------------
# before and after RL

BEFORE, AFTER = ([[int(draw) for draw in row] for row in table.split()] for table in (
    "1000 1111 0010 0100 0001 0000 0001 0000",
    "1000 0111 1000 0111 1111 1000 0111 0000",
))


def test_solved_sets():
    """By hand. Before RL only the fourth draw of question 4 is right: a gain by three draws, none by four."""
    assert solved_sets(BEFORE, AFTER, 3) == {
        "solved_before": {0, 1}, "within_reach": {2, 3}, "out_of_reach": {4, 5, 6, 7},
        "solved_after": {0, 2, 4, 5}, "retained": {0}, "regression": {1},
        "self_distillation": {2}, "capability_gain": {4, 5}, "capability_gain_all_draws": {5},
    }
    whole = solved_sets(BEFORE, AFTER, 4)
    assert whole == solved_sets(BEFORE, AFTER, 16)
    assert whole["self_distillation"] == {2, 4} and whole["capability_gain"] == {5}
    only_one = solved_sets(BEFORE, AFTER, 1)
    assert only_one["within_reach"] == set() and only_one["capability_gain"] == {2, 4, 5}


def test_the_split_adds_up():
    """On random tables, against counting question by question as the definition is read out."""
    rng = random.Random(0)
    for _ in range(300):
        n, m, k = rng.randint(1, 20), rng.randint(1, 30), rng.randint(1, 20)
        before, after = ([[int(rng.random() < p) for _ in range(n)] for _ in range(m)] for p in (0.15, 0.4))
        counts = dict.fromkeys(solved_sets(before, after, k), 0)
        for was, now in zip(before, after, strict=True):
            reached = "solved_before" if was[0] else "within_reach" if 1 in was[1:k] else "out_of_reach"
            counts[reached] += 1
            counts["solved_after"] += now[0]
            counts["retained"] += was[0] and now[0]
            counts["regression"] += was[0] and not now[0]
            counts["self_distillation"] += reached == "within_reach" and now[0]
            counts["capability_gain"] += reached == "out_of_reach" and now[0]
            counts["capability_gain_all_draws"] += sum(was) == 0 and now[0]
        split = compare({"before": before, "after": after}, k)["split"]["after"]
        share = {name: split[name]["mean"] for name in split}
        assert share == pytest.approx({name: count / m for name, count in counts.items()})
        gain = statistics.fmean(row[0] for row in after) - statistics.fmean(row[0] for row in before)
        parts = share["self_distillation"] + share["capability_gain"] - share["regression"]
        assert parts == pytest.approx(gain, abs=1e-12)


def test_compare():
    """Sixteen draws decide, the first of them alone says solved; all do where there are fewer."""
    late = [[0] * 16 + [1] * 16]  # its first right draw is the seventeenth
    in_time = [[0] * 15 + [1] * 17]
    for before, name in ((late, "capability_gain"), (in_time, "self_distillation")):
        report = compare({"before": before, "after": [[1] * 32]})
        assert report["reach"] == 16 and report["split"]["after"][name]["mean"] == 1
        assert report["split"]["after"]["capability_gain_all_draws"]["mean"] == 0
    report = compare({"before": BEFORE, "after": AFTER, "floor": BEFORE, "after, hinted": AFTER})
    assert (report["questions"], report["samples"], report["reach"]) == (8, 4, 4)
    assert list(report["pass_at"]) == ["before", "after", "floor", "after, hinted"]
    assert report["pass_at"]["after"] == pass_curve(AFTER) != report["pass_at"]["floor"]
    assert list(report["split"]) == ["after", "floor"]
    two_of_eight = over_questions([0, 0, 1, 0, 1, 0, 0, 0])
    assert report["split"]["after"]["self_distillation"] == two_of_eight | {"questions": [2, 4]}
    assert report["split"]["floor"]["retained"]["questions"] == [0, 1]  # the same draws: nothing else moves
    for name in ("self_distillation", "capability_gain", "regression"):
        assert report["split"]["floor"][name]["mean"] == 0


def keep(folder, draws, name="eval_toy", **flags):
    """An evaluation's two files, of questions 0, 1, ... with these draws."""
    folder.mkdir(exist_ok=True)
    flags = {"samples": len(draws[0]), "temperature": 1.0, "max_new_tokens": 64, "seed": 0, **flags}
    (folder / f"{name}.json").write_text(json.dumps({"flags": flags}))
    samples = [{"question": str(i), "gold": {"solution": "1"}, "grade": [False, True, None][grade]}
               for i, row in enumerate(draws) for grade in row]
    (folder / f"{name}_samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def test_script_compares(tmp_path, capsys):
    """Grades that took too long (2 stands for None) are wrong; no model is near."""
    keep(tmp_path / "before", BEFORE), keep(tmp_path / "after", [[2, *AFTER[0][1:]], *AFTER[1:]])
    keep(tmp_path / "other", [[0] * 4, *BEFORE[1:]], seed=1)
    for folder, table in (("before", AFTER), ("after", BEFORE)):
        keep(tmp_path / folder, table, "eval_toy_hinted")
    with pytest.raises(SystemExit) as end:
        call(tmp_path, "evaluate.py", "--compare", "before", "after", "--floor", "other", "--hinted")
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "after/compare_toy.json").read_text())
    assert not end.value.code and report["floor"] == "other" and report["before"] == "before"
    assert list(report["pass_at"]) == ["before", "after", "floor", "before, hinted", "after, hinted"]
    assert report["pass_at"]["before, hinted"]["4"]["mean"] == statistics.fmean(map(any, AFTER))
    assert report["split"]["after"]["regression"]["questions"] == [0, 1]
    assert report["split"]["floor"]["regression"] == over_questions([1] + [0] * 7) | {"questions": [0]}
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "pass@k 1 2 4" in lines and "before against after floor" in lines
    assert "self distillation 25.0 ± 16.4 % 0.0 ± 0.0 %" in lines
    assert "8 questions | solved: by the first draw | within reach: by all 4 | floor: other" in lines
    with pytest.raises(SystemExit):
        call(tmp_path, "evaluate.py", "--compare", "before", "after")
    assert "floor" not in json.loads((tmp_path / "after/compare_toy.json").read_text())["split"]


@pytest.mark.parametrize("change, complaint", [
    (dict(draws=[row[:2] for row in AFTER]), "differ in samples"),
    (dict(draws=AFTER[:-1]), "differ in questions"),
    (dict(draws=AFTER, temperature=0.6), "differ in temperature"),
    (dict(draws=AFTER, max_new_tokens=32), "differ in max_new_tokens"),
])
def test_evaluations_that_were_not_asked_alike_are_refused(tmp_path, change, complaint):
    paths = {"before": keep(tmp_path / "before", BEFORE), "after": keep(tmp_path / "after", **change)}
    with pytest.raises(ValueError, match=complaint) as error:
        read_alike({label: folder / "eval_toy.json" for label, folder in paths.items()})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_other_questions_and_the_same_seed_are_refused(tmp_path):
    before, after = (keep(tmp_path / name, BEFORE) / "eval_toy.json" for name in ("before", "after"))
    assert read_alike({"before": before, "after": after})["after"] == [list(map(bool, row)) for row in BEFORE]
    with pytest.raises(ValueError, match="has the seed of .*before"):
        read_alike({"before": before, "floor": after})
    samples = after.with_name("eval_toy_samples.jsonl")
    samples.write_text(samples.read_text().replace('"7"', '"8"'))  # as many, but one is another
    with pytest.raises(ValueError, match="differ in questions"):
        read_alike({"before": before, "after": after})
    with pytest.raises(FileNotFoundError, match="eval_gsm8k.json is missing: evaluate first"):
        read_alike({"before": before.with_name("eval_gsm8k.json")})


def test_refusals_are_one_line(tmp_path):
    keep(tmp_path / "before", BEFORE), keep(tmp_path / "after", AFTER[1:])
    done = run_script(tmp_path, "evaluate.py", "--compare", "before", "after", check=False)
    assert done.returncode == 1 and not done.stdout
    [line] = done.stderr.splitlines()
    assert "evaluate.py: after/eval_toy.json and before/eval_toy.json differ in questions" in line
    assert not (tmp_path / "after/compare_toy.json").exists()


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


def test_script_hinted(toy, tmp_path, capsys, monkeypatch):
    """The prompts have the hint, and what comes of it lies beside the plain evaluation."""
    import models

    prompts, seen = Prompts(models.load_tokenizer(toy / "runs/toy")), []
    generate = models.generate
    monkeypatch.setattr(models, "generate", lambda model, tokenizer, asked, **settings:
                        seen.extend(asked) or generate(model, tokenizer, asked, **settings))
    flags = ("--model", "toy", "--limit", 3, "--samples", 2, "--temperature", 1, "--max-new-tokens", 8)
    for hinted in ([], ["--hinted"]):
        call(toy, "evaluate.py", *flags, *hinted, "--out", tmp_path)
    rows = [row for row in load_rows(toy / "runs/toy/test.jsonl", limit=3) for _ in range(2)]
    assert seen == [*map(prompts.question, rows), *map(prompts.hinted, rows)]
    kept = [json.loads((tmp_path / f"toy/eval_toy{end}.json").read_text()) for end in ("", "_hinted")]
    assert [result["hinted"] for result in kept] == [False, True]
    assert len(read_jsonl(tmp_path / "toy/eval_toy_hinted_samples.jsonl")) == 6
    plain_table, hinted_table = capsys.readouterr().out.split("toy/eval_toy_hinted.json")
    assert "toy, hinted" in hinted_table and "toy, hinted" not in plain_table
    (tmp_path / "rows.jsonl").write_text('{"question": "1", "solution": "2"}\n')
    with pytest.raises(ValueError, match='has no "hint" .columns found: question'):
        call(toy, "evaluate.py", *flags, "--hinted", "--data", tmp_path / "rows.jsonl")


@pytest.mark.parametrize("flags, complaint", [
    (("--samples", 3), "--temperature 0 are all the same: pass 0.6, say"),
    (("--task", "gsm8k"), "--task gsm8k needs --data, rows with answer"),
    (("--task", "gpqa"), "invalid choice: 'gpqa'"),
    (("--floor", "runs/toy"), "--floor does nothing without --compare"),
    (("--task", "gsm8k", "--compare", "a", "b"), "a/eval_gsm8k.json is missing: evaluate first"),
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
