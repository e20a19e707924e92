"""
The Triton kernels: interpreted, on a GPU where there is one, and compiled for GPUs that are not here.

    python -m pytest tests/test_triton.py
    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py -o python_functions="kernel_*"   the kernels
"""

import functools
import json
import os
import subprocess
import sys

from rlt.logprobs import _HeadLogprobs

import pytest
import torch
from conftest import ROOT

import rewards
from rewards import rlt_reward, segment_stats, token_logprobs, token_stats

pytest.importorskip("triton", reason="triton is not installed: on Linux, pip install triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ----------------------------------------------------------------------------------------------------------
# Three ways to run what follows


def run_kernels(interpret):
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-o", "python_functions=kernel_*", "-x"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_kernels_in_the_interpreter():
    run_kernels(interpret=True)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the interpreter runs the same tests"
)
def test_kernels_on_the_gpu():
    run_kernels(interpret=False)


COMPILE = """
import json, os, re, subprocess, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
sys.path.insert(0, sys.argv[1])
import rewards

V = 152_064
row = {"out": "*fp32", "ids": "*i64", "N": "i32"}
side = lambda name, dtype: {name: "*" + dtype, name[0] + "_stride": "i32", name[0] + "_scale": "fp32"}
one = lambda dtype: {**row, "logits": "*" + dtype, "stride": "i32", "scale": "fp32"}
two = lambda dtype: {**row, **side("teacher", dtype), **side("student", dtype)}
segments = {"out": "*fp32", "position": "*i64", "values": "*fp32", "starts": "*i64", "B": "i32"}
tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
for target in (80, 90, 100):
    for kernel, dtype, arguments, constants in (
            *((rewards._token_stats_kernel, d, two(d), {"VT": V, "VS": V}) for d in ("bf16", "fp16", "fp32")),
            *((rewards._token_logprobs_kernel, d, one(d), {"V": V}) for d in ("bf16", "fp32")),
            (rewards._segment_stats_kernel, "fp32", segments, {"LANES": 256})):
        tile = {} if "LANES" in constants else rewards.meta_parameters(4 if dtype == "fp32" else 2)
        warps = tile.pop("num_warps", 4)
        constants = {**constants, **tile}
        signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
        assert list(signature) == kernel.arg_names, (list(signature), kernel.arg_names)
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature)
                   if signature[name].startswith("*") or name.endswith("stride")}
        binary = compile(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
                         target=GPUTarget("cuda", target, 32), options={"num_warps": warps, "enable_fp_fusion": False})
        with open("kernel.cubin", "wb") as file:
            file.write(binary.asm["cubin"])
        used = subprocess.run([os.path.join(tools, "cuobjdump"), "--dump-resource-usage", "kernel.cubin"],
                              capture_output=True, text=True, check=True).stdout
        stack, registers = (int(re.search(name + r":(\\d+)", used)[1]) for name in ("STACK", "REG"))
        loop = re.search(r"(\\$L__BB0_\\d+):(.*)bra\\S* *\\t*\\1;", binary.asm["ptx"], re.DOTALL)[2]
        print(json.dumps(dict(
            kernel=kernel.__name__, dtype=dtype, target=target, stack=stack, registers=registers,
            shared=binary.metadata.shared, loads=re.findall(r"ld\\.global\\S*", loop),
            exchanges=len(re.findall(r"bar\\.sync|shfl", loop)))))
"""


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    """Default tile, V = 152,064: no spills, few registers, 16-byte loads, no exchange in loops."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(built) == 18
    for x in built:
        assert x["stack"] == 0 and x["registers"] <= 128, x
        assert x["shared"] <= {80: 166_912, 90: 232_448, 100: 232_448}[x["target"]], x
        assert x["exchanges"] == 0, x
        if x["kernel"] != "_segment_stats_kernel":
            assert x["loads"] and {load.split(".")[-2] for load in x["loads"]} == {"v4"}, x


# ----------------------------------------------------------------------------------------------------------
# The kernels' tests


def logits(n, v, dtype="float32", noise=1.0, spread=4.0, offset=(0.0, 0.0), seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, v, generator=generator) * spread
    student = teacher + torch.randn(n, v, generator=generator) * noise + offset[1]
    ids = torch.randint(v, (n,), generator=generator)
    return *((x.to(DTYPES[dtype]).to(DEVICE) for x in (teacher + offset[0], student))), ids.to(DEVICE)


def eager_stats(teacher, student, ids):
    """What a plain program would do, with all of its temporaries."""
    t, s = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p, ids = t.exp(), ids[:, None]
    return (p * (t - s)).sum(-1), t.gather(1, ids)[:, 0], s.gather(1, ids)[:, 0], -(p * t).sum(-1)


def assert_exact(got, want, allowed=()):
    """Errors over max(1, |value|) up to 1e-6, or eager float32's own; infinities and NaN in their places."""
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.dtype == torch.float32 and torch.equal(x.isnan(), y.isnan())
        wrong = torch.where((x == y) | y.isnan(), 0.0, (x - y).abs() / y.abs().clamp(min=1)).max().item()
        assert wrong <= max(1e-6, allowed[i] if allowed else 0), (i, wrong)


