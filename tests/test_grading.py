"""Graders against adversarial outputs and gold answers, pass@k and comparisons against counting.

python -m pytest tests/test_grading.py -v
"""
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import time

from rlt.answers import opened_thought, same_text, split_thought
from rlt.errors import UserError
from rlt.evaluations import read_evaluations
from rlt.grading import (
    answer_of,
    compare,
    gold_answer,
    gradable,
    grade,
    grade_all,
    over_questions,
    pass_at_k,
    pass_curve,
    solved_sets,
    task_of,
    with_choices,
)

import pytest
from conftest import ROOT, data_file

THOUGHT, DONE = "<|begin_of_thought|>", "<|end_of_thought|>"
OPEN, CLOSE = "<|begin_of_solution|>", "<|end_of_solution|>"
HANGS = r"\boxed{9^{9^{9}}}"  # math-verify works this number out


def row(**columns):
    return {"where": "rows.jsonl line 1", **columns}


def public_rows(file):
    lines = data_file(file).read_text().splitlines()
    return [row(**json.loads(line)) for line in lines]


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


@pytest.mark.parametrize("opening, closing", [
    ("<deliberation>", "</deliberation>"), ("<internal>", "</internal>"), ("<cot>", "</cot>"),
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"), ("<reflection>", "</reflection>"), ("<analysis>", "</analysis>"),
    ("<scratchpad>", "</scratchpad>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("<Think>", "</THINK>"), ("<chain-of-thought>", "</chain-of-thought>"), ("<inner_reasoning>", "</inner_reasoning>"),
    ("<|thinking|>", "<|/thinking|>"), ("<|thought_start|>", "<|thought_end|>"), ("<think effort='low'>", "</think>"),
    ("<rationale>", "</rationale>"), ("<longcat_think>", "</longcat_think>"), ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("◁think▷", "◁/think▷"), ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|startofthought|>", "<|endofthought|>"), ("[unused16]", "[unused17]"), ("<think_on><think>", "</think>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    (THOUGHT, DONE)])
def test_thoughts_of_any_model_are_no_answer(opening, closing):
    for task in ("math500", "gsm8k", "countdown", "gpqa"):
        for output, answer in (
            (rf"{opening}maybe \boxed{{72}}, wait", None),                   # cut off
            (rf"{opening}maybe \boxed{{72}}{closing} so", None),
            (rf"{opening}maybe \boxed{{72}}{closing} \boxed{{7}}", "7"),
            (rf"maybe \boxed{{72}}{closing} \boxed{{7}}", "7"),              # the prompt opened the thought
            (rf"{opening}a{closing} \boxed{{7}} {opening} \boxed{{72}}", None),  # it thinks again
        ):
            assert answer_of(task, output) == answer, (task, output)


@pytest.mark.parametrize("switch", ["<think_on>", "<think_off>", "<no_think>", "<nothink>", "<|no_thinking|>"])
def test_a_switch_opens_no_thought(switch):
    assert answer_of("math500", rf"{switch}\boxed{{7}}") == "7"
    assert answer_of("math500", rf"{switch}<think>maybe \boxed{{72}}, wait") is None
    assert opened_thought(f"assistant {switch}\n") == ""


def test_a_thought_within_a_thought_does_not_end_it():
    inner = r"<thinking>a <reflection>b</reflection> \boxed{72}"
    assert answer_of("math500", inner) is None
    assert answer_of("math500", inner + r"</thinking> \boxed{7}") == "7"


def test_a_thought_that_the_prompt_opened():
    """DeepSeek-R1's template ends in <think>: only together with it a cut off output shows that it is thinking."""
    assert opened_thought("<|Assistant|><think>\n") == "<think>"
    assert opened_thought("<|im_start|>assistant\n<THINK>") == "<THINK>"
    assert opened_thought("use <think> tags <|im_start|>assistant\n") == ""
    assert opened_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opened_thought(f"assistant {THOUGHT}\n\n") == THOUGHT
    assert opened_thought(f"assistant {DONE}\n\n") == opened_thought("") == ""
    assert opened_thought("<|start|>assistant<|channel|>analysis") == "<|channel|>analysis"
    assert opened_thought("<|start|>assistant<|channel|>analysis<|message|>") == "<|channel|>analysis<|message|>"
    assert answer_of("math500", opened_thought("<think>\n") + r"maybe \boxed{72}, wait") is None


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
    (r"She pays $9{,}500$.", "9500"),
    (r"in all $1{,}234{,}567.50", "1234567.50"),
    (r"in all \$10,\!080", "10080"),
    (r"in all $12\,345$", "12345"),
    ("in all 9\u202f500 or 9\u00a0500", "9500"),
    ("a change of \u22123", "-3"),
    ("a change of -$3", "-3"),
    (r"a change of \u2212\$9,500".replace(r"\u2212", "\u2212"), "-9,500"),
    ("a half, .5", ".5"),
    ("a loss of \u2212.5", "-.5"),
    ("$.75 each", ".75"),
    ("and so ...5", "5"),
    ("see No.5", "5"),
    ("10-3", "3"),
    ("10\u22123", "3"),
    ("the point (1,\u00a0200)", "200"),
    (r"the point $(1,\,200)$", "200"),
    ("#### \u2212$9{,}500 and 7 more", "-9500"),
    ("a change of \u20133", "-3"),                         # an en dash
    ("from 10\u20133", "3"),
    ("in all \uff19\uff0c\uff15\uff10\uff10", "9,500"),      # full-width characters
    (r"in all 9~500 or 9{\,}500", "9500"),
    ("the ratio is 1/2.", "1/2"),
    (r"the ratio is $\frac{1}{2}$", "1/2"),
    ("48/2 = 24", "24"),
    ("half of 48 is 48/2", "48/2"),
    ("in all 9'500 or 9\u2019500", "9500"),                # as the Swiss write it
    (r"= 3\frac{1}{2}", "7/2"),
    ("3 1/2 cups", "7/2"),
    (r"-\frac{1}{2}", "-1/2"),
    ("that is 1.5e3", "1.5e3"),
    ("1e", "1"),
    ("The answer is 3.5e-3", "3.5e-3"),
    ("that is -1.5E-12.", "-1.5E-12"),
    ("#### Step 1\n5+3=8\n#### Step 2: total\nSo the total is 18.", "18"),  # headings in Markdown
    ("#### 1. Cost\n5+3=8\n#### 2) Total\nSo the total is 18.", "18"),
    ("####  1. Cost\nIt is 18.", "18"),
    ("#### 18\n#### Why\nThere are 3.", "18"),
    ("#### **18** and not 3", "18"),
    ("####\n-$18 and not 3", "-18"),
    ("#### 18. \n", "18"),
    ("#### 12.50 and not 3", "12.50"),
])
def test_gsm8k_falls_back_to_a_number(output, answer):
    assert answer_of("gsm8k", output) == answer


