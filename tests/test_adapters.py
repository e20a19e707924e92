"""Adapters as people make them with peft: the reference is the starting policy, all parts are trained, or refused."""

import copy
import json
import shutil

from rlt import lora, merge, models, saving
from rlt.errors import UserError
from rlt.logprobs import completion_logprobs

import peft
import pytest
import torch
from conftest import call, ended, mostly_slow
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bench import zoo

CPU = torch.device("cpu")
PROMPTS, COMPLETIONS = [[5, 6, 7, 8], [5, 9]], [[3, 9, 11, 12], [5, 5, 13]]
PLAIN = dict(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def base(request, tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), True)


def make_base(folder, tied, name="Qwen2"):
    model = zoo.build(name, tie_word_embeddings=tied)
    model.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def theirs(base, folder, **changes):
    """A trained adapter as peft alone writes it -> log-probs by the model's own logits, number of tensors trained."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**PLAIN | changes))
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trained:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        model.save_pretrained(folder)
        return zoo.own_logprobs(model.eval(), PROMPTS, COMPLETIONS), len(trained)


def ours(folder, **options):
    return models.load_lora(str(folder), **dict(bits=32, device=CPU, seed=0, reference=True) | options)


def ask(model):
    return completion_logprobs(model, PROMPTS, COMPLETIONS, vocab=zoo.VOCAB - 3)[0]


def refusal(*args, **options):
    with pytest.raises(UserError) as error:
        ours(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


KINDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "ranks by layer": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 16}},
    "regular expression": {"target_modules": r".*\.(q_proj|down_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "norms whole": {"modules_to_save": ["input_layernorm", "norm"]},
    "embeddings whole": {"modules_to_save": ["embed_tokens"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "biases of its own": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "trainable tokens": {"trainable_token_indices": [3, 5, 9]},
}
# A head of its own is another case where embeddings are trained, which a tied head shares.
OWN_HEAD = ("plain", "embeddings whole", "embeddings", "trainable tokens")
IN_EVERY_RUN = ("plain", "DoRA", "norms whole", "embeddings whole", "PiSSA", "parameters", "trainable tokens")
HEADS_AND_KINDS = [
    pytest.param(tied, kind, id=f"{'tied' if tied else 'own'} head-{kind}",
                 marks=[] if tied and kind in IN_EVERY_RUN else pytest.mark.slow)
    for tied, kinds in ((True, KINDS), (False, OWN_HEAD)) for kind in kinds]


@pytest.mark.parametrize(("base", "kind"), HEADS_AND_KINDS, indirect=["base"])
def test_the_reference_is_the_start_and_all_parts_are_trained_and_saved(base, tmp_path, kind):
    own, tensors = theirs(base, tmp_path / "theirs", **KINDS[kind])
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    if kind == "trainable tokens" and tied:  # they are part of the head, too
        assert "expected a plain torch.nn.Linear" in refusal(tmp_path / "theirs")
        return
    policy = ours(tmp_path / "theirs")
    start = ask(policy)
    zoo.close(start.detach(), own, 1e-5)
    with lora.use_adapter(policy, "reference"):
        assert torch.equal(ask(policy), start), "kl_ref is 0, not nearly 0"
    assert torch.equal(ask(policy), start), "and asking it has changed nothing"

    start.sum().backward()
    parameters = lora.adapter_parameters(policy)
    assert len(parameters) == tensors and all(p.grad.norm() > 0 for p in parameters)
    assert sum(p.requires_grad for p in policy.parameters()) == tensors
    assert {p.dtype for p in parameters} == {torch.float32}
    torch.optim.AdamW(parameters, lr=0.1).step()
    moved = ask(policy).detach()
    assert (moved - start).abs().max() > 1e-3
    with lora.use_adapter(policy, "reference"):
        assert torch.equal(ask(policy), start), "the reference stays"

    tokenizer = models.load_tokenizer(str(tmp_path / "theirs"))
    saving.save_model(policy, tokenizer, tmp_path / "ours", list(policy.peft_config))
    again = ours(tmp_path / "theirs", seed=9)
    saving.restore(again, tmp_path / "ours")
    assert torch.equal(ask(again), moved)
    with lora.use_adapter(again, "reference"):
        assert torch.equal(ask(again), start)
    assert torch.equal(ask(models.load_model(str(tmp_path / "ours"), bits=32, device=CPU, scores=True)), moved)
    assert torch.equal(ask(ours(tmp_path / "ours")), moved), "and it can be trained on"


@pytest.mark.parametrize("base", mostly_slow([True, False], plain=[True]), ids=["tied head", "own head"], indirect=True)
@pytest.mark.parametrize("changes, message", [
    ({"bias": "all"}, "trains biases of its base (bias='all')"),
    ({"bias": "lora_only"}, "trains biases of its base (bias='lora_only')"),
    ({"target_modules": ["q_proj", "lm_head"]}, "the head of Qwen2ForCausalLM is a peft"),
    ({"modules_to_save": ["lm_head"]}, "the head of Qwen2ForCausalLM is a peft"),
    ({"alora_invocation_tokens": [5, 6]}, "(prompt-learning, aLoRA, X-LoRA, Poly) are not supported"),
])
def test_what_can_not_be_trained_is_refused(base, tmp_path, changes, message):
    theirs(base, tmp_path, **changes)
    assert message in refusal(tmp_path)


def test_an_adapter_that_lacks_a_weight_is_refused(plain_base, tmp_path):
    """peft would go on with a random one, and only warn."""
    theirs(plain_base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)
    for load in (ours, lambda folder: models.load_model(str(folder), bits=32, device=CPU)):
        with pytest.raises(UserError, match="does not fit its base .*: Found missing adapter keys"):
            load(tmp_path)


@pytest.mark.parametrize("config, kind", [
    (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), "IA3"),
    (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
    (peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "VERA"),
])
def test_adapters_of_another_kind_are_refused(plain_base, tmp_path, config, kind):
    get_peft_model(AutoModelForCausalLM.from_pretrained(plain_base), config).save_pretrained(tmp_path)
    assert f"holds an adapter of type {kind}, expected LORA" in refusal(tmp_path)
    assert "adapter" not in models.model_and_adapter_config(str(tmp_path))


@pytest.mark.parametrize("config", [
    peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    LoraConfig(**PLAIN, alora_invocation_tokens=[5, 6]),
    peft.PolyConfig(target_modules=["q_proj"], n_tasks=2, task_type="CAUSAL_LM"),
], ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("scores", [False, True])
def test_adapters_that_only_pefts_own_forward_applies_are_not_sampled_from_as_their_base(
        plain_base, tmp_path, config, scores):
    get_peft_model(AutoModelForCausalLM.from_pretrained(plain_base), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't be used: adapters that change the prompt, wait for a token"):
        models.load_model(str(tmp_path), bits=32, device=CPU, scores=scores)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("kind", ["DoRA", "embeddings", "biases of its own"])
def test_adapters_on_coarser_bases_are_float32_and_start_as_their_reference(plain_base, tmp_path, kind, bits):
    _, tensors = theirs(plain_base, tmp_path, **KINDS[kind])
    policy = ours(tmp_path, bits=bits)
    start = ask(policy)
    with lora.use_adapter(policy, "reference"):
        assert torch.equal(ask(policy), start)
    start.sum().backward()
    parameters = lora.adapter_parameters(policy)
    assert len(parameters) == tensors and all(p.dtype == torch.float32 and p.grad.norm() > 0 for p in parameters)


@pytest.mark.parametrize(("base", "kind"), HEADS_AND_KINDS, indirect=["base"])
def test_the_base_comes_out_of_every_adapter(base, tmp_path, kind):
    """Where its weights may be shared; else they have been changed."""
    theirs(base, tmp_path, **KINDS[kind])
    if kind == "trainable tokens" and json.loads((base / "config.json").read_text())["tie_word_embeddings"]:
        return  # refused, see above
    policy, alone = ours(tmp_path), models.load_model(str(base), bits=32, device=CPU)
    trained = [p.requires_grad for p in policy.parameters()]
    student = lora.without_adapter(policy)
    assert [p.requires_grad for p in policy.parameters()] == trained
    shared = models.shares_base(str(tmp_path), 32, str(base), 32)
    assert shared == (kind not in ("PiSSA", "OLoRA"))
    assert not shared or torch.equal(ask(student), ask(alone))
    assert not shared or saving.fingerprint(student) == saving.fingerprint(alone)
    assert not torch.equal(ask(student), ask(policy)), "the test must be able to tell"


def adapted_layer(**changes):
    """A linear layer in bfloat16 with an adapter in float32, inputs, and gradients of the outputs."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["0"], **changes))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape) / 8
    return model, torch.randn(40, 64).bfloat16(), torch.randn(40, 48).bfloat16()


