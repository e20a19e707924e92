# SPDX-License-Identifier: MIT
"""
Supervised fine-tuning on explanations: of a student on what a teacher wrote, or of a teacher before RL (the warm-up).

    laptop, a minute      python sft_student.py
    the warm-up           python sft_student.py --format teacher --data rows.jsonl --model org/name --out runs/warm-up

    --format student   question -> thought, solution       rows of distill.py, or question, explanation, solution
    --format teacher   question, solution -> explanation   the format that RL starts from; rows with an explanation

The loss is the mean over all supervised tokens of a step: the assistant's turn (a teacher's from its explanation on),
with the end of the turn exactly once.
"""

import sys
from typing import NamedTuple

from rlt import flags, lora, models, saving
from rlt.chat_template import vocabulary_size
from rlt.console import print_next, progress_bar
from rlt.defaults import DEFAULTS, settle
from rlt.distributed import all_reduce_sum, init_distributed
from rlt.dry_run import dry_run
from rlt.errors import UserError
from rlt.evaluations import print_evaluation_command
from rlt.footprint import ModelFootprint
from rlt.logprobs import completion_logprobs
from rlt.memory import MicroBatched
from rlt.prompts import Prompts, show_rows
from rlt.rows import load_rows, map_rows
from rlt.runs import Run, check_run_folder, digest
from rlt.steps import StepTimer, batch_indices, lr_fraction, seed_for
from rlt.updates import Updates

import torch

from rewards import micro_batches

DEFAULTS_OF = {  # --format: other defaults
    "student": {"out": "runs/student", "data": "runs/distilled.jsonl"},
    "teacher": {"out": "runs/toy-teacher", "data": "toy"},
}
NO_EXPLANATIONS = {
    "student": "let a teacher write them: distill.py.",
    "teacher": "warm up on a set that has them, as README.md shows (GSM8K: --explanation-column answer), and give your "
               "rows to train_rlt.py, which needs none. It also trains a model without a warm-up.",
}

# ---------------------------------------------------------------------------------------------------------
parser = flags.make_parser(__doc__)
parser.add_argument("--format", choices=("student", "teacher"), default="student", help="whose turn the rows become")
group = parser.add_argument_group("model")
group.add_argument("--model", type=flags.path, default="toy", help="model to start from: run folder, folder or hub id")
flags.add_bits(group, "--bits", "weights of the base")
flags.add_lora(group, lowest_rank=0)
group = parser.add_argument_group("data")
flags.add_data(group, data=None, what="an explanation; default: runs/distilled.jsonl; for a teacher toy",
               columns=("question", "solution", "explanation"))
flags.add_solution_in(group)
group.add_argument("--max-tokens", type=flags.number(int, 2), default=16384, metavar="N",
                   help="longer rows are cut to N tokens, or to the model's context")
group = parser.add_argument_group("optimisation")
flags.add_optimizer(group, steps=DEFAULTS["SFT steps"], lr=DEFAULTS["SFT lr"], warmup_steps=DEFAULTS["SFT warm-up"])
group.add_argument("--batch-size", type=flags.number(int, 1), default=DEFAULTS["SFT batch"], metavar="N",
                   help="rows a step")
group.add_argument("--weight-decay", type=flags.number(float, 0), default=0.0, metavar="W", help="of AdamW")
group = parser.add_argument_group("system")
flags.add_micro_batches(group)
flags.add_checkpointing(group)
flags.add_system(group)
flags.add_run_folder(parser.add_argument_group("run folder"), None, save_every=0, eval_every=50,
                     eval_what="validation loss", eval_flag="--val-rows")
parser.set_defaults(**DEFAULTS_OF[parser.parse_known_args()[0].format])
args = parser.parse_args()
if args.format != "teacher":
    flags.refuse(parser, args, "without --format teacher: a student is not shown the solution", "solution_in")
train_all = args.lora_rank == 0
if train_all:
    flags.refuse(parser, args, "with --lora-rank 0, which trains all weights", "lora_alpha", "lora_targets")
