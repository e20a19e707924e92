# SPDX-License-Identifier: MIT
"""
Public data sets as JSONL with our columns: from the hub, or from a local copy in any format that --data takes.

    countdown, drawn here    python data/prepare.py countdown --level 3
    from the hub             python data/prepare.py math500
    from a local copy        python data/prepare.py gsm8k --source train.jsonl

Rows have question and solution, and where there is one explanation, answer (what evaluate.py grades by), nums and
target, choices, level and subject. Printed are counts, SHA-256 and the licence.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt import flags
from rlt.answers import GOLD, gold_answer
from rlt.errors import UserError
from rlt.files import write_atomically
from rlt.grading import with_choices
from rlt.rows import countdown_question, load_rows

from countdown import LEVELS, draw_problems, solve

COLUMNS = ("question", "solution", "explanation", "answer", "nums", "target", "choices", "level", "subject")


def as_it_is(row):
    return row


def gsm8k(row):
    """The steps as explanation, the boxed number alone as solution: with steps in both, a warm-up teaches to copy."""
    steps, _, box = row["solution"].rpartition("\n")
    return row | {"explanation": steps or None, "solution": box, "answer": gold_answer("gsm8k", row)}


def gpqa(row):
    """The choices in the question, in the order of evaluate.py, and the letter of the right one as solution."""
    row = with_choices(row)
    return row | {"solution": f"\\boxed{{{gold_answer('gpqa', row)}}}"}


def countdown(row):
    """With a solution, which the solver finds."""
    problem = gold_answer("countdown", row)
    expression = solve(**problem)
    if expression is None:
        raise UserError(f"{row['where']} has no solution: {problem['nums']} don't make {problem['target']}")
    return row | {"solution": f"\\boxed{{{expression}}}", "level": len(problem["nums"])}


class DataSet(NamedTuple):
    source: str | None  # on the hub
    rows: int | None  # as published
    licence: str
    convert: Callable = as_it_is  # a row of load_rows -> a row with our columns; UserError where it is a bad one


SETS = {
    "stratos": DataSet("bespokelabs/Bespoke-Stratos-17k", None, "Apache 2.0; the traces are written by DeepSeek-R1"),
    "gsm8k": DataSet("openai/gsm8k:main", 7473, "MIT", gsm8k),
    "gsm8k-test": DataSet("openai/gsm8k:main@test", 1319, "MIT", gsm8k),
    "svamp": DataSet("ChilleD/SVAMP@test", 300, "MIT"),
    "multiarith": DataSet("ChilleD/MultiArith@test", 180, "not stated; by Roy and Roth (2015)"),
    "math500": DataSet("HuggingFaceH4/MATH-500@test", 500, "MIT"),
    "aime24": DataSet("HuggingFaceH4/aime_2024", 30, "the problems are by the MAA, the solutions from the AoPS wiki"),
    "aime25": DataSet("MathArena/aime_2025", 30, "CC BY-NC-SA 4.0; the problems are by the MAA"),
    "gpqa": DataSet("Idavidrein/gpqa:gpqa_diamond", 198,
                    "CC BY 4.0; accept its terms on the hub, and don't put its questions online", gpqa),
    "countdown": DataSet(None, None, "MIT if drawn here, else that of the source", countdown),
}


def read_rows(name, source, limit, skip_bad):
    """Rows of a set with our columns. source: a file or a hub id. Raises UserError naming a bad row.

    With skip_bad bad rows are left out and counted in a line of output.
    """
    kept, bad = [], []
    for row in load_rows(source, limit=limit, skip_bad=skip_bad, require_solution=name != "countdown"):
        try:
            row = SETS[name].convert(row)
            if name in GOLD:
                gold_answer(name, row)  # it has one
            kept.append(row)
        except UserError as error:
            bad.append(error)
            if not skip_bad:
                raise UserError(f"{str(error).rstrip('.')}. --skip-bad-rows leaves such rows out.") from None
    if bad:
        print(f"{len(bad)} rows left out, the first: {bad[0]}")
    if not kept:
        raise UserError(f"{source} has no rows of {name}: pass another --source.")
    return kept


def draw_countdown(count, level, seed):
    """So many rows of countdown, all different, and the same for the same arguments."""
    drawn = []
    for number, problem in enumerate(draw_problems(count, level, seed)):
        question = countdown_question(problem["nums"], problem["target"])
        solution = f"\\boxed{{{problem['expression']}}}"
        drawn.append(problem | {"where": f"row {number}", "question": question, "solution": solution, "level": level})
    return drawn


def as_jsonl(rows):
    """The text of the file: of each row the columns of COLUMNS that it has."""
    kept = [{column: row[column] for column in COLUMNS if row.get(column) is not None} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in kept)


def main():
    parser = flags.make_parser(__doc__)
    parser.usage = "%(prog)s NAME [flags]"
    parser.add_argument("name", choices=SETS, metavar="NAME", help=", ".join(SETS))
    parser.add_argument("--source", type=flags.path, help="a file or another hub id; default: the set's own on the hub")
    parser.add_argument("--limit", type=flags.number(int, 1), metavar="N",
                        help="the first N rows only; of countdown, rows to draw [1000]")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out bad rows, and count them")
    parser.add_argument("--out", type=flags.path, metavar="FILE", help="file to write; default: runs/data/NAME.jsonl")
    group = parser.add_argument_group("countdown, drawn here")
    group.add_argument("--level", type=int, choices=LEVELS, default=3, help="numbers in a problem")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws")
    args = parser.parse_args()
    chosen = SETS[args.name]
    source = args.source or chosen.source
    if source and (args.level, args.seed) != (parser.get_default("level"), parser.get_default("seed")):
        parser.error("--level and --seed are of the countdown problems that are drawn here, without --source")
    out = Path(args.out or f"runs/data/{args.name}.jsonl")
    if out.exists():
        raise UserError(f"{out} exists already: delete it, or pass another --out.")

    if source:
        rows = read_rows(args.name, source, args.limit, args.skip_bad_rows)
    else:
        source = f"the generator, --level {args.level} --seed {args.seed}"
        rows = draw_countdown(args.limit or 1000, args.level, args.seed)
    text = as_jsonl(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)

    explained = sum(row.get("explanation") is not None for row in rows)
    questions = len({row["question"] for row in rows})
    print(f"{out}: {len(rows)} rows from {source}, {questions} different questions, {explained} with an explanation")
    if chosen.rows and len(rows) != chosen.rows:
        print(f"published are {chosen.rows} rows: this is a part of them, or another version")
    print(f"sha256   {hashlib.sha256(text.encode()).hexdigest()}")
    print(f"licence  {chosen.licence}")


if __name__ == "__main__":
    main()
