# SPDX-License-Identifier: MIT
"""
The toy study: every claim of the papers as an arm, by the commands a user would type.

    python figures/toy_study.py             all of it; start it twice on two cores: they share the work
    python figures/toy_study.py --quick     a few steps of every arm, to see that it runs

Each setting of the toy and each seed has a folder of its own (runs/study/toy-seed0, with runs/toy and all that follows
inside). A finished arm is a line in figures/logs/toy_study.jsonl and is not run again; a killed one goes on where it
stopped. Every student gets the same steps of the same size; settings may be chosen by the `val` numbers only.
"""

import argparse
import fcntl
import json
import os
import platform
import runpy
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import toy  # noqa: E402

from runs import read_jsonl  # noqa: E402

SETTINGS = {  # flags of data/toy.py
    "toy": [],
    "rooms": ["--rooms", "--steps", 4000],  # base and warm-up teacher know both tasks, RL sees one
    **{f"base {share}": ["--clocks", 3, "--hints", "--careful-base", share]
       for share in (0.08, 0.005, 0.0)},  # the map
}
ROWS = (0.1, 0.02, 0.0)  # the map's other side: share of careful authors among the rows of the teacher's warm-up
BINARY = ["--rewards", 0, 0, 1]


def named(arm):
    return arm.replace(", ", "-").replace(" ", "-")


