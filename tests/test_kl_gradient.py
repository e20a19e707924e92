"""The exact KL's whole gradient, on a policy that can be enumerated.   python -m pytest tests/test_kl_gradient.py"""

import itertools

from rlt import logprobs
from rlt.files import read_jsonl
from rlt.grpo import group_advantages, group_scale, grpo_loss, pathwise_kl_loss
from rlt.logprobs import KLRow, completion_logprobs, completion_logprobs_and_kl

import pytest
import torch
from conftest import call

from rewards import Row, check_model, score_explanations

V, T, G, LAM = 3, 2, 2, 1.5
SEQUENCES = list(itertools.product(range(V), repeat=T))
PREFIXES = {prefix: i for i, prefix in enumerate(p for t in range(T) for p in itertools.product(range(V), repeat=t))}


class Tiny:
    """A teacher with free logits at every prefix, a fixed student, and a fixed score of every sequence."""

    def __init__(self):
        torch.manual_seed(0)
        self.theta = torch.randn(len(PREFIXES), V, dtype=torch.double, requires_grad=True)
        self.student = torch.randn(len(PREFIXES), V, dtype=torch.double).log_softmax(-1)
        self.score = 2 * torch.randn(len(SEQUENCES), dtype=torch.double)

    def tokens(self, sequence):
        """log-probs (T,), exact kl (T,), sampled kl (T,) of a sequence; all with gradient."""
        at = [PREFIXES[sequence[:t]] for t in range(T)]
        logp = self.theta[at].log_softmax(-1)
        kl = (logp.exp() * (logp - self.student[at])).sum(-1)
        chosen = logp[range(T), list(sequence)]
        return chosen, kl, chosen - self.student[at, list(sequence)]

    def reward(self, i, form, alpha):
        _, exact, sampled = self.tokens(SEQUENCES[i])
        kl = exact if form == "exact" else sampled
        return self.score[i] - LAM * (kl.mean() + alpha * kl.max())

    def true_gradient(self, form, alpha):
        expected = sum(self.tokens(s)[0].sum().exp() * self.reward(i, form, alpha) for i, s in enumerate(SEQUENCES))
        return torch.autograd.grad(expected, self.theta)[0]

    def estimate(self, form, alpha, pathwise, scale="none"):
        """What GRPO's update is in expectation over all groups of G sequences: token sums, one update."""
        total = torch.zeros_like(self.theta)
        for group in itertools.product(range(len(SEQUENCES)), repeat=G):
            logprobs, kls, _ = zip(*(self.tokens(SEQUENCES[i]) for i in group), strict=True)
            weight = torch.stack(logprobs).sum().exp().item()
            rewards = torch.stack([self.reward(i, form, alpha) for i in group]).detach()[None]
            # the group's mean contains the sample itself: G / (G - 1) makes it a leave-one-out baseline
            advantages = G / (G - 1) * group_advantages(rewards, scale=scale).flatten()
            packed, lengths = torch.cat(logprobs), torch.tensor([T] * G)
            loss, _ = grpo_loss(packed, packed.detach(), None, advantages, lengths, denominator=G, loss="dapo")
            if pathwise:
                scales = group_scale(rewards, scale=scale).expand(1, G).flatten()
                loss = loss + pathwise_kl_loss(
                    torch.cat(kls), lengths, lengths, scales, lam=LAM, alpha=alpha, denominator=G, loss="dapo"
                )
            total -= weight * torch.autograd.grad(loss, self.theta)[0]
        return total


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def test_exact_with_its_term_and_sampled_alone_are_the_true_gradient():
    tiny = Tiny()
    # groups without a difference in reward (here: the same sequence twice) are left out; with them it is exact
    for alpha in (0.0, 0.2):
        truth = tiny.true_gradient("exact", alpha)
        alone, whole = (tiny.estimate("exact", alpha, pathwise) for pathwise in (False, True))
        assert (alone - truth).norm() > 0.2 * truth.norm(), "the test must be able to tell"
        missing = equal_groups(tiny, alpha)
        assert torch.allclose(whole + missing, truth, atol=1e-12)
    truth = tiny.true_gradient("sampled", 0.0)
    assert torch.allclose(truth, tiny.true_gradient("exact", 0.0), atol=1e-12), "the same objective"
    assert torch.allclose(tiny.estimate("sampled", 0.0, False), truth, atol=1e-12)


def equal_groups(tiny, alpha):
    """The pathwise term of the groups that are left out: the same sequence G times."""
    total = torch.zeros_like(tiny.theta)
    for sequence in SEQUENCES:
        logprob, kl, _ = tiny.tokens(sequence)
        weight = (G * logprob.sum()).exp().item()
        total -= weight * LAM * torch.autograd.grad(kl.mean() + alpha * kl.max(), tiny.theta)[0]
    return total


def test_the_samples_maximum_is_where_sampled_is_biased():
    """Which token's log-ratio is largest depends on the draw: with alpha the sampled form misses a part, too."""
    tiny = Tiny()
    truth = tiny.true_gradient("sampled", 0.2)
    assert (tiny.estimate("sampled", 0.2, False) - truth).norm() > 1e-3 * truth.norm()


