# SPDX-License-Identifier: MIT
"""
Models: found, loaded, sampled from, saved. Nothing here knows about rewards or GRPO.

A model is named by a hub id, a folder, a run folder (its final/ is meant), or `toy` and `toy-teacher`, which are
made on first use. Weights are read from safetensors only, and no code is ever taken from a model's repository.
"""

import hashlib
import inspect
import logging
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it offers a hub kernel that we don't want
HERE = Path(__file__).resolve().parent
MADE_ON_FIRST_USE = {  # name: (folder, the command that makes it, what is being made)
    "toy": ("runs/toy", ["data/toy.py"], "the toy (rows, tokenizer, base model: two minutes)"),
    "toy-teacher": (
        "runs/toy-teacher", ["sft_student.py", "--format", "teacher", "--resume"], "the toy's warm-up teacher"
    ),
}


def _torchrun(name, alone):
    """What torchrun says to each of its processes: RANK, LOCAL_RANK or WORLD_SIZE."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone


def resolve(name):
    """The folder (or hub id) that a model's name stands for. Makes the toy when it is asked for and missing."""
    if name in MADE_ON_FIRST_USE:
        folder, (script, *flags), what = MADE_ON_FIRST_USE[name]

        def missing():
            return not any((Path(folder) / whole).exists() for whole in ("model.safetensors", "final"))

        while missing() and _torchrun("RANK", 0) > 0:  # rank 0 makes it, in a process of its own
            time.sleep(1)
        if missing():
            print(f"{folder} is missing: making {what}, once.", flush=True)
            subprocess.run([sys.executable, str(HERE / script), *flags, "--out", folder], check=True,
                           env={**os.environ, "WORLD_SIZE": "1"})
        name = folder
    path = Path(name)
    if (path / "final").is_dir():
        return str((path / "final").resolve())
    if (path / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{name} has no final/: that run has not finished. Continue it with --resume.")
    if path.is_dir():  # absolute, since adapters remember their base by it
        return str(path.resolve())
    if (name.count("/") <= 1 and not name.startswith((".", "/", "runs/"))):
        return name
    raise FileNotFoundError(f"{name} is no folder: expected a run folder, a model folder, a hub id (org/name) or toy.")


def rows_of(data, split):
    """The file of a data source: `toy` stands for the toy's rows of this split (train, val, test, long)."""
    return f"{resolve('toy')}/{split}.jsonl" if data == "toy" else data


def pick_device(name):
    """cpu, cuda or cuda:1; "auto" is CUDA where there is one. Under torchrun each rank has a CUDA device to itself."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: expected cpu, cuda, cuda:1 or auto.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no usable CUDA device. Pass --device cpu or auto.")
    if name.startswith("cuda") and _torchrun("WORLD_SIZE", 1) > 1:
        place, devices = _torchrun("LOCAL_RANK", 0), torch.cuda.device_count()
        if name != "cuda":
            raise ValueError(f"--device {name} under torchrun: each rank has a device to itself, pass cuda.")
        if place >= devices:
            raise ValueError(f"rank {place} of this machine finds {devices} CUDA devices and needs one to itself: "
                             f"pass torchrun --nproc_per_node={devices}, or --device cpu.")
        name = f"cuda:{place}"
    return torch.device(name)


def load_tokenizer(name):
    """The tokenizer of a model, its tokenizer.json taken as it is, with a padding token.

    Not AutoTokenizer: that goes by the model's architecture, and finds another class beside a bare adapter.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve(name))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name}: expected a model's folder, a run folder or a hub id ({reason})") from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-sequence token: expected an instruct model's.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: every mask here comes from lengths
    return tokenizer


def check_same_tokenizer(teacher, student):
    """Raise unless both tokenizers give every id the same meaning: the reward compares token by token."""
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (teacher, student))
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i):
            raise ValueError(
                f"teacher and student tokenize differently (id {i} is {ours.get(i)!r} in one, {theirs.get(i)!r} in the "
                "other), and the reward compares token by token. Pass a --student of the same family."
            )


def context_of(*names):
    """Tokens that all of these models can read."""
    from transformers import AutoConfig

    return min(AutoConfig.from_pretrained(base_of(name)).max_position_embeddings for name in names)


