# SPDX-License-Identifier: MIT
"""
LoRA adapters: which layers a new one is put on, which existing ones can be trained, and no dropout in RL.
"""

import re

from rlt.errors import UserError

import torch

from rewards import decoder

LORA_DEFAULTS = {"rank": 16, "alpha": 32, "targets": "all-linear"}  # of a new adapter
DROPOUT = torch.nn.modules.dropout._DropoutNd  # the class of all dropout layers


def new_lora_config(base, rank=None, alpha=None, targets=None):
    """The peft config of a new adapter, LORA_DEFAULTS where None. Raises UserError for layers that base does not have.

    "all-linear" are the linear layers of the text model but for its head, and but for those that an adapter does not
    fit: routers that are a class of their own, and layers whose weights a state-space kernel reads by itself.
    """
    from peft import LoraConfig

    asked = {"rank": rank, "alpha": alpha, "targets": targets}
    lora = LORA_DEFAULTS | {key: value for key, value in asked.items() if value is not None}
    names = lora["targets"]
    if names != "all-linear":
        names, known = _split_names(names), {path.rpartition(".")[2] for path in _linear_layers(base)[0]}
        if not known.issuperset(names):
            raise UserError(f"--lora-targets {lora['targets']}: expected all-linear, or some of "
                            f"{', '.join(sorted(known))}.")
    return LoraConfig(r=lora["rank"], lora_alpha=lora["alpha"], target_modules=names, task_type="CAUSAL_LM",
                      exclude_modules=excluded_layers(base))


def excluded_layers(base):
    """A regular expression of the layers that no new adapter is put on; None for most models."""
    patterns = sorted({re.sub(r"\d+", r"\\d+", re.escape(path)) for path in _linear_layers(base)[1]})
    return "|".join(patterns) or None


def _linear_layers(base):
    """(paths of linear layers that can have an adapter, paths of those that can't), without the head."""
    from transformers.pytorch_utils import Conv1D

    text, head = decoder(base), base.get_output_embeddings()
    in_text = {id(module) for module in text.modules()}
    layers, excluded = [], []
    for path, module in base.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            parent, _, name = path.rpartition(".")
            mixer = base.get_submodule(parent)
            of_kernel = hasattr(mixer, "A_log") and hasattr(mixer, "D") and name in ("out_proj", "dt_proj")
            own_class = type(module).__module__.startswith("transformers.models.")  # may return more than a tensor
            (layers if id(module) in in_text and not of_kernel and not own_class else excluded).append(path)
    return layers, excluded


def check_adapter(name, config, base, rank, alpha, targets):
    """Raise UserError for an adapter that can't be trained, or that the flags contradict."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UserError(f"{name} holds an adapter of type {kind}, expected LORA: start from its base instead.")
    if config.bias != "none":
        raise UserError(f"the adapter of {name} trains biases of its base (bias={config.bias!r}), which no second "
                        "adapter can have: expected bias='none'.")
    own = {"rank": config.r, "alpha": config.lora_alpha, "targets": config.target_modules}
    if targets and not isinstance(own["targets"], str):
        names = _split_names(targets)
        if targets == "all-linear":
            names = {path.rpartition(".")[2] for path in _linear_layers(base)[0]}
        targets, own["targets"] = ",".join(sorted(names)), ",".join(sorted(own["targets"]))
    for key, asked in (("rank", rank), ("alpha", alpha), ("targets", targets)):
        if asked is not None and asked != own[key]:
            raise UserError(f"{name} holds an adapter with {key} {own[key]}: leave --lora-{key} out.")


def _split_names(targets):
    return [target.strip() for target in targets.split(",")]


@torch.no_grad()
def disable_dropout(model, name):
    """Set every rate of dropout and router noise to 0. Raises UserError where training draws random numbers even so."""
    base, found = model.get_base_model(), False
    for part in (*model.modules(), base.config, base.config.get_text_config()):
        for key, rate in list(vars(part).items()):
            is_rate = re.search("drop|jitter", key) or isinstance(part, DROPOUT) and key == "p"
            if is_rate and isinstance(rate, float) and rate > 0:
                setattr(part, key, 0.0)
                found = True
    if found:
        print(f"{name}: dropout is off, so that the policy that is trained is the one that sampled")
    model.train()
    before = _random_states()
    decoder(base)(input_ids=torch.zeros(1, 8, dtype=torch.long, device=base.device), use_cache=False)
    drawn = any(not torch.equal(*pair) for pair in zip(before, _random_states(), strict=True))
    model.eval()
    if drawn:
        raise UserError(f"{name} draws random numbers when it trains (a dropout or noise that is not known here): what "
                        "is trained would not be the policy that sampled. Use another model.")


def _random_states():
    """The states of torch's generators on the CPU and on all GPUs."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
