"""
Log-probs with a gradient, and sequences packed into one row, where none may see another.

    python -m pytest tests/test_logprobs.py
"""

import copy
import inspect

from rlt import lora, models, rollout
from rlt.logprobs import KLRow, completion_logprobs, completion_logprobs_and_kl

import pytest
import test_rewards
import torch
from test_rewards import REAL, Watch, make_rows
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import rewards
from rewards import Row, UnsupportedModel, check_model, micro_batches, score_explanations

CPU, V = torch.device("cpu"), 53

# ----------------------------------------------------------------------------------------------------------
# Packing

LENGTHS = (9, 1, 30, 4, 17, 2)


def tiny(seed=0, kv_heads=2, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=kv_heads, initializer_range=0.3)
    return Qwen2ForCausalLM(Qwen2Config(**{**shape, **changes})).to(dtype).eval()


def sequences(seed=0, lengths=LENGTHS):
    """Each with a first token of its own: as prompts of one token none is shared."""
    generator = torch.Generator().manual_seed(seed)
    return [[i, *torch.randint(V, (n - 1,), generator=generator).tolist()] for i, n in enumerate(lengths)]


def whole(model, rows):
    """The states that predict all tokens but the first, of every row."""
    n = torch.tensor([len(row) for row in rows])
    states, = rewards.hidden_states(model, rows, (torch.ones_like(n), n - 1))
    return states


def alone(model, rows):
    """The same by transformers itself, a row at a time."""
    ids = [torch.tensor([row], device=model.device) for row in rows]
    return torch.cat([model.model(row, use_cache=False).last_hidden_state[0, :-1] for row in ids])


def gradients(model, states):
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype, device=states.device).view_as(states)
    (states * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_packed_is_alone(kv_heads, dtype, tolerance):
    model, rows = tiny(kv_heads=kv_heads, dtype=dtype), sequences()
    wanted = alone(model, rows)  # before the first packed pass, by the attention the model came with
    wanted_gradients = gradients(model, wanted)
    got = whole(model, rows)
    assert model.config._attn_implementation == "packed"
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)
    found = gradients(model, got)
    assert found.keys() == wanted_gradients.keys()
    for name in found:
        scale = wanted_gradients[name].abs().max()
        assert (found[name] - wanted_gradients[name]).abs().max() <= 10 * tolerance * scale.clamp(min=1), name


def test_no_sequence_sees_another():
    """To the bit: whatever stands in the others, and in whatever place."""
    model, rows = tiny(), sequences()
    before = whole(model, rows).split([n - 1 for n in LENGTHS])
    for changed in range(len(rows)):
        others = rows[:changed] + [sequences(seed=9)[changed]] + rows[changed + 1 :]
        after = whole(model, others).split([n - 1 for n in LENGTHS])
        for i, (x, y) in enumerate(zip(before, after, strict=True)):
            assert torch.equal(x, y) == (i != changed or LENGTHS[i] <= 2), f"{changed} is seen by {i}"
    back = whole(model, rows[::-1]).split([n - 1 for n in LENGTHS[::-1]])
    for x, y in zip(before, back[::-1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def with_shared_prompts():
    """Three prompts of 12, 1 and 7 tokens, of four, one and three sequences, in mixed order."""
    prompts, ends = sequences(3, (12, 1, 7)), sequences(4, (3, 11, 5, 1, 6, 2, 8, 1))
    uses = [0, 2, 0, 1, 2, 0, 2, 0]
    rows = [prompts[use] + end for use, end in zip(uses, ends, strict=True)]
    return rows, torch.tensor([len(prompts[use]) for use in uses]), torch.tensor([*map(len, ends)])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_shared_prompt_is_read_once_and_changes_nothing(kv_heads):
    model, (rows, starts, lengths) = tiny(kv_heads=kv_heads, dtype=torch.float64), with_shared_prompts()
    by_one = [alone(model, [row])[start - 1 :] for row, start in zip(rows, starts, strict=True)]
    wanted = torch.cat(by_one)
    wanted_gradients = gradients(model, wanted)
    seen = []
    check_model(model)
    model.model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape), with_kwargs=True)
    got, = rewards.hidden_states(model, rows, (starts, lengths))
    assert seen == [(1, 12 + 1 + 7 + int(lengths.sum()))]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    found = gradients(model, got)
    assert found.keys() == wanted_gradients.keys()
    for name in found:  # Qwen2's norms round to float32, also the sum of a shared prompt's gradients
        assert (found[name] - wanted_gradients[name]).norm() <= 1e-6 * wanted_gradients[name].norm(), name


