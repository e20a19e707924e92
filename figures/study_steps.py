# SPDX-License-Identifier: MIT
"""The steps that the arms of a study consist of: one command each, in the folder of the arm's setting and seed.

A step returns the path of what it made. What a command has made is not made again, so that arms share it. Several
processes may work off the same study: an arm and a step belong to one of them at a time.
"""

import contextlib
import fcntl
import functools
import json
import os
import platform
import runpy
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESUMABLE = ("train_rlt.py", "rl_student.py", "on_policy_student.py", "sft_student.py", "distill.py")


def read_rows(path):
    """The objects of a JSON Lines file. A last line without its newline is still being written, and left out."""
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def mean_of(rows, keys):
    return {key: statistics.fmean(row[key] for row in rows) for key in keys}


def file_name(arm):
    return arm.replace(", ", "-").replace(" ", "-")


class Busy(Exception):
    """Another process is at this arm or step."""


@contextlib.contextmanager
def only_one(path):
    """Hold the file `path` as a lock. Raises Busy where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(path) from None
        yield


class Job:
    """One arm on one seed of one setting. A study has a class of its own, with the steps of its arms.

    recipes: {arm: function of a Job -> its student, or None where the arm only measures}. quick: few steps and rows.
    """

    made = {}  # script: the file in its --out that is there once it has ended, where that is not final/

    def __init__(self, recipes, setting, seed, arm, quick=False):
        self.recipes, self.setting, self.seed, self.arm, self.quick = recipes, setting, seed, arm, quick
        self.folder = ROOT / "runs/study" / f"{'quick-' * quick}{setting.replace(' ', '-')}-seed{seed}"
        self.name = file_name(arm)
        self.forget()

    def forget(self):
        """Begin anew with what the log will say of the arm."""
        self.commands, self.facts = [], {}
        self.seconds = {}  # of the commands that ran; what existed took none, what was continued has those of the rest

    def base(self):
        """Make the base model and the rows, if they do not exist."""
        raise NotImplementedError

    def accuracy(self, student):
        """{split and decoding: exact match} of a student."""
        raise NotImplementedError

    def run(self, script, *flags, out=None, seed=True):
        """Run one command in the folder, unless `out` is complete, and note it as a user would type it."""
        flags = [*flags, *(["--seed", self.seed] if seed else []), *(["--out", out] if out else [])]
        command = ["python", script, *map(str, flags)]
        self.commands.append(" ".join(command))
        if out and self.is_complete(script, out):
            return out
        with only_one(self.folder / f"{out}.lock") if out else contextlib.nullcontext():
            if out and self.is_complete(script, out):  # by now
                return out
            print(f"[{self.folder.name}] {self.commands[-1]}", flush=True)
            if script in RESUMABLE:
                command.append("--resume")
            started = time.time()
            if run_command(self.folder, command):
                raise RuntimeError(f"{self.commands[-1]} failed: see {self.folder}/log.txt")
            self.seconds[self.commands[-1]] = time.time() - started
            if out and out.endswith(".jsonl"):
                (self.folder / f"{out}.complete").touch()
        return out

    def is_complete(self, script, out):
        marks = f"{out}/{self.made.get(script, 'final')}", f"{out}.complete"
        return any((self.folder / mark).exists() for mark in marks)

    def if_quick(self, *flags):
        return flags if self.quick else ()

    def read(self, path):
        return read_rows(self.folder / path)

    def report(self, path):
        return json.loads((self.folder / path).read_text())

    def write(self, path, rows):
        replace_file(self.folder / path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    def other(self, arm):
        """The job of another arm on the same seed."""
        return type(self)(self.recipes, self.setting, self.seed, arm, self.quick)

    def student_of(self, arm):
        """The student of another arm on the same seed, made if it does not exist."""
        return self.take(arm, self.recipes[arm])

    def take(self, arm, make):
        """What make(job) returns for the job of another arm on the same seed."""
        other = self.other(arm)
        made = make(other)
        self.adopt(other)
        return made

    def adopt(self, other):
        """The commands of another job become this one's."""
        self.commands += other.commands
        self.seconds |= other.seconds


