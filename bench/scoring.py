"""
Measure the reward on this machine against everything else that computes it. One command, one run:

    python tests/bench_rewards.py                    reduce, hidden, scoring (a few minutes on a CPU)
    python tests/bench_rewards.py --parts tiles      only the search for the kernels' tile

Parts    reduce    logits to four numbers a token (`token_stats`), and to two (`token_logprobs`)
         hidden    hidden states to the KL a token: the chunked head included
         scoring   `score_explanations` against the released code's way, at Qwen2.5-7B's dimensions
         tiles     the row kernels' tiles at V = 152,064, for `meta_parameters`

Each measurement is a line of JSON, printed and appended to --out. The rivals are optional packages:
pip install liger-kernel==0.8.5 trl==1.16.0. What is missing is named; running out of memory is a result.
"""

import argparse
import datetime
import functools
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402
from rewards import Row, score_explanations, token_logprobs, token_stats  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HIDDEN = 3584 if CUDA else 64  # of Qwen2.5-7B


# ----------------------------------------------------------------------------------------------------------
# Measuring


def milliseconds(function):
    if CUDA:
        import triton
        return triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


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
        return result, milliseconds(function), (torch.cuda.max_memory_allocated() - before) / 1e6
    except torch.cuda.OutOfMemoryError:
        return None, None, None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def machine():
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    versions = {}
    for package in ("torch", "triton", "transformers", "liger-kernel", "trl"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name() if CUDA else cpu
    return {"device": name, **versions, "date": datetime.date.today().isoformat()}


def log(**entry):
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()}
    print(json.dumps(rounded), flush=True)
    with open(args.out, "a") as file:
        file.write(json.dumps({**rounded, **MACHINE}) + "\n")


def copy_bandwidth():
    """GB/s of a copy on the device, read and written bytes counted: the ceiling of a kernel that reads."""
    source = torch.randn((2**31 if CUDA else 2**27) // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def matmul_rate():
    """TFLOP/s of a square bf16 product on a GPU, fp32 on a CPU."""
    n = 8192 if CUDA else 1024
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32)
    return 2 * n**3 / milliseconds(lambda: a @ b) / 1e9


# ----------------------------------------------------------------------------------------------------------
# Logits to numbers


def eager_stats(teacher, student, ids):
    """The definitions, in float32, as one would write them in torch."""
    t, s = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p, ids = t.exp(), ids[:, None]
    return (p * (t - s)).sum(-1), t.gather(1, ids)[:, 0], s.gather(1, ids)[:, 0], -(p * t).sum(-1)


def eager_logprobs(logits, ids):
    z = logits.float().log_softmax(-1)
    return z.gather(1, ids[:, None])[:, 0], -(z.exp() * z).sum(-1)


def rivals():
    """{package: {kind: {name: function}}} of the optional packages that are there; the others are named."""
    found = {}
    try:
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
        from liger_kernel.transformers import LigerKLDIVLoss

        def liger_kl(teacher, student, ids):
            kl = LigerKLDIVLoss(reduction="none", log_target=True)
            return kl(student.float().log_softmax(-1), teacher.float().log_softmax(-1)).sum(-1),

        def liger_logprobs(logits, ids):  # it skips the last of L + 1 positions: one more row, never read
            rows = logits.as_strided((1, len(logits) + 1, logits.shape[1]), (1, *logits.stride()))
            return fused_selective_log_softmax(rows, ids[None], 1.0)[0],

        found["liger-kernel"] = {"stats": {"liger": liger_kl}, "logprobs": {"liger": liger_logprobs}}
    except ImportError as error:
        print(f"skipped: Liger ({error})", file=sys.stderr)
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
        from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

        def trl_hidden(teacher, teacher_head, student, student_head):
            models = student, student_head, None, teacher, teacher_head, None
            return ChunkedDivergenceFunction.apply(*models, 0.0)[0]

        def trl_logprobs(logits, ids):
            logprobs, entropy = selective_log_softmax_and_entropy(logits[None], ids[None])
            return logprobs[0], entropy[0]

        found["trl"] = {"logprobs": {"trl": trl_logprobs}, "hidden": {"trl": trl_hidden}}
    except ImportError as error:
        print(f"skipped: TRL ({error})", file=sys.stderr)
    if CUDA and len(found) < 2:
        sys.exit("a GPU run without both rivals says little: pip install liger-kernel==0.8.5 trl==1.16.0")
    return found


