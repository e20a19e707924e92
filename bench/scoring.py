# SPDX-License-Identifier: MIT
"""
Measure the reward on this machine against everything else that computes it.

    python bench/scoring.py                    reduce, hidden, scoring (a few minutes on a CPU)
    python bench/scoring.py --parts tiles      only the search for the kernels' tile

Parts    reduce    logits to four numbers a token (`token_stats`), and to two (`token_logprobs`)
         hidden    hidden states to the KL of a token: the chunked head included
         scoring   `score_explanations` and the released code's way of it, at Qwen2.5-7B's dimensions
         tiles     the row kernels' tiles at V = 152,064, for `meta_parameters`

Each measurement is a line of JSON, printed and appended to --out. Liger and TRL are measured on a GPU where they are
installed: pip install liger-kernel==0.8.5 trl==1.16.0. What is missing is named; running out of memory is a result.
"""

import argparse
import functools
import gc
import multiprocessing
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rlt  # noqa: E402,F401  before torch: it sets how OpenMP's threads wait

import torch  # noqa: E402
from measure import (  # noqa: E402
    CUDA,
    DEVICE,
    DTYPE,
    LOGS,
    Log,
    copy_bandwidth,
    machine,
    matmul_rate,
    milliseconds,
)

import rewards  # noqa: E402
from rewards import LOGITS_CHUNK, Row, score_explanations, token_logprobs, token_stats  # noqa: E402

HIDDEN = 3584 if CUDA else 64  # of Qwen2.5-7B


def measured(function):
    """(result, ms, peak MB above what was allocated); without enough memory (None, None, None)."""
    try:
        result = function()  # compiles
        if not CUDA:
            return result, milliseconds(function), None
        del result
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before  # read here: timing takes memory of its own
        return result, milliseconds(function), peak / 1e6
    except torch.OutOfMemoryError:
        return None, None, None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------
# other implementations


def eager_stats(teacher, student, ids):
    """The definitions, in float32, as one would write them in torch."""
    t, s = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p, ids = t.exp(), ids[:, None]
    return (p * (t - s)).sum(-1), t.gather(1, ids)[:, 0], s.gather(1, ids)[:, 0], -(p * t).sum(-1)


def eager_logprobs(logits, ids):
    z = logits.float().log_softmax(-1)
    return z.gather(1, ids[:, None])[:, 0], -(z.exp() * z).sum(-1)


def eager_hidden(teacher, teacher_head, student, student_head):
    t = (teacher @ teacher_head.T).float().log_softmax(-1)
    s = (student @ student_head.T).float().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1)


@functools.cache
def other_packages():
    """{kind: {name: function}} of Liger and TRL, where they are installed and there is a GPU for them."""
    found = {"stats": {}, "logprobs": {}, "hidden": {}}
    if not CUDA:
        return found
    try:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
        from liger_kernel.transformers import LigerKLDIVLoss

        def liger_kl(teacher, student, ids):
            kl = LigerKLDIVLoss(reduction="none", log_target=True)
            return kl(student.float().log_softmax(-1), teacher.float().log_softmax(-1)).sum(-1),

        def liger_logprobs(logits, ids):  # it skips the last of L + 1 positions: one more row, never read
            rows = logits.as_strided((1, len(logits) + 1, logits.shape[1]), (1, *logits.stride()))
            return fused_selective_log_softmax(rows, ids[None], 1.0)[0],

        found["stats"]["liger"], found["logprobs"]["liger"] = liger_kl, liger_logprobs
    except ImportError as error:
        print(f"not measured: Liger ({error})", file=sys.stderr)
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        def trl_hidden(teacher, teacher_head, student, student_head):
            models = student, student_head, None, teacher, teacher_head, None
            return ChunkedDivergenceFunction.apply(*models, 0.0)[0]

        def trl_logprobs(logits, ids):
            logprobs, entropy = selective_log_softmax_and_entropy(logits[None], ids[None])
            return logprobs[0], entropy[0]

        found["logprobs"]["trl"], found["hidden"]["trl"] = trl_logprobs, trl_hidden
    except ImportError as error:
        print(f"not measured: TRL ({error})", file=sys.stderr)
    return found


def error(got, want):
    """The largest error over max(1, |value|) and over all numbers that `got` has."""
    errors = ((g.double() - w).abs() / w.abs().clamp(min=1) for g, w in zip(got, want, strict=False))
    return max(x.max().item() for x in errors)


# ---------------------------------------------------------------------------------------------------------
# logits to numbers


