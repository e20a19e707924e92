# SPDX-License-Identifier: MIT
"""Figures of the toy study that follow the RLT paper's: students, training curves, cold starts, ranks, ablations."""

import math
import statistics

import matplotlib.pyplot as plt
from plotting import (
    BLUE,
    COLOURS,
    GREY,
    LABELS,
    LILAC,
    ORANGE,
    PURPLE,
    RED,
    accuracy_legend,
    bars,
    save,
    smooth,
    steps,
)
from study_log import correlations, greedy, paired_rows, reward_fifths, rows_of, sampled

MAIN_ARMS = ("base", "solutions only", "warm-up teacher", "score only", "best of 10", "RL traces, raw",
             "RL traces, filtered", "RLT", "direct RL", "ground truth")


def accuracy():
    """Figure 1 and Table 1: exact match of students trained on each kind of explanation."""
    figure, axes = plt.subplots(figsize=(6.6, 3.7))
    bars(axes, {arm: rows_of(arm) for arm in MAIN_ARMS})
    axes.set_xlabel("exact match on 800 held-out questions, %")
    axes.set_ylabel("student trained on")
    accuracy_legend(figure)
    save(figure, "toy_accuracy")


def reward():
    """Training curves of the teacher, with the KL and without."""
    titles = {"reward": "reward (each with its own λ)", "score": "score, nats", "kl": "kl (k1 estimate), nats",
              "leak": "explanations that leak, %", "length": "tokens in an explanation"}
    figure, panels = plt.subplots(1, len(titles), figsize=(11, 2.2))
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        scale = 100 if key == "leak" else 1
        for arm, colour in (("RLT", RED), ("score only", GREY)):
            for row in rows_of(arm):
                line, = axes.plot(steps(row["curve"]), [scale * entry[key] for entry in row["curve"]], color=colour,
                                  lw=0.8, alpha=0.8)
            line.set_label(LABELS[arm])
        axes.set_title(title)
        axes.set_xlabel("step")
    figure.legend(*panels[0].get_legend_handles_labels(), title="one line for each seed", loc="upper center", ncols=2,
                  bbox_to_anchor=(0.5, 0.03))
    save(figure, "toy_reward")


def few_and_long():
    """Table 1's 1K of 17K rows, and questions longer than those of the training rows."""
    figure, (few, long) = plt.subplots(1, 2, figsize=(10.5, 2.9))
    bars(few, {arm: rows_of(f"{arm}, 176 rows")
               for arm in ("warm-up teacher", "RL traces, filtered", "RLT", "ground truth")})
    few.set_title("trained on 176 rows instead of 3,000")
    few.set_ylabel("student trained on")
    results = [row["long"] for row in rows_of("long problems")]
    bars(long, {arm: [result[arm] for result in results if arm in result] for arm in MAIN_ARMS},
         [lambda exact_match: 100 * exact_match["mean"]])
    long.set_title("questions of 6 steps (trained on 4 and 5), greedy")
    for axes in (few, long):
        axes.set_xlabel("exact match, %")
    accuracy_legend(figure)
    save(figure, "toy_few_and_long")


COLD_STARTS = ("warm-up teacher", "RL traces, raw", "RL traces, filtered", "best of 10", "RLT")


def cold_start():
    """Table 2: RL on correctness, from the base model or after SFT on explanations."""
    figure, (curves, final) = plt.subplots(1, 2, figsize=(10, 2.9))
    starts = {"direct RL": "direct RL"} | {f"RL after {start}": start for start in COLD_STARTS}
    labels = {arm: LABELS.get(start, start) for arm, start in starts.items()} | {"direct RL": "no cold start"}
    colours = {arm: COLOURS.get(start, GREY) for arm, start in starts.items()}
    rows = paired_rows(starts)
    for arm, own in rows.items():
        by_step = zip(*(row["curve"] for row in own), strict=True)
        solved = [100 * statistics.fmean(entry["solved"] for entry in entries) for entries in by_step]
        curves.plot(steps(own[0]["curve"]), smooth(solved), color=colours[arm], lw=1.3, label=labels[arm],
                    ls="--" if "traces" in arm else "-")
    curves.set_xlabel("step of RL on correctness")
    curves.set_ylabel("samples that solve a training question, %")
    curves.set_ylim(0, 100)
    curves.legend(title="SFT before RL on")
    bars(final, rows, labels=labels, colours=colours)
    final.set_xlabel("exact match after RL, %")
    final.set_ylabel("SFT before RL on")
    accuracy_legend(figure)
    save(figure, "toy_cold_start")


def transfer():
    """The Countdown figure: students of a second task, which the teacher did not see in its RL."""
    figure, axes = plt.subplots(figsize=(6.4, 2.9))
    arms = ("base", "solutions only", "warm-up teacher", "best of 10", "RLT", "direct RL", "ground truth")
    bars(axes, {arm: rows_of(arm, "rooms") for arm in arms},
         labels={"RLT": "RLT (λ = 3) on clocks", "direct RL": "direct RL on rooms"})
    axes.set_xlabel("exact match on the rooms task, %")
    axes.set_ylabel("student trained on")
    accuracy_legend(figure)
    save(figure, "toy_transfer")


