# SPDX-License-Identifier: MIT
"""
Supervised fine-tuning on explanations: the student on what a teacher wrote, or the teacher's warm-up.

    --format student   question -> thought, solution       rows of distill.py, or question, explanation, solution
    --format teacher   question, solution -> explanation   the format RL starts from; rows with an explanation

The loss is the mean over all supervised tokens of a step: the assistant's turn, for a teacher from its explanation
on, the end of turn included exactly once.

    laptop, 20 seconds    python sft_student.py
    the warm-up           python sft_student.py --format teacher --data rows.jsonl --model org/instruct-model --bits 16
"""

import time

import torch
from tqdm import tqdm

import memory
import models
import runs
from prompts import Prompts, load_rows, viewed
from rewards import completion_logprobs, micro_batches
from runs import number

# ---------------------------------------------------------------------------------------------------------
parser = runs.flags(__doc__)
parser.add_argument("--format", choices=("student", "teacher"), default="student", help="what the rows are turned into")
# model
parser.add_argument("--model", default="toy", help="model to start from: run folder, folder, hub id")
parser.add_argument("--bits", type=int, choices=(4, 16, 32), default=32, help="bits of the base")
parser.add_argument("--lora-rank", type=number(int, 0), default=16, help="rank of the adapter; 0: train all weights")
parser.add_argument("--lora-alpha", type=number(float, above=0), default=32, help="adapter scale times its rank")
parser.add_argument("--lora-targets", default="all-linear", help="layers with an adapter, by name, with commas")
# data
parser.add_argument("--data", default=None, help="rows: file or hub id; None: runs/distilled.jsonl, for a teacher toy")
parser.add_argument("--question-column", default=None, help="column with the question; None: by known schemas")
parser.add_argument("--solution-column", default=None, help="column with the solution; None: by known schemas")
parser.add_argument("--limit", type=number(int, 1), default=None, help="use the first rows only")
parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows out, and count them")
parser.add_argument("--solution-in", choices=("assistant", "user"), default="assistant", help="the teacher finds the "
                    "solution prefilled in its own turn (as released) or in the user's (as the paper draws it)")
parser.add_argument("--max-tokens", type=number(int, 2), default=16384, help="longer rows are cut to this many tokens")
parser.add_argument("--val-rows", type=number(int, 0), default=64, help="rows at the end of --data for validation")
# optimisation
parser.add_argument("--steps", type=number(int, 1), default=150, help="optimizer steps")
parser.add_argument("--batch-size", type=number(int, 1), default=64, help="rows a step")
parser.add_argument("--lr", type=number(float, above=0), default=2e-3, help="peak learning rate (AdamW)")
parser.add_argument("--warmup-steps", type=number(int, 0), default=10, help="steps in which the rate rises to --lr; "
                    "a cosine takes it to 0 from there")
parser.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="of AdamW")
parser.add_argument("--max-grad-norm", type=number(float, above=0), default=1.0, help="gradients are clipped to it")
# system
parser.add_argument("--micro-batch-tokens", type=number(int, 1), default=8192, help="tokens a forward pass")
parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in the backward "
                    "pass: less memory, a third more time")
parser.add_argument("--head-chunk", type=number(int, 1), default=1024, help="rows of logits that exist at a time")
parser.add_argument("--seed", type=number(int, 0), default=0, help="of the adapter and the order of rows")
parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
parser.add_argument("--dry-run", nargs="?", metavar="GB", const=0.0, type=number(float, above=0), help="check "
                    "flags, rows and disk, estimate the memory, and stop; GB: of the GPU meant; none: this machine")
# run folder
parser.add_argument("--out", default=None, help="run folder; None: runs/student, for a teacher runs/toy-teacher")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, or start")
parser.add_argument("--save-every", type=number(int, 0), default=0, help="steps between checkpoints; 0: at the end")
parser.add_argument("--eval-every", type=number(int, 0), default=50, help="steps between validation losses; 0: never")
args = parser.parse_args()
args.out = args.out or {"student": "runs/student", "teacher": "runs/toy-teacher"}[args.format]
args.data = args.data or {"student": "runs/distilled.jsonl", "teacher": "toy"}[args.format]
if args.lora_rank == 0 and args.bits != 32:
    parser.error(f"--lora-rank 0 trains all weights, which takes --bits 32: at {args.bits} bits small steps are lost")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
rank, world = runs.join(device)
run = runs.Run(args)
rows = load_rows(models.rows_of(args.data, "train"), question_column=args.question_column, limit=args.limit,
                 solution_column=args.solution_column, skip_bad=args.skip_bad_rows)
