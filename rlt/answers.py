# SPDX-License-Identifier: MIT
"""
Answers: found in what a model wrote, read from a row, and compared. Text in, verdicts out.

All of it takes time linear in the text, except for math-verify, which never ends on some texts: rlt/grading.py
calls `equivalent` in processes with a time limit.
"""

import ast
import logging
import operator
import re
from decimal import Decimal
from fractions import Fraction

from rlt.errors import UserError
from rlt.tags import SOLUTION

GOLD = {  # task -> the columns of a row that its answers are graded by
    "toy": ("solution",),
    "gsm8k": ("answer",),
    "math500": ("answer",),
    "aime24": ("answer",),
    "aime25": ("answer",),
    "gpqa": ("answer",),
    "countdown": ("nums", "target"),
}
TASKS = tuple(GOLD)
MATH_TASKS = ("gsm8k", "math500", "aime24", "aime25")  # compared by math-verify

# <think>, </thinking>, <|begin_of_thought|>, <|END_THINKING|>, <seed:think>, <inner_reasoning> ...
THOUGHT_TAG = re.compile(
    r"<\|?(/?[\w:-]{0,40}"
    r"(?:think|thought|reason|reflect|rationale|analysis|scratchpad|monologue|deliberat|internal|cot(?![a-z]))"
    r"[\w-]{0,40})"
    r"(?:\s[^<>]{0,99})?\|?>",
    re.IGNORECASE)
SWITCH = re.compile(r"non?[_-]?think(?:ing)?|think(?:ing)?[_-](?:on|off)")  # a tag that says whether to think
OTHER_TAGS = {  # of thoughts: opening -> closing
    r"\[THINK\]": r"\[/THINK\]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi
    r"<\|inner_prefix\|>": r"<\|inner_suffix\|>",  # Apertus
    r"\[unused16\]": r"\[unused17\]",  # openPangu
    r"<\|channel>thought": r"<channel\|>",  # Gemma
    r"<\|channel\|>(?:analysis|commentary)(?:<\|message\|>)?":  # gpt-oss
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>final(?:<\|message\|>)?",
}
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
TYPESET = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width characters
TYPESET |= dict.fromkeys((0x2212, 0x2010, 0x2011, 0x2012, 0x2013, 0xFE63), "-")  # a minus, and dashes used as one
TYPESET |= dict.fromkeys((0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF))  # characters without a width


def is_right(task, gold, answer):
    """Whether an answer (of answer_of; None is wrong) equals the gold answer (of gold_answer)."""
    if answer is None:
        return False
    if task == "toy":
        return answer.split() == gold.split()
    if task == "gpqa":
        return _letter(answer) == gold
    if task == "countdown":
        return _reaches(answer, **gold)
    return equivalent(gold, answer)


# ---------------------------------------------------------------------------------------------------------
# the answer in an output


def answer_of(task, output):
    """The answer that an output gives, as text, or None. An output that is still thinking gives none."""
    text = _after_thought(output)
    if text is None:
        return None
    if task == "toy":
        return _solution_block(text)
    if boxes := list(BOX.finditer(text)):
        return _until_closed(text[boxes[-1].end() :])
    if task == "gsm8k":
        return _last_number(text)
    if task == "gpqa":
        stated = re.findall(r"(?i:answer\s*(?:is|:))[\s*_$:({\[]*(?:\\text\{)?\(?([A-D])\b", text)
        return stated[-1] if stated else None
    return _solution_block(text) if task == "countdown" else None


def opened_thought(prompt):
    """The opening tag that a prompt ends with, or "": some chat templates open the thought."""
    prompt = prompt.rstrip()
    last = [tag for tag in _thought_tags(prompt) if tag[1] == len(prompt)]
    return "".join(prompt[start:] for start, _, _, closes in last if not closes)


def _after_thought(output):
    """What an output says after its last thought; None where it is still thinking."""
    closed, answer = {}, 0  # by the name of a tag: whether the last one closes
    for _, end, name, closes in sorted(_thought_tags(output)):
        closed[name] = closes
        answer = end if closes else answer
    return output[answer:] if all(closed.values()) else None