def test_the_scale_of_the_term_follows_the_advantages():
    tiny = Tiny()
    with_std = tiny.estimate("exact", 0.0, True, scale="std")
    assert cosine(with_std, tiny.true_gradient("exact", 0.0)) > cosine(
        tiny.estimate("exact", 0.0, False, scale="std"), tiny.true_gradient("exact", 0.0)
    )
    rewards = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert group_scale(rewards)[:, 0].tolist() == pytest.approx([1 / (2**0.5 + 1e-4), 0])
    assert group_scale(rewards, scale="none")[:, 0].tolist() == [1, 0]


def test_the_loss_by_hand():
    token_kl = torch.tensor([0.1, 0.3, 0.5])
    common = dict(lam=2.0, alpha=0.1, denominator=4)
    arguments = token_kl, torch.tensor([2, 0, 1]), torch.tensor([4, 2, 5]), torch.tensor([3.0, 7.0, 1.0])
    first, last = 0.2 + 0.03, 0.5 + 0.05
    assert pathwise_kl_loss(*arguments, **common, loss="dapo").item() == pytest.approx(2 * (3 * first + last) / 4)
    assert pathwise_kl_loss(*arguments, **common).item() == pytest.approx(2 * (3 * first / 4 + last / 5) / 4)
    halves = [
        pathwise_kl_loss(token_kl[a:b], *(x[i:j] for x in arguments[1:]), **common)
        for a, b, i, j in ((0, 2, 0, 2), (2, 3, 2, 3))
    ]
    assert sum(halves).item() == pytest.approx(pathwise_kl_loss(*arguments, **common).item())


ROWS = [Row([1, 2], [5, 6, 7], [3], [1, 4], [9], [8, 8]), Row([2], [7, 7], [3, 3], [4], [9], [5])]
KL_ROWS = [KLRow(*row[:4]) for row in ROWS]


def test_the_chunked_pass_has_the_values_and_the_gradient_of_the_plain_one(tiny_model):
    teacher, student = tiny_model(48).double(), tiny_model(50, seed=1).double()
    teacher.get_output_embeddings().weight.requires_grad_(False)
    scored = score_explanations(teacher, student, ROWS, temperature=0.7, vocab=45)
    logprobs, kl = completion_logprobs_and_kl(teacher, student, KL_ROWS, temperature=0.7, vocab=45, head_chunk=2)
    assert torch.allclose(kl.float(), scored.token_kl_exact, atol=1e-6)
    assert torch.allclose(logprobs.float(), scored.old_logprobs, atol=1e-6)
    alone, _ = completion_logprobs(teacher, [r.teacher_prompt for r in ROWS],
                                   [r.thought + r.teacher_end for r in ROWS], temperature=0.7, vocab=45)
    assert torch.allclose(logprobs, alone, atol=1e-6)

    weights = torch.arange(1.0, 6.0)
    (kl * weights).sum().backward()
    ours = [p.grad.clone() for p in teacher.model.parameters()]
    assert student.model.layers[0].mlp.up_proj.weight.grad is None
    teacher.zero_grad()
    plain = []
    for row in ROWS:
        t = teacher(torch.tensor([row.teacher_prompt + row.thought])).logits[0, len(row.teacher_prompt) - 1 : -1, :45]
        with torch.no_grad():
            s = student(torch.tensor([row.student_prompt + row.thought])).logits[
                0, len(row.student_prompt) - 1 : -1, :45
            ]
        t, s = (t / 0.7).log_softmax(-1), (s / 0.7).log_softmax(-1)
        plain.append((t.exp() * (t - s)).sum(-1))
    (torch.cat(plain) * weights).sum().backward()
    for mine, p in zip(ours, teacher.model.parameters(), strict=True):
        assert torch.allclose(mine, p.grad, atol=1e-6, rtol=1e-5)


def test_no_logits_larger_than_a_chunk(tiny_model, monkeypatch):
    seen, compute = [], logprobs.compute_logits

    def count(states, *rest):
        seen.append(len(states))
        return compute(states, *rest)

    monkeypatch.setattr(logprobs, "compute_logits", count)  # of the KL
    monkeypatch.setattr("rewards.compute_logits", count)  # of the log-probs' forward pass
    teacher, student = tiny_model(48), tiny_model(48, seed=1)
    for model in (teacher, student):
        check_model(model)
    seen.clear()
    teacher.get_output_embeddings().weight.requires_grad_(False)
    sum(x.sum() for x in completion_logprobs_and_kl(teacher, student, KL_ROWS, head_chunk=2)).backward()
    assert max(seen) == 2 and sum(seen) == 2 * (8 + 2 * 5)  # forward and backward; ends have no kl


def test_the_flag_changes_the_update_and_not_the_reward(workshop, tmp_path):
    flags = ["--steps", 2, "--limit", 60, "--prompts-per-step", 2, "--group-size", 4, "--max-new-tokens", 12,
             "--kl", "exact", "--eval-every", 0]
    for name, extra in (("off", []), ("on", ["--kl-gradient"]), ("cut", ["--kl-gradient", "--micro-batch-tokens", 60])):
        call(workshop, "train_rlt.py", *flags, *extra, "--out", tmp_path / name)
    off, on, cut = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("off", "on", "cut"))
    assert off[0]["reward"] == on[0]["reward"] and off[0]["grad_norm"] != pytest.approx(on[0]["grad_norm"], rel=1e-4)
    assert on[0]["grad_norm"] == pytest.approx(cut[0]["grad_norm"], rel=1e-4)
