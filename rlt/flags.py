# SPDX-License-Identifier: MIT
"""
Flags, and the run folder: what was asked for, what happened, and where to go on. No models, no rewards here.

    config.json     flags, command, git commit, versions, device, and what the script adds (a hash of the base)
    metrics.jsonl   one object a step
    samples.jsonl   a few full texts
    step_000050/    a checkpoint after 50 steps; renamed into place when it is whole
    final/          the result: a peft adapter or a Hugging Face folder

Under torchrun a script is several processes, its ranks: each does a share of a step, rank 0 alone prints and writes.
"""

import argparse
import atexit
import hashlib
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
RANK, WORLD = 0, 1  # which of how many processes this is
if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
HASHES = ("base_hash", "student_hash", "data_hash")  # what a resumed run, and every rank, must find the same
FREE_TO_CHANGE = {  # flags that a resumed run may give another value
    "resume", "steps", "save_every", "device", "dry_run", "offload_student"
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def flags(doc):
    """A script's parser: its docstring, defaults in --help, no abbreviations. Errors of ours become one line."""
    sys.excepthook = one_line
    if RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    return argparse.ArgumentParser(
        description=doc, usage="%(prog)s [flags]", formatter_class=_Help, allow_abbrev=False
    )


def number(kind, low=None, high=None, above=None):
    """An argparse type: an int or float in [low, high], or greater than `above`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {_a(kind)}") from None
        for wrong, rule in (
            (not math.isfinite(value), "a finite one"),
            (low is not None and not value >= low, f"at least {low}"),
            (high is not None and not value <= high, f"at most {high}"),
            (above is not None and not value > above, f"more than {above}"),
        ):
            if wrong:
                raise argparse.ArgumentTypeError(f"got {text}, expected {rule}")
        return value

    return parse


def _a(kind):
    return {int: "a whole number", float: "a number"}[kind]


def one_line(kind, error, trace):
    """Complaints that this repository raises itself say all there is to say; anything else keeps its traceback."""
    last = trace
    while last and last.tb_next:
        last = last.tb_next
    ours = last and Path(last.tb_frame.f_code.co_filename).resolve().parent == HERE
    ours = ours and issubclass(kind, (ValueError, OSError, NotImplementedError))
    if WORLD > 1:  # torchrun ends all ranks when one has gone: by then the cause is printed, and its echoes are not
        time.sleep(2 * (RANK > 0) + (not ours))
    if ours:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    if WORLD > 1:
        sys.stderr.flush()
        os._exit(1)  # at once: the group's own clean-up may wait for ranks that wait for this one


def digest(rows):
    """A hash of rows' questions and solutions: a resumed run must find those it was started on."""
    text = json.dumps([(row["question"], row["solution"]) for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()


def seed_for(*key):
    """A seed for this key alone, e.g. (seed, step, rank, batch): a resumed run draws what the first would have."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "big")


def pick(n, size, step, seed):
    """Indices of the `size` rows of this step: epochs of shuffled rows laid end to end, a function of step alone."""
    chosen = []
    for at in range(step * size, (step + 1) * size):
        epoch, place = divmod(at, n)
        if not chosen or place == 0:
            order = random.Random(seed_for(seed, "epoch", epoch)).sample(range(n), n)
        chosen.append(order[place])
    return chosen


def schedule(step, steps, warmup, final, shape="linear"):
    """Share of the peak learning rate at this step: up over `warmup` steps, then down to `final` at the last one."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step + 1 - warmup) / (steps - warmup)
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return 1 + (final - 1) * progress


def falling(metrics, key, window=10):
    """A sentence when `key` has fallen from window to window, three in a row and beyond its noise; else None."""
    values = [entry[key] for entry in read_jsonl(metrics)[-3 * window :]]
    if len(values) < 3 * window or len(read_jsonl(metrics)) % window:
        return None
    first, second, third = (values[i * window : (i + 1) * window] for i in range(3))
    means = [statistics.fmean(part) for part in (first, second, third)]
    noise = statistics.stdev(first) * (2 / window) ** 0.5
    if means[0] > means[1] > means[2] and means[0] - means[2] > 2 * noise:
        return f"the {key} has fallen for {3 * window} steps ({means[0]:.3g} -> {means[1]:.3g} -> {means[2]:.3g})."


def gap(sampler, trainer, limit):
    """Mean difference of the sampler's log-probs (a list) to the trainer's (N,), nats, over the tokens of all ranks.

    Beyond the limit it raises, on all of them.
    """
    import torch

    apart = (torch.tensor(sampler, device=trainer.device) - trainer).abs().mean().item()
    apart = mean(apart, len(sampler)) or 0.0
    if not apart <= limit:  # NaN does not pass either
        raise ValueError(
            f"sampler and trainer disagree by {apart:.3g} nats a token, --max-sampler-gap is {limit}: the gradient "
            "would be wrong. Look for a difference in precision or temperature; the last checkpoint is untouched."
        )
    return apart


def write_atomically(path, text):
    """Never half a file: written beside, flushed to the disk, renamed."""
    beside = Path(f"{path}.partial")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read_jsonl(path):
    """Objects of a JSON Lines file that is being appended to; a last line cut short by a kill is left out."""
    if not Path(path).exists():
        return []
    lines = Path(path).read_text().split("\n")[:-1]  # whole lines end in a newline
    return [json.loads(line) for line in lines]


def append_jsonl(path, entries):
    """Add objects to a JSON Lines file; on rank 0, elsewhere nothing."""
    if RANK == 0:
        with path.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))


def describe(args):
    """What config.json says of a run before it starts."""
    packages = ("torch", "transformers", "peft", "triton", "bitsandbytes", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"flags": vars(args), "command": command, "git": _git(), "versions": versions}


def _git():
    def ask(*what):
        return subprocess.run(["git", *what], cwd=HERE, capture_output=True, text=True)

    try:
        commit = ask("rev-parse", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(ask("status", "--porcelain", "-uno").stdout.strip())}


def check_same_flags(out, then, now):
    """A resumed run goes on with the flags it was started with."""
    for flag in sorted(set(now) - FREE_TO_CHANGE):
        if flag not in then:
            raise ValueError(f"--resume: {out} was started by a version without the flag {flag}. Go on with that one, "
                             "whose commit is in its config.json, or start anew with another --out.")
        if then[flag] != now[flag]:
            raise ValueError(
                f"--resume: {out} was started with {flag} = {then[flag]}, now it is {now[flag]}. "
                "Pass the flags it was started with, or another --out."
            )


class Run:
    """The folder of one run. `step` is where the loop starts, `checkpoint` the folder to load first, or None.

    Nothing is written before `start`, so that a run that can't begin leaves nothing behind.
    """

    def __init__(self, args):
        self.folder = Path(args.out)
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        self.step, self.checkpoint, self.before = 0, None, {}
        if self.folder.is_file() or (self.folder.is_dir() and any(self.folder.iterdir()) and not args.resume):
            raise FileExistsError(f"{self.folder} is there already. Pass --resume to continue a run, or another --out.")
        self.config = describe(args)
        before = self.folder / "config.json"
        if before.exists():
            self.before = json.loads(before.read_text())
            if "flags" not in self.before:
                raise FileExistsError(f"{self.folder} holds something else than a run. Pass another --out.")
            check_same_flags(self.folder, self.before["flags"], vars(args))
            whole = sorted(p for p in self.folder.glob("step_*") if p.suffix != ".partial")
            if whole:
                self.checkpoint, self.step = whole[-1], int(whole[-1].name.removeprefix("step_"))
                if self.step > args.steps:
                    raise ValueError(f"{self.folder} has done {self.step} steps, --steps is {args.steps}: raise it.")

    def start(self, **facts):
        """Write config.json, with these facts too, and cut the logs back to the checkpoint: the first trace of a run.

        A resumed run must find the weights and the rows it was started on.
        """
        for key in HASHES:
            if key in facts and self.before.get(key) not in (None, facts[key]):
                raise ValueError(
                    f"--resume: {key} is not what it was when {self.folder} was started: the weights or rows have "
                    "changed, or are loaded in another precision. Restore them, or start anew with another --out."
                )
        if len(set(gather((self.step, *(facts.get(key) for key in HASHES))))) > 1:
            raise ValueError(
                f"the ranks of {self.folder} have found different checkpoints, weights or rows: give all of them the "
                "same files, on several machines in a folder that they share."
            )
        self.config |= facts | {"ranks": WORLD}
        if RANK:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for log in (self.metrics, self.samples):
            kept = [entry for entry in read_jsonl(log) if entry["step"] < self.step]
            write_atomically(log, "".join(json.dumps(entry) + "\n" for entry in kept))
        write_atomically(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")

    def log(self, entry):
        """One step into metrics.jsonl; returns the line for the console."""
        append_jsonl(self.metrics, [entry])
        shown = ("reward", "score", "kl", "solved", "hinted", "closed", "leak", "kl_ref", "length", "eval_reward",
                 "eval_solved", "loss", "val_loss")
        words = [f"{key} {entry[key]:.4g}" for key in shown if entry.get(key) is not None]
        seconds = sum(value for key, value in entry.items() if key.startswith("t_"))
        return " | ".join([f"step {entry['step'] + 1}", *words, f"{seconds:.1f}s"])

    def log_samples(self, entries):
        append_jsonl(self.samples, entries)

    def save(self, step, write):
        """A checkpoint after `step` steps. write(folder) fills it; it appears under its name once it is whole."""
        self._place(self.folder / f"step_{step:06d}", write)

    def finish(self, write):
        self._place(self.folder / "final", write)
        return self.folder / "final"

    def _place(self, folder, write):
        if RANK:
            return meet()
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        write(beside)
        for path in beside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        meet()


# ---------------------------------------------------------------------------------------------------------
# ranks: the processes that torchrun starts. Alone, a sum is the number itself


def join(device):
    """Meet the other ranks -> (rank, world): NCCL between CUDA devices, gloo between CPUs. Alone (0, 1), no group.

    What asks for no device by name, as continuous batching does for its free memory, gets this one.
    """
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if WORLD > 1:
        if not torch.distributed.is_initialized():
            # Its defaults are the group at its import. Imported later it keeps the group's threads alive past the end,
            # and one that lets go of a tensor once the interpreter has closed aborts: one end in some hundreds.
            import torch.distributed.nn.functional

            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(days=1),  # a rank waits as long as the slowest samples; torchrun sees to dead ones
            )
            atexit.register(torch.distributed.destroy_process_group)
            sys.excepthook = one_line  # the group has put its own around it, which holds lines back until it returns
        print(f"{WORLD} ranks, this one on {device}", flush=True)
    return RANK, WORLD


def gather(thing):
    """This thing (whatever pickles) of every rank, in their order; all ranks must call."""
    if WORLD == 1:
        return [thing]
    from torch import distributed

    things = [None] * WORLD
    distributed.all_gather_object(things, thing)
    return things


def meet():
    """Wait until all ranks are here."""
    gather(None)


def total(*numbers):
    """Each number's sum over all ranks."""
    return [sum(values) for values in zip(*gather(numbers), strict=True)]


def mean(value, count):
    """The mean over all ranks' samples, or tokens, from the mean over this rank's `count`; None if there are none."""
    means = gather((value, count))
    n = sum(count for _, count in means)
    return sum(value * (count / n) for value, count in means if count) if n else None


def sum_gradients(parameters):
    """Every rank's gradients added up, in one all-reduce; a rank that had nothing to learn from adds zeros."""
    if WORLD == 1:
        return
    import torch

    bits = sum(p.detach().view(torch.int32).sum() for p in parameters).item()  # exact, in any order
    assert len(set(gather(bits))) == 1, "the ranks no longer have the same weights"
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)
