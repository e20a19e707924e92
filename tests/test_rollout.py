"""
Sampling: what is drawn, and the log-probs of it, are those of the distribution that is trained.

    python -m pytest tests/test_rollout.py
"""

import argparse
import copy
import sys
from unittest import mock

from rlt import decode_steps, lora, models, rollout
from rlt.errors import UserError
from rlt.logprobs import completion_logprobs
from rlt.prompts import Prompts

import peft
import pytest
import torch
from test_logprobs import gemma
from transformers import GenerationConfig, OpenAIGPTConfig, OpenAIGPTLMHeadModel

CPU, EOS = torch.device("cpu"), 1
PROMPTS = [[2, 8, 10, 9, 11, 3, 4], [2, 8, 3], [2, 8, 10, 9, 11, 20, 31, 21, 33, 22, 35, 3, 4], [2] + [8, 10] * 30]


@pytest.fixture(scope="module")
def tokenizer(toy):
    return models.load_tokenizer(str(toy / "runs/toy"))


@pytest.fixture(params=["own steps", "generate"])
def sampler(request, monkeypatch):
    """Both of rollout.generate's ways, however few the steps are."""
    monkeypatch.setattr(decode_steps, "FEWEST_STEPS", 1)
    monkeypatch.setattr(rollout, "sample", mock.Mock(wraps=rollout.sample))
    if request.param == "generate":
        monkeypatch.setattr(decode_steps, "suits", lambda *_: False)
    yield
    assert rollout.sample.called == (request.param == "own steps")


def draw(model, tokenizer, prompts=PROMPTS, **changes):
    return rollout.generate(model, tokenizer, prompts,
                            **{"max_new_tokens": 12, "temperature": 1.0, "seed": 5, **changes})


def sampled_logprobs(completions):
    return torch.tensor([p for c in completions for p in c.logprobs])


def own_logprobs(model, prompts, completions, temperature, columns):
    """The definition: a sequence at a time, full logits, float64."""
    found = []
    for prompt, c in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + c.ids])).logits[0, len(prompt) - 1 : -1, :columns].double()
        found.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(c.ids)[:, None])[:, 0])
    return torch.cat(found)


def assert_drawn_from(logits, drawn):
    """Chi-square of the first ids drawn against softmax(logits); and the tail is drawn as often as it should be."""
    n = len(drawn)
    expected = logits.softmax(-1) * n
    counted = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=len(logits)).float()
    seen = expected > 5
    assert ((counted - expected)[seen] ** 2 / expected[seen]).sum() < 2 * seen.sum() + 20
    rare = expected < 0.01 * n
    assert counted[rare].sum() == pytest.approx(expected[rare].sum().item(), rel=0.35)


ARCHITECTURES = {
    "grouped heads": lambda make: make(64),
    "all heads": lambda make: make(64, num_key_value_heads=4),
    "eager": lambda make: make(64, attn_implementation="eager"),
    "sliding window": lambda make: gemma(vocab_size=64, sliding_window=6),
}


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("make", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_sampler_and_the_trainer_agree(make, temperature, tiny_model, tokenizer):
    """The head has nine columns more than the tokenizer has words: they are in neither's sum."""
    model, prompts = make(tiny_model), PROMPTS * 8
    sampled = draw(model, tokenizer, prompts, temperature=temperature)
    trained, _ = completion_logprobs(model, prompts, [c.ids for c in sampled], temperature=temperature or 1.0,
                                     vocab=len(tokenizer))
    own = own_logprobs(model, prompts, sampled, temperature or 1.0, len(tokenizer))
    assert (sampled_logprobs(sampled) - own).abs().max() < 1e-4
    assert (trained - own).abs().max() < 1e-4
    for c in sampled:
        assert len(c.ids) == len(c.logprobs) and (c.finished or len(c.ids) == 12)
        assert c.finished == (c.ids[-1] == EOS) and EOS not in c.ids[:-1] and max(c.ids) < len(tokenizer)
    if temperature == 1.5:
        assert {c.finished for c in sampled} == {True, False}, "or the test is blind to lengths"


def test_a_model_without_a_cache(tokenizer):
    """GPT-1 reads everything anew for each token."""
    torch.manual_seed(0)
    config = OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3)
    model, prompts = OpenAIGPTLMHeadModel(config).eval(), PROMPTS * 2
    sampled = draw(model, tokenizer, prompts)
    own = own_logprobs(model, prompts, sampled, 1.0, len(tokenizer))
    assert (sampled_logprobs(sampled) - own).abs().max() < 1e-4


