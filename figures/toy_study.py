# SPDX-License-Identifier: MIT
"""
The toy study: every claim of the papers as an arm, by the commands that a user would type.

    python figures/toy_study.py             all arms, a day of one thread; start it twice on two cores to share them
    python figures/toy_study.py --quick     a few steps of every arm, to see that it runs

Each setting of the toy and each seed has a folder of its own (runs/study/toy-seed0, with runs/toy and all that follows
inside). A finished arm is a line in figures/logs/toy_study.jsonl and is not run again; a killed one continues where it
stopped. To run arms again, give another --log, and move runs/study away. All students get the same number of steps of
the same size; settings may be chosen by the `val` numbers only.
"""

import argparse
import functools
import sys
from pathlib import Path

from study_steps import ROOT, mean_of, prepare_for_forks, work_off
from toy_steps import BEST_OF_10, BEST_OF_25, TOY_FLAGS, ToyJob, share_of_full_chains

BOTH_KLS = ("--forward-share", 0.5)
CORRECTNESS = ("--rewards", 0, 0, 1)  # 1 for a correct answer, nothing for the format
GUIDE = ("--failed-groups", "guide")
FROM_CHAINS = ("--explanation-column", "chain", "--failed-groups")
WARM_UP_SHARES = (0.1, 0.02, 0.0)  # of full chains among the warm-up rows: columns of the map


# ---------------------------------------------------------------------------------------------------------
# arms: functions of a ToyJob that return its student, or None where they only measure


def warm_up(job, *flags):
    """A student of the warm-up teacher's explanations. flags: of distill.py."""
    return job.sft(job.explain(job.warm_up_teacher(), *flags))


def rlt(job, *flags):
    """A student of the RLT's explanations. flags: of train_rlt.py."""
    return job.sft(job.explain(job.train_teacher(job.warm_up_teacher(), *flags)))


def solutions_only(job):
    return job.sft(job.replace_explanations(lambda row: ""))


def ground_truth(job):
    return job.sft(job.replace_explanations(lambda row: row["chain"]))


def traces(job, *flags):
    """A student of the answers of the student by direct RL. flags: of distill.py --solver."""
    return job.sft(job.solve(job.student_of("direct RL"), *flags))


def few_rows(job, arm):
    """1K of the paper's 17K rows is 176 of 3,000; 64 more validate."""
    return job.sft(job.explanations_of(arm), "--limit", 176 + 64)


def rl_after(job, arm):
    return job.rl("--model", job.student_of(arm))


def reward_fifth(job, i):
    """A student of one fifth of the warm-up teacher's explanations, by reward within the question."""
    job.explain(job.warm_up_teacher(), "--samples", 10, "--limit", 1000, "--partition", 5, out="ranked")
    data = f"runs/ranked.within-{i}of5.jsonl"
    job.facts["explanations"] = mean_of(job.read(data), ("reward", "score", "kl"))
    return job.sft(data)


def larger_base(job):
    return job.base("runs/toy-strong", ("--hidden-size", 192))


def weaker_base(job):
    return job.base("runs/toy-weak", ("--steps", 700))


def larger_student(job, arm):
    return job.sft(job.explanations_of(arm), "--model", larger_base(job))


def other_reward_student(job, base):
    return rlt(job, "--student", base(job))


def long_problems(job):
    """Students on questions longer than those of the training rows."""
    arms = ("base", "warm-up teacher", "RLT", "score only", "ground truth", "best of 10", "direct RL")
    students = {job.student_of(arm): arm for arm in arms}
    results = job.evaluate(students, "runs/toy/long.jsonl", "--temperature", 0, out="runs/eval/long")
    job.facts["long"] = {students[model]: result["exact_match"] for model, result in results.items()}


def what_rl_did(job, *arms):
    """pass@k before and after RL, and the gain split into what was in reach before and what was not."""
    base, students = job.student_of("base"), {arm: job.student_of(arm) for arm in arms}
    samples = ("--samples", 16, "--temperature", 1)
    job.evaluate([base, *students.values()], job.tests["test"], *samples, out="runs/eval/16")
    again = ("--seed", job.seed + 100, "--out", "runs/eval/16-again")  # how much two draws of the base differ
    job.run("evaluate.py", "--task", "toy", "--model", base, "--data", job.tests["test"], *samples,
            *job.if_quick("--limit", 40), *again, seed=False)
    for arm, student in students.items():
        before, after = (f"runs/eval/16/{model.replace('/', '_')}" for model in (base, student))
        job.run("evaluate.py", "--task", "toy", "--compare", before, after, "--floor", "runs/eval/16-again/runs_toy",
                seed=False)
        report = job.report(f"{after}/compare_toy.json")
        kept = {key: without_lists(report[key]) for key in ("pass_at", "split", "samples", "reach")}
        job.facts.setdefault("compare", {})[arm] = kept


