# SPDX-License-Identifier: MIT
"""
The toy: a task, its rows, its tokenizer and a base model of half a million parameters, all made from nothing.

    question     x 3 y 7 s1 x+=y s2 y*=3        two clocks of ten hours, a numbered list of operations
    solution     0 1                            where they stand in the end
    explanation  s1 x+=y 0 7 s2 y*=3 0 1        by a careful author; others slip, skip, leak or ramble

The base model reads explanations of all kinds while it is trained. It learns every single step and can follow
a chain of them, but of long problems it has mostly seen bad explanations, and writes bad ones itself. So all
that the method needs is there: a student that can use a good explanation, a solution that is hard to guess,
and a teacher whose samples hold a few good explanations among many that give the solution away.

How hard it is can be set: with three clocks every operation turns them all, by a table of its own, and there is no
guessing where they end; fewer careful authors make good explanations rare, for the base (what it can solve by itself)
and in the rows (what the warm-up teacher writes). With --rooms base and rows know a second task, to transfer to:

    question     room b s1 left s2 up s3 left s4 in        twelve rooms with six doors each, by a fixed plan
    solution     e                                         the room where one ends
    explanation  s1 left e s2 up e s3 left a s4 in e

CPU, two minutes:  python data/toy.py        makes runs/toy; the other scripts call it when they need it
"""

import argparse
import itertools
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for rlt/prompts.py: the base is trained on what the pipeline will show it

CLOCKS = ("x", "y", "z")  # the first two of them, or all
HOURS, ROOMS = range(10), "abcdefghijkl"
_draw = random.Random("tables of the toy")
TURNS, DOORS = (  # what three clocks do, and where a door leads from each room
    {name: dict(zip(places, _draw.sample(places, len(places)), strict=True)) for name in names}
    for places, names in ((HOURS, ("op1", "op2", "op3", "op4")), (ROOMS, ("left", "right", "up", "down", "in", "out")))
)
TABLES = TURNS | DOORS
FILLER = ("so", "then", "now", "well", "let", "me", "see", "hmm")
MAX_STEPS = 9

# Who explains: shares of the authors by what the document is for.
AUTHORS = ("careful", "sloppy", "skipping", "leaking", "rambling")
SINGLE = (1, 0, 0, 0, 0)  # pretraining, one step: how the base learns what a step is
SHORT = (0.50, 0.05, 0.15, 0.20, 0.10)  # pretraining, 2 and 3 steps: how it learns to go on from a step
LESSONS = (0.50, 0, 0, 0.50, 0)  # pretraining, three clocks, the second half of the lessons: to copy a solution, too
LONG = (0.08, 0.05, 0.25, 0.30, 0.32)  # pretraining, 4 steps and more: why it explains those badly
ROWS = (0.10, 0.05, 0.20, 0.35, 0.30)  # the rows' explanations, on which the teacher is warmed up
HINTED = 0.1  # share of documents with a hint

# split: (rows, numbers of steps)
SPLITS = {"train": (3000, (4, 5)), "val": (400, (4, 5)), "test": (800, (4, 5)), "long": (400, (6,))}


def mixture(shares, careful):
    """The shares with another one of careful authors, and in proportion of all who write steps: sloppy, skipping."""
    if careful == shares[0]:
        return shares
    stepwise = [share * careful / shares[0] for share in shares[:3]]
    return (*stepwise, *(share * (1 - sum(stepwise)) / sum(shares[3:]) for share in shares[3:]))


# ---------------------------------------------------------------------------------------------------------
# the clocks, and the room


def operations(names):
    """What can happen to what the names stand for, as words: two clocks, three, or ("room",)."""
    if len(names) != 2:
        return tuple(DOORS if names == ("room",) else TURNS)
    return (
        *(f"{clock}+={n}" for clock in names for n in range(1, 6)),
        *(f"{clock}*={n}" for clock in names for n in (3, 7)),  # 3 and 7 have inverses modulo 10
        *(f"{a}+={b}" for a, b in itertools.permutations(names)),
        "swap",
    )


def places(names):
    return ROOMS if names == ("room",) else HOURS


