# SPDX-License-Identifier: MIT
"""
Draw every figure and write every table of the READMEs from the committed logs.

    python figures/make_figures.py

One function a figure. A log that is missing raises, with the command that makes it.
"""

import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150,
                     "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})
RED, GREY, BLUE = "#c8102e", "#8c8c8c", "#2a6f97"


def read(name, command):
    path = HERE / "logs" / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing. Make it with: {command}")
    return [json.loads(line) for line in path.read_text().splitlines()]


@functools.cache
def toy_rows():
    return read("toy_study.jsonl", "python figures/toy_study.py")


def replace(page, what, text):
    """Put the text between the page's marks."""
    pattern = rf"(<!-- {what}: written by figures/make_figures.py -->\n).*?(<!-- end of {what} -->)"
    after, count = re.subn(pattern, lambda m: m[1] + text + m[2], page.read_text(), flags=re.S)
    assert count == 1, f"{page.name} has no place for {what}"
    page.write_text(after)


# What the papers report, for bars drawn in outline beside ours. Other models, other questions: only shapes compare.
PAPER = {  # arXiv 2506.08388: overall score of 7B students (mean of AIME 2024, MATH-500, GPQA diamond), %
    "Table 1, 17K rows": {"base": 39.17, "RL traces, filtered": 46.60, "RLT": 49.50},  # the middle one: R1's traces
    "Table 1, 1K rows": {"RL traces, filtered": 42.37, "RLT": 47.43},
    "Table 2": {"direct RL": 40.77, "RL after RL traces, raw": 38.60, "RL after RL traces, filtered": 43.93,
                "RL after RLT": 50.53},
    "countdown": {"direct RL": 50.8},  # secondary sources agree on this one alone; for RLT they say 52.3 to 56.6
}
THEIRS = {"fill": False, "edgecolor": "black", "linestyle": ":", "lw": 0.9}
COLOURS = {"RLT": RED, "direct RL": BLUE, "best of 10": "#e09f3e"}


def of(arm, setting="toy"):
    """The log's rows of an arm, by seed."""
    rows = [row for row in toy_rows() if (row.get("setting", "toy"), row["arm"]) == (setting, arm)]
    return sorted(rows, key=lambda row: row["seed"])


def together(arms):
    """of() for the toy's arms, on the seeds that all of them have: bars that stand side by side are paired."""
    seeds = set(range(5)).intersection(*([row["seed"] for row in rows] for arm in arms if (rows := of(arm))))
    return lambda arm, setting="toy": [row for row in of(arm, setting) if row["seed"] in seeds]


def greedy(row):
    return 100 * row["accuracy"]["test greedy"]["mean"]


def sampled(row):
    return 100 * row["accuracy"]["test sampled"]["mean"]


T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values):
    """(mean, half of its 95 % interval by Student's t); nan for the half where there is one value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def bars(axes, arms, setting="toy", theirs=(), values=((greedy, 1.0), (sampled, 0.45)), rows_of=of):
    """A bar for each arm and measure: mean over seeds, whisker: 95 % interval, dots: seeds; the paper's is outlined."""
    arms = [arm for arm in arms if rows_of(arm, setting)]
    few = ", 176 rows"  # an arm with fewer rows looks like the arm
    for y, arm in enumerate(reversed(arms)):
        rows = rows_of(arm, setting)
        for i, (value, shade) in enumerate(values):
            at = y + 0.4 * (0.5 - (i + 0.5) / len(values)) * len(values) / 2
            each = [value(row) for row in rows]
            mean, half = interval(each)
            axes.barh(at, mean, 0.8 / len(values), color=COLOURS.get(arm.removesuffix(few), GREY), alpha=shade,
                      xerr=half, error_kw={"lw": 0.8, "capsize": 2})
            axes.plot(each, [at] * len(each), "k.", ms=2.5)
        if arm in theirs:
            axes.barh(y, theirs[arm], 0.8, **THEIRS)
    names = [arm.removesuffix(few) for arm in reversed(arms)]
    axes.set_yticks(range(len(arms)), [LABELS.get(name, name) for name in names])
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 103)
    axes.set_ylim(-0.6, len(arms) - 0.4)


LABELS = {
    "base": "base student", "score only": "teacher without KL (lambda 0)", "RLT": "RLT (lambda 3)",
    "ground truth": "ground-truth chains", "best of 10": "best of 10 of the warm-up teacher, no RL",
    "direct RL": "direct RL on correctness", "RL traces, raw": "RL student's traces, raw",
    "RL traces, filtered": "RL student's traces, filtered",
}
HEADLINE = ["base", "solutions only", "warm-up teacher", "score only", "best of 10", "RL traces, raw",
            "RL traces, filtered", "RLT", "direct RL", "ground truth"]


def toy_accuracy():
    """Figure 1 and Table 1: held-out exact match of the students of each kind of explanation."""
    figure, axes = plt.subplots(figsize=(6.6, 3.9))
    bars(axes, HEADLINE, theirs=PAPER["Table 1, 17K rows"])
    axes.set_xlabel("held-out exact match, %   (dark: greedy, light: T = 1; whisker: 95 % interval, dots: seeds)\n"
                    "dotted: the paper's 7B students, overall score (base; R1's traces; RLT)", fontsize=7.5)
    save(figure, "toy_accuracy")