@pytest.mark.usefixtures("sampler")
@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_sampling_is_the_plain_softmax(tiny_model, tokenizer, temperature):
    """No top-k, no top-p: tokens far down the tail are drawn, as often as they should."""
    model = tiny_model(64)
    drawn = draw(model, tokenizer, [PROMPTS[0]] * 4000, max_new_tokens=1, temperature=temperature, seed=0)
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1, : len(tokenizer)]
    assert_drawn_from(logits / temperature, drawn)


@pytest.mark.usefixtures("sampler")
def test_the_second_token_is_the_plain_softmax_after_the_first(tiny_model, tokenizer):
    """What a penalty for repetition would change."""
    model = tiny_model(64, initializer_range=0.1)
    drawn = draw(model, tokenizer, [PROMPTS[1]] * 6000, max_new_tokens=2, seed=0)
    first = torch.bincount(torch.tensor([c.ids[0] for c in drawn if len(c.ids) == 2])).argmax().item()
    seconds = [c._replace(ids=c.ids[1:]) for c in drawn if c.ids[0] == first and len(c.ids) == 2]
    assert len(seconds) > 150
    logits = model(torch.tensor([PROMPTS[1] + [first]])).logits[0, -1, : len(tokenizer)]
    assert_drawn_from(logits, seconds)


@pytest.mark.usefixtures("sampler")
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_columns_without_a_word_are_never_drawn(tiny_model, tokenizer, temperature):
    """Even where their logits are the largest by far."""
    model = tiny_model(64)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 50
    assert model(torch.tensor([PROMPTS[0]])).logits[0].argmax(-1).min() >= len(tokenizer)
    drawn = draw(model, tokenizer, PROMPTS * 5, temperature=temperature)
    assert max(i for c in drawn for i in c.ids) < len(tokenizer)
    ours, _ = completion_logprobs(model, PROMPTS * 5, [c.ids for c in drawn], vocab=len(tokenizer))
    assert (ours - sampled_logprobs(drawn)).abs().max() < 1e-4
    assert model(torch.tensor([PROMPTS[0]])).logits.isfinite().all(), "and the head is as it was"


SETTINGS = dict(top_k=1, top_p=0.1, repetition_penalty=3.0, do_sample=True, min_new_tokens=9, typical_p=0.2,
                no_repeat_ngram_size=1, suppress_tokens=[5, 6, 7], temperature=0.01, min_p=0.5)


@pytest.mark.usefixtures("sampler")
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_checkpoints_own_sampling_settings_are_not_used(tokenizer, tmp_path, tiny_model, temperature):
    tiny_model(64).save_pretrained(tmp_path)
    GenerationConfig(**SETTINGS).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_model(str(tmp_path), bits=32, device=CPU)
    a, b = (draw(model, tokenizer, temperature=temperature) for model in (loaded, tiny_model(64)))
    assert [c.ids for c in a] == [c.ids for c in b]
    torch.testing.assert_close(sampled_logprobs(a), sampled_logprobs(b))


@pytest.mark.usefixtures("sampler")
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_do_not_depend_on_padding(tiny_model, tokenizer, temperature):
    """Sampled behind padding on the left, recomputed in a packed row, and alone: the same."""
    model = tiny_model(64, initializer_range=0.1)
    sampled = draw(model, tokenizer, temperature=temperature, seed=2)

    def trained(prompts, completions):
        return completion_logprobs(model, prompts, [c.ids for c in completions], temperature=temperature,
                                   vocab=len(tokenizer))[0]

    alone = torch.cat([trained([prompt], [c]) for prompt, c in zip(PROMPTS, sampled, strict=True)])
    assert torch.allclose(trained(PROMPTS, sampled), alone, atol=1e-5)
    assert torch.allclose(sampled_logprobs(sampled), alone, atol=1e-5)


