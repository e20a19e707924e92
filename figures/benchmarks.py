# SPDX-License-Identifier: MIT
"""Figures and tables of the benchmarks (bench/scoring.py, bench/step.py), and the README's table of machines."""

import sys
from pathlib import Path
from typing import NamedTuple

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


# ---------------------------------------------------------------------------------------------------------
# "Which machine, which command"

PROMPT = 1024  # tokens that the table assumes for a prompt
COMPLETIONS = 125 * 16 * 64  # of the paper's recipe: steps x questions x explanations
RANK, VOCAB = 32, 151_665  # of the adapter; of Qwen2.5's tokenizer
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
           "max_position_embeddings": 32_768}


class Machine(NamedTuple):
    """A row of the table; what its command has besides the README's $RECIPE."""

    name: str
    launcher: str
    gpus: int
    bandwidth: float  # of a GPU's memory, bytes/s
    flops: float  # that a GPU reaches, FLOP/s
    teacher_bits: int
    offload_student: bool
    max_new_tokens: int
    rollout_batch: int
    micro_batch_tokens: int

    @property
    def flags(self):
        return (f"--teacher-bits {self.teacher_bits} --student-bits 4 " + "--offload-student " * self.offload_student
                + f"--max-new-tokens {self.max_new_tokens} --rollout-batch {self.rollout_batch} "
                f"--micro-batch-tokens {self.micro_batch_tokens}")


ON_24_GB = dict(bandwidth=0.5e12, flops=60e12, teacher_bits=4, offload_student=True, max_new_tokens=4096,
                rollout_batch=32, micro_batch_tokens=6144)
ON_80_GB = dict(bandwidth=1.7e12, flops=300e12, teacher_bits=16, offload_student=False, max_new_tokens=16_384,
                rollout_batch=24, micro_batch_tokens=18_432)
MACHINES = (
    Machine("one 24 GB GPU", "python", 1, **ON_24_GB),
    Machine("one 80 GB GPU", "python", 1, **ON_80_GB),
    Machine("two 80 GB GPUs", "torchrun --nproc_per_node=2", 2, **ON_80_GB),
    Machine("two nodes of eight", "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d "
            "--rdzv_endpoint=HOST:29500", 16, **ON_80_GB),
)


def expected_peak(machine):
    """(GB, phase) of the 7B pair's largest phase, as --dry-run estimates it, with prompts of PROMPT tokens."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from rlt.dry_run import GB, ModelFootprint, phases

    from transformers import Qwen2Config

    config = Qwen2Config(**QWEN_7B)
    teacher = ModelFootprint(config, bits=machine.teacher_bits, gpu=True, rank=RANK, trained="adapter", reference=True)
    table = phases(
        teacher, ModelFootprint(config, bits=4, gpu=True), vocab=VOCAB, checkpointing=True, scored=True, learned=True,
        reference=True, tokens=max(machine.micro_batch_tokens, PROMPT + machine.max_new_tokens),
        rollout=(machine.rollout_batch, PROMPT, machine.max_new_tokens), offloaded=machine.offload_student)
    worst = max(table, key=lambda phase: table[phase]["total"])
    return table[worst]["total"] / GB, worst


def expected_hours(machine):
    """Hours of the whole recipe: model FLOPs at the GPU's rate, decoding at its memory bandwidth."""
    hidden, layers, heads = QWEN_7B["hidden_size"], QWEN_7B["num_hidden_layers"], QWEN_7B["num_attention_heads"]
    kv_size = hidden * QWEN_7B["num_key_value_heads"] // heads
    completion = machine.max_new_tokens // 4
    length = PROMPT + completion
    linear = 2 * (2 * hidden**2 + 2 * hidden * kv_size + 3 * hidden * QWEN_7B["intermediate_size"]) * length
    attention = 2 * hidden * length**2  # two products, half of them masked
    forward = layers * (linear + attention) + 2 * hidden * QWEN_7B["vocab_size"] * completion
    # Passes: teacher and student in scoring, reference, and an update, whose backward pass computes no gradients of
    # frozen weights and so costs as much as its forward; for attention twice as much.
    passes = 5 * forward + layers * attention
    weights = 15.2e9 if machine.teacher_bits == 16 else 5.5e9  # bytes, read once a token for the whole batch
    cache = 2 * layers * kv_size * 2 * (PROMPT + completion / 2)  # bytes of keys and values in bf16, on average
    decoding = completion * (weights / machine.rollout_batch + 3 * cache) / machine.bandwidth  # read, copied, read
    return COMPLETIONS * (passes / machine.flops + decoding) / 3600 / machine.gpus


def machine_table():
    """The table of "Which machine, which command", and what of it has been measured."""
    lines = ["| machine | command | peak memory of a GPU | hours |", "| --- | --- | --- | --- |",
             "| laptop, the toy | `python train_rlt.py --lambda 3 --alpha 0.01` | under 1 GB (estimated) | "
             "minutes on two cores, timed by `.ci/run` |"]
    for machine in MACHINES:
        size, phase = expected_peak(machine)
        lines.append(f"| {machine.name} | `{machine.launcher} train_rlt.py $RECIPE {machine.flags}` | {size:.0f} GB in "
                     f"{phase} (estimated) | {expected_hours(machine):,.0f} (estimated) |")
    lines += ["", "Peaks are those of `--dry-run` for Qwen2.5-7B as teacher and student, with prompts of 1,024 tokens. "
              "Hours are arithmetic, not measurements: 128,000 completions, on average a quarter as long as the limit; "
              "model FLOPs at 300 TFLOP/s on a GPU of 80 GB (60 on 24 GB); decoding at 1.7 TB/s (0.5). They are a "
              "lower bound: with `--engine transformers` a batch takes as long as its longest completion."]
    on_gpus = {machine: rows for machine, rows in step_rows().items() if not machine[0].startswith("CPU")}
    if not on_gpus:
        lines += ["", "None of it has been measured on a GPU. `python bench/step.py` does that in ten minutes."]
    for (device, size), rows in on_gpus.items():
        lines += ["", *measured_lines(device, size, rows)]
    return "\n".join([*lines, ""])


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


FIGURES = (scoring, step)
