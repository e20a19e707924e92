# SPDX-License-Identifier: MIT
"""
Train a student with GRPO on correctness: the baseline that a teacher must beat, and what follows a cold start.

    reward = right 1, wrong -0.5, no answer -1        graded by evaluate.py, so reward and evaluation can't disagree

With --hints it is Guide-GRPO (arXiv 2506.13923): where all of a question's answers fail, the group is drawn again
with the row's hint in the prompt and takes the plain one's place. Hinted answers are learned without the hint: their
ratio is the new policy's, which doesn't see it, over the old one's, which did; shaped, not clipped.

    laptop                python rl_student.py
    after a cold start    python rl_student.py --model runs/student --out runs/cold-start
    with hints            python rl_student.py --hints --rewards 0 0 1 --model runs/hints --data runs/hints/train.jsonl
                          (the plain toy's base has never seen a hint; this one's has:
                          python data/toy.py --clocks 3 --careful-base 0 --hints --out runs/hints)
"""

import time
from collections import Counter

import torch
from tqdm import tqdm

import memory
import models
import runs
from evaluate import answer_of, gradable, grade_all
from grpo import LOSSES, group_advantages, grpo_loss, guided_loss, step_denominator
from prompts import Prompts, load_rows
from rewards import completion_logprobs, implementation, micro_batches
from runs import number, seed_for

# ---------------------------------------------------------------------------------------------------------
parser = runs.flags(__doc__)
# model
parser.add_argument("--model", default="toy", help="student to start from: run folder, folder, hub id")
parser.add_argument("--bits", type=int, choices=(4, 16, 32), default=32, help="bits of the base")
parser.add_argument("--lora-rank", type=number(int, 1), default=16, help="rank of the student's adapter")
parser.add_argument("--lora-alpha", type=number(float, above=0), default=32, help="adapter scale times its rank")
parser.add_argument("--lora-targets", default="all-linear", help="layers with an adapter, by name, with commas")
# data
parser.add_argument("--task", choices=("toy", "gsm8k", "math500", "aime24", "countdown"), default="toy", help="how "
                    "answers are graded")
parser.add_argument("--data", default="toy", help="rows with what the task is graded by: file, hub id, or toy")
parser.add_argument("--limit", type=number(int, 1), default=None, help="use the first rows only")
parser.add_argument("--skip-bad-rows", action="store_true", help="leave bad and over-long rows out, and count them")
# reward
parser.add_argument("--rewards", type=number(float), nargs=3, default=[-1.0, -0.5, 1.0],
                    metavar=("NONE", "WRONG", "RIGHT"), help="of no answer, a wrong one, the right one; 0 0 1: binary, "
                    "which --hints take")
parser.add_argument("--keep-zero-groups", action="store_true", help="count groups without signal in the loss's "
                    "denominator, and their KL to the reference; else they are dropped")
# hints
parser.add_argument("--hints", action="store_true", help="Guide-GRPO, with the rows' column `hint`")
parser.add_argument("--hint-ratio", choices=("guide", "naive"), default="guide", help="old log-probs of hinted answers "
                    "with the hint (guide), or without, as if they had been drawn so (naive)")
# sampling
parser.add_argument("--prompts-per-step", type=number(int, 1), default=16, help="questions a step")
parser.add_argument("--group-size", type=number(int, 2), default=16, help="answers a question")
parser.add_argument("--temperature", type=number(float, above=0), default=1.0, help="of sampling and log-probs")
parser.add_argument("--max-new-tokens", type=number(int, 1), default=48, help="length limit of an answer")
parser.add_argument("--rollout-batch", type=number(int, 1), default=256, help="answers sampled side by side")
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
                    "answers; the clip acts from the second on")
parser.add_argument("--beta", type=number(float, 0), default=0.04, help="weight of the KL to the reference adapter; "
                    "0: no reference pass")
parser.add_argument("--sync-ref-every", type=number(int, 0), default=32, help="steps after which the reference "
                    "moves towards the student; 0: never")
parser.add_argument("--sync-ref-mix", type=number(float, 0, 1), default=0.9, help="share m of the student in the new "
                    "reference. A and B are averaged each by itself, so the reference's BA differs from the average "
                    "of both BA by exactly m (1 - m) dB dA times the adapter's scale")
# system
parser.add_argument("--micro-batch-tokens", type=number(int, 1), default=8192, help="tokens a forward pass")
parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in the backward "
                    "pass: less memory, a third more time")
