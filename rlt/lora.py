# SPDX-License-Identifier: MIT
"""
LoRA adapters: which layers a new one is put on, which existing ones can be trained, the policy's and its reference.
"""

import copy
import re
from contextlib import contextmanager

from rlt.errors import UserError

import torch

from rewards import decoder

LORA_DEFAULTS = {"rank": 16, "alpha": 32, "targets": "all-linear"}  # of a new adapter
DROPOUT = torch.nn.modules.dropout._DropoutNd  # the class of all dropout layers


# ---------------------------------------------------------------------------------------------------------
# new adapters, and other people's


def new_lora_config(base, rank=None, alpha=None, targets=None):
    """The peft config of a new adapter, LORA_DEFAULTS where None. Raises UserError for layers that base does not have.

    "all-linear" are the linear layers of the text model except its head, and except those that an adapter does not
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
            fits = id(module) in in_text and not of_kernel and _is_linear(module)
            (layers if fits else excluded).append(path)
    return layers, excluded


@torch.no_grad()
def _is_linear(module):
    """Whether a layer does what its class says. Some models derive a router from it, which returns a tuple."""
    if not type(module).__module__.startswith("transformers.models."):
        return True
    try:
        return module(module.weight[:1, :]).shape == (1, len(module.weight))
    except Exception:
        return False


def check_adapter(name, config, base, rank, alpha, targets):
    """Raise UserError for an adapter that can't be trained, or that the flags contradict."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UserError(f"{name} holds an adapter of type {kind}, expected LORA: start from its base instead.")
    if config.bias != "none":
        raise UserError(f"the adapter of {name} trains biases of its base (bias={config.bias!r}), which no second "
                        "adapter can have: expected bias='none'.")
    for key, own, asked in (("rank", config.r, rank), ("alpha", config.lora_alpha, alpha)):
        if asked not in (None, own):
            raise UserError(f"{name} holds an adapter with {key} {own}: leave --lora-{key} out.")
    if targets is not None:
        asked = _linear_layers(base)[0] if targets == "all-linear" else _split_names(targets)
        layers, wanted = (_matching(base, these) for these in (config.target_modules, asked))
        if layers != wanted:
            names = ",".join(sorted({path.rpartition(".")[2] for path in layers}))
            raise UserError(f"{name} holds an adapter with targets {names}: leave --lora-targets out.")


def highest_rank(config):
    """Of all layers that an adapter is on, for vLLM: some can have ranks of their own. Raises UserError for an adapter
    without a rank, whose base vLLM would sample."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise UserError(f"vLLM applies no adapter of type {kind}, expected LORA: pass --engine transformers.")
    return max([config.r, *config.rank_pattern.values()])


def _matching(base, targets):
    """Paths of the modules that peft takes targets for: a regular expression of paths, or ends of paths."""
    paths = {path for path, _ in base.named_modules()}
    if isinstance(targets, str):
        return {path for path in paths if re.fullmatch(targets, path)}
    return {path for path in paths if any(f".{path}".endswith(f".{target}") for target in targets)}


def _split_names(targets):
    return [target.strip() for target in targets.split(",")]


# ---------------------------------------------------------------------------------------------------------
# weights in float32, products in the type of the base


class _AdapterMatrix(torch.nn.Linear):
    """A layer whose weight is float32 and whose product has the type of its input, as under torch.autocast."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)


