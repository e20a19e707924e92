# SPDX-License-Identifier: MIT
"""
Graders and pass@k. Rewards and evaluations share them, so that the two cannot disagree.

A model's whole turn goes in as text. What follows its thought is searched for an answer, and the answer is
compared with the row's own (the gold answer):

    task      the answer in the output                                     compared by
    toy       the text between the solution tags                           words
    gsm8k     the last \\boxed{}, else after "####", else the last number   math-verify
    math500   the last \\boxed{}                                            math-verify; so aime24 and aime25
    gpqa      the last \\boxed{}, else "the answer is (C)"                  letter
    countdown the last \\boxed{}, else the solution block                   exact fractions of + - * /, each number once

math-verify's verdicts are its own: 50% equals .5, (1,2) equals {1,2}.
"""

import importlib.util
import json
import math
import random
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlt.answers import (
    GOLD,
    MATH_TASKS,
    TASKS,
    answer_of,
    as_text,
    equivalent,
    gold_answer,
    is_right,
    same_text,
)
from rlt.errors import UserError
from rlt.steps import seed_for

__all__ = ["GOLD", "MATH_TASKS", "TASKS", "answer_of", "gold_answer", "same_text"]  # from rlt.answers
GRADERS = {"toy": "exact match", "gpqa": "letter", "countdown": "exact fractions"}  # what is not math-verify's
LETTER_ONLY = (
    "Return your final response within \\boxed{} and only include the letter choice (A, B, C, or D) as your final "
    "response. "
)
CHOICES = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")  # columns of GPQA
UNREADABLE = "unreadable"  # the verdict on an answer whose row's own answer math-verify can't read


def grade(task, output, row):
    """Whether a model's output, its whole turn as text, answers the row.

    Raises UserError where the row's own answer is missing or unreadable: that is no verdict on the output.
    math-verify never ends on some outputs: grade_all is the one with a time limit.
    """
    return is_right(task, gold_answer(task, row), answer_of(task, output))


def grade_all(task, outputs, rows, *, seconds=5.0, workers=2):
    """grade() of each output with its row, with a time limit -> list of True, False or None.

    None counts as wrong: math-verify took more than `seconds`, or its process was killed, say for its memory.
    """
    pairs = [(gold_answer(task, row), answer_of(task, output)) for output, row in zip(outputs, rows, strict=True)]
    if task not in MATH_TASKS:
        return [is_right(task, *pair) for pair in pairs]
    verdicts = _in_processes([pair for pair in pairs if pair[1] is not None], seconds, workers)
    for row, (gold, answer) in zip(rows, pairs, strict=True):
        if verdicts.get((gold, answer)) == UNREADABLE:
            raise UserError(f"{row['where']}: math-verify can't read its own answer {gold!r:.60}: leave that row out.")
    return [verdicts.get(pair, False) for pair in pairs]


def gradable(task, rows, *, seed=0, seconds=5.0, workers=2):
    """The rows whose own answer the grader can read, each within `seconds`; the number of the others is printed.

    Rows of GPQA get their choices into the question (with_choices). Raises UserError where no row is left.
    """
    kept, bad = [], []
    for row in rows:
        try:
            row = with_choices(row, seed) if task == "gpqa" else row
            kept.append((row, gold_answer(task, row)))
        except UserError as error:
            bad.append(str(error))
    if task in MATH_TASKS:
        verdicts = _in_processes([(gold, gold) for _, gold in kept], seconds, workers)
        bad += [f"{row['where']} has {gold!r:.60}" for row, gold in kept if verdicts[gold, gold] is not True]
        kept = [(row, gold) for row, gold in kept if verdicts[gold, gold] is True]
    first = f" The first: {bad[0]}" if bad else ""
    if not kept:
        raise UserError(f"no row has an answer that --task {task} can grade: is it the task of --data?{first}")
    if bad:
        print(f"{len(bad)} of {len(rows)} rows have no answer that the grader can read: left out.{first}")
    return [row for row, _ in kept]


def task_of(rows):
    """The task that grades most of these rows by their columns, or None. Rows with text for an answer count as gsm8k,
    whose grader reads any number, boxed or not."""

    def has_gold(task, row):
        try:
            return gold_answer(task, with_choices(row)) is not None
        except UserError:
            return False

    tasks = ("countdown", "gpqa", "gsm8k")
    return next((task for task in tasks if sum(has_gold(task, row) for row in rows) > len(rows) / 2), None)


def with_choices(row, seed=0):
    """A row of GPQA with its four choices in the question, and the letter of the right one as `answer`.

    Their order depends on the seed and the question alone. A row without a "Correct Answer" is returned as it is: its
    question should show the choices, its `answer` be a letter.
    """
    columns = {name.strip().lower(): value for name, value in row.items()}
    texts = [as_text(columns.get(name.lower())) for name in CHOICES]
    if texts[0] is None or row.get("choices"):
        return row
    if None in texts:
        raise UserError(f"{row['where']} has no {CHOICES[texts.index(None)]}: leave that row out.")
    order = random.Random(seed_for(seed, "choices", row["question"])).sample(range(4), 4)
    choices = [texts[i] for i in order]
    listed = "\n".join(f"{letter}) {choice}" for letter, choice in zip("ABCD", choices, strict=True))
    question = f"{LETTER_ONLY}{row['question']}\n\n{listed}"
    return row | {"question": question, "choices": choices, "answer": "ABCD"[order.index(0)]}


