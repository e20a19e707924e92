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


MAIN = ["base", "solutions only", "warm-up teacher", "score only", "RLT, sampled KL", "ground truth"]
NAMES = {
    "base": "base student", "solutions only": "solutions only", "warm-up teacher": "warm-up teacher",
    "score only": "teacher without KL (lambda 0)", "RLT, sampled KL": "RLT (lambda 3)",
    "ground truth": "ground-truth chains",
    "RLT, sampled KL, lr 5e-3": "RLT, learning rate 5e-3", "RLT": "RLT, exact KL",
    "RLT, lr 5e-3": "RLT, exact KL, learning rate 5e-3",
    "best of 5": "best of 5 of the warm-up teacher, no RL", "direct RL": "direct RL on correctness, no teacher",
}


def toy_accuracy():
    """Held-out exact match of the students, one bar an arm: mean over seeds, a dot for each."""
    rows = toy_rows()
    figure, axes = plt.subplots(figsize=(6.4, 2.9))
    for y, arm in enumerate(reversed(MAIN)):
        own = [row for row in rows if row["arm"] == arm]
        for offset, decoding, shade in ((0.2, "greedy", 1.0), (-0.2, "sampled", 0.45)):
            mean, spread, values = over_seeds(own, lambda row: 100 * row["accuracy"][f"test {decoding}"]["mean"])  # noqa: B023
            axes.barh(y + offset, mean, height=0.36, color=RED if arm == "RLT, sampled KL" else GREY, alpha=shade,
                      xerr=spread, error_kw={"lw": 0.8, "capsize": 2})
            axes.plot(values, [y + offset] * len(values), "k.", ms=3)
    axes.set_yticks(range(len(MAIN)), [NAMES[arm] for arm in reversed(MAIN)])
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 103)
    axes.set_xlabel("held-out exact match, %\ndark: greedy, light: T = 1; bar: mean, whisker: deviation, dots: seeds",
                    fontsize=8)
    save(figure, "toy_accuracy")


def toy_reward():
    """What the teacher learns: reward, score, kl and leaks during RL, with the KL and without."""
    rows = toy_rows()
    figure, panels = plt.subplots(1, 4, figsize=(9.2, 2.3))
    for arm, colour in (("RLT, sampled KL", RED), ("score only", GREY)):
        curves = [row["curve"] for row in rows if row["arm"] == arm]
        for axes, key in zip(panels, ("reward", "score", "kl", "leak"), strict=True):
            for i, curve in enumerate(curves):
                axes.plot([e["step"] + 1 for e in curve], [e[key] for e in curve], color=colour, lw=0.9, alpha=0.75,
                          label=NAMES[arm] if i == 0 else None)
            titles = {"leak": "share that leaks", "kl": "kl (red: sampled, grey: exact)"}
            axes.set_title(titles.get(key, key), fontsize=9)
            axes.set_xlabel("step")
    panels[0].set_title("reward, by the arm's own lambda", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.08))
    save(figure, "toy_reward")


def toy_table():
    rows = toy_rows()
    seeds = sorted({row["seed"] for row in rows})
    count = rows[0]["accuracy"]["test greedy"]["questions"]
    lines = [f"Exact match in %, mean over seeds {', '.join(map(str, seeds))} (each seed), {count} held-out questions; "
             "explanations: what the teacher wrote for the training questions, at lambda 3 and exact KL.", "",
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
              + ". The commands of every arm and the commit they ran at are in `figures/logs/toy_study.jsonl`; at that "
              "commit `--kl exact` was still the default.", ""]
    replace_in_readme("toy table", "\n".join(lines))


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
    replace_in_readme("bench text", "\n".join([*lines, ""]))


def save(figure, name):
    figure.tight_layout()
    figure.savefig(HERE / f"{name}.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(f"figures/{name}.png")


if __name__ == "__main__":
    toy_accuracy()
    toy_reward()
    toy_table()
    bench_rewards()
    bench_text()
