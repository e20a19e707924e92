# SPDX-License-Identifier: MIT
"""
A study of the method on a real language model: SmolLM2-135M-Instruct on English word problems.

    python figures/smollm2_study.py --gsm8k train.jsonl --seeds 0 1 2    all arms; start it several times to share them
    python figures/smollm2_study.py --gsm8k train.jsonl --quick          a few steps of every arm, to see that it runs

Fifteen of these processes can share one GPU, if NVIDIA's MPS runs their kernels side by side: three seeds take an H100
about fifteen minutes, an estimate from half of it. On a CPU core with amx_bf16 in its flags a student of SFT takes
twenty minutes. Each seed has a folder of its own (runs/study/smollm2-seed0). A finished arm is a line in
figures/logs/smollm2_study.jsonl and is not run again; a killed one continues where it stopped. Every student gets the
same questions and the same steps; settings may be chosen by the `val` numbers only.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

from study_steps import ROOT, Job, mean_of, prepare_for_forks, replace_file, work_off

GSM8K = "gsm8k.jsonl"  # a copy of its train split, in the folder of a seed
MULTIARITH = "multiarith.json"  # the same of the problems of --multiarith
ON_MULTIARITH = ("base", "solutions only", "warm-up teacher", "warmed-up student", "right chains")  # students
LENGTH = ("--max-new-tokens", 64)  # of an explanation; the longest right chain takes 56 tokens
BITS = ("--bits", 16)
WARM_UP = ("--steps", 46, "--batch-size", 8, "--lr", 1e-3, "--warmup-steps", 3, "--val-rows", 16, "--eval-every", 20,
           "--save-every", 20)
RL = ("--prompts-per-step", 16, "--group-size", 8, "--steps", 40, "--lr", 3e-4, "--eval-rows", 0, "--save-every", 20)
ON_POLICY = ("--prompts-per-step", 32, "--steps", 40, "--lr", 3e-4, "--eval-rows", 0, "--save-every", 20,
             "--forward-share", 0.5)  # as many thoughts as SFT has rows; both KLs: some seeds of the toy need them
SMALL_BATCHES = ("--micro-batch-tokens", 4096)  # of students that write by themselves: two fit into 24 GB
STUDENT = ("--steps", 80, "--batch-size", 16, "--lr", 1e-3, "--val-rows", 32, "--save-every", 40)
QUESTIONS = 672  # 640 to learn from, twice, and 32 to validate
QUESTIONS_OF = {"val": 100, "test": 400}
ANSWER = ("--max-new-tokens", 128)
BEST_OF_8 = ("--samples", 8, "--keep", "best")
CURVE = ("step", "reward", "score", "kl", "closed", "length", "entropy", "kl_ref")  # leak is blind to bent equations
ON_POLICY_CURVE = ("step", "kl", "nll", "closed", "length")
SOLVED = ("step", "reward", "solved", "zero_groups", "length")  # of RL on correctness
RESULT = re.compile(r"= *(-?\d+)")  # of a step
THOUGHT_END = "<|end_of_thought|>"
MEASURES = {"is_right_chain": "is_right_chain", "right_steps": "right_steps", "leak": "leaks"}  # data/word_problems.py


def word_problems():
    """data/word_problems.py as a module. It imports torch, which must not be loaded before the threads are set."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from data import word_problems as module

    return module


