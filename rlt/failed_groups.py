# SPDX-License-Identifier: MIT
"""
Questions whose whole group of answers fails: what `rl_student.py --failed-groups` keeps of them between steps.

    AdaBack   how much of its right chain each question reveals       arXiv 2506.18110
    ReLift    which questions wait for a step of SFT                  arXiv 2506.07527

Both are updated once a step with the success of all its questions, in the order of the step: `gather_groups`. So they
are the same on every rank, and on any number of ranks. Both are saved in checkpoints. Guide-GRPO keeps nothing.
"""

import json
import random
from pathlib import Path

from rlt.distributed import all_gather_object
from rlt.models import user_errors
from rlt.steps import seed_for

FAILED_GROUPS = ("none", "guide", "adaback", "relift")
TAU = 0.5  # AdaBack's only parameter; the paper finds 0.1 to 0.9 alike. A group has the most signal where half is right
PLAIN = 0.1  # share of visits that reveal nothing, as in tests (the paper's)
FILE = "failed_groups.json"  # in a checkpoint


def gather_groups(values):
    """One value for each question of this rank, which has every WORLD-th of a step -> those of all ranks, in the
    order of the step."""
    return [value for together in zip(*all_gather_object(values), strict=True) for value in together]


class AdaBack:
    """The share of its right chain that each question reveals: a search by the question's own success.

    Each has an interval [lo, hi] of shares, at first [0, 1]. A visit draws rho from U(lo, hi), or 0 with probability
    PLAIN, and the first floor(rho * m) of the chain's m tokens end the prompt of its whole group. Then

        mean success <  TAU    lo <- max(lo, rho)
        mean success >= TAU    hi <- rho, lo <- 0        hi never rises

    The max is ours: a visit with rho = 0 that fails says nothing new. So is that all questions start at [0, 1]: in the
    paper later ones start at running means of the others' intervals. Before a question comes for the second time, in
    the second epoch, its share is therefore a plain draw from all of [0, 1].
    """

    def __init__(self, rows, seed):
        """rows: how many there are."""
        self.seed, self.intervals = seed, [[0.0, 1.0] for _ in range(rows)]

    def share(self, question, step):
        """rho of this question (the index of its row) in this step: always the same, until `update`."""
        draw = random.Random(seed_for(self.seed, "AdaBack", step, question))
        return 0.0 if draw.random() < PLAIN else draw.uniform(*self.intervals[question])

    def update(self, questions, shares, success):
        """questions, shares, success: of a step's P questions the row's index, rho and the mean success."""
        for question, share, mean in zip(questions, shares, success, strict=True):
            lo, hi = self.intervals[question]
            self.intervals[question] = [max(lo, share), hi] if mean < TAU else [0.0, share]

    def state_dict(self):
        return {"intervals": self.intervals}

    def load_state_dict(self, state):
        self.intervals = state["intervals"]


class ReLift:
    """Questions of which every answer failed, for SFT steps of `size` rows. The newest are first in the buffer and in
    the SFT. A question is in the buffer once: one that fails again moves to the front."""

    def __init__(self, size):
        self.size, self.buffer = size, []  # indices of rows

    def add(self, questions, success):
        """questions, success: of a step's P questions the row's index and the mean success."""
        failed = [question for question, mean in zip(questions, success, strict=True) if mean == 0]
        self.buffer = list(dict.fromkeys([*failed, *self.buffer]))

    def take(self):
        """The newest `size` questions, which leave the buffer; [] where it has fewer."""
        if len(self.buffer) < self.size:
            return []
        taken, self.buffer = self.buffer[: self.size], self.buffer[self.size :]
        return taken

    def state_dict(self):
        return {"buffer": self.buffer}

    def load_state_dict(self, state):
        self.buffer = state["buffer"]


def save_state(memory, folder):
    """Write the state of an AdaBack or a ReLift into a checkpoint."""
    (Path(folder) / FILE).write_text(json.dumps(memory.state_dict()))


def restore_state(memory, folder):
    """Read back what save_state wrote, the same numbers to the last bit."""
    with user_errors(f"the checkpoint {folder} can't be read, delete it to go on from the one before: {FILE}"):
        memory.load_state_dict(json.loads((Path(folder) / FILE).read_text()))