def anatomy(name):
    """What is known of a model without its weights: its base's config, and rank and targets of an adapter it has."""
    from transformers import AutoConfig

    folder, adapter = resolve(name), {}
    if (Path(folder) / "adapter_config.json").exists():
        from peft import PeftConfig

        lora = PeftConfig.from_pretrained(folder)
        adapter = {"rank": lora.r, "targets": ",".join(sorted(lora.target_modules))}
    return {"config": AutoConfig.from_pretrained(base_of(folder)), **adapter}


def base_of(name):
    """The model under an adapter; any other model is its own base."""
    folder = resolve(name)
    if (Path(folder) / "adapter_config.json").exists():
        from peft import PeftConfig

        return PeftConfig.from_pretrained(folder).base_model_name_or_path
    return folder


def load_model(name, *, bits, device):
    """A frozen model in eval mode; an adapter folder is loaded as its base with the adapter on.

    bits: 32 (float32), 16 (bfloat16) or 4 (nf4 with double quantisation, through bitsandbytes; embeddings and head
    stay unquantised).
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = resolve(name)
    if (Path(folder) / "adapter_config.json").exists():
        from peft import PeftModel

        base = load_model(base_of(folder), bits=bits, device=device)
        return PeftModel.from_pretrained(base, folder).eval().requires_grad_(False)
    options = {"dtype": torch.float32 if bits == 32 else torch.bfloat16}
    if bits == 4:
        options = _four_bits(device)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": str(device)}, use_safetensors=True, trust_remote_code=False, **options
    )
    model.generation_config = GenerationConfig()  # a checkpoint's own top-p or repetition penalty must not leak in
    return model.eval().requires_grad_(False)


def _four_bits(device):
    import bitsandbytes.nn.modules
    from transformers import BitsAndBytesConfig

    # On CPUs with AVX512-BF16 bitsandbytes repacks weights in place at the first forward, and gradients through
    # the repacked layers are wrong (or raise): keep the plain path.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"dtype": dtype, "quantization_config": quantisation}


def load_lora(name, *, bits, device, rank, alpha, targets, seed, reference=False, checkpointing=False):
    """A base with a trainable LoRA adapter "default", in float32 on any base: bf16 ones do not move at lr 1e-6.

    name: a folder that holds an adapter goes on training that adapter; any other model gets a fresh one.
    checkpointing: recompute activations in the backward pass, which saves memory and costs a third more time.
    reference: add a second, frozen adapter "reference" with the starting weights (`using` switches to it).
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    folder, names = resolve(name), [target.strip() for target in targets.split(",")]
    torch.manual_seed(seed)
    if (Path(folder) / "adapter_config.json").exists():
        config = PeftConfig.from_pretrained(folder)
        theirs = sorted(config.target_modules)
        if targets != "all-linear" and sorted(names) != theirs:
            raise ValueError(f"{name} holds an adapter on {', '.join(theirs)}: leave --lora-targets out.")
        if (config.r, config.lora_alpha) != (rank, alpha):
            raise ValueError(
                f"{name} holds an adapter of rank {config.r} and alpha {config.lora_alpha}, asked for were {rank} and "
                f"{alpha}: pass --lora-rank {config.r} --lora-alpha {config.lora_alpha}."
            )
        base = load_model(config.base_model_name_or_path, bits=bits, device=device)
        model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    else:
        base = load_model(folder, bits=bits, device=device)
        head = base.get_output_embeddings()
        linear = {path.rpartition(".")[2] for path, module in base.named_modules()
                  if isinstance(module, torch.nn.Linear) and module is not head}
        if targets != "all-linear" and not linear.issuperset(names):
            raise ValueError(f"--lora-targets {targets}: expected all-linear, or some of {', '.join(sorted(linear))}.")
        targets = targets if targets == "all-linear" else names
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
    if reference:
        model.add_adapter("reference", model.peft_config["default"])
        with torch.no_grad():
            for ours, theirs in adapter_pairs(model):
                theirs.copy_(ours)
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.float()
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return set_trainable(model)


def adapter_parameters(model, adapter="default"):
    return [p for name, p in model.named_parameters() if "lora_" in name and f".{adapter}." in name]


def adapter_pairs(model):
    """(policy, reference) tensors of the two adapters, in one order."""
    pairs = zip(adapter_parameters(model), adapter_parameters(model, "reference"), strict=True)
    return list(pairs)


def set_trainable(model):
    """Activate the adapter "default" and let gradients reach it alone."""
    model.set_adapter("default")
    model.requires_grad_(False)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)
    return model


