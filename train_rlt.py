# SPDX-License-Identifier: MIT
"""
Train a Reinforcement-Learned Teacher with GRPO (arXiv 2506.08388).

The teacher sees a question and its solution and writes an explanation. A frozen student, shown only the question
and the explanation, says how likely the solution has become:

    score  = mean + alpha * min   over solution tokens     of  log p_student(token | question, explanation)
    kl     = mean + alpha * max   over explanation tokens  of  KL(p_teacher || p_student)
    reward = score - lambda * kl                           (- the penalty, where the explanation is not closed)

As released, the KL is estimated by the log-ratio of the sampled token; --kl exact computes it. Unlike the release,
token ids go from sampling to reward unchanged; the teacher is a LoRA adapter, and so is its reference.

    laptop, 5 minutes     python train_rlt.py --lambda 3 --alpha 0.01
    several GPUs          torchrun --nproc_per_node=2 train_rlt.py ...
    your rows             python train_rlt.py --data rows.jsonl --model runs/my-teacher --max-new-tokens 2048 ...
"""

import time
from collections import Counter

import torch
from tqdm import tqdm

import memory
import models
import runs
from grpo import LOSSES, group_advantages, group_scale, grpo_loss, pathwise_kl_loss, step_denominator
from prompts import Prompts, leaks, load_rows
from rewards import completion_logprobs, completion_logprobs_and_kl, implementation, micro_batches, score_explanations
from runs import number, seed_for

# ---------------------------------------------------------------------------------------------------------
parser = runs.flags(__doc__)
# models
parser.add_argument("--model", default="toy-teacher", help="teacher to start from: run folder, folder, hub id")
parser.add_argument("--student", default=None, help="frozen student that scores; None: the teacher's own base")
parser.add_argument("--teacher-bits", type=int, choices=(4, 16, 32), default=32, help="bits of the teacher's base")
parser.add_argument("--student-bits", type=int, choices=(4, 16, 32), default=4, help="bits of the student")
parser.add_argument("--offload-student", action="store_true", help="the student waits in host memory, and is on the "
                    "device only while it scores")
parser.add_argument("--lora-rank", type=number(int, 1), default=16, help="rank of the teacher's adapter")
parser.add_argument("--lora-alpha", type=number(float, above=0), default=32, help="adapter scale times its rank")
parser.add_argument("--lora-targets", default="all-linear", help="layers with an adapter, by name, with commas")
# data
parser.add_argument("--data", default="toy", help="rows with question and solution: file, hub id, or toy")
parser.add_argument("--question-column", default=None, help="column with the question; None: by known schemas")
parser.add_argument("--solution-column", default=None, help="column with the solution; None: by known schemas")
parser.add_argument("--limit", type=number(int, 1), default=None, help="use the first rows only")
parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad and over-long rows out, and count them")
parser.add_argument("--solution-in", choices=("assistant", "user"), default="assistant", help="the teacher finds the "
                    "solution prefilled in its own turn (as released) or in the user's (as the paper draws it)")
# reward
parser.add_argument("--lambda", dest="lam", metavar="L", type=number(float, 0), default=3.0, help="weight of the KL")
parser.add_argument("--alpha", type=number(float, 0), default=0.01, help="weight of the min and the max over tokens")
parser.add_argument("--kl", choices=("exact", "sampled"), default="sampled", help="the sampled token's log-ratio (as "
                    "released), or over the whole vocabulary, whose gradient needs --kl-gradient to be right")
parser.add_argument("--kl-gradient", action="store_true", help="add the exact KL's gradient through the teacher's own "
                    "distribution, which the score function misses; a student pass in every update")
parser.add_argument("--score-temperature", type=number(float, above=0), default=None, help="temperature of both "
                    "models in the reward; None: the sampling temperature, as released")
parser.add_argument("--unclosed-penalty", type=number(float, 0), default=1.0, help="taken off the reward of an "
                    "explanation that does not end properly")
