# SPDX-License-Identifier: MIT
"""
What a run will take, before it starts: peak memory of each of its phases, from the models' configs alone.

The models are built on the meta device, where tensors have a shape and no content, with their adapters. Their real
forward and backward passes run there, and every storage that comes and goes is counted. So any architecture works,
and nothing here knows what a layer keeps. Put in by hand: what fused attention allocates, the buffer of a 4-bit layer,
the chunks of logits in rewards.py, and what transformers' generate does with a step's logits.

Not counted: the CUDA context (0.5 GB), workspaces of libraries, fragmentation, and what else runs on the card. The
verdict leaves MARGIN bytes for them.
"""

import copy
import functools
import os
import shutil
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GB, MARGIN = 1e9, 1.5e9
COLUMNS = ("weights", "adapters, AdamW", "cache", "activations", "head", "total")


class Live(TorchDispatchMode):
    """Bytes of the storages that operations under this mode have made: alive now, and at most so far."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 0  # what a mask's builder asks: meta tensors hold no numbers, and no mask is built here
        self.seen.update(_storages((args, kwargs)))  # one that is new here was made elsewhere
        out = function(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self.seen:
                self.seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, n):
        self.now += n
        self.peak = max(self.peak, self.now)

    def restart(self):
        """The peak so far; it counts anew from here."""
        peak, self.peak = self.peak, self.now
        return peak


def _storages(tree):
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class _Attention(torch.autograd.Function):
    """A fused kernel's memory: the output and a log-sum-exp, backwards the gradients. On a GPU that of the queries is
    summed in float32, and those of shared keys and values begin with a copy a query head.
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
        held = [torch.empty_like(q, dtype=torch.float32)] if ctx.gpu else []
        if ctx.gpu and k.shape != q.shape:
            held += [torch.empty_like(q), torch.empty_like(q)]
        return *map(torch.empty_like, (q, k, v)), None


def _attention(module, q, k, v, mask, *, padded, gpu, **_):
    """padded: as in generate, where a mask of the padding makes transformers repeat keys and values a query head, as
    float32 on a GPU makes rewards.py.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    masks, kernel = [], gpu and q.itemsize == 2
    if padded:
        masks += [q.new_empty(len(q), 1, q.shape[2], k.shape[2], dtype=dtype) for dtype in (torch.bool, q.dtype)]
    if padded or gpu and not kernel:
        k, v = (repeat_kv(x, q.shape[1] // x.shape[1]) for x in (k, v))
    out = _Attention.apply(q, k, v, gpu)
    return out if kernel or padded else out.clone(), None  # rewards.py puts the sequences together again


class _Head(torch.autograd.Function):
    """The head's place in the graph: the states are kept for its backward, and go with it."""

    @staticmethod
    def forward(ctx, states):
        ctx.save_for_backward(states)
        return states.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(*ctx.saved_tensors)


