"""The estimate of --dry-run against the bytes that are really alive.   python -m pytest tests/test_dry_run.py"""

import contextlib
import io
import itertools
import re

from rlt import distributed, dry_run, footprint, lora, models
from rlt.dry_run import Machine, expected_hours, phases, remedy
from rlt.errors import UserError
from rlt.files import read_jsonl
from rlt.footprint import AllocationTracker, ModelFootprint, target_modules
from rlt.logprobs import KLRow, completion_logprobs, completion_logprobs_and_kl
from rlt.lora import compute_in_input_type
from rlt.rollout import generate

import pytest
import test_adapters
import torch
from conftest import ROOT, call
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, DynamicCache, Qwen2Config

from rewards import Row, check_model, score_explanations

CPU = torch.device("cpu")
SMALL = dict(vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=65_536, tie_word_embeddings=False)


def qwen(**sizes):
    return Qwen2Config(**SMALL | sizes)


def real(config, rank=0, targets="all-linear", dtype=torch.float32):
    """The model that a footprint stands for, with random weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    check_model(model)  # once, before memory is watched
    return model


def with_gradients(model):
    """Trainable, with gradients from the micro-batch before."""
    lora.set_trainable(model).train()
    for p in lora.adapter_parameters(model):
        p.grad = torch.zeros_like(p)
    return model


class EndlessTokenizer:
    """As many tokens as the model has, and an end of turn that comes after them: it is never sampled."""

    chat_template, pad_token_id = None, 0

    def __init__(self, config):
        self.eos_token_id = config.vocab_size - 1

    def get_vocab(self):
        return {str(i): i for i in range(self.eos_token_id)}


def ids(n):
    return torch.randint(4, 100, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def peak(function):
    """The most bytes of tensors made by `function` that are alive at a time."""
    with AllocationTracker() as tracker:
        function()
    return tracker.peak


def transient(numbers):
    return numbers["total"] - numbers["weights"] - numbers["adapters, AdamW"]


# ---------------------------------------------------------------------------------------------------------
# the tracker


def test_the_tracker_counts_storages():
    a = torch.zeros(1000)  # before: not counted
    with AllocationTracker() as tracker:
        b = a + 1
        view = b[:10].view(2, 5)
        assert tracker.now == tracker.peak == 4000  # a view has the storage of its tensor
        c = torch.cat([b, b])
        del b
        assert (tracker.now, tracker.peak) == (4000 + 8000, 12_000)  # the view keeps b's storage
        del view
        assert (tracker.now, tracker.reset_peak(), tracker.peak) == (8000, 12_000, 8000)
        c.add_(1)
        assert tracker.peak == 8000
    assert c.sum() == 4000


# ---------------------------------------------------------------------------------------------------------
# passes, against real ones

SHAPES = {  # what is large in it: (config, tokens of a pass)
    "vocabulary": (qwen(vocab_size=40_000), 1000),
    "depth": (qwen(num_hidden_layers=12, hidden_size=64, intermediate_size=128), 1200),
    "length": (qwen(num_hidden_layers=2), 4000),
    "width": (qwen(hidden_size=256, intermediate_size=2048), 1200),
    "attention": (qwen(num_attention_heads=16, head_dim=64, num_key_value_heads=16), 1200),
    "shared heads": (qwen(num_attention_heads=16, head_dim=64, num_key_value_heads=2, num_hidden_layers=1), 1200),
    "states": (qwen(hidden_size=256, intermediate_size=64, head_dim=16, num_hidden_layers=1), 5000),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "shared heads"])
def test_an_update(name, checkpointing):
    config, tokens = SHAPES[name]
    policy = ModelFootprint(config, bits=32, gpu=False, rank=8, trained="adapter")
    table = phases(policy, vocab=config.vocab_size, tokens=tokens, learned=True, checkpointing=checkpointing)
    model = with_gradients(real(config, rank=8))
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})

    def update():
        policy, _ = completion_logprobs(model, [ids(64)], [ids(tokens - 64)])
        policy.sum().backward()

    assert transient(table["update"]) == pytest.approx(peak(update), rel=0.1)


@pytest.mark.slow  # bfloat16 on a CPU
def test_an_update_in_16_bits():
    """Nothing of the adapter's passes is in float32."""
    config, tokens = qwen(hidden_size=64, intermediate_size=128, num_hidden_layers=10, num_attention_heads=2), 700
    policy = ModelFootprint(config, bits=16, gpu=False, rank=8, trained="adapter")
    table = phases(policy, vocab=config.vocab_size, tokens=tokens, learned=True)
    model = real(config, rank=8, dtype=torch.bfloat16)
    compute_in_input_type(model)
    with_gradients(model)
    measured = peak(lambda: completion_logprobs(model, [ids(64)], [ids(tokens - 64)])[0].sum().backward())
    assert transient(table["update"]) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", SHAPES)
