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

import json
from pathlib import Path
from typing import NamedTuple

THOUGHT = ("<|begin_of_thought|>", "<|end_of_thought|>")
SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
EXPLANATION = ("<|begin_of_explanation|>", "<|end_of_explanation|>")

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
BOXED = "Return your final response within \\boxed{}. "  # the instruction that the benchmarks' harness puts first


# ---------------------------------------------------------------------------------------------------------
# rows


def load_rows(source, *, question_column=None, solution_column=None, limit=None, skip_bad=False, solved=True):
    """Rows of a data source as dicts with `question`, `solution`, `where`, and every column they came with.

    source: a .jsonl, .json or .parquet file, or a hub id ("org/name", its train split). Known schemas: our own
    (question, solution, perhaps explanation), Stratos `conversations`, GSM8K, MATH, AIME, countdown; any other
    through the two columns. solved=False also takes rows that have no solution (countdown).
    limit counts rows of the source, from its start. A bad row raises ValueError naming file and line; with
    skip_bad it is left out and counted in a line of output.
    """
    rows, bad = [], []
    for where, raw in _read(source, limit):
        try:
            if isinstance(raw, Exception):
                raise ValueError(f"is not JSON ({raw})")
            rows.append(_canonical(raw, where, question_column, solution_column, solved))
        except ValueError as error:
            if not skip_bad:
                raise ValueError(f"{where} {error}. Mend it, or pass --skip-bad-rows to leave such rows out.") from None
            bad.append(f"{where} {error}")
    if bad:
        print(f"{source}: {len(bad)} bad rows left out, the first: {bad[0]}")
    if not rows:
        raise ValueError(f"{source} has no usable rows: expected at least one with a question and a solution.")
    return rows


def _read(source, limit):
    """(where, object or the exception that stands for it), at most `limit` of them."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            for count, (number, line) in enumerate(filled):
                if count == limit:
                    return
                try:
                    yield f"{source} line {number}", json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    yield f"{source} line {number}", error
        return
    if path.suffix == ".json" and path.is_file():
        try:
            table = json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON ({error}). Mend it, or save it as JSONL.") from None
        if not isinstance(table, list):
            raise ValueError(f"{source} holds a {type(table).__name__}, expected a list of rows. Save it as JSONL.")
    else:
        from datasets import load_dataset

        if path.suffix == ".parquet" and path.is_file():
            table = load_dataset("parquet", data_files=str(path), split="train")
        elif path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
            raise FileNotFoundError(f"{source}: expected a .jsonl, .json or .parquet file that exists, or a hub id.")
        else:
            try:
                table = load_dataset(str(source), split="train")
            except Exception as error:  # whatever the hub has to say, in its first line
                reason = str(error).strip().partition("\n")[0]
                raise FileNotFoundError(f"{source}: expected a file or a readable hub id ({reason})") from None
    for number, raw in enumerate(table):
        if number == limit:
            return
        yield f"{source} row {number}", raw


def _canonical(raw, where, question_column, solution_column, solved):
    """One row in our words. Raises ValueError with the end of a sentence that starts with the row's place."""
    if not isinstance(raw, dict):
        raise ValueError(f"holds a {type(raw).__name__}, expected an object")
    row, boxed = {**raw, "where": where}, ""
    if question_column or solution_column:
        question, solution = question_column or "question", solution_column or "solution"
        for column in (question, solution):
            if column not in raw:
                raise ValueError(f'has no "{column}"; columns found: {", ".join(raw)}')
        row["question"], row["solution"] = raw[question], raw[solution]
    elif "conversations" in raw:
        row |= _stratos(raw["conversations"])
    elif "problem" in raw and "solution" in raw:  # MATH, AIME
        row["question"], boxed = raw["problem"], BOXED
    elif "question" in raw and "solution" in raw:
        pass
    elif "question" in raw and "answer" in raw:  # GSM8K: steps with calculator marks, then "#### 72"
        row["solution"], boxed = _gsm8k_solution(raw["answer"]), BOXED
    elif isinstance(raw.get("nums"), list) and "target" in raw and not solved:
        numbers = ", ".join(map(str, raw["nums"]))
        row["question"], row["solution"], boxed = (
            f"Using each of the numbers {numbers} exactly once, with + - * / and parentheses, write an expression that "
            f"equals {raw['target']}."
        ), None, BOXED
    else:
        raise ValueError(
            f'has no "question" and "solution"; columns found: {", ".join(raw)}; name them by '
            "--question-column and --solution-column"
        )
    for column in ("question", "solution") if solved else ("question",):
        if not isinstance(row[column], str):
            raise ValueError(f"has a {column} of type {type(row[column]).__name__}, expected text")
        if not row[column].strip():
            raise ValueError(f"has an empty {column}")
    row["question"] = boxed + row["question"]
    return row


