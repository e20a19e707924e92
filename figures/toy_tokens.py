# SPDX-License-Identifier: MIT
"""What the reward sees on the base where all groups fail: tokens of explanations, scored by two reward students."""

from plotting import save
from reward_picture import draw
from reward_rows import Settings, take_apart
from study_log import rows_of

SETTINGS = Settings(lam=3.0, alpha=0.01, kl="exact", unclosed_penalty=1.0)  # distill.py's defaults
STUDENTS = {"base": "the base", "warmed-up": "the warmed-up student"}
WRITERS = {"full chains": "a teacher of full chains", "RLT": "RLT, with the base as reward student"}
LABELS = {("full chains", "base"): "a chain,\nto the base", ("full chains", "warmed-up"): "a chain,\nwarmed-up",
          ("RLT", "base"): "RLT's,\nto the base", ("RLT", "warmed-up"): "RLT's,\nwarmed-up"}


def seen():
    """The measurements: a list of {by, student, reward, score, kl, length, full_chain, rows}."""
    [row] = rows_of("what the reward sees", "base 0.0")
    return row["seen"]


def tokens():
    """One question: an explanation of each teacher, as each student scores it."""
    question = seen()[0]["rows"][0]["question"]
    group = [take_apart(row | {"by": LABELS[part["by"], part["student"]]}, SETTINGS)
             for part in seen() for row in part["rows"] if row["question"] == question]
    group.sort(key=lambda scored: -scored.reward)
    save(draw(group, SETTINGS), "toy_tokens")


def seen_table():
    """Means over the explanations of 64 questions."""
    lines = ["| explanations by | scored by | full chains | score | KL | reward |",
             "| --- | --- | --- | --- | --- | --- |"]
    for part in seen():
        lines.append(f"| {WRITERS[part['by']]} | {STUDENTS[part['student']]} | {part['full_chain']:.0%} | "
                     f"{part['score']:.2f} | {part['kl']:.2f} | {part['reward']:.2f} |")
    return "\n".join(lines) + "\n"


FIGURES = (tokens,)