def test_scoring(name):
    config, tokens = SHAPES[name]
    teacher = ModelFootprint(config, bits=32, gpu=False, rank=8)
    student = ModelFootprint(config, bits=32, gpu=False)
    table = phases(teacher, student, vocab=config.vocab_size, tokens=tokens, scored=True)
    pair, thought, n = (real(config, rank=8), real(config)), tokens - 128, 64
    row = Row(ids(n), ids(thought), ids(n), ids(n - 4), ids(4), ids(n))
    assert transient(table["score"]) == pytest.approx(peak(lambda: score_explanations(*pair, [row])), rel=0.1)


@pytest.mark.parametrize(("name", "batch", "prompt", "new"), [
    ("vocabulary", 32, 20, 6), ("depth", 16, 300, 20), ("length", 4, 50, 60), ("width", 4, 500, 8),
    ("attention", 8, 10, 100), ("shared heads", 16, 10, 200)])
def test_a_rollout(name, batch, prompt, new):
    config, _ = SHAPES[name]
    policy = ModelFootprint(config, bits=32, gpu=False, rank=8)
    table = phases(policy, vocab=config.vocab_size, tokens=64, rollout=(batch, prompt, new))
    model = real(config, rank=8)

    def measured(prompts):
        return peak(lambda: generate(model, EndlessTokenizer(config), prompts, max_new_tokens=new, temperature=1.0,
                                     seed=0))

    apart = [[i, *ids(prompt - i % 3 - 1)] for i in range(batch)]
    assert transient(table["rollout"]) == pytest.approx(measured(apart), rel=0.1)
    assert measured([ids(prompt)] * batch) <= 1.1 * transient(table["rollout"]), "a shared prompt takes no more"


def test_every_weight_is_trained():
    config, tokens = SHAPES["width"]
    policy = ModelFootprint(config, bits=32, gpu=False, trained="all")
    update = phases(policy, vocab=config.vocab_size, tokens=tokens, learned=True)["update"]
    model = real(config).requires_grad_(True)
    weights = sum(p.nbytes for p in model.parameters())
    assert update["weights"] == weights and update["adapters, AdamW"] == 3 * weights
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    pair = [ids(9)], [ids(tokens - 9)]
    measured = peak(lambda: completion_logprobs(model, *pair)[0].sum().backward())
    assert transient(update) == pytest.approx(measured, rel=0.1)


def test_the_gradient_of_the_exact_kl():
    config, tokens = qwen(vocab_size=8000), 2300  # two full chunks of thought tokens
    teacher = ModelFootprint(config, bits=32, gpu=False, rank=8, trained="adapter")
    student = ModelFootprint(config, bits=32, gpu=False)
    table = phases(teacher, student, vocab=config.vocab_size, tokens=tokens, learned=True, kl_gradient=True)
    pair = with_gradients(real(config, rank=8)), real(config)

    def update():
        row = KLRow(ids(64), ids(tokens - 128), ids(64), ids(60))
        policy, kl = completion_logprobs_and_kl(*pair, [row])
        (policy.sum() + kl.sum()).backward()

    assert transient(table["update"]) == pytest.approx(peak(update), rel=0.1)


# ---------------------------------------------------------------------------------------------------------
# models of every kind