@contextmanager
def using(model, adapter):
    """`with using(model, "reference"):` the other adapter speaks, without gradients."""
    model.set_adapter(adapter)
    try:
        with torch.no_grad():
            yield model
    finally:
        set_trainable(model)


@contextmanager
def on(device, model):
    """`with on(device, model):` inside, the model is there; afterwards back where it was. 4-bit states move along."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield model
    finally:
        model.to(before)


@torch.no_grad()
def sync_reference(model, mix):
    """reference <- mix * policy + (1 - mix) * reference, for A and for B (TR-DPO, as in the released recipe).

    With A' = A + dA and B' = B + dB the policy's, the product misses the average of the two products by exactly
    mix (1 - mix) dB dA times the adapter's scale.
    """
    for policy, reference in adapter_pairs(model):
        reference.lerp_(policy, mix)


def fingerprint(model):
    """A hash of a sample of the weights under the adapters: some hundred numbers of every tensor, its name and type."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if "lora_" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            few = p.detach().flatten()[:: max(1, p.numel() // 64)]
            digest.update(few.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(model, tokenizer, folder, adapters=("default",)):
    """A Hugging Face folder, or for a model with adapters a peft folder (a second adapter goes into a subfolder)."""
    options = {"selected_adapters": list(adapters)} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)


def restore(model, folder):
    """Read the weights that save_model wrote into this folder back into the model, bit for bit."""
    if not hasattr(model, "peft_config"):
        from safetensors.torch import load_model as load_safetensors

        load_safetensors(model, Path(folder) / "model.safetensors")
        return
    from peft import load_peft_weights, set_peft_model_state_dict

    for adapter in model.peft_config:
        place = Path(folder) if adapter == "default" else Path(folder) / adapter
        set_peft_model_state_dict(model, load_peft_weights(str(place), device="cpu"), adapter_name=adapter)


# ---------------------------------------------------------------------------------------------------------
# sampling


class Completion(NamedTuple):
    ids: list  # what was sampled, the end of turn included
    logprobs: list  # of each id, under the very distribution it was drawn from; nats
    finished: bool  # the end of turn was sampled


@torch.no_grad()
def generate(model, tokenizer, prompts, *, max_new_tokens, temperature, seed, engine="batch", cache_tokens=None):
    """One completion for each prompt (lists of ids). temperature 0 is greedy.

    Sampled is exactly softmax(logits / temperature) over the tokenizer's vocabulary: no top-k, no top-p, no
    penalties, and the columns a model's head has beyond its tokenizer are masked. Draws depend on `seed` and the
    prompts alone (and on the engine). Of the log-softmax only one step's (B, V) is ever held.

    engine: "batch" samples all prompts side by side until the last has ended. "continuous" is transformers' continuous
    batching: keys and values live in pages, and a prompt starts as soon as another's end leaves room for it.
    cache_tokens: what those pages hold, but never less than one row; None: all rows at full length.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature > 0 else None,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    training = model.training
    model.eval()  # gradient checkpointing would switch the cache off
    if engine == "batch":
        rows = _batch(model, prompts, config, len(tokenizer), seed)
    else:
        rows = _continuous(model, prompts, config, len(tokenizer), seed, cache_tokens)
    model.train(training)
    completions = []
    for ids, logprobs in rows:
        finished = tokenizer.eos_token_id in ids
        length = ids.index(tokenizer.eos_token_id) + 1 if finished else len(ids)
        completions.append(Completion(ids[:length], logprobs[:length], finished))
    return completions


def _batch(model, prompts, config, vocab, seed):
    """(ids, log-probs) of every prompt's completion and whatever follows its end: model.generate on padded rows."""
    from transformers import LogitsProcessorList

    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):  # on the left, so that all rows go on at the same column
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    sampler = _Sampler(config.temperature, vocab)
    config.temperature = 1.0  # the sampler divides
    torch.manual_seed(seed)
    sequences = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
    )
    sampler.take(sequences)
    return zip(sequences[:, longest:].tolist(), torch.stack(sampler.taken, 1).tolist(), strict=True)


class _Sampler:
    """A logits processor that tempers, masks, and remembers the log-prob of each id once it has been drawn."""

    def __init__(self, temperature, vocab):
        self.temperature, self.vocab = temperature, vocab
        self.held, self.taken = None, []

    def __call__(self, ids, logits):
        if self.held is not None:
            self.take(ids)
        logits = logits.float()
        logits[:, self.vocab :] = float("-inf")
        self.held = torch.log_softmax(logits / self.temperature, -1)
        return self.held

    def take(self, ids):
        self.taken.append(self.held.gather(1, ids[:, -1:])[:, 0])


