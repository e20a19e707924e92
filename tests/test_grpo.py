"""
GRPO's mathematics against sums by hand, slow loops and two other implementations.

    python -m pytest tests/test_grpo.py
"""

import json
import math
from pathlib import Path

from rlt.errors import UserError
from rlt.grpo import (
    LOSSES,
    group_advantages,
    grpo_loss,
    guided_loss,
    pathwise_kl_loss,
    step_denominator,
    tis_weights,
)

import pytest
import torch

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("grpo.json").read_text())


def batch(lengths=(5, 1, 3, 4), spread=0.4, seed=0):
    """Random float64 log-probs of policy (with gradient), sampler and reference; advantages; lengths."""
    draw = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(sum(lengths), generator=draw, dtype=torch.float64)
    new, ref = (old + spread * torch.randn(len(old), generator=draw, dtype=torch.float64) for _ in range(2))
    advantages = torch.randn(len(lengths), generator=draw, dtype=torch.float64)
    return new.requires_grad_(), old, ref, advantages, torch.tensor(lengths)


def denominator(loss, lengths):
    return step_denominator(loss, sequences=len(lengths), tokens=int(lengths.sum()), max_new_tokens=6)


# ---------------------------------------------------------------------------------------------------------
# advantages


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])  # means 3 and 1; squares about them 14 and 6
    want = torch.tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]])
    torch.testing.assert_close(group_advantages(rewards, scale="none"), want)
    std = torch.tensor([[math.sqrt(14 / 2)], [math.sqrt(6 / 2)]])
    torch.testing.assert_close(group_advantages(rewards), want / (std + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, eps=1.0), want / (std + 1.0))


@pytest.mark.parametrize("value", [0.1, -1.7, 1e4 / 3, 1e-6])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_an_all_equal_group_gives_exact_zeros(value, scale):
    for size in range(2, 70):  # for some of these sizes the float32 mean of equal numbers is another number
        rewards = torch.full((2, size), value)
        rewards[1, 0] += 1
        advantages = group_advantages(rewards, scale=scale)
        assert (advantages[0] == 0).all() and (advantages[1] != 0).all()


def test_groups_are_rows():
    """A reward that is the prompt's index differs between groups and never within one."""
    assert (group_advantages(torch.arange(3.0).repeat_interleave(4).view(3, 4)) == 0).all()


@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_number_of_the_question_changes_no_advantage(scale):
    """So the score above the student's unaided one, log p(solution | question), trains the same teacher."""
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    unaided = torch.tensor([[-7.5], [0.3]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards - unaided, scale=scale),
                               group_advantages(rewards, scale=scale), rtol=1e-12, atol=1e-12)


