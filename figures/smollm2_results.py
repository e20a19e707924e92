# SPDX-License-Identifier: MIT
"""What the study on SmolLM2 has measured: students, training curves, and explanations of one problem token by token."""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt.evaluations import percent

import matplotlib.pyplot as plt
from plotting import GREY, LABELS, RED, bars, save, steps
from reward_picture import draw
from reward_rows import read_scored
from study_log import LOGS, greedy, interval, measured, paired_differences, read_log

COMMAND = "python figures/smollm2_study.py --gsm8k train.jsonl"
BEFORE_AND_AFTER = LOGS / "smollm2_explanations.jsonl"  # of one problem, by the teacher before and after 25 steps of RL
BY_LAMBDA = LOGS / "smollm2_samples.jsonl"  # of one problem, by teachers with the KL in their reward and without it
STUDENTS = ("base", "solutions only", "human chains", "warm-up teacher", "score only", "best of 8", "RLT",
            "warmed-up student", "direct RL", "RL after RLT", "on-policy, warm-up teacher", "on-policy, RLT",
            "on-policy, RLT, KL alone", "right chains")
COMPARED = (("RLT", "warm-up teacher"), ("best of 8", "RLT"), ("RL after RLT", "RLT"),  # students; above ...
            ("warmed-up student", "RLT"), ("warmed-up student", "best of 8"))
NAMES = LABELS | {"best of 8": "best of 8, no RL",
                  "warmed-up student": "the reward student: warm-up rows, easier problems",
                  "right chains": "right chains", "human chains": "human chains of other problems (GSM8K)",
                  "on-policy, warm-up teacher": "on-policy student of the warm-up teacher",
                  "on-policy, RLT": "on-policy student of RLT",
                  "on-policy, RLT, KL alone": "the same, without the loss on the solution"}
EXPLANATIONS = {"is_right_chain": "right chains", "right_steps": "right steps", "leak": "leak"}  # shares


def rows_of(arm):
    """The rows of an arm, ordered by seed; [] if it has not been run."""
    rows = [row for row in read_log("smollm2_study.jsonl", COMMAND) if row["arm"] == arm]
    return sorted(rows, key=lambda row: row["seed"])


def tested(arm):
    """The rows of an arm whose students have answered the test questions."""
    return [row for row in rows_of(arm) if "test greedy" in row["accuracy"]]