args.bits = args.bits or (32 if train_all else None)
if train_all and args.bits != 32:
    parser.error(f"--lora-rank 0 trains all weights, which takes --bits 32: at {args.bits} bits small steps are lost")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
flags.choose_bits(parser, args, device)
rank, world = init_distributed(device)
check_run_folder(args)

# rows and tokens
rows = load_rows(models.data_source(args.data, "train"), require_solution=args.format == "teacher",
                 **flags.row_options(args))
tokenizer = models.load_tokenizer(args.model)
settle(parser, args, rows, tokenizer)
if (args.format == "teacher" and args.out == parser.get_default("out") and not models.is_toy(args.model)
        and not args.show_rows):
    raise UserError(f"--out {args.out} is where the toy's teacher is looked for: pass another folder for {args.model}.")
run = Run(args)
if not any(isinstance(row.get("explanation"), str) or args.format == "student" and "messages" in row for row in rows):
    raise UserError(f"{args.data} has no explanations. If they have a column, name it by --explanation-column. Else "
                    + NO_EXPLANATIONS[args.format])
prompts, vocab = Prompts(tokenizer, args.solution_in), vocabulary_size(tokenizer)
if args.show_rows:
    print(show_rows(prompts, rows, args.show_rows, args.skip_bad_rows))
    sys.exit()
max_tokens = min(args.max_tokens, models.context_length(args.model))


class Example(NamedTuple):
    row: dict
    before: list  # ids before the loss starts
    supervised: list  # ids with loss


examples, cut = [], 0
for row, (ids, start) in map_rows(rows, lambda row: prompts.sft_row(row, args.format), skip=args.skip_bad_rows):
    cut += len(ids) > max_tokens
    if start < max_tokens:
        examples.append(Example(row, ids[:start], ids[start:max_tokens]))
if cut:
    print(f"{cut} of {len(rows)} rows are longer than {max_tokens} tokens and were cut; "
          f"{len(rows) - len(examples)} of them have no supervised tokens left and are dropped")
if not examples:
    raise UserError(f"no row has supervised tokens within {max_tokens} tokens: raise --max-tokens, or pass a "
                    "--model that reads more.")
if empty := sum(not x.row.get("messages") and not x.row["explanation"].strip() for x in examples):
    print(f"{empty} of {len(examples)} rows have an empty explanation: they teach that there is nothing to explain")
held_out = args.val_rows if args.eval_every else 0
if len(examples) <= held_out:
    raise UserError(f"{len(examples)} rows, --val-rows takes {held_out} of them: give more rows, or lower it.")
examples, validation = examples[: len(examples) - held_out], examples[len(examples) - held_out :]
if args.dry_run is not None:
    footprint = {"rank": args.lora_rank, "targets": args.lora_targets} | models.model_and_adapter_config(args.model)
    if train_all:
        footprint |= {"rank": 0, "adapter": None}
    sys.exit(dry_run(
        args, device, ModelFootprint(**footprint, bits=args.bits, gpu=args.dry_run > 0 or device.type == "cuda",
                                     trained="all" if train_all else "adapter"),
        row=max(len(x.before) + len(x.supervised) for x in examples), batch_rows=max(args.batch_size, held_out),
        vocab=vocab, learned=True))

# model and optimizer
if train_all:
    if models.base_of(args.model) != models.resolve(args.model):
        raise UserError(f"--lora-rank 0 trains all weights, but {args.model} is an adapter: pass a model without one.")
    model = models.load_model(args.model, bits=args.bits, device=device, scores=True).requires_grad_(True)
    if args.gradient_checkpointing:
        with models.user_errors(f"{args.model} can't be trained with --gradient-checkpointing"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.parameters())
else:
    model = models.load_lora(args.model, bits=args.bits, device=device, seed=args.seed, rank=args.lora_rank,
                             alpha=args.lora_alpha, targets=args.lora_targets, dropout=True,
                             checkpointing=args.gradient_checkpointing)
    parameters = lora.adapter_parameters(model)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