def without_lists(tree):
    """A report without the numbers of single questions."""
    if not isinstance(tree, dict):
        return tree
    return {key: without_lists(value) for key, value in tree.items() if not isinstance(value, list)}


def signal(job):
    """Correct answers of the base in twice 16 samples of each question, plain and with hints."""
    counts = {}
    for kind, flags, stem in (("plain", (), "eval_toy"), ("hinted", ("--hinted",), "eval_toy_hinted")):
        out = f"runs/eval/32{''.join(flags)}"
        job.evaluate([job.base()], job.tests["val"], "--samples", 32, "--temperature", 1, *flags, out=out)
        correct = [bool(row["grade"]) for row in job.read(f"{out}/runs_toy/{stem}_samples.jsonl")]
        groups = [correct[at : at + 32] for at in range(0, len(correct), 32)]
        counts[kind] = [(sum(group[:16]), sum(group[16:])) for group in groups]
    job.facts["signal"] = counts


# -- three clocks: the warm-up teacher is trained on rows with this share of full chains


def what_the_reward_sees(job, careful=0.1):
    """Explanations by a teacher of full chains and by RLT, scored by the base and by a warmed-up student: means, and
    the tokens of some."""
    students = {"base": job.base(), "warmed-up": job.student_of(f"warm-up teacher, rows {careful}")}
    teachers = {"full chains": job.warm_up_on_chains(), "RLT": job.teacher_of(f"RLT, rows {careful}", careful=careful)}
    seen = job.facts["seen"] = []
    for by, teacher in teachers.items():
        for student in students:
            data = f"runs/seen-{by.replace(' ', '-')}-{student}.jsonl"
            job.run("distill.py", "--model", teacher, "--student", students[student], "--limit", 64, out=data)
            rows = job.read(data)
            kept = [{key: row[key] for key in ("question", "solution", "explanation", "reward", "score", "kl", "closed",
                                               "tokens")} for row in rows[:8]]
            seen.append({"by": by, "student": student, **mean_of(rows, ("reward", "score", "kl", "length")),
                         "full_chain": share_of_full_chains(rows), "rows": kept})


def map_warm_up(job, careful, *flags, student=None):
    """As warm_up(). student: the arm whose student scores the explanations, instead of the base."""
    scored_by = ("--student", job.student_of(student)) if student else ()
    return job.sft(job.explain(job.warm_up_teacher(careful), *flags, *scored_by))


def map_rlt(job, *flags, careful, student=None):
    """As rlt(). student: the arm whose student is the reward student, instead of the base. flags: of train_rlt.py."""
    rewarded_by = ("--student", job.student_of(student)) if student else ()
    return job.sft(job.explain(job.train_teacher(job.warm_up_teacher(careful), *rewarded_by, *flags)))


IN_ONE_RUN = {  # what else starts anew with each of the PARTS, one by one: flags of train_rlt.py
    "reference renewed": ("--sync-ref-every", 20, "--sync-ref-mix", 1),
    "constant lr": ("--final-lr-fraction", 1),
    "320 questions": ("--limit", 384),  # 64 are held out
}
PARTS = ("-1", "-2", "-3")


def refreshed_teacher(job, careful):
    """RLT in three parts of 20 steps. The reward student of each is a student of the latest explanations, first of the
    warm-up teacher's. Each part starts anew with the optimizer, the learning rate's warm-up, the reference policy and
    the order of the questions: it trains on the same 320."""
    teacher = job.warm_up_teacher(careful)
    for part in PARTS:
        student = job.sft(job.explain(teacher, out=f"{job.name}{part}"), part=part)
        teacher = job.train_part(teacher, student, part)
    return teacher


def teacher_in_parts(job, careful):
    """The control: the same three parts, with the first of these reward students in all of them."""
    teacher, student = job.warm_up_teacher(careful), job.student_of(f"warm-up teacher, rows {careful}")
    for part in PARTS:
        teacher = job.train_part(teacher, student, part)
    return teacher


def on_policy_ablation(job, ablation):
    """An on-policy student of an RLT with other flags."""
    return job.on_policy(job.teacher_of(f"RLT, {ablation}", *ABLATIONS[ablation]))


def on_policy_refreshed(job, *flags, arm, careful):
    """An on-policy student of the RLT of this arm. flags: of on_policy_student.py."""
    return job.on_policy(job.take(arm, lambda other: refreshed_teacher(other, careful)), *flags)


