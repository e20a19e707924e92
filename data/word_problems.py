# SPDX-License-Identifier: MIT
"""
English word problems of additions and subtractions, drawn from a seed, for a small language model.

    question     Emma has 14 pencils. She buys 7 more and gives 5 to Noah. Later, she finds 3 more under the bed.
                 How many pencils does Emma have now?
    solution     \\boxed{19}
    explanation  14+7=21
                 21-5=16
                 16+3=19

The target problems have 2 to 4 steps, the easy ones 1 to 3. Easy problems come with their chains: together with the
chains of GSM8K they are the rows for a teacher's warm-up. A count starts at 5 to 30, changes by 2 to 15 at every step,
and stays between 1 and 50, and no answer is that of more than 6 % of the test problems.

    train.jsonl  val.jsonl  test.jsonl   target problems: question, solution, answer, start, steps
    easy.jsonl  practice.jsonl           easy problems, with explanation, for the two parts of a warm-up
    chains.jsonl                         the rows of train.jsonl with explanation, for the upper bound
    warmup.jsonl                         with --gsm8k: easy.jsonl and rows of GSM8K, shuffled

CPU, a second         python data/word_problems.py
with GSM8K's chains   python data/word_problems.py --gsm8k train.jsonl
"""

import itertools
import json
import os
import random
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt import flags
from rlt.errors import UserError
from rlt.files import read_jsonl

START, CHANGE, LIMIT = (5, 30), (2, 15), 50  # counts: at the start, of a step, at most
SPLITS = {  # split: (rows, numbers of steps)
    "train": (1600, (2, 3, 4)), "val": (200, (2, 3, 4)), "test": (400, (2, 3, 4)), "easy": (320, (1, 2, 3)),
    "practice": (320, (2, 3)),
}

SHE = ("Emma", "Olivia", "Mia", "Ava", "Lucy", "Nora", "Zoe", "Ruth", "Maya", "Anna", "Clara", "Sofia", "Leila",
       "Grace", "Hannah", "Priya", "Elena", "Julia", "Amira", "Rosa")
HE = ("Noah", "Liam", "Omar", "Leo", "Max", "Sam", "Ivan", "Ben", "Hugo", "Oscar", "Tom", "Daniel", "Felix", "Ravi",
      "Jack", "Kenji", "Adam", "Peter", "Luis", "David")
TOYS = ("marbles", "stickers", "pencils", "seashells", "stamps", "coins", "buttons", "toy cars", "beads", "crayons",
        "postcards", "balloons", "ribbons", "trading cards", "notebooks", "shiny stones")
FOOD = ("apples", "cookies", "oranges", "muffins", "candies", "plums", "pears", "cupcakes", "walnuts", "tomatoes")
WARES = ("loaves", "pies", "lamps", "tickets", "umbrellas", "bottles of juice", "sandwiches", "candles", "hats",
         "baskets")