def outputs_and_gradients(model, x, grads):
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grads.to(out.dtype))
    return [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("changes", [{}, {"lora_bias": True}])
def test_adapters_multiply_as_under_autocast_and_learn_as_in_float32(changes):
    """Bit for bit torch.autocast; against float64 an error like bfloat16's, of 2^-9."""
    model, *data = adapted_layer(**changes)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = outputs_and_gradients(copy.deepcopy(model), *data)
    double = outputs_and_gradients(copy.deepcopy(model).double(), *(x.double() for x in data))
    lora.compute_in_input_type(model)
    ours = outputs_and_gradients(model, *data)
    assert len(ours) == 4 + len(changes)
    for mine, theirs, exact in zip(ours, autocast, double, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        assert 0 < (mine - exact).norm() < 4 * 2**-9 * exact.norm()
    assert {x.dtype for x in ours[2:]} == {torch.float32}, "of the weights"


def test_nothing_of_an_adapter_is_kept_in_float32(plain_base, tmp_path):
    """In the backward pass of a bfloat16 base: the inputs' copies were most of what an update kept."""
    theirs(plain_base, tmp_path)
    policy, kept = ours(tmp_path, bits=16), []
    weights = {p.data_ptr() for p in policy.parameters()}
    layer = policy.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(1, 9, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    kept = [tensor for tensor in kept if tensor.data_ptr() not in weights]
    assert kept and {tensor.dtype for tensor in kept} == {torch.bfloat16}


def test_whole_layers_in_bfloat16_are_refused(plain_base, tmp_path):
    """A step of lr 1e-6 would be rounded away."""
    theirs(plain_base, tmp_path, modules_to_save=["norm"])
    assert "trains whole layers (modules_to_save), which at 16 bits are bfloat16" in refusal(tmp_path, bits=16)


def test_an_adapter_that_could_not_be_read_back_is_refused_before_the_run(plain_base, tmp_path, monkeypatch):
    """As of a mixture of experts whose shared ones transformers renames (Laguna)."""
    from peft.utils import transformers_weight_conversion

    before = ours(plain_base, rank=2, reference=False)
    weights = [p.clone() for p in lora.adapter_parameters(before)]
    lora.check_can_be_read_back(before, "base")
    assert all(torch.equal(a, b) for a, b in zip(lora.adapter_parameters(before), weights, strict=True))

    def renamed(adapter_state_dict, **_):
        return {key.replace("up_proj", "upper"): value for key, value in adapter_state_dict.items()}

    monkeypatch.setattr(transformers_weight_conversion, "convert_peft_adapter_state_dict_for_transformers", renamed)
    message = refusal(plain_base, rank=2)
    assert "could be saved and not be read back: transformers renames" in message and "up_proj.lora_A" in message
    ours(plain_base, rank=2, targets="q_proj,down_proj")


# -- merged

IN_LAYERS = ("plain", "DoRA", "norms whole", "parameters")
OF_HEADS = {"head": {"target_modules": ["q_proj", "lm_head"]}, "head whole": {"modules_to_save": ["lm_head"]},
            "embeddings and head": {"target_modules": ["embed_tokens", "lm_head"]},
            "tied adapters": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}}


@pytest.mark.parametrize("base", [True, False], ids=["tied head", "own head"], indirect=True)
@pytest.mark.parametrize("kind", [*IN_LAYERS, "embeddings whole", "embeddings", "trainable tokens", *OF_HEADS])
def test_a_merged_model_is_the_base_with_its_adapter(base, tmp_path, kind):
    """Read again by plain transformers: a tied head must not get what an adapter adds to the embeddings alone."""
    own, _ = theirs(base, tmp_path / "theirs", **(KINDS | OF_HEADS)[kind])
    merge.merge(str(tmp_path / "theirs"), tmp_path / "merged", bits=32)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    zoo.close(zoo.own_logprobs(merged, PROMPTS, COMPLETIONS), own, 1e-4)
    tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    assert merged.config.tie_word_embeddings is (tied and kind in IN_LAYERS)


@pytest.mark.parametrize("config, message", [
    (LoraConfig(**PLAIN, lora_bias=True), "can't be merged, use it as it is, with its base: Impossible to merge"),
    (LoraConfig(**PLAIN, alora_invocation_tokens=[5, 6]), "can't be used: adapters that change the prompt"),
    (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "can't be used: adapters that change"),
    (peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
     "holds an adapter of type ADAPTION_PROMPT, which can't be merged"),
])
def test_what_can_not_be_merged_is_refused(tmp_path, config, message):
    base = make_base(tmp_path / "base", False, "Llama")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError) as error:
        merge.merge(str(tmp_path / "theirs"), tmp_path / "merged", bits=32)
    assert message in str(error.value) and not (tmp_path / "merged").exists()


def test_a_merge_that_computes_something_else_is_refused(plain_base, tmp_path, monkeypatch):
    """As an unknown kind of adapter would."""
    theirs(plain_base, tmp_path / "theirs")
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", peft.LoraModel.unload)
    with pytest.raises(UserError, match="with the adapter in its weights computes something else"):
        merge.merge(str(tmp_path / "theirs"), tmp_path / "merged", bits=32)


# -- flags


def test_rank_scale_and_layers_come_from_the_adapter(plain_base, tmp_path):
    theirs(plain_base, tmp_path, target_modules="all-linear")
    for options in ({}, {"rank": 4, "alpha": 8.0}, {"targets": "all-linear"},
                    {"targets": "q_proj, k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"}):
        assert ours(tmp_path, **options).peft_config["default"].r == 4
    for options, message in (({"rank": 8}, "rank 4: leave --lora-rank out"),
                             ({"alpha": 9}, "alpha 8: leave --lora-alpha out"),
                             ({"targets": "q_proj"}, "up_proj,v_proj: leave --lora-targets out")):
        assert message in refusal(tmp_path, **options)


def test_layers_that_no_base_has_are_refused_with_those_it_has(plain_base):
    message = refusal(plain_base, targets="q_proj,wq")
    assert message.startswith("--lora-targets q_proj,wq: expected all-linear, or some of down_proj, gate_proj, k_proj")


# -- which layers of other architectures


@pytest.mark.parametrize("name, out", [
    ("Mamba-2", ["out_proj"]),  # its kernel reads the weight and would pass over an adapter
    ("Falcon-H1", ["out_proj"]),
    ("Jamba", ["out_proj", "dt_proj"]),
    ("Phi-3.5-MoE", ["router"]),  # a class of its own, which returns a tuple
    ("Llama 4 text", ["router"]),
    ("Falcon", []),  # a class of its own, which does what a linear layer does
    ("Qwen3-Next", []),
])
def test_new_adapters_leave_out_layers_that_they_do_not_fit(name, out):
    model = zoo.build(name).requires_grad_(False)
    adapted = get_peft_model(model, lora.new_lora_config(model, rank=2))
    paths = [path.partition(".lora_A")[0] for path, _ in adapted.named_parameters() if "lora_A" in path]
    assert paths and not {path.rpartition(".")[2] for path in paths} & {*out, "lm_head"}
    for left_out in out:
        assert left_out in lora.excluded_layers(zoo.build(name))
    if not out:
        assert lora.excluded_layers(zoo.build(name)) is None


def test_a_composite_model_is_trained_in_its_text_part():
    """Adapters on a vision tower would never see a gradient."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=8)
    config = Gemma3Config(text_config=zoo.SHAPE | zoo.HEAD, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    adapted = get_peft_model(model.requires_grad_(False), lora.new_lora_config(model, rank=2))
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 7 and all(".language_model." in name for name in names)
    assert any("vision_tower" in name and "q_proj" in name for name, _ in model.named_parameters())


# -- dropout and other random numbers


def test_no_random_number_is_left_in_an_update(plain_base, tmp_path, capsys):
    theirs(plain_base, tmp_path, lora_dropout=0.5)
    config = json.loads((plain_base / "config.json").read_text())
    shutil.copytree(plain_base, tmp_path / "base")
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    adapter["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for checkpointing in (False, True):
        policy = ours(tmp_path, checkpointing=checkpointing)
        assert capsys.readouterr().out.count("dropout is off") == 1
        wanted = ask(policy)
        lora.update_mode(policy)
        drawn = torch.get_rng_state()
        assert torch.equal(ask(policy), wanted) and torch.equal(torch.get_rng_state(), drawn)
        assert any(m.training for m in policy.modules()) is checkpointing


class Noisy(torch.nn.Module):
    """A layer with a noise that has no name to know it by, in the layer itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.gradient_checkpointing = layer, False

    def forward(self, states, **options):
        states = self.layer(states, **options)
        return states + torch.randn_like(states) * self.training


def test_noise_that_is_not_known_is_refused_where_it_would_be_trained(plain_base, monkeypatch):
    load = models._load_base

    def noisy(*args):
        model = load(*args)
        model.model.layers[0] = Noisy(model.model.layers[0])
        model.gradient_checkpointing_enable = lambda _: setattr(model.model.layers[0], "gradient_checkpointing", True)
        return model

    monkeypatch.setattr(models, "_load_base", noisy)
    message = refusal(plain_base, checkpointing=True)
    assert "computes something else when it trains with --gradient-checkpointing" in message
    policy = ours(plain_base, rank=2)  # without, no layer is in train mode
    lora.update_mode(policy)
    assert torch.equal(ask(policy), ask(policy))


def test_a_model_without_gradient_checkpointing_says_so(tmp_path):
    make_base(tmp_path, False, "JetMoe")
    assert "can't be trained with --gradient-checkpointing: JetMoe" in refusal(tmp_path, checkpointing=True)


# -- through the scripts


def test_other_peoples_adapters_end_a_script_in_one_line_and_block_nothing(toy, tmp_path):
    base = get_peft_model(AutoModelForCausalLM.from_pretrained(toy / "runs/toy"),
                          LoraConfig(**PLAIN | {"target_modules": ["q_proj", "lm_head"]}))
    base.save_pretrained(tmp_path / "theirs")
    flags = ("--model", tmp_path / "theirs", "--student", "toy", "--steps", 1, "--out", tmp_path / "run")
    result = ended(toy, "train_rlt.py", *flags)
    assert result.code == 2 and result.stderr.count("\n") == 1 and "expected a plain torch.nn.Linear" in result.stderr
    assert not (tmp_path / "run").exists()


def test_other_peoples_adapters_are_trained_from_kl_ref_zero(toy, tmp_path):
    """From a folder that peft wrote, whose base is named by a relative path, with whole norms, rank 3, scale 5."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(toy / "runs/toy"),
                           LoraConfig(**PLAIN | {"r": 3, "lora_alpha": 5, "modules_to_save": ["norm"]}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape) * p.requires_grad)
    model.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "runs/toy"}))
    call(toy, "train_rlt.py", "--model", tmp_path / "theirs", "--steps", 2, "--limit", 20, "--eval-every", 0,
         "--prompts-per-step", 2, "--group-size", 2, "--max-new-tokens", 8, "--out", tmp_path / "run")
    first, second = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert first["kl_ref"] == 0 < second["kl_ref"]
    saved = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["modules_to_save"]) == (3, 5, ["norm"])
