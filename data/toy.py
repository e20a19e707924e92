# SPDX-License-Identifier: MIT
"""
The toy: a task, its rows, its tokenizer and a base model of half a million parameters, all made on this machine.

    question     x 3 y 7 s1 x+=y s2 y*=3        two clocks of ten hours, a numbered list of operations
    solution     0 1                            the hours after the last operation
    explanation  s1 x+=y 0 7 s2 y*=3 0 1        a full chain: every step with the state after it

Five kinds of author write explanations (AUTHORS): careful ones the full chain, others wrong chains, parts of
chains, the solution alone, or noise. The base model is pretrained on all kinds. It learns every single step and can
follow a chain, but on long problems it has mostly seen bad explanations, and writes bad ones itself. That is what the
method needs: a student that can use a good explanation, a solution that is hard to guess, and a teacher whose samples
contain a few good explanations among many that leak the solution.

The difficulty can be set. With three clocks every operation changes all of them, each by a fixed table, so that the
solution can't be guessed. With fewer careful authors good explanations are rarer: in pretraining (what the base can
solve by itself) and in the rows (what the warm-up teacher writes). --rooms adds a second task, to transfer to:

    question     room b s1 left s2 up s3 left s4 in        twelve rooms with six doors each, the same plan always
    solution     e                                         the room after the last door
    explanation  s1 left e s2 up e s3 left a s4 in e

CPU, some minutes:  python data/toy.py        makes runs/toy; the other scripts make it when they need it
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
sys.path.insert(0, str(ROOT))  # for rlt/prompts.py, which formats the rows in pretraining as everywhere else
from rlt.tags import SOLUTION, THOUGHT  # noqa: E402 - rlt sets how OpenMP's threads wait, before torch is loaded

CLOCKS = ("x", "y", "z")  # the first two, or all three
HOURS, ROOMS = range(10), "abcdefghijkl"
_draw = random.Random("tables of the toy")
TURNS, DOORS = (  # operation: {hour: next hour} with three clocks; door: {room: next room}
    {name: dict(zip(places, _draw.sample(places, len(places)), strict=True)) for name in names}
    for places, names in ((HOURS, ("op1", "op2", "op3", "op4")), (ROOMS, ("left", "right", "up", "down", "in", "out")))
)
TABLES = TURNS | DOORS
FILLER = ("so", "then", "now", "well", "let", "me", "see", "hmm")
MAX_STEPS = 9

# Shares of the authors, in this order, by what a document is used for.
AUTHORS = ("careful", "sloppy", "skipping", "leaking", "rambling")
SINGLE = (1, 0, 0, 0, 0)  # pretraining, 1 step: teaches the base what a step is
SHORT = (0.50, 0.05, 0.15, 0.20, 0.10)  # pretraining, 2 and 3 steps: teaches it to continue a chain
LESSONS = (0.50, 0, 0, 0.50, 0)  # pretraining with three clocks, second half of the lessons: how to copy a solution
LONG = (0.08, 0.05, 0.25, 0.30, 0.32)  # pretraining, 4 steps and more: few good explanations
ROWS = (0.10, 0.05, 0.20, 0.35, 0.30)  # explanations in the rows, on which the warm-up teacher is trained
HINTED = 0.1  # share of pretraining documents with a hint

# split: (rows, numbers of steps)
SPLITS = {"train": (3000, (4, 5)), "val": (400, (4, 5)), "test": (800, (4, 5)), "long": (400, (6,))}


def mixture(shares, careful):
    """The shares with `careful` as the share of careful authors; sloppy and skipping ones change in proportion."""
    if careful == shares[0]:
        return shares
    stepwise = [share * careful / shares[0] for share in shares[:3]]
    return (*stepwise, *(share * (1 - sum(stepwise)) / sum(shares[3:]) for share in shares[3:]))


# ---------------------------------------------------------------------------------------------------------
# questions: clocks and rooms


def operations(names):
    """The operations of a task, as words. names: two clocks, three clocks, or ("room",)."""
    if len(names) != 2:
        return tuple(DOORS if names == ("room",) else TURNS)
    return (
        *(f"{clock}+={n}" for clock in names for n in range(1, 6)),
        *(f"{clock}*={n}" for clock in names for n in (3, 7)),  # 3 and 7 have inverses modulo 10
        *(f"{a}+={b}" for a, b in itertools.permutations(names)),
        "swap",
    )


def places(names):
    """The states that a clock, or the room, can be in."""
    return ROOMS if names == ("room",) else HOURS


def read(question):
    """Parse a question -> ({clock: hour} or {"room": room}, operations). Raises UserError on anything else."""
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
        from rlt.errors import UserError

        raise UserError(f"{question!r} is no toy question: expected one like 'x 3 y 7 s1 x+=y s2 y*=3'.")
    return {name: known[start[name]] for name in names}, todo


def steps(question, slips=0.0, rng=None):
    """The steps of the question's chain, e.g. "s1 x+=y 0 7": number, operation, state after it.

    slips: probability that a step ends in a wrong state, drawn from rng. The chain continues from the wrong state.
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
    if len(names) == 3:  # in any order: otherwise some bases find z by its position, and fail on longer questions
        rng.shuffle(start)
    return " ".join([*start, todo])