# A scene: what changes, and how it is told. {n}: the number, {name} and {they} whose it is, {friend}: somebody else.
# An empty `they` is a scene without a person; `when` may open a step's sentence.
LATER = ("Then", "After that,", "Later,", "The next day,", "In the afternoon,", "In the evening,", "On Monday,")
SCENES = (
    {
        "things": TOYS, "they": True, "when": LATER,
        "opening": ("{name} has {n} {things}.", "{name} starts the week with {n} {things}.",
                    "There are {n} {things} in {name}'s box.", "{name} keeps {n} {things} in a drawer.",
                    "At first, {name} has {n} {things}.", "{name} owns a collection of {n} {things}."),
        "gain": ("buys {n} more", "finds {n} more under the bed", "gets {n} from {friend}", "wins {n} in a game",
                 "receives {n} more as a present", "is given {n} by {friend}", "picks up {n} more at the fair",
                 "swaps an old book for {n} more", "adds {n} new ones", "earns {n} more for helping at home"),
        "lose": ("gives {n} to {friend}", "loses {n}", "sells {n}", "lends {n} to {friend}", "leaves {n} at school",
                 "gives {n} away", "throws {n} away", "hands {n} to {friend}", "drops {n} on the way home",
                 "lets {friend} take {n}"),
        "question": ("How many {things} does {name} have now?", "How many {things} does {name} have in the end?",
                     "How many {things} are left with {name}?", "What number of {things} does {name} end up with?"),
    },
    {
        "things": FOOD, "they": True, "when": LATER,
        "opening": ("{name} has a basket with {n} {things}.", "There are {n} {things} in {name}'s kitchen.",
                    "{name} brings {n} {things} to the picnic.", "{name} puts {n} {things} on a plate.",
                    "{name} has {n} {things}."),
        "gain": ("buys {n} more at the market", "gets {n} more from {friend}", "brings {n} more", "adds {n}",
                 "finds {n} more in the pantry", "is handed {n} by {friend}", "puts {n} more with them"),
        "lose": ("eats {n}", "gives {n} to {friend}", "shares {n} with the neighbors", "uses {n} for a cake",
                 "throws out {n} that went bad", "hands out {n}", "packs {n} for lunch", "feeds {n} to the goats"),
        "question": ("How many {things} does {name} have now?", "How many {things} are left?",
                     "How many {things} remain in the end?"),
    },
    {
        "things": ("dollars",), "they": True, "when": LATER,
        "opening": ("{name} has {n} dollars.", "{name} has saved {n} dollars.",
                    "There are {n} dollars in {name}'s purse.", "{name} leaves home with {n} dollars."),
        "gain": ("earns {n} dollars for washing cars", "gets {n} dollars from {friend}", "finds {n} dollars in a coat",
                 "is paid {n} dollars for babysitting", "sells a game for {n} dollars",
                 "receives {n} dollars as a birthday gift"),
        "lose": ("spends {n} dollars on lunch", "pays {n} dollars for a book", "gives {n} dollars to {friend}",
                 "buys a ticket for {n} dollars", "pays back {n} dollars to {friend}", "spends {n} dollars on a gift",
                 "donates {n} dollars"),
        "question": ("How much money does {name} have now, in dollars?", "How many dollars does {name} have left?",
                     "How many dollars does {name} have in the end?"),
    },
    {
        "things": WARES, "they": True,
        "when": ("Then", "After that,", "At noon,", "In the afternoon,", "Before closing,", "The next morning,"),
        "opening": ("{name} runs a shop and has {n} {things} on the shelf.", "{name}'s stall opens with {n} {things}.",
                    "In the morning, {name} has {n} {things} to sell."),
        "gain": ("makes {n} more", "unpacks {n} more", "gets a delivery of {n}", "orders {n} more",
                 "takes back {n} from a customer", "brings {n} more from the store room"),
        "lose": ("sells {n}", "sells {n} to {friend}", "gives {n} to a school", "sets {n} aside for {friend}",
                 "sends {n} to another shop", "puts {n} away because they are damaged"),
        "question": ("How many {things} does {name} have left?", "How many {things} are still for sale?",
                     "How many {things} does the shop have now?"),
    },
    {
        "things": ("passengers", "people", "children"), "they": False,
        "when": ("At the first stop,", "At the next stop,", "Then", "At the station,", "At the market,",
                 "A little later,"),
        "opening": ("A bus leaves with {n} {things} on board.", "There are {n} {things} on a train.",
                    "A tram carries {n} {things}."),
        "gain": ("{n} get on", "{n} more get on", "{n} climb in", "{n} new ones board"),
        "lose": ("{n} get off", "{n} step out", "{n} leave", "{n} change to another line"),
        "question": ("How many {things} are on board now?", "How many {things} are still riding?",
                     "How many {things} are on board in the end?"),
    },
    {
        "things": ("ducks", "geese", "swans", "pigeons", "sparrows", "gulls"), "they": False,
        "when": ("Then", "A minute later,", "After the rain,", "Soon,", "At sunset,", "Later,"),
        "opening": ("There are {n} {things} at the pond.", "{name} counts {n} {things} in the park.",
                    "{n} {things} rest by the lake."),
        "gain": ("{n} more arrive", "{n} more fly in", "{n} come back", "{n} land next to them"),
        "lose": ("{n} fly away", "{n} leave", "a dog scares {n} away", "{n} take off"),
        "question": ("How many {things} are there now?", "How many {things} are there in the end?",
                     "How many {things} stay?"),
    },
    {
        "things": ("books", "magazines", "films", "puzzles", "comics"), "they": False,
        "when": ("Then", "On Tuesday,", "On Friday,", "After that,", "The next week,", "Later,"),
        "opening": ("A library shelf holds {n} {things}.", "There are {n} {things} in the classroom.",
                    "The school library has {n} {things} about animals."),
        "gain": ("{n} are returned", "{n} more are bought", "{friend} donates {n}", "{n} are brought back"),
        "lose": ("{n} are borrowed", "{friend} borrows {n}", "{n} are given away", "{n} are sent to be repaired"),
        "question": ("How many {things} are there now?", "How many {things} are left?",
                     "How many {things} are there in the end?"),
    },
    {
        "things": ("members", "players", "students", "singers", "visitors", "guests"), "they": False,
        "when": ("Then", "In spring,", "In the fall,", "After a month,", "Later,", "A week later,"),
        "opening": ("A club has {n} {things}.", "{name}'s group starts with {n} {things}.",
                    "There are {n} {things} in the hall."),
        "gain": ("{n} join", "{n} more arrive", "{friend} brings {n} more", "{n} new ones come in"),
        "lose": ("{n} leave", "{n} go home", "{n} drop out", "{n} move away"),
        "question": ("How many {things} are there now?", "How many {things} remain?",
                     "How many {things} are there in the end?"),
    },
)