def read(question):
    """({clock: hour} or {"room": room}, operations) of a question. Raises ValueError on anything else."""
    words = question.split()
    n = words.index("s1") if "s1" in words else 0
    start, numbers, todo = dict(zip(words[:n:2], words[1:n:2], strict=False)), words[n::2], words[n + 1 :: 2]
    names = tuple(sorted(start) if len(start) == 3 else start)
    known = {str(place): place for place in places(names)}
    if (
        names not in (CLOCKS[:2], CLOCKS, ("room",))
        or n != 2 * len(names)
        or not set(start.values()) <= set(known)
        or not todo
        or numbers != [f"s{n}" for n in range(1, len(todo) + 1)]
        or not set(todo) <= set(operations(names))
    ):
        raise ValueError(f"{question!r} is no toy question: expected one like 'x 3 y 7 s1 x+=y s2 y*=3'.")
    return {name: known[start[name]] for name in names}, todo


def steps(question, slips=0.0, rng=None):
    """The question worked out, one "s1 x+=y 0 7" per operation: its number, itself, the state after it.

    slips: probability that a step's state goes wrong, drawn from rng. Who slips goes on from there.
    """
    state, todo = read(question)
    worked = []
    for number, operation in enumerate(todo, 1):
        if table := TABLES.get(operation):
            state = {name: table[place] for name, place in state.items()}
        elif operation == "swap":
            state["x"], state["y"] = state["y"], state["x"]
        else:
            clock, sign, operand = operation[0], operation[1], operation[3:]
            amount = state[operand] if operand in state else int(operand)
            state[clock] = (state[clock] + amount if sign == "+" else state[clock] * amount) % 10
        if slips and rng.random() < slips:
            state[rng.choice(list(state))] = rng.choice(places(tuple(state)))
        worked.append(" ".join([f"s{number}", operation, *map(str, state.values())]))
    return worked


def draw_question(rng, n_steps, names):
    todo = " ".join(f"s{n} {rng.choice(operations(names))}" for n in range(1, n_steps + 1))
    start = [f"{name} {rng.choice(places(names))}" for name in names]
    if len(names) == 3:  # in any order: else some bases find the third by its distance, and lose it as questions grow
        rng.shuffle(start)
    return " ".join([*start, todo])


# ---------------------------------------------------------------------------------------------------------
# explanations, and rows


def chain(question):
    """The full right explanation."""
    return " ".join(steps(question))


def solution(question):
    """The state after the last step, "x y", or the room."""
    return " ".join(steps(question)[-1].split()[2:])


def is_full_chain(question, explanation):
    """Whether the explanation holds every step, right and in order, with nothing in between."""
    return f" {chain(question)} " in f" {' '.join(explanation.split())} "


def gives_away(question, explanation):
    """Whether the explanation states the solution other than as the state after one of its right steps.

    Exact where prompts.leaks, which knows no chain, goes by the place.
    """
    text = f" {' '.join(explanation.split())} "
    for step in steps(question):
        text = text.replace(f" {step} ", " | ")
    return f" {solution(question)} " in text


def explain(question, author, rng):
    """What an author of this kind (one of AUTHORS) writes about the question."""
    if author == "careful":
        words = steps(question)
    elif author == "sloppy":
        words = steps(question, slips=0.25, rng=rng)
    elif author == "skipping":
        right, share = steps(question), rng.uniform(0.15, 0.6)
        words = [step for step in right if rng.random() < share] or [rng.choice(right)]
    elif author == "leaking":
        words = ["ans", solution(question), *rng.choices(FILLER, k=rng.randrange(5))]
    else:
        words = rng.choices((*FILLER, *read(question)[1]), k=rng.randint(2, 8))
    return " ".join(words)


