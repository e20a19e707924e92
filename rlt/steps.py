# SPDX-License-Identifier: MIT
"""What happens in a step apart from the models: seeds, batches, the learning rate, what is measured and warned of.

Seeds, batches and rates are functions of the step alone, so that a resumed run does what the first would have done.
"""

import hashlib
import math
import random
import shlex
import statistics
import time

from rlt.distributed import all_gather_object, all_reduce_mean
from rlt.errors import UserError
from rlt.files import read_lines

UNLIKELY = -3.0  # nats: less than 5 %


def seed_for(*key):
    """A seed for this key alone, e.g. (seed, step, rank, batch)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big")


def batch_indices(n, size, step, seed):
    """Indices of the `size` rows of this step, from epochs of n shuffled rows laid end to end."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, n)
        if not indices or offset == 0:
            order = random.Random(seed_for(seed, "epoch", epoch)).sample(range(n), n)
        indices.append(order[offset])
    return indices


def lr_fraction(step, steps, warmup, final, shape="linear"):
    """Fraction of the peak learning rate at this step: up over `warmup` steps, then down to `final` at the last of
    `steps`, where it stays. A final 0 is reached one step later: no step is taken for nothing."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1, (step + (final > 0) - warmup) / max(1, steps - warmup))
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return 1 + (final - 1) * progress


def reward_is_dropping(metrics, key="reward", window=10):
    """A sentence when `key` has dropped over three windows in a row, by more than noise; else None."""
    entries = [entry for _, entry in read_lines(metrics)]
    if len(entries) < 3 * window or len(entries) % window:
        return None
    values = [entry and entry.get(key) for entry in entries[-3 * window :]]
    if None in values:
        return None
    windows = [values[i * window : (i + 1) * window] for i in range(3)]
    means = [statistics.fmean(part) for part in windows]
    noise = statistics.stdev(windows[0]) * (2 / window) ** 0.5
    if means[0] > means[1] > means[2] and means[0] - means[2] > 2 * noise:
        return f"the {key} has dropped for {3 * window} steps ({means[0]:.3g} -> {means[1]:.3g} -> {means[2]:.3g})."


def advice_on_closing(entry, args):
    """What to do where hardly an explanation of the first step ends as it should. entry: the step's metrics."""
    found = f"{entry['closed']:.0%} of the first explanations are closed: the closing tag, then the end of the turn."
    if entry["length_p50"] >= args.max_new_tokens:
        found += f" Most are cut off at --max-new-tokens {args.max_new_tokens}: raise it if they make sense so far."
    return (f"{found} A teacher that has not learned the format gets little from RL. Stop, warm it up on rows with "
            "explanations:\n    python sft_student.py --format teacher --data ROWS --out runs/warm-up --model "
            f"{shlex.quote(args.model)}\nand train --model runs/warm-up. Where your rows have none, take others for "
            "the warm-up, such as GSM8K (--explanation-column answer): it is the format that is learned.")


def advice_on_format(scored, student):
    """What to do where the student does not know the format of solutions; None where it does.

    scored: rewards.Scored of a step. It hardly does where the first of several tokens is the least likely one of nearly
    all solutions: often that token is the same for all, and says nothing of the explanation. student: its name.
    """
    parts = [part.tolist() for part in scored.solution_logprobs.split(scored.solution_lengths)]
    unknown = [part[0] for part in parts if len(part) > 1 and part[0] == min(part) < UNLIKELY]
    if not unknown or len(unknown) < 0.9 * len(parts):
        return None
    return (f"the student gives the first token of a solution a log-prob of {statistics.fmean(unknown):.1f}, whatever "
            "the explanation says: it seems not to know the format, and the score then hardly depends on the "
            "explanation. Warm it up, too:\n    python sft_student.py --data ROWS --out runs/warm-student --model "
            f"{shlex.quote(student)}\nwith rows that have explanations, and pass --student runs/warm-student.")


def check_logprob_diff(sampler_logprobs, trainer_logprobs, limit):
    """Mean absolute difference of the sampler's log-probs (N,) to the trainer's, nats a token, over all ranks.

    Raises UserError, on all ranks, where it is above the limit or NaN: the gradient would be wrong.
    """
    diff = all_reduce_mean((sampler_logprobs - trainer_logprobs).abs().mean().item(), len(sampler_logprobs)) or 0.0
    if not diff <= limit:
        raise UserError(
            f"sampler and trainer differ by {diff:.3g} nats a token, --max-logprob-diff is {limit}: the gradient would "
            "be wrong. Look for a difference in precision or temperature; the last checkpoint is untouched.")
    return diff


def quantiles(name, values):
    """The 10th, 50th and 90th percentile of the values of all ranks, as log keys."""
    values = sorted(value for part in all_gather_object(list(values)) for value in part)
    return {f"{name}_p{p}": values[min(len(values) * p // 100, len(values) - 1)] for p in (10, 50, 90)}


def split_held_out(rows, args):
    """(rows to train on, the last --eval-rows rows, none if nothing is measured on them)."""
    held_out = rows[-args.eval_rows :] if args.eval_every and args.eval_rows else []
    rows = rows[: len(rows) - len(held_out)]
    if len(rows) < args.prompts_per_step:
        raise UserError(f"{len(rows)} rows are left to train on, a step takes {args.prompts_per_step}: give more rows, "
                        "or lower --prompts-per-step or --eval-rows.")
    return rows, held_out


class StepTimer:
    """Seconds of a step's phases, and on a GPU the peak memory of each."""

    def __init__(self, device):
        self.cuda = device if device.type == "cuda" else None
        self.numbers = {}
        self._start()

    def _start(self):
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.cuda)
            torch.cuda.reset_peak_memory_stats(self.cuda)
        self.started = time.perf_counter()

    def end(self, phase):
        """A phase ends here: its seconds are those since the last call."""
        if self.cuda:
            import torch

            torch.cuda.synchronize(self.cuda)
            self.numbers[f"peak_gb_{phase}"] = torch.cuda.max_memory_allocated(self.cuda) / 1e9
        self.numbers[f"t_{phase}"] = time.perf_counter() - self.started
        self._start()

    @property
    def seconds(self):
        return sum(value for key, value in self.numbers.items() if key.startswith("t_"))