def assert_kernel(teacher, student, ids, temperatures=(1.0, 1.0), vocab=None, eager=False):
    """Both row kernels against float64 (which tests/test_rewards.py holds against the definitions)."""
    exact = [x.double() for x in (teacher, student)]
    options = dict(teacher_temperature=temperatures[0], student_temperature=temperatures[1], vocab=vocab)
    want = token_stats(*exact, ids, **options, impl="torch")
    allowed = ()
    if eager:
        scaled = [x.float() / t for x, t in zip((teacher, student), temperatures, strict=True)]
        allowed = [
            ((x - y).abs() / y.abs().clamp(min=1)).max().item()
            for x, y in zip(eager_stats(*scaled, ids), want, strict=True)
        ]
    got = token_stats(teacher, student, ids, **options, impl="triton")
    assert_exact(got, want, allowed)
    for side, columns, temperature in ((0, (1, 3), temperatures[0]), (1, (2,), temperatures[1])):
        alone = token_logprobs(
            (teacher, student)[side], ids, temperature=temperature, vocab=vocab, impl="triton"
        )
        assert_exact(
            alone[: len(columns)], [want[i] for i in columns], [allowed[i] for i in columns] if eager else ()
        )
    return got


@pytest.mark.parametrize("n, v", [(1, 1), (1, 7), (2, 50), (1, 1024), (1, 4096), (2, 4099)])
@pytest.mark.parametrize("dtype", DTYPES)
def kernel_is_exact_at_any_shape(n, v, dtype):
    assert_kernel(*logits(n, v, dtype), (0.7, 1.3), eager=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "noise, spread, offset",
    [
        (0.01, 4, (0, 0)),
        (1, 4, (40, -40)),
        (1, 4, (1e4, 1e4)),
        (1, 4, (1e4, -1e4)),
        (2, 10, (0, 0)),
        (1, 100, (0, 0)),
    ],
)
def kernel_is_exact_at_any_magnitude(noise, spread, offset, dtype):
    assert_kernel(*logits(2, 3001, dtype, noise, spread, offset), (0.7, 0.7), eager=True)


@pytest.mark.parametrize("dtype", DTYPES)
def kernel_knows_equal_models(dtype):
    """Their KL is 0, not about 0: both sides are rounded alike."""
    teacher, _, ids = logits(3 if INTERPRETED else 512, 4099, dtype)
    assert (token_stats(teacher, teacher, ids, impl="triton").kl == 0).all()


def kernel_moves_its_centre_late():
    """Columns that rise make every step a new maximum, columns that fall none."""
    teacher, student, ids = logits(1, 5001)
    ramp = torch.linspace(-300, 300, 5001, device=DEVICE)
    assert_kernel(teacher + ramp, student + ramp, ids)
    assert_kernel(teacher - ramp, student - 0.9 * ramp, ids)
    assert_kernel(teacher + ramp, student - ramp, ids)


