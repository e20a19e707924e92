"""Loading, sampling, adapters: what is sampled is what is trained.   python -m pytest tests/test_models.py"""

import json

from rlt import models

import pytest
import torch
from conftest import run_script

from rewards import completion_logprobs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(toy):
    return str(toy / "runs/toy")


@pytest.fixture(scope="module")
def tokenizer(base):
    return models.load_tokenizer(base)


def lora(base, **changes):
    options = dict(bits=32, device=CPU, rank=4, alpha=8, targets="all-linear", seed=0, reference=True)
    return models.load_lora(base, **{**options, **changes})


def stir(model, by=0.3):
    """Move the policy's adapter away from where it started."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in models.adapter_parameters(model):
            p.add_(by * torch.randn_like(p))


PROMPTS = [[2, 8, 10, 9, 11, 3, 4], [2, 8, 3], [2, 8, 10, 9, 11, 20, 31, 21, 33, 22, 35, 3, 4]]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_sampler_and_the_trainer_agree(tiny_model, tokenizer, temperature):
    model = tiny_model(64)  # nine columns more than the tokenizer has words
    sampled = rollout.generate(model, tokenizer, PROMPTS * 20, max_new_tokens=12, temperature=temperature, seed=5)
    ours, _ = completion_logprobs(
        model, PROMPTS * 20, [c.ids for c in sampled], temperature=temperature, vocab=len(tokenizer)
    )
    theirs = torch.tensor([p for c in sampled for p in c.logprobs])
    assert (ours - theirs).abs().max() < 1e-4
    assert {len(c.ids) for c in sampled} != {12}, "some end early, or the test is blind to lengths"
    for c in sampled:
        assert c.finished == (c.ids[-1] == tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in c.ids[:-1]
        assert max(c.ids) < len(tokenizer)


def test_sampling_is_the_plain_softmax(tiny_model, tokenizer):
    """No top-k, no top-p: tokens far down the tail are drawn, as often as they should."""
    model = tiny_model(64)
    n = 4000
    drawn = rollout.generate(model, tokenizer, [PROMPTS[0]] * n, max_new_tokens=1, temperature=1.0, seed=0)
    logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1, : len(tokenizer)]
    expected = logits.softmax(-1) * n
    counted = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=len(tokenizer)).float()
    seen = expected > 5
    chi2 = ((counted - expected)[seen] ** 2 / expected[seen]).sum()
    assert chi2 < 2 * seen.sum() + 20
    rare = expected < 0.01 * n
    assert counted[rare].sum() == pytest.approx(expected[rare].sum().item(), rel=0.35)


def test_a_checkpoints_own_sampling_settings_do_not_leak_in(base, tokenizer, tmp_path, tiny_model):
    from transformers import GenerationConfig

    tiny_model(64).save_pretrained(tmp_path)
    GenerationConfig(top_k=1, top_p=0.1, repetition_penalty=3.0, do_sample=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = models.load_model(str(tmp_path), bits=32, device=CPU)
    a = rollout.generate(loaded, tokenizer, PROMPTS, max_new_tokens=9, temperature=1.0, seed=1)
    b = rollout.generate(tiny_model(64), tokenizer, PROMPTS, max_new_tokens=9, temperature=1.0, seed=1)
    assert [c.ids for c in a] == [c.ids for c in b]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_do_not_depend_on_padding(tiny_model, tokenizer, temperature):
    """Sampled behind padding on the left, recomputed with padding on the right, and alone: the same."""
    model = tiny_model(64, initializer_range=0.1)
    sampled = rollout.generate(model, tokenizer, PROMPTS, max_new_tokens=9, temperature=temperature, seed=2)
    score = lambda prompts, answers: completion_logprobs(  # noqa: E731
        model, prompts, answers, temperature=temperature, vocab=len(tokenizer)
    )[0]
    together = score(PROMPTS, [c.ids for c in sampled])
    alone = torch.cat([score([prompt], [c.ids]) for prompt, c in zip(PROMPTS, sampled, strict=True)])
    left = torch.tensor([p for c in sampled for p in c.logprobs])
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(left, alone, atol=1e-5)


def test_greedy_rows_do_not_depend_on_their_neighbours(tiny_model, tokenizer):
    model = tiny_model(64)
    together = rollout.generate(model, tokenizer, PROMPTS, max_new_tokens=10, temperature=0, seed=0)
    for prompt, c in zip(PROMPTS, together, strict=True):
        [alone] = rollout.generate(model, tokenizer, [prompt], max_new_tokens=10, temperature=0, seed=9)
        assert alone.ids == c.ids
        assert torch.allclose(torch.tensor(alone.logprobs), torch.tensor(c.logprobs), atol=1e-5)


def test_only_one_step_of_the_log_softmax_is_held(tiny_model, tokenizer, monkeypatch):
    numbers, take = [], models._Sampler.take

    def count(self, ids):
        take(self, ids)
        tensors = [t for kept in vars(self).values() for t in (kept if isinstance(kept, list) else [kept])]
        numbers.append(sum(t.numel() for t in tensors if isinstance(t, torch.Tensor)) - 3 * len(numbers))

    monkeypatch.setattr(models._Sampler, "take", count)
    rollout.generate(tiny_model(64), tokenizer, PROMPTS, max_new_tokens=6, temperature=1.0, seed=0)
    assert len(numbers) == 6 and set(numbers) == {3 * 64 + 3}, "one (B, V), and a number a step and row"


def test_draws_depend_on_the_seed_alone(tiny_model, tokenizer):
    draw = lambda seed: rollout.generate(  # noqa: E731
        tiny_model(64), tokenizer, PROMPTS, max_new_tokens=6, temperature=1.0, seed=seed
    )
    first = draw(3)
    torch.rand(17)
    assert draw(3) == first and draw(4) != first


def test_pad_and_eos_may_be_the_same(tiny_model, tokenizer):
    """Masks come from lengths: rows are the same when the padding is the end of the turn."""
    import copy

    twin = copy.deepcopy(tokenizer)
    twin.pad_token = twin.eos_token
    a, b = (
        rollout.generate(tiny_model(64), t, PROMPTS * 9, max_new_tokens=12, temperature=1.0, seed=5)
        for t in (tokenizer, twin)
    )
    assert [(c.ids, c.finished) for c in a] == [(c.ids, c.finished) for c in b]
    ours, theirs = (torch.tensor([p for c in side for p in c.logprobs]) for side in (a, b))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert any(c.finished and len(c.ids) < 12 for c in a)


def test_a_student_whose_padding_is_its_end_learns_to_end(tiny_model, tokenizer):
    import copy

    from prompts import Prompts

    twin = copy.deepcopy(tokenizer)
    twin.pad_token = twin.eos_token
    rows = [{"question": "x 3 y 7 s1 swap", "solution": "7 3", "explanation": text} for text in ("s1 swap 7 3", "so")]
    made = [[Prompts(t).sft(row, "student") for row in rows] for t in (tokenizer, twin)]
    assert made[0] == made[1] and all(ids.count(twin.eos_token_id) == 1 for ids, _ in made[1])
    model = tiny_model(64).train()
    before, supervised = zip(*((ids[:start], ids[start:]) for ids, start in made[1]), strict=True)
    logprobs, _ = completion_logprobs(model, before, supervised, vocab=len(twin))
    (-logprobs.sum()).backward()
    head = model.get_output_embeddings().weight.grad[twin.eos_token_id]
    assert len(logprobs) == sum(map(len, supervised)) and head.abs().max() > 0


# -- adapters


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_adapters_are_float32_on_any_base_and_alone_are_trained(base, bits):
    model = lora(base, bits=bits)
    adapters = models.adapter_parameters(model) + models.adapter_parameters(model, "reference")
    assert {p.dtype for p in adapters} == {torch.float32}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in models.adapter_parameters(model)}
    with models.use_adapter(model, "reference"):
        pass
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_reference_holds_the_starting_weights(base, tmp_path, tokenizer):
    """Also when they are a warm-up's: it is not the base."""
    first = lora(base, reference=False)
    stir(first)
    models.save_model(first, tokenizer, tmp_path)
    model = lora(str(tmp_path))
    ask = lambda: completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0]  # noqa: E731
    start = ask().detach()
    with models.use_adapter(model, "reference"):
        assert torch.equal(ask(), start)
    stir(model)
    with models.use_adapter(model, "reference"):
        assert torch.equal(ask(), start)
    assert not torch.allclose(ask(), start, atol=1e-3)
    base_alone = models.load_model(base, bits=32, device=CPU)
    plain = completion_logprobs(base_alone, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0]
    assert not torch.allclose(plain, start, atol=1e-3)