def _stratos(turns):
    """Bespoke-Stratos: a user turn, and an assistant turn with a thought and a solution in their tags."""
    turns = turns if isinstance(turns, list) else []
    said = {turn.get("from"): turn.get("value") for turn in turns if isinstance(turn, dict)}
    answer = said.get("assistant")
    parts = [between(answer, *tags) if isinstance(answer, str) else None for tags in (THOUGHT, SOLUTION)]
    if None in parts or "user" not in said:
        raise ValueError("has conversations without a user turn, or an assistant turn without thought and solution")
    return {"question": said["user"], "explanation": parts[0].strip("\n"), "solution": parts[1].strip("\n")}


def between(text, start, end):
    """What stands between the first `start` and the `end` after it, or None."""
    head, opened, tail = text.partition(start)
    inner, closed, _ = tail.partition(end)
    return inner if opened and closed else None


def _gsm8k_solution(answer):
    import re

    steps, mark, value = str(answer).rpartition("####")
    if not mark or not value.strip():
        raise ValueError('has an answer without "#### number"')
    return re.sub(r"<<.*?>>", "", steps).rstrip() + f"\n\\boxed{{{value.strip()}}}"


def viewed(rows, view, skip=False):
    """[(row, view(row))] of the rows. One that the view refuses (ValueError) raises with its place, or is left out."""
    kept, out = [], []
    for row in rows:
        try:
            kept.append((row, view(row)))
        except ValueError as error:
            if not skip:
                raise ValueError(f"{row['where']} {error}, or pass --skip-bad-rows to leave such rows out.") from None
            out.append(f"{row['where']} {error}")
    if out:
        print(f"{len(out)} of {len(rows)} rows left out, the first: {out[0]}")
    return kept


def leaks(explanation, solution):
    """Whether the explanation gives the solution away instead of arriving at it: the solution stands in it word for
    word, before its middle or with next to nothing around it."""
    text, wanted = (f" {' '.join(words.split())} " for words in (explanation, solution))
    at = text.find(wanted)
    return at >= 0 and (at < len(text) / 2 or len(text.split()) < 2 * len(wanted.split()))


# ---------------------------------------------------------------------------------------------------------
# views


class ScoringRow(NamedTuple):
    """Token ids of one explanation, ready for rewards.score_explanations.

    teacher reads  teacher_prompt + thought + teacher_end           (thought + teacher_end: all that was sampled)
    student reads  student_prompt + thought + bridge + solution
    """

    teacher_prompt: list
    thought: list
    teacher_end: list
    student_prompt: list
    bridge: list
    solution: list


