# SPDX-License-Identifier: MIT
"""
The reward of Reinforcement-Learned Teachers (arXiv 2506.08388). Copy this file alone: it needs torch, and
triton on a GPU. `score_explanations` takes models of transformers. Tested with torch 2.11 and 2.13, transformers 5.17
and 5.19.

A teacher sees a question and its solution and writes a thought. A frozen student sees the question and the thought:
how likely is the solution to it now, and how likely was the thought itself?

    score  = mean + alpha * min  over solution tokens  of  log p_student(token)           equation (3)
    kl     = mean + alpha * max  over thought tokens   of  KL(p_teacher || p_student)     equation (4)
    reward = score - lambda * kl                                                          equation (5)

`token_stats` and `token_logprobs` reduce logits to numbers per token; `segment_stats` and `rlt_reward` reduce tokens to
numbers per sequence. `score_explanations` does it all, from two models and token ids. Logits exist for LOGITS_CHUNK
tokens at a time. Sequences are packed into one row, without padding; see `enable_packed_attention`.

    python rewards.py            an example computed by hand
    python rewards.py --check    torch and Triton on this machine, against float64
"""

import contextlib
import functools
import inspect
import math
import os
import sys
import weakref
from collections import Counter, namedtuple
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch comes without it; see `implementation`
    triton = None

TokenStats = namedtuple("TokenStats", "kl teacher_logprob student_logprob teacher_entropy")
SegmentStats = namedtuple("SegmentStats", "mean min max argmin argmax")
RLTReward = namedtuple("RLTReward", "reward score kl score_mean score_min kl_mean kl_max")
FLOOR = -1e4  # for centred log-weights: its exponential is 0, and 0 * FLOOR is 0 where 0 * -inf is NaN
CPU = torch.device("cpu")
LOGITS_CHUNK = 1024  # tokens whose logits exist at a time
KNOWN_OPTIONS = {"scaling", "dropout", "is_causal", "position_ids", "use_cache", "output_attentions"}  # of attention


class UnsupportedModel(ValueError):
    """A model whose log-probs this file would not compute as the model itself does."""


class Row(NamedTuple):
    """One explanation in six lists of token ids.

    teacher reads  teacher_prompt + thought + teacher_end           kl    of the thought, teacher against student
    student reads  student_prompt + thought + bridge + solution     score of the solution, by the student
    """

    teacher_prompt: list[int]
    thought: list[int]
    teacher_end: list[int]
    student_prompt: list[int]
    bridge: list[int]
    solution: list[int]


class Scored(NamedTuple):
    """B rows scored. Values per token are packed: sequences end to end, in the order of the rows. In nats."""

    reward: RLTReward  # seven tensors, each (B,)
    token_kl: Tensor  # of thought tokens, as asked for: exact, or the log-ratio
    old_logprobs: Tensor  # of thought and end tokens, under the teacher
    entropies: Tensor  # of the same tokens
    solution_logprobs: Tensor  # of solution tokens, under the student
    thought_lengths: list[int]
    completion_lengths: list[int]
    solution_lengths: list[int]
    token_kl_exact: Tensor  # of thought tokens, over the vocabulary
    token_log_ratio: Tensor  # of thought tokens: log p_teacher - log p_student, the k1 estimate of the KL


@functools.cache
def implementation(impl, device_type):
    """What `impl` means on a type of device: "triton" or "torch".

    "auto" is Triton on a GPU and torch elsewhere; which one is printed once. A GPU without Triton raises RuntimeError.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'torch' or 'triton'")
    chosen = impl
    if impl == "auto":
        chosen = "triton" if device_type == "cuda" else "torch"
    if chosen == "triton" and triton is None:
        raise RuntimeError("Triton is not installed: pip install triton, or pass impl='torch'")
    if chosen == "triton" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"impl='triton' needs a GPU, not {device_type}: pass impl='torch', or start "
                           "Python with TRITON_INTERPRET=1 to interpret the kernels")
    if impl == "auto":
        print(f"rewards.py: {chosen} on {device_type}", file=sys.stderr)
    return chosen


# ----------------------------------------------------------------------------------------------------------
# From logits to numbers per token


def token_stats(teacher_logits, student_logits, token_ids, *, teacher_temperature=1.0,
                student_temperature=1.0, vocab=None, impl="auto"):
    """What the reward needs of every token, from both models' logits: exact over the vocabulary, in nats.

    teacher_logits (N, Vt), student_logits (N, Vs), token_ids (N,) -> TokenStats, each (N,) float32
        kl               KL(p_teacher || p_student), p = softmax(logits / temperature)
        teacher_logprob  log p_teacher[token_ids]
        student_logprob  log p_student[token_ids]
        teacher_entropy  of p_teacher

    vocab: columns from there on are ignored on both sides. None: all count, and a column that one side lacks is
    -inf there, for token_ids too. A teacher's logit above -inf where the student's is -inf gives kl = +inf. A row
    that is -inf throughout is not a distribution and gives NaN.
    impl: "torch" carries gradients and keeps float64, "triton" does neither; "auto": see `implementation`.
    """
    teacher, student = (_checked(x, token_ids, temperature, vocab) for x, temperature in (
        (teacher_logits, teacher_temperature), (student_logits, student_temperature)))
    if implementation(impl, teacher.device.type) == "torch":
        blocks = _blocks(teacher, student, token_ids)
        stats = [_token_stats_torch(*block, teacher_temperature, student_temperature) for block in blocks]
        return TokenStats(*map(torch.cat, zip(*stats, strict=True)))
    out = torch.empty(4, len(teacher), device=teacher.device)
    _launch(_token_stats_kernel, out, token_ids,
            (teacher, teacher_temperature), (student, student_temperature))
    return TokenStats(*out)


def token_logprobs(logits, token_ids, *, temperature=1.0, vocab=None, impl="auto"):
    """One model's part of `token_stats`, with its vocab and impl.

    logits (N, V), token_ids (N,) -> log p[token_ids] and the entropy of p, each (N,) float32, in nats.
    """
    logits = _checked(logits, token_ids, temperature, vocab)
    if implementation(impl, logits.device.type) == "torch":
        stats = [_token_logprobs_torch(*block, temperature) for block in _blocks(logits, token_ids)]
        return tuple(map(torch.cat, zip(*stats, strict=True)))
    out = torch.empty(2, len(logits), device=logits.device)
    _launch(_token_logprobs_kernel, out, token_ids, (logits, temperature))
    return tuple(out)


def _checked(logits, token_ids, temperature, vocab):
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0: score greedy samples at 1")
    if logits.dim() != 2 or token_ids.shape != logits.shape[:1]:
        raise ValueError(f"logits are {tuple(logits.shape)} and token_ids {tuple(token_ids.shape)}, "
                         "expected (N, V) and (N,): flatten batch and position first")
    return logits[:, :vocab]


def _blocks(*tensors):
    """A few rows at a time, so that temporaries stay small beside the logits."""
    rows = max(1, (2**26 if tensors[0].is_cuda else 2**18) // tensors[0].shape[1])
    return zip(*(x.split(rows) for x in tensors), strict=True)


def centred(logits, temperature):
    """Log-weights with a maximum of 0. Subtracting before dividing keeps the digits of a large offset."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits - logits.amax(1, keepdim=True)) / temperature