parser.add_argument("--head-chunk", type=number(int, 1), default=1024, help="rows of logits that exist at a time")
parser.add_argument("--seed", type=number(int, 0), default=0, help="of every draw")
parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
parser.add_argument("--dry-run", nargs="?", metavar="GB", const=0.0, type=number(float, above=0), help="check "
                    "flags, rows and disk, estimate the memory, and stop; GB: of the GPU meant; none: this machine")
# run folder
parser.add_argument("--out", default="runs/rl_student", help="run folder")
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out, or start")
parser.add_argument("--save-every", type=number(int, 0), default=20, help="steps between checkpoints; 0: at the end")
parser.add_argument("--eval-every", type=number(int, 0), default=20, help="steps between held-out success; 0: never")
parser.add_argument("--eval-rows", type=number(int, 1), default=64, help="rows at the end of --data that are held out")
args = parser.parse_args()
if args.hints and args.rewards[:2] != [0, 0]:
    parser.error(f"--hints with --rewards {args.rewards}: Guide-GRPO takes a binary reward, pass --rewards 0 0 1")
if args.hints and args.loss == "gspo":
    parser.error("--hints with --loss gspo: hinted answers have one ratio a token; pass grpo, dapo or dr_grpo")
if args.hint_ratio != "guide" and not args.hints:
    parser.error(f"--hint-ratio {args.hint_ratio} does nothing without --hints")
# ---------------------------------------------------------------------------------------------------------

device = models.pick_device(args.device)
rank, world = runs.join(device)
if args.prompts_per_step % world:
    raise ValueError(f"--prompts-per-step {args.prompts_per_step} can't be shared evenly by {world} ranks: pass "
                     f"{args.prompts_per_step + -args.prompts_per_step % world}.")
run = runs.Run(args)
rows = load_rows(models.rows_of(args.data, "train"), limit=args.limit, skip_bad=args.skip_bad_rows,
                 solved=args.task != "countdown")
tokenizer = models.load_tokenizer(args.model)
prompts, vocab = Prompts(tokenizer), len(tokenizer)
rows = prompts.fitting(gradable(args.task, rows), models.context_of(args.model) - args.max_new_tokens,
                       skip=args.skip_bad_rows, also=[prompts.hinted] if args.hints else [])
held_out = rows[-args.eval_rows :] if args.eval_every else []
rows = rows[: len(rows) - len(held_out)]
if len(rows) < args.prompts_per_step:
    raise ValueError(f"{len(rows)} rows are left to train on, a step takes {args.prompts_per_step}: give more rows, or "
                     "lower --prompts-per-step, --eval-rows or --eval-every.")
if args.dry_run is not None:
    lora = dict(rank=args.lora_rank, targets=args.lora_targets) | models.anatomy(args.model)
    gpu = args.dry_run > 0 or device.type == "cuda"
    batch = max(args.prompts_per_step // world * args.group_size, len(held_out))
    longest = max(len((prompts.hinted if args.hints else prompts.question)(row)) for row in rows + held_out)
    raise SystemExit(memory.dry_run(
        args, device, memory.Shape(**lora, bits=args.bits, gpu=gpu, trained="adapter", reference=args.beta > 0),
        row=longest + args.max_new_tokens, rollout=(min(args.rollout_batch, batch), longest, args.max_new_tokens),
        vocab=vocab, scored=True, learned=True, reference=args.beta > 0))

student = models.load_lora(args.model, bits=args.bits, device=device, rank=args.lora_rank, seed=args.seed,
                           alpha=args.lora_alpha, targets=args.lora_targets, reference=args.beta > 0,
                           checkpointing=args.gradient_checkpointing)
parameters = models.adapter_parameters(student)
optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)

if run.checkpoint:
    models.restore(student, run.checkpoint)
    optimizer.load_state_dict(torch.load(run.checkpoint / "optimizer.pt", map_location="cpu"))
run.start(base_hash=models.fingerprint(student), data_hash=runs.digest(rows), device=str(device), rows=len(rows))
print(f"{run.folder}: {sum(p.numel() for p in parameters):,} trained parameters, {len(rows)} rows, {device}, "
      f"log-probs by {implementation('auto', device.type)}", flush=True)


def save(folder):
    models.save_model(student, tokenizer, folder, adapters=list(student.peft_config))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def sample(asked, *key):
    """One completion for each prompt, drawn with seeds of this key."""
    completions = []
    for at in range(0, len(asked), args.rollout_batch):
        completions += models.generate(student, tokenizer, asked[at : at + args.rollout_batch],
                                       max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                                       seed=seed_for(args.seed, *key, at), engine=args.engine,
                                       cache_tokens=args.cache_tokens)
    return completions