def test_behind_a_shared_prompt_no_sequence_sees_another():
    """To the bit. The prompt, too, does not change with what comes after it."""
    model, (rows, starts, _) = tiny(), with_shared_prompts()

    def states(rows):
        packing = rewards.pack_sequences(rows, starts.tolist())
        row = rewards._packed_states(model, packing)
        return row[packing.places].split([len(r) for r in rows])

    check_model(model)
    before = states(rows)
    for changed in range(len(rows)):
        others = [row[:-1] + [(row[-1] + 1) % V] if i == changed else row for i, row in enumerate(rows)]
        for i, (x, y) in enumerate(zip(before, states(others), strict=True)):
            assert torch.equal(x[:-1], y[:-1]), f"{i} changed with {changed}"
            assert torch.equal(x[-1], y[-1]) == (i != changed)


def test_sequences_that_are_nothing_but_the_shared_prompt():
    packing = rewards.pack_sequences([[5, 6], [5, 6, 7], [5, 6]], [2, 2, 2])
    assert packing.ids == [5, 6, 7] and packing.lengths == [2, 1] and packing.key_lengths == [2, 3]
    assert packing.places.tolist() == [0, 1, 0, 1, 2, 0, 1] and packing.keys.tolist() == [0, 1, 0, 1, 2]
    assert packing.positions.tolist() == [0, 1, 2]


