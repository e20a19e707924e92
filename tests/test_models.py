"""Models: found, loaded, given adapters, saved, refused.   python -m pytest tests/test_models.py"""

import copy
import json
import math
import shutil

from rlt import lora, models, rollout, saving
from rlt.chat_template import tokenize, vocabulary_size
from rlt.errors import UserError
from rlt.logprobs import completion_logprobs
from rlt.lora import update_mode

import pytest
import torch
from conftest import run_script
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_rewards import small
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bench import zoo

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(toy):
    return str(toy / "runs/toy")


@pytest.fixture(scope="module")
def tokenizer(base):
    return models.load_tokenizer(base)


def new_adapter(base, **changes):
    options = dict(bits=32, device=CPU, rank=4, alpha=8, targets="all-linear", seed=0, reference=True)
    return models.load_lora(str(base), **{**options, **changes})


def ask(model, tokenizer):
    """Log-probs of three short answers."""
    return completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0]


def stir(model, by=0.3):
    """Move the policy's adapter away from where it started."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in lora.adapter_parameters(model):
            p.add_(by * torch.randn_like(p))


PROMPTS = [[2, 8, 10, 9, 11, 3, 4], [2, 8, 3], [2, 8, 10, 9, 11, 20, 31, 21, 33, 22, 35, 3, 4]]


# -- adapters


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_adapters_are_float32_on_any_base_and_alone_are_trained(base, bits):
    model = new_adapter(base, bits=bits)
    adapters = lora.adapter_parameters(model) + lora.adapter_parameters(model, "reference")
    assert {p.dtype for p in adapters} == {torch.float32}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in lora.adapter_parameters(model)}
    with lora.use_adapter(model, "reference"):
        pass
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_reference_holds_the_starting_weights(base, tmp_path, tokenizer):
    """Also when they are a warm-up's: it is not the base."""
    first = new_adapter(base, reference=False)
    stir(first)
    saving.save_model(first, tokenizer, tmp_path)
    model = new_adapter(str(tmp_path))
    start = ask(model, tokenizer).detach()
    with lora.use_adapter(model, "reference"):
        assert torch.equal(ask(model, tokenizer), start)
    stir(model)
    with lora.use_adapter(model, "reference"):
        assert torch.equal(ask(model, tokenizer), start)
    assert not torch.allclose(ask(model, tokenizer), start, atol=1e-3)
    base_alone = models.load_model(base, bits=32, device=CPU)
    assert not torch.allclose(ask(base_alone, tokenizer), start, atol=1e-3)


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_the_base_without_its_adapter_is_a_second_copy_in_the_same_memory(base, tokenizer, bits):
    """The same bits as a copy of its own, hash included, whatever the policy's adapters and modes are."""
    policy = new_adapter(base, bits=bits, checkpointing=True)
    stir(policy)
    before, alone = ask(policy, tokenizer), models.load_model(base, bits=bits, device=CPU)
    student = lora.without_adapter(policy)
    assert torch.equal(ask(student, tokenizer), ask(alone, tokenizer))
    assert not torch.equal(before, ask(student, tokenizer)), "the test must be able to tell"
    assert saving.fingerprint(student) == saving.fingerprint(alone) == saving.fingerprint(policy)
    assert [name for name, _ in student.named_parameters()] == [name for name, _ in alone.named_parameters()]
    ours = {p.data_ptr() for p in policy.parameters()}
    assert ours.issuperset(p.data_ptr() for p in student.parameters())
    states = [p.quant_state.absmax for p in policy.parameters() if getattr(p, "quant_state", None)]
    assert {x.data_ptr() for x in states} == {
        p.quant_state.absmax.data_ptr() for p in student.parameters() if getattr(p, "quant_state", None)}
    assert bool(states) == (bits == 4)

    with lora.use_adapter(policy, "reference"):  # the policy's state is not the student's
        assert torch.equal(ask(student, tokenizer), ask(alone, tokenizer))
    update_mode(policy)
    ask(policy, tokenizer).sum().backward()
    assert torch.equal(ask(student, tokenizer), ask(alone, tokenizer)) and torch.equal(before, ask(policy, tokenizer))
    assert not any(module.training for module in student.modules())
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in lora.adapter_parameters(policy))
    plain = models.load_model(base, bits=32, device=CPU)
    assert lora.without_adapter(plain) is plain


