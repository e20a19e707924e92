# SPDX-License-Identifier: MIT
"""What the study on SmolLM2 has measured so far: RLT's training curve, and explanations before and after it."""

import math

import matplotlib.pyplot as plt
from plotting import RED, save, smooth, steps
from reward_picture import draw
from reward_rows import read_scored
from study_log import LOGS, read_log

COMMAND = "python figures/smollm2_study.py --gsm8k train.jsonl"
EXPLANATIONS = LOGS / "smollm2_explanations.jsonl"  # of one validation question, before and after RL
MEASURED = {"before RL": "explanations before RL", "after RL": "explanations after RL"}


def row_of(arm):
    return next(row for row in read_log("smollm2_study.jsonl", COMMAND) if row["arm"] == arm)


def share(p, n):
    """A share of n rows in %, with its standard error."""
    return f"{100 * p:.0f} ± {100 * math.sqrt(p * (1 - p) / n):.0f} %"


def explanations_table():
    """The README's table: explanations of the same validation questions by the teacher before and after RL."""
    rows = {name: row_of(arm)["explanations"] for name, arm in MEASURED.items()}
    count, taken = rows["before RL"]["count"], len(row_of(MEASURED["after RL"])["curve"])
    lines = [f"One explanation of each of {count} validation questions, sampled by the teacher before RL and after "
             f"{taken} steps of 32 explanations; ± is the standard error. Reward, score, KL: means with λ = 3 and "
             "the exact KL.", "",
             "| teacher | right chains | right steps | leak | closed | length | score | KL | reward |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, found in rows.items():
        chains, leak, closed = (share(found[key], count) for key in ("is_right_chain", "leak", "closed"))
        numbers = f"{found['length']:.0f} | {found['score']:.2f} | {found['kl']:.2f} | {found['reward']:.2f}"
        lines.append(f"| {name} | {chains} | {100 * found['right_steps']:.0f} % | {leak} | {closed} | {numbers} |")
    students = [f"{row['arm']} {share(found['mean'], found['questions'])} of {found['questions']}"
                for row in read_log("smollm2_study.jsonl", COMMAND) if "accuracy" in row
                for found in [row["accuracy"]["test greedy"]]]
    lines += ["", f"Test questions answered right by students (greedy), by what they were trained on: "
              f"{'; '.join(students)}."] if students else []
    row = row_of(MEASURED["after RL"])
    lines += ["", f"Measured: {row['machine']}, torch {row['torch']}, {row['date']}, seed {row['seed']}. "
              "`figures/logs/smollm2_study.jsonl` holds the commands and the commit.", ""]
    return "\n".join(lines)


def training():
    """RLT on SmolLM2: what the reward is made of, along training."""
    curve = row_of(MEASURED["after RL"])["curve"]
    titles = {"reward": "reward", "score": "score, nats", "kl": "KL (k1), nats", "closed": "closed, share",
              "length": "tokens in an explanation", "kl_ref": "KL to the start, nats"}
    figure, panels = plt.subplots(1, len(titles), figsize=(11, 2))
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        values = [entry[key] for entry in curve]
        axes.plot(steps(curve), values, color=RED, lw=0.6, alpha=0.4)
        axes.plot(steps(curve), smooth(values), color=RED, lw=1.4)
        axes.set_title(title)
        axes.set_xlabel("step")
    save(figure, "smollm2_reward")


def before_and_after():
    """Explanations of one validation question, before and after RL, token by token."""
    settings, (group, *_) = read_scored(EXPLANATIONS)
    save(draw(group, settings), "smollm2_explanations")


FIGURES = (training, before_and_after)