def reward_ranks():
    """Section 4.5: students of five parts of the warm-up teacher's explanations, by reward within each question."""
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.6))
    for axes, measure, name in ((panels[0], greedy, "greedy"), (panels[1], sampled, "sampled at T = 1")):
        for seed, colour, marker in ((0, BLUE, "o"), (1, ORANGE, "s"), (2, PURPLE, "^")):
            accuracies = [measure(row) for row in reward_fifths(seed)]
            pearson, spearman = correlations(range(5), accuracies)
            axes.plot(range(1, 6), accuracies, color=colour, marker=marker, ms=4, lw=1,
                      label=f"seed {seed}: {pearson:.2f}, {spearman:.2f}")
        axes.set_xticks(range(1, 6))
        axes.set_xlabel("student trained on this fifth of the explanations,\n1: lowest reward, 5: highest")
        axes.set_ylabel(f"exact match, %,\n{name}")
        axes.set_ylim(0, 100)
        axes.legend(title="correlation: Pearson, Spearman")
    save(figure, "toy_ranks")


ABLATIONS = {
    "score only": "λ = 0 (score only)", "RLT, lambda 1": "λ = 1", "RLT": "RLT: λ = 3, α = 0.01, k1, lr 2e-3",
    "RLT, lambda 10": "λ = 10", "RLT, alpha 0": "α = 0 (means only)", "RLT, alpha 0.1": "α = 0.1",
    "RLT, lr 5e-3": "lr 5e-3", "RLT, exact KL": "exact KL", "RLT, exact KL, lr 5e-3": "exact KL, lr 5e-3",
    "RLT, exact KL and gradient": "exact KL with --kl-gradient",
}


def ablations():
    """Appendix D: lambda, alpha and the form of the KL; accuracy of students, length and leaks of explanations."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), sharey=True, width_ratios=(2, 1, 1))
    rows = paired_rows(ABLATIONS)

    def length(row):
        return row["explanations"]["length"]

    def leak(row):
        return 100 * row["explanations"]["leak"]

    for axes, measures, highest, label in (
            (panels[0], (greedy, sampled), 100, "student's exact match, %"),
            (panels[1], [length], math.inf, "tokens in an explanation"),
            (panels[2], [leak], 100, "explanations that leak, %")):
        bars(axes, rows, measures, labels=ABLATIONS, highest=highest)
        axes.set_xlabel(label)
    accuracy_legend(figure)
    save(figure, "toy_ablations")


def students():
    """Appendix C.4: larger students of the same explanations, and other students in the reward."""
    figure, axes = plt.subplots(figsize=(6.6, 3.2))
    arms = ("base, weaker", "base", "base, larger", "warm-up teacher", "warm-up teacher, larger student", "RLT",
            "RLT, larger student", "RLT, weaker reward student", "RLT, stronger reward student")
    bars(axes, paired_rows(arms), labels={
        "warm-up teacher": "base model + SFT on warm-up teacher",
        "warm-up teacher, larger student": "larger base model + SFT on warm-up teacher",
        "RLT": "base model + SFT on RLT",
        "RLT, larger student": "larger base model + SFT on RLT",
        "RLT, weaker reward student": "base model + SFT on RLT, reward by weaker base",
        "RLT, stronger reward student": "base model + SFT on RLT, reward by larger base"})
    axes.set_xlabel("exact match, %")
    accuracy_legend(figure)
    save(figure, "toy_students")


ON_POLICY = {  # arm: the teacher of an on-policy student, and a colour
    "on-policy, base": ("base model", GREY),
    "on-policy, warm-up teacher": ("warm-up teacher", BLUE),
    "on-policy, warm-up teacher, 240 steps": ("warm-up teacher, 240 steps", BLUE),
    "on-policy, warm-up teacher, forward KL": ("warm-up teacher, forward KL", LILAC),
    "on-policy, score only": ("RLT without KL (λ = 0)", PURPLE),
    "on-policy, RLT, lambda 1": ("RLT, λ = 1", RED), "on-policy, RLT": ("RLT (λ = 3)", RED),
    "on-policy, RLT, lambda 10": ("RLT, λ = 10", RED),
    "on-policy, best of 10": ("teacher of best of 10, no RL", "black"),
    "on-policy, clean chains": ("warm-up teacher of full chains", ORANGE),
    "RLT, bases of on-policy": ("for comparison: SFT on RLT", GREY),
    "direct RL, bases of on-policy": ("for comparison: direct RL", GREY),
}
BARS_ONLY = ("240 steps", "lambda", "bases of on-policy")


def on_policy():
    """On-policy students: accuracy; the KL to the teacher and the length of thoughts along training."""
    figure, (final, *panels) = plt.subplots(1, 3, figsize=(12, 2.9), width_ratios=(1.3, 1, 1))
    rows = {arm: rows_of(arm) for arm in ON_POLICY}
    labels, colours = ({arm: entry[i] for arm, entry in ON_POLICY.items()} for i in range(2))
    bars(final, rows, labels=labels, colours=colours)
    final.set_xlabel("exact match, %")
    final.set_ylabel("on-policy student of")
    for axes, key, title in zip(panels, ("kl", "length"), ("KL to the teacher, nats a token", "tokens in a thought"),
                                strict=True):
        for arm, own in rows.items():
            if any(part in arm for part in BARS_ONLY):
                continue
            curve = own[0]["curve"]
            axes.plot(steps(curve), [entry[key] for entry in curve], color=colours[arm], lw=1.2,
                      ls="--" if "forward" in arm else "-")
        axes.set_xlabel(f"step (seed {rows['on-policy, RLT'][0]['seed']})")
        axes.set_ylabel(title)
        axes.set_ylim(bottom=0)
    panels[0].set_title("colours as on the left; dashed: forward KL")
    accuracy_legend(figure)
    save(figure, "toy_on_policy")


FIGURES = (accuracy, reward, few_and_long, cold_start, transfer, reward_ranks, ablations, students, on_policy)
