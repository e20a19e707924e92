# SPDX-License-Identifier: MIT
"""
A row as token ids: what the teacher reads, what the student reads, what a student is trained on.

    teacher   system, question | solution block, <|begin_of_explanation|>\\n\\n  ... writes from here on
    student   system, question | <|begin_of_thought|>\\n\\n  explanation  <|end_of_thought|>, solution block
                                                            ^ kl is measured here    ^ score here

The ids that the teacher sampled are the ids that are scored under both models and that it is trained on: nothing is
decoded and encoded again, so no token is lost at the edges.

    thought   sampled ids up to the last token boundary before the closing tag
    bridge    text between thought and solution: closing and opening tag, and before them what is left of the thought
              where one token holds its end and the start of the closing tag (".<" leaves ".")
    solution  solution + "\\n\\n"

A student is trained on texts, tokenized anew. They give the ids that were scored, token for token, wherever the
sampled ids are the tokenizer's own for their text.

The tags are those of Bespoke-Stratos and of the released RLT code (custom_data/); the wording is ours.
No model is touched here, except in `score_texts`.
"""

import codecs
import re
from typing import NamedTuple

from rlt.answers import opened_thought
from rlt.chat_template import ChatTemplate, tokenize, turn_ends, vocabulary_size
from rlt.errors import UserError, printable
from rlt.logprobs import KLRow
from rlt.rows import map_rows
from rlt.tags import EXPLANATION, SOLUTION, THOUGHT, tagged_answer

from rewards import Row, score_explanations

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
THOUGHT_OPENED, EXPLANATION_OPENED = (f"{opening}\n\n" for opening, _ in (THOUGHT, EXPLANATION))


class Explanation(NamedTuple):
    """A completion, taken apart at the end of the explanation, or of a student's thought (`split_answer`)."""

    thought: list  # ids that are scored
    end: list  # ids after them: closing tag, end of turn. Trained on, not scored
    leftover: str  # the thought's last characters, where a token holds them and the start of the closing tag
    text: str  # the explanation as it goes to the student
    closed: bool  # closing tag, no foreign tags before it; an explanation's turn must also end there
    foreign_tags: bool  # the text has special tokens or tags: it could forge a solution block

    @property
    def complete(self):
        """Closed, and with a text: the reward of any other has the penalty."""
        return bool(self.closed and self.text.strip())


