# SPDX-License-Identifier: MIT
"""
Draw every figure and write every table of the README from the committed logs.

    python figures/make_figures.py

One function a figure. A log that is missing raises, with the command that makes it.
"""

import json
import re
import statistics
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


def toy_rows():
    return read("toy_study.jsonl", "python figures/toy_study.py")


def over_seeds(rows, value):
    """(mean, standard deviation over seeds, per seed)."""
    values = [value(row) for row in sorted(rows, key=lambda row: row["seed"])]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, values


def replace_in_readme(what, text):
    before = README.read_text()
    pattern = rf"(<!-- {what}: written by figures/make_figures.py -->\n).*?(<!-- end of {what} -->)"
    after, count = re.subn(pattern, lambda m: m[1] + text + m[2], before, flags=re.S)
    assert count == 1, f"README.md has no place for {what}"
    README.write_text(after)


MAIN = ["base", "solutions only", "warm-up teacher", "score only", "RLT", "ground truth"]
NAMES = {
    "base": "base student", "solutions only": "solutions only", "warm-up teacher": "warm-up teacher",
    "score only": "teacher without KL (lambda 0)", "RLT": "RLT (lambda 3)", "ground truth": "ground-truth chains",
    "RLT, lr 5e-3": "RLT, learning rate 5e-3", "RLT, sampled KL": "RLT, sampled KL",
    "RLT, sampled KL, lr 5e-3": "RLT, sampled KL, learning rate 5e-3",
}


def toy_accuracy():
    """Held-out exact match of the students, one bar an arm: mean over seeds, a dot for each."""
    rows = toy_rows()
    figure, axes = plt.subplots(figsize=(6.4, 2.9))
    for y, arm in enumerate(reversed(MAIN)):
        own = [row for row in rows if row["arm"] == arm]
        for offset, decoding, shade in ((0.2, "greedy", 1.0), (-0.2, "sampled", 0.45)):
            mean, spread, values = over_seeds(own, lambda row: 100 * row["accuracy"][f"test {decoding}"]["mean"])  # noqa: B023
            axes.barh(y + offset, mean, height=0.36, color=RED if arm == "RLT" else GREY, alpha=shade, xerr=spread,
                      error_kw={"lw": 0.8, "capsize": 2})
            axes.plot(values, [y + offset] * len(values), "k.", ms=3)
    axes.set_yticks(range(len(MAIN)), [NAMES[arm] for arm in reversed(MAIN)])
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 100)
    axes.set_xlabel("held-out exact match, % (dark: greedy, light: T = 1; bars: mean and deviation over seeds)")
    save(figure, "toy_accuracy")


def toy_reward():
    """What the teacher learns: reward, score, kl and leaks during RL, with the KL and without."""
    rows = toy_rows()
    figure, panels = plt.subplots(1, 4, figsize=(9.2, 2.3))
    for arm, colour in (("RLT", RED), ("score only", GREY)):
        curves = [row["curve"] for row in rows if row["arm"] == arm]
        for axes, key in zip(panels, ("reward", "score", "kl", "leak"), strict=True):
            for i, curve in enumerate(curves):
                axes.plot([e["step"] + 1 for e in curve], [e[key] for e in curve], color=colour, lw=0.9, alpha=0.75,
                          label=NAMES[arm] if i == 0 else None)
            axes.set_title({"leak": "share that leaks"}.get(key, key))
            axes.set_xlabel("step")
    panels[0].set_title("reward (each arm's own lambda)")
    panels[2].legend(fontsize=7)
    save(figure, "toy_reward")


def toy_table():
    rows = toy_rows()
    seeds = sorted({row["seed"] for row in rows})
    count = rows[0]["accuracy"]["test greedy"]["questions"]
    lines = [f"Exact match in %, mean over seeds {', '.join(map(str, seeds))} (each seed), {count} held-out questions; "
             "explanations: what the teacher wrote for the training questions, scored with lambda 3.", "",
             "| student of | greedy | T = 1 | tokens | gives away | full right chains | raw reward |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for arm in [*MAIN, *(arm for arm in NAMES if arm not in MAIN)]:
        own = [row for row in rows if row["arm"] == arm]
        if not own:
            continue
        cells = [NAMES[arm]]
        for decoding in ("greedy", "sampled"):
            mean, _, values = over_seeds(own, lambda row: 100 * row["accuracy"][f"test {decoding}"]["mean"])  # noqa: B023
            cells.append(f"**{mean:.1f}** ({' / '.join(f'{v:.1f}' for v in values)})")
        if "explanations" in own[0]:
            told = lambda key: over_seeds(own, lambda row: row["explanations"][key])[0]  # noqa: B023, E731
            cells += [f"{told('length'):.1f}", f"{100 * told('leak'):.0f} %", f"{100 * told('full_chain'):.0f} %",
                      f"{told('reward'):.2f}"]
        else:
            cells += ["", "", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    versions = sorted({(row["machine"], row["torch"], row["date"]) for row in rows})
    lines += ["", "Measured: " + "; ".join(f"{machine}, torch {torch}, {date}" for machine, torch, date in versions)
              + ". The commands of every arm are in `figures/logs/toy_study.jsonl`.", ""]
    replace_in_readme("toy table", "\n".join(lines))


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.png", dpi=150)
    plt.close(figure)
    print(f"figures/{name}.png")


if __name__ == "__main__":
    toy_accuracy()
    toy_reward()
    toy_table()
