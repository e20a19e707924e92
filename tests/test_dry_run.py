"""The estimate of --dry-run against what really lives in memory.   python -m pytest tests/test_memory.py"""


import contextlib
import io

import memory
import models
import pytest
import runs
import torch
from conftest import call

from rewards import Row, completion_logprobs, completion_logprobs_and_kl, score_explanations

CPU = torch.device("cpu")


def qwen(**sizes):
    from transformers import Qwen2Config

    shape = dict(vocab_size=2000, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=65536, tie_word_embeddings=False)
    return Qwen2Config(**{**shape, **sizes})


def real(config, rank=0):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    return model


class Endless(list):
    """A tokenizer of as many words, whose end of turn next to never comes."""

    eos_token_id, pad_token_id = 1999, 0


def ids(n):
    return torch.randint(4, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def peak(function):
    """Most bytes of tensors alive at a time that `function` made."""
    with memory.Live() as live:
        function()
    return live.peak


def transient(numbers):
    return numbers["total"] - numbers["weights"] - numbers["adapters, AdamW"]


SHAPES = {  # what is large in it: (config, tokens of a pass, rows of a head's chunk)
    "vocabulary": (qwen(vocab_size=40_000), 1000, 512),
    "depth": (qwen(num_hidden_layers=12, hidden_size=64, intermediate_size=128), 3000, 64),
    "length": (qwen(num_hidden_layers=2), 6000, 64),
    "width": (qwen(hidden_size=256, intermediate_size=2048), 2000, 64),
    "attention": (qwen(num_attention_heads=16, head_dim=64, num_key_value_heads=16), 3000, 64),
    "sharing": (qwen(num_attention_heads=16, head_dim=64, num_key_value_heads=2, num_hidden_layers=1), 2000, 64),
    "states": (qwen(hidden_size=256, intermediate_size=64, head_dim=16, num_hidden_layers=1, vocab_size=700), 6000,
               6000),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "sharing"])
def test_an_update(name, checkpointing):
    config, tokens, chunk = SHAPES[name]
    shape = memory.Shape(config, bits=32, gpu=False, rank=8, trained="adapter")
    [estimate] = [memory.phases(shape, vocab=config.vocab_size, head_chunk=chunk, tokens=tokens, learned=True,
                                checkpointing=checkpointing)["update"]]
    model = models.set_trainable(real(config, rank=8)).train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for p in models.adapter_parameters(model):
        p.grad = torch.zeros_like(p)

    def update():
        policy, _ = completion_logprobs(model, [ids(64)], [ids(tokens - 64)], head_chunk=chunk)
        policy.sum().backward()

    assert transient(estimate) == pytest.approx(peak(update), rel=0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_scoring(name):
    config, tokens, chunk = SHAPES[name]
    student = memory.Shape(config, bits=32, gpu=False)
    teacher = memory.Shape(config, bits=32, gpu=False, rank=8)
    estimate = memory.phases(teacher, student, vocab=config.vocab_size, head_chunk=chunk, tokens=tokens, scored=True)
    models_ = real(config, rank=8), real(config)
    thought, n = tokens - 128, 64
    row = Row(ids(n), ids(thought), ids(n), ids(n - 4), ids(4), ids(n))
    measured = peak(lambda: score_explanations(*models_, [row], head_chunk=chunk))
    assert transient(estimate["score"]) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("name", "batch", "prompt", "new"), [
    ("vocabulary", 32, 20, 6), ("depth", 16, 300, 20), ("length", 4, 50, 60), ("width", 4, 500, 8),
    ("attention", 8, 10, 100), ("sharing", 16, 10, 200)])
def test_a_rollout(name, batch, prompt, new):
    config, _, _ = SHAPES[name]
    tokenizer = Endless([0] * config.vocab_size)
    estimate = memory.phases(memory.Shape(config, bits=32, gpu=False, rank=8), vocab=config.vocab_size, head_chunk=64,
                             tokens=64, rollout=(batch, prompt, new))
    model = real(config, rank=8)
    prompts = [ids(prompt - i % 3) for i in range(batch)]
    measured = peak(lambda: models.generate(model, tokenizer, prompts, max_new_tokens=new, temperature=1.0, seed=0))
    assert transient(estimate["rollout"]) == pytest.approx(measured, rel=0.1)



def test_pages_are_bounded():
    """Continuous batching holds the tokens it was given, or what all rows take, and copies a layer's of them."""
    config, _, _ = SHAPES["depth"]
    shape = memory.Shape(config, bits=16, gpu=True, rank=8)
    token = 2 * 12 * 2 * 16 * 2  # keys and values, layers, heads, numbers, bytes
    for tokens, held in ((1000, 1000), (10**6, 8 * 300), (50, 300)):  # models.generate always has room for one row
        numbers = memory.phases(shape, vocab=2000, head_chunk=64, tokens=64, rollout=(8, 100, 200), cache_tokens=tokens)
        reading = shape.reading(2048)[0]
        assert numbers["rollout"]["cache"] == held * token
        assert numbers["rollout"]["activations"] == reading + held * token // 12
        assert transient(numbers["rollout"]) == held * token + reading + held * token // 12