def test_the_reference_is_synced_by_the_formula(base):
    model = lora(base)
    stir(model)
    pairs = [(p.clone(), r.clone()) for p, r in models.adapter_pairs(model)]
    models.sync_reference(model, 0.9)
    for (policy, before), (now, after) in zip(pairs, models.adapter_pairs(model), strict=True):
        assert torch.equal(now, policy)
        assert torch.allclose(after, 0.9 * policy + 0.1 * before, atol=1e-7)
    models.sync_reference(model, 1.0)
    assert all(torch.equal(p, r) for p, r in models.adapter_pairs(model))


def test_averaging_factors_is_not_averaging_products(base):
    """What --sync-ref-mix's help says: the miss is exactly m (1 - m) dB dA times the scale."""
    model, m = lora(base), 0.9
    stir(model)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    product = lambda adapter: layer.get_delta_weight(adapter).clone()  # noqa: E731
    factors = {a: (layer.lora_A[a].weight.clone(), layer.lora_B[a].weight.clone()) for a in ("default", "reference")}
    average = m * product("default") + (1 - m) * product("reference")
    models.sync_reference(model, m)
    (a1, b1), (a0, b0) = factors["default"], factors["reference"]
    miss = m * (1 - m) * (b1 - b0) @ (a1 - a0) * layer.scaling["default"]
    assert miss.abs().max() > 1e-3
    assert torch.allclose(average - product("reference"), miss, atol=1e-6)