def on_policy_best(job, *flags, scored_by, careful):
    """An on-policy student of the warm-up teacher after SFT on the best of ten of its explanations: no RL."""
    best = job.explain(job.warm_up_teacher(careful), *BEST_OF_10, "--student", job.student_of(scored_by),
                       out=f"on-policy-best-of-10-rows-{careful}")
    return job.on_policy(job.sft_teacher("--data", best, out=f"runs/best-teacher-{careful}"), *flags)


def map_arms(careful):
    """The arms of one column of the map."""
    partial, rows = functools.partial, f"rows {careful}"
    warmed_up, best = f"warm-up teacher, {rows}", f"best of 10, {rows}"
    refreshed = f"RLT, refreshed every 20 steps, {rows}"
    return {
        warmed_up: lambda job: map_warm_up(job, careful),
        f"RLT, {rows}": partial(map_rlt, careful=careful),
        best: lambda job: map_warm_up(job, careful, *BEST_OF_10),
        f"best of 10, warmed-up student, {rows}": lambda job: map_warm_up(job, careful, *BEST_OF_10, student=warmed_up),
        f"best of 25, warmed-up student, {rows}": lambda job: map_warm_up(job, careful, *BEST_OF_25, student=warmed_up),
        f"RLT, warmed-up student, {rows}": partial(map_rlt, careful=careful, student=warmed_up),
        **{f"RLT, warmed-up student, {name}, {rows}":
           lambda job, flags=flags: map_rlt(job, *flags, careful=careful, student=warmed_up)
           for name, flags in IN_ONE_RUN.items()},
        f"RLT, student of best of 10, {rows}": partial(map_rlt, careful=careful, student=best),
        refreshed: lambda job: job.sft(job.explain(refreshed_teacher(job, careful))),
        f"RLT, warmed-up student, in three parts, {rows}": lambda job: job.sft(
            job.explain(teacher_in_parts(job, careful))),
        f"on-policy, {refreshed}": lambda job, *flags: on_policy_refreshed(job, *flags, arm=refreshed, careful=careful),
        f"on-policy, best of 10, {rows}": lambda job, *flags: on_policy_best(
            job, *flags, scored_by=warmed_up, careful=careful),
        f"on-policy, warm-up teacher, {rows}": lambda job, *flags: job.on_policy(job.warm_up_teacher(careful), *flags),
        f"RL after RLT, {rows}": partial(rl_after, arm=f"RLT, {rows}"),
        f"RL after best of 10, {rows}": partial(rl_after, arm=best),
    }