# sampling
parser.add_argument("--prompts-per-step", type=number(int, 1), default=16, help="questions a step")
parser.add_argument("--group-size", type=number(int, 2), default=16, help="explanations a question")
parser.add_argument("--temperature", type=number(float, above=0), default=1.0, help="of sampling and log-probs")
parser.add_argument("--max-new-tokens", type=number(int, 1), default=48, help="length limit of an explanation")
parser.add_argument("--rollout-batch", type=number(int, 1), default=256, help="explanations sampled side by side")
parser.add_argument("--engine", choices=("batch", "continuous"), default="batch", help="side by side until the last "
                    "has ended, or continuous batching, where the next one starts as soon as another ends")
parser.add_argument("--cache-tokens", type=number(int, 1), default=2**18, help="tokens, prompts included, that "
                    "--engine continuous may hold keys and values of; 2**18 of Qwen2.5-7B take 15 GB")
parser.add_argument("--max-sampler-gap", type=number(float, above=0), default=0.1, help="stop when sampler and "
                    "trainer disagree on the sampled tokens by more than this on average, nats")
# optimisation
parser.add_argument("--steps", type=number(int, 1), default=60, help="optimizer steps")
parser.add_argument("--lr", type=number(float, above=0), default=2e-3, help="peak learning rate (AdamW)")
parser.add_argument("--warmup-steps", type=number(int, 0), default=5, help="steps in which the rate rises to --lr")
parser.add_argument("--final-lr", type=number(float, 0, 1), default=0.1, help="the rate falls linearly to this "
                    "share of --lr; 1: constant, as released")
parser.add_argument("--max-grad-norm", type=number(float, above=0), default=1.0, help="gradients are clipped to it")
parser.add_argument("--loss", choices=LOSSES, default="grpo", help="how tokens and sequences are averaged")
parser.add_argument("--advantage-scale", choices=("std", "none"), default="std", help="divide by the group's std")
parser.add_argument("--epsilon-low", type=number(float, 0, 0.999), default=0.2, help="ratio clip below 1")
parser.add_argument("--epsilon-high", type=number(float, 0), default=0.2, help="ratio clip above 1")
parser.add_argument("--updates-per-batch", type=number(int, 1), default=1, help="optimizer steps on the same "
                    "explanations; the clip acts from the second on")
parser.add_argument("--beta", type=number(float, 0), default=0.04, help="weight of the KL to the reference adapter; "
                    "0: no reference pass")
parser.add_argument("--sync-ref-every", type=number(int, 0), default=32, help="steps after which the reference "
                    "moves towards the teacher; 0: never")
parser.add_argument("--sync-ref-mix", type=number(float, 0, 1), default=0.9, help="share m of the teacher in the new "
                    "reference. A and B are averaged each by itself, so the reference's BA differs from the average "
                    "of both BA by exactly m (1 - m) dB dA times the adapter's scale")
# system
parser.add_argument("--micro-batch-tokens", type=number(int, 1), default=8192, help="tokens a forward pass")
parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in the backward "
                    "pass: less memory, a third more time")
parser.add_argument("--head-chunk", type=number(int, 1), default=1024, help="rows of logits that exist at a time")
parser.add_argument("--logits-dtype", choices=("float32", "bfloat16"), default="float32", help="of the logits in the "
                    "scoring pass; bfloat16 halves their traffic where the heads are bfloat16, and rounds the reward")
parser.add_argument("--seed", type=number(int, 0), default=0, help="of every draw")
parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
parser.add_argument("--dry-run", nargs="?", metavar="GB", const=0.0, type=number(float, above=0), help="check "
                    "flags, rows and disk, estimate the memory, and stop; GB: of the GPU meant; none: this machine")
# run folder
parser.add_argument("--out", default="runs/teacher", help="run folder")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, or start")
parser.add_argument("--save-every", type=number(int, 0), default=20, help="steps between checkpoints; 0: at the end")
parser.add_argument("--eval-every", type=number(int, 0), default=20, help="steps between held-out rewards; 0: never")
parser.add_argument("--eval-rows", type=number(int, 1), default=64, help="rows at the end of --data that are held out")
args = parser.parse_args()
if args.kl_gradient and args.kl != "exact":
    parser.error(f"--kl-gradient is the exact KL's, --kl is {args.kl}, which needs no such term: pass --kl exact")
