# SPDX-License-Identifier: MIT
"""
Let a teacher explain every row, and write what a student is distilled on.

Each line of --out is a row: question, solution, explanation, reward, score, kl, closed, and `messages`, the chat
(system, user, assistant) that any SFT tool takes. The explanation is the teacher's raw text with its tags swapped
for the student's; nothing is filtered unless asked for. A killed run goes on with --resume: rows that are whole
stay, the batch that was cut is drawn again, to the same text.

    laptop, 40 seconds    python distill.py
    best of 16            python distill.py --samples 16 --keep best --out runs/best-of-16.jsonl
"""

import json
from pathlib import Path

import torch
from tqdm import tqdm

import models
import runs
from prompts import Prompts, leaks, load_rows
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
# explanations
parser.add_argument("--samples", type=number(int, 1), default=1, help="explanations a row")
parser.add_argument("--keep", choices=("all", "best"), default="all", help="of a row's samples: all, or the one with "
                    "the highest reward")
parser.add_argument("--drop-unclosed", action="store_true", help="leave explanations out that do not end properly")
parser.add_argument("--temperature", type=number(float, above=0), default=1.0, help="of sampling")
parser.add_argument("--max-new-tokens", type=number(int, 1), default=48, help="length limit of an explanation")
# reward
parser.add_argument("--lambda", dest="lam", metavar="L", type=number(float, 0), default=3.0, help="weight of the KL")
parser.add_argument("--alpha", type=number(float, 0), default=0.01, help="weight of the min and the max over tokens")
parser.add_argument("--kl", choices=("exact", "sampled"), default="exact", help="KL over the whole vocabulary, or "
                    "the log-ratio of the sampled token (as released)")
parser.add_argument("--score-temperature", type=number(float, above=0), default=None, help="temperature of both "
                    "models in the reward; None: the sampling temperature")
parser.add_argument("--unclosed-penalty", type=number(float, 0), default=1.0, help="taken off the reward of an "
                    "explanation that does not end properly")
# system
parser.add_argument("--batch-size", type=number(int, 1), default=256, help="explanations sampled side by side")
parser.add_argument("--micro-batch-tokens", type=number(int, 1), default=8192, help="padded tokens a scoring pass")
parser.add_argument("--head-chunk", type=number(int, 1), default=1024, help="rows of logits that exist at a time")
parser.add_argument("--seed", type=number(int, 0), default=0, help="of every draw")
parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
parser.add_argument("--out", default="runs/distilled.jsonl", help="file to write")
parser.add_argument("--resume", action="store_true", help="go on where a killed run stopped, or start")
args = parser.parse_args()
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
out, config = Path(args.out), Path(f"{args.out}.config.json")
done = 0  # batches that are whole in the file
if out.exists() and not args.resume:
    raise FileExistsError(f"{out} is there already. Pass --resume to go on, or another --out.")
if out.exists():
    then = json.loads(config.read_text())["flags"]
    runs.check_same_flags(out, then, vars(args))
    written = runs.read_jsonl(out)
    done = written[-1]["batch"] if written else 0  # the last one may be cut short: draw it again
    runs.write_atomically(out, "".join(json.dumps(row) + "\n" for row in written if row["batch"] < done))

student_name = args.student or models.base_of(args.model)
rows = load_rows(models.rows_of(args.data, "train"), question_column=args.question_column, limit=args.limit,
                 solution_column=args.solution_column, skip_bad=args.skip_bad_rows)
tokenizer = models.load_tokenizer(args.model)
models.check_same_tokenizer(tokenizer, models.load_tokenizer(student_name))
prompts, vocab = Prompts(tokenizer, args.solution_in), len(tokenizer)
room = models.context_of(args.model, student_name) - args.max_new_tokens
rows = prompts.fitting(rows, room, skip=args.skip_bad_rows)
teacher = models.load_model(args.model, bits=args.teacher_bits, device=device)
student = models.load_model(student_name, bits=args.student_bits, device=device)
out.parent.mkdir(parents=True, exist_ok=True)
runs.write_atomically(config, json.dumps(runs.describe(args), indent=2) + "\n")

per_batch = max(1, args.batch_size // args.samples)  # rows, each with all its samples
batches = [rows[at : at + per_batch] for at in range(0, len(rows), per_batch)]
with out.open("a") as file:
    for batch in tqdm(range(done, len(batches)), initial=done, total=len(batches), unit="batch", dynamic_ncols=True):
        # 1. explain
        asked = [row for row in batches[batch] for _ in range(args.samples)]
        completions = models.generate(
            teacher, tokenizer, [prompts.teacher(row) for row in asked], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=seed_for(args.seed, "distill", 0, batch))
        explanations = [prompts.split(c.ids, c.finished) for c in completions]

        # 2. score
        scored = score_explanations(
            teacher, student, [prompts.scoring(*pair) for pair in zip(asked, explanations, strict=True)],
            lam=args.lam, alpha=args.alpha, kl=args.kl, temperature=args.score_temperature or args.temperature,
            vocab=vocab, head_chunk=args.head_chunk, micro_batch_tokens=args.micro_batch_tokens).reward
        improper = torch.tensor([not (e.closed and e.thought) for e in explanations], device=device)
        rewards = (scored.reward - args.unclosed_penalty * improper).tolist()

        # 3. keep, and write the batch in one go
        lines = []
        for first in range(0, len(asked), args.samples):
            group = list(range(first, first + args.samples))
            if args.keep == "best":
                group = [max(group, key=rewards.__getitem__)]
            for i in group:
                if explanations[i].closed or not args.drop_unclosed:
                    lines.append(json.dumps({
                        "batch": batch,
                        "question": asked[i]["question"],
                        "solution": asked[i]["solution"],
                        "explanation": explanations[i].text,
                        "reward": rewards[i],
                        "score": scored.score[i].item(),
                        "kl": scored.kl[i].item(),
                        "closed": explanations[i].closed,
                        "length": len(completions[i].ids),
                        "leak": leaks(explanations[i].text, asked[i]["solution"]),
                        "messages": prompts.distilled(asked[i], explanations[i].text),
                    }) + "\n")
        file.write("".join(lines))
        file.flush()

written = runs.read_jsonl(out)
mean = lambda key: sum(row[key] for row in written) / max(1, len(written))  # noqa: E731
print(f"{out}: {len(written)} explanations of {len(rows)} rows | "
      + " | ".join(f"{key} {mean(key):.4g}" for key in ("reward", "score", "kl", "closed", "leak", "length")))
print("Next: python sft_student.py" + (f" --data {out}" if args.out != "runs/distilled.jsonl" else ""))