def students_table():
    """The README's table: students by what they were trained on, and what the explanations are like."""
    rows = {arm: rows_of(arm) for arm in STUDENTS if rows_of(arm)}
    all_rows = [row for own in rows.values() for row in own]
    seeds = sorted({row["seed"] for row in all_rows})
    counts = {split: max(row["accuracy"].get(f"{split} greedy", {}).get("questions", 0) for row in all_rows)
              for split in ("test", "val")}
    lines = [f"Right answers to {counts['test']} test and {counts['val']} validation questions in %, greedy: mean over "
             f"seeds {', '.join(map(str, seeds))} ± its 95 % interval. On the right: means over the explanations of "
             "the training questions, with λ = 3 and the exact KL.", "",
             "| student trained on | test | validation | right chains | right steps | leak | score | KL | reward |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for arm, own in rows.items():
        accuracies = " | ".join(accuracy_of(own, split, seeds) for split in ("test", "val"))
        lines.append(f"| {NAMES.get(arm, arm)} | {accuracies} | {' | '.join(explanations_of(own))} |")
    found = []
    for arm, other in COMPARED:
        gains = paired_differences(tested(arm), tested(other), greedy)
        if len(gains) > 1:
            mean, half = interval(gains)
            found.append(f"{NAMES.get(arm, arm)} above {NAMES.get(other, other)}: {mean:+.1f} ± {half:.1f}")
    if found:
        lines += ["", f"Points of the test, on the same seeds: {'; '.join(found)}."]
    lines += ["", f"Measured on {measured(all_rows)}. `figures/logs/smollm2_study.jsonl` says of every arm on what it "
              "ran, by which commands and at which commit.", ""]
    return "\n".join(lines)


def accuracy_of(rows, split, seeds):
    """A cell: the mean over seeds, and its interval; of one seed, which it is; empty where none was measured."""
    found = {row["seed"]: 100 * row["accuracy"][f"{split} greedy"]["mean"] for row in rows
             if f"{split} greedy" in row["accuracy"]}
    if not found:
        return ""
    mean, half = interval(list(found.values()))
    if len(found) == 1:
        return f"**{mean:.1f}** (seed {', '.join(map(str, found))})"
    return f"**{mean:.1f}** ± {half:.1f}" + ("" if len(found) == len(seeds) else f" ({len(found)} seeds)")


def explanations_of(rows):
    """Cells: what the explanations that these students learned from are like; empty where a teacher wrote none."""
    found = [row["explanations"] for row in rows if "explanations" in row]
    if not found:
        return [""] * (len(EXPLANATIONS) + 3)
    cells = [f"{100 * statistics.fmean(one[key] for one in found):.0f} %" for key in EXPLANATIONS]
    for key in ("score", "kl", "reward"):
        known = [one[key] for one in found if key in one]
        cells.append(f"{statistics.fmean(known):.2f}" if known else "")
    return cells


def accuracy():
    figure, axes = plt.subplots(figsize=(6.4, 2.8))
    rows = {arm: tested(arm) for arm in STUDENTS}
    bars(axes, rows, [greedy], labels=NAMES, highest=50)
    axes.set_xlabel("right answers to 400 test questions, greedy, %\n(mean, 95 % interval, one dot for each seed)")
    axes.set_ylabel("student trained on")
    save(figure, "smollm2_accuracy")


def training():
    """RLT on SmolLM2, with the KL in the reward and without: what the reward is made of, along training."""
    titles = {"score": "score, nats", "kl": "KL (k1), nats", "reward": "score - 3 KL, nats",
              "length": "tokens in an explanation", "entropy": "entropy, nats a token",
              "kl_ref": "KL to the reference"}
    figure, panels = plt.subplots(1, len(titles), figsize=(11, 2.2))
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for arm, colour in (("RLT", RED), ("score only", GREY)):
            for row in rows_of(f"training of {arm}"):
                curve = row["curve"]
                values = [entry["score"] - 3 * entry["kl"] if key == "reward" else entry[key] for entry in curve]
                line, = axes.plot(steps(curve), values, color=colour, lw=0.8)
            line.set_label(LABELS[arm])
        axes.set_title(title)
        axes.set_xlabel("step")
    figure.legend(*panels[0].get_legend_handles_labels(), title="one line for each seed", loc="upper center", ncols=2,
                  bbox_to_anchor=(0.5, 0.03))
    save(figure, "smollm2_reward")


def curves_table():
    """First and last five steps of every training run, and how often the teacher writes a right chain."""
    lines = ["| seed | reward | steps | score | KL | score - 3 KL | right chains |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    for arm in ("RLT", "score only"):
        for row in rows_of(f"training of {arm}"):
            first, last = row["curve"][:5], row["curve"][-5:]
            values = [[statistics.fmean(measure(entry) for entry in part) for part in (first, last)]
                      for measure in (lambda e: e["score"], lambda e: e["kl"], lambda e: e["score"] - 3 * e["kl"])]
            cells = " | ".join(f"{before:.2f} → {after:.2f}" for before, after in values)
            before, after = (share_of_right_chains(name, row["seed"]) for name in ("warm-up teacher", arm))
            chains = f"{before} → {after}" if before and after else ""
            lines.append(f"| {row['seed']} | {LABELS[arm]} | {len(row['curve'])} | {cells} | {chains} |")
    return "\n".join([*lines, ""])


def rollout_text():
    """A sentence on rollouts with CUDA graphs and without, of the runs of which both are known."""
    parts = []
    for graphs, kind in ((True, "with CUDA graphs and MPS"), (False, "without")):
        rows = [row for arm in ("RLT", "score only") for row in rows_of(f"training of {arm}")
                if row.get("cuda_graphs") is graphs]
        if not rows:
            continue
        seconds = sorted({f"{row['seconds_a_step']['t_rollout']:.1f}" for row in rows})
        shared, = {row["processes"] for row in rows}
        parts.append(f"{' to '.join([*seconds[:1], *seconds[1:][-1:]])} s {kind}, beside {shared - 1} other processes")
    if not parts:
        return ""
    return ("A rollout of the study on SmolLM2, 128 explanations of at most 64 tokens, took on one H100 "
            f"{', and '.join(parts)}.")


def explanations_table():
    """What teachers' explanations of the same training questions are like, seed by seed."""
    arms = [arm for arm in STUDENTS if rows_of(f"explanations of {arm}")]
    found = {arm: {row["seed"]: row["explanations"] for row in rows_of(f"explanations of {arm}")} for arm in arms}
    lines = [f"| teacher | seeds | {' | '.join([*EXPLANATIONS.values(), 'score', 'KL', 'reward'])} |",
             "| --- " * (len(EXPLANATIONS) + 5) + "|"]
    for arm, own in found.items():
        cells = [", ".join(f"{100 * own[seed][key]:.0f}" for seed in own) + " %" for key in EXPLANATIONS]
        cells += [", ".join(f"{own[seed][key]:.2f}" for seed in own) for key in ("score", "kl", "reward")]
        lines.append(f"| {NAMES.get(arm, arm)} | {', '.join(map(str, own))} | {' | '.join(cells)} |")
    rlt, warm_up = (rows_of(f"explanations of {arm}") for arm in ("RLT", "warm-up teacher"))
    mean, half = interval(paired_differences(rlt, warm_up, lambda row: 100 * row["explanations"]["is_right_chain"]))
    lines += ["", f"Right chains of RLT, less those of its own warm-up teacher: {mean:+.1f} ± {half:.1f} points.", ""]
    return "\n".join(lines)


def share_of_right_chains(arm, seed):
    """Among the explanations of an arm, in %, with its standard error; "" where it was not measured."""
    for row in rows_of(f"explanations of {arm}"):
        if row["seed"] == seed:
            share, count = row["explanations"]["is_right_chain"], row["explanations"]["count"]
            return f"{100 * share:.0f} ± {100 * math.sqrt(share * (1 - share) / count):.0f} %"
    return ""


def answers_table():
    """Students' answers to the test questions and the last result of their own chains, seed by seed, where known."""
    rows = [row for arm in STUDENTS for row in tested(arm) if "same_answer" in row["accuracy"]["test greedy"]]
    lines = ["| student trained on | seed | right answers | last result right | answers it | most frequent answer |",
             "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        found = row["accuracy"]["test greedy"]
        shares = [found[key] for key in ("mean", "right_result", "answer_is_result", "same_answer")]
        cells = " | ".join(f"{100 * share:.0f} %" for share in shares)
        lines.append(f"| {NAMES.get(row['arm'], row['arm'])} | {row['seed']} | {cells} |")
    return "\n".join([*lines, ""])


def rl_table():
    """RL on correctness: first and last five steps, and how many groups had nothing to learn from."""
    lines = ["| student | seed | steps | right answers, T = 1 | groups all right or all wrong | tokens in an answer | "
             "test, greedy, before → after |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for arm, start in (("direct RL", "warmed-up student"), ("RL after RLT", "RLT")):
        before = {row["seed"]: greedy(row) for row in tested(start)}
        before |= {row["seed"]: 100 * row["start"]["mean"] for row in rows_of(arm) if "start" in row}  # made anew
        for row in rows_of(arm) or rows_of(f"training of {arm}"):
            values = {key: [statistics.fmean(entry[key] for entry in part)
                            for part in (row["curve"][:5], row["curve"][-5:])]
                      for key in ("solved", "zero_groups", "length")}
            cells = [" → ".join(f"{100 * value:.0f}" for value in values[key]) + " %"
                     for key in ("solved", "zero_groups")]
            cells.append(" → ".join(f"{value:.0f}" for value in values["length"]))
            known = row in tested(arm) and row["seed"] in before
            cells.append(f"{before[row['seed']]:.1f} → {greedy(row):.1f} %" if known else "")
            lines.append(f"| {NAMES.get(arm, arm)} | {row['seed']} | {len(row['curve'])} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def multiarith_table():
    """Right answers to public problems that no student was trained on."""
    rows = rows_of("MultiArith")
    lines = ["| student trained on | seed | right answers |", "| --- | --- | --- |"]
    for row in rows:
        for arm, share in row["multiarith"].items():
            lines.append(f"| {NAMES.get(arm, arm)} | {row['seed']} | {percent(share)} |")
    lines += ["", f"{rows[0]['questions']} of MultiArith's problems of additions and subtractions, greedy, ± the "
              "standard error.", ""]
    return "\n".join(lines)


def by_lambda():
    """Explanations of one problem after 30 steps of RL, with the KL in the reward and without, token by token."""
    settings, (group,) = read_scored(BY_LAMBDA)
    save(draw(group, settings), "smollm2_explanations")


def before_and_after():
    """Explanations of one problem before and after 25 steps of RL, token by token."""
    settings, (group, *_) = read_scored(BEFORE_AND_AFTER)
    save(draw(group, settings), "smollm2_before_and_after")


FIGURES = (accuracy, training, by_lambda, before_and_after)
