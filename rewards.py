# SPDX-License-Identifier: MIT
"""
The reward of Reinforcement-Learned Teachers (arXiv 2506.08388). Copy this file alone: it needs torch, and triton on a GPU.

A teacher sees a question and its solution and writes a thought. A frozen student, shown the question and that
thought, says how likely the solution is, and how natural the thought itself was:

    score  = mean + alpha * min  over solution tokens  of  log p_student(token)           equation (3)
    kl     = mean + alpha * max  over thought tokens   of  KL(p_teacher || p_student)     equation (4)
    reward = score - lambda * kl                                                          equation (5)

`token_stats` and `token_logprobs` reduce logits to one number a token, `segment_stats` and `rlt_reward` reduce tokens
to one number a sequence, `score_explanations` does it all from two models and token ids, and `completion_logprobs` is
the policy pass with a gradient. No tensor of [tokens, vocabulary] larger than one chunk of `head_chunk` tokens exists.

    python rewards.py            an example computed by hand
    python rewards.py --check    torch and Triton on this machine, against float64
"""

import functools
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # "auto" is then torch on a CPU and an error on a GPU: see `implementation`
    triton = None


class TokenStats(NamedTuple):
    kl: Tensor
    teacher_logprob: Tensor
    student_logprob: Tensor
    teacher_entropy: Tensor


class SegmentStats(NamedTuple):
    mean: Tensor
    min: Tensor
    max: Tensor
    argmin: Tensor
    argmax: Tensor


class RLTReward(NamedTuple):
    reward: Tensor
    score: Tensor
    kl: Tensor
    score_mean: Tensor
    score_min: Tensor
    kl_mean: Tensor
    kl_max: Tensor


class Row(NamedTuple):
    """One explanation as six lists of token ids. The teacher reads teacher_prompt + thought + teacher_end, the student
    student_prompt + thought + bridge + solution; the kl compares the thought, the score is about the solution."""

    teacher_prompt: list[int]
    thought: list[int]
    teacher_end: list[int]
    student_prompt: list[int]
    bridge: list[int]
    solution: list[int]


class Scored(NamedTuple):
    """B rows scored. Token values are packed: the sequences laid end to end, in the order of the rows."""

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
    """"triton" or "torch" for `impl` on a device type; "auto" says once which it picked, and never picks a slow way out."""
    if impl == "auto":
        if device_type == "cuda" and triton is None:
            raise RuntimeError("impl='auto' means Triton on a GPU, and triton is not installed: "
                               "pip install triton, or pass impl='torch'")
        impl = "triton" if device_type == "cuda" else "torch"
        print(f"rewards.py: {impl} on {device_type}", file=sys.stderr)
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'torch' or 'triton'")
    if impl == "triton":
        raise NotImplementedError("impl='triton' is not written yet: pass impl='torch'")
    return impl


# ---------------------------------------------------------------------------------------------------------------------
# Logits to one number a token


def token_stats(teacher_logits, student_logits, token_ids, *, teacher_temperature=1.0, student_temperature=1.0,
                vocab=None, impl="auto"):
    """What the reward needs of every token, from both models' logits. Exact over the vocabulary; in nats.

    teacher_logits (N, Vt), student_logits (N, Vs), token_ids (N,) -> TokenStats, each (N,) float32
        kl               KL(p_teacher || p_student), p = softmax(logits / temperature)
        teacher_logprob  log p_teacher[token_ids]
        student_logprob  log p_student[token_ids]
        teacher_entropy  of p_teacher

    vocab: columns from there on are ignored on both sides. None: all count, and a column that one side lacks is -inf
    there. A teacher logit above -inf where the student's is -inf gives kl = +inf. A row that is -inf throughout is no
    distribution and gives NaN. impl "torch" can be differentiated, "triton" cannot. float64 stays float64 in torch.
    """
    teacher, student = _columns(teacher_logits, vocab), _columns(student_logits, vocab)
    _check_rows(token_ids, teacher_temperature, teacher, student)
    _check_rows(token_ids, student_temperature, student)
    implementation(impl, teacher.device.type)
    blocks = [_token_stats_torch(t, s, i, teacher_temperature, student_temperature) for t, s, i in _blocks(
        teacher, student, token_ids)]
    return TokenStats(*map(torch.cat, zip(*blocks, strict=True)))


