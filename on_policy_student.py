# SPDX-License-Identifier: MIT
"""
On-policy distillation: a student learns on thoughts that it samples itself, from a teacher that knows the solution.

    laptop, 3 minutes    python on_policy_student.py
    your rows            python on_policy_student.py --data rows.jsonl --model org/model --teacher runs/my-teacher ...

The student sees a question and writes a thought. A frozen teacher, which sees the question and its solution, says at
every token what it would have written there. Around its own thought the student learns the tags and the solution:

    kl    = mean over the thought's tokens         of  KL(p_student || p_teacher), exact, over the whole vocabulary
    nll   = mean over the tags' and the solution's of  - log p_student(token | question, what stands before it)
    loss  = kl + nll; with --solution-weight W the solution's part of nll counts W times

--forward-share mixes in the other direction, KL(p_teacher || p_student). Pass 0.5, say, for a student that hardly ever
writes what the teacher would: the gradient of the first direction vanishes with the student's own probability of a
token. The KL also covers the token that ends the thought. Behind an unclosed thought nothing is learned. Training on
samples of the student by such a mixture is GKD (arXiv 2306.13649); with a teacher that knows more: arXiv 2601.18734,
2601.20802. New here: the teacher is trained by RLT, with its KL to the student in its reward.
"""

import math
import sys
from typing import NamedTuple

from rlt import flags, lora, models, saving
from rlt.chat_template import vocabulary_size
from rlt.console import progress_bar
from rlt.defaults import DEFAULTS, settle
from rlt.distributed import all_reduce_mean, all_reduce_sum, init_distributed
from rlt.dry_run import dry_run
from rlt.evaluations import print_evaluation_command
from rlt.footprint import ModelFootprint
from rlt.logprobs import completion_logprobs_and_kl
from rlt.memory import MicroBatched
from rlt.prompts import Prompts, drop_overlong, show_rows
from rlt.rollout import make_engine
from rlt.rows import load_rows
from rlt.runs import Run, check_run_folder, digest
from rlt.steps import StepTimer, batch_indices, check_logprob_diff, lr_fraction, quantiles, split_held_out
from rlt.updates import Updates

import torch

from rewards import implementation, micro_batches

# ---------------------------------------------------------------------------------------------------------
parser = flags.make_parser(__doc__)
group = parser.add_argument_group("models")
group.add_argument("--model", type=flags.path, default="toy", help="student: run folder, folder or hub id")
group.add_argument("--teacher", type=flags.path, default="runs/teacher", help="frozen teacher, trained by train_rlt.py")
flags.add_bits(group, "--bits", "weights of the student's base")
flags.add_bits(group, "--teacher-bits", "weights of the teacher's base")
flags.add_lora(group)
group = parser.add_argument_group("data")
flags.add_data(group, data="toy", columns=("question", "solution"))
flags.add_solution_in(group)
group = parser.add_argument_group("loss")
group.add_argument("--forward-share", type=flags.number(float, 0, 1), default=0.0, metavar="F",
                   help="the loss is (1 - F) KL(student || teacher) + F KL(teacher || student)")
group.add_argument("--solution-weight", type=flags.number(float, 0), default=1.0, metavar="W",
                   help="weight of the solution's tokens in nll; those of the tags have 1")
group = parser.add_argument_group("sampling")
group.add_argument("--prompts-per-step", type=flags.number(int, 1), default=128, metavar="P",
                   help="questions a step, one thought each")
flags.add_sampling(group)
group.add_argument("--max-logprob-diff", type=flags.number(float, above=0), default=0.1, metavar="D",
                   help="stop when sampler and trainer differ by more, nats a token on average")
group = parser.add_argument_group("optimisation")
flags.add_optimizer(group, steps=60, lr=DEFAULTS["RL lr"], warmup_steps=5)
group = parser.add_argument_group("system")
flags.add_micro_batches(group)
flags.add_checkpointing(group)
flags.add_system(group)
flags.add_run_folder(parser.add_argument_group("run folder"), "runs/on_policy_student", save_every=20, eval_every=20,
                     eval_what="held-out loss")
args = parser.parse_args()
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
flags.choose_bits(parser, args, device)
rank, world = init_distributed(device)
flags.check_prompts_per_rank(args, world)
check_run_folder(args)

# rows and tokens
rows = load_rows(models.data_source(args.data, "train"), **flags.row_options(args))
tokenizer = models.load_tokenizer(args.model)
models.check_same_tokenizer(tokenizer, models.load_tokenizer(args.teacher), args.teacher)
settle(parser, args, rows, tokenizer)
run = Run(args)
prompts, vocab = Prompts(tokenizer, args.solution_in), vocabulary_size(tokenizer)
if args.show_rows:
    print(show_rows(prompts, rows, args.show_rows, args.skip_bad_rows))
    sys.exit()
