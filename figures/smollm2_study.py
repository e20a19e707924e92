# SPDX-License-Identifier: MIT
"""
A study of the method on a real language model: SmolLM2-135M-Instruct on English word problems, on CPU cores.

    python figures/smollm2_study.py --gsm8k train.jsonl            all arms; start it twice on two cores to share seeds
    python figures/smollm2_study.py --gsm8k train.jsonl --quick    a few steps of every arm, to see that it runs

Run so far: the explanations before and after 25 steps of RL, on one seed. Each seed has a folder of its own
(runs/study/smollm2-seed0). A finished arm is a line in figures/logs/smollm2_study.jsonl and is not run again; a killed
one continues where it stopped. Every student gets the same questions and the same steps; settings may be chosen by the
`val` numbers only.
"""

import argparse
import os
import shutil
import statistics
import sys
from pathlib import Path

from study_steps import ROOT, Job, mean_of
from toy_study import try_arm

GSM8K = "gsm8k.jsonl"  # a copy of its train split, in the folder of a seed
LENGTH = ("--max-new-tokens", 64)  # of an explanation; the longest right chain takes 56 tokens
MICRO_BATCH = ("--micro-batch-tokens", 1024)
WHOLE_STEP = ("--micro-batch-tokens", 8192)  # of RL, so that a prompt is read once; 1,500 tokens where it is
WARM_UP = ("--steps", 46, "--batch-size", 8, "--lr", 1e-3, "--warmup-steps", 3, "--val-rows", 16, "--eval-every", 20,
           "--save-every", 20)
RL = ("--prompts-per-step", 4, "--group-size", 8, "--steps", 25, "--lr-steps", 60, "--lr", 1e-3, "--eval-every", 20,
      "--eval-rows", 32, "--save-every", 5)  # 25 steps take an hour of one core
STUDENT = ("--steps", 50, "--batch-size", 8, "--lr", 1e-3, "--val-rows", 32, "--save-every", 10)
QUESTIONS = 432  # 400 to learn from and 32 to validate
QUESTIONS_OF = {"val": 100, "test": 400}
MEASURED = 64  # validation questions whose explanations are looked at before and after RL
CURVE = ("step", "reward", "score", "kl", "closed", "length", "entropy", "kl_ref", "eval_reward")
MEASURES = {"is_right_chain": "is_right_chain", "right_steps": "right_steps", "leak": "leaks"}  # data/word_problems.py