ABLATIONS = {  # flags of train_rlt.py
    "lambda 1": ("--lambda", 1), "lambda 10": ("--lambda", 10),
    "alpha 0": ("--alpha", 0), "alpha 0.1": ("--alpha", 0.1),
    "exact KL": ("--kl", "exact"), "exact KL, lr 5e-3": ("--kl", "exact", "--lr", "5e-3"),
    "exact KL and gradient": ("--kl", "exact", "--kl-gradient"), "lr 5e-3": ("--lr", "5e-3"),
}
OTHER_LAMBDAS = ("lambda 1", "lambda 10")
COLD_STARTS = ("warm-up teacher", "RL traces, raw", "RL traces, filtered", "RLT", "best of 10")
FEW_ROWS = ("warm-up teacher", "RLT", "RL traces, filtered", "ground truth")
ARMS = {  # by the names of the log
    # Figure 1, Table 1
    "base": lambda job: job.base(),
    "warm-up teacher": warm_up,
    "RLT": rlt,
    "solutions only": solutions_only,
    "score only": lambda job: rlt(job, "--lambda", 0),
    "ground truth": ground_truth,
    "best of 10": lambda job: warm_up(job, *BEST_OF_10),
    "direct RL": lambda job: job.rl(),
    "direct RL, 240 steps": lambda job: job.rl("--steps", 240),
    "RL traces, raw": lambda job: traces(job, "--keep-wrong"),
    "RL traces, filtered": traces,
    "long problems": long_problems,
    **{f"{arm}, 176 rows": functools.partial(few_rows, arm=arm) for arm in FEW_ROWS},
    # Table 2
    **{f"RL after {arm}": functools.partial(rl_after, arm=arm) for arm in COLD_STARTS},
    # section 4.5
    **{f"rank {i} of 5": functools.partial(reward_fifth, i=i) for i in range(1, 6)},
    # Appendix C.4
    "base, larger": larger_base,
    "base, weaker": weaker_base,
    "warm-up teacher, larger student": functools.partial(larger_student, arm="warm-up teacher"),
    "RLT, larger student": functools.partial(larger_student, arm="RLT"),
    "RLT, stronger reward student": functools.partial(other_reward_student, base=larger_base),
    "RLT, weaker reward student": functools.partial(other_reward_student, base=weaker_base),
    # Appendix D
    **{f"RLT, {name}": lambda job, flags=flags: rlt(job, *flags) for name, flags in ABLATIONS.items()},
    # beyond the papers: on-policy distillation
    "on-policy, base": lambda job: job.on_policy(job.base()),
    "on-policy, warm-up teacher": lambda job: job.on_policy(job.warm_up_teacher()),
    "on-policy, score only": lambda job: job.on_policy(job.teacher_of("score only", "--lambda", 0)),
    "on-policy, RLT": lambda job: job.on_policy(job.teacher_of("RLT")),
    "on-policy, best of 10": lambda job: job.on_policy(job.warm_up_on_best()),
    "on-policy, clean chains": lambda job: job.on_policy(job.warm_up_on_chains()),
    "on-policy, warm-up teacher, forward KL": lambda job: job.on_policy(job.warm_up_teacher(), "--forward-share", 1),
    "on-policy, warm-up teacher, 240 steps": lambda job: job.on_policy(job.warm_up_teacher(), "--steps", 240),
    **{f"on-policy, RLT, {name}": functools.partial(on_policy_ablation, ablation=name) for name in OTHER_LAMBDAS},
    # beside them, since their bases were made later, on another CPU, than those of the other arms with two clocks
    "RLT, bases of on-policy": lambda job: job.sft(job.explain(job.teacher_of("RLT"))),
    "RLT, lambda 1, bases of on-policy":
        lambda job: job.sft(job.explain(job.teacher_of("RLT, lambda 1", *ABLATIONS["lambda 1"]))),
    "direct RL, bases of on-policy": lambda job: job.rl(),
    # Guide-GRPO
    "GRPO": lambda job: job.rl(*CORRECTNESS),
    "Guide": lambda job: job.rl(*GUIDE, *CORRECTNESS),
    "Guide, naive ratio": lambda job: job.rl(*GUIDE, "--hint-ratio", "naive", *CORRECTNESS),
    "Guide, naive start": lambda job: job.rl(*GUIDE, "--hint-ratio", "start", *CORRECTNESS),
    "AdaBack": lambda job: job.rl(*FROM_CHAINS, "adaback", "--limit", 304, *CORRECTNESS),  # each question four times
    "ReLIFT": lambda job: job.rl(*FROM_CHAINS, "relift", *CORRECTNESS),
    "signal": signal,
    "what Guide did": lambda job: what_rl_did(job, "GRPO", "Guide", "Guide, naive ratio"),
    "what the reward sees": what_the_reward_sees,
    "what RL did": lambda job: what_rl_did(job, "direct RL"),
    # the map
    **{arm: recipe for careful in WARM_UP_SHARES for arm, recipe in map_arms(careful).items()},
}
ARMS |= {f"{arm}, both KLs": functools.partial(lambda job, recipe: recipe(job, *BOTH_KLS), recipe=recipe)
         for arm, recipe in ARMS.items() if arm.startswith("on-policy") and "rows" in arm}


# ---------------------------------------------------------------------------------------------------------
# the plan


