# SPDX-License-Identifier: MIT
"""
What a tokenizer's chat template makes of a conversation, found by rendering short ones.

Templates differ: some refuse a system turn, some open a thought of the model's own, and the token that ends a turn is
not always the tokenizer's eos. Nothing here goes by a model's name.
"""

import datetime
import functools
import math
import re

from rlt.errors import UserError
from rlt.tags import SOLUTION, THOUGHT

SYSTEM, QUESTION, ANSWER = "the system text", "the question", "the answer"  # contents to look for in a rendering
TAGGED = f"{THOUGHT[0]}\n\nthe thought\n\n{THOUGHT[1]}\n\n{SOLUTION[0]}\n\nthe solution\n\n{SOLUTION[1]}"
A_DAY = datetime.datetime(2024, 7, 26)  # the date in Llama 3's own template
MARKUP = re.compile(r"<{1,2}[^<>\s]+>{1,2}|\[/?[A-Z_]+\]")  # <|im_start|>, <s>, <<SYS>>, [INST]


def vocabulary_size(tokenizer):
    """One more than the highest id: the columns of a model's head that are computed. Ids may have gaps.

    Where models have fewer rows (`tokenizer.model_rows`, see `models.load_tokenizer`) it is those: Gemma 3's smallest
    have no row for the token of an image.
    """
    return min(1 + _highest_id(tokenizer), getattr(tokenizer, "model_rows", math.inf))


@functools.lru_cache(maxsize=8)
def _highest_id(tokenizer):
    return max(tokenizer.get_vocab().values())


def turn_ends(tokenizer):
    """The ids that end an assistant's turn, the chat template's own first.

    The others are the tokenizer's eos and `tokenizer.generation_eos`, what the model's generation_config lists. The
    first one ends every training row; each of them ends a sample. Where a template ends turns by two tokens (Command
    R7B: the end of the response, the end of the turn), that is the former: behind it there is nothing to say.
    """
    listed = tuple(getattr(tokenizer, "generation_eos", ()))
    ends = [*_template_ends(tokenizer, listed), tokenizer.eos_token_id, *listed]
    ends = tuple(dict.fromkeys(i for i in ends if i is not None))
    if not ends:
        raise UserError(f"{_name(tokenizer)} has no token that ends a turn: expected an instruct model's tokenizer.")
    return ends


def _template_ends(tokenizer, listed):
    """The ids of the tokens that the template puts after an answer: up to a listed one, or the first alone."""
    if tokenizer.chat_template is None:
        return []
    user, assistant = ({"role": role, "content": text} for role, text in (("user", QUESTION), ("assistant", ANSWER)))
    try:
        rendered = render(tokenizer, [user, assistant])
        opened, _, closed = rendered.rpartition(ANSWER)
        ids = _added_tokens(tokenizer, closed)
        if not ids:  # some close a turn only when another follows; what opens that one is no end
            between = render(tokenizer, [user, assistant, user]).rpartition(ANSWER)[2].rpartition(QUESTION)[0]
            before = opened.partition(QUESTION)[0]
            while between and before.endswith(between[-1:]):
                between, before = between[:-1], before[:-1]
            ids = _added_tokens(tokenizer, between)
    except UserError:
        return []
    return ids[: 1 + next((n for n, i in enumerate(ids) if i in listed), 0)]


def _added_tokens(tokenizer, text):
    """The ids of the special and added tokens in a piece of a rendering."""
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return [i for i in tokenize(tokenizer, text)["input_ids"] if i in known]


def tokenize(tokenizer, text, **options):
    """The tokenizer's own encoding of a text, without special tokens of its own. Raises UserError where it has none."""
    try:
        encoded = tokenizer(text, add_special_tokens=False, **options)
    except Exception as error:  # tokenizers has no class of its own for a word without a token
        raise UserError(f"can't be tokenized ({error}): use words that the model has") from None
    rows = getattr(tokenizer, "model_rows", None)
    if rows is not None and max(encoded["input_ids"], default=0) >= rows:
        token = tokenizer.convert_ids_to_tokens(max(encoded["input_ids"]))
        raise UserError(f"can't be tokenized: the model has no row for {token!r}. Resize it (resize_token_embeddings), "
                        "and save it with its tokenizer")
    return encoded