@pytest.mark.usefixtures("sampler")
def test_greedy_rows_do_not_depend_on_their_neighbours(tiny_model, tokenizer):
    model = tiny_model(64)
    together = draw(model, tokenizer, temperature=0)
    for prompt, c in zip(PROMPTS, together, strict=True):
        [alone] = draw(model, tokenizer, [prompt], temperature=0, seed=9)
        assert alone.ids == c.ids and alone.finished == c.finished
        assert torch.allclose(torch.tensor(alone.logprobs), torch.tensor(c.logprobs), atol=1e-5)
        logits = model(torch.tensor([prompt + c.ids])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        assert logits.argmax(-1).tolist() == c.ids


def test_only_one_step_of_the_log_softmax_is_held(tiny_model, tokenizer, monkeypatch):
    numbers, record, rows = [], rollout._LogprobRecorder._record, len(PROMPTS)

    def count(self, ids):
        record(self, ids)
        tensors = [t for kept in vars(self).values() for t in (kept if isinstance(kept, list) else [kept])]
        numbers.append(sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)) - rows * len(numbers))

    monkeypatch.setattr(decode_steps, "suits", lambda *_: False)  # by transformers' generate
    monkeypatch.setattr(rollout._LogprobRecorder, "_record", count)
    draw(tiny_model(64), tokenizer, max_new_tokens=6)
    assert len(numbers) == 6 and set(numbers) == {rows * 64 + rows}, "one (B, V), and a number a step and row"


def test_draws_depend_on_the_seed_alone(tiny_model, tokenizer):
    first = draw(tiny_model(64), tokenizer, seed=3)
    torch.rand(17)
    assert draw(tiny_model(64), tokenizer, seed=3) == first != draw(tiny_model(64), tokenizer, seed=4)


def test_pad_and_eos_may_be_the_same(tiny_model, tokenizer):
    """Masks come from lengths: rows are the same when the padding is the end of the turn."""
    twin = copy.deepcopy(tokenizer)
    twin.pad_token = twin.eos_token
    a, b = (draw(tiny_model(64), t, PROMPTS * 9) for t in (tokenizer, twin))
    assert [(c.ids, c.finished) for c in a] == [(c.ids, c.finished) for c in b]
    assert torch.allclose(sampled_logprobs(a), sampled_logprobs(b), atol=1e-5)
    assert any(c.finished and len(c.ids) < 12 for c in a)


def test_each_of_several_ends_ends_a_row(tiny_model, tokenizer):
    """Also one that the model's generation_config alone names; and no other token does."""
    twin = copy.deepcopy(tokenizer)
    twin.generation_eos = (20, 33)
    drawn = draw(tiny_model(64), twin, PROMPTS * 30)
    assert {c.ids[-1] for c in drawn if c.finished} == {EOS, 20, 33}
    for c in drawn:
        assert not {EOS, 20, 33} & {*c.ids[:-1]} and c.finished == (c.ids[-1] in (EOS, 20, 33))
    longer = draw(tiny_model(64), tokenizer, PROMPTS * 30)
    assert max(len(c.ids) for c in longer) == 12 and {20, 33} & {i for c in longer for i in c.ids[:-1]}


