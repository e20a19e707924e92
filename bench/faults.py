# SPDX-License-Identifier: MIT
"""
Break things on purpose, many times, and count what was lost.

    python bench/faults.py --kills 25 --folders 100 --inputs 60 --fuzz-minutes 60 --soak 2000     hours
    python bench/faults.py --kills 3 --folders 20 --inputs 10 --fuzz-minutes 0.2 --soak 20        minutes

Parts    kills     every script, ended by kill -9, SIGTERM and Ctrl-C at random moments and resumed, until it has ended:
                   its metrics and results against those of a run that nobody touched
         folders   a run folder with random damage: refused in one line, or resumed where it was
         inputs    rows and flags that nobody should pass: one line and exit code 2
         fuzz      random texts into the tag parser, the answer parser and the row loader: a value or a UserError
         soak      one long run of the toy: memory, open files and seconds a step of its last quarter and its second

Each part prints its counts and appends them to --log as a line of JSON. The exit code is 1 if anything was lost.
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

from rlt import answers, checkpoints, models, prompts, rows, runs  # noqa: E402
from rlt.errors import UserError  # noqa: E402

RL = ["--limit", "80", "--prompts-per-step", "2", "--group-size", "4", "--max-new-tokens", "12", "--eval-rows", "4"]
SCRIPTS = {  # script: flags that make it small
    "train_rlt.py": [*RL, "--steps", "6", "--save-every", "2", "--sync-ref-every", "3"],
    "rl_student.py": [*RL, "--steps", "6", "--save-every", "2", "--rewards", "0", "0.1", "1"],
    "sft_student.py": ["--data", "toy", "--limit", "80", "--val-rows", "8", "--steps", "12", "--save-every", "3"],
    "distill.py": ["--model", "toy-teacher", "--limit", "64", "--batch-size", "8", "--max-new-tokens", "12"],
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
    """What a run has left, without its times: {name: bytes or entries}. peft writes a config's names in any order."""
    if out.suffix == ".jsonl":
        return {"rows": out.read_bytes()}
    entries = [{key: value for key, value in entry.items() if not key.startswith("t_") and key != "tokens_per_s"}
               for entry in runs.read_jsonl(out / "metrics.jsonl")]
    return {"metrics": entries} | {path.name: path.read_bytes() for path in (out / "final").glob("*.safetensors")}


def progress_of(out):
    path = out if out.suffix == ".jsonl" else out / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def kills(folder, n, draw):
    """n interruptions of each script -> counts."""
    counts = {}
    for script, flags in SCRIPTS.items():
        suffix = ".jsonl" if script == "distill.py" else ""
        straight = folder / f"straight-{script}{suffix}"
        process = start(folder, script, *flags, "--out", straight)
        if process.wait():
            raise SystemExit(ended_badly(process))
        counts[script] = tally = {"kills": 0, "runs": 0, "identical": 0, "other_exit_codes": 0}
        while tally["kills"] < n:
            out = folder / f"killed-{script}-{tally['runs']}{suffix}"
            while True:
                before, number = progress_of(out), draw.choice(list(STOPS))
                process = start(folder, script, *flags, "--out", out, "--resume")
                while process.poll() is None and progress_of(out) == before:  # loading, then the first step
                    time.sleep(0.02)
                time.sleep(draw.random() * 0.5)
                if process.poll() is None and tally["kills"] < n:
                    process.send_signal(number)
                    tally["kills"] += 1
                    tally["other_exit_codes"] += process.wait() not in STOPS[number]
                elif process.wait():  # it ended by itself, or was left to
                    raise SystemExit(ended_badly(process))
                if process.returncode == 0:
                    break
            tally["runs"] += 1
            tally["identical"] += result_of(out) == result_of(straight)
        print(script, tally, flush=True)
    return {"scripts": counts,
            "failures": sum(t["runs"] - t["identical"] + t["other_exit_codes"] for t in counts.values())}


def folders(folder, n, draw):
    """n damaged copies of a run -> counts. In a copy the newest checkpoint is named if it is damaged, never read."""
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
    return counts


def inputs(folder, n, draw):
    """n files and flags that are wrong -> counts. One line on stderr, exit code 2, nothing written."""
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
    return counts