if args.kl_gradient and args.offload_student:
    parser.error("--offload-student: --kl-gradient needs the student in every update: pass one or the other")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
rank, world = runs.join(device)
if args.prompts_per_step % world:
    raise ValueError(f"--prompts-per-step {args.prompts_per_step} can't be shared evenly by {world} ranks: pass "
                     f"{args.prompts_per_step + -args.prompts_per_step % world}.")
run = runs.Run(args)
student_name = args.student or models.base_of(args.model)
rows = load_rows(models.rows_of(args.data, "train"), question_column=args.question_column, limit=args.limit,
                 solution_column=args.solution_column, skip_bad=args.skip_bad_rows)
tokenizer = models.load_tokenizer(args.model)
models.check_same_tokenizer(tokenizer, models.load_tokenizer(student_name))
prompts, vocab = Prompts(tokenizer, args.solution_in), len(tokenizer)
room = models.context_of(args.model, student_name) - args.max_new_tokens
rows = prompts.fitting(rows, room, skip=args.skip_bad_rows)
held_out = rows[-args.eval_rows :] if args.eval_every else []
rows = rows[: len(rows) - len(held_out)]
if len(rows) < args.prompts_per_step:
    raise ValueError(f"{len(rows)} rows are left to train on, a step takes {args.prompts_per_step}: give more rows, or "
                     "lower --prompts-per-step, --eval-rows or --eval-every.")
if args.dry_run is not None:
    lora = dict(rank=args.lora_rank, targets=args.lora_targets) | models.anatomy(args.model)
    gpu = args.dry_run > 0 or device.type == "cuda"
    batch = max(args.prompts_per_step // world * args.group_size, len(held_out))
    longest = max(len(prompts.teacher(row)) for row in rows + held_out)
    raise SystemExit(memory.dry_run(
        args, device, memory.Shape(**lora, bits=args.teacher_bits, gpu=gpu, trained="adapter", reference=args.beta > 0),
        memory.Shape(**models.anatomy(student_name), bits=args.student_bits, gpu=gpu), vocab=vocab,
        row=longest + args.max_new_tokens, rollout=(min(args.rollout_batch, batch), longest, args.max_new_tokens),
        scored=True, learned=True, reference=args.beta > 0))

teacher = models.load_lora(args.model, bits=args.teacher_bits, device=device, rank=args.lora_rank, seed=args.seed,
                           alpha=args.lora_alpha, targets=args.lora_targets, reference=args.beta > 0,
                           checkpointing=args.gradient_checkpointing)
student = models.load_model(student_name, bits=args.student_bits, device=device)
student_hash = models.fingerprint(student)
if args.offload_student:
    student.to("cpu")
parameters = models.adapter_parameters(teacher)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)

if run.checkpoint:
    models.restore(teacher, run.checkpoint)
    optimizer.load_state_dict(torch.load(run.checkpoint / "optimizer.pt", map_location="cpu"))
run.start(base_hash=models.fingerprint(teacher), student_hash=student_hash, student=student_name,
          data_hash=runs.digest(rows), device=str(device), rows=len(rows))
print(f"{run.folder}: {sum(p.numel() for p in parameters):,} trained parameters, {len(rows)} rows, {device}, "
      f"log-probs by {implementation('auto', device.type)}", flush=True)


def save(folder):
    models.save_model(teacher, tokenizer, folder, adapters=list(teacher.peft_config))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def sample(rows, *key):
    """One completion for each row, drawn with seeds of this key."""
    completions = []
    for at in range(0, len(rows), args.rollout_batch):
        asked = [prompts.teacher(row) for row in rows[at : at + args.rollout_batch]]
        completions += models.generate(teacher, tokenizer, asked, max_new_tokens=args.max_new_tokens,
                                       temperature=args.temperature, seed=seed_for(args.seed, *key, at),
                                       engine=args.engine, cache_tokens=args.cache_tokens)
    return completions


