# SPDX-License-Identifier: MIT
"""
The toy study: every arm of the comparison, for every seed, by the commands a user would type.

    python figures/toy_study.py --seeds 0 1 2          about 50 minutes a seed on a quiet core; start one a core

Each seed works in its own folder (runs/study/seed0, with runs/toy and all that follows inside). A finished arm is a
line in figures/logs/toy_study.jsonl and is not run again; a killed one goes on where it stopped. Settings may be
chosen by the `val` numbers only; `test` is what the README shows.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import toy  # noqa: E402

LOG = ROOT / "figures/logs/toy_study.jsonl"

# Arms: what the teacher is, or which rows stand in for one. The same students, steps and questions for all.
RLT = {
    "RLT": ["--kl", "exact"],  # the default when the committed log was made
    "score only": ["--lambda", "0"],
    "RLT, lr 5e-3": ["--kl", "exact", "--lr", "5e-3"],
    "RLT, sampled KL": ["--kl", "sampled"],
    "RLT, sampled KL, lr 5e-3": ["--kl", "sampled", "--lr", "5e-3"],
}
SAMPLED = {"warm-up teacher": [], "best of 5": ["--samples", "5", "--keep", "best"]}  # as many samples as RL draws
ROWS = {"solutions only": lambda row: "", "ground truth": lambda row: row["chain"]}
ARMS = ["base", "warm-up teacher", "RLT", "solutions only", "score only", "ground truth", "best of 5", *list(RLT)[2:],
        "direct RL"]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of base, teacher, samples and students")
parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help="which arms to run")
parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs; no log")
args = parser.parse_args()


def run(folder, commands, script, *flags):
    """One command, in the folder, output in its log; remembered as it would be typed."""
    typed = ["python", script, *map(str, flags)]
    print(f"[{folder.name}] {' '.join(typed)}", flush=True)
    commands.append(" ".join(typed))
    with (folder / "log.txt").open("a") as log:
        subprocess.run([sys.executable, str(ROOT / script), *typed[2:]], cwd=folder, stdout=log, stderr=log, check=True,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def student_of(folder, arm, seed, commands):
    """Make the arm's student; returns its run folder and what is known of the explanations it learned from."""
    name = arm.replace(", ", "-").replace(" ", "-")
    few = ["--steps", 2] if args.quick else []
    if arm == "base":
        return "runs/toy", {}
    if arm == "direct RL":
        run(folder, commands, "rl_student.py", "--seed", seed, "--out", "runs/direct-RL", "--resume", *few)
        metrics = read_jsonl(folder / "runs/direct-RL/metrics.jsonl")
        keep = ("step", "reward", "solved", "usable_groups", "length", "eval_solved")
        return "runs/direct-RL", {"curve": [{key: entry[key] for key in keep} for entry in metrics],
                                  "sampled_tokens": sum(entry["sampled_tokens"] for entry in metrics)}
    if arm in ROWS:
        data = f"{name}.jsonl"
        rows = [{**row, "explanation": ROWS[arm](row)} for row in read_jsonl(folder / "runs/toy/train.jsonl")]
        (folder / data).write_text("".join(json.dumps(row) + "\n" for row in rows))
        facts = {}
    else:
        teacher, data = "runs/toy-teacher", f"runs/{name}.jsonl"
        facts = {}
        if arm in RLT:
            teacher = f"runs/{name}"
            run(folder, commands, "train_rlt.py", *RLT[arm], "--seed", seed, "--out", teacher, "--resume", *few)
            keep = ("step", "reward", "score", "kl", "closed", "leak", "length", "entropy", "kl_ref", "eval_reward")
            metrics = read_jsonl(folder / teacher / "metrics.jsonl")
            facts["curve"] = [{key: entry[key] for key in keep} for entry in metrics]
            config = json.loads((folder / teacher / "config.json").read_text())["flags"]
            batch = config["prompts_per_step"] * config["group_size"]
            facts["sampled_tokens"] = round(sum(entry["length"] for entry in metrics) * batch)
            phases = ("t_rollout", "t_score", "t_update")
            facts["seconds_a_step"] = {p: sum(e[p] for e in metrics) / len(metrics) for p in phases}
        few_rows = ["--limit", 80] if args.quick else []
        run(folder, commands, "distill.py", "--model", teacher, "--seed", seed, "--out", data, "--resume",
            *SAMPLED.get(arm, []), *few_rows)
        rows = read_jsonl(folder / data)
        mean = lambda key: sum(row[key] for row in rows) / len(rows)  # noqa: E731
        facts["explanations"] = {key: mean(key) for key in ("reward", "score", "kl", "length", "closed")} | {
            # exact here; the logs' `leak` (prompts.leaks) goes by the place of the solution
            "leak": sum(toy.gives_away(row["question"], row["explanation"]) for row in rows) / len(rows),
            "full_chain": sum(toy.is_full_chain(row["question"], row["explanation"]) for row in rows) / len(rows),
            "count": len(rows),
        }
    student = f"runs/student-{name}"
    run(folder, commands, "sft_student.py", "--data", data, "--seed", seed, "--out", student, "--resume", *few)
    return student, facts


for seed in args.seeds:
    folder = ROOT / "runs/study" / (f"quick{seed}" if args.quick else f"seed{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    LOG.parent.mkdir(exist_ok=True)
    made = []
    if not (folder / "runs/toy").exists():
        run(folder, made, "data/toy.py", "--seed", seed, "--out", "runs/toy", *(["--steps", 20] if args.quick else []))
    if not (folder / "runs/toy-teacher/final").exists():
        run(folder, made, "sft_student.py", "--format", "teacher", "--seed", seed, "--resume",
            *(["--steps", 2] if args.quick else []))
    for arm in args.arms:
        if not args.quick and any((row["arm"], row["seed"]) == (arm, seed) for row in read_jsonl(LOG)):
            continue
        started, commands = time.time(), []
        student, facts = student_of(folder, arm, seed, commands)
        accuracy = {}
        for split, decoding, temperature in (("val", "greedy", 0), ("test", "greedy", 0), ("test", "sampled", 1)):
            out = f"runs/eval/{split}-{decoding}"
            run(folder, commands, "evaluate.py", "--task", "toy", "--model", student, "--data",
                f"runs/toy/{split}.jsonl", "--temperature", temperature, "--seed", seed, "--out", out)
            [result] = folder.glob(f"{out}/{student.replace('/', '_')}/eval_toy.json")
            result = json.loads(result.read_text())
            accuracy[f"{split} {decoding}"] = {**result["exact_match"], "questions": result["questions"],
                                               "length": result["length"]}
        row = {
            "arm": arm, "seed": seed, "accuracy": accuracy, **facts, "commands": made + commands,
            "minutes": (time.time() - started) / 60, "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()} CPU, one thread", "torch": version("torch"),
            "transformers": version("transformers"),
            "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        }
        if not args.quick:
            with LOG.open("a") as log:
                log.write(json.dumps(row) + "\n")
        greedy = accuracy["test greedy"]
        print(f"[{folder.name}] {arm}: {100 * greedy['mean']:.1f} % greedy on {greedy['questions']} test questions")
