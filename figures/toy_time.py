# SPDX-License-Identifier: MIT
"""What students of the toy's hardest base cost, in seconds of one core, beside what they learn."""

import statistics

from study_log import greedy, measured, rows_of, sampled
from toy_map import arms_of_hardest_base

SETTING, SEEDS = "base 0.0", (0, 1, 2)
NAMES = {"warm-up teacher, rows 0.1": "SFT on the warm-up teacher", "direct RL, 240 steps": "direct RL, 240 steps",
         "best of 10, rows 0.1": "SFT on best of 10 by the base", **arms_of_hardest_base(0.1)}
NOT_COUNTED = ("data/toy.py", "evaluate.py")  # what all students begin with, and what measures them


def wall_time_table():
    """Students by the seconds that they took, their teachers' training included: means over seeds."""
    rows = {arm: [row for row in rows_of(arm, SETTING) if row["seed"] in SEEDS] for arm in NAMES}
    all_rows = [row for own in rows.values() for row in own]
    seconds = {command: taken for row in all_rows for command, taken in row["seconds"].items()}
    cost = {arm: statistics.fmean(seconds_of(row, seconds) for row in own) for arm, own in rows.items()}
    lines = ["| student | seconds | greedy | T = 1 |", "| --- | --- | --- | --- |"]
    for arm in sorted(NAMES, key=cost.get):
        cells = (", ".join(f"{measure(row):.0f}" for row in rows[arm]) for measure in (greedy, sampled))
        lines.append(f"| {NAMES[arm]} | {cost[arm]:.0f} | {' | '.join(cells)} |")
    lines += ["", f"Exact match, %, on seeds {', '.join(map(str, SEEDS))}. Seconds: from the base to the student, with "
              f"all that it needs, without its tests; mean over these seeds. Measured on {measured(all_rows)}.", ""]
    return "\n".join(lines)


def seconds_of(row, seconds):
    """What all commands of an arm took. seconds: {command: what it took, in whichever arm it ran}."""
    commands = dict.fromkeys(row["commands"])
    return sum(seconds[command] for command in commands if command.split()[1] not in NOT_COUNTED)