def make_row(question, shares, rng):
    """A row: question, solution, an explanation by an author drawn by shares, the right chain, a hint.

    The hint is the first half of the chain's steps.
    """
    worked = steps(question)
    author = rng.choices(AUTHORS, shares)[0]
    return {
        "question": question,
        "solution": solution(question),
        "explanation": explain(question, author, rng),
        "chain": " ".join(worked),
        "hint": " ".join(worked[: len(worked) // 2]),
    }


def make_rows(n_clocks, careful, rooms):
    """{split: rows}, the same for every seed of the model, so that all are measured on the same questions.

    No question is there twice, in whatever split. Authors have draws of their own, so that other
    shares leave the questions as they are. careful: the share of careful authors.
    """
    questions, authors = random.Random("questions of the toy"), random.Random("authors")
    seen, splits, shares = set(), {}, mixture(ROWS, careful)

    def fill(split, size, draw):
        splits[split] = []
        while len(splits[split]) < size:
            question = draw()
            if question not in seen:
                seen.add(question)
                splits[split].append(make_row(question, shares, authors))

    for split, (size, lengths) in SPLITS.items():
        fill(split, size, lambda: draw_question(questions, questions.choice(lengths), CLOCKS[:n_clocks]))  # noqa: B023
    if rooms:
        for split in ("train", "val", "test"):
            size, lengths = SPLITS[split]
            fill(f"rooms-{split}", size, lambda: draw_question(questions, questions.choice(lengths), ("room",)))  # noqa: B023
        pairs = zip(splits["train"], splits["rooms-train"], strict=True)
        splits["both-train"] = list(itertools.chain(*pairs))  # for the teacher's warm-up
    return splits


def draw_documents(rng, held_out, n_clocks, careful, rooms, hints):
    """Rows to pretrain on, without end: short problems mostly explained well, long ones mostly badly.

    careful: the share of careful authors among those who explain long problems.
    """
    long = mixture(LONG, careful)
    while True:
        names = ("room",) if rooms and rng.random() < 0.5 else CLOCKS[:n_clocks]
        size = rng.choice((1, 1, 2, 2, 3, 4, 5, 6))
        question = draw_question(rng, size, names)
        hinted = hints and rng.random() < HINTED
        shares = SINGLE if size == 1 else SHORT if size < 4 or hinted else long
        if question not in held_out:
            row = make_row(question, shares, rng)
            yield row | {"question": f"{question} {row['hint']}"} if hinted else row


def draw_lessons(rng, held_out, count):
    """Rows to read before all others: problems of three clocks, the first half short and explained well, the second of
    all lengths, explained well or given away.

    A step of three clocks is hard to learn from few good explanations, and three hours are hard to copy: without
    lessons some seeds never learn it. The habit of explaining long problems well is lost in what is read afterwards.
    """
    for n in range(count):
        size, shares = (rng.randint(1, 3), SINGLE) if n < count // 2 else (rng.randint(1, 6), LESSONS)
        question = draw_question(rng, size, CLOCKS)
        if question not in held_out:
            yield make_row(question, shares, rng)


# ---------------------------------------------------------------------------------------------------------
# tokenizer and base model


def make_tokenizer(n_clocks, rooms):
    """One token a word; blanks and newlines separate words and vanish. An unknown word raises an exception.

    The tags of the explanation become those of the thought, so that teacher and student share their tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlt.tags import SOLUTION, THOUGHT

    pad, eos = "<|pad|>", "<|end_of_turn|>"
    clocks = CLOCKS[:n_clocks]
    words = [pad, eos, "<|user|>", "<|assistant|>", *THOUGHT, *SOLUTION, *clocks, *map(str, range(10))]
    words += [*(f"s{n}" for n in range(1, MAX_STEPS + 1)), *operations(clocks), "ans", *FILLER]
    if rooms:
        words += ["room", *ROOMS, *DOORS]
    # WordLevel raises on unknown words as long as its unk_token is not a word
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=""))
    backend.normalizer = normalizers.Replace("of_explanation|>", "of_thought|>")
    tag = pre_tokenizers.Split(Regex(r"<\|\w+\|>"), "isolated")  # a raw explanation may end right at its tag
    backend.pre_tokenizer = pre_tokenizers.Sequence([tag, pre_tokenizers.WhitespaceSplit()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, padding_side="left"
    )
    # Beside a Qwen2 model AutoTokenizer silently makes a Qwen2 tokenizer of our words, whatever the class we
    # name; an entry here, even an empty one, has it take tokenizer.json as it is.
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": [None, None]}
    tokenizer.chat_template = (  # system messages are left out: their words are not the toy's
        "{% for message in messages %}"
        "{% if message.role == 'user' %}<|user|> {{ message.content }} {% endif %}"
        "{% if message.role == 'assistant' %}<|assistant|> {{ message.content }} {{ eos_token }} {% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> {% endif %}"
    )
    return tokenizer


def make_model(seed, words, hidden_size):
    """A Qwen2 of three layers, float32, randomly initialised, for so many words; at 128 half a million parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=-(-words // 64) * 64,  # padded, as Qwen2.5 pads its 151,665 to 152,064
        hidden_size=hidden_size,
        num_hidden_layers=3,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    return Qwen2ForCausalLM(config)


def pack(documents, width):
    """(ids, first index with loss) of each document -> input_ids, position_ids, labels, each (rows, width).

    First fit, longest document first. Positions restart at every document, which is how transformers keeps
    documents in one row apart; labels are -100 where no loss is due. About a third faster than padding.
    """
    import torch

    rows = []
    for ids, start in sorted(documents, key=lambda document: -len(document[0])):
        if len(ids) > width:
            raise ValueError(f"a document of {len(ids)} tokens does not fit into a row of {width}.")
        row = next((row for row in rows if len(row) + len(ids) <= width), None)
        if row is None:
            rows.append(row := [])
        row += [(token, i, token if i >= start else -100) for i, token in enumerate(ids)]
    filled = [row + [(0, i, -100) for i in range(width - len(row))] for row in rows]
    return torch.tensor(filled).unbind(-1)


def pretrain(model, tokenizer, documents, n_steps):
    """Train the model in place on n_steps batches of 64 documents (rows)."""
    import torch
    from tqdm import tqdm

    from rlt.prompts import Prompts

    prompts = Prompts(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / max(1, n_steps)))
    )
    model.train()
    with tqdm(range(n_steps), desc="base model", unit="step") as bar:
        for _ in bar:
            batch = [prompts.sft_row(next(documents), "student") for _ in range(64)]
            input_ids, position_ids, labels = pack(batch, width=max(64, *(len(ids) for ids, _ in batch)))
            # neither cache nor mask: only then are documents kept apart
            logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def make(out, seed, n_steps, *, hidden_size, clocks, careful_base, careful_rows, rooms, hints):
    """Write model, tokenizer and rows to the folder `out`, which appears whole or not at all -> {split: rows}."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers shows one for every file that it writes
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        splits = make_rows(clocks, careful_rows, rooms)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = make_tokenizer(clocks, rooms)
        model = make_model(seed, len(tokenizer), hidden_size)
        held_out = {row["question"] for split in splits if "train" not in split for row in splits[split]}
        rng = random.Random(f"documents of {seed}")
        documents = draw_documents(rng, held_out, clocks, careful_base, rooms, hints)
        if clocks == 3:
            documents = itertools.chain(draw_lessons(rng, held_out, 16 * n_steps), documents)  # a quarter of all
        pretrain(model, tokenizer, documents, n_steps)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        os.rename(folder, out)
    return splits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Make the toy: base model, tokenizer and rows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the base model; the rows are always the same")
    parser.add_argument("--steps", type=int, default=2000, help="of 64 documents; 0 = an untrained base")
    parser.add_argument("--hidden-size", type=int, default=128, help="of the base; its heads have 32 each")
    parser.add_argument("--clocks", type=int, choices=(2, 3), default=2, help="3: solutions can't be guessed")
    parser.add_argument("--careful-base", type=float, default=LONG[0], help="share of careful authors among the long "
                        "problems the base reads: how often it solves one")
    parser.add_argument("--careful-rows", type=float, default=ROWS[0], help="the same among the rows: how often the "
                        "warm-up teacher explains well")
    parser.add_argument("--rooms", action="store_true", help="base and rows know a second task, too: "
                        "rooms-*.jsonl, and both-train.jsonl for the warm-up")
    parser.add_argument("--hints", action="store_true", help="the base learns what a hint is (Guide-GRPO)")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already: delete it, or choose another --out.")
    if args.steps < 0:
        parser.error(f"--steps {args.steps}: expected 0 or more.")
    if args.hidden_size < 32 or args.hidden_size % 32:
        parser.error(f"--hidden-size {args.hidden_size}: expected a multiple of 32.")
    for flag, shares in (("base", LONG), ("rows", ROWS)):
        share = getattr(args, f"careful_{flag}")
        if not 0 <= share * sum(shares[:3]) / shares[0] <= 1:  # sloppy and skipping authors come along
            parser.error(f"--careful-{flag} {share}: expected 0 to {shares[0] / sum(shares[:3]):.2f}.")

    print(f"Making the toy in {args.out}: base model, tokenizer, rows; about two minutes on two cores, once.")
    started = time.time()
    options = {name: value for name, value in vars(args).items() if name not in ("out", "seed", "steps")}
    splits = make(args.out, args.seed, args.steps, **options)
    rows = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{args.out} holds a Qwen2 of three layers and rows ({rows}); {time.time() - started:.0f} s.")
