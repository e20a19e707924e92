# SPDX-License-Identifier: MIT
"""
What a run needs, before it starts: peak memory of each of its phases, from the models' configs alone, and hours.

`phases` adds up what is on the device in each phase, from the footprints of the models (rlt/footprint.py), and
`dry_run` prints it for --dry-run, with what to change if it does not fit. Not counted: the CUDA context (0.5 GB),
workspaces of libraries, fragmentation, and what else runs on the GPU. The verdict leaves MARGIN bytes for them.

`expected_hours` is arithmetic about the whole recipe, as a range: nothing of it is measured.
"""

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from rlt.footprint import ModelFootprint
from rlt.models import base_of, model_and_adapter_config, shares_base
from rlt.vllm_engine import MEMORY_SHARE

import torch

from rewards import LOGITS_CHUNK

GB, MARGIN = 1e9, 1.5e9
COLUMNS = ("weights", "adapters, AdamW", "cache", "activations", "logits", "total")


# ---------------------------------------------------------------------------------------------------------
# the phases of a run


def phases(policy, student=None, *, vocab, tokens, rollout=None, scored=False, learned=False, reference=False,
           checkpointing=False, kl_gradient=False, offloaded=False, shared=False, engine_bytes=0, optimizers=1):
    """Peak bytes by phase: {phase: {column: bytes}}. The parts are at their own peaks, the total at the phase's.

    policy: the ModelFootprint that samples and learns. student: the frozen one, for the reward. tokens: of a forward
    pass. rollout: (batch, prompt, new) tokens of generate, or None. scored: a pass of the policy, and of the student
    where there is one. learned: an update, with gradients. reference: a pass under the reference adapter. offloaded:
    the student is on the device only while it scores. shared: its weights are those of the policy's base.
    engine_bytes: what vLLM reserves, for its own copy of the base and its cache; 0: transformers samples. optimizers:
    AdamWs, each with states of its own.
    """
    student_bytes = student.weights + student.adapters if student and not shared else 0
    table = {}

    def add(name, transient, *, cache=0, activations=0, logits=0, with_student=not offloaded, copies=2 * optimizers):
        """copies: of the trained parameters' size, beside them: an AdamW's two states, and gradients."""
        weights = policy.weights + student_bytes * with_student + engine_bytes
        trained = policy.adapters + copies * policy.trained_bytes
        table[name] = dict(zip(COLUMNS, (weights, trained, cache, activations, logits, weights + trained + transient),
                               strict=True))

    largest = max(model.largest for model in (policy, student) if model)  # a tensor while its type is changed
    add("load", largest, activations=largest, copies=0, with_student=True)
    if rollout and engine_bytes:
        add("rollout", 0)
    elif rollout:
        cache, activations, both = policy.generate_bytes(*rollout)
        logits = rollout[0] * len(policy.head) * (policy.head.itemsize + 5 * 4)  # a step's, and five copies in float32
        add("rollout", max(both, cache + logits), cache=cache, activations=activations, logits=logits)

    block = 0 if policy.gpu else 2**20  # without Triton, rewards.py reduces a block of logits at a time
    peak, kept = policy.forward_bytes(tokens) if scored or reference else (0, 0)
    if scored:
        logits, activations, both = policy.logits_bytes(LOGITS_CHUNK, vocab) + 6 * block, peak, kept
        if student:
            student_peak, student_kept = student.forward_bytes(tokens)
            activations, both = max(peak, kept + student_peak), kept + student_kept
            logits += student.logits_bytes(LOGITS_CHUNK, vocab)
        add("score", max(activations, both + logits), activations=activations, logits=logits, with_student=True)
    rows = min(LOGITS_CHUNK, tokens)  # the other passes make no larger buffer than they need
    chunk = policy.logits_bytes(rows, vocab)
    if reference:
        logits = chunk + 4 * block
        add("reference", max(peak, kept + logits), activations=peak, logits=logits)
    if learned:
        activations, kept = policy.training_bytes(tokens, checkpointing)
        hidden, itemsize = policy.head.shape[1], policy.head.itemsize
        grad_states = tokens * hidden * itemsize
        rounded = rows * vocab * itemsize if itemsize < 4 else 0  # the logits' gradient, in the head's type
        logits = max(chunk + rounded + grad_states, chunk + 4 * block)
        if policy.head.requires_grad:
            logits += vocab * hidden * 4
        if kl_gradient:  # two buffers, and seven temporaries of their size and a mask for the KL's gradient
            student_peak, student_kept = student.forward_bytes(tokens)
            logits = 37 * chunk // 4 + grad_states + student_kept
            activations = max(activations, kept + student_peak)
        add("update", max(activations, kept + logits), activations=activations, logits=logits,
            copies=2 * optimizers + 1, with_student=not offloaded or kl_gradient)
    return table