def test_a_student_whose_padding_is_its_end_learns_to_end(tiny_model, tokenizer):
    twin = copy.deepcopy(tokenizer)
    twin.pad_token = twin.eos_token
    rows = [{"question": "x 3 y 7 s1 swap", "solution": "7 3", "explanation": text} for text in ("s1 swap 7 3", "so")]
    made = [[Prompts(t).sft_row(row, "student") for row in rows] for t in (tokenizer, twin)]
    assert made[0] == made[1] and all(ids.count(twin.eos_token_id) == 1 for ids, _ in made[1])
    model = tiny_model(64).train()
    before, supervised = zip(*((ids[:start], ids[start:]) for ids, start in made[1]), strict=True)
    logprobs, _ = completion_logprobs(model, before, supervised, vocab=len(twin))
    (-logprobs.sum()).backward()
    head = model.get_output_embeddings().weight.grad[twin.eos_token_id]
    assert len(logprobs) == sum(map(len, supervised)) and head.abs().max() > 0


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_adapters_sample_in_the_middle_of_training_too(toy, tokenizer, bits):
    """Checkpointed and in train mode, where a model has no cache; afterwards all is as it was."""
    model = models.load_lora(str(toy / "runs/toy"), bits=bits, device=CPU, rank=4, alpha=8, seed=0,
                             checkpointing=True).train()
    plain = draw(model, tokenizer, temperature=0)
    with torch.no_grad():
        for p in lora.adapter_parameters(model):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    trained = draw(model, tokenizer, temperature=0)
    assert [c.ids for c in trained] != [c.ids for c in plain] and model.training
    ours, _ = completion_logprobs(model, PROMPTS, [c.ids for c in trained], vocab=len(tokenizer))
    assert (ours - sampled_logprobs(trained)).abs().mean() < (0.1 if bits == 16 else 1e-4)
    again = draw(model, tokenizer, temperature=0)  # now with attention that can be packed, which must not matter
    assert [c.ids for c in again] == [c.ids for c in trained]
    ours.sum().backward()
    assert all(p.grad is not None for p in lora.adapter_parameters(model))
    assert model.training and all(p.requires_grad for p in lora.adapter_parameters(model))


# ----------------------------------------------------------------------------------------------------------
# The engine


def test_an_engine_is_generate_a_batch_at_a_time(tiny_model, tokenizer):
    """Batches are keyed by the position of their first prompt: up to one batch, the draws are those of generate."""
    model, options = tiny_model(64), dict(max_new_tokens=12, temperature=1.0)
    engine = rollout.make_engine("transformers", model, tokenizer, base="unused", bits=32, device=CPU, max_tokens=99,
                                 batch=4)
    assert engine.load_adapter(model) is None
    got = engine.generate(PROMPTS, key=(0, 3, 1), **options)
    assert got == draw(model, tokenizer, seed=rollout.seed_for(0, 3, 1, 0))
    assert engine.generate(PROMPTS, key=(0, 3, 1), first=8, **options) == draw(
        model, tokenizer, seed=rollout.seed_for(0, 3, 1, 8))
    assert engine.generate([], key=(0,), **options) == []


def test_more_prompts_than_a_batch_are_sampled_by_length_and_come_back_in_order(tiny_model, tokenizer, monkeypatch):
    model, prompts, seen, sample = tiny_model(64), (PROMPTS * 3)[:11], [], rollout.generate

    def watch(model, tokenizer, prompts, **options):
        seen.append(([len(p) for p in prompts], options["seed"]))
        return sample(model, tokenizer, prompts, **options)

    monkeypatch.setattr(rollout, "generate", watch)
    engine = rollout.TransformersEngine(model, tokenizer, 4)
    drawn = engine.generate(prompts, max_new_tokens=12, temperature=1.0, key=(7,))
    lengths = sorted(map(len, prompts))
    assert [batch for batch, _ in seen] == [lengths[:4], lengths[4:8], lengths[8:]]
    assert [seed for _, seed in seen] == [rollout.seed_for(7, at) for at in (0, 4, 8)]
    own = own_logprobs(model, prompts, drawn, 1.0, len(tokenizer))
    assert (own - sampled_logprobs(drawn)).abs().max() < 1e-4, "each completion follows its own prompt"
    again = engine.generate(prompts, max_new_tokens=12, temperature=1.0, key=(7,))
    assert again == drawn != engine.generate(prompts, max_new_tokens=12, temperature=1.0, key=(8,))


def test_an_end_of_turn_in_the_models_own_config_does_not_stop_the_check_of_batches(tiny_model):
    """As many logits are compared as were asked for, whatever token is drawn."""
    model = tiny_model(64)
    model.generation_config.eos_token_id = list(range(64))
    assert rollout.can_batch(model.train(), 0) and model.training