def split_thought(output):
    """(thought, answer) of an assistant's turn: thought None where it has none, both None where it never ends.

    Any tag can open a thought at the start of the turn, further on only one that is used for nothing else: in a
    program, <InternalNode> opens none. What stands between two thoughts is part of the thought.
    """
    tags, beginning = sorted(_thought_tags(output)), len(output) - len(output.lstrip())
    first = next((name for start, _, name, _ in tags if start == beginning
                  or name in OTHER_TAGS or re.search("(?<![a-z])think(?:ing)?$", name)), None)
    tags = [tag for tag in tags if tag[2] == first]
    if not tags:
        return None, output
    starts, ends, _, closes = zip(*tags, strict=True)
    pieces = [output[end:start] for end, start in zip((0, *ends), starts, strict=False)]
    thought = "".join(pieces if closes[0] else pieces[1:])
    return (thought, output[ends[-1] :]) if closes[-1] else (None, None)


def _thought_tags(text):
    """(start, end, name, closes) of every tag around a thought, of whatever model."""
    for match in THOUGHT_TAG.finditer(text):
        tag = match[1].lower()
        name = re.sub(r"^(?:/|(?:begin|start|end)(?:_of_|of|_))|_(?:begin|start|end)$", "", tag)
        if not SWITCH.fullmatch(name):
            yield *match.span(), name, tag.startswith(("/", "end_", "endof")) or tag.endswith("_end")
    for opening, closing in OTHER_TAGS.items():
        for tag in (opening, closing):
            for match in re.finditer(tag, text, re.IGNORECASE):
                yield *match.span(), opening, tag == closing


def _solution_block(text):
    """The text of the one solution block; None where there are several, since they could list every answer."""
    opening, closing = SOLUTION
    _, *blocks = text.split(opening)
    return blocks[0].partition(closing)[0].strip() if len(blocks) == 1 and closing in blocks[0] else None


def boxed(text):
    """(position, content) of every box that is closed."""
    found = [(box.start(), _until_closed(text[box.end() : box.end() + 400])) for box in BOX.finditer(text)]
    return [(at, content) for at, content in found if content]