def plan():
    """[(setting, seed, arm)] in the order in which they are run."""
    main = ("base", "warm-up teacher", "RLT", "solutions only", "score only", "ground truth", "best of 10", "direct RL",
            "RL traces, raw", "RL traces, filtered")
    rooms = ("base", "warm-up teacher", "RLT", "direct RL", "solutions only", "ground truth", "best of 10",
             "what RL did")
    guide = ("base", "GRPO", "Guide", "Guide, naive ratio", "signal", "what Guide did")
    hardest = ("direct RL", *(f"{arm}, rows 0.1" for arm in (
        "warm-up teacher", "RLT", "best of 10", "RLT, warmed-up student", "best of 10, warmed-up student")))
    other_students = ("base, larger", "base, weaker", "warm-up teacher, larger student", "RLT, larger student",
                      "RLT, stronger reward student", "RLT, weaker reward student")

    def against_refreshed(careful):
        """RLT whose reward student is refreshed, and its rivals."""
        arms = ("warm-up teacher", "best of 10, warmed-up student", "RLT, refreshed every 20 steps")
        return ["direct RL", *(f"{arm}, rows {careful}" for arm in arms)]

    def on_policy(careful, *kls):
        """On-policy students of each of these teachers. kls: ends of the arms' names."""
        teachers = ("RLT, refreshed every 20 steps", "best of 10", "warm-up teacher")
        return [f"on-policy, {teacher}, rows {careful}{end}" for end in kls for teacher in teachers]

    def on_map(*with_a_student):
        """The map's arms on one base. with_a_student: those whose reward student is not the base."""
        arms = ("warm-up teacher", "RLT", "best of 10", *with_a_student, "RL after RLT", "RL after best of 10")
        return ("base", "direct RL", "Guide", "signal",
                *(f"{arm}, rows {careful}" for careful in WARM_UP_SHARES for arm in arms))

    both = ", both KLs"
    warmed_up = ("best of 10, warmed-up student", "RLT, warmed-up student")
    parts = (
        ("toy", 5, main),
        ("toy", 5, ("on-policy, warm-up teacher", "on-policy, RLT", "RLT, bases of on-policy",
                    "direct RL, bases of on-policy")),
        ("toy", 3, [f"on-policy, {teacher}" for teacher in ("base", "score only", "best of 10", "clean chains")]),
        ("toy", 1, ["on-policy, warm-up teacher, forward KL"]),
        ("toy", 3, ["on-policy, warm-up teacher, 240 steps", *(f"on-policy, RLT, {name}" for name in OTHER_LAMBDAS)]),
        ("toy", 3, [f"RL after {arm}" for arm in COLD_STARTS]),
        ("toy", 3, [f"rank {i} of 5" for i in range(1, 6)]),
        ("rooms", 3, rooms),
        ("base 0.005", 3, guide),
        ("base 0.0", 3, guide),
        ("base 0.0", 3, ("AdaBack", "ReLIFT", "ground truth")),
        ("base 0.0", 3, ["Guide, naive start"]),
        ("base 0.08", 1, on_map()),
        ("base 0.005", 1, on_map(*warmed_up)),
        ("base 0.0", 1, on_map(*warmed_up, "RLT, student of best of 10")),
        ("base 0.08", 3, ("RLT, rows 0.02", "best of 10, rows 0.02")),
        ("base 0.0", 3, hardest),
        ("base 0.0", 1, ["what the reward sees"]),
        ("base 0.0", 5, [*against_refreshed(0.1), *on_policy(0.1, "", both)]),
        ("base 0.0", 5, against_refreshed(0.02)),
        ("base 0.0", 3, on_policy(0.02, "", both)),
        *((base, 3, [*against_refreshed(careful), *on_policy(careful, both)])
          for base in ("base 0.005", "base 0.08") for careful in (0.1, 0.02)),
        ("base 0.0", 3, [f"RLT, warmed-up student{parts}, rows {careful}" for careful in (0.1, 0.02)
                         for parts in ("", ", in three parts")]),
        ("base 0.0", 1, [f"RLT, warmed-up student, {name}, rows 0.02" for name in IN_ONE_RUN]),
        ("toy", 3, ["RLT, lambda 1, bases of on-policy"]),
        ("base 0.0", 5, ["direct RL, 240 steps"]),
        ("base 0.0", 3, [f"best of 25, warmed-up student, rows {careful}" for careful in (0.1, 0.02)]),
        ("toy", 3, ("long problems", "what RL did", *(f"{arm}, 176 rows" for arm in FEW_ROWS))),
        ("toy", 3, other_students),
        ("toy", 3, [f"RLT, {name}" for name in ABLATIONS]),
    )
    jobs = [(setting, seed, arm) for setting, seeds, arms in parts for seed in range(seeds) for arm in arms]
    return list(dict.fromkeys(jobs))  # some arms belong to two parts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--settings", nargs="+", default=list(TOY_FLAGS), choices=TOY_FLAGS, help="settings of the toy")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM", help="arms, by name")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)), help="seeds of the base and all draws")
    parser.add_argument("--log", type=Path, metavar="FILE", help="default: figures/logs/toy_study.jsonl")
    parser.add_argument("--quick", action="store_true", help="a few steps of every arm on seed 0, to see that it runs")
    args = parser.parse_args()

    prepare_for_forks()
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  # loaded once, for all the children

    log = args.log or ROOT / ("runs/study/quick.jsonl" if args.quick else "figures/logs/toy_study.jsonl")
    jobs = [ToyJob(ARMS, setting, seed, arm, args.quick) for setting, seed, arm in plan()
            if setting in args.settings and seed in args.seeds and arm in args.arms and not (args.quick and seed)]
    sys.exit(1 if work_off(jobs, log) else 0)


if __name__ == "__main__":
    main()
