# SPDX-License-Identifier: MIT
"""
Log-probs of completions with a gradient, and the exact KL with one: what the policy update needs beside the reward.

As in rewards.py, sequences are packed, and logits exist for one chunk of tokens at a time. The backward pass computes
each chunk's logits again, so memory does not depend on the vocabulary there either.
"""

import sys
from typing import NamedTuple

import torch

from rewards import (
    LOGITS_CHUNK,
    centred,
    chunk_slices,
    compute_logits,
    flat_ids,
    head_logprobs,
    hidden_states,
    logits_buffer,
    micro_batches,
    output_head,
    output_heads,
    token_stats,
)


class KLRow(NamedTuple):
    """Token ids of a sampled text, as the model that learns reads it, and as a frozen one does."""

    prompt: list  # what the learner reads before the thought
    thought: list  # it has a KL
    end: list  # what the learner writes to end it, without a KL
    frozen_prompt: list  # what the frozen model reads before the thought
    solution: list = []  # what the learner writes behind the end
    opening: list = []  # what the learner writes before the thought, behind its prompt


def completion_logprobs(model, prompts, completions, *, temperature=1.0, vocab=None, head_chunk=LOGITS_CHUNK,
                        impl="auto"):
    """Log-probs and entropies of B completions (lists of ids) after their prompts: packed, (N,) float32 each, nats.

    One forward pass, one micro-batch: the caller splits, see rewards.micro_batches. Where grad is enabled the
    log-probs carry it; entropies never do. A frozen head gets no gradient buffer. The values are the same bits with
    grad and without. vocab, head_chunk: as in rewards.score_explanations. Raises ValueError for no completions, and
    for ids that the head does not have.
    """
    if not completions:
        raise ValueError("there are no completions, expected at least one")
    head = output_head(model, vocab)
    prompt_lengths = torch.tensor([len(ids) for ids in prompts])
    completion_lengths = torch.tensor([len(ids) for ids in completions])
    sequences = [[*p, *c] for p, c in zip(prompts, completions, strict=True)]
    [states] = hidden_states(model, sequences, (prompt_lengths, completion_lengths))
    return _HeadLogprobs.apply(states, *head, flat_ids(completions, head), temperature, head_chunk, impl)


def completion_logprobs_and_kl(learner, frozen, rows, *, forward_share=0.0, temperature=1.0, vocab=None,
                               head_chunk=LOGITS_CHUNK, impl="auto"):
    """The learner's log-probs of what it writes, and the exact KL of thoughts to a frozen model, both with gradient.

    rows: B KLRows, one micro-batch -> log-probs of opening + thought + end + solution, packed row by row, and kl of the
    thoughts' tokens, packed. The KL's gradient is the one through the learner's distribution.
    forward_share: f in  (1 - f) KL(learner || frozen) + f KL(frozen || learner). vocab: ids that are read, or
    those of the smaller head where that has fewer, or None is given.
    """
    n = KLRow(*torch.tensor([[len(ids) for ids in row] for row in rows]).unbind(1))  # lengths, on the host
    head, frozen_head = output_heads((learner, frozen), sys.maxsize if vocab is None else vocab)
    completions = [row.opening + row.thought + row.end + row.solution for row in rows]
    states_thought, states_completion = hidden_states(
        learner, [row.prompt + ids for row, ids in zip(rows, completions, strict=True)],
        (n.prompt + n.opening, n.thought), (n.prompt, n.opening + n.thought + n.end + n.solution))
    with torch.no_grad():
        [frozen_states] = hidden_states(frozen, [row.frozen_prompt + row.thought for row in rows],
                                        (n.frozen_prompt, n.thought))
    ids = flat_ids(completions, head)
    logprobs, _ = _HeadLogprobs.apply(states_completion, *head, ids, temperature, head_chunk, impl)
    kl = _HeadKL.apply(states_thought, *head, frozen_states, *frozen_head, forward_share, temperature, head_chunk, impl)
    return logprobs, kl


@torch.no_grad()
def batched_logprobs(model, prompts, completions, *, micro_batch_tokens, **options):
    """completion_logprobs of any number of completions, in their order: without gradient, and in micro-batches."""
    lengths = [len(ids) for ids in completions]
    widths = [len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True)]
    parts = {}
    for indices in micro_batches(widths, micro_batch_tokens, prompts):
        packed = completion_logprobs(model, [prompts[i] for i in indices], [completions[i] for i in indices], **options)
        split = [values.split([lengths[i] for i in indices]) for values in packed]
        parts |= dict(zip(indices, zip(*split, strict=True), strict=True))
    empty = torch.empty(0, device=output_head(model)[0].device)
    return tuple(torch.cat([empty, *(parts[i][kind] for i in range(len(parts)))]) for kind in (0, 1))


