# SPDX-License-Identifier: MIT
"""
Train a Reinforcement-Learned Teacher with GRPO (arXiv 2506.08388).

    laptop, minutes      python train_rlt.py --lambda 3 --alpha 0.01
    several GPUs         torchrun --nproc_per_node=2 train_rlt.py ...
    your rows            python train_rlt.py --data rows.jsonl --model runs/my-teacher --max-new-tokens 2048 ...

The teacher sees a question and its solution and writes an explanation. A frozen student sees the question and the
explanation, and says how likely the solution now is:

    score  = mean + alpha * min   over solution tokens     of  log p_student(token | question, explanation)
    kl     = mean + alpha * max   over explanation tokens  of  KL(p_teacher || p_student)
    reward = score - lambda * kl                           (- a penalty, where the explanation is empty or not closed)

By default the log-ratio of the sampled token estimates a token's KL (--kl sampled); --kl exact computes it.
"""

import sys

from rlt import flags, lora, models, saving
from rlt.chat_template import vocabulary_size
from rlt.console import print_next, progress_bar
from rlt.defaults import settle
from rlt.distributed import all_reduce_mean, all_reduce_sum, init_distributed
from rlt.dry_run import dry_run_rl
from rlt.episodes import Episode, completion_lengths, pack, split_into_micro_batches, unpack, weight_by_tis
from rlt.errors import UserError
from rlt.grpo import LOSSES, group_advantages, group_scale, grpo_loss, pathwise_kl_loss, step_denominator
from rlt.inspection import token_numbers
from rlt.logprobs import KLRow, batched_logprobs, completion_logprobs, completion_logprobs_and_kl
from rlt.memory import MicroBatched
from rlt.prompts import Prompts, drop_overlong, show_rows
from rlt.rollout import make_engine
from rlt.rows import leaks, load_rows
from rlt.runs import Run, check_run_folder, digest
from rlt.steps import (
    StepTimer,
    advice_on_closing,
    advice_on_format,
    batch_indices,
    check_logprob_diff,
    lr_fraction,
    quantiles,
    reward_is_dropping,
    split_held_out,
)
from rlt.updates import Updates

import torch

from rewards import implementation, score_explanations

STATS = ("clip_fraction", "kl_ref")  # of grpo_loss

# ---------------------------------------------------------------------------------------------------------
parser = flags.make_parser(__doc__)
group = parser.add_argument_group("models")
group.add_argument("--model", type=flags.path, default="toy-teacher", help="teacher: run folder, folder or hub id")
group.add_argument("--student", type=flags.path, help="frozen student; default: the teacher's own base")
flags.add_bits(group, "--teacher-bits", "weights of the teacher's base")
flags.add_student_bits(group)
flags.add_switch(group, "--offload-student", "keep the student in host memory between uses")
flags.add_lora(group)
group = parser.add_argument_group("data")
flags.add_data(group, data="toy", columns=("question", "solution"))
flags.add_solution_in(group)
group = parser.add_argument_group("reward")
flags.add_reward(group, kl="sampled")
group.add_argument("--kl-gradient", action="store_true", help="with --kl exact: add the KL's gradient through the "
                   "teacher's distribution, which the policy gradient lacks")
flags.add_rollouts(parser.add_argument_group("sampling"))
flags.add_grpo(parser.add_argument_group("policy update"), LOSSES)
group = parser.add_argument_group("system")
flags.add_micro_batches(group)
flags.add_checkpointing(group)
flags.add_system(group)
flags.add_run_folder(parser.add_argument_group("run folder"), "runs/teacher", save_every=20, eval_every=20,
                     eval_what="held-out reward")
args = parser.parse_args()
flags.check_grpo(parser, args)
if args.kl_gradient and args.kl != "exact":
    parser.error(f"--kl-gradient belongs to the exact KL, but --kl is {args.kl}: pass --kl exact")
if args.kl_gradient and args.offload_student:
    parser.error("--kl-gradient needs the student in every update: leave out --offload-student")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
flags.choose_bits(parser, args, device)
rank, world = init_distributed(device)
flags.check_prompts_per_rank(args, world)
check_run_folder(args)

