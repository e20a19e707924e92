# SPDX-License-Identifier: MIT
"""
Let a teacher explain every row, and write what a student is distilled on.

Each line of --out is a row: question, solution, explanation, reward, score, kl, closed, and `messages`, the chat
(system, user, assistant) that any SFT tool takes. The explanation is the teacher's raw text with its tags swapped
for the student's; nothing is filtered unless asked for. A killed run goes on with --resume: rows that are whole
stay, the batch that was cut is drawn again, to the same text.

With --score-file nothing is written by the teacher: it scores explanations that are there, anybody's. --partition k
then splits the rows into k files by reward. With --solver the model is a student that solves the questions by itself,
and what the grader accepts is kept: the traditional way to make such data.

    laptop, 40 seconds    python distill.py
    best of 16            python distill.py --samples 16 --keep best --out runs/best-of-16.jsonl
    somebody's traces     python distill.py --score-file traces.jsonl --partition 5 --out runs/scored.jsonl
    an RL student's own   python distill.py --solver --model runs/rl_student --out runs/solved.jsonl
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import memory
import models
import runs
from evaluate import GOLD, gradable, grade_all
from prompts import THOUGHT, Prompts, between, leaks, load_rows
from rewards import score_explanations
from runs import number, seed_for

# ---------------------------------------------------------------------------------------------------------
parser = runs.flags(__doc__)
# models
parser.add_argument("--model", default="runs/teacher", help="teacher: run folder, folder, hub id")
parser.add_argument("--student", default=None, help="frozen student that scores; None: the teacher's own base")
parser.add_argument("--teacher-bits", type=int, choices=(4, 16, 32), default=32, help="bits of the teacher's base")
parser.add_argument("--student-bits", type=int, choices=(4, 16, 32), default=4, help="bits of the student")
# data
parser.add_argument("--data", default="toy", help="rows with question and solution: file, hub id, or toy")
parser.add_argument("--question-column", default=None, help="column with the question; None: by known schemas")
parser.add_argument("--solution-column", default=None, help="column with the solution; None: by known schemas")
parser.add_argument("--limit", type=number(int, 1), default=None, help="use the first rows only")
parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad and over-long rows out, and count them")
parser.add_argument("--solution-in", choices=("assistant", "user"), default="assistant", help="where the teacher was "
                    "trained to find the solution")
parser.add_argument("--score-file", default=None, help="score this file's explanations instead of writing any")
parser.add_argument("--solver", action="store_true", help="the model solves the questions, without the solutions; what "
                    "--task's grader accepts is kept")
parser.add_argument("--task", choices=sorted(GOLD), default="toy", help="how --solver's answers are graded")
parser.add_argument("--keep-wrong", action="store_true", help="with --solver: keep what the grader rejects, too")
# explanations
parser.add_argument("--samples", type=number(int, 1), default=1, help="explanations a row")
parser.add_argument("--keep", choices=("all", "best"), default="all", help="of a row's samples: all, or the one with "
                    "the highest reward")
parser.add_argument("--drop-unclosed", action="store_true", help="leave explanations out that do not end properly")
parser.add_argument("--partition", type=number(int, 2), default=None, help="split the rows by reward into this many "
                    "files, overall and within each question")
parser.add_argument("--temperature", type=number(float, above=0), default=1.0, help="of sampling")
parser.add_argument("--max-new-tokens", type=number(int, 1), default=48, help="length limit of an explanation")
# reward
parser.add_argument("--lambda", dest="lam", metavar="L", type=number(float, 0), default=3.0, help="weight of the KL")
parser.add_argument("--alpha", type=number(float, 0), default=0.01, help="weight of the min and the max over tokens")
parser.add_argument("--kl", choices=("exact", "sampled"), default="exact", help="KL over the whole vocabulary, the "
                    "less noisy measure, or the log-ratio of the sampled token, as train_rlt.py's default")
parser.add_argument("--score-temperature", type=number(float, above=0), default=None, help="temperature of both "
                    "models in the reward; None: the sampling temperature")
parser.add_argument("--unclosed-penalty", type=number(float, 0), default=1.0, help="taken off the reward of an "
                    "explanation that does not end properly")
# system
parser.add_argument("--batch-size", type=number(int, 1), default=256, help="explanations sampled side by side")
parser.add_argument("--engine", choices=("batch", "continuous"), default="batch", help="side by side until the last "
                    "has ended, or continuous batching, where the next one starts as soon as another ends")
parser.add_argument("--cache-tokens", type=number(int, 1), default=2**18, help="tokens, prompts included, that "
                    "--engine continuous may hold keys and values of; 2**18 of Qwen2.5-7B take 15 GB")
parser.add_argument("--micro-batch-tokens", type=number(int, 1), default=8192, help="tokens a scoring pass")
parser.add_argument("--head-chunk", type=number(int, 1), default=1024, help="rows of logits that exist at a time")
parser.add_argument("--logits-dtype", choices=("float32", "bfloat16"), default="float32", help="of the logits in the "
                    "scoring pass; bfloat16 halves their traffic where the heads are bfloat16, and rounds the reward")
parser.add_argument("--seed", type=number(int, 0), default=0, help="of every draw")
parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
parser.add_argument("--dry-run", nargs="?", metavar="GB", const=0.0, type=number(float, above=0), help="check "
                    "flags, rows and disk, estimate the memory, and stop; GB: of the GPU meant; none: this machine")
parser.add_argument("--out", default="runs/distilled.jsonl", help="file to write")
parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped, or start")
args = parser.parse_args()
if args.score_file and (args.samples > 1 or args.solver):
    parser.error("--score-file reads explanations, --samples and --solver make them: pass one or the other")
if args.solver and (args.keep == "best" or args.partition):
    parser.error("--solver gives no rewards: --keep best and --partition need them")
if args.keep == "best" and args.samples == 1:
    parser.error("--keep best chooses among the --samples of a row: pass 2 or more")
if args.keep_wrong and not args.solver:
    parser.error("--keep-wrong does nothing without --solver")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
rank, world = runs.join(device)
out, config = Path(args.out), Path(f"{args.out}.config.json")
done, written = 0, []  # batches that are whole in the file, and its lines
if out.exists() and not args.resume:
    raise FileExistsError(f"{out} is there already. Pass --resume to go on, or another --out.")
if out.exists():
    if not config.exists():
        raise FileExistsError(f"{out} is no output of distill.py, {config} is missing. Pass another --out.")
    runs.check_same_flags(out, json.loads(config.read_text())["flags"], vars(args))
    written = runs.read_jsonl(out)
    done = written[-1]["batch"] if written else 0  # the last one may be cut short: draw it again

student_name = args.student or models.base_of(args.model)
rows = load_rows(args.score_file or models.rows_of(args.data, "train"), question_column=args.question_column,
                 solution_column=args.solution_column, limit=args.limit, skip_bad=args.skip_bad_rows)
if args.solver:
    rows = gradable(args.task, rows)
tokenizer = models.load_tokenizer(args.model)
models.check_same_tokenizer(tokenizer, models.load_tokenizer(student_name))
prompts, vocab = Prompts(tokenizer, args.solution_in), len(tokenizer)
room = models.context_of(args.model, student_name) - (0 if args.score_file else args.max_new_tokens)
also = [lambda row: prompts.written(row)[0]] if args.score_file else []
rows = prompts.fitting(rows, room, skip=args.skip_bad_rows, also=also)
per_batch = max(1, args.batch_size // args.samples)  # rows, each with all its samples
if args.dry_run is not None:
    gpu, batch = args.dry_run > 0 or device.type == "cuda", min(per_batch, len(rows)) * args.samples
    longest = max(len(prompts.teacher(row)) + sum(len(ids_of(row)) for ids_of in also) for row in rows)
    shapes = [memory.Shape(**models.anatomy(args.model), bits=args.teacher_bits, gpu=gpu)]
    if not args.solver:
        shapes.append(memory.Shape(**models.anatomy(student_name), bits=args.student_bits, gpu=gpu))
    raise SystemExit(memory.dry_run(
        args, device, *shapes, vocab=vocab, row=longest + (0 if args.score_file else args.max_new_tokens),
        rollout=None if args.score_file else (batch, longest, args.max_new_tokens), scored=not args.solver))
teacher = models.load_model(args.model, bits=args.teacher_bits, device=device)
student = None if args.solver else models.load_model(student_name, bits=args.student_bits, device=device)
runs.meet()  # all ranks have read what was there
if rank == 0:
    out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_atomically(config, json.dumps(runs.describe(args), indent=2) + "\n")
    runs.write_atomically(out, "".join(json.dumps(row) + "\n" for row in written if row["batch"] < done))


def sample(asked, batch):
    return models.generate(teacher, tokenizer, asked, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                           seed=seed_for(args.seed, "distill", 0, batch), engine=args.engine,
                           cache_tokens=args.cache_tokens)


def explain(asked, batch):
    """One line for each of these rows: its explanation, new or from the file, and what the student makes of it."""
    if args.score_file:
        sampled = [prompts.written(row) for row in asked]
    else:
        sampled = [(c.ids, c.finished) for c in sample([prompts.teacher(row) for row in asked], batch)]
    explanations = [prompts.split(ids, finished) for ids, finished in sampled]
    scored = score_explanations(
        teacher, student, [prompts.scoring(*pair) for pair in zip(asked, explanations, strict=True)],
        lam=args.lam, alpha=args.alpha, kl=args.kl, temperature=args.score_temperature or args.temperature,
        vocab=vocab, head_chunk=args.head_chunk, micro_batch_tokens=args.micro_batch_tokens,
        logits_dtype=getattr(torch, args.logits_dtype)).reward
    improper = torch.tensor([not (e.closed and e.thought) for e in explanations], device=device)
    rewards = scored.reward - args.unclosed_penalty * improper
    for row, explanation, (ids, _), *numbers in zip(
            asked, explanations, sampled, rewards.tolist(), scored.score.tolist(), scored.kl.tolist(), strict=True):
        yield {
            "batch": batch, "question": row["question"], "solution": row["solution"], "explanation": explanation.text,
            **dict(zip(("reward", "score", "kl"), numbers, strict=True)), "closed": explanation.closed,
            "length": len(ids), "leak": leaks(explanation.text, row["solution"]),
            "messages": prompts.distilled(row, explanation.text),
        }


def solve(asked, batch):
    """One line for each of these rows: what the student writes when it sees the question alone, and its grade."""
    completions = sample([prompts.question(row) for row in asked], batch)
    texts = [tokenizer.decode(c.ids[:-1] if c.finished else c.ids) for c in completions]
    grades = grade_all(args.task, texts, asked)
    for row, text, c, right in zip(asked, texts, completions, grades, strict=True):
        *before, answer = prompts.distilled(row, "")
        yield {
            "batch": batch, "question": row["question"], "solution": row["solution"],
            "explanation": (between(text, *THOUGHT) or "").lstrip("\n"), "right": bool(right), "closed": c.finished,
            "length": len(c.ids), "messages": [*before, {**answer, "content": text}],
        }


batches = [rows[at : at + per_batch] for at in range(0, len(rows), per_batch)]


def kept(batch):
    """What this batch leaves in the file."""
    asked = [row for row in batches[batch] for _ in range(args.samples)]
    lines = list(solve(asked, batch) if args.solver else explain(asked, batch))
    groups = [lines[at : at + args.samples] for at in range(0, len(lines), args.samples)]
    groups = [[line for line in group if (line["closed"] or not args.drop_unclosed)
               and (line.get("right", True) or args.keep_wrong)] for group in groups]
    if args.keep == "best":
        groups = [[max(group, key=lambda line: line["reward"])] for group in groups if group]
    return [line for group in groups for line in group]


with tqdm(initial=done, total=len(batches), unit="batch", dynamic_ncols=True, disable=rank > 0) as progress:
    for first in range(done, len(batches), world):  # a batch on each rank; the file is the same on any number of them
        lines = runs.gather(kept(first + rank) if first + rank < len(batches) else [])
        runs.append_jsonl(out, [line for part in lines for line in part])  # in one go
        progress.update(len(batches[first : first + world]))
if rank:
    sys.exit()

written = runs.read_jsonl(out)
if args.partition:
    k, questions = args.partition, {}
    for row in written:
        questions.setdefault(row["question"], []).append(row)
    for name, groups in (("overall", [written]), ("within", questions.values())):
        parts = [[] for _ in range(k)]
        for group in groups:
            for place, row in enumerate(sorted(group, key=lambda row: row["reward"])):
                parts[place * k // len(group)].append(row)
        for i, part in enumerate(parts, 1):
            path = out.with_name(f"{out.stem}.{name}-{i}of{k}.jsonl")
            runs.write_atomically(path, "".join(json.dumps(row) + "\n" for row in part))
            print(f"{path}: {len(part)} rows, reward up to {max((row['reward'] for row in part), default=0):.4g}")

shown = [key for key in ("reward", "score", "kl", "right", "closed", "leak", "length") if written and key in written[0]]
means = " | ".join(f"{key} {sum(row[key] for row in written) / len(written):.4g}" for key in shown)
print(f"{out}: {len(written)} explanations of {len(rows)} rows | {means}")
flags = f" --data {out}" if args.out != "runs/distilled.jsonl" else ""
flags += f" --model {student_name}" if args.data != "toy" or args.score_file else ""
print(f"Next: python sft_student.py{flags}")
