# SPDX-License-Identifier: MIT
"""
The mathematics of GRPO: rewards to advantages, log-probs and advantages to a loss. Tensors in, tensors out.

    A_i    = (reward_i - mean of its group) / (std of its group + eps)      DeepSeekMath, arXiv 2402.03300
    r_t    = pi(token_t) / pi_old(token_t)
    k3_t   = pi_ref / pi - log(pi_ref / pi) - 1 at token_t: never negative, its mean is KL(pi || pi_ref)
    loss_t = -min(r_t A_i, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_i) + beta * k3_t

The four losses differ in how they add up tokens, and gspo in its ratio as well:

    grpo     mean over each sequence's tokens, then mean over sequences
    dapo     mean over the tokens of all sequences                          DAPO, arXiv 2503.14476
    dr_grpo  sum over tokens / (sequences * max_new_tokens)                 Dr. GRPO, arXiv 2503.20783
    gspo     as grpo, with one ratio a sequence: the geometric mean of r_t  GSPO, arXiv 2507.18071

Completions lie end to end in packed (N,) tensors, so there is no padding to mask. Every mean is a sum over a
denominator that counts the whole optimizer step: losses, gradients and stats of micro-batches simply add up.
"""

import math

from rlt.errors import UserError

import torch

from rewards import to_device

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")