def _at(z, token_ids):
    """z[i, token_ids[i]], and -inf where there is no such column."""
    known = (token_ids >= 0) & (token_ids < z.shape[1])
    return torch.where(known, z.gather(1, token_ids.where(known, 0)[:, None])[:, 0], -torch.inf)


def _token_logprobs_torch(logits, token_ids, temperature):
    z = centred(logits, temperature)
    p = z.exp()
    total = p.sum(1)
    return _at(z, token_ids) - total.log(), total.log() - (p * z.clamp(min=FLOOR)).sum(1) / total


def _token_stats_torch(teacher, student, token_ids, teacher_temperature, student_temperature):
    # With t and s centred and Z = sum exp,  kl = sum p (t - s) - log Z_t + log Z_s.  The difference is taken
    # before the sum, the ratio before the logarithm: equal models have exactly 0, nearly equal ones a rounding of
    # about 1e-7 nats, not of the logits' own size.
    t, s = centred(teacher, teacher_temperature), centred(student, student_temperature)
    width = max(t.shape[1], s.shape[1])
    t, s = (F.pad(z, (0, width - z.shape[1]), value=-torch.inf) for z in (t, s))
    p = t.exp()
    total_t, total_s = p.sum(1), s.exp().sum(1)
    # Where the teacher has -inf, t - s is -inf or NaN and p is 0: at FLOOR, p removes it. It is +inf only
    # where the teacher has more than -inf and the student has not.
    difference = torch.fmax(t - s, t.new_tensor(FLOOR))
    total_d = (p * difference).sum(1).masked_fill(difference.amax(1) == torch.inf, torch.inf)
    return (total_d / total_t + (total_s / total_t).log(), _at(t, token_ids) - total_t.log(),
            _at(s, token_ids) - total_s.log(), total_t.log() - (p * t.clamp(min=FLOOR)).sum(1) / total_t)


# ----------------------------------------------------------------------------------------------------------
# The same in Triton: one pass, each logit is read once, four numbers are written
#
# spec      kl = sum p (t - s) - log Z_t + log Z_s    entropy = log Z_t - sum p t    logprob = z[id] - log Z
#           with t, s = (logits - maximum) / temperature, in base 2,  Z = sum 2^z,  p = 2^t / Z_t
# online    m is the maximum so far, and Z = sum 2^z, D = sum 2^t (t - s), E = sum 2^t t are relative to it.
#           When m moves, all old t move by dt = (old m - new m) / temperature, all old s by ds, and so
#               D <- 2^dt (D + Z_t (dt - ds)) + new      E <- 2^dt (E + Z_t dt) + new      Z <- 2^dt Z + new
#           Centred like this, the sums are no larger than the results, and float32 holds 1e-6.
# layout    A program owns a row, and each thread a lane: it reads WIDTH neighbours in one 16-byte load, ROWS
#           loads a step, and keeps an m, Z, D, E of its own. The loop has no barrier and no shuffle; lanes
#           are merged once, after it, by the same rule.
# -inf      m starts at -1e30, where -inf would breed NaN: 0 * -1e30 is 0, and -inf - -1e30 is still -inf.
#           Where the teacher has -inf, t - s is -inf or NaN and p is 0: at FLOOR, p removes it. It is +inf
#           only where the teacher has more than -inf and the student has not: then kl is +inf, which `worst`
#           remembers whatever p * inf has made of D.
# traffic   reads (V_t + V_s) * itemsize bytes a token, writes 16