def test_nothing_is_as_large_as_all_tokens_squared():
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.seen = max(self.seen, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    model, rows = tiny(), sequences(lengths=[40] * 50)  # 2000 tokens: widest are the MLP's 48 columns
    with torch.no_grad(), Largest() as largest:
        whole(model, rows)
    assert largest.seen == 2000 * 48


def test_log_probs_and_kl_are_those_of_one_row_at_a_time():
    teacher, student, rows = tiny(0, dtype=torch.float64), tiny(1, dtype=torch.float64), []
    for parts in zip(*(sequences(seed, (3, 7, 1, 12)) for seed in range(4)), strict=True):
        rows.append(KLRow(*parts))
    teacher.lm_head.requires_grad_(False)
    policy, kl = completion_logprobs_and_kl(teacher, student, rows, impl="torch")
    single = [completion_logprobs_and_kl(teacher, student, [row], impl="torch") for row in rows]
    for got, wanted in zip((policy, kl), map(torch.cat, zip(*single, strict=True)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    together = gradients(teacher, torch.cat([policy, kl]))
    apart = gradients(teacher, torch.cat([*map(torch.cat, zip(*single, strict=True))]))
    assert all(torch.allclose(together[name], apart[name], rtol=1e-8, atol=1e-8) for name in apart)


def test_a_kl_of_heads_of_two_sizes_reads_those_of_the_smaller():
    """Qwen2.5's heads of 7B and 1.5B have 152,064 and 151,936 rows, of which a tokenizer uses fewer still."""
    rows = [KLRow(*parts) for parts in zip(*(sequences(seed, (3, 7)) for seed in range(4)), strict=True)]
    found = []
    for vocab in (None, V):
        learner, frozen = tiny(0), tiny(1, vocab_size=V + 16)
        learner.lm_head.requires_grad_(False)
        logprobs, kl = completion_logprobs_and_kl(learner, frozen, rows, vocab=vocab)
        found.append((logprobs, kl, gradients(learner, torch.cat([logprobs, kl]))))
    (logprobs, kl, grad), (wanted, wanted_kl, wanted_grad) = found
    assert torch.equal(logprobs, wanted) and torch.equal(kl, wanted_kl)
    assert all(torch.equal(grad[name], wanted_grad[name]) for name in wanted_grad)


def test_checkpointed_layers_pack_again_in_the_backward():
    """They run a second time there, after the forward pass, even if the model has sampled in between."""
    rows, plain = sequences(), tiny()
    wanted = gradients(plain, whole(plain, rows))
    model = tiny().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    states = whole(model, rows)
    with torch.no_grad():
        model.eval()(torch.tensor([[1, 2, 3]]))
    model.train()
    found = gradients(model, states)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_sampling_stays_as_it_was(toy):
    base = str(toy / "runs/toy")
    tokenizer = models.load_tokenizer(base)
    prompts = [[2, 8, 10, 9, 11, 3, 4], [2, 8, 3], [2, 8, 10, 9, 11, 20, 31, 21, 33, 22, 35, 3, 4]] * 3
    model = models.load_model(base, bits=32, device=CPU)

    def draw(t):
        return rollout.generate(model, tokenizer, prompts, max_new_tokens=12, temperature=t, seed=3)

    before = [draw(t) for t in (0, 1)]
    whole(model, prompts)
    assert model.config._attn_implementation == "packed"
    assert [draw(t) for t in (0, 1)] == before


def test_a_saved_model_knows_nothing_of_it(tmp_path):
    model = tiny()
    wanted = whole(model, sequences())
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    again = models.load_model(str(tmp_path), bits=32, device=CPU)
    assert again.config._attn_implementation == "sdpa" and torch.equal(whole(again, sequences()), wanted)


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_adapters_on_off_and_reference(toy, bits):
    base, rows = str(toy / "runs/toy"), sequences(lengths=(12, 5, 20))
    model = models.load_lora(base, bits=bits, device=CPU, rank=4, alpha=8, targets="all-linear", seed=0, reference=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in lora.adapter_parameters(model):
            p.add_(0.3 * torch.randn_like(p))
    tolerance = 0.05 if bits == 16 else 1e-4

    def ask(some):
        return completion_logprobs(model, [row[:2] for row in some], [row[2:] for row in some])[0]

    def together_as_apart():
        together, apart = ask(rows), torch.cat([ask([row]) for row in rows])
        torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)
        return together.detach()

    policy = together_as_apart()
    with lora.use_adapter(model, "reference"):
        reference = together_as_apart()
    with torch.no_grad(), model.disable_adapter():
        plain = together_as_apart()
    assert torch.equal(reference, plain), "a fresh adapter is none"
    assert not torch.allclose(policy, plain, atol=0.1)
    ask(rows).sum().backward()
    together = [p.grad.clone() for p in lora.adapter_parameters(model)]
    model.zero_grad()
    for row in rows:
        ask([row]).sum().backward()
    for got, p in zip(together, lora.adapter_parameters(model), strict=True):
        assert (got - p.grad).norm() <= (0.05 if bits == 16 else 1e-4) * p.grad.norm()


def gemma(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                 head_dim=8, num_key_value_heads=2, sliding_window=4, initializer_range=0.3,
                 final_logit_softcapping=None,
                 layer_types=["sliding_attention", "sliding_attention", "full_attention"])
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **changes})).eval()
    model.generation_config = GenerationConfig()
    return model


@pytest.mark.parametrize("make", [
    gemma,
    lambda: tiny(use_sliding_window=True, sliding_window=4, max_window_layers=0),
    lambda: tiny(attn_implementation="eager"),
], ids=["gemma3", "window", "eager"])
def test_what_can_not_be_packed_is_read_one_by_one(make, capsys):
    model, rows, shapes = make(), sequences(), []
    wanted = alone(model, rows)
    assert not check_model(model)
    model.model.register_forward_pre_hook(lambda *call: shapes.append(call[2]["input_ids"].shape), with_kwargs=True)
    assert torch.equal(whole(model, rows), wanted)
    assert shapes == [(1, n) for n in LENGTHS] and model.config._attn_implementation != "packed"
    message = f"rewards.py: {type(model).__name__} reads sequences one by one: its attention can't be packed\n"
    assert capsys.readouterr().err == message, "said once"