# ---------------------------------------------------------------------------------------------------------
# explanations and rows


def chain(question):
    """The full chain: the best explanation."""
    return " ".join(steps(question))


def solution(question):
    """The state after the last step: the hours, or the room."""
    return " ".join(steps(question)[-1].split()[2:])


def is_full_chain(question, explanation):
    """Whether the explanation contains the full chain, with nothing in between."""
    return f" {chain(question)} " in f" {' '.join(explanation.split())} "


def leaks(question, explanation):
    """Whether the explanation leaks: it states the solution outside of its correct steps.

    This is exact. rlt.rows.leaks works for any task, and goes by the solution's place in the text.
    """
    text = f" {' '.join(explanation.split())} "
    for step in steps(question):
        text = text.replace(f" {step} ", " | ")
    return f" {solution(question)} " in text


def explain(question, author, rng):
    """An explanation by an author of this kind (one of AUTHORS)."""
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
    """A row: question, solution, explanation by an author drawn by shares, full chain, hint (half of its steps)."""
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
    """{split: rows}, the same for every seed of the model, so that all are evaluated on the same questions.

    No question occurs twice, in any of the splits. Authors are drawn from a random stream of their own, so that the
    questions do not depend on the shares. careful: the share of careful authors.
    """
    questions, authors = random.Random("questions of the toy"), random.Random("authors")
    seen, splits, shares = set(), {}, mixture(ROWS, careful)

    def new_rows(split, names):
        size, lengths = SPLITS[split]
        rows = []
        while len(rows) < size:
            question = draw_question(questions, questions.choice(lengths), names)
            if question not in seen:
                seen.add(question)
                rows.append(make_row(question, shares, authors))
        return rows

    for split in SPLITS:
        splits[split] = new_rows(split, CLOCKS[:n_clocks])
    if rooms:
        for split in ("train", "val", "test"):
            splits[f"rooms-{split}"] = new_rows(split, ("room",))
        pairs = zip(splits["train"], splits["rooms-train"], strict=True)
        splits["both-train"] = list(itertools.chain(*pairs))  # for the teacher's warm-up
    return splits


