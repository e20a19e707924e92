# SPDX-License-Identifier: MIT
"""
Train a student with GRPO on correctness: the baseline that a teacher must beat, and the RL stage after SFT.

    laptop                python rl_student.py
    after a cold start    python rl_student.py --model runs/student --out runs/cold-start
    with hints            python rl_student.py --hints --rewards 0 0 1 --model runs/hints --data runs/hints/train.jsonl
                          (made by: python data/toy.py --clocks 3 --careful-base 0 --hints --out runs/hints; the base of
                          the plain toy has never seen a hint)

    reward = right 1, wrong -0.5, no answer -1        graded as in evaluate.py, by rlt/grading.py

With --hints it is Guide-GRPO (arXiv 2506.13923): where all answers to a question fail, the group is sampled again
with the row's hint in the prompt and replaces the plain one. Hinted answers are learned without the hint: their
ratio is the new policy's, which doesn't see it, over the old one's, which did; shaped, not clipped.
"""

import sys

from rlt import flags, models, saving
from rlt.console import progress_bar
from rlt.defaults import settle
from rlt.distributed import all_reduce_mean, all_reduce_sum, init_distributed
from rlt.dry_run import dry_run_rl
from rlt.episodes import Episode, completion_lengths, pack, split_into_micro_batches, unpack
from rlt.evaluations import print_evaluation_command
from rlt.grading import GOLD, TASKS, answer_of, gradable, grade_all
from rlt.grpo import LOSSES, group_advantages, grpo_loss, guided_loss, step_denominator, tis_weights
from rlt.logprobs import batched_logprobs, completion_logprobs
from rlt.lora import update_mode
from rlt.memory import MicroBatched
from rlt.prompts import Prompts, show_rows
from rlt.rollout import make_engine
from rlt.rows import load_rows
from rlt.runs import Run, check_run_folder, digest
from rlt.steps import StepTimer, batch_indices, check_logprob_diff, lr_fraction, quantiles, split_held_out
from rlt.updates import Updates

import torch

from rewards import implementation

STATS = ("clip_fraction", "guided_log_ratio", "kl_ref")  # of grpo_loss and guided_loss

# ---------------------------------------------------------------------------------------------------------
parser = flags.make_parser(__doc__)
group = parser.add_argument_group("model")
group.add_argument("--model", type=flags.path, default="toy", help="student: run folder, folder or hub id")
flags.add_bits(group, "--bits", "weights of the base")
flags.add_lora(group)
group = parser.add_argument_group("data")
group.add_argument("--task", choices=TASKS, default="toy", metavar="NAME",
                   help=f"how answers are graded: {', '.join(TASKS)}")
flags.add_data(group, data="toy", what="questions and what answers are graded against",
               columns=("question", "solution"))
group = parser.add_argument_group("reward, equal groups, hints")
group.add_argument("--rewards", type=flags.number(float), nargs=3, default=[-1.0, -0.5, 1.0],
                   metavar=("NONE", "WRONG", "RIGHT"), help="of no answer, a wrong, a right one; --hints needs 0 0 1")
group.add_argument("--keep-zero-groups", action="store_true", help="count groups whose rewards are all equal in the "
                   "loss's denominator, and their KL to the reference; else they are dropped")
group.add_argument("--hints", action="store_true", help="Guide-GRPO, with the rows' column `hint`")
group.add_argument("--hint-ratio", choices=("guide", "naive"), default="guide", metavar="KIND", help="old log-probs of "
                   "hinted answers: guide: with the hint; naive: without, as if they had been sampled so")
flags.add_rollouts(parser.add_argument_group("sampling"), prompts_per_step=16, group_size=16)
flags.add_grpo(parser.add_argument_group("policy update"), LOSSES, steps=60, warmup_steps=5)
group = parser.add_argument_group("system")
flags.add_micro_batches(group)
flags.add_checkpointing(group)
flags.add_system(group)
flags.add_run_folder(parser.add_argument_group("run folder"), "runs/rl_student", save_every=20, eval_every=20,
                     eval_what="held-out success")
