# SPDX-License-Identifier: MIT
"""
Rows of data sets in one form: schemas, bad rows, leaks. data/README.md has the table of schemas.

Everything a user can get wrong here is a UserError that names the row.
"""

import json
import math
import re
from decimal import Decimal

from rlt.answers import answer_of, as_text, at_mark, boxed, same_text, split_thought, whole_number
from rlt.errors import FLAGS, UserError, printable
from rlt.sources import BROKEN, read_source
from rlt.tags import SOLUTION, THOUGHT, tagged_answer

BOXED = "Return your final response within \\boxed{}. "  # the instruction that the benchmarks' harness puts first
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # of an assistant's turn, beside its content
ROLES = {"developer": "system", "human": "user",
         **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")}


def load_rows(source, *, question_column=None, solution_column=None, explanation_column=None, limit=None,
              skip_bad=False, require_solution=True):
    """Rows of a data source as dicts with `question`, `solution`, `where`, and every column they came with.

    source: a file or a hub id, see rlt/sources.py; limit counts its rows, bad ones included. Schemas are recognised by
    their columns; the three arguments name those of any other. `solution` is None where there is none, which
    require_solution=False allows. Rows that have them bring `explanation` (text) and `messages` (dicts with role and
    content, an assistant's turn last); messages are left out where a column is named.

    Bad rows raise UserError naming file and line of the first; with skip_bad they are left out and counted in a line of
    output.
    """
    named = {"question": question_column, "solution": solution_column, "explanation": explanation_column}
    named = {ours: theirs for ours, theirs in named.items() if theirs}
    rows, bad = [], []
    for where, raw in read_source(source, limit):
        try:
            rows.append(_row(raw, named, require_solution) | {"where": where})
        except UserError as error:
            bad.append(UserError(f"{where} {error}"))
    if bad and not skip_bad:
        raise UserError(f"{bad[0]}. Fix it{', or pass --skip-bad-rows to leave such rows out' * bool(rows)}.")
    if bad:
        print(f"{printable(source)}: {len(bad)} bad rows left out, the first: {bad[0]}")
    if not rows:
        raise UserError(f"{source} has no usable rows: expected at least one with a question"
                        + " and a solution." * require_solution)
    return rows


def map_rows(rows, function, skip=False):
    """[(row, function(row))] of the rows.

    A row that the function refuses (UserError) raises with the row's place; with skip it is left out and counted in a
    line of output.
    """
    kept, bad = [], []
    for row in rows:
        try:
            kept.append((row, function(row)))
        except UserError as error:
            bad.append(UserError(f"{row['where']} {error}"))
            if not skip:
                raise UserError(f"{bad[0]}, or pass --skip-bad-rows to leave such rows out.") from None
    if bad:
        print(f"{len(bad)} of {len(rows)} rows left out, the first: {bad[0]}")
    return kept


def between(text, start, end):
    """The text between the first `start` and the `end` after it, or None."""
    _, opened, tail = text.partition(start)
    inner, closed, _ = tail.partition(end)
    return inner if opened and closed else None


# ---------------------------------------------------------------------------------------------------------
# schemas


def _row(raw, named, require_solution):
    """A row with our columns. Raises UserError with the end of a sentence that starts with the row's place.

    named: our column -> the row's own, where a flag names it.
    """
    if isinstance(raw, UserError):
        raise raw
    if not isinstance(raw, dict):
        raise UserError(f"holds a {type(raw).__name__}, expected an object")
    for name in named.values():
        if name not in raw:
            raise UserError(f'has no "{name}"; columns found: {", ".join(raw)}')
    filled = {name: value for name, value in raw.items() if not _is_empty(value)}
    columns = {name.strip().lower(): value for name, value in filled.items()} | filled
    if "answer" in columns:
        columns["answer"] = _number_as_text(columns["answer"])

    # what the row came with, what a known schema makes of it, what the flags name: later ones win
    row = {name: value for name, value in raw.items() if name not in ("messages", "closed")}
    row["solution"] = raw.get("solution")
    if not named.keys() & {"question", "solution"}:
        row |= _by_schema(columns)
    row |= {name: columns[name] for name in ("answer", "explanation", "hint", "closed") if name in columns}
    if "messages" in columns and not named:
        row |= _messages(columns["messages"], "explanation" in columns)
    row |= {ours: _number_as_text(raw[name]) for ours, name in named.items()}
    if named.get("explanation", "").strip().lower() == "answer" and "solution" not in named:
        if at_mark(str(row["explanation"]))[1] is not None:  # GSM8K
            row["explanation"], _, row["solution"] = _solution_of(row["explanation"]).rpartition("\n")
    row["solution"] = _number_as_text(row["solution"])
    _check_texts(row, raw, columns, named, require_solution)
    return row


def _check_texts(row, raw, columns, named, require_solution):
    """Raise UserError unless the row's texts are there and are texts. raw: as it came; columns: as in _by_schema."""
    required = {"question", *named, *(["solution"] if require_solution else [])}
    for column in ("question", "solution", "explanation", "hint"):
        value = row.get(column)
        if column in required and _is_empty(value) and value is not None:
            raise UserError(f"has an empty {column}")
        if column in required and value is None:
            _raise_missing(column, named.get(column, column), raw, columns, require_solution)
        if value is not None and not isinstance(value, str) and column in ("question", "solution", *named):
            raise UserError(f"has {column} of type {type(value).__name__}, expected text")
        if isinstance(value, str) and BROKEN.search(value):
            raise UserError(f"has half a character (a lone surrogate) in its {column}")


def _raise_missing(column, name, raw, columns, require_solution):
    """column: ours, which the row lacks; name: what a flag calls it; columns: as in _by_schema."""
    if name in raw:
        raise UserError(f"has an empty {column}")
    for own in [own for own in raw if own not in columns]:  # the empty ones
        if column in _by_schema_if_filled(columns, own):
            raise UserError(f'has an empty "{own}"')
    wanted = '"question" and "solution"' if require_solution else '"question"'
    remedy = "; name them by --question-column and --solution-column" if "--question-column" in FLAGS else ""
    raise UserError(f'has no {wanted}; columns found: {", ".join(raw)}{remedy}')


def _by_schema_if_filled(columns, empty):
    """What _by_schema would find if this empty column had a value."""
    try:
        return _by_schema(columns | {empty.strip().lower(): "1"})
    except UserError:  # a known column, for which "1" won't do
        return {"question", "solution"}


def _is_empty(value):
    """Whether a value stands for nothing: null, NaN (as pandas writes it), blanks, an empty list."""
    return value is None or value != value or isinstance(value, str) and not value.strip() or value in ([], {})


def _number_as_text(value):
    """72 as "72", and so 72.0, which a column of whole numbers with a null holds; 1e-05 as Python writes it, so that a
    grader knows what it was; any value that is no number as it is."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    if isinstance(value, Decimal):
        return re.sub(r"\.0+$", "", f"{value:f}")
    if isinstance(value, int):
        return as_text(value) or value
    return value


def _by_schema(columns):
    """question, solution, perhaps explanation, of a row with known columns; {} of any other.

    columns: the row's without empty ones, names in lower case, too. The order is that of data/README.md.
    """
    names = columns.keys()
    if "conversations" in names:  # Bespoke-Stratos, OpenThoughts, ShareGPT
        return _exchange(columns["conversations"], "conversations")
    if names >= {"problem", "deepseek_reasoning", "deepseek_solution"}:  # OpenThoughts, the metadata
        return {"question": columns["problem"], "solution": columns["deepseek_solution"],
                "explanation": columns["deepseek_reasoning"]}
    if names >= {"problem", "solution"}:  # MATH, AIME 2024, open-r1
        return {"question": BOXED + _text(columns, "problem"), "solution": columns["solution"]}
    if names >= {"question", "solution"}:
        return {"question": columns["question"], "solution": columns["solution"]}
    if names >= {"question", "correct answer"}:  # GPQA: rlt/grading.py adds the choices
        return {"question": columns["question"], "solution": columns["correct answer"]}
    if names >= {"body", "question", "answer"}:  # SVAMP
        question = f"{_text(columns, 'body').strip()} {_text(columns, 'question').strip()}"
        return {"question": BOXED + question, "solution": _solution_of(columns["answer"])}
    for question, answer in (("squestion", "lsolutions"), ("question", "final_ans")):  # MultiArith, as published, hub
        if names >= {question, answer}:
            value = columns[answer]
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            return {"question": BOXED + _text(columns, question).strip(),
                    "solution": _solution_of(_number_as_text(value))}
    for name in ("question", "problem"):  # GSM8K, AIME 2025
        if names >= {name, "answer"}:
            return {"question": BOXED + _text(columns, name), "solution": _solution_of(columns["answer"])}
    if names >= {"nums", "target"}:
        return _countdown(columns["nums"], columns["target"])
    if names >= {"instruction", "output"}:  # Alpaca
        question = "\n\n".join(_text(columns, name) for name in ("instruction", "input") if name in names)
        return {"question": question, "solution": columns["output"]}
    if names >= {"input", "output"} and re.fullmatch(r"\d+(?:,\d+)+", str(columns["input"])):  # countdown of d1
        return _countdown(columns["input"].split(","), columns["output"])
    if "messages" in names:
        try:
            return _exchange(columns["messages"], "messages")
        except UserError:
            if "question" not in names:
                raise
            return {}  # the messages of a row with a question can be trained on as they are
    if "problem" in names:
        return {"question": columns["problem"]}
    return {}


def _text(columns, name):
    if not isinstance(columns[name], str):
        raise UserError(f"has {name} of type {type(columns[name]).__name__}, expected text")
    return columns[name]


def _solution_of(answer):
    """A solution from an answer: GSM8K's steps without calculator marks, their number boxed; others boxed if short."""
    answer = as_text(answer)
    if answer is None:
        raise UserError("has an answer that is neither text nor a number")
    steps, number = at_mark(answer)
    if number == "":
        raise UserError('has an answer without "#### number"')
    if number:
        return re.sub(r"<<.*?>>", "", steps).rstrip() + f"\n\\boxed{{{number}}}"
    return answer if "\\boxed" in answer or "\n" in answer else f"\\boxed{{{answer}}}"


def countdown_question(nums, target):
    """The question of a countdown problem: whole numbers, and one to reach with them."""
    return (f"{BOXED}Using each of the numbers {', '.join(map(str, nums))} exactly once, with + - * / and "
            f"parentheses, write an expression that equals {target}.")


def _countdown(nums, target):
    """Numbers to reach a target with; there is no solution, any right expression counts."""
    if isinstance(nums, str) and nums.startswith("["):  # from a CSV file
        nums = _json(nums, "nums")
    if not isinstance(nums, list):
        return {}
    nums, target = [whole_number(number) for number in nums], whole_number(target)
    if not nums or None in (*nums, target):
        raise UserError("has nums and a target that are not whole numbers")
    question = countdown_question(nums, target)
    return {"question": question, "solution": None, "nums": nums, "target": target}


# ---------------------------------------------------------------------------------------------------------
# conversations


def _exchange(value, column):
    """question, solution, perhaps explanation, of a conversation with one question and its answer."""
    turns = [turn for turn in _turns(value, column) if turn["role"] != "system"]
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(f"has {column} without a user turn and the assistant's answer (found: {roles})")
    question, answer = (turn["content"] for turn in turns)
    explanation, solution = _sections(answer)
    if solution is None:
        raise UserError(f"has {column} without thought and solution in their tags")
    return {"question": question, "solution": solution.strip("\n")} | (
        {} if explanation is None else {"explanation": explanation.strip("\n")})


def _messages(value, explained):
    """`messages` to train on, where they end with an assistant's turn; and `explanation`, unless the row has one.

    That explanation is the text in the messages, so that the two give the same ids.
    """
    turns = _turns(value, "messages")
    if turns[-1]["role"] != "assistant":
        return {}
    explanation, _ = _sections(turns[-1]["content"])
    return {"messages": turns} | ({} if explained or explanation is None else {"explanation": explanation})


def _turns(value, column):
    """A conversation as dicts with role and content (text), whatever its keys and its form.

    A thought that an assistant's turn has in a column of its own becomes part of its content, in our tags.
    """
    if isinstance(value, str):
        value = _json(value, column)
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"has {column} without turns: expected a list of objects with role and content")
    turns = []
    for turn in value:
        role = turn.get("role") or turn.get("from")
        content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
        if isinstance(content, list):  # parts, as in the API for text and images
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        role = ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise UserError(f"has {column} with a turn that is no text by system, user or assistant")
        thought = next((turn[key] for key in THOUGHT_KEYS if not _is_empty(turn.get(key))), None)
        if role == "assistant" and content.strip() and not isinstance(thought, bool | None):  # a bool: whether to think
            if not isinstance(thought, str):
                raise UserError(f"has {column} with a thought of type {type(thought).__name__}, expected text")
            if _sections(content) == (None, content):
                content = tagged_answer(thought.strip("\n") + "\n\n", content.strip("\n"))
        if BROKEN.search(content):
            raise UserError(f"has half a character (a lone surrogate) in its {column}")
        turns.append({"role": role, "content": content})
    return turns