def test_which_students_are_the_teachers_base(base, tmp_path, tokenizer):
    teacher, other = str(tmp_path / "teacher"), str(tmp_path / "other")
    saving.save_model(new_adapter(base, reference=False), tokenizer, tmp_path / "teacher")
    shutil.copytree(base, other)
    assert models.shares_base(teacher, 16, base, 16) and models.shares_base(base, 4, base, 4)
    assert not models.shares_base(teacher, 32, base, 4), "other bits"
    assert not models.shares_base(teacher, 32, teacher, 32), "an adapter is no base"
    assert not models.shares_base(teacher, 32, other, 32), "another folder"
    path = tmp_path / "teacher/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    assert not models.shares_base(teacher, 32, base, 32), "its base has lost what the adapter started with"


def test_a_base_is_the_same_folder_in_every_spelling(base, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    somebody_elses(base, tmp_path / "teacher")
    shutil.copytree(base, tmp_path / "models/run/final")
    (tmp_path / "models/run/metrics.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "models")
    final = str(tmp_path / "models/run/final")
    config = tmp_path / "teacher/adapter_config.json"
    for spelled in ("models/run/final", "./models/run/final", f"{final}/", "link/run/final", "models/run", final):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": spelled}))
        assert models.base_of("teacher") == final
        for student in (models.base_of("teacher"), spelled, "link/run"):
            assert models.shares_base("teacher", 32, student, 32)
    wanted = ask(models.load_model("teacher", bits=32, device=CPU), tokenizer)
    assert torch.equal(ask(new_adapter("teacher", rank=None, alpha=None, targets=None), tokenizer), wanted)


def test_an_adapter_on_an_adapter_is_refused(base, tmp_path):
    somebody_elses(base, tmp_path / "first")
    somebody_elses(base, tmp_path / "second")
    config = tmp_path / "second/adapter_config.json"
    first = {"base_model_name_or_path": str(tmp_path / "first")}
    config.write_text(json.dumps(json.loads(config.read_text()) | first))
    for function, options in ((models.load_tokenizer, {}), (models.load_model, dict(bits=32, device=CPU)),
                              (models.load_lora, dict(bits=32, device=CPU, seed=0))):
        assert "is one on another adapter" in refusal(function, str(tmp_path / "second"), **options)


def test_the_reference_is_synced_by_the_formula(base):
    model = new_adapter(base)
    stir(model)
    pairs = [(p.clone(), r.clone()) for p, r in lora.adapter_pairs(model)]
    lora.sync_reference(model, 0.9)
    for (policy, before), (now, after) in zip(pairs, lora.adapter_pairs(model), strict=True):
        assert torch.equal(now, policy)
        assert torch.allclose(after, 0.9 * policy + 0.1 * before, atol=1e-7)
    lora.sync_reference(model, 1.0)
    assert all(torch.equal(p, r) for p, r in lora.adapter_pairs(model))


def test_averaging_factors_is_not_averaging_products(base):
    """What --sync-ref-mix's help says: the miss is exactly m (1 - m) dB dA times the scale."""
    model, m = new_adapter(base), 0.9
    stir(model)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)

    def product(adapter):
        return layer.get_delta_weight(adapter).clone()

    factors = {a: (layer.lora_A[a].weight.clone(), layer.lora_B[a].weight.clone()) for a in ("default", "reference")}
    average = m * product("default") + (1 - m) * product("reference")
    lora.sync_reference(model, m)
    (a1, b1), (a0, b0) = factors["default"], factors["reference"]
    miss = m * (1 - m) * (b1 - b0) @ (a1 - a0) * layer.scaling["default"]
    assert miss.abs().max() > 1e-3
    assert torch.allclose(average - product("reference"), miss, atol=1e-6)


def test_saving_and_restoring_is_bit_for_bit(base, tmp_path, tokenizer):
    model = new_adapter(base)
    stir(model)
    saving.save_model(model, tokenizer, tmp_path / "both", adapters=("default", "reference"))
    kept = [(p.clone(), r.clone()) for p, r in lora.adapter_pairs(model)]
    fresh = new_adapter(base, seed=7)
    saving.restore(fresh, tmp_path / "both")
    for (p, r), (p2, r2) in zip(kept, lora.adapter_pairs(fresh), strict=True):
        assert torch.equal(p, p2) and torch.equal(r, r2)
    assert (tmp_path / "both/adapter_model.safetensors").exists()
    config = json.loads((tmp_path / "both/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


def test_training_never_touches_the_base(base, tokenizer):
    model = new_adapter(base, bits=4, checkpointing=True).train()
    before = saving.fingerprint(model)
    adapters = [p.clone() for p in lora.adapter_parameters(model)]
    optimizer = torch.optim.AdamW(lora.adapter_parameters(model), lr=1e-6)
    for _ in range(3):
        ask(model, tokenizer).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert saving.fingerprint(model) == before
    moved = [(p != q).float().mean() for p, q in zip(lora.adapter_parameters(model), adapters, strict=True)]
    assert torch.stack(moved).min() > 0.99, "at lr 1e-6 bf16 adapters would stand still"


def test_four_bits_on_a_cpu_keep_their_gradients(base, tokenizer):
    """bitsandbytes' in-place repack for AVX512-BF16 would break training after the first eval pass."""
    model = new_adapter(base, bits=4, reference=False)
    stir(model)

    def gradients():
        model.train()
        ask(model, tokenizer).sum().backward()
        found = [p.grad.clone() for p in lora.adapter_parameters(model)]
        model.zero_grad()
        return found

    before = gradients()
    model.eval()
    rollout.generate(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=1.0, seed=0)
    with torch.no_grad():
        ask(model, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_checkpointed_gradients_are_the_plain_ones(base, tokenizer):
    def gradients(checkpointing):
        model = new_adapter(base, reference=False, checkpointing=checkpointing)
        stir(model)
        model.train()
        ask(model, tokenizer).sum().backward()
        return [p.grad for p in lora.adapter_parameters(model)]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_targets(base, tmp_path, tokenizer):
    model = new_adapter(base, targets="q_proj, v_proj", reference=False)
    names = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, _ in model.named_parameters() if "lora_" in n}
    assert names == {"q_proj", "v_proj"}
    for wrong in ("q_proj,no_such", "no_such", "lm_head", "embed_tokens", ""):
        with pytest.raises(ValueError, match="expected all-linear, or some of down_proj, gate_proj"):
            new_adapter(base, targets=wrong)
    saving.save_model(model, tokenizer, tmp_path)
    new_adapter(tmp_path, targets="v_proj,q_proj")
    for other in ("q_proj", "all-linear"):
        with pytest.raises(UserError, match="holds an adapter with targets q_proj,v_proj: leave --lora-targets out"):
            new_adapter(tmp_path, targets=other)


def test_an_adapter_keeps_its_own_rank_scale_and_targets(base, tmp_path, tokenizer):
    saved = new_adapter(base, reference=False)
    stir(saved)
    wanted = ask(saved, tokenizer)
    saving.save_model(saved, tokenizer, tmp_path)
    none = dict(rank=None, alpha=None, targets=None)
    for asked in (none, {}, {**none, "targets": "all-linear"}, {**none, "alpha": 8.0}):
        model = new_adapter(tmp_path, **asked)
        config = model.peft_config["default"]
        assert (config.r, config.lora_alpha, len(config.target_modules)) == (4, 8, 7)
        assert torch.equal(ask(model, tokenizer), wanted)
    for asked, own in (({"rank": 16}, "rank 4"), ({"alpha": 16.0}, "alpha 8")):
        with pytest.raises(UserError, match=f"holds an adapter with {own}: leave --lora-{own.split()[0]} out"):
            new_adapter(tmp_path, **{**none, **asked})
    fresh = new_adapter(base, **none).peft_config["default"]
    assert (fresh.r, fresh.lora_alpha, len(fresh.target_modules)) == (16, 32, 7), "a new one has the defaults"


def somebody_elses(base, folder, **changes):
    """An adapter that peft made, without a tokenizer beside it."""
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(models.load_model(str(base), bits=32, device=CPU), LoraConfig(**{**options, **changes}))
    stir(model)
    model.save_pretrained(folder)
    return model


def test_modules_that_an_adapter_trains_whole_are_trained_saved_and_in_the_reference(base, tmp_path, tokenizer):
    somebody_elses(base, tmp_path / "theirs", modules_to_save=["input_layernorm"])
    model = new_adapter(tmp_path / "theirs", rank=None, alpha=None, targets=None)
    copies = [n for n, p in model.named_parameters() if "modules_to_save.default" in n and p.requires_grad]
    assert len(copies) == 3 and len(lora.adapter_parameters(model)) == 3 + 2 * 3
    start = ask(model, tokenizer).detach()
    stir(model)
    with lora.use_adapter(model, "reference"):
        assert torch.equal(ask(model, tokenizer), start)
    moved = ask(model, tokenizer).detach()
    assert not torch.allclose(moved, start, atol=1e-3)
    saving.save_model(model, tokenizer, tmp_path / "ours", adapters=("default", "reference"))
    again = new_adapter(tmp_path / "theirs", rank=None, alpha=None, targets=None)
    saving.restore(again, tmp_path / "ours")
    assert torch.equal(ask(again, tokenizer), moved)
    with lora.use_adapter(again, "reference"):
        assert torch.equal(ask(again, tokenizer), start)


def test_dropout_is_off_in_rl_and_stays_on_in_sft(base, tmp_path, tokenizer, capsys):
    somebody_elses(base, tmp_path, lora_dropout=0.5)
    none = dict(rank=None, alpha=None, targets=None, reference=False)
    off, on = (new_adapter(tmp_path, dropout=dropout, **none).train() for dropout in (False, True))
    assert torch.equal(ask(off, tokenizer), ask(off, tokenizer))
    assert not torch.equal(ask(on, tokenizer), ask(on, tokenizer))
    assert torch.equal(ask(on.eval(), tokenizer), ask(off, tokenizer))
    assert capsys.readouterr().out.count("dropout is off") == 1


# -- devices


def test_on_brings_a_model_and_takes_it_back():
    class Model:
        device, trips = "cpu", []

        def parameters(self):
            return iter([self])

        def to(self, device):
            self.device = device
            self.trips.append(device)

    model = Model()
    with models.on_device("cuda", model):
        assert model.device == "cuda"
    with pytest.raises(ZeroDivisionError), models.on_device("cuda", model):
        1 / 0  # noqa: B018
    assert model.trips == ["cuda", "cpu"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the tests around this one have stand-ins")
@pytest.mark.parametrize("bits", [16, 4])
def test_a_parked_model_leaves_the_gpu_and_comes_back(base, tokenizer, bits):
    cuda = torch.device("cuda")
    model = models.load_model(base, bits=bits, device=cuda)
    before, held = ask(model, tokenizer), torch.cuda.memory_allocated()
    model.to("cpu")
    parked = torch.cuda.memory_allocated()
    assert parked < held
    for _ in range(2):
        with models.on_device(cuda, model):
            assert torch.equal(ask(model, tokenizer), before)
        assert {p.device.type for p in model.parameters()} == {"cpu"} and torch.cuda.memory_allocated() <= parked


def test_four_bit_states_move_with_their_weights(base, tokenizer, monkeypatch):
    """All of them, both ways: constants of a 4-bit weight are neither parameters nor buffers."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    model, moved, move = models.load_model(base, bits=4, device=CPU), [], QuantState.to
    states = {id(m.weight.quant_state): m for m in model.modules() if isinstance(m, Linear4bit)}
    before = ask(model, tokenizer)
    monkeypatch.setattr(QuantState, "to", lambda self, device: moved.append((id(self), device)) or move(self, device))
    with models.on_device(CPU, model):
        assert set(moved) == {(state, CPU) for state in states} and len(states) == 7 * 3
        moved.clear()
    assert set(moved) == {(state, CPU) for state in states}
    assert {id(m.weight.quant_state) for m in states.values()} == set(states)
    assert torch.equal(ask(model, tokenizer), before)


# -- names


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/done/final").mkdir(parents=True)
    (tmp_path / "runs/open").mkdir()
    (tmp_path / "runs/open/metrics.jsonl").touch()
    assert models.resolve("runs/done") == str(tmp_path / "runs/done/final")
    assert models.resolve("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(UserError, match="runs/open has no final/: .* Continue it with --resume"):
        models.resolve("runs/open")
    for wrong in ("runs/typo", "./typo", "/no/such", "a/b/c"):
        with pytest.raises(UserError, match=f"{wrong} does not exist: expected a run folder, .* or toy"):
            models.resolve(wrong)
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(UserError, match="rows.jsonl is a file: expected a run folder"):
        models.resolve("./rows.jsonl")


def test_devices():
    assert models.pick_device("cpu") == CPU
    for wrong in ("tpu", "cuda:", "cpu:0", "gpu"):
        with pytest.raises(UserError, match=f"--device {wrong}: expected cpu, cuda, cuda:1 or auto"):
            models.pick_device(wrong)
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert models.pick_device("auto") == CPU
    with pytest.raises(UserError, match="no usable CUDA device. Pass --device cpu or auto"):
        models.pick_device("cuda:9")


def test_what_is_known_of_a_model_without_its_weights(base, tmp_path, tokenizer, tiny_model):
    saving.save_model(new_adapter(base, reference=False), tokenizer, tmp_path / "adapter")
    assert models.base_of(str(tmp_path / "adapter")) == base == models.base_of(base)
    known = models.model_and_adapter_config(str(tmp_path / "adapter"))
    assert known["adapter"].r == 4 and len(known["adapter"].target_modules) == 7 and known["config"].hidden_size == 128
    assert models.model_and_adapter_config(base).keys() == {"config"}
    tiny_model(64, max_position_embeddings=77).save_pretrained(tmp_path / "short")
    assert models.context_length(base, str(tmp_path / "short")) == 77
    small("Bloom", n_layer=2, n_head=4).save_pretrained(tmp_path / "bloom")
    assert models.context_length(str(tmp_path / "bloom")) == math.inf, "it has no limit"


# -- tokenizers


def test_a_model_that_reads_another_ones_prompts_is_named(tokenizer, capsys):
    for change in (None, {"chat_template": tokenizer.chat_template + "{# another #}"},
                   {"init_kwargs": tokenizer.init_kwargs | {"rlt_system": {"student": "Solve."}}}):
        other = copy.deepcopy(tokenizer)
        for name, value in (change or {}).items():
            setattr(other, name, value)
        models.check_same_tokenizer(tokenizer, other, "org/student")
        warned = "warning: org/student has another chat template or other system texts" in capsys.readouterr().out
        assert warned is bool(change)


def test_tokenizers_that_differ_are_refused_at_the_first_id(tokenizer, toy, tmp_path):
    models.check_same_tokenizer(tokenizer, copy.deepcopy(tokenizer), "student")
    text = (toy / "runs/toy/tokenizer.json").read_text().replace('"swap"', '"swop"')
    (tmp_path / "tokenizer.json").write_text(text)
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copy(toy / "runs/toy" / name, tmp_path)
    i = tokenizer.get_vocab()["swap"]
    with pytest.raises(UserError, match=f"id {i} is 'swap' in one, 'swop' in the other.* of the same family"):
        models.check_same_tokenizer(tokenizer, models.load_tokenizer(str(tmp_path)), "student")


def added(tokenizer, *tokens, **special):
    """A copy of a tokenizer with more tokens."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens(list(tokens))
    more.add_special_tokens(special)
    return more


def test_tokens_that_were_added_to_one_model_alone_are_never_used(tokenizer):
    rows = 1 + max(tokenizer.get_vocab().values())
    for ours, theirs in (({"pad_token": "[PAD]"}, {}), ({}, {"pad_token": "[PAD]"}),
                         ({"pad_token": "[PAD]"}, {"pad_token": "[PAD]"})):
        model, other = added(tokenizer, **ours), added(tokenizer, **theirs)
        assert "[PAD]" in (model.pad_token, other.pad_token)
        model.model_rows = other.model_rows = rows + 1
        models.check_same_tokenizer(model, other, "student")
        both = bool(ours and theirs)
        assert vocabulary_size(model) == rows + both and model.pad_token_id < rows + both
        assert (model.pad_token == "[PAD]") is both, "a student without a row for it would read it as padding"
    model = added(tokenizer, pad_token="[PAD]")
    model.model_rows = tokenizer.model_rows
    models.check_same_tokenizer(model, tokenizer, "student")
    with pytest.raises(UserError, match=r"no row for '\[PAD\]'"):
        tokenize(model, "[PAD]")


def test_tokens_that_end_a_turn_or_stand_between_others_must_be_in_both(tokenizer):
    first = 1 + max(tokenizer.get_vocab().values())
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["word"] = first
    longer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=tokenizer.eos_token)
    for model, other, i in (
        (tokenizer, longer, first),  # texts are other ids to the longer one
        (added(tokenizer, eos_token="<|im_end|>"), tokenizer, first),
        (added(tokenizer, "new", pad_token="[PAD]"), added(tokenizer, pad_token="[PAD]"), first),
    ):
        with pytest.raises(UserError, match=f"tokenize differently .id {i} is"):
            models.check_same_tokenizer(model, other, "student")


def test_a_bare_adapter_has_the_tokenizer_of_its_base(base, tmp_path, tokenizer):
    somebody_elses(base, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
    assert models.load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


def test_a_token_that_the_model_has_no_row_for_is_never_used(base, tokenizer, tmp_path):
    """A padding token was added without a resize, or an image's, as in Gemma 3's smallest models."""
    rows = len(models.load_model(base, bits=32, device=CPU).get_input_embeddings().weight)
    for name, resized in (("teacher", True), ("student", False)):
        models.load_model(base, bits=32, device=CPU).save_pretrained(tmp_path / name)
        more = copy.deepcopy(tokenizer)
        more.add_tokens([f"word {i}" for i in range(rows - vocabulary_size(more))])
        more.add_special_tokens({"pad_token": "[PAD]"})
        more.save_pretrained(tmp_path / name)
        if resized:
            model = models.load_model(str(tmp_path / name), bits=32, device=CPU)
            model.resize_token_embeddings(rows + 1)
            model.save_pretrained(tmp_path / name)
    teacher, student = (models.load_tokenizer(str(tmp_path / name)) for name in ("teacher", "student"))
    assert (vocabulary_size(teacher), vocabulary_size(student)) == (rows + 1, rows)
    assert teacher.pad_token == "[PAD]" and student.pad_token == student.eos_token
    models.check_same_tokenizer(teacher, student, "student")
    assert vocabulary_size(teacher) == rows, "what one samples both can read"
    assert tokenize(teacher, "")["input_ids"] == []
    student.add_tokens(["new"])
    with pytest.raises(UserError, match="the model has no row for 'new'"):
        tokenize(student, "new")


def test_a_models_own_ends_come_with_its_tokenizer(base, tmp_path):
    from transformers import GenerationConfig

    shutil.copytree(base, tmp_path / "m")
    for ends, found in ([7, 9], (7, 9)), (7, (7,)), (None, ()):
        GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path / "m")
        assert models.load_tokenizer(str(tmp_path / "m")).generation_eos == found
    (tmp_path / "m/generation_config.json").unlink()
    assert models.load_tokenizer(str(tmp_path / "m")).generation_eos == ()
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("eos_token", "pad_token")}
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config))
    model_config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(model_config | {"eos_token_id": None}))
    with pytest.raises(UserError, match="has no end-of-sequence token: expected an instruct model's"):
        models.load_tokenizer(str(tmp_path / "m"))
    GenerationConfig(eos_token_id=[9, 7]).save_pretrained(tmp_path / "m")
    without = models.load_tokenizer(str(tmp_path / "m"))
    assert without.eos_token_id == without.pad_token_id == 9, "padding is harmless: masks come from lengths"


