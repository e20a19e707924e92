# SPDX-License-Identifier: MIT
"""
One row, seen by everyone who reads it: the teacher, the student, the student to be distilled.

    teacher   system, question | solution block, <|begin_of_explanation|>\\n\\n  ... writes from here on
    student   system, question | <|begin_of_thought|>\\n\\n  explanation  <|end_of_thought|>, solution block
                                                            ^ kl is measured here    ^ score here

Everything leaves this file as token ids. The ids that the teacher sampled are the ids that are scored under
both models and trained on: nothing is decoded and encoded again, so no token is lost at the edges.

    thought   sampled ids up to the last token boundary before the closing tag
    bridge    what a token that straddles the tag left over (".<" leaves "."), then close of thought, open of solution
    solution  solution + "\\n\\n"

The tags are those of Bespoke-Stratos and of the released RLT code (custom_data/); the wording is ours.
No model is touched here.
"""

from typing import NamedTuple

from rlt.errors import UserError
from rlt.rows import map_rows
from rlt.tags import EXPLANATION, SOLUTION, THOUGHT

from rewards import Row

STUDENT_SYSTEM = (
    "You solve problems by thinking them through before you answer. Write two sections. The first, between "
    f"{THOUGHT[0]} and {THOUGHT[1]}, holds your whole line of thought: analyse the question, recall what is "
    "needed, explore, check yourself, go back and correct where you must; separate the steps by blank lines. "
    f"The second, between {SOLUTION[0]} and {SOLUTION[1]}, states the final solution, precisely and in full."
)
TEACHER_SYSTEM = (
    "You are given a question and answer in two sections. The first, between "
    f"{SOLUTION[0]} and {SOLUTION[1]}, is its precise solution. The second, between {EXPLANATION[0]} and "
    f"{EXPLANATION[1]}, explains how one gets there: a careful line of thought that analyses the question, "
    "explores, checks itself, goes back and corrects where it must, and arrives at the solution; its steps are "
    "separated by blank lines."
)
class Explanation(NamedTuple):
    """A teacher's completion, taken apart."""

    thought: list  # ids that are scored
    end: list  # ids after them: closing tag, end of turn. Trained on, not scored
    leftover: str  # characters of a token that straddles thought and closing tag
    text: str  # the explanation as it goes to the student
    closed: bool  # it ended properly: closing tag, then the end of the turn