@torch.no_grad()
def reduce(log, tokens, vocab, dtype, copy):
    """copy: bytes/s of a copy, which the kernels' reads are a share of."""
    padded = torch.randn(2, tokens + 1, vocab, device=DEVICE, dtype=dtype)  # a row more, for liger_logprobs
    padded[0].mul_(4)
    padded[1].add_(padded[0])
    teacher, student = padded[:, :tokens]
    ids = torch.randint(vocab, (tokens,), device=DEVICE)
    sample = torch.randint(tokens, (16,), device=DEVICE)
    torch._dynamo.reset()
    cases = {
        "stats": ((teacher, student, ids), {
            "eager": eager_stats, "compile": torch.compile(eager_stats, dynamic=False), **other_packages()["stats"],
            "ours": token_stats}),
        "logprobs": ((teacher, ids), {
            "eager": eager_logprobs, "compile": torch.compile(eager_logprobs, dynamic=False),
            **other_packages()["logprobs"], "ours": token_logprobs}),
    }
    for kind, (inputs, implementations) in cases.items():
        rows = [x[sample].double() if x.is_floating_point() else x[sample] for x in inputs]
        want = (token_stats if kind == "stats" else token_logprobs)(*rows, impl="torch")
        read = sum(x.nbytes for x in inputs)
        for name, function in implementations.items():
            got, ms, peak = measured(functools.partial(function, *inputs))
            result = {}
            if ms:
                speed = read / ms * 1000
                result = dict(gb_s=speed / 1e9, of_copy=speed / copy, numbers=len(got),
                              error=error([x[sample] for x in got], want))
            log(part="reduce", kind=kind, impl=name, tokens=tokens, vocab=vocab, dtype=str(dtype)[6:], ms=ms,
                peak_mb=peak, **result)
            del got


# ---------------------------------------------------------------------------------------------------------
# hidden states to the KL


@torch.no_grad()
def hidden(log, tokens, vocab, matmul):
    """matmul: FLOP/s of a product, which the heads' products are a share of."""
    head = torch.randn(vocab, HIDDEN, device=DEVICE, dtype=DTYPE) / HIDDEN**0.5 * 3
    teacher, student = torch.randn(2, tokens, HIDDEN, device=DEVICE, dtype=DTYPE)
    student.mul_(0.3).add_(teacher)  # and the same head: a KL of about one nat
    inputs = teacher, head, student, head
    sample = torch.randint(tokens, (16,), device=DEVICE)
    logits = [x[sample].double() @ head.double().T for x in (teacher, student)]
    want = token_stats(*logits, sample, impl="torch")
    for name, function in {"eager": eager_hidden, "ours": chunked_head, **other_packages()["hidden"]}.items():
        got, ms, peak = measured(functools.partial(function, *inputs))
        result = {}
        if ms:
            result = dict(of_matmul=4 * tokens * vocab * HIDDEN / ms * 1000 / matmul, error=error([got[sample]], want))
        log(part="hidden", impl=name, tokens=tokens, vocab=vocab, hidden=HIDDEN, dtype=str(DTYPE)[6:], ms=ms,
            peak_mb=peak, **result)
        del got


def chunked_head(teacher, teacher_head, student, student_head):
    """What score_explanations does between the hidden states and the reward."""
    heads = (teacher_head, None), (student_head, None)
    buffers = [rewards.logits_buffer(head, LOGITS_CHUNK) for head in heads]
    ids = torch.zeros(len(teacher), dtype=torch.long, device=DEVICE)
    kl = []
    for c in rewards.chunk_slices(len(teacher), LOGITS_CHUNK):
        logits = [rewards.compute_logits(states[c], head, buffer)
                  for states, head, buffer in zip((teacher, student), heads, buffers, strict=True)]
        kl.append(token_stats(*logits, ids[c]).kl)
    return torch.cat(kl)


# ---------------------------------------------------------------------------------------------------------
# two models to rewards


def make_model(seed):
    """Random weights: on a GPU Qwen2.5-7B's dimensions in bfloat16, on a CPU small ones."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
                 num_key_value_heads=4, vocab_size=152_064, rope_theta=1e6, max_position_embeddings=32_768)
    if not CUDA:
        sizes = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=32_000)
    torch.manual_seed(seed)
    torch.set_default_dtype(DTYPE)
    with DEVICE:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    torch.set_default_dtype(torch.float32)
    return model


def scoring_rows(length, count):
    """Rows whose sequences have `length` tokens for both models: five eighths thought, a quarter solution."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(1000, (n,), generator=generator).tolist()

    thought, solution = 5 * length // 8, length // 4
    return [Row(ids(length - thought - 1), ids(thought), ids(1), ids(length - thought - solution - 4), ids(4),
                ids(solution)) for _ in range(count)]


@torch.no_grad()
def released_way(teacher, student, rows, lam=3.0, alpha=0.01, temperature=0.7):
    """One sequence at a time: full logits of both models, two log-softmaxes, caches flushed after each."""
    out = []
    for row in rows:
        p, q, n, m = len(row.teacher_prompt), len(row.student_prompt), len(row.thought), len(row.solution)
        ids_s = torch.tensor([row.student_prompt + row.thought + row.bridge + row.solution], device=DEVICE)
        ids_t = torch.tensor([row.teacher_prompt + row.thought + row.teacher_end], device=DEVICE)
        s, t = (torch.log_softmax(model(ids).logits[:, :-1].float() / temperature, -1)
                .gather(2, ids[:, 1:, None])[0, :, 0] for model, ids in ((student, ids_s), (teacher, ids_t)))
        score = s[-m:].mean() + alpha * s[-m:].min()
        log_ratio = t[p - 1:p - 1 + n] - s[q - 1:q - 1 + n]
        out.append(score - lam * (log_ratio.mean() + alpha * log_ratio.max()))
        del s, t
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return torch.stack(out)


