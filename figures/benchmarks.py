# SPDX-License-Identifier: MIT
"""Figures and tables of the benchmarks: bench/scoring.py, bench/step.py, bench/faults.py, bench/zoo.py."""

from collections import Counter

import matplotlib.pyplot as plt
from plotting import BLUE, GREY, ORANGE, RED, save
from study_log import read_log

# ---------------------------------------------------------------------------------------------------------
# scoring: the reward against other implementations

MEASURED = {"ms", "gb_s", "of_copy", "of_matmul", "peak_mb", "error", "tokens_per_s", "reward", "date", "copy_gb_s",
            "matmul_tflop_s"}  # columns of the log that are results; all others say what was measured
IMPLEMENTATIONS = {"ours": ("rewards.py", RED), "eager": ("PyTorch, eager", GREY),
                   "compile": ("PyTorch, torch.compile", BLUE), "released": ("as in the released code", GREY)}


def last_of_each(rows, key):
    """Rows in order; of those with the same key, the last, since a measurement that is repeated replaces the first."""
    return list({key(row): row for row in rows}.values())


def scoring_rows():
    """{device: rows of logs/bench_rewards.jsonl}."""
    rows = last_of_each(read_log("bench_rewards.jsonl", "python bench/scoring.py"),
                        lambda row: tuple((key, value) for key, value in row.items() if key not in MEASURED))
    return {device: [row for row in rows if row["device"] == device] for device in sorted({r["device"] for r in rows})}


def scoring():
    """The reward against other implementations: memory bandwidth, error, and a whole pass of two models."""
    for device, rows in scoring_rows().items():
        figure, panels = plt.subplots(1, 4, figsize=(11, 2.6))
        draw_token_stats(panels[0], rows, "of_copy", 100, "memory bandwidth,\n% of a copy's")
        panels[0].set_ylim(bottom=0)
        draw_token_stats(panels[1], rows, "error", 1, "largest error\nagainst float64, nats")
        panels[1].set_yscale("log")
        panels[0].legend()
        draw_passes(panels[2], rows, "tokens_per_s", "completion tokens\nper second")
        draw_passes(panels[3], rows, "peak_mb", "peak memory\nabove the weights, MB")
        panels[3].legend(loc="upper left")
        figure.suptitle(f"{device}. Left: KL, log-probs and entropy of a token from two rows of logits in bfloat16. "
                        "Right: scoring of completions by two models", fontsize=8)
        save(figure, "bench_rewards_cpu" if device.startswith("CPU") else "bench_rewards_gpu")


def draw_token_stats(axes, rows, key, scale, label):
    stats = [r for r in rows if r["part"] == "reduce" and r["kind"] == "stats" and r["dtype"] == "bfloat16"]
    tokens = max(row["tokens"] for row in stats)
    values = {(row["impl"], row["vocab"]): row.get(key) for row in stats if row["tokens"] == tokens}
    vocabularies = sorted({vocab for _, vocab in values})
    for implementation in dict.fromkeys(implementation for implementation, _ in values):
        name, colour = IMPLEMENTATIONS.get(implementation, (implementation, None))
        line = [values.get((implementation, vocab)) for vocab in vocabularies]
        axes.plot([f"{vocab:,}" for vocab in vocabularies],
                  [scale * value if value else float("nan") for value in line], "o-", ms=3, color=colour, label=name)
    axes.margins(x=0.2)
    axes.set_ylabel(label)
    axes.set_xlabel(f"vocabulary ({tokens:,} tokens)")


def draw_passes(axes, rows, key, label):
    passes = {(row["impl"], row["length"]): row for row in rows if row["part"] == "scoring" and row["ms"]}
    lengths = sorted({length for _, length in passes})
    for offset, implementation in ((-0.2, "released"), (0.2, "ours")):
        name, colour = IMPLEMENTATIONS[implementation]
        values = [passes[implementation, n][key] if (implementation, n) in passes else 0 for n in lengths]
        axes.bar([x + offset for x in range(len(lengths))], values, 0.4, color=colour, label=name)
    axes.margins(y=0.3)  # room for a legend
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_ylabel(label)
    axes.set_xlabel("tokens in a completion")


