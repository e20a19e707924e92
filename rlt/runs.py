# SPDX-License-Identifier: MIT
"""
The run folder: what was asked for, what happened, and where to continue. No models and no rewards here.

    config.json     flags, command, git commit, versions, device, and what the script adds (hashes of weights and rows)
    metrics.jsonl   one object a step
    samples.jsonl   a few full texts
    step_000050/    a checkpoint after 50 steps, with a manifest of checksums; renamed into place when it is complete
    final/          the result: a peft adapter or a Hugging Face folder
    bad_step.json   rows of the last update that was skipped for a loss or gradient that is not finite
"""

import hashlib
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlt.checkpoints import check_writable, keep_last, last_checkpoint, write_folder
from rlt.distributed import RANK, WORLD, all_gather_object, barrier
from rlt.errors import UserError, flag_of
from rlt.files import append_jsonl, read_lines, write_atomically
from rlt.flags import renamed
from rlt.interrupts import StopSignals, exit_code
from rlt.locks import hold_lock
from rlt.report import check_installed, open_report

ROOT = Path(__file__).resolve().parent.parent
# what a resumed run, and every rank, must find unchanged
HASHES = ("base_hash", "adapter_hash", "student_hash", "student_adapter_hash", "teacher_hash", "teacher_adapter_hash",
          "rows_hash")
RESUME_OVERRIDABLE = {"resume", "show_rows", "steps", "lr_steps", "save_every", "keep_checkpoints", "max_bad_steps",
                      "device", "dry_run", "offload_student", "micro_batch_tokens", "gradient_checkpointing", "out",
                      "quiet", "report"}
LOCK = ".lock"  # in a run folder; alone it does not make one
LOGGED = ("reward", "score", "kl", "solved", "hinted", "revealed", "closed", "leak", "kl_ref", "length",
          "eval_reward_before", "eval_reward", "eval_solved_before", "eval_solved", "loss", "relift_loss",
          "val_loss")  # what the console shows of a step


# ---------------------------------------------------------------------------------------------------------
# what config.json says


def digest(rows, *graded_by):
    """A hash of all that rows are trained on: a resumed run must find the rows it was started on. graded_by: columns
    that rewards are computed from."""
    columns = dict.fromkeys(("question", "solution", "explanation", "messages", "hint", *graded_by))
    text = json.dumps([{column: row[column] for column in columns if column in row} for row in rows],
                      default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(args):
    """What config.json says of a run before it starts."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "triton", "bitsandbytes", "vllm", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"flags": vars(args), "command": command, "git": _git_state(), "versions": versions}


def _git_state():
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)

    try:
        commit = git("rev-parse", "HEAD")
    except FileNotFoundError:  # no git on this machine
        return None
    if commit.returncode:
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(git("status", "--porcelain", "-uno").stdout.strip())}


# ---------------------------------------------------------------------------------------------------------
# the run folder


def config_of(path, out, script):
    """The config.json that a run has written. Raises UserError unless it is there and this script's."""
    try:
        config = json.loads(path.read_text())
        flags, command = dict(config["flags"]), config["command"].split()[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"--resume: {out} is not empty and not a run ({path} is missing or can't be read). "
                        "Pass another --out.") from None
    if command != script.split()[0]:
        raise UserError(f"--resume: {out} was written by {command}, this is {script.split()[0]}. Pass another --out.")
    return config | {"flags": flags}


def continued(config, before):
    """The config of a run that goes on from the one with the config `before`: its command stays, later ones are
    listed."""
    if not before:
        return config
    return config | {"command": before["command"], "resumed_by": [*before.get("resumed_by", []), config["command"]]}


def only_looks(args):
    """Whether a script will stop before it writes anything: its --out may exist."""
    return bool(vars(args).get("show_rows")) or vars(args).get("dry_run") is not None


def check_same_flags(out, before, now):
    """A resumed run continues with the flags it was started with. before, now: flags as dicts; all differences are
    named at once. Flags that have been renamed since are compared under their new names, paths as what they mean."""
    before = renamed(before)
    different = []
    for flag in sorted(set(now) - RESUME_OVERRIDABLE):
        if flag in before and _spelled_out(before[flag]) != _spelled_out(now[flag]):
            different.append(f"{flag_of(flag)} {before[flag]}, now {now[flag]}")
    if different:
        raise UserError(f"--resume: {out} was started with {'; '.join(different)}. Pass the flags it was started "
                        "with, or another --out.")


def _spelled_out(value):
    return os.path.realpath(value) if isinstance(value, str) else value


def check_same_hashes(out, before, now):
    """Raise UserError where a resumed run finds other weights or rows than it was started on. before, now: HASHES."""
    for key in HASHES:
        if key in now and before.get(key) not in (None, now[key]):
            raise UserError(
                f"--resume: {key} is not what it was when {out} was started: the weights or rows have changed, or are "
                "loaded in another precision. Restore them, or start anew with another --out.")


def resume_command():
    """The command that continues this run."""
    arguments = sys.argv[1:] + ["--resume"] * ("--resume" not in sys.argv)
    launcher = "python"
    if WORLD > 1:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = f"--nnodes={WORLD // here} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT " if WORLD > here else ""
        launcher = f"torchrun {nodes}--nproc_per_node={here}"
    return f"{launcher} {shlex.join([sys.argv[0], *arguments])}"


def check_run_folder(args):
    """Whether the folder --out has files. Raises UserError where it can't be this run's: a script calls it before it
    makes or reads anything."""
    folder = Path(args.out)
    check_installed(args)
    if os.path.isfile(folder):
        raise UserError(f"--out {folder} is a file, expected a folder. Pass another --out.")
    check_writable(folder)
    exists = has_files(folder)
    if exists and not (args.resume or only_looks(args)):
        raise UserError(f"{folder} already exists. Pass --resume to continue a run, or another --out.")
    if exists and args.resume:
        config_of(folder / "config.json", folder, Path(sys.argv[0]).name)
    return exists


def has_files(folder):
    return folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())


