# SPDX-License-Identifier: MIT
"""
The README's table of machines: peak memory and hours of the recipe, as rlt/dry_run.py estimates them.

    python figures/machines.py    estimate the peaks again, into logs/machines.jsonl: two minutes
"""

import datetime
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt import dry_run
from rlt.files import write_atomically

import torch
from benchmarks import measured_text
from smollm2_results import rollout_text
from study_log import LOGS, read_log

LOG = LOGS / "machines.jsonl"
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


def peaks(plan):
    """{phase: bytes at its peak} of the 7B pair on a GPU of this plan, as --dry-run estimates them: half a minute."""
    from transformers import Qwen2Config

    config = Qwen2Config(**QWEN_7B)
    teacher = dry_run.ModelFootprint(config, bits=plan.teacher_bits, gpu=True, rank=RANK, trained="adapter",
                                     reference=True)
    phases = dry_run.phases(
        teacher, dry_run.ModelFootprint(config, bits=4, gpu=True), vocab=VOCAB, checkpointing=True, scored=True,
        learned=True, reference=True, tokens=max(plan.micro_batch_tokens, PROMPT + plan.max_new_tokens),
        rollout=(plan.rollout_batch, PROMPT, plan.max_new_tokens), offloaded=plan.offload_student,
        engine_bytes=dry_run.MEMORY_SHARE * plan.memory if plan.engine == "vllm" else 0)
    return {phase: found["total"] for phase, found in phases.items()}


def hours(plan):
    """(low, high) hours of the whole recipe with the 7B pair."""
    machine = dry_run.Machine(plan.gpus, plan.memory, plan.bandwidth, plan.flops)
    return dry_run.expected_hours(machine, bits=plan.teacher_bits, prompt=PROMPT, limit=plan.max_new_tokens,
                                  batch=plan.rollout_batch, engine=plan.engine)["total"]


def machine_table():
    """Which machine needs how much memory and time, and what of it has been measured."""
    quick_start = "python train_rlt.py --lambda 3 --alpha 0.01"
    seconds, = (row["seconds"] for row in read_log("readme_walk.jsonl", "the commands of the README, by hand")
                if row["command"] == quick_start)
    lines = ["| machine | command | peak memory of a GPU | hours |", "| --- | --- | --- | --- |",
             f"| laptop, the toy | `{quick_start}` | under 1 GB (estimated) | {seconds / 3600:.1f} on two cores |"]
    logged = {row["command"]: row["peaks"] for row in read_log(LOG.name, "python figures/machines.py")}
    for plan in PLANS:
        phase, size = max(logged[plan.command].items(), key=lambda item: item[1])
        low, high = hours(plan)
        lines.append(f"| {plan.name} | `{plan.command}` | {size / dry_run.GB:.0f} GB in {phase} (estimated) | "
                     f"{low:,.0f} to {high:,.0f} (estimated) |")
    lines += ["", "Peaks are those of `--dry-run` for Qwen2.5-7B as teacher and student, with prompts of 1,024 tokens. "
              "Hours are those of the whole recipe, 128,000 completions: arithmetic, and what it assumes is in "
              "[rlt/README.md](rlt/README.md#what-the-hours-assume)."]
    return "\n".join([*lines, "", *measured_text(), rollout_text(), ""])


def hours_text():
    """What the hours of the table assume."""
    lines = ["The hours in the README's table are arithmetic, not measured: `expected_hours` in `rlt/dry_run.py`. They "
             "assume:", "", *(f"- {assumption}" for assumption in dry_run.HOURS_ASSUMPTIONS)]
    return "\n".join([*lines, ""])


def main():
    lines = []
    for plan in PLANS:
        row = {"name": plan.name, "command": plan.command, "peaks": peaks(plan), "made_by": "figures/machines.py",
               "date": str(datetime.date.today()), "torch": torch.__version__}
        lines.append(json.dumps(row) + "\n")
        print(plan.name, row["peaks"])
    write_atomically(LOG, "".join(lines))


if __name__ == "__main__":
    main()
