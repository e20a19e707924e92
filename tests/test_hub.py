"""Models by their hub ids: what is pushed with push_to_hub is loaded back by every script.   pytest tests/test_hub.py

The hub is a stand-in: commits are put into the cache of downloads, from where the libraries read them offline.
"""

import json
import shutil
from pathlib import Path

from rlt import merge, models
from rlt.chat_template import turn_ends

import pytest
import torch
from conftest import call, ended
from test_zoo import words_and_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = ("--data", "rows.jsonl", "--device", "cpu")
LIMITS = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with rows.jsonl and warm/, a warm-up teacher of org/small, which is on the hub."""
    import huggingface_hub as library

    folder = tmp_path_factory.mktemp("hub")
    cache = folder / "cache"

    def create_repo(self, repo_id, **options):
        return library.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **options):
        repo = cache / f"models--{repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs/main").write_text(COMMIT)
        for operation in operations:
            path = repo / "snapshots" / COMMIT / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(library.HfApi, "create_repo", create_repo)
        patch.setattr(library.HfApi, "create_commit", create_commit)
        words_and_rows(folder, "Llama")
        AutoModelForCausalLM.from_pretrained(folder / "base").push_to_hub("org/small")
        AutoTokenizer.from_pretrained(folder / "base").push_to_hub("org/small")
        call(folder, "sft_student.py", "--model", "org/small", *ROWS, "--val-rows", 2, "--batch-size", 2, "--steps", 2,
             "--lr", 0.1, "--format", "teacher", "--out", "warm")
        yield folder


def push(folder, repo_id):
    """As one pushes an adapter and its tokenizer."""
    from peft import AutoPeftModelForCausalLM

    AutoPeftModelForCausalLM.from_pretrained(folder).push_to_hub(repo_id)
    AutoTokenizer.from_pretrained(folder).push_to_hub(repo_id)


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(20, 40)[None]).logits


def test_an_adapter_pushed_is_an_adapter_loaded(hub, monkeypatch):
    monkeypatch.chdir(hub)
    push("warm/final", "me/teacher")
    ours, pushed, base = (logits(models.load_model(name, bits=32, device=CPU, scores=True))
                          for name in ("warm", "me/teacher", "org/small"))
    assert torch.equal(ours, pushed) and (ours - base).abs().max() > 0.01
    assert models.base_of("me/teacher") == models.base_of("warm") == "org/small"
    assert models.shares_base("me/teacher", 32, "org/small", 32)
    assert models.load_tokenizer("me/teacher").chat_template == models.load_tokenizer("warm").chat_template
    again = models.load_lora("me/teacher", bits=32, device=CPU, seed=0)
    assert len(again.peft_config) == 1 and torch.equal(logits(again), ours), "it goes on training that adapter"


def test_scripts_take_hub_ids_and_leave_the_cache_alone(hub, graded_here, monkeypatch, capsys):
    monkeypatch.chdir(hub)
    push("warm/final", "me/teacher")
    before = {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*")}
    capsys.readouterr()
    rl = ("--prompts-per-step", 2, "--group-size", 2, "--eval-every", 0, "--student-bits", 32, "--steps", 1)
    call(hub, "train_rlt.py", "--model", "me/teacher", *ROWS, *LIMITS, *rl, "--out", "rlt")
    assert json.loads(Path("rlt/config.json").read_text())["student"] == "org/small", "the adapter's base"
    assert models.base_of("rlt") == "org/small"
    call(hub, "distill.py", "--model", "me/teacher", "--student", "org/small", "--student-bits", 32, *ROWS, *LIMITS,
         "--out", "distilled.jsonl")
    call(hub, "evaluate.py", "--task", "gsm8k", *ROWS, *LIMITS, "--model", "org/small", "me/teacher")
    assert sorted(path.name for path in Path("runs/eval").iterdir()) == ["me_teacher", "org_small"]
    merge.merge("me/teacher", Path("merged"), bits=32)
    assert (logits(AutoModelForCausalLM.from_pretrained("merged")) - logits(
        models.load_model("warm", bits=32, device=CPU))).abs().max() < 1e-4
    shown = capsys.readouterr().out
    assert "--model me/teacher" in shown and str(hub / "cache") not in shown, "its name, as typed"
    assert {path: path.stat().st_mtime_ns for path in Path("cache").rglob("*")} == before


def test_a_full_run_pushed_is_a_plain_model(hub, monkeypatch):
    monkeypatch.chdir(hub)
    call(hub, "sft_student.py", "--model", "org/small", *ROWS, "--val-rows", 2, "--batch-size", 2, "--steps", 1,
         "--lora-rank", 0, "--out", "full")
    AutoModelForCausalLM.from_pretrained("full/final").push_to_hub("me/student")
    AutoTokenizer.from_pretrained("full/final").push_to_hub("me/student")
    plain = AutoModelForCausalLM.from_pretrained("me/student")
    assert torch.equal(logits(plain), logits(models.load_model("full", bits=32, device=CPU)))
    assert torch.equal(logits(plain), logits(models.load_model("me/student", bits=32, device=CPU, scores=True)))
    ends = list(turn_ends(models.load_tokenizer("me/student")))
    assert plain.generation_config.eos_token_id == ends, "plain generate() stops where a turn ends"


def test_a_name_that_is_nowhere_is_one_line(hub):
    for name in ("org/nothing", "nothing"):
        result = ended(hub, "train_rlt.py", "--model", name, *ROWS, "--out", "run")
        assert result.code == 2 and result.stderr.count("\n") == 1, result.stderr
        assert f"{name} is not a local folder and can't be loaded from the Hugging Face Hub, check the" in result.stderr
    assert not (hub / "run").exists()
