# SPDX-License-Identifier: MIT
"""
Measure every phase of a training step on this machine, and what the paper's recipe would take. One command, one run:

    python bench/step.py                 Qwen2.5-7B's dimensions, on a CUDA GPU: less than ten minutes
    python bench/step.py --size tiny     the same code on a CPU: a minute

Weights are random and made on the device: nothing is downloaded. Parts
    rollout    decoding at a given context, by transformers and by vLLM: seconds of a step in which all rows get a token
    score      score_explanations, the student in 16 bits and in 4
    reference  completion_logprobs without gradient, under the reference adapter
    update     completion_logprobs and grpo_loss with gradient and backward, gradient checkpointing on
    step       all of them at the longest completions, one AdamW step included, in three settings: the peak of each
               phase and what --dry-run expects
    recipe     GPU-hours of 125 steps x 16 questions x 64 explanations, from the phases measured before

FLOPs are the model's: 2 a parameter and token forward, 4 in an update (LoRA), causal attention, the head where it is
needed; recomputation does not count. Each measurement is a line of JSON, printed and appended to --out. What is
missing is named; running out of memory is a result.
"""

import argparse
import gc
import importlib.util
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlt import decode_steps, lora  # noqa: E402
from rlt.dry_run import phases  # noqa: E402
from rlt.errors import UserError  # noqa: E402
from rlt.footprint import ModelFootprint  # noqa: E402
from rlt.grpo import grpo_loss  # noqa: E402
from rlt.logprobs import completion_logprobs  # noqa: E402
from rlt.rollout import _LogprobRecorder, can_batch, generate  # noqa: E402
from rlt.runs import describe  # noqa: E402
from rlt.vllm_engine import INSTALL, VLLMEngine  # noqa: E402

import torch  # noqa: E402
from measure import CUDA, DEVICE, DTYPE, LOGS, Log, machine, matmul_rate, model_bytes, peak_bytes, seconds  # noqa: E402
from random_models import RANK, can_quantise, make_teacher, random_model, save_folders  # noqa: E402

from rewards import Row, score_explanations  # noqa: E402

DECODED = 32  # steps timed at each context
DECODED_BY_VLLM = 128  # far more than the steps in which it reads the prompts: those are not to be the median
COMPLETIONS, PAPER = 125 * 16 * 64, 280.4  # the paper's recipe, and its H100-hours for it
WIDE = 16 if CUDA else 32  # bits of models that are not quantised


class Size(NamedTuple):
    """Models of one size, and what they are measured with."""

    config: object
    lengths: tuple  # tokens of completions
    cached: int  # tokens that a rollout holds in all

    @property
    def prompt(self):
        """Tokens of a question, and of its solution: with completions of 16k, 512."""
        return self.lengths[-1] // 32

    @property
    def micro_batch(self):
        """Tokens of a pass: the longest row."""
        return self.lengths[-1] + 2 * self.prompt + 2

    @property
    def vocab(self):
        return self.config.vocab_size - 1


SIZES = {  # Qwen2.5's, and a small one: config, completions, tokens that a rollout holds
    "7b": (dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152_064), (1024, 4096, 16_384), 2**18),
    "1.5b": (dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                  num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True), (1024, 4096, 16_384), 2**18),
    "tiny": (dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=2,
                  num_key_value_heads=1, vocab_size=8192), (64, 256, 1024), 2**12),
}