if triton is not None:
    LOW, LN2 = tl.constexpr(FLOOR), tl.constexpr(math.log(2))

    @triton.jit
    def _tile(ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
        lane = tl.arange(0, ROWS)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]
        return lane * WIDTH + tl.arange(0, WIDTH)[None, None, :]

    @triton.jit
    def _load(row, columns, V: tl.constexpr):
        return tl.load(row + columns, mask=(columns >= 0) & (columns < V), other=float("-inf")).to(tl.float32)

    @triton.jit
    def _lane_sum(x):
        return tl.sum(tl.sum(x, 2), 0)

    @triton.jit
    def _lane_max(x):
        return tl.max(tl.max(x, 2), 0)

    @triton.jit
    def _recentre(x, m, scale):
        """New maxima, how far the old terms move, the new terms z."""
        new = tl.maximum(m, _lane_max(x))
        return new, (m - new) * scale, (x - new[None, :, None]) * scale

    @triton.jit(do_not_specialize=["N"])
    def _token_stats_kernel(out, ids, N, teacher, t_stride, t_scale, student, s_stride, s_scale,
                            VT: tl.constexpr, VS: tl.constexpr,
                            ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31 at 14,123 rows of 152,064
        teacher += row * t_stride
        student += row * s_stride
        tile = _tile(ROWS, LANES, WIDTH)
        nothing, low = tl.zeros([LANES], tl.float32), tl.full([LANES], -1e30, tl.float32)
        m_t, m_s, Z_t, Z_s, D, E, worst = low, low, nothing, nothing, nothing, nothing, low
        for start in range(0, max(VT, VS), ROWS * LANES * WIDTH):
            m_t, dt, t = _recentre(_load(teacher, start + tile, VT), m_t, t_scale)
            m_s, ds, s = _recentre(_load(student, start + tile, VS), m_s, s_scale)
            p, keep = tl.exp2(t), tl.exp2(dt)
            difference = tl.where(t - s > LOW, t - s, LOW)  # not tl.maximum: NaN must lose
            worst = tl.maximum(worst, _lane_max(difference))
            D = keep * (D + Z_t * (dt - ds)) + _lane_sum(p * difference)
            E = keep * (E + Z_t * dt) + _lane_sum(p * tl.maximum(t, LOW))
            Z_t = keep * Z_t + _lane_sum(p)
            Z_s = tl.exp2(ds) * Z_s + _lane_sum(tl.exp2(s))

        max_t, max_s = tl.max(m_t, 0), tl.max(m_s, 0)  # the lanes' maxima move to the row's
        dt, ds = (m_t - max_t) * t_scale, (m_s - max_s) * s_scale
        keep = tl.exp2(dt)
        D = tl.sum(keep * (D + Z_t * (dt - ds)), 0)
        E = tl.sum(keep * (E + Z_t * dt), 0)
        Z_t = tl.sum(keep * Z_t, 0)
        Z_s = tl.sum(tl.exp2(ds) * Z_s, 0)
        D = tl.where(tl.max(worst, 0) == float("inf"), float("inf"), D)
        token = tl.load(ids + row)
        t = (_load(teacher, token, VT) - max_t) * t_scale
        s = (_load(student, token, VS) - max_s) * s_scale
        tl.store(out + row, (D / Z_t + tl.log2(tl.div_rn(Z_s, Z_t))) * LN2)  # x / x of Triton may not be 1
        tl.store(out + N + row, (t - tl.log2(Z_t)) * LN2)
        tl.store(out + 2 * N + row, (s - tl.log2(Z_s)) * LN2)
        tl.store(out + 3 * N + row, (tl.log2(Z_t) - E / Z_t) * LN2)

    @triton.jit(do_not_specialize=["N"])
    def _token_logprobs_kernel(out, ids, N, logits, stride, scale, V: tl.constexpr,
                               ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        tile = _tile(ROWS, LANES, WIDTH)
        nothing = tl.zeros([LANES], tl.float32)
        m, Z, E = tl.full([LANES], -1e30, tl.float32), nothing, nothing
        for start in range(0, V, ROWS * LANES * WIDTH):
            m, dz, z = _recentre(_load(logits, start + tile, V), m, scale)
            p, keep = tl.exp2(z), tl.exp2(dz)
            E = keep * (E + Z * dz) + _lane_sum(p * tl.maximum(z, LOW))
            Z = keep * Z + _lane_sum(p)
        top = tl.max(m, 0)
        dz = (m - top) * scale
        E = tl.sum(tl.exp2(dz) * (E + Z * dz), 0)
        Z = tl.sum(tl.exp2(dz) * Z, 0)
        z = (_load(logits, tl.load(ids + row), V) - top) * scale
        tl.store(out + row, (z - tl.log2(Z)) * LN2)
        tl.store(out + N + row, (tl.log2(Z) - E / Z) * LN2)

    @triton.jit(do_not_specialize=["B"])
    def _segment_stats_kernel(out, position, values, starts, B, LANES: tl.constexpr):
        """out (3, B): mean, min, max. position (2, B): of the min and of the max. starts (B + 1,), int64."""
        row = tl.program_id(0)
        first, last = tl.load(starts + row), tl.load(starts + row + 1)
        lane = tl.arange(0, LANES)
        total = tl.zeros([LANES], tl.float32)
        low, low_at = tl.full([LANES], float("inf"), tl.float32), tl.zeros([LANES], tl.int64)
        high, high_at = tl.full([LANES], float("-inf"), tl.float32), tl.zeros([LANES], tl.int64)
        for start in range(first, last, LANES):
            at = start + lane
            x = tl.load(values + at, mask=at < last, other=0.0)
            total += x
            lower, higher = (at < last) & (x < low), (at < last) & (x > high)
            low, low_at = tl.where(lower, x, low), tl.where(lower, at - first, low_at)
            high, high_at = tl.where(higher, x, high), tl.where(higher, at - first, high_at)
        least, most = tl.min(low, 0), tl.max(high, 0)
        tl.store(out + row, tl.sum(total, 0) / (last - first).to(tl.float32))
        tl.store(out + B + row, least)
        tl.store(out + 2 * B + row, most)
        tl.store(position + row, tl.min(tl.where(low == least, low_at, last), 0))
        tl.store(position + B + row, tl.min(tl.where(high == most, high_at, last), 0))


def _launch(kernel, out, token_ids, *sides):
    """Run a row kernel over the (logits, temperature) of one model or of two."""
    arguments, widths = [], []
    for logits, temperature in sides:
        if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"the kernels read bfloat16, float16 and float32, not {logits.dtype}: "
                             "pass impl='torch'")
        if torch.is_grad_enabled() and logits.requires_grad:
            raise ValueError("the kernels have no backward: call under torch.no_grad(), or pass impl='torch'")
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        arguments += [logits, logits.stride(0), math.log2(math.e) / temperature]
        widths.append(logits.shape[1])
    tokens, itemsize = out.shape[1], max(logits.itemsize for logits, _ in sides)
    with torch.cuda.device_of(out):
        kernel[(tokens,)](out, token_ids.contiguous(), tokens, *arguments, *widths, **meta_parameters(itemsize),
                          enable_fp_fusion=False)  # fused, t - s rounds one side only: no 0 where they are equal


def meta_parameters(itemsize, num_warps=8, rows=2):
    """The row kernels' tile: one lane a thread, 16 bytes a load. bench/scoring.py times others."""
    return dict(ROWS=rows, LANES=32 * num_warps, WIDTH=16 // itemsize, num_warps=num_warps)


# ----------------------------------------------------------------------------------------------------------
# From tokens to numbers per sequence


def segment_stats(values, lengths, *, impl="auto"):
    """values (N,) of B packed sequences, lengths (B,) on the host -> SegmentStats, each (B,).

    argmin and argmax are the first position of the extreme in its own sequence. An empty sequence, or none at all,
    raises ValueError. On a GPU nothing is sent to the host.
    """
    lengths = _lengths("values", values, lengths)
    if implementation(impl, values.device.type) == "torch":
        parts = values.split(lengths)
        low, high = [part.min(0) for part in parts], [part.max(0) for part in parts]
        return SegmentStats(*map(torch.stack, (
            [part.mean() for part in parts], [x.values for x in low], [x.values for x in high],
            [x.indices for x in low], [x.indices for x in high])))
    out = torch.empty(3, len(lengths), device=values.device)
    position = torch.empty(2, len(lengths), dtype=torch.long, device=values.device)
    starts = to_device(values.device, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)))
    with torch.cuda.device_of(values):
        _segment_stats_kernel[(len(lengths),)](
            out, position, values.float().contiguous(), starts, len(lengths), LANES=256)
    return SegmentStats(*out, *position)


