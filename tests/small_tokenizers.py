"""Tokenizers of every family, trained here in a second, and chat templates as models have them."""

import json
import re

from rlt.prompts import STUDENT_SYSTEM, TEACHER_SYSTEM

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_RIGHT_AWAY = (  # no role, no newline: what a turn says starts right after a special token
    "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
QWEN_3 = (  # a finished last turn has a thought, be it empty; thoughts of earlier turns are taken out
    "{% set last = namespace(query=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.query and (loop.last or thought) %}"
    "{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + GENERATE }}{% endif %}"
)
QWEN_3_HYBRID = QWEN_3.replace(
    "GENERATE", "('<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '')")
QWEN_3_THINKING = QWEN_3.replace("GENERATE", "'<think>\n'")
R1 = (  # opens a thought, and takes it out of every finished turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<|User|>' + m.content }}{% else %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
GPT_OSS = (  # thoughts and answers are channels, named in front of what a turn says
    "{% for m in messages %}{% set channel = '<|channel|>final' if m.role == 'assistant' else '' %}"
    "{{ '<|start|>' + m.role + channel + '<|message|>' + m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
LLAMA_2 = (  # a system turn inside the user's, answers between blanks
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CORPUS = [
    *(re.sub(r"<\|\w+\|>", "the tag", text) for text in (STUDENT_SYSTEM, TEACHER_SYSTEM)),
    "if a <b and c> d then |x| or {y}; <tag|> end_of_line begin_of_file <|",
    "So x = 2. Then 3x + 4 = 10, and the answer is \\boxed{10}.\n\nCheck: 10 - 4 = 6, 6 / 3 = 2.",
    "First, $\\frac{1}{2}$ of 48 is 24; in May she sold 24 fewer clips.\n\nTherefore 48 + 24 = 72.",
    "Let a < b and c > d. If (a, b) = (1, 2), we get a|b, so {1, 2} and [3, 4] differ.\nHm, wait: no.",
] * 4


WORDS = pre_tokenizers.Split(Regex("\n+|[▁ ]?[^▁ \n]+|[▁ ]"), "isolated")  # no token crosses words, but tags are words


def _train(model, trainer, *, corpus=CORPUS, words=None, normalizer=None, pre_tokenizer=None, decoder=None):
    """words: the pre-tokenizer during training, where the finished tokenizer has another or none.

    Byte tokens must be given to the trainer as special ones; in the finished tokenizer they are ordinary.
    """
    tokenizer = Tokenizer(model)
    if normalizer:
        tokenizer.normalizer = normalizer
    if words or pre_tokenizer:
        tokenizer.pre_tokenizer = words or pre_tokenizer
    tokenizer.train_from_iterator(corpus, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    if words:
        state["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(state))
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    return tokenizer


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
REPLACE = normalizers.Replace(" ", "▁")


def _sentencepiece(normalizer=None, pre_tokenizer=None, strip=True, corpus=CORPUS):
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return _train(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL + BYTES, show_progress=False), corpus=corpus,
        words=pre_tokenizers.Sequence([pre_tokenizer, WORDS]) if pre_tokenizer else WORDS,
        normalizer=normalizer, pre_tokenizer=pre_tokenizer,
        decoder=decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strip))


def _llama_2():
    one_line = [text.replace("\n", " ") for text in CORPUS]  # a newline is a byte
    return _sentencepiece(normalizers.Sequence([normalizers.Prepend("▁"), REPLACE]), corpus=one_line)


def _gemma():
    return _sentencepiece(REPLACE, strip=False)


def _metaspace_first():
    return _sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def _metaspace_always():
    return _sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always"))


def _metaspace_never():
    return _sentencepiece(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="never"), strip=False)


def _unigram():
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    return _train(
        models.Unigram(), trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>",
                                                  show_progress=False),
        pre_tokenizer=metaspace, decoder=decoders.Metaspace(prepend_scheme="always"))


def _byte_level(add_prefix_space=False):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(
        models.BPE(), trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                          show_progress=False),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space), decoder=decoders.ByteLevel())


def _byte_level_prefix():
    return _byte_level(add_prefix_space=True)


def _wordpiece():
    return _train(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL,
                                                                       show_progress=False),
        normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece())


FAMILIES = {
    "llama-2": (_llama_2, LLAMA_2), "gemma": (_gemma, CHATML), "metaspace-first": (_metaspace_first, LLAMA_2),
    "metaspace-always": (_metaspace_always, LLAMA_2), "metaspace-never": (_metaspace_never, CHATML),
    "unigram": (_unigram, CHATML), "byte-level": (_byte_level, CHATML),
    "byte-level-prefix": (_byte_level_prefix, CHATML), "wordpiece": (_wordpiece, CHATML),
}


def make_tokenizer(family, template=None, special=("<|im_start|>", "<|im_end|>"), eos="</s>"):
    """A tokenizer of one of FAMILIES with a chat template; `special` tokens are added to its vocabulary."""
    make, own = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), bos_token="<s>", eos_token=eos, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template or own
    return tokenizer