def size_of(name):
    from transformers import Qwen2Config

    sizes, lengths, cached = SIZES[name]
    config = Qwen2Config(**{"tie_word_embeddings": False} | sizes, max_position_embeddings=32_768,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return Size(config, lengths, cached)


def flops(config, lengths, heads):
    """Of one forward pass over sequences of these lengths, with the head on so many tokens of each."""
    h, kv = config.hidden_size, config.hidden_size * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * (2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size)
    attention = sum(2 * h * n * n for n in lengths)  # two products, half of them masked
    return config.num_hidden_layers * (layer * sum(lengths) + attention) + 2 * h * config.vocab_size * sum(heads)


# ---------------------------------------------------------------------------------------------------------
# inputs


class EndlessTokenizer:
    """As many tokens as the model has, and an end of turn that comes after them: it is never sampled."""

    chat_template, pad_token_id = None, 0

    def __init__(self, size):
        self.eos_token_id = size.vocab

    def get_vocab(self):
        return {str(i): i for i in range(self.eos_token_id)}


def ids(n):
    return torch.randint(1, 1000, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def scoring_row(size, length):
    """Prompt, completion and solution of one explanation."""
    return Row(ids(2 * size.prompt), ids(length - 2), ids(2), ids(size.prompt), ids(4), ids(size.prompt))


def rows_of(size, length):
    """Rows with completions of this length that fill a pass."""
    return max(1, size.micro_batch // (length + 2 * size.prompt + 2))


# ---------------------------------------------------------------------------------------------------------
# the phases


def decode(teacher, size, batch, context, matmul, graph=True):
    """The median step in which `batch` rows at this context get a token each. graph: by DecodeSteps, which is a CUDA
    graph on a GPU, or by transformers' generate."""
    from transformers import DynamicCache

    config, times = size.config, []
    prompts = [ids(context + 1) for _ in range(batch)]
    prompts[0] = prompts[0][1:]  # so that there is padding, as in a batch of several questions

    def prompts_read(*_, **__):
        """A cache as if all but the last token of the prompts had been read: what they were does not matter."""
        cache, heads = DynamicCache(config=config), config.num_key_value_heads
        shape = batch, heads, context, config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2)), layer)
        return cache

    def run():
        times.clear()
        generate(teacher, EndlessTokenizer(size), prompts, max_new_tokens=DECODED, temperature=0.7, seed=0)

    def timed(self, *arguments):
        times.append(time.perf_counter())  # every step before it is done: that all rows have ended was asked
        return log_softmax(self, *arguments)

    can_batch(teacher, EndlessTokenizer(size).pad_token_id)  # measured once for a model, by generate as it is
    log_softmax, suits = _LogprobRecorder.log_softmax, decode_steps.suits
    with (mock.patch("rlt.rollout._read_prompts_once", prompts_read),
          mock.patch("rlt.decode_steps.suits", lambda *model: graph and suits(*model)),
          mock.patch.object(_LogprobRecorder, "log_softmax", timed)):
        peak = peak_bytes(run, teacher)
        if not CUDA:  # again, without counting bytes
            run()
    step = statistics.median(end - start for start, end in zip(times[1:], times[2:], strict=False))
    return dict(seconds=step, tokens_per_s=batch / step, of_matmul=batch / step * flops(config, [1], [1]) / matmul,
                peak_gb=peak / 1e9, graph=graph and CUDA and suits(teacher, EndlessTokenizer(size).pad_token_id))


def median_step(engine, prompts):
    """Seconds of a step of a VLLMEngine: nearly all are those in which every prompt gets a token."""
    times, step = [], engine.llm.llm_engine.step

    def timed_step():
        times.append(time.perf_counter())
        return step()

    with mock.patch.object(engine.llm.llm_engine, "step", timed_step):
        engine.generate(prompts, max_new_tokens=DECODED_BY_VLLM, temperature=0.7, key=(0,))
    return statistics.median(end - start for start, end in zip(times, times[1:], strict=False))


