# SPDX-License-Identifier: MIT
"""One completion and all that the policy update needs of it: micro-batches are lists of these."""

from dataclasses import dataclass

from rlt.distributed import all_reduce_mean
from rlt.grpo import tis_weights

import torch
from torch import Tensor

from rewards import Row, micro_batches


@dataclass
class Episode:
    """A completion of T tokens. Tensors (T,) have one number for each of them; log-probs are in nats."""

    row: dict  # its question, solution, ...
    prompt: list[int]  # what the policy learns to continue
    completion: list[int]
    advantage: Tensor  # ()
    hinted_prompt: list[int] | None = None  # Guide-GRPO: it was sampled after this prompt, not after `prompt`
    old_logprobs: Tensor | None = None  # (T,) of the policy that sampled it; None: see grpo_loss
    ref_logprobs: Tensor | None = None  # (T,) of the reference; None where there is no KL to it
    tis_weights: Tensor | None = None  # (T,) for an engine that is not quite the policy
    scoring_row: Row | None = None  # for --kl-gradient: what was scored
    scale: Tensor | None = None  # () for --kl-gradient: 1 / (the group's std + eps), see grpo.group_scale

    @property
    def width(self):
        return max(len(self.prompt), len(self.hinted_prompt or [])) + len(self.completion)


def split_into_micro_batches(episodes, tokens):
    """Lists of episodes of at most `tokens` tokens, or of one. Hinted ones are apart: they use guided_loss."""
    batches = []
    for indices in micro_batches([e.width for e in episodes], tokens, [e.prompt for e in episodes]):
        batch = [episodes[i] for i in indices]
        plain, hinted = [e for e in batch if not e.hinted_prompt], [e for e in batch if e.hinted_prompt]
        batches += [part for part in (plain, hinted) if part]
    return batches


def completion_lengths(episodes):
    """(B,) tokens of each completion, on the host."""
    return torch.tensor([len(e.completion) for e in episodes], dtype=torch.long)


def pack(episodes, name):
    """The attribute `name` of all episodes: (N,) of tensors per token, end to end, (B,) of one number each; or None."""
    values = [getattr(e, name) for e in episodes]
    if values[0] is None:
        return None
    return torch.cat(values) if values[0].ndim else torch.stack(values)


def unpack(episodes, name, packed):
    """Give each episode its part of a tensor of all tokens (N,), as the attribute of this name."""
    for e, part in zip(episodes, packed.split(completion_lengths(episodes).tolist()), strict=True):
        setattr(e, name, part)


def weight_by_tis(episodes, trainer_logprobs, sampler_logprobs, cap):
    """Give each episode its weights of truncated importance sampling -> tis_weights' numbers, means over all ranks.

    trainer_logprobs, sampler_logprobs: (N,) nats of all tokens, end to end.
    """
    weights, numbers = tis_weights(trainer_logprobs, sampler_logprobs, cap)
    unpack(episodes, "tis_weights", weights)
    return {key: all_reduce_mean(value, len(weights)) for key, value in numbers.items()}