def judge(rows, completions):
    """Explanations taken apart, everything score_explanations measured on them, and their rewards (B,)."""
    explanations = [prompts.split(c.ids, c.finished) for c in completions]
    with models.on(device, student):
        scored = score_explanations(
            teacher, student, list(map(prompts.scoring, rows, explanations)),
            lam=args.lam, alpha=args.alpha, kl=args.kl, temperature=args.score_temperature or args.temperature,
            policy_temperature=args.temperature, vocab=vocab, head_chunk=args.head_chunk,
            micro_batch_tokens=args.micro_batch_tokens, logits_dtype=getattr(torch, args.logits_dtype))
    improper = torch.tensor([not (e.closed and e.thought) for e in explanations], device=device)
    return explanations, scored, scored.reward.reward - args.unclosed_penalty * improper


def log_probs_of(batch, asked, answers):
    """Packed log-probs, under whoever speaks now, of the answers (lists of ids) to the prompts numbered in batch."""
    return completion_logprobs(teacher, [asked[i] for i in batch], [answers[i] for i in batch], vocab=vocab,
                               temperature=args.temperature, head_chunk=args.head_chunk)[0]


def update(chosen, explanations, answers, scored, advantages, scales):
    """Optimizer steps on what was sampled, in micro-batches that add up to one loss.

    advantages, scales (B,) -> the last step's loss, its gradient's norm, and grpo_loss's stats a token.
    """
    asked, lengths = [prompts.teacher(row) for row in chosen], torch.tensor(scored.completion_lengths)
    old = scored.old_logprobs.split(scored.completion_lengths)
    widths = [len(a) + len(b) for a, b in zip(asked, answers, strict=True)]
    batches = list(micro_batches(widths, args.micro_batch_tokens))
    sequences, tokens = runs.total(len(lengths), int(lengths.sum()))
    denominator = step_denominator(args.loss, sequences=sequences, tokens=tokens, max_new_tokens=args.max_new_tokens)
    reference = [None] * len(batches)
    if args.beta > 0:
        with models.using(teacher, "reference"):
            reference = [log_probs_of(batch, asked, answers) for batch in batches]
    teacher.train()
    for _ in range(args.updates_per_batch):
        total, sums = 0.0, Counter()
        for batch, ref in zip(batches, reference, strict=True):
            if args.kl_gradient:
                policy, token_kl = completion_logprobs_and_kl(
                    teacher, student, [prompts.scoring(chosen[i], explanations[i]) for i in batch], vocab=vocab,
                    temperature=args.score_temperature or args.temperature, policy_temperature=args.temperature,
                    head_chunk=args.head_chunk)
            else:
                policy = log_probs_of(batch, asked, answers)
            loss, stats = grpo_loss(
                policy, torch.cat([old[i] for i in batch]), ref, advantages[batch], lengths[batch],
                denominator=denominator, epsilon_low=args.epsilon_low, epsilon_high=args.epsilon_high, beta=args.beta,
                loss=args.loss)
            if args.kl_gradient:
                thoughts = torch.tensor([len(explanations[i].thought) for i in batch])
                loss = loss + pathwise_kl_loss(token_kl, thoughts, lengths[batch], scales[batch], lam=args.lam,
                                               alpha=args.alpha, denominator=denominator, loss=args.loss)
            loss.backward()
            total += loss.item()
            sums.update({key: value.item() for key, value in stats.items()})
        runs.sum_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
    teacher.eval()
    total, *values = runs.total(total, *sums.values())
    return total, grad_norm, {key: value / tokens for key, value in zip(sums, values, strict=True)}