class Prompts:
    """One tokenizer's prompts and training rows.

    solution_in: where the teacher finds the solution, "assistant" (a prefilled start of its own turn, as in the
    released code) or "user" (after the question, as in the paper's Figure 2).

    system: the system texts, {"student": text, "teacher": text}. A model may bring its own, shorter ones for a small
    model, as `rlt_system` in its tokenizer_config.json.

    Text of a row is never read as a special token or tag: a question with <|im_end|> could forge a turn, a solution
    with <|begin_of_solution|> a second solution. Methods that take a row raise UserError where it has such text.
    """

    def __init__(self, tokenizer, solution_in="assistant"):
        self.tokenizer, self.solution_in = tokenizer, solution_in
        self.template, self.end_of_turn = ChatTemplate(tokenizer), turn_ends(tokenizer)[0]
        self.opened_thought = opened_thought(self.template.start)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {*tokenizer.all_special_tokens, *self.template.markup}
        special = {token for token in special if len(token.strip()) > 2}  # some models pad with "!"
        self._special = _any_of(special)
        self._special_or_tag = _any_of(special.union(THOUGHT, SOLUTION, EXPLANATION))

        # Some tokenizers put a blank in front of every text: for them, a piece of text needs other text before it.
        self._neutral, self._anchor = ("",), []
        within, = self._encode_in_turn(THOUGHT_OPENED, THOUGHT[0])
        if self.encode(THOUGHT[0]) != within:
            self._neutral, self._anchor = ("\n", "a", "."), within
        for ours, theirs in zip(EXPLANATION, THOUGHT, strict=True):
            a, b = (self._encode_in_turn(THOUGHT_OPENED, tag)[0] for tag in (ours, theirs))
            if a != b and 1 in (len(a), len(b)):
                # the teacher's mass on its own tag would meet a student that never saw that token: every KL is off
                raise UserError(
                    f"{ours} and {theirs} are different single tokens ({a}, {b}) in {tokenizer.name_or_path}: "
                    "the KL between the two roles would be wrong. Make them one token, or no special tokens at all.")
        self.system = {"student": STUDENT_SYSTEM, "teacher": TEACHER_SYSTEM} | _own_system_texts(tokenizer)
        self._bytes = _token_bytes(tokenizer)
        # what the closing tag looks like once sampled: a tokenizer may write both roles' tags alike
        self._closing, self._closing_thought = (
            self._decode(self._encode_in_turn(THOUGHT_OPENED, tag)[0]).encode() for tag in (EXPLANATION[1], THOUGHT[1]))

    def encode(self, text):
        """The ids of a text that stands alone, such as a prompt."""
        return tokenize(self.tokenizer, text)["input_ids"]

    def _encode_in_turn(self, before, *pieces):
        """The ids of each piece of text, where they follow each other and `before` at the start of an answer.

        They are encoded together and cut by offsets, so that the pieces' ids are those of the whole text. A token with
        characters of two pieces belongs to the later one. If one has characters of `before`, the pieces are encoded
        behind something else.
        """
        text = "".join(pieces)
        for context in (self.template.start + before, *self._neutral):
            tokens = tokenize(self.tokenizer, context + text, return_offsets_mapping=True)
            start, ids = len(context), [[] for _ in pieces]
            ends = [start + sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]
            inside = [(i, a, b) for i, (a, b) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
                      if b > start or not context]
            if all(a >= start for _, a, _ in inside):
                break
        piece = 0
        for i, _, b in inside:
            while b > ends[piece]:
                piece += 1
            ids[piece].append(i)
        return ids

    def _decode(self, ids):
        """The text of ids within a turn, its leading blank included."""
        before = self.tokenizer.decode(self._anchor) if self._anchor else ""
        return self.tokenizer.decode([*self._anchor, *ids])[len(before) :]

    def token_texts(self, ids):
        """The text of each id. A character that several tokens share is the text of the last of them."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(self._bytes(i), final=n == len(ids)) for n, i in enumerate(ids, 1)]

    # prompts

    def question_prompt(self, row):
        """Ids of the student's prompt: system, question, and the start of an empty assistant turn."""
        return self._turn(self.system["student"], self._text(row, "question"))

    def hinted_prompt(self, row):
        """The student's prompt with the row's `hint` after the question (Guide-GRPO)."""
        user = f"{self._text(row, 'question')}\n\n{self._text(row, 'hint')}"
        return self._turn(self.system["student"], user)

    def revealed_chain(self, row, share):
        """Ids of the start of an answer, to follow `question_prompt` (AdaBack): the opened thought and the first
        floor(share * m) of the m tokens of the row's `explanation`, as in `sft_row`. [] where that is no token."""
        if share == 0:
            return []
        text = self._text(row, "explanation").strip("\n")
        if not text.strip():
            raise UserError("has an empty explanation: give it one")
        opened, chain, _ = self._encode_in_turn("", THOUGHT_OPENED, text, f"\n\n{THOUGHT[1]}")
        revealed = chain[: int(share * len(chain))]
        return opened + revealed if revealed else []

    def student_prompt(self, row):
        """The plain prompt with the thought opened: what stands before an explanation when the student scores it."""
        return self.question_prompt(row) + self._thought_opening()

    def _thought_opening(self):
        """Ids that open a thought at the start of an answer."""
        return self._encode_in_turn("", THOUGHT_OPENED)[0]

    def teacher_prompt(self, row):
        """Ids of the teacher's prompt: it has seen the solution, and the explanation is opened."""
        user, opened = self._text(row, "question"), EXPLANATION_OPENED
        solution = f"{SOLUTION[0]}\n\n{self._text(row, 'solution')}\n\n{SOLUTION[1]}"
        if self.solution_in == "user":
            user = f"{user}\n\n{solution}"
        else:
            opened = f"{solution}\n\n{opened}"
        return self._turn(self.system["teacher"], user) + self._encode_in_turn("", opened)[0]

    def _turn(self, system, user):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return self.encode(self.template.prompt(messages))

    def _text(self, row, column):
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise UserError(f"has {column} of type {type(text).__name__}, expected text: fix it")
        if text is None and column in row:
            raise UserError(f"has an empty {column}: give it one")
        if text is None:
            found = ", ".join(name for name in row if name != "where")
            raise UserError(f'has no "{column}" (columns found: {found}): give the rows one')
        return self._without(self._special_or_tag, text, column)

    def _without(self, pattern, text, column, remedy="take it out"):
        if found := pattern.search(text):
            raise UserError(f'has "{found[0]}" in its {column}, which a model would take for its own tag: {remedy}')
        return text

    # what a model wrote

    def turn_text(self, completion):
        """A rollout.Completion as a grader reads it: without the end of the turn, and with the opening tag of a
        thought that the prompt has opened. Else one that is cut off would not show that it is still thinking."""
        return self.opened_thought + self.tokenizer.decode(completion.ids[: -1 if completion.finished else None])

    def encode_explanation(self, row):
        """(ids, finished): the row's `explanation` as a teacher would have sampled it.

        A row that distill.py wrote (it has `messages`) is taken as it is; other texts get a blank line at the end.
        """
        text, closed = self._text(row, "explanation"), row.get("closed", True)
        if not isinstance(closed, bool):
            raise UserError(f"has closed {closed!r:.40}, expected true or false: fix it, or leave the column out")
        text = text if "messages" in row else text.strip("\n") + "\n\n"
        ids, = self._encode_in_turn(EXPLANATION_OPENED, text + EXPLANATION[1] * closed)
        return ids + [self.end_of_turn] * closed, closed

    def split_completion(self, ids, finished):
        """Take a teacher's completion apart. ids: all that was sampled, the end of turn included if finished.

        The tag is looked for in bytes, so characters cut in half by the length limit do no harm.
        """
        explanation, after = self._split_at(ids, finished, self._closing)
        return explanation._replace(closed=finished and explanation.closed and not after.strip())

    def split_answer(self, ids, finished):
        """Take a student's completion apart at the end of its thought. closed: the thought's closing tag is there."""
        return self._split_at(ids, finished, self._closing_thought)[0]

    def _split_at(self, ids, finished, tag):
        """(Explanation, the bytes after the tag). closed: the tag is there, and no foreign ones before it."""
        body = ids[:-1] if finished else ids
        pieces = [self._bytes(i) for i in body]
        sampled = b"".join(pieces)
        at = sampled.find(tag)
        if at < 0:
            text = self._decode(body)
            return Explanation(list(body), list(ids[len(body) :]), "", text, False, self._is_foreign(text)), b""
        boundary = length = 0
        while length + len(pieces[boundary]) <= at:
            length += len(pieces[boundary])
            boundary += 1
        leftover = sampled[length:at].decode("utf-8", "replace")
        text = self._decode(body[:boundary]) + leftover
        foreign = self._is_foreign(text)
        explanation = Explanation(list(body[:boundary]), list(ids[boundary:]), leftover, text, not foreign, foreign)
        return explanation, sampled[at + len(tag) :]

    def _is_foreign(self, text):
        return self._special_or_tag.search(text) is not None

    def has_special_tokens(self, text):
        """Whether the text has special tokens, or markup of the chat template: no training row can be made of it."""
        return self._special.search(text) is not None

    def scoring_row(self, row, explanation):
        """The rewards.Row of one explanation (as `split_completion` returns it) of one row."""
        bridge, solution, _ = self._encode_in_turn(
            THOUGHT_OPENED, f"{explanation.leftover}{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n",
            f"{row['solution']}\n\n", SOLUTION[1])
        return Row(teacher_prompt=self.teacher_prompt(row), thought=explanation.thought, teacher_end=explanation.end,
                   student_prompt=self.student_prompt(row), bridge=bridge, solution=solution)

    def on_policy_row(self, row, thought):
        """The KLRow of a student's own thought (as `split_answer` returns it); the frozen model is the teacher.

        The prompt that the thought was sampled from had opened it: here that is for the student to learn. The token
        that ends it counts as one of the thought, the first of its closing tag or an end of turn: the KL says whether
        to end there. Behind an unclosed thought there is nothing to learn.
        """
        end, solution = thought.end[:1], []
        if thought.closed:
            end, solution = self._encode_in_turn(
                THOUGHT_OPENED, f"{thought.leftover}{THOUGHT[1]}\n\n",
                f"{SOLUTION[0]}\n\n{row['solution']}\n\n{SOLUTION[1]}")
            solution.append(self.end_of_turn)
        return KLRow(prompt=self.question_prompt(row), opening=self._thought_opening(),
                     thought=thought.thought + end[:1], end=end[1:], solution=solution,
                     frozen_prompt=self.teacher_prompt(row))

    # training rows

    def chat_messages(self, row, text):
        """The chat messages a student is trained on: the teacher's raw text with the tags swapped."""
        answer = tagged_answer(text, row["solution"])
        roles = ("system", self.system["student"]), ("user", row["question"]), ("assistant", answer)
        return [{"role": role, "content": content} for role, content in roles]

    def sft_row(self, row, view):
        """(ids, start): a training row for the view "student" or "teacher", loss from `start` to the end.

        A row that brings `messages` (distill.py wrote it) is taken word for word; otherwise its `explanation` is
        set between blank lines. The end of turn is there exactly once.
        """
        if view == "student" and "messages" in row:
            messages = row["messages"]
            for message in messages:
                self._without(self._special, message["content"], "messages",
                              'take it out, or, where it marks a thought, call the column "conversations"')
        else:
            text = self._text(row, "explanation").strip("\n") + "\n\n"
            if view == "student" and not self._text(row, "solution").strip():
                raise UserError("has an empty solution: give it one")
            messages = self.chat_messages({name: self._text(row, name) for name in ("question", "solution")}, text)
        if view == "student":
            *before, answer = messages
            if not answer["content"].strip():
                raise UserError("has messages that end with an empty assistant turn: give it a text")
            prompt = self.encode(self.template.prompt(before))
            supervised, = self._encode_in_turn("", answer["content"])
        else:
            prompt = self.teacher_prompt(row)
            supervised, = self._encode_in_turn(EXPLANATION_OPENED, text + EXPLANATION[1])
        return prompt + supervised + [self.end_of_turn], len(prompt)

    def scored_length(self, row):
        """Tokens that teacher or student reads beside an explanation that is scored, whichever are more."""
        solution = len(self.encode(row["solution"])) + 32  # 32: tags
        return max(len(self.teacher_prompt(row)), len(self.student_prompt(row)) + solution)


