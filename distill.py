# SPDX-License-Identifier: MIT
"""
Write explanations of every row with a teacher: the data that students are distilled on.

    laptop, 40 seconds       python distill.py
    best of 16               python distill.py --samples 16 --keep best --out runs/best-of-16.jsonl
    others' explanations     python distill.py --score-file traces.jsonl --partition 5 --out runs/scored.jsonl
    a student's own answers  python distill.py --solver --model runs/rl_student --out runs/solved.jsonl

Each line of --out is a row: question, solution, explanation, reward, score, kl, closed, and `messages`, the chat
(system, user, assistant) that any SFT tool takes. The explanation is the teacher's raw text, between the student's
tags. Explanations with tags or special tokens are left out, and nothing else unless asked for. With --score-file the
teacher writes nothing: it scores explanations that exist already. With --solver the model is a student that answers the
questions, and what the grader accepts is kept; empty answers never are.
"""

import json
import math
import shlex
import sys

from rlt import flags, lora, models, saving
from rlt.chat_template import vocabulary_size
from rlt.console import print_next, print_progress, progress_bar
from rlt.defaults import settle
from rlt.distributed import all_gather_object, init_distributed
from rlt.dry_run import dry_run
from rlt.errors import UserError, printable
from rlt.files import read_jsonl, write_atomically
from rlt.footprint import ModelFootprint
from rlt.grading import GOLD, TASKS, answer_of, gradable, grade_all
from rlt.inspection import ROWS, token_numbers
from rlt.memory import MicroBatched
from rlt.prompts import THOUGHT, Prompts, drop_overlong, show_rows
from rlt.rollout import check_finite, make_engine
from rlt.rows import between, leaks, load_rows
from rlt.rows_file import RowsFile, check_rows_file
from rlt.runs import digest
from rlt.steps import advice_on_format

import torch

from rewards import score_explanations

# ---------------------------------------------------------------------------------------------------------
parser = flags.make_parser(__doc__)
group = parser.add_argument_group("models")
group.add_argument("--model", type=flags.path, default="runs/teacher", help="teacher: run folder, folder or hub id")
group.add_argument("--student", type=flags.path, help="frozen student; default: the teacher's own base")
flags.add_bits(group, "--teacher-bits", "weights of the teacher's base")
flags.add_student_bits(group)
group = parser.add_argument_group("data")
flags.add_data(group, data="toy", columns=("question", "solution", "explanation"))
flags.add_solution_in(group)
group.add_argument("--score-file", type=flags.path, metavar="FILE", help="score this file's explanations, write none")
group = parser.add_argument_group("answers instead of explanations")
group.add_argument("--solver", action="store_true", help="the model answers the questions, without the solutions")
group.add_argument("--task", choices=TASKS, default="toy", metavar="NAME",
                   help=f"how the answers are graded: {', '.join(TASKS)}")
group.add_argument("--keep-wrong", action="store_true", help="keep wrong answers, too")
group = parser.add_argument_group("explanations")
group.add_argument("--samples", type=flags.number(int, 1), default=1, metavar="N", help="explanations a row")
group.add_argument("--keep", choices=("all", "best"), default="all", metavar="WHICH",
                   help="of a row's samples: all, or best, the one with the highest reward")
group.add_argument("--drop-unclosed", action="store_true", help="leave out explanations that do not end properly")
group.add_argument("--partition", type=flags.number(int, 2), metavar="K",
                   help="also split the rows by reward into K files, over all rows and within each question")
flags.add_sampling(group, batch_flag="--batch-size")
flags.add_reward(parser.add_argument_group("reward"), kl="exact")
group = parser.add_argument_group("system")
flags.add_micro_batches(group)
flags.add_system(group)
group.add_argument("--out", type=flags.path, default="runs/distilled.jsonl", metavar="FILE", help="file to write")
group.add_argument("--resume", action="store_true", help="continue where a killed run stopped, or start; "
                   "flags that are not given are those that it was started with")
args = parser.parse_args()
if args.score_file:
    flags.refuse(parser, args, "with --score-file, which has the explanations", "solver", "data", "samples", "keep",
                 "engine", "max_new_tokens")
if args.solver:
    flags.refuse(parser, args, "with --solver, which gives no rewards", "keep", "partition", "lam", "alpha", "kl",
                 "student", "student_bits", "unclosed_penalty", "solution_in")
else:
    flags.refuse(parser, args, "without --solver", "task", "keep_wrong")
if args.keep == "best" and args.samples == 1:
    parser.error("--keep best chooses among the --samples of a row: pass 2 or more")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
flags.choose_bits(parser, args, device)
rank, world = init_distributed(device)
check_rows_file(args)

# rows and tokens
rows = load_rows(args.score_file or models.data_source(args.data, "train"), require_solution=not args.solver,
                 **flags.row_options(args))
tokenizer = models.load_tokenizer(args.model)
settle(parser, args, rows, tokenizer)
output = RowsFile(args)
student_name = args.student or models.base_of(args.model)
if args.solver:
    rows = gradable(args.task, rows)
    if rank == 0 and (advice := models.advice_on_task(args.task, args.model)):
        print(f"warning: {advice}")
