# SPDX-License-Identifier: MIT
"""Figures of the harder toy with three clocks: Guide-GRPO, and a map of when RLT beats direct RL and best of 10."""

import math
import statistics

import matplotlib.pyplot as plt
from plotting import BLUE, GREY, ORANGE, RED, accuracy_legend, bars, save, smooth, steps, whisker
from study_log import greedy, rows_of, sampled

BASES = (0.08, 0.005, 0.0)  # share of full chains that the base saw explain long problems in pretraining
ROWS = (0.1, 0.02, 0.0)  # the same share among the rows of the teacher's warm-up
MAP_SEED = 0
GROUP = 16  # samples of a question


def describe_base(share):
    return f"{100 * share:g} % full chains in the base's pretraining"


def all_from(some, draws, group=GROUP):
    """Probability that a group, drawn without putting back, consists of `some` of the draws only."""
    return math.comb(some, group) / math.comb(draws, group)


def usable(correct, draws, group=GROUP):
    """Probability that a group out of these draws has a non-zero advantage: correct answers and wrong ones.

    The paper's s(p) = 1 - (1 - p)^G - p^G, but without putting back: with a p estimated from the same draws, questions
    that were lucky in the estimate would seem to fall short of the prediction.
    """
    return 1 - all_from(draws - correct, draws, group) - all_from(correct, draws, group)


def usable_groups(rows):
    """Usable groups among the questions of each number of correct answers, without hints and with.

    rows: of the arm "signal", which has 32 samples of each question without a hint, as two counts of 16, and as many
    with a hint. The first 16 are the group; where all of them fail, Guide takes the 16 with a hint instead.
    Returns {correct answers in 32: (questions, plain, plain predicted, guided, guided predicted)}; the last four are
    shares of the questions.
    """
    by_correct = {}
    for row in rows:
        for plain, hinted in zip(row["signal"]["plain"], row["signal"]["hinted"], strict=True):
            correct, correct_hinted, draws = sum(plain), sum(hinted), 2 * GROUP
            group = hinted[0] if plain[0] == 0 else plain[0]
            by_correct.setdefault(correct, []).append((
                0 < plain[0] < GROUP,
                usable(correct, draws),
                0 < group < GROUP,
                usable(correct, draws) + all_from(draws - correct, draws) * usable(correct_hinted, draws),
            ))
    return {correct: (len(of_questions), *map(statistics.fmean, zip(*of_questions, strict=True)))
            for correct, of_questions in sorted(by_correct.items())}


GUIDE_ARMS = {"GRPO": (GREY, "GRPO"), "Guide": (RED, "Guide-GRPO"),
              "Guide, naive ratio": (BLUE, "Guide-GRPO with the naive ratio")}
GUIDE_CURVES = GUIDE_ARMS | {"Guide, naive start": (ORANGE, "naive ratio on 8 tokens only")}
GAINS = {"self_distillation": (ORANGE, "gain, in reach before\n(self-distillation)"),
         "capability_gain": (BLUE, "gain, out of reach before\n(capability gain)"),
         "regression": (GREY, "loss (regression)")}


def guide():
    """Guide-GRPO against GRPO: usable groups, predicted and counted; training curves; which questions were gained."""
    figure, panels = plt.subplot_mosaic("gcs;gCS", figsize=(10, 5), width_ratios=(1, 1.1, 1.1))
    draw_usable_groups(panels["g"])
    for share, curves, gains in ((0.005, panels["c"], panels["s"]), (0.0, panels["C"], panels["S"])):
        for arm, (colour, label) in GUIDE_CURVES.items():
            for i, row in enumerate(rows_of(arm, f"base {share}")):
                solved = smooth([100 * entry["solved"] for entry in row["curve"]])
                curves.plot(steps(row["curve"]), solved, color=colour, lw=0.9, label=None if i else label)
        curves.set_title(describe_base(share))
        curves.set_xlabel("step")
        curves.set_ylabel("samples without a hint\nthat solve the question, %")
        draw_gains(gains, [row["compare"] for row in rows_of("what Guide did", f"base {share}")])
        gains.set_title(describe_base(share))
        for axes in (curves, gains):
            axes.set_ylim(0, 103)
    panels["c"].legend(*panels["C"].get_legend_handles_labels(), title="one line for each seed", loc="lower right")
    panels["S"].legend(loc="upper center")
    save(figure, "toy_guide")