class WordProblemJob(Job):
    """One arm on one seed. Every teacher and student starts from runs/smollm2 in the job's folder."""

    made = {"data/smollm2.py": "config.json", "data/word_problems.py": "train.jsonl"}

    def rows_of(self, split):
        """The file of a split of the word problems."""
        out = self.run("data/word_problems.py", "--gsm8k", GSM8K, "--gsm8k-rows", 64, out="runs/rows")
        return f"{out}/{split}.jsonl"

    def base(self):
        return self.run("data/smollm2.py", out="runs/smollm2", seed=False)

    def scored_by(self):
        return "--student", self.warm_up("student"), "--student-bits", 16

    def warm_up(self, role):
        """The teacher before RL, or the student that scores: SFT on chains of GSM8K and of easy problems, then on more
        of these problems alone."""
        model = self.base()
        for part, out in (("warmup", f"runs/chains-{role}"), ("practice", f"runs/warm-{role}")):
            model = self.run("sft_student.py", "--format", role, "--model", model, "--data", self.rows_of(part),
                             *BITS, *WARM_UP, *self.if_quick("--steps", 2), out=out)
        return model

    def teacher_of(self, arm, *flags):
        """The RLT of another arm on the same seed, trained with its flags if it does not exist; its curve is a fact."""
        return self.take(arm, lambda other: other.train_teacher(*flags))

    def adopt(self, other):
        """The other job's facts become this one's, too."""
        super().adopt(other)
        self.facts |= other.facts

    def train_teacher(self, *flags):
        """RLT from the warm-up teacher."""
        quick = self.if_quick("--steps", 2, "--group-size", 2)
        out = self.run("train_rlt.py", "--model", self.warm_up("teacher"), *self.scored_by(), "--data",
                       self.rows_of("train"), "--teacher-bits", 16, *RL, *LENGTH, *flags, *quick,
                       out=f"runs/{self.name}")
        metrics = self.read(f"{out}/metrics.jsonl")
        self.facts["curve"] = [{key: entry[key] for key in CURVE} for entry in metrics]
        self.facts["seconds_a_step"] = mean_of(metrics, ("t_rollout", "t_score", "t_update"))
        return out

    def explain(self, teacher, *flags):
        """The teacher's explanations of training questions; all teachers' are scored alike: exact KL, lambda 3."""
        data = f"runs/{self.name}.jsonl"
        self.run("distill.py", "--model", teacher, *self.scored_by(), "--data", self.rows_of("train"), "--limit",
                 QUESTIONS, "--teacher-bits", 16, *LENGTH, "--batch-size", 512, *flags, *self.if_quick("--limit", 12),
                 out=data)
        problems = {row["question"]: row for row in self.read(self.rows_of("train"))}
        rows = self.read(data)
        pairs = [(problems[row["question"]], row["explanation"]) for row in rows]
        self.facts["explanations"] = {
            **mean_of(rows, ("reward", "score", "kl", "closed", "length")), "count": len(rows),
            **{key: statistics.fmean(getattr(word_problems(), function)(*pair) for pair in pairs)
               for key, function in MEASURES.items()},
        }
        return data

    def explanations_of(self, arm):
        """What the student of another arm on the same seed learns from; there need not be one."""
        return self.take(arm, EXPLANATIONS[arm])

    def replace_explanations(self, explanation):
        """The training rows with explanation(row) for an explanation."""
        rows = self.read(self.rows_of("chains"))[:QUESTIONS]
        return self.write(f"runs/{self.name}.jsonl", [{**row, "explanation": explanation(row)} for row in rows])

    def human_chains(self):
        """As many rows of GSM8K: other problems, explained by people."""
        rows = [word_problems().from_gsm8k(row) for row in self.read(GSM8K)[:QUESTIONS]]
        return self.write(f"runs/{self.name}.jsonl", rows)

    def sft(self, data, model=None):
        """A student of these explanations, from the model as it comes or from another."""
        return self.run("sft_student.py", "--model", model or self.base(), "--data", data, *BITS, *STUDENT,
                        *self.if_quick("--steps", 2, "--val-rows", 4), out=f"runs/student-{self.name}")

    def rl(self, model):
        """A student by RL on correctness, from this one."""
        student = self.run("rl_student.py", "--task", "gsm8k", "--model", model, "--data", self.rows_of("train"), *BITS,
                           *RL, *ANSWER, *SMALL_BATCHES, *self.if_quick("--steps", 2, "--group-size", 2),
                           out=f"runs/{self.name}")
        metrics = self.read(f"{student}/metrics.jsonl")
        self.facts["curve"] = [{key: entry[key] for key in SOLVED} for entry in metrics]
        return student

    def on_policy(self, teacher, *flags):
        """On-policy distillation from this teacher; the warmed-up student learns."""
        student = self.run("on_policy_student.py", "--model", self.warm_up("student"), "--teacher", teacher, "--data",
                           self.rows_of("train"), *BITS, "--teacher-bits", 16, *ON_POLICY, *LENGTH, *SMALL_BATCHES,
                           *flags, *self.if_quick("--steps", 2, "--prompts-per-step", 8), out=f"runs/{self.name}")
        metrics = self.read(f"{student}/metrics.jsonl")
        self.facts["curve"] = [{key: entry[key] for key in ON_POLICY_CURVE} for entry in metrics]
        return student

    def on_multiarith(self, arms):
        """Students of other arms on public problems that none was trained on."""
        students = {arm: self.student_of(arm) for arm in arms}
        self.facts.clear()  # those of the students
        out = f"runs/eval-{self.name}"
        self.run("evaluate.py", "--task", "gsm8k", "--model", *students.values(), "--data", MULTIARITH, *BITS, *ANSWER,
                 "--batch-size", 200, *self.if_quick("--limit", 4), "--out", out)
        results = {arm: self.report(f"{out}/{student.replace('/', '_')}/eval_gsm8k.json")
                   for arm, student in students.items()}
        self.facts["multiarith"] = {arm: result["exact_match"] for arm, result in results.items()}
        self.facts["questions"] = results["base"]["questions"]

    def watch(self, *_):
        """For arms that measure how others train, and have no student of their own."""

    def accuracy(self, student):
        """{split and decoding: exact match} of a student."""
        found = {}
        for split, limit in QUESTIONS_OF.items():
            out = f"runs/eval-{self.name}-{split}"
            self.run("evaluate.py", "--task", "gsm8k", "--model", student, "--data", self.rows_of(split), "--limit",
                     limit, *BITS, *ANSWER, "--batch-size", 200, *self.if_quick("--limit", 4), "--out", out)
            result = self.report(f"{out}/{student.replace('/', '_')}/eval_gsm8k.json")
            samples = self.read(f"{out}/{student.replace('/', '_')}/eval_gsm8k_samples.jsonl")
            found[f"{split} greedy"] = {**result["exact_match"], "questions": result["questions"],
                                        "length": result["length"], **answers_and_chains(samples)}
        return found