def drop_overlong(rows, length_of, context, max_new_tokens=0, skip=False):
    """The rows of which length_of(row) tokens, and max_new_tokens sampled ones, fit into `context` tokens."""
    room = context - max_new_tokens
    if room <= 0:
        raise UserError(f"--max-new-tokens {max_new_tokens}, but the models can read {context} tokens: lower it.")

    def check_length(row):
        if (tokens := length_of(row)) > room:
            remedy = "shorten it" + ", or lower --max-new-tokens" * (max_new_tokens > 0)
            raise UserError(f"takes {tokens} tokens, room is for {room}: {remedy}")

    return [row for row, _ in map_rows(rows, check_length, skip)]


def score_texts(teacher, student, tokenizer, rows, *, solution_in="assistant", **options):
    """Reward explanations that are texts: `score_explanations` of rewards.py, prompts and ids included -> Scored.

    rows: B dicts of strings, `question`, `solution` and `explanation`. tokenizer: of both models. solution_in: see
    `Prompts`. options: those of `score_explanations`; vocab is the tokenizer's. Raises UserError naming a bad row.
    """
    if not rows:
        raise UserError("there are no rows to score: expected at least one")
    prompts = Prompts(tokenizer, solution_in)

    def scoring_row(row):
        for column in ("question", "solution"):
            if not prompts._text(row, column).strip():
                raise UserError(f"has an empty {column}: there is nothing to score")
        return prompts.scoring_row(row, prompts.split_completion(*prompts.encode_explanation(row)))

    encoded = []
    for number, row in enumerate(rows):
        try:
            encoded.append(scoring_row(row))
        except UserError as error:
            raise UserError(f"row {number} {error}") from None
    return score_explanations(teacher, student, encoded, **{"vocab": vocabulary_size(tokenizer)} | options)