PAGE = 32  # tokens a page of the continuous engine's cache


def _continuous(model, prompts, config, vocab, seed, cache_tokens):
    """The same by continuous batching. It knows no processors of ours, so columns from vocab on are masked in the head.

    No size is taken from the memory that happens to be free, and no attention kernel from a hub.
    """
    from transformers import ContinuousBatchingConfig

    pages = [-(-(len(prompt) + config.max_new_tokens) // PAGE) for prompt in prompts]
    room = sum(pages) if cache_tokens is None else min(sum(pages), max(cache_tokens // PAGE, *pages))
    options = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=room, max_batch_tokens=max(2048, len(prompts)), allow_block_sharing=False,
        return_logprobs=True, use_cuda_graph=False, use_async_batching=False, auto_switch_to_flash=False,
        safety_margin=0.0 if room == sum(pages) else None)  # the last rows need not wait where all have room
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters are in its layers
    with _paged(model), _masked(model.get_output_embeddings(), vocab):
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=options)
        try:
            manager.warmup()  # makes the pages, and seeds random numbers by the rank: ours go by `seed` alone
        except MemoryError as error:  # its own reckoning, before anything is made
            raise ValueError(f"--engine continuous would run out of memory with pages for {room * PAGE:,} tokens "
                             f"({error}). Pass a lower --cache-tokens, now {cache_tokens}.") from None
        torch.manual_seed(seed)
        names, done = manager.add_requests(prompts), {}  # all before the start, or their order would be a race's
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # it has a stream of its own, which knows of no optimizer step
        try:
            manager.start()
            while len(done) < len(prompts):
                output = manager.get_result(timeout=1)
                if output is None and manager.is_running():
                    continue
                if output is None or output.error:
                    raise RuntimeError(f"continuous batching stopped: {output and output.error}")
                done[output.request_id] = output
        finally:
            manager.stop(hard_stop=True)
    return [(done[name].generated_tokens, done[name].logprobs) for name in names]


@contextmanager
def _masked(head, vocab):
    """Inside, the head's columns from vocab on are -inf."""

    def mask(module, inputs, logits):
        logits[..., vocab:] = float("-inf")

    hook = head.register_forward_hook(mask)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _paged(model):
    """Inside, a model with torch's attention has one for pages, without transformers' mask of queries x cache."""
    from transformers import AttentionInterface

    before = model.config._attn_implementation
    AttentionInterface.register("paged_flash", _paged_attention)  # "flash" in a name is what no mask is made for
    if before != "eager":
        model.config._attn_implementation = "paged_flash"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _paged_attention(module, query, key, value, attention_mask, **options):
    """Attention of rows end to end, (1, heads, T, D), to what the cache holds of each and to themselves."""
    key, value = options["cache"].update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=options)
    bounds, bounds_k, scale = options["cu_seq_lens_q"], options["cu_seq_lens_k"], options["scaling"]
    window = options.get("sliding_window") or 0
    flash = query.is_cuda and query.itemsize == 2 and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if flash and query.shape[3] == value.shape[3] <= 256 and query.shape[3] % 8 == 0:
        from torch.nn.attention.varlen import varlen_attn

        longest, longest_k = options["max_length_q"], options["max_length_k"]
        ahead = 0 if longest > 1 else -1  # one query a row has nothing ahead: unmasked, heads that share a key are one
        fewer = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        out = varlen_attn(*(x[0].transpose(0, 1) for x in (query, key, value)), bounds.int(), bounds_k.int(),
                          longest, longest_k, scale=scale, window_size=(window - 1, ahead), **fewer)
        return out[None], None
    if query.is_cuda:  # else SDPA's kernel for shared heads would be the one that holds all scores
        from transformers.integrations.sdpa_attention import repeat_kv

        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    lengths, lengths_k = bounds.diff().tolist(), bounds_k.diff().tolist()
    out = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths_k, 2), value.split(lengths_k, 2), strict=True):
        before = k.shape[2] - q.shape[2]  # keys ahead of the first query's own
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        mask = mask.triu(before - window + 1) if window else mask
        out.append(torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, scale=scale, enable_gqa=not query.is_cuda))
    return torch.cat(out, 2).transpose(1, 2), None