def token_logprobs(logits, token_ids, *, temperature=1.0, vocab=None, impl="auto"):
    """logits (N, V), token_ids (N,) -> log p[token_ids] and the entropy of p = softmax(logits / temperature), each (N,)."""
    logits = _columns(logits, vocab)
    _check_rows(token_ids, temperature, logits)
    implementation(impl, logits.device.type)
    blocks = [_token_logprobs_torch(x, i, temperature) for x, i in _blocks(logits, token_ids)]
    return tuple(map(torch.cat, zip(*blocks, strict=True)))


def _columns(logits, vocab):
    return logits if vocab is None else logits[:, :vocab]


def _check_rows(token_ids, temperature, *logits):
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0: score greedy samples at 1")
    for x in logits:
        if x.dim() != 2 or token_ids.shape != x.shape[:1]:
            raise ValueError(f"logits are {tuple(x.shape)} and token_ids {tuple(token_ids.shape)}, "
                             "expected (N, V) and (N,): flatten batch and position first")


def _blocks(*tensors):
    """Split along the rows, so that temporaries stay small beside the logits; an empty tensor is one empty block."""
    rows = max(1, 2**22 // tensors[0].shape[1])
    return zip(*(x.split(rows) for x in tensors), strict=True)


def _centred(logits, temperature):
    """log-weights with a maximum of 0. Subtracting before dividing keeps every digit of logits with a large offset."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits - logits.amax(1, keepdim=True)) / temperature


def _at(z, token_ids):
    """z[i, token_ids[i]], and -inf where the column does not exist."""
    known = (token_ids >= 0) & (token_ids < z.shape[1])
    return torch.where(known, z.gather(1, token_ids.where(known, 0)[:, None])[:, 0], -torch.inf)


def _expect(p, x):
    """sum p * x over the columns where p > 0, so that 0 * inf is nothing."""
    return torch.where(p > 0, p * x, 0).sum(1)


def _token_logprobs_torch(logits, token_ids, temperature):
    z = _centred(logits, temperature)
    p = z.exp()
    total = p.sum(1)
    return _at(z, token_ids) - total.log(), total.log() - _expect(p, z) / total


def _token_stats_torch(teacher, student, token_ids, teacher_temperature, student_temperature):
    # With t, s centred and Z = sum exp:  kl = sum p (t - s) - log Z_t + log Z_s.  The difference is taken before the
    # sum and the ratio before the logarithm, so two nearly equal models lose no digits to cancellation.
    t, s = _centred(teacher, teacher_temperature), _centred(student, student_temperature)
    width = max(t.shape[1], s.shape[1])
    t, s = (F.pad(z, (0, width - z.shape[1]), value=-torch.inf) for z in (t, s))
    p = t.exp()
    total_t, total_s = p.sum(1), s.exp().sum(1)
    kl = _expect(p, t - s) / total_t + (total_s / total_t).log()
    impossible = ((t > -torch.inf) & (s == -torch.inf)).any(1)
    return (kl.masked_fill(impossible, torch.inf), _at(t, token_ids) - total_t.log(),
            _at(s, token_ids) - total_s.log(), total_t.log() - _expect(p, t) / total_t)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens to one number a sequence


def segment_stats(values, lengths, *, impl="auto"):
    """values (N,) of B sequences laid end to end, lengths (B,) on the host -> SegmentStats, each (B,).

    argmin and argmax are the first position of the extreme within its own sequence, int64: of a solution's log-probs,
    argmin is the hardest leap. An empty sequence raises ValueError. On a GPU nothing is copied back to the host.
    """
    lengths = _lengths("values", values, lengths)
    implementation(impl, values.device.type)
    parts = values.split(lengths)
    low, high = [part.min(0) for part in parts], [part.max(0) for part in parts]
    return SegmentStats(torch.stack([part.mean() for part in parts]), *(
        torch.stack(column) for column in ([x.values for x in low], [x.values for x in high],
                                           [x.indices for x in low], [x.indices for x in high])))


def _lengths(name, values, lengths):
    assert not (isinstance(lengths, Tensor) and lengths.is_cuda), "lengths live on the host"
    lengths = [int(n) for n in lengths]
    if 0 in lengths:
        raise ValueError(f"row {lengths.index(0)} has no {name}, expected at least one token: decide what an empty row "
                         "counts as before calling")
    if sum(lengths) != len(values):
        raise ValueError(f"{name} has {len(values)} tokens and the lengths add up to {sum(lengths)}")
    return lengths


def rlt_reward(solution_logprobs, solution_lengths, token_kl, thought_lengths, *, lam=3.0, alpha=0.01, impl="auto"):
    """Equations (3), (4), (5) of arXiv 2506.08388. Packed tokens of B rows -> RLTReward, each (B,).

    solution_logprobs: the student's, in nats, solution_lengths (B,); token_kl: in nats, thought_lengths (B,).
    lam and alpha default to the paper's. An empty thought or solution raises ValueError naming the row.
    """
    s = segment_stats(solution_logprobs, _lengths("solution", solution_logprobs, solution_lengths), impl=impl)
    k = segment_stats(token_kl, _lengths("thought", token_kl, thought_lengths), impl=impl)
    score = s.mean + alpha * s.min
    kl = k.mean + alpha * k.max
    return RLTReward(score - lam * kl, score, kl, s.mean, s.min, k.mean, k.max)


# ---------------------------------------------------------------------------------------------------------------------
# Two models to rewards


@torch.no_grad()
def score_explanations(teacher, student, rows, *, lam=3.0, alpha=0.01, kl="exact", temperature=1.0,
                       policy_temperature=None, vocab=None, head_chunk=1024, micro_batch_tokens=16_384,
                       logits_dtype=torch.float32, impl="auto"):
    """Reward explanations, and get the teacher's old log-probs and entropies from the same forward pass -> Scored.

    teacher, student: Hugging Face causal LMs (a PeftModel too), in the mode they are in; rows: B times the six fields
    of `Row`. kl: "exact" sums over the vocabulary, "sampled" is log p_teacher - log p_student of the sampled token, as
    the released code does. temperature divides both models' logits in score and kl, policy_temperature those of old
    log-probs and entropies (None: the same). vocab: len(tokenizer); the head's columns beyond it are never multiplied.
    micro_batch_tokens: padded tokens of one forward pass; a longer row has a pass of its own.

    A thought without tokens counts as 1 in the mean and in the max of kl, as released. An empty solution raises
    ValueError naming the row.
    """
    if kl not in ("exact", "sampled"):
        raise ValueError(f"kl is {kl!r}, expected 'exact' or 'sampled'")
    rows = [Row(*map(list, row)) for row in rows]
    n = torch.tensor([[len(ids) for ids in row] for row in rows]).view(-1, 6)  # (B, 6) lengths, on the host
    if 0 in n[:, 5]:
        raise ValueError(f"row {n[:, 5].tolist().index(0)} has an empty solution, so nothing to score: drop the row")
    policy_temperature = policy_temperature or temperature
    head_t, head_s = _head(teacher, vocab), _head(student, vocab)
    device = head_t[0].device
    buffer_t, buffer_s = (torch.empty(min(head_chunk, int(n.sum())), len(weight), dtype=logits_dtype, device=weight.device)
                          for weight, _ in (head_t, head_s))

    thought, completion, solution = n[:, 1], n[:, 1] + n[:, 2], n[:, 5]
    token_kl = torch.empty(int(thought.sum()), device=device)
    old_logprobs, entropies = torch.empty(2, int(completion.sum()), device=device)
    solution_logprobs = torch.empty(int(solution.sum()), device=device)
    thought_at, completion_at, solution_at = (x.cumsum(0) - x for x in (thought, completion, solution))

    for b in _micro_batches(torch.maximum(n[:, :3].sum(1), n[:, [3, 1, 4, 5]].sum(1)).tolist(), micro_batch_tokens):
        batch = [rows[i] for i in b]
        tp, th, te, sp, br, so = n[b].unbind(1)

        # 1. hidden states that predict thought and end under the teacher, thought and solution under the student
        hidden_t = _hidden(teacher, [r.teacher_prompt + r.thought + r.teacher_end for r in batch],
                           (tp, th), (tp + th, te))
        hidden_s = _hidden(student, [r.student_prompt + r.thought + r.bridge + r.solution for r in batch],
                           (sp, th), (sp + th + br, so))
        hidden_t, hidden_end = hidden_t.split([int(th.sum()), int(te.sum())])
        hidden_s, hidden_solution = hidden_s.split([int(th.sum()), int(so.sum())])

        # 2. thoughts: a chunk of logits from each model, reduced together; old log-probs come from the same logits
        ids = _ids([r.thought for r in batch], device)
        kl_at, old_at = _ranges(device, (thought_at[b], th)), _ranges(device, (completion_at[b], th))
        for c in _chunks(len(ids), head_chunk):
            logits_t = _logits(hidden_t[c], *head_t, buffer_t)
            logits_s = _logits(hidden_s[c], *head_s, buffer_s).to(device)
            stats = token_stats(logits_t, logits_s, ids[c], teacher_temperature=temperature,
                                student_temperature=temperature, impl=impl)
            token_kl[kl_at[c]] = stats.kl if kl == "exact" else stats.teacher_logprob - stats.student_logprob
            old = stats.teacher_logprob, stats.teacher_entropy
            if policy_temperature != temperature:
                old = token_logprobs(logits_t, ids[c], temperature=policy_temperature, impl=impl)
            old_logprobs[old_at[c]], entropies[old_at[c]] = old

        # 3. the teacher's end tokens and the solutions: one model each
        at = _ranges(device, (completion_at[b] + th, te))
        old_logprobs[at], entropies[at] = _head_logprobs(
            hidden_end, *head_t, _ids([r.teacher_end for r in batch], device), policy_temperature, buffer_t, impl)
        logprobs, _ = _head_logprobs(hidden_solution, *head_s, _ids([r.solution for r in batch], head_s[0].device),
                                     temperature, buffer_s, impl)
        solution_logprobs[_ranges(device, (solution_at[b], so))] = logprobs.to(device)

    counted = thought.clamp(min=1)  # an empty thought is one token of kl 1
    kl_values = torch.ones(int(counted.sum()), device=device)
    kl_values[_ranges(device, (counted.cumsum(0) - counted, thought))] = token_kl
    reward = rlt_reward(solution_logprobs, solution, kl_values, counted, lam=lam, alpha=alpha, impl=impl)
    return Scored(reward, token_kl, old_logprobs, entropies, solution_logprobs,
                  thought.tolist(), completion.tolist(), solution.tolist())


def completion_logprobs(model, prompts, completions, *, temperature=1.0, vocab=None, head_chunk=1024, impl="auto"):
    """Log-probs of B completions (lists of token ids) after their prompts, and entropies: packed, (N,) float32 each.

    One forward pass, one micro-batch: the caller splits. With grad enabled the log-probs carry it, and memory does not
    depend on the vocabulary: the backward computes each chunk's logits again. Entropies carry none. A head that is
    frozen gets no gradient buffer. Values are the same bits with grad and without.
    """
    weight, bias = _head(model, vocab)
    n = torch.tensor([[len(p), len(c)] for p, c in zip(prompts, completions, strict=True)])
    hidden = _hidden(model, [[*p, *c] for p, c in zip(prompts, completions, strict=True)], tuple(n.unbind(1)))
    return _HeadLogprobs.apply(hidden, weight, bias, _ids(completions, weight.device), temperature, head_chunk, impl)


class _HeadLogprobs(torch.autograd.Function):
    """hidden (N, H) -> log p[ids], entropy, each (N,), through logits = hidden @ weight.T + bias, a chunk at a time.

    gradient   d logprob / d logits = (onehot(ids) - softmax(logits / T)) / T
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, temperature, head_chunk, impl):
        buffer = hidden.new_empty(min(head_chunk, max(1, len(ids))), len(weight), dtype=_logits_dtype(hidden))
        logprobs, entropies = _head_logprobs(hidden, weight, bias, ids, temperature, buffer, impl)
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.temperature, ctx.head_chunk = temperature, head_chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _):
        hidden, weight, bias, ids = ctx.saved_tensors
        buffer = hidden.new_empty(min(ctx.head_chunk, max(1, len(ids))), len(weight), dtype=_logits_dtype(hidden))
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=buffer.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=buffer.dtype) if ctx.needs_input_grad[2] else None
        for c in _chunks(len(ids), ctx.head_chunk):
            g = (grad_logprobs[c] / ctx.temperature)[:, None]
            z = _logits(hidden[c], weight, bias, buffer)
            z.sub_(z.amax(1, keepdim=True)).div_(ctx.temperature).exp_()  # in place: the buffer is the only [c, V]
            z.mul_(-g / z.sum(1, keepdim=True)).scatter_add_(1, ids[c, None], g)
            if grad_bias is not None:
                grad_bias += z.sum(0)
            z = z.to(weight.dtype)
            grad_hidden[c] = z @ weight
            if grad_weight is not None:
                grad_weight += z.T @ hidden[c]
        return (grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype),
                None if grad_bias is None else grad_bias.to(bias.dtype), None, None, None, None)