def _sections(answer):
    """(thought, solution) of an assistant's turn, by our tags or another model's; thought None where it has none.

    (None, None) where it has tags that do not belong together, or a thought that never ends.
    """
    if any(tag in answer for tag in THOUGHT + SOLUTION):
        thought, solution = between(answer, *THOUGHT), between(answer, *SOLUTION)
        return (None, None) if None in (thought, solution) else (thought.lstrip("\n"), solution)
    thought, solution = split_thought(answer)
    if thought is None:
        return None, solution
    in_tags = re.fullmatch(r"\s*<answer>(.*)</answer>\s*", solution, re.DOTALL | re.IGNORECASE)
    return thought.strip("\n") + "\n\n", in_tags[1] if in_tags else solution


def _json(text, column):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"has {column} that are no JSON") from None


# ---------------------------------------------------------------------------------------------------------
# leaks

STATED = (r"\b(?i:answer|result|solution)"  # possessive (++): linear in the text
          r"(?i:[\s*_]*(?:is|equals|must|should|would|will|be|then|thus|therefore|clearly|just|simply|:|=|,))++|####")


def leaks(explanation, solution):
    """Whether the explanation gives the solution away instead of arriving at it: `leak` in logs, tables and figures.

    It does where one of these stands before its middle, or with next to nothing around it:
      - the solution, word for word, if it has more than two characters: "5" or "A" may stand in any text
      - a statement of the answer: "the answer is 144", "\\boxed{144}", "#### 144". The answer is what the solution's
        last box holds, or a solution of few words itself. It may be in another notation, "1/2" or "C" for \\text{C}
    And where it is a boxed solution's answer alone, with at most three words before it: "144", "It is 144."
    Statements are recognised in English only, the solution itself in any language with blanks between words.
    """
    text = f" {' '.join(explanation.split())} "
    wanted = f" {' '.join(solution.split())} "
    stands = wanted in text and len(wanted.strip()) > 2
    found = [(text.find(wanted), len(wanted.split()))] if stands else []
    in_box = " ".join((answer_of("math500", solution) or "").split())
    answer = in_box or (wanted.strip() if len(wanted.split()) <= 5 else "")
    if answer and (statement := _statement(answer).search(text)):
        found.append((statement.start(), len(statement[0].split())))
    found += [(at, len(box.split())) for at, box in boxed(text) if answer and same_text(answer, box)]
    short = 0 < len(answer) <= 200
    found += _statements_in_another_notation(answer, text) if short else []
    alone = in_box and (re.fullmatch(rf"\W*(?:[A-Za-z]+\W+){{0,3}}{_either(in_box)}\W*", text)
                        or short and _is_alone(in_box, text.split()))
    return bool(alone) or any(at < len(text) / 2 or len(text.split()) < 2 * words for at, words in found)


