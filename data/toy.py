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

CPU, two minutes:  python data/toy.py        makes runs/toy; the other scripts call it when they need it
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for prompts.py: the base is trained on what the pipeline will show it

REGISTERS = ("x", "y")
OPERATIONS = (
    *(f"{register}+={n}" for register in REGISTERS for n in range(1, 6)),
    *(f"{register}*={n}" for register in REGISTERS for n in (3, 7)),  # 3 and 7 have inverses modulo 10
    "x+=y",
    "y+=x",
    "swap",
)
FILLER = ("so", "then", "now", "well", "let", "me", "see", "hmm")
MAX_STEPS = 9

# Who explains: shares of the authors by what the document is for.
AUTHORS = ("careful", "sloppy", "skipping", "leaking", "rambling")
SINGLE = (1, 0, 0, 0, 0)  # pretraining, one step: how the base learns what a step is
SHORT = (0.50, 0.05, 0.15, 0.20, 0.10)  # pretraining, 2 and 3 steps: how it learns to go on from a step
LONG = (0.08, 0.05, 0.25, 0.30, 0.32)  # pretraining, 4 steps and more: why it explains long problems badly
ROWS = (0.10, 0.05, 0.20, 0.35, 0.30)  # the rows' explanations, on which the teacher is warmed up

# split: (rows, numbers of steps)
SPLITS = {"train": (3000, (4, 5)), "val": (400, (4, 5)), "test": (800, (4, 5)), "long": (400, (6,))}


# ---------------------------------------------------------------------------------------------------------
# the task


def steps(question, slips=0.0, rng=None):
    """The question worked out, one "s1 x+=y 0 7" per operation: its number, itself, the state after it.

    slips: probability that a step's state goes wrong, drawn from rng. Who slips goes on from there.
    Raises ValueError on anything but a toy question.
    """
    words = question.split()
    numbers, operations = words[4::2], words[5::2]
    if (
        words[:4:2] != list(REGISTERS)
        or not all(word in set("0123456789") for word in words[1:4:2])
        or not operations
        or numbers != [f"s{n}" for n in range(1, len(operations) + 1)]
        or not set(operations) <= set(OPERATIONS)
    ):
        raise ValueError(f"{question!r} is no toy question: expected one like 'x 3 y 7 s1 x+=y s2 y*=3'.")
    state = {"x": int(words[1]), "y": int(words[3])}
    worked = []
    for number, operation in zip(numbers, operations, strict=True):
        if operation == "swap":
            state = {"x": state["y"], "y": state["x"]}
        else:
            register, sign, operand = operation[0], operation[1], operation[3:]
            amount = state[operand] if operand in state else int(operand)
            state[register] = (state[register] + amount if sign == "+" else state[register] * amount) % 10
        if slips and rng.random() < slips:
            state[rng.choice(REGISTERS)] = rng.randrange(10)
        worked.append(f"{number} {operation} {state['x']} {state['y']}")
    return worked


def chain(question):
    """The full right explanation: every step, with the state after it."""
    return " ".join(steps(question))


def solution(question):
    """The state after the last step, "x y"."""
    return steps(question)[-1][-3:]


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
        words = rng.choices((*FILLER, *question.split()[5::2]), k=rng.randint(2, 8))
    return " ".join(words)


def draw_question(rng, n_steps):
    operations = " ".join(f"s{n} {rng.choice(OPERATIONS)}" for n in range(1, n_steps + 1))
    return f"x {rng.randrange(10)} y {rng.randrange(10)} {operations}"


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
        "chain": chain(question),
        "hint": " ".join(worked[: len(worked) // 2]),
    }


def make_rows():
    """{split: rows}, the same for every seed of the model, so that all are measured on the same questions.

    No question is there twice, in whatever split. Authors have draws of their own, so that other
    shares leave the questions as they are.
    """
    questions, authors = random.Random("questions of the toy"), random.Random("authors")
    seen, splits = set(), {}
    for split, (size, lengths) in SPLITS.items():
        splits[split] = []
        while len(splits[split]) < size:
            question = draw_question(questions, questions.choice(lengths))
            if question not in seen:
                seen.add(question)
                splits[split].append(make_row(question, ROWS, authors))
    return splits


def draw_documents(rng, held_out):
    """Rows to pretrain on, without end: short problems mostly explained well, long ones mostly badly."""
    while True:
        n_steps = rng.choice((1, 1, 2, 2, 3, 4, 5, 6))
        question = draw_question(rng, n_steps)
        if question not in held_out:
            yield make_row(question, SINGLE if n_steps == 1 else SHORT if n_steps < 4 else LONG, rng)


# ---------------------------------------------------------------------------------------------------------
# tokenizer and base model


def make_tokenizer():
    """One token a word; blanks and newlines separate words and vanish. An unknown word raises an exception.

    The tags of the explanation become those of the thought, so that teacher and student share their tokens.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from prompts import SOLUTION, THOUGHT

    pad, eos = "<|pad|>", "<|end_of_turn|>"
    words = [pad, eos, "<|user|>", "<|assistant|>", *THOUGHT, *SOLUTION, *REGISTERS, *map(str, range(10))]
    words += [*(f"s{n}" for n in range(1, MAX_STEPS + 1)), *OPERATIONS, "ans", *FILLER]
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


def make_model(seed):
    """A Qwen2 of half a million parameters, float32, randomly initialised."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64,  # 55 words and padding, as Qwen2.5 pads its 151,665 to 152,064
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=256,
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


def pretrain(model, tokenizer, seed, n_steps, held_out):
    """Train the model in place on n_steps batches of 64 documents, none of whose questions is in held_out."""
    import torch
    from tqdm import tqdm

    from prompts import Prompts

    prompts, documents = Prompts(tokenizer), draw_documents(random.Random(f"documents of {seed}"), held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / max(1, n_steps)))
    )
    model.train()
    with tqdm(range(n_steps), desc="base model", unit="step") as bar:
        for _ in bar:
            batch = [prompts.sft(next(documents), "student") for _ in range(64)]
            input_ids, position_ids, labels = pack(batch, width=64)
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


def make(out, seed, n_steps):
    """Write model, tokenizer and rows to the folder `out`, which appears whole or not at all."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # transformers shows one for every file that it writes
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        folder.mkdir()
        splits = make_rows()
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer, model = make_tokenizer(), make_model(seed)
        held_out = {row["question"] for split in ("val", "test", "long") for row in splits[split]}
        pretrain(model, tokenizer, seed, n_steps, held_out)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
        os.rename(folder, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Make the toy: base model, tokenizer and rows.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the base model; the rows are always the same")
    parser.add_argument("--steps", type=int, default=2000, help="of 64 documents; 0 = an untrained base")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists already: delete it, or choose another --out.")
    if args.steps < 0:
        parser.error(f"--steps {args.steps}: expected 0 or more.")

    print(f"Making the toy in {args.out}: base model, tokenizer, rows; about two minutes on two cores, once.")
    started = time.time()
    make(args.out, args.seed, args.steps)
    rows = ", ".join(f"{size} {split}" for split, (size, _) in SPLITS.items())
    print(f"{args.out} holds a Qwen2 of 0.5 M parameters and rows ({rows}); {time.time() - started:.0f} s.")
