# SPDX-License-Identifier: MIT
"""
What a GPU can tell about this repository, in one command: two minutes of an H100, without vLLM.

    python bench/gpu.py                on the CUDA GPU of this machine, whatever it is
    python bench/gpu.py --size tiny    the same code on a CPU, small

Parts
    tests     the tests that need a GPU: pytest -m gpu
    step      for each size of models, with random weights: a rollout, a scoring pass, a reference pass and an update;
              tokens/s, and the peak memory beside the one that --dry-run expects. The rollout by vLLM too, with what it
              takes of a GPU, where it is installed
    kernels   logits to numbers: eager torch, torch.compile, Liger and TRL where they are installed, and rewards.py;
              GB/s as a share of a copy's in the same run, and the error against float64

Bits are the widest that fit, by the dry run. One log: a line of JSON for each measurement, appended to --out. One table
at the end, printed and written beside the log (.md). A part that would start after --minutes is logged as skipped.
"""

import argparse
import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlt.dry_run import MARGIN  # noqa: E402

import scoring  # noqa: E402
import step  # noqa: E402
import torch  # noqa: E402
from measure import CUDA, LOGS, Log, copy_bandwidth, matmul_rate  # noqa: E402
from random_models import can_quantise  # noqa: E402

PARTS = ("tests", "step", "kernels")
TEST_SECONDS = 180  # that the tests may take
KERNELS = ((4096, 152_064, torch.bfloat16), (4096, 32_000, torch.bfloat16), (4096, 152_064, torch.float32))
KERNELS_ON_A_CPU = ((64, 32_000, torch.bfloat16),)


def run_tests(log, seconds):
    """pytest -m gpu in a process of its own, for at most so many seconds."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        log(part="tests", failed=f"stopped after {seconds:.0f} s")
        return
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-500:])}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    log(part="tests", counts=counts, seconds=time.perf_counter() - started, failures=failures)


def widest_bits(size, shape):
    """(teacher's bits, student's) that fit into the GPU's free memory, by the dry run; None if none do."""
    if not CUDA:
        return step.WIDE, step.WIDE
    free, _ = torch.cuda.mem_get_info()
    pairs = [(16, 16), (16, 4), (4, 4)] if can_quantise() else [(16, 16)]
    for pair in pairs:
        if max(step.expected_bytes(size, *pair, **shape).values()) + MARGIN < free:
            return pair
    return None


