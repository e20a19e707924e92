# SPDX-License-Identifier: MIT
"""
Train a student with GRPO on correctness: the baseline that a teacher must beat, and the RL stage after SFT.

    laptop                python rl_student.py
    after a cold start    python rl_student.py --model runs/student --out runs/cold-start
    from right chains     python rl_student.py --failed-groups adaback --explanation-column chain --limit 304
                          (240 rows to train on and 64 held out: a question has to come several times)
    with hints            python rl_student.py --failed-groups guide --rewards 0 0 1 --model runs/hints
                          --data runs/hints/train.jsonl
                          (made by: python data/toy.py --clocks 3 --careful-base 0 --hints --out runs/hints; the base of
                          the plain toy has never seen a hint)

    reward = right 1, wrong -0.5, no answer -1        graded as in evaluate.py, by rlt/grading.py

A question whose answers all have the same reward teaches nothing: mostly one that is never answered right. What
--failed-groups does about questions whose answers are all wrong:

    guide    Guide-GRPO (arXiv 2506.13923): the group is sampled again with the row's hint in the prompt and replaces
             the plain one. Hinted answers are learned without the hint: their ratio is the new policy's, which doesn't
             see it, over the old one's, which did; shaped, not clipped
    adaback  AdaBack (arXiv 2506.18110): every prompt ends with the start of the row's explanation, the more of it the
             more often the question has failed; the policy writes the rest, and learns that alone
    relift   ReLIFT (arXiv 2506.07527): they are collected; whenever there are --relift-rows of them, one step of SFT on
             their explanations follows the RL update. Without the paper's entropy bonus in the SFT loss
"""

import math
import sys

from rlt import flags, lora, models, saving
from rlt.chat_template import vocabulary_size
from rlt.console import progress_bar
from rlt.defaults import settle
from rlt.distributed import all_reduce_mean, all_reduce_sum, init_distributed
from rlt.dry_run import dry_run_rl
from rlt.episodes import Episode, completion_lengths, pack, split_into_micro_batches, unpack, weight_by_tis
from rlt.errors import UserError
from rlt.evaluations import print_evaluation_command
from rlt.failed_groups import FAILED_GROUPS, AdaBack, ReLift, gather_groups, restore_state, save_state
from rlt.grading import GOLD, TASKS, answer_of, gradable, grade_all
from rlt.grpo import LOSSES, group_advantages, grpo_loss, guided_loss, step_denominator
from rlt.logprobs import batched_logprobs, completion_logprobs
from rlt.memory import MicroBatched
from rlt.prompts import Prompts, drop_overlong, show_rows
from rlt.rollout import make_engine
from rlt.rows import load_rows, map_rows
from rlt.runs import Run, check_run_folder, digest
from rlt.steps import StepTimer, batch_indices, check_logprob_diff, lr_fraction, quantiles, split_held_out
from rlt.updates import Updates

import torch

from rewards import implementation, micro_batches

NAIVE_START = 8  # tokens
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
               columns=("question", "solution", "explanation"))
group = parser.add_argument_group("reward, equal groups, failed groups")
group.add_argument("--rewards", type=flags.number(float), nargs=3, default=[-1.0, -0.5, 1.0],
                   metavar=("NONE", "WRONG", "RIGHT"), help="of no answer, a wrong, a right one; guide needs 0 0 1")
group.add_argument("--keep-zero-groups", action="store_true", help="count groups whose rewards are all equal in the "
                   "loss's denominator, and their KL to the reference; else they are dropped")
group.add_argument("--failed-groups", choices=FAILED_GROUPS, default="none", metavar="NAME", help="what to do about "
                   "questions of which all answers fail: none, guide (the rows' column `hint`), adaback or relift "
                   "(their explanation, a right chain)")
group.add_argument("--hint-ratio", choices=("guide", "naive", "start"), default="guide", metavar="KIND", help="old "
                   "log-probs of hinted answers: guide: with the hint; naive: without, as if they had been sampled so; "
                   f"start: without for the first {NAIVE_START} tokens, then with it")
group.add_argument("--relift-rows", type=flags.number(int, 1), default=32, metavar="N",
                   help="relift: rows of an SFT step (paper: 128)")