class _HeadLogprobs(torch.autograd.Function):
    """states (N, H) -> log p[ids] and entropy, (N,) each, of states @ weight.T + bias, a chunk at a time.

    gradient   d logprob / d logits = (onehot(ids) - softmax(logits / temperature)) / temperature
    """

    @staticmethod
    def forward(ctx, states, weight, bias, ids, temperature, head_chunk, impl):
        buffer = logits_buffer((weight, bias), min(head_chunk, len(ids)))
        logprobs, entropies = head_logprobs(states, (weight, bias), ids, temperature, buffer, impl)
        ctx.save_for_backward(states, weight, bias, ids)
        ctx.temperature, ctx.head_chunk = temperature, head_chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, _):
        states, weight, bias, ids = ctx.saved_tensors
        buffer = logits_buffer((weight, bias), min(ctx.head_chunk, len(ids)))
        grad_states = torch.empty_like(states)
        _, weight_needed, bias_needed, *_ = ctx.needs_input_grad
        grad_weight = torch.zeros_like(weight, dtype=buffer.dtype) if weight_needed else None
        grad_bias = torch.zeros_like(bias, dtype=buffer.dtype) if bias_needed else None
        for c in chunk_slices(len(ids), ctx.head_chunk):
            grad = (grad_logprobs[c] / ctx.temperature)[:, None]
            # softmax and gradient in the memory of the logits
            z = compute_logits(states[c], (weight, bias), buffer)[:, : len(weight)]
            z.sub_(z.amax(1, keepdim=True)).div_(ctx.temperature).exp_()
            z.mul_(-grad / z.sum(1, keepdim=True)).scatter_add_(1, ids[c, None], grad)
            if bias_needed:
                grad_bias += z.sum(0)
            z = z.to(weight.dtype)
            grad_states[c] = z @ weight
            if weight_needed:
                grad_weight += z.T @ states[c]
        return grad_states, grad_weight, grad_bias, None, None, None, None


class _HeadKL(torch.autograd.Function):
    """states of the learner and of the frozen model, (N, H) each -> kl (N,), a chunk of logits at a time.

    kl         (1 - f) sum p (log p - log q)  +  f sum q (log q - log p),  f = forward_share
               p of the learner, q of the frozen model
    gradient   by the learner's logits: ((1 - f) p (log p - log q - sum p (log p - log q))  +  f (p - q)) / temperature;
               none for the heads, which are frozen
    """

    @staticmethod
    def forward(ctx, states, weight, bias, frozen_states, frozen_weight, frozen_bias, forward_share, temperature,
                head_chunk, impl):
        assert not weight.requires_grad, "the head must be frozen"
        saved = states, weight, bias, frozen_states, frozen_weight, frozen_bias
        ctx.save_for_backward(*saved)
        ctx.forward_share, ctx.temperature, ctx.head_chunk = forward_share, temperature, head_chunk
        options = dict(teacher_temperature=temperature, student_temperature=temperature, impl=impl)
        kl = []
        for _, logits, frozen_logits in _logits_of_both(*saved, head_chunk):
            any_ids = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
            reverse, forward = (logits, frozen_logits), (frozen_logits, logits)
            parts = [(share, pair) for share, pair in ((1 - forward_share, reverse), (forward_share, forward)) if share]
            kl.append(sum(share * token_stats(*pair, any_ids, **options).kl for share, pair in parts))
        return torch.cat(kl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        states, weight, *_ = ctx.saved_tensors
        grad_states = torch.empty_like(states)
        for c, logits, frozen_logits in _logits_of_both(*ctx.saved_tensors, ctx.head_chunk):
            log_p = centred(logits, ctx.temperature).log_softmax(1)
            log_q = centred(frozen_logits, ctx.temperature).log_softmax(1)
            p = log_p.exp()
            difference = torch.where(p > 0, log_p - log_q, 0)
            kl = (p * difference).sum(1, keepdim=True)
            grad = p * (difference - kl)
            if ctx.forward_share:
                grad = torch.lerp(grad, p - log_q.exp(), ctx.forward_share)
            grad = grad * (grad_kl[c] / ctx.temperature)[:, None]
            grad_states[c] = grad[:, : len(weight)].to(weight.dtype) @ weight
        return grad_states, *[None] * 9


def _logits_of_both(states, weight, bias, frozen_states, frozen_weight, frozen_bias, head_chunk):
    """(slice, the learner's logits, the frozen model's) of one chunk after the other, in two buffers."""
    head, frozen_head = (weight, bias), (frozen_weight, frozen_bias)
    buffer = logits_buffer(head, min(head_chunk, len(states)))
    frozen_buffer = logits_buffer(frozen_head, min(head_chunk, len(states)))
    for c in chunk_slices(len(states), head_chunk):
        logits = compute_logits(states[c], head, buffer)
        frozen_logits = compute_logits(frozen_states[c], frozen_head, frozen_buffer)
        yield c, logits, frozen_logits.to(logits.device)