models.check_same_tokenizer(tokenizer, models.load_tokenizer(student_name), student_name)
shared = models.shares_base(args.model, args.teacher_bits, student_name, args.student_bits)
prompts, vocab = Prompts(tokenizer, args.solution_in), vocabulary_size(tokenizer)
prompt_of = prompts.question_prompt if args.solver else prompts.teacher_prompt
if args.show_rows:
    print(show_rows(prompts, rows, args.show_rows, args.skip_bad_rows))
    sys.exit()
new_tokens = 0 if args.score_file else args.max_new_tokens


def given_length(row):
    """Tokens of what is read of a row, all but what is sampled."""
    if args.solver:
        return len(prompt_of(row))
    return prompts.scored_length(row) + (len(prompts.encode_explanation(row)[0]) if args.score_file else 0)


rows = drop_overlong(rows, given_length, models.context_length(args.model, student_name), new_tokens,
                     skip=args.skip_bad_rows)
rows_per_batch = max(1, args.batch_size // args.samples)  # each with all its samples
batches = [rows[at : at + rows_per_batch] for at in range(0, len(rows), rows_per_batch)]
longest = max(map(given_length if args.score_file else lambda row: len(prompt_of(row)), rows))
if args.dry_run is not None:
    gpu, sampled = args.dry_run > 0 or device.type == "cuda", len(batches[0]) * args.samples
    footprints = [ModelFootprint(**models.model_and_adapter_config(args.model), bits=args.teacher_bits, gpu=gpu)]
    if not args.solver:
        student_config = models.model_and_adapter_config(student_name)
        footprints.append(ModelFootprint(**student_config, bits=args.student_bits, gpu=gpu))
    sys.exit(dry_run(
        args, device, *footprints, vocab=vocab, row=longest + new_tokens, batch_rows=sampled, shared=shared,
        scored=not args.solver, rollout=None if args.score_file else (sampled, longest, args.max_new_tokens)))

# models
teacher = models.load_model(args.model, bits=args.teacher_bits, device=device, scores=not args.solver)
student = None
if shared and not args.solver:
    student = lora.without_adapter(teacher)
elif not args.solver:
    student = models.load_model(student_name, bits=args.student_bits, device=device, scores=True)
engine, micro_batched = None, MicroBatched(args.micro_batch_tokens)
if not args.score_file:
    engine = make_engine(args.engine, teacher, tokenizer, base=models.base_of(args.model), bits=args.teacher_bits,
                         device=device, max_tokens=longest + args.max_new_tokens, batch=args.batch_size)
if args.solver:  # scoring models are looked at when they are loaded
    check_finite(args.model, engine.generate([prompt_of(rows[0])], max_new_tokens=1, temperature=0.0,
                                             key=("check",)))
output.start(base_hash=saving.fingerprint(teacher), adapter_hash=saving.adapter_hash(teacher),
             student_hash=student and saving.fingerprint(student),
             student_adapter_hash=None if shared or args.solver else saving.adapter_hash(student),
             rows_hash=digest(rows, *(GOLD[args.task] if args.solver else ())))


def sample(prompt_ids, batch):
    return engine.generate(prompt_ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                           key=(args.seed, "distill", batch))


def explain(rows, batch):
    """One line for each of these rows: its explanation, sampled or from the file, and its reward."""
    if args.score_file:
        completions = [prompts.encode_explanation(row) for row in rows]
    else:
        completions = [(c.ids, c.finished) for c in sample([prompt_of(row) for row in rows], batch)]
    explanations = [prompts.split_completion(ids, finished) for ids, finished in completions]
    scoring_rows = [prompts.scoring_row(*pair) for pair in zip(rows, explanations, strict=True)]
    scored = micro_batched(score_explanations, teacher, student, scoring_rows, lam=args.lam, alpha=args.alpha,
                           kl=args.kl, temperature=args.temperature, vocab=vocab)
    if batch == 0 and (advice := advice_on_format(scored, models.short_name(student_name))):
        print(f"warning: {advice}", flush=True)
    unclosed = torch.tensor([not e.complete for e in explanations], device=device)
    rewards = (scored.reward.reward - args.unclosed_penalty * unclosed).tolist()
    scores, kls = scored.reward.score.tolist(), scored.reward.kl.tolist()
    inspected = ROWS - batch * rows_per_batch * args.samples  # rows of this batch that keep their tokens
    return [{
        "batch": batch, "question": row["question"], "solution": row["solution"], "explanation": explanations[i].text,
        "reward": rewards[i], "score": scores[i], "kl": kls[i], "closed": explanations[i].closed,
        "foreign_tags": explanations[i].foreign_tags, "length": len(completions[i][0]),
        "leak": leaks(explanations[i].text, row["solution"]),
        "messages": prompts.chat_messages(row, explanations[i].text),
        **({"tokens": token_numbers(prompts, scoring_rows[i], scored, i)} if i < inspected else {}),
    } for i, row in enumerate(rows)]


def solve(rows, batch):
    """One line for each of these rows: what the student writes when it sees the question alone, and its grade. A row
    without a solution gets a right answer for one."""
    completions = sample([prompt_of(row) for row in rows], batch)
    texts = [prompts.turn_text(completion) for completion in completions]
    answers = [text.removeprefix(prompts.opened_thought) for text in texts]  # what the prompt has not opened itself
    grades = grade_all(args.task, texts, rows)
    return [{
        "batch": batch, "question": row["question"],
        "solution": row["solution"] or (answer_of(args.task, text) if right else None),
        "explanation": (between(text, *THOUGHT) or "").lstrip("\n"), "right": bool(right), "closed": c.finished,
        "foreign_tags": prompts.has_special_tokens(answer), "length": len(c.ids),
        "messages": [*prompts.chat_messages(row, "")[:-1], {"role": "assistant", "content": answer}],
    } for row, text, answer, c, right in zip(rows, texts, answers, completions, grades, strict=True)]


def keep(line):
    if args.drop_unclosed and not line["closed"] or not args.keep_wrong and not line.get("right", True):
        return False
    if not line["messages"][-1]["content"].strip():  # of --solver
        return False
    return not line.get("foreign_tags")  # a student that is trained on it would learn to forge a solution block


def lines_of(batch):
    """What this batch writes into the file."""
    repeated = [row for row in batches[batch] for _ in range(args.samples)]
    lines = solve(repeated, batch) if args.solver else explain(repeated, batch)
    groups = [lines[at : at + args.samples] for at in range(0, len(lines), args.samples)]
    groups = [[line for line in group if keep(line)] for group in groups]
    if args.keep == "best":
        groups = [[max(group, key=lambda line: (math.isfinite(line["reward"]), line["reward"]))]
                  for group in groups if group]
    return [line for group in groups for line in group]


with progress_bar(initial=output.first_batch, total=len(batches), unit="batch") as progress:
    for first in range(output.first_batch, len(batches), world):  # one batch a rank, and the same file by any number
        parts = all_gather_object(lines_of(first + rank) if first + rank < len(batches) else [])
        output.append([line for part in parts for line in part])
        done = min(first + world, len(batches))
        progress.update(done - first)
        print_progress(args.model, first, done, len(batches), args.quiet)
if rank:
    sys.exit()


def write_partitions(lines, k):
    """The lines by reward in k files of equal size: over all, and over each question's own. A question with fewer than
    k lines has none in each part: it is left out of the latter."""
    questions = {}
    for line in lines:
        questions.setdefault(line["question"], []).append(line)
    divisible = [group for group in questions.values() if len(group) >= k]
    if short := len(questions) - len(divisible):
        print(f"{short} questions have fewer than {k} explanations each: they are not in the files within questions. "
              "A lower --partition takes them in.")
    for name, groups in (("overall", [lines]), ("within", divisible)):
        parts = [[] for _ in range(k)]
        for group in groups:
            for position, line in enumerate(sorted(group, key=lambda line: line["reward"])):
                parts[position * k // len(group)].append(line)
        for i, part in enumerate(parts, 1):
            if part:
                path = output.path.with_name(f"{output.path.stem}.{name}-{i}of{k}.jsonl")
                write_atomically(path, "".join(json.dumps(line) + "\n" for line in part))
                print(f"{path}: {len(part)} rows, reward up to {max(line['reward'] for line in part):.4g}")


def describe(line):
    """A row of the file for the terminal, on three lines."""
    text = line["messages"][-1]["content"] if args.solver else line["explanation"]
    shown = ("reward", "score", "kl", "right", "closed")
    numbers = " | ".join(f"{key} {line[key]:.4g}" for key in shown if key in line)
    return "\n".join(printable(" ".join(part.split()), longest=300) for part in (line["question"], text, numbers))


lines = read_jsonl(output.path)
reasons = ["those that the grader found wrong"] * (args.solver and not args.keep_wrong)
reasons += ["empty answers"] * args.solver + ["unclosed ones"] * args.drop_unclosed
reasons += ["those with a reward that is NaN or infinite"] * bool(output.dropped)
reasons += ["those with tags or special tokens"]
if not lines:
    raise UserError(f"{output.path} has no rows. Left out were {', '.join(reasons)}: pass a better --model, "
                    "or one that has learned the format, more --max-new-tokens, or other rows.")
if args.partition:
    write_partitions(lines, args.partition)
shown = [key for key in ("reward", "score", "kl", "right", "closed", "leak", "length") if key in lines[0]]
means = " | ".join(f"{key} {sum(line[key] for line in lines) / len(lines):.4g}" for key in shown)
if left_out := len(rows) * (1 if args.keep == "best" else args.samples) - len(lines):
    print(f"{left_out} left out: {', '.join(reasons)}")
print(f"{output.path}: {len(lines)} explanations of {len(rows)} rows | {means}\nThe first:\n{describe(lines[0])}")
following = flags.carry(parser, args, "micro_batch_tokens", "device", data="out")
following += flags.following_out(parser, args, "-student")
if (base := models.short_name(student_name)) != "toy":
    following += f" --model {shlex.quote(base)}"
print_next("sft_student.py" + following)
