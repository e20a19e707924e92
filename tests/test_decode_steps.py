"""
Decode steps: a cache whose addresses stay gives the logits that the model gives, on a GPU in a CUDA graph.

    python -m pytest tests/test_decode_steps.py
"""

import re
import weakref
from unittest import mock

from rlt import decode_steps, lora, models, rollout
from rlt.errors import UserError

import pytest
import torch
from conftest import ROOT
from test_rollout import ARCHITECTURES, EOS, PROMPTS, draw, own_logprobs, sampled_logprobs
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PLAIN = {name: make for name, make in ARCHITECTURES.items() if name != "sliding window"}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a CUDA GPU")


@pytest.fixture(scope="module")
def tokenizer(toy):
    return models.load_tokenizer(str(toy / "runs/toy"))


def steps_of(model, tokenizer, prompts, steps):
    ids, mask = rollout._left_padded(prompts, tokenizer.pad_token_id)
    device = next(model.parameters()).device
    with torch.no_grad():
        cache = rollout._read_prompts_once(model, prompts, tokenizer.pad_token_id, even_if_different=True)
    return ids.to(device), decode_steps.DecodeSteps(model, cache, mask.to(device), steps=steps, capture=False)


@pytest.mark.parametrize("block", [1, 5, 256])
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_logits_are_those_of_the_whole_sequence(make, block, tiny_model, tokenizer, monkeypatch):
    """Behind padding, over the edges of several blocks, one more than the cache was made for at first."""
    monkeypatch.setattr(decode_steps, "BLOCK", block)
    monkeypatch.setattr(decode_steps, "ALIGNED", 1)
    model = make(tiny_model)
    follow = torch.randint(2, 40, (len(PROMPTS), 17), generator=torch.Generator().manual_seed(3))
    ids, decode = steps_of(model, tokenizer, PROMPTS, 17)
    with torch.no_grad():
        found = [decode(ids[:, -1:]).clone()] + [decode(follow[:, i : i + 1]).clone() for i in range(16)]
        for row, prompt in enumerate(PROMPTS):
            own = model(torch.tensor([prompt + follow[row].tolist()])).logits[0, len(prompt) - 1 : -1]
            assert torch.allclose(torch.stack(found)[:, row], own, atol=1e-4)


@pytest.mark.parametrize("heads, shared", [(4, 4), (6, 2), (3, 1)])
def test_heads_that_share_keys_attend_without_copies_of_them(heads, shared, monkeypatch):
    """As transformers' attention, which repeats the keys, with rows that see 1, 5 and all of 7 columns."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, n, t, size, generator=generator)
                         for n, t, size in ((heads, 1, 8), (shared, 7, 8), (shared, 7, 5)))
    bias = torch.full((3, 1, 1, 7), torch.finfo(torch.float32).min)
    for row, seen in enumerate((1, 5, 7)):
        bias[row, ..., :seen] = 0
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared
    want, _ = sdpa_attention_forward(module, query, key, value, bias, scaling=0.3)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", None)
    got, _ = decode_steps._attend(module, query, key, value, bias, scaling=0.3)
    assert torch.allclose(got, want, atol=1e-6) and got.shape == (3, 1, heads, 5)


def test_attention_with_more_to_it_is_that_of_transformers(monkeypatch):
    seen = []
    monkeypatch.setattr(decode_steps, "sdpa_attention_forward", lambda *_, **options: seen.append(options))
    tensors = torch.zeros(3, 1, 2, 1, 4)
    decode_steps._attend(None, *tensors, None, scaling=0.3, position_bias=1)
    decode_steps._attend(None, *torch.zeros(3, 1, 2, 2, 4), None, scaling=0.3)
    assert seen == [{"scaling": 0.3, "position_bias": 1}, {"scaling": 0.3}]


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_what_is_drawn_is_what_generate_draws(temperature, tiny_model, tokenizer, monkeypatch):
    """The same prompts, ends and draws: the same ids and log-probs, also where rows that have ended are dropped, and it
    stops when the last one has. A draw is made of a step's noise, one number for each id (Gumbel's trick); the end
    becomes more likely from step to step."""
    model, rows = tiny_model(64, initializer_range=0.3), []  # rows: of each step
    prompts = [[2, *(8 + (i * n) % 50 for n in range(1, 4 + i % 5))] for i in range(32)]
    noise = torch.rand(41, 64, generator=torch.Generator().manual_seed(1)).log().neg().log().neg()
    log_softmax = rollout._LogprobRecorder.log_softmax

    def soon_ended(self, logits):
        rows.append(len(logits))
        logits = logits.clone()
        logits[:, EOS] += 0.1 * len(rows)
        return log_softmax(self, logits)

    def drawn_from(logprobs):
        return (logprobs + noise[len(rows)]).argmax(-1, keepdim=True)

    monkeypatch.setattr(rollout._LogprobRecorder, "log_softmax", soon_ended)
    monkeypatch.setattr(torch, "multinomial", lambda shares, num_samples: drawn_from(shares.log()))
    monkeypatch.setattr(rollout, "draw", drawn_from)
    with mock.patch.object(decode_steps, "suits", lambda *_: False):
        theirs = draw(model, tokenizer, prompts, temperature=temperature, max_new_tokens=40)
    rows.clear()
    ours = draw(model, tokenizer, prompts, temperature=temperature, max_new_tokens=40)
    assert [c.ids for c in ours] == [c.ids for c in theirs]
    assert torch.allclose(sampled_logprobs(ours), sampled_logprobs(theirs), atol=1e-5)
    lengths = [len(c.ids) for c in ours]
    assert len(rows) == max(lengths) and len({*lengths}) > 8
    assert rows[0] == 32 and len({*rows}) > 2, "or none are dropped"
    for step, (before, after) in enumerate(zip(rows, rows[1:], strict=False), 1):
        left = sum(length > step for length in lengths)
        assert after == (left if 2 * left <= before else before)


@pytest.mark.parametrize("number, drawn", [(0, 0), (0.4999, 0), (0.5, 2), (0.7499, 2), (0.75, 3), (1 - 2**-53, 3)])
def test_a_number_draws_the_id_in_whose_share_it_falls(number, drawn, monkeypatch):
    """Of shares 1/2, 0, 1/4, 1/4, 0: by hand."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, number, **options))
    shares = torch.tensor([[0.5, 0, 0.25, 0.25, 0]])
    assert rollout.draw(shares.log()).tolist() == [[drawn]]