def test_every_weight_is_trained():
    config, tokens, chunk = SHAPES["width"]
    estimate = memory.phases(memory.Shape(config, bits=32, gpu=False, trained="all"), vocab=config.vocab_size,
                             head_chunk=chunk, tokens=tokens, learned=True)["update"]
    model = real(config).requires_grad_(True)
    weights = sum(p.nbytes for p in model.parameters())
    assert estimate["weights"] == weights and estimate["adapters, AdamW"] == 3 * weights
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pair = [ids(9)], [ids(tokens - 9)]
    measured = peak(lambda: completion_logprobs(model, *pair, head_chunk=chunk)[0].sum().backward())
    assert transient(estimate) == pytest.approx(measured, rel=0.1)


def test_the_gradient_of_the_exact_kl():
    config, tokens, chunk = qwen(vocab_size=20_000), 600, 256
    shapes = [memory.Shape(config, bits=32, gpu=False, rank=8, trained="adapter"),
              memory.Shape(config, bits=32, gpu=False)]
    estimate = memory.phases(*shapes, vocab=config.vocab_size, head_chunk=chunk, tokens=tokens, learned=True,
                             kl_gradient=True)["update"]
    teacher, student = models.set_trainable(real(config, rank=8)).train(), real(config)
    for p in models.adapter_parameters(teacher):
        p.grad = torch.zeros_like(p)

    def update():
        row = Row(ids(64), ids(tokens - 128), ids(64), ids(60), [5], [7])
        policy, kl = completion_logprobs_and_kl(teacher, student, [row], head_chunk=chunk)
        (policy.sum() + kl.sum()).backward()

    assert transient(estimate) == pytest.approx(peak(update), rel=0.1)


def test_four_bits_are_counted_to_the_byte(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = qwen(intermediate_size=320, hidden_size=192)
    real(config).save_pretrained(tmp_path)
    loaded = models.load_model(str(tmp_path), bits=4, device=CPU)
    found = 0
    for p in loaded.parameters():
        found += p.nbytes
        if state := getattr(p, "quant_state", None):
            found += sum(x.nbytes for x in state.as_dict(packed=False).values() if isinstance(x, torch.Tensor))
    assert memory.Shape(config, bits=4, gpu=False).weights == pytest.approx(found, rel=2e-3)
    small, large = (memory.Shape(config, bits=bits, gpu=True).weights for bits in (16, 32))
    assert large == 2 * small == sum(p.numel() for p in real(config).parameters()) * 4


def test_the_phases_of_a_pair():
    """What is resident when: the parked student only in score, two adapters and AdamW always, gradients in update."""
    config, tokens, chunk = SHAPES["depth"]
    teacher = memory.Shape(config, bits=16, gpu=True, rank=8, trained="adapter", reference=True)
    student = memory.Shape(config, bits=4, gpu=True)
    asked = dict(vocab=2000, head_chunk=chunk, tokens=tokens, rollout=(4, 50, 10), scored=True, learned=True,
                 reference=True, checkpointing=True)
    here, parked = (memory.phases(teacher, student, parked=parked, **asked) for parked in (False, True))
    assert list(here) == ["load", "rollout", "score", "reference", "update"]
    assert teacher.adapters == 2 * teacher.trained == 2 * 4 * sum(
        8 * sum(m.weight.shape) for name, m in real(config).named_modules() if "proj" in name)
    for phase in here:
        gone = 0 if phase in ("load", "score") else student.weights
        assert here[phase]["total"] - parked[phase]["total"] == gone
        copies = {"load": 0, "update": 3}.get(phase, 2)
        assert here[phase]["adapters, AdamW"] == teacher.adapters + copies * teacher.trained
    assert here["rollout"]["cache"] == 4 * 59 * 12 * 2 * 2 * 16 * 2  # rows, tokens but the last, layers, k v, heads...


# -- --dry-run


def dry(workshop, script, *flags):
    """(exit status, what it printed), nothing loaded and nothing written on the way."""
    before = sorted(workshop.rglob("*"))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            call(workshop, script, *flags)
    except SystemExit as end:
        assert sorted(workshop.rglob("*")) == before
        return end.code, printed.getvalue()
    raise AssertionError("it ran")


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(models, "load_model", load)


PHASES = {
    "train_rlt.py": "load rollout score reference update", "rl_student.py": "load rollout score reference update",
    "sft_student.py --data toy": "load update", "distill.py --model toy-teacher": "load rollout score",
    "distill.py --model toy-teacher --solver": "load rollout",
    "evaluate.py --model toy toy-teacher": "load rollout load rollout",
    "train_rlt.py --beta 0": "load rollout score update",
}


@pytest.mark.parametrize("command", PHASES)
def test_a_dry_run(workshop, no_weights, command):
    script, *flags = command.split()
    out = [] if script == "evaluate.py" else ["--out", workshop / "runs/never"]
    status, printed = dry(workshop, script, *flags, "--limit", 400, *out, "--dry-run", 24)
    found = [line.split()[0] for line in printed.splitlines() if line and line.split()[0] in PHASES["train_rlt.py"]]
    assert status == 0 and " ".join(found) == PHASES[command], printed
    assert "fits: " in printed and "24 GB on the GPU asked for" in printed
    status, printed = dry(workshop, script, *flags, "--limit", 400, *out, "--dry-run", 0.1)
    assert status == 1 and "does not fit: " in printed and "First: --" in printed


@pytest.mark.parametrize("script", ["train_rlt.py", "rl_student.py"])
def test_ranks_share_a_steps_rows(workshop, no_weights, monkeypatch, script):
    """Two of them sample as many as one that is asked half the questions."""
    def rollout(ranks, questions):
        monkeypatch.setattr(runs, "join", lambda device: (0, ranks))
        printed = dry(workshop, script, "--limit", 400, "--out", "runs/never", "--dry-run", "24", "--eval-rows", 8,
                      "--rollout-batch", 10_000, "--prompts-per-step", questions)[1]
        return next(line for line in printed.splitlines() if line.startswith("rollout"))

    assert rollout(2, 64) == rollout(1, 32) != rollout(1, 64)


def test_a_dry_run_finds_what_a_run_would(workshop, no_weights, tmp_path, monkeypatch):
    flags = ["--limit", 200, "--dry-run"]
    with pytest.raises(FileExistsError, match="is there already"):
        call(workshop, "train_rlt.py", *flags, "--out", "runs/toy-teacher")
    with pytest.raises(ValueError, match="70 rows are left|6 rows are left"):
        call(workshop, "train_rlt.py", "--limit", 70, "--dry-run", "--out", "runs/never")
    status, printed = dry(workshop, "train_rlt.py", *flags, "--out", "runs/never")
    assert status == 0 and "on this machine" in printed
    disk = type("disk", (), {"free": 10})
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: disk)
    status, printed = dry(workshop, "train_rlt.py", *flags, "--out", "runs/never")
    assert status == 1 and "the disk is too small for 4 checkpoints" in printed
    monkeypatch.setattr(memory.os, "access", lambda path, mode: False)
    assert "can't be written" in dry(workshop, "distill.py", "--model", "toy", *flags, "--out", "runs/never")[1]


