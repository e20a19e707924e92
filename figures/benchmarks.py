# SPDX-License-Identifier: MIT
"""Figures and tables of the benchmarks (bench/scoring.py, step.py, zoo.py), and the README's table of machines."""

import functools
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
# machines: peak memory and hours of the recipe, as rlt/dry_run.py estimates them

PROMPT = 1024  # tokens that the table assumes for a prompt
RANK, VOCAB = 32, 151_665  # of the adapter; of Qwen2.5's tokenizer
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
           "max_position_embeddings": 32_768}


class Plan(NamedTuple):
    """A row of the table: GPUs, and what their command has besides the README's $RECIPE."""

    name: str
    launcher: str
    gpus: int
    memory: float  # bytes of a GPU
    bandwidth: float  # bytes/s of a GPU, by its data sheet
    flops: float  # FLOP/s of a GPU in bfloat16, by its data sheet
    teacher_bits: int
    offload_student: bool
    max_new_tokens: int
    rollout_batch: int
    micro_batch_tokens: int
    engine: str = "transformers"

    @property
    def command(self):
        flags = [f"--teacher-bits {self.teacher_bits} --student-bits 4", "--offload-student" * self.offload_student,
                 f"--max-new-tokens {self.max_new_tokens} --rollout-batch {self.rollout_batch}",
                 f"--micro-batch-tokens {self.micro_batch_tokens}", "--engine vllm" * (self.engine == "vllm")]
        return " ".join([self.launcher, "train_rlt.py $RECIPE", *filter(None, flags)])


RTX_4090 = dict(memory=24e9, bandwidth=1.008e12, flops=165e12, teacher_bits=4, offload_student=True,
                max_new_tokens=4096, rollout_batch=32, micro_batch_tokens=6144)
H100 = dict(memory=80e9, bandwidth=3.35e12, flops=989e12, teacher_bits=16, offload_student=False,
            max_new_tokens=16_384, rollout_batch=24, micro_batch_tokens=18_432)
NODES = "torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500"
PLANS = (
    Plan("one 24 GB GPU (RTX 4090)", "python", 1, **RTX_4090),
    Plan("one 80 GB GPU (H100)", "python", 1, **H100),
    Plan("the same, sampling with vLLM", "python", 1, **H100, engine="vllm"),
    Plan("two 80 GB GPUs", "torchrun --nproc_per_node=2", 2, **H100, engine="vllm"),
    Plan("two nodes of eight", NODES, 16, **H100, engine="vllm"),
)


def dry_run_module():
    """rlt/dry_run.py, which the scripts find because they start in the repository's root."""
    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    from rlt import dry_run

    return dry_run


@functools.cache
def expected_peak(teacher_bits, offload_student, max_new_tokens, rollout_batch, micro_batch_tokens, engine_bytes):
    """(GB, phase) of the phase of the 7B pair with the highest peak on a GPU, as --dry-run estimates it."""
    from transformers import Qwen2Config

    dry_run, config = dry_run_module(), Qwen2Config(**QWEN_7B)
    teacher = dry_run.ModelFootprint(config, bits=teacher_bits, gpu=True, rank=RANK, trained="adapter", reference=True)
    phases = dry_run.phases(
        teacher, dry_run.ModelFootprint(config, bits=4, gpu=True), vocab=VOCAB, checkpointing=True, scored=True,
        learned=True, reference=True, tokens=max(micro_batch_tokens, PROMPT + max_new_tokens),
        rollout=(rollout_batch, PROMPT, max_new_tokens), offloaded=offload_student, engine_bytes=engine_bytes)
    worst = max(phases, key=lambda phase: phases[phase]["total"])
    return phases[worst]["total"] / dry_run.GB, worst


def estimate(plan):
    """(GB of the phase with the highest peak, its name, (low, high) hours) of the recipe with the 7B pair."""
    dry_run = dry_run_module()
    peak, phase = expected_peak(
        plan.teacher_bits, plan.offload_student, plan.max_new_tokens, plan.rollout_batch, plan.micro_batch_tokens,
        dry_run.MEMORY_SHARE * plan.memory if plan.engine == "vllm" else 0)
    hours = dry_run.expected_hours(
        dry_run.Machine(plan.gpus, plan.memory, plan.bandwidth, plan.flops), bits=plan.teacher_bits, prompt=PROMPT,
        limit=plan.max_new_tokens, batch=plan.rollout_batch, engine=plan.engine)
    return peak, phase, hours["total"]


def machine_table():
    """Which machine needs how much memory and time, and what of it has been measured."""
    lines = ["| machine | command | peak memory of a GPU | hours |", "| --- | --- | --- | --- |",
             "| laptop, the toy | `python train_rlt.py --lambda 3 --alpha 0.01` | under 1 GB (estimated) | "
             "minutes on two cores, timed by `.ci/run` |"]
    for plan in PLANS:
        size, phase, (low, high) = estimate(plan)
        lines.append(f"| {plan.name} | `{plan.command}` | {size:.0f} GB in {phase} (estimated) | "
                     f"{low:,.0f} to {high:,.0f} (estimated) |")
    lines += ["", "Peaks are those of `--dry-run` for Qwen2.5-7B as teacher and student, with prompts of 1,024 tokens. "
              "The hours are for 128,000 completions, the whole recipe. " + dry_run_module().HOURS_ASSUMPTIONS]
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