def _own_system_texts(tokenizer):
    """What the tokenizer_config.json of a model has for system texts, {"student": text, "teacher": text} or less."""
    own = tokenizer.init_kwargs.get("rlt_system", {})
    texts = isinstance(own, dict) and all(isinstance(text, str) for text in own.values())
    if not texts or not own.keys() <= {"student", "teacher"}:
        raise UserError(f"{tokenizer.name_or_path} has rlt_system {own!r:.60} in its tokenizer_config.json, expected "
                        '{"student": text, "teacher": text}: fix it, or leave it out.')
    return own


def show_rows(prompts, rows, n, skip=False):
    """The first n rows as each model sees them, as text to print: special tokens as they are, line ends as \u21b5.
    skip: leave out those that can't be turned into prompts, see `map_rows`.

    Blanks at a line's end are \u00b7, control characters are escaped. Of a prompt and what follows it, the count of
    tokens is given, too. Raises UserError where a row can't be turned into prompts and none are skipped.
    """
    shown = []
    for row, sections in map_rows(rows[:n], lambda row: _sections(prompts, row), skip):
        shown.append(f"=== {printable(row['where'])}")
        for title, ids in sections.items():
            shown += [f"--- {title}: {len(ids)} tokens", _visible(prompts._decode(ids))]
    return "\n".join(shown)