TEXT = dict(SMALL, num_hidden_layers=4, head_dim=16, num_attention_heads=8)
VISION = dict(hidden_size=32, intermediate_size=64)
EXPERTS = dict(TEXT, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
CONFIGS = {
    "composite, sliding windows": ("gemma3", dict(
        text_config=TEXT | {"sliding_window": 256, "layer_types": ["sliding_attention", "full_attention"] * 2},
        vision_config=VISION | dict(num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14))),
    "composite, linear attention": ("qwen3_5", dict(
        text_config=TEXT, vision_config=VISION | dict(depth=2, num_heads=2, out_hidden_size=128))),
    "sliding window": ("mistral", TEXT | {"sliding_window": 256}),
    "experts": ("qwen3_moe", EXPERTS),
    "shared experts": ("qwen2_moe", EXPERTS | dict(shared_expert_intermediate_size=64)),
}


def config_of(kind):
    name, sizes = CONFIGS[kind]
    return CONFIG_MAPPING[name](**sizes)


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_that_are_not_a_plain_decoder(kind):
    """Weights and adapter to the byte, passes with and without gradient, generate."""
    config, attention = config_of(kind), ["q_proj", "o_proj"]
    made = ModelFootprint(config, bits=16, gpu=True, rank=4, targets=attention, trained="adapter")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert made.weights == sum(p.nbytes for p in model.parameters())
    layers = [m for name, m in model.named_modules() if name.endswith(tuple(attention)) and "vision" not in name]
    assert made.adapters >= 4 * 4 * sum(sum(m.weight.shape) for m in layers) > 0
    (peak_of_pass, kept), (training_peak, _) = made.forward_bytes(600), made.training_bytes(600, True)
    assert training_peak > peak_of_pass > kept == 600 * 128 * 2
    cache, activations, both = made.generate_bytes(2, 40, 10)
    assert 0 < cache < both and activations < both


@pytest.mark.parametrize("kind", ["composite, sliding windows", "sliding window"])
def test_a_pass_that_is_not_packed_has_masks(kind):
    """rewards.py reads such a model one row at a time, with masks of T x T for layers with a window."""
    config = config_of(kind)
    model = real(config)
    measured = peak(lambda: score_explanations(model, model, [Row(ids(500), ids(900), ids(4), ids(500), [5], ids(8))]))
    both = ModelFootprint(config, bits=32, gpu=False)
    table = phases(both, both, vocab=config.get_text_config().vocab_size, tokens=1409, scored=True)
    assert transient(table["score"]) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("kind", "bits", "targets"), [("experts", 16, "all-linear"), ("experts", 32, "q_proj")])
def test_a_model_that_cannot_run_without_weights_is_one_line(kind, bits, targets):
    made = ModelFootprint(config_of(kind), bits=bits, gpu=True, rank=4, targets=targets, trained="adapter")
    for run in (lambda: made.forward_bytes(50), lambda: made.training_bytes(50, True),
                lambda: made.generate_bytes(2, 9, 4)):
        with pytest.raises(UserError, match="can't run Qwen3MoeForCausalLM without weights .*--lora-targets") as caught:
            run()
        assert "\n" not in str(caught.value)


def test_an_adapter_that_fits_no_layer_is_one_line():
    with pytest.raises(UserError, match="Qwen2ForCausalLM can't have this adapter: Target modules .*nowhere"):
        ModelFootprint(qwen(), bits=32, gpu=False, rank=4, targets="nowhere")


@pytest.mark.parametrize(("given", "meant"), [
    (None, "all-linear"), ("all-linear", "all-linear"), ("q_proj", ["q_proj"]), ("q, k", ["q", "k"]),
    ({"v_proj", "q_proj"}, ["q_proj", "v_proj"]), (["o_proj"], ["o_proj"]), ("layers.0.mlp", ["layers.0.mlp"]),
    (r".*\.(q|v)_proj", r".*\.(q|v)_proj"), (r"(.*a{1,2}|b)", r"(.*a{1,2}|b)")])
def test_target_modules(given, meant):
    assert target_modules(given) == meant


@pytest.mark.parametrize("targets", [r".*\.(q|v)_proj", "q_proj,v_proj", {"q_proj", "v_proj"}])
def test_an_adapter_is_counted_to_the_byte(targets):
    config = qwen(num_hidden_layers=2)
    made = ModelFootprint(config, bits=16, gpu=True, rank=8, targets=targets, trained="adapter", reference=True)
    one = 2 * 8 * ((128 + 128) + (128 + 64)) * 4  # layers, rank, in + out of q and of v, float32
    assert made.trained_bytes == one and made.adapters == made.saved == 2 * one


