# SPDX-License-Identifier: MIT
"""The log of the toy study (logs/toy_study.jsonl): the rows of an arm, pairs of arms, means and intervals.

A row is one arm on one seed of one setting. `setting` names the flags of data/toy.py, `arm` what was trained on what;
figures/toy_study.py lists both.
"""

import functools
import json
import math
import re
import statistics
from pathlib import Path

LOGS = Path(__file__).resolve().parent / "logs"
STUDENT_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def read_log(name, command):
    """The rows of a committed log. command: what makes it, for the error of a log that is missing."""
    path = LOGS / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Make it with: {command}")
    return [json.loads(line) for line in path.read_text().splitlines()]


@functools.cache
def study_rows():
    """Every row of the toy study."""
    return read_log("toy_study.jsonl", "python figures/toy_study.py")


def rows_of(arm, setting="toy"):
    """The rows of an arm in a setting, ordered by seed; [] if it has not been run."""
    rows = [row for row in study_rows() if (row["setting"], row["arm"]) == (setting, arm)]
    return sorted(rows, key=lambda row: row["seed"])


def paired_rows(arms, setting="toy"):
    """{arm: its rows} on the seeds that all arms have, so that bars side by side compare; arms without rows: []."""
    rows = {arm: rows_of(arm, setting) for arm in arms}
    seeds = set.intersection(*({row["seed"] for row in own} for own in rows.values() if own))
    return {arm: [row for row in own if row["seed"] in seeds] for arm, own in rows.items()}


def differences(arm, other, measure, setting="toy"):
    """measure(row of arm) - measure(row of the other arm) for each seed that both have."""
    return paired_differences(rows_of(arm, setting), rows_of(other, setting), measure)


def paired_differences(rows, others, measure):
    """measure(row) of these rows, less that of the others, for each seed that both have."""
    others = {row["seed"]: row for row in others}
    return [measure(row) - measure(others[row["seed"]]) for row in rows if row["seed"] in others]


def greedy(row):
    """Exact match on the test questions, greedy decoding, in %."""
    return 100 * row["accuracy"]["test greedy"]["mean"]


def sampled(row):
    """Exact match on the test questions, sampled at temperature 1, in %."""
    return 100 * row["accuracy"]["test sampled"]["mean"]


def interval(values):
    """(mean, half the width of its 95 % interval by Student's t); the half is nan for a single value."""
    if len(values) < 2:
        return values[0], math.nan
    half = STUDENT_T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def measured(rows):
    """On what, with which versions and when: a few words of all rows together. The log has it row by row."""
    machines = [re.sub(r" \(.*?\)", "", part) for row in rows for part in row["machine"].split("; ")]
    versions, dates = ([row[key] for row in rows] for key in ("torch", "date"))
    return "; ".join((" and ".join(dict.fromkeys(machines)), "torch " + " and ".join(sorted(set(versions))),
                      " to ".join(sorted({min(dates), max(dates)}))))


def reward_fifths(seed):
    """The rows of the five students that learned from one fifth of the explanations each, lowest reward first.

    None if the log does not hold all five.
    """
    rows = [row for i in range(1, 6) for row in rows_of(f"rank {i} of 5") if row["seed"] == seed]
    return rows if len(rows) == 5 else None


def ranks(values):
    """The rank of each value; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def correlations(xs, ys):
    """(Pearson's correlation, Spearman's)."""
    return statistics.correlation(xs, ys), statistics.correlation(ranks(xs), ranks(ys))
