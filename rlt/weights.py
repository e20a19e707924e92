# SPDX-License-Identifier: MIT
"""Whether the weights of a folder are those of the model in its config: transformers draws what is missing."""

import re

from rlt.distributed import RANK
from rlt.errors import UserError

from rewards import decoder


def check_weights(folder, model, report):
    """Raise UserError where the weights are not those of the model in its config: what is missing would be random.

    report: of from_pretrained. Weights that the model has no place for are a loss where they are a layer like its own.
    Others may be more than a language model, a tower for images or layers that predict more tokens: one line says so.
    """
    refused = f"{folder} can't be loaded as a causal language model: "
    for name, saved, wanted in sorted(report["mismatched_keys"]):
        raise UserError(f"{refused}{name} has the shape {[*saved]} in its weights and {[*wanted]} by its config.json. "
                        "Copy or save both anew.")
    missing, unexpected = report["missing_keys"], report["unexpected_keys"]
    if missing and model.config.get_text_config() is not model.config:
        parts = (decoder(model), model.get_output_embeddings())
        of_text = {id(x) for part in parts for x in (*part.parameters(), *part.buffers())}
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        missing = missing & {name for name, x in named if id(x) in of_text}
    if missing:
        found = f", and have {min(unexpected)}, which is none of them" if unexpected else ""
        raise UserError(f"{refused}its weights lack {len(missing)} of those in its config.json, {min(missing)} for "
                        f"one{found}. Copy or save it anew, or use the model that it was made of.")
    if unexpected and (layer := _lost_layer(unexpected, model.state_dict())):
        raise UserError(f"{refused}by its config.json it has no layer {layer}, which is in its weights. Copy or save "
                        "both anew.")
    if unexpected and RANK == 0:
        print(f"{folder}: {len(unexpected)} of its weights are not used, {min(unexpected)} for one", flush=True)


def _lost_layer(unexpected, own):
    """The path of a layer among names of weights that all are like the model's own, but in a layer that it lacks."""
    layers = {}
    for name in sorted(unexpected):
        if match := re.match(r"(.*?\.\d+)\.(.*)", name):
            layers.setdefault(match[1], []).append(match[2])
    kinds = {_without_numbers(name) for name in own}
    for layer, names in layers.items():
        if (not any(name.startswith(f"{layer}.") for name in own)
                and kinds.issuperset(_without_numbers(f"{layer}.{name}") for name in names)):
            return layer
    return None


def _without_numbers(name):
    return re.sub(r"\d+", "0", name)