flags.add_rollouts(parser.add_argument_group("sampling"))
flags.add_grpo(parser.add_argument_group("policy update"), LOSSES)
group = parser.add_argument_group("system")
flags.add_micro_batches(group)
flags.add_checkpointing(group)
flags.add_system(group)
flags.add_run_folder(parser.add_argument_group("run folder"), "runs/rl_student", save_every=20, eval_every=20,
                     eval_what="held-out success")
args = parser.parse_args()
flags.check_grpo(parser, args)
guide = args.failed_groups == "guide"
if guide and args.rewards[:2] != [0, 0]:
    parser.error(f"--failed-groups guide with --rewards {args.rewards}: Guide-GRPO takes a binary reward, pass "
                 "--rewards 0 0 1")
if guide and args.loss == "gspo":
    parser.error("--failed-groups guide with --loss gspo: hinted answers have one ratio a token; pass grpo, dapo or "
                 "dr_grpo")
if not guide:
    flags.refuse(parser, args, "without --failed-groups guide", "hint_ratio")
if args.failed_groups != "relift":
    flags.refuse(parser, args, "without --failed-groups relift", "relift_rows")
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
prompts, vocab = Prompts(tokenizer), vocabulary_size(tokenizer)
context = models.context_length(args.model)
longest_prompt_of = {  # a row's
    "guide": prompts.hinted_prompt,
    "adaback": lambda row: prompts.question_prompt(row) + prompts.revealed_chain(row, 1.0),
}.get(args.failed_groups, prompts.question_prompt)
if args.show_rows:
    print(show_rows(prompts, rows, args.show_rows, args.skip_bad_rows))
    sys.exit()
if rank == 0 and (advice := models.advice_on_task(args.task, args.model)):
    print(f"warning: {advice}")
rows = drop_overlong(gradable(args.task, rows), lambda row: len(longest_prompt_of(row)), context, args.max_new_tokens,
                     skip=args.skip_bad_rows)


def sft_row(row):
    """ReLIFT: the row as sft_student.py learns it: ids before the loss starts, ids with loss, cut to the context."""
    ids, start = prompts.sft_row(row, "student")
    if start >= context:
        raise UserError(f"takes {start} tokens before its explanation, the model reads {context}: shorten it")
    return ids[:start], ids[start:context]


longest_sft_row = 0
if args.failed_groups == "relift":  # rows that SFT can't be made of are found here
    sft_rows = map_rows(rows, sft_row, args.skip_bad_rows)
    rows = [row for row, _ in sft_rows]
    longest_sft_row = max((len(before) + len(supervised) for _, (before, supervised) in sft_rows), default=0)
rows, held_out = split_held_out(rows, args)
if args.failed_groups == "relift" and args.relift_rows > len(rows):
    raise UserError(f"--relift-rows {args.relift_rows}, but there are {len(rows)} rows to train on: lower it.")
longest = max(len(longest_prompt_of(row)) for row in rows + held_out)
if args.dry_run is not None:
    sys.exit(dry_run_rl(args, device, world, args.bits, None, longest_prompt=longest, vocab=vocab,
                        held_out=len(held_out), longest_sft_row=longest_sft_row))

# model and optimizer
policy = models.load_lora(args.model, bits=args.bits, device=device, seed=args.seed, rank=args.lora_rank,
                          alpha=args.lora_alpha, targets=args.lora_targets, reference=args.beta > 0,
                          checkpointing=args.gradient_checkpointing)
parameters = lora.adapter_parameters(policy)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
updates = Updates(run, optimizer, parameters, tokenizer, STATS)
micro_batched = MicroBatched(args.micro_batch_tokens)
adaback = AdaBack(len(rows), args.seed) if args.failed_groups == "adaback" else None
relift, optimizers = None, {"optimizer.pt": optimizer}  # by their files in a checkpoint
if args.failed_groups == "relift":
    relift = ReLift(args.relift_rows)
    sft_optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)  # moments of its own, as in the paper
    optimizers["sft_optimizer.pt"] = sft_optimizer
    sft_updates = Updates(run, sft_optimizer, parameters, tokenizer)
if run.checkpoint:
    saving.restore(policy, run.checkpoint)
    for file, each in optimizers.items():
        saving.restore_optimizer(each, run.checkpoint, file)
    if adaback or relift:
        restore_state(adaback or relift, run.checkpoint)
