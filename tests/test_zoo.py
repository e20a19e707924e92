"""Small models of many architectures: right, or refused in one line.   pytest tests/test_zoo.py; the rest by -m slow"""

import copy
import json
import re
import shutil

from rlt import decode_steps, models, rollout, saving
from rlt.errors import UserError
from rlt.logprobs import completion_logprobs

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import call, ended, mostly_slow
from transformers.masking_utils import create_sliding_window_causal_mask

import rewards
from bench import zoo
from rewards import Row, check_model, decoder, score_explanations

CPU = torch.device("cpu")
SEQUENCES = [[(7 * i * i + 3 * i + n) % 250 + 5 for i in range(n)] for n in (90, 40, 61, 9)]  # longer than any probe


@pytest.mark.parametrize("name", mostly_slow(zoo.ARCHITECTURES, plain=zoo.QUICK))
def test_log_probs_are_those_of_the_models_own_logits_or_it_is_refused(name):
    """In float32, to 1e-5, with sequences longer than those that the check at load has seen."""
    model, expected = zoo.build(name), zoo.ARCHITECTURES[name][2]
    if expected == zoo.REFUSED:
        with pytest.raises(rewards.UnsupportedModel, match=type(model).__name__):
            check_model(model)
        return
    prompts, ids = [s[:5] for s in SEQUENCES], [s[5:] for s in SEQUENCES]
    rows = [Row(p, c, [3], p, [11], [13, 17]) for p, c in zip(prompts, ids, strict=True)]
    assert check_model(model) is (expected == zoo.PACKED)
    with torch.no_grad():
        wanted = zoo.own_logprobs(model, prompts, ids)
        zoo.close(completion_logprobs(model, prompts, ids, vocab=zoo.VOCAB - 3)[0], wanted, 1e-5)
    scored = score_explanations(model, model, rows, vocab=zoo.VOCAB - 3)
    zoo.close(torch.cat([part[:-1] for part in scored.old_logprobs.split(scored.completion_lengths)]), wanted, 1e-5)
    with torch.no_grad():
        wanted = zoo.own_logprobs(model, [[*p, *c, 11] for p, c in zip(prompts, ids, strict=True)], [[13, 17]] * 4)
    zoo.close(scored.solution_logprobs, wanted, 1e-5)


@pytest.mark.parametrize("name", mostly_slow(zoo.ARCHITECTURES, plain=["Llama", "Qwen3-MoE", "Gemma 2", "Mamba-2"]))
def test_a_step_is_right_or_refused(name):
    entry = zoo.examine(name)
    assert entry["read"] == zoo.ARCHITECTURES[name][2] and (entry["why"] or entry["read"] != zoo.REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (*_, read) in zoo.ARCHITECTURES.items() if read != zoo.REFUSED])
def test_bfloat16_is_read_as_in_float32_and_right(name):
    """The decision does not hang on rounding, and log-probs are float32's on the same weights."""
    model = zoo.build(name, torch.bfloat16)
    prompts, ids = [s[:5] for s in SEQUENCES], [s[5:] for s in SEQUENCES]
    assert check_model(model) is (zoo.ARCHITECTURES[name][2] == zoo.PACKED)
    with torch.no_grad():
        got, wanted = completion_logprobs(model, prompts, ids)[0], zoo.own_logprobs(model, prompts, ids, zoo.VOCAB)
    assert (got.double() - wanted).abs().median() < 0.05, "no more than their rounding"


def test_the_log_has_all_architectures_and_what_was_expected_of_them():
    found = {entry["architecture"]: entry["read"] for entry in map(json.loads, zoo.LOG.read_text().splitlines())}
    assert found == {name: read for name, (*_, read) in zoo.ARCHITECTURES.items()}


# -- models that try to fool the check


def logits_error(model):
    """The largest difference of log-probs to the model's own, over sequences that are packed where it packs."""
    prompts, ids = [s[:2] for s in SEQUENCES], [s[2:] for s in SEQUENCES]
    with torch.no_grad():
        wanted = zoo.own_logprobs(copy.deepcopy(model), prompts, ids, zoo.VOCAB)
        return (completion_logprobs(model, prompts, ids)[0].double() - wanted).abs().max().item()