def toy_reward():
    """Training curves: reward, score, kl, leaks and length during RL, with the KL and without."""
    figure, panels = plt.subplots(1, 5, figsize=(11, 2.3))
    for arm, colour in (("RLT", RED), ("score only", GREY)):
        for i, row in enumerate(of(arm)):
            for axes, key in zip(panels, ("reward", "score", "kl", "leak", "length"), strict=True):
                axes.plot([e["step"] + 1 for e in row["curve"]], [e[key] for e in row["curve"]], color=colour, lw=0.8,
                          alpha=0.7, label=LABELS[arm] if i == 0 else None)
                axes.set_title({"leak": "share that leaks", "reward": "reward, by the arm's own lambda"}.get(key, key),
                               fontsize=8)
                axes.set_xlabel("step")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.08))
    save(figure, "toy_reward")


def toy_few_and_long():
    """Table 1's 1K of 17K rows, and questions longer than any that was trained on."""
    figure, (few, long) = plt.subplots(1, 2, figsize=(10.5, 2.8))
    theirs = {f"{arm}, 176 rows": score for arm, score in PAPER["Table 1, 1K rows"].items()}
    bars(few, [f"{arm}, 176 rows" for arm in ("warm-up teacher", "RL traces, filtered", "RLT", "ground truth")],
         theirs=theirs)
    few.set_xlabel("exact match after 176 of 3,000 rows, %\ndotted: the paper's, 1K of 17K rows", fontsize=7.5)
    bars(long, HEADLINE, values=((lambda exact: 100 * exact["mean"], 1.0),),
         rows_of=lambda arm, _: [row["long"][arm] for row in of("long problems") if arm in row["long"]])
    long.set_xlabel("exact match on 6 steps, trained on 4 and 5, %, greedy", fontsize=7.5)
    save(figure, "toy_few_and_long")


STARTS = {"direct RL": ("nothing", BLUE)} | {f"RL after {start}": (start, colour) for start, colour in (
    ("warm-up teacher", GREY), ("RL traces, raw", "#a3c585"), ("RL traces, filtered", "#386641"),
    ("best of 10", COLOURS["best of 10"]), ("RLT", RED))}