def replace_file(path, text):
    """Write a file that other processes may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


@functools.cache
def can_fork():
    """Whether a forked child could use CUDA, or there is none: a package that was imported may have started it here."""
    import torch

    return not torch.cuda.is_available() or fork(torch.cuda.init) == 0


def fork(function, *arguments):
    """Call a function in a forked child -> the exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = function(*arguments) or 0
        finally:  # whatever happens: the child must not continue as the study
            os._exit(status)
    return os.waitpid(child, 0)[1]


def run_command(folder, command):
    """Do what `python script flags` does in this folder, with its output in log.txt -> exit status."""
    if can_fork():  # a new process would spend seconds on imports
        return fork(run_in_child, folder, command)
    with (folder / "log.txt").open("a") as log:
        command = [sys.executable, str(ROOT / command[1]), *command[2:]]
        return subprocess.run(command, cwd=folder, stdout=log, stderr=log).returncode


def run_in_child(folder, command):
    """run_command in a forked child."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv, sys.path[0] = command[1:], str((ROOT / command[1]).parent)
    status = 0
    try:
        runpy.run_path(str(ROOT / command[1]), run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else bool(leaving.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


# ---------------------------------------------------------------------------------------------------------
# all arms


def prepare_for_forks():
    """Set what torch reads when it is imported, and import what the children need."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() does not start CUDA
    import torch

    if torch.version.cuda is None:  # bitsandbytes, which peft imports, would start it
        import peft  # noqa: F401


def work_off(jobs, log):
    """Run all arms that are not in the log, in order; other processes may do the same -> the keys of those that failed.

    Returns when nothing is left to do, or to wait for.
    """
    failed = set()
    while True:
        outcomes = []
        for job in jobs:
            outcomes.append(try_arm(job, log, failed))
            if outcomes[-1] == "run":  # from the top again: another process may have finished what comes first
                break
        else:
            if "busy" not in outcomes:
                return failed
            time.sleep(2)


def try_arm(job, log, failed):
    """Run an arm -> "run", "done" before or failed, or "busy" where another process is at it or at one of its steps."""
    key = job.setting, job.seed, job.arm
    try:
        with only_one(job.folder / f"{job.name}.lock"):
            rows = read_rows(log) if log.exists() else []
            if key in failed or key in {(row["setting"], row["seed"], row["arm"]) for row in rows}:
                return "done"
            job.forget()
            run_arm(job, log)
    except Busy:
        return "busy"
    except RuntimeError as error:  # of a command; the other arms can do without this one
        failed.add(key)
        print(f"[{job.folder.name}] {job.arm}: {error}", flush=True)
    return "run"


def run_arm(job, log):
    """Run an arm and append its row to the log."""
    started = time.time()
    job.base()
    student = job.recipes[job.arm](job)
    accuracy = {"accuracy": job.accuracy(student)} if student else {}
    row = {
        "setting": job.setting, "arm": job.arm, "seed": job.seed, **accuracy, **job.facts, "commands": job.commands,
        "seconds": job.seconds, "minutes": (time.time() - started) / 60, "date": time.strftime("%Y-%m-%d"),
        "machine": machine(), "torch": version("torch"), "transformers": version("transformers"),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")
    result = f"{100 * row['accuracy']['test greedy']['mean']:.1f} % greedy" if student else "measured"
    print(f"[{job.folder.name}] {job.arm}: {result}, {row['minutes']:.1f} min", flush=True)


def machine():
    """What the commands ran on. Asked of the driver: torch would start CUDA."""
    import torch

    if torch.version.cuda and shutil.which("nvidia-smi"):
        question = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        asked = subprocess.run(question, capture_output=True, text=True)
        if asked.returncode == 0:
            return asked.stdout.splitlines()[0]
    return f"{platform.machine()} CPU, one thread"