def scoring_table():
    """A whole scoring pass and the released code's way of it, on every machine that was measured."""
    lines = ["| machine | completions | as in the released code | `rewards.py` | peak memory above the weights |",
             "| --- | --- | --- | --- | --- |"]
    for device, rows in scoring_rows().items():
        passes = {(row["impl"], row["length"]): row for row in rows if row["part"] == "scoring"}
        for length in sorted({length for _, length in passes}):
            released, ours = passes["released", length], passes["ours", length]
            lines.append(f"| {device} | {ours['rows']} of {length:,} tokens | {speed(released)} | {speed(ours)} | "
                         f"{peak(released)} -> {peak(ours)} |")
    if not any("NVIDIA" in device for device in scoring_rows()):
        lines += ["", "Nothing here has been timed on a GPU yet: the kernels are tested in Triton's interpreter and "
                  "compiled for sm_80, sm_90 and sm_100. `python bench/scoring.py` times them."]
    return "\n".join([*lines, ""])


def speed(row):
    return f"{row['tokens_per_s']:,.0f} tokens/s" if row["ms"] else "out of memory"


def peak(row):
    return f"{row['peak_mb']:,.0f} MB" if row["ms"] else "-"


# ---------------------------------------------------------------------------------------------------------
# step: where the time and the memory of a training step go

PHASES = {"rollout": GREY, "score": BLUE, "reference": ORANGE, "update": RED}
ENGINES = {"batch": "transformers", "transformers": "transformers", "vllm": "vLLM"}  # in old logs, in new ones


def step_rows():
    """{(device, size of the models): rows of logs/bench_step.jsonl that succeeded}."""
    asked = ("part", "phase", "engine", "context", "length", "teacher_bits", "student_bits", "offload_student")
    machines = {}
    for row in read_log("bench_step.jsonl", "python bench/step.py"):
        if row.get("engine", "transformers") in ENGINES:
            machines.setdefault((row["device"], row["size"]), []).append(row)
    return {machine: [row for row in last_of_each(rows, lambda row: tuple(row.get(key) for key in asked))
                      if "failed" not in row] for machine, rows in machines.items()}


def step():
    """Hours of the recipe by phase, and the peak memory of each phase with what --dry-run expects."""
    for (device, size), rows in step_rows().items():
        figure, (hours, peaks) = plt.subplots(1, 2, figsize=(10, 2.8), width_ratios=(2, 3))
        recipes = [row for row in rows if row["part"] == "recipe" and row["student_bits"] == 4]
        bottom = [0] * len(recipes)
        for phase, colour in PHASES.items():
            own = [row[f"h_{phase}"] for row in recipes]
            hours.bar(range(len(recipes)), own, bottom=bottom, color=colour, label=phase)
            bottom = [below + value for below, value in zip(bottom, own, strict=True)]
        hours.set_xticks(range(len(recipes)), [f"{row['length']:,}\n{ENGINES[row['engine']]}" for row in recipes],
                         fontsize=7)
        hours.set_xlabel("mean tokens in a completion; sampling engine")
        hours.set_ylabel("hours for 128,000 completions")
        hours.legend(reverse=True)
        draw_peaks(peaks, [row for row in rows if row["part"] == "step"])
        figure.suptitle(f"{device}, models of size {size}", fontsize=8)
        save(figure, "bench_step_cpu" if device.startswith("CPU") else "bench_step_gpu")


def draw_peaks(axes, rows):
    def setting(row):
        return row["teacher_bits"], row["student_bits"], row["offload_student"]

    settings = list(dict.fromkeys(map(setting, rows)))
    for row in rows:
        x = settings.index(setting(row)) + 0.2 * (list(PHASES).index(row["phase"]) - 1.5)
        axes.bar(x, row["peak_gb"], 0.18, color=PHASES[row["phase"]])
        axes.plot(x, row["expected_gb"], "k_", ms=9)
    axes.plot([], [], "k_", ms=9, label="expected by --dry-run")
    axes.margins(y=0.2)  # room for the legend
    axes.set_xticks(range(len(settings)), [
        f"teacher {teacher} bits, student {student}" + "\nstudent offloaded" * offloaded
        for teacher, student, offloaded in settings], fontsize=7)
    axes.set_ylabel("peak memory of a phase, GB")
    axes.legend(loc="upper right")


def measured_steps():
    """Paragraphs and tables of the steps that were measured on GPUs."""
    on_gpus = {machine: rows for machine, rows in step_rows().items() if not machine[0].startswith("CPU")}
    if not on_gpus:
        return ["", "None of it has been measured on a GPU: `python bench/gpu.py` does that, where there is one."]
    return [line for (device, size), rows in on_gpus.items() for line in ["", *measured_lines(device, size, rows)]]