def test_rare_ids_keep_their_share(monkeypatch):
    """Of 50,000 ids the last has one in 1e8, less than a float32 near 1 can tell."""
    shares = torch.full((50_000,), (1 - 1e-8) / 49_999, dtype=torch.float64)
    shares[-1] = 1e-8
    for number, is_last in ((1 - 1.1e-8, False), (1 - 0.9e-8, True)):
        monkeypatch.setattr(torch, "rand", lambda *shape, u=number, **options: torch.full(shape, u, **options))
        assert (rollout.draw(shares.log()[None].float()).item() == 49_999) is is_last


def test_rows_that_are_not_finite_are_named(tiny_model, tokenizer):
    """And not drawn from in silence."""
    model = tiny_model(64)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    decode_steps._SUITS[model] = True
    with pytest.raises(UserError, match="NaN or infinite"):
        draw(model, tokenizer)


def test_the_prompts_cache_is_freed_once_it_is_copied(tiny_model, tokenizer):
    """Of 24 prompts of 1,024 tokens of a 7B model it takes 1.4 GB."""
    model = tiny_model(64)
    with torch.no_grad():
        cache = rollout._read_prompts_once(model, PROMPTS, 0, even_if_different=True)
        keys = [weakref.ref(layer.keys) for layer in cache.layers]
        ids, mask = rollout._left_padded(PROMPTS, 0)
        decode = decode_steps.DecodeSteps(model, cache, mask, steps=4, capture=False)
        decode(ids[:, -1:])
    assert not any(reference() is not None for reference in keys)


def test_a_models_attention_is_replaced_during_a_step_alone(tiny_model, tokenizer):
    """And only where it is torch's."""
    model, seen = tiny_model(64), []
    ids, decode = steps_of(model, tokenizer, PROMPTS, 4)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(model.config._attn_implementation))
    for usual in ("sdpa", "eager"):
        model.config._attn_implementation = usual
        with torch.no_grad():
            decode(ids[:, -1:])
        assert model.config._attn_implementation == usual
    assert seen == ["decode", "eager"]


@pytest.mark.parametrize("first, suits", [(13, False), (17, True)])
def test_in_16_bits_most_logits_decide(first, suits, tiny_model):
    """Of the steps after columns 9 to 20: in bfloat16 rounding alone may change some by more than their size."""
    model, step = tiny_model(64).bfloat16(), decode_steps.DecodeSteps._step

    def wrong(self):
        logits = step(self)
        return logits.flip(-1) if self.read >= first else logits

    with mock.patch.object(decode_steps.DecodeSteps, "_step", wrong):
        assert decode_steps.suits(model, 0) is suits