@pytest.mark.parametrize("piece", [
    "<", "<think", "<think ", "<|", "think-", "<think" * 3 + "-", r"\boxed", r"\boxed{", r"\boxed {", "{", "\\", "1,",
    "1.", "-1", "9" * 99, "{,}", r"\!", "#", "#### ", "#### 1. a",
    "1e-", "answer is ", "answer: (", OPEN, THOUGHT, "[THINK]", "\ufeff",
    "a<reason>", "<think>a</think>"])
def test_finding_an_answer_takes_linear_time(piece):
    """It has no time limit: a text of 200,000 characters takes a moment, whatever it repeats."""
    for task in ("toy", "math500", "gsm8k", "gpqa", "countdown"):
        started = time.process_time()
        for head in ("", "<", "<think ", "answer is", r"\boxed{"):
            answer_of(task, head + piece * (200_000 // len(piece)))
        assert time.process_time() - started < 4, task
    started = time.process_time()
    split_thought(piece * (200_000 // len(piece)))
    assert time.process_time() - started < 1


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
    with pytest.raises(UserError, match="task 'mmlu': expected one of toy, gsm8k"):
        grade("mmlu", "A", row(answer="A"))
    with pytest.raises(UserError, match="rows.jsonl line 1 has no answer that --task aime24 can be graded by"):
        grade("aime24", r"\boxed{1}", row(solution="in words"))


@pytest.mark.parametrize("gold", ["", " ", r"\text{}"])
def test_a_gold_answer_that_cannot_be_read_is_never_right(gold, graded_here, capsys):
    bad, good = row(answer=gold), row(answer="5")
    for output in (r"\boxed{\text{}}", r"\boxed{5}"):
        with pytest.raises(UserError, match="leave that row out"):
            grade("math500", output, bad)
    assert gradable("math500", [bad, good, bad]) == [good]
    assert "2 of 3 rows" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row has an answer that --task math500 can grade.*The first: rows.jsonl"):
        gradable("math500", [bad])


@pytest.mark.parametrize("task, gold, answer", [
    ("gsm8k", 72, "72"), ("gsm8k", 72.0, "72"), ("gsm8k", "72", "72"), ("gsm8k", "steps\n#### 72", "72"),
    ("gsm8k", "#### -1,234", "-1234"), ("gsm8k", ["72"], "72"), ("gsm8k", -7, "-7"), ("gsm8k", 0, "0"),
    ("math500", 0.0001, "10^{-4}"), ("math500", "0.00001", "10^{-5}"), ("math500", 1e16, "10^{16}"),
    ("math500", "1e+16", "10^{16}"), ("math500", 1e16, "1e16"), ("math500", "0.0000", "0"),
    ("math500", 0.5, r"\frac{1}{2}"), ("aime24", 33, "33"), ("aime25", 70.0, "70"), ("aime24", "025", "25"),
    ("math500", r"2e-1", "2e-1"), ("math500", "10000", "10^4"), ("gsm8k", "0.0035", "3.5e-3"),
    ("gsm8k", 0.0035, "3.5E-3"), ("gsm8k", "#### Step 1\n5+3=8\n#### 72", "72"),
])
def test_gold_of_any_type_of_number(task, gold, answer):
    for text, right in ((answer, True), ("31", False), (r"\text{nan}", False)):
        assert grade(task, rf"\boxed{{{text}}}", row(answer=gold)) is right


NO_ANSWER = [None, math.nan, math.inf, "", " ", "NaN", "nan", "None", "null", True, [], ["1", "2"], {"value": 1},
             1e-05, "1e-05", [1e-05], -2.5e-07]  # the last four: 0.0000104 would be right, and 0


@pytest.mark.parametrize("task, golds", [
    ("gsm8k", [*NO_ANSWER, "####", "steps ####  "]), ("math500", NO_ANSWER), ("aime24", NO_ANSWER)])
def test_gold_that_no_answer_can_equal_is_left_out(task, golds, graded_here, capsys):
    good, bad = row(answer="5"), [row(), *(row(answer=gold) for gold in golds)]
    for one in bad:
        with pytest.raises(UserError, match="rows.jsonl line 1 .*leave that row out"):
            grade(task, r"\boxed{5}", one)
    assert gradable(task, [*bad, good]) == [good]
    assert f"{len(bad)} of {len(bad) + 1} rows have no answer that the grader can read" in capsys.readouterr().out


@pytest.mark.parametrize("nums, target, right", [
    ([2, 3, 4], 14, True), ([2.0, 3.0, 4.0], 14.0, True), (["2", "3", "4"], "14", True), ([2, 3, 4], 14.5, None),
    ([2, 3, None], 14, None), ([2, 3, 4], None, None), ([2, 3, 4], math.nan, None), ([], 14, None), (None, 14, None),
    ("2, 3, 4", 14, None), ([2, 3, True], 14, None), ([2, 3, "four"], 14, None), ([2, 3, 4], 15, False)])
def test_countdown_numbers_of_any_type(nums, target, right):
    question = row(nums=nums, target=target)
    if right is None:
        with pytest.raises(UserError, match="expected whole numbers"):
            grade("countdown", r"\boxed{(3 + 4) * 2}", question)
        return
    assert grade("countdown", r"\boxed{(3 + 4) * 2}", question) is right
    assert grade("countdown", r"\boxed{(3 + 4) * 2.0}", question) is False


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
    (r"\boxed{(3 + 4)(2)}", True),            # a product
    (r"\boxed{2(3 + 4)}", True),
    (r"\boxed{(3 + 4) 2}", True),
    (r"\boxed{2 \left(3 + 4\right)}", True),
    (r"\boxed{3 4 2}", False),
    (r"\boxed{2\,(3 + 4)}", True),
    (r"\boxed{(3 + 4)\;\ast\;2}", True),
    (r"\boxed{(3\:+\:4)\!\cdot\!2}", True),
    (r"\boxed{(3 + 4) \quad\times 2}", True),
    (r"\boxed{\displaystyle(3 + 4)\times2}", True),
    ("\\boxed{(3 + 4) \u22c5 2}", True),
    ("\\boxed{(3 + 4) \u00b7 2}", True),
    ("\\boxed{(3 + 4) \u2217 2}", True),
    ("\\boxed{(3\u00a0+\u00a04)\u00a0*\u00a02}", True),
    ("\\boxed{(3\u2009+ 4)\u202f* 2}", True),
    ("\\boxed{(3 + 4)\n* 2}", True),
    (r"\boxed{[3 + 4] * 2}", True),
    (r"\boxed{\{3 + 4\} * 2}", True),
    (r"\boxed{\bigl(3 + 4\bigr) * 2}", True),
    (r"\boxed{\Big[3 + 4\Bigg] * 2}", True),
    (r"\boxed{\left[ 3 + 4 \right] \times 2}", True),
    (r"\boxed{$(3 + 4) * 2$}", True),
    (r"\boxed{\((3 + 4) * 2\)}", True),
    (r"\boxed{{(3 + 4)} \times {2}}", True),
    (r"\boxed{(3 + 4] * 2}", True),           # brackets of any kind are brackets
    (r"\boxed{\left\lbrace 3 + 4 \right\rbrace \mathbin{\star} 2}", True),
    ("\\boxed{\uff08\uff13\uff0b\uff14\uff09\u2715\uff12}", True),
    ("\\boxed{(3\u200b + 4)\ufeff \u2022 2}", True),
    (r"\boxed{\text{(3 + 4) * 2}}", True),
    (r"\boxed{\mathbf{(3 + 4) * 2}}", True),
    (r"\boxed{(+3 + 4) * 2}", True),
    (r"\boxed{(3 + 4) * 2 = 14 \text{ (the target)}}", True),
    (r"\boxed{(3 + 4) * 2 = 14.\;\checkmark}", True),
    (r"\boxed{(3 + 4) * 2 = 15 \text{, almost}}", False),
    (r"\boxed{(3 + 4) * 2 \text{ or } 14}", False),
    ("\\boxed{3\u00b2 + 4 + 2}", False),      # an exponent is none of the numbers
    (r"\boxed{(3 + 4) * 2 = 14 = 2 * 7}", True),
    (r"\boxed{(3 + 4) * 2 = 14.0}", True),
    (r"\boxed{(3 + 4) * 2 = 15}", False),     # what it claims is false
    (r"\boxed{(3 + 4) * 2 = 14 = 15}", False),
    (r"\boxed{(3 + 4) * 2 = 7}", False),
    (r"\boxed{(3 + 4) * 2 = }", False),
    (r"\boxed{(3 + 4) * 2 = x}", False),
    (r"\boxed{(3 + 4) * 2 \neq 14}", False),
    (r"\boxed{3 + 4, 2}", False),
    (r"\boxed{(3 + 4) x 2}", True),
    (r"\boxed{(3 + 4) \hspace{1mm}\* \thinspace 2}", True),
    ("\\boxed{2\u2062(3 + 4)}", True),
    (r"\boxed{(3 + 4) * 2 \approx 14}", True),
    (r"\boxed{(3 + 4) * 2 == 13}", False),
    (r"\boxed{(3 + 4) * 2 = x }", False),
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
    assert grade("countdown", r"\boxed{\frac83 \cdot 3}", row(nums=[8, 3, 3], target=8))
    assert grade("countdown", r"\boxed{\cfrac{8}{2}(3)}", row(nums=[8, 2, 3], target=12))
    for target in (1, 3):  # 2 times a half, or 5/2: neither is accepted
        assert not grade("countdown", r"\boxed{2\frac{1}{2}}", row(nums=[2, 1, 2], target=target))


def test_countdown_states_no_falsehood():
    question = row(nums=[30, 100, 93], target=23)
    assert grade("countdown", r"\boxed{30 + 93 - 100}", question)
    assert grade("countdown", r"\boxed{30 + 93 - 100 = 23}", question)
    assert not grade("countdown", r"\boxed{30 + 93 - 100 = 24}", question)


GPQA = {"Correct Answer": "10^-4 eV", "Incorrect Answer 1": "10^-11 eV", "Incorrect Answer 2": " 10^-8 eV\n",
        "Incorrect Answer 3": "10^-9 eV"}


def test_choices_have_an_order_of_their_own():
    """It depends on the seed and the question alone: not on other rows, and not on how often one asks."""
    rows = [row(question=f"Which energy, {i}?", **GPQA) for i in range(400)]
    lettered = gradable("gpqa", rows)
    assert gradable("gpqa", rows[7:9]) == lettered[7:9] and gradable("gpqa", lettered) == lettered
    assert gradable("gpqa", rows, seed=1) != lettered
    for one in lettered[:20]:
        assert sorted(one["choices"]) == sorted(text.strip() for text in GPQA.values())
        right = "ABCD".index(one["answer"])
        assert one["choices"][right] == "10^-4 eV"
        assert f"{one['answer']}) 10^-4 eV" in one["question"] and "\\boxed{}" in one["question"]
        assert grade("gpqa", rf"\boxed{{{one['answer']}}}", one)
    counts = [sum(one["answer"] == letter for one in lettered) for letter in "ABCD"]
    assert min(counts) > 70  # 100 expected, standard deviation 9
    orders = {tuple(one["choices"]) for one in lettered}
    assert len(orders) == 24
    lower = {name.lower(): text for name, text in GPQA.items()}
    for columns in (lower, {**lower, "choices": None}, {f"{name} ": text for name, text in GPQA.items()}):
        assert gradable("gpqa", [row(question="Which energy, 0?", **columns)])[0]["choices"] == lettered[0]["choices"]
    ready = row(question="Which? A) 1 B) 2", answer="B", **dict.fromkeys(GPQA))
    assert gradable("gpqa", [ready]) == [ready]
    with pytest.raises(UserError, match="has no Incorrect Answer 2"):
        with_choices(row(question="?", **GPQA | {"Incorrect Answer 2": None}))


@pytest.mark.parametrize("output, right", [
    (r"\boxed{C}", True), (r"\boxed{(C)}", True), (r"\boxed{\text{C}}", True), (r"\boxed{\textbf{(C)}}", True),
    (r"\boxed{C.}", True), (r"\boxed{C) 10^{-4} eV}", True), (r"\boxed{c}", True), (r"\boxed{$C$}", True),
    (r"\boxed{\mathrm{C}}", True), (r"\boxed{Option C}", True), (r"\boxed{B} no, \boxed{C}", True),
    ("The answer is C.", True), ("**Answer: C**", True), ("The correct answer is **(C)**", True),
    (r"Answer: $\text{C}$", True), ("Answer: B, no. The answer is C", True),
    (r"\boxed{B}", False), (r"\boxed{A, C}", False), (r"\boxed{ABCD}", False), (r"\boxed{C} then \boxed{B}", False),
    (r"\boxed{Carbon}", False), ("C", False), ("I see. C is a constant", False), ("The answer is Carbon", False),
    (r"the answer is C, \boxed{D", False), (r"\boxed{10^{-4} eV}", False), (r"\boxed{E}", False), ("", False),
    (r"<think>\boxed{C}", False)])
def test_letters(output, right):
    assert grade("gpqa", output, row(answer="C")) is right
    assert grade("gpqa", output, row(answer="(C)")) is right


@pytest.mark.parametrize("gold, answer, right", [
    (r"\frac{1}{2}", r"\dfrac12", True), (r"\frac{1}{2}", "0.5", True), (r"\frac{1}{2}", "1/2", True),
    (r"-\frac{1}{2}", "-.5", True), ("10,\\!080", "10080", True), (r"\$32,\!348", "32348", True), ("x=5", "5", True),
    (r"90^\circ", "90", True), (r"\text{Evelyn}", "Evelyn", True), (r"\left( 3, \frac{\pi}{2} \right)",
     r"(3,\frac{\pi}{2})", True), (r"\sqrt2", r"\sqrt{2}", True), ("025", "25", True), ("5", "5.", True),
    (r"50\%", "50", True), ("p - q", "p-q", True), ("2k+2", "2(k+1)", False), ("p - q", "q - p", False),
    ("(1,2)", "(2,1)", False), ("1/3", "0.3333", False), ("5", "-5", False), ("204", "2040", False),
    ("1,234", "1234", True), ("(1,200)", "(1200)", True), ("1e999999999", "1", False), ("1/0", "1/0", True),
    ("9" * 10**6, "9" * 10**6, True), ("", "5", False)])
def test_same_text(gold, answer, right):
    """Notation is forgiven, algebra is not done, and no text takes long."""
    assert same_text(gold, answer) is right and same_text(answer, gold) is right


# ---------------------------------------------------------------------------------------------------------
# the public rows


@pytest.mark.parametrize("task, file, count", [
    ("gsm8k", "gsm8k_train_1k.jsonl", 1000), ("math500", "math500_first250.jsonl", 250),
    ("aime24", "aime24_first15.jsonl", 15)])
def test_every_gold_answer_is_right_for_its_row_and_wrong_for_the_next(task, file, count):
    rows = public_rows(file)
    outputs = [r["answer"] if task == "gsm8k" else rf"\boxed{{{r['answer']}}}" for r in rows]
    golds = [r["answer"].rpartition("####")[2].strip() for r in rows]
    next_is_the_same = [a == b or {a, b} == {"5", "x=5"} for a, b in zip(golds, golds[1:], strict=False)]
    grades = grade_all(task, outputs + outputs[1:], rows + rows[:-1], seconds=30)
    assert grades == [True] * count + next_is_the_same


def test_countdown_rows():
    """Each row is searched for a solution, which must be right there, and only there."""
    rows = public_rows("countdown_sample.jsonl")
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


@pytest.mark.parametrize("gold", [
    r"\binom{1000000000}{500000000}", "(" * 3000 + "1" + ")" * 3000, "x=" * 3000 + "1", "1+" * 20_000 + "1"])
def test_a_gold_answer_that_hangs_the_grader_is_left_out(gold, capsys):
    """Rows are checked under the same time limit as outputs."""
    started, good = time.monotonic(), row(answer="5")
    assert gradable("math500", [row(answer=gold), good], seconds=1.0) == [good]
    shown = capsys.readouterr().out
    assert "1 of 2 rows have no answer that the grader can read" in shown and len(shown) < 300
    assert grade_all("math500", [rf"\boxed{{{gold}}}", r"\boxed{5}"], [good, good], seconds=1.0) == [None, True]
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("death, grades", [("os.kill(os.getpid(), 9)", [None, None, None]), ("", [True, False, True])])
def test_a_process_that_dies_at_its_start(tmp_path, monkeypatch, death, grades):
    """Killed before it has read a line, say for its memory: it costs one answer, as any other. No broken pipe."""
    (tmp_path / "sitecustomize.py").write_text(f"import os\n{death}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    outputs = [rf"\boxed{{{i}}}" + " " * 10**6 for i in (1, 2, 3)]  # more than a pipe holds
    assert grade_all("math500", outputs, [row(answer=gold) for gold in (1, 7, 3)]) == grades


def test_a_grading_process_that_fails_is_no_verdict(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken install')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="a grading process failed: its traceback"):
        grade_all("math500", [r"\boxed{1}"], [row(answer="1")])


def test_a_missing_grader_is_said_before_anything_is_sampled(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match="graded by math-verify, which is not installed: pip install"):
        gradable("gsm8k", [row(answer="1")])


def test_grades_come_in_order_whatever_the_workers():
    """Repeated answers are graded once, those that give none not at all."""
    rows = [row(answer=str(i % 4)) for i in range(23)]
    outputs = [rf"\boxed{{{i % 3}}}" if i % 5 else "no box" for i in range(23)]
    want = [i % 5 > 0 and i % 4 == i % 3 for i in range(23)]
    for workers in (1, 5):
        assert grade_all("math500", outputs, rows, workers=workers) == want
    rows = [row(solution=str(i)) for i in range(11)]
    outputs = [f"{OPEN} {i if i % 3 else 'x'} {CLOSE}" for i in range(11)]
    assert grade_all("toy", outputs, rows) == [bool(i % 3) for i in range(11)]
    for task in ("toy", "math500"):
        assert grade_all(task, [], []) == []
        with pytest.raises(ValueError, match="zip"):
            grade_all(task, ["a"], [])


def test_a_bad_row_is_an_error_in_a_process_too():
    with pytest.raises(UserError, match="rows.jsonl line 1 has no answer"):
        grade_all("gsm8k", [r"\boxed{1}"] * 3, [row(answer="1"), row(solution="in words"), row(answer="1")])
    with pytest.raises(UserError, match="rows.jsonl line 1: math-verify can't read its own answer"):
        grade_all("math500", [r"\boxed{1}"] * 2, [row(answer="1"), row(answer=r"\text{}")])


def test_importing_the_grader_is_quick():
    """Every grading process imports it: no torch, no sympy, no parser."""
    slow = ("torch", "transformers", "sympy")
    code = f"import sys, rlt.grading, evaluate; print([name for name in {slow} if name in sys.modules])"
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


def write_evaluation(folder, draws, name="eval_toy", **flags):
    """An evaluation's two files, of questions 0, 1, ... with these draws."""
    folder.mkdir(exist_ok=True)
    flags = {"samples": len(draws[0]), "temperature": 1.0, "max_new_tokens": 64, "seed": 0, **flags}
    (folder / f"{name}.json").write_text(json.dumps({"flags": flags}))
    samples = [{"question": str(i), "gold": {"solution": "1"}, "grade": [False, True, None][grade]}
               for i, row in enumerate(draws) for grade in row]
    (folder / f"{name}_samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


@pytest.mark.parametrize("change, complaint", [
    (dict(draws=[row[:2] for row in AFTER]), "differ in samples"),
    (dict(draws=AFTER[:-1]), "differ in questions"),
    (dict(draws=AFTER, temperature=0.6), "differ in temperature"),
    (dict(draws=AFTER, max_new_tokens=32), "differ in max_new_tokens"),
])
def test_evaluations_that_were_not_asked_alike_are_refused(tmp_path, change, complaint):
    paths = {"before": write_evaluation(tmp_path / "before", BEFORE)}
    paths["after"] = write_evaluation(tmp_path / "after", **change)
    with pytest.raises(UserError, match=complaint) as error:
        read_evaluations({label: folder / "eval_toy.json" for label, folder in paths.items()})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_other_questions_and_the_same_seed_are_refused(tmp_path):
    before, after = (write_evaluation(tmp_path / name, BEFORE) / "eval_toy.json" for name in ("before", "after"))
    assert read_evaluations({"before": before, "after": after})["after"] == [list(map(bool, row)) for row in BEFORE]
    with pytest.raises(UserError, match="has the seed of .*before"):
        read_evaluations({"before": before, "floor": after})
    samples = after.with_name("eval_toy_samples.jsonl")
    samples.write_text(samples.read_text().replace('"7"', '"8"'))  # as many, but one is another
    with pytest.raises(UserError, match="differ in questions"):
        read_evaluations({"before": before, "after": after})
    with pytest.raises(UserError, match="eval_gsm8k.json is missing: evaluate first"):
        read_evaluations({"before": before.with_name("eval_gsm8k.json")})


@pytest.mark.parametrize(("solution", "gold"), [
    (r"2+3 is \boxed{4}, no: \boxed{5}.", "5"), ("1,024", "1,024"), (" -3.5 ", "-3.5"), ("1/2", "1/2"),
    ("It is 5.", None), ("5 apples", None), ("", None), (None, None)])
def test_a_row_of_question_and_solution_alone_is_graded_by_its_solution(solution, gold):
    """By the last box, or by a solution that is a number. A column answer goes before it."""
    row = {"where": "row", "solution": solution}
    if gold is None:
        with pytest.raises(UserError, match="no answer that --task math500 can be graded by"):
            gold_answer("math500", row)
    else:
        assert gold_answer("math500", row) == gold and grade("math500", rf"\boxed{{{gold}}}", row)
    assert gold_answer("math500", row | {"answer": "9"}) == "9"


@pytest.mark.parametrize(("row", "task"), [
    ({"nums": [3, 4], "target": 7}, "countdown"), ({"answer": "B"}, "gpqa"), ({"answer": "72"}, "gsm8k"),
    ({"solution": r"\boxed{x^2}"}, "gsm8k"), ({"solution": "in words"}, None), ({}, None)])
def test_the_task_of_rows_that_nobody_named(row, task):
    assert task_of([row | {"where": "row", "question": "Q"}] * 3) == task
    assert task_of([row | {"where": "row", "question": "Q"}, {"where": "row", "question": "Q"}]) is None
    assert task_of([row | {"where": "row", "question": "Q"}] * 2 + [{"where": "row", "question": "Q"}]) == task
