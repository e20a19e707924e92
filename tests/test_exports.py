"""What comes out loads elsewhere: plain peft and transformers, merged, LLaMA-Factory.   pytest tests/test_exports.py"""

import json
import re
import shutil
from pathlib import Path

from rlt import lora, merge, models, saving
from rlt.errors import UserError
from rlt.prompts import Prompts
from rlt.rows import load_rows

import pytest
import torch
from conftest import call
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


@pytest.fixture(scope="module")
def folder(workshop):
    """A run folder with an adapter that is far from doing nothing, and one with all weights trained."""
    trained = models.load_lora(workshop / "runs/toy-teacher", bits=32, device=CPU, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in lora.adapter_parameters(trained):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    tokenizer = models.load_tokenizer(workshop / "runs/toy-teacher")
    saving.save_model(trained, tokenizer, workshop / "runs/adapter/final")
    call(workshop, "sft_student.py", "--data", "toy", "--lora-rank", 0, "--lr", 1e-3, "--steps", 1, "--limit", 100,
         "--out", "runs/full")
    return workshop


@pytest.fixture
def ids(folder, monkeypatch):
    monkeypatch.chdir(folder)
    [row] = load_rows("runs/toy/train.jsonl", limit=1)
    return Prompts(models.load_tokenizer("runs/adapter")).sft_row(row, "student")[0]


def test_an_adapter_in_plain_peft(folder, ids, tmp_path):
    from peft import AutoPeftModelForCausalLM

    final = tmp_path / "final"
    shutil.copytree("runs/adapter/final", final)
    config = json.loads((final / "tokenizer_config.json").read_text())
    del config["auto_map"]  # of the toy alone: AutoTokenizer can't read it without a config.json
    (final / "tokenizer_config.json").write_text(json.dumps(config))
    plain = AutoPeftModelForCausalLM.from_pretrained(final)
    ours = models.load_model("runs/adapter", bits=32, device=CPU)
    assert torch.equal(logits(plain, ids), logits(ours, ids))
    text = "x 3 y 7 s1 x+=y"
    theirs, ours = AutoTokenizer.from_pretrained(final), models.load_tokenizer("runs/adapter")
    assert theirs(text).input_ids == ours(text).input_ids and theirs.chat_template == ours.chat_template


def test_an_adapter_merged_is_a_plain_model(folder, ids, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["merge", "runs/adapter", "--out", "runs/merged"])
    merge.main()
    assert "runs/merged holds runs/adapter, merged." in capsys.readouterr().out
    assert not (folder / "runs/merged/adapter_config.json").exists()
    adapter = logits(models.load_model("runs/adapter", bits=32, device=CPU), ids)
    base = logits(models.load_model("toy", bits=32, device=CPU), ids)
    assert (adapter - base).abs().max() > 0.1
    plain = AutoModelForCausalLM.from_pretrained("runs/merged")
    assert (logits(plain, ids) - adapter).abs().max() < 1e-4
    assert torch.equal(logits(models.load_model("runs/merged", bits=32, device=CPU, scores=True), ids),
                       logits(plain, ids))
    tokenizer = AutoTokenizer.from_pretrained("runs/merged")
    assert tokenizer.decode(ids) == models.load_tokenizer("runs/adapter").decode(ids)
    assert plain.generation_config.eos_token_id == [Prompts(tokenizer).end_of_turn]


def test_merged_weights_are_summed_before_they_are_rounded(folder, ids):
    merge.merge("runs/adapter", Path("runs/merged-16"), bits=16)
    rounded = AutoModelForCausalLM.from_pretrained("runs/merged-16")
    merge.merge("runs/adapter", Path("runs/merged-32"), bits=32)
    exact = AutoModelForCausalLM.from_pretrained("runs/merged-32")
    for (name, a), (_, b) in zip(rounded.named_parameters(), exact.named_parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16()), name


def test_merging_says_what_is_wrong(folder, ids):
    with pytest.raises(UserError, match="runs/adapter/final exists already: delete it"):
        merge.merge("runs/adapter", Path("runs/adapter/final"), bits=32)
    with pytest.raises(UserError, match="runs/full has no adapter: it can be used as it is"):
        merge.merge("runs/full", Path("runs/other"), bits=32)
    assert not Path("runs/other").exists()


def test_a_full_run_in_plain_transformers(folder, ids):
    plain = AutoModelForCausalLM.from_pretrained("runs/full/final")
    assert torch.equal(logits(plain, ids), logits(models.load_model("runs/full", bits=32, device=CPU), ids))
    assert (logits(plain, ids) - logits(models.load_model("toy", bits=32, device=CPU), ids)).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained("runs/full/final")
    messages = [{"role": "user", "content": "x 3 y 7 s1 x+=y"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == models.load_tokenizer(
        "runs/full").apply_chat_template(messages, tokenize=False)


def test_distilled_rows_are_what_llama_factory_reads_as_sharegpt(folder, ids):
    """By the rules of its converter (0.9.5): a system turn may come first, then user and assistant in turns."""
    block = re.search(r"```json\n(.*?)```", (ROOT / "rlt/README.md").read_text(), re.DOTALL)[1]
    [entry] = json.loads(block).values()
    columns, tags = entry["columns"], entry["tags"]
    assert entry["formatting"] == "sharegpt"
    call(folder, "distill.py", "--model", "runs/toy-teacher", "--student", "toy", "--limit", 8,
         "--max-new-tokens", 12, "--out", f"runs/{entry['file_name']}")
    rows = [json.loads(line) for line in Path(f"runs/{entry['file_name']}").open()]
    for row in rows:
        system, *turns = row[columns["messages"]]
        assert system[tags["role_tag"]] == tags["system_tag"] and len(turns) % 2 == 0
        wanted = [tags["user_tag"], tags["assistant_tag"]] * (len(turns) // 2)
        assert [turn[tags["role_tag"]] for turn in turns] == wanted
        assert turns[0][tags["content_tag"]] == row["question"]
        assert row["explanation"] in turns[1][tags["content_tag"]]
    assert len(rows) > 2
