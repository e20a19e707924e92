# SPDX-License-Identifier: MIT
"""Figures and tables of the benchmarks: bench/scoring.py, step.py, small_step.py, gpu.py, faults.py and zoo.py."""

import statistics
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
    return "\n".join([*lines, ""])


WAYS = {  # what is compared, its slower way, its faster way
    "prompts": ("shared prompts", "each", "once"),
    "sampler": ("decode steps", "generate", "steps"),
    "bits": ("bits of the weights", 32, 16),
}
WORDS = {"generate": "transformers' generate", "steps": "our own"}


def small_step_table():
    """What the parts of a step with a small model gain by each of three measures."""
    rows = read_log("small_step.jsonl", "python bench/small_step.py --compare bits --data rows.jsonl")
    lines = ["| processor | | rollout | score | update | step |", "| --- | --- | --- | --- | --- | --- |"]
    for kind, (title, slow, fast) in WAYS.items():
        ways = {way: [row for row in rows if (row["part"], row["way"]) == (kind, way)] for way in (slow, fast)}
        processor = "{device}, {bfloat16}".format(**ways[fast][0])
        medians = [[statistics.median(row[f"t_{part}"] for row in ways[way]) for way in (slow, fast)]
                   for part in ("rollout", "score", "update", "step")]
        ratios = [before / after for before, after in medians]
        choice = f"{WORDS.get(fast, fast)}, not {WORDS.get(slow, slow)}"
        lines.append(f"| {processor} | {title}: {choice} | {' | '.join(f'{x:.1f}' for x in ratios)} |")
    by_bits = {bits: [row for row in rows if row["way"] == bits] for bits in (16, 32)}
    gaps = " and ".join(f"{statistics.fmean(row['gap'] for row in own):.1e} nats a token with {bits} bits"
                        for bits, own in by_bits.items())
    one, rounds = rows[0], len(by_bits[16])
    sampler = ""
    if not all("sampler" in row for row in rows if row["part"] in ("prompts", "bits")):  # measured before there was one
        sampler = " Where prompts or bits are compared, transformers' generate samples."
    return "\n".join([*lines, "", "How many times as fast a step of RLT is with SmolLM2-135M as teacher and student, "
                      f"{one['questions'] * one['group_size']} explanations, medians of {rounds} rounds in turn. "
                      f"Sampler and trainer are apart by {gaps}.{sampler}", ""])


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


# ---------------------------------------------------------------------------------------------------------
# GPUs: bench/gpu.py

KERNELS = {"eager": "PyTorch, eager", "compile": "torch.compile", "liger": "Liger", "trl": "TRL", "ours": "rewards.py"}
NUMBERS = {"stats": "KL, two log-probs, entropy", "logprobs": "log-prob, entropy"}  # of a token


def gpu_rows(part):
    """{device: rows of this part in logs/gpu.jsonl}; of repeated measurements, the last."""
    asked = ("phase", "size", "kind", "impl", "tokens", "vocab", "dtype", "length", "rollout_rows")
    devices = {}
    for row in read_log("gpu.jsonl", "python bench/gpu.py"):
        if row["part"] == part:
            devices.setdefault(row["device"], []).append(row)
    return {device: last_of_each(rows, lambda row: tuple(map(row.get, asked))) for device, rows in devices.items()}


def ceilings(device):
    return gpu_rows("ceilings")[device][-1]


def gpu_tables():
    """What was measured on GPUs: kernels against other implementations, and the phases of a training step."""
    lines = []
    for device, rows in gpu_rows("reduce").items():
        limits = ceilings(device)
        lines += [f"{device}, torch {limits['torch']}, {limits['date']}: time, and share of the bandwidth of a copy "
                  f"({limits['copy_gb_s']:,.0f} GB/s). 4,096 tokens; Liger's KL takes log-probs, which it is given "
                  "by `log_softmax`, and has no other number.", "",
                  "| numbers of a token | vocabulary | " + " | ".join(KERNELS.values()) + " |",
                  "| --- " * (2 + len(KERNELS)) + "|"]
        found = {(row["kind"], row["vocab"], row["dtype"], row["impl"]): row for row in rows}
        for kind, vocab, dtype in dict.fromkeys(key[:3] for key in found):
            cells = (kernel_cell(found.get((kind, vocab, dtype, impl))) for impl in KERNELS)
            lines.append(f"| {NUMBERS[kind]} | {vocab:,} {dtype} | {' | '.join(cells)} |")
        lines.append("")
    for device, rows in gpu_rows("step").items():
        matmul = ceilings(device)["matmul_tflop_s"]
        lines += [f"{device}: phases of a training step at 16,384 tokens, random weights in 16 bits, gradient "
                  f"checkpointing. Shares are of a matrix product's speed, {matmul:,.0f} TFLOP/s.", "",
                  "| teacher and student | phase | tokens/s | share | peak memory | expected by `--dry-run` |",
                  "| --- | --- | --- | --- | --- | --- |"]
        for row in rows:
            phase = f"rollout of {row['rollout_rows']} rows" if row["phase"] == "rollout" else row["phase"]
            lines.append(f"| {row['size'].upper()} | {phase} | {row['tokens_per_s']:,.0f} | {row['of_matmul']:.0%} | "
                         f"{row['peak_gb']:.1f} GB | {row['expected_gb']:.1f} GB |")
        lines.append("")
    return "\n".join(lines)