class Leak(torch.nn.Module):
    """A layer that mixes in a little of the state of the token before, wherever a sequence may begin."""

    def __init__(self, layer, share):
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, states, **options):
        return self.layer(states + self.share * F.pad(states, (0, 0, 1, 0))[:, :-1], **options)


@pytest.mark.parametrize("share, dtype", [(0.01, torch.float32), (1e-5, torch.float32), (0.01, torch.bfloat16)])
def test_a_leak_no_larger_than_rounding_is_one(share, dtype):
    model = zoo.build("Llama", dtype)
    model.model.layers[1] = Leak(model.model.layers[1], share)
    assert check_model(model) is False


class Windowed(torch.nn.Module):
    """A layer with a window of 50 tokens that no config tells of."""

    def __init__(self, layer, config):
        super().__init__()
        self.layer, self.config = layer, config

    def forward(self, states, attention_mask=None, **options):
        config = copy.copy(self.config)
        config.sliding_window = 50
        window = create_sliding_window_causal_mask(config, states, attention_mask, past_key_values=None)
        return self.layer(states, attention_mask=window, **options)


def test_a_window_longer_than_the_check_is_seen():
    model = zoo.build("Llama")
    model.model.layers[1] = Windowed(model.model.layers[1], model.config)
    assert check_model(model) is False and logits_error(model) < 1e-4


def longrope(tokens):
    """Of a config: positions are scaled anew beyond so many tokens."""
    length = {"original_max_position_embeddings": tokens}
    return length | {"rope_parameters": zoo.LONGROPE | length}


def test_rotary_embeddings_that_depend_on_the_longest_sequence_are_not_shared():
    """Beyond its original length Phi-3 scales all positions of a pass, those of short sequences too."""
    model = zoo.build("Phi-3, longrope", **longrope(80))
    assert check_model(model) is False and logits_error(model) < 1e-4


@pytest.mark.parametrize("option", ["softcap", "s_aux", "sliding_window", "position_bias", "indices", "anything_new"])
def test_attention_with_an_option_that_packing_does_not_know_is_not_packed(option):
    model = zoo.build("Llama")
    layer = model.model.layers[0].self_attn
    layer.forward = lambda *args, forward=layer.forward, **options: forward(*args, **options, **{option: 30.0})
    assert check_model(model) is False


def test_attention_that_is_not_causal_is_not_packed():
    model = zoo.build("Llama")
    layer = model.model.layers[0].self_attn
    layer.forward = lambda *args, forward=layer.forward, **options: forward(*args, **options, is_causal=False)
    assert check_model(model) is False


class Doubled(transformers.LlamaForCausalLM):
    """The head reads something else than its decoder's last hidden states."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits + 2 * self.lm_head(self.model.embed_tokens.weight[:1])
        return out


class Masked(transformers.LlamaForCausalLM):
    """Some tokens can't be generated, as image tokens in Emu3."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits[..., 7] = torch.finfo(out.logits.dtype).min
        return out


