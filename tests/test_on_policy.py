"""On-policy distillation.   python -m pytest tests/test_on_policy.py"""

import json

from rlt import models
from rlt.files import read_jsonl
from rlt.logprobs import KLRow, completion_logprobs_and_kl
from rlt.prompts import Prompts
from rlt.tags import SOLUTION, THOUGHT

import pytest
import torch
from conftest import call, ended, metrics

SMALL = ("--teacher", "toy-teacher", "--limit", 80, "--prompts-per-step", 6, "--max-new-tokens", 12, "--eval-rows", 4)


# ---------------------------------------------------------------------------------------------------------
# the loss


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_both_kls_and_their_gradients(tiny_model, share, temperature):
    """Against autograd through whole logits, in float64."""
    learner, frozen = (tiny_model(23, seed).double() for seed in (0, 1))
    learner.lm_head.requires_grad_(False)
    rows = [KLRow([1, 2], [3, 4, 5], [6], [7, 8, 9]), KLRow([2], [9], [], [1, 1]),
            KLRow([4], [5, 6], [7, 3], [2], solution=[8, 1], opening=[3, 0, 2])]
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25, -1.0], dtype=torch.double)
    logprobs, kl = completion_logprobs_and_kl(learner, frozen, rows, forward_share=share, temperature=temperature,
                                              impl="torch")
    (kl.double() * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    learner.zero_grad()

    wanted, wanted_logprobs = [], []
    for row in rows:
        n = len(row.thought)

        def log_softmax(model, prompt, row=row, n=n):
            logits = model(torch.tensor([prompt + row.thought])).logits[0, len(prompt) - 1 : -1]
            assert len(logits) == n
            return (logits / temperature).log_softmax(1)

        p, q = log_softmax(learner, row.prompt + row.opening), log_softmax(frozen, row.frozen_prompt).detach()
        wanted.append((1 - share) * (p.exp() * (p - q)).sum(1) + share * (q.exp() * (q - p)).sum(1))
        written = row.opening + row.thought + row.end + row.solution
        logits = learner(torch.tensor([row.prompt + written])).logits[0, len(row.prompt) - 1 : -1] / temperature
        wanted_logprobs.append(logits.log_softmax(1).gather(1, torch.tensor(written)[:, None])[:, 0])
    torch.testing.assert_close(logprobs.double(), torch.cat(wanted_logprobs).detach(), rtol=1e-6, atol=1e-7)
    wanted = torch.cat(wanted)
    torch.testing.assert_close(kl.double(), wanted.detach(), rtol=1e-6, atol=1e-7)
    (wanted * weights).sum().backward()
    for name, gradient in found.items():
        want = dict(learner.named_parameters())[name].grad
        assert (gradient - want).norm() <= 1e-6 * want.norm() + 1e-9, name


# ---------------------------------------------------------------------------------------------------------
# what the student wrote


@pytest.fixture(scope="module")
def prompts(toy):
    return Prompts(models.load_tokenizer(str(toy / "runs/toy")))


def first_row(toy):
    return json.loads((toy / "runs/toy/train.jsonl").open().readline())


def test_an_answer_is_cut_at_the_end_of_its_thought(toy, prompts):
    row = first_row(toy)
    ids, start = prompts.sft_row(row, "student")
    opened = prompts.student_prompt(row)
    assert ids[: len(opened)] == opened and len(opened) > start, "the thought is opened by the prompt"
    sampled = ids[len(opened) :]
    thought = prompts.split_answer(sampled, finished=True)
    assert thought.closed and not thought.foreign_tags and thought.thought + thought.end == sampled
    assert THOUGHT[1] not in prompts.tokenizer.decode(thought.thought)
    assert prompts.tokenizer.decode(thought.end).startswith(THOUGHT[1])
    assert prompts.split_answer(sampled[: len(thought.thought)], finished=False).closed is False
    assert prompts.split_answer(sampled[: len(thought.thought) + 1], finished=False).closed, "the tag is all it takes"
    other = prompts.split_answer(prompts.encode(SOLUTION[0]) + sampled, finished=True)
    assert other.foreign_tags and not other.closed


def test_what_is_learned_is_the_sft_row_with_the_students_own_thought(toy, prompts):
    """Token for token where the thought is the row's own explanation."""
    row = first_row(toy)
    ids, _ = prompts.sft_row(row, "student")
    opened = prompts.student_prompt(row)
    thought = prompts.split_answer(ids[len(opened) :], finished=True)
    made = prompts.on_policy_row(row, thought)
    assert made.prompt + made.opening + made.thought + made.end + made.solution == ids
    assert made.prompt + made.opening == opened and made.prompt == prompts.question_prompt(row), "to open is learned"
    assert made.thought[:-1] == thought.thought and made.thought[-1] == thought.end[0], "when to close is learned"
    assert made.frozen_prompt == prompts.teacher_prompt(row)
    unclosed = prompts.split_answer(thought.thought, finished=False)
    made = prompts.on_policy_row(row, unclosed)
    assert made.thought == thought.thought and made.end == made.solution == []
    assert made.prompt + made.opening == opened
    stopped = prompts.split_answer([*thought.thought, prompts.end_of_turn], finished=True)
    made = prompts.on_policy_row(row, stopped)
    assert made.thought == [*thought.thought, prompts.end_of_turn], "the teacher says that it is not the end yet"
    assert made.end == made.solution == []
    nothing = prompts.on_policy_row(row, prompts.split_answer([prompts.end_of_turn], finished=True))
    assert nothing.thought == [prompts.end_of_turn], "nor is it before the first word"


# ---------------------------------------------------------------------------------------------------------
# the script


def test_the_loss_of_a_step_is_that_of_plain_logits(workshop, tmp_path, monkeypatch):
    """With a learning rate that moves nothing: kl and nll from each model's own logits, a row at a time.

    The toy's closing tag is one token: two of the solution's make it longer here.
    """
    def on_policy_row(self, *row_and_thought, own=Prompts.on_policy_row):
        row = own(self, *row_and_thought)
        return row._replace(end=row.end + row.solution[:2], solution=row.solution[2:])

    monkeypatch.setattr(Prompts, "on_policy_row", on_policy_row)
    flags = (*SMALL, "--steps", 1, "--lr", 1e-30, "--forward-share", 0.25, "--solution-weight", 0.5,
             "--seed", 1)  # some thoughts are closed
    scope = call(workshop, "on_policy_student.py", *flags, "--out", tmp_path / "run", "--micro-batch-tokens", 100)
    kls, nlls, weights = [], [], []
    with torch.no_grad():
        for row in scope["kl_rows"]:
            def log_softmax(model, prompt, after, vocab=scope["vocab"]):
                logits = model(input_ids=torch.tensor([prompt + after])).logits[0, len(prompt) - 1 : -1, :vocab]
                return logits.double().log_softmax(1)

            written = row.opening + row.thought + row.end + row.solution
            p = log_softmax(scope["student"], row.prompt, written)
            q = log_softmax(scope["teacher"], row.frozen_prompt, row.thought)
            first, last = len(row.opening), len(row.opening + row.thought)
            nll = -p.gather(1, torch.tensor(written)[:, None])[:, 0]
            p = p[first:last]
            kls.append(0.75 * (p.exp() * (p - q)).sum(1) + 0.25 * (q.exp() * (q - p)).sum(1))
            nlls.append(torch.cat((nll[:first], nll[last:])))
            weights += [1.0] * len(row.opening + row.end) + [0.5] * len(row.solution)
    kl, nll = torch.cat(kls).mean().item(), torch.cat(nlls).mean().item()
    weighted = (torch.cat(nlls) * torch.tensor(weights)).mean().item()
    assert 0.5 in weights and 1.0 in weights
    entry, = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert entry["kl"] == pytest.approx(kl, rel=1e-4) and entry["nll"] == pytest.approx(nll, rel=1e-4)
    assert entry["loss"] == pytest.approx(kl + weighted, rel=1e-4)
    assert entry["sampler_logprob_diff"] < 1e-4 and 0 < entry["closed"] <= 1


def test_it_learns(workshop, tmp_path):
    """The solutions behind its own thoughts, which the toy's base does not expect there."""
    call(workshop, "on_policy_student.py", *SMALL, "--prompts-per-step", 32, "--steps", 10, "--out", tmp_path / "run")
    nll = [entry["nll"] for entry in metrics(tmp_path / "run")]
    assert sum(nll[-3:]) < 0.7 * sum(nll[:3]), nll


def test_a_stopped_run_goes_on_as_if_it_had_not(workshop, tmp_path):
    flags = (*SMALL, "--steps", 4, "--save-every", 2, "--lr-steps", 4)
    call(workshop, "on_policy_student.py", *flags, "--out", tmp_path / "once")
    call(workshop, "on_policy_student.py", *flags, "--steps", 2, "--out", tmp_path / "twice")
    call(workshop, "on_policy_student.py", *flags, "--resume", "--out", tmp_path / "twice")
    once, twice = (metrics(tmp_path / name) for name in ("once", "twice"))
    drop = ("eval_kl", "eval_nll")  # the shorter run measures at its own end
    assert [{k: v for k, v in e.items() if k not in drop} for e in once] == [
        {k: v for k, v in e.items() if k not in drop} for e in twice]
    weights = [(tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("once", "twice")]
    assert weights[0] == weights[1]
    assert once[-1]["eval_kl"] is not None and once[0]["length"] > 0


def test_a_dry_run_counts_both_models(workshop, tmp_path):
    shown = ended(workshop, "on_policy_student.py", *SMALL, "--dry-run", "--out", tmp_path / "run")
    assert shown.code == 0 and "\nupdate" in shown.stdout and not (tmp_path / "run").exists(), shown