# ---------------------------------------------------------------------------------------------------------
# math-verify in processes


def _in_processes(pairs, seconds, workers):
    """(gold, answer) -> True, False, UNREADABLE, or None where it took too long; each distinct pair once.

    Raises UserError where math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("answers are graded by math-verify, which is not installed: pip install -r requirements.txt")
    pairs = list(dict.fromkeys(pairs))
    shards = [pairs[at::workers] for at in range(min(workers, len(pairs)))]
    with ThreadPoolExecutor(workers) as pool:
        graded = list(pool.map(lambda shard: _in_one_process(shard, seconds), shards))
    return {pair: verdict for shard, verdicts in zip(shards, graded, strict=True)
            for pair, verdict in zip(shard, verdicts, strict=True)}


def _in_one_process(pairs, seconds):
    """Verdicts of one pair after the other. A process that dies, say by its time limit, costs one pair: None."""
    command = [sys.executable, "-c", "from rlt.grading import _serve; _serve()"]
    root, verdicts = Path(__file__).resolve().parent.parent, []
    while len(verdicts) < len(pairs):
        request = json.dumps([seconds, pairs[len(verdicts) :]])
        worker = subprocess.run(command, cwd=root, input=request, stdout=subprocess.PIPE, text=True)
        verdicts += [json.loads(line) for line in worker.stdout.splitlines()]
        if len(verdicts) < len(pairs):
            if worker.returncode > 0:  # below 0 a signal ended it
                raise RuntimeError("a grading process failed: its traceback stands above")
            verdicts.append(None)
    return verdicts


def _serve():
    """A grading process: [seconds, pairs] on stdin; on stdout one verdict a line."""
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may pass for a verdict
    seconds, pairs = json.load(sys.stdin)
    equivalent("1", "1")  # imports that take seconds
    for pair in pairs:
        # unhandled, so that it ends the process even inside one long multiplication, where no handler runs
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = equivalent(*pair)
        except UserError:
            verdict = UNREADABLE
        except (RecursionError, MemoryError):
            verdict = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


# ---------------------------------------------------------------------------------------------------------
# pass@k, and what training changed


def pass_at_k(n, c, k):
    """Chance that one of k samples is right, when they are drawn from n samples of which c are right.

    1 - C(n - c, k) / C(n, k) is an unbiased estimate of pass@k (arXiv 2107.03374); 1 - (1 - c / n)^k is not.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k of n={n}, c={c}, k={k}: expected 0 <= c <= n and 1 <= k <= n.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def over_questions(values):
    """Mean of one value per question, and its standard error (None where there is one question)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def pass_curve(draws):
    """pass@k over questions, k = 1, 2, 4, ... n. draws: a row of n for each question, True where right."""
    n = len(draws[0])
    ks = sorted({*(2**i for i in range(n.bit_length())), n})
    return {k: over_questions([pass_at_k(n, sum(row), k) for row in draws]) for k in ks}


def solved_sets(before, after, k):
    """Which questions training changed: name -> set of their indices. After arXiv 2506.13923, the draws fixed.

    before, after: draws of the same M questions, as pass_curve takes them. A question is solved if its first
    draw is right, and within reach if only another of its first k before training is. By first draws, exactly:

        pass@1 after - pass@1 before = (|self_distillation| + |capability_gain| - |regression|) / M

    k draws can miss by chance: capability_gain_all_draws was out of reach of all n.
    """
    everyone = set(range(len(before)))
    solved, now = ({i for i in everyone if draws[i][0]} for draws in (before, after))
    reach = {i for i in everyone if any(before[i][:k])} - solved
    beyond = everyone - solved - reach
    return {
        "solved_before": solved, "within_reach": reach, "out_of_reach": beyond, "solved_after": now,
        "self_distillation": reach & now, "capability_gain": beyond & now, "regression": solved - now,
        "retained": solved & now, "capability_gain_all_draws": {i for i in now if not any(before[i])},
    }


def compare(draws, k=16):
    """pass@k of label -> draws, and solved_sets of `before` and `after`, as shares and indices of questions.

    The same of `before` and `floor`, where that is given: the same model with another seed, chance and no more.
    k: 16 as in the paper, or all n draws where n is less.
    """
    before, n = draws["before"], len(draws["before"][0])
    report = {"questions": len(before), "samples": n, "reach": min(k, n), "split": {}}
    report["pass_at"] = {label: pass_curve(rows) for label, rows in draws.items()}
    for label in [label for label in ("after", "floor") if label in draws]:
        report["split"][label] = {
            name: over_questions([i in chosen for i in range(len(before))]) | {"questions": sorted(chosen)}
            for name, chosen in solved_sets(before, draws[label], k).items()
        }
    return report