updates, micro_batched = Updates(run, optimizer, parameters, tokenizer), MicroBatched(args.micro_batch_tokens)
base_hash = saving.fingerprint(model)
if run.checkpoint:
    saving.restore(model, run.checkpoint)
    saving.restore_optimizer(optimizer, run.checkpoint)
run.start(base_hash=base_hash, rows_hash=digest(rows), device=str(device), rows=len(examples), cut=cut)
print(f"{run.folder}: {sum(p.numel() for p in parameters):,} trained parameters, {len(examples)} rows, {device}",
      flush=True)


def save(folder):
    saving.save_model(model, tokenizer, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def losses(batch, micro_batch_tokens):
    """One micro-batch after the other: its examples, and minus the sum of log-probs of supervised tokens, nats."""
    for indices in micro_batches([len(x.before) + len(x.supervised) for x in batch], micro_batch_tokens):
        micro_batch = [batch[i] for i in indices]
        _, before, supervised = zip(*micro_batch, strict=True)
        yield micro_batch, -completion_logprobs(model, before, supervised, vocab=vocab)[0].sum()


def compute_gradients(batch, tokens, micro_batch_tokens):
    """The gradients of this rank's share of a loss, a mean over the `tokens` of all ranks."""
    updates.zero_grad()
    torch.manual_seed(seed_for(args.seed, "dropout", step, rank))  # a resumed run draws what the first would have
    for micro_batch, micro_loss in losses(batch, micro_batch_tokens):
        updates.backward(micro_loss.double() / tokens, [(x.row, x.supervised) for x in micro_batch])


@torch.no_grad()
def sum_of_losses(batch, micro_batch_tokens):
    return sum(micro_loss.item() for _, micro_loss in losses(batch, micro_batch_tokens))


progress = progress_bar(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step")
for step in run.steps(progress, save):
    timer = StepTimer(device)
    batch = [examples[i] for i in batch_indices(len(examples), args.batch_size, step, args.seed)]
    tokens = sum(len(x.supervised) for x in batch)  # of all ranks
    for group in optimizer.param_groups:
        group["lr"] = args.lr * lr_fraction(step, run.lr_steps, args.warmup_steps, 0.0, shape="cosine")

    # 1. forward and backward on this rank's share, an optimizer step on all
    model.train()
    micro_batched(compute_gradients, batch[rank::world], tokens)
    loss, grad_norm, _ = updates.step()
    model.eval()
    timer.end("update")

    # 2. validation loss, log; run.steps saves
    val_loss = None
    if validation and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
        (val_loss,) = all_reduce_sum(micro_batched(sum_of_losses, validation[rank::world]))
        val_loss /= sum(len(x.supervised) for x in validation)
    shown = val_loss is not None or (step + 1) % max(1, args.steps // 10) == 0  # a step may take a minute
    run.log({"step": step, "loss": loss, "val_loss": val_loss, "lr": optimizer.param_groups[0]["lr"],
             "grad_norm": grad_norm, **timer.numbers, "tokens_per_s": tokens / timer.seconds},
            progress if shown else None)
    progress.set_postfix_str(f"loss {loss:.4g}")

final = run.finish(lambda folder: saving.save_model(model, tokenizer, folder))
print(f"The {args.format} is in {final}.")
if args.format == "teacher":
    carried = ("data", "question_column", "solution_column", "skip_bad_rows", "solution_in", "micro_batch_tokens",
               "gradient_checkpointing", "device")
    following = flags.carry(parser, args, *carried, teacher_bits="bits", model="out")
    print_next("train_rlt.py" + following + flags.following_out(parser, args, "-rlt"),
               "or with --data of your own: RL needs questions and solutions, no explanations.\n      The student that "
               "scores is the base as it comes, unless --student names one that has learned the format, too.")
else:
    print_evaluation_command(parser, args)