class Work:
    """One arm in one folder. What a command makes is named after the arm, and is not made again."""

    def __init__(self, setting, seed, arm):
        self.setting, self.seed, self.arm = setting, seed, arm
        self.folder = ROOT / "runs/study" / f"{'quick-' * args.quick}{setting.replace(' ', '-')}-seed{seed}"
        self.name = named(arm)
        self.commands, self.facts = [], {}
        task = "rooms-" * (setting == "rooms")
        self.rows = f"runs/toy/{task}train.jsonl"
        self.source = ["--data", self.rows] if task else []
        self.tests = {split: f"runs/toy/{task}{split}.jsonl" for split in ("val", "test")}

    def run(self, script, *flags, out=None, seed=True):
        """One command in the folder, remembered as it would be typed. out: skip it where this is whole."""
        flags = [*flags, *(["--seed", self.seed] if seed else []), *(["--out", out] if out else [])]
        typed = ["python", script, *map(str, flags)]
        self.commands.append(" ".join(typed))
        whole = out and ((self.folder / out / "final").exists() or (self.folder / out / "config.json").exists()
                         and script == "data/toy.py" or (self.folder / f"{out}.whole").exists())
        if whole:
            return out
        print(f"[{self.folder.name}] {self.commands[-1]}", flush=True)
        if script in ("train_rlt.py", "rl_student.py", "sft_student.py", "distill.py"):
            typed.append("--resume")
        child = os.fork()  # instead of a process of its own, which would spend seconds on imports
        if child == 0:
            os._exit(as_typed(self.folder, typed))
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{self.commands[-1]} failed: see {self.folder}/log.txt")
        if out and out.endswith(".jsonl"):
            (self.folder / f"{out}.whole").touch()
        return out

    def few(self, *flags):
        return flags if args.quick else ()

    # -- the steps that arms are made of; each returns what it made

    def base(self, out="runs/toy", *flags):
        return self.run("data/toy.py", *SETTINGS[self.setting], *flags, *self.few("--steps", 20), out=out)

    def warm_up(self, careful=None):
        """The warm-up teacher, on the toy's rows, or on others with this share of careful authors."""
        if careful is None:
            data = ["--data", "runs/toy/both-train.jsonl"] if self.source else []
            return self.run("sft_student.py", "--format", "teacher", *data, *self.few("--steps", 2),
                            out="runs/toy-teacher")
        rows = toy.make_rows(3, careful, False)["train"]
        self.write(f"rows-{careful}.jsonl", rows)
        return self.run("sft_student.py", "--format", "teacher", "--data", f"rows-{careful}.jsonl", "--steps", 300,
                        *self.few("--steps", 2), out=f"runs/toy-teacher-{careful}")

    def teach(self, *flags, model):
        """RLT, from this warm-up teacher."""
        teacher = f"runs/{self.name}"
        self.run("train_rlt.py", "--model", model, *flags, *self.few("--steps", 2), out=teacher)
        metrics = read_jsonl(self.folder / teacher / "metrics.jsonl")
        keep = ("step", "reward", "score", "kl", "closed", "leak", "length", "entropy", "kl_ref", "eval_reward")
        self.facts["curve"] = [{key: entry[key] for key in keep} for entry in metrics]
        self.facts["sampled_tokens"] = round(sum(entry["length"] for entry in metrics) * 256)
        self.facts["seconds_a_step"] = {phase: sum(entry[phase] for entry in metrics) / len(metrics)
                                        for phase in ("t_rollout", "t_score", "t_update")}
        return teacher

    def explain(self, teacher, *flags, out=None):
        """What a teacher writes for the training questions, scored alike for all: exact KL, lambda 3."""
        data = f"runs/{out or self.name}.jsonl"
        self.run("distill.py", "--model", teacher, *self.source, *flags, *self.few("--limit", 80), out=data)
        rows = read_jsonl(self.folder / data)
        mean = lambda key: sum(row[key] for row in rows) / len(rows)  # noqa: E731
        self.facts["explanations"] = {key: mean(key) for key in ("reward", "score", "kl", "length", "closed")} | {
            # exact here; the logs' `leak` (prompts.leaks) goes by the place of the solution
            "leak": sum(toy.gives_away(row["question"], row["explanation"]) for row in rows) / len(rows),
            "full_chain": sum(toy.is_full_chain(row["question"], row["explanation"]) for row in rows) / len(rows),
            "count": len(rows),
        }
        return data

    def solve(self, model, *flags):
        """What a student writes for the training questions, by itself: traditional distillation."""
        data = f"runs/{self.name}.jsonl"
        self.run("distill.py", "--solver", "--model", model, *flags, *self.few("--limit", 80, "--keep-wrong"), out=data)
        rows = read_jsonl(self.folder / data)
        self.facts["traces"] = {key: sum(row[key] for row in rows) / len(rows) for key in ("right", "length")}
        self.facts["traces"] |= {"count": len(rows), "full_chain": sum(
            toy.is_full_chain(row["question"], row["explanation"]) for row in rows) / len(rows)}
        return data

    def write(self, path, rows):
        (self.folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def instead(self, of):
        """The training rows with something else for an explanation."""
        rows = read_jsonl(self.folder / self.rows)
        return self.write(f"runs/{self.name}.jsonl", [{**row, "explanation": of(row)} for row in rows])

    def learn(self, data, *flags):
        """A student of the explanations in this file."""
        out = f"runs/student-{self.name}"
        return self.run("sft_student.py", "--data", data, *flags, *self.few("--steps", 2), out=out)

    def rl(self, *flags):
        """A student by RL on correctness."""
        student = self.run("rl_student.py", *self.source, *flags, *self.few("--steps", 2), out=f"runs/{self.name}")
        metrics = read_jsonl(self.folder / student / "metrics.jsonl")
        keep = ("step", "reward", "solved", "zero_groups", "usable_groups", "hinted", "hinted_solved", "length",
                "guided_log_ratio", "eval_solved")
        self.facts["curve"] = [{key: entry[key] for key in keep} for entry in metrics]
        self.facts["sampled_tokens"] = sum(entry["sampled_tokens"] for entry in metrics)
        return student

    def of(self, arm):
        """The student of another arm of this folder, made if need be."""
        other = Work(self.setting, self.seed, arm)
        student = ARMS[arm](other)
        self.commands += other.commands
        return student

    def data_of(self, arm):
        """The file that the student of another arm learned from."""
        self.of(arm)
        return f"runs/{named(arm)}.jsonl"

    # -- what is measured

    def ask(self, models, data, *flags, out):
        """{model: its evaluation} by one command."""
        self.run("evaluate.py", "--task", "toy", "--model", *models, "--data", data, *flags, *self.few("--limit", 40),
                 "--out", out)
        stem = "eval_toy" + "_hinted" * ("--hinted" in flags)
        return {model: json.loads((self.folder / out / model.replace("/", "_") / f"{stem}.json").read_text())
                for model in models}

    def accuracy(self, student):
        for split, data in self.tests.items():
            for decoding, temperature in (("greedy", 0), ("sampled", 1)):
                if (split, decoding) != ("val", "sampled"):
                    out = f"runs/eval/{split}-{decoding}"
                    result = self.ask([student], data, "--temperature", temperature, out=out)[student]
                    yield f"{split} {decoding}", {**result["exact_match"], "questions": result["questions"],
                                                  "length": result["length"]}


def as_typed(folder, typed):
    """In a child: do what `python script flags` does in this folder, output in its log -> exit status."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = typed[1:]
    status = 0
    try:
        runpy.run_path(str(ROOT / typed[1]), run_name="__main__")
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else bool(leaving.code)
    except BaseException:  # whatever it is: the child must not go on as the study
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def ranked(i):
    """A student of one fifth of the warm-up teacher's explanations, by reward within the question."""
    def arm(w):
        w.explain(w.warm_up(), "--samples", 10, "--limit", 1000, "--partition", 5, out="ranked")
        data = f"runs/ranked.within-{i}of5.jsonl"
        part = read_jsonl(w.folder / data)
        w.facts["explanations"] = {key: sum(row[key] for row in part) / len(part) for key in ("reward", "score", "kl")}
        return w.learn(data)

    return arm


def strong(w):
    return w.base("runs/toy-strong", "--hidden-size", 192)


def weak(w):
    return w.base("runs/toy-weak", "--steps", 700)


def long_problems(w):
    """Questions longer than any that a teacher or a student has learned from."""
    arms = ["base", "warm-up teacher", "RLT", "score only", "ground truth", "best of 10", "direct RL"]
    students = {w.of(arm): arm for arm in arms}
    results = w.ask(students, "runs/toy/long.jsonl", "--temperature", 0, out="runs/eval/long")
    w.facts["long"] = {students[model]: result["exact_match"] for model, result in results.items()}


def without_lists(tree):
    """A report without the numbers of its questions."""
    if not isinstance(tree, dict):
        return tree
    return {key: without_lists(value) for key, value in tree.items() if not isinstance(value, list)}


def what_rl_did(*arms):
    """pass@k before and after, and the gain split into what was in reach before and what is new."""
    def analysis(w):
        base, after = w.of("base"), {arm: w.of(arm) for arm in arms}
        sampled = ["--samples", 16, "--temperature", 1]
        w.ask([base, *after.values()], w.tests["test"], *sampled, out="runs/eval/16")
        w.run("evaluate.py", "--task", "toy", "--model", base, "--data", w.tests["test"], *sampled,
              *w.few("--limit", 40), "--seed", w.seed + 100, "--out", "runs/eval/16-again", seed=False)
        for arm, student in after.items():
            before, then = (f"runs/eval/16/{model.replace('/', '_')}" for model in (base, student))
            w.run("evaluate.py", "--task", "toy", "--compare", before, then, "--floor",
                  "runs/eval/16-again/runs_toy", seed=False)
            report = json.loads((w.folder / then / "compare_toy.json").read_text())
            kept = ("pass_at", "split", "samples", "reach")
            w.facts.setdefault("compare", {})[arm] = {key: without_lists(report[key]) for key in kept}

    return analysis


def signal(w):
    """How often a group of 16 has a signal, plain and with hints, against the pass rates of 16 other draws."""
    draws = {}
    for kind in ([], ["--hinted"]):
        out = f"runs/eval/32{''.join(kind)}"
        w.ask([w.base()], w.tests["val"], "--samples", 32, "--temperature", 1, *kind, out=out)
        stem = "eval_toy_hinted" if kind else "eval_toy"
        right = [bool(row["grade"]) for row in read_jsonl(w.folder / out / f"runs_toy/{stem}_samples.jsonl")]
        groups = [right[at : at + 32] for at in range(0, len(right), 32)]
        draws["hinted" if kind else "plain"] = [(sum(group[:16]), sum(group[16:])) for group in groups]
    w.facts["signal"] = draws


def in_cell(careful):
    """The arms of one cell of the map; the base is the folder's, the warm-up teacher this share of careful rows."""
    rows = f"rows {careful}"
    best = f"best of 10, {rows}"
    return {
        f"warm-up teacher, {rows}": lambda w: w.learn(w.explain(w.warm_up(careful))),
        f"RLT, {rows}": lambda w: w.learn(w.explain(w.teach(model=w.warm_up(careful)))),
        best: lambda w: w.learn(w.explain(w.warm_up(careful), *BEST)),
        f"best of 10, warmed-up student, {rows}": lambda w: w.learn(w.explain(
            w.warm_up(careful), *BEST, "--student", w.of(f"warm-up teacher, {rows}"))),
        f"RLT, warmed-up student, {rows}": lambda w: w.learn(w.explain(
            w.teach("--student", w.of(f"warm-up teacher, {rows}"), model=w.warm_up(careful)))),
        f"RLT, refreshed student, {rows}": lambda w: w.learn(w.explain(
            w.teach("--student", w.of(best), model=w.warm_up(careful)))),
        f"RL after RLT, {rows}": lambda w: w.rl("--model", w.of(f"RLT, {rows}")),
        f"RL after best of 10, {rows}": lambda w: w.rl("--model", w.of(best)),
    }


BEST = ["--samples", 10, "--keep", "best"]  # as many sampled tokens as RL and its explanations
ARMS = {
    # Figure 1, Table 1
    "base": lambda w: w.base(),
    "warm-up teacher": lambda w: w.learn(w.explain(w.warm_up())),
    "RLT": lambda w: w.learn(w.explain(w.teach(model=w.warm_up()))),
    "solutions only": lambda w: w.learn(w.instead(lambda row: "")),
    "score only": lambda w: w.learn(w.explain(w.teach("--lambda", 0, model=w.warm_up()))),
    "ground truth": lambda w: w.learn(w.instead(lambda row: row["chain"])),
    "best of 10": lambda w: w.learn(w.explain(w.warm_up(), *BEST)),
    "direct RL": lambda w: w.rl(),
    "RL traces, raw": lambda w: w.learn(w.solve(w.of("direct RL"), "--keep-wrong")),
    "RL traces, filtered": lambda w: w.learn(w.solve(w.of("direct RL"))),
    "long problems": long_problems,
    **{f"{arm}, 176 rows": lambda w, arm=arm: w.learn(w.data_of(arm), "--limit", 176 + 64)  # 1K of 17K; 64 validate
       for arm in ("warm-up teacher", "RLT", "RL traces, filtered", "ground truth")},
    # Table 2: RL after a cold start
    **{f"RL after {arm}": lambda w, arm=arm: w.rl("--model", w.of(arm))
       for arm in ("warm-up teacher", "RL traces, raw", "RL traces, filtered", "RLT", "best of 10")},
    # section 4.5
    **{f"rank {i} of 5": ranked(i) for i in range(1, 6)},
    # Appendix C.4
    "base, larger": strong,
    "base, weaker": weak,
    "warm-up teacher, larger student": lambda w: w.learn(w.data_of("warm-up teacher"), "--model", strong(w)),
    "RLT, larger student": lambda w: w.learn(w.data_of("RLT"), "--model", strong(w)),
    "RLT, stronger reward student": lambda w: w.learn(w.explain(w.teach("--student", strong(w), model=w.warm_up()))),
    "RLT, weaker reward student": lambda w: w.learn(w.explain(w.teach("--student", weak(w), model=w.warm_up()))),
    # Appendix D
    **{f"RLT, {what}": lambda w, flags=flags: w.learn(w.explain(w.teach(*flags, model=w.warm_up())))
       for what, flags in {
           "lambda 1": ["--lambda", 1], "lambda 10": ["--lambda", 10],
           "alpha 0": ["--alpha", 0], "alpha 0.1": ["--alpha", 0.1],
           "exact KL": ["--kl", "exact"], "exact KL, lr 5e-3": ["--kl", "exact", "--lr", "5e-3"],
           "exact KL and gradient": ["--kl", "exact", "--kl-gradient"], "lr 5e-3": ["--lr", "5e-3"]}.items()},
    # Guide
    "GRPO": lambda w: w.rl(*BINARY),
    "Guide": lambda w: w.rl("--hints", *BINARY),
    "Guide, naive ratio": lambda w: w.rl("--hints", "--hint-ratio", "naive", *BINARY),
    "signal": signal,
    "what Guide did": what_rl_did("GRPO", "Guide", "Guide, naive ratio"),
    "what RL did": what_rl_did("direct RL"),
    # the map
    **{arm: make for careful in ROWS for arm, make in in_cell(careful).items()},
}
HEADLINE = ["base", "warm-up teacher", "RLT", "solutions only", "score only", "ground truth", "best of 10", "direct RL",
            "RL traces, raw", "RL traces, filtered"]
PLAN = [  # setting, seeds, arms
    ("toy", range(5), HEADLINE),
    ("toy", range(3), [arm for arm in ARMS if arm.startswith("RL after") and "rows" not in arm]),
    ("toy", range(3), [arm for arm in ARMS if arm.startswith("rank")]),
    ("rooms", range(3), ["base", "warm-up teacher", "RLT", "direct RL", "solutions only", "ground truth",
                             "best of 10", "what RL did"]),
    *((setting, range(3), ["base", "GRPO", "Guide", "Guide, naive ratio", "signal", "what Guide did"])
      for setting in ("base 0.005", "base 0.0")),
    *((setting, [0], ["base", "direct RL", "Guide", "signal",
                      *(arm for careful in ROWS for arm in in_cell(careful) if left_out not in arm)])
      for setting, left_out in (("base 0.08", "student"), ("base 0.005", "refreshed"), ("base 0.0", "nothing"))),
    ("base 0.08", range(3), ["RLT, rows 0.02", "best of 10, rows 0.02"]),
    ("base 0.0", range(3), ["direct RL", *(f"{arm}, rows 0.1" for arm in (
        "warm-up teacher", "RLT", "best of 10", "RLT, warmed-up student", "best of 10, warmed-up student"))]),
    ("toy", range(3), ["long problems", "what RL did", *(arm for arm in ARMS if arm.endswith("176 rows"))]),
    ("toy", range(3), ["base, larger", "base, weaker", "warm-up teacher, larger student", "RLT, larger student",
                       "RLT, stronger reward student", "RLT, weaker reward student"]),
    ("toy", range(3), [f"RLT, {what}" for what in ("lambda 1", "lambda 10", "alpha 0", "alpha 0.1", "exact KL",
                                                   "exact KL, lr 5e-3", "exact KL and gradient", "lr 5e-3")]),
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS, help="which settings")
parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="which arms, by name")
parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="which seeds, of base and all draws")
parser.add_argument("--quick", action="store_true", help="a few steps of every arm, to see that it runs")
args = parser.parse_args()
LOG = ROOT / ("runs/study/quick.jsonl" if args.quick else "figures/logs/toy_study.jsonl")


