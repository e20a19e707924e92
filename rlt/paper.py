# SPDX-License-Identifier: MIT
"""
Results printed in the RLT paper, arXiv 2506.08388: % right, one answer a question, SkyThought's grader. None is ours.

Table 1 is the paper's own table. The columns of Table 2 and the Countdown accuracies are from notes that others wrote
on the paper; where these contradict each other, every number is given.
"""

import statistics

QUESTIONS = {"aime24": 30, "math500": 500, "gpqa": 198}  # of the sets: the papers' and ours


def _scores(aime24, math500, gpqa):
    return {"aime24": aime24, "math500": math500, "gpqa": gpqa}


TABLE_1 = {  # students by SFT, and the models they are compared with
    "QwQ-32B": _scores(50.0, 90.6, 54.5),
    "DeepSeek-R1": _scores(79.8, 97.3, 71.5),
    "Qwen2.5-7B-Instruct": _scores(10.0, 74.2, 33.3),
    "Bespoke-7B-1K": _scores(13.3, 80.0, 33.8),
    "RLT-7B-1K": _scores(20.0, 80.4, 41.9),
    "Bespoke-7B": _scores(20.0, 82.0, 37.8),
    "RLT-7B": _scores(23.3, 82.8, 42.4),
    "Qwen2.5-32B-Instruct": _scores(26.7, 84.0, 49.0),
    "s1-32B": _scores(50.0, 92.6, 56.6),
    "s1-32B + budget forcing": _scores(56.7, 93.0, 59.6),
    "Bespoke-32B-1K": _scores(46.7, 92.6, 57.5),
    "RLT-32B-1K": _scores(60.0, 94.0, 60.1),
    "Sky-T1-32B": _scores(43.3, 82.4, 56.8),
    "Bespoke-32B": _scores(63.3, 93.0, 58.1),
    "RLT-32B": _scores(66.7, 93.4, 59.6),
}
TABLE_2 = {  # RL on correctness of a 7B model, after SFT on these traces
    "7B + RL, no cold start": _scores(13.3, 74.2, 34.8),
    "RL-teacher traces, raw, + RL": _scores(10.0, 71.0, 34.8),
    "RL-teacher traces, GPT-edited, + RL": _scores(16.7, 78.2, 36.9),
    "Bespoke-7B + RL": _scores(16.7, 82.8, 45.4),
    "RLT-7B + RL": _scores(26.7, 84.0, 40.9),
}
COUNTDOWN = {  # every number that a note gives
    "direct RL on Countdown": (50.8,),
    "SFT on R1's traces": (49.2,),
    "SFT on an RLT's traces, zero-shot": (52.3, 55.7, 56.6),
}


def overall(name):
    """The paper's Overall of a row of Table 1 or 2: the mean of its three columns, %."""
    return statistics.fmean((TABLE_1 | TABLE_2)[name].values())