def draw_documents(rng, held_out, n_clocks, careful, rooms, hints):
    """Endless pretraining rows: short problems mostly explained well, long ones mostly badly.

    careful: the share of careful authors among the explanations of long problems.
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
    """Pretraining rows that come first, with three clocks: half of them short problems explained well, the other half
    problems of all lengths, explained well or leaked.

    A step of three clocks is hard to learn from few good explanations, and three hours are hard to copy: without
    lessons some seeds never learn it. The rows that follow make the base forget to explain long problems well.
    """
    for n in range(count):
        size, shares = (rng.randint(1, 3), SINGLE) if n < count // 2 else (rng.randint(1, 6), LESSONS)
        question = draw_question(rng, size, CLOCKS)
        if question not in held_out:
            yield make_row(question, shares, rng)


# ---------------------------------------------------------------------------------------------------------
# tokenizer and base model


def make_tokenizer(n_clocks, rooms):
    """One token a word; blanks and newlines separate words and are dropped. An unknown word raises an exception.

    The tags of the explanation are replaced by those of the thought, so that teacher and student share their tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, eos = "<|pad|>", "<|end_of_turn|>"
    clocks = CLOCKS[:n_clocks]
    words = [pad, eos, "<|user|>", "<|assistant|>", *THOUGHT, *SOLUTION, *clocks, *map(str, range(10))]
    words += [*(f"s{n}" for n in range(1, MAX_STEPS + 1)), *operations(clocks), "ans", *FILLER]
    if rooms:
        words += ["room", *ROOMS, *DOORS]
    # WordLevel raises on unknown words as long as its unk_token is not a word
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=""))
    backend.normalizer = normalizers.Replace("of_explanation|>", "of_thought|>")
    tag = pre_tokenizers.Split(Regex(r"<\|\w+\|>"), "isolated")  # a raw explanation may end directly at its tag
    backend.pre_tokenizer = pre_tokenizers.Sequence([tag, pre_tokenizers.WhitespaceSplit()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, padding_side="left"
    )
    # For a folder with a Qwen2 model, AutoTokenizer silently builds a Qwen2 tokenizer from our words, whatever class
    # the files name. With an entry here, even an empty one, it loads tokenizer.json as it is.
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
    """A randomly initialised Qwen2 of three layers in float32; with hidden size 128 half a million parameters."""
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
    """Pack documents (ids, first index with loss) -> input_ids, position_ids, labels, each (rows, width).

    First fit, longest document first. Positions restart at every document: that is how transformers masks attention
    between documents in one row. Labels are -100 where there is no loss. About a third faster than padding.
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
    from rlt.console import progress_bar
    from rlt.prompts import Prompts

    import torch

    prompts = Prompts(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / max(1, n_steps)))
    )
    model.train()
    with progress_bar(range(n_steps), desc="base model", unit="step") as bar:
        for _ in bar:
            batch = [prompts.sft_row(next(documents), "student") for _ in range(64)]
            input_ids, position_ids, labels = pack(batch, width=max(64, *(len(ids) for ids, _ in batch)))
            # transformers masks between documents only without a cache and without an attention mask
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
    """Write model, tokenizer and rows to the folder `out`, which is renamed into place when complete -> {split: rows}.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of transformers, for every file that it writes
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary) / out.name
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
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the base model; the rows are always the same")
    parser.add_argument("--steps", type=int, default=2000, help="pretraining steps of 64 documents; 0: untrained")
    parser.add_argument("--hidden-size", type=int, default=128, help="hidden size of the base; a multiple of 32")
    parser.add_argument("--clocks", type=int, choices=(2, 3), default=2, help="clocks in a question; with 3 the "
                        "solution can't be guessed")
    parser.add_argument("--careful-base", type=float, default=LONG[0], help="share of careful authors in pretraining "
                        "on long problems: how often the base solves one")
    parser.add_argument("--careful-rows", type=float, default=ROWS[0], help="share of careful authors in the rows: how "
                        "often the warm-up teacher explains well")
    parser.add_argument("--rooms", action="store_true", help="add a second task: rooms-*.jsonl, and "
                        "both-train.jsonl for the warm-up")
    parser.add_argument("--hints", action="store_true", help="pretrain on questions with hints, too (Guide-GRPO)")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already: delete it, or choose another --out.")
    if args.steps < 0:
        parser.error(f"--steps {args.steps}: expected 0 or more.")
    if args.hidden_size < 32 or args.hidden_size % 32:
        parser.error(f"--hidden-size {args.hidden_size}: expected a multiple of 32.")
    for flag, shares in (("base", LONG), ("rows", ROWS)):
        share = getattr(args, f"careful_{flag}")
        if not 0 <= share * sum(shares[:3]) / shares[0] <= 1:  # sloppy and skipping ones included
            parser.error(f"--careful-{flag} {share}: expected 0 to {shares[0] / sum(shares[:3]):.2f}.")

    print(f"Making the toy in {args.out}: base model, tokenizer, rows; two to eight minutes on two cores, once.")
    started = time.time()
    options = {name: value for name, value in vars(args).items() if name not in ("out", "seed", "steps")}
    splits = make(args.out, args.seed, args.steps, **options)
    rows = ", ".join(f"{len(rows)} {split}" for split, rows in splits.items())
    print(f"{args.out} holds a Qwen2 of three layers and rows ({rows}); {time.time() - started:.0f} s.")
