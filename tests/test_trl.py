"""The lines for TRL of rlt/README.md, and its SFTTrainer on distilled rows.   python -m pytest tests/test_trl.py"""

import re
from pathlib import Path

from rlt import models
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
        names["start"] = [parameter.detach().clone() for parameter in models.adapter_parameters(names["teacher"])]
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
               zip(names["start"], models.adapter_parameters(names["teacher"]), strict=True)]
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