@pytest.mark.parametrize("kind", test_adapters.KINDS)
def test_an_existing_adapter_is_counted_as_it_is(tmp_path, kind):
    """To the byte what the run trains: ranks of single layers, whole modules, parameters. Passes go through it."""
    tied = kind != "trainable tokens"  # of a tied head, which are refused
    base = test_adapters.make_base(tmp_path / "base", tied)
    test_adapters.theirs(base, tmp_path / "theirs", **test_adapters.KINDS[kind])
    trained = sum(p.nbytes for p in lora.adapter_parameters(test_adapters.ours(tmp_path / "theirs")))
    known = models.model_and_adapter_config(str(tmp_path / "theirs"))
    made = ModelFootprint(**{"rank": 16, "targets": "q_proj"} | known, bits=32, gpu=False, trained="adapter",
                          reference=True)
    assert made.trained_bytes == trained and made.adapters == made.saved == 2 * trained
    without = ModelFootprint(known["config"], bits=32, gpu=False)
    assert made.weights == without.weights
    assert made.training_bytes(50, False)[0] > made.forward_bytes(50)[0] >= without.forward_bytes(50)[0]
    assert made.generate_bytes(2, 9, 4)


def test_rank_none_is_the_default_and_0_is_no_adapter():
    rank_16, default, none = (ModelFootprint(qwen(), bits=32, gpu=False, rank=rank) for rank in (16, None, 0))
    assert default.adapters == rank_16.adapters > none.adapters == 0
    assert none.saved == none.weights and default.saved == default.adapters