# rows and tokens
rows = load_rows(models.data_source(args.data, "train"), **flags.row_options(args))
tokenizer = models.load_tokenizer(args.model)
settle(parser, args, rows, tokenizer)
run = Run(args)
student_name = args.student or models.base_of(args.model)
models.check_same_tokenizer(tokenizer, models.load_tokenizer(student_name), student_name)
shared = models.shares_base(args.model, args.teacher_bits, student_name, args.student_bits)
if shared and args.offload_student:
    raise UserError("--offload-student: the student is the teacher's base at the same bits, so its weights are the "
                    "teacher's and take no memory. Leave the flag out.")
prompts, vocab = Prompts(tokenizer, args.solution_in), vocabulary_size(tokenizer)
if args.show_rows:
    print(show_rows(prompts, rows, args.show_rows, args.skip_bad_rows))
    sys.exit()
rows = drop_overlong(rows, prompts.scored_length, models.context_length(args.model, student_name), args.max_new_tokens,
                     skip=args.skip_bad_rows)
rows, held_out = split_held_out(rows, args)
longest = max(len(prompts.teacher_prompt(row)) for row in rows + held_out)
if args.dry_run is not None:
    sys.exit(dry_run_rl(args, device, world, args.teacher_bits, student_name, longest_prompt=longest, vocab=vocab,
                        held_out=len(held_out), shared=shared))

# models and optimizer
policy = models.load_lora(args.model, bits=args.teacher_bits, device=device, seed=args.seed, rank=args.lora_rank,
                          alpha=args.lora_alpha, targets=args.lora_targets, reference=args.beta > 0,
                          checkpointing=args.gradient_checkpointing)
if shared:
    student = lora.without_adapter(policy)
else:
    student = models.load_model(student_name, bits=args.student_bits, device=device, scores=True)
student_hash, student_adapter_hash = saving.fingerprint(student), None if shared else saving.adapter_hash(student)
if args.offload_student:
    student.to("cpu")
parameters = lora.adapter_parameters(policy)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
updates = Updates(run, optimizer, parameters, tokenizer, STATS)
micro_batched = MicroBatched(args.micro_batch_tokens)
if run.checkpoint:
    saving.restore(policy, run.checkpoint)
    saving.restore_optimizer(optimizer, run.checkpoint)
engine = make_engine(args.engine, policy, tokenizer, base=models.base_of(args.model), bits=args.teacher_bits,
                     device=device, max_tokens=longest + args.max_new_tokens, batch=args.rollout_batch)
run.start(base_hash=saving.fingerprint(policy), student_hash=student_hash, student_adapter_hash=student_adapter_hash,
          student=student_name, rows_hash=digest(rows), device=str(device), rows=len(rows))
print(f"{run.folder}: {sum(p.numel() for p in parameters):,} trained parameters, {len(rows)} rows, {device}, "
      f"log-probs by {implementation('auto', device.type)}", flush=True)
if held_out and run.step == 0:
    print(f"first: the reward of {len(held_out)} held-out rows", flush=True)

distribution = dict(temperature=args.temperature, vocab=vocab)  # what is sampled from, and scored


def save(folder):
    saving.save_model(policy, tokenizer, folder, adapters=list(policy.peft_config))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def sample(prompt_ids, *key):
    """One completion for each prompt, drawn with seeds of this key."""
    return engine.generate(prompt_ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                           key=(args.seed, *key))


def compute_rewards(batch, completions):
    """Rewards (B,) of B completions, the explanations in them, their scoring rows, and what was measured on them."""
    explanations = [prompts.split_completion(c.ids, c.finished) for c in completions]
    scoring_rows = [prompts.scoring_row(row, e) for row, e in zip(batch, explanations, strict=True)]
    with models.on_device(device, student):
        scored = micro_batched(score_explanations, policy, student, scoring_rows, lam=args.lam, alpha=args.alpha,
                               kl=args.kl, **distribution)
    unclosed = torch.tensor([not e.complete for e in explanations], device=device)
    return scored.reward.reward - args.unclosed_penalty * unclosed, explanations, scoring_rows, scored