def word_problems():
    """data/word_problems.py as a module. It imports torch, which must not be loaded before the threads are set."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from data import word_problems as module

    return module


class WordProblemJob(Job):
    """One arm on one seed. model: what every teacher and student starts from."""

    def __init__(self, seed, arm, model="smollm2", quick=False):
        super().__init__(ARMS, "smollm2", seed, arm, quick)
        self.model = model

    def is_complete(self, script, out):
        return super().is_complete(script, out) or (self.folder / out / "train.jsonl").exists()

    def rows_of(self, split):
        """The file of a split of the word problems."""
        out = self.run("data/word_problems.py", "--gsm8k", GSM8K, "--gsm8k-rows", 64, out="runs/rows")
        return f"{out}/{split}.jsonl"

    def base(self):
        return self.model

    def scored_by(self):
        return "--student", self.warm_up("student"), "--student-bits", 32

    def warm_up(self, role):
        """The teacher before RL, or the student that scores: SFT on chains of GSM8K and of easy problems, then on more
        of these problems alone."""
        model = self.model
        for part, out in (("warmup", f"runs/chains-{role}"), ("practice", f"runs/warm-{role}")):
            model = self.run("sft_student.py", "--format", role, "--model", model, "--data", self.rows_of(part),
                             *WARM_UP, *MICRO_BATCH, *self.if_quick("--steps", 2), out=out)
        return model

    def teacher_of(self, arm, *flags):
        """The RLT of another arm on the same seed, trained with its flags if it does not exist; its curve is a fact."""
        other = type(self)(self.seed, arm, self.model, self.quick)
        teacher = other.train_teacher(*flags)
        self.commands += other.commands
        self.facts |= other.facts
        return teacher

    def train_teacher(self, *flags):
        """RLT from the warm-up teacher."""
        quick = self.if_quick("--steps", 2, "--group-size", 2, "--eval-rows", 2)
        out = self.run("train_rlt.py", "--model", self.warm_up("teacher"), *self.scored_by(), "--data",
                       self.rows_of("train"), *RL, *LENGTH, *WHOLE_STEP, *flags, *quick, out=f"runs/{self.name}")
        metrics = self.read(f"{out}/metrics.jsonl")
        self.facts["curve"] = [{key: entry[key] for key in CURVE} for entry in metrics]
        self.facts["seconds_a_step"] = mean_of(metrics, ("t_rollout", "t_score", "t_update"))
        return out

    def explain(self, teacher, *flags, split="train", limit=QUESTIONS):
        """The teacher's explanations of a split's questions; all teachers' are scored alike: exact KL, lambda 3."""
        data = f"runs/{self.name}.jsonl"
        self.run("distill.py", "--model", teacher, *self.scored_by(), "--data", self.rows_of(split), "--limit",
                 limit, *LENGTH, *WHOLE_STEP, "--batch-size", 64, *flags, *self.if_quick("--limit", 12), out=data)
        problems = {row["question"]: row for row in self.read(self.rows_of(split))}
        rows = self.read(data)
        pairs = [(problems[row["question"]], row["explanation"]) for row in rows]
        self.facts["explanations"] = {
            **mean_of(rows, ("reward", "score", "kl", "closed", "length")), "count": len(rows),
            **{key: statistics.fmean(getattr(word_problems(), function)(*pair) for pair in pairs)
               for key, function in MEASURES.items()},
        }
        return data

    def measure(self, teacher):
        """What the teacher's explanations of validation questions are like. There is no student of them."""
        self.explain(teacher, split="val", limit=MEASURED)

    def replace_explanations(self, explanation):
        """The training rows with explanation(row) for an explanation."""
        rows = self.read(self.rows_of("chains"))[:QUESTIONS]
        return self.write(f"runs/{self.name}.jsonl", [{**row, "explanation": explanation(row)} for row in rows])

    def sft(self, data):
        """A student of these explanations, from the model as it comes."""
        return self.run("sft_student.py", "--model", self.model, "--data", data, *STUDENT, *MICRO_BATCH,
                        *self.if_quick("--steps", 2, "--val-rows", 4), out=f"runs/student-{self.name}")

    def accuracy(self, student):
        """{split and decoding: exact match} of a student."""
        found = {}
        for split, limit in QUESTIONS_OF.items():
            out = f"runs/eval-{self.name}-{split}"
            self.run("evaluate.py", "--task", "gsm8k", "--model", student, "--data", self.rows_of(split), "--limit",
                     limit, "--max-new-tokens", 128, "--batch-size", 64, *self.if_quick("--limit", 4), "--out", out)
            result = self.report(f"{out}/{student.replace('/', '_')}/eval_gsm8k.json")
            found[f"{split} greedy"] = {**result["exact_match"], "questions": result["questions"],
                                        "length": result["length"]}
        return found


ARMS = {  # functions of a WordProblemJob that return its student, or None where they only measure
    "explanations before RL": lambda job: job.measure(job.warm_up("teacher")),
    "explanations after RL": lambda job: job.measure(job.teacher_of("RLT")),
    "base": lambda job: job.base(),
    "warmed-up student": lambda job: job.warm_up("student"),
    "solutions only": lambda job: job.sft(job.replace_explanations(lambda row: "")),
    "warm-up teacher": lambda job: job.sft(job.explain(job.warm_up("teacher"))),
    "RLT": lambda job: job.sft(job.explain(job.train_teacher())),
    "right chains": lambda job: job.sft(job.replace_explanations(lambda row: row["explanation"])),
    "score only": lambda job: job.sft(job.explain(job.train_teacher("--lambda", 0))),
    "best of 8": lambda job: job.sft(job.explain(job.warm_up("teacher"), "--samples", 8, "--keep", "best")),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train split as JSONL (question, answer)")
    parser.add_argument("--model", default="smollm2", help="another model folder, for a try")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="arms, by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the rows and all draws")
    parser.add_argument("--quick", action="store_true", help="a few steps of every arm, to see that it runs")
    args = parser.parse_args()
    if not args.gsm8k.is_file():
        parser.error(f"--gsm8k {args.gsm8k}: expected a file of GSM8K's train split.")
    model = args.model if args.model == "smollm2" else str(Path(args.model).resolve())

    os.environ["OMP_NUM_THREADS"] = "1"  # before torch
    # what is no measurement of the real model stays out of the committed log
    real = not args.quick and model == "smollm2"
    log = ROOT / ("figures/logs/smollm2_study.jsonl" if real else "runs/study/smollm2-try.jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    jobs = [WordProblemJob(seed, arm, model, args.quick) for seed in args.seeds for arm in args.arms]
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(args.gsm8k, job.folder / GSM8K)
    failed = set()
    while any(try_arm(job, log, failed) for job in jobs):  # from the top after every arm: another study may be running
        pass
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