def test_four_bits_are_counted_to_the_byte(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = qwen(intermediate_size=320, hidden_size=192)
    real(config).save_pretrained(tmp_path)
    found = 0
    for p in models.load_model(str(tmp_path), bits=4, device=CPU).parameters():
        found += p.nbytes
        if state := getattr(p, "quant_state", None):
            found += sum(x.nbytes for x in state.as_dict(packed=False).values() if isinstance(x, torch.Tensor))
    four = ModelFootprint(config, bits=4, gpu=False)
    assert four.weights == pytest.approx(found, rel=2e-3)
    linear = [module for module in four.base.modules() if type(module) is torch.nn.Linear]
    assert linear == [four.base.get_output_embeddings()]  # the only one that is not quantised
    small, large = (ModelFootprint(config, bits=bits, gpu=True).weights for bits in (16, 32))
    assert large == 2 * small == sum(p.numel() for p in real(config).parameters()) * 4


# ---------------------------------------------------------------------------------------------------------
# the table


def test_the_phases_of_a_pair():
    """What is resident when: an offloaded student only in score, two adapters and AdamW always, gradients in update."""
    config, tokens = SHAPES["length"]
    teacher = ModelFootprint(config, bits=16, gpu=True, rank=8, trained="adapter", reference=True)
    student = ModelFootprint(config, bits=4, gpu=True)
    asked = dict(vocab=256, tokens=tokens, rollout=(4, 50, 10), scored=True, learned=True, reference=True,
                 checkpointing=True)
    resident, offloaded = (phases(teacher, student, offloaded=offloaded, **asked) for offloaded in (False, True))
    assert list(resident) == ["load", "rollout", "score", "reference", "update"]
    assert teacher.adapters == 2 * teacher.trained_bytes == 2 * 4 * sum(
        8 * sum(m.weight.shape) for name, m in real(config).named_modules() if "proj" in name)
    for phase in resident:
        saved = 0 if phase in ("load", "score") else student.weights
        assert resident[phase]["total"] - offloaded[phase]["total"] == saved
        copies = {"load": 0, "update": 3}.get(phase, 2)
        assert resident[phase]["adapters, AdamW"] == teacher.adapters + copies * teacher.trained_bytes
    assert resident["rollout"]["cache"] == 4 * 64 * 2 * 2 * 2 * 32 * 2  # rows, 59 tokens in 64 columns, layers, k v...


def test_a_student_that_shares_the_policys_base_takes_no_memory_of_its_own():
    """But for its activations: the phases of two copies, less the second."""
    policy = ModelFootprint(qwen(), bits=16, gpu=True, rank=8, trained="adapter")
    student = ModelFootprint(qwen(), bits=16, gpu=True)
    asked = dict(vocab=256, tokens=500, scored=True, learned=True, kl_gradient=True)
    copies, shared = (phases(policy, student, shared=shared, **asked) for shared in (False, True))
    assert student.weights == policy.weights
    for phase in copies:
        assert copies[phase]["total"] - shared[phase]["total"] == student.weights
        assert shared[phase]["weights"] == policy.weights


def test_an_engine_of_its_own_is_resident_in_every_phase():
    policy = ModelFootprint(qwen(), bits=16, gpu=True, rank=8, trained="adapter")
    asked = dict(vocab=256, tokens=500, scored=True, learned=True)
    alone, engine = phases(policy, **asked), phases(policy, **asked, rollout=(4, 50, 10), engine_bytes=10**9)
    assert [*engine] == ["load", "rollout", "score", "update"]
    for phase in alone:
        assert engine[phase]["total"] - alone[phase]["total"] == 10**9
    assert engine["rollout"]["total"] == 10**9 + policy.weights + 3 * policy.adapters  # nothing of transformers' own


def test_what_to_change_first():
    flags = dict(student_bits=4, teacher_bits=16, micro_batch_tokens=8192, rollout_batch=64, max_new_tokens=1000,
                 gradient_checkpointing=True, lora_rank=16)
    zero = dict.fromkeys(dry_run.COLUMNS, 0)

    def first(phase, part, row=1100, shared=False, **changes):
        return remedy({**flags, **changes}, phase, {**zero, part: 9}, row, shared)

    assert first("load", "weights") == "--teacher-bits 4"
    assert first("load", "weights", student_bits=16) == "--student-bits 4"
    assert first("update", "weights", teacher_bits=4, offload_student=False) == "--offload-student"
    assert first("update", "weights", teacher_bits=4) == "a smaller model"
    assert first("score", "weights", teacher_bits=4, offload_student=False) == "a smaller model"  # it has to score
    assert first("rollout", "weights", teacher_bits=4, offload_student=False, kl_gradient=True) == "a smaller model"
    assert first("rollout", "cache") == first("rollout", "logits") == "--rollout-batch 32"
    assert first("rollout", "cache", rollout_batch=1) == "--max-new-tokens 500"
    assert first("update", "activations", gradient_checkpointing=False) == "--gradient-checkpointing"
    assert first("update", "activations") == first("score", "activations") == "--micro-batch-tokens 4096"
    assert first("update", "activations", row=8000) == "--max-new-tokens 500"
    assert first("score", "logits") == "a smaller model"  # their chunk is a constant
    assert first("update", "adapters, AdamW") == "--lora-rank 8"
    assert first("update", "adapters, AdamW", lora_rank=None) == "a smaller model"  # the adapter's own
    for part in ("weights", "adapters, AdamW"):  # all weights are trained, which 4 bits can't be
        assert first("update", part, lora_rank=0, bits=32) == "--lora-rank 16"
    assert first("update", "weights", engine="vllm", student_bits=16) == "--student-bits 4"
    assert first("update", "weights", engine="vllm") == "--engine transformers"  # it has no 4 bits
    same = dict(shared=True, student_bits=16, offload_student=False)
    assert first("update", "weights", **same) == "--teacher-bits 4 --student-bits 4"  # one alone would be a second copy
    assert first("update", "weights", **same, engine="vllm") == "--engine transformers"
    assert first("update", "weights", **same | dict(teacher_bits=4, student_bits=4)) == "a smaller model"
    numbers = zero | {"activations": 5, "logits": 9, "weights": 1}
    assert remedy(flags, "score", numbers, 1100) == "--micro-batch-tokens 4096"  # the largest that a flag can change


# ---------------------------------------------------------------------------------------------------------
# --dry-run of every script


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
    monkeypatch.setattr(models, "load_lora", load)


PHASES = {
    "train_rlt.py": "load rollout score reference update", "rl_student.py": "load rollout score reference update",
    "on_policy_student.py --teacher toy-teacher": "load rollout update", "sft_student.py --data toy": "load update",
    "distill.py --model toy-teacher": "load rollout score",
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


@pytest.mark.parametrize("script, phase, rows, flags", [
    ("train_rlt.py", "update", 4, ("--prompts-per-step", 2, "--group-size", 2, "--eval-rows", 4)),
    ("on_policy_student.py", "update", 4, ("--teacher", "toy-teacher", "--prompts-per-step", 4, "--eval-rows", 4)),
    ("sft_student.py", "update", 4, ("--data", "toy", "--batch-size", 4, "--val-rows", 4)),
    ("distill.py", "score", 4, ("--model", "toy-teacher", "--batch-size", 4))])
def test_a_micro_batch_has_no_more_rows_than_a_step(workshop, no_weights, script, phase, rows, flags):
    def peak(tokens):
        _, printed = dry(workshop, script, *flags, "--limit", 400, "--out", "runs/never", "--dry-run", 24,
                         "--micro-batch-tokens", tokens)
        row = int(re.search(r"rows of up to ([\d,]+) tokens", printed)[1].replace(",", ""))
        return next(line for line in printed.splitlines() if line.startswith(phase)), row

    many, row = peak(10**7)
    assert peak(rows * row)[0] == many and peak(row)[0] != many


@pytest.mark.parametrize("script", ["train_rlt.py", "rl_student.py"])
def test_ranks_share_a_steps_rows(workshop, no_weights, monkeypatch, script):
    """Two of them sample as many as one that is asked half the questions."""
    def rollout(ranks, questions):
        monkeypatch.setattr(distributed, "init_distributed", lambda device: (0, ranks))
        printed = dry(workshop, script, "--limit", 400, "--out", "runs/never", "--dry-run", "24", "--eval-rows", 8,
                      "--rollout-batch", 10_000, "--prompts-per-step", questions)[1]
        return next(line for line in printed.splitlines() if line.startswith("rollout"))

    assert rollout(2, 64) == rollout(1, 32) != rollout(1, 64)


@pytest.mark.parametrize("script", ["train_rlt.py", "distill.py"])
def test_a_dry_run_counts_a_shared_base_once(workshop, no_weights, monkeypatch, script):
    monkeypatch.setattr(dry_run, "GB", 1e6)  # the toy's weights in MB

    def weights(teacher, student):
        bits = ("--teacher-bits", teacher, "--student-bits", student)
        printed = dry(workshop, script, "--model", "toy-teacher", "--limit", 400, "--out", "runs/never", *bits,
                      "--dry-run", 24)[1]
        return float(next(line for line in printed.splitlines() if line.startswith("score")).split()[1])

    shared, mixed = weights(32, 32), weights(32, 16)
    assert shared == pytest.approx(2 * weights(16, 16), rel=0.01) and shared < mixed
    saved = ("tip: with --student-bits 32 the student is the teacher's own base, which needs no weights of its own: "
             "{:.3g} GB less")
    asked = ("--model", "toy-teacher", "--limit", 400, "--out", "runs/never", "--teacher-bits", 32, "--dry-run", 24)
    assert saved.format(mixed - shared) in dry(workshop, script, *asked, "--student-bits", 16)[1]
    for others in (("--student-bits", 32), ("--student-bits", 16, "--student", "runs/toy-teacher")):
        assert "own base" not in dry(workshop, script, *asked, *others)[1]


def test_a_dry_run_finds_what_a_run_would(workshop, no_weights, tmp_path, monkeypatch):
    flags = ["--limit", 200, "--dry-run"]
    assert dry(workshop, "train_rlt.py", *flags, "--out", "runs/toy-teacher")[0] == 0, "beside a run"
    with pytest.raises(UserError, match="6 rows are left"):
        call(workshop, "train_rlt.py", "--limit", 70, "--dry-run", "--out", "runs/never")
    status, printed = dry(workshop, "train_rlt.py", *flags, "--out", "runs/never")
    assert status == 0 and "on this machine" in printed
    disk = type("disk", (), {"free": 10})
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: disk)
    status, printed = dry(workshop, "train_rlt.py", *flags, "--out", "runs/never")
    assert status == 1 and "the disk is too small for 4 checkpoints" in printed
    status, printed = dry(workshop, "train_rlt.py", *flags, "--out", "runs/never", "--save-every", 0)
    assert status == 1 and "the disk is too small for 1 checkpoint:" in printed
    monkeypatch.setattr(dry_run.os, "access", lambda path, mode: False)
    assert "can't be written" in dry(workshop, "distill.py", "--model", "toy", *flags, "--out", "runs/never")[1]


def test_a_killed_run_is_planned_too(workshop, tmp_path):
    flags = ["--data", "toy", "--limit", 100, "--val-rows", 8, "--batch-size", 8, "--out", tmp_path / "run"]
    call(workshop, "sft_student.py", *flags, "--steps", 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    status, printed = dry(workshop, "sft_student.py", *flags, "--steps", 2, "--lr-steps", 2, "--resume",
                          "--dry-run")
    assert status == 0 and "fits" in printed
    with pytest.raises(UserError, match="was started with --lr"):
        call(workshop, "sft_student.py", *flags, "--lr", 1, "--resume", "--dry-run")
    explained = ["--model", "toy-teacher", "--limit", 20, "--batch-size", 8, "--max-new-tokens", 12]
    call(workshop, "distill.py", *explained, "--out", tmp_path / "d.jsonl")
    cut = (tmp_path / "d.jsonl").read_text()[:-50]
    (tmp_path / "d.jsonl").write_text(cut)
    asked = (*explained, "--dry-run", "--out", tmp_path / "d.jsonl")
    assert f"note: {tmp_path}/d.jsonl exists already" in dry(workshop, "distill.py", *asked)[1]
    status, printed = dry(workshop, "distill.py", *asked, "--resume")
    assert "note:" not in printed
    assert status == 0 and (tmp_path / "d.jsonl").read_text() == cut
    assert {path: path.stat().st_mtime_ns for path in before} == before


# ---------------------------------------------------------------------------------------------------------
# hours

H100 = Machine(1, 80e9, 3.35e12, 989e12)


@pytest.mark.parametrize("graph, copies, shares, launch", [
    (True, 1, (0.9, 0.4), (2e-6, 17e-6)), (False, 3, (0.9, 0.7), (20e-6, 35e-6))])
def test_hours_by_hand(graph, copies, shares, launch):
    """One question of one completion, one layer: every term written out."""
    machine = Machine(gpus=1, memory=1e9, bandwidth=1e9, flops=1e12)
    sizes = dict(parameters=1e6, layers=1, hidden=128, heads=2, kv_heads=1, completions=10, steps=10, group=1,
                 prompt=100, limit=1000, batch=1)
    longest = 255 * (1 - torch.e ** (-1 / 0.255))  # a batch of one waits for its own mean
    reads = 2e6 + (100 + longest / 2) * (2 * 64 * 2) * copies
    quick, slow = (88 * seconds for seconds in launch)
    tokens, squared = 350, 100**2 + 2 * 100 * 250 + 1000**2 * 0.1174  # E[length^2], of the cut exponential
    flops = 6 * 2e6 * tokens + 7.5 * 2 * 128 * squared
    hours = expected_hours(machine, graph=graph, **sizes)
    seconds = longest * max(reads / shares[0] / 1e9, quick), longest * (reads / shares[1] / 1e9 + slow)
    assert hours["rollout"] == pytest.approx([10 * each / 3600 for each in seconds], rel=1e-3)
    assert hours["passes"] == pytest.approx([10 * flops / (1e12 * rate) / 3600 for rate in (0.45, 0.25)], rel=1e-3)
    assert hours["total"] == pytest.approx([sum(pair) for pair in zip(hours["rollout"], hours["passes"], strict=True)])


def test_the_longest_row_against_draws():
    """The expected maximum of 24 lengths, and their mean, drawn."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(20_000, 24, dtype=torch.float64).exponential_(1 / 0.255, generator=generator).clamp(max=1)
    assert lengths.mean().item() == pytest.approx(dry_run.MEAN, rel=0.01)
    cut = 1 - torch.e ** (-1 / 0.255)
    formula = 0.255 * sum(cut**k / k for k in range(1, 25))
    assert lengths.amax(1).mean().item() == pytest.approx(formula, rel=0.01)
    assert lengths.square().mean().item() == pytest.approx(0.1174, rel=0.02)


def test_padding_costs_where_questions_share_a_batch():
    def low(**changes):
        return expected_hours(H100, graph=False, **changes)["rollout"][0]

    assert low(batch=32, group=64) < low(batch=32, group=48) < low(batch=32, group=16)
    assert low(batch=32, group=16) == low(batch=32, group=1)


def test_hours_go_the_right_way():
    base = expected_hours(H100)
    for low, high in base.values():
        assert 0 < low < high
    halves = expected_hours(H100._replace(gpus=2))
    assert halves["passes"] == pytest.approx([x / 2 for x in base["passes"]])
    assert halves["rollout"] == pytest.approx([x / 2 for x in base["rollout"]], rel=0.05)
    more = dict(parameters=9e9, layers=30, completions=150_000, limit=20_000, bits=4)
    for name, value in more.items():
        assert expected_hours(H100, **{name: value})["rollout"] > base["rollout"], name
    assert expected_hours(H100, checkpointing=False)["passes"] < base["passes"]
    assert expected_hours(H100, reference=False)["passes"] < base["passes"]
    engine = expected_hours(H100, engine="vllm")
    launched = expected_hours(H100, graph=False)
    assert engine["passes"] == base["passes"] and engine["rollout"][1] < launched["rollout"][0] / 3
    assert all(graph < one for graph, one in zip(base["rollout"], launched["rollout"], strict=True))
    with pytest.raises(ValueError, match="hold the engine's weights and no row"):
        expected_hours(Machine(1, 24e9, 1e12, 165e12), engine="vllm")


def measured_on_a_gpu(phase):
    """Rows of bench/gpu.py's log."""
    rows = [row for row in read_jsonl(ROOT / "figures/logs/gpu.jsonl") if row.get("phase") == phase]
    assert {row["size"] for row in rows} == {"7b", "1.5b"}
    return rows


QWEN = {"7b": dict(parameters=7.6e9), "1.5b": dict(parameters=1.54e9, hidden=1536, heads=12, kv_heads=2)}


def test_hours_agree_with_decode_steps_that_were_measured():
    """A batch of two questions whose few tokens all come at the context of the log."""
    for row in measured_on_a_gpu("rollout"):
        rows, limit = row["rollout_rows"], 4
        hours = expected_hours(H100, completions=rows, steps=1, group=rows // 2, batch=rows, prompt=row["length"],
                               limit=limit, graph=row.get("graph", False), **QWEN[row["size"]])["rollout"]
        cut = 1 - torch.e ** (-1 / dry_run.SCALE)
        longest = limit * dry_run.SCALE * sum(cut**k / k for k in range(1, rows + 1))
        low, high = (3600 * x / longest for x in hours)
        assert low < row["seconds"] < high, row["size"]


@pytest.mark.parametrize("size", QWEN)
def test_memory_agrees_with_peaks_that_were_measured(size, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import step

    monkeypatch.setattr(step, "CUDA", True)
    for phase in ("rollout", "score", "reference", "update"):
        row, = (row for row in measured_on_a_gpu(phase) if row["size"] == size)
        expected = step.expected_bytes(step.size_of(size), row["teacher_bits"], row["student_bits"],
                                       length=row["length"], count=1, batch=row["rollout_rows"],
                                       own_steps=row.get("graph", False))
        assert row["peak_gb"] == pytest.approx(expected[phase] / 1e9, rel=0.01), phase


def test_hours_agree_with_what_is_known():
    """vLLM's published rate: 7,224 tokens/s of Qwen3-4B with LoRA, 32 rows on a B200. The paper: 280 H100-hours, all
    weights trained."""
    qwen3_4b = dict(parameters=4e9, layers=36, hidden=4096, heads=32, kv_heads=8, prompt=512, limit=4096)
    b200 = Machine(1, 40e9, 8e12, 2250e12)  # as much memory as leaves room for some 32 rows
    hours = expected_hours(b200, **qwen3_4b, engine="vllm", completions=1000 * 1024, steps=1)["rollout"]
    fast, slow = (1000 * 1024 * 1024 / 3600 / x for x in hours)
    assert slow < 7224 < fast
    low, high = expected_hours(H100, engine="vllm")["total"]
    assert low < 280 and high > 100


class KernelCounter(TorchDispatchMode):
    """Operations that launch a kernel: those that write memory, views do not."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return False
        before = set(map(id, footprint._storages((args, kwargs))))
        out = function(*args, **(kwargs or {}))
        made = [s for s in footprint._storages(out) if id(s) not in before]
        self.count += bool(made or function._schema.is_mutable) and "empty" not in str(function)
        return out


def test_kernels_of_a_decode_step():
    config = qwen(hidden_size=512, num_hidden_layers=4)
    for rank, share in ((8, 1), (0, 0.5)):
        base = ModelFootprint(config, bits=16, gpu=True, rank=rank).base
        cache, counts = DynamicCache(config=base.config), []
        for tokens in (20, 1):
            with KernelCounter() as counter, torch.no_grad():
                base.get_decoder()(input_ids=torch.empty(4, tokens, dtype=torch.long, device="meta"), use_cache=True,
                                   past_key_values=cache)
            counts.append(counter.count)
        assert counts[-1] / 4 == pytest.approx(dry_run.KERNELS_PER_LAYER * share, rel=0.15)


def test_nothing_is_resident_after_a_trace():
    """Passes can be repeated: the second finds what the first found."""
    made = ModelFootprint(qwen(), bits=32, gpu=False, rank=4, trained="adapter")
    for run in (lambda: made.forward_bytes(99), lambda: made.training_bytes(99, True),
                lambda: made.training_bytes(99, False), lambda: made.generate_bytes(2, 9, 4)):
        first, *others = (run() for _ in range(3))
        assert all(other == first for other in others)
    assert all(a < b for a, b in itertools.pairwise(made.forward_bytes(n)[0] for n in (64, 128, 256)))
