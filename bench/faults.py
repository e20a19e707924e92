# SPDX-License-Identifier: MIT
"""
Break things on purpose, many times, and count what was lost.

    python bench/faults.py --kills 25 --folders 100 --inputs 60 --fuzz 60 --soak 2000     hours
    python bench/faults.py --kills 3 --folders 20 --inputs 10 --fuzz 0.2 --soak 20        minutes

Parts    kills     every script, ended by kill -9, SIGTERM and Ctrl-C at random moments and resumed, until it has ended:
                   its metrics and results against those of a run that nobody touched (evaluate.py begins again)
         folders   a run folder with random damage: refused in one line, or resumed where it was
         inputs    rows and flags that nobody should pass: one line and exit code 2
         fuzz      random texts into the tag parser, the answer parser and the row loader: a value or a UserError
         soak      one long run of the toy: memory, open files and seconds a step of its last quarter and its second

Each part prints its counts and appends them to --log as lines of JSON, one a script in kills. The exit code
is 1 if anything was lost.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

from rlt import checkpoints, runs  # noqa: E402
from rlt.errors import UserError  # noqa: E402
from rlt.files import read_jsonl  # noqa: E402

from fuzz import fuzz  # noqa: E402
from measure import Log, machine  # noqa: E402

RL = ["--limit", "80", "--prompts-per-step", "2", "--group-size", "4", "--max-new-tokens", "12", "--eval-rows", "4"]
SOAK = ["--limit", "80", "--prompts-per-step", "2", "--group-size", "2", "--max-new-tokens", "4", "--eval-rows", "2",
        "--eval-every", "100", "--save-every", "50"]
SCRIPTS = {  # script: flags that make it small
    "train_rlt.py": [*RL, "--steps", "6", "--save-every", "2", "--sync-ref-every", "3"],
    "rl_student.py": [*RL, "--steps", "6", "--save-every", "2", "--rewards", "0", "0.1", "1"],
    "on_policy_student.py": ["--teacher", "toy-teacher", "--limit", "80", "--prompts-per-step", "8", "--max-new-tokens",
                             "12", "--eval-rows", "4", "--steps", "6", "--save-every", "2"],
    "sft_student.py": ["--data", "toy", "--limit", "80", "--val-rows", "8", "--steps", "12", "--save-every", "3"],
    "distill.py": ["--model", "toy-teacher", "--limit", "64", "--batch-size", "8", "--max-new-tokens", "12"],
    "evaluate.py": ["--model", "toy", "toy-teacher", "--limit", "64", "--batch-size", "8", "--max-new-tokens", "24"],
}
STOPS = {  # exit codes, of a process that has ended before the signal came, too
    signal.SIGKILL: (-9, 0),
    signal.SIGTERM: (143, -15, 0),  # -15: before its loop
    signal.SIGINT: (130, -2, 0),
}


def start(folder, script, *flags):
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], cwd=folder, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended_badly(process):
    return f"exit code {process.returncode} of {' '.join(map(str, process.args))}\n{process.stderr.read()}"


def result_of(out):
    """What a script has left, without its times: {name: bytes or entries}. peft writes a config's names in any order.
    Files of an evaluation are read as they are needed: half of one would raise."""
    if out.suffix == ".jsonl":
        return {"rows": out.read_bytes()}
    if not (out / "metrics.jsonl").exists():
        return {str(path.relative_to(out)): read_jsonl(path) for path in sorted(out.glob("*/*.jsonl"))} | {
            str(path.relative_to(out)): {key: value for key, value in json.loads(path.read_text()).items()
                                         if key not in ("flags", "command")} for path in sorted(out.glob("*/*.json"))}
    entries = [{key: value for key, value in entry.items() if not key.startswith("t_") and key != "tokens_per_s"}
               for entry in read_jsonl(out / "metrics.jsonl")]
    return {"metrics": entries} | {path.name: path.read_bytes() for path in (out / "final").glob("*.safetensors")}


def progress_of(out):
    """A number that grows while a script works."""
    files = [path for path in (out, out / "metrics.jsonl") if path.is_file()]
    # not in a training run, whose folders are renamed meanwhile
    return sum(path.stat().st_size for path in files or out.glob("*/eval_*"))


def kills(folder, n, draw, scripts=tuple(SCRIPTS)):
    """n interruptions of each script -> an entry of counts for each."""
    for script in scripts:
        flags = SCRIPTS[script]
        suffix = ".jsonl" if script == "distill.py" else ""
        straight, began = folder / f"straight-{script}{suffix}", time.monotonic()
        process = start(folder, script, *flags, "--out", straight)
        if process.wait():
            raise SystemExit(ended_badly(process))
        resume = [] if script == "evaluate.py" else ["--resume"]
        loading = 0.6 * (time.monotonic() - began) if script == "evaluate.py" else 1e9  # it writes at its end alone
        counts = {"script": script, "kills": 0, "runs": 0, "identical": 0, "other_exit_codes": 0}
        while counts["kills"] < n:
            out = folder / f"killed-{script}-{counts['runs']}{suffix}"
            while True:
                before, number, began = progress_of(out), draw.choice(list(STOPS)), time.monotonic()
                process = start(folder, script, *flags, "--out", out, *resume)
                while process.poll() is None and progress_of(out) == before and time.monotonic() < began + loading:
                    time.sleep(0.02)  # loading, then the first step
                time.sleep(draw.random() * min(loading, 0.5 if resume else loading))
                if process.poll() is None and counts["kills"] < n:
                    process.send_signal(number)
                    counts["kills"] += 1
                    counts["other_exit_codes"] += process.wait() not in STOPS[number]
                elif process.wait():  # it ended by itself, or was left to
                    raise SystemExit(ended_badly(process))
                if process.returncode == 0:
                    break
            counts["runs"] += 1
            counts["identical"] += result_of(out) == result_of(straight)
        yield counts | {"failures": counts["runs"] - counts["identical"] + counts["other_exit_codes"]}


def folders(folder, n, draw):
    """n damaged copies of a run -> one entry of counts.

    In a copy the newest checkpoint is named if it is damaged, never read.
    """
    whole = folder / "whole"
    process = start(folder, "train_rlt.py", *SCRIPTS["train_rlt.py"], "--out", whole)
    if process.wait():
        raise SystemExit(ended_badly(process))
    config = json.loads((whole / "config.json").read_text())
    sys.argv = [str(ROOT / "train_rlt.py")]
    counts = {"refused": 0, "resumed": 0, "failures": 0}
    for _ in range(n):
        copy = folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(whole, copy)
        path = draw.choice(sorted(p for p in copy.rglob("*") if p.is_file()))
        how = draw.choice(["missing", "empty", "cut", "bit"])
        data = path.read_bytes()
        at = draw.randrange(max(1, len(data)))
        if how == "missing":
            path.unlink()
        else:
            path.write_bytes({"empty": b"", "cut": data[:at], "bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                              if data else b"\0"}[how])
        changed = not path.exists() or path.read_bytes() != data
        try:
            run = runs.Run(argparse.Namespace(**config["flags"] | {"out": str(copy), "resume": True}))
            with contextlib.redirect_stdout(io.StringIO()):
                run.start(**{key: config[key] for key in runs.HASHES if key in config})
            in_last = f"step_{run.step:06d}" in path.parts and path.name != checkpoints.MANIFEST
            outcome = "failures" if in_last and changed else "resumed"
        except UserError:
            outcome = "refused"
        except Exception as error:
            outcome = "failures"
            print(f"{path.relative_to(copy)} {how}: {type(error).__name__}: {error}")
        counts[outcome] += 1
    yield counts


def inputs(folder, n, draw):
    """n files and flags that are wrong -> one entry of counts. One line on stderr, exit code 2, nothing written."""
    good = (folder / "runs/toy/train.jsonl").read_bytes().splitlines()[:5]
    row = json.loads(good[0])
    junk = [None, 7, -0.0, [], {}, [[]], "", " ", "\ud800", "\0", "9" * 5000, "[" * 3000, {"question": {}}, True]
    counts = {"one_line": 0, "accepted": 0, "failures": 0}
    flags = [["--seed", "1e3"], ["--seed", 2**70], ["--lr", "nan"], ["--limit", 0], ["--lr", "-1"], ["--bits", 7],
             ["--model", "runs/nowhere"], ["--model", "/dev/null"], ["--out", "/proc/x"], ["--data", "/dev/null"],
             ["--data", folder], ["--device", "abacus"], ["--lora-targets", "nothing"], ["--steps", 10**400]]
    for i in range(n):
        path, out = folder / f"input-{i}.{draw.choice(['jsonl', 'json', 'parquet', 'csv'])}", folder / f"input-out-{i}"
        kind = draw.choice(["row", "bytes", "flags"])
        if kind == "row":
            bad = row | {draw.choice(["question", "solution", "explanation"]): draw.choice(junk)}
            path = path.with_suffix(".jsonl")
            path.write_bytes(b"\n".join([*good, json.dumps(bad).encode()]) + b"\n")
        elif kind == "bytes":
            text = bytearray(b"\n".join(good))
            for _ in range(draw.randint(1, 20)):
                text[draw.randrange(len(text))] = draw.randrange(256)
            path.write_bytes(bytes(text))
        chosen = ["--data", path, "--out", out] if kind != "flags" else ["--data", "toy", "--out", out,
                                                                        *draw.choice(flags)]
        process = start(folder, "sft_student.py", "--format", "teacher", "--val-rows", 1, "--dry-run", *chosen)
        stderr = process.communicate(timeout=300)[1]
        lines = [line for line in stderr.splitlines() if ": error: " in line or "Traceback" in line]
        if process.returncode == 2 and len(lines) == 1 and "Traceback" not in stderr and not out.exists():
            counts["one_line"] += 1
        elif process.returncode in (0, 1) and "Traceback" not in stderr:  # a dry run's answer
            counts["accepted"] += 1
        else:
            counts["failures"] += 1
            print(f"{chosen}: exit code {process.returncode}: {stderr[-500:]}")
    yield counts


def soak(folder, steps, draw):
    """One long run of small steps -> its memory, open files and seconds a step: second quarter against the last."""
    out = folder / "soak"
    process = start(folder, "train_rlt.py", *SOAK, "--steps", steps, "--out", out)
    proc, samples = Path(f"/proc/{process.pid}"), []  # (steps done, resident MB, open files)
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # it has ended
            pages = int((proc / "statm").read_text().split()[1])
            done = len(read_jsonl(out / "metrics.jsonl"))
            samples.append((done, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(list((proc / "fd").iterdir()))))
        time.sleep(1)
    seconds = [entry["t_rollout"] + entry["t_score"] + entry["t_update"]
               for entry in read_jsonl(out / "metrics.jsonl")]
    quarters = {}
    for name, low, high in (("second", steps // 4, steps // 2), ("last", 3 * steps // 4, steps)):
        part = [sample for sample in samples if low <= sample[0] < high] or samples[-1:]
        quarters[name] = {"resident_mb": round(statistics.median(s[1] for s in part), 1),
                          "open_files": max(s[2] for s in part),
                          "seconds": round(statistics.median(seconds[low:high] or [0.0]), 3)}
    grown = [quarters["last"][key] > factor * quarters["second"][key]
             for key, factor in (("resident_mb", 1.05), ("open_files", 1))]
    yield {"steps": len(seconds), **quarters, "checkpoints": len(checkpoints.checkpoints(out)),
           "failures": sum(grown) + (process.returncode != 0)}


PARTS = {"kills": kills, "folders": folders, "inputs": inputs, "fuzz": fuzz, "soak": soak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("kills", "interruptions a script"), ("folders", "damaged run folders"),
                       ("inputs", "wrong inputs"), ("fuzz", "minutes of a core to fuzz"),
                       ("soak", "steps of one run")):
        parser.add_argument(f"--{name}", type=float if name == "fuzz" else int, default=0, metavar="N",
                            help=f"{what}; 0: leave the part out")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, metavar="NAME", help="of --kills; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is broken, and when")
    parser.add_argument("--log", type=Path, default=ROOT / "figures/logs/faults.jsonl", metavar="FILE")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and theirs, ignore Ctrl-C
    log = Log(args.log, **machine("peft"))
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, ROOT / "data/toy.py", "--out", "runs/toy", "--steps", "3"], cwd=folder,
                       check=True, stdout=subprocess.DEVNULL)
        warm_up = start(folder, "sft_student.py", "--format", "teacher", "--steps", 2, "--out", "runs/toy-teacher")
        if warm_up.wait():
            raise SystemExit(ended_badly(warm_up))
        for name, part in PARTS.items():
            began, size = time.monotonic(), getattr(args, name)
            command, options = f"python bench/faults.py --{name} {size} --seed {args.seed}", {}
            if name == "kills" and args.scripts:
                command += f" --scripts {' '.join(args.scripts)}"
                options = {"scripts": args.scripts}
            for counts in part(folder, size, random.Random(args.seed), **options) if size else []:
                log(part=name, command=command, **counts, seconds=round(time.monotonic() - began))
                began, failures = time.monotonic(), failures + counts["failures"]
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