def of_rivals(kind):
    return {name: f for rival in RIVALS.values() for name, f in rival.get(kind, {}).items()} if CUDA else {}


def error(got, want):
    """The largest error over max(1, |value|) and over all numbers that `got` has."""
    errors = ((g.double() - w).abs() / w.abs().clamp(min=1) for g, w in zip(got, want, strict=False))
    return max(x.max().item() for x in errors)


@torch.no_grad()
def reduce():
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in args.vocab:
            for tokens in args.tokens:
                reduce_at(tokens, vocab, dtype)


def reduce_at(tokens, vocab, dtype):
    padded = torch.randn(2, tokens + 1, vocab, device=DEVICE, dtype=dtype)  # a row more, for liger_logprobs
    padded[0].mul_(4)
    padded[1].add_(padded[0])
    teacher, student = padded[:, :tokens]
    ids = torch.randint(vocab, (tokens,), device=DEVICE)
    sample = torch.randint(tokens, (16,), device=DEVICE)
    torch._dynamo.reset()
    cases = {
        "stats": ((teacher, student, ids), {
            "eager": eager_stats, "compile": torch.compile(eager_stats, dynamic=False), **of_rivals("stats"),
            "ours": token_stats}),
        "logprobs": ((teacher, ids), {
            "eager": eager_logprobs, "compile": torch.compile(eager_logprobs, dynamic=False),
            **of_rivals("logprobs"), "ours": token_logprobs}),
    }
    for kind, (inputs, implementations) in cases.items():
        rows = [x[sample].double() if x.is_floating_point() else x[sample] for x in inputs]
        want = (token_stats if kind == "stats" else token_logprobs)(*rows, impl="torch")
        moved = sum(x.nbytes for x in inputs)
        for name, function in implementations.items():
            got, ms, peak = measured(lambda f=function, inputs=inputs: f(*inputs))
            result = {}
            if ms:
                speed = moved / ms / 1e6
                result = dict(gb_s=speed, of_copy=speed / COPY, numbers=len(got),
                              error=error([x[sample] for x in got], want))
            log(part="reduce", kind=kind, impl=name, tokens=tokens, vocab=vocab, dtype=str(dtype)[6:], ms=ms,
                peak_mb=peak, **result)
            del got


# ----------------------------------------------------------------------------------------------------------
# Hidden states to the KL


@torch.no_grad()
def hidden():
    dtype = torch.bfloat16 if CUDA else torch.float32
    for vocab in args.vocab:
        head = torch.randn(vocab, HIDDEN, device=DEVICE, dtype=dtype) / HIDDEN**0.5 * 3
        for tokens in args.tokens:
            teacher, student = torch.randn(2, tokens, HIDDEN, device=DEVICE, dtype=dtype)
            student.mul_(0.3).add_(teacher)  # and the same head: a KL of about one nat
            inputs = teacher, head, student, head
            sample = torch.randint(tokens, (16,), device=DEVICE)
            wide = [x[sample].double() @ head.double().T for x in (teacher, student)]
            want = token_stats(*wide, sample, impl="torch")
            names = {"ours": chunked_head, "ours, bf16 logits": functools.partial(chunked_head, dtype=dtype),
                     **of_rivals("hidden")} if CUDA else {"ours": chunked_head}
            for name, function in {"eager": eager_hidden, **names}.items():
                got, ms, peak = measured(lambda f=function, x=inputs: f(*x))
                result = {}
                if ms:
                    result = dict(of_matmul=4 * tokens * vocab * HIDDEN / ms / 1e9 / MATMUL,
                                  error=error([got[sample]], want))
                log(part="hidden", impl=name, tokens=tokens, vocab=vocab, hidden=HIDDEN, dtype=str(dtype)[6:],
                    ms=ms, peak_mb=peak, **result)
                del got


def chunked_head(teacher, teacher_head, student, student_head, dtype=torch.float32, chunk=1024):
    """What score_explanations does between the backbones and the reward."""
    sides = [(states, (head, None), rewards._buffer((head, None), chunk, dtype))
             for states, head in ((teacher, teacher_head), (student, student_head))]
    ids = torch.zeros(len(teacher), dtype=torch.long, device=DEVICE)
    return torch.cat([
        token_stats(*(rewards._logits(states[c], head, buffer) for states, head, buffer in sides), ids[c]).kl
        for c in rewards._chunks(len(teacher), chunk)])


def eager_hidden(teacher, teacher_head, student, student_head):
    t = (teacher @ teacher_head.T).float().log_softmax(-1)
    s = (student @ student_head.T).float().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1)