def judge(rows, completions):
    """Rewards (B,), which answers are right (B,), and the texts."""
    texts = [tokenizer.decode(c.ids[:-1] if c.finished else c.ids) for c in completions]
    right = torch.tensor([bool(verdict) for verdict in grade_all(args.task, texts, rows)], device=device)
    answered = torch.tensor([answer_of(args.task, text) is not None for text in texts], device=device)
    none, wrong, good = args.rewards
    return torch.where(right, good, torch.where(answered, wrong, none)), right, texts


def log_probs_of(batch, asked, answers):
    """Packed log-probs and entropies, under whoever speaks now, of the answers to the prompts numbered in batch."""
    return completion_logprobs(student, [asked[i] for i in batch], [answers[i] for i in batch], vocab=vocab,
                               temperature=args.temperature, head_chunk=args.head_chunk)


def batches_of(kept, hinted, asked, sampled_from, answers):
    """Micro-batches of the answers numbered in kept, hinted and plain ones apart: their losses differ."""
    widths = [max(len(asked[i]), len(sampled_from[i])) + len(answers[i]) for i in kept]
    for some in micro_batches(widths, args.micro_batch_tokens):
        for side in (False, True):
            if batch := [kept[j] for j in some if hinted[kept[j]] == side]:
                yield batch