def summary(chosen, explanations, scored, rewards):
    """What the log says of a step's explanations: means over those of all ranks."""
    share = lambda values: sum(values) / len(chosen)  # noqa: E731
    means = {
        "reward": rewards.mean().item(),
        **{key: getattr(scored.reward, key).mean().item() for key in ("score", "kl", "score_min", "kl_max")},
        "closed": share(e.closed for e in explanations),
        "empty": share(not e.thought for e in explanations),
        "straddled": share(bool(e.left_over.strip()) for e in explanations),
        "leak": share(leaks(e.text, row["solution"]) for e, row in zip(explanations, chosen, strict=True)),
        "length": share(scored.completion_lengths),
    }
    entropy = runs.mean(scored.entropies.mean().item(), len(scored.entropies))
    return {**{key: runs.mean(value, len(chosen)) for key, value in means.items()}, "entropy": entropy}


progress = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step", dynamic_ncols=True,
                disable=rank > 0)
for step in progress:
    clock = [time.perf_counter()]

    # 1. questions, this rank's share of the step's, and G explanations of each
    chosen = [rows[i] for i in runs.pick(len(rows), args.prompts_per_step, step, args.seed)[rank::world]]
    chosen = [row for row in chosen for _ in range(args.group_size)]  # (B,) prompt i // G
    completions = sample(chosen, step, rank)
    clock.append(time.perf_counter())

    # 2. one pass of the teacher and one of the student: rewards (B,), old log-probs, entropies
    explanations, scored, rewards = judge(chosen, completions)
    sampler_gap = runs.gap([p for c in completions for p in c.logprobs], scored.old_logprobs, args.max_sampler_gap)
    clock.append(time.perf_counter())

    # 3. how much better each explanation is than the others of its question
    groups = rewards.view(-1, args.group_size)
    advantages = group_advantages(groups, scale=args.advantage_scale).flatten()
    scales = group_scale(groups, scale=args.advantage_scale).repeat_interleave(args.group_size)

    # 4. update on them
    for group in optimizer.param_groups:
        group["lr"] = args.lr * runs.schedule(step, args.steps, args.warmup_steps, args.final_lr)
    loss, grad_norm, stats = update(chosen, explanations, [c.ids for c in completions], scored, advantages, scales)
    if args.beta > 0 and args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
        models.sync_reference(teacher, args.sync_ref_mix)
    clock.append(time.perf_counter())

    # 5. measure on held-out rows, log, save
    eval_reward = None
    if held_out and rank == 0 and (step % args.eval_every == 0 or step + 1 == args.steps):
        eval_reward = judge(held_out, sample(held_out, "held out", step, rank))[2].mean().item()
    entry = {
        "step": step, **summary(chosen, explanations, scored, rewards), "kl_ref": stats.get("kl_ref"),
        "clip_fraction": stats["clip_fraction"], "sampler_gap": sampler_gap, "loss": loss,
        "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm, "eval_reward": eval_reward,
        **{f"t_{phase}": b - a for phase, a, b in zip(("rollout", "score", "update"), clock, clock[1:], strict=False)},
        "tokens_per_s": runs.total(sum(scored.completion_lengths))[0] / (clock[-1] - clock[0]),
    }
    progress.write(run.log(entry))
    if warning := runs.falling(run.metrics, "reward"):
        blind = args.kl == "exact" and not args.kl_gradient
        progress.write(f"warning: {warning} Lower --lr or raise --beta" + (
            "; the KL sees the teacher sharpen, its gradient without --kl-gradient does not." if blind else "."))
    if step % 10 == 0 or step + 1 == args.steps:
        best = int(rewards[: args.group_size].argmax())
        run.log_samples([{"step": step, "question": chosen[i]["question"], "solution": chosen[i]["solution"],
                          "explanation": explanations[i].text, "closed": explanations[i].closed,
                          "reward": rewards[i].item()} for i in sorted({0, best})])
    if args.save_every and (step + 1) % args.save_every == 0 or step + 1 == args.steps:
        run.save(step + 1, save)

final = run.finish(lambda folder: models.save_model(teacher, tokenizer, folder))
flags = f" --model {args.out}" if args.out != "runs/teacher" else ""
flags += f" --data {args.data}" if args.data != "toy" else ""
print(f"The teacher is in {final}. Next: python distill.py{flags}")