def decode_by_vllm(size, shapes, matmul):
    """As decode, by vLLM with an adapter: a dict for each (context, batch). Fewer rows where its cache has no room."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = save_folders(size.config, WIDE, folder)
        longest = max(context for context, _ in shapes) + DECODED_BY_VLLM
        engine = VLLMEngine(folder, EndlessTokenizer(size), bits=WIDE, device=DEVICE, load_format="dummy",
                            max_model_len=longest, stop_ids=[size.vocab], lora_rank=RANK)
        engine.load_adapter_folder(adapter)
    limits = engine.llm.llm_engine.vllm_config
    cached, most, results = limits.cache_config.kv_cache_size_tokens, limits.scheduler_config.max_num_seqs, []
    for context, batch in shapes:
        batch = min(batch, most, cached // (context + DECODED_BY_VLLM))
        step = median_step(engine, torch.randint(1, 1000, (batch, context)).tolist())  # no two share their cache
        results.append(dict(context=context, batch=batch, seconds=step, tokens_per_s=batch / step,
                            of_matmul=batch / step * flops(size.config, [1], [1]) / matmul,
                            peak_gb=torch.cuda.max_memory_allocated() / 1e9 if CUDA else None))
    return results


def measure_vllm(log, size, shapes, matmul):
    """Rollouts by vLLM, in a process that leaves the GPU's memory at its end -> the rows logged."""
    what = dict(part="rollout", engine="vllm")
    if importlib.util.find_spec("vllm") is None:
        return [log(**what, skipped=f"vLLM is not installed: {INSTALL}")]
    gc.collect()
    torch.cuda.empty_cache()
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results = process.submit(decode_by_vllm, size, shapes, matmul).result()
    except (UserError, torch.OutOfMemoryError) as error:
        return [log(**what, failed=str(error))]
    return [log(**what, **result) for result in results]


def measured(function, work, tokens, matmul, *resident):
    peak = peak_bytes(function, *resident)  # and a warm-up
    took = seconds(function)
    return dict(seconds=took, tokens_per_s=tokens / took, of_matmul=work / took / matmul, peak_gb=peak / 1e9)


def score(teacher, student, size, length, count, matmul):
    rows = [scoring_row(size, length)] * count
    told, seen = 2 * size.prompt + length, 2 * size.prompt + length + 2
    work = flops(size.config, [told] * count, [length] * count)
    work += flops(size.config, [seen] * count, [length + size.prompt] * count)

    def run():
        score_explanations(teacher, student, rows, temperature=0.7, vocab=size.vocab, kl="sampled",
                           micro_batch_tokens=size.micro_batch)

    return measured(run, work, count * length, matmul, teacher, student)


def log_probs(teacher, size, length, count):
    row = scoring_row(size, length)
    return completion_logprobs(teacher, [row.teacher_prompt] * count, [row.thought + row.teacher_end] * count,
                               temperature=0.7, vocab=size.vocab)[0]


def reference(teacher, size, length, count, matmul):
    def run():
        with lora.use_adapter(teacher, "reference"):
            log_probs(teacher, size, length, count)

    work = flops(size.config, [2 * size.prompt + length] * count, [length] * count)
    return measured(run, work, count * length, matmul, teacher)


def backward(teacher, size, length, count):
    """One micro-batch of train_rlt's update."""
    teacher.train()
    policy = log_probs(teacher, size, length, count)
    loss, _ = grpo_loss(policy, policy.detach(), policy.detach(), torch.linspace(-1, 1, count, device=DEVICE),
                        torch.tensor([length] * count), denominator=count, beta=0.04)
    loss.backward()
    teacher.eval()


def update(teacher, optimizer, size, length, count, matmul):
    """Parameters: 2 forward, 2 backward; attention: 1 forward, 2 backward; the head: as parameters."""
    config, told = size.config, [2 * size.prompt + length] * count
    work = 2 * flops(config, told, [length] * count)
    work += 2 * config.hidden_size * config.num_hidden_layers * sum(n * n for n in told)

    def run():
        backward(teacher, size, length, count)
        optimizer.zero_grad()

    return measured(run, work, count * length, matmul, teacher)