def finished():
    return {(row.get("setting", "toy"), row["seed"], row["arm"]) for row in read_jsonl(LOG)}


def do(setting, seed, arm):
    work, started = Work(setting, seed, arm), time.time()
    work.base()
    student = ARMS[arm](work)
    accuracy = {"accuracy": dict(work.accuracy(student))} if student else {}
    row = {
        "setting": setting, "arm": arm, "seed": seed, **accuracy, **work.facts, "commands": work.commands,
        "minutes": (time.time() - started) / 60, "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} CPU, one thread", "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
    }
    with LOG.open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        log.write(json.dumps(row) + "\n")
    said = f"{100 * row['accuracy']['test greedy']['mean']:.1f} % greedy" if student else "measured"
    print(f"[{work.folder.name}] {arm}: {said}, {row['minutes']:.1f} min", flush=True)


failed = set()


def attempt(setting, seed, arm):
    """Do this arm, unless it is done, has failed, or somebody works in its folder -> whether it was tried now."""
    folder = Work(setting, seed, arm).folder
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if (setting, seed, arm) in finished() | failed:
            return False
        try:
            do(setting, seed, arm)
        except RuntimeError as error:  # of a command; the other arms can do without this one
            failed.add((setting, seed, arm))
            print(f"[{folder.name}] {arm}: {error}", flush=True)
        return True


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # loaded once, for all the children

    LOG.parent.mkdir(parents=True, exist_ok=True)
    todo = [(setting, seed, arm) for setting, seeds, arms in PLAN for seed in seeds for arm in arms
            if setting in args.settings and seed in args.seeds and arm in args.arms and not (args.quick and seed)]
    while any(attempt(*job) for job in todo):  # from the top again after every arm: another study may be at work, too
        pass
    sys.exit(1 if failed else 0)