class Tempered(transformers.LlamaForCausalLM):
    """Its temperature depends on the logits."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits = out.logits / out.logits.std().clamp(min=1e-3)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Doubled, Masked, Tempered])
def test_other_logits_than_the_heads_are_refused(kind, dtype):
    model = kind(transformers.LlamaConfig(**zoo.SHAPE)).to(dtype).eval()
    with pytest.raises(rewards.UnsupportedModel, match=f"{kind.__name__} "):
        check_model(model)


def test_a_decoder_that_is_not_called_one_is_found():
    for name in ("Llama 4 text", "Mamba-2", "GPT-NeoX", "OPT"):
        model = zoo.build(name)
        assert decoder(model) is not model and not isinstance(decoder(model), torch.nn.Linear)


# -- decode steps that could be a CUDA graph


@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_decode_steps_with_fixed_addresses(name):
    """Of all models that keep keys and values alone; BLOOM makes its distances from a mask of two dimensions."""
    model = zoo.build(name).eval()
    if rollout.keeps_only_keys_and_values(model):
        assert decode_steps.suits(model, 0) is (name != "BLOOM")


# -- sampling where rows of a batch change each other


@pytest.mark.parametrize("name", ["RWKV", "MiniMax"])
def test_prompts_are_sampled_one_at_a_time_where_a_batch_changes_them(name, capsys):
    model, words = zoo.build(name), zoo.tokenizer()
    prompts = [s[:n] for s, n in zip(SEQUENCES * 2, (9, 4, 9, 5, 4, 4, 9, 7), strict=True)]
    drawn = rollout.generate(model, words, prompts, max_new_tokens=5, temperature=1.0, seed=3)
    assert capsys.readouterr().out.count("is sampled one prompt at a time") == 1
    with torch.no_grad():
        wanted = zoo.own_logprobs(model, prompts, [c.ids for c in drawn])
    zoo.close(torch.tensor([p for c in drawn for p in c.logprobs]), wanted, 1e-4)
    assert drawn == rollout.generate(model, words, prompts, max_new_tokens=5, temperature=1.0, seed=3)
    assert capsys.readouterr().out == "", "said once"
    same = rollout.generate(model, words, prompts[:1] * 8, max_new_tokens=5, temperature=1.0, seed=3)
    assert len({tuple(c.ids) for c in same}) > 4, "each has draws of its own"


# -- old log-probs


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_old_log_probs_are_float32_and_on_policy_ratios_are_one(tmp_path, bits):
    """Rounded to bfloat16, log-probs of -3 would be off by 0.01, and ratios by one percent."""
    zoo.build("Llama").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    policy = models.load_lora(str(tmp_path), bits=bits, device=CPU, seed=0, rank=2)
    zoo.stir(policy)
    prompts, ids = [s[:5] for s in SEQUENCES], [s[5:] for s in SEQUENCES]
    rows = [Row(p, c, [], p, [11], [13]) for p, c in zip(prompts, ids, strict=True)]
    old = score_explanations(policy, policy, rows, vocab=zoo.VOCAB - 3).old_logprobs
    new, _ = completion_logprobs(policy, prompts, ids, vocab=zoo.VOCAB - 3)
    assert old.dtype == new.dtype == torch.float32
    assert (old != old.bfloat16().float()).float().mean() > 0.9, "not rounded on the way"
    assert ((new - old).exp() - 1).abs().max() < 1e-5


# -- training all weights


@pytest.mark.parametrize("name", mostly_slow(["Qwen3-MoE", "Mixtral", "Granite", "GPT-OSS"], plain=["Qwen3-MoE"]))
def test_all_weights_are_trained_saved_and_restored_bit_for_bit(tmp_path, name):
    """Experts, too, which transformers stores under other names than it keeps them; in one file and in shards."""
    zoo.build(name).save_pretrained(tmp_path / "base")
    zoo.tokenizer().save_pretrained(tmp_path / "base")
    words = models.load_tokenizer(str(tmp_path / "base"))
    model = models.load_model(str(tmp_path / "base"), bits=32, device=CPU, scores=True).requires_grad_(True)
    prompts, ids = [s[:5] for s in SEQUENCES], [s[5:] for s in SEQUENCES]
    ours, theirs = [], []
    for logprobs, gradients in ((completion_logprobs(model, prompts, ids)[0], ours),
                                (zoo.own_logprobs(model, prompts, ids, zoo.VOCAB), theirs)):
        logprobs.sum().backward()
        gradients += [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        model.zero_grad()
    for got, wanted in zip(ours, theirs, strict=True):
        assert (got - wanted).norm() <= 1e-3 * wanted.norm() + 1e-5
    with torch.no_grad():
        for p, gradient in zip(model.parameters(), ours, strict=True):
            p -= 1e-4 * gradient
        after = completion_logprobs(model, prompts, ids)[0]
    saving.save_model(model, words, tmp_path / "saved")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("saved", "shards"):
        again = models.load_model(str(tmp_path / "base"), bits=32, device=CPU)
        saving.restore(again, tmp_path / folder)
        for (path, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q), path
        with torch.no_grad():
            assert torch.equal(completion_logprobs(again, prompts, ids)[0], after)
            loaded = models.load_model(str(tmp_path / folder), bits=32, device=CPU)
            assert torch.equal(completion_logprobs(loaded, prompts, ids)[0], after)


# -- context lengths


@pytest.mark.parametrize("name, changes, tokens", [
    ("Llama", {"max_position_embeddings": 77}, 77),
    ("GPT-2", {"n_positions": 78, "max_position_embeddings": 78}, 78),
    ("Phi-3, longrope", {}, 1024),  # of 2048: from there on all that was read before would have other positions
])
def test_context_lengths(tmp_path, name, changes, tokens):
    zoo.build(name, **changes).save_pretrained(tmp_path)
    assert models.context_length(str(tmp_path)) == tokens


def test_a_model_without_a_limit_has_none(tmp_path):
    transformers.Mamba2Config().save_pretrained(tmp_path)
    assert models.context_length(str(tmp_path)) == float("inf")


def test_longrope_changes_what_was_read_before():
    """Why its original length is the limit: sampled past it, log-probs are no longer the trainer's."""
    model, words = zoo.build("Phi-3, longrope", **longrope(12)), zoo.tokenizer()
    [drawn] = rollout.generate(model, words, [SEQUENCES[3]], max_new_tokens=20, temperature=1.0, seed=1)
    assert len(drawn.ids) > 10
    difference = torch.tensor(drawn.logprobs).double() - zoo.own_logprobs(model, [SEQUENCES[3]], [drawn.ids])
    assert difference.abs().max() > 0.05