args = parser.parse_args()
if args.hints and args.rewards[:2] != [0, 0]:
    parser.error(f"--hints with --rewards {args.rewards}: Guide-GRPO takes a binary reward, pass --rewards 0 0 1")
if args.hints and args.loss == "gspo":
    parser.error("--hints with --loss gspo: hinted answers have one ratio a token; pass grpo, dapo or dr_grpo")
if args.hint_ratio != "guide" and not args.hints:
    parser.error(f"--hint-ratio {args.hint_ratio} does nothing without --hints")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
flags.choose_bits(parser, args, device)
rank, world = init_distributed(device)
flags.check_prompts_per_rank(args, world)
check_run_folder(args)

# rows and tokens
rows = load_rows(models.data_source(args.data, "train"), require_solution=False, **flags.row_options(args))
tokenizer = models.load_tokenizer(args.model)
settle(parser, args, rows, tokenizer)
run = Run(args)
prompts, vocab = Prompts(tokenizer), len(tokenizer)
context = models.context_length(args.model) - args.max_new_tokens
rows = prompts.drop_overlong(gradable(args.task, rows), context, skip=args.skip_bad_rows,
                             also=[prompts.hinted_prompt] if args.hints else [])
rows, held_out = split_held_out(rows, args)
if args.show_rows:
    print(show_rows(prompts, rows, args.show_rows))
    sys.exit()
prompt_of = prompts.hinted_prompt if args.hints else prompts.question_prompt
longest = max(len(prompt_of(row)) for row in rows + held_out)
if args.dry_run is not None:
    sys.exit(dry_run_rl(args, device, world, args.bits, None, longest_prompt=longest, vocab=vocab,
                        held_out=len(held_out)))

# model and optimizer
policy = models.load_lora(args.model, bits=args.bits, device=device, seed=args.seed, rank=args.lora_rank,
                          alpha=args.lora_alpha, targets=args.lora_targets, reference=args.beta > 0,
                          checkpointing=args.gradient_checkpointing)
parameters = models.adapter_parameters(policy)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
updates = Updates(run, optimizer, parameters, tokenizer, STATS)
micro_batched = MicroBatched(args.micro_batch_tokens)
if run.checkpoint:
    saving.restore(policy, run.checkpoint)
    saving.restore_optimizer(optimizer, run.checkpoint)
engine = make_engine(args.engine, policy, tokenizer, base=models.base_of(args.model), bits=args.bits, device=device,
                     max_tokens=longest + args.max_new_tokens, batch=args.rollout_batch)
run.start(base_hash=saving.fingerprint(policy), rows_hash=digest(rows, *GOLD[args.task]), device=str(device),
          rows=len(rows))
print(f"{run.folder}: {sum(p.numel() for p in parameters):,} trained parameters, {len(rows)} rows, {device}, "
      f"log-probs by {implementation('auto', device.type)}", flush=True)

distribution = dict(temperature=args.temperature, vocab=vocab)  # what is sampled from, and learned


def save(folder):
    saving.save_model(policy, tokenizer, folder, adapters=list(policy.peft_config))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def sample(prompt_ids, *key):
    """One completion for each prompt, drawn with seeds of this key."""
    return engine.generate(prompt_ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                           key=(args.seed, *key))


def compute_rewards(batch, completions):
    """Rewards (B,) of B completions, which are right (B,), and their texts."""
    texts = [prompts.turn_text(completion) for completion in completions]
    right = torch.tensor([bool(verdict) for verdict in grade_all(args.task, texts, batch)], device=device)
    answered = torch.tensor([answer_of(args.task, text) is not None for text in texts], device=device)
    none, wrong, good = args.rewards
    return torch.where(right, good, torch.where(answered, wrong, none)), right, texts


def sample_failed_groups(batch, completions, rewards, right, texts, *key):
    """Guide-GRPO: groups whose answers all fail are sampled again with the hint, in place.

    -> for each answer the hinted prompt that it was sampled after, or None; tokens sampled, share right.
    """
    hinted_prompts = [None] * len(batch)
    solved = right.view(-1, args.group_size).any(1).repeat_interleave(args.group_size)
    failed = (~solved).nonzero().flatten().tolist() if args.hints else []
    if not failed:
        return hinted_prompts, 0, None
    for i in failed:
        hinted_prompts[i] = prompts.hinted_prompt(batch[i])
    new = sample([hinted_prompts[i] for i in failed], "hinted", *key)
    rewards[failed], new_right, new_texts = compute_rewards([batch[i] for i in failed], new)
    for i, completion, text in zip(failed, new, new_texts, strict=True):
        completions[i], texts[i] = completion, text
    return hinted_prompts, sum(len(c.ids) for c in new), new_right.float().mean().item()