def our_way(teacher, student, rows, kl="exact"):
    return score_explanations(teacher, student, rows, kl=kl, temperature=0.7,
                              head_chunk=LOGITS_CHUNK if CUDA else 64).reward.reward


WAYS = {"released": released_way, "ours": our_way, "ours, sampled": functools.partial(our_way, kl="sampled")}


def flops(config, length, rows):
    """Of both models for all rows: the layers' products and causal attention, the heads where they are needed."""
    h, layers = config.hidden_size, config.num_hidden_layers
    kv = h * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * (2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size) + 2 * h * length  # a token
    needed = sum(2 * len(r.thought) + len(r.teacher_end) + len(r.solution) for r in rows)
    return 2 * layers * layer * length * len(rows) + 2 * h * config.vocab_size * needed


def scoring(log, matmul):
    total, lengths = (16_384, (1024, 4096, 16_384)) if CUDA else (4096, (512, 2048))
    teacher, student = make_model(0), make_model(1)
    for length in lengths:
        rows = scoring_rows(length, total // length)
        for way, function in WAYS.items():
            got, ms, peak = measured(functools.partial(function, teacher, student, rows))
            result = {}
            if ms:
                result = dict(tokens_per_s=2 * total / ms * 1000, reward=got.mean().item(),
                              of_matmul=flops(teacher.config, length, rows) / ms * 1000 / matmul)
            log(part="scoring", impl=way, length=length, rows=len(rows), ms=ms,
                peak_mb=peak if CUDA else peak_on_cpu(way, length, len(rows)), **result)


def peak_on_cpu(*arguments):
    """Peak MB above the weights, of a fresh process whose large blocks go back to the system when freed."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_peak_on_cpu, arguments)
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _peak_on_cpu(way, length, count):
    torch.set_num_threads(1)
    teacher, student = make_model(0), make_model(1)
    WAYS[way](teacher, student, scoring_rows(64, 1))  # imports and pools, before memory is watched
    before, _ = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    WAYS[way](teacher, student, scoring_rows(length, count))
    return resident()[1] - before


def resident():
    """(now, peak) MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return [int(fields[name].split()[0]) / 1000 for name in ("VmRSS", "VmHWM")]


# ---------------------------------------------------------------------------------------------------------
# the tile


@torch.no_grad()
def tiles(log, copy):
    default = rewards.meta_parameters
    for dtype in (torch.bfloat16, torch.float32):
        teacher, student = torch.randn(2, 4096, 152_064, device=DEVICE, dtype=dtype)
        ids = torch.randint(152_064, (4096,), device=DEVICE)
        for kind, inputs, function in (("stats", (teacher, student, ids), token_stats),
                                       ("logprobs", (teacher, ids), token_logprobs)):
            for num_warps in (2, 4, 8, 16):
                for rows in (1, 2, 4, 8):
                    rewards.meta_parameters = functools.partial(default, num_warps=num_warps, rows=rows)
                    ms = milliseconds(functools.partial(function, *inputs))
                    speed = sum(x.nbytes for x in inputs) / ms * 1000
                    log(part="tiles", kind=kind, dtype=str(dtype)[6:], num_warps=num_warps, rows=rows, ms=ms,
                        gb_s=speed / 1e9, of_copy=speed / copy)
    rewards.meta_parameters = default


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=("reduce", "hidden", "scoring", "tiles"),
                        default=["reduce", "hidden", "scoring"], help="what to measure")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16_384] if CUDA else [64, 256],
                        help="tokens of reduce and hidden")
    parser.add_argument("--vocab", nargs="+", type=int, help="columns of reduce and hidden",
                        default=[32_000, 128_256, 151_936, 152_064, 256_000] if CUDA else [32_000, 152_064])
    parser.add_argument("--out", default=LOGS / "bench_rewards.jsonl", help="JSONL to append to")
    args = parser.parse_args()
    if not CUDA:
        print("no GPU: these are figures of a CPU, of torch against torch.compile", file=sys.stderr)
    log = Log(args.out, **machine("liger-kernel", "trl"))
    copy, matmul = copy_bandwidth(), matmul_rate()
    log(part="ceilings", copy_gb_s=copy / 1e9, matmul_tflop_s=matmul / 1e12)
    for part in args.parts:
        if part == "scoring":
            scoring(log, matmul)
        elif part == "tiles":
            tiles(log, copy)
        else:
            for dtype in (torch.bfloat16, torch.float32) if part == "reduce" else (None,):
                for vocab in args.vocab:
                    for tokens in args.tokens:
                        if part == "reduce":
                            reduce(log, tokens, vocab, dtype, copy)
                        else:
                            hidden(log, tokens, vocab, matmul)


if __name__ == "__main__":
    main()