def test_a_composite_config_has_the_context_of_its_text_part(tmp_path):
    config = transformers.Gemma3Config(text_config=zoo.SHAPE | zoo.HEAD | {"max_position_embeddings": 79})
    config.save_pretrained(tmp_path)
    assert models.context_length(str(tmp_path)) == 79


# -- quantised checkpoints


@pytest.mark.parametrize("quantisation, message", [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ", {} bits were asked for: pass 4 bits"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, " (bitsandbytes), which is not read here"),
    ({"quant_method": "mxfp4"}, " (mxfp4), which is not read here"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, " (gptq), which is not read here"),
    ({"quant_method": "fp8"}, " (fp8), which is not read here"),
])
def test_a_quantised_checkpoint_is_what_was_asked_for_or_refused(tmp_path, quantisation, message):
    zoo.build("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))
    for bits in (32, 16) if "load_in_4bit" in quantisation else (32, 16, 4):
        with pytest.raises(UserError, match=re.escape("is saved in a quantised form" + message.format(bits))):
            models.load_model(str(tmp_path), bits=bits, device=CPU)


# -- through the scripts


def words_and_rows(folder, name):
    """A model folder with a tokenizer, and some rows."""
    zoo.build(name).save_pretrained(folder / "base")
    zoo.tokenizer().save_pretrained(folder / "base")
    rows = [{"question": f"What is {i} + {i}?", "solution": f"It is \\boxed{{{2 * i}}}.", "answer": str(2 * i),
             "explanation": f"Twice {i}."} for i in range(1, 9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "Mamba-2", "Granite", "Gemma 3 text", "RWKV", "GPT-OSS",
                                  "Falcon-H1", "Qwen3-Next", "Phi-3, longrope", "GPT-2", "DeepSeek-V3"])
def test_every_script_takes_it(tmp_path, graded_here, name):
    """One of each kind: what scripts may stumble over is positions, experts, states and caches that are unlike Llama's,
    not the order of norms. All others take a step above, and are saved and restored."""
    words_and_rows(tmp_path, name)
    rows, limits = ("--data", "rows.jsonl", "--device", "cpu"), ("--max-new-tokens", 8)
    sft = ("sft_student.py", "--model", "base", *rows, "--val-rows", 2, "--batch-size", 2, "--steps", 1)
    call(tmp_path, *sft, "--format", "teacher", "--out", "warm")
    rl = ("train_rlt.py", "--model", "warm", *rows, *limits, "--prompts-per-step", 2, "--group-size", 2,
          "--eval-rows", 2, "--eval-every", 1, "--student-bits", 32, "--out", "teacher")
    call(tmp_path, *rl, "--steps", 1)
    call(tmp_path, *rl, "--steps", 2, "--resume")
    entries = [json.loads(line) for line in (tmp_path / "teacher/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 1] and entries[0]["kl_ref"] == 0
    assert all(entry["sampler_logprob_diff"] < 1e-3 for entry in entries)
    call(tmp_path, "distill.py", "--model", "teacher", *rows, *limits, "--student-bits", 32, "--out", "distilled.jsonl")
    assert 0 < len((tmp_path / "distilled.jsonl").read_text().splitlines()) <= 8  # special tokens: left out
    call(tmp_path, *sft, "--data", "rows.jsonl", "--lora-rank", 0, "--out", "student")
    call(tmp_path, *sft, "--lora-rank", 0, "--out", "student", "--steps", 2, "--lr-steps", 2, "--resume")
    call(tmp_path, "evaluate.py", "--task", "gsm8k", *rows, *limits, "--model", "base", "student", "teacher")
    for folder in ("runs/eval/base", "student", "teacher"):
        assert json.loads((tmp_path / folder / "eval_gsm8k.json").read_text())["questions"] == 8


@pytest.mark.parametrize("name", ["Gemma 2", "ModernBERT decoder"])
def test_scripts_refuse_a_model_in_one_line_and_leave_nothing(tmp_path, name):
    words_and_rows(tmp_path, name)
    for script, flags in (("train_rlt.py", ("--prompts-per-step", 2)), ("sft_student.py", ("--val-rows", 2))):
        result = ended(tmp_path, script, "--model", "base", "--data", "rows.jsonl", "--eval-every", 0, *flags, "--out",
                       "run")
        assert result.code == 2 and result.stderr.count("\n") == 1 and "base can't be used:" in result.stderr
        assert not (tmp_path / "run").exists()


def test_a_longer_run_keeps_its_learning_rate(toy, tmp_path, capsys):
    """Resumed with more --steps it goes on at the last value; --lr-steps stretches the schedule."""
    shutil.copytree(toy / "runs/toy", tmp_path / "runs/toy")

    def rates(*flags):
        call(tmp_path, "rl_student.py", "--limit", 12, "--eval-every", 0, "--prompts-per-step", 1, "--group-size", 2,
             "--max-new-tokens", 2, "--lr", 1.0, "--warmup-steps", 0, "--final-lr-fraction", 0.1, "--keep-zero-groups",
             "--out", "run", "--save-every", 1, *flags)
        return [json.loads(line)["lr"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]

    assert rates("--steps", 3) == pytest.approx([0.7, 0.4, 0.1])
    assert "keeps it" not in capsys.readouterr().out
    assert rates("--steps", 4, "--resume") == pytest.approx([0.7, 0.4, 0.1, 0.1])
    assert "falls over 3 steps, and keeps it: pass --lr-steps for another" in capsys.readouterr().out
    assert rates("--steps", 5, "--resume") == pytest.approx([0.7, 0.4, 0.1, 0.1, 0.1]), "the first run's, not the last"
    assert rates("--steps", 6, "--lr-steps", 9, "--resume")[5:] == pytest.approx([0.4])
    assert rates("--steps", 7, "--resume")[6:] == pytest.approx([0.3]), "and from then on that one"


def test_a_learning_rate_of_zero_trains_nothing_and_says_so(toy, tmp_path):
    row = {"question": "x 3 y 7 s1 swap", "solution": "7 3", "explanation": "s1 swap 7 3"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    flags = ("--data", tmp_path / "rows.jsonl", "--val-rows", 1, "--batch-size", 1, "--out", tmp_path / "run")
    call(toy, "sft_student.py", *flags, "--steps", 2)
    result = ended(toy, "sft_student.py", *flags, "--steps", 4, "--resume")
    assert result.code == 2 and "the learning rate is 0 from step 2 on: pass --lr-steps 4" in result.stderr