# ---------------------------------------------------------------------------------------------------------
# arithmetic


def draw_changes(rng, count):
    """(start, steps): a count and its signed changes, such that it stays between 1 and LIMIT."""
    start = total = rng.randint(*START)
    steps = []
    while len(steps) < count:
        step = rng.choice((1, -1)) * rng.randint(*CHANGE)
        if 1 <= total + step <= LIMIT:
            total += step
            steps.append(step)
    return start, steps


def chain(start, steps):
    """The right explanation: one equation a line."""
    lines, total = [], start
    for step in steps:
        lines.append(f"{total}{step:+d}={total + step}")
        total += step
    return "\n".join(lines)


EQUATION = re.compile(r"(\d+(?:\s*[+-]\s*\$?\d+)+)\s*=\s*\$?(-?\d+)")


def equations(text):
    """[(terms, result)] of the sums and differences in a text: "14 + 7 - 5 = 16" is ([14, 7, -5], 16)."""
    return [_equation(found) for found in EQUATION.finditer(text)]


def _equation(found):
    terms = re.findall(r"[+-]?\s*\$?\d+", found[1])
    return [int(re.sub(r"[\s$]", "", term)) for term in terms], int(found[2])


def is_right_chain(row, text):
    """Whether the equations of an explanation are the row's steps, all of them, in order, each right.

    Words between them do not matter, one equation may take several steps, and the first two terms may be swapped.
    """
    total, left = row["start"], list(row["steps"])
    for terms, result in equations(text):
        if terms[0] != total and terms[1] == total:
            terms = [terms[1], terms[0], *terms[2:]]
        steps = terms[1:]
        if terms[0] != total or steps != left[: len(steps)] or total + sum(steps) != result:
            return False
        total, left = result, left[len(steps) :]
    return not left


def _steps(row):
    """The row's steps as equations: [([14, 7], 21), ([21, -5], 16)]."""
    totals = list(itertools.accumulate(row["steps"], initial=row["start"]))
    return [([total, step], total + step) for total, step in zip(totals, row["steps"], strict=False)]


def right_steps(row, text):
    """Share of the row's steps that stand in the text as right equations, in whatever order; all of a right chain."""
    if is_right_chain(row, text):
        return 1.0
    written = [_in_any_order(*equation) for equation in equations(text)]
    return sum(_in_any_order(*step) in written for step in _steps(row)) / len(row["steps"])


def _in_any_order(terms, result):
    return sorted(terms), result


def leaks(row, text):
    """Whether an explanation that is not a right chain states the answer other than in one of the row's right steps.

    Never where the answer is a number of the question, too: there the two can't be told apart.
    """
    if int(row["answer"]) in (row["start"], *map(abs, row["steps"])) or is_right_chain(row, text):
        return False
    right = [_in_any_order(*step) for step in _steps(row)]
    rest = EQUATION.sub(lambda found: " " if _in_any_order(*_equation(found)) in right else found[0], text)
    return row["answer"] in re.findall(r"\d+", rest)


# ---------------------------------------------------------------------------------------------------------
# text


