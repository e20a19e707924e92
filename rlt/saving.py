# SPDX-License-Identifier: MIT
"""Models and optimizers: saved, restored, and told apart by hashes of their weights."""

import hashlib
from pathlib import Path

from rlt.chat_template import turn_ends
from rlt.errors import UserError
from rlt.lora import adapter_parameters
from rlt.models import user_errors

import torch


def fingerprint(model):
    """A hash of the base's weights: some numbers of every tensor, evenly spaced, its name, shape and type."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not {"default", "reference"} & set(name.split(".")):
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            sample = p.detach().flatten()[:: max(1, p.numel() // 64)]
            digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter_hash(model):
    """A hash of all numbers of the adapter "default"; the same for all models without one."""
    digest = hashlib.sha256()
    if hasattr(model, "peft_config"):
        for p in adapter_parameters(model):
            digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(model, tokenizer, folder, adapters=("default",)):
    """A Hugging Face folder, or for a model with adapters a peft folder (a second adapter goes into a subfolder).

    Raises UserError where a weight is NaN or infinite: nothing is written then.
    """
    parameters = model.parameters()
    if hasattr(model, "peft_config"):
        parameters = [p for adapter in adapters for p in adapter_parameters(model, adapter)]
    if not all(p.isfinite().all() for p in parameters):
        raise UserError(f"{Path(folder).with_suffix('')} is not written: weights have become NaN or infinite. Go on "
                        "from the last checkpoint with a lower --lr, in a copy of the run.")
    if hasattr(model, "peft_config"):
        # the base's embeddings are never part of it; peft would ask the hub whether they could be
        model.save_pretrained(folder, selected_adapters=list(adapters), save_embedding_layers=False)
    else:
        model.generation_config.eos_token_id = list(turn_ends(tokenizer))
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore(model, folder):
    """Read the weights that save_model wrote into this folder back into the model, bit for bit."""
    with user_errors(f"the checkpoint {folder} can't be read, delete it to go on from the one before"):
        if not hasattr(model, "peft_config"):  # by from_pretrained, which knows sharded folders and renamed weights
            saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
            model.load_state_dict(saved.state_dict())
            return
        from peft import load_peft_weights, set_peft_model_state_dict

        for adapter in model.peft_config:
            path = Path(folder) if adapter == "default" else Path(folder) / adapter
            weights = load_peft_weights(str(path), device="cpu")
            missing = set_peft_model_state_dict(model, weights, adapter_name=adapter).missing_keys
            if missing := [name for name in missing if adapter in name.split(".")]:
                raise UserError(f"the checkpoint {folder} lacks {len(missing)} weights of the adapter {adapter}, "
                                f"{missing[0]} for one: delete it to go on from the one before.")


def restore_optimizer(optimizer, folder, file="optimizer.pt"):
    """Read the state that a checkpoint holds back into the optimizer."""
    with user_errors(f"the checkpoint {folder} can't be read, delete it to go on from the one before: {file}"):
        state = torch.load(Path(folder) / file, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
