# SPDX-License-Identifier: MIT
"""
A step of train_rlt.py with a small model, done in two ways in turn:

    python bench/small_step.py --compare prompts --data rows.jsonl    a prompt read once for the explanations that share
                                                                      it, or once for each of them
    python bench/small_step.py --compare sampler --data rows.jsonl    decode steps of our own, or transformers' generate
    python bench/small_step.py --compare bits --data rows.jsonl       16 bits or 32

Times sampling, scoring and the gradient, with the model as teacher and as student, --rounds times each way. Both ways
score and learn from the same explanations. Each measurement is a line of JSON in --out: seconds of each part, and how
far the log-probs of sampler and trainer are apart, mean over the tokens in nats. At the end it prints the ratio of the
times, and how far the log-probs of both ways differ at most.
"""

import argparse
import contextlib
import functools
import statistics
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlt import decode_steps, models, rollout  # noqa: E402
from rlt.chat_template import vocabulary_size  # noqa: E402
from rlt.logprobs import completion_logprobs  # noqa: E402
from rlt.lora import update_mode  # noqa: E402
from rlt.prompts import Prompts  # noqa: E402
from rlt.rows import load_rows  # noqa: E402

import torch  # noqa: E402
from measure import DEVICE, LOGS, Log, bfloat16_instructions, machine, seconds  # noqa: E402

import rewards  # noqa: E402

BITS = 16 if DEVICE.type == "cuda" else 32
WAYS = {"prompts": ("once", "each"), "sampler": ("steps", "generate"), "bits": (16, 32)}


@contextlib.contextmanager
def prompts_read_for_each():
    """As if no two sequences had the same prompt."""
    pack = rewards.pack_sequences
    with mock.patch.object(rewards, "pack_sequences", lambda sequences, _: pack(sequences, [0] * len(sequences))), \
            mock.patch.object(rollout, "_different", lambda prompts: (prompts, range(len(prompts)))):
        yield


INSIDE = {  # a way: what makes the difference while it runs
    "each": prompts_read_for_each,
    "generate": lambda: mock.patch.object(decode_steps, "suits", lambda *_: False),
}


class Step:
    """The parts of one step with a model in these bits, as teacher and as student, one explanation of each row."""

    def __init__(self, model, batch, max_new_tokens, bits):
        self.tokenizer = models.load_tokenizer(model)
        self.policy = models.load_lora(model, bits=bits, device=DEVICE, seed=0)
        self.student = models.load_model(model, bits=bits, device=DEVICE, scores=True)
        self.prompts, self.vocab = Prompts(self.tokenizer), vocabulary_size(self.tokenizer)
        self.batch, self.max_new_tokens = batch, max_new_tokens
        self.prompt_ids = [self.prompts.teacher_prompt(row) for row in batch]

    def sample(self):
        """Completions of every prompt, drawn with the same seed each time."""
        return rollout.generate(self.policy, self.tokenizer, self.prompt_ids, max_new_tokens=self.max_new_tokens,
                                temperature=1.0, seed=0)

    def score(self, completions):
        """Log-probs by the trainer of the completions' tokens, one after the other; rewards are computed on the way."""
        rows = [self.prompts.scoring_row(row, self.prompts.split_completion(c.ids, c.finished))
                for row, c in zip(self.batch, completions, strict=True)]
        return rewards.score_explanations(self.policy, self.student, rows, vocab=self.vocab).old_logprobs

    def gradient(self, completions):
        update_mode(self.policy)
        ids = [c.ids for c in completions]
        completion_logprobs(self.policy, self.prompt_ids, ids, vocab=self.vocab)[0].sum().backward()
        self.policy.zero_grad()
        self.policy.eval()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--compare", choices=WAYS, required=True, help="what is done in two ways")
    parser.add_argument("--model", default="smollm2", help="run folder, folder or hub id")
    parser.add_argument("--data", required=True, help="rows with question and solution")
    parser.add_argument("--questions", type=int, default=2, help="of the step")
    parser.add_argument("--group-size", type=int, default=8, help="explanations of a question")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="tokens of an explanation")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way")
    parser.add_argument("--out", default=LOGS / "small_step.jsonl", help="JSONL to append to")
    args = parser.parse_args()

    ways = WAYS[args.compare]
    batch = [row for row in load_rows(args.data, limit=args.questions) for _ in range(args.group_size)]
    make = functools.partial(Step, args.model, batch, args.max_new_tokens)
    steps = {bits: make(bits) for bits in ways} if args.compare == "bits" else dict.fromkeys(ways, make(BITS))
    first = steps[ways[0]]
    completions = first.sample()  # the ones that both ways score and learn from
    log = Log(args.out, **machine(), bfloat16=bfloat16_instructions(), model=args.model, questions=args.questions,
              group_size=args.group_size, prompt_tokens=statistics.fmean(map(len, first.prompt_ids)),
              completion_tokens=statistics.fmean(len(c.ids) for c in completions))
    measured = {way: [] for way in ways}
    for i in range(args.rounds):
        logprobs = {}
        for way in measured if i % 2 == 0 else reversed(measured):
            with INSIDE.get(way, contextlib.nullcontext)():
                entry, logprobs[way] = measure(steps[way], completions)
            measured[way].append(entry)
            log(part=args.compare, way=way, round=i, sampler="generate" if way == "generate" else "steps", **entry)
        difference = (logprobs[ways[0]] - logprobs[ways[1]]).abs().max().item()
        if args.compare != "bits":
            assert difference < (0.1 if BITS == 16 else 1e-3), f"log-probs differ by {difference} nats"

    print(f"\nseconds   {ways[0]:>8}  {ways[1]:>8}     ratio")
    for name in ("t_rollout", "t_score", "t_update", "t_step"):
        once, each = (statistics.median(times[name] for times in measured[way]) for way in ways)
        print(f"{name[2:]:9} {once:8.3g} {each:9.3g} {each / once:9.2f}")
    print(f"log-probs differ by at most {difference:.1e} nats")


def measure(step, completions):
    """-> seconds of each part and the gap between sampler and trainer; the log-probs of these completions."""
    sampled, found = [], {}
    times = {
        "t_rollout": seconds(lambda: sampled.extend(step.sample())),
        "t_score": seconds(lambda: found.update(logprobs=step.score(completions))),
        "t_update": seconds(lambda: step.gradient(completions)),
    }
    gap = step.score(sampled).cpu() - torch.tensor([logprob for c in sampled for logprob in c.logprobs])
    return {**times, "t_step": sum(times.values()), "gap": gap.abs().mean().item()}, found["logprobs"].cpu()


if __name__ == "__main__":
    main()