def _head_logprobs(hidden, weight, bias, ids, temperature, buffer, impl):
    chunks = [token_logprobs(_logits(h, weight, bias, buffer), i, temperature=temperature, impl=impl)
              for h, i in zip(hidden.split(len(buffer)), ids.split(len(buffer)), strict=True)]
    return tuple(map(torch.cat, zip(*chunks, strict=True)))


def _logits(hidden, weight, bias, buffer):
    """hidden (n, H) @ weight (V, H).T + bias into buffer's first n rows, in the buffer's dtype."""
    out = buffer[: len(hidden)]
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif out.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:  # no CPU matmul widens its result: widen a slice of the head at a time
        for v in _chunks(len(weight), 2**14):
            out[:, v] = hidden.to(out.dtype) @ weight[v].to(out.dtype).T
    return out if bias is None else out.add_(bias)


def _logits_dtype(hidden):
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _base(model):
    """The Hugging Face causal LM itself; a LoRA adapter lives inside its layers, so nothing of a PeftModel is lost."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise NotImplementedError("prompt-learning adapters are not supported: use one that lives in the layers, as LoRA")
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model, vocab):
    """(weight (V, H), bias or None) of the head, cut to the first `vocab` rows."""
    base = _base(model)
    config = base.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise NotImplementedError(f"{type(base).__name__} has {name}={getattr(config, name)} after its head, which "
                                      "the chunked head does not apply: score with a model without it")
    head = base.get_output_embeddings()
    assert type(head) is torch.nn.Linear, f"the head must be a plain, unquantised Linear, not {type(head).__name__}"
    return head.weight[:vocab], head.bias if head.bias is None else head.bias[:vocab]


def _hidden(model, sequences, *spans):
    """Hidden states that predict the tokens of each span, laid end to end -> (N, H).

    sequences: B lists of ids; a span is (starts (B,), lengths (B,)), one stretch of every sequence. Sequences are padded
    on the right and attention is causal, so no mask is needed and positions count from 0 by themselves.
    """
    base = _base(model)
    width = max(map(len, sequences))
    ids = _on(base.device, [s + [0] * (width - len(s)) for s in sequences])
    states = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    row = torch.arange(len(sequences)) * width
    at = _ranges(states.device, *((row + starts - 1, lengths) for starts, lengths in spans))
    weight = base.get_output_embeddings().weight
    return states.index_select(0, at).to(weight)


def _micro_batches(lengths, tokens):
    """Lists of row numbers, longest rows first, so that each list padded to its longest row holds at most `tokens`."""
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _ranges(device, *spans):
    """start, start + 1, ... for every (start, length) of every span, laid end to end, on `device`."""
    starts, lengths = (torch.cat(x) for x in zip(*spans, strict=True))
    within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return _on(device, starts.repeat_interleave(lengths) + within)


def _ids(lists, device):
    return _on(device, [i for ids in lists for i in ids], torch.long)


def _on(device, data, dtype=None):
    """Host to device without waiting for the device."""
    data = torch.as_tensor(data, dtype=dtype)
    return data.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else data.to(device)


def _chunks(n, size):
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


# ---------------------------------------------------------------------------------------------------------------------
# python rewards.py


def _example():
    """Two tokens of vocabulary, by hand: a fair teacher, a student at 3:1, and two solution tokens at 1/2 and 1/4."""
    stats = token_stats(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]), impl="torch")
    # KL = 1/2 log(1/2 : 3/4) + 1/2 log(1/2 : 1/4) = log 2 - 1/2 log 3 = 0.143841
    reward = rlt_reward(torch.tensor([0.5, 0.25]).log(), [2], stats.kl, [1], lam=3.0, alpha=0.01, impl="torch")
    # score = -3/2 log 2 - 0.01 * 2 log 2 = -1.053584; kl = 1.01 * 0.143841 = 0.145279; reward = -1.489422
    for name, got, want in (("score", reward.score, -1.053584), ("kl", reward.kl, 0.145279),
                            ("reward", reward.reward, -1.489422)):
        print(f"{name:7}{got.item():10.6f}   by hand {want:10.6f}")
        assert abs(got.item() - want) < 1e-6, name


if __name__ == "__main__":
    _example()
