"""Two engines, one distribution.   python -m pytest tests/test_engines.py"""

import inspect

from rlt import models

import pytest
import torch
from torch.nn.attention import varlen
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from rewards import completion_logprobs

CPU, EOS = torch.device("cpu"), 1
PROMPTS = [[2, 8, 10, 9, 11, 3, 4], [2, 8, 3], [2, 8, 10, 9, 11, 20, 31, 21, 33, 22, 35, 3, 4], [2] + [8, 10] * 30]


@pytest.fixture(scope="module")
def tokenizer(toy):
    return models.load_tokenizer(str(toy / "runs/toy"))


def draw(model, tokenizer, prompts=PROMPTS, **changes):
    options = dict(max_new_tokens=12, temperature=1.0, seed=5, engine="continuous")
    return rollout.generate(model, tokenizer, prompts, **{**options, **changes})


def same(a, b, tolerance=1e-4):
    assert [c.ids for c in a] == [c.ids for c in b] and [c.finished for c in a] == [c.finished for c in b]
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(torch.tensor(x.logprobs), torch.tensor(y.logprobs), rtol=0, atol=tolerance)


def gemma(_):
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=6, initializer_range=0.3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"]))
    model.generation_config = GenerationConfig()
    return model.eval()


@pytest.mark.parametrize("make", [
    lambda make: make(64),
    lambda make: make(64, num_key_value_heads=4),
    lambda make: make(64, attn_implementation="eager"),
    gemma,
], ids=["grouped", "all heads", "eager", "sliding window"])
def test_greedy_is_the_same_by_both(make, tiny_model, tokenizer):
    model = make(tiny_model)
    implementation = model.config._attn_implementation
    same(*(draw(model, tokenizer, PROMPTS * 3, temperature=0, engine=e) for e in ("batch", "continuous")))
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("room", [None, 160])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_are_the_trainers(tiny_model, tokenizer, temperature, room):
    """Also where pages run out, and rows are dropped and read again to go on: a tenth of what all would take."""
    model, prompts = tiny_model(64), PROMPTS * 8
    sampled = draw(model, tokenizer, prompts, temperature=temperature, max_new_tokens=30, cache_tokens=room)
    ours, _ = completion_logprobs(
        model, prompts, [c.ids for c in sampled], temperature=temperature, vocab=len(tokenizer))
    assert (ours - torch.tensor([p for c in sampled for p in c.logprobs])).abs().max() < 1e-4
    assert {c.finished for c in sampled} == {True, False}
    for c in sampled:
        assert len(c.ids) == len(c.logprobs) and (len(c.ids) == 30 or c.finished)
        assert c.finished == (c.ids[-1] == EOS) and EOS not in c.ids[:-1] and max(c.ids) < len(tokenizer)


def test_it_is_the_plain_softmax(tiny_model, tokenizer):
    model, n = tiny_model(64), 3000
    drawn = draw(model, tokenizer, [PROMPTS[0]] * n, max_new_tokens=1, temperature=0.8)
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1, : len(tokenizer)]
    expected = (logits / 0.8).softmax(-1) * n
    counted = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=len(tokenizer)).float()
    seen = expected > 5
    assert ((counted - expected)[seen] ** 2 / expected[seen]).sum() < 2 * seen.sum() + 20
    rare = expected < 0.01 * n
    assert counted[rare].sum() == pytest.approx(expected[rare].sum().item(), rel=0.35)


