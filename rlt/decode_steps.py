# SPDX-License-Identifier: MIT
"""
Decode steps: each gives all rows of a batch one token.

transformers' generate copies its cache at every step, and a key once for each head that reads it. Here the cache has
room for some more tokens than it holds, is extended a block at a time, and heads read the keys that they share.

Since the cache has room, a step reads and writes the same addresses every time, and on a CUDA GPU it is a CUDA graph: a
step is two thousand small kernels, which Python takes 80 to 150 ms to launch and an H100 a fraction of it to run. A
graph launches them all at once.
"""

import contextlib
import weakref

from rlt.console import show_activity

import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rewards import KNOWN_OPTIONS, causal_lm, decoder, equal_but_for_rounding

BLOCK = 256  # columns that a cache is extended by at most; attention reads those that are not used yet, too
ALIGNED = 16  # columns of a cache are a multiple of it, for fused attention
FEWEST_STEPS = 8  # for fewer neither these steps nor a graph are worth it: it takes as long to make as two steps
_SUITS = weakref.WeakKeyDictionary()  # model: whether `suits`


class DecodeSteps:
    """The decode steps of one batch: call it with the last token of each row, once for each token to sample.

    cache: DynamicCache of all tokens but the last, (B, heads, T - 1, D) each layer; it is used up. mask (B, T): 1 for
    tokens, 0 for padding on the left. steps: how many there will be at most. capture: whether a step on a CUDA GPU
    becomes a graph.
    """

    def __init__(self, model, cache, mask, *, steps, capture=True):
        self.model, self.capture = causal_lm(model), capture and mask.is_cuda
        self.read, self.last = mask.shape[1] - 1, mask.shape[1] - 1 + steps  # columns read, and in the end
        device = mask.device
        self.ids = mask.new_zeros((len(mask), 1), dtype=torch.long)
        self.positions = mask.sum(1, keepdim=True) - 1  # (B, 1), of the token that is read next
        self.column = torch.tensor([self.read], device=device)
        dtype = cache.layers[0].keys.dtype
        self.bias = torch.zeros(mask[:, None, None, :-1].shape, dtype=dtype, device=device)  # (B, 1, 1, columns)
        self.bias.masked_fill_(mask[:, None, None, :-1] == 0, torch.finfo(dtype).min)
        self.cache = DynamicCache()
        self.cache.layers = [_FixedLayer(layer.keys, layer.values, self.column) for layer in cache.layers]
        cache.layers.clear()  # so that `make_room` frees each layer's tensors when it has copied them
        self.graph = self.logits = None

    def __call__(self, ids):
        """Logits (B, V) after these tokens (B, 1). They are overwritten by the next call."""
        if self.read == self.bias.shape[3]:
            self.make_room()
        self.ids.copy_(ids)
        self.read += 1
        if self.graph:
            self.graph.replay()
            return self.logits
        logits = self._step()
        left = min(self.bias.shape[3], self.last) - self.read
        if self.capture and left >= FEWEST_STEPS:
            self._capture()
        return logits

    @property
    def may_drop(self):
        """Whether `keep` costs no graph: there is none, or the next step makes another."""
        return self.graph is None or self.read == self.bias.shape[3]

    def keep(self, rows):
        """Go on with some rows (N,) of the batch alone."""
        self.graph = self.logits = None
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.ids, self.positions, self.bias = self.ids[rows], self.positions[rows], self.bias[rows]

    def _capture(self):
        """Make the next step a graph. Nothing is computed."""
        stream = torch.cuda.current_stream()
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.logits = self._step()
        except Exception:
            torch.cuda.set_stream(stream)  # torch leaves that of the capture
            raise

    def make_room(self):
        """Extend the cache by a block, or by what is left. The addresses change: the graph is no longer of use."""
        self.graph = self.logits = None
        columns = self.read + min(BLOCK, self.last - self.read)
        columns = -(-columns // ALIGNED) * ALIGNED - self.read
        for layer in self.cache.layers:
            layer.extend(columns)
        lowest = torch.finfo(self.bias.dtype).min
        self.bias = torch.nn.functional.pad(self.bias, (0, columns), value=lowest)

    def _step(self):
        self.bias.index_fill_(3, self.column, 0)
        with _attention_of_one_token(self.model.config.get_text_config()):
            logits = self.model(input_ids=self.ids, attention_mask=self.bias, position_ids=self.positions,
                                past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.column += 1
        self.positions += 1
        return logits


class _FixedLayer(DynamicLayer):
    """Keys and values whose addresses stay: a token's are written at `column`, a tensor, and all columns are read."""

    def __init__(self, keys, values, column):
        super().__init__()
        self.keys, self.values, self.column = keys, values, column
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, keys, values, *_, **__):
        self.keys.index_copy_(2, self.column, keys)
        self.values.index_copy_(2, self.column, values)
        return self.keys, self.values

    def extend(self, columns):
        self.keys, self.values = (torch.nn.functional.pad(x, (0, 0, 0, columns)) for x in (self.keys, self.values))


@contextlib.contextmanager
def _attention_of_one_token(config):
    """Inside it a model that has torch's sdpa, or rewards.py's packed attention, attends by `_attend`."""
    usual = config._attn_implementation
    if usual not in ("sdpa", "packed"):
        yield
        return
    config._attn_implementation = "decode"
    try:
        yield
    finally:
        config._attn_implementation = usual


@contextlib.contextmanager
def _no_waiting():
    """Inside it what waits for the GPU, or copies from the CPU, raises RuntimeError. A graph can hold neither, and a
    capture that fails leaves torch's allocator unusable."""
    if not torch.cuda.is_available():
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _attend(module, query, key, value, attention_mask, scaling=None, **options):
    """Attention of one token a row: query (B, heads, 1, D), keys (B, fewer, T, D) -> (B, 1, heads, D), None.

    Heads that share their keys are queries of the same sequence here. transformers would write the keys once for each.
    """
    if query.shape[2] > 1 or any(value is not None for name, value in options.items() if name not in KNOWN_OPTIONS):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    batch, heads, _, size = query.shape
    query = query.view(batch, key.shape[1], heads // key.shape[1], size)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[3]), None


AttentionInterface.register("decode", _attend)
AttentionMaskInterface.register("decode", sdpa_mask)


def suits(model, pad_id):
    """Whether DecodeSteps gives the logits that a model gives, on a GPU as a graph. Measured once per model; why not is
    printed."""
    key = causal_lm(model)
    if key not in _SUITS:
        try:
            reason = _difference(key, pad_id)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model of someone else does: transformers can sample from it
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        _SUITS[key] = reason is None
        if reason:
            print(f"{type(key).__name__} is sampled by transformers' generate, which is slower: {reason}")
    return _SUITS[key]


@torch.no_grad()
def _difference(model, pad_id):
    """None, or in words how the logits of the steps differ from the model's own, for two rows with padding."""
    show_activity("trying the decode steps")
    steps, vocab = FEWEST_STEPS + 4, len(model.get_input_embeddings().weight)
    ids = torch.arange(2 * (9 + steps), device=model.device).view(2, -1) % vocab
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = pad_id, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    own = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 8:-1].float()
    cache = DynamicCache(config=model.config)
    decoder(model)(input_ids=ids[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8],
                   past_key_values=cache, use_cache=True)
    decode = DecodeSteps(model, cache, mask[:, :9], steps=steps, capture=False)
    with _no_waiting():
        found = [decode(ids[:, 8:9]).float().clone()]
    decode.capture = model.device.type == "cuda"  # only now: a capture that fails leaves torch's allocator unusable
    found += [decode(ids[:, at : at + 1]).float().clone() for at in range(9, 8 + steps)]
    ours, theirs = ((x - x.mean(2, keepdim=True)).flatten(0, 1) for x in (torch.stack(found, 1), own))
    if equal_but_for_rounding(ours, theirs, 1e-2, 0.1, model.get_output_embeddings().weight.dtype):
        return None
    return f"its logits differ by up to {(ours - theirs).abs().max() / theirs.abs().max():.0%}"