def peak_of_update(teacher, optimizer, size, length, count):
    """Bytes of two micro-batches, the second with the first one's gradients, and the optimizer's step."""
    def run():
        backward(teacher, size, length, count)
        backward(teacher, size, length, count)
        torch.nn.utils.clip_grad_norm_(lora.adapter_parameters(teacher), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return peak_bytes(run, teacher)


def expected_bytes(size, teacher_bits, student_bits, *, length, count, batch, offloaded=False, own_steps=True):
    """{phase: bytes} that --dry-run expects of whole_step. own_steps: by DecodeSteps, not by transformers' generate."""
    read = 2 if own_steps else 1  # tokens of the prompt that are read at once: what matters is the last step
    teacher = ModelFootprint(size.config, bits=teacher_bits, gpu=CUDA, rank=RANK, trained="adapter", reference=True)
    student = ModelFootprint(size.config, bits=student_bits, gpu=CUDA)
    table = phases(teacher, student, vocab=size.vocab, tokens=count * (length + 2 * size.prompt + 2), scored=True,
                   learned=True, reference=True, rollout=(batch, read, length + DECODED + 1 - read),
                   checkpointing=True, offloaded=offloaded)
    return {phase: numbers["total"] for phase, numbers in table.items()}


def whole_step(log, size, teacher_bits, student_bits, matmul, *, length, count, batch, offloaded=False, decoded=(),
               **what):
    """Log peak and speed of every phase, and the peak that --dry-run expects.

    count: rows of a pass. batch: rows of a rollout. matmul: FLOP/s of a product, None to leave the speed out. decoded:
    contexts and rows of decode steps that are also timed, as a CUDA graph and without. what: to log of each phase.
    """
    shape = dict(length=length, count=count, batch=batch)
    expected = expected_bytes(size, teacher_bits, student_bits, offloaded=offloaded, **shape)
    teacher, optimizer = make_teacher(size.config, teacher_bits)
    student = random_model(size.config, student_bits)
    rate = matmul or float("inf")

    def updated():
        speed = update(teacher, optimizer, size, length, count, rate)
        return speed | {"peak_gb": peak_of_update(teacher, optimizer, size, length, count) / 1e9}

    run = {
        "score": lambda: score(teacher, student, size, length, count, rate),
        "rollout": lambda: decode(teacher, size, batch, length, rate),
        "reference": lambda: reference(teacher, size, length, count, rate),
        "update": updated,
    }
    for phase, measure in run.items():
        student.to(DEVICE if phase == "score" or not offloaded else "cpu")

        def compare(phase=phase, measure=measure):
            result = measure()
            if matmul is None:
                result = {"peak_gb": result["peak_gb"]}
            if not CUDA:  # there, what exists beside the models of a phase is not counted
                others = 2 * sum(p.nbytes for p in lora.adapter_parameters(teacher))
                others += model_bytes(student) * (phase != "score" and not offloaded)
                result["peak_gb"] += others / 1e9
            expectation = expected[phase] / 1e9
            return result | {"expected_gb": expectation, "ratio": expectation / result["peak_gb"]}

        log.attempt(compare, **what, teacher_bits=teacher_bits, student_bits=student_bits, offload_student=offloaded,
                    length=length, phase=phase)
    for (context, rows), graph in itertools.product(decoded, (True, False)):
        log.attempt(lambda c=context, n=rows, g=graph: decode(teacher, size, n, c, rate, g), part="decode",
                    teacher_bits=teacher_bits, context=context, batch=rows)


# ---------------------------------------------------------------------------------------------------------
# the recipe


def between(points, x):
    """The line through measured points (x, y), level below the first and above the last."""
    points = sorted(points)
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def recipe(log, size, rows):
    """Hours of the paper's 125 steps, if every completion had the mean length: seconds a token, interpolated.

    No completion waits for a longer one: rlt.dry_run.expected_hours adds that.
    """
    done = [row for row in rows if "tokens_per_s" in row]

    def points(part, at="length", **only):
        return [(row[at], 1 / row["tokens_per_s"]) for row in done
                if row["part"] == part and all(row[key] == value for key, value in only.items())]

    engines = sorted({row["engine"] for row in done if row["part"] == "rollout"}) or ["transformers"]
    students = sorted({row["student_bits"] for row in done if row["part"] == "score"})
    for engine, bits in itertools.product(engines, students):
        asked = dict(part="recipe", engine=engine, student_bits=bits)
        measured = {"rollout": points("rollout", at="context", engine=engine), "reference": points("reference"),
                    "score": points("score", student_bits=bits), "update": points("update")}
        if not all(measured.values()):
            log(**asked, failed=f"not measured: {', '.join(part for part in measured if not measured[part])}")
            continue
        for mean in (size.lengths[0], 2 * size.lengths[0], size.lengths[1], 2 * size.lengths[1]):
            seconds_a_token = {part: between(measured[part], mean) for part in ("score", "reference", "update")}
            contexts = [2 * size.prompt + mean * (i + 0.5) / 64 for i in range(64)]  # while it is sampled
            seconds_a_token["rollout"] = sum(between(measured["rollout"], context) for context in contexts) / 64
            hours = {f"h_{part}": COMPLETIONS * mean * value / 3600 for part, value in seconds_a_token.items()}
            log(**asked, length=mean, **hours, h_total=sum(hours.values()),
                h_without_rollout=sum(hours.values()) - hours["h_rollout"], h_paper=PAPER)


# ---------------------------------------------------------------------------------------------------------


def measure_phases(log, size, parts, students, matmul):
    """rollout, score, reference and update at all lengths -> the rows logged. students: bits of each to score with."""
    rows = []
    teacher, optimizer = make_teacher(size.config, WIDE)
    counts = {length: rows_of(size, length) for length in size.lengths}
    if "rollout" in parts:
        for context in size.lengths:
            batch = max(1, size.cached // context)
            rows.append(log.attempt(lambda c=context, b=batch: decode(teacher, size, b, c, matmul),
                                    part="rollout", engine="transformers", context=context, batch=batch))
    for bits in students if "score" in parts else ():
        student = random_model(size.config, bits)
        for length, count in counts.items():
            rows.append(log.attempt(lambda n=length, c=count, s=student: score(teacher, s, size, n, c, matmul),
                                    part="score", student_bits=bits, length=length, rows=count))
        del student
    for length, count in counts.items():
        if "reference" in parts:
            rows.append(log.attempt(lambda n=length, c=count: reference(teacher, size, n, c, matmul),
                                    part="reference", length=length, rows=count))
        if "update" in parts:
            rows.append(log.attempt(lambda n=length, c=count: update(teacher, optimizer, size, n, c, matmul),
                                    part="update", length=length, rows=count))
    return rows


def open_log(path, size, script):
    """A Log whose lines say the machine, the models' size, the commit and the command."""
    command = " ".join([f"python bench/{script}", *sys.argv[1:]])
    return Log(path, size=size, **machine("peft", "bitsandbytes"), seed=0, git=describe(argparse.Namespace())["git"],
               command=command)


def main():
    choices = ("rollout", "score", "reference", "update", "step", "recipe")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="7b", help="of the models")
    parser.add_argument("--parts", nargs="+", choices=choices, default=choices, help="what to measure")
    parser.add_argument("--out", default=LOGS / "bench_step.jsonl", help="JSONL to append to")
    args = parser.parse_args()
    if not CUDA and args.size != "tiny":
        parser.error(f"--size {args.size} needs a CUDA GPU, and there is none here: pass --size tiny")
    torch.manual_seed(0)
    size, log, matmul = size_of(args.size), open_log(args.out, args.size, "step.py"), matmul_rate()
    log(part="ceiling", matmul_tflop_s=matmul / 1e12)
    quantised = (4,) if can_quantise() else ()
    rows = measure_phases(log, size, args.parts, (WIDE, *quantised), matmul)
    gc.collect()
    if "step" in args.parts:
        length = size.lengths[-1]
        shape = dict(matmul=None, part="step", length=length, count=1, batch=max(1, size.cached // length // 2))
        whole_step(log, size, WIDE, WIDE, **shape)
        for bits in quantised:
            whole_step(log, size, WIDE, bits, offloaded=True, **shape)
            whole_step(log, size, bits, bits, offloaded=True, **shape)
    if "rollout" in args.parts:
        rows += measure_vllm(log, size, [(n, max(1, size.cached // n)) for n in size.lengths], matmul)
    if "recipe" in args.parts:
        recipe(log, size, rows)


if __name__ == "__main__":
    main()