def update_policy(episodes):
    """Optimizer steps on one batch, in micro-batches that add up to one loss.

    -> the last optimizer step's loss and gradient norm, and the losses' stats, summed over tokens.
    """
    prompt_ids, completion_ids = [e.prompt for e in episodes], [e.completion for e in episodes]
    sequences, tokens = all_reduce_sum(len(episodes), sum(map(len, completion_ids)))
    if not sequences:  # no rank has an episode
        return 0.0, 0.0, dict.fromkeys(STATS, 0.0)
    denominator = step_denominator(args.loss, sequences=sequences, tokens=tokens, max_new_tokens=args.max_new_tokens)
    if args.beta > 0:
        with models.use_adapter(policy, "reference"):
            ref_logprobs, _ = micro_batched(batched_logprobs, policy, prompt_ids, completion_ids, **distribution)
        unpack(episodes, "ref_logprobs", ref_logprobs)

    def compute_gradients(micro_batch_tokens):
        updates.zero_grad()
        for batch in split_into_micro_batches(episodes, micro_batch_tokens):
            logprobs, _ = completion_logprobs(
                policy, [e.prompt for e in batch], [e.completion for e in batch], **distribution)
            packed = (logprobs, pack(batch, "old_logprobs"), pack(batch, "ref_logprobs"), pack(batch, "advantage"),
                      completion_lengths(batch))
            options = dict(denominator=denominator, beta=args.beta, loss=args.loss,
                           token_weights=pack(batch, "tis_weights"))
            if batch[0].hinted_prompt:
                loss, stats = guided_loss(*packed, **options)
            else:
                loss, stats = grpo_loss(*packed, epsilon_low=args.epsilon_low, epsilon_high=args.epsilon_high,
                                        **options)
            updates.backward(loss, [(e.row, e.completion) for e in batch], stats)

    update_mode(policy)
    for _ in range(args.updates_per_batch):
        micro_batched(compute_gradients)
        loss, grad_norm, stats = updates.step()
    policy.eval()
    return loss, grad_norm, stats


def held_out_success(*key):
    """Share of held-out rows that one answer each gets right."""
    completions = sample([prompts.question_prompt(row) for row in held_out], "held out", *key)
    return compute_rewards(held_out, completions)[1].float().mean().item()