def test_a_model_that_loses_the_bounds_later_does_not_go_on(monkeypatch):
    """After it was checked, too: rather an error than sequences that see each other."""
    model = tiny()
    whole(model, sequences())
    forward = type(model.model.layers[0]).forward

    def forget(self, *args, packed=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model.layers[0]), "forward", forget)
    with pytest.raises(RuntimeError):
        whole(model, sequences())


def test_a_budget_counts_tokens():
    lengths = [5, 100, 7, 7, 3, 30, 31]
    batches = list(micro_batches(lengths, 62))
    assert batches == [[1], [6, 5], [2, 3, 0, 4]]
    assert list(micro_batches([3] * 5, 6)) == [[0, 1], [2, 3], [4]]
    assert list(micro_batches([9, 1, 1], 9)) == [[0], [1, 2]] and list(micro_batches([], 9)) == []


def test_rows_of_one_prompt_follow_each_other():
    prompts = [[1], [2], [1], [2], [1], [3]]
    assert list(micro_batches([5, 9, 7, 3, 6, 8], 20, prompts)) == [[1, 3, 5], [2, 4, 0]]
    assert list(micro_batches([4, 4, 4, 4], 8, [[1], [2], [1], [2]])) == [[0, 2], [1, 3]]


def test_scoring_passes_hold_no_more_tokens_than_asked_for():
    teacher, student, seen = tiny(0), tiny(1), []
    rows = [Row(*parts) for parts in zip(*(sequences(seed, (3, 7, 1, 12, 2)) for seed in range(6)), strict=True)]
    for model in (teacher, student):
        check_model(model)
        model.model.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape), with_kwargs=True)
    score_explanations(teacher, student, rows, micro_batch_tokens=48, impl="torch")
    assert {shape[0] for shape in seen} == {1} and max(shape[1] for shape in seen) == 48
    assert sum(shape[1] for shape in seen) == sum(len(sum(r[:3], [])) + len(r[1]) + len(sum(r[3:], [])) for r in rows)


