# SPDX-License-Identifier: MIT
"""
The reward of Reinforcement-Learned Teachers (arXiv 2506.08388). Copy this file alone: it needs torch, and
triton on a GPU.

A teacher sees a question and its solution and writes a thought. A frozen student, shown the question and the
thought, says how likely the solution is now, and how natural the thought itself was:

    score  = mean + alpha * min  over solution tokens  of  log p_student(token)           equation (3)
    kl     = mean + alpha * max  over thought tokens   of  KL(p_teacher || p_student)     equation (4)
    reward = score - lambda * kl                                                          equation (5)

`token_stats` and `token_logprobs` reduce logits to numbers a token, `segment_stats` and `rlt_reward` reduce
tokens to numbers a sequence. `score_explanations` does it all, from two models and token ids, and
`completion_logprobs` is the policy pass, with a gradient. Logits exist for `head_chunk` tokens at a time, and
sequences lie end to end in one row, without padding: see `_packs`.

    python rewards.py            an example computed by hand
    python rewards.py --check    torch and Triton on this machine, against float64
"""

import functools
import inspect
import math
import os
import sys
from collections import namedtuple
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


class Row(NamedTuple):
    """One explanation in six lists of token ids.

    The teacher reads teacher_prompt + thought + teacher_end, the student student_prompt + thought + bridge +
    solution. The kl compares the models on the thought; the score is the student's on the solution.
    """

    teacher_prompt: list[int]
    thought: list[int]
    teacher_end: list[int]
    student_prompt: list[int]
    bridge: list[int]
    solution: list[int]


class Scored(NamedTuple):
    """B rows scored. Token values are packed: sequences laid end to end, in the order of the rows."""

    reward: RLTReward  # seven tensors, each (B,)
    token_kl: Tensor  # thought tokens
    old_logprobs: Tensor  # thought and end tokens, under the teacher
    entropies: Tensor  # the same tokens
    solution_logprobs: Tensor  # solution tokens, under the student
    thought_lengths: list[int]
    completion_lengths: list[int]
    solution_lengths: list[int]


@functools.cache
def implementation(impl, device_type):
    """What `impl` means on a type of device: "triton" or "torch".

    "auto" is Triton on a GPU and torch elsewhere, and says so once. A GPU without Triton raises.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'torch' or 'triton'")
    chosen = impl if impl != "auto" else "triton" if device_type == "cuda" else "torch"
    if chosen == "triton" and triton is None:
        raise RuntimeError("Triton is not installed: pip install triton, or pass impl='torch'")
    if chosen == "triton" and device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"impl='triton' needs a GPU, not {device_type}: pass impl='torch', or start "
                           "Python with TRITON_INTERPRET=1 to interpret the kernels")
    if impl == "auto":
        print(f"rewards.py: {chosen} on {device_type}", file=sys.stderr)
    return chosen


# ----------------------------------------------------------------------------------------------------------
# Logits to a number a token


def token_stats(teacher_logits, student_logits, token_ids, *, teacher_temperature=1.0,
                student_temperature=1.0, vocab=None, impl="auto"):
    """What the reward needs of every token, from both models' logits: exact over the vocabulary, in nats.

    teacher_logits (N, Vt), student_logits (N, Vs), token_ids (N,) -> TokenStats, each (N,) float32
        kl               KL(p_teacher || p_student), p = softmax(logits / temperature)
        teacher_logprob  log p_teacher[token_ids]
        student_logprob  log p_student[token_ids]
        teacher_entropy  of p_teacher

    vocab: columns from there on are ignored on both sides. None: all count, and one that a side lacks is -inf
    there, for token_ids too. A teacher's logit above -inf where the student's is -inf gives kl = +inf. A row
    that is -inf throughout is no distribution and gives NaN.
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