progress = progress_bar(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step")
for step in run.steps(progress, save):
    eval_solved_before = held_out_success("before") if step == 0 and held_out and rank == 0 else None
    timer = StepTimer(device)

    # 1. this rank's share of the step's questions, and G answers to each
    batch = [rows[i] for i in batch_indices(len(rows), args.prompts_per_step, step, args.seed)[rank::world]]
    batch = [row for row in batch for _ in range(args.group_size)]  # (B,), grouped by question
    prompt_ids = [prompts.question_prompt(row) for row in batch]
    completions = sample(prompt_ids, step, rank)
    sampled_tokens = sum(len(c.ids) for c in completions)

    # 2. rewards (B,); where all answers to a question fail, new ones with the hint
    rewards, right, texts = compute_rewards(batch, completions)
    solved = right.float().mean().item()
    hinted_prompts, hinted_tokens, hinted_solved = sample_failed_groups(
        batch, completions, rewards, right, texts, step, rank)
    timer.end("rollout")

    # 3. advantages (B,): how much better each answer is than the others to its question; equal groups are dropped
    groups = rewards.view(-1, args.group_size)
    advantages = group_advantages(groups, scale=args.advantage_scale).flatten()
    signal = (groups != groups[:, :1]).any(1)
    kept = (signal.repeat_interleave(args.group_size) | args.keep_zero_groups).nonzero().flatten().tolist()

    # 4. old log-probs and entropies of what is learned from, by the policy and the prompt that it was sampled from
    episodes = [Episode(batch[i], prompt_ids[i], completions[i].ids, advantages[i], hinted_prompts[i]) for i in kept]
    completion_ids = [e.completion for e in episodes]
    old_logprobs, entropies = micro_batched(
        batched_logprobs, policy, [e.hinted_prompt or e.prompt for e in episodes], completion_ids, **distribution)
    sampler_logprobs = torch.tensor([p for i in kept for p in completions[i].logprobs], device=device)
    logprob_diff = check_logprob_diff(sampler_logprobs, old_logprobs, args.max_logprob_diff)
    tis = {}  # truncated importance sampling
    if args.engine == "vllm" and args.tis_cap:
        token_weights, tis = tis_weights(old_logprobs, sampler_logprobs, args.tis_cap)
        unpack(episodes, "tis_weights", token_weights)
        tis = {key: all_reduce_mean(value, len(token_weights)) for key, value in tis.items()}
    if args.hint_ratio == "naive":
        old_logprobs, _ = micro_batched(
            batched_logprobs, policy, [e.prompt for e in episodes], completion_ids, **distribution)
    unpack(episodes, "old_logprobs", old_logprobs)
    timer.end("score")

    # 5. the policy update
    for group in optimizer.param_groups:
        group["lr"] = args.lr * lr_fraction(step, run.lr_steps, args.warmup_steps, args.final_lr_fraction)
    loss, grad_norm, stats = update_policy(episodes)
    engine.load_adapter(policy)
    if args.beta > 0 and args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
        models.sync_reference(policy, args.sync_ref_mix)
    timer.end("update")

    # 6. measure on held-out rows, log; run.steps saves
    eval_solved = None
    if held_out and rank == 0 and ((step + 1) % args.eval_every == 0 or step + 1 == args.steps):
        eval_solved = held_out_success(step, rank)
    B, n_hinted = len(batch), sum(prompt is not None for prompt in hinted_prompts)
    lengths = [len(c.ids) for c in completions]
    plain, guided, usable, tokens = all_reduce_sum(
        sum(len(e.completion) for e in episodes if not e.hinted_prompt),
        sum(len(e.completion) for e in episodes if e.hinted_prompt), int(signal.sum()), sampled_tokens + hinted_tokens)
    entry = {
        "step": step, "reward": all_reduce_mean(rewards.mean().item(), B),
        "reward_std": all_reduce_mean(groups.std(1).mean().item(), B), "solved": all_reduce_mean(solved, B),
        "hinted": all_reduce_mean(n_hinted / B, B) if args.hints else None,
        "hinted_solved": all_reduce_mean(hinted_solved, n_hinted),
        "zero_groups": all_reduce_mean((~signal).float().mean().item(), B), "usable_groups": usable,
        "sampled_tokens": tokens, "length": all_reduce_mean(sum(lengths) / B, B),
        **quantiles("length", lengths),
        "kl_ref": stats["kl_ref"] / (plain + guided) if args.beta > 0 and plain + guided else None,
        "entropy": all_reduce_mean(entropies.mean().item(), len(entropies)),
        "clip_fraction": stats["clip_fraction"] / plain if plain else None,
        "guided_log_ratio": stats["guided_log_ratio"] / guided if guided else None,
        "sampler_logprob_diff": logprob_diff, **tis, "loss": loss, "lr": optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm, "eval_solved": eval_solved, "eval_solved_before": eval_solved_before,
        **timer.numbers, "tokens_per_s": tokens / timer.seconds,
    }
    run.log(entry, progress)
    if step % 10 == 0 or step + 1 == args.steps:
        run.log_samples([{
            "step": step, "question": batch[i]["question"], "solution": batch[i]["solution"], "answer": texts[i],
            "hinted": hinted_prompts[i] is not None, "reward": rewards[i].item(),
        } for i in sorted({0, int(rewards.argmax())})])

final = run.finish(lambda folder: saving.save_model(policy, tokenizer, folder))
print(f"The student is in {final}.")
print_evaluation_command(parser, args, args.task)
