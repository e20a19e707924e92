# SPDX-License-Identifier: MIT
"""
Bytes that the passes of one model take, from its config alone.

The model, its adapter included, is built on the meta device, where a tensor has a shape and no content. Its real
forward and backward passes run there, and every storage that is made and freed is counted. So any architecture works,
and nothing here knows what a layer keeps. Written by hand are only the things that are not operations of torch: what
fused attention allocates, and the dequantised weight of a 4-bit layer.
"""

import copy
import dataclasses
import weakref
from contextlib import contextmanager
from functools import partial

from rlt.errors import UserError
from rlt.lora import LORA_DEFAULTS, adapter_parameters, compute_in_input_type, excluded_layers
from rlt.models import user_errors
from rlt.rollout import keeps_only_keys_and_values

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewards import decoder


class AllocationTracker(TorchDispatchMode):
    """Bytes of the storages that operations make while this mode is on: alive now, and the most so far.

    yes: what a meta tensor answers when the program asks for its content, as transformers asks of masks.
    """

    def __init__(self, yes=False):
        super().__init__()
        self.yes = yes
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.yes
        self.known.update(_storages((args, kwargs)))  # a new one among the inputs was made outside
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)

    def reset_peak(self):
        """The peak so far; it is counted anew from here."""
        peak, self.peak = self.peak, self.now
        return peak


def _storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


# ---------------------------------------------------------------------------------------------------------
# one model, on the meta device


class _FusedAttention(torch.autograd.Function):
    """Memory of a fused kernel: the output and a log-sum-exp; in the backward pass the gradients.

    On a GPU the gradient of the queries is summed in float32, and that of shared keys and values starts with a copy
    for each query head.
    """

    @staticmethod
    def forward(ctx, q, k, v, gpu):
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])  # (B, T, heads, D)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        ctx.gpu = gpu
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *_ = ctx.saved_tensors
        temporary = [torch.empty_like(q, dtype=torch.float32)] if ctx.gpu else []
        if ctx.gpu and k.shape != q.shape:
            temporary += [torch.empty_like(q), torch.empty_like(q)]
        return *map(torch.empty_like, (q, k, v)), None


def _attention(module, query, key, value, attention_mask, *, gpu, shared_keys=False, **_):
    """What torch's attention allocates behind transformers' interface, and the packed attention of rewards.py.

    shared_keys: heads read the keys that they share, as in DecodeSteps; else they are repeated for each head where
    there is a mask, or the kernel asks for it.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    varlen = gpu and query.itemsize == 2 and attention_mask is None
    if attention_mask is not None:
        attention_mask = attention_mask.to(query.dtype)  # alive until the kernel is done
    if not shared_keys and (attention_mask is not None or gpu and not varlen):
        key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    out = _FusedAttention.apply(query, key, value, gpu)
    return (out if varlen or attention_mask is not None else out.clone()), None  # packed sequences are concatenated


class _KeepStates(torch.autograd.Function):
    """The head's place in the graph: it keeps the hidden states for its backward pass."""

    @staticmethod
    def forward(ctx, states):
        ctx.save_for_backward(states)
        return states.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(*ctx.saved_tensors)


