# SPDX-License-Identifier: MIT
"""The tables of the toy study: accuracy of students, and the papers' claims with a verdict each."""

import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt.paper import COUNTDOWN, overall

from plotting import LABELS
from study_log import (
    correlations,
    differences,
    greedy,
    interval,
    measured,
    read_log,
    reward_fifths,
    rows_of,
    sampled,
    study_rows,
)
from toy_results import MAIN_ARMS

# Overall score of 7B students in the paper
PAPER_17K_ROWS = {"R1 traces": overall("Bespoke-7B"), "RLT": overall("RLT-7B")}
PAPER_1K_ROWS = {"R1 traces": overall("Bespoke-7B-1K"), "RLT": overall("RLT-7B-1K")}
PAPER_COLD_START = {"direct RL": overall("7B + RL, no cold start"),
                    "RL after RL traces, raw": overall("RL-teacher traces, raw, + RL"),
                    "RL after RL traces, filtered": overall("RL-teacher traces, GPT-edited, + RL"),
                    "RL after RLT": overall("RLT-7B + RL")}
POINTS = "exact match, points, greedy"
SAMPLED_POINTS = "exact match, points, sampled at T = 1"


def accuracy_table():
    """The README's table: students by what they were trained on, and what those explanations are like."""
    seeds = sorted({row["seed"] for row in rows_of("RLT")})
    count = rows_of("base")[0]["accuracy"]["test greedy"]["questions"]
    lines = [f"Exact match on {count} held-out questions in %: mean over seeds {', '.join(map(str, seeds))} ± its 95 % "
             "interval. The columns on the right are means over the explanations of the training questions: length in "
             "tokens, how many leak the solution, how many are full chains, and the reward (λ = 3, exact KL).",
             "",
             "| student trained on | greedy | sampled at T = 1 | length | leak | full chains | reward |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for arm in MAIN_ARMS:
        rows = rows_of(arm)
        cells = [LABELS.get(arm, arm)]
        for measure in (greedy, sampled):
            mean, half = interval([measure(row) for row in rows])
            cells.append(f"**{mean:.1f}** ± {half:.1f}")
        if "explanations" in rows[0]:
            mean = {key: statistics.fmean(row["explanations"][key] for row in rows)
                    for key in ("length", "leak", "full_chain", "reward")}
            cells += [f"{mean['length']:.1f}", f"{100 * mean['leak']:.0f} %", f"{100 * mean['full_chain']:.0f} %",
                      f"{mean['reward']:.2f}"]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Measured on {measured(study_rows())}. `figures/logs/toy_study.jsonl` holds the commands of every "
              "arm and the commit they ran at.", ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# claims


class Claim(NamedTuple):
    """It holds where the values, one for each seed, are above zero."""

    text: str
    values: list
    measure: str = POINTS
    paper: str = ""


def claims():
    """{subject: [Claim, ...]}, in the order of the figures."""
    return {
        "Students (Figure 1, Table 1)": student_claims(),
        "Reward ranks (section 4.5)": rank_claims(),
        "RL after a cold start (Table 2)": cold_start_claims(),
        "A second task (zero-shot transfer)": transfer_claims(),
        "Other students, and ablations (Appendices C.4, D)": ablation_claims(),
        "On-policy distillation": on_policy_claims(),
        "Three clocks: 0 % full chains in the base's pretraining, 10 % in the warm-up rows": hardest_base_claims(),
        "The same base: a reward student refreshed every 20 steps, and on-policy distillation":
            refreshed_claims(0.1),
        "The same base, 2 % full chains in the warm-up rows": refreshed_claims(0.02),
        "Three clocks: 0.5 % full chains in the base's pretraining, 10 % in the warm-up rows":
            refreshed_claims(0.1, "base 0.005"),
        "Three clocks: 0.5 % full chains in the base's pretraining, 2 % in the warm-up rows":
            refreshed_claims(0.02, "base 0.005"),
        "Three clocks: 8 % full chains in the base's pretraining, 10 % in the warm-up rows":
            refreshed_claims(0.1, "base 0.08"),
        "Three clocks: 8 % full chains in the base's pretraining, 2 % in the warm-up rows":
            refreshed_claims(0.02, "base 0.08"),
        "Three clocks: other shares of full chains": other_share_claims(),
        "Guide-GRPO (arXiv 2506.13923), three clocks: 0.5 % full chains in the base's pretraining": guide_claims(0.005),
        "Guide-GRPO, three clocks: 0 % full chains in the base's pretraining": guide_claims(0.0),
        "Guide-GRPO with the naive ratio on an answer's first 8 tokens, on that base": naive_start_claims(),
        "Right chains where all answers fail (AdaBack, ReLIFT), on that base": right_chain_claims(),
        "What RL adds (the analysis of the Guide paper)": self_distillation_claims(),
    }


def student_claims():
    r1_traces = PAPER_17K_ROWS["RLT"] - PAPER_17K_ROWS["R1 traces"]
    r1_traces_1k = PAPER_1K_ROWS["RLT"] - PAPER_1K_ROWS["R1 traces"]

    def on_long_questions(other):
        return [100 * (row["long"]["RLT"]["mean"] - row["long"][other]["mean"]) for row in rows_of("long problems")]

    def leak(row):
        return 100 * row["explanations"]["leak"]

    return [
        Claim("RLT above the warm-up teacher", differences("RLT", "warm-up teacher", greedy)),
        Claim("RLT above RLT without KL (λ = 0)", differences("RLT", "score only", greedy)),
        Claim("RLT above solutions without explanations", differences("RLT", "solutions only", greedy)),
        Claim("RLT above all traces of the RL student", differences("RLT", "RL traces, raw", greedy)),
        Claim("RLT above the correct traces of the RL student", differences("RLT", "RL traces, filtered", greedy),
              paper=f"{r1_traces:+.1f} (R1's traces)"),
        Claim("RLT above the correct traces of the RL student, 176 rows each",
              differences("RLT, 176 rows", "RL traces, filtered, 176 rows", greedy),
              paper=f"{r1_traces_1k:+.1f} (R1's traces, 1K rows)"),
        Claim("RLT above the warm-up teacher on questions longer than in training",
              on_long_questions("warm-up teacher")),
        Claim("RLT above direct RL on questions longer than in training", on_long_questions("direct RL")),
        Claim("RLT above best of 10 without RL", differences("RLT", "best of 10", greedy), paper="not in the paper"),
        Claim("RLT above best of 10 without RL, sampled", differences("RLT", "best of 10", sampled), SAMPLED_POINTS,
              paper="not in the paper"),
        Claim("without KL, more explanations leak the solution than the warm-up teacher's",
              differences("score only", "warm-up teacher", leak), "explanations that leak, points"),
    ]


def rank_claims():
    fifths = [rows for seed in range(5) if (rows := reward_fifths(seed))]
    return [Claim("a higher reward of the explanations makes a better student",
                  [correlations(range(5), [greedy(row) for row in rows])[0] for rows in fifths],
                  "Pearson correlation of exact match with the fifth by reward, greedy", paper="0.89")]


def on_policy_claims():
    new, rlt = "not in the paper", "on-policy, RLT"
    others = {"on-policy, warm-up teacher": "the warm-up teacher", "on-policy, score only": "RLT without KL",
              "on-policy, base": "the base with the solution in its prompt",
              "on-policy, best of 10": "a teacher trained on the best of 10 explanations, without RL",
              "on-policy, clean chains": "a teacher warmed up on full chains, without RL",
              "on-policy, RLT, lambda 1": "RLT with λ = 1", "on-policy, RLT, lambda 10": "RLT with λ = 10",
              "on-policy, warm-up teacher, 240 steps": "the warm-up teacher in four times as many steps"}
    return [
        *(Claim(f"on-policy student of RLT above that of {teacher}", differences(rlt, arm, greedy), paper=new)
          for arm, teacher in others.items()),
        Claim("on-policy student of RLT above that of a teacher trained on the best of 10 explanations, sampled",
              differences(rlt, "on-policy, best of 10", sampled), SAMPLED_POINTS, paper=new),
        *(Claim(f"on-policy student of RLT above {name}", differences(rlt, f"{arm}, bases of on-policy", measure),
                points, new)
          for arm, name in (("RLT", "SFT on its explanations"), ("direct RL", "direct RL"))
          for measure, points in ((greedy, POINTS), (sampled, SAMPLED_POINTS))),
    ]


def mean_solved(row):
    """Samples that solve a training question, mean over all steps, in %."""
    return 100 * statistics.fmean(entry["solved"] for entry in row["curve"])


def cold_start_claims():
    names = {"direct RL": "direct RL", "RL after warm-up teacher": "RL after the warm-up teacher",
             "RL after RL traces, raw": "RL after all traces of the RL student",
             "RL after RL traces, filtered": "RL after the correct traces of the RL student",
             "RL after best of 10": "RL after best of 10"}
    found = []
    for arm, name in names.items():
        known = f"{PAPER_COLD_START['RL after RLT'] - PAPER_COLD_START[arm]:+.1f}" if arm in PAPER_COLD_START else ""
        found.append(Claim(f"RL after RLT above {name}", differences("RL after RLT", arm, greedy), paper=known))
    return [*found, Claim("RL after RLT above direct RL during training",
                          differences("RL after RLT", "direct RL", mean_solved),
                          "solved in training, points, mean of 60 steps")]


def transfer_claims():
    direct, of_rlt = COUNTDOWN["direct RL on Countdown"][0], COUNTDOWN["SFT on an RLT's traces, zero-shot"]
    known = f"{min(of_rlt) - direct:+.1f} to {max(of_rlt) - direct:+.1f} (Countdown; secondary sources)"
    return [
        Claim("RLT above the warm-up teacher on the task that its RL did not see",
              differences("RLT", "warm-up teacher", greedy, "rooms")),
        Claim("RLT above direct RL on that task", differences("RLT", "direct RL", greedy, "rooms"),
              paper=known),
        Claim("RLT above best of 10 without RL on that task", differences("RLT", "best of 10", greedy, "rooms"),
              paper="not in the paper"),
    ]


def ablation_claims():
    def length(row):
        return row["explanations"]["length"]

    return [
        Claim("a stronger reward student makes a better teacher than a weaker one",
              differences("RLT, stronger reward student", "RLT, weaker reward student", greedy)),
        Claim("a larger student learns more from the same explanations",
              differences("RLT, larger student", "RLT", greedy)),
        Claim("explanations are longer without min and max (α = 0)", differences("RLT, alpha 0", "RLT", length),
              "tokens in an explanation"),
        Claim("exact KL: its whole gradient (`--kl-gradient`) above the score function alone",
              differences("RLT, exact KL and gradient", "RLT, exact KL", greedy), paper="not in the paper"),
        Claim("exact KL with its whole gradient above the sampled KL (k1), sampled",
              differences("RLT, exact KL and gradient", "RLT", sampled), SAMPLED_POINTS, paper="not in the paper"),
    ]


def hardest_base_claims():
    def above(arm, other):
        return differences(arm, other, greedy, "base 0.0")

    new = "not in the paper"
    warmed_up = "RLT, warmed-up student, rows 0.1"
    return [
        Claim("RLT above direct RL", above("RLT, rows 0.1", "direct RL")),
        Claim("best of 10 above direct RL", above("best of 10, rows 0.1", "direct RL"), paper="not in the paper"),
        Claim("RLT with a warmed-up reward student above direct RL", above(warmed_up, "direct RL")),
        Claim("RLT with a warmed-up reward student above RLT", above(warmed_up, "RLT, rows 0.1"),
              paper="not in the paper"),
        Claim("RLT above best of 10, both with a warmed-up reward student",
              above(warmed_up, "best of 10, warmed-up student, rows 0.1"), paper="not in the paper"),
        *(Claim("RLT with a reward student that is refreshed every 20 steps above RLT with a warmed-up one",
                differences("RLT, refreshed every 20 steps, rows 0.1", warmed_up, measure, "base 0.0"), points, new)
          for measure, points in ((greedy, POINTS), (sampled, SAMPLED_POINTS))),
    ]


def refreshed_claims(careful, setting="base 0.0"):
    """RLT whose reward student is refreshed: students of its explanations, and on-policy students, by the reverse KL or
    by half of both KLs. careful: the share of full chains in the warm-up rows. Only of pairs that the log has."""
    rows = f"rows {careful}"
    rlt, best = f"RLT, refreshed every 20 steps, {rows}", f"best of 10, warmed-up student, {rows}"
    in_parts = f"RLT, warmed-up student, in three parts, {rows}"
    reverse, both = f"on-policy, {rlt}", f"on-policy, {rlt}, both KLs"
    as_long = ", which takes as long" * (careful == 0.1)
    pairs = (
        (rlt, in_parts, "SFT on RLT above SFT on RLT in the same three parts, its warmed-up student never refreshed"),
        (in_parts, f"RLT, warmed-up student, {rows}",
         "SFT on RLT in three parts above SFT on RLT in one run, both with the warmed-up student"),
        (rlt, "direct RL", "SFT on RLT above direct RL"),
        (rlt, "direct RL, 240 steps", "SFT on RLT above direct RL of four times as many steps"),
        (rlt, best, "SFT on RLT above SFT on best of 10 by a warmed-up reward student"),
        (rlt, f"best of 25, warmed-up student, {rows}", f"SFT on RLT above SFT on best of 25{as_long}"),
        (reverse, "direct RL", "on-policy student of RLT, reverse KL, above direct RL"),
        (reverse, f"on-policy, best of 10, {rows}", "on-policy student of RLT above that of best of 10, reverse KL"),
        (both, reverse, "on-policy student of RLT by both KLs above that by the reverse KL alone"),
        (both, f"on-policy, best of 10, {rows}, both KLs",
         "on-policy student of RLT above that of best of 10, both KLs"),
        (both, f"on-policy, warm-up teacher, {rows}, both KLs",
         "on-policy student of RLT above that of the warm-up teacher, both KLs"),
        (both, "direct RL", "on-policy student of RLT, both KLs, above direct RL"),
        (both, rlt, "on-policy student of RLT, both KLs, above SFT on its explanations"),
        (both, best, "on-policy student of RLT, both KLs, above SFT on best of 10 by a warmed-up reward student"),
    )
    return [Claim(text, values, points, "not in the paper")
            for arm, other, text in pairs for measure, points in ((greedy, POINTS), (sampled, SAMPLED_POINTS))
            if (values := differences(arm, other, measure, setting))]


def other_share_claims():
    return [
        Claim("0 % in pretraining, 2 % in the rows: RLT above direct RL",
              differences("RLT, rows 0.02", "direct RL", greedy, "base 0.0")),
        Claim("0 % in pretraining, 0 % in the rows: RLT above direct RL",
              differences("RLT, rows 0.0", "direct RL", greedy, "base 0.0")),
        Claim("8 % in pretraining, 2 % in the rows: RLT above best of 10, sampled",
              differences("RLT, rows 0.02", "best of 10, rows 0.02", sampled, "base 0.08"),
              SAMPLED_POINTS, paper="not in the paper"),
    ]


def guide_claims(share):
    def usable_groups(row):
        return 100 * statistics.fmean(entry["usable_groups"] for entry in row["curve"][:10]) / 16

    def above(other, measure):
        return differences("Guide", other, measure, f"base {share}")

    return [
        Claim("Guide-GRPO has more usable groups than GRPO", above("GRPO", usable_groups),
              "groups with a non-zero advantage, points, first 10 steps"),
        Claim("Guide-GRPO above GRPO", above("GRPO", greedy), paper="up to +4"),
        Claim("Guide-GRPO above GRPO during training", above("GRPO", mean_solved),
              "solved without a hint, points, mean of 60 steps"),
        Claim("Guide-GRPO above Guide-GRPO with the naive ratio", above("Guide, naive ratio", greedy)),
    ]


def naive_start_claims():
    def above(other, measure=greedy):
        return differences("Guide, naive start", other, measure, "base 0.0")

    new = "not in the paper"
    return [
        Claim("above GRPO", above("GRPO"), paper=new),
        Claim("above Guide-GRPO", above("Guide"), paper=new),
        Claim("above the naive ratio on all tokens", above("Guide, naive ratio"), paper=new),
        Claim("above the naive ratio on all tokens during training", above("Guide, naive ratio", mean_solved),
              "solved without a hint, points, mean of 60 steps", paper=new),
    ]


def right_chain_claims():
    def above(arm, other):
        return differences(arm, other, greedy, "base 0.0")

    return [
        Claim("AdaBack above GRPO", above("AdaBack", "GRPO")),
        Claim("ReLIFT above GRPO", above("ReLIFT", "GRPO")),
        Claim("AdaBack above ReLIFT", above("AdaBack", "ReLIFT")),
        Claim("AdaBack above SFT on full chains", above("AdaBack", "ground truth")),
        Claim("ReLIFT above SFT on full chains", above("ReLIFT", "ground truth")),
    ]


def self_distillation_claims():
    def more_than_capability_gain(setting, analysis, arm):
        splits = [row["compare"][arm]["split"]["after"] for row in rows_of(analysis, setting)]
        return [100 * (split["self_distillation"]["mean"] - split["capability_gain"]["mean"]) for split in splits]

    measure = "self-distillation minus capability gain, points of questions"
    return [
        Claim("two clocks: most of the gain by direct RL is self-distillation",
              more_than_capability_gain("toy", "what RL did", "direct RL"), measure, "98.5 % on Countdown"),
        Claim("three clocks, 0.5 % in pretraining: most of the gain by Guide-GRPO is self-distillation",
              more_than_capability_gain("base 0.005", "what Guide did", "Guide"), measure, "98.5 % on Countdown"),
    ]


def verdict(values):
    """Of a claim with these values: what the 95 % interval of their mean says."""
    mean, half = interval(values)
    if len(values) < 2:
        return "one seed"
    if mean > half:
        return "holds"
    if mean < -half:
        return "the opposite holds"
    return "no clear difference"


def claims_table():
    lines = []
    for subject, found in claims().items():
        lines += [f"**{subject}**", "",
                  "| claim | papers | measure on the toy | mean ± 95 % interval | seeds | verdict |",
                  "| --- | --- | --- | --- | --- | --- |"]
        for claim in found:
            mean, half = interval(claim.values)
            shown = f"{mean:+.2f} ± {half:.2f}" if len(claim.values) > 1 else f"{mean:+.2f}"
            lines.append(f"| {claim.text} | {claim.paper} | {claim.measure} | {shown} | {len(claim.values)} | "
                         f"{verdict(claim.values)} |")
        lines.append("")
    hours = sum(row["minutes"] for row in study_rows()) / 60
    lines += ["*Holds*: the 95 % interval of the mean over seeds lies above zero. *The opposite holds*: it lies below. "
              "*No clear difference*: it contains zero. Intervals are not corrected for their number: of twenty claims "
              "without any difference, one would *hold*, or its opposite, by chance.", "",
              f"All arms together took {hours:.0f} hours of one CPU thread, most of them on a busy machine.", ""]
    return "\n".join(lines)


VARIANTS = {  # arm of logs/toy_variants.jsonl: (what it is, the arm that it is measured against)
    "RLT, spread-weighted score": ("solution tokens weighted by the spread of their log-probs over the group", "RLT"),
}


def variants_table():
    """Variants of the reward that were tried and taken out again; the commit that a row names has their code."""
    lines = ["| variant | exact match above RLT, points, greedy | seeds | verdict | code |",
             "| --- | --- | --- | --- | --- |"]
    rows = read_log("toy_variants.jsonl", "python figures/toy_study.py, at the commit that its rows name")
    for arm, (variant, other) in VARIANTS.items():
        own = [row for row in rows if row["arm"] == arm]
        rivals = {row["seed"]: row for row in rows_of(other, own[0]["setting"])}
        values = [greedy(row) - greedy(rivals[row["seed"]]) for row in own]
        mean, half = interval(values)
        shown = f"{mean:+.1f} ± {half:.1f}" if len(values) > 1 else f"{mean:+.1f}"
        lines.append(f"| {variant} | {shown} | {len(values)} | {verdict(values)} | `{own[0]['commit'][:7]}` |")
    return "\n".join([*lines, ""])