def _lengths(name, values, lengths):
    assert not (isinstance(lengths, Tensor) and lengths.is_cuda), "lengths live on the host"
    lengths = [int(n) for n in lengths]
    if not lengths:
        raise ValueError(f"{name} has no rows, expected at least one")
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} has an empty {name}, expected at least one token: "
                         "decide what such a row counts as before the call")
    if sum(lengths) != len(values):
        raise ValueError(f"{name} has {len(values)} tokens, but its lengths add up to {sum(lengths)}")
    return lengths


def rlt_reward(solution_logprobs, solution_lengths, token_kl, thought_lengths, *, lam=3.0, alpha=0.01,
               impl="auto"):
    """Equations (3), (4) and (5) of arXiv 2506.08388. Packed tokens of B rows -> RLTReward, each (B,).

    solution_logprobs: the student's, in nats; token_kl: in nats; the lengths of both (B,) live on the host.
    lam and alpha default to the paper's. An empty thought or solution raises ValueError naming the row; so do no rows
    at all, and lengths of solutions and thoughts that are not as many.
    """
    if len(solution_lengths) != len(thought_lengths):
        raise ValueError(f"{len(solution_lengths)} solutions and {len(thought_lengths)} thoughts, expected one of each "
                         "for a row")
    s = segment_stats(solution_logprobs, _lengths("solution", solution_logprobs, solution_lengths), impl=impl)
    k = segment_stats(token_kl, _lengths("thought", token_kl, thought_lengths), impl=impl)
    score = s.mean + alpha * s.min
    kl = k.mean + alpha * k.max
    return RLTReward(score - lam * kl, score, kl, s.mean, s.min, k.mean, k.max)


# ----------------------------------------------------------------------------------------------------------
# From two models to rewards


@torch.no_grad()
def score_explanations(teacher, student, rows, *, lam=3.0, alpha=0.01, kl="exact", temperature=1.0, vocab=None,
                       head_chunk=LOGITS_CHUNK, micro_batch_tokens=16_384, impl="auto"):
    """Reward explanations. The teacher's old log-probs and entropies come from the same pass -> Scored.

    teacher, student    Hugging Face causal LMs or PeftModels, in the mode (train or eval) they are in
    rows                B times the six fields of `Row`
    kl                  "exact" over the vocabulary, or "sampled": log p_teacher - log p_student of the
                        sampled token, the k1 estimate, as in the released code
    temperature         divides all logits of both models
    vocab               len(tokenizer), or where its ids have gaps one more than the highest: the head's columns
                        beyond it, or beyond what both models have, are never computed
    head_chunk          tokens whose logits exist at a time
    micro_batch_tokens  tokens of one forward pass; a longer row is a pass of its own

    A thought without tokens counts as 1 in the mean and in the max of kl, as in the released code. An empty
    solution raises ValueError naming the row; so do no rows at all. A model that `check_model` refuses raises
    UnsupportedModel.
    """
    if kl not in ("exact", "sampled"):
        raise ValueError(f"kl is {kl!r}, expected 'exact' or 'sampled'")
    rows = [Row(*map(list, row)) for row in rows]
    if not rows:
        raise ValueError("there are no rows to score, expected at least one")
    n = row_lengths(rows)
    if 0 in n.solution:
        raise ValueError(f"row {n.solution.tolist().index(0)} has an empty solution, expected at least one "
                         "token: there is nothing to score, drop the row")
    check_model(teacher)
    check_model(student)
    head_t, head_s = output_heads((teacher, student), vocab)
    device = head_t[0].device

    # results, packed in the order of the rows; micro-batches fill them in another order
    n_completion = n.thought + n.teacher_end
    token_kl_exact, token_log_ratio = torch.empty(2, int(n.thought.sum()), device=device)
    old_logprobs, entropies = torch.empty(2, int(n_completion.sum()), device=device)
    solution_logprobs = torch.empty(int(n.solution.sum()), device=device)
    thought_start, completion_start, solution_start = (
        lengths.cumsum(0) - lengths for lengths in (n.thought, n_completion, n.solution))

    width = torch.maximum(n.teacher_prompt + n_completion, n.student_prompt + n.thought + n.bridge + n.solution)
    for b in micro_batches(width.tolist(), micro_batch_tokens, [r.teacher_prompt for r in rows]):
        thought, end, solution = _score_micro_batch(
            teacher, student, head_t, head_s, [rows[i] for i in b], temperature, head_chunk, impl)
        at = ranges(device, thought_start[b], n.thought[b])
        token_kl_exact[at] = thought.kl.float()
        token_log_ratio[at] = (thought.teacher_logprob - thought.student_logprob).float()
        at = ranges(device, completion_start[b], n.thought[b])
        old_logprobs[at], entropies[at] = thought.teacher_logprob.float(), thought.teacher_entropy.float()
        at = ranges(device, completion_start[b] + n.thought[b], n.teacher_end[b])
        old_logprobs[at], entropies[at] = end
        solution_logprobs[ranges(device, solution_start[b], n.solution[b])] = solution

    token_kl = token_kl_exact if kl == "exact" else token_log_ratio
    n_counted = n.thought.clamp(min=1)  # an empty thought counts as one token of kl 1
    counted_kl = torch.ones(int(n_counted.sum()), device=device)
    counted_kl[ranges(device, n_counted.cumsum(0) - n_counted, n.thought)] = token_kl
    reward = rlt_reward(solution_logprobs, n.solution, counted_kl, n_counted, lam=lam, alpha=alpha, impl=impl)
    return Scored(reward, token_kl, old_logprobs, entropies, solution_logprobs, n.thought.tolist(),
                  n_completion.tolist(), n.solution.tolist(), token_kl_exact, token_log_ratio)