def compute_in_input_type(model):
    """Have the adapters of a bfloat16 base multiply in bfloat16; weights, gradients and optimizer stay float32.

    peft would copy each layer's input to float32 and keep the copy for the backward pass. torch.autocast around the
    model would round layers that models keep in float32, such as routers. DoRA, whose norms need float32, stays so.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not layer.lora_variant:
            layer.cast_input_dtype_enabled = False  # peft's, as its helper disable_input_dtype_casting sets it
            for matrices in (layer.lora_A, layer.lora_B):
                for name, matrix in list(matrices.items()):
                    if type(matrix) is torch.nn.Linear:
                        matrices[name] = _AdapterMatrix(matrix)


# ---------------------------------------------------------------------------------------------------------
# the policy "default" and its "reference"


def adapter_parameters(model, adapter="default"):
    """Every tensor of an adapter: LoRA matrices, and full copies of modules that it trains (modules_to_save)."""
    return [p for name, p in model.named_parameters() if adapter in name.split(".")]


def adapter_pairs(model):
    """(policy, reference) tensors of the two adapters, in one order."""
    return list(zip(adapter_parameters(model), adapter_parameters(model, "reference"), strict=True))


def set_trainable(model):
    """Activate the adapter "default" and let gradients reach it alone."""
    model.set_adapter("default")
    model.requires_grad_(False)
    for parameter in adapter_parameters(model):
        parameter.requires_grad_(True)
    return model


@contextmanager
def use_adapter(model, adapter):
    """`with use_adapter(model, "reference"):` inside, that adapter is active, without gradients."""
    model.set_adapter(adapter)
    try:
        with torch.no_grad():
            yield model
    finally:
        set_trainable(model)


@torch.no_grad()
def sync_reference(model, mix):
    """reference <- mix * policy + (1 - mix) * reference, for A and for B (TR-DPO, as in the released recipe).

    With A' = A + dA and B' = B + dB the policy's, the product misses the average of the two products by exactly
    mix (1 - mix) dB dA times the adapter's scale.
    """
    for policy, reference in adapter_pairs(model):
        reference.lerp_(policy, mix)


def without_adapter(model):
    """The base of a model with adapters, as a frozen model of its own: its modules are copies, its weights are not.

    So it must stay on the device that it is on. A model without adapters is its own base.
    """
    from peft.utils import ModulesToSaveWrapper

    if not hasattr(model, "peft_config"):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for path, module in list(twin.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # a whole layer that the adapter trains, which unload would keep
            twin.set_submodule(path, module.original_module)
    base = twin.unload()
    base.gradient_checkpointing_disable()
    return base.eval()


def check_can_be_read_back(model, name):
    """Raise UserError unless peft finds the adapter's weights again under the names that it saves them by: for some
    models transformers renames them on the way, and a run's result would be lost. The weights stay as they are."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = [key for key in set_peft_model_state_dict(model, state).missing_keys if "default" in key.split(".")]
    if lost:
        raise UserError(f"an adapter of {name} could be saved and not be read back: transformers renames {lost[0]}. "
                        "Use another model, or --lora-targets without that layer.")


# ---------------------------------------------------------------------------------------------------------
# no dropout in RL


def update_mode(model):
    """Eval mode, except for the layers that recompute their activations in the backward pass, which transformers does
    in train mode only: dropout, router noise and what else training adds would not be the policy that sampled."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def disable_dropout(model, name):
    """Set every rate of dropout to 0: layers that recompute their activations are in train mode.

    Raises UserError where the model computes something else then than in eval mode: what is trained would not be the
    policy that sampled.
    """
    base, found = model.get_base_model(), False
    states = [_states(model.eval())]
    for part in (*model.modules(), base.config, base.config.get_text_config()):
        for key, rate in list(vars(part).items()):
            is_rate = re.search("dropout|layerdrop|drop_path", key) or isinstance(part, DROPOUT) and key == "p"
            if is_rate and isinstance(rate, float) and rate > 0:
                setattr(part, key, 0.0)
                found = True
    if found:
        print(f"{name}: dropout is off, so that the policy that is trained is the one that sampled")
    update_mode(model)
    states.append(_states(model))
    model.eval()
    tolerance = 0.1 if base.get_output_embeddings().weight.itemsize == 2 else 1e-3
    if not (states[0] - states[1]).norm() <= tolerance * states[0].norm():
        raise UserError(f"{name} computes something else when it trains with --gradient-checkpointing (a dropout or "
                        "noise that is not known here): leave the flag out, or use another model.")


@torch.no_grad()
def _states(model):
    """The hidden states of a few tokens, (8, H). The random numbers that follow are as before."""
    base = model.get_base_model()
    ids = torch.arange(8, device=base.device)[None] % len(base.get_input_embeddings().weight)
    with torch.random.fork_rng():
        return decoder(base)(input_ids=ids, use_cache=False).last_hidden_state[0].float()
