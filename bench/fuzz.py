# SPDX-License-Identifier: MIT
"""
Coverage-guided fuzzing of what reads other people's text: the tag parser, the answer parser and the row loader.

An input is a list of pieces: ids of tokens, or strings, some of which mean something to the parser. One that reaches a
pair of consecutive lines of rlt/ that no input before has reached is kept; later inputs are changed copies of those.
Any input gives a value that passes the target's checks, or a UserError, within a second.
"""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

from rlt import answers, models, prompts, rows
from rlt.errors import UserError

OURS = str(Path(prompts.__file__).parent)
SLOW = 1.0  # seconds of this process: longer than any of these texts may take
BETWEEN = "\x1f"  # a piece that ends one text of an input and begins the next
TAGS = [*prompts.THOUGHT, *prompts.SOLUTION, *prompts.EXPLANATION, "<think>", "</think>", "[THINK]", "<|channel|>final"]
JSON = ["\n", "{", "}", "[", "]", ":", ",", '"', "\\", "null", "NaN", "1e999", "9" * 5000, "[" * 3000, "\\ud800",
        '{"question": "q", "solution": "s"}\n', '{"question": "q", "answer": "#### 1"}\n', '"question": ',
        '"messages": ', '"nums": [1, 2], "target": 3', '"conversations": [{"from": "human", "value": "q"}, ',
        '{"role": "assistant", ', '"content": ', '"problem": ', '"instruction": "i", "output": ',
        '"Correct Answer": ', '"deepseek_reasoning": ']
MATHS = ["\\boxed{", "}", "{", "####", "\\frac", "{1}{2}", "(" * 50, "1/0", "**", "9" * 400, "1,234.5", "x=", "+", "-",
         "the answer is (", "C", ")", "\\text{", "=", "*", "\\times ", "1e-05", "\u2212", "\uff11"]
TEXT = ["\n\n", " ", "\0", "\x1b[2J", "\u00e9", "\u202e", "\U0001f600", "\ud83d", "word", "\r\n", "\u0660", "!", ".<"]


class Coverage:
    """Pairs of consecutive lines in rlt/, over all calls."""

    def __init__(self):
        self.seen = set()

    def call(self, function, *inputs):
        """function(*inputs) -> whether it reached a pair of lines that no call before has reached."""
        found, before = set(), {}

        def trace(frame, event, _):
            code = frame.f_code
            if not code.co_filename.startswith(OURS):
                return None
            found.add((code, before.get(code), frame.f_lineno))
            before[code] = frame.f_lineno
            return trace

        sys.settrace(trace)
        try:
            function(*inputs)
        finally:
            sys.settrace(None)
            self.new = not found <= self.seen
            self.seen |= found


class Target:
    """A parser: `check` calls it with a list of pieces and asserts what must hold. first: an input that is right."""

    def __init__(self, check, pieces, first, draw):
        self.check, self.pieces, self.draw, self.corpus = check, pieces, draw, [first]

    def piece(self):
        if self.draw.random() < 0.8:
            return self.draw.choice(self.pieces)
        return chr(self.draw.randrange(1, 0x3000)) if isinstance(self.pieces[0], str) else self.draw.choice(self.pieces)

    def input(self):
        """A kept input with one to eight changes."""
        chosen = list(self.draw.choice(self.corpus))
        for _ in range(self.draw.randint(1, 8)):
            at, end = sorted(self.draw.randrange(len(chosen) + 1) for _ in range(2))
            part = self.draw.choice(([], [self.piece()], chosen[at:end] * 2, self.draw.choice(self.corpus)))
            chosen[at : self.draw.choice((at, end))] = part
        return chosen[:60]


def targets(folder, draw):
    """Each parser as a Target. folder: has runs/toy in it, and takes a file."""
    tokenizer = models.load_tokenizer(str(folder / "runs/toy"))
    words = prompts.Prompts(tokenizer)
    specials = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    ids_of_tags = [tokenizer.convert_tokens_to_ids(token) for token in specials]

    def split(ids):
        for finished in (False, True):
            found = words.split_completion(ids, finished) if ids else None
            if found:
                assert found.thought + found.end == ids and not (found.closed and found.foreign_tags)
                assert not found.closed or finished and not any(tag in found.text for tag in prompts.SOLUTION)

    def explain(pieces):
        texts = ("".join(pieces).split(BETWEEN) + ["", "", ""])[:3]
        row = dict(zip(("question", "solution", "explanation"), texts, strict=True)) | {"where": "fuzz"}
        for view in ("student", "teacher"):
            ids, start = words.sft_row(row, view)
            assert 0 < start < len(ids) and ids[start:].count(words.end_of_turn) == 1 and ids[-1] == words.end_of_turn

    def load(pieces):
        path = folder / f"fuzz.{('jsonl', 'json', 'csv', 'tsv')[len(pieces) % 4]}"
        path.write_text("".join(pieces), errors="surrogatepass")
        for skip in (False, True):
            for row in rows.load_rows(str(path), skip_bad=skip, require_solution=len(pieces) % 3 > 0):
                assert row["question"].strip() and json.dumps(row["question"]).isascii()
                assert all(isinstance(turn["content"], str) for turn in row.get("messages", []))

    def answer(pieces):
        text, _, gold = "".join(pieces).partition(BETWEEN)
        for task in answers.TASKS:
            found = answers.answer_of(task, text)
            assert found is None or isinstance(found, str)
            if task not in answers.MATH_TASKS:
                row = {"where": "fuzz", "solution": gold, "answer": "C", "nums": [1, 2], "target": 3}
                assert answers.is_right(task, answers.gold_answer(task, row), found) in (True, False)
        answers.same_text(gold, text)
        rows.leaks(text, gold)

    strings = [BETWEEN, *TAGS, *specials, *MATHS, *TEXT]
    rows_of_toy = (folder / "runs/toy/train.jsonl").read_text().splitlines(keepends=True)[:3]
    completion, _ = words.encode_explanation(json.loads(rows_of_toy[0]))
    return [Target(split, [*range(len(tokenizer)), *ids_of_tags * 20], completion, draw),
            Target(explain, strings, ["word", BETWEEN, "word", BETWEEN, "word"], draw),
            Target(load, [*JSON, *JSON, *strings], rows_of_toy, draw),
            Target(answer, strings, ["\\boxed{", "1,234.5", "}", BETWEEN, "####", "1,234.5"], draw)]


def fuzz(folder, minutes, draw):
    """Inputs for some minutes of a core -> one entry of counts. What fails is printed, with its input."""
    coverage, parsers = Coverage(), targets(folder, draw)
    counts = {"texts": 0, "user_errors": 0, "failures": 0, "slowest_s": 0.0}
    end = time.process_time() + 60 * minutes  # not monotonic: a busy machine is no fault, and does nothing meanwhile
    while time.process_time() < end:
        target = draw.choice(parsers)
        chosen, began = target.input(), time.process_time()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                coverage.call(target.check, chosen)
            assert time.process_time() - began < SLOW, "slow"
        except UserError:
            counts["user_errors"] += 1
        except Exception as error:
            counts["failures"] += 1
            print(f"{target.check.__name__}: {type(error).__name__}: {error!s:.300}: {chosen!r:.2000}", flush=True)
        if coverage.new:
            target.corpus.append(chosen)
        counts["texts"] += 1
        counts["slowest_s"] = max(counts["slowest_s"], time.process_time() - began)
    yield counts | {"minutes": minutes, "pairs_of_lines": len(coverage.seen),
                    "kept": sum(len(target.corpus) for target in parsers)}