def _score_micro_batch(teacher, student, head_t, head_s, rows, temperature, head_chunk, impl):
    """Packed numbers of some rows, on the teacher's device: TokenStats of the thoughts' tokens, the teacher's log-probs
    and entropies (2, M) of the ends' tokens, the student's log-probs (S,) of the solutions' tokens."""
    n = row_lengths(rows)
    device = head_t[0].device

    # 1. the hidden states that predict thought and end under the teacher, thought and solution under the student
    states_t, states_end = hidden_states(
        teacher, [r.teacher_prompt + r.thought + r.teacher_end for r in rows],
        (n.teacher_prompt, n.thought), (n.teacher_prompt + n.thought, n.teacher_end))
    states_s, states_solution = hidden_states(
        student, [r.student_prompt + r.thought + r.bridge + r.solution for r in rows],
        (n.student_prompt, n.thought), (n.student_prompt + n.thought + n.bridge, n.solution))
    buffer_t, buffer_s = logits_buffer(head_t, head_chunk), logits_buffer(head_s, head_chunk)

    # 2. thoughts: a chunk of logits of each model, reduced together
    ids = flat_ids([r.thought for r in rows], head_t)
    chunks = []
    for c in chunk_slices(len(ids), head_chunk):
        logits_t = compute_logits(states_t[c], head_t, buffer_t)
        logits_s = compute_logits(states_s[c], head_s, buffer_s).to(device)
        chunks.append(token_stats(logits_t, logits_s, ids[c], teacher_temperature=temperature,
                                  student_temperature=temperature, impl=impl))
    thought = TokenStats(*map(torch.cat, zip(*chunks, strict=True)))

    # 3. the teacher's end tokens, the student's solutions
    ids_end = flat_ids([r.teacher_end for r in rows], head_t)
    end = head_logprobs(states_end, head_t, ids_end, temperature, buffer_t, impl)
    ids_solution = flat_ids([r.solution for r in rows], head_s)
    solution, _ = head_logprobs(states_solution, head_s, ids_solution, temperature, buffer_s, impl)
    return thought, torch.stack(end).float(), solution.to(device).float()


def row_lengths(rows):
    """Lengths of the six parts of B rows, on the host: a Row of six tensors (B,)."""
    return Row(*torch.tensor([[len(ids) for ids in row] for row in rows]).unbind(1))


# ----------------------------------------------------------------------------------------------------------
# Hidden states, and logits in chunks


def output_head(model, vocab=None):
    """weight (V, H) and bias (V,) or None of the layer that makes logits, cut to the first `vocab` rows."""
    head = causal_lm(model).get_output_embeddings()
    return head.weight[:vocab], head.bias if head.bias is None else head.bias[:vocab]


def output_heads(models, vocab):
    """The output_head of each model; with a vocab all have as many rows: where one has fewer, as many as that one."""
    if vocab is not None:
        vocab = min(vocab, *(len(output_head(model)[0]) for model in models))
    return [output_head(model, vocab) for model in models]