def _centred(logits, temperature):
    """Log-weights with a maximum of 0. Subtracting before dividing keeps the digits of a large offset."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits - logits.amax(1, keepdim=True)) / temperature


def _at(z, token_ids):
    """z[i, token_ids[i]], and -inf where there is no such column."""
    known = (token_ids >= 0) & (token_ids < z.shape[1])
    return torch.where(known, z.gather(1, token_ids.where(known, 0)[:, None])[:, 0], -torch.inf)


def _token_logprobs_torch(logits, token_ids, temperature):
    z = _centred(logits, temperature)
    p = z.exp()
    total = p.sum(1)
    return _at(z, token_ids) - total.log(), total.log() - (p * z.clamp(min=FLOOR)).sum(1) / total


def _token_stats_torch(teacher, student, token_ids, teacher_temperature, student_temperature):
    # With t and s centred and Z = sum exp,  kl = sum p (t - s) - log Z_t + log Z_s.  The difference is taken
    # before the sum, the ratio before the logarithm: nearly equal models lose no digits to cancellation.
    t, s = _centred(teacher, teacher_temperature), _centred(student, student_temperature)
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
# The same in Triton: one pass, each logit read once, four numbers written
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
        tl.store(out + row, (D / Z_t + tl.log2(Z_s / Z_t)) * LN2)
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
        kernel[(tokens,)](out, token_ids.contiguous(), tokens, *arguments, *widths,
                          **meta_parameters(itemsize))


def meta_parameters(itemsize, num_warps=8, rows=2):
    """The row kernels' tile: a lane a thread, 16 bytes a load. tests/bench_rewards.py times others."""
    return dict(ROWS=rows, LANES=32 * num_warps, WIDTH=16 // itemsize, num_warps=num_warps)


# ----------------------------------------------------------------------------------------------------------
# Tokens to a number a sequence


def segment_stats(values, lengths, *, impl="auto"):
    """values (N,) of B sequences laid end to end, lengths (B,) on the host -> SegmentStats, each (B,).

    argmin and argmax are the first position of the extreme in its own sequence: the argmin of a solution's
    log-probs is its hardest leap. An empty sequence raises ValueError. On a GPU nothing is sent to the host.
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
    starts = _on(values.device, F.pad(torch.tensor(lengths).cumsum(0), (1, 0)))
    with torch.cuda.device_of(values):
        _segment_stats_kernel[(len(lengths),)](
            out, position, values.float().contiguous(), starts, len(lengths), LANES=256)
    return SegmentStats(*out, *position)


def _lengths(name, values, lengths):
    assert not (isinstance(lengths, Tensor) and lengths.is_cuda), "lengths live on the host"
    lengths = [int(n) for n in lengths]
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
    lam and alpha default to the paper's. An empty thought or solution raises ValueError naming the row.
    """
    s = segment_stats(solution_logprobs, _lengths("solution", solution_logprobs, solution_lengths), impl=impl)
    k = segment_stats(token_kl, _lengths("thought", token_kl, thought_lengths), impl=impl)
    score = s.mean + alpha * s.min
    kl = k.mean + alpha * k.max
    return RLTReward(score - lam * kl, score, kl, s.mean, s.min, k.mean, k.max)


# ----------------------------------------------------------------------------------------------------------
# Two models to rewards


@torch.no_grad()
def score_explanations(teacher, student, rows, *, lam=3.0, alpha=0.01, kl="exact", temperature=1.0,
                       policy_temperature=None, vocab=None, head_chunk=1024, micro_batch_tokens=16_384,
                       logits_dtype=torch.float32, impl="auto"):
    """Reward explanations; the teacher's old log-probs and entropies come from the same pass -> Scored.

    teacher, student    Hugging Face causal LMs, a PeftModel too, in the mode (train or eval) they are in
    rows                B times the six fields of `Row`
    kl                  "exact" over the vocabulary, or "sampled": log p_teacher - log p_student of the
                        sampled token, as in the released code
    temperature         divides both models' logits in score and kl
    policy_temperature  divides the teacher's in old log-probs and entropies; None: the same
    vocab               len(tokenizer): the head's columns beyond it are never computed
    head_chunk          tokens whose logits exist at a time, in logits_dtype or the head's if that is wider
    micro_batch_tokens  tokens of one forward pass; a longer row goes alone

    A thought without tokens counts as 1 in the mean and in the max of kl, as in the released code. An empty
    solution raises ValueError naming the row.
    """
    if kl not in ("exact", "sampled"):
        raise ValueError(f"kl is {kl!r}, expected 'exact' or 'sampled'")
    rows = [Row(*map(list, row)) for row in rows]
    lengths = torch.tensor([[len(ids) for ids in row] for row in rows])  # (B, 6), on the host
    thought, completion, solution = lengths[:, 1], lengths[:, 1] + lengths[:, 2], lengths[:, 5]
    if 0 in solution:
        raise ValueError(f"row {solution.tolist().index(0)} has an empty solution, expected at least one "
                         "token: there is nothing to score, drop the row")
    policy_temperature = temperature if policy_temperature is None else policy_temperature
    head_t, head_s = _head(teacher, vocab), _head(student, vocab)
    device = head_t[0].device

    def score(batch, tp, th, te, sp, br, so):
        """Packed numbers of a micro-batch: kl, log-probs and entropies of thoughts and of ends, solutions."""
        # 1. the states that predict thought and end under the teacher, thought and solution under the student
        states_t, states_end = _hidden(
            teacher, [r.teacher_prompt + r.thought + r.teacher_end for r in batch], (tp, th), (tp + th, te))
        states_s, states_solution = _hidden(
            student, [r.student_prompt + r.thought + r.bridge + r.solution for r in batch],
            (sp, th), (sp + th + br, so))
        buffer_t, buffer_s = (_buffer(head, head_chunk, logits_dtype) for head in (head_t, head_s))

        # 2. thoughts: a chunk of logits of each model, reduced together
        ids, token_kl, old = _ids([r.thought for r in batch], head_t), [], []
        for c in _chunks(len(ids), head_chunk):
            logits_t = _logits(states_t[c], head_t, buffer_t)
            logits_s = _logits(states_s[c], head_s, buffer_s).to(device)
            stats = token_stats(logits_t, logits_s, ids[c], teacher_temperature=temperature,
                                student_temperature=temperature, impl=impl)
            token_kl.append(stats.kl if kl == "exact" else stats.teacher_logprob - stats.student_logprob)
            old.append(torch.stack(
                (stats.teacher_logprob, stats.teacher_entropy) if policy_temperature == temperature
                else token_logprobs(logits_t, ids[c], temperature=policy_temperature, impl=impl)))

        # 3. the teacher's end tokens, the student's solutions
        end = _head_logprobs(states_end, head_t, _ids([r.teacher_end for r in batch], head_t),
                             policy_temperature, buffer_t, impl)
        logprobs, _ = _head_logprobs(states_solution, head_s, _ids([r.solution for r in batch], head_s),
                                     temperature, buffer_s, impl)
        packed = torch.cat(token_kl), torch.cat(old, 1), torch.stack(end), logprobs
        return [x.to(device, torch.float32) for x in packed]

    token_kl = torch.empty(int(thought.sum()), device=device)
    old = torch.empty(2, int(completion.sum()), device=device)
    solution_logprobs = torch.empty(int(solution.sum()), device=device)
    thought_at, completion_at, solution_at = (n.cumsum(0) - n for n in (thought, completion, solution))
    width = torch.maximum(lengths[:, :3].sum(1), lengths[:, [3, 1, 4, 5]].sum(1))
    for b in micro_batches(width.tolist(), micro_batch_tokens):
        _, th, te, _, _, so = spans = lengths[b].unbind(1)
        kl_values, old_thought, old_end, logprobs = score([rows[i] for i in b], *spans)
        token_kl[_ranges(device, thought_at[b], th)] = kl_values
        old[:, _ranges(device, completion_at[b], th)] = old_thought
        old[:, _ranges(device, completion_at[b] + th, te)] = old_end
        solution_logprobs[_ranges(device, solution_at[b], so)] = logprobs

    counted = thought.clamp(min=1)  # an empty thought counts as one token of kl 1
    values = torch.ones(int(counted.sum()), device=device)
    values[_ranges(device, counted.cumsum(0) - counted, thought)] = token_kl
    reward = rlt_reward(solution_logprobs, solution, values, counted, lam=lam, alpha=alpha, impl=impl)
    return Scored(reward, token_kl, *old, solution_logprobs,
                  thought.tolist(), completion.tolist(), solution.tolist())


def completion_logprobs(model, prompts, completions, *, temperature=1.0, vocab=None, head_chunk=1024,
                        impl="auto"):
    """Log-probs and entropies of B completions (lists of ids) after their prompts: packed, (N,) float32 each.

    One forward pass, one micro-batch: the caller splits, see `micro_batches`. Where grad is enabled the
    log-probs carry it, and memory still does not depend on the vocabulary: the backward computes each chunk's
    logits again. A frozen head gets no gradient buffer. Entropies carry no gradient. With grad and without,
    values are the same bits.
    """
    head = _head(model, vocab)
    pairs = list(zip(prompts, completions, strict=True))
    prompt, completion = torch.tensor([[len(p), len(c)] for p, c in pairs]).unbind(1)
    states, = _hidden(model, [[*p, *c] for p, c in pairs], (prompt, completion))
    return _HeadLogprobs.apply(states, *head, _ids(completions, head), temperature, head_chunk, impl)


def completion_logprobs_and_kl(teacher, student, rows, *, temperature=1.0, policy_temperature=None, vocab=None,
                               head_chunk=1024, impl="auto"):
    """The teacher's part of `completion_logprobs`, and its exact kl to the student, both with gradient.

    rows as in `score_explanations`, one micro-batch -> log-probs of thoughts and ends, packed row by row, at
    policy_temperature (None: the same); and kl of the thoughts' tokens at `temperature`. The gradient of the kl
    is the one through the teacher's distribution; the student has none. Chunked and recomputed as the log-probs.
    """
    rows = [Row(*map(list, row)) for row in rows]
    tp, th, te, sp, *_ = torch.tensor([[len(ids) for ids in row] for row in rows]).unbind(1)
    head_t, head_s = _head(teacher, vocab), _head(student, vocab)
    states_t, states_all = _hidden(teacher, [r.teacher_prompt + r.thought + r.teacher_end for r in rows],
                                   (tp, th), (tp, th + te))
    with torch.no_grad():
        states_s, = _hidden(student, [r.student_prompt + r.thought for r in rows], (sp, th))
    ids = _ids([r.thought + r.teacher_end for r in rows], head_t)
    policy_temperature = temperature if policy_temperature is None else policy_temperature
    logprobs, _ = _HeadLogprobs.apply(states_all, *head_t, ids, policy_temperature, head_chunk, impl)
    return logprobs, _HeadKL.apply(states_t, *head_t, states_s, *head_s, temperature, head_chunk, impl)


class _HeadKL(torch.autograd.Function):
    """states of the teacher and of the student, (N, H) each -> kl (N,), a chunk of logits at a time.

    gradient   d kl / d logits_t = p (log p - log q - kl) / temperature; none for the heads, which are frozen
    """

    @staticmethod
    def forward(ctx, states_t, weight_t, bias_t, states_s, weight_s, bias_s, temperature, head_chunk, impl):
        assert not weight_t.requires_grad, "the head must be frozen"
        saved = states_t, weight_t, bias_t, states_s, weight_s, bias_s
        ctx.save_for_backward(*saved)
        ctx.temperature, ctx.head_chunk = temperature, head_chunk
        kl = [token_stats(t, s, torch.zeros(len(t), dtype=torch.long, device=t.device), impl=impl,
                          teacher_temperature=temperature, student_temperature=temperature).kl
              for _, t, s in _chunks_of_logits(*saved, head_chunk)]
        return torch.cat(kl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        states_t, weight_t, *_ = ctx.saved_tensors
        grad_states = torch.empty_like(states_t)
        for c, t, s in _chunks_of_logits(*ctx.saved_tensors, ctx.head_chunk):
            t, s = (_centred(x, ctx.temperature).log_softmax(1) for x in (t, s))
            p = t.exp()
            difference = torch.where(p > 0, t - s, 0)
            kl = (p * difference).sum(1, keepdim=True)
            g = p * (difference - kl) * (grad_kl[c] / ctx.temperature)[:, None]
            grad_states[c] = g[:, : len(weight_t)].to(weight_t.dtype) @ weight_t
        return grad_states, *[None] * 8


def _chunks_of_logits(states_t, weight_t, bias_t, states_s, weight_s, bias_s, head_chunk):
    """(slice, the teacher's logits, the student's) of one chunk after the other, in two buffers."""
    heads = (weight_t, bias_t), (weight_s, bias_s)
    buffer_t, buffer_s = (_buffer(head, min(head_chunk, len(states_t))) for head in heads)
    for c in _chunks(len(states_t), head_chunk):
        logits_t, logits_s = _logits(states_t[c], heads[0], buffer_t), _logits(states_s[c], heads[1], buffer_s)
        yield c, logits_t, logits_s.to(logits_t.device)


class _HeadLogprobs(torch.autograd.Function):
    """states (N, H) -> log p[ids] and entropy, (N,) each, of states @ weight.T + bias, a chunk at a time.

    gradient   d logprob / d logits = (onehot(ids) - softmax(logits / temperature)) / temperature
    """

    @staticmethod
    def forward(ctx, states, weight, bias, ids, temperature, head_chunk, impl):
        head = weight, bias
        buffer = _buffer(head, min(head_chunk, len(ids)))
        logprobs, entropies = _head_logprobs(states, head, ids, temperature, buffer, impl)
        ctx.save_for_backward(states, weight, bias, ids)
        ctx.temperature, ctx.head_chunk = temperature, head_chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _):
        states, weight, bias, ids = ctx.saved_tensors
        buffer = _buffer((weight, bias), min(ctx.head_chunk, len(ids)))
        grad_states = torch.empty_like(states)
        _, weight_needed, bias_needed, *_ = ctx.needs_input_grad
        grad_weight = torch.zeros_like(weight, dtype=buffer.dtype) if weight_needed else None
        grad_bias = torch.zeros_like(bias, dtype=buffer.dtype) if bias_needed else None
        for c in _chunks(len(ids), ctx.head_chunk):
            g = (grad_logprobs[c] / ctx.temperature)[:, None]
            z = _logits(states[c], (weight, bias), buffer)[:, : len(weight)]  # and all that follows in place
            z.sub_(z.amax(1, keepdim=True)).div_(ctx.temperature).exp_()
            z.mul_(-g / z.sum(1, keepdim=True)).scatter_add_(1, ids[c, None], g)
            if bias_needed:
                grad_bias += z.sum(0)
            z = z.to(weight.dtype)
            grad_states[c] = z @ weight
            if weight_needed:
                grad_weight += z.T @ states[c]
        return grad_states, grad_weight, grad_bias, None, None, None, None


def _head_logprobs(states, head, ids, temperature, buffer, impl):
    chunks = [token_logprobs(_logits(states[c], head, buffer), ids[c], temperature=temperature, impl=impl)
              for c in _chunks(len(ids), len(buffer))]
    return tuple(map(torch.cat, zip(*chunks, strict=True)))


def _buffer(head, rows, dtype=torch.float32):
    """Room for a chunk of logits, no narrower than the head's own.

    Columns are rounded up to 16, with -inf, which counts as absent: the kernels load 16 bytes at a time only
    where rows are aligned, and a tokenizer is as long as it is (Qwen2.5's has 151,665 ids).
    """
    weight, _ = head
    dtype = torch.promote_types(dtype, weight.dtype)
    buffer = torch.empty(max(1, rows), -(-len(weight) // 16) * 16, dtype=dtype, device=weight.device)
    buffer[:, len(weight):] = -torch.inf
    return buffer


def _logits(states, head, buffer):
    """states (n, H) @ weight (V, H).T + bias, into n rows and V columns of `buffer` -> those rows of it."""
    weight, bias = head
    out = buffer[: len(states), : len(weight)]
    if out.dtype == weight.dtype:
        torch.mm(states, weight.T, out=out)
    elif out.is_cuda:
        torch.mm(states, weight.T, out_dtype=out.dtype, out=out)
    else:  # a matmul on the CPU can't widen its result: widen a slice of the head at a time
        for v in _chunks(len(weight), 2**14):
            out[:, v] = states.to(out.dtype) @ weight[v].to(out.dtype).T
    if bias is not None:
        out.add_(bias)
    return buffer[: len(states)]


def _causal_lm(model):
    """The Hugging Face model inside a PeftModel: LoRA lives in its layers, so nothing is lost."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise NotImplementedError("prompt-learning adapters are not supported: use one in the layers, LoRA")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model, vocab):
    """weight (V, H) and bias (V,) or None of the head, cut to the first `vocab` rows."""
    model = _causal_lm(model)
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1):
            raise NotImplementedError(f"{type(model).__name__} has {name} = {getattr(config, name)} behind "
                                      "its head, which the chunked head leaves out: use a model without")
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear, f"the head must be a plain Linear layer, not {type(head).__name__}"
    return head.weight[:vocab], head.bias if head.bias is None else head.bias[:vocab]


def _hidden(model, sequences, *spans):
    """The states that predict the tokens of each span -> for each span (n, H), sequences laid end to end.

    sequences: B lists of ids; a span: starts (B,) and lengths (B,) of one stretch of every sequence. All lie in
    one row, without padding, and none sees another; a model that can't do that reads them one by one.
    """
    model = _causal_lm(model)
    decoder, device, lengths = model.get_decoder(), model.device, torch.tensor([len(s) for s in sequences])
    ends = lengths.cumsum(0)
    ids = _on(device, [[i for s in sequences for i in s]])
    if _packs(model):
        # The empty mask keeps transformers from making one, T x T; and if a model lost `packed` on its way to
        # the attention, it could not go on with it.
        states = decoder(input_ids=ids, position_ids=_ranges(device, ends * 0, lengths)[None], use_cache=False,
                         attention_mask=torch.empty(1, 1, 0, 0),
                         packed=(lengths.tolist(), _on(device, F.pad(ends, (1, 0)).int()))).last_hidden_state
    else:
        _one_by_one(type(model).__name__)
        states = torch.cat([decoder(input_ids=one, use_cache=False).last_hidden_state
                            for one in ids.split(lengths.tolist(), 1)], 1)
    states = states[0].to(model.get_output_embeddings().weight.dtype)
    return [states.index_select(0, _ranges(states.device, ends - lengths - 1 + start, n)) for start, n in spans]


@functools.cache
def _one_by_one(name):
    """Says so, once."""
    print(f"rewards.py: {name} reads sequences one by one: its attention can't be packed", file=sys.stderr)


def _packs(model):
    """Whether sequences can lie end to end in one row: every layer's attention is full, and torch's sdpa.

    Such a model gets `_packed_attention` for good, since the backward of a checkpointed layer looks it up again.
    Outside of here that is sdpa, mask and all: the model samples as before.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [getattr(config, "sliding_window", None) or "full_attention"]
    if model._supports_attention_backend and config._attn_implementation == "sdpa" and {*kinds} == {"full_attention"}:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        AttentionInterface.register("packed", _packed_attention)
        AttentionMaskInterface.register("packed", sdpa_mask)
        model.set_attn_implementation("packed")
    return config._attn_implementation == "packed"


def _packed_attention(module, query, key, value, attention_mask, packed=None, **options):
    """Causal attention of sequences that lie end to end in one row, each for itself; no T x T mask.

    query (1, heads, T, D), key and value of fewer heads, or as many -> (1, T, heads, D), None
    packed: lengths (B,) on the host, and their running sums from 0 on (B + 1,), int32. None: this is sdpa.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    (lengths, bounds), scale, dropout = packed, options["scaling"], options.get("dropout", 0.0)
    size = query.shape[3]
    flash = query.is_cuda and query.itemsize == 2 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if flash and size == value.shape[3] <= 256 and size % 8 == 0 and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        fewer = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        out = varlen_attn(*(x[0].transpose(0, 1) for x in (query, key, value)), bounds, bounds, max(lengths),
                          max(lengths), scale=scale, window_size=(-1, 0), **fewer)  # nothing ahead: causal
        return out[None], None
    if query.is_cuda:  # else SDPA's kernel for shared heads would be the one that holds all T x T scores
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, dropout_p=dropout,
                                          enable_gqa=not query.is_cuda) for part in parts]
    return torch.cat(out, 2).transpose(1, 2), None


def micro_batches(lengths, tokens):
    """Lists of row numbers, longest rows first; a list of more than one row has at most `tokens` tokens."""
    batch, left = [], tokens
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[i] > left:
            yield batch
            batch, left = [], tokens
        batch.append(i)
        left -= lengths[i]
    if batch:
        yield batch


def _ranges(device, starts, lengths):
    """start, start + 1, ..., start + length - 1 of every pair, laid end to end."""
    skipped = starts - (lengths.cumsum(0) - lengths)
    return _on(device, torch.arange(int(lengths.sum())) + skipped.repeat_interleave(lengths))


def _ids(lists, head):
    weight, _ = head
    ids = torch.tensor([i for ids in lists for i in ids], dtype=torch.long)
    if len(ids) and not 0 <= ids.min() <= ids.max() < len(weight):
        raise ValueError(f"token ids run from {ids.min()} to {ids.max()}, expected 0 to {len(weight) - 1}: "
                         "the tokenizer has more of them than vocab or the head")
    return _on(weight.device, ids)


def _on(device, data):
    """From the host to a device, without waiting for it."""
    data = torch.as_tensor(data)
    return data.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else data.to(device)


def _chunks(n, size):
    return [slice(start, min(start + size, n)) for start in range(0, n, size)] or [slice(0, 0)]


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