def test_an_error_leaves_the_model_in_its_mode(tiny_model, tokenizer):
    model = tiny_model(64).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    hook = model.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(model, tokenizer)
    hook.remove()
    draw(model, tokenizer)
    assert [module.training for module in model.modules()] == modes


def test_vllm_is_asked_for_by_name(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with pytest.raises(UserError, match="vLLM can't be imported .*pip install"):
        rollout.make_engine("vllm", tiny_model(64), tokenizer, base="base", bits=32, device=CPU, max_tokens=99, batch=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the tests above run the same on a CPU")
@pytest.mark.parametrize("dtype, difference", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_on_a_gpu_sampler_and_trainer_agree(tiny_model, tokenizer, dtype, difference):
    model = tiny_model(64, hidden_size=128, initializer_range=0.1).to("cuda", dtype)
    sampled = draw(model, tokenizer, PROMPTS * 16, max_new_tokens=40)
    ours, _ = completion_logprobs(model, PROMPTS * 16, [c.ids for c in sampled], vocab=len(tokenizer))
    assert (ours.cpu() - sampled_logprobs(sampled)).abs().mean() < difference
    assert sampled == draw(model, tokenizer, PROMPTS * 16, max_new_tokens=40)


# -- what vLLM is told of adapters


@pytest.fixture
def engine(monkeypatch):
    """What stands in for vLLM's engine, and keeps what it was given."""
    made = mock.Mock()
    monkeypatch.setattr("rlt.vllm_engine.VLLMEngine", made)
    return made


def adapter(base, folder, config):
    peft.get_peft_model(models.load_model(str(base), bits=32, device=CPU), config).save_pretrained(folder)
    return str(folder)


def test_the_highest_rank_of_all_layers_is_what_vllm_makes_room_for(toy, tokenizer, tmp_path, engine):
    base, lora_of = toy / "runs/toy", dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wide = adapter(base, tmp_path / "wide", peft.LoraConfig(**lora_of, rank_pattern={"q_proj": 32}))
    plain = adapter(base, tmp_path / "plain", peft.LoraConfig(**lora_of))
    args = argparse.Namespace(engine="vllm", bits=32, max_new_tokens=8, batch_size=4)
    for names, rank in (((plain,), 4), ((wide, plain), 32), ((plain, str(base)), 4), ((str(base),), None)):
        engines = [*rollout.make_engines(args, 16, dict.fromkeys(names, tokenizer), CPU)]
        assert [name for name, _ in engines] == [*names] and engine.call_args.kwargs["lora_rank"] == rank
        loaded = [call.args[0] for call in engine.return_value.load_adapter_folder.call_args_list[-len(names) :]]
        assert loaded == [None if name == str(base) else name for name in names]
    policy = models.load_lora(wide, bits=32, device=CPU, seed=0)
    rollout.make_engine("vllm", policy, tokenizer, base=base, bits=32, device=CPU, max_tokens=24, batch=4)
    assert engine.call_args.kwargs["lora_rank"] == 32


def test_adapters_that_vllm_would_pass_over_are_refused(toy, tokenizer, tmp_path, engine):
    """It would sample their base."""
    args = argparse.Namespace(engine="vllm", bits=32, max_new_tokens=8, batch_size=4)
    other_kind = "vLLM applies no adapter of type IA3, expected LORA: pass --engine transformers"
    never = "adapters that change the prompt, wait for a token"  # transformers would not apply it either
    for config, message in (
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"), other_kind),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), never),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM"), never),
    ):
        name = adapter(toy / "runs/toy", tmp_path / type(config).__name__, config)
        with pytest.raises(UserError, match=message):
            next(rollout.make_engines(args, 16, {name: tokenizer}, CPU))
    model = models.load_model(str(tmp_path / "IA3Config"), bits=32, device=CPU)
    with pytest.raises(UserError, match=other_kind):
        rollout.make_engine("vllm", model, tokenizer, base="toy", bits=32, device=CPU, max_tokens=24, batch=4)
    assert not engine.called