# ----------------------------------------------------------------------------------------------------------
# Two models to rewards


def model(seed):
    """Random weights: on a GPU Qwen2.5-7B's dimensions in bf16, on a CPU small ones."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
                 num_key_value_heads=4, vocab_size=152_064, rope_theta=1e6, max_position_embeddings=32_768)
    if not CUDA:
        sizes = dict(hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=32_000)
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    with DEVICE:
        made = Qwen2ForCausalLM(Qwen2Config(**sizes)).eval()
    torch.set_default_dtype(torch.float32)
    return made


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
        seen = torch.tensor([row.student_prompt + row.thought + row.bridge + row.solution], device=DEVICE)
        told = torch.tensor([row.teacher_prompt + row.thought + row.teacher_end], device=DEVICE)
        s, t = (torch.log_softmax(model(x).logits[:, :-1].float() / temperature, -1)
                .gather(2, x[:, 1:, None])[0, :, 0] for model, x in ((student, seen), (teacher, told)))
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
                              head_chunk=1024 if CUDA else 64).reward.reward


WAYS = {"released": released_way, "ours": our_way, "ours, sampled": functools.partial(our_way, kl="sampled")}


def flops(config, length, rows):
    """Of both models for all rows: the backbones' products and causal attention, the heads where needed."""
    h, layers = config.hidden_size, config.num_hidden_layers
    kv = h * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * (2 * h * h + 2 * h * kv + 3 * h * config.intermediate_size) + 2 * h * length  # a token
    needed = sum(2 * len(r.thought) + len(r.teacher_end) + len(r.solution) for r in rows)
    return 2 * layers * layer * length * len(rows) + 2 * h * config.vocab_size * needed


def scoring():
    total, lengths = (16_384, (1024, 4096, 16_384)) if CUDA else (4096, (512, 2048))
    teacher, student = model(0), model(1)
    for length in lengths:
        rows = scoring_rows(length, total // length)
        for way, function in WAYS.items():
            got, ms, peak = measured(lambda f=function, rows=rows: f(teacher, student, rows))
            result = {}
            if ms:
                result = dict(tokens_per_s=2 * total / ms * 1000, reward=got.mean().item(),
                              of_matmul=flops(teacher.config, length, rows) / ms / 1e9 / MATMUL)
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
    teacher, student = model(0), model(1)
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


# ----------------------------------------------------------------------------------------------------------
# The tile


@torch.no_grad()
def tiles():
    default = rewards.meta_parameters
    for dtype in (torch.bfloat16, torch.float32):
        teacher, student = torch.randn(2, 4096, 152_064, device=DEVICE, dtype=dtype)
        ids = torch.randint(152_064, (4096,), device=DEVICE)
        for kind, inputs, function in (("stats", (teacher, student, ids), token_stats),
                                       ("logprobs", (teacher, ids), token_logprobs)):
            for num_warps in (2, 4, 8, 16):
                for rows in (1, 2, 4, 8):
                    rewards.meta_parameters = functools.partial(default, num_warps=num_warps, rows=rows)
                    ms = milliseconds(lambda f=function, x=inputs: f(*x))
                    speed = sum(x.nbytes for x in inputs) / ms / 1e6
                    log(part="tiles", kind=kind, dtype=str(dtype)[6:], num_warps=num_warps, rows=rows, ms=ms,
                        gb_s=speed, of_copy=speed / COPY)
    rewards.meta_parameters = default


PARTS = {"reduce": reduce, "hidden": hidden, "scoring": scoring, "tiles": tiles}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["reduce", "hidden", "scoring"],
                        help="what to measure")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096, 16_384] if CUDA else [64, 256],
                        help="tokens of reduce and hidden")
    parser.add_argument("--vocab", nargs="+", type=int, help="columns of reduce and hidden",
                        default=[32_000, 128_256, 151_936, 152_064, 256_000] if CUDA else [32_000, 152_064])
    parser.add_argument("--out", default=ROOT / "figures/logs/bench_rewards.jsonl", help="JSONL to append to")
    args = parser.parse_args()

    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    MACHINE, RIVALS = machine(), rivals()
    if not CUDA:
        print("no GPU: these are figures of a CPU, of torch against torch.compile", file=sys.stderr)
    COPY, MATMUL = copy_bandwidth(), matmul_rate()
    log(part="ceilings", copy_gb_s=COPY, matmul_tflop_s=MATMUL)
    for part in args.parts:
        PARTS[part]()