def longest_rollout(size):
    """(tokens, rows) of a rollout of the longest completions: half as many cached tokens as it may hold."""
    return size.lengths[-1], max(1, size.cached // size.lengths[-1] // 2)


def measure_step(log, name, matmul):
    """All phases at the longest completions, one row a pass."""
    size = step.size_of(name)
    length, batch = longest_rollout(size)
    shape = dict(length=length, count=1, batch=batch)
    bits = widest_bits(size, shape)
    if bits is None:
        log(part=f"step, {name}", failed="does not fit, says the dry run")
        return
    log = Log(log.path, **log.machine | {"size": name})
    decoded = [(context, 64) for context in size.lengths[:1]] + [(length, batch)] if CUDA else []
    step.whole_step(log, size, *bits, matmul, part="step", rollout_rows=batch, decoded=decoded, **shape)


def measure_vllm(log, name, matmul):
    """The same rollout by vLLM."""
    size = step.size_of(name)
    step.measure_vllm(Log(log.path, **log.machine | {"size": name}), size, [longest_rollout(size)], matmul)


# ---------------------------------------------------------------------------------------------------------
# the table


def table(entries):
    """The log's entries as Markdown."""
    lines = ["| what | result | share | peak, GB | expected, GB |", "| --- | --- | --- | --- | --- |"]
    for entry in entries:
        cells = [describe(entry), *results(entry)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def describe(entry):
    if entry["part"] == "reduce":
        numbers = {"stats": "KL, two log-probs, entropy", "logprobs": "log-prob, entropy"}[entry["kind"]]
        return f"{numbers}, {entry['tokens']:,} x {entry['vocab']:,} {entry['dtype']}: {entry['impl']}"
    if "phase" in entry:
        rows = entry["rollout_rows"] if entry["phase"] == "rollout" else 1
        bits = f"{entry['teacher_bits']} and {entry['student_bits']} bits"
        return f"{entry['size']}, {bits}: {entry['phase']}, {rows} x {entry['length']:,} tokens"
    if entry["part"] == "decode":
        how = "as a CUDA graph" if entry["graph"] else "without a graph"
        return f"{entry['size']}, decode step {how}: {entry['batch']} x {entry['context']:,} tokens"
    if entry["part"] == "rollout":
        shape = f", {entry['batch']} x {entry['context']:,} tokens" if "batch" in entry else ""
        return f"{entry['size']}, {entry['engine']}: rollout{shape}"
    return entry["part"]


def results(entry):
    """result, share, peak, expected peak: as text, empty where there is none."""
    if entry.get("failed") or entry.get("skipped"):
        return [entry.get("failed") or f"skipped: {entry['skipped']}", "", "", ""]
    if entry["part"] == "tests":
        counts = [f"{n} {kind}" for kind, n in entry["counts"].items()] or ["none ran"]
        return [", ".join(counts + entry["failures"]), "", "", ""]
    if entry["part"] == "ceilings":
        return [f"copy {entry['copy_gb_s']:,.0f} GB/s, matmul {entry['matmul_tflop_s']:,.3g} TFLOP/s", "", "", ""]
    if entry["part"] == "reduce":
        if entry["ms"] is None:
            return ["out of memory", "", "", ""]
        peak = "" if entry["peak_mb"] is None else f"{entry['peak_mb'] / 1000:.2f}"
        return [f"{entry['ms']:.3g} ms, {entry['gb_s']:,.3g} GB/s, error {entry['error']:.0e}",
                f"{entry['of_copy']:.0%} of a copy", peak, ""]
    peaks = ["" if entry.get(key) is None else f"{entry[key]:.3g}" for key in ("peak_gb", "expected_gb")]
    return [f"{entry['tokens_per_s']:,.0f} tokens/s", f"{entry['of_matmul']:.0%} of matmul", *peaks]


# ---------------------------------------------------------------------------------------------------------


def main():
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--size", nargs="+", choices=step.SIZES, default=["1.5b", "7b"], help="of the models")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no part is started")
    parser.add_argument("--out", default=LOGS / "gpu.jsonl", help="JSONL to append to")
    args = parser.parse_args()
    if not CUDA and args.size != ["tiny"]:
        parser.error("there is no CUDA GPU here: pass --size tiny")

    log = step.open_log(args.out, "/".join(args.size), "gpu.py")
    before = log.path.stat().st_size if log.path.exists() else 0
    copy, matmul = copy_bandwidth(), matmul_rate()
    log(part="ceilings", copy_gb_s=copy / 1e9, matmul_tflop_s=matmul / 1e12)

    def left():
        return started + 60 * args.minutes - time.perf_counter()

    jobs = []
    if "tests" in args.parts:
        jobs.append(("tests", lambda: run_tests(log, min(left(), TEST_SECONDS))))
    if "step" in args.parts:
        for name in args.size:
            jobs += [(f"step, {name}", lambda name=name: measure_step(log, name, matmul)),
                     (f"vLLM, {name}", lambda name=name: measure_vllm(log, name, matmul))]
    if "kernels" in args.parts:
        for tokens, vocab, dtype in KERNELS if CUDA else KERNELS_ON_A_CPU:
            jobs.append((f"kernels, {tokens} x {vocab} {dtype}",
                         lambda n=tokens, v=vocab, d=dtype: scoring.reduce(log, n, v, d, copy)))
    for name, job in jobs:
        if left() <= 0:
            log(part=name, skipped=f"--minutes {args.minutes:g} were over")
            continue
        gc.collect()
        torch.cuda.empty_cache()  # what the last job has left counts as used
        try:
            job()
        except torch.OutOfMemoryError:
            log(part=name, failed="out of memory")

    with log.path.open() as file:
        file.seek(before)
        text = table([json.loads(line) for line in file])
    log.path.with_suffix(".md").write_text(f"{log.machine['device']}, {log.machine['date']}\n\n{text}")
    print(f"\n{text}\nin {(time.perf_counter() - started) / 60:.1f} minutes, appended to {log.path}")


if __name__ == "__main__":
    main()