def update_policy(episodes):
    """Optimizer steps on one batch, in micro-batches that add up to one loss.

    -> the last optimizer step's loss and gradient norm, and grpo_loss's stats, means over tokens.
    """
    prompt_ids, completion_ids = [e.prompt for e in episodes], [e.completion for e in episodes]
    sequences, tokens = all_reduce_sum(len(episodes), sum(map(len, completion_ids)))
    denominator = step_denominator(args.loss, sequences=sequences, tokens=tokens, max_new_tokens=args.max_new_tokens)
    if args.beta > 0:
        with lora.use_adapter(policy, "reference"):
            ref_logprobs, _ = micro_batched(batched_logprobs, policy, prompt_ids, completion_ids, **distribution)
        unpack(episodes, "ref_logprobs", ref_logprobs)

    def compute_gradients(micro_batch_tokens):
        updates.zero_grad()
        for batch in split_into_micro_batches(episodes, micro_batch_tokens):
            lengths = completion_lengths(batch)
            if args.kl_gradient:
                scoring_rows = [e.scoring_row for e in batch]
                kl_rows = [KLRow(row.teacher_prompt, row.thought, row.teacher_end, row.student_prompt)
                           for row in scoring_rows]
                logprobs, token_kl = completion_logprobs_and_kl(policy, student, kl_rows, **distribution)
            else:
                logprobs, _ = completion_logprobs(
                    policy, [e.prompt for e in batch], [e.completion for e in batch], **distribution)
            packed = (logprobs, pack(batch, "old_logprobs"), pack(batch, "ref_logprobs"), pack(batch, "advantage"))
            loss, stats = grpo_loss(*packed, lengths, denominator=denominator, beta=args.beta, loss=args.loss,
                                    token_weights=pack(batch, "tis_weights"), epsilon_low=args.epsilon_low,
                                    epsilon_high=args.epsilon_high)
            if args.kl_gradient:
                thought_lengths = torch.tensor([len(row.thought) for row in scoring_rows])
                loss = loss + pathwise_kl_loss(token_kl, thought_lengths, lengths, pack(batch, "scale"), lam=args.lam,
                                               alpha=args.alpha, denominator=denominator, loss=args.loss)
            updates.backward(loss, [(e.row, e.completion) for e in batch], stats)

    lora.update_mode(policy)
    for _ in range(args.updates_per_batch):
        micro_batched(compute_gradients)
        loss, grad_norm, stats = updates.step()
    policy.eval()
    return loss, grad_norm, {key: value / tokens for key, value in stats.items()}


def summarize(batch, explanations, scored, rewards):
    """What metrics.jsonl says of a step's explanations: means over those of all ranks."""
    B, groups = len(batch), rewards.view(-1, args.group_size)
    means = {
        "reward": rewards.mean().item(),
        "reward_std": groups.std(1).mean().item(),
        "zero_groups": (groups == groups[:, :1]).all(1).float().mean().item(),
        **{key: getattr(scored.reward, key).mean().item() for key in ("score", "kl", "score_min", "kl_max")},
        "closed": sum(e.closed for e in explanations) / B,
        "empty": sum(not e.text.strip() for e in explanations) / B,
        "foreign_tags": sum(e.foreign_tags for e in explanations) / B,
        "boundary_token_split": sum(bool(e.leftover.strip()) for e in explanations) / B,
        "leak": sum(leaks(e.text, row["solution"]) for e, row in zip(explanations, batch, strict=True)) / B,
        "length": sum(scored.completion_lengths) / B,
    }
    means = {key: all_reduce_mean(value, B) for key, value in means.items()}
    per_token = {"kl_exact": scored.token_kl_exact, "kl_k1": scored.token_log_ratio, "entropy": scored.entropies}
    means |= {key: all_reduce_mean(v.mean().item() if len(v) else 0.0, len(v)) for key, v in per_token.items()}
    return means | quantiles("length", scored.completion_lengths)


def held_out_reward(*key):
    """Mean reward of one explanation for each held-out row."""
    completions = sample([prompts.teacher_prompt(row) for row in held_out], "held out", *key)
    return compute_rewards(held_out, completions)[0].mean().item()