def tell(rng, start, steps):
    """The problem as English text: a scene, its steps in one or two sentences each, a question."""
    scene = rng.choice(SCENES)
    name, friend = rng.sample(SHE + HE, 2)
    they = ("she " if name in SHE else "he ") if scene["they"] else ""
    words = {"name": name, "things": rng.choice(scene["things"])}
    pools = {sign: rng.sample(scene[sign], len(scene[sign])) for sign in ("gain", "lose")}
    clauses = []
    for step in steps:
        pool = pools["gain" if step > 0 else "lose"]
        phrase = pool.pop(0)
        pool.append(phrase)  # used again once all others were
        clauses.append(phrase.format(n=abs(step), friend=friend, **words))
        friend = rng.choice([other for other in SHE + HE if other != name])
    sentences = [rng.choice(scene["opening"]).format(n=start, **words)]
    when = rng.sample(scene["when"], len(scene["when"]))
    while clauses:
        said = they + clauses.pop(0)
        if clauses and rng.random() < 0.35:
            said += rng.choice((" and ", ", then ", " and then ")) + clauses.pop(0)
        if when and (len(sentences) > 1 or not they) and rng.random() < 0.7:
            said = f"{when.pop()} {said}"
        sentences.append(said[0].upper() + said[1:] + ".")
    return " ".join([*sentences, rng.choice(scene["question"]).format(**words)])


def make_row(rng, count):
    """A row of so many steps, without explanation."""
    start, steps = draw_changes(rng, count)
    answer = str(start + sum(steps))
    return {"question": tell(rng, start, steps), "solution": f"\\boxed{{{answer}}}", "answer": answer, "start": start,
            "steps": steps}


def with_chain(row):
    return row | {"explanation": chain(row["start"], row["steps"])}


def make_rows(seed=0, splits=SPLITS):
    """{split: rows}. No question is in two places; a split does not depend on the sizes of the others after it."""
    made, seen = {}, set()
    for split, (size, counts) in splits.items():
        rng, made[split] = random.Random(f"word problems {seed} {split}"), []
        while len(made[split]) < size:
            row = make_row(rng, rng.choice(counts))
            if row["question"] not in seen:
                seen.add(row["question"])
                made[split].append(row)
    made |= {split: [with_chain(row) for row in made[split]] for split in ("easy", "practice") if split in made}
    made["chains"] = [with_chain(row) for row in made["train"]]
    return made


def from_gsm8k(row):
    """A row of GSM8K (question, answer) for the warm-up: its chain without calculator marks, its answer in a box.

    Raises UserError where the answer has no "#### number".
    """
    if not all(isinstance(row.get(column), str) for column in ("question", "answer")):
        raise UserError(f"a row of GSM8K has question and answer, this one has {', '.join(row)}.")
    steps, mark, answer = row["answer"].rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", answer):
        raise UserError(f"GSM8K's answers end in '#### number', this one doesn't: {row['answer']!r}")
    explanation = re.sub(r"<<.*?>>", "", steps).strip()
    return {"question": row["question"], "solution": f"\\boxed{{{answer}}}", "answer": answer,
            "explanation": explanation}


def write(out, splits):
    """Write {name: rows} as the folder's JSONL files; the folder appears complete or not at all."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
        folder.mkdir()
        for name, rows in splits.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.rename(folder, out)


if __name__ == "__main__":
    parser = flags.make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/word_problems"), metavar="FOLDER", help="folder to make")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws")
    parser.add_argument("--gsm8k", type=Path, metavar="FILE",
                        help="GSM8K's train split as JSONL (question, answer): write warmup.jsonl, too")
    parser.add_argument("--gsm8k-rows", type=flags.number(int, 1), default=400, metavar="N",
                        help="rows of it, from its start")
    parser.add_argument("--easy-rows", type=flags.number(int, 1), default=SPLITS["easy"][0], metavar="N",
                        help="easy problems")
    parser.add_argument("--easy-steps", type=flags.number(int, 1), nargs="+", default=SPLITS["easy"][1], metavar="N",
                        help="numbers of their steps")
    args = parser.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists already: delete it, or choose another --out.")
    if args.gsm8k and not args.gsm8k.is_file():
        raise UserError(f"--gsm8k {args.gsm8k}: expected a file of GSM8K's train split.")
    splits = make_rows(args.seed, {**SPLITS, "easy": (args.easy_rows, args.easy_steps)})
    if args.gsm8k:
        gsm8k = map(from_gsm8k, read_jsonl(args.gsm8k)[: args.gsm8k_rows])
        mixed = [{key: row[key] for key in ("question", "solution", "explanation")}
                 for row in [*splits["easy"], *gsm8k]]
        random.Random(f"order {args.seed}").shuffle(mixed)
        splits["warmup"] = mixed
    write(args.out, splits)
    print(f"{args.out}: {', '.join(f'{len(rows)} {name}' for name, rows in splits.items())}")