engine = make_engine(args.engine, policy, tokenizer, base=models.base_of(args.model), bits=args.bits, device=device,
                     max_tokens=longest + args.max_new_tokens, batch=args.rollout_batch)
run.start(base_hash=saving.fingerprint(policy), rows_hash=digest(rows, *GOLD[args.task]), device=str(device),
          rows=len(rows))
print(f"{run.folder}: {sum(p.numel() for p in parameters):,} trained parameters, {len(rows)} rows, {device}, "
      f"log-probs by {implementation('auto', device.type)}", flush=True)
if held_out and run.step == 0:
    print(f"first: answers to {len(held_out)} held-out questions", flush=True)

distribution = dict(temperature=args.temperature, vocab=vocab)  # what is sampled from, and learned


def save(folder):
    saving.save_model(policy, tokenizer, folder, adapters=list(policy.peft_config))
    for file, each in optimizers.items():
        torch.save(each.state_dict(), folder / file)
    if adaback or relift:
        save_state(adaback or relift, folder)


def sample(prompt_ids, *key):
    """One completion for each prompt, drawn with seeds of this key."""
    return engine.generate(prompt_ids, max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                           key=(args.seed, *key))


def compute_rewards(batch, completions):
    """Rewards (B,) of B completions, which are right (B,), and their texts. Each is the whole of an answer."""
    texts = [prompts.turn_text(completion) for completion in completions]
    right = torch.tensor([bool(verdict) for verdict in grade_all(args.task, texts, batch)], device=device)
    answered = torch.tensor([answer_of(args.task, text) is not None for text in texts], device=device)
    none, wrong, good = args.rewards
    return torch.where(right, good, torch.where(answered, wrong, none)), right, texts


def replace_failed_groups(batch, completions, rewards, right, texts, *key):
    """Guide-GRPO: groups whose answers all fail are sampled again with the hint. Their completions, rewards and texts
    take the place of those in the arguments.

    -> for each answer the hinted prompt that it was sampled after, or None; tokens sampled, share right.
    """
    hinted_prompts = [None] * len(batch)
    solved = right.view(-1, args.group_size).any(1).repeat_interleave(args.group_size)
    failed = (~solved).nonzero().flatten().tolist()
    if not failed:
        return hinted_prompts, 0, None
    for i in failed:
        hinted_prompts[i] = prompts.hinted_prompt(batch[i])
    new = sample([hinted_prompts[i] for i in failed], "hinted", *key)
    rewards[failed], new_right, new_texts = compute_rewards([batch[i] for i in failed], new)
    for i, completion, text in zip(failed, new, new_texts, strict=True):
        completions[i], texts[i] = completion, text
    return hinted_prompts, sum(len(c.ids) for c in new), new_right.float().mean().item()


def without_hints(episodes, old_logprobs):
    """--hint-ratio naive, start: old log-probs (N,) of which those of an answer's tokens, or of its first ones, are
    given the prompt without a hint. For answers that had none they are what they were."""
    completion_ids = [e.completion for e in episodes]
    plain_logprobs, _ = micro_batched(
        batched_logprobs, policy, [e.prompt for e in episodes], completion_ids, **distribution)
    place = torch.tensor([i for ids in completion_ids for i in range(len(ids))], device=device)  # in its answer
    naive_until = NAIVE_START if args.hint_ratio == "start" else math.inf
    return torch.where(place < naive_until, plain_logprobs, old_logprobs)


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
        with lora.use_adapter(policy, "reference"):
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

    lora.update_mode(policy)
    for _ in range(args.updates_per_batch):
        micro_batched(compute_gradients)
        loss, grad_norm, stats = updates.step()
    policy.eval()
    return loss, grad_norm, stats


def imitate(questions):
    """ReLIFT: an optimizer step of SFT on the explanations of these rows (indices) -> its loss, nats a token.

    The loss is sft_student.py's: the mean over all supervised tokens.
    """
    examples = [(rows[i], *sft_row(rows[i])) for i in questions]
    tokens = sum(len(supervised) for *_, supervised in examples)  # of all ranks
    mine = examples[rank::world]

    def compute_gradients(micro_batch_tokens):
        sft_updates.zero_grad()
        for indices in micro_batches([len(before) + len(supervised) for _, before, supervised in mine],
                                     micro_batch_tokens):
            batch, before, supervised = zip(*(mine[i] for i in indices), strict=True)
            logprobs, _ = completion_logprobs(policy, before, supervised, vocab=vocab)
            sft_updates.backward(-logprobs.sum().double() / tokens, zip(batch, supervised, strict=True))

    lora.update_mode(policy)
    micro_batched(compute_gradients)
    loss, _, _ = sft_updates.step()
    policy.eval()
    return loss