def test_what_a_model_keeps_decides(tiny_model):
    assert rollout.keeps_only_keys_and_values(tiny_model(64))
    assert not rollout.keeps_only_keys_and_values(ARCHITECTURES["sliding window"](tiny_model))


@pytest.mark.parametrize("fault, reason", [
    (lambda logits: logits * 3, "its logits differ by up to .*%"),
    (lambda logits: logits.no_such_thing, "AttributeError: .*no_such_thing"),
], ids=["other logits", "an error"])
def test_a_model_that_a_graph_does_not_suit_is_sampled_without(fault, reason, tiny_model, capsys):
    model, step = tiny_model(64), decode_steps.DecodeSteps._step
    with mock.patch.object(decode_steps.DecodeSteps, "_step", lambda self: fault(step(self))):
        assert not decode_steps.suits(model, 0)
    assert not decode_steps.suits(model, 0), "measured once"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert re.search(f"by transformers' generate, which is slower: {reason}", printed)


def test_a_model_is_measured_once(tiny_model, capsys):
    model = tiny_model(64)
    assert decode_steps.suits(model, 0)
    with mock.patch.object(decode_steps.DecodeSteps, "_step", side_effect=AssertionError):
        assert decode_steps.suits(model, 0)
    assert capsys.readouterr().out == ""


def test_a_full_memory_is_no_answer(tiny_model):
    model = tiny_model(64)
    with mock.patch.object(decode_steps.DecodeSteps, "_step", side_effect=torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            decode_steps.suits(model, 0)
    assert model not in decode_steps._SUITS


# ----------------------------------------------------------------------------------------------------------
# Captured


def counted_replays(monkeypatch):
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self)))
    return replays


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_on_a_gpu_steps_are_replayed(make, block, tiny_model, tokenizer, monkeypatch):
    """And log-probs are those of the definition."""
    monkeypatch.setattr(decode_steps, "BLOCK", block)
    model, replays = make(tiny_model), counted_replays(monkeypatch)
    drawn = draw(model.to("cuda"), tokenizer, PROMPTS * 30, max_new_tokens=40, temperature=1.5)
    assert len(replays) > 25 and max(len(c.ids) for c in drawn) == 40
    own = own_logprobs(model.cpu(), PROMPTS * 30, drawn, 1.5, len(tokenizer))
    assert (own - sampled_logprobs(drawn)).abs().max() < 1e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["Phi-3, longrope", "GPT-Neo"])
def test_on_a_gpu_a_step_that_waits_is_never_captured(name, tiny_model, tokenizer, monkeypatch, capsys):
    """A capture that fails would leave torch's allocator, and the current stream, unusable for what follows."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import zoo

    model, replays = zoo.build(name).to("cuda").eval(), counted_replays(monkeypatch)
    rollout.generate(model, zoo.tokenizer(), [[2, 8, 10], [2, 8]], max_new_tokens=20, temperature=1.0, seed=0)
    assert "by transformers' generate" in capsys.readouterr().out and not replays
    torch.cuda.empty_cache()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    draw(tiny_model(64).to("cuda"), tokenizer, max_new_tokens=20)
    assert replays


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "DeepSeek-V3", "OLMo 2", "Phi", "Gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_architectures_are_captured(name, dtype, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import zoo

    replays = counted_replays(monkeypatch)
    assert decode_steps.suits(zoo.build(name, dtype).to("cuda").eval(), 0), capsys.readouterr().out
    assert len(replays) > 8


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bits", [32, 16, 4])
def test_on_a_gpu_an_adapter_samples_as_it_was_last_trained(toy, tokenizer, bits, monkeypatch):
    if bits == 4:
        pytest.importorskip("bitsandbytes")
    model = models.load_lora(str(toy / "runs/toy"), bits=bits, device=torch.device("cuda"), rank=4, alpha=8, seed=0)
    replays = counted_replays(monkeypatch)
    options = dict(temperature=0, max_new_tokens=30)
    before = draw(model, tokenizer, **options)
    with torch.no_grad():
        for p in lora.adapter_parameters(model):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p))
    after = draw(model, tokenizer, **options)
    assert len(replays) > 40 and [c.ids for c in after] != [c.ids for c in before]
    with mock.patch("rlt.decode_steps.suits", lambda *_: False):
        plain, count = draw(model, tokenizer, **options), len(replays)
    assert len(replays) == count
    pairs = zip(after, plain, strict=True)
    same = [a for a, b in pairs if a.ids == b.ids]
    assert len(same) >= (len(after) if bits == 32 else 1), "in few bits a near tie may go either way"