def test_a_killed_run_is_planned_too(workshop, tmp_path):
    flags = ["--data", "toy", "--limit", 100, "--val-rows", 8, "--batch-size", 8, "--out", tmp_path / "run"]
    call(workshop, "sft_student.py", *flags, "--steps", 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, printed = dry(workshop, "sft_student.py", *flags, "--steps", 2, "--resume", "--dry-run")
    assert status == 0 and "fits" in printed
    with pytest.raises(ValueError, match="has done 1 steps|was started with"):
        call(workshop, "sft_student.py", *flags, "--lr", 1, "--resume", "--dry-run")
    explained = ["--model", "toy-teacher", "--limit", 20, "--batch-size", 8, "--max-new-tokens", 12]
    call(workshop, "distill.py", *explained, "--out", tmp_path / "d.jsonl")
    cut = (tmp_path / "d.jsonl").read_text()[:-50]
    (tmp_path / "d.jsonl").write_text(cut)
    status, _ = dry(workshop, "distill.py", *explained, "--resume", "--dry-run", "--out", tmp_path / "d.jsonl")
    assert status == 0 and (tmp_path / "d.jsonl").read_text() == cut
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_to_change_first():
    flags = dict(student_bits=4, teacher_bits=16, micro_batch_tokens=8192, head_chunk=1024, rollout_batch=64,
                 max_new_tokens=1000, gradient_checkpointing=True, lora_rank=16)
    zero = dict.fromkeys(memory.COLUMNS, 0)

    def first(phase, part, row=1100, **changes):
        return memory.remedy({**flags, **changes}, phase, {**zero, part: 9}, row)

    assert first("load", "weights") == "--teacher-bits 4"
    assert first("load", "weights", student_bits=16) == "--student-bits 4"
    assert first("update", "weights", teacher_bits=4, offload_student=False) == "--offload-student"
    assert first("update", "weights", teacher_bits=4) == "a smaller model"
    assert first("score", "weights", teacher_bits=4, offload_student=False) == "a smaller model"  # it is there to score
    assert first("rollout", "weights", teacher_bits=4, offload_student=False, kl_gradient=True) == "a smaller model"
    assert first("rollout", "cache") == first("rollout", "head") == "--rollout-batch 32"
    assert first("rollout", "cache", rollout_batch=1) == "--max-new-tokens 500"
    assert first("update", "activations", gradient_checkpointing=False) == "--gradient-checkpointing"
    assert first("update", "activations") == first("score", "activations") == "--micro-batch-tokens 4096"
    assert first("update", "activations", row=8000) == "--max-new-tokens 500"
    assert first("score", "head") == "--head-chunk 512"
