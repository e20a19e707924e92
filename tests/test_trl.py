"""The lines for TRL of rlt/README.md, its SFTTrainer on distilled rows, its losses of distillation as oracles.

python -m pytest tests/test_trl.py
"""

import re
from pathlib import Path

from rlt import lora, models
from rlt.logprobs import KLRow, completion_logprobs_and_kl
from rlt.prompts import Prompts
from rlt.rows import load_rows

import pytest
import torch
from conftest import call

from rewards import score_explanations

pytest.importorskip("trl", reason="pip install -r requirements-trl.txt to run this")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def grpo(workshop):
    """Everything that the README's lines define, after they have run, and the rewards that they returned."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "rlt/README.md").read_text(), re.DOTALL)
    [lines] = [block for block in blocks if "GRPOTrainer" in block]
    before, after = lines.split("trainer.train()")
    names, calls = {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        exec(before, names)
        trainer = names["trainer"]
        [original] = trainer.reward_funcs

        def recorded(**columns):
            calls.append((columns, original(**columns)))
            return calls[-1][1]

        trainer.reward_funcs = [recorded]
        names["start"] = [parameter.detach().clone() for parameter in lora.adapter_parameters(names["teacher"])]
        exec("trainer.train()" + after, names)
    return names, calls


def test_grpo_trainer_takes_two_steps_on_the_reward(grpo):
    names, calls = grpo
    trainer = names["trainer"]
    assert trainer.state.global_step == 2 and len(calls) == 2
    logged = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert logged == pytest.approx([sum(rewards) / len(rewards) for _, rewards in calls], abs=1e-4)
    for columns, rewards in calls:
        assert len(rewards) == 16 and len(set(rewards)) > 1
        assert columns["question"][0] == columns["question"][7]  # a group
    changed = [not torch.equal(a, b) for a, b in
               zip(names["start"], lora.adapter_parameters(names["teacher"]), strict=True)]
    assert any(changed)


def test_the_teacher_reads_the_prompts_of_train_rlt(grpo):
    names, _ = grpo
    data, prompts = names["data"], names["prompts"]
    ids, *_ = names["trainer"]._tokenize_prompts(list(data["prompt"]))
    assert ids == [prompts.teacher_prompt(row) for row in data]


def test_its_rewards_are_those_of_one_explanation_at_a_time(grpo, workshop, monkeypatch):
    """Of the first step: its teacher is the warm-up teacher, which is loaded again here."""
    monkeypatch.chdir(workshop)
    names, [(columns, rewards), _] = grpo
    tokenizer, prompts = names["tokenizer"], names["prompts"]
    teacher, student = (models.load_model(name, bits=32, device=torch.device("cpu")) for name in ("toy-teacher", "toy"))
    texts = (columns[name] for name in ("completion_ids", "question", "solution"))
    for (ids, question, solution), reward in zip(zip(*texts, strict=True), rewards, strict=True):
        assert max(ids) < len(tokenizer)  # no column of the head without a token is sampled
        explanation = prompts.split_completion(ids, ids[-1] == prompts.end_of_turn)
        row = prompts.scoring_row({"question": question, "solution": solution}, explanation)
        scored = score_explanations(teacher, student, [row], vocab=len(tokenizer))
        assert reward == pytest.approx(scored.reward.reward.item() - (not explanation.complete), abs=1e-4)


def test_distilled_rows_train_in_sft_trainer_as_in_sft_student(workshop, monkeypatch):
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    monkeypatch.chdir(workshop)
    call(workshop, "distill.py", "--model", "runs/toy-teacher", "--student", "toy", "--limit", 16,
         "--max-new-tokens", 24, "--out", "runs/for-trl.jsonl")
    rows = load_dataset("json", data_files="runs/for-trl.jsonl", split="train").select_columns(["messages"])
    tokenizer = models.load_tokenizer("toy")
    config = SFTConfig(output_dir="runs/trl-sft", max_steps=2, per_device_train_batch_size=4, logging_steps=1,
                       save_strategy="no", bf16=False, report_to="none")
    trainer = SFTTrainer("runs/toy", args=config, train_dataset=rows, processing_class=tokenizer)
    prompts = Prompts(tokenizer)
    expected = [prompts.sft_row(row, "student")[0] for row in load_rows("runs/for-trl.jsonl")]
    assert len(expected) > 4 and [row["input_ids"] for row in trainer.train_dataset] == expected
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


# ---------------------------------------------------------------------------------------------------------
# on_policy_student.py's loss

BATCH = [KLRow([1, 2], [3, 4, 5], [6], [7, 8, 9]), KLRow([2], [9], [], [1, 1])]  # 4 tokens of thoughts


@pytest.mark.parametrize("forward_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_to_the_teacher_is_that_of_trls_distillation(tiny_model, forward_share, temperature):
    """Its value and gradient, against the loss of GKDTrainer on logits. TRL mixes another way between the two KLs
    (a Jensen-Shannon divergence), so a mix is held against the sum of both ends."""
    from trl.experimental.gkd import GKDTrainer

    student, teacher = (tiny_model(23, seed).double() for seed in (0, 1))
    student.lm_head.requires_grad_(False)  # as with an adapter
    _, kl = completion_logprobs_and_kl(student, teacher, BATCH, forward_share=forward_share, temperature=temperature)
    (kl.sum() / len(kl)).backward()
    found = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    def logits(model, prompt, thought):
        return model(torch.tensor([prompt + thought])).logits[0, len(prompt) - 1 : -1]

    logits_s = torch.cat([logits(student, row.prompt, row.thought) for row in BATCH])
    logits_t = torch.cat([logits(teacher, row.frozen_prompt, row.thought) for row in BATCH]).detach()
    loss = sum(share * GKDTrainer.generalized_jsd_loss(
        logits_s, logits_t, beta=beta, temperature=temperature, num_items_in_batch=len(logits_s))
        for share, beta in ((1 - forward_share, 1), (forward_share, 0)))
    assert kl.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for name, p in student.named_parameters():
        if p.requires_grad:
            assert (found[name] - p.grad).norm() <= 1e-6 * p.grad.norm() + 1e-9, name


def test_the_kl_is_that_of_trls_distillation_trainer(tiny_model):
    """The chunked loss that DistillationTrainer trains with, from the states before the head. beta 1 is reverse."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    student, teacher = (tiny_model(23, seed) for seed in (0, 1))
    student.lm_head.requires_grad_(False)
    with torch.no_grad():
        for share, beta in ((0.0, 1.0), (1.0, 0.0)):
            _, kl = completion_logprobs_and_kl(student, teacher, BATCH, forward_share=share, temperature=0.7)
            states = [torch.cat([
                model.model(torch.tensor([prompt(row) + row.thought])).last_hidden_state[:, len(prompt(row)) - 1 : -1]
                for row in BATCH], 1) for model, prompt in ((student, lambda row: row.prompt),
                                                            (teacher, lambda row: row.frozen_prompt))]
            loss, _, count = _chunked_divergence_loss(
                *states, student.lm_head.weight, teacher.lm_head.weight, torch.ones(1, 4), beta, temperature=0.7)
            assert count == len(kl) == 4 and kl.mean().item() == pytest.approx(loss.item(), rel=1e-5)