def fuzz(folder, minutes, draw):
    """Random texts, made of pieces that mean something, for some minutes -> counts."""
    tokenizer = models.load_tokenizer(str(folder / "runs/toy"))
    words = prompts.Prompts(tokenizer)
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    pieces = [*prompts.THOUGHT, *prompts.SOLUTION, *prompts.EXPLANATION, *specials, "\\boxed{", "}", "{", "\n\n", "\0",
              "(" * 50, "é", "\u202e", "😀", "1/0", "**", "9" * 400, "\\frac", "a = ", "question", "\ud83d"]
    counts, end = {"texts": 0, "user_errors": 0, "failures": 0, "slowest_s": 0.0}, time.monotonic() + 60 * minutes

    def text():
        return "".join(draw.choice(pieces) if draw.random() < 0.6 else chr(draw.randrange(1, 0xD000))
                       for _ in range(draw.randrange(40)))

    def split():
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(60))]
        words.split_completion(ids, draw.random() < 0.5)

    def explain():
        row = {"question": text(), "solution": text(), "explanation": text(), "where": "fuzz"}
        words.sft_row(row, draw.choice(["student", "teacher"]))

    def load():
        path = folder / "fuzz.jsonl"
        row = {draw.choice(["question", "prompt", "problem", text()]): text(), "solution": text(), "messages": [text()]}
        path.write_text(json.dumps(row) + "\n" + text().encode(errors="replace").decode() + "\n")
        rows.load_rows(str(path), skip_bad=draw.random() < 0.5)

    def answer():
        answers.answer_of(draw.choice(["math500", "toy", "gpqa", "countdown"]), text())

    while time.monotonic() < end:
        function, began = draw.choice([split, explain, load, answer]), time.monotonic()
        state = draw.getstate()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                function()
        except UserError:
            counts["user_errors"] += 1
        except Exception as error:
            counts["failures"] += 1
            draw.setstate(state)
            print(f"{function.__name__}: {type(error).__name__}: {error}"[:300])
            draw.random()
        counts["texts"] += 1
        counts["slowest_s"] = max(counts["slowest_s"], time.monotonic() - began)
    return counts


def soak(folder, steps, draw):
    """One run of that many steps -> its memory, open files and seconds a step: second quarter against the last."""
    out = folder / "soak"
    process = start(folder, "train_rlt.py", *RL, "--steps", steps, "--save-every", 50, "--eval-every", 0, "--out", out)
    proc, samples = Path(f"/proc/{process.pid}"), []  # (steps done, resident MB, open files)
    while process.poll() is None:
        with contextlib.suppress(OSError):
            pages = int((proc / "statm").read_text().split()[1])
            done = len(runs.read_jsonl(out / "metrics.jsonl"))
            samples.append((done, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(list((proc / "fd").iterdir()))))
        time.sleep(1)
    seconds = [entry["t_rollout"] + entry["t_score"] + entry["t_update"]
               for entry in runs.read_jsonl(out / "metrics.jsonl")]
    quarters = {}
    for name, low, high in (("second", steps // 4, steps // 2), ("last", 3 * steps // 4, steps)):
        part = [sample for sample in samples if low <= sample[0] < high] or samples[-1:]
        quarters[name] = {"resident_mb": round(statistics.median(s[1] for s in part), 1),
                          "open_files": max(s[2] for s in part),
                          "seconds": round(statistics.median(seconds[low:high] or [0.0]), 3)}
    kept = len(checkpoints.checkpoints(out))
    return {"steps": len(seconds), **quarters, "checkpoints": kept, "failures": int(process.returncode != 0)}


PARTS = {"kills": kills, "folders": folders, "inputs": inputs, "fuzz_minutes": fuzz, "soak": soak}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("kills", "interruptions a script"), ("folders", "damaged run folders"),
                       ("inputs", "wrong inputs"), ("fuzz-minutes", "minutes of random texts"),
                       ("soak", "steps of one run")):
        parser.add_argument(f"--{name}", type=float if "minutes" in name else int, default=0, metavar="N",
                            help=f"{what}; 0: leave the part out")
    parser.add_argument("--seed", type=int, default=0, help="of what is broken, and when")
    parser.add_argument("--log", type=Path, default=ROOT / "figures/logs/faults.jsonl", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, ROOT / "data/toy.py", "--out", "runs/toy", "--steps", "3"], cwd=folder,
                       check=True, stdout=subprocess.DEVNULL)
        warm_up = start(folder, "sft_student.py", "--format", "teacher", "--steps", 2, "--out", "runs/toy-teacher")
        if warm_up.wait():
            raise SystemExit(ended_badly(warm_up))
        for name, part in PARTS.items():
            if size := getattr(args, name):
                began = time.monotonic()
                counts = part(folder, size, random.Random(args.seed))
                entry = {"part": name, "size": size, "seed": args.seed, **counts,
                         "seconds": round(time.monotonic() - began)}
                print(json.dumps(entry), flush=True)
                args.log.parent.mkdir(parents=True, exist_ok=True)
                with args.log.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                failures += counts["failures"]
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