# -- models that can't be used end in one line


def refusal(function, *args, **options):
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pickled_weights_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "m")
    model = models.load_model(base, bits=32, device=CPU)
    torch.save(model.state_dict(), tmp_path / "m/pytorch_model.bin")
    (tmp_path / "m/model.safetensors").unlink()
    message = refusal(models.load_model, str(tmp_path / "m"), bits=32, device=CPU)
    assert "can't be loaded as a causal language model" in message and "safetensors" in message


def test_files_that_can_not_be_read(base, tmp_path):
    shutil.copytree(base, tmp_path / "m")
    (tmp_path / "m/config.json").write_text("{")
    for function in (models.model_and_adapter_config, models.context_length):
        assert "the config of" in refusal(function, str(tmp_path / "m"))
    assert "can't be loaded as a causal" in refusal(models.load_model, str(tmp_path / "m"), bits=32, device=CPU)
    (tmp_path / "m/tokenizer.json").unlink()
    (tmp_path / "m/tokenizer_config.json").unlink()
    assert "has no tokenizer that can be read, expected tokenizer.json" in refusal(
        models.load_tokenizer, str(tmp_path / "m"))
    somebody_elses(base, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text("{")
    assert "the adapter in" in refusal(models.base_of, str(tmp_path / "adapter"))


def test_code_of_a_model_is_never_run_and_nobody_is_asked(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "m")
    (tmp_path / "m/own.py").write_text(
        f"open({str(tmp_path / 'run')!r}, 'w')\nfrom transformers import Qwen2Config\n"
        "class Own(Qwen2Config):\n    model_type = 'own'\n")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | own))
    monkeypatch.setattr("builtins.input", lambda question: "y")
    somebody_elses(base, tmp_path / "adapter")
    adapter = tmp_path / "adapter/adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"base_model_name_or_path": str(tmp_path / "m")}))
    for name in ("m", "adapter"):
        for function, options in ((models.load_tokenizer, {}), (models.model_and_adapter_config, {}),
                                  (models.load_model, dict(bits=32, device=CPU)),
                                  (models.load_lora, dict(bits=32, device=CPU, seed=0))):
            assert "it needs code of its own, which is never run here" in refusal(
                function, str(tmp_path / name), **options)
    assert not (tmp_path / "run").exists()
    config["auto_map"] = {"AutoConfig": "own.Own"}  # beside a type that transformers has, which is taken
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    models.load_model(str(tmp_path / "m"), bits=32, device=CPU)
    assert not (tmp_path / "run").exists()