@pytest.mark.parametrize("engine", ["batch", "continuous"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_columns_without_a_word_are_never_drawn(tiny_model, tokenizer, engine, temperature):
    """Even where their logits are the largest by far."""
    model = tiny_model(64)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 50
    assert model(torch.tensor([PROMPTS[0]])).logits[0].argmax(-1).min() >= len(tokenizer)
    drawn = draw(model, tokenizer, PROMPTS * 5, engine=engine, temperature=temperature)
    assert max(i for c in drawn for i in c.ids) < len(tokenizer)
    ours, _ = completion_logprobs(model, PROMPTS * 5, [c.ids for c in drawn], vocab=len(tokenizer))
    assert (ours - torch.tensor([p for c in drawn for p in c.logprobs])).abs().max() < 1e-4
    assert model(torch.tensor([PROMPTS[0]])).logits.isfinite().all(), "and the head is as it was"


def test_draws_depend_on_the_seed_alone(tiny_model, tokenizer):
    model = tiny_model(64)
    first = draw(model, tokenizer, PROMPTS * 8, seed=3)
    torch.rand(17)
    assert draw(model, tokenizer, PROMPTS * 8, seed=3) == first != draw(model, tokenizer, PROMPTS * 8, seed=4)


@pytest.mark.parametrize("bits", [32, 4])
def test_adapters_speak_also_in_training(toy, tokenizer, bits):
    options = dict(bits=bits, device=CPU, rank=4, alpha=8, targets="all-linear", seed=0, checkpointing=True)
    model = models.load_lora(str(toy / "runs/toy"), **options).train()
    plain = draw(model, tokenizer, temperature=0)
    with torch.no_grad():
        for p in models.adapter_parameters(model):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    trained = draw(model, tokenizer, temperature=0)
    same(trained, draw(model, tokenizer, temperature=0, engine="batch"))
    assert trained != plain and model.training
    ours, _ = completion_logprobs(model, PROMPTS, [c.ids for c in trained], vocab=len(tokenizer))  # packs the model,
    same(trained, draw(model, tokenizer, temperature=0))  # which must not matter
    ours.sum().backward()
    assert all(p.grad is not None for p in models.adapter_parameters(model))


def test_pages_are_bounded_by_the_prompts_and_the_flag(tiny_model, tokenizer, monkeypatch):
    """And never by what memory is free."""
    made, init = [], PagedAttentionCache.__init__

    def watch(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append((self.num_blocks, self.max_batch_tokens, self.cache_tensor.numel()))

    monkeypatch.setattr(PagedAttentionCache, "__init__", watch)
    model = tiny_model(64)
    for room in (None, 10**9, 200, 1):
        draw(model, tokenizer, cache_tokens=room, max_new_tokens=40)
    page = models.PAGE * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, width, bytes; two hold nothing
    assert made == [(2 + 2 + 2 + 4, 2048, 12 * page)] * 2 + [(6, 2048, 8 * page), (4, 2048, 6 * page)]


def test_pages_that_do_not_fit_are_refused_in_one_line(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.generation.continuous_batching.cache.get_device_and_memory_breakdown",
                        lambda: (CPU, 1000, 0, 0))
    model = tiny_model(64)
    with pytest.raises(ValueError, match="pages for 192 tokens .* Pass a lower --cache-tokens, now 200"):
        draw(model, tokenizer, cache_tokens=200, max_new_tokens=40)
    assert not model.lm_head._forward_hooks and model.config._attn_implementation == "sdpa"


def test_a_short_row_makes_room_for_the_next(tiny_model, tokenizer):
    """Twelve rows through room for four: fewer steps than three batches that wait for their longest."""
    model, rows = tiny_model(64), []
    count = model.lm_head.register_forward_hook(lambda module, inputs, logits: rows.append(logits.shape[-2]))
    drawn = draw(model, tokenizer, PROMPTS[:3] * 4, max_new_tokens=60, cache_tokens=4 * 96, temperature=0.5)
    count.remove()
    lengths = [len(c.ids) for c in drawn]
    waiting = sum(max(lengths[at : at + 4]) for at in range(0, 12, 4))
    assert max(rows) > 4 and len(rows) < waiting, (lengths, rows)


def test_what_goes_wrong_in_the_other_thread_is_raised_here(tiny_model, tokenizer, monkeypatch):
    model = tiny_model(64)
    broken = lambda *_, **__: (_ for _ in ()).throw(ZeroDivisionError("a broken kernel"))  # noqa: E731
    monkeypatch.setattr(models, "_paged_attention", broken)
    with pytest.raises(RuntimeError, match="a broken kernel"):
        draw(model, tokenizer)
    monkeypatch.undo()
    assert not model.lm_head._forward_hooks and model.config._attn_implementation == "sdpa"
    assert len(draw(model, tokenizer)) == len(PROMPTS)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths, lengths_k", [([4, 1, 6], [9, 30, 6]), ([1, 1, 1], [3, 1, 7])])
def test_on_a_gpu_the_kernel_is_asked_for_the_same(monkeypatch, lengths, lengths_k, window):
    """Without one: tensors that say they are on it, and the kernel by its definition, called as torch declares it."""
    declared, calls = inspect.signature(varlen.varlen_attn), []
    tokens, tokens_k = sum(lengths), sum(lengths_k)
    bounds, bounds_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths, lengths_k))

    def kernel(*args, **kwargs):
        calls.append(declared.bind(*args, **kwargs).arguments)
        query, key, value, starts, starts_k = (x.as_subclass(torch.Tensor) for x in args[:5])
        assert starts.dtype == starts_k.dtype == torch.int32 and kwargs["enable_gqa"]
        assert query.shape == (tokens, 8, 16) and key.shape == value.shape == (tokens_k, 2, 16)
        assert args[5:] == (max(lengths), max(lengths_k))
        left, right = kwargs["window_size"]
        out = torch.empty_like(query)
        for a, b, c, d in zip(starts, starts[1:], starts_k, starts_k[1:], strict=False):
            column = torch.arange(d - c) - (torch.arange(b - a) + (d - c) - (b - a))[:, None]  # from the diagonal
            hidden = ((column > right) & (right >= 0)) | ((column < -left) & (left >= 0))
            for head in range(8):
                scores = query[a:b, head].float() @ key[c:d, head // 4].float().T * kwargs["scale"]
                weights = scores.masked_fill(hidden, -torch.inf).softmax(1)
                out[a:b, head] = (weights @ value[c:d, head // 4].float()).bfloat16()
        return out

    class OnGPU(torch.Tensor):
        is_cuda = property(lambda self: True)

    class Cache:
        def update(self, key_states, value_states, layer_idx, kwargs):
            kwargs |= {"cu_seq_lens_k": bounds_k, "max_length_k": max(lengths_k)}
            return key_states, value_states

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(inspect, "signature", lambda _: declared)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, heads, 16).bfloat16().transpose(1, 2)
                         for n, heads in ((tokens, 8), (tokens_k, 2), (tokens_k, 2)))
    layer = torch.nn.Module()
    layer.layer_idx = 0
    here, there = (models._paged_attention(
        layer, q, key, value, None, cache=Cache(), scaling=0.3, cu_seq_lens_q=bounds, max_length_q=max(lengths),
        sliding_window=window)[0].as_subclass(torch.Tensor).float() for q in (query, query.as_subclass(OnGPU)))
    assert here.shape == there.shape == (1, tokens, 8, 16) and len(calls) == 1
    torch.testing.assert_close(here, there, rtol=0.02, atol=0.02)
    attend, heads = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *mask, **options: (
        heads.append((k.shape[1], v.shape[1], options["enable_gqa"])) or attend(q, k, v, *mask, **options)))
    key, value = key.float(), value.float()  # no such kernel; with shared heads only one that holds all scores
    full = models._paged_attention(
        layer, query.float().as_subclass(OnGPU), key, value, None, cache=Cache(), scaling=0.3, cu_seq_lens_q=bounds,
        max_length_q=max(lengths), sliding_window=window)[0].as_subclass(torch.Tensor)
    torch.testing.assert_close(full, here, rtol=0.02, atol=0.02)
    assert len(calls) == 1 and heads == [(8, 8, False)] * len(lengths)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the test above has a stand-in")
@pytest.mark.parametrize("dtype, gap", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_on_a_gpu_both_engines_agree_with_the_trainer(tiny_model, tokenizer, dtype, gap):
    model = tiny_model(64, hidden_size=128, initializer_range=0.1).to("cuda", dtype)
    for engine in ("batch", "continuous"):
        sampled = draw(model, tokenizer, PROMPTS * 16, engine=engine, max_new_tokens=40, cache_tokens=1024)
        ours, _ = completion_logprobs(model, PROMPTS * 16, [c.ids for c in sampled], vocab=len(tokenizer))
        theirs = torch.tensor([p for c in sampled for p in c.logprobs], device="cuda")
        assert (ours - theirs).abs().mean() < gap, engine
        assert sampled == draw(model, tokenizer, PROMPTS * 16, engine=engine, max_new_tokens=40, cache_tokens=1024)