# ---------------------------------------------------------------------------------------------------------
# --dry-run


def dry_run(args, device, policy, student=None, *, row, vocab, batch_rows=math.inf, shared=False, optimizers=1,
            **parts):
    """Print what the run needs, by phase, and what to change if that is too much -> 0 if it can run, else 1.

    row: tokens of the longest row. batch_rows: as many are in a step of one rank, at most. shared, optimizers, parts:
    for `phases`, whose other arguments come from the script's flags.
    """
    flags, problems = dict(vars(args)), []
    if "micro_batch_tokens" in flags:
        flags["micro_batch_tokens"] = min(flags["micro_batch_tokens"], batch_rows * row)
    available, where = available_bytes(device, args.dry_run)
    engine_bytes = MEMORY_SHARE * available if flags.get("engine") == "vllm" else 0
    if 0 < engine_bytes < policy.weights:
        problems.append(f"vLLM gets {engine_bytes / GB:.3g} GB, {MEMORY_SHARE:.0%} of the memory, and its copy of the "
                        f"base takes {policy.weights / GB:.3g} GB: pass --engine transformers, or a larger GPU.")
    table = phases(policy, student, vocab=vocab, tokens=max(flags.get("micro_batch_tokens", 0), row),
                   checkpointing=flags.get("gradient_checkpointing", False),
                   offloaded=flags.get("offload_student", False), shared=shared, engine_bytes=engine_bytes,
                   optimizers=optimizers, **{"kl_gradient": flags.get("kl_gradient", False)} | parts)
    print(f"{sum(p.numel() for p in policy.parameters):,} trained parameters; rows of up to {row:,} tokens\n")
    print(f"{'GB':10}", *(f"{column:>{len(column) + 5}}" for column in COLUMNS))
    for phase, numbers in table.items():
        print(f"{phase:10}", *(f"{numbers[column] / GB:{len(column) + 5}.3f}" for column in COLUMNS))
    print("the total is the phase's peak: its parts need not peak at the same time\n")
    if student and not shared and "student_bits" in flags and shares_base(
            args.model, args.teacher_bits, args.student or base_of(args.model), args.teacher_bits):
        print(f"tip: with --student-bits {args.teacher_bits} the student is the teacher's own base, which needs no "
              f"weights of its own: {student.weights / GB:.3g} GB less")

    out = folder = Path(flags.get("out") or "runs").resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        problems.append(f"{out} can't be written: {folder} is read-only. Pass another --out.")
    if flags.get("resume") is False and out.exists():
        print(f"note: {args.out} exists already: the run will need --resume, or another --out")
    if "save_every" in flags:
        saves = 1 + (args.steps // args.save_every if args.save_every else 0)
        if kept := flags.get("keep_checkpoints", 0):
            saves = min(saves, kept + 1)  # the oldest goes once the new one is complete
        needed = saves * (policy.saved + 2 * optimizers * policy.trained_bytes) + policy.saved
        free = shutil.disk_usage(folder).free
        checkpoints = f"{saves} checkpoint" + "s" * (saves > 1)
        print(f"disk: {needed / GB:.2f} GB for {checkpoints} and the result, {free / GB:.1f} GB free in {folder}")
        if needed > free:
            problems.append(f"the disk is too small for {checkpoints}: raise --save-every, or change --out.")

    worst = max(table, key=lambda phase: table[phase]["total"])
    verdict = f"{table[worst]['total'] / GB:.3g} GB in {worst}, {available / GB:.3g} GB on {where}"
    if table[worst]["total"] + MARGIN > available:
        problems.append(f"does not fit: {verdict}. First: {remedy(flags, worst, table[worst], row, shared)}")
    print("\n".join(problems) or f"fits: {verdict}")
    return 1 if problems else 0


def dry_run_rl(args, device, world, bits, student_name, *, longest_prompt, held_out, vocab, shared=False,
               longest_sft_row=0):
    """`dry_run` of a script with a GRPO loop.

    bits: of the policy's base. student_name: of the student in the reward, or None. longest_prompt: tokens. held_out:
    rows that are sampled at the same time, for the held-out measure. shared: for `phases`. longest_sft_row: tokens, of
    a script that does SFT too, with an optimizer of its own; 0: it does not.
    """
    gpu = args.dry_run > 0 or device.type == "cuda"
    adapter = {"rank": args.lora_rank, "targets": args.lora_targets} | model_and_adapter_config(args.model)
    models = [ModelFootprint(**adapter, bits=bits, gpu=gpu, trained="adapter", reference=args.beta > 0)]
    if student_name:
        models.append(ModelFootprint(**model_and_adapter_config(student_name), bits=args.student_bits, gpu=gpu))
    completions = max(args.prompts_per_step // world * args.group_size, held_out)
    return dry_run(args, device, *models, vocab=vocab, row=max(longest_prompt + args.max_new_tokens, longest_sft_row),
                   batch_rows=max(completions, args.relift_rows if longest_sft_row else 0), scored=True, learned=True,
                   reference=args.beta > 0, shared=shared, optimizers=2 if longest_sft_row else 1,
                   rollout=(min(args.rollout_batch, completions), longest_prompt, args.max_new_tokens))


def available_bytes(device, asked_gb):
    """(bytes, what they are): as asked for, or what this machine has."""
    if asked_gb:
        return asked_gb * GB, "the GPU asked for"
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"{torch.cuda.get_device_name(device)} (free now)"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def remedy(flags, phase, numbers, row, shared=False):
    """The flag to change first in a phase that does not fit, with a value. It makes the phase's largest part smaller.

    flags: the script's, as a dict. numbers: the phase's columns. row: tokens of the longest row. shared: teacher and
    student have the same weights, so bits of one alone would load a second copy.
    """

    def set_to(name, value):
        return f"--{name.replace('_', '-')} {value}"

    def halve(*names, at_least=2):
        return [set_to(name, flags[name] // 2) for name in names if (flags.get(name) or 0) >= at_least]

    vllm = flags.get("engine") == "vllm"  # which needs its base in 16 bits
    quantisable = ("student_bits",) if vllm else ("student_bits", "teacher_bits", "bits")
    fewer = [set_to(name, 4) for name in quantisable if flags.get(name, 4) > 4]
    if shared:
        fewer = [" ".join(fewer[::-1])] if fewer and not vllm else []
    elif flags.get("offload_student") is False and not flags.get("kl_gradient") and phase not in ("load", "score"):
        fewer.append("--offload-student")
    if vllm:
        fewer.append("--engine transformers")
    smaller_batch = halve("rollout_batch", "batch_size") if phase == "rollout" else []
    shorter = halve("max_new_tokens", "max_tokens")
    if phase == "rollout":
        smaller_pass = smaller_batch + shorter
    elif phase == "update" and not flags.get("gradient_checkpointing"):
        smaller_pass = ["--gradient-checkpointing"]
    else:
        smaller_pass = halve("micro_batch_tokens", at_least=2 * row) or shorter
    remedies = {"weights": fewer, "adapters, AdamW": halve("lora_rank"), "cache": smaller_batch + shorter,
                "activations": smaller_pass, "logits": smaller_batch}
    if flags.get("lora_rank") == 0:  # all weights are trained, which takes 32 bits
        remedies |= dict.fromkeys(("weights", "adapters, AdamW"), [set_to("lora_rank", 16)])
    for part in sorted(remedies, key=lambda part: -numbers[part]):
        if remedies[part] and numbers[part]:
            return remedies[part][0]
    return "a smaller model"


# ---------------------------------------------------------------------------------------------------------
# hours


class Machine(NamedTuple):
    """GPUs of one kind, as their data sheet has them. One H100 SXM: Machine(1, 80e9, 3.35e12, 989e12)."""

    gpus: int
    memory: float  # bytes of one
    bandwidth: float  # bytes/s of one
    flops: float  # FLOP/s of one, bfloat16, dense


# (low, high): the low hours take the first of each. {whether a decode step is a CUDA graph: ...} for transformers;
# what is without a graph holds two steps that were measured on an H100
TRANSFORMERS_BANDWIDTH = {True: (0.9, 0.4), False: (0.9, 0.7)}  # share of the data sheet's
LAUNCH = {True: (2e-6, 17e-6), False: (20e-6, 35e-6)}  # seconds a kernel; low: hidden behind reads, high: added to them
VLLM_BANDWIDTH = 0.7, 0.3  # 0.35 in the published 7,224 tokens/s of Qwen3-4B with LoRA, 32 rows on a B200
FLOPS = 0.45, 0.25  # share of the data sheet's; published for LoRA RL steps on an H100: 0.22 to 0.37
KERNELS_PER_LAYER = 88  # of a decode step with an adapter on every linear layer, half of them the adapter's
VLLM_ROWS = 256  # the most that it runs at a time
MEAN, SCALE = 0.25, 0.255  # of an exponential distribution cut at the limit, as fractions of the limit
HOURS_ASSUMPTIONS = (
    "Completions are a quarter as long as the limit on average, exponentially distributed, and cut at the limit.",
    "transformers: each batch waits for its longest row, and reads the cache of all until then. A decode step is a "
    "CUDA graph: it reads the weights and the cache at 40 to 90 % of the bandwidth and has 88 kernels a layer of 2 to "
    "17 us. Measured: 15 to 17 us, on an H100 that 15 processes shared. A model whose step can't be a graph takes 20 "
    "to 35 us a kernel, and copies its cache.",
    "vLLM: up to 256 rows at a time, as many as its pages hold (40 % of the memory, less its weights), at 30 to 70 % "
    "of the bandwidth.",
    "Scoring, reference and update: 25 to 45 % of the GPU's bfloat16 FLOP/s, activations are recomputed.",
    "Not counted: loading, evaluation, checkpoints, ranks that wait for each other.",
)


def expected_hours(machine, *, parameters=7.6e9, layers=28, hidden=3584, heads=28, kv_heads=4, bits=16,
                   completions=128_000, steps=125, group=64, prompt=1024, limit=16_384, batch=24,
                   engine="transformers", graph=True, reference=True, checkpointing=True):
    """Hours of GRPO with LoRA -> {"rollout": (low, high), "passes": (low, high), "total": (low, high)}.

    The defaults are Qwen2.5-7B and the paper's recipe. bits: of the policy's base, 16 or 4. completions: of the whole
    run. group: of one question. prompt, limit: tokens. batch: rows of one call of generate. graph: whether a decode
    step of transformers is a CUDA graph (rlt.decode_steps).

    longest    of n rows: scale * sum of u^k / k for k up to n, u = 1 - exp(-limit / scale), the expected maximum
    rollout    transformers: for each batch, longest * (seconds of a decode step)
               vllm: tokens / rows at a time * (seconds of a step), and at the end longest * (a step of few rows)
    a step     (weights + cache) / bandwidth, and with transformers kernels * launch. Weights: 2 bytes a parameter; 4.5
               in 4 bits, which are read, written in 16 bits and read again. Cache: read; by transformers without a
               graph also copied (torch.cat), and where two questions share a batch, so that prompts are padded, also
               written and read once for each query head
    passes     2 parameters FLOPs a token and pass: the policy's and the student's scores, the reference, and in the
               update forward, backward (LoRA: no gradients of weights) and recomputation; and causal attention,
               2 hidden tokens^2 a layer, 2.5 times that backward
    """
    rows = completions // steps // machine.gpus  # of one GPU in a step
    cut = 1 - math.exp(-1 / SCALE)
    longest = [0.0]
    for k in range(1, rows + 1):
        longest.append(longest[-1] + SCALE * limit * cut**k / k)
    weights = (2 if bits == 16 else 4.5) * parameters
    token = 2 * layers * kv_heads * (hidden // heads) * 2  # bytes of a token in the cache

    def generate_seconds(bandwidth, launch, overlap):
        seconds = 0.0
        for start in range(0, rows, batch):
            n = min(batch, rows - start)
            padded = start // group != (start + n - 1) // group
            cache = n * (prompt + longest[n] / 2) * token * (1 if graph else 3 + 2 * padded * heads / kv_heads)
            reads, launches = (weights + cache) / bandwidth, KERNELS_PER_LAYER * layers * launch
            seconds += longest[n] * (max(reads, launches) if overlap else reads + launches)
        return seconds

    def vllm_seconds(bandwidth):
        context = (prompt + MEAN * limit) * token
        pages = MEMORY_SHARE * machine.memory - 2 * parameters
        at_a_time = min(rows, VLLM_ROWS, int(pages / context))
        if at_a_time < 1:
            raise ValueError(f"{MEMORY_SHARE:.0%} of {machine.memory / GB:.0f} GB hold the engine's weights and no row")
        step = (2 * parameters + at_a_time * context) / bandwidth
        return rows * MEAN * limit / at_a_time * step + longest[at_a_time] * 2 * parameters / bandwidth

    squared = prompt**2 + 2 * prompt * MEAN * limit + 2 * (SCALE * limit) ** 2 * (1 - (1 - cut) * (1 + 1 / SCALE))
    passes = 4 + reference + checkpointing
    flops = passes * 2 * parameters * (prompt + MEAN * limit) + (passes + 1.5) * 2 * layers * hidden * squared

    hours = {"rollout": [], "passes": []}
    for i in range(2):
        if engine == "transformers":
            bandwidth, launch = machine.bandwidth * TRANSFORMERS_BANDWIDTH[graph][i], LAUNCH[graph][i]
            seconds = generate_seconds(bandwidth, launch, overlap=i == 0)
        else:
            seconds = vllm_seconds(machine.bandwidth * VLLM_BANDWIDTH[i])
        hours["rollout"].append(steps * seconds / 3600)
        hours["passes"].append(completions * flops / machine.gpus / (machine.flops * FLOPS[i]) / 3600)
    hours["total"] = [sum(pair) for pair in zip(*hours.values(), strict=True)]
    return {part: tuple(pair) for part, pair in hours.items()}