def _sections(prompts, row):
    """Titles and ids of what a row is turned into. Explanations stand between the prompts and what follows them."""
    if row["solution"] is None:
        return {"the student's prompt": prompts.question_prompt(row)}
    scoring = prompts.scoring_row(row, Explanation([], [], "", "", True, False))
    sections = {"the teacher's prompt": scoring.teacher_prompt, "the student's prompt": scoring.student_prompt,
                "what the student reads after an explanation": scoring.bridge,
                "the solution, whose tokens are scored": scoring.solution}
    if isinstance(row.get("explanation"), str) or "messages" in row:
        for view in ("student", "teacher") if isinstance(row.get("explanation"), str) else ("student",):
            ids, start = prompts.sft_row(row, view)
            sections[f"SFT row, --format {view}: the supervised part"] = ids[start:]
    return sections


def _visible(text):
    text = re.sub(r"[ \t]+(?=\n|$)", lambda blanks: "\u00b7" * len(blanks[0]), text)
    return "\n".join(printable(line, longest=10**9) for line in text.replace("\n", "\u21b5\n").split("\n"))


def _any_of(texts):
    return re.compile("|".join(map(re.escape, sorted(texts))))


def _token_bytes(tokenizer):
    """id -> the bytes it stands for in a text."""
    from tokenizers import decoders
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.convert_ids_to_tokens
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        byte = {character: value for value, character in bytes_to_unicode().items()}
        return lambda i: added[i] if i in added else bytes(byte[c] for c in vocabulary(i) or "")
    # Others are decoded behind another token. A byte of a character without a token of its own, <0xE4>, has no text.
    anchor = tokenizer.eos_token_id
    before = len(tokenizer.decode([anchor]))

    def of(i):
        if i not in added and (match := re.fullmatch(r"<0x([0-9A-F]{2})>", vocabulary(i) or "")):
            return bytes.fromhex(match[1])
        return tokenizer.decode([anchor, i])[before:].encode()

    return of