def test_on_a_gpu_the_kernel_is_asked_for_the_same(monkeypatch):
    """Without one: tensors that say they are on it, and the kernel by its definition, called as torch declares it."""
    declared, calls = inspect.signature(varlen.varlen_attn), []

    def kernel(*args, **kwargs):
        calls.append("kernel")
        asked = declared.bind(*args, **kwargs).arguments
        query, key, value = (asked[name] for name in ("query", "key", "value"))
        assert query.shape == (58, 8, 16) and key.shape == value.shape == (58, 2, 16) and query.stride(2) == 1
        assert asked["window_size"] == (-1, 0) and asked["enable_gqa"] and asked["max_q"] == asked["max_k"] == 30
        assert asked["cu_seq_q"].dtype == asked["cu_seq_k"].dtype == torch.int32
        out = torch.empty_like(query)
        bounds = asked["cu_seq_q"].tolist()
        for a, b in zip(bounds, bounds[1:], strict=False):
            for head in range(8):
                scores = query[a:b, head].float() @ key[a:b, head // 4].float().T * asked["scale"]
                scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)
                out[a:b, head] = (scores.softmax(1) @ value[a:b, head // 4].float()).to(out.dtype)
        return out

    class OnGPU(torch.Tensor):
        is_cuda = property(lambda self: True)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(inspect, "signature", lambda _: declared)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 58, heads, 16).bfloat16().transpose(1, 2) for heads in (8, 2, 2))
    lengths = [9, 1, 30, 18]
    bounds = torch.tensor([0, 9, 10, 40, 58], dtype=torch.int32)
    packed = lengths, bounds, lengths, bounds, None
    here, there = (rewards._packed_attention(None, q, key, value, None, packed=packed, scaling=0.2)[0].float()
                   for q in (query, query.as_subclass(OnGPU)))
    assert here.shape == there.shape == (1, 58, 8, 16) and calls == ["kernel"]
    torch.testing.assert_close(here, there.as_subclass(torch.Tensor), rtol=0.02, atol=0.02)
    full = query.as_subclass(OnGPU).float(), key.float(), value.float()  # float32 has no such kernel
    attend, heads = torch.nn.functional.scaled_dot_product_attention, []

    def sdpa(q, k, v, **options):  # and with shared heads, on a GPU, only one that holds all scores
        heads.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    in_float32 = rewards._packed_attention(None, *full, None, packed=packed, scaling=0.2)[0]
    torch.testing.assert_close(in_float32.as_subclass(torch.Tensor), here, rtol=0.02, atol=0.02)
    assert calls == ["kernel"] and heads == [(8, 8, False)] * 4
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))  # nor does a GPU before Ampere
    old = rewards._packed_attention(None, query.as_subclass(OnGPU), key, value, None, packed=packed, scaling=0.2)[0]
    torch.testing.assert_close(old.as_subclass(torch.Tensor).float(), here, rtol=0.02, atol=0.02)
    assert calls == ["kernel"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the test above has a stand-in")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_packed_is_as_exact_as_alone(checkpointing):
    """bfloat16 by the kernel: no further from float32 than a row at a time."""
    rows, size = sequences(lengths=(300, 1, 700, 40)), dict(hidden_size=256, kv_heads=2)
    exact, model, packed = (tiny(dtype=dtype, **size).cuda() for dtype in (torch.float32, *[torch.bfloat16] * 2))
    packed.train()
    if checkpointing:
        packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    states = alone(exact, rows), alone(model, rows), whole(packed, rows)
    slopes = [gradients(m, x) for m, x in zip((exact, model, packed), states, strict=True)]
    pairs = [states, *([s[name] for s in slopes] for name in slopes[0])]
    for wanted, single, got in pairs:
        assert (got.float() - wanted).norm() <= 1.5 * (single.float() - wanted).norm() + 1e-3 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the CPU reads shared prompts above")
def test_on_a_gpu_a_shared_prompt_is_as_exact_as_alone():
    """The kernel with more keys than queries: in bfloat16 no further from float32 than a row at a time."""
    rows, starts, lengths = with_shared_prompts()
    exact, model, shared = (tiny(dtype=dtype, hidden_size=256, kv_heads=2).cuda()
                            for dtype in (torch.float32, *[torch.bfloat16] * 2))
    states = [torch.cat([alone(m, [row])[start - 1 :] for row, start in zip(rows, starts, strict=True)])
              for m in (exact, model)]
    states += rewards.hidden_states(shared, rows, (starts, lengths))
    slopes = [gradients(m, x) for m, x in zip((exact, model, shared), states, strict=True)]
    for wanted, single, got in [states, *([s[name] for s in slopes] for name in slopes[0])]:
        assert (got.float() - wanted).norm() <= 1.5 * (single.float() - wanted).norm() + 1e-3 * wanted.norm()


# ----------------------------------------------------------------------------------------------------------
# Log-probs of the policy


@pytest.fixture(scope="module")
def pair():
    return test_rewards.tiny(0), test_rewards.tiny(1)


def policy_case():
    rows = make_rows()
    return [row.teacher_prompt for row in rows], [row.thought + row.teacher_end for row in rows]


def eager_logprobs(model, prompts, completions, temperature):
    out = []
    for p, c in zip(prompts, completions, strict=True):
        full = model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1, :REAL] / temperature
        out.append(full.log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("tied", [False, True])
def test_gradients_are_those_of_full_logits(tied, chunk):
    model = test_rewards.tiny(0, tie_word_embeddings=tied).double()
    prompts, completions = policy_case()
    weights = torch.randn(sum(map(len, completions)), dtype=torch.double)
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(logprobs):
        return torch.autograd.grad((weights * logprobs).sum(), parameters)

    logprobs, entropies = completion_logprobs(
        model, prompts, completions, temperature=0.7, vocab=REAL, head_chunk=chunk
    )
    eager = eager_logprobs(model, prompts, completions, 0.7)
    torch.testing.assert_close(logprobs, eager, rtol=1e-10, atol=1e-10)
    assert logprobs.requires_grad and not entropies.requires_grad
    for name, got, want in zip(names, gradients(logprobs), gradients(eager), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_a_head_with_a_bias_has_its_gradient_too():
    """Also one whose exponentials overflow if nothing is subtracted."""
    model = test_rewards.tiny(0).double()
    model.lm_head = torch.nn.Linear(32, test_rewards.V).double()
    model.lm_head.bias.data += 1e4
    prompts, completions = policy_case()
    got, want = (
        torch.autograd.grad(f.square().sum(), (model.lm_head.bias, model.lm_head.weight))
        for f in (
            completion_logprobs(model, prompts, completions, vocab=REAL, head_chunk=3)[0],
            eager_logprobs(model, prompts, completions, 1.0),
        )
    )
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert (got[0][REAL:] == 0).all()


def test_values_are_the_same_bits_with_and_without_grad(pair):
    prompts, completions = policy_case()
    with_grad = completion_logprobs(pair[0], prompts, completions, vocab=REAL, head_chunk=4)
    with torch.no_grad():
        without = completion_logprobs(pair[0], prompts, completions, vocab=REAL, head_chunk=4)
    assert all(torch.equal(x, y) for x, y in zip(with_grad, without, strict=True))
    assert with_grad[0].requires_grad and not without[0].requires_grad


def test_the_scoring_pass_and_the_policy_pass_agree(pair):
    rows = make_rows()
    scored = score_explanations(*pair, rows, temperature=0.7, vocab=REAL, micro_batch_tokens=50)
    with torch.no_grad():
        logprobs, entropies = completion_logprobs(pair[0], *policy_case(), temperature=0.7, vocab=REAL)
    torch.testing.assert_close(logprobs, scored.old_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, scored.entropies, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_buffer_and_chunks_stay_small():
    model = test_rewards.tiny(0)
    model.lm_head.requires_grad_(False)
    check_model(model)
    with Watch(model) as watch:
        completion_logprobs(model, *policy_case(), vocab=REAL, head_chunk=4)[0].sum().backward()
    assert max(watch.rows) <= 4 and model.lm_head.weight.grad is None
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    # forward and backward: each row goes through the head twice
    assert sum(n for n, _ in watch.matmuls) == 2 * sum(map(len, policy_case()[1]))


def test_models_whose_logits_are_not_the_heads_are_refused_here_too(pair):
    capped = test_rewards.small("Gemma2", head_dim=8, final_logit_softcapping=30.0)
    capped.lm_head.requires_grad_(False)
    with pytest.raises(UnsupportedModel, match="Gemma2ForCausalLM does more to its logits"):
        completion_logprobs(capped, *policy_case(), vocab=REAL)
    for models_of in ((capped, pair[1]), (test_rewards.tiny(0).requires_grad_(False), capped)):
        with pytest.raises(UnsupportedModel, match="Gemma2ForCausalLM does more to its logits"):
            completion_logprobs_and_kl(*models_of, [KLRow(*row[:4]) for row in make_rows()], vocab=REAL)


def test_bfloat16_heads_give_float32_logits(pair):
    """Logits rounded to bfloat16 move a log-prob by hundredths of a nat: only weights and states may be."""
    model = copy.deepcopy(pair[0]).bfloat16()
    head = model.lm_head.weight[:REAL].double()
    for p, c in zip(*policy_case(), strict=True):
        with torch.no_grad():
            got, _ = completion_logprobs(model, [p], [c], vocab=REAL)
            states = model.model(torch.tensor([p + c]), use_cache=False).last_hidden_state[0, len(p) - 1 : -1]
        want = (states.double() @ head.T).log_softmax(-1).gather(1, torch.tensor(c)[:, None])[:, 0]
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
