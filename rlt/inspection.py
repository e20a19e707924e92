# SPDX-License-Identifier: MIT
"""What a reward is made of, token by token: samples.jsonl and distilled rows keep it for figures/inspect_reward.py."""

import math

ROWS = 64  # of a distilled file that keep their tokens: the first ones. A row takes about ten bytes a token


def token_numbers(prompts, scoring_row, scored, i):
    """The tokens of row i of `scored` (rewards.Scored, of which scoring_row is row i), with their numbers in nats.

    -> {"thought": texts, "kl": KL of each, "solution": texts, "logprob": the student's log-prob of each}, numbers with
    four decimals. One that is NaN or infinite is None: JSON has neither.
    """
    thought, solution = sum(scored.thought_lengths[:i]), sum(scored.solution_lengths[:i])
    kl = scored.token_kl[thought : thought + scored.thought_lengths[i]]
    logprob = scored.solution_logprobs[solution : solution + scored.solution_lengths[i]]
    return {"thought": prompts.token_texts(scoring_row.thought), "kl": _rounded(kl),
            "solution": prompts.token_texts(scoring_row.solution), "logprob": _rounded(logprob)}


def _rounded(values):
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]