def causal_lm(model):
    """The Hugging Face model inside a PeftModel: LoRA adapters are in its layers, so nothing is lost."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model):
    """The module whose last hidden states go into the head."""
    for found in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if found is not None and found is not model and not isinstance(found, torch.nn.Linear):
            return found
    raise UnsupportedModel(f"{type(model).__name__} has no decoder under its head")


def hidden_states(model, sequences, *spans):
    """The states that predict the tokens of each span -> for each span (N, H), packed.

    sequences: B lists of ids. A span is a pair of starts (B,) and lengths (B,): one part of every sequence. All
    sequences are packed into one row and none attends to another; models that can't do that read them one by one.
    What comes before the first span is the prompt: where several sequences have the same, it is read once. Raises
    ValueError for an id that the model does not have.
    """
    packed = check_model(model)
    model = causal_lm(model)
    _check_ids((i for s in sequences for i in s), len(model.get_input_embeddings().weight))
    lengths = torch.tensor([len(s) for s in sequences])
    begins = lengths.cumsum(0) - lengths
    at = [ranges(CPU, begins + start - 1, length) for start, length in spans]  # the state at t - 1 predicts token t
    if packed:
        packing = pack_sequences(sequences, spans[0][0].tolist())
        states, at = _packed_states(model, packing), [packing.places[i] for i in at]
    else:
        states = _states_one_by_one(model, sequences)
    states = states.to(model.get_output_embeddings().weight.dtype)
    if (scale := _CHECKED[model].logit_scale) != 1:  # a model that multiplies its logits by a number
        states = states * scale
    return [states.index_select(0, to_device(states.device, i)) for i in at]


class Packing(NamedTuple):
    """B sequences as one row of T tokens. Its segments are whole sequences, prompts that several sequences share, and
    what follows those. A token attends to its segment up to itself, and to the shared prompt if that comes before."""

    ids: list[int]  # (T,)
    positions: Tensor  # (T,) of each token in its sequence
    places: Tensor  # (N,) where the tokens of the sequences, end to end, are in the row
    lengths: list[int]  # of the segments
    key_lengths: list[int]  # keys of each segment: those of its shared prompt, and its own
    keys: Tensor | None  # (sum of key_lengths,) places of these keys, segment by segment; None: no prompt is shared


def pack_sequences(sequences, prompt_lengths):
    """B lists of ids, the first prompt_lengths[i] of which are a prompt -> Packing. Equal prompts are stored once."""
    prompts = [tuple(s[:n]) for s, n in zip(sequences, prompt_lengths, strict=True)]
    uses = Counter(prompts)
    ids, positions, places, lengths, key_lengths, keys = [], [], [], [], [], []

    def add_segment(tokens, prompt_places):
        """-> the places of its tokens in the row"""
        own = range(len(ids), len(ids) + len(tokens))
        if tokens:
            ids.extend(tokens)
            positions.extend(range(len(prompt_places), len(prompt_places) + len(tokens)))
            lengths.append(len(tokens))
            key_lengths.append(len(prompt_places) + len(tokens))
            keys.extend([*prompt_places, *own])
        return own

    shared = {}  # prompt: its places
    for sequence, prompt in zip(sequences, prompts, strict=True):
        if uses[prompt] == 1 or not prompt:
            places += add_segment(sequence, ())
            continue
        if prompt not in shared:
            shared[prompt] = add_segment(prompt, ())
        places += [*shared[prompt], *add_segment(sequence[len(prompt) :], shared[prompt])]
    return Packing(ids, torch.tensor(positions), torch.tensor(places), lengths, key_lengths,
                   torch.tensor(keys) if shared else None)


def _packed_states(model, packing):
    """One forward pass of the packed row -> (T, H)."""
    bounds, key_bounds = (to_device(model.device, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int())
                          for lengths in (packing.lengths, packing.key_lengths))
    keys = packing.keys if packing.keys is None else to_device(model.device, packing.keys)
    # The empty mask keeps transformers from making one of T x T. A model that loses `packed` on the way to its
    # attention can't run with it.
    return decoder(model)(
        input_ids=to_device(model.device, [packing.ids]), position_ids=to_device(model.device, packing.positions)[None],
        attention_mask=torch.empty(1, 1, 0, 0), use_cache=False,
        packed=(packing.lengths, bounds, packing.key_lengths, key_bounds, keys)).last_hidden_state[0]


def _states_one_by_one(model, sequences):
    """A forward pass for each sequence -> (N, H)."""
    read = decoder(model)
    return torch.cat([read(input_ids=to_device(model.device, [s]), use_cache=False).last_hidden_state[0]
                      for s in sequences])


def logits_buffer(head, rows, dtype=torch.float32):
    """Memory for a chunk of logits, in float32 or the head's own type if that is wider.

    Columns are rounded up to 16, with -inf, which counts as absent: the kernels load 16 bytes at a time only
    where rows are aligned, and a tokenizer can have any length (Qwen2.5's has 151,665 ids).
    """
    weight, _ = head
    dtype = torch.promote_types(dtype, weight.dtype)
    buffer = torch.empty(max(1, rows), -(-len(weight) // 16) * 16, dtype=dtype, device=weight.device)
    buffer[:, len(weight):] = -torch.inf
    return buffer


def compute_logits(states, head, buffer):
    """states (n, H) @ weight (V, H).T + bias, into n rows and V columns of `buffer` -> those rows of it."""
    weight, bias = head
    out = buffer[: len(states), : len(weight)]
    if out.dtype == weight.dtype:
        torch.mm(states, weight.T, out=out)
    elif out.is_cuda:
        torch.mm(states, weight.T, out_dtype=out.dtype, out=out)
    else:  # a matmul on the CPU can't widen its result: widen a slice of the head at a time
        for v in chunk_slices(len(weight), 2**14):
            out[:, v] = states.to(out.dtype) @ weight[v].to(out.dtype).T
    if bias is not None:
        out.add_(bias)
    return buffer[: len(states)]


def head_logprobs(states, head, ids, temperature, buffer, impl):
    """states (N, H), ids (N,) -> log p[ids] and entropies, (N,) each, one chunk of logits at a time."""
    chunks = [token_logprobs(compute_logits(states[c], head, buffer), ids[c], temperature=temperature, impl=impl)
              for c in chunk_slices(len(ids), len(buffer))]
    return tuple(map(torch.cat, zip(*chunks, strict=True)))


def flat_ids(lists, head):
    """Lists of ids as one tensor on the head's device. Raises ValueError for an id that the head does not have."""
    weight, _ = head
    return to_device(weight.device, _check_ids((i for ids in lists for i in ids), len(weight)))


def _check_ids(ids, count):
    """Ids as a tensor on the host. Raises ValueError where one is not below `count`."""
    ids = torch.tensor(list(ids), dtype=torch.long)
    if len(ids) and not 0 <= ids.min() <= ids.max() < count:
        raise ValueError(f"token ids run from {ids.min()} to {ids.max()}, expected 0 to {count - 1}: "
                         "the tokenizer has more of them than vocab or the model")
    return ids


def micro_batches(lengths, tokens, prompts=None):
    """Lists of row numbers, longest rows first; a list of more than one row has at most `tokens` tokens.

    prompts: what the rows begin with, ids. Rows with the same prompt follow each other, so that it is read once.
    """
    groups = range(len(lengths)) if prompts is None else [tuple(prompt) for prompt in prompts]
    place = {}  # group: its longest row, and the first one of that length
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place.setdefault(groups[i], (-lengths[i], i))
    batch, left = [], tokens
    for i in sorted(range(len(lengths)), key=lambda i: (place[groups[i]], -lengths[i])):
        if batch and lengths[i] > left:
            yield batch
            batch, left = [], tokens
        batch.append(i)
        left -= lengths[i]
    if batch:
        yield batch


def chunk_slices(n, size):
    return [slice(start, min(start + size, n)) for start in range(0, n, size)] or [slice(0, 0)]


def ranges(device, starts, lengths):
    """start, start + 1, ..., start + length - 1 of every pair, concatenated."""
    skipped = starts - (lengths.cumsum(0) - lengths)
    return to_device(device, torch.arange(int(lengths.sum())) + skipped.repeat_interleave(lengths))


def to_device(device, data):
    """From the host to a device, without waiting for it."""
    data = torch.as_tensor(data)
    return data.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else data.to(device)


# ----------------------------------------------------------------------------------------------------------
# Which models are read right: packed, one by one, or not at all

Checked = namedtuple("Checked", "packed logit_scale")  # what `check_model` has found out
_CHECKED = weakref.WeakKeyDictionary()  # model: Checked


@contextlib.contextmanager
def eval_mode(model):
    """Inside it the model is in eval mode; afterwards each of its modules is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_adapter_type(config):
    """Raise UnsupportedModel for an adapter that works in peft's own forward pass, which is not used here: all that is
    left of it would be its base. config: peft's, or None."""
    if (getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None)
            or getattr(config, "peft_type", None) in ("XLORA", "POLY")):
        raise UnsupportedModel("adapters that change the prompt, wait for a token or choose by the input (prompt-"
                               "learning, aLoRA, X-LoRA, Poly) are not supported: use one that is always on in the "
                               "layers, LoRA")