rows = drop_overlong(rows, prompts.scored_length, models.context_length(args.model, args.teacher), args.max_new_tokens,
                     skip=args.skip_bad_rows)
rows, held_out = split_held_out(rows, args)
longest = max(len(prompts.student_prompt(row)) for row in rows + held_out)
if args.dry_run is not None:
    gpu = args.dry_run > 0 or device.type == "cuda"
    adapter = {"rank": args.lora_rank, "targets": args.lora_targets} | models.model_and_adapter_config(args.model)
    footprints = (ModelFootprint(**adapter, bits=args.bits, gpu=gpu, trained="adapter"),
                  ModelFootprint(**models.model_and_adapter_config(args.teacher), bits=args.teacher_bits, gpu=gpu))
    longest_row = max(len(prompts.teacher_prompt(row)) for row in rows + held_out) + args.max_new_tokens
    completions = max(args.prompts_per_step // world, len(held_out))
    sys.exit(dry_run(args, device, *footprints, row=longest_row, batch_rows=completions, vocab=vocab, learned=True,
                     kl_gradient=True, rollout=(min(args.rollout_batch, completions), longest, args.max_new_tokens)))

# models and optimizer
student = models.load_lora(args.model, bits=args.bits, device=device, seed=args.seed, rank=args.lora_rank,
                           alpha=args.lora_alpha, targets=args.lora_targets, checkpointing=args.gradient_checkpointing)
teacher = models.load_model(args.teacher, bits=args.teacher_bits, device=device, scores=True)
parameters = lora.adapter_parameters(student)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
updates = Updates(run, optimizer, parameters, tokenizer, stats=("kl", "nll"))
micro_batched = MicroBatched(args.micro_batch_tokens)
if run.checkpoint:
    saving.restore(student, run.checkpoint)
    saving.restore_optimizer(optimizer, run.checkpoint)
engine = make_engine(args.engine, student, tokenizer, base=models.base_of(args.model), bits=args.bits, device=device,
                     max_tokens=longest + args.max_new_tokens, batch=args.rollout_batch)
run.start(base_hash=saving.fingerprint(student), teacher_hash=saving.fingerprint(teacher),
          teacher_adapter_hash=saving.adapter_hash(teacher), rows_hash=digest(rows), device=str(device), rows=len(rows))
print(f"{run.folder}: {sum(p.numel() for p in parameters):,} trained parameters, {len(rows)} rows, {device}, "
      f"log-probs by {implementation('auto', device.type)}", flush=True)


def save(folder):
    saving.save_model(student, tokenizer, folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def sample(batch, *key):
    """A thought of the student for each row, drawn with seeds of this key -> completions, thoughts, KLRows."""
    completions = engine.generate([prompts.student_prompt(row) for row in batch], temperature=args.temperature,
                                  max_new_tokens=args.max_new_tokens, key=(args.seed, *key))
    thoughts = [prompts.split_answer(c.ids, c.finished) for c in completions]
    return completions, thoughts, [prompts.on_policy_row(*pair) for pair in zip(batch, thoughts, strict=True)]


class Scored(NamedTuple):
    """What the loss of one micro-batch is made of. Log-probs are the student's, in nats; all have a gradient."""

    indices: list  # of its rows
    thoughts: list  # log-probs of each row's thought and of the token that ends it (prompts.on_policy_row), (T,)
    kl: torch.Tensor  # of the same tokens, packed
    tags: torch.Tensor  # log-probs of the tags, packed
    solutions: torch.Tensor  # log-probs of the solutions, packed


def score(kl_rows, micro_batch_tokens):
    """One Scored after the other, a micro-batch each."""
    widths = [len(row.thought) + max(len(row.prompt + row.opening + row.end + row.solution), len(row.frozen_prompt))
              for row in kl_rows]
    for indices in micro_batches(widths, micro_batch_tokens):
        some = [kl_rows[i] for i in indices]
        logprobs, kl = completion_logprobs_and_kl(student, teacher, some, forward_share=args.forward_share,
                                                  temperature=args.temperature, vocab=vocab)
        parts = logprobs.split([len(ids) for row in some for ids in (row.opening, row.thought, row.end, row.solution)])
        openings, thoughts, ends, solutions = (parts[i::4] for i in range(4))
        yield Scored(indices, thoughts, kl, torch.cat(openings + ends), torch.cat(solutions))


def count_tokens(kl_rows):
    """Tokens of thoughts, and of what is learned around them."""
    return (sum(len(row.thought) for row in kl_rows),
            sum(len(row.opening + row.end + row.solution) for row in kl_rows))


def compute_gradients(batch, kl_rows, tokens, micro_batch_tokens):
    """The gradients of this rank's share of the loss -> log-probs of each thought, with that of what ends it."""
    updates.zero_grad()
    thought_logprobs = [None] * len(batch)
    for scored in score(kl_rows, micro_batch_tokens):
        kl = scored.kl.sum() / tokens[0]
        tag_nll, solution_nll = (-logprobs.sum() / tokens[1] for logprobs in (scored.tags, scored.solutions))
        updates.backward(kl + tag_nll + args.solution_weight * solution_nll,
                         [(batch[i], kl_rows[i].thought) for i in scored.indices],
                         {"kl": kl, "nll": tag_nll + solution_nll})
        for i, values in zip(scored.indices, scored.thoughts, strict=True):
            thought_logprobs[i] = values.detach()
    return thought_logprobs


@torch.no_grad()
def sum_of_losses(kl_rows, micro_batch_tokens):
    sums = [(scored.kl.sum().item(), -(scored.tags.sum() + scored.solutions.sum()).item())
            for scored in score(kl_rows, micro_batch_tokens)]
    return [sum(values) for values in zip(*sums, strict=True)]


def held_out_loss(*key):
    """kl and nll of one thought for each held-out row, means over tokens."""
    _, _, kl_rows = sample(held_out, "held out", *key)
    sums = micro_batched(sum_of_losses, kl_rows)
    return [value / max(1, n) for value, n in zip(sums, count_tokens(kl_rows), strict=True)]


progress = progress_bar(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step")
for step in run.steps(progress, save):
    timer = StepTimer(device)

    # 1. this rank's share of the step's questions, and a thought of the student for each
    batch = [rows[i] for i in batch_indices(len(rows), args.prompts_per_step, step, args.seed)[rank::world]]
    completions, thoughts, kl_rows = sample(batch, step, rank)
    timer.end("rollout")

    # 2. the update: the student's log-probs and the KL to the teacher, in micro-batches that add up to one loss
    for group in optimizer.param_groups:
        group["lr"] = args.lr * lr_fraction(step, run.lr_steps, args.warmup_steps, 0.0, shape="cosine")
    lora.update_mode(student)
    tokens_of_step = [max(1, n) for n in all_reduce_sum(*count_tokens(kl_rows))]
    thought_logprobs = micro_batched(compute_gradients, batch, kl_rows, tokens_of_step)
    loss, grad_norm, stats = updates.step()
    student.eval()
    engine.load_adapter(student)
    lengths, logprob_diff = [len(thought.thought) for thought in thoughts], None
    if math.isfinite(loss) and math.isfinite(grad_norm):  # else the update was skipped
        sampled = [p for c, n in zip(completions, lengths, strict=True) for p in c.logprobs[:n]]
        computed = torch.cat([values[:n] for values, n in zip(thought_logprobs, lengths, strict=True)])
        logprob_diff = check_logprob_diff(torch.tensor(sampled, device=device), computed, args.max_logprob_diff)
    timer.end("update")

    # 3. measure on held-out rows, log; run.steps saves
    eval_kl = eval_nll = None
    if held_out and rank == 0 and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
        eval_kl, eval_nll = held_out_loss(step)
    B, tokens = len(batch), all_reduce_sum(sum(len(c.ids) for c in completions))[0]
    entry = {
        "step": step, **stats, "closed": all_reduce_mean(sum(thought.closed for thought in thoughts) / B, B),
        "foreign_tags": all_reduce_mean(sum(thought.foreign_tags for thought in thoughts) / B, B),
        "length": all_reduce_mean(sum(lengths) / B, B), **quantiles("length", lengths), "sampled_tokens": tokens,
        "sampler_logprob_diff": logprob_diff, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm, "eval_kl": eval_kl, "eval_nll": eval_nll, **timer.numbers,
        "tokens_per_s": tokens / timer.seconds,
    }
    run.log(entry, progress)
    if step % 10 == 0 or step + 1 == args.steps:
        run.log_samples([{
            "step": step, "question": batch[i]["question"], "solution": batch[i]["solution"],
            "answer": prompts.turn_text(completions[i]), "closed": thoughts[i].closed} for i in range(min(2, B))])

final = run.finish(lambda folder: saving.save_model(student, tokenizer, folder))
print(f"The student is in {final}.")
print_evaluation_command(parser, args)
