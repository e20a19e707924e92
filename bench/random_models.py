# SPDX-License-Identifier: MIT
"""Models with random weights, made on the device: nothing is downloaded, and no model in 16 bits exists at 4 bits."""

import gc
import sys
from unittest import mock

from rlt import lora, models

import torch
from measure import DEVICE, DTYPE, ROOT

RANK, ALPHA = 32, 64


def random_model(config, bits):
    """A frozen Qwen2, made layer by layer."""
    from transformers import GenerationConfig, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(DTYPE)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(DEVICE)
    for path, module in list(model.named_modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            weight = torch.ones(p.shape, dtype=DTYPE, device=DEVICE)
            weight = weight if p.dim() == 1 else weight.normal_(0, 0.02)
            module.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
        if bits == 4 and type(module) is torch.nn.Linear and module is not model.lm_head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, four_bit_linear(module))
    model.tie_weights()
    model.is_loaded_in_4bit = bits == 4  # peft looks here
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)


def four_bit_linear(linear):
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None,
                           compute_dtype=linear.weight.dtype, quant_type="nf4")
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4",
                              module=layer).to(linear.weight.device)
    layer.bias = linear.bias
    return layer


def make_teacher(config, bits):
    """(the teacher, by the loader of the scripts but with random weights; its AdamW, whose states exist)."""
    with mock.patch.object(models, "_load_base", lambda name, bits, device: random_model(config, bits)):
        teacher = models.load_lora(str(ROOT / "bench"), bits=bits, device=DEVICE, rank=RANK, alpha=ALPHA, seed=0,
                                   reference=True, checkpointing=True)
    parameters = lora.adapter_parameters(teacher)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return teacher.eval(), optimizer


def save_folders(config, bits, folder):
    """Write config.json, and an adapter of random weights into a folder below, whose path is returned."""
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    teacher, _ = make_teacher(config, bits)
    teacher.save_pretrained(f"{folder}/adapter", selected_adapters=["default"], save_embedding_layers=False)
    del teacher
    gc.collect()
    torch.cuda.empty_cache()
    return f"{folder}/adapter"


def can_quantise():
    """Whether bitsandbytes is installed."""
    try:
        models._four_bits(DEVICE)
    except ImportError as error:
        print(f"4 bits are not measured: bitsandbytes is not importable ({error})", file=sys.stderr)
        return False
    return True