def smooth(values, window=5):
    return [statistics.fmean(values[max(0, i - window // 2) : i + window // 2 + 1]) for i in range(len(values))]


def toy_cold_start():
    """Table 2: RL on correctness after a cold start."""
    figure, (curves, final) = plt.subplots(1, 2, figsize=(9.6, 2.8))
    rows_of = together(STARTS)
    for arm, (start, colour) in STARTS.items():
        rows = rows_of(arm)
        if not rows:
            continue
        steps = [e["step"] + 1 for e in rows[0]["curve"]]
        mean = [100 * statistics.fmean(row["curve"][i]["solved"] for row in rows) for i in range(len(steps))]
        curves.plot(steps, smooth(mean), color=colour, lw=1.2, label=start)
    curves.set_xlabel("step of RL")
    curves.set_ylabel("solved in training, %")
    curves.legend(fontsize=7, title="cold start from", title_fontsize=7)
    bars(final, STARTS, theirs=PAPER["Table 2"], rows_of=rows_of)
    final.set_xlabel("exact match after RL, %; dotted: the paper's Table 2", fontsize=7.5)
    save(figure, "toy_cold_start")


def toy_transfer():
    """The countdown figure, with rooms: a teacher that never saw them in RL explains them; and RL on them."""
    figure, axes = plt.subplots(figsize=(6.4, 2.6))
    bars(axes, ["base", "solutions only", "warm-up teacher", "best of 10", "RLT", "direct RL", "ground truth"],
         setting="rooms", theirs=PAPER["countdown"])
    axes.set_xlabel("rooms: exact match, %; the teacher's RL saw the clocks alone, direct RL the rooms\n"
                    "dotted: the paper's direct RL on countdown", fontsize=7.5)
    save(figure, "toy_transfer")


def correlations(xs, ys):
    """(Pearson, Spearman)."""
    ranks = lambda values: [sorted(values).index(v) for v in values]  # noqa: E731
    return statistics.correlation(xs, ys), statistics.correlation(ranks(xs), ranks(ys))


def toy_ranks():
    """Section 4.5: students of five parts of the warm-up teacher's explanations, by reward within the question."""
    figure, panels = plt.subplots(1, 2, figsize=(6.4, 2.4))
    for axes, value, name in ((panels[0], greedy, "greedy"), (panels[1], sampled, "T = 1")):
        for seed in range(5):
            if parts := ranks(seed):
                ys = [value(part) for part in parts]
                pearson, spearman = correlations(range(5), ys)
                axes.plot(range(1, 6), ys, "o-", ms=3, lw=0.9, label=f"seed {seed}: {pearson:.2f}, {spearman:.2f}")
        axes.set_xticks(range(1, 6))
        axes.set_xlabel("part, worst to best reward")
        axes.set_title(f"exact match, %, {name}", fontsize=8)
        axes.legend(fontsize=6, title="Pearson, Spearman (the paper: 0.89)", title_fontsize=6)
    save(figure, "toy_ranks")


ABLATIONS = ["score only", "RLT, lambda 1", "RLT", "RLT, lambda 10", "RLT, alpha 0", "RLT, alpha 0.1", "RLT, lr 5e-3",
             "RLT, exact KL", "RLT, exact KL, lr 5e-3", "RLT, exact KL and gradient"]


def toy_ablations():
    """Appendix D: lambda, alpha and the KL; accuracy, length and leaks."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, width_ratios=(2, 1, 1))
    rows_of = together(ABLATIONS)
    bars(panels[0], ABLATIONS, rows_of=rows_of)
    panels[0].set_xlabel("exact match, %", fontsize=8)
    for axes, key, scale, label in ((panels[1], "length", 1, "tokens of an explanation"),
                                    (panels[2], "leak", 100, "give the solution away, %")):
        bars(axes, ABLATIONS, values=((lambda row: scale * row["explanations"][key], 0.8),), rows_of=rows_of)  # noqa: B023
        axes.set_xlim(0, 100 if key == "leak" else 25)
        axes.set_xlabel(label, fontsize=8)
    save(figure, "toy_ablations")


def toy_students():
    """Appendix C.4: a larger student of the same explanations, and reward students of other strength."""
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    arms = ["base, weaker", "base", "base, larger", "warm-up teacher", "warm-up teacher, larger student", "RLT",
            "RLT, larger student", "RLT, weaker reward student", "RLT, stronger reward student"]
    bars(axes, arms, rows_of=together(arms))
    axes.set_xlabel("exact match, %", fontsize=8)
    save(figure, "toy_students")


def all_of(some, draws, group=16):
    """Chance that a group out of these draws holds nothing but `some` of them."""
    return math.comb(some, group) / math.comb(draws, group)


def usable(right, draws, group=16):
    """Chance that a group out of these draws holds right and wrong ones: s(p) = 1 - (1-p)^G - p^G, but without putting
    back. With s of an estimated p, questions that were lucky in the estimate would seem to miss the prediction."""
    return 1 - all_of(draws - right, draws, group) - all_of(right, draws, group)


GUIDE_ARMS = {"GRPO": GREY, "Guide": RED, "Guide, naive ratio": BLUE}


def toy_guide():
    """Guide against GRPO: groups with a signal, predicted and drawn; success; what was gained."""
    figure, panels = plt.subplot_mosaic("gcs;gCS", figsize=(9, 4.6))
    groups = panels["g"]
    rates, plain, guided, expected = [], [], [], []
    for row in [row for share in MAP_BASES for row in of("signal", f"base {share}")]:
        for (drawn, other), (hinted, other_hinted) in zip(row["signal"]["plain"], row["signal"]["hinted"], strict=True):
            right, right_hinted = drawn + other, hinted + other_hinted
            rates.append(right)
            plain.append(0 < drawn < 16)
            guided.append(0 < (hinted if drawn == 0 else drawn) < 16)
            expected.append(usable(right, 32) + all_of(32 - right, 32) * usable(right_hinted, 32))
    at = sorted(set(rates))
    share = lambda values, p: statistics.fmean(v for v, rate in zip(values, rates, strict=True) if rate == p)  # noqa: E731
    weights = [5 + 60 * rates.count(p) / len(rates) for p in at]
    for drawn, predicted, colour, label in ((plain, [usable(k, 32) for k in at], GREY, "plain groups"),
                                            (guided, [share(expected, k) for k in at], RED, "hints where all fail")):
        groups.scatter(at, [100 * share(drawn, k) for k in at], weights, color=colour, label=label)
        groups.plot(at, [100 * value for value in predicted], color=colour, lw=0.9)
    groups.xaxis.get_major_locator().set_params(integer=True)
    groups.set_xlabel("right answers in 32 draws")
    groups.set_title("usable groups of 16, %; lines: predicted", fontsize=8)
    groups.legend(fontsize=7)
    for setting, curves, split in (("base 0.005", panels["c"], panels["s"]), ("base 0.0", panels["C"], panels["S"])):
        for x, (arm, colour) in enumerate(GUIDE_ARMS.items()):
            for i, row in enumerate(of(arm, setting)):
                curves.plot([e["step"] + 1 for e in row["curve"]], smooth([100 * e["solved"] for e in row["curve"]]),
                            color=colour, lw=0.9, label=arm if i == 0 else None)
            splits = [row["compare"][arm]["split"]["after"] for row in of("what Guide did", setting)]
            if not splits:
                continue
            for offset, key, shade in ((-0.2, "self_distillation", GREY), (0.0, "capability_gain", RED),
                                       (0.2, "regression", BLUE)):
                mean, half = interval([100 * row[key]["mean"] for row in splits])
                split.bar(x + offset, mean, 0.2, yerr=half, color=shade, error_kw={"lw": 0.8},
                          label=key.replace("_", " ") if x == 0 else None)
        curves.set_title(f"{setting}: solved without a hint, %", fontsize=8)
        curves.set_xlabel("step")
        split.set_xticks(range(3), ("GRPO", "Guide", "naive ratio"), fontsize=7)
        split.set_title(f"{setting}: share of questions, %", fontsize=8)
        curves.set_ylim(0, 103)
        split.set_ylim(0, 103)
    panels["c"].legend(fontsize=6)
    panels["S"].legend(fontsize=6, loc="upper center")
    save(figure, "toy_guide")


MAP_BASES, MAP_ROWS, MAP_SEED = (0.08, 0.005, 0.0), (0.1, 0.02, 0.0), 0
MAP_ARMS = {"direct RL": "direct RL", "best of 10, {}": "best of 10", "RLT, {}": "RLT",
            "RL after best of 10, {}": "best of 10, then RL", "RL after RLT, {}": "RLT, then RL", "Guide": "Guide",
            "best of 10, warmed-up student, {}": "best of 10,\nwarmed-up student",
            "RLT, warmed-up student, {}": "RLT,\nwarmed-up student",
            "RLT, refreshed student, {}": "RLT,\nrefreshed student"}


def toy_map():
    """When RLT wins: what the base solves by itself, against how many good explanations the warm-up teacher writes."""
    figure, panels = plt.subplots(2, 5, figsize=(8.5, 4.2), sharex=True, sharey=True)
    for axes, (arm, title) in zip(panels.flat, MAP_ARMS.items(), strict=False):
        cells = [[on_map(arm.format(f"rows {careful}"), share) for careful in MAP_ROWS] for share in MAP_BASES]
        values = [[greedy(cell) if cell else math.nan for cell in line] for line in cells]
        axes.imshow(values, vmin=0, vmax=100, cmap="RdYlGn", alpha=0.6)
        for y, line in enumerate(cells):
            for x, cell in enumerate(line):
                axes.text(x, y, f"{greedy(cell):.0f}" if cell else "–", ha="center", va="center", fontsize=8)
                axes.text(x, y + 0.33, f"{sampled(cell):.0f}" if cell else "", ha="center", va="center", fontsize=6)
        axes.set_xticks(range(3), [percent(told(f"warm-up teacher, rows {r}")) for r in MAP_ROWS], fontsize=7)
        axes.set_title(title, fontsize=8)
        axes.grid(visible=False)
    panels[1, 4].set_axis_off()
    panels[0, 4].tick_params(labelbottom=True)  # nothing is below it
    for axes in panels[:, 0]:
        axes.set_yticks(range(3), [percent(zero_groups(share)) for share in MAP_BASES], fontsize=7)
        axes.set_ylabel("groups all zero at the start", fontsize=7)
    figure.supxlabel("full right chains among the warm-up teacher's explanations (mean over bases)", fontsize=8)
    panels[1, 4].text(0.1, 0.4, "exact match, %: greedy,\nand below it at T = 1;\none seed; –: not measured",
                      fontsize=7, transform=panels[1, 4].transAxes)
    save(figure, "toy_map")


def percent(share):
    return "" if math.isnan(share) else f"{100 * share:.0f} %"


def on_map(arm, share):
    """The row of an arm on the base with this share of careful authors; None while it is missing."""
    return next((row for row in of(arm, f"base {share}") if row["seed"] == MAP_SEED), None)


def told(arm):
    """Share of full right chains, mean over the map's bases."""
    rows = [row for share in MAP_BASES if (row := on_map(arm, share))]
    return statistics.fmean(row["explanations"]["full_chain"] for row in rows) if rows else math.nan


def zero_groups(share):
    """Share of validation questions of which the base gets none of 16 draws right."""
    row = on_map("signal", share)
    return statistics.fmean(drawn == 0 for drawn, _ in row["signal"]["plain"]) if row else math.nan


def toy_table():
    """The README's table."""
    seeds = sorted({row["seed"] for row in of("RLT")})
    count = of("base")[0]["accuracy"]["test greedy"]["questions"]
    lines = [f"Exact match in %, mean over seeds {', '.join(map(str, seeds))} with its 95 % interval, {count} held-out "
             "questions; explanations: what the teacher wrote for the training questions, rewarded at lambda 3 with "
             "the exact KL.",
             "",
             "| student of | greedy | T = 1 | tokens | gives away | full right chains | raw reward |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for arm in HEADLINE:
        own = of(arm)
        if not own:
            continue
        cells = [LABELS.get(arm, arm)]
        for value in (greedy, sampled):
            mean, half = interval([value(row) for row in own])
            cells.append(f"**{mean:.1f}** ± {half:.1f}")
        mean = lambda key: statistics.fmean(row["explanations"][key] for row in own)  # noqa: B023, E731
        cells += [f"{mean('length'):.1f}", f"{100 * mean('leak'):.0f} %", f"{100 * mean('full_chain'):.0f} %",
                  f"{mean('reward'):.2f}"] if "explanations" in own[0] else [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    rows = toy_rows()
    versions = sorted({(row["machine"], row["torch"], row["date"]) for row in rows})
    lines += ["", "Measured: " + "; ".join(f"{machine}, torch {torch}, {date}" for machine, torch, date in versions)
              + ". The commands of every arm and the commit they ran at are in `figures/logs/toy_study.jsonl`.", ""]
    replace(README, "toy table", "\n".join(lines))


def difference(better, worse, value=greedy, setting="toy"):
    """Differences between two arms on the seeds that both have."""
    others = {row["seed"]: row for row in of(worse, setting)}
    return [value(row) - value(others[row["seed"]]) for row in of(better, setting) if row["seed"] in others]


def ranks(seed):
    """The rows of the five parts by reward, worst first; None while one is missing."""
    parts = [row for i in range(1, 6) for row in of(f"rank {i} of 5") if row["seed"] == seed]
    return parts if len(parts) == 5 else None


def claims():
    """[(claim, the papers' number, measure, values by seed)]: it holds where the values are above zero."""
    points = "exact match, points, greedy"
    yield "RLT above the warm-up teacher", "", points, difference("RLT", "warm-up teacher")
    yield "RLT above score only", "", points, difference("RLT", "score only")
    yield "RLT above solutions only", "", points, difference("RLT", "solutions only")
    table = PAPER["Table 1, 17K rows"]
    above = f"{table['RLT'] - table['RL traces, filtered']:+.1f} (R1's traces)"
    for kind, theirs in (("raw", ""), ("filtered", above)):
        yield (f"RLT above the correctness-trained model's traces, {kind}", theirs, points,
               difference("RLT", f"RL traces, {kind}"))
    table = PAPER["Table 1, 1K rows"]
    above = f"{table['RLT'] - table['RL traces, filtered']:+.1f} (R1's traces)"
    yield ("the same, filtered, with few rows (176)", above, points,
           difference("RLT, 176 rows", "RL traces, filtered, 176 rows"))
    long = lambda arm: lambda row: 100 * row["long"][arm]["mean"]  # noqa: E731
    for other in ("warm-up teacher", "direct RL"):
        yield (f"on longer problems than any learned from: RLT above {other}", "", points,
               [long("RLT")(row) - long(other)(row) for row in of("long problems")])
    yield "RLT above best of 10 without RL (not in the paper)", "", points, difference("RLT", "best of 10")
    yield ("the same at T = 1", "", "exact match, points, T = 1", difference("RLT", "best of 10", sampled))
    yield ("score-only explanations leak the answer", "", "share that leaks minus the warm-up teacher's, points",
           difference("score only", "warm-up teacher", lambda row: 100 * row["explanations"]["leak"]))
    yield ("reward rank correlates with student accuracy", "Pearson 0.89", "Pearson over 5 parts, greedy",
           [correlations(range(5), [greedy(row) for row in parts])[0] for seed in range(5) if (parts := ranks(seed))])
    for other in ("direct RL", "RL after warm-up teacher", "RL after RL traces, raw", "RL after RL traces, filtered",
                  "RL after best of 10"):
        theirs = PAPER["Table 2"]
        told = f"{theirs['RL after RLT'] - theirs[other]:+.1f}" if other in theirs else ""
        yield f"RL after RLT above {other}", told, points, difference("RL after RLT", other)
    along = lambda row: 100 * statistics.fmean(e["solved"] for e in row["curve"])  # noqa: E731
    yield ("the same against direct RL, over the whole run", "", "solved in training, points, mean of 60 steps",
           difference("RL after RLT", "direct RL", along))
    yield ("zero-shot transfer: RLT above the warm-up teacher on the unseen task", "", points,
           difference("RLT", "warm-up teacher", setting="rooms"))
    yield ("zero-shot transfer: RLT above direct RL on that task", "+1.5 to +5.8", points,
           difference("RLT", "direct RL", setting="rooms"))
    yield ("the same above best of 10 without RL (not in the paper)", "", points,
           difference("RLT", "best of 10", setting="rooms"))
    yield ("a stronger reward student makes a stronger teacher", "", points + ", against a weaker one",
           difference("RLT, stronger reward student", "RLT, weaker reward student"))
    yield ("a larger student learns more from the same explanations", "", points,
           difference("RLT, larger student", "RLT"))
    yield ("without min and max (alpha 0) explanations are longer", "", "tokens, alpha 0 minus alpha 0.01",
           difference("RLT, alpha 0", "RLT", lambda row: row["explanations"]["length"]))
    yield ("the exact KL's whole gradient above its score function alone (not in the paper)", "", points,
           difference("RLT, exact KL and gradient", "RLT, exact KL"))
    yield ("the same above the sampled KL, at T = 1 (not in the paper)", "", "exact match, points, T = 1",
           difference("RLT, exact KL and gradient", "RLT", sampled))
    for careful in MAP_ROWS:
        yield (f"RLT above direct RL where groups start all zero (base 0.0, rows {careful})", "", points,
               difference(f"RLT, rows {careful}", "direct RL", setting="base 0.0"))
    warmed = "RLT, warmed-up student, rows 0.1"
    for better, worse, where in (
            (warmed, "direct RL", "base 0.0"), (warmed, "RLT, rows 0.1", "base 0.0; not in the paper"),
            (warmed, "best of 10, warmed-up student, rows 0.1", "base 0.0; not in the paper"),
            ("best of 10, rows 0.1", "direct RL", "base 0.0; not in the paper")):
        yield f"{better} above {worse} ({where})", "", points, difference(better, worse, setting="base 0.0")
    yield ("RLT above best of 10 where good explanations are rare, T = 1 (base 0.08, rows 0.02; not in the paper)", "",
           "exact match, points, T = 1", difference("RLT, rows 0.02", "best of 10, rows 0.02", sampled, "base 0.08"))
    groups = lambda row: 100 * statistics.fmean(e["usable_groups"] for e in row["curve"][:10]) / 16  # noqa: E731
    for setting in ("base 0.005", "base 0.0"):
        yield (f"Guide has more usable groups than GRPO where plain groups fail ({setting})", "",
               "points, first 10 steps", difference("Guide", "GRPO", groups, setting=setting))
        yield (f"Guide ends at a higher pass rate ({setting})", "up to +4", points,
               difference("Guide", "GRPO", setting=setting))
        yield (f"the same over the whole run ({setting})", "", "solved without a hint, points, mean of 60 steps",
               difference("Guide", "GRPO", along, setting=setting))
        yield (f"Guide's ratio is better than the naive one ({setting})", "", points,
               difference("Guide", "Guide, naive ratio", setting=setting))
    for setting, analysis, arm in (("toy", "what RL did", "direct RL"),
                                   ("base 0.005", "what Guide did", "Guide")):
        yield (f"RL's gain is mostly self-distillation ({setting}, {arm})", "98.5 % on countdown",
               "self-distillation minus capability gain, points of questions",
               [100 * (split["self_distillation"]["mean"] - split["capability_gain"]["mean"])
                for split in (row["compare"][arm]["split"]["after"] for row in of(analysis, setting))])


def claims_table():
    lines = ["| expected | the papers | ours: measure | mean and 95 % interval | seeds | verdict |",
             "| --- | --- | --- | --- | --- | --- |"]
    for claim, theirs, measure, values in claims():
        if not values:
            lines.append(f"| {claim} | {theirs} | {measure} | | 0 | not measured yet |")
            continue
        mean, half = interval(values)
        verdict = "holds" if mean > half else "does not hold" if mean <= 0 else "mixed"
        shown = f"{mean:+.2f} ± {half:.2f}"
        if len(values) < 2:
            verdict, shown = "one seed", f"{mean:+.2f}"
        lines.append(f"| {claim} | {theirs} | {measure} | {shown} | {len(values)} | {verdict} |")
    hours = sum(row["minutes"] for row in toy_rows()) / 60
    lines += ["", "*Holds*: the interval of the mean over seeds lies above zero. *Does not hold*: the mean is zero "
              "(no seed tells them apart) or below. *Mixed*: the mean is above zero, its interval is not.", "",
              f"All arms together took {hours:.0f} hours of one thread, most of them beside other work.", ""]
    replace(HERE / "README.md", "claims", "\n".join(lines))


def bench_rows():
    """{device: its rows}, of a repeated measurement the last."""
    devices = {}
    for row in read("bench_rewards.jsonl", "python tests/bench_rewards.py"):
        numbers = ("ms", "gb_s", "of_copy", "of_matmul", "peak_mb", "error", "tokens_per_s", "reward", "date",
                   "copy_gb_s", "matmul_tflop_s")
        key = tuple((k, v) for k, v in row.items() if k not in numbers)
        devices.setdefault(row["device"], {})[key] = row
    return {device: list(rows.values()) for device, rows in devices.items()}


def bench_rewards():
    """The reward against its rivals: share of the memory's bandwidth, error, and the whole scoring pass."""
    for device, rows in bench_rows().items():
        stats = [r for r in rows if r["part"] == "reduce" and r["kind"] == "stats" and r["dtype"] == "bfloat16"]
        tokens = max(r["tokens"] for r in stats)
        stats = [r for r in stats if r["tokens"] == tokens]
        scoring = [r for r in rows if r["part"] == "scoring" and r["ms"]]
        figure, panels = plt.subplots(1, 4, figsize=(10, 2.5))
        colour = {"ours": RED, "eager": GREY, "compile": BLUE, "released": GREY}.get
        for axes, key, label in ((panels[0], "of_copy", "share of a copy's bandwidth"), (panels[1], "error", "error")):
            vocabularies = sorted({r["vocab"] for r in stats})
            for impl in dict.fromkeys(r["impl"] for r in stats):
                values = [next((r.get(key) for r in stats if (r["impl"], r["vocab"]) == (impl, v)), None)
                          for v in vocabularies]
                axes.plot([f"{v:,}" for v in vocabularies], [v if v else float("nan") for v in values], "o-", ms=3,
                          color=colour(impl), label=impl)
            axes.set_title(f"{label}, {tokens:,} tokens, bf16", fontsize=8)
            axes.set_xlabel("vocabulary")
        panels[1].set_yscale("log")
        panels[0].legend(fontsize=7)
        for axes, key, label in ((panels[2], "tokens_per_s", "scoring pass, tokens/s"),
                                 (panels[3], "peak_mb", "its peak above the weights, MB")):
            lengths = sorted({r["length"] for r in scoring})
            for shift, impl in ((-0.2, "released"), (0.2, "ours")):
                values = [next((r[key] for r in scoring if (r["impl"], r["length"]) == (impl, n)), 0) for n in lengths]
                axes.bar([i + shift for i in range(len(lengths))], values, 0.4, color=colour(impl), label=impl)
            axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axes.set_title(label, fontsize=8)
            axes.set_xlabel("tokens of a completion")
        panels[3].legend(fontsize=7)
        figure.suptitle(device, fontsize=8, y=0.99)
        save(figure, "bench_rewards_cpu" if device.startswith("CPU") else "bench_rewards_gpu")


def bench_text():
    """The scoring pass beside the released code's way of doing it, on every machine that was measured."""
    lines = ["| machine | completions | released way | ours | peak above the weights |",
             "| --- | --- | --- | --- | --- |"]
    for device, rows in bench_rows().items():
        scoring = {(r["impl"], r["length"]): r for r in rows if r["part"] == "scoring"}
        for length in sorted({length for _, length in scoring}):
            theirs, ours = scoring["released", length], scoring["ours", length]
            rate = lambda r: f"{r['tokens_per_s']:,.0f} tokens/s" if r["ms"] else "out of memory"  # noqa: E731
            peak = lambda r: f"{r['peak_mb']:,.0f} MB" if r["ms"] else "-"  # noqa: E731
            lines.append(f"| {device} | {ours['rows']} of {length:,} tokens | {rate(theirs)} | {rate(ours)} | "
                         f"{peak(theirs)} -> {peak(ours)} |")
    if not any("NVIDIA" in device for device in bench_rows()):
        lines += ["", "No figure of a GPU is claimed: the kernels are proven in Triton's interpreter and compiled for "
                  "sm_80, sm_90 and sm_100, but have not been timed. `python tests/bench_rewards.py` does it."]
    replace(README, "bench text", "\n".join([*lines, ""]))


def bench_step_rows():
    """{(device, size): its rows}, of a repeated measurement the last."""
    found = {}
    for row in read("bench_step.jsonl", "python tests/bench_step.py"):
        asked = ("part", "phase", "engine", "context", "length", "teacher_bits", "student_bits", "offload_student")
        found.setdefault((row["device"], row["size"]), {})[tuple(row.get(key) for key in asked)] = row
    return {machine: [row for row in rows.values() if "failed" not in row] for machine, rows in found.items()}


def bench_step():
    """Where a step's time and memory go: hours of the recipe by phase, peaks by phase beside what was expected."""
    colours = {"rollout": GREY, "score": BLUE, "reference": "#e9c46a", "update": RED}
    for (device, size), rows in bench_step_rows().items():
        figure, panels = plt.subplots(1, 2, figsize=(10, 2.7))
        recipes = [row for row in rows if row["part"] == "recipe" and row["student_bits"] == 4]
        for i, row in enumerate(recipes):
            bottom = 0
            for phase, colour in colours.items():
                panels[0].bar(i, row[f"h_{phase}"], bottom=bottom, color=colour, label=phase if i == 0 else None)
                bottom += row[f"h_{phase}"]
        panels[0].set_xticks(range(len(recipes)), [f"{r['engine']}\n{r['length']:,}" for r in recipes], fontsize=6)
        panels[0].set_title("hours of 128,000 completions, by engine and mean length", fontsize=8)
        panels[0].legend(fontsize=7)
        steps = [row for row in rows if row["part"] == "step"]
        settings = list(dict.fromkeys((r["teacher_bits"], r["student_bits"], r["offload_student"]) for r in steps))
        for i, setting in enumerate(settings):
            own = [r for r in steps if (r["teacher_bits"], r["student_bits"], r["offload_student"]) == setting]
            for j, row in enumerate(sorted(own, key=lambda row: list(colours).index(row["phase"]))):
                panels[1].bar(i + 0.2 * (j - 1.5), row["peak_gb"], 0.18, color=colours[row["phase"]])
                panels[1].plot(i + 0.2 * (j - 1.5), row["expected_gb"], "k_", ms=8)
        names = [f"teacher {t} bits, student {s}" + "\nstudent offloaded" * o for t, s, o in settings]
        panels[1].set_xticks(range(len(settings)), names, fontsize=6)
        panels[1].set_title("peak of a phase, GB; dash: what --dry-run expects", fontsize=8)
        figure.suptitle(f"{device}, size {size}", fontsize=8, y=0.99)
        save(figure, "bench_step_cpu" if device.startswith("CPU") else "bench_step_gpu")


# Which machine, which command. Flags that all but the laptop's share stand in the README, as $RECIPE.
MACHINES = [  # machine, bytes/s and FLOP/s of one of its GPUs, GPUs, the launcher, what is added to $RECIPE
    ("one 24 GB GPU", 24, (0.5e12, 60e12), 1, "python", "--teacher-bits 4 --student-bits 4 --offload-student "
     "--max-new-tokens 4096 --rollout-batch 32 --micro-batch-tokens 6144"),
    ("one 80 GB GPU", 80, (1.7e12, 300e12), 1, "python", "--teacher-bits 16 --student-bits 4 "
     "--max-new-tokens 16384 --rollout-batch 24 --micro-batch-tokens 18432"),
    ("two 80 GB GPUs", 80, (1.7e12, 300e12), 2, "torchrun --nproc_per_node=2", "--teacher-bits 16 --student-bits 4 "
     "--max-new-tokens 16384 --rollout-batch 24 --micro-batch-tokens 18432"),
    ("two nodes of eight", 80, (1.7e12, 300e12), 16, "torchrun --nnodes=2 --nproc_per_node=8 "
     "--rdzv_backend=c10d --rdzv_endpoint=HOST:29500", "--teacher-bits 16 --student-bits 4 --max-new-tokens 16384 "
     "--rollout-batch 24 --micro-batch-tokens 18432"),
]
PROMPT = 1024  # tokens that the table counts with


def qwen_7b():
    """Its config, and tests/bench_step.py, where that is written out."""
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]
    import bench_step
    from transformers import Qwen2Config

    sizes, *_ = bench_step.SIZES["7b"]
    bench_step.CONFIG = Qwen2Config(**sizes, tie_word_embeddings=False, max_position_embeddings=32_768)
    return bench_step.CONFIG, bench_step


def expected_peak(flags):
    """(GB, phase) of the 7B pair's largest phase, as --dry-run finds it, with prompts of 1,024 tokens."""
    config, bench = qwen_7b()
    import memory

    words = flags.split()
    value = {word: int(after) for word, after in zip(words, words[1:], strict=False) if not after.startswith("--")}
    teacher = memory.Shape(config, bits=value["--teacher-bits"], gpu=True, rank=32, trained="adapter", reference=True)
    table = memory.phases(
        teacher, memory.Shape(config, bits=value["--student-bits"], gpu=True), vocab=151_665, head_chunk=1024,
        tokens=max(value["--micro-batch-tokens"], PROMPT + value["--max-new-tokens"]), checkpointing=True,
        rollout=(value["--rollout-batch"], PROMPT, value["--max-new-tokens"]), scored=True, learned=True,
        reference=True, parked="--offload-student" in words)
    worst = max(table, key=lambda phase: table[phase]["total"])
    return table[worst]["total"] / memory.GB, worst


def expected_hours(bandwidth, rate, gpus, flags):
    """Hours of the whole recipe on so many GPUs: FLOPs at the rate, decoding at the bandwidth of weights and cache."""
    config, bench = qwen_7b()
    mean = int(flags.split("--max-new-tokens ")[1].split()[0]) // 4
    told = [PROMPT + mean]
    forward = bench.flops(told, [mean])
    work = 5 * forward + 2 * config.hidden_size * config.num_hidden_layers * told[0] ** 2  # 2 in score, 1, 2 and more
    batch = int(flags.split("--rollout-batch ")[1].split()[0])
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * 128 * 2
    weights = 15.2e9 if "--teacher-bits 16" in flags else 5.5e9
    decode = mean * (weights / batch + 3 * token * (PROMPT + mean / 2)) / bandwidth  # read, copied, read again
    return bench.COMPLETIONS * (work / rate + decode) / 3600 / gpus


def machines():
    """The table of "Which machine, which command", and what of it has been measured."""
    lines = ["| machine | command | peak of a GPU | hours |", "| --- | --- | --- | --- |",
             "| laptop, the toy | `python train_rlt.py --lambda 3 --alpha 0.01` | under 1 GB (estimated) | "
             "minutes on two cores, timed by `.ci/run` |"]
    for name, _, (bandwidth, rate), gpus, launcher, flags in MACHINES:
        peak, phase = expected_peak(flags)
        hours = expected_hours(bandwidth, rate, gpus, flags)
        lines.append(f"| {name} | `{launcher} train_rlt.py $RECIPE {flags}` | {peak:.0f} GB in {phase} (estimated) | "
                     f"{hours:,.0f} (estimated) |")
    lines += ["", "Peaks are the dry run's, for Qwen2.5-7B as teacher and student and prompts of 1,024 tokens. Hours "
              "are arithmetic: 128,000 completions a quarter as long as the limit on average, none of which waits for "
              "another (by the commands' `--engine batch` each waits for the longest of its batch: so many hours at "
              "least), model FLOPs at 300 TFLOP/s a GPU of 80 GB (60 on 24 GB), decoding at 1.7 TB/s (0.5)."]
    gpu = {key: rows for key, rows in bench_step_rows().items() if not key[0].startswith("CPU")}
    if not gpu:
        lines += ["", "None of it has been measured on a GPU. `python tests/bench_step.py` does it, in ten minutes."]
    for (device, size), rows in gpu.items():
        lines += ["", f"Measured on {device}, size {size}, {rows[0]['date']}:", "",
                  "| phase | tokens | completion tokens/s | share of matmul | peak |",
                  "| --- | --- | --- | --- | --- |"]
        for row in rows:
            if "tokens_per_s" in row:
                kind = row.get("engine") or (f"student {row['student_bits']} bits" if "student_bits" in row else "")
                lines.append(f"| {row['part']} {kind} | {row.get('context') or row['length']:,} | "
                             f"{row['tokens_per_s']:,.0f} | {row['of_matmul']:.0%} | {row['peak_gb']:.1f} GB |")
        for row in rows:
            if row["part"] == "recipe" and row["student_bits"] == 4 and row["length"] == 4096:
                lines += ["", f"The whole recipe at 4,096 tokens, {row['engine']}: {row['h_total']:,.0f} GPU-hours, "
                          f"{row['h_without_rollout']:,.0f} without rollouts (the paper: {row['h_paper']})."]
    replace(README, "machines", "\n".join([*lines, ""]))


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(f"figures/{name}.png")


if __name__ == "__main__":
    for draw in (toy_accuracy, toy_reward, toy_cold_start, toy_ranks, toy_ablations, toy_table, claims_table):
        draw()
    for draw, setting, arm in (  # which the log may not hold yet
            (toy_few_and_long, "toy", "long problems"), (toy_transfer, "rooms", "RLT"),
            (toy_students, "toy", "base, larger"), (toy_guide, "base 0.005", "what Guide did"),
            (toy_map, "base 0.0", "RL after RLT, rows 0.0")):
        if of(arm, setting):
            draw()
    bench_rewards()
    bench_text()
    bench_step()
    machines()