def _until_closed(text):
    """The text up to the brace that closes it; None if that is nothing, or the brace never comes."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped brace, \{, opens nothing
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()].strip() or None
    return None


# "-$1,234.50", "3/4", "1.5e-3": a sign that is no subtraction, a currency, digits in groups, decimals. ".5", but not of
# "...5"
NUMBER = re.compile(r"(?<!\d)-?(?:\\?[$€£]\s?)?"
                    r"(?:\d+(?:,\d{3})*(?:\.\d+)?(?:/\d+|[eE][+-]?\d{1,3}(?!\w))?|(?<![\w.])\.\d+)")
MARK = re.compile(r"####[\s*_$\\({]*+(?=-?\\?[$€£]?\s?\.?\d)(?!\d\d?[.):][ \t]+\S)")  # no heading: "#### 2. Total"
MIXED = re.compile(r"(?<![\d.,/])(\d{1,15})\s+(\d{1,9})/(\d{1,9})(?![\d/])")  # 3 1/2


def _last_number(text):
    """The number that follows the last mark, "#### 72", else the last number; None where there is none."""
    text = re.sub(r"(?<=\d)(?=\\[dtc]?frac)", " ", plain_digits(text))
    text = re.sub(r"\\[dtc]?frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = MIXED.sub(_improper, text)
    marks = [mark.end() for mark in MARK.finditer(text)]
    numbers = NUMBER.findall(text[marks[-1] :] if marks else text)
    return re.sub(r"[\\$€£\s]", "", numbers[0 if marks else -1]) if numbers else None


def at_mark(answer):
    """(steps, number) of an answer as GSM8K writes it, "steps\n#### number"; number None where it is not so. The last
    line has the mark: other lines with "####" are headings in Markdown."""
    steps, mark, number = answer.rpartition("####")
    return (steps, number.strip()) if mark and "\n" not in number.strip() else (answer, None)


def _improper(mixed):
    """3 1/2 as 7/2; 48 48/2 as it is."""
    whole, part, of = map(int, mixed.groups())
    return f"{whole * of + part}/{of}" if 0 < part < of else mixed[0]


def plain_digits(text):
    """Typeset numbers as plain ones: ASCII digits and minus, digits not grouped by {,} \\, \\! or a narrow space."""
    groups = r"(?<=\d)(?:\{(?:,|\\,)\}|,?\\!|['\u2019]|\\[,;: ]|[\u00a0\u2007-\u200a\u202f~])(?=\d{3}(?!\d))"
    return re.sub(groups, "", text.translate(TYPESET))


# ---------------------------------------------------------------------------------------------------------
# the answer of a row


def gold_answer(task, row):
    """What a row is graded by: a text, or for countdown {"nums": list of int, "target": int}.

    Raises UserError where it is missing, or of a kind that no answer can equal (null, NaN, several answers).
    """
    if task not in GOLD:
        raise UserError(f"task {task!r}: expected one of {', '.join(TASKS)}.")
    values = {column: row.get(column) for column in GOLD[task]}
    if task == "countdown":
        numbers = values["nums"] if isinstance(values["nums"], list) else []
        *nums, target = [whole_number(value) for value in (*numbers, values["target"])]
        if not nums or None in (*nums, target):
            raise UserError(f"{row['where']} has {values}: expected whole numbers, a list of them and a target.")
        return {"nums": nums, "target": target}
    ((column, value),) = values.items()
    value = _one_of_one(value)
    if value is None and task in MATH_TASKS:
        value = _answer_in_solution(row.get("solution"))
    if task in MATH_TASKS and re.fullmatch(r"-?\d+(?:\.\d+)?e-\d{2,3}", str(value).strip(), re.ASCII):
        raise UserError(f"{row['where']} has the {column} {value}, a rounded float, and math-verify compares six "
                        "decimals: write it as text, 10^{-5} or 0.00001, or leave that row out.")
    text = as_text(value)
    if text and task == "gsm8k":
        steps, number = at_mark(text)
        text = steps if number is None else as_text(number)
    if text and task == "gpqa":
        text = _letter(text)
    if not text:
        raise UserError(f"{row['where']} has no {column} that --task {task} can be graded by (found {value!r:.60}): "
                        "leave that row out.")
    return text


def _answer_in_solution(solution):
    """What a solution has in its last box, or all of it where it is a number: rows of questions and solutions alone."""
    if not isinstance(solution, str):
        return None
    in_box = answer_of("math500", solution)
    return solution if in_box is None and re.fullmatch(r"\s*[-+$]?\d[\d.,/]*%?\s*", solution) else in_box


def _one_of_one(value):
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def as_text(value):
    """A number or text of any type as text, without an exponent; None where there is no value."""
    value = _one_of_one(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    text = str(value).strip()
    # 1e-05 and 1e+16, as Python writes floats, and 3.5e-3; without decimals it may mean Euler's number, 2e-1
    if re.fullmatch(r"-?\d+(?:(?:\.\d+)?[eE](?:\+?\d{1,3}|-\d{2,3})|\.\d+[eE]-\d)", text, re.ASCII):
        return f"{Decimal(text):f}"
    return None if text.lower() in ("", "nan", "inf", "-inf") or text in ("None", "null") else text


def whole_number(value):
    """1, "1" and 1.0 (Parquet turns a column with a null into floats) as an int; None for anything else."""
    text = as_text(value) or ""
    return int(text.partition(".")[0]) if re.fullmatch(r"-?\d{1,18}(?:\.0*)?", text, re.ASCII) else None


# ---------------------------------------------------------------------------------------------------------
# comparing mathematics


def equivalent(gold, answer):
    """Whether math-verify finds the answer equal to the gold answer. No time limit: see rlt/grading.py.

    Raises UserError where it can't read the gold answer.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # at each call it warns that its own limit is off
    texts = [f"\\boxed{{{plain_digits(as_text(text) or '')}}}" for text in (gold, answer)]
    expected, got = (parse(text, parsing_timeout=None) for text in texts)
    if not expected:
        raise UserError(f"math-verify can't read a row's own answer, {gold!r:.60}: leave that row out.")
    return verify(expected, got, timeout_seconds=None)  # it is not symmetric: gold goes first


NOTATION = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:!> ]|\\?\$|\\?%|\s|\^\{?\\circ\}?", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt(\w)", r"\\sqrt{\1}"),
    (r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1"),
    (r"^[A-Za-z]=(?=.)", ""),  # x=5
    (r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3"),
    (r"(?<=\d),(?=\d{3}(?:\D|$))", ""),
    (r"\.$", ""),
)]


def same_text(gold, answer):
    """Whether two mathematical answers are the same but for notation: no algebra, no dependency.

    After the comparison of the MATH dataset (arXiv 2103.03874); numbers are compared as fractions.
    """
    texts = [plain_digits(gold), plain_digits(answer)]
    for pattern, plain in NOTATION:
        texts = [pattern.sub(plain, text) for text in texts]
    number = r"-?(?:\d{1,99}(?:\.\d{0,99})?|\.\d{1,99}|\d{1,99}/0*[1-9]\d{0,99})"
    if all(re.fullmatch(number, text, re.ASCII) for text in texts):
        return Fraction(texts[0]) == Fraction(texts[1])
    return texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------------