@pytest.mark.parametrize("seed", range(6 if INTERPRETED else 10))  # the interpreter takes a second for each
def kernel_takes_any_pattern_of_minus_infinity(seed):
    """Random masks on both sides, of no column to nearly all; infinities and NaN fall where they should."""
    teacher, student, ids = logits(4, 2500, spread=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor([0.0, 0.1, 0.9, 0.9998])[torch.randint(4, (2, 4, 1), generator=generator)]
    masks = (torch.rand(2, 4, 2500, generator=generator) < share).to(DEVICE)
    if seed % 2:
        masks[0] |= masks[1]  # the teacher has nothing where the student has nothing: a finite kl
    kl = assert_kernel(
        teacher.masked_fill(masks[0], -torch.inf), student.masked_fill(masks[1], -torch.inf), ids
    ).kl
    if seed % 2:
        assert (kl.isfinite() | masks[0].all(1)).all()


@pytest.mark.parametrize("gap", [0.0, 50.0, 500.0, 1e4])
def kernel_gives_infinity_where_only_the_student_has_nothing(gap):
    teacher, student, ids = logits(3, 2500)
    teacher[1, 17], student[1, 17] = teacher[1].max() - gap, -torch.inf
    kl = assert_kernel(teacher, student, ids).kl
    assert kl[1] == torch.inf and kl[[0, 2]].isfinite().all()


def kernel_is_infinite_whole_blocks_before_the_teacher_wakes():
    """The student's early columns are -inf, the teacher's late ones a thousand nats higher: p underflows."""
    teacher, student, ids = logits(2, 9000)
    teacher[:, 8000:] += 1000
    student[0, :4000] = -torch.inf
    assert assert_kernel(teacher, student, ids).kl.isinf().tolist() == [True, False]


def kernel_keeps_nan_in_its_row():
    teacher, student, ids = logits(4, 3000)
    teacher[1, 5], student[2, 2999], teacher[3] = torch.nan, torch.nan, -torch.inf
    got = token_stats(teacher, student, ids, impl="triton")
    assert got.kl.isnan().tolist() == [False, True, True, True]
    assert (
        got.teacher_logprob.isnan().tolist()
        == got.teacher_entropy.isnan().tolist()
        == [False, True, False, True]
    )
    assert got.student_logprob.isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("widths", [(3000, 2900), (2900, 3000), (3000, 3)])
def kernel_takes_unequal_vocabularies(widths):
    teacher, student, ids = logits(3, 3000, "bfloat16")
    teacher, student = teacher[:, : widths[0]], student[:, : widths[1]]
    assert_kernel(teacher, student, ids)
    assert_kernel(teacher, student, ids % 2900, vocab=2900)


def kernel_ignores_columns_beyond_vocab():
    teacher, student, ids = logits(3, 3000)
    clean = token_stats(teacher[:, :2900], student[:, :2900], ids % 2900, impl="triton")
    teacher[:, 2900:], student[:, 2900:] = 1e4, torch.nan
    dirty = token_stats(teacher, student, ids % 2900, vocab=2900, impl="triton")
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))


def kernel_reads_strides_and_mixed_types():
    teacher, student, _ = logits(8, 3000, "bfloat16")
    ids = torch.randint(1000, (4, 2), device=DEVICE)[:, 1]
    assert_kernel(teacher[::2, ::3], student.float().t()[::3, ::2].t(), ids)


def kernel_finds_no_probability_without_a_column():
    teacher, student, _ = logits(3, 50)
    got = token_stats(teacher, student[:, :40], torch.tensor([39, 45, -1], device=DEVICE), impl="triton")
    assert got.teacher_logprob.isfinite().tolist() == [True, True, False]
    assert got.student_logprob.isfinite().tolist() == [True, False, False]


def kernel_takes_no_rows():
    assert all(x.shape == (0,) for x in token_stats(*logits(0, 9), impl="triton"))