@torch.no_grad()
def check_model(model):
    """Whether the model's sequences can be packed. Measured once per model, on a few tokens; never assumed.

    The head: logits must be a multiple of `compute_logits`, see `_logit_scale`, and those of a sequence must be the
    model's own. Tolerance, relative to the largest of a token: 1e-4 in float32, 2e-2 in 16 bits, which round.
    Packing: a sequence between two others must give the states that it gives alone (1e-3 and 5e-2), and none of the
    other two may reach it at all. Otherwise sequences are read one by one.

    Raises UnsupportedModel with the model's name.
    """
    check_adapter_type(getattr(model, "active_peft_config", None))  # of a PeftModel
    model = causal_lm(model)
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:  # every time: an adapter may have come since
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise UnsupportedModel(f"the head of {type(model).__name__} is a {kind}, expected a plain torch.nn.Linear: use "
                               "another model, or an adapter that leaves lm_head alone")
    if model not in _CHECKED:
        with eval_mode(model):
            scale = _logit_scale(model)
            _CHECKED[model] = Checked(_check_sequences(model, scale), scale)
        if not _CHECKED[model].packed:
            print(f"rewards.py: {type(model).__name__} reads sequences one by one: its attention can't be packed",
                  file=sys.stderr)
    return _CHECKED[model].packed


def _logit_scale(model):
    """The number s in  logits = s * (states @ weight.T + bias),  1 for most models.

    Found exactly, whatever the weights' type: known numbers in float64 take the place of the states, and other ones
    that of the head's result. What comes out must be a multiple of them, from 1 to 300: a soft cap is none.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    generator, seen = torch.Generator().manual_seed(0), {}

    def numbers(width):
        x = torch.randn(1, 3, width, generator=generator)
        x *= torch.tensor([[[1.0], [30.0], [300.0]]]) / x.abs().amax(2, keepdim=True)
        return x.bfloat16().double().to(head.weight.device)  # which no type rounds

    states, logits = numbers(head.weight.shape[1]), numbers(len(head.weight))

    def replace_states(module, inputs, output):
        output.last_hidden_state = states
        return output

    def keep_input(module, inputs):
        seen["states"] = inputs[0]
        return inputs[0].to(head.weight.dtype)

    hooks = [head.register_forward_pre_hook(keep_input), head.register_forward_hook(lambda *_: logits)]
    try:
        hooks.append(decoder(model).register_forward_hook(replace_states))
        seen["logits"] = model(input_ids=to_device(model.device, [[0, 1, 2]]), use_cache=False).logits
        ratios = torch.cat([(seen[key].double() / x).flatten() for key, x in (("states", states), ("logits", logits))])
    except Exception as error:
        raise UnsupportedModel(f"{name} can't be checked ({str(error).partition(chr(10))[0]}): expected a decoder-only "
                               "causal LM of transformers") from error
    finally:
        for hook in hooks:
            hook.remove()
    parts = ratios.split([states.numel(), logits.numel()])
    scale = math.prod(part.mean().item() for part in parts)
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    constant = all((part - part.mean()).abs().max() <= 1e-6 * part.mean().abs() for part in parts)  # NaN is not
    if not constant or scale <= 0 or (scale != 1 and head.bias is not None):
        raise UnsupportedModel(f"{name} does more to its logits than multiply by its head and a number (a soft cap, "
                               "perhaps), which chunked logits leave out: use another model")
    return scale


def _check_sequences(model, scale):
    """Compare a sequence's logits with the model's own, and its states when packed -> can the model pack?"""
    vocab, dtype = len(model.get_input_embeddings().weight), model.get_output_embeddings().weight.dtype
    around, sequence = ([(i % step + i // step) % vocab for i in range(n)] for step, n in ((7, 19), (5, 13)))
    can_pack = enable_packed_attention(model) and _is_plainly_causal(model, sequence)
    states = _states_one_by_one(model, [sequence])
    head = output_head(model)
    ours = compute_logits(states.to(dtype) * scale, head, logits_buffer(head, len(states)))[:, : len(head[0])]
    theirs = model(input_ids=to_device(model.device, [sequence]), use_cache=False).logits[0]
    name = type(model).__name__
    if not theirs.isfinite().all():
        raise UnsupportedModel(f"{name} has logits that are NaN or infinite: its weights are broken, or too coarse")
    if theirs.shape != ours.shape or not equal_but_for_rounding(ours, theirs, 1e-4, 2e-2, dtype):
        raise UnsupportedModel(f"{name} has other logits than its head makes of its decoder's states: use another one")
    can_pack = can_pack and _packs(model, around, sequence, states)
    if not can_pack and model.config.get_text_config()._attn_implementation == "packed":
        model.set_attn_implementation("sdpa")
    return can_pack


def _is_plainly_causal(model, sequence):
    """Whether no layer uses another mask than the causal one. Others are NaN here, and so is what they reach: a window
    longer than the sequence changes nothing else that one could measure."""
    from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

    def mask(*, mask_function=causal_mask_function, local_size=None, **options):
        if local_size is None and mask_function is causal_mask_function:
            return sdpa_mask(mask_function=mask_function, **options)
        shape = options["batch_size"], 1, options["q_length"], options["kv_length"]
        return torch.full(shape, torch.nan, dtype=options["dtype"], device=options["device"])

    AttentionMaskInterface.register("packed", mask)
    try:
        return bool(_states_one_by_one(model, [sequence]).isfinite().all())
    except Exception:  # a mask that was made in another way than by transformers' own functions
        return False
    finally:
        AttentionMaskInterface.register("packed", sdpa_mask)


def _packs(model, around, sequence, alone):
    """Whether `sequence`, packed between two others, has the states that it has alone, whatever those are.

    Other tokens around it must not change a bit. Where they do, they may have changed how experts were computed
    together, no more: then NaN around it decides, of which any leak, however small, carries some over.
    """
    n = len(around), len(around) + len(sequence)

    def states(around):
        return _packed_states(model, pack_sequences([around, sequence, around], [0, 0, 0]))[n[0] : n[1]]

    def poison(module, inputs, output):
        output = output.clone()
        output[:, : n[0]], output[:, n[1] :] = torch.nan, torch.nan
        return output

    def close(states):
        return equal_but_for_rounding(states, alone, 1e-3, 5e-2, model.get_output_embeddings().weight.dtype)

    try:
        first = states(around)
        if not close(first) or torch.equal(first, states(around[::-1])):
            return close(first)
        hook = model.get_input_embeddings().register_forward_hook(poison)
        try:
            return close(states(around))
        finally:
            hook.remove()
    except Exception as error:  # whatever a model does with arguments that it does not know
        print(f"rewards.py: {type(model).__name__}, packed: {type(error).__name__}: {error}", file=sys.stderr)
        return False


def equal_but_for_rounding(ours, theirs, tolerance, tolerance_16_bits, dtype):
    """Whether rows (N, M) of numbers of tokens are the same, computed in two ways in this type.

    A row may differ by the tolerance times its largest value. In float32 all rows must be so close. In 16 bits half of
    them: rounding alone changes single tokens by more than their size there (SmolLM2 with a trained adapter, read whole
    or token by token: 2 % in the median, 57 % at most), while a model that can't be read so is wrong on most of them.
    """
    close = (ours.float() - theirs.float()).abs().amax(1) <= theirs.float().abs().amax(1) * (
        tolerance_16_bits if dtype.itemsize == 2 else tolerance)  # NaN is not
    if dtype.itemsize == 2:
        return bool(2 * close.sum() > len(close) and ours.isfinite().all())
    return bool(close.all())


def enable_packed_attention(model):
    """Give the model `_packed_attention`, if every layer's attention is full and torch's sdpa -> whether it has it.

    It stays, since the backward of a checkpointed layer looks it up again. In passes that are not packed it is sdpa,
    mask and all: the model samples as before.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None) or "full_attention"]
    # rotary embeddings that depend on the longest sequence of a pass
    by_length = any(kind in str(getattr(module, "rope_type", "")) for module in model.modules()
                    for kind in ("dynamic", "longrope"))
    if (model._supports_attention_backend and config._attn_implementation == "sdpa" and {*kinds} == {"full_attention"}
            and not by_length):
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register("packed", _packed_attention)
        AttentionMaskInterface.register("packed", sdpa_mask)
        model.set_attn_implementation("packed")
    return config._attn_implementation == "packed"


