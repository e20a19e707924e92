# SPDX-License-Identifier: MIT
"""
What the arms of the toy's study consist of: warm-ups, teachers, explanations, students, evaluations.

Models and rows are those of data/toy.py in runs/toy of the job's folder. A step's flags are the scripts' defaults, but
for what the arm itself passes.
"""

import functools
import statistics
import sys

from study_steps import ROOT, Job, file_name, mean_of

TOY_FLAGS = {  # setting: flags of data/toy.py
    "toy": [],
    "rooms": ["--rooms", "--steps", 4000],  # base and warm-up teacher know both tasks, RL sees one
    # three clocks; the share of full chains among the explanations of long problems that the base is pretrained on
    **{f"base {share}": ["--clocks", 3, "--hints", "--careful-base", share] for share in (0.08, 0.005, 0.0)},
}
BEST_OF_10 = ("--samples", 10, "--keep", "best")  # as many sampled tokens as RL and the explanations after it
BEST_OF_25 = ("--samples", 25, "--keep", "best")  # as long as RLT with a refreshed reward student takes
TEACHER_CURVE = ("step", "reward", "score", "kl", "closed", "leak", "length", "entropy", "kl_ref", "eval_reward")
ON_POLICY_CURVE = ("step", "kl", "nll", "closed", "length", "eval_kl", "eval_nll")
STUDENT_CURVE = ("step", "reward", "solved", "zero_groups", "usable_groups", "hinted", "hinted_solved", "length",
                 "guided_log_ratio", "eval_solved")
COMPLETIONS_PER_STEP = 16 * 16  # of train_rlt.py, by its defaults


