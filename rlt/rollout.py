# SPDX-License-Identifier: MIT
"""
Sampling: completions of prompts, with the log-prob of each id under the very distribution it was drawn from.

What is drawn is exactly softmax(logits / temperature) over the tokenizer's vocabulary: no top-k, no top-p, no
penalties, and the columns that a model's head has beyond its tokenizer are masked.

    transformers   the model itself, some prompts at a time; nothing to install, and what the toy uses
    vllm           an engine with its own copy of the base, into which the adapter is loaded after every update
"""

import inspect
import math
import weakref
from typing import NamedTuple

from rlt.chat_template import turn_ends, vocabulary_size
from rlt.console import show_activity
from rlt.errors import UserError
from rlt.lora import highest_rank
from rlt.steps import seed_for

import torch

from rewards import causal_lm, decoder, equal_but_for_rounding, eval_mode

NOT_FINITE = "computes log-probs that are NaN or infinite: its weights are broken, or loaded in too few bits."
_CAN_BATCH = weakref.WeakKeyDictionary()  # model: whether `can_batch`


class Completion(NamedTuple):
    ids: list  # what was sampled, the end of the turn included
    logprobs: list  # of each id, nats
    finished: bool  # the end of the turn was sampled


def check_finite(name, completions):
    """Raise UserError where a log-prob of these completions is NaN or infinite. name: of the model.

    transformers' generate could not go on after sampling from a NaN on a GPU: where nothing else has looked at the
    model, begin with one greedy token.
    """
    if not all(math.isfinite(logprob) for completion in completions for logprob in completion.logprobs):
        raise UserError(f"{name} {NOT_FINITE}")


def make_engine(name, model, tokenizer, *, base, bits, device, max_tokens, batch):
    """The engine that --engine names: .generate samples, .load_adapter after every update.

    model: samples in transformers; the adapter that vLLM starts with. base: folder or hub id of its base, at `bits`.
    max_tokens: the longest prompt and its completion. batch: completions that transformers samples at the same time.
    Raises UserError where vLLM is missing or can't run the model.
    """
    if name == "transformers":
        return TransformersEngine(model, tokenizer, batch)
    from rlt.vllm_engine import VLLMEngine

    adapter = model.peft_config["default"] if hasattr(model, "peft_config") else None
    engine = VLLMEngine(base, tokenizer, bits=bits, device=device, max_model_len=max_tokens,
                        stop_ids=turn_ends(tokenizer), lora_rank=highest_rank(adapter) if adapter else None)
    if adapter:
        engine.load_adapter(model)
    return engine


class TransformersEngine:
    """Samples from the model itself, `batch` prompts at the same time."""

    def __init__(self, model, tokenizer, batch):
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    def load_adapter(self, model):
        """Nothing to do: the model that is trained is the one that samples."""

    def generate(self, prompts, *, max_new_tokens, temperature, key, first=0):
        """One completion for each prompt (lists of ids), in their order. temperature 0 is greedy.

        Draws of a batch are keyed by (*key, position of its first prompt); `first` is the first prompt's position.
        More prompts than one batch are sampled in the order of their lengths, so that less of a batch is padding.
        """
        order = range(len(prompts))
        if len(prompts) > self.batch:
            order = sorted(order, key=lambda i: len(prompts[i]))
        completions = [None] * len(prompts)
        for at in range(0, len(prompts), self.batch):
            indices = order[at : at + self.batch]
            sampled = generate(self.model, self.tokenizer, [prompts[i] for i in indices], temperature=temperature,
                               max_new_tokens=max_new_tokens, seed=seed_for(*key, first + at))
            for i, completion in zip(indices, sampled, strict=True):
                completions[i] = completion
        return completions