def test_advantages_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match=r"shape \(4, 1\).*2 or more samples"):
        group_advantages(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        group_advantages(torch.zeros(4))
    for bad in (math.nan, math.inf, -math.inf):
        rewards = torch.zeros(2, 3)
        rewards[1, 2] = bad
        with pytest.raises(UserError, match="prompt 1, sample 2"):
            group_advantages(rewards)
    with pytest.raises(ValueError, match="'batch'"):
        group_advantages(torch.zeros(2, 3), scale="batch")


# ---------------------------------------------------------------------------------------------------------
# the clipped losses


def slow_loss(new, old, ref, advantages, lengths, loss, beta, low, high):
    """The losses as the papers write them: one sequence and one token at a time, in Python floats."""
    total, start, count = 0.0, 0, len(lengths)
    for advantage, length in zip(advantages.tolist(), lengths.tolist(), strict=True):
        span = range(start, start + length)
        start += length
        sequence_ratio = math.exp(sum(new[t].item() - old[t].item() for t in span) / length)
        objective = 0.0
        for t in span:
            ratio = sequence_ratio if loss == "gspo" else math.exp(new[t].item() - old[t].item())
            gap = ref[t].item() - new[t].item()
            surrogate = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
            objective += surrogate - beta * (math.exp(gap) - gap - 1)
        total -= objective / length if loss in ("grpo", "gspo") else objective
    return total / {"grpo": count, "gspo": count, "dapo": start, "dr_grpo": count * 6}[loss]


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_against_a_slow_loop(loss, beta):
    for seed in range(3):
        new, old, ref, advantages, lengths = batch(seed=seed)
        want = slow_loss(new, old, ref, advantages, lengths, loss, beta, 0.1, 0.25)

        def ours(logprobs, rest=(old, ref, advantages, lengths)):
            return grpo_loss(logprobs, *rest, denominator=denominator(loss, rest[-1]), loss=loss, beta=beta,
                             epsilon_low=0.1, epsilon_high=0.25)[0]

        assert ours(new).item() == pytest.approx(want, abs=1e-12)
        assert torch.autograd.gradcheck(ours, new)


@pytest.mark.parametrize("oracle", ["trl", "liger"])
@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['loss']}-{case['beta']}")
def test_losses_against_other_implementations(case, oracle):
    """Numbers of TRL 1.16.0 and Liger 0.8.5 on the same inputs: tests/golden/make_golden.py."""
    hidden, head, old, ref, advantages = (torch.tensor(GOLDEN[key], dtype=torch.float64) for key in
                                          ("hidden", "head", "old_logprobs", "ref_logprobs", "advantages"))
    ids, lengths, want = torch.tensor(GOLDEN["ids"]), torch.tensor(GOLDEN["lengths"]), case[oracle]
    head.requires_grad_()
    logprobs = (hidden @ head.T).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    loss, stats = grpo_loss(logprobs, old, ref, advantages, lengths, beta=case["beta"], loss=case["loss"],
                            epsilon_low=GOLDEN["epsilon_low"], epsilon_high=GOLDEN["epsilon_high"],
                            denominator=denominator(case["loss"], lengths))
    if oracle == "trl":
        got, grad, tolerance = torch.autograd.grad(loss, logprobs)[0], want["grad_logprobs"], 1e-12
    else:  # Liger computes in float32
        got, grad, tolerance = torch.autograd.grad(loss, head)[0], want["grad_head"], 1e-6
    assert loss.item() == pytest.approx(want["loss"], abs=tolerance)
    torch.testing.assert_close(got, torch.tensor(grad, dtype=torch.float64), atol=tolerance, rtol=0)
    tokens = lengths.sum().item()
    assert 0 < stats["clip_fraction"] < tokens
    if (oracle, case["loss"]) != ("trl", "gspo"):  # there TRL counts sequences, not their tokens
        assert stats["clip_fraction"].item() / tokens == pytest.approx(want["clip_ratio"])
    if case["beta"]:
        assert stats["kl_ref"].item() / tokens == pytest.approx(want["kl"], abs=tolerance)