def test_a_reason_that_a_library_only_announces_in_its_first_line(base, tmp_path, tiny_model):
    shutil.copytree(base, tmp_path / "m")
    config = tmp_path / "m/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": "wide"}))
    assert "'hidden_size': TypeError: Field 'hidden_size' expected int, got str" in refusal(
        models.context_length, str(tmp_path / "m"))
    somebody_elses(base, tmp_path / "adapter")
    tiny_model(64).save_pretrained(tmp_path / "other")  # of width 32
    adapter = tmp_path / "adapter/adapter_config.json"
    other = {"base_model_name_or_path": str(tmp_path / "other")}
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | other))
    message = refusal(models.load_model, str(tmp_path / "adapter"), bits=32, device=CPU)
    assert "does not fit its base" in message and "size mismatch for " in message


def test_adapters_without_their_base(base, tmp_path, tiny_model):
    shutil.copytree(base, tmp_path / "base")
    somebody_elses(tmp_path / "base", tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    message = refusal(models.load_model, str(tmp_path / "adapter"), bits=32, device=CPU)
    assert "which does not exist here: put the path or hub id of its base into adapter_config.json" in message
    config = tmp_path / "adapter/adapter_config.json"
    for name in (None, "", 5, ["base"], "/gone"):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
        assert "which does not exist here" in refusal(models.load_tokenizer, str(tmp_path / "adapter"))
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    tiny_model(64).save_pretrained(tmp_path / "base")  # another one
    for load in (models.load_model, new_adapter):
        options = {} if load is new_adapter else dict(bits=32, device=CPU)
        options |= dict(rank=None, alpha=None, targets=None) if load is new_adapter else {}
        assert "does not fit its base" in refusal(load, str(tmp_path / "adapter"), **options)


def test_models_that_rewards_would_read_wrong(tmp_path):
    small("Gemma2", head_dim=8).save_pretrained(tmp_path)
    for load, options in ((models.load_model, dict(scores=True)), (models.load_lora, dict(seed=0))):
        message = refusal(load, str(tmp_path), bits=32, device=CPU, **options)
        assert message.startswith(f"{tmp_path} can't be used: Gemma2ForCausalLM does more to its logits")
    models.load_model(str(tmp_path), bits=32, device=CPU)  # it may still be evaluated


def test_quantised_checkpoints_are_loaded_with_four_bits_only(base, tmp_path, tokenizer):
    models.load_model(base, bits=4, device=CPU).save_pretrained(tmp_path)
    message = refusal(models.load_model, str(tmp_path), bits=32, device=CPU)
    assert "32 bits were asked for: pass 4 bits to sample or to train an adapter" in message
    assert message.endswith("To merge one, or to train all weights, use the unquantised model."), "those can't pass 4"
    saved = models.load_model(str(tmp_path), bits=4, device=CPU)
    torch.testing.assert_close(ask(saved, tokenizer), ask(models.load_model(base, bits=4, device=CPU), tokenizer))


# -- weights that are not the model's


def resaved(folder, model, change, **config):
    """A folder with this model's weights after change(weights), and these entries of its config."""
    model.save_pretrained(folder)
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: x.clone() for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def prefixed(prefix):
    return lambda weights: {prefix + name: x for name, x in weights.items()}


def without(part):
    return lambda weights: {name: x for name, x in weights.items() if part not in name}


def with_next_layer(**more):
    """The last layer once more, as one that the model lacks, with other weights in it."""
    return lambda weights: weights | {name.replace("layers.1.", "layers.2."): x for name, x in weights.items()} | {
        f"model.layers.2.{name}": x for name, x in more.items()}


SHAPE_OF_3 = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
AS_CLASSIFIER = {"architectures": ["Qwen2ForSequenceClassification"]}


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("change, config, message", [
    (without("lm_head"), {}, "its weights lack 1 of those in its config.json, lm_head.weight for one. Copy"),
    (without("lm_head"), AS_CLASSIFIER, "lm_head.weight for one"),
    (without("layers.1.mlp.up_proj"), {}, "lack 1 of those in its config.json, model.layers.1.mlp.up_proj.weight for"),
    (prefixed("module."), {}, "and have module.lm_head.weight, which is none of them"),
    (prefixed("_orig_mod."), {}, "and have _orig_mod.lm_head.weight, which is none of them"),
    (lambda weights: weights, SHAPE_OF_3, "lack 12 of those in its config.json, model.layers.2.input_layernorm.weight"),
    (with_next_layer(), {}, "by its config.json it has no layer model.layers.2, which is in its weights"),
])
def test_weights_that_would_be_random_or_lost_are_refused(tiny_model, tmp_path, capfd, change, config, message, bits):
    folder = resaved(tmp_path / "m", tiny_model(64), change, **config)
    for load, options in ((models.load_model, {}), (models.load_lora, dict(seed=0))):
        assert message in refusal(load, folder, bits=bits, device=CPU, **options)
    assert "LOAD REPORT" not in capfd.readouterr().err, "one line is enough"


def test_weights_of_another_shape_are_named(tiny_model, tmp_path):
    folder = resaved(tmp_path / "m", tiny_model(64), dict, vocab_size=80)
    message = refusal(models.load_model, folder, bits=32, device=CPU)
    assert "lm_head.weight has the shape [64, 32] in its weights and [80, 32] by its config.json" in message


@pytest.mark.parametrize("tied, change", [
    (True, without("nothing")),  # the head is not among the weights
    (True, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}),
    (True, lambda weights: {name.removeprefix("model."): x for name, x in weights.items()}),  # without its head's class
    (False, with_next_layer(**{"eh_proj.weight": torch.zeros(3)})),  # it predicts the token after the next
    (False, lambda weights: weights | {"vision_tower.layers.0.mlp.up_proj.weight": torch.zeros(3)}),
    (False, lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
])
def test_weights_that_a_language_model_does_not_need_do_no_harm(tiny_model, tmp_path, capsys, tied, change):
    model, ids = tiny_model(64, tie_word_embeddings=tied), torch.tensor([[5, 6, 7]])
    loaded = models.load_model(resaved(tmp_path / "m", model, change), bits=32, device=CPU)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    names = {*load_file(tmp_path / "m/model.safetensors")}
    said = any(part in name for name in names for part in ("layers.2.", "vision_tower"))
    assert ("of its weights are not used" in capsys.readouterr().out) is said


def test_of_a_composite_model_only_the_text_must_be_complete(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=8)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=zoo.SHAPE | zoo.HEAD, vision_config=vision, mm_tokens_per_image=4)).eval()
    ids = torch.tensor([[5, 6, 7]])
    loaded = models.load_model(resaved(tmp_path / "text", model, without("vision_tower")), bits=32, device=CPU)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    folder = resaved(tmp_path / "m", model, without("layers.1.mlp.up_proj"))
    assert "layers.1.mlp.up_proj.weight for one" in refusal(models.load_model, folder, bits=32, device=CPU)