def group_advantages(rewards, *, scale="std", eps=1e-4):
    """How much better each sample did than the others of its group.

    rewards (P, G), one row of G samples per prompt -> (P, G), every row with mean 0.
    scale: "std" divides by the row's unbiased standard deviation + eps (the RLT release), "none" doesn't
    (Dr. GRPO). A row whose rewards are all equal gives exact zeros: its prompt teaches nothing.
    Raises ValueError on a group of one and an unknown scale, UserError on a reward that is not finite.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"advantage scale {scale!r}: expected 'std' or 'none'.")
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)}: expected (prompts, samples) with 2 or "
                         "more samples, since each is judged against the others of its group.")
    if not rewards.isfinite().all():
        p, g = (~rewards.isfinite()).nonzero()[0].tolist()
        raise UserError(f"the reward of prompt {p}, sample {g} of a step is {rewards[p, g].item()}, expected a finite "
                        "number: teacher or student computes NaN or infinity. Load them in more bits.")
    return (rewards - rewards.mean(dim=1, keepdim=True)) * group_scale(rewards, scale=scale, eps=eps)


def group_scale(rewards, *, scale="std", eps=1e-4):
    """What group_advantages multiplies the distances to a row's mean by: rewards (P, G) -> (P, 1).

    1 / (std + eps), or 1 for scale "none"; 0 where a row's rewards are all equal: the rounded mean of equal
    numbers need not be that number, and dividing by eps would blow the rest up.
    """
    all_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    factor = 1 / (rewards.std(dim=1, keepdim=True) + eps) if scale == "std" else torch.ones_like(rewards[:, :1])
    return torch.where(all_equal, 0.0, factor)


def step_denominator(loss, *, sequences, tokens, max_new_tokens):
    """What a loss divides by, from the counts of a whole optimizer step: all micro-batches on all ranks."""
    return {"grpo": sequences, "gspo": sequences, "dapo": tokens, "dr_grpo": sequences * max_new_tokens}[loss]


def tis_weights(trainer_logprobs, sampler_logprobs, cap):
    """Truncated importance sampling, for a sampling engine whose log-probs are not quite the trainer's.

    trainer_logprobs, sampler_logprobs: (N,) nats of the sampled tokens under the same weights -> weights (N,), without
    gradient: min(exp(trainer - sampler), cap), and {"tis_weight": their mean, "tis_capped": share at the cap}. Where
    both agree all weights are exactly 1. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training" (cap 2 in verl and TRL).
    """
    log_weights = (trainer_logprobs - sampler_logprobs).detach()
    weights = log_weights.clamp(max=math.log(cap)).exp()
    capped = (log_weights > math.log(cap)).float()
    return weights, {"tis_weight": weights.mean().item(), "tis_capped": capped.mean().item()}


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, lengths, *, denominator,
              epsilon_low=0.2, epsilon_high=0.2, beta=0.0, loss="grpo", token_weights=None):
    """The clipped loss of a micro-batch: B sequences with N completion tokens in all -> (loss (), stats).

    logprobs, old_logprobs, ref_logprobs: (N,) nats of the sampled tokens under the policy (with gradient),
      the policy that sampled, and the reference (or None where beta is 0: then no KL is logged). old_logprobs None
      are the policy's own, without gradient: right in the first update of a batch, and free of rounding.
    advantages: (B,). lengths: (B,) tokens of each sequence, on the host. denominator: from step_denominator.
    token_weights: (N,) factors of the clipped term, from tis_weights; None: 1.
    stats: sums over tokens; added over micro-batches and divided by the step's tokens they are
      clip_fraction, tokens without gradient because the ratio (in gspo their sequence's) left its range, and
      kl_ref, nats per token. So no logged number depends on the size of a micro-batch.
    """
    if not 0 <= epsilon_low < 1 or epsilon_high < 0:
        raise ValueError(f"epsilon_low {epsilon_low}, epsilon_high {epsilon_high}: expected 0 <= epsilon_low "
                         "< 1 and epsilon_high >= 0, to keep ratios in [1 - epsilon_low, 1 + epsilon_high].")
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    lengths = _checked_lengths(lengths, loss, logprobs, old_logprobs)
    log_ratio = logprobs - old_logprobs                                                             # (N,)
    if loss == "gspo":
        means = torch.segment_reduce(log_ratio, "mean", lengths=lengths, unsafe=True)  # not checked again
        log_ratio = _per_token(means, lengths, logprobs)
    advantages = _per_token(advantages, lengths, logprobs)                                          # (N,)
    # min(r A, clip(r) A) is A min(r, 1 + high) where A > 0 and A max(r, 1 - low) where A < 0. Clamped before
    # exp(), so that a clipped token's gradient is 0 even where exp() would overflow and make it 0 * inf.
    clamped = torch.where(advantages >= 0, log_ratio.clamp(max=math.log1p(epsilon_high)),
                          log_ratio.clamp(min=math.log1p(-epsilon_low)))
    stats = {"clip_fraction": ((clamped != log_ratio) & (advantages != 0)).sum()}
    token_loss = -advantages * clamped.exp()
    if token_weights is not None:
        token_loss = token_loss * token_weights
    token_loss = _add_reference_kl(token_loss, logprobs, ref_logprobs, beta, stats)
    return _sum(token_loss, lengths, loss) / denominator, stats


def guided_loss(logprobs, hinted_logprobs, ref_logprobs, advantages, lengths, *, denominator,
                quantile=0.9, beta=0.0, loss="grpo", token_weights=None):
    """Guide-GRPO's loss of completions sampled with a hint and learned without it (arXiv 2506.13923).

    The call is grpo_loss's, with r_t = pi(token_t | question) / pi_old(token_t | question, hint):
    hinted_logprobs (N,) are the sampling policy's, which saw the hint; all others are the plain question's.
    r is not clipped but shaped, f(r) = r / (r + gamma): grad log pi has the weight gamma r / (r + gamma)^2.
    gamma: the `quantile` of r over the sequence's own tokens, without gradient, at least 1e-4; with
    quantile=None, f(r) = r. gspo has no ratio per token and is refused.
    stats: kl_ref as in grpo_loss, and guided_log_ratio, the sum of log r over tokens.
    Source: the authors' released code (there the quantile is over padding too).
    """
    if loss == "gspo":
        raise ValueError("loss 'gspo' for guided rows: their ratio is per token. Use grpo, dapo or dr_grpo.")
    on_host, lengths = lengths.tolist(), _checked_lengths(lengths, loss, logprobs, hinted_logprobs)
    log_ratio = logprobs - hinted_logprobs                                                          # (N,)
    if quantile is None:
        weight = log_ratio.exp()
    else:
        # log gamma, with the sequence's largest r divided out before exp(), so that nothing overflows
        rows = [(row, row.max()) for row in log_ratio.detach().split(on_host)]
        log_gamma = torch.stack([(row - top).exp().quantile(quantile).log() + top for row, top in rows])
        log_gamma = _per_token(log_gamma.clamp(min=math.log(1e-4)), lengths, logprobs)              # (N,)
        weight = torch.sigmoid(log_ratio - log_gamma)                            # this is r / (r + gamma)
    token_loss = -_per_token(advantages, lengths, logprobs) * weight
    if token_weights is not None:
        token_loss = token_loss * token_weights
    stats = {"guided_log_ratio": log_ratio.detach().sum()}
    token_loss = _add_reference_kl(token_loss, logprobs, ref_logprobs, beta, stats)
    return _sum(token_loss, lengths, loss) / denominator, stats


def pathwise_kl_loss(token_kl, thought_lengths, lengths, scales, *, lam, alpha, denominator, loss="grpo"):
    """The part of the reward's gradient that the score function misses, as a loss beside grpo_loss -> ().

    The reward's kl depends on the teacher's weights directly (2506.08388, eq. 4: mean + alpha * max over the
    thought):  d E[reward] = E[reward d log p] - lam E[d kl].  This is the second term, on the same scale as the
    first: multiplied by the group's, divided by the same denominator, by `loss` per token or per sequence.

    token_kl: exact, with gradient, packed over the thoughts; thought_lengths: (B,), 0 where there is none.
    lengths: (B,) tokens of each completion. scales: (B,) from group_scale. denominator: from step_denominator.
    """
    per_sequence = lam * scales / denominator
    if loss in ("grpo", "gspo"):
        per_sequence = per_sequence / to_device(scales.device, lengths)
    parts = token_kl.split(thought_lengths.tolist())
    return sum(weight * (part.mean() + alpha * part.max())
               for weight, part in zip(per_sequence, parts, strict=True) if len(part))


def _checked_lengths(lengths, loss, *packed):
    """The lengths (B,), which are on the host, on the device of the packed tensors (N,). Nothing waits for it."""
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r}: expected one of {', '.join(LOSSES)}.")
    assert lengths.min() > 0, "a completion of no tokens: even an empty one has its end token"
    assert all(x.shape == (int(lengths.sum()),) for x in packed), "the log-probs are not packed by these lengths"
    return to_device(packed[0].device, lengths)


def _per_token(values, lengths, logprobs):
    """values (B,) of sequences -> (N,), one of each token. Without the output's size it would wait for the device."""
    return values.repeat_interleave(lengths, output_size=len(logprobs))


def _add_reference_kl(token_loss, logprobs, ref_logprobs, beta, stats):
    """token_loss + beta * k3, all (N,); the sum of k3 goes into stats."""
    if ref_logprobs is None:
        if beta != 0:
            raise ValueError(f"beta is {beta} but ref_logprobs is None: pass the reference's, or beta=0.")
        return token_loss
    log_ratio = ref_logprobs - logprobs
    k3 = torch.expm1(log_ratio) - log_ratio
    stats["kl_ref"] = k3.detach().sum()
    return token_loss + beta * k3 if beta else token_loss


def _sum(token_loss, lengths, loss):
    """Token losses (N,) summed over tokens and sequences as `loss` has it -> ()."""
    if loss in ("grpo", "gspo"):
        token_loss = token_loss / _per_token(lengths, lengths, token_loss)
    return token_loss.sum()