class Run:
    """The folder of one run. `step` is where the loop starts, `checkpoint` the folder to load first, or None.
    lr_steps: over which the learning rate falls; a resumed run keeps those that it was started with.

    Nothing is written before `start`, so that a run that can't begin leaves nothing behind. From then on no other
    process can write into the folder.
    """

    def __init__(self, args):
        self.args, self.folder = args, Path(args.out)
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        self.step, self.checkpoint, self.config_before = 0, None, {}
        self.lr_steps = args.lr_steps or args.steps
        self.report = None
        self.weights_changed = False  # since this step began: it can't be abandoned any more
        self.existed = check_run_folder(args)
        self.config = describe(args)
        if self.existed and args.resume:
            self._find_checkpoint(args)
        self._check_lr_steps()

    def _find_checkpoint(self, args):
        self.config_before = config_of(self.folder / "config.json", self.folder, self.config["command"])
        self._lock()
        check_same_flags(self.folder, self.config_before["flags"], vars(args))
        self.step, self.checkpoint = last_checkpoint(self.folder)
        if self.step > args.steps:
            raise UserError(f"{self.folder} has done {self.step} steps, --steps is {args.steps}: raise it.")
        if self.step and not args.lr_steps:
            before = self.config_before
            self.lr_steps = before.get("lr_steps") or before["flags"].get("steps", args.steps)
            if self.lr_steps != args.steps:
                print(f"{self.folder} was started with a learning rate that falls over {self.lr_steps} steps, and "
                      "keeps it: pass --lr-steps for another.")

    def _check_lr_steps(self):
        """Raise UserError where the learning rate is 0 before the last step: SFT's falls to 0, RL's to a fraction."""
        if self.args.steps > self.lr_steps and not vars(self.args).get("final_lr_fraction"):
            raise UserError(f"the learning rate is 0 from step {self.lr_steps} on: pass --lr-steps {self.args.steps} "
                            "to raise it.")

    def _lock(self):
        if RANK == 0:
            hold_lock(self.folder / LOCK, self.folder)

    def start(self, **facts):
        """Write config.json, with these facts too, and cut the logs back to the checkpoint: the first trace of a run.

        Raises UserError where a resumed run, or another rank, finds other weights or rows than the run was started on.
        """
        check_same_hashes(self.folder, self.config_before, facts)
        if len(set(all_gather_object((self.step, *(facts.get(key) for key in HASHES))))) > 1:
            raise UserError(
                f"the ranks of {self.folder} have found different checkpoints, weights or rows: give all of them the "
                "same files, on several machines in a folder that they share.")
        report_id = self.config_before.get("report_id") or secrets.token_hex(4)
        self.config = continued(self.config, self.config_before) | facts
        self.config |= {"ranks": WORLD, "lr_steps": self.lr_steps, "report_id": report_id}
        if RANK:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        if has_files(self.folder) and not self.existed:
            raise UserError(f"{self.folder} was made by another process since this one started. Pass another --out.")
        if vars(self.args).get("report"):  # first: it may refuse
            self.report = open_report(self.args.report, self.folder, self.config, self.step)
        write_atomically(self.folder / "config.json", json.dumps(self.config, indent=2) + "\n")  # what makes it a run
        for log in (self.metrics, self.samples):
            self._cut_back(log)

    def _cut_back(self, log):
        """Drop what the log says of steps after the checkpoint. What can't be read is kept, and said."""
        lines = read_lines(log)
        steps = [entry.get("step") for _, entry in lines if entry]
        if self.step and log == self.metrics and (not steps or max(steps) + 1 < self.step):
            print(f"warning: {log} {'ends early' if steps else 'is missing'}: {self.step} steps were taken, it has "
                  f"{len(steps)} of them. It goes on from here.")
        if torn := [str(number) for number, (_, entry) in enumerate(lines, 1) if entry is None]:
            print(f"warning: {log} has lines that are not JSON objects: {', '.join(torn)}. They stay as they are.")
        kept = [line for line, entry in lines if entry is None or entry.get("step", 0) < self.step]
        write_atomically(log, "".join(line + "\n" for line in kept))

    def log(self, entry, progress=None):
        """Append one step to metrics.jsonl, and print it above the progress bar, if one is given -> the line."""
        append_jsonl(self.metrics, [entry])
        if self.report:
            self.report(entry["step"], entry)
        shown = [f"{key} {entry[key]:.4g}" for key in LOGGED if entry.get(key) is not None]
        seconds = sum(value for key, value in entry.items() if key.startswith("t_"))
        line = " | ".join([f"step {entry['step']}", *shown, f"{seconds:.1f}s"])
        if progress is not None and not self.args.quiet:
            progress.write(line)
        return line

    def log_samples(self, entries):
        append_jsonl(self.samples, entries)

    def steps(self, progress, save):
        """The steps of a training loop, from an iterator over them. save(folder) fills a checkpoint: one follows every
        --save-every steps and the last one.

        SIGTERM and Ctrl-C end the loop with a checkpoint and the command that continues the run. A step that has not
        changed the weights yet is abandoned at once, any other one is finished. Several ranks finish their step, too:
        each may be somewhere else in it. But torchrun kills them after 30 seconds (--shutdown-timeout), so rank 0 first
        saves what the steps before have done. A second signal ends the process at once.
        """
        self.saved = self.step
        with StopSignals(lambda number: self._stop(number, save, abandon=True)) as signals:
            for step in progress:
                self.step, self.weights_changed = step, False
                if signals.received and WORLD == 1:  # between the check below and here
                    self._stop(signals.received, save)
                yield step
                self.weights_changed, self.step = True, step + 1
                stop = max(all_gather_object(signals.received))
                if stop:
                    self._stop(stop, save)
                if self.args.save_every and self.step % self.args.save_every == 0 or self.step == self.args.steps:
                    self.save(self.step, save)

    def _stop(self, number, save, abandon=False):
        """End the process with a checkpoint after `self.step` steps. abandon: unless the weights have changed since."""
        if abandon and self.weights_changed:
            return
        if abandon and WORLD > 1:
            if RANK == 0 and self.step > self.saved:
                self._write_checkpoint(self.step, save)
            return
        if self.step > self.saved:
            self.save(self.step, save)
        if RANK == 0:
            saved = f"{self.folder} has a checkpoint after {self.step} steps" if self.step else "no step was taken"
            message = f"\ninterrupted: {saved}. To go on:\n    {resume_command()}\n"
            os.write(2, message.encode())  # in a signal handler print may meet its own buffer
        raise SystemExit(exit_code(number))

    def save(self, step, write):
        """A checkpoint after `step` steps. write(folder) fills it; it gets its name once it is complete. Then those
        before the last --keep-checkpoints go."""
        if RANK == 0:
            self._write_checkpoint(step, write)
        self.saved = step
        barrier()

    def _write_checkpoint(self, step, write):
        write_folder(self.folder / f"step_{step:06d}", write)
        keep_last(self.folder, self.args.keep_checkpoints)

    def finish(self, write):
        """The result of the run, in final/ -> that folder."""
        if RANK == 0:
            write_folder(self.folder / "final", write)
        barrier()
        return self.folder / "final"