class Explanation(NamedTuple):
    """A teacher's completion, taken apart."""

    thought: list  # ids that are scored
    end: list  # ids after them: closing tag, end of turn. Trained on, not scored
    left_over: str  # characters of a token that straddles thought and closing tag
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
            raise ValueError(f"{tokenizer.name_or_path} has no chat template: expected an instruct model's tokenizer.")
        for ours, theirs in zip(EXPLANATION, THOUGHT, strict=True):
            a, b = self.encode(ours), self.encode(theirs)
            if a != b and 1 in (len(a), len(b)):
                # the teacher's mass on its own tag would meet a student that never saw that token: every KL is off
                raise ValueError(
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
            raise ValueError(f"can't be tokenized ({error}): use words that the model has") from None

    def question(self, row):
        """Ids of the student's prompt: system, question, and the start of an empty assistant turn."""
        return self._turn(STUDENT_SYSTEM, row["question"])

    def hinted(self, row):
        """The student's prompt with the row's `hint` after the question (Guide-GRPO)."""
        return self._turn(STUDENT_SYSTEM, f"{row['question']}\n\n{self._column(row, 'hint')}")

    def _column(self, row, name):
        if not isinstance(row.get(name), str):
            raise ValueError(f'has no "{name}" (columns found: {", ".join(row)}): give the rows one')
        return row[name]

    def student(self, row):
        """The plain prompt with the thought opened: what stands before an explanation when the student scores it."""
        return self.question(row) + self.encode(f"{THOUGHT[0]}\n\n")

    def teacher(self, row):
        """Ids of the teacher's prompt: it has seen the solution, and the explanation is opened."""
        known = f"{SOLUTION[0]}\n\n{row['solution']}\n\n{SOLUTION[1]}"
        opened = f"{EXPLANATION[0]}\n\n"
        if self.solution_in == "user":
            return self._turn(TEACHER_SYSTEM, f"{row['question']}\n\n{known}") + self.encode(opened)
        return self._turn(TEACHER_SYSTEM, row["question"]) + self.encode(f"{known}\n\n{opened}")

    def _turn(self, system, user):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return self.encode(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def written(self, row):
        """(ids, closed): the row's `explanation` as a teacher would have sampled it.

        A row that distill.py wrote (it has `messages`) is taken as it is; other texts get a blank line at the end.
        """
        closed, text = row.get("closed", True), self._column(row, "explanation")
        text = text if "messages" in row else text.strip("\n") + "\n\n"
        return (self.encode(text + EXPLANATION[1]) + [self.tokenizer.eos_token_id], True) if closed else (
            self.encode(text), False)

    def fitting(self, rows, room, skip=False, also=()):
        """The rows whose prompts and solution, and what `also` makes ids of, fit into `room` tokens."""

        def length(row):
            solution = len(self.encode(row["solution"] or ""))
            tokens = max(len(self.teacher(row)), len(self.student(row)) + solution + 32)  # 32: the tags between
            tokens += sum(len(ids_of(row)) for ids_of in also)
            if tokens > room:
                raise ValueError(f"takes {tokens} tokens, room is for {room}: shorten it, lower --max-new-tokens")
            return tokens

        return [row for row, _ in viewed(rows, length, skip)]

    def split(self, ids, finished):
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
        left_over = written[length:at].decode("utf-8", "replace")
        after = written[at + len(self._closing) :]
        text = self.tokenizer.decode(body[:boundary]) + left_over
        closed = finished and not after.strip()
        return Explanation(list(body[:boundary]), list(ids[boundary:]), left_over, text, closed)

    def scoring(self, row, explanation):
        """The ScoringRow of one explanation (as `split` returns it) of one row."""
        bridge = f"{explanation.left_over}{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n"
        return ScoringRow(
            teacher_prompt=self.teacher(row),
            thought=explanation.thought,
            teacher_end=explanation.end,
            student_prompt=self.student(row),
            bridge=self.encode(bridge),
            solution=self.encode(f"{row['solution']}\n\n"),
        )

    def distilled(self, row, text):
        """The chat messages a student is trained on: the teacher's raw text with the tags swapped."""
        answer = f"{THOUGHT[0]}\n\n{text}{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n{row['solution']}\n\n{SOLUTION[1]}"
        roles = ("system", STUDENT_SYSTEM), ("user", row["question"]), ("assistant", answer)
        return [{"role": role, "content": content} for role, content in roles]

    def sft(self, row, view):
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
                prompt, answer = self.question(row), self.distilled(row, padded)[-1]["content"]
            else:
                prompt, answer = self.teacher(row), padded + EXPLANATION[1]
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