def _packed_attention(module, query, key, value, attention_mask, packed=None, **options):
    """Causal attention of the segments of a `Packing`, each on its own or after its prompt; no T x T mask.

    query (1, heads, T, D), key and value with as many heads or fewer -> (1, T, heads, D), None
    packed: (lengths, bounds, key_lengths, key_bounds, keys). Lengths are lists on the host, bounds their cumulative
      sums from 0 on, int32, on the device; see Packing. None: plain sdpa.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unknown = [name for name, value in options.items() if name not in KNOWN_OPTIONS and value is not None]
    if unknown or options.get("is_causal") is False or (attention_mask is not None and attention_mask.numel()):
        raise UnsupportedModel(f"attention that is not plainly causal can't be packed ({', '.join(unknown)})")
    (lengths, bounds, key_lengths, key_bounds, keys), scale = packed, options["scaling"]
    dropout, size = options.get("dropout", 0.0), query.shape[3]
    if keys is not None:
        key, value = key.index_select(2, keys), value.index_select(2, keys)
    flash = query.is_cuda and query.itemsize == 2 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if flash and size == value.shape[3] <= 256 and size % 8 == 0 and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        gqa = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        out = varlen_attn(*(x[0].transpose(0, 1) for x in (query, key, value)), bounds, key_bounds, max(lengths),
                          max(key_lengths), scale=scale, window_size=(-1, 0), **gqa)  # (-1, 0): causal, ends aligned
        return out[None], None
    if query.is_cuda:  # with enable_gqa SDPA would take the kernel that holds all T x T scores
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    out = []
    for q, k, v in zip(query.split(lengths, 2), key.split(key_lengths, 2), value.split(key_lengths, 2), strict=True):
        T, S = q.shape[2], k.shape[2]
        causal = {"is_causal": True}
        if T < S:  # after a shared prompt, all of which is seen
            causal = {"attn_mask": torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)}
        out.append(F.scaled_dot_product_attention(q, k, v, **causal, scale=scale, dropout_p=dropout,
                                                  enable_gqa=not query.is_cuda))
    return torch.cat(out, 2).transpose(1, 2), None


# ----------------------------------------------------------------------------------------------------------
# python rewards.py [--check]


def example():
    """By hand: one thought token, a fair teacher against a 3 : 1 student; solution tokens at 1/2 and 1/4."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher, student = torch.tensor([[[1.0, 1.0]], [[3.0, 1.0]]], device=device).log()
    stats = token_stats(teacher, student, torch.tensor([0], device=device))
    reward = rlt_reward(torch.tensor([1 / 2, 1 / 4], device=device).log(), [2], stats.kl, [1])
    score = -1.5 * math.log(2) + 0.01 * -2 * math.log(2)
    kl = 1.01 * (math.log(2) - math.log(3) / 2)  # 1/2 log (1/2 : 3/4) + 1/2 log (1/2 : 1/4), mean and max
    for name, want in (("score", score), ("kl", kl), ("reward", score - 3 * kl)):
        got = getattr(reward, name).item()
        print(f"{name:6} {got:9.6f}   by hand {want:9.6f}")
        assert abs(got - want) < 1e-6, name


def check():
    """Print the errors of torch and of Triton against float64 -> are Triton's as small, or below 1e-6?"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("largest error, in units of max(1, |value|)        torch     triton")
    good = True
    for vocab, dtype in ((50, torch.float32), (4099, torch.bfloat16), (152_064, torch.bfloat16)):
        torch.manual_seed(0)
        teacher = torch.randn(4, vocab, device=device) * 5
        student = teacher + torch.randn(4, vocab, device=device)
        pair, ids = (teacher.to(dtype), student.to(dtype)), torch.randint(vocab, (4,), device=device)
        want = token_stats(*(x.double() for x in pair), ids, teacher_temperature=0.7, impl="torch")
        both = (token_stats(*pair, ids, teacher_temperature=0.7, impl=impl) for impl in ("torch", "triton"))
        for name, w, *got in zip(TokenStats._fields, want, *both, strict=True):
            eager, kernel = (((x - w).abs() / w.abs().clamp(min=1)).max().item() for x in got)
            print(f"{name:16} {vocab:7} columns, {str(dtype)[6:]:8} {eager:14.1e} {kernel:10.1e}")
            good = good and kernel <= max(eager, 1e-6)
    return good


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"unknown arguments {sys.argv[1:]}: pass none, or --check")
    example()
    if sys.argv[1:]:
        try:
            sys.exit(None if check() else "Triton is less exact than torch on this machine: see above")
        except RuntimeError as error:
            sys.exit(f"--check compares torch with Triton: {error}")