def _statement(answer):
    """The pattern of sentences that state an answer as it is."""
    return re.compile(rf"(?:{STATED}|(?=\\boxed))[\s:*_$(\[\\]*(?:\\boxed\s?\{{\s?)?{_either(answer)}(?!\w|[.,]\d)")


def _statements_in_another_notation(answer, text):
    """[(position, number of words)] of the first sentence that states a short answer, as same_text compares it."""
    tried = set()  # a model that repeats itself states an answer a thousand times
    for stated in re.finditer(rf"(?:{STATED})(?:[\s:*_$]|\\[(\[])*+", text):
        words = text[stated.end() : stated.end() + 2 * len(answer) + 40].split()
        for n in range(1, min(len(words), 9) + 1):  # "x + 1" is x+1
            start = " ".join(words[:n])
            if start not in tried and _is_same(answer, start):
                return [(stated.start(), len(stated[0].split()) + n)]
            tried.add(start)
    return []


def _is_alone(answer, words):
    """Whether the words are a short answer, as same_text compares it, and at most three before it."""
    before = [n for n in range(4) if all(word.strip(",:*").isalpha() for word in words[:n])]
    return len(words) <= 12 and any(_is_same(answer, " ".join(words[n:])) for n in before)


def _is_same(answer, text):
    """Whether a text is the answer, with punctuation around it. "3 4" is not 34, and no letter or digit is nothing."""
    return re.search(r"\w", text) and not re.search(r"\d\s+\d", text) and same_text(_bare(answer), _bare(text))


def _bare(text):
    """A text without punctuation and markup around it; a choice, "(C)", as its letter."""
    text = re.sub(r"^\\[(\[]|\\[)\]]$", "", text.strip(" .,;:?*_$`\"'"))
    return re.sub(r"^(?:\\text(?:bf)?\{)?\((\w+)\)\}?$", r"\1", text.strip(" .,;:?*_$`\"'"))


def _either(answer):
    """A pattern of the answer, as it is and without the commas of its thousands."""
    return f"(?:{'|'.join(re.escape(text) for text in {answer, answer.replace(',', '')})})"