def held_out_success(*key):
    """Share of held-out rows that one answer each gets right."""
    completions = sample([prompts.question_prompt(row) for row in held_out], "held out", *key)
    return compute_rewards(held_out, completions)[1].float().mean().item()


progress = progress_bar(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step")
for step in run.steps(progress, save):
    eval_solved_before = held_out_success("before") if step == 0 and held_out and rank == 0 else None
    timer = StepTimer(device)

    # 1. this rank's share of the step's questions, and G answers to each; AdaBack: their starts are in the prompts
    questions = batch_indices(len(rows), args.prompts_per_step, step, args.seed)  # of all ranks
    shares = [adaback.share(i, step) if adaback else 0.0 for i in questions]
    mine = [(rows[i], prompts.revealed_chain(rows[i], share))
            for i, share in list(zip(questions, shares, strict=True))[rank::world]]
    batch = [row for row, _ in mine for _ in range(args.group_size)]  # (B,), grouped by question
    revealed = [ids for _, ids in mine for _ in range(args.group_size)]  # (B,)
    prompt_ids = [prompts.question_prompt(row) + ids for row, ids in zip(batch, revealed, strict=True)]
    completions = sample(prompt_ids, step, rank)
    sampled_tokens = sum(len(c.ids) for c in completions)

    # 2. rewards (B,) of whole answers; Guide: where all answers to a question fail, new ones with the hint
    rewards, right, texts = compute_rewards(
        batch, [c._replace(ids=ids + c.ids) for ids, c in zip(revealed, completions, strict=True)])
    solved = right.float().mean().item()
    hinted_prompts, hinted_tokens, hinted_solved = [None] * len(batch), 0, None
    if guide:
        hinted_prompts, hinted_tokens, hinted_solved = replace_failed_groups(
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
    tis = {}
    if args.engine == "vllm" and args.tis_cap:
        tis = weight_by_tis(episodes, old_logprobs, sampler_logprobs, args.tis_cap)
    if args.hint_ratio != "guide" and any(e.hinted_prompt for e in episodes):
        old_logprobs = without_hints(episodes, old_logprobs)
    unpack(episodes, "old_logprobs", old_logprobs)
    if args.updates_per_batch == 1:  # as in train_rlt.py: a ratio of 1, without the rounding of another pass
        for episode in episodes:
            if not episode.hinted_prompt:
                episode.old_logprobs = None
    timer.end("score")

    # 5. the policy update; AdaBack and ReLIFT note which questions failed; ReLIFT: SFT where enough of them have
    for group in [group for each in optimizers.values() for group in each.param_groups]:
        group["lr"] = args.lr * lr_fraction(step, run.lr_steps, args.warmup_steps, args.final_lr_fraction)
    loss, grad_norm, stats = update_policy(episodes)
    run.weights_changed = True  # if no group had a signal, too: what follows must not be done twice
    success = gather_groups(right.view(-1, args.group_size).float().mean(1).tolist())  # (P,) of all ranks
    if adaback:
        adaback.update(questions, shares, success)
    relift_loss = None
    if relift:
        relift.add(questions, success)
        if chosen := relift.take():
            relift_loss = imitate(chosen)
    engine.load_adapter(policy)
    if args.beta > 0 and args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
        lora.sync_reference(policy, args.sync_ref_mix)
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
        "hinted": all_reduce_mean(n_hinted / B, B) if guide else None,
        "hinted_solved": all_reduce_mean(hinted_solved, n_hinted),
        "revealed": sum(shares) / len(shares) if adaback else None,
        "relift_buffer": len(relift.buffer) if relift else None, "relift_loss": relift_loss,
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
            "hinted": hinted_prompts[i] is not None, "revealed": tokenizer.decode(revealed[i]),
            "reward": rewards[i].item(),
        } for i in sorted({0, int(rewards.argmax())})])

final = run.finish(lambda folder: saving.save_model(policy, tokenizer, folder))
print(f"The student is in {final}.")
print_evaluation_command(parser, args, args.task)
