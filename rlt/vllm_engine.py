# SPDX-License-Identifier: MIT
"""
Sampling with vLLM in this process: the base is loaded once, and a LoRA adapter is swapped after every update.

vLLM is optional (requirements-vllm.txt). Nothing here imports it before an engine is made.
"""

import logging
import os
import random
import tempfile
import warnings
from contextlib import contextmanager
from typing import get_args

from rlt.chat_template import vocabulary_size
from rlt.errors import UserError
from rlt.rollout import Completion
from rlt.steps import seed_for

import torch

INSTALL = 'pip install "vllm==0.32.*" on a GPU, the lines of requirements-vllm.txt on a CPU'
MEMORY_SHARE = 0.4  # of a GPU, for vLLM's copy of the base and its cache: the trainer needs the rest
PREFILL_TOKENS = 8192  # of all prompts that a CPU reads in one engine step


class VLLMEngine:
    """
    vLLM with one base model and at most one LoRA adapter at a time, in this process.

    Sampled is exactly softmax(logits / temperature) over the tokenizer's vocabulary: no top-k, no top-p, no
    penalties, no defaults of the model's generation_config.json, and no column that the head has beyond the
    tokenizer. The adapter is never merged: load_adapter saves it to a folder of its own, and vLLM reads it there
    under a number that it has not seen before.

    Under torchrun every rank makes an engine of its own on its own device, all at the same time, after
    torch.distributed.init_process_group: vLLM adds groups of one rank each to the default group. Without torchrun
    vLLM makes a default group of one rank itself, so a script must not make another one. Make one engine in a
    process, and keep it.
    """

    def __init__(self, base_folder, tokenizer, *, bits, device, max_model_len, stop_ids, lora_rank=None,
                 gpu_memory_utilization=MEMORY_SHARE, load_format="auto", seed=0):
        """
        base_folder: a Hugging Face folder with full-precision weights, not an adapter's.
        tokenizer: its length is the vocabulary that is sampled from.
        bits: 32 (float32) or 16 (bfloat16), of weights, activations and cache.
        device: torch.device, of the type that the installed vLLM is built for.
        max_model_len: tokens, the longest prompt and its completion together.
        stop_ids: token ids that end a completion. No other token does.
        lora_rank: of the adapters to come; rounded up to one that vLLM accepts. None: no adapters.
        gpu_memory_utilization: share of the device's memory for weights and cache. On a CPU the cache has
            VLLM_CPU_KVCACHE_SPACE GiB, 1 where that is not set.
        load_format: "auto" reads the folder's weights. "dummy" makes random ones, and config.json is all that it reads.
        seed: vLLM's own; draws go by the seeds that sample gets.

        Raises UserError, in one line: vLLM is missing or broken, was built for another device, does not take the
        rank, or can't load the model.
        """
        if bits not in (16, 32):
            raise UserError(f"vLLM samples from a base of 16 or 32 bits, and {bits} were asked for: the policy that is "
                            "trained would be another one. Pass 16, or --engine transformers.")
        vllm = _import_vllm(device)
        options = _lora_options(lora_rank) | _device_options(device, max_model_len)
        self.vocab, self.max_model_len, self.stop_ids = vocabulary_size(tokenizer), max_model_len, list(stop_ids)
        group_exists = torch.distributed.is_initialized()
        with _process_state_restored(device):
            try:
                self.llm = vllm.LLM(
                    str(base_folder),
                    dtype="float32" if bits == 32 else "bfloat16",
                    max_model_len=max_model_len,
                    gpu_memory_utilization=gpu_memory_utilization,
                    load_format=load_format,
                    seed=seed,
                    logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
                    generation_config="vllm",  # a checkpoint's own top-p or repetition penalty must not leak in
                    skip_tokenizer_init=True,
                    use_tqdm_on_load=False,
                    **options,
                )
            except ValueError as error:
                raise UserError(f"vLLM can't load {base_folder}: {_one_line(error)}") from None
            self.llm.apply_model(self._mask_padding)
        if group_exists:
            # vLLM's finalizer destroys its own groups and the default group, at exit or when the engine is freed.
            # The default group is the script's, and destroying that one destroys all.
            self.llm.llm_engine.engine_core._finalizer.detach()
        self.device, self.lora_rank = device, lora_rank
        self.request, self.folder, self.number = None, None, 0

    def _mask_padding(self, model):
        """Have the model's logits (tokens, columns) be -inf in the columns beyond the tokenizer."""
        compute_logits = model.compute_logits

        def compute_masked_logits(*args, **kwargs):
            logits = compute_logits(*args, **kwargs)
            logits[..., self.vocab :] = float("-inf")
            return logits

        model.compute_logits = compute_masked_logits

    def load_adapter(self, model):
        """Sample from now on with the adapter "default" of this peft model, as it is now. Raises UserError."""
        before, self.folder = self.folder, tempfile.TemporaryDirectory(prefix="rlt-adapter-")
        model.save_pretrained(self.folder.name, selected_adapters=["default"], save_embedding_layers=False)
        self.load_adapter_folder(self.folder.name)
        if before is not None:
            before.cleanup()

    def load_adapter_folder(self, folder):
        """Sample from now on with the adapter in this folder; None: with the base alone.

        Raises UserError if the engine was made without lora_rank, or vLLM can't read the adapter.
        """
        from vllm.lora.request import LoRARequest

        if folder is None:
            self.request = None
            return
        if self.lora_rank is None:
            raise UserError("this engine was made without adapters: expected a lora_rank.")
        self.number += 1
        # vLLM's prefix cache goes by the name, its adapter cache by the number: both must be new
        self.request = LoRARequest(f"adapter-{self.number}", self.number, folder)
        try:
            self.llm.llm_engine.add_lora(self.request)
        except ValueError as error:
            raise UserError(f"vLLM can't load the adapter in {folder}: {_one_line(error)}") from None

    def generate(self, prompts, *, max_new_tokens, temperature, key, first=0):
        """One completion for each prompt, in their order; the draws of prompt i are keyed by (*key, first, i)."""
        seeds = [seed_for(*key, first, i) for i in range(len(prompts))]
        return self.sample(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)

    def sample(self, prompts, *, max_new_tokens, temperature, seeds):
        """
        One completion for each prompt, in their order.

        prompts: lists of token ids. seeds: a number in [0, 2**63) for each prompt; a draw depends on the seed and the
        prompt alone, up to the rounding of the batch it is computed in. temperature: 0 is greedy, and its log-probs
        are those of temperature 1.

        Hand over all prompts of a step in one call: vLLM schedules them, and prompts that are equal share their
        prefill. Raises UserError for a prompt that is too long, and for temperatures that vLLM would change.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        longest = max(map(len, prompts), default=0)
        if longest + max_new_tokens > self.max_model_len:
            raise UserError(f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the engine's "
                             f"{self.max_model_len}: lower max_new_tokens, or make the engine with more.")
        if 0 < temperature < 0.01:
            raise UserError(f"temperature {temperature}: vLLM samples with 0 (greedy), or with 0.01 and more.")
        self.llm.reset_prefix_cache()  # what is cached changes the rounding: a resumed run must find the same
        params = [
            SamplingParams(temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_new_tokens, seed=seed,
                           logprobs=0, stop_token_ids=self.stop_ids, ignore_eos=True, detokenize=False)
            for seed in seeds
        ]
        with _process_state_restored(self.device):
            outputs = self.llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params,
                                        lora_request=self.request, use_tqdm=False)
        completions = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            logprobs = [step[token].logprob for token, step in zip(ids, output.outputs[0].logprobs, strict=True)]
            completions.append(Completion(ids, logprobs, ids[-1] in self.stop_ids))
        return completions


def _import_vllm(device):
    """The module vllm, set up for an engine in this process and on this device."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the engine is another process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        logging.getLogger("vllm").setLevel(logging.ERROR)  # what it logs before it has read that
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            import vllm
            from vllm.platforms import current_platform
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
        raise UserError(f"vLLM can't be imported ({_one_line(error)}). Install it: {INSTALL}.") from None
    if device.type != current_platform.device_type:
        raise UserError(f"the installed vLLM runs on {current_platform.device_type}, asked for was {device}.")
    return vllm