@pytest.mark.parametrize("v, vocab", [(152_064, None), (152_064, 151_936), (151_936, 151_665)])
def kernel_is_exact_at_full_size(v, vocab, monkeypatch):
    if INTERPRETED:  # which takes long over each step, however wide
        monkeypatch.setattr(rewards, "meta_parameters", functools.partial(rewards.meta_parameters, rows=32))
    teacher, student, ids = logits(2, v, "bfloat16")
    assert_kernel(teacher, student, ids % (vocab or v), (0.7, 0.7), vocab)


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [256, 257, 1, 255], [700, 3, 2048]])
def kernel_reduces_segments(lengths):
    values = torch.randn(sum(lengths), device=DEVICE).round(decimals=1)  # with ties: the first one counts
    got, want = (segment_stats(values, lengths, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(
        got.mean.double(), segment_stats(values.double(), lengths, impl="torch").mean, rtol=0, atol=1e-6
    )
    assert all(torch.equal(x, y) for x, y in zip(got[1:], want[1:], strict=True))


def kernel_reduces_infinities():
    got = segment_stats(
        torch.tensor([torch.inf, torch.inf, 1.0, torch.inf, 2.0], device=DEVICE), [2, 3], impl="triton"
    )
    assert got.mean.tolist() == [torch.inf] * 2 and got.max.tolist() == [torch.inf] * 2
    assert (
        got.min.tolist() == [torch.inf, 1.0]
        and got.argmin.tolist() == [0, 0]
        and got.argmax.tolist() == [0, 1]
    )


def kernel_rewards_are_torchs():
    args = torch.randn(40, device=DEVICE), [10, 30], torch.rand(25, device=DEVICE), [24, 1]
    for x, y in zip(rlt_reward(*args, impl="triton"), rlt_reward(*args, impl="torch"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def kernel_serves_the_policy_pass():
    """The same log-probs and gradients through the chunked head, whatever reduces the logits."""
    states, weight = torch.randn(9, 16, device=DEVICE), torch.randn(300, 16, device=DEVICE)
    ids = torch.randint(300, (9,), device=DEVICE)
    inputs = states.requires_grad_(), weight.requires_grad_()
    results = []
    for impl in ("torch", "triton"):
        logprobs, entropies = _HeadLogprobs.apply(*inputs, None, ids, 0.7, 4, impl)
        results.append((logprobs, entropies, *torch.autograd.grad(logprobs.sum(), inputs)))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def kernel_refuses_what_it_would_get_wrong():
    teacher, student, ids = logits(2, 50)
    with pytest.raises(ValueError, match="not torch.float64: pass impl='torch'"):
        token_stats(teacher.double(), student, ids, impl="triton")
    with pytest.raises(ValueError, match="no backward"):
        token_stats(teacher.requires_grad_(), student, ids, impl="triton")


gpu_only = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")


@gpu_only
def kernel_offsets_pass_two_to_the_31():
    teacher = torch.zeros(14_200, 152_064, dtype=torch.bfloat16, device="cuda")
    student = torch.zeros_like(teacher)
    teacher[-1], student[-1] = torch.randn(2, 152_064, device="cuda", dtype=torch.bfloat16)
    ids = torch.full((14_200,), 152_063, device="cuda")
    got = token_stats(teacher, student, ids, impl="triton")
    assert_exact(
        [x[-1:] for x in got],
        token_stats(teacher[-1:].double(), student[-1:].double(), ids[-1:], impl="torch"),
    )
    assert (got.kl[:-1] == 0).all()


@gpu_only
def kernel_rewards_leave_the_host_alone():
    args = torch.randn(4000, device="cuda"), [1000] * 4, torch.rand(5000, device="cuda"), [1250] * 4
    rlt_reward(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rlt_reward(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
def kernel_memory_is_the_outputs():
    teacher, student, ids = (
        x.repeat(128, 1) if x.dim() == 2 else x.repeat(128) for x in logits(8, 152_064, "bfloat16")
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    token_stats(teacher, student, ids, impl="triton")
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * len(ids) + 512