progress = progress_bar(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step")
for step in run.steps(progress, save):
    eval_reward_before = held_out_reward("before") if step == 0 and held_out and rank == 0 else None
    timer = StepTimer(device)

    # 1. this rank's share of the step's questions, and G explanations of each
    batch = [rows[i] for i in batch_indices(len(rows), args.prompts_per_step, step, args.seed)[rank::world]]
    batch = [row for row in batch for _ in range(args.group_size)]  # (B,), grouped by question
    prompt_ids = [prompts.teacher_prompt(row) for row in batch]
    completions = sample(prompt_ids, step, rank)
    completion_ids = [c.ids for c in completions]
    timer.end("rollout")

    # 2. rewards (B,), old log-probs and entropies: one pass of the teacher and one of the student
    rewards, explanations, scoring_rows, scored = compute_rewards(batch, completions)
    sampler_logprobs = torch.tensor([p for c in completions for p in c.logprobs], device=device)
    logprob_diff = check_logprob_diff(sampler_logprobs, scored.old_logprobs, args.max_logprob_diff)
    timer.end("score")

    # 3. advantages (B,): how much better each explanation is than the others of its question
    groups = rewards.view(-1, args.group_size)
    advantages = group_advantages(groups, scale=args.advantage_scale).flatten()

    # 4. the policy update; a sampling engine that is not quite the policy is corrected for
    episodes = [Episode(*parts) for parts in zip(batch, prompt_ids, completion_ids, advantages, strict=True)]
    if args.kl_gradient:
        scales = group_scale(groups, scale=args.advantage_scale).repeat_interleave(args.group_size)
        for episode, scoring_row, scale in zip(episodes, scoring_rows, scales, strict=True):
            episode.scoring_row, episode.scale = scoring_row, scale
    # the old log-probs of a batch's only update are its own: the ratio is 1, without the rounding of another pass
    if args.updates_per_batch > 1:
        unpack(episodes, "old_logprobs", scored.old_logprobs)
    tis = {}
    if args.engine == "vllm" and args.tis_cap:
        tis = weight_by_tis(episodes, scored.old_logprobs, sampler_logprobs, args.tis_cap)
    for group in optimizer.param_groups:
        group["lr"] = args.lr * lr_fraction(step, run.lr_steps, args.warmup_steps, args.final_lr_fraction)
    loss, grad_norm, stats = update_policy(episodes)
    engine.load_adapter(policy)
    if args.beta > 0 and args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
        lora.sync_reference(policy, args.sync_ref_mix)
    timer.end("update")

    # 5. measure on held-out rows, log; run.steps saves
    eval_reward = None
    if held_out and rank == 0 and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
        eval_reward = held_out_reward(step, rank)
    tokens = all_reduce_sum(sum(scored.completion_lengths))[0]
    entry = {
        "step": step, **summarize(batch, explanations, scored, rewards),
        "kl_ref": stats["kl_ref"] if args.beta > 0 else None, "clip_fraction": stats["clip_fraction"],
        "sampler_logprob_diff": logprob_diff, **tis, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm, "eval_reward": eval_reward, "eval_reward_before": eval_reward_before,
        **timer.numbers, "tokens_per_s": tokens / timer.seconds,
    }
    run.log(entry, progress)
    if step == 0 and entry["closed"] < 0.1:
        progress.write(f"warning: {advice_on_closing(entry, args)}")
    if step == 0 and (advice := advice_on_format(scored, models.short_name(student_name))):
        progress.write(f"warning: {advice}")
    if (step + 1) % 10 == 0 and (warning := reward_is_dropping(run.metrics)):
        progress.write(f"warning: {warning} Lower --lr or raise --beta.")
    if step % 10 == 0 or step + 1 == args.steps:
        first_group = rewards[: args.group_size]
        run.log_samples([{
            "step": step, "question": batch[i]["question"], "solution": batch[i]["solution"],
            "explanation": explanations[i].text, "closed": explanations[i].closed, "reward": rewards[i].item(),
            "score": scored.reward.score[i].item(), "kl": scored.reward.kl[i].item(),
            "leak": leaks(explanations[i].text, batch[i]["solution"]),
            "tokens": token_numbers(prompts, scoring_rows[i], scored, i),
        } for i in sorted({0, int(first_group.argmin()), int(first_group.argmax())})])

final = run.finish(lambda folder: saving.save_model(policy, tokenizer, folder))
print(f"The teacher is in {final}.")
following = flags.carry(parser, args, "student", "teacher_bits", "student_bits", "data", "question_column",
                        "solution_column", "skip_bad_rows", "solution_in", "temperature", "max_new_tokens", "alpha",
                        "unclosed_penalty", "engine", "micro_batch_tokens", "device",
                        batch_size="rollout_batch", **{"lambda": "lam", "model": "out"})
print_next("distill.py" + following + flags.following_out(parser, args, "-distilled.jsonl"))
