# SPDX-License-Identifier: MIT
"""
What it saves to read a prompt once that all explanations of a question share, and not once for each of them:

    python bench/small_step.py --model smollm2 --data rows.jsonl --out runs/small_step.jsonl

Times sampling, scoring and the gradient of one step of train_rlt.py, with the model as teacher and as student, both
ways in turn, --rounds times, on the same explanations. Each measurement is a line of JSON in --out: seconds of each
part. At the end it prints their ratio, and how far the log-probs of both ways differ at most, in nats.
"""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlt import models, rollout  # noqa: E402
from rlt.chat_template import vocabulary_size  # noqa: E402
from rlt.logprobs import completion_logprobs  # noqa: E402
from rlt.lora import update_mode  # noqa: E402
from rlt.prompts import Prompts  # noqa: E402
from rlt.rows import load_rows  # noqa: E402

from measure import DEVICE, LOGS, Log, machine, seconds  # noqa: E402

import rewards  # noqa: E402

BITS = 16 if DEVICE.type == "cuda" else 32


@contextlib.contextmanager
def prompts_read_for_each():
    """As if no two sequences had the same prompt."""
    pack = rewards.pack_sequences
    with mock.patch.object(rewards, "pack_sequences", lambda sequences, _: pack(sequences, [0] * len(sequences))), \
            mock.patch.object(rollout, "_read_prompts_once", lambda *_, **__: None):
        yield


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--model", default="smollm2", help="run folder, folder or hub id")
    parser.add_argument("--data", required=True, help="rows with question and solution")
    parser.add_argument("--questions", type=int, default=2, help="of the step")
    parser.add_argument("--group-size", type=int, default=8, help="explanations of a question")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="tokens of an explanation")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each way")
    parser.add_argument("--out", default=LOGS / "small_step.jsonl", help="JSONL to append to")
    args = parser.parse_args()

    tokenizer = models.load_tokenizer(args.model)
    policy = models.load_lora(args.model, bits=BITS, device=DEVICE, seed=0)
    student = models.load_model(args.model, bits=BITS, device=DEVICE, scores=True)
    prompts, vocab = Prompts(tokenizer), vocabulary_size(tokenizer)
    batch = [row for row in load_rows(args.data, limit=args.questions) for _ in range(args.group_size)]
    prompt_ids = [prompts.teacher_prompt(row) for row in batch]

    def sample():
        return rollout.generate(policy, tokenizer, prompt_ids, max_new_tokens=args.max_new_tokens, temperature=1.0,
                                seed=0)

    completions = sample()
    ids = [c.ids for c in completions]
    scoring_rows = [prompts.scoring_row(row, prompts.split_completion(c.ids, c.finished))
                    for row, c in zip(batch, completions, strict=True)]
    found = {}

    def score():
        found["logprobs"] = rewards.score_explanations(policy, student, scoring_rows, vocab=vocab).old_logprobs

    def gradient():
        update_mode(policy)
        completion_logprobs(policy, prompt_ids, ids, vocab=vocab)[0].sum().backward()
        policy.zero_grad()
        policy.eval()

    log = Log(args.out, **machine(), model=args.model, questions=args.questions, group_size=args.group_size,
              prompt_tokens=statistics.fmean(map(len, prompt_ids)), completion_tokens=statistics.fmean(map(len, ids)))
    parts = {"rollout": sample, "score": score, "update": gradient}
    measured = {way: [] for way in ("once", "each")}
    for i in range(args.rounds):
        logprobs = {}
        for way in measured if i % 2 == 0 else reversed(measured):
            with prompts_read_for_each() if way == "each" else contextlib.nullcontext():
                times = {f"t_{name}": seconds(part) for name, part in parts.items()}
            logprobs[way] = found["logprobs"]
            measured[way].append(times)
            log(part="shared prompts", prompts_read=way, round=i, **times, t_step=sum(times.values()))
        difference = (logprobs["once"] - logprobs["each"]).abs().max().item()
        assert difference < (0.1 if BITS == 16 else 1e-3), f"log-probs differ by {difference} nats"

    print("\nseconds      once      each     ratio")
    for name in measured["once"][0]:
        once, each = (statistics.median(times[name] for times in measured[way]) for way in ("once", "each"))
        print(f"{name[2:]:9} {once:8.3g} {each:9.3g} {each / once:9.2f}")
    print(f"log-probs differ by at most {difference:.1e} nats")


if __name__ == "__main__":
    main()