def draw_usable_groups(axes):
    groups = usable_groups([row for share in BASES for row in rows_of("signal", f"base {share}")])
    correct = list(groups)
    questions, plain, plain_predicted, guided, guided_predicted = zip(*groups.values(), strict=True)
    areas = [5 + 60 * n / sum(questions) for n in questions]
    for measured, predicted, colour, label in ((plain, plain_predicted, GREY, "plain groups"),
                                               (guided, guided_predicted, RED, "hints where all 16 fail")):
        axes.scatter(correct, [100 * share for share in measured], areas, color=colour, label=label)
        axes.plot(correct, [100 * share for share in predicted], color=colour, lw=0.9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("correct answers in 32 samples of the base model")
    axes.set_ylabel("groups of 16 with a non-zero advantage, %")
    axes.set_title("dots: counted (area: questions); lines: predicted")
    axes.legend()


def draw_gains(axes, comparisons):
    """comparisons: {arm: comparison with the base model}, one for each seed."""
    for x, arm in enumerate(GUIDE_ARMS):
        for offset, (kind, (colour, label)) in zip((-0.25, 0.0, 0.25), GAINS.items(), strict=True):
            shares = [100 * comparison[arm]["split"]["after"][kind]["mean"] for comparison in comparisons]
            mean, error = whisker(shares, 100)
            axes.bar(x + offset, mean, 0.25, yerr=error, color=colour, error_kw={"lw": 0.8, "capsize": 2},
                     label=label if x == 0 else None)
            axes.plot([x + offset] * len(shares), shares, "k.", ms=3)
    axes.set_xticks(range(len(GUIDE_ARMS)), ["GRPO", "Guide-GRPO", "naive ratio"])
    axes.set_ylabel("share of test questions, %")


PANELS = {  # of the map: arm, title
    "direct RL": "direct RL", "best of 10, {}": "best of 10", "RLT, {}": "RLT",
    "RL after best of 10, {}": "best of 10, then RL", "RL after RLT, {}": "RLT, then RL", "Guide": "Guide-GRPO",
    "best of 10, warmed-up student, {}": "best of 10, reward by a\nwarmed-up student",
    "RLT, warmed-up student, {}": "RLT, reward by a\nwarmed-up student",
    "RLT, student of best of 10, {}": "RLT, reward by a\nstudent of best of 10",
}


def map_of_arms():
    """When RLT wins: what the base solves by itself, against how many good explanations the warm-up teacher writes."""
    figure, panels = plt.subplots(2, 5, figsize=(9.5, 4.6), sharex=True, sharey=True)
    for axes, (arm, title) in zip(panels.flat, PANELS.items(), strict=False):
        cells = [[map_row(arm.format(f"rows {careful}"), share) for careful in ROWS] for share in BASES]
        axes.imshow([[greedy(cell) if cell else math.nan for cell in line] for line in cells],
                    vmin=0, vmax=160, cmap="Blues")
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                axes.text(x, y, f"{greedy(cell):.0f}" if cell else "–", ha="center", va="center", fontsize=9)
                axes.text(x, y + 0.33, f"{sampled(cell):.0f}" if cell else "", ha="center", va="center", fontsize=6.5)
        axes.set_xticks(range(3), [percent(chains_in_warm_up(careful)) for careful in ROWS])
        axes.set_yticks(range(3), [percent(groups_without_success(share)) for share in BASES])
        axes.set_title(title)
        axes.grid(visible=False)
    panels[1, 4].set_axis_off()
    panels[0, 4].tick_params(labelbottom=True)  # the panel below it is empty
    panels[1, 4].text(-0.05, 0.35, "exact match, %\nlarge: greedy\nsmall: sampled at T = 1\none seed\n–: not measured",
                      fontsize=8, transform=panels[1, 4].transAxes)
    figure.supylabel("questions on which 16 samples of the base all fail", fontsize=8)
    figure.supxlabel("full chains among the explanations of the warm-up teacher (mean over bases)", fontsize=8)
    save(figure, "toy_map")


WITH_RLT = {"RLT, {}": "RLT", "RLT, warmed-up student, {}": "RLT, warmed-up", "RL after RLT, {}": "RLT, then RL",
            "RLT, student of best of 10, {}": "RLT, student of best of 10",
            "RLT, refreshed every 20 steps, {}": "RLT, refreshed"}
WITHOUT_RLT = {"best of 10, {}": "best of 10", "best of 10, warmed-up student, {}": "best of 10, warmed-up",
               "RL after best of 10, {}": "best of 10, then RL", "direct RL": "direct RL"}


def cells_table():
    """Every cell of the map: the best arm that uses RLT beside the best that does not, on one seed."""
    lines = ["| groups of the base that fail | full chains of the warm-up teacher | best with RLT | best without RLT | "
             "greedy | T = 1 |", "| --- | --- | --- | --- | --- | --- |"]
    wins = 0
    for share in BASES:
        for careful in ROWS:
            ours, theirs = (cell_results(arms, share, careful) for arms in (WITH_RLT, WITHOUT_RLT))
            best, other = max(ours), max(theirs)
            gains = best[0] - other[0], best[1] - max(result[1] for result in theirs)
            wins += min(gains) > 0
            lines.append(" | ".join([
                f"| {percent(groups_without_success(share))}", percent(chains_in_warm_up(careful)),
                *("{2}: {0:.0f}, {1:.0f}".format(*result) for result in (best, other)),
                "{:+.1f} | {:+.1f} |".format(*gains)]))
    lines += ["", f"Exact match, %, greedy and sampled at T = 1, on seed {MAP_SEED}. Last two columns: the arm with "
              "RLT minus the highest number of any arm without. RLT is ahead in both in "
              f"{wins} of {len(BASES) * len(ROWS)} cells, although the best of its arms was chosen by these numbers."]
    return "\n".join(lines) + "\n"


def cell_results(arms, share, careful):
    """[(greedy, sampled, name)] of the arms that were run in this cell."""
    rows = [(map_row(arm.format(f"rows {careful}"), share), name) for arm, name in arms.items()]
    return [(greedy(row), sampled(row), name) for row, name in rows if row]


def percent(share):
    return f"{100 * share:.0f} %"


def map_row(arm, share):
    """The row of an arm on the base with this share; None if the log does not have it."""
    return next((row for row in rows_of(arm, f"base {share}") if row["seed"] == MAP_SEED), None)


def chains_in_warm_up(careful):
    """Share of full chains among the explanations of the warm-up teacher, mean over the map's bases."""
    return statistics.fmean(map_row(f"warm-up teacher, rows {careful}", share)["explanations"]["full_chain"]
                            for share in BASES)


def groups_without_success(share):
    """Share of validation questions of which the base gets none of 16 samples right."""
    return statistics.fmean(correct == 0 for correct, _ in map_row("signal", share)["signal"]["plain"])


def arms_of_hardest_base(careful):
    """{arm: what its student was trained on}, on-policy students among them. careful: of the warm-up rows."""
    rows = f"rows {careful}"
    teachers = {"warm-up teacher": "warm-up teacher", "best of 10": "best of 10",
                "RLT, refreshed every 20 steps": "RLT"}
    return {
        "direct RL": "direct RL",
        f"best of 10, warmed-up student, {rows}": "SFT on best of 10",
        f"best of 25, warmed-up student, {rows}": "SFT on best of 25",
        f"RLT, refreshed every 20 steps, {rows}": "SFT on RLT",
        **{f"on-policy, {teacher}, {rows}{kls}": f"on-policy student of {name}{' (both KLs)' * bool(kls)}"
           for teacher, name in teachers.items() for kls in ("", ", both KLs")},
    }


def hardest_base():
    """Students on the base where all plain groups fail: SFT, on-policy, direct RL; rare and rarer chains."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axes, careful in zip(panels, (0.1, 0.02), strict=True):
        labels = arms_of_hardest_base(careful)
        colours = {arm: GREY if arm == "direct RL" else ORANGE if arm.startswith("on-policy") else BLUE
                   for arm in labels}
        bars(axes, {arm: rows_of(arm, "base 0.0") for arm in labels}, labels=labels, colours=colours)
        axes.set_xlabel("exact match, %")
        axes.set_title(f"{100 * careful:.0f} % full chains in the warm-up rows")
    panels[0].set_ylabel("student trained by")
    accuracy_legend(figure)
    save(figure, "toy_hardest_base")


FIGURES = (guide, map_of_arms, hardest_base)
