# SPDX-License-Identifier: MIT
"""
Reading rows: files, hub ids, schemas, bad rows. data/README.md has the table of schemas.

Everything a user can get wrong here is a UserError that names the row.
"""

import json
import re
from pathlib import Path

from rlt.errors import UserError
from rlt.tags import SOLUTION, THOUGHT

BOXED = "Return your final response within \\boxed{}. "  # the instruction that the benchmarks' harness puts first


def load_rows(source, *, question_column=None, solution_column=None, explanation_column=None, limit=None,
              skip_bad=False, require_solution=True):
    """Rows of a data source as dicts with `question`, `solution`, `where`, and every column they came with.

    source: a .jsonl, .json or .parquet file, or a hub id ("org/name", its train split). Known schemas: our own
    (question, solution, perhaps explanation), Stratos `conversations`, GSM8K, MATH, AIME, countdown; any other
    through the two columns. require_solution=False also takes rows that have no solution (countdown).
    limit counts rows of the source, from its start. A bad row raises UserError naming file and line; with
    skip_bad it is left out and counted in a line of output.
    """
    rows, bad = [], []
    for where, raw in _read(source, limit):
        try:
            if isinstance(raw, Exception):
                raise UserError(f"is not JSON ({raw})")
            row = _canonical(raw, where, question_column, solution_column, require_solution)
            if explanation_column:
                row["explanation"] = raw[explanation_column]
            rows.append(row)
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{where} {error}. Fix it, or pass --skip-bad-rows to leave such rows out.") from None
            bad.append(f"{where} {error}")
    if bad:
        print(f"{source}: {len(bad)} bad rows left out, the first: {bad[0]}")
    if not rows:
        raise UserError(f"{source} has no usable rows: expected at least one with a question and a solution.")
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
            raise UserError(f"{source} is not JSON ({error}). Fix it, or save it as JSONL.") from None
        if not isinstance(table, list):
            raise UserError(f"{source} holds a {type(table).__name__}, expected a list of rows. Save it as JSONL.")
    else:
        from datasets import load_dataset

        if path.suffix == ".parquet" and path.is_file():
            table = load_dataset("parquet", data_files=str(path), split="train")
        elif path.exists() or path.suffix in (".jsonl", ".json", ".parquet"):
            raise UserError(f"{source}: expected a .jsonl, .json or .parquet file that exists, or a hub id.")
        else:
            try:
                table = load_dataset(str(source), split="train")
            except Exception as error:  # whatever the hub has to say, in its first line
                reason = str(error).strip().partition("\n")[0]
                raise UserError(f"{source}: expected a file or a readable hub id ({reason})") from None
    for number, raw in enumerate(table):
        if number == limit:
            return
        yield f"{source} row {number}", raw


def _canonical(raw, where, question_column, solution_column, require_solution):
    """One row in our column names. Raises UserError with the end of a sentence that starts with the row's place."""
    if not isinstance(raw, dict):
        raise UserError(f"holds a {type(raw).__name__}, expected an object")
    row, boxed = {**raw, "where": where}, ""
    if question_column or solution_column:
        question, solution = question_column or "question", solution_column or "solution"
        for column in (question, solution):
            if column not in raw:
                raise UserError(f'has no "{column}"; columns found: {", ".join(raw)}')
        row["question"], row["solution"] = raw[question], raw[solution]
    elif "conversations" in raw:
        row |= _stratos(raw["conversations"])
    elif "problem" in raw and "solution" in raw:  # MATH, AIME
        row["question"], boxed = raw["problem"], BOXED
    elif "question" in raw and "solution" in raw:
        pass
    elif "question" in raw and "answer" in raw:  # GSM8K: steps with calculator marks, then "#### 72"
        row["solution"], boxed = _gsm8k_solution(raw["answer"]), BOXED
    elif isinstance(raw.get("nums"), list) and "target" in raw and not require_solution:
        numbers = ", ".join(map(str, raw["nums"]))
        row["question"], row["solution"], boxed = (
            f"Using each of the numbers {numbers} exactly once, with + - * / and parentheses, write an expression that "
            f"equals {raw['target']}."
        ), None, BOXED
    else:
        raise UserError(
            f'has no "question" and "solution"; columns found: {", ".join(raw)}; name them by '
            "--question-column and --solution-column"
        )
    for column in ("question", "solution") if require_solution else ("question",):
        if not isinstance(row[column], str):
            raise UserError(f"has a {column} of type {type(row[column]).__name__}, expected text")
        if not row[column].strip():
            raise UserError(f"has an empty {column}")
    row["question"] = boxed + row["question"]
    return row


def _stratos(turns):
    """Bespoke-Stratos: a user turn, and an assistant turn with a thought and a solution in their tags."""
    turns = turns if isinstance(turns, list) else []
    said = {turn.get("from"): turn.get("value") for turn in turns if isinstance(turn, dict)}
    answer = said.get("assistant")
    parts = [between(answer, *tags) if isinstance(answer, str) else None for tags in (THOUGHT, SOLUTION)]
    if None in parts or "user" not in said:
        raise UserError("has conversations without a user turn, or an assistant turn without thought and solution")
    return {"question": said["user"], "explanation": parts[0].strip("\n"), "solution": parts[1].strip("\n")}


def between(text, start, end):
    """What stands between the first `start` and the `end` after it, or None."""
    head, opened, tail = text.partition(start)
    inner, closed, _ = tail.partition(end)
    return inner if opened and closed else None


def _gsm8k_solution(answer):
    steps, mark, value = str(answer).rpartition("####")
    if not mark or not value.strip():
        raise UserError('has an answer without "#### number"')
    return re.sub(r"<<.*?>>", "", steps).rstrip() + f"\n\\boxed{{{value.strip()}}}"


def map_rows(rows, function, skip=False):
    """[(row, function(row))] of the rows.

    A row that the function refuses (UserError) raises with the row's place; with skip it is left out and counted in a
    line of output.
    """
    kept, out = [], []
    for row in rows:
        try:
            kept.append((row, function(row)))
        except UserError as error:
            if not skip:
                raise UserError(f"{row['where']} {error}, or pass --skip-bad-rows to leave such rows out.") from None
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