def test_saving_and_restoring_is_bit_for_bit(base, tmp_path, tokenizer):
    model = lora(base)
    stir(model)
    models.save_model(model, tokenizer, tmp_path / "both", adapters=("default", "reference"))
    kept = [(p.clone(), r.clone()) for p, r in models.adapter_pairs(model)]
    fresh = lora(base, seed=7)
    models.restore(fresh, tmp_path / "both")
    for (p, r), (p2, r2) in zip(kept, models.adapter_pairs(fresh), strict=True):
        assert torch.equal(p, p2) and torch.equal(r, r2)
    assert (tmp_path / "both/adapter_model.safetensors").exists()
    config = json.loads((tmp_path / "both/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base


def test_training_never_touches_the_base(base, tokenizer):
    model = lora(base, bits=4, checkpointing=True).train()
    before = models.fingerprint(model)
    adapters = [p.clone() for p in models.adapter_parameters(model)]
    optimizer = torch.optim.AdamW(models.adapter_parameters(model), lr=1e-6)
    for _ in range(3):
        completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert models.fingerprint(model) == before
    moved = [(p != q).float().mean() for p, q in zip(models.adapter_parameters(model), adapters, strict=True)]
    assert torch.stack(moved).min() > 0.99, "at lr 1e-6 bf16 adapters would stand still"


def test_four_bits_on_a_cpu_keep_their_gradients(base, tokenizer):
    """bitsandbytes' in-place repack for AVX512-BF16 would break training after the first eval pass."""
    model = lora(base, bits=4, reference=False)
    stir(model)

    def gradients():
        model.train()
        completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0].sum().backward()
        found = [p.grad.clone() for p in models.adapter_parameters(model)]
        model.zero_grad()
        return found

    before = gradients()
    model.eval()
    rollout.generate(model, tokenizer, PROMPTS, max_new_tokens=4, temperature=1.0, seed=0)
    with torch.no_grad():
        completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_checkpointed_gradients_are_the_plain_ones(base, tokenizer):
    def gradients(checkpointing):
        model = lora(base, reference=False, checkpointing=checkpointing)
        stir(model)
        model.train()
        completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0].sum().backward()
        return [p.grad for p in models.adapter_parameters(model)]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_targets(base, tmp_path, tokenizer):
    model = lora(base, targets="q_proj, v_proj", reference=False)
    names = {n.split(".lora_")[0].rsplit(".", 1)[1] for n, _ in model.named_parameters() if "lora_" in n}
    assert names == {"q_proj", "v_proj"}
    for wrong in ("q_proj,no_such", "no_such", "lm_head", "embed_tokens", ""):
        with pytest.raises(ValueError, match="expected all-linear, or some of down_proj, gate_proj"):
            lora(base, targets=wrong)
    models.save_model(model, tokenizer, tmp_path)
    lora(str(tmp_path), targets="v_proj,q_proj")
    with pytest.raises(ValueError, match="holds an adapter on q_proj, v_proj: leave --lora-targets out"):
        lora(str(tmp_path), targets="q_proj")