def kernel_cell(row):
    return f"{row['ms']:.2f} ms, {row['of_copy']:.0%}" if row and row["ms"] else "-"


def largest_in_bfloat16(rows, kind):
    """{implementation: its row} at the largest vocabulary."""
    vocab = max(row["vocab"] for row in rows)
    return {row["impl"]: row for row in rows
            if (row["kind"], row["vocab"], row["dtype"]) == (kind, vocab, "bfloat16")}


def kernel_text():
    """The README's sentence on the kernel of the KL."""
    lines = []
    for device, rows in gpu_rows("reduce").items():
        own = largest_in_bfloat16(rows, "stats")
        ours = own["ours"]
        lines.append(f"On one {device} the KL, log-probs and entropy of {ours['tokens']:,} tokens with a vocabulary of "
                     f"{ours['vocab']:,} in bfloat16 take {ours['ms']:.2f} ms, at {ours['of_copy']:.0%} of a copy's "
                     f"bandwidth: {own['eager']['ms'] / ours['ms']:.0f} times as fast as PyTorch, "
                     f"{own['compile']['ms'] / ours['ms']:.1f} times as `torch.compile`.")
    return "\n".join([*lines, ""])


def measured_text():
    """The README's sentence on what was measured on GPUs."""
    lines = []
    for device, rows in gpu_rows("step").items():
        worst = max(abs(row["peak_gb"] / row["expected_gb"] - 1) for row in rows)
        sizes = " and ".join(dict.fromkeys(f"{row['size'].upper()}" for row in rows))
        largest = {row["phase"]: row for row in rows if row["size"] == rows[0]["size"]}
        decoding = largest.pop("rollout")
        graph = decoding.get("graph", False)
        rates = ", ".join(f"{phase} {row['tokens_per_s']:,.0f}" for phase, row in largest.items())
        lines.append(
            f"Measured on one {device} (`python bench/gpu.py`): with {sizes} models of random weights in 16 bits and "
            f"16,384 tokens, no phase's peak was more than {100 * worst:.1f} % from the one that `--dry-run` expects. "
            f"Tokens a second of {decoding['size'].upper()} models: {rates}; a decode step of "
            f"{decoding['rollout_rows']} rows takes {decoding['seconds']:.2f} s "
            f"{'as a CUDA graph' if graph else 'by generate of transformers'}. Not measured: "
            f"{'' if graph else 'rollouts of this size as CUDA graphs (time and memory), '}vLLM on a GPU, "
            "4-bit weights of this size, several GPUs ([all numbers](figures/README.md#speed-and-memory)).")
    return lines


def gpu():
    """Kernels against other implementations, and the peak of every phase with what --dry-run expects."""
    for device, rows in gpu_rows("reduce").items():
        figure, panels = plt.subplots(1, 3, figsize=(11, 2.6), width_ratios=(2, 2, 3))
        for axes, (kind, numbers) in zip(panels, NUMBERS.items(), strict=False):
            own = largest_in_bfloat16(rows, kind)
            names = [name for name in reversed(KERNELS) if name in own]
            axes.barh([KERNELS[name] for name in names], [100 * own[name]["of_copy"] for name in names],
                      color=[RED if name == "ours" else GREY for name in names])
            for place, name in enumerate(names):
                axes.text(100 * own[name]["of_copy"] + 1, place, f"{own[name]['ms']:.2g} ms", va="center", fontsize=7)
            axes.set_xlim(0, 118)
            axes.set_xlabel("bandwidth, % of a copy's")
            axes.set_title(f"{numbers} of a token")
            axes.grid(axis="y", visible=False)
        draw_gpu_peaks(panels[2], gpu_rows("step")[device])
        figure.suptitle(f"{device}. Left and middle: from logits of 4,096 tokens, vocabulary 152,064, bfloat16. Right: "
                        "a training step at 16,384 tokens", fontsize=8)
        save(figure, "bench_gpu")


def draw_gpu_peaks(axes, rows):
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    for row in rows:
        x = sizes.index(row["size"]) + 0.2 * (list(PHASES).index(row["phase"]) - 1.5)
        axes.bar(x, row["peak_gb"], 0.18, color=PHASES[row["phase"]], label=row["phase"])
        axes.plot(x, row["expected_gb"], "k_", ms=12, label="expected by --dry-run")
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(named.values(), named.keys(), loc="upper right")
    axes.set_xticks(range(len(sizes)), [size.upper() for size in sizes])
    axes.set_xlabel("teacher and student, 16 bits")
    axes.set_ylabel("peak memory of a phase, GB")
    axes.grid(axis="x", visible=False)


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
    return (f"{n['runs']} runs, ended {n['kills']} times by kill -9, SIGTERM or Ctrl-C at random moments ({scripts}), "
            f"each time followed by the same command: {n['identical']} of them left, bit for bit, what an undisturbed "
            "run leaves.")


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


FIGURES = (scoring, step, gpu)