class Prompts:
    """The views of a row under one tokenizer's chat template.

    solution_in: where the teacher finds the solution, "assistant" (a prefilled start of its own turn, as in the
    released code) or "user" (after the question, as in the paper's Figure 2).
    """

    def __init__(self, tokenizer, solution_in="assistant"):
        self.tokenizer, self.solution_in = tokenizer, solution_in
        if tokenizer.chat_template is None:
            raise UserError(f"{tokenizer.name_or_path} has no chat template: expected an instruct model's tokenizer.")
        for ours, theirs in zip(EXPLANATION, THOUGHT, strict=True):
            a, b = self.encode(ours), self.encode(theirs)
            if a != b and 1 in (len(a), len(b)):
                # the teacher's mass on its own tag would meet a student that never saw that token: every KL is off
                raise UserError(
                    f"{ours} and {theirs} are different single tokens ({a}, {b}) in {tokenizer.name_or_path}: "
                    "the KL between the two roles would be wrong. Make them one token, or no special tokens at all."
                )
        self._bytes = _token_bytes(tokenizer)
        # what the closing tag looks like once sampled: a tokenizer may write both roles' tags alike
        self._closing = tokenizer.decode(self.encode(EXPLANATION[1])).encode()

    def encode(self, text):
        try:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # tokenizers has no class of its own for a word without a token
            raise UserError(f"can't be tokenized ({error}): use words that the model has") from None

    def question_prompt(self, row):
        """Ids of the student's prompt: system, question, and the start of an empty assistant turn."""
        return self._turn(STUDENT_SYSTEM, row["question"])

    def hinted_prompt(self, row):
        """The student's prompt with the row's `hint` after the question (Guide-GRPO)."""
        return self._turn(STUDENT_SYSTEM, f"{row['question']}\n\n{self._column(row, 'hint')}")

    def _column(self, row, name):
        if not isinstance(row.get(name), str):
            raise UserError(f'has no "{name}" (columns found: {", ".join(row)}): give the rows one')
        return row[name]

    def student_prompt(self, row):
        """The plain prompt with the thought opened: what stands before an explanation when the student scores it."""
        return self.question_prompt(row) + self.encode(f"{THOUGHT[0]}\n\n")

    def teacher_prompt(self, row):
        """Ids of the teacher's prompt: it has seen the solution, and the explanation is opened."""
        known = f"{SOLUTION[0]}\n\n{row['solution']}\n\n{SOLUTION[1]}"
        opened = f"{EXPLANATION[0]}\n\n"
        if self.solution_in == "user":
            return self._turn(TEACHER_SYSTEM, f"{row['question']}\n\n{known}") + self.encode(opened)
        return self._turn(TEACHER_SYSTEM, row["question"]) + self.encode(f"{known}\n\n{opened}")

    def _turn(self, system, user):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return self.encode(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode_explanation(self, row):
        """(ids, closed): the row's `explanation` as a teacher would have sampled it.

        A row that distill.py wrote (it has `messages`) is taken as it is; other texts get a blank line at the end.
        """
        closed, text = row.get("closed", True), self._column(row, "explanation")
        text = text if "messages" in row else text.strip("\n") + "\n\n"
        return (self.encode(text + EXPLANATION[1]) + [self.tokenizer.eos_token_id], True) if closed else (
            self.encode(text), False)

    def drop_overlong(self, rows, context, skip=False, also=()):
        """The rows whose prompts and solution, and what `also` makes ids of, fit into `context` tokens."""

        def length(row):
            student = len(self.student_prompt(row)) + len(self.encode(row["solution"] or "")) + 32  # 32: tags
            tokens = max(len(self.teacher_prompt(row)), student)
            tokens += sum(len(ids_of(row)) for ids_of in also)
            if tokens > context:
                raise UserError(f"takes {tokens} tokens, room is for {context}: shorten it, lower --max-new-tokens")
            return tokens

        return [row for row, _ in map_rows(rows, length, skip)]

    def split_completion(self, ids, finished):
        """Take a teacher's completion apart. ids: all that was sampled, the end of turn included if finished.

        The tag is looked for in bytes, so characters cut in half by the length limit do no harm.
        """
        body = ids[:-1] if finished else ids
        pieces = [self._bytes(i) for i in body]
        written = b"".join(pieces)
        at = written.find(self._closing)
        if at < 0:
            return Explanation(list(body), list(ids[len(body) :]), "", self.tokenizer.decode(body), False)
        boundary = length = 0
        while length + len(pieces[boundary]) <= at:
            length += len(pieces[boundary])
            boundary += 1
        leftover = written[length:at].decode("utf-8", "replace")
        after = written[at + len(self._closing) :]
        text = self.tokenizer.decode(body[:boundary]) + leftover
        closed = finished and not after.strip()
        return Explanation(list(body[:boundary]), list(ids[boundary:]), leftover, text, closed)

    def scoring_row(self, row, explanation):
        """The rewards.Row of one explanation (as `split_completion` returns it) of one row."""
        bridge = f"{explanation.leftover}{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n"
        return Row(
            teacher_prompt=self.teacher_prompt(row),
            thought=explanation.thought,
            teacher_end=explanation.end,
            student_prompt=self.student_prompt(row),
            bridge=self.encode(bridge),
            solution=self.encode(f"{row['solution']}\n\n"),
        )

    def chat_messages(self, row, text):
        """The chat messages a student is trained on: the teacher's raw text with the tags swapped."""
        answer = f"{THOUGHT[0]}\n\n{text}{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n{row['solution']}\n\n{SOLUTION[1]}"
        roles = ("system", STUDENT_SYSTEM), ("user", row["question"]), ("assistant", answer)
        return [{"role": role, "content": content} for role, content in roles]

    def sft_row(self, row, view):
        """(ids, start): a training row for the view "student" or "teacher", loss from `start` to the end.

        A row that brings `messages` (distill.py wrote it) is taken word for word; otherwise its `explanation` is
        set between blank lines. The end of turn is there exactly once.
        """
        if view == "student" and "messages" in row:
            *before, answer = row["messages"]
            text = self.tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True)
            prompt, answer = self.encode(text), answer["content"]
        else:
            padded = self._column(row, "explanation").strip("\n") + "\n\n"
            if view == "student":
                prompt, answer = self.question_prompt(row), self.chat_messages(row, padded)[-1]["content"]
            else:
                prompt, answer = self.teacher_prompt(row), padded + EXPLANATION[1]
        return prompt + self.encode(answer) + [self.tokenizer.eos_token_id], len(prompt)


def _token_bytes(tokenizer):
    """id -> the bytes it stands for in a text."""
    from tokenizers import decoders
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        byte = {character: value for value, character in bytes_to_unicode().items()}
        vocabulary = tokenizer.convert_ids_to_tokens
        return lambda i: added[i] if i in added else bytes(byte[c] for c in vocabulary(i))
    # word-level and the like: look at each token behind another one. A lone byte of a byte-fallback tokenizer decodes
    # to a replacement character, so there a character that is cut in half is not told from a whole one
    anchor = tokenizer.eos_token_id
    before = len(tokenizer.decode([anchor]))
    return lambda i: tokenizer.decode([anchor, i])[before:].encode()