@torch.no_grad()
def generate(model, tokenizer, prompts, *, max_new_tokens, temperature, seed):
    """One completion for each prompt (lists of ids), from a model of transformers. temperature 0 is greedy.

    All prompts are sampled at the same time, until the last has ended. Draws depend on `seed` and the prompts alone.
    Of the log-softmax only one step's (B, V) is ever held. By rlt.decode_steps where they suit the model, else by
    transformers' generate.
    """
    from rlt.decode_steps import FEWEST_STEPS, DecodeSteps, suits

    from transformers import LogitsProcessorList

    if len(prompts) > 1 and not can_batch(model, tokenizer.pad_token_id):
        return [completion for i, prompt in enumerate(prompts) for completion in generate(
            model, tokenizer, [prompt], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed_for(seed, i))]
    ends = turn_ends(tokenizer)
    recorder = _LogprobRecorder(temperature or 1.0, vocabulary_size(tokenizer), max_new_tokens)
    ids, mask = _left_padded(prompts, tokenizer.pad_token_id)
    device = next(model.parameters()).device
    own_steps = cache = None
    with eval_mode(model):  # gradient checkpointing would switch the cache off
        if keeps_only_keys_and_values(model):
            own_steps = max_new_tokens >= FEWEST_STEPS and suits(model, tokenizer.pad_token_id)
            cache = _read_prompts_once(model, prompts, tokenizer.pad_token_id, even_if_different=own_steps)
        torch.manual_seed(seed)
        try:
            if own_steps and cache is not None:
                steps = DecodeSteps(model, cache, mask.to(device), steps=max_new_tokens)
                sampled, logprobs = sample(steps, recorder.log_softmax, ids[:, -1:].to(device), max_new_tokens, ends,
                                           greedy=temperature == 0)
            else:
                sequences = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), past_key_values=cache,
                    generation_config=_generation_config(max_new_tokens, temperature, ends, tokenizer.pad_token_id),
                    logits_processor=LogitsProcessorList([recorder]))
                sampled, logprobs = sequences[:, ids.shape[1] :], recorder.logprobs(sequences)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise UserError(f"{type(model).__name__} {NOT_FINITE}") from None
    completions = [_cut_at_end(*pair, ends) for pair in zip(sampled.tolist(), logprobs.tolist(), strict=True)]
    if temperature > 0:  # what is greedy is looked at by those who have the model's name
        check_finite(type(model).__name__, completions)
    return completions


def sample(decode, log_softmax, last, max_new_tokens, ends, *, greedy):
    """Ids and their log-probs, (B, T) each, until every row has one of `ends`; what follows it means nothing.

    decode: DecodeSteps. log_softmax(logits): what is drawn from. last (B, 1): the last ids of the prompts. Rows that
    have ended are dropped once they are half of those that are left, where that costs no CUDA graph.
    """
    stops, rows = torch.tensor([*ends], device=last.device), torch.arange(len(last), device=last.device)
    ids = last.new_zeros(len(last), max_new_tokens)
    logprobs = torch.zeros_like(ids, dtype=torch.float32)
    ended = torch.zeros_like(rows, dtype=torch.bool)  # of the rows that are left
    for at in range(max_new_tokens):
        scores = log_softmax(decode(last))
        last = scores.argmax(-1, keepdim=True) if greedy else draw(scores)
        ids[rows, at], logprobs[rows, at] = last[:, 0], scores.gather(1, last)[:, 0]
        ended |= torch.isin(last[:, 0], stops)
        left = len(rows) - int(ended.sum())
        if left == 0:
            break
        if 2 * left <= len(rows) and decode.may_drop and at + 1 < max_new_tokens:
            going_on = (~ended).nonzero()[:, 0]
            decode.keep(going_on)
            rows, last, ended = rows[going_on], last[going_on], ended[going_on]
    return ids[:, : at + 1], logprobs[:, : at + 1]


def draw(logprobs):
    """An id of each row: (B, V) -> (B, 1). Where a row is NaN, its last.

    By one random number of each row. torch.multinomial takes one of each column, which on a CPU can take as long as the
    step of a small model.
    """
    cumulated = logprobs.exp().cumsum(-1, dtype=torch.float64)  # in 32 bits rounding would change what is rare
    at = torch.rand(len(logprobs), 1, dtype=torch.float64, device=logprobs.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, at, right=True).clamp(max=logprobs.shape[1] - 1)


