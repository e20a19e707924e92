# SPDX-License-Identifier: MIT
"""The look that all figures share, and the bar chart that most of them use."""

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from study_log import greedy, interval, sampled

FIGURES = Path(__file__).resolve().parent
RED, GREY, BLUE, ORANGE, PURPLE, LILAC = "#c8102e", "#8c8c8c", "#2a6f97", "#e09f3e", "#5e3c99", "#b2abd2"
OPACITY = (1.0, 0.45)  # of an arm's first bar and its second
plt.rcParams.update({"font.size": 9, "axes.titlesize": 8, "axes.labelsize": 8, "axes.spines.top": False,
                     "axes.spines.right": False, "figure.dpi": 150, "axes.grid": True, "grid.alpha": 0.25,
                     "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 7,
                     "legend.title_fontsize": 7})

LABELS = {  # of arms, where their name in the log does not say enough
    "base": "base model",
    "base, larger": "larger base model",
    "base, weaker": "weaker base model (fewer steps)",
    "solutions only": "solutions without explanations",
    "score only": "RLT without KL (λ = 0)",
    "best of 10": "best of 10, no RL",
    "RL traces, raw": "traces of the RL student, all",
    "RL traces, filtered": "traces of the RL student, correct ones",
    "RLT": "RLT (λ = 3)",
    "direct RL": "direct RL on correctness",
    "ground truth": "ground-truth chains",
}
COLOURS = {"RLT": RED, "direct RL": BLUE, "best of 10": ORANGE, "RL traces, raw": LILAC, "RL traces, filtered": PURPLE}


def whisker(values, highest):
    """(mean, [[below], [above]]) for error bars: the 95 % interval, cut at 0 and `highest`; None for one value."""
    mean, half = interval(values)
    if math.isnan(half):
        return mean, None
    return mean, [[mean - max(0, mean - half)], [min(highest, mean + half) - mean]]


def bars(axes, rows, measures=(greedy, sampled), *, labels=None, colours=None, highest=100):
    """Horizontal bars, one for each arm and measure: mean over seeds, 95 % interval, and a dot for each seed.

    rows: {arm: rows of the log}; an arm without rows is left out. measures: one or two functions of a row.
    labels, colours: by arm, before those of all figures. highest: the largest value that a measure can have, math.inf
    if there is none.
    """
    labels, colours = LABELS | (labels or {}), COLOURS | (colours or {})
    arms = [arm for arm in rows if rows[arm]]
    height = 0.8 / len(measures)
    for place, arm in enumerate(reversed(arms)):
        for i, measure in enumerate(measures):
            y = place + 0.4 - height * (i + 0.5)
            values = [measure(row) for row in rows[arm]]
            mean, error = whisker(values, highest)
            axes.barh(y, mean, height, color=colours.get(arm, GREY), alpha=OPACITY[i])
            if error:
                axes.errorbar(mean, y, xerr=error, fmt="none", ecolor="black", elinewidth=0.8, capsize=2)
            axes.plot(values, [y] * len(values), "k.", ms=3)
    axes.set_yticks(range(len(arms)), [labels.get(arm, arm) for arm in reversed(arms)])
    axes.grid(axis="y", visible=False)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    if highest < math.inf:
        axes.set_xlim(0, 1.03 * highest)
    else:
        axes.set_xlim(left=0)


def accuracy_legend(figure, **place):
    """Explains what bars() draws with its default measures."""
    handles = [Patch(color=GREY, label="greedy"), Patch(color=GREY, alpha=OPACITY[1], label="sampled at T = 1"),
               Line2D([], [], color="black", marker="|", lw=0.8, label="95 % interval of the mean, cut at 0 and 100"),
               Line2D([], [], color="black", marker=".", ms=4, ls="", label="one seed")]
    figure.legend(handles=handles, ncols=4, **({"loc": "upper center", "bbox_to_anchor": (0.5, 0.03)} | place))


def smooth(values, window=5):
    """Running mean over so many values, fewer at the ends."""
    return [statistics.fmean(values[max(0, i - window // 2) : i + window // 2 + 1]) for i in range(len(values))]


def steps(curve):
    """The x axis of a training curve: steps done."""
    return [entry["step"] + 1 for entry in curve]


def save(figure, name):
    """Write figures/<name>.png and close the figure."""
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(f"figures/{name}.png")