def answers_and_chains(samples):
    """Shares of an evaluation's samples: the last result of the chain is right; the answer is that result; the answer
    is the most frequent one of all."""
    results = [RESULT.findall(sample["output"].partition(THOUGHT_END)[0])[-1:] for sample in samples]
    answers = [sample["answer"] for sample in samples]
    return {
        "right_result": statistics.fmean(last == [row["gold"]] for last, row in zip(results, samples, strict=True)),
        "answer_is_result": statistics.fmean(last == [answer] for last, answer in zip(results, answers, strict=True)),
        "same_answer": answers.count(statistics.mode(answers)) / len(answers),
    }


EXPLANATIONS = {  # arm: function of its job that writes what its student learns from
    "RLT": lambda job: job.explain(job.train_teacher()),
    "best of 8": lambda job: job.explain(job.warm_up("teacher"), *BEST_OF_8),
    "warm-up teacher": lambda job: job.explain(job.warm_up("teacher")),
    "right chains": lambda job: job.replace_explanations(lambda row: row["explanation"]),
    "human chains": lambda job: job.human_chains(),
    "solutions only": lambda job: job.replace_explanations(lambda row: ""),
    "score only": lambda job: job.explain(job.train_teacher("--lambda", 0)),
}
ARMS = {  # functions of a WordProblemJob that return its student, or None where they only measure
    **{arm: lambda job, explain=explain: job.sft(explain(job)) for arm, explain in EXPLANATIONS.items()},
    "warmed-up student": lambda job: job.warm_up("student"),
    **{f"{arm}, warmed-up student": lambda job, arm=arm: job.sft(job.explanations_of(arm), job.warm_up("student"))
       for arm in ("RLT", "best of 8", "warm-up teacher", "right chains")},
    "on-policy, warm-up teacher": lambda job: job.on_policy(job.warm_up("teacher")),
    "on-policy, RLT": lambda job: job.on_policy(job.teacher_of("RLT")),
    "on-policy, RLT, KL alone": lambda job: job.on_policy(job.teacher_of("RLT"), "--solution-weight", 0),
    **{f"explanations of {arm}": lambda job, arm=arm: job.watch(job.explanations_of(arm))
       for arm in ("RLT", "best of 8", "warm-up teacher", "score only")},
    "base": lambda job: job.base(),
    "training of RLT": lambda job: job.watch(job.teacher_of("RLT")),
    "training of score only": lambda job: job.watch(job.teacher_of("score only", "--lambda", 0)),
    "training of direct RL": lambda job: job.watch(job.student_of("direct RL")),
    "direct RL": lambda job: job.rl(job.warm_up("student")),
    "RL after RLT": lambda job: job.rl(job.student_of("RLT")),
    "MultiArith": lambda job: job.on_multiarith(ON_MULTIARITH),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--gsm8k", type=Path, required=True, help="GSM8K's train split as JSONL (question, answer)")
    parser.add_argument("--multiarith", type=Path, metavar="FILE", help="MultiArith's problems, for the arm MultiArith")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="another model in SmolLM2's place, for a try")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM",
                        help="arms, by name; default: all, MultiArith if its problems are given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the rows and all draws")
    parser.add_argument("--quick", action="store_true", help="a few steps of every arm, to see that it runs")
    args = parser.parse_args()
    if not args.gsm8k.is_file():
        parser.error(f"--gsm8k {args.gsm8k}: expected a file of GSM8K's train split.")
    args.arms = args.arms or [arm for arm in ARMS if arm != "MultiArith" or args.multiarith]
    if "MultiArith" in args.arms and not (args.multiarith and args.multiarith.is_file()):
        parser.error("the arm MultiArith needs --multiarith, a file of its problems.")
    prepare_for_forks()
    import transformers.models.llama.modeling_llama  # noqa: F401  # loaded once, for all the children

    real = not args.quick and not args.model  # what is no measurement of SmolLM2 stays out of the committed log
    log = ROOT / ("figures/logs/smollm2_study.jsonl" if real else "runs/study/smollm2-try.jsonl")
    setting = args.model.resolve().name if args.model else "smollm2"
    jobs = [WordProblemJob(ARMS, setting, seed, arm, args.quick) for arm in args.arms for seed in args.seeds]
    for job in jobs:
        replace_file(job.folder / GSM8K, args.gsm8k.read_text())
        if args.multiarith:
            replace_file(job.folder / MULTIARITH, args.multiarith.read_text())
        model = job.folder / "runs/smollm2"
        if args.model and not model.exists():
            model.parent.mkdir(exist_ok=True)
            model.symlink_to(args.model.resolve())
    sys.exit(1 if work_off(jobs, log) else 0)


if __name__ == "__main__":
    main()