class _DequantisedLinear(torch.autograd.Function):
    """A linear layer whose weight exists in full only while it multiplies."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return torch.nn.functional.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.empty_like(ctx.weight), None, None


class _FourBitLinear(torch.nn.Linear):
    """In the place of a linear layer that is loaded in 4 bits."""

    def forward(self, x):
        return _DequantisedLinear.apply(x, self.weight, self.bias).clone()  # peft copies the result


def four_bit_bytes(n):
    """Bytes of n weights in nf4 with double quantisation: a scale for 64 weights, in 8 bits, and one for 256 scales."""
    blocks = -(-n // 64)
    return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


class ModelFootprint:
    """A model without its weights, and the bytes that it takes.

    config: of the base, a composite one too. bits: 4, 16 or 32, as for models.load_model. gpu: on a GPU, where 4-bit
    layers compute in bfloat16. rank: of a new adapter, 0 for none, None for the default; targets: its layers, as flags
    or peft have them: names with commas, a collection, a regular expression, all-linear. adapter: peft's config of one
    that exists, in place of a new one. trained: "adapter", "all" or None. reference: with a second adapter. Raises
    UserError for a model or an adapter that it can't build or run.

    weights, adapters, trained_bytes, saved, largest: bytes of the base as loaded, of the adapters, of what is trained,
    of a checkpoint's weights, and of the largest tensor.
    """

    def __init__(self, config, *, bits, gpu, rank=0, targets=None, adapter=None, trained=None, reference=False):
        from transformers import AutoModelForCausalLM

        self.gpu, self.adapters = gpu, 0
        dtype = torch.float32 if bits == 32 or (bits == 4 and not gpu) else torch.bfloat16
        with user_errors(f"a model of type {config.model_type} can't be built from its config"), torch.device("meta"):
            self.base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        self.base.requires_grad_(trained == "all")
        self.head = self.base.get_output_embeddings().weight
        sizes = [p.nbytes for p in self.base.parameters()]
        self.weights, self.largest = sum(sizes), max(sizes)
        if bits == 4:
            self._quantise()
        rank = LORA_DEFAULTS["rank"] if rank is None else rank
        model = self.base
        if adapter is not None:  # without what its initialisation would take out of weights, as PiSSA does
            model = self._with_adapter(dataclasses.replace(adapter, init_lora_weights=True), trained, reference)
        elif rank:
            model = self._with_adapter(self._new_adapter(rank, targets), trained, reference)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.trained_bytes = sum(p.nbytes for p in self.parameters)
        self.saved = self.adapters or self.weights
        self._count_attention()

    def _quantise(self):
        head = self.base.get_output_embeddings()
        for path, module in list(self.base.named_modules()):
            if type(module) is torch.nn.Linear and module is not head:
                self.weights += four_bit_bytes(module.weight.numel()) - module.weight.nbytes
                parent, _, name = path.rpartition(".")
                made = _FourBitLinear(module.in_features, module.out_features, module.bias is not None, device="meta",
                                      dtype=module.weight.dtype)
                setattr(self.base.get_submodule(parent), name, made.requires_grad_(False))

    def _new_adapter(self, rank, targets):
        from peft import LoraConfig

        return LoraConfig(r=rank, target_modules=target_modules(targets), task_type="CAUSAL_LM",
                          exclude_modules=excluded_layers(self.base))

    def _with_adapter(self, config, trained, reference):
        """The model with this adapter, its matrices in float32."""
        from peft import get_peft_model

        with user_errors(f"{type(self.base).__name__} can't have this adapter"), torch.device("meta"):
            model = get_peft_model(self.base, config)
        model.requires_grad_(False)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()
        for p in adapter_parameters(model):
            p.requires_grad_(trained == "adapter")
            self.adapters += p.nbytes * (2 if reference else 1)
        compute_in_input_type(model)
        return model

    def _count_attention(self):
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

        self.counted = f"counted_{'gpu' if self.gpu else 'cpu'}"
        for name, shared_keys in ((self.counted, False), (f"{self.counted}_shared_keys", True)):
            AttentionInterface.register(name, partial(_attention, gpu=self.gpu, shared_keys=shared_keys))
            AttentionMaskInterface.register(name, sdpa_mask)
        self.base.set_attn_implementation(self.counted)

    @contextmanager
    def _tracked(self, *, padded):
        """An AllocationTracker around a pass. A model that can't run without content is one line for the user."""
        try:
            with AllocationTracker(yes=not padded) as tracker:  # to "are all tokens real, is this one sequence?"
                yield tracker
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"--dry-run can't run {type(self.base).__name__} without weights ({type(error).__name__}: {reason}). "
                "A mixture-of-experts model needs 16 or 4 bits, and --lora-targets with attention layers alone. "
                "For others, start the run without --dry-run.") from error

    def _states(self, tokens):
        """The pass of rewards.py up to the head: hidden states (tokens, H) of one packed row."""
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        states = decoder(self.base)(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        return states.to(self.head.dtype).index_select(0, ids[0])

    @torch.no_grad()
    def forward_bytes(self, tokens):
        """A pass without gradients -> (bytes at its peak, bytes of the hidden states that the head needs)."""
        with self._tracked(padded=False) as tracker:
            states = self._states(tokens)
            kept = tracker.now
            del states
        return tracker.peak, kept

    def training_bytes(self, tokens, checkpointing):
        """A pass with gradients and its backward pass -> (bytes at the peak, bytes kept while the head computes)."""
        if checkpointing:
            with user_errors(f"--gradient-checkpointing: {type(self.base).__name__} can't"):
                self.base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        self.base.train()
        for p in self.parameters:
            p.grad = torch.empty_like(p)
        with self._tracked(padded=False) as tracker:
            loss = _KeepStates.apply(self._states(tokens))
            kept = tracker.now
            loss.backward()
        for p in self.parameters:
            p.grad = None
        self.base.eval()
        if checkpointing:
            self.base.gradient_checkpointing_disable()
        return max(tracker.peak, 2 * self.trained_bytes), kept  # AdamW's temporaries come after the activations

    @torch.no_grad()
    def generate_bytes(self, batch, prompt, new):
        """Sampling after padded prompts -> bytes of (the full cache, the activations' peak, the peak of both together).

        batch rows, tokens of the longest prompt, new tokens of each. The last token is sampled and never read. By
        DecodeSteps, where the model keeps what they can hold, else by transformers' generate.
        """
        from rlt.decode_steps import FEWEST_STEPS

        from transformers import DynamicCache

        own_steps = new >= FEWEST_STEPS and prompt > 1 and keeps_only_keys_and_values(self.base)
        sample = self._sample_by_decode_steps if own_steps else self._sample_by_generate
        with self._tracked(padded=True) as tracker:
            try:
                return sample(tracker, DynamicCache(config=self.base.config), batch, prompt, new)
            finally:
                self.base.set_attn_implementation(self.counted)

    def _sample_by_decode_steps(self, tracker, cache, batch, prompt, new):
        from rlt.decode_steps import DecodeSteps

        self._read(cache, _ones(batch, prompt - 1), prompt - 1)
        cache_first, peak_first = tracker.now, tracker.reset_peak()
        steps = DecodeSteps(self.base, cache, _ones(batch, prompt), steps=new)
        while steps.bias.shape[3] < steps.last:
            steps.read = steps.bias.shape[3]
            steps.make_room()
        full = sum(x.nbytes for layer in steps.cache.layers for x in (layer.keys, layer.values))
        cache_before = tracker.now
        self.base.set_attn_implementation(f"{self.counted}_shared_keys")
        self._read(steps.cache, steps.bias, 1)
        return full, max(peak_first - cache_first, tracker.peak - cache_before), max(peak_first, tracker.peak)

    def _sample_by_generate(self, tracker, cache, batch, prompt, new):
        self._read(cache, _ones(batch, prompt), prompt)
        cache_first, peak_first = tracker.now, tracker.reset_peak()
        between = max(new - 2, 1)
        self._read(cache, _ones(batch, prompt + between), between)  # the cache as it is before the last step
        tracker.reset_peak()
        cache_before = tracker.now
        self._read(cache, _ones(batch, prompt + between + 1), 1)
        tensors = (x for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))
        full = sum(x.nbytes for x in tensors)
        return full, max(peak_first - cache_first, tracker.peak - cache_before), max(peak_first, tracker.peak)

    def _read(self, cache, mask, tokens):
        """Read so many tokens of each row into the cache."""
        ids = torch.empty(len(mask), tokens, dtype=torch.long, device="meta")
        decoder(self.base)(input_ids=ids, attention_mask=mask, use_cache=True, past_key_values=cache)

    def logits_bytes(self, rows, vocab):
        """A buffer of logits in rewards.py: float32, or the head's own type if that is wider."""
        return rows * -(-vocab // 16) * 16 * max(4, self.head.itemsize)


def _ones(rows, tokens):
    """A mask without padding."""
    return torch.ones(rows, tokens, dtype=torch.long, device="meta")


def target_modules(targets):
    """peft's target_modules, from a flag or an adapter's config: all-linear, a list, or a regular expression."""
    if not isinstance(targets, str | None):
        return sorted(targets)
    targets = targets or LORA_DEFAULTS["targets"]
    names = [name.strip() for name in targets.split(",")]
    is_names = all(name.replace(".", "").isidentifier() for name in names)
    return names if is_names else targets