@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy_gradient_is_minus_advantage_over_denominator(loss):
    """Where policy, sampler and reference are one; divided by the sequence's length too in grpo and gspo."""
    new, _, _, advantages, lengths = batch()
    value, _ = grpo_loss(new, new.detach(), new.detach(), advantages, lengths, loss=loss, beta=0.04,
                         denominator=denominator(loss, lengths))
    got = torch.autograd.grad(value, new)[0]
    per_token = {"grpo": 4 * lengths, "gspo": 4 * lengths, "dapo": torch.tensor([13] * 4),
                 "dr_grpo": torch.tensor([24] * 4)}[loss]
    torch.testing.assert_close(got, (-advantages / per_token).repeat_interleave(lengths), atol=1e-15, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up(loss):
    new, old, ref, advantages, lengths = batch((5, 1, 3, 4, 2, 6, 1, 7))
    args = dict(loss=loss, denominator=denominator(loss, lengths), beta=0.04, epsilon_low=0.1)
    whole, whole_stats = grpo_loss(new, old, ref, advantages, lengths, **args)
    want = torch.autograd.grad(whole, new)[0]
    assert 0 < whole_stats["clip_fraction"] < lengths.sum() and whole_stats["kl_ref"] > 0
    for size in (1, 2, 3, 8):
        total, totals = 0.0, {"clip_fraction": 0, "kl_ref": 0}
        for rows in torch.arange(len(lengths)).split(size):
            tokens = slice(lengths[: rows[0]].sum(), lengths[: rows[-1] + 1].sum())
            packed = (x[tokens] for x in (new, old, ref))
            part, stats = grpo_loss(*packed, advantages[rows], lengths[rows], **args)
            total = total + part
            totals = {key: totals[key] + stats[key] for key in totals}
        torch.testing.assert_close(total, whole, atol=1e-14, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(total, new)[0], want, atol=1e-15, rtol=0)
        torch.testing.assert_close(totals, whole_stats, atol=1e-13, rtol=0, check_dtype=False)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("advantage, log_ratio, clipped", [
    (+1, math.log(1.31), True),   # already likelier than the range allows: no further push up
    (+1, math.log(1.29), False),
    (+1, math.log(0.01), False),  # the good token became unlikely: it is pulled back however far it went
    (-1, math.log(0.79), True),
    (-1, math.log(0.81), False),
    (-1, math.log(9.0), False),
    (0, math.log(9.0), False),    # no gradient to lose
    (+1, 800.0, True),            # exp overflows: the gradient is 0, not 0 * inf
    (-1, -800.0, True),
    (0, 800.0, False),
])
def test_clip_is_one_sided_and_safe(loss, advantage, log_ratio, clipped):
    old = torch.zeros(3, dtype=torch.float64)
    new = torch.full((3,), log_ratio, dtype=torch.float64, requires_grad=True)
    value, stats = grpo_loss(new, old, None, torch.tensor([float(advantage)]), torch.tensor([3]), loss=loss,
                             denominator=1, epsilon_low=0.2, epsilon_high=0.3)
    grad = torch.autograd.grad(value, new)[0]
    assert stats["clip_fraction"].item() == (3 if clipped else 0)
    assert value.isfinite() and grad.isfinite().all()
    assert (grad == 0).all() == (clipped or advantage == 0)


def test_gspo_has_one_ratio_a_sequence():
    """Token ratios far out of the range on both sides cancel: token-level losses clip them, gspo does not."""
    new = torch.tensor([2.0, -2.0, 0.05, 0.05], requires_grad=True)
    advantages, lengths = torch.tensor([1.0, -1.0]), torch.tensor([2, 2])
    for loss, clipped in {"grpo": 1, "dapo": 1, "dr_grpo": 1, "gspo": 0}.items():
        _, stats = grpo_loss(new, torch.zeros(4), None, advantages, lengths, loss=loss, denominator=2)
        assert stats["clip_fraction"] == clipped


def test_kl_ref():
    """Exactly 0 where the policy is the reference; 1 / r + log r - 1 elsewhere, pulling towards it."""
    new, old, _, advantages, lengths = batch()
    _, stats = grpo_loss(new, old, new.detach().clone(), advantages, lengths, denominator=1)
    assert stats["kl_ref"].item() == 0.0
    new = torch.tensor([0.0, math.log(2.0)], requires_grad=True)
    loss, stats = grpo_loss(new, new.detach(), torch.zeros(2), torch.zeros(1), torch.tensor([2]), beta=3.0,
                            loss="dapo", denominator=1)
    assert stats["kl_ref"].item() == pytest.approx(0.5 + math.log(2) - 1)
    assert loss.item() == pytest.approx(3 * stats["kl_ref"].item())
    assert torch.autograd.grad(loss, new)[0].tolist() == pytest.approx([0.0, 3 * (1 - 0.5)])


def test_reference_is_optional_only_without_beta():
    new, old, ref, advantages, lengths = batch()
    without, stats = grpo_loss(new, old, None, advantages, lengths, denominator=4)
    logged, logged_stats = grpo_loss(new, old, ref, advantages, lengths, denominator=4)
    assert without.item() == logged.item()
    assert set(stats) == {"clip_fraction"} and set(logged_stats) == {"clip_fraction", "kl_ref"}
    with pytest.raises(ValueError, match="beta is 0.1 but ref_logprobs is None"):
        grpo_loss(new, old, None, advantages, lengths, denominator=4, beta=0.1)


def test_bad_calls_are_refused():
    new, old, ref, advantages, lengths = batch()
    with pytest.raises(ValueError, match="loss 'ppo': expected one of grpo, dapo, dr_grpo, gspo"):
        grpo_loss(new, old, ref, advantages, lengths, denominator=4, loss="ppo")
    for low, high in ((1.0, 0.2), (-0.1, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match="epsilon_low"):
            grpo_loss(new, old, ref, advantages, lengths, denominator=4, epsilon_low=low, epsilon_high=high)
    with pytest.raises(AssertionError, match="packed"):
        grpo_loss(new, old, ref, advantages, lengths + 1, denominator=4)
    with pytest.raises(AssertionError, match="end token"):
        grpo_loss(new, old, ref, advantages, torch.tensor([5, 0, 4, 4]), denominator=4)
    with pytest.raises(ValueError, match="per token"):
        guided_loss(new, old, ref, advantages, lengths, denominator=4, loss="gspo")


# ---------------------------------------------------------------------------------------------------------
# truncated importance sampling


def test_importance_weights_by_hand():
    trainer = torch.tensor([-1.0, -2.0, -3.0, -1.0]).requires_grad_()
    weights, stats = tis_weights(trainer, torch.tensor([-1.0, -4.0, -2.0, -1.5]), 2.0)
    assert weights.tolist() == pytest.approx([1, 2, math.exp(-1), math.exp(0.5)]) and not weights.requires_grad
    assert weights[0] == 1, "where both agree, to the bit"
    assert stats == {"tis_weight": pytest.approx((3 + math.exp(-1) + math.exp(0.5)) / 4), "tis_capped": 0.25}
    far, _ = tis_weights(torch.tensor([0.0, -500.0]), torch.tensor([-500.0, 0.0]), 2.0)
    assert far.tolist() == pytest.approx([2, 0]), "exp overflows: not inf"


def test_importance_weights_make_up_for_the_sampler():
    """E over the sampler of weight * f is E over the trainer of f, for tokens below the cap."""
    trainer, sampler = (torch.tensor(p).log() for p in ([0.5, 0.3, 0.2], [0.4, 0.35, 0.25]))
    values = torch.tensor([3.0, -1.0, 7.0])
    weights, _ = tis_weights(trainer, sampler, 2.0)
    assert (sampler.exp() * weights * values).sum().item() == pytest.approx((trainer.exp() * values).sum().item())
    capped, stats = tis_weights(trainer, sampler, 1.1)
    assert capped.tolist() == pytest.approx([1.1, 0.3 / 0.35, 0.8]) and stats["tis_capped"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_of", [grpo_loss, guided_loss])
@pytest.mark.parametrize("loss", LOSSES)
def test_token_weights_multiply_the_surrogate_and_not_the_kl(loss, loss_of, beta):
    if loss_of is guided_loss and loss == "gspo":
        pytest.skip("guided losses are per token")
    new, old, ref, advantages, lengths = batch()
    args = dict(denominator=5, beta=beta, loss=loss)

    def of(weights=None, advantages=advantages):
        value, _ = loss_of(new, old, ref, advantages, lengths, token_weights=weights, **args)
        return value, torch.autograd.grad(value, new)[0]

    ones = torch.ones_like(old)
    assert all(torch.equal(a, b) for a, b in zip(of(), of(ones), strict=True))
    # the KL's part: no advantage, so no surrogate
    (whole, slope), (kl, kl_slope) = of(), of(advantages=torch.zeros(4, dtype=torch.float64))
    doubled, doubled_slope = of(2 * ones)
    torch.testing.assert_close(doubled, 2 * (whole - kl) + kl)
    torch.testing.assert_close(doubled_slope, 2 * (slope - kl_slope) + kl_slope)
    one_token = ones.clone()
    one_token[5:] = 0  # the first sequence alone, five tokens
    value, _ = of(one_token)
    first = advantages * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(value, of(advantages=first)[0])


# ---------------------------------------------------------------------------------------------------------
# Guide's rows


def test_guided_ratio_by_hand():
    """Two sequences, ratios (1, 3) and (0.5): gamma = 1 + 0.9 * (3 - 1) = 2.8 and 0.5."""
    new = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64).log().requires_grad_()
    advantages, lengths = torch.tensor([2.0, -1.0]), torch.tensor([2, 1])
    loss, stats = guided_loss(new, torch.zeros_like(new), None, advantages, lengths, denominator=2)
    f = [1 / 3.8, 3 / 5.8, 0.5]
    assert loss.item() == pytest.approx(-(2 * (f[0] + f[1]) / 2 - f[2]) / 2)
    weight = [2.8 * 1 / 3.8**2, 2.8 * 3 / 5.8**2, 0.25]  # gamma r / (r + gamma)^2 on grad log pi
    want = [-2 * weight[0] / 2 / 2, -2 * weight[1] / 2 / 2, weight[2] / 2]
    assert torch.autograd.grad(loss, new)[0].tolist() == pytest.approx(want)
    assert stats["guided_log_ratio"].item() == pytest.approx(math.log(1.5)) and "kl_ref" not in stats


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_guided_gradient_by_finite_differences(loss):
    """gamma carries no gradient, so it is held still while the loss is nudged."""
    new, old, ref, advantages, lengths = batch()
    value, _ = guided_loss(new, old, ref, advantages, lengths, denominator=7, beta=0.1, loss=loss)
    got = torch.autograd.grad(value, new)[0]
    ratios = (new - old).detach().exp().split(lengths.tolist())
    gamma = torch.cat([r.quantile(0.9).expand(len(r)) for r in ratios])
    per_sequence = lengths.repeat_interleave(lengths) if loss == "grpo" else 1

    def frozen(x):
        ratio, gap = (x - old).exp(), ref - x
        surrogate = advantages.repeat_interleave(lengths) * ratio / (ratio + gamma)
        return ((0.1 * (gap.exp() - gap - 1) - surrogate) / per_sequence).sum() / 7

    step = 1e-6 * torch.eye(len(new), dtype=torch.float64)
    slope = torch.stack([(frozen(new + nudge) - frozen(new - nudge)) / 2e-6 for nudge in step]).detach()
    torch.testing.assert_close(got, slope, atol=1e-9, rtol=0)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
def test_guided_with_an_empty_hint_and_no_shaping_is_the_plain_loss(loss):
    new, _, ref, advantages, lengths = batch()
    args = dict(denominator=denominator(loss, lengths), beta=0.04, loss=loss)
    plain = grpo_loss(new, new.detach(), ref, advantages, lengths, **args)[0]
    guided = guided_loss(new, new.detach(), ref, advantages, lengths, quantile=None, **args)[0]
    assert torch.equal(plain, guided)
    assert torch.equal(*(torch.autograd.grad(x, new)[0] for x in (plain, guided)))


def test_guided_micro_batches_add_up():
    """The quantile is a sequence's own, so its neighbours don't change its weights."""
    new, old, ref, advantages, lengths = batch()
    whole = guided_loss(new, old, ref, advantages, lengths, denominator=4)[0]
    rows = zip(*(x.split(lengths.tolist()) for x in (new, old, ref)), advantages.split(1), lengths.split(1),
               strict=True)
    parts = sum(guided_loss(*row, denominator=4)[0] for row in rows)
    torch.testing.assert_close(parts, whole, atol=1e-15, rtol=0)


def test_guided_weight_stays_finite():
    """A hint can make tokens impossible or certain; r itself overflows float32 at exp(89)."""
    new = torch.tensor([-90.0, 0.0, 90.0, -500.0], requires_grad=True)
    loss, _ = guided_loss(new, torch.zeros(4), None, torch.ones(2), torch.tensor([3, 1]), denominator=1)
    assert loss.isfinite() and torch.autograd.grad(loss, new)[0].isfinite().all()


# ---------------------------------------------------------------------------------------------------------
# what a GPU would wait for


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("function", [grpo_loss, guided_loss, pathwise_kl_loss])
def test_no_loss_waits_for_the_device(function, loss):
    """On the meta device, where tensors have no content: reading a number, or a size that depends on it, fails."""
    if function is guided_loss and loss == "gspo":
        return  # refused, see above
    lengths = torch.tensor([3, 1, 4])

    def tensor(n):
        return torch.empty(n, device="meta", requires_grad=True)

    if function is pathwise_kl_loss:
        value = pathwise_kl_loss(tensor(6), torch.tensor([2, 0, 4]), lengths, tensor(3), lam=3.0, alpha=0.01,
                                 denominator=3, loss=loss)
    else:
        value, stats = function(tensor(8), tensor(8), tensor(8), tensor(3), lengths, denominator=3, beta=0.1, loss=loss,
                                token_weights=tensor(8))
        assert all(number.is_meta for number in stats.values())
    value.backward()
    with pytest.raises(RuntimeError):
        value.item()


@pytest.mark.parametrize("loss", LOSSES)
def test_without_old_logprobs_they_are_the_policys_own(loss):
    new, _, ref, advantages, lengths = batch()
    common = dict(denominator=denominator(loss, lengths), beta=0.1, loss=loss)
    (ours, stats), (given, _) = (grpo_loss(new, old, ref, advantages, lengths, **common)
                                 for old in (None, new.detach()))
    assert torch.equal(ours, given) and stats["clip_fraction"] == 0
    assert torch.equal(*(torch.autograd.grad(value, new)[0] for value in (ours, given)))
