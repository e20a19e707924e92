# SPDX-License-Identifier: MIT
"""
How much slower a training step of the toy is beside a busy process, with and without OMP_WAIT_POLICY=passive:

    python bench/busy.py                  on a quiet machine; several minutes
    python bench/busy.py --limit 400      other flags go to train_rlt.py

rlt/__init__.py sets the variable before torch is imported, where the user has not set it: OpenMP's threads then sleep
while they wait, and don't take the cores that others compute on. Without it they spin for some time first. The four
cases (default and passive, quiet and beside a busy process) take turns, --rounds times. Each measurement is a line of
JSON in --out: the median seconds of a step. Aims: beside one busy process at most 2.5 times as slow as when it is
quiet, and when it is quiet no slower than without.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlt.files import read_jsonl  # noqa: E402

from measure import LOGS, Log, machine  # noqa: E402

# torch is imported first, so that rlt/__init__.py comes too late with its default
TORCH_FIRST = ("import os, runpy, sys, torch; del sys.argv[0]; sys.path[0] = os.path.dirname(sys.argv[0]); "
               "runpy.run_path(sys.argv[0], run_name='__main__')")
COMMANDS = {"default": [sys.executable, "-c", TORCH_FIRST], "passive": [sys.executable]}


@contextmanager
def busy_processes(n):
    """n processes that compute on one core each, as Popen objects."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def step_seconds(policy, steps, flags):
    """Seconds of every step of a run but the first, in rollout, scoring and update."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*COMMANDS[policy], str(ROOT / "train_rlt.py"), "--out", f"{folder}/run", "--steps", str(steps + 1),
             "--eval-every", "0", "--save-every", "0", "--device", "cpu", *flags],
            env=environment, check=True, stdout=subprocess.DEVNULL)
        entries = read_jsonl(f"{folder}/run/metrics.jsonl")[1:]
    return [entry["t_rollout"] + entry["t_score"] + entry["t_update"] for entry in entries]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=8, help="steps of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each case")
    parser.add_argument("--busy", type=int, default=1, help="busy processes")
    parser.add_argument("--out", default=LOGS / "busy.jsonl", help="JSONL to append to")
    args, train_flags = parser.parse_known_args()

    log = Log(args.out, **machine(), cores=len(os.sched_getaffinity(0)), omp_threads=os.environ.get("OMP_NUM_THREADS"))
    cases = [(policy, busy) for busy in (0, args.busy) for policy in COMMANDS]
    measured = {case: [] for case in cases}
    for i in range(args.rounds):
        for policy, busy in cases if i % 2 == 0 else reversed(cases):
            load = os.getloadavg()[0]
            with busy_processes(busy):
                seconds = step_seconds(policy, args.steps, train_flags)
            measured[policy, busy] += seconds
            log(part="busy", wait_policy=policy, busy=busy, round=i, steps=args.steps,
                seconds=statistics.median(seconds), slowest=max(seconds), load_before=load)

    median = {case: statistics.median(seconds) for case, seconds in measured.items()}
    print("\nseconds a step     quiet      busy     ratio")
    for policy in COMMANDS:
        quiet, busy = median[policy, 0], median[policy, args.busy]
        print(f"{policy:12} {quiet:11.3g} {busy:9.3g} {busy / quiet:9.2f}")
    print(f"quiet, passive against default: {median['passive', 0] / median['default', 0]:.2f}")


if __name__ == "__main__":
    main()