class ToyJob(Job):
    """One arm on one seed of one setting of the toy."""

    made = {"data/toy.py": "config.json"}

    def __init__(self, recipes, setting, seed, arm, quick=False):
        super().__init__(recipes, setting, seed, arm, quick)
        task = "rooms-" if setting == "rooms" else ""
        self.rows = f"runs/toy/{task}train.jsonl"
        self.data = ["--data", self.rows] if task else []
        self.tests = {split: f"runs/toy/{task}{split}.jsonl" for split in ("val", "test")}

    # -- models and explanations

    def base(self, out="runs/toy", flags=()):
        """The toy of this setting: base model and rows."""
        return self.run("data/toy.py", *TOY_FLAGS[self.setting], *flags, *self.if_quick("--steps", 20), out=out)

    def warm_up_teacher(self, careful=None):
        """SFT of the teacher on the toy's rows, or on rows with this share of full chains (three clocks)."""
        if careful is None:
            data, steps = ["--data", "runs/toy/both-train.jsonl"] if self.setting == "rooms" else [], []
            out = "runs/toy-teacher"
        else:
            rows = self.write(f"rows-{careful}.jsonl", rows_with(careful))
            data, steps = ["--data", rows], ["--steps", 300]
            out = f"runs/toy-teacher-{careful}"
        return self.sft_teacher(*data, *steps, out=out)

    def sft_teacher(self, *flags, out):
        """SFT of the teacher. flags: of sft_student.py."""
        return self.run("sft_student.py", "--format", "teacher", *flags, *self.if_quick("--steps", 2), out=out)

    def warm_up_on_chains(self):
        """SFT of the teacher on the full chain of every row."""
        rows = [{**row, "explanation": row["chain"]} for row in self.read(self.rows)]
        data = self.write("runs/chains.jsonl", rows)
        return self.sft_teacher("--data", data, out="runs/chains-teacher")

    def train_teacher(self, warm_up, *flags, part=""):
        """RLT from this warm-up teacher. part: the end of the folder's name where one arm trains several times; its
        curve goes on."""
        out = f"runs/{self.name}{part}"
        self.run("train_rlt.py", "--model", warm_up, *flags, *self.if_quick("--steps", 2), out=out)
        metrics = self.read(f"{out}/metrics.jsonl")
        curve = self.facts.setdefault("curve", [])
        curve += [{key: entry[key] for key in TEACHER_CURVE} | {"step": len(curve) + i}
                  for i, entry in enumerate(metrics)]
        self.facts["sampled_tokens"] = round(sum(entry["length"] for entry in curve) * COMPLETIONS_PER_STEP)
        self.facts["seconds_a_step"] = mean_of(metrics, ("t_rollout", "t_score", "t_update"))
        return out

    def train_part(self, teacher, student, part):
        """One of three parts of an RLT, with this reward student."""
        return self.train_teacher(teacher, "--student", student, "--steps", 20, "--lr-steps", 60, part=part)

    def warm_up_on_best(self):
        """SFT of the teacher on the best of ten of the warm-up teacher's explanations: no RL."""
        data = self.explain(self.warm_up_teacher(), *BEST_OF_10, out="best-of-10")
        return self.sft_teacher("--data", data, out="runs/best-teacher")

    def explain(self, teacher, *flags, out=None):
        """The teacher's explanations of the training questions; all teachers' are scored alike: exact KL, lambda 3."""
        data = f"runs/{out or self.name}.jsonl"
        self.run("distill.py", "--model", teacher, *self.data, *flags, *self.if_quick("--limit", 240), out=data)
        rows = self.read(data)
        self.facts["explanations"] = {
            **mean_of(rows, ("reward", "score", "kl", "length", "closed")),
            # exact; the leak of the training log is rlt.rows.leaks, by the place of the solution in the text
            "leak": statistics.fmean(toy().leaks(row["question"], row["explanation"]) for row in rows),
            "full_chain": share_of_full_chains(rows),
            "count": len(rows),
        }
        return data

    def solve(self, student, *flags):
        """The student's own answers to the training questions: traditional distillation."""
        data = f"runs/{self.name}.jsonl"
        few = self.if_quick("--limit", 240, "--keep-wrong")
        self.run("distill.py", "--solver", "--model", student, *flags, *few, out=data)
        rows = self.read(data)
        self.facts["traces"] = {**mean_of(rows, ("right", "length")), "count": len(rows),
                                "full_chain": share_of_full_chains(rows)}
        return data

    def replace_explanations(self, explanation):
        """The training rows with explanation(row) for an explanation."""
        rows = self.read(self.rows)
        return self.write(f"runs/{self.name}.jsonl", [{**row, "explanation": explanation(row)} for row in rows])

    def sft(self, data, *flags, part=""):
        """A student of these explanations. part: the end of the folder's name where one arm makes several."""
        few = self.if_quick("--steps", 2, "--skip-bad-rows")  # a base of 20 steps also writes tags, which are refused
        return self.run("sft_student.py", "--data", data, *flags, *few, out=f"runs/student-{self.name}{part}")

    def rl(self, *flags):
        """A student by RL on correctness."""
        student = self.run("rl_student.py", *self.data, *flags, *self.if_quick("--steps", 2), out=f"runs/{self.name}")
        metrics = self.read(f"{student}/metrics.jsonl")
        self.facts["curve"] = [{key: entry[key] for key in STUDENT_CURVE} for entry in metrics]
        self.facts["sampled_tokens"] = sum(entry["sampled_tokens"] for entry in metrics)
        return student

    def on_policy(self, teacher, *flags):
        """An on-policy student of this teacher."""
        student = self.run("on_policy_student.py", "--teacher", teacher, *self.data, *flags,
                           *self.if_quick("--steps", 2), out=f"runs/{self.name}")
        metrics = self.read(f"{student}/metrics.jsonl")
        self.facts["curve"] = [{key: entry[key] for key in ON_POLICY_CURVE} for entry in metrics]
        self.facts["sampled_tokens"] = sum(entry["sampled_tokens"] for entry in metrics)
        self.facts["seconds_a_step"] = mean_of(metrics, ("t_rollout", "t_update"))
        return student

    def teacher_of(self, arm, *flags, careful=None):
        """The RLT of another arm on the same seed, trained with its flags if it does not exist. careful: see
        warm_up_teacher."""
        return self.take(arm, lambda other: other.train_teacher(other.warm_up_teacher(careful), *flags))

    def explanations_of(self, arm):
        """The file that the student of another arm was trained on."""
        self.student_of(arm)
        return f"runs/{file_name(arm)}.jsonl"

    # -- measurements

    def evaluate(self, models, data, *flags, out):
        """{model: its evaluation}, by one command."""
        self.run("evaluate.py", "--task", "toy", "--model", *models, "--data", data, *flags,
                 *self.if_quick("--limit", 40), "--out", out)
        name = "eval_toy_hinted.json" if "--hinted" in flags else "eval_toy.json"
        return {model: self.report(f"{out}/{model.replace('/', '_')}/{name}") for model in models}

    def accuracy(self, student):
        """{split and decoding: exact match} of a student."""
        found = {}
        for split, decoding, temperature in (("val", "greedy", 0), ("test", "greedy", 0), ("test", "sampled", 1)):
            result = self.evaluate([student], self.tests[split], "--temperature", temperature,
                                   out=f"runs/eval/{split}-{decoding}")[student]
            found[f"{split} {decoding}"] = {**result["exact_match"], "questions": result["questions"],
                                            "length": result["length"]}
        return found


def toy():
    """data/toy.py, which the scripts find by its path, as a module."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from data import toy as module

    return module


@functools.cache
def rows_with(careful):
    """The training rows with three clocks, with this share of full chains among the explanations."""
    return toy().make_rows(3, careful, False)["train"]


def share_of_full_chains(rows):
    return statistics.fmean(toy().is_full_chain(row["question"], row["explanation"]) for row in rows)
