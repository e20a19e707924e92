# SPDX-License-Identifier: MIT
"""
Small models of many architectures, made from their configs, each taken through what a training run does with it:

    python bench/zoo.py                 all of them, into figures/logs/zoo.jsonl: a few minutes on a CPU
    python bench/zoo.py llama mamba2    these, printed

A model is loaded with a LoRA adapter and a reference; a batch is sampled, scored and learnt from; weights are saved and
restored. Held against the model's own logits: log-probs and gradient. What can't be right must be refused in one line.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from rlt import lora, models, rollout, saving  # noqa: E402
from rlt.errors import UserError  # noqa: E402
from rlt.logprobs import completion_logprobs  # noqa: E402
from rlt.lora import update_mode  # noqa: E402

import torch  # noqa: E402

from rewards import Row, check_model, score_explanations  # noqa: E402

LOG = ROOT / "figures/logs/zoo.jsonl"
CPU = torch.device("cpu")
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCAB = 5 + 256 + 3  # of the models: three columns more than the tokenizer has tokens
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             tie_word_embeddings=False)
HEAD = dict(head_dim=8)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=2048)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
LOCAL_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
              num_key_value_heads=4)
DEEPSEEK = dict(LATENT, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_shared_experts=1,
                n_group=1, topk_group=1, first_k_dense_replace=1)
INDEXER = dict(index_topk=1024, index_n_heads=4, index_head_dim=16)  # more than there are: ties would be cut at random
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
              layer_types=["linear_attention", "full_attention"])
MAMBA = dict(mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1)
WINDOW = dict(sliding_window=1024)  # longer than anything that is tried here
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4,
                original_max_position_embeddings=1024)

PACKED, ONE_BY_ONE, REFUSED = "packed", "one by one", "refused"
ARCHITECTURES = {  # name: (model_type, what its config has beyond SHAPE, how sequences are read)
    "Llama": ("llama", {}, PACKED),
    "Mistral": ("mistral", {"sliding_window": None}, PACKED),
    "Mistral, sliding window": ("mistral", WINDOW, ONE_BY_ONE),
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}, PACKED),
    "Qwen3": ("qwen3", HEAD, PACKED),
    "Qwen3-MoE": ("qwen3_moe", HEAD | EXPERTS, PACKED),
    "Gemma 2": ("gemma2", HEAD | WINDOW, REFUSED),
    "Gemma 3 text": ("gemma3_text", HEAD | WINDOW, ONE_BY_ONE),
    "Phi-3": ("phi3", {}, PACKED),
    "Falcon-H1": ("falcon_h1", HEAD | MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.0390625}, ONE_BY_ONE),
    "OLMo 2": ("olmo2", {}, PACKED),
    "Granite": ("granite", {"logits_scaling": 6.0}, PACKED),
    "SmolLM3": ("smollm3", {}, PACKED),
    "DeepSeek-V3": ("deepseek_v3", DEEPSEEK, PACKED),
    "GPT-OSS": ("gpt_oss", HEAD | LOCAL_EXPERTS | WINDOW, ONE_BY_ONE),
    "Mamba-2": ("mamba2", dict(state_size=8, num_heads=8, head_dim=8, n_groups=1), ONE_BY_ONE),
    "Cohere 2": ("cohere2", HEAD | WINDOW | {"logit_scale": 0.25}, ONE_BY_ONE),
    "StableLM": ("stablelm", {}, ONE_BY_ONE),
    "GLM-4": ("glm4", HEAD, PACKED),
    "Starcoder2": ("starcoder2", {}, PACKED),
    "GPT-NeoX": ("gpt_neox", {}, PACKED),
    "Mixtral": ("mixtral", {"num_local_experts": 4}, PACKED),
    # the rest is for patient tests
    "Llama 4 text": ("llama4_text", HEAD | {"intermediate_size_mlp": 48, "num_local_experts": 2,
                                            "num_experts_per_tok": 1, "attention_chunk_size": 1024}, ONE_BY_ONE),
    "Qwen2, some windows": ("qwen2", dict(WINDOW, use_sliding_window=True, max_window_layers=1), ONE_BY_ONE),
    "Qwen2-MoE": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 16}, PACKED),
    "Qwen3-Next": ("qwen3_next", HEAD | EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}, ONE_BY_ONE),
    "Qwen3.5 text": ("qwen3_5_text", HEAD | LINEAR, ONE_BY_ONE),
    "Gemma": ("gemma", HEAD, PACKED),
    "Gemma 2 without caps": ("gemma2", HEAD | WINDOW | {"final_logit_softcapping": None}, ONE_BY_ONE),
    "VaultGemma": ("vaultgemma", HEAD | WINDOW, REFUSED),
    "RecurrentGemma": ("recurrent_gemma", HEAD | {"lru_width": 32, "block_types": ["recurrent", "attention"]}, REFUSED),
    "Phi": ("phi", {}, PACKED),
    "Phi-3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 1024}, ONE_BY_ONE),
    "Phi-3.5-MoE": ("phimoe", LOCAL_EXPERTS | {"router_jitter_noise": 0.01, "input_jitter_noise": 0.01}, PACKED),
    "OLMo": ("olmo", {}, PACKED),
    "OLMo 3": ("olmo3", WINDOW, ONE_BY_ONE),
    "OLMoE": ("olmoe", EXPERTS, PACKED),
    "OLMo hybrid": ("olmo_hybrid", LINEAR, ONE_BY_ONE),
    "Granite MoE": ("granitemoe", LOCAL_EXPERTS | {"logits_scaling": 8.0}, PACKED),
    "Granite hybrid": ("granitemoehybrid", MAMBA | LOCAL_EXPERTS | {
        "shared_intermediate_size": 32, "logits_scaling": 8.0, "layer_types": ["mamba", "attention"]}, ONE_BY_ONE),
    "DeepSeek-V2": ("deepseek_v2", DEEPSEEK | {"topk_method": "greedy"}, PACKED),
    "DeepSeek-V3.2": ("deepseek_v32", DEEPSEEK | INDEXER, ONE_BY_ONE),
    "GLM-4.5": ("glm4_moe", DEEPSEEK, PACKED),
    "GLM-4.7 Flash": ("glm4_moe_lite", DEEPSEEK, PACKED),
    "GLM-5": ("glm_moe_dsa", DEEPSEEK | INDEXER, ONE_BY_ONE),
    "Mamba": ("mamba", dict(state_size=8, intermediate_size=64), ONE_BY_ONE),
    "RWKV": ("rwkv", {"attention_hidden_size": 32}, ONE_BY_ONE),
    "Cohere": ("cohere", {"logit_scale": 0.0625}, PACKED),
    "MiniCPM3": ("minicpm3", LATENT | {"dim_model_base": 16, "scale_emb": 12}, PACKED),
    "nanochat": ("nanochat", HEAD, REFUSED),
    "Falcon": ("falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}, ONE_BY_ONE),
    "GPT-2": ("gpt2", GPT2, PACKED),
    "GPT-J": ("gptj", GPT2 | {"rotary_dim": 4}, ONE_BY_ONE),
    "GPT-Neo": ("gpt_neo", dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]), ONE_BY_ONE),
    "OPT": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32), PACKED),
    "BLOOM": ("bloom", dict(n_layer=2, n_head=4), ONE_BY_ONE),
    "MPT": ("mpt", dict(d_model=32, n_heads=4, n_layers=2), ONE_BY_ONE),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, ONE_BY_ONE),
    "Nemotron": ("nemotron", HEAD, ONE_BY_ONE),
    "Nemotron-H": ("nemotron_h", HEAD | dict(layers_block_type=["mamba", "attention"], ssm_state_size=8,
                                             mamba_num_heads=4, mamba_head_dim=16, n_groups=1), ONE_BY_ONE),
    "Doge": ("doge", HEAD, ONE_BY_ONE),
    "JetMoe": ("jetmoe", LOCAL_EXPERTS | {"kv_channels": 8}, ONE_BY_ONE),
    "Jamba": ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                            num_experts=4, mamba_d_state=8), ONE_BY_ONE),
    "Bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}, ONE_BY_ONE),
    "EXAONE 4": ("exaone4", WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}, ONE_BY_ONE),
    "Hunyuan": ("hunyuan_v1_dense", HEAD, PACKED),
    "ERNIE 4.5": ("ernie4_5", HEAD, PACKED),
    "Seed-OSS": ("seed_oss", HEAD, PACKED),
    "Apertus": ("apertus", {}, PACKED),
    "Arcee": ("arcee", {}, PACKED),
    "BitNet": ("bitnet", {}, PACKED),
    "Ministral 3": ("ministral3", HEAD, PACKED),
    "MiniMax": ("minimax", HEAD | {"num_local_experts": 4, "block_size": 16,
                                   "layer_types": ["linear_attention", "full_attention"]}, ONE_BY_ONE),
    "MiniMax-M2": ("minimax_m2", HEAD | LOCAL_EXPERTS, PACKED),
    "ModernBERT decoder": ("modernbert-decoder", {}, REFUSED),
    "xLSTM": ("xlstm", {}, REFUSED),
}
QUICK = list(ARCHITECTURES)[:22]


# ----------------------------------------------------------------------------------------------------------
# Models and a tokenizer


def tokenizer(ids=None):
    """One token a byte, and the special tokens of a chat template. ids: {token: id}, counted from 0 by default."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(BPE(ids or {token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   additional_special_tokens=SPECIAL[3:])
    made.chat_template = TEMPLATE
    return made