# -- the hash of a base


def test_a_fingerprint_is_the_bases_and_notices_its_change(base, tmp_path, tokenizer):
    plain = models.load_model(base, bits=32, device=CPU)
    wanted = saving.fingerprint(plain)
    adapted = new_adapter(base)
    stir(adapted)
    assert saving.fingerprint(adapted) == wanted == saving.fingerprint(models.load_model(base, bits=32, device=CPU))
    assert saving.fingerprint(models.load_model(base, bits=16, device=CPU)) != wanted, "in another precision"
    with torch.no_grad():
        plain.model.norm.weight[0] += 1e-6
    assert saving.fingerprint(plain) != wanted


def test_full_weights_are_saved_in_shards_and_restored_bit_for_bit(base, tmp_path, tokenizer):
    model = models.load_model(base, bits=32, device=CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    saving.save_model(model, tokenizer, tmp_path / "whole")
    ends = json.loads((tmp_path / "whole/generation_config.json").read_text())
    assert ends["eos_token_id"] == [tokenizer.eos_token_id] and ends["pad_token_id"] == tokenizer.pad_token_id
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        fresh = models.load_model(base, bits=32, device=CPU)
        saving.restore(fresh, tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


@pytest.mark.slow
def test_the_toys_model_is_the_same_for_the_same_seed(tmp_path, toy):
    run_script(tmp_path, "data/toy.py", "--out", "again", "--steps", "3")
    again = models.load_model(str(tmp_path / "again"), bits=32, device=CPU)
    assert saving.fingerprint(again) == saving.fingerprint(
        models.load_model(str(toy / "runs/toy"), bits=32, device=CPU)
    )