def update(batches, asked, answers, old, advantages, hinted):
    """Optimizer steps on what was sampled, in micro-batches that add up to one loss.

    old: log-probs of each micro-batch; advantages, hinted (B,) -> the last step's loss, its gradient's norm, and
    the losses' stats, summed over tokens.
    """
    lengths = torch.tensor([len(ids) for ids in answers])
    kept = [i for batch in batches for i in batch]
    sequences, tokens = runs.total(len(kept), int(lengths[kept].sum()))
    if not sequences:  # on no rank
        return 0.0, 0.0, Counter()
    denominator = step_denominator(args.loss, sequences=sequences, tokens=tokens, max_new_tokens=args.max_new_tokens)
    reference = [None] * len(batches)
    if args.beta > 0:
        with models.using(student, "reference"):
            reference = [log_probs_of(batch, asked, answers)[0] for batch in batches]
    student.train()
    for _ in range(args.updates_per_batch):
        total, sums = 0.0, Counter()
        for batch, before, ref in zip(batches, old, reference, strict=True):
            policy, _ = log_probs_of(batch, asked, answers)
            common = dict(denominator=denominator, beta=args.beta, loss=args.loss)
            if hinted[batch[0]]:
                loss, stats = guided_loss(policy, before, ref, advantages[batch], lengths[batch], **common)
            else:
                loss, stats = grpo_loss(policy, before, ref, advantages[batch], lengths[batch],
                                        epsilon_low=args.epsilon_low, epsilon_high=args.epsilon_high, **common)
            loss.backward()
            total += loss.item()
            sums.update({key: value.item() for key, value in stats.items()})
        runs.sum_gradients(parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
        optimizer.step()
        optimizer.zero_grad()
    student.eval()
    names = ("kl_ref", "clip_fraction", "guided_log_ratio")
    total, *values = runs.total(total, *(sums[name] for name in names))
    return total, grad_norm, dict(zip(names, values, strict=True))


B, G = args.prompts_per_step // world * args.group_size, args.group_size  # answers on this rank, to each question
progress = tqdm(range(run.step, args.steps), initial=run.step, total=args.steps, unit="step", dynamic_ncols=True,
                disable=rank > 0)
for step in progress:
    clock = [time.perf_counter()]

    # 1. questions, this rank's share of the step's, and G answers to each; an answer is drawn from one prompt and
    # learned for another only with hints
    chosen = [rows[i] for i in runs.pick(len(rows), args.prompts_per_step, step, args.seed)[rank::world]]
    chosen = [row for row in chosen for _ in range(G)]  # (B,) prompt i // G
    asked = [prompts.question(row) for row in chosen]
    sampled_from, completions = list(asked), sample(asked, step, rank)
    rewards, right, texts = judge(chosen, completions)
    sampled_tokens, solved = sum(len(c.ids) for c in completions), right.float().mean().item()

    # 2. where all of a group fail: once more, with the hint
    hinted = ~right.view(-1, G).any(1).repeat_interleave(G) & args.hints  # (B,)
    again, hinted_solved = hinted.nonzero().flatten().tolist(), None
    if again:
        replies = sample([prompts.hinted(chosen[i]) for i in again], "hinted", step, rank)
        rewards[again], right_now, said = judge([chosen[i] for i in again], replies)
        for i, reply, text in zip(again, replies, said, strict=True):
            sampled_from[i], completions[i], texts[i] = prompts.hinted(chosen[i]), reply, text
        sampled_tokens += sum(len(c.ids) for c in replies)
        hinted_solved = right_now.float().mean().item()
    clock.append(time.perf_counter())

    # 3. how much better each answer is than the others to its question; groups without signal teach nothing
    groups = rewards.view(-1, G)
    advantages = group_advantages(groups, scale=args.advantage_scale).flatten()
    signal = (groups != groups[:, :1]).any(1)
    kept = (signal.repeat_interleave(G) | args.keep_zero_groups).nonzero().flatten().tolist()

    # 4. log-probs of the policy that sampled, with what it had seen
    answers = [c.ids for c in completions]
    batches = list(batches_of(kept, hinted, asked, sampled_from, answers))
    nothing = torch.empty(0, device=device)  # a rank may have nothing to learn from
    with torch.no_grad():
        measured = [log_probs_of(batch, sampled_from, answers) for batch in batches]
        old, entropies = [logprobs for logprobs, _ in measured], torch.cat([nothing, *(e for _, e in measured)])
        sampler_gap = runs.gap([p for batch in batches for i in batch for p in completions[i].logprobs],
                               torch.cat([nothing, *old]), args.max_sampler_gap)
        if args.hint_ratio == "naive":
            old = [log_probs_of(batch, asked, answers)[0] for batch in batches]
    clock.append(time.perf_counter())

    # 5. update on them
    for group in optimizer.param_groups:
        group["lr"] = args.lr * runs.schedule(step, args.steps, args.warmup_steps, args.final_lr)
    loss, grad_norm, sums = update(batches, asked, answers, old, advantages, hinted)
    if args.beta > 0 and args.sync_ref_every and (step + 1) % args.sync_ref_every == 0:
        models.sync_reference(student, args.sync_ref_mix)
    clock.append(time.perf_counter())

    # 6. measure on held-out rows, log, save
    eval_solved = None
    if held_out and rank == 0 and (step % args.eval_every == 0 or step + 1 == args.steps):
        replies = sample([prompts.question(row) for row in held_out], "held out", step, rank)
        eval_solved = judge(held_out, replies)[1].float().mean().item()
    plain, guided, usable, sampled_tokens = runs.total(
        sum(len(answers[i]) for i in kept if not hinted[i]), sum(len(answers[i]) for i in kept if hinted[i]),
        int(signal.sum()), sampled_tokens)
    entry = {
        "step": step, "reward": runs.mean(rewards.mean().item(), B), "solved": runs.mean(solved, B),
        "hinted": runs.mean(len(again) / B, B) if args.hints else None,
        "hinted_solved": runs.mean(hinted_solved, len(again)),
        "zero_groups": runs.mean((~signal).float().mean().item(), B), "usable_groups": usable,
        "sampled_tokens": sampled_tokens, "length": runs.mean(sum(map(len, answers)) / B, B),
        "kl_ref": sums["kl_ref"] / (plain + guided) if args.beta > 0 and plain + guided else None,
        "entropy": runs.mean(entropies.mean().item(), len(entropies)),
        "clip_fraction": sums["clip_fraction"] / plain if plain else None,
        "guided_log_ratio": sums["guided_log_ratio"] / guided if guided else None,
        "sampler_gap": sampler_gap, "loss": loss, "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm,
        "eval_solved": eval_solved,
        **{f"t_{phase}": b - a for phase, a, b in zip(("rollout", "score", "update"), clock, clock[1:], strict=False)},
        "tokens_per_s": sampled_tokens / (clock[-1] - clock[0]),
    }
    progress.write(run.log(entry))
    if step % 10 == 0 or step + 1 == args.steps:
        run.log_samples([{"step": step, "question": chosen[i]["question"], "solution": chosen[i]["solution"],
                          "answer": texts[i], "hinted": bool(hinted[i]), "reward": rewards[i].item()}
                         for i in sorted({0, int(rewards.argmax())})])
    if args.save_every and (step + 1) % args.save_every == 0 or step + 1 == args.steps:
        run.save(step + 1, save)

final = run.finish(lambda folder: models.save_model(student, tokenizer, folder))
flags = f" --data {args.data}" if args.data != "toy" else ""
print(f"The student is in {final}. Next: python evaluate.py --task {args.task} --model {args.model} {args.out}{flags}")