def _lora_options(rank):
    """vLLM's options for one adapter of at most this rank."""
    if rank is None:
        return {}
    from vllm.config.lora import MaxLoRARanks

    accepted = [known for known in sorted(get_args(MaxLoRARanks)) if known >= rank]
    if not accepted:
        raise UserError(f"a LoRA rank of {rank}: vLLM takes at most {max(get_args(MaxLoRARanks))}.")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": accepted[0]}


def _device_options(device, max_model_len):
    """vLLM's options for this device, and for ranks that torchrun has started."""
    options = {}
    if device.type == "cpu":
        # A prompt whose prefill is split has its generator rewound, which a CPU's generator can't do.
        options = {"enforce_eager": True, "enable_chunked_prefill": False,
                   "max_num_batched_tokens": max(PREFILL_TOKENS, max_model_len)}
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return options | {"distributed_executor_backend": "external_launcher"}  # it goes by RANK and LOCAL_RANK
    return options | ({"device_ids": [device.index]} if device.index else {})


@contextmanager
def _process_state_restored(device):
    """Inside, vLLM may change what belongs to the whole process; afterwards that is as it was.

    vLLM seeds all random numbers and draws from them, writes to the environment (LD_PRELOAD, LOCAL_WORLD_SIZE), and on
    a CPU replaces torch.set_num_threads by a function that does nothing.
    """
    import numpy

    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])
            torch.set_num_threads = set_num_threads
            for name in [name for name in os.environ if not name.startswith("VLLM_")]:
                if name in environment:
                    os.environ[name] = environment[name]
                else:
                    del os.environ[name]


def _one_line(error):
    """What an error says, without the lists and hints that vLLM and pydantic append."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("Value error, ")), lines[0] if lines else repr(error))
    reason = reason.removeprefix("Value error, ").partition(" [type=")[0]
    return reason.partition(". ")[0][:200]