tokenizer = models.load_tokenizer(args.model)
prompts, vocab = Prompts(tokenizer, args.solution_in), len(tokenizer)

examples, cut = [], 0  # (ids before the loss starts, ids with loss)
for _, (ids, start) in viewed(rows, lambda row: prompts.sft(row, args.format), skip=args.skip_bad_rows):
    cut += len(ids) > args.max_tokens
    if start < args.max_tokens:
        examples.append((ids[:start], ids[start : args.max_tokens]))
if cut:
    print(f"{cut} of {len(rows)} rows are longer than --max-tokens {args.max_tokens} and were cut; "
          f"{len(rows) - len(examples)} of them have nothing left to learn and are out")
if len(examples) <= args.val_rows:
    raise ValueError(f"{len(examples)} rows, --val-rows takes {args.val_rows} of them: give more rows, or lower it.")
validation = examples[len(examples) - args.val_rows :]
examples = examples[: len(examples) - args.val_rows]
if args.dry_run is not None:
    lora = dict(rank=args.lora_rank, targets=args.lora_targets) | models.anatomy(args.model)
    gpu = args.dry_run > 0 or device.type == "cuda"
    raise SystemExit(memory.dry_run(
        args, device, memory.Shape(**lora, bits=args.bits, gpu=gpu, trained="adapter" if args.lora_rank else "all"),
        row=max(len(before) + len(supervised) for before, supervised in examples), vocab=vocab, learned=True))

if args.lora_rank:
    model = models.load_lora(args.model, bits=args.bits, device=device, rank=args.lora_rank, alpha=args.lora_alpha,
                             targets=args.lora_targets, seed=args.seed, checkpointing=args.gradient_checkpointing)
    parameters = models.adapter_parameters(model)
else:
    model = models.load_model(args.model, bits=args.bits, device=device).requires_grad_(True)
    parameters = list(model.parameters())
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
base_hash = models.fingerprint(model)
if run.checkpoint:
    models.restore(model, run.checkpoint)
    optimizer.load_state_dict(torch.load(run.checkpoint / "optimizer.pt", map_location="cpu"))
run.start(base_hash=base_hash, data_hash=runs.digest(rows), device=str(device), rows=len(examples), cut=cut)
count = sum(p.numel() for p in parameters)
print(f"{run.folder}: {count:,} trained parameters, {len(examples)} rows, {device}", flush=True)


def save(folder):
    models.save_model(model, tokenizer, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def losses(chosen):
    """One micro-batch after the other: minus the sum of log-probs of its supervised tokens, nats."""
    for batch in micro_batches([len(p) + len(c) for p, c in chosen], args.micro_batch_tokens):
        before, supervised = zip(*(chosen[i] for i in batch), strict=True)
        yield -completion_logprobs(model, before, supervised, vocab=vocab, head_chunk=args.head_chunk)[0].sum()


progress = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step", dynamic_ncols=True,
                disable=rank > 0)
for step in progress:
    started = time.perf_counter()
    chosen = [examples[i] for i in runs.pick(len(examples), args.batch_size, step, args.seed)]
    tokens = sum(len(supervised) for _, supervised in chosen)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * runs.schedule(step, args.steps, args.warmup_steps, 0.0, shape="cosine")
    model.train()
    loss = 0.0
    for micro_loss in losses(chosen[rank::world]):
        (micro_loss / tokens).backward()
        loss += micro_loss.item() / tokens
    runs.sum_gradients(parameters)
    (loss,) = runs.total(loss)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    seconds = time.perf_counter() - started

    val_loss = None
    if validation and args.eval_every and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
        with torch.no_grad():
            (val_loss,) = runs.total(sum(micro.item() for micro in losses(validation[rank::world])))
            val_loss /= sum(len(supervised) for _, supervised in validation)
    line = run.log({"step": step, "loss": loss, "val_loss": val_loss, "lr": optimizer.param_groups[0]["lr"],
                    "grad_norm": grad_norm, "t_update": seconds, "tokens_per_s": tokens / seconds})
    progress.set_postfix_str(f"loss {loss:.4g}")
    if val_loss is not None:
        progress.write(line)
    if args.save_every and (step + 1) % args.save_every == 0 or step + 1 == args.steps:
        run.save(step + 1, save)

final = run.finish(lambda folder: models.save_model(model, tokenizer, folder))
following = f"train_rlt.py --model {args.out}"
if args.format == "student":
    following = f"evaluate.py --model {args.model} {args.out}" + (" --task toy" if args.model == "toy" else "")
print(f"The {args.format} is in {final}. Next: python {following}")