def measured_lines(device, size, rows):
    lines = [f"Measured on {device}, size {size}, {rows[0]['date']}:", "",
             "| phase | tokens | completion tokens/s | share of matmul | peak |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if "tokens_per_s" in row:
            student = f"student {row['student_bits']} bits" if "student_bits" in row else ""
            kind = ENGINES.get(row.get("engine"), student)
            lines.append(f"| {row['part']} {kind} | {row.get('context') or row['length']:,} | "
                         f"{row['tokens_per_s']:,.0f} | {row['of_matmul']:.0%} | {row['peak_gb']:.1f} GB |")
    for row in rows:
        if row["part"] == "recipe" and row["student_bits"] == 4 and row["length"] == 4096:
            lines += ["", f"The whole recipe at 4,096 tokens, {ENGINES[row['engine']]}: {row['h_total']:,.0f} "
                      f"GPU-hours, {row['h_without_rollout']:,.0f} without rollouts (the paper: {row['h_paper']})."]
    return lines


# ---------------------------------------------------------------------------------------------------------
# faults: what was broken on purpose, and what came of it


def faults_list():
    """The counts of logs/faults.jsonl, those of repeated parts added up."""
    rows = read_log("faults.jsonl", "python bench/faults.py --kills 25 --folders 100 --inputs 60 --fuzz 60 --soak 2000")
    devices, dates = sorted({row["device"] for row in rows}), [row["date"] for row in rows]
    lines = [f"`python bench/faults.py` breaks things on purpose. On {' and '.join(devices)}, by {max(dates)}:", ""]
    for part, describe in FAULTS.items():
        own = [row for row in rows if row["part"] == part]
        counts = Counter()
        for row in own:
            counts.update({key: value for key, value in row.items() if isinstance(value, int | float)})
        if own:
            lines.append(f"- {describe(own, counts)}")
    return "\n".join([*lines, ""])


def kills_text(rows, n):
    scripts = ", ".join(f"{row['script']} {row['kills']}" for row in rows)
    return (f"{n['kills']} ends by kill -9, SIGTERM or Ctrl-C at random moments ({scripts}), each followed by the same "
            f"command: {n['identical']} of {n['runs']} runs left, bit for bit, what an undisturbed run leaves.")


def folders_text(_, n):
    total = n["refused"] + n["resumed"] + n["failures"]
    return (f"{total} run folders with a file missing, empty, cut or with a flipped bit: {n['refused']} refused in one "
            f"line, {n['resumed']} resumed since the damage was elsewhere, {n['failures']} read as if they were whole.")


def inputs_text(_, n):
    total = n["one_line"] + n["accepted"] + n["failures"]
    return (f"{total} wrong rows, files and flags: {n['one_line']} refused in one line, {n['accepted']} harmless, "
            f"{n['failures']} ended otherwise.")


def fuzz_text(rows, n):
    slowest = max(row["slowest_s"] for row in rows)
    return (f"{n['minutes']:g} minutes of coverage-guided fuzzing of parsers, {n['texts']:,} texts: {n['failures']} "
            f"failures, and no text took more than {slowest:.2f} s.")


def soak_text(rows, _):
    steps, before, after = (rows[-1][key] for key in ("steps", "second", "last"))
    return (f"{steps:,} steps of one run, its last quarter against its second: {after['resident_mb']:.0f} MB of memory "
            f"against {before['resident_mb']:.0f}, {after['open_files']} open files against {before['open_files']}, "
            f"{after['seconds']:.2f} s a step against {before['seconds']:.2f}.")


FAULTS = {"kills": kills_text, "folders": folders_text, "inputs": inputs_text, "fuzz": fuzz_text, "soak": soak_text}


# ---------------------------------------------------------------------------------------------------------
# models: small ones of many architectures, and how each is read

READ = {"packed": "packed into one row", "one by one": "one by one"}  # of the sequences of a batch


def models_table():
    """Which architectures work, and how their sequences are read; which are refused, and why."""
    rows = read_log("zoo.jsonl", "python bench/zoo.py")
    groups = {way: [] for way in READ.values()}
    for row in rows:
        if row["read"] in READ:
            note = f" ({row['why']})" * bool(row["why"])
            groups[READ[row["read"]]].append(row["architecture"] + note)
        else:
            reason, *_ = row["why"].partition(" (")
            groups.setdefault(f"{row['read']}: {reason}", []).append(row["architecture"])
    lines = ["| sequences are | architectures |", "| --- | --- |"]
    for way, names in groups.items():
        lines.append(f"| {way} | {' · '.join(sorted(names, key=str.lower))} |")
    return "\n".join([*lines, ""])


FIGURES = (scoring, step)