class _FromFourBits(torch.autograd.Function):
    """A linear layer whose weight exists in full only while it multiplies."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return torch.nn.functional.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.empty_like(ctx.weight), None, None


class _FourBits(torch.nn.Linear):
    def forward(self, x):
        return _FromFourBits.apply(x, self.weight, self.bias).clone()  # peft copies the result


class Shape:
    """A model without its weights, and the bytes that it takes.

    config: of the base. bits: 4, 16 or 32, as for models.load_model; gpu: where 4-bit layers compute in bfloat16.
    rank, targets: of its adapter, rank 0 for none. trained: "adapter", "all" or None. reference: a second adapter.
    """

    def __init__(self, config, *, bits, gpu, rank=0, targets="all-linear", trained=None, reference=False):
        from transformers import AutoModelForCausalLM

        self.gpu = gpu
        dtype = torch.float32 if bits == 32 or (bits == 4 and not gpu) else torch.bfloat16
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
        self.model.requires_grad_(trained == "all")
        self.head = self.model.get_output_embeddings().weight
        linear = [m for m in self.model.modules() if type(m) is torch.nn.Linear and m.weight is not self.head]
        sizes = [p.nbytes for p in self.model.parameters()]
        self.weights, self.largest = sum(sizes), max(sizes)
        if bits == 4:
            for module in linear:
                self.weights += four_bits(module.weight.numel()) - module.weight.nbytes
                module.__class__ = _FourBits
        self.adapters = 0
        if rank:
            from peft import LoraConfig, get_peft_model

            targets = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
            lora = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM")
            with torch.device("meta"):
                self.model = get_peft_model(self.model, lora)
            adapter = [p for name, p in self.model.named_parameters() if "lora_" in name]
            for p in adapter:
                p.data = p.data.float()
                p.requires_grad_(trained == "adapter")
            self.adapters = sum(p.nbytes for p in adapter) * (2 if reference else 1)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.nbytes for p in self.parameters)
        self.saved = self.adapters or self.weights

    def base(self, padded):
        """The Hugging Face model, adapters in its layers, attention replaced by what it allocates."""
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register("counted", functools.partial(_attention, padded=padded, gpu=self.gpu))
        AttentionMaskInterface.register("counted", lambda *_, **__: None)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        base.set_attn_implementation("counted")
        return base

    def states(self, tokens):
        """The passes of rewards.py up to the head: hidden states of one row of so many tokens."""
        base = self.base(padded=False)
        ids = torch.empty(1, tokens, dtype=torch.long, device="meta")
        states = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
        return states.to(self.head.dtype).index_select(0, ids[0])

    @torch.no_grad()
    def reading(self, tokens):
        """Bytes of a pass without gradients -> (at its peak, kept for the head)."""
        with Live() as live:
            kept = self.states(tokens)  # noqa: F841
            return live.peak, live.now

    def learning(self, tokens, checkpointing):
        """Bytes of a pass with gradients and its backward -> (at the peak, kept while the head is at work)."""
        base = self.base(padded=False).train()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        for p in self.parameters:
            p.grad = torch.empty_like(p)
        with Live() as live:
            loss = _Head.apply(self.states(tokens))
            kept = live.now
            loss.backward()
        base.gradient_checkpointing_disable()
        base.eval()
        for p in self.parameters:
            p.grad = None
        return max(live.peak, 2 * self.trained), kept  # or AdamW's temporaries, by when the activations are gone

    @torch.no_grad()
    def sampling(self, batch, prompt, new):
        """Bytes of generate -> (the full cache, the activations' peak, the peak of both together)."""
        from transformers import DynamicCache

        base = self.base(padded=True)

        def read(tokens):
            ids = torch.empty(batch, tokens, dtype=torch.long, device="meta")
            return base.get_decoder()(input_ids=ids, use_cache=True, past_key_values=cache)

        cache = DynamicCache(config=base.config)
        with Live() as live:
            read(prompt)
            early, first = live.now, live.restart()
            read(max(new - 2, 1))  # the cache as it is before the last step
            before, _ = live.now, live.restart()
            read(1)
            full = sum(x.nbytes for layer in cache.layers for x in vars(layer).values() if isinstance(x, torch.Tensor))
            return full, max(first - early, live.peak - before), max(first, live.peak)

    def paging(self, batch, prompt, new, tokens):
        """Bytes of continuous batching, as `sampling`: pages made beforehand for at most so many tokens but never for
        less than a row; a pass of up to 2,048 of them, in which each layer's keys and values are copied out of them.
        """
        each = self.sampling(1, 1024, 3)[0] // 1026  # the last token is never read
        cache = each * min(max(tokens, prompt + new), batch * (prompt + new))
        activations = self.reading(max(2048, batch))[0] + cache // self.model.config.get_text_config().num_hidden_layers
        return cache, activations, cache + activations

    def logits(self, rows, vocab, itemsize):
        """Bytes of a buffer of logits in rewards.py, no narrower than the head's own."""
        return rows * -(-vocab // 16) * 16 * max(itemsize, self.head.itemsize)


def four_bits(n):
    """Bytes of n weights in nf4 with double quantisation: a scale a block of 64, in 8 bits, and one a 256 of those."""
    blocks = -(-n // 64)
    return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


def phases(learner, student=None, *, vocab, head_chunk, tokens, rollout=None, scored=False, learned=False,
           reference=False, checkpointing=False, logits_bytes=4, kl_gradient=False, parked=False, cache_tokens=None):
    """Peak bytes by phase: {phase: {column: bytes}}, the parts at their own peaks, the total at the phase's.

    tokens: of a forward pass. rollout: (batch, prompt, new) tokens, or None. cache_tokens: of continuous batching;
    None: plain. scored: a pass of the learner and of the student, where there is one. parked: the student is on the
    device only while it scores.
    """
    theirs = student.weights + student.adapters if student else 0
    table = {}

    def phase(name, transient, *, cache=0, activations=0, head=0, with_student=not parked, optimizer=2):
        weights, trained = learner.weights + theirs * with_student, learner.adapters + optimizer * learner.trained
        numbers = weights, trained, cache, activations, head, weights + trained + transient
        table[name] = dict(zip(COLUMNS, numbers, strict=True))

    block = 0 if learner.gpu else 2**20  # without Triton, rewards.py reads a block of logits at a time
    largest = max(shape.largest for shape in (learner, student) if shape)
    phase("load", largest, activations=largest, optimizer=0, with_student=True)  # a tensor on its way to its dtype
    if rollout:
        rolled = learner.paging(*rollout, cache_tokens) if cache_tokens else learner.sampling(*rollout)
        cache, activations, both = rolled
        head = rollout[0] * len(learner.head) * (learner.head.itemsize + 5 * 4)  # and five copies in float32
        phase("rollout", max(both, cache + head), cache=cache, activations=activations, head=head)
    passing, kept = learner.reading(tokens) if scored or reference else (0, 0)
    if scored:
        head, activations, both = learner.logits(head_chunk, vocab, logits_bytes) + 6 * block, passing, kept
        if student:
            their_passing, their_kept = student.reading(tokens)
            activations, both = max(passing, kept + their_passing), kept + their_kept
            head += student.logits(head_chunk, vocab, logits_bytes)
        phase("score", max(activations, both + head), activations=activations, head=head, with_student=True)
    chunk = learner.logits(head_chunk, vocab, 4)
    if reference:
        phase("reference", max(passing, kept + chunk + 4 * block), activations=passing, head=chunk + 4 * block)
    if learned:
        activations, kept = learner.learning(tokens, checkpointing)
        states = tokens * learner.head.shape[1] * learner.head.itemsize
        head = chunk + states + (head_chunk * vocab * learner.head.itemsize if learner.head.itemsize < 4 else 0)
        head = max(head, chunk + 4 * block)
        if learner.head.requires_grad:
            head += vocab * learner.head.shape[1] * 4
        if kl_gradient:  # two buffers; seven more of their size and a mask while the gradient is computed
            reading, their_kept = student.reading(tokens)
            head = 37 * chunk // 4 + states + their_kept
            activations = max(activations, kept + reading)
        phase("update", max(activations, kept + head), activations=activations, head=head, optimizer=3,
              with_student=not parked or kl_gradient)
    return table


# ---------------------------------------------------------------------------------------------------------
# --dry-run


def dry_run(args, device, learner, student=None, *, row, vocab, **parts):
    """Print what the run will take, by phase, and what to change if that is too much -> 0 if it can run, else 1.

    row: tokens of the longest one. parts: for `phases`, which takes the rest from the script's flags.
    """
    flags, problems = vars(args), []
    table = phases(
        learner, student, vocab=vocab, head_chunk=flags.get("head_chunk", 0),
        tokens=max(flags.get("micro_batch_tokens", 0), row), checkpointing=flags.get("gradient_checkpointing", False),
        logits_bytes=2 if flags.get("logits_dtype") == "bfloat16" else 4,
        kl_gradient=flags.get("kl_gradient", False), parked=flags.get("offload_student", False),
        cache_tokens=flags["cache_tokens"] if flags.get("engine") == "continuous" else None, **parts)
    print(f"{learner.trained // 4:,} trained parameters; rows of up to {row:,} tokens\n")
    print(f"{'GB':10}", *(f"{column:>{len(column) + 5}}" for column in COLUMNS))
    for phase, numbers in table.items():
        print(f"{phase:10}", *(f"{numbers[column] / GB:{len(column) + 5}.3f}" for column in COLUMNS))
    print("the total is the phase's peak: cache, activations and head need not peak together\n")

    out = folder = Path(flags.get("out") or "runs").resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        problems.append(f"{out} can't be written: {folder} is read-only. Pass another --out.")
    if "save_every" in flags:
        saves = 1 + (args.steps // args.save_every if args.save_every else 0)
        needed = saves * (learner.saved + 2 * learner.trained) + learner.saved
        free = shutil.disk_usage(folder).free
        print(f"disk: {needed / GB:.2f} GB for {saves} checkpoints and the result, {free / GB:.1f} GB free in {folder}")
        if needed > free:
            problems.append(f"the disk is too small for {saves} checkpoints: raise --save-every, or another --out.")
    worst = max(table, key=lambda phase: table[phase]["total"])
    size, where = size_of(device, args.dry_run)
    verdict = f"{table[worst]['total'] / GB:.3g} GB in {worst}, {size / GB:.3g} GB on {where}"
    if table[worst]["total"] + MARGIN > size:
        problems.append(f"does not fit: {verdict}. First: {remedy(flags, worst, table[worst], row)}")
    print("\n".join(problems) or f"fits: {verdict}")
    return 1 if problems else 0


def size_of(device, asked):
    """Bytes for the run, and a name for where they are: as asked for, or what this machine has."""
    if asked:
        return asked * GB, "the GPU asked for"
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], f"{torch.cuda.get_device_name(device)} (free now)"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def remedy(flags, phase, numbers, row):
    """The flag to change first in a phase that does not fit, with a value: it makes the largest part smaller."""
    half = lambda flag: f"--{flag.replace('_', '-')} {flags[flag] // 2}"  # noqa: E731
    batch = ("cache_tokens",) if flags.get("engine") == "continuous" else ("rollout_batch", "batch_size")
    sampling = [half(flag) for flag in batch if flags.get(flag, 1) > 1]
    shorter = [half(flag) for flag in ("max_new_tokens", "max_tokens") if flag in flags]
    passing = [half("micro_batch_tokens")] if flags.get("micro_batch_tokens", 0) >= 2 * row else shorter
    if phase == "update" and not flags.get("gradient_checkpointing"):
        passing = ["--gradient-checkpointing"]
    helps = flags.get("offload_student") is False and phase in ("rollout", "reference", "update")
    remedies = {
        "weights": [f"--{flag.replace('_', '-')} 4" for flag in ("student_bits", "teacher_bits", "bits")
                    if flags.get(flag, 4) > 4] + ["--offload-student"] * (helps and not flags.get("kl_gradient")),
        "adapters, AdamW": [half("lora_rank")] if flags.get("lora_rank", 1) > 1 else [],
        "cache": sampling + shorter,
        "activations": sampling + shorter if phase == "rollout" else passing,
        "head": sampling if phase == "rollout" else [half("head_chunk")] if flags.get("head_chunk", 1) > 1 else [],
    }
    for part in sorted(remedies, key=lambda part: -numbers[part]):
        if remedies[part] and numbers[part]:
            return remedies[part][0]
    return "a smaller model"