def render(tokenizer, messages, add_generation_prompt=False):
    """The text that the template makes of messages. Models that can think are asked not to: they have our tags for it.

    Raises UserError with the template's own words where it refuses.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt,
            enable_thinking=False, thinking=False,  # Qwen3's name for it, and DeepSeek's
            # some would write today's date: prompts would change at midnight
            date_string=f"{A_DAY:%d %b %Y}", strftime_now=A_DAY.strftime,
        )
    except Exception as error:  # templates raise what they like
        reason = str(error).strip().partition("\n")[0]
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template of {_name(tokenizer)} refuses the turns {roles} ({reason})") from None


def _name(tokenizer):
    return tokenizer.name_or_path or "this tokenizer"


class ChatTemplate:
    """A tokenizer's template as prompts use it.

    start   the text between the question and the assistant's answer
    markup  the words in brackets that the template writes: a row that has one could forge a turn
    """

    def __init__(self, tokenizer):
        self.tokenizer, name = tokenizer, _name(tokenizer)
        if tokenizer.chat_template is None:
            raise UserError(f"{name} has no chat template: pass an instruct model, or give the tokenizer one.")
        conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
        self.folds_system = self.starts_as_finished = False
        self.folds_system = not self._has_system_turn(conversation)
        if self.folds_system:
            print(f"{name}: its chat template has no system turn: system texts go before the question.")
        prompt = self._render(conversation, add_generation_prompt=True)
        finished = self._render([*conversation, {"role": "assistant", "content": ANSWER}])
        if QUESTION not in prompt or ANSWER not in finished:
            raise UserError(f"the chat template of {name} leaves out a turn: expected a user's and an assistant's.")
        self.starts_as_finished = prompt.split() != finished.rpartition(ANSWER)[0].split()
        if self.starts_as_finished:
            print(f"{name}: its chat template starts an answer by {prompt.rpartition(QUESTION)[2]!r}; prompts end as "
                  f"a finished turn starts, by {self.prompt(conversation).rpartition(QUESTION)[2]!r}.")
        if TAGGED not in self._render([*conversation, {"role": "assistant", "content": TAGGED}]):
            print(f"{name}: its chat template rewrites the thought of a finished turn. Rows made here keep it; other "
                  "SFT tools would lose it.")
        self.start = self.prompt(conversation).rpartition(QUESTION)[2]
        self.markup = sorted(set(MARKUP.findall(prompt + finished)))

    def _has_system_turn(self, conversation):
        try:
            if SYSTEM in render(self.tokenizer, conversation, add_generation_prompt=True):
                return True
        except UserError:
            return False
        # It is left out in silence. A tokenizer without words for it (the toy's) is meant to go without.
        try:
            tokenize(self.tokenizer, SYSTEM)
        except UserError:
            return True
        return False

    def _render(self, messages, add_generation_prompt=False):
        if self.folds_system:
            systems = [message["content"] for message in messages if message["role"] == "system"]
            messages = [dict(message) for message in messages if message["role"] != "system"]
            if first := next((message for message in messages if message["role"] == "user"), None):
                first["content"] = "\n\n".join([*systems, first["content"]])
        return render(self.tokenizer, messages, add_generation_prompt)

    def prompt(self, messages):
        """The text of these messages (role, content), and of the start of an assistant's turn."""
        if self.starts_as_finished:  # what the template writes before the answer of a finished turn
            return self._render([*messages, {"role": "assistant", "content": ANSWER}]).rpartition(ANSWER)[0]
        return self._render(messages, add_generation_prompt=True)