# countdown

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
ARITHMETIC = [(re.compile(pattern), plain) for pattern, plain in (
    (r"\\(?:q?quad|(?:thin|med|thick|en)?space)(?![A-Za-z])|\\[hm]space\*?\{[^{}]*\}", " "),
    (r"\\[,;:!>() ]|\\?\$|~|\s", " "),  # \s is any space of Unicode
    (r"(?<=[\d)}\]])(?:\\text\{[^{}]*\}|\\checkmark|[✓✔.,;\s])+$", ""),
    (r"\\(?:mathbin|mathrm|mathbf|mathit|textbf|text)\{([^{}]*)\}", r"\1"),
    (r"\\(?:left|right|displaystyle|[bB]igg?[lrm]?)(?![A-Za-z])", ""),
    (r"\\(?:times|cdot|cdotp|ast|star|bullet)(?![A-Za-z])|[×·⋅∙∗•✕⨯\u2062]|\\\*|(?<=\s)[xX](?=\s)", "*"),
    (r"\\div(?![A-Za-z])|[÷∕⁄]", "/"),
    (r"\\(?:approx|equiv)(?![A-Za-z])|[≈≡]|==", "="),
    (r"\[|\\\{|\\l(?:brack|paren|brace)(?![A-Za-z])", "("),
    (r"\]|\\\}|\\r(?:brack|paren|brace)(?![A-Za-z])", ")"),
    (r"\\[dtc]?frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
)]
FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def _reaches(expression, nums, target):
    """Whether the expression has each of the numbers exactly once, no other, and the target as its value.

    What it claims to equal, "(3 + 4) * 2 = 14", has to be the target, too.
    """
    try:
        sides = [_value(side) for side in _plain_arithmetic(expression).split("=")]
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return False
    used = sides[0][1]
    only_given = all(type(number) is int for number in used) and sorted(used) == sorted(nums)
    return only_given and all(value == target for value, _ in sides)


def _plain_arithmetic(text):
    """LaTeX and typeset signs as + - * / ( ), with every product written out. Raises ValueError if it is too long."""
    if len(text) > 400:
        raise ValueError("too long")
    text = text.translate(TYPESET)
    for pattern, plain in ARITHMETIC:
        text = pattern.sub(plain, text)
    if re.search(r"\d\s*\\[dtc]?frac", text):
        raise ValueError("2\\frac{1}{2} is a product to some and 5/2 to others")
    while (expanded := FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = expanded
    text = text.replace("{", "(").replace("}", ")")
    text = re.sub(r"(?<=[0-9)])\s*\(", "*(", text)  # 2(3 + 4)
    return re.sub(r"\)\s*(?=[0-9])", ")*", text)


def _value(expression):
    """(value, the numbers in it) of + - * / over numbers, exactly. Raises ValueError for anything else."""
    if len(expression) > 200 or not re.fullmatch(r"[0-9+\-*/(). ]+", expression):
        raise ValueError("expected + - * / of numbers")
    used = []

    def value(node):
        match node:
            case ast.BinOp(left, op, right) if type(op) in OPERATIONS:  # no powers: nothing grows huge
                return OPERATIONS[type(op)](value(left), value(right))
            case ast.UnaryOp(ast.USub() | ast.UAdd() as sign, operand):
                return -value(operand) if isinstance(sign, ast.USub) else value(operand)
            case ast.Constant(number):
                used.append(number)
                return Fraction(number)
        raise ValueError("expected + - * / of numbers")

    return value(ast.parse(expression.strip(), mode="eval").body), used


# ---------------------------------------------------------------------------------------------------------
# multiple choice


def _letter(text):
    """The one choice that a text names: "C", "(C)", "\\text{C}", "C. 5 m"; None where there is none, or several."""
    text = re.sub(r"\\[a-z]+\s*\{", "", text).strip(" ${}().*_\n")
    match = re.fullmatch(r"(?:(?:option|answer)\W+)?([A-D])(?:[).:}]+(?:\s.*)?)?", text, re.DOTALL | re.IGNORECASE)
    return match[1].upper() if match else None