def build(name, dtype=torch.float32, **more):
    """A random model of this architecture, its weights large enough to tell tokens apart. more: of its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes, _ = ARCHITECTURES[name]
    config = type(AutoConfig.for_model(model_type).get_text_config())(**SHAPE | changes | more)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator, head = torch.Generator().manual_seed(0), model.get_output_embeddings()
    for p in model.parameters():
        if p.dim() > 1 or p is getattr(head, "bias", None):
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------
# What a run does


def examine(name):
    """Take an architecture through a step -> {"architecture", "class", "read", "why"}. AssertionError where wrong.

    why: of a refusal, or what is special about how the model is read.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = build(name)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        entry = {"architecture": name, "class": type(model).__name__}
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                entry |= take_a_step(folder)
        except UserError as error:
            reason = str(error).partition(f"{type(model).__name__} ")[2]
            assert reason and "\n" not in reason, error
            return entry | {"read": REFUSED, "why": reason}
    return entry


def take_a_step(folder):
    words, why = models.load_tokenizer(folder), []
    options = dict(bits=32, device=CPU, rank=2, reference=True)
    try:
        policy = models.load_lora(folder, seed=0, checkpointing=True, **options)
    except UserError as error:
        if "--gradient-checkpointing" not in str(error):
            raise
        policy, why = models.load_lora(folder, seed=0, **options), ["no gradient checkpointing"]
    student = models.load_model(folder, bits=32, device=CPU, scores=True)
    packs, batches = check_model(policy), rollout.can_batch(policy, words.pad_token_id)
    stir(policy)

    # sampling: the log-probs of what was drawn are the trainer's
    prompts = [list(b"What is 12 + 30?"), list(b"Why?"), list(b"Name a prime below 9."), list(b"Why?")]
    completions = rollout.generate(policy, words, prompts, max_new_tokens=12, temperature=1.0, seed=1)
    ids = [c.ids for c in completions]
    ours, _ = completion_logprobs(policy, prompts, ids, vocab=len(words))
    close(ours, torch.tensor([p for c in completions for p in c.logprobs]), 1e-4 if packs else 1e-2)  # they add up

    # scoring: the log-probs are those of the model's own logits
    rows = [Row(p, c, [4], [*p, 10], [11, 12], [13, 14, 15]) for p, c in zip(prompts, ids, strict=True)]
    scored = score_explanations(policy, student, rows, vocab=len(words))
    with torch.no_grad():
        close(scored.old_logprobs, own_logprobs(policy, prompts, [[*c, 4] for c in ids]), 1e-5)
        before = [[*r.student_prompt, *r.thought, *r.bridge] for r in rows]
        close(scored.solution_logprobs, own_logprobs(student, before, [r.solution for r in rows]), 1e-5)

    # the update: dropout and the like draw nothing, the gradient is that of the model's own logits
    weights = torch.linspace(-1, 1, len(ours))
    gradients = []
    for mode, compute in ((update_mode, lambda: completion_logprobs(policy, prompts, ids, vocab=len(words))[0]),
                          (torch.nn.Module.eval, lambda: own_logprobs(policy, prompts, ids))):
        mode(policy)
        logprobs = compute()
        close(logprobs.detach(), ours.detach(), 1e-5)
        (logprobs * weights).sum().backward()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in lora.adapter_parameters(policy)])
        policy.zero_grad()
    for got, wanted in zip(*gradients, strict=True):
        assert (got - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, "gradient"
    assert sum(g.norm() > 0 for g in gradients[0]) >= len(gradients[0]) / 2, "most of the adapter is not trained"

    # saved, restored, and as a model of its own: the same bits
    with torch.no_grad():
        for p, gradient in zip(lora.adapter_parameters(policy), gradients[0], strict=True):
            p -= 0.1 * gradient
        after = completion_logprobs(policy, prompts, ids, vocab=len(words))[0]
        saving.save_model(policy, words, f"{folder}/saved", adapters=list(policy.peft_config))
        again = models.load_lora(folder, seed=7, **options)
        saving.restore(again, f"{folder}/saved")
        loaded = models.load_model(f"{folder}/saved", bits=32, device=CPU, scores=True)
        for model in (again, loaded):
            assert torch.equal(completion_logprobs(model, prompts, ids, vocab=len(words))[0], after), "saved"
        with lora.use_adapter(again, "reference"):
            start = completion_logprobs(again, prompts, ids, vocab=len(words))[0]
        close(start, own_logprobs(student, prompts, ids), 1e-5)
    why += [] if batches else ["sampled one prompt at a time"]
    return {"read": PACKED if packs else ONE_BY_ONE, "why": "; ".join(why)}


def stir(model):
    """Move an adapter away from where it started, its reference not."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in lora.adapter_parameters(model):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def own_logprobs(model, prompts, completions, vocab=VOCAB - 3):
    """Log-probs of completions by the model's own logits, one sequence at a time, packed (N,)."""
    parts = []
    for prompt, ids in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        parts.append(logits[:, :vocab].double().log_softmax(1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.cat(parts)


def close(ours, theirs, tolerance):
    difference = (ours.double() - theirs.double()).abs().max().item()
    assert difference <= tolerance, f"differ by {difference:.2g} nats"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures by name or model type; default: all, into the log")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name, (kind, *_) in ARCHITECTURES.items() if not args.names or {name, kind} & {*args.names}]
    entries = []
    for name in names:
        entries.append(examine(name))
        print(json.dumps(entries[-1]), flush=True)
    if not args.names:
        LOG.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


if __name__ == "__main__":
    main()