def test_a_rank_that_differs_from_the_saved_one_is_refused(base, tmp_path, tokenizer):
    models.save_model(lora(base, reference=False), tokenizer, tmp_path)
    with pytest.raises(ValueError, match="rank 4 and alpha 8.* pass --lora-rank 4 --lora-alpha 8"):
        lora(str(tmp_path), rank=16)


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
    ask = lambda: completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0]  # noqa: E731
    before, held = ask(), torch.cuda.memory_allocated()
    model.to("cpu")
    parked = torch.cuda.memory_allocated()
    assert parked < held
    for _ in range(2):
        with models.on_device(cuda, model):
            assert torch.equal(ask(), before)
        assert {p.device.type for p in model.parameters()} == {"cpu"} and torch.cuda.memory_allocated() <= parked


def test_four_bit_states_move_with_their_weights(base, tokenizer, monkeypatch):
    """All of them, both ways: constants of a 4-bit weight are neither parameters nor buffers."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

    model, moved, move = models.load_model(base, bits=4, device=CPU), [], QuantState.to
    states = {id(m.weight.quant_state): m for m in model.modules() if isinstance(m, Linear4bit)}
    ask = lambda: completion_logprobs(model, PROMPTS, [[5, 9, 1]] * 3, vocab=len(tokenizer))[0]  # noqa: E731
    before = ask()
    monkeypatch.setattr(QuantState, "to", lambda self, device: moved.append((id(self), device)) or move(self, device))
    with models.on_device(CPU, model):
        assert set(moved) == {(state, CPU) for state in states} and len(states) == 7 * 3
        moved.clear()
    assert set(moved) == {(state, CPU) for state in states}
    assert {id(m.weight.quant_state) for m in states.values()} == set(states)
    assert torch.equal(ask(), before)


# -- names


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/done/final").mkdir(parents=True)
    (tmp_path / "runs/open").mkdir()
    (tmp_path / "runs/open/metrics.jsonl").touch()
    assert models.resolve("runs/done") == str(tmp_path / "runs/done/final")
    assert models.resolve("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(FileNotFoundError, match="has not finished. Continue it with --resume"):
        models.resolve("runs/open")
    with pytest.raises(FileNotFoundError, match="runs/typo is no folder"):
        models.resolve("runs/typo")
    with pytest.raises(ValueError, match="no usable CUDA device"):
        models.pick_device("cuda:9") if not torch.cuda.is_available() else pytest.skip("this machine has CUDA")


def test_tokenizers_that_differ_are_refused_at_the_first_id(tokenizer, toy, tmp_path):
    import copy

    models.check_same_tokenizer(tokenizer, copy.deepcopy(tokenizer))
    text = (toy / "runs/toy/tokenizer.json").read_text().replace('"swap"', '"swop"')
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text((toy / "runs/toy/tokenizer_config.json").read_text())
    i = tokenizer.get_vocab()["swap"]
    with pytest.raises(ValueError, match=f"id {i} is 'swap' in one, 'swop' in the other"):
        models.check_same_tokenizer(tokenizer, models.load_tokenizer(str(tmp_path)))


def test_pickled_weights_are_refused(base, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "m")
    model = models.load_model(base, bits=32, device=CPU)
    torch.save(model.state_dict(), tmp_path / "m/pytorch_model.bin")
    (tmp_path / "m/model.safetensors").unlink()
    with pytest.raises(OSError):
        models.load_model(str(tmp_path / "m"), bits=32, device=CPU)


def test_the_toys_model_is_the_same_for_the_same_seed(tmp_path, toy):
    run_script(tmp_path, "data/toy.py", "--out", "again", "--steps", "3")
    again = models.load_model(str(tmp_path / "again"), bits=32, device=CPU)
    assert models.fingerprint(again) == models.fingerprint(
        models.load_model(str(toy / "runs/toy"), bits=32, device=CPU)
    )