def keeps_only_keys_and_values(model):
    """Whether all that a model keeps of a sequence is the keys and values of each of its tokens."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    lm = causal_lm(model)
    if "past_key_values" not in inspect.signature(decoder(lm).forward).parameters:
        return False  # GPT-1 keeps nothing
    return not lm._is_stateful and {type(layer) for layer in DynamicCache(config=lm.config).layers} == {DynamicLayer}


def _read_prompts_once(model, prompts, pad_id, even_if_different=False):
    """The cache of all prompts but their last tokens, for which equal ones are read once. None where a prompt has one
    token, or no two are equal, unless even_if_different. For models that keep only keys and values."""
    from transformers import DynamicCache

    different, of_prompt = _different(prompts)
    all_differ = len(different) == len(prompts) and not even_if_different
    if all_differ or min(map(len, different)) < 2:
        return None
    lm = causal_lm(model)
    cache = DynamicCache(config=lm.config)
    ids, mask = (x[:, :-1].to(lm.device) for x in _left_padded(different, pad_id))
    decoder(lm)(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.tensor(of_prompt, device=lm.device))
    return cache


def _different(prompts):
    """The prompts, each once, and for each prompt its place among them."""
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    return [*places], [places[tuple(prompt)] for prompt in prompts]


def _generation_config(max_new_tokens, temperature, ends, pad_id):
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        top_k=0 if temperature > 0 else None,
        top_p=1.0,
        temperature=1.0,  # the logits processor divides
        repetition_penalty=1.0,
        eos_token_id=list(ends) or None,
        pad_token_id=pad_id,
    )


@torch.no_grad()
def can_batch(model, pad_id):
    """Whether prompts beside a longer one, padded on the left, give the logits that they give alone. Measured once per
    model, on two tokens after prompts of four: some recurrent models read padding, or mix up the rows of a batch."""
    key = causal_lm(model)
    if key not in _CAN_BATCH:
        vocab = len(key.get_input_embeddings().weight)
        short = [[(i + n) % vocab for n in (1, 3, 2, 4)] for i in range(0, 50, 10)]
        with eval_mode(model):
            beside = _greedy_logits(model, [*short, [i % vocab for i in range(9)]], pad_id)
            alone = [_greedy_logits(model, [prompt], pad_id)[0] for prompt in short]
        pairs = [(a, b) for ours, theirs in zip(beside, alone, strict=False) for a, b in zip(ours, theirs, strict=True)
                 if ours[0].argmax() == theirs[0].argmax() or a is ours[0]]  # the second, if the first drew the same
        ours, theirs = (torch.stack(rows) for rows in zip(*pairs, strict=True))
        dtype = key.get_output_embeddings().weight.dtype
        _CAN_BATCH[key] = equal_but_for_rounding(ours, theirs, 1e-2, 0.1, dtype)
        if not _CAN_BATCH[key]:
            print(f"{type(key).__name__} is sampled one prompt at a time: padding or other rows change its logits")
    return _CAN_BATCH[key]


def _greedy_logits(model, prompts, pad_id):
    """For each prompt the logits of two greedy tokens, less their mean: what is the same for all changes no draw."""
    config = _generation_config(2, 0, [10**9], pad_id)  # no token ends it, also none that the model's config names
    config.output_logits = config.return_dict_in_generate = True
    ids, mask = (x.to(causal_lm(model).device) for x in _left_padded(prompts, pad_id))
    first, second = model.generate(input_ids=ids, attention_mask=mask, generation_config=config).logits
    return [[logits - logits.mean() for logits in pair] for pair in zip(first.float(), second.float(), strict=True)]


def _left_padded(prompts, pad_id):
    """ids (B, T) and mask (B, T): padded on the left, so that all rows continue at the same column."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return ids, mask


def _cut_at_end(ids, logprobs, ends):
    """A completion up to its first end of turn, that included."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    return Completion(ids[:length], logprobs[:length], length is not None)


class _LogprobRecorder:
    """A logits processor: divides by the temperature, masks, and keeps the log-prob of each id once it is drawn."""

    def __init__(self, temperature, vocab, max_new_tokens):
        self.temperature, self.vocab, self.max_new_tokens = temperature, vocab, max_new_tokens
        self.latest, self.drawn, self.steps = None, [], 0

    def __call__(self, ids, logits):
        if self.latest is not None:
            self._record(ids)
        self.latest = self.log_softmax(logits)
        return self.latest

    def log_softmax(self, logits):
        """What is drawn from: (B, V) -> (B, V)."""
        self.steps += 1
        show_activity(f"sampling token {self.steps} of at most {self.max_new_tokens}")
        logits = logits.float()
        logits[:, self.vocab :] = float("-inf")
        return torch.log_softmax(logits / self.temperature, -1)

    def _record(self, ids):
        self.drawn.append(self.latest.gather(1, ids[:, -1:])[:, 0])

    def logprobs(self, sequences):
        """(B, T) of all ids drawn. sequences (B, prompt + T): what generate returned."""
        self._record(sequences)
        return torch.stack(self.drawn, 1)


def make_engines(args, longest_prompt, tokenizers, device):
    """(name, engine) of one model after the other, with --engine, --bits and --batch-size of args: for evaluation.

    tokenizers: by the models' names. longest_prompt: tokens. vLLM has one engine in a process, so there all models must
    be one base, with adapters or without.
    """
    from rlt import models

    if args.engine == "transformers":
        for name, tokenizer in tokenizers.items():
            yield name, TransformersEngine(models.load_model(name, bits=args.bits, device=device), tokenizer,
                                           args.batch_size)
        return
    from rlt.vllm_engine import VLLMEngine

    bases = {models.base_of(name) for name in tokenizers}
    if len(bases) > 1:
        raise UserError(f"--engine vllm evaluates models of one base at a time, these have {len(bases)}: "
                        f"{', '.join(sorted(bases))}. Call evaluate.py for each.")
    ranks = [models.rank_for_vllm(name) for name in tokenizers]
    tokenizer = next(iter(tokenizers.values()))
    engine = VLLMEngine(bases.pop(), tokenizer, bits=args.bits, device=device, stop_ids=turn_ends(tokenizer),
                        max_model_len=longest_prompt + args.max_new_tokens, lora_rank=max(ranks) or None)
    for name, rank in zip(tokenizers, ranks, strict=True):
        engine.load_adapter_folder(models.resolve(name) if rank else None)
        yield name, engine
