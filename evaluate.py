# SPDX-License-Identifier: MIT
"""
Sample answers from one or several models, grade them, and compare.

    laptop, 20 seconds    python evaluate.py
    a benchmark           python evaluate.py --task math500 --data math500.jsonl --model org/model --bits 16
    what RL did           python evaluate.py --samples 64 --temperature 1 --out runs/eval --model toy runs/rl_student
                          python evaluate.py --compare runs/eval/toy runs/eval/runs_rl_student

A model sees the question alone and thinks in its tags; what follows its thought is graded (rlt/grading.py). With
--samples n the table has pass@k, the chance that one of k answers is right, estimated without bias (arXiv 2107.03374).
Results are eval_<task>.json and every sample in eval_<task>_samples.jsonl, in the run folder of the model. An answer
has up to 64 tokens on the toy, elsewhere 4096 or half the model's context, if --max-new-tokens and --protocol say
nothing else.

--compare splits what training did to pass@1 by two such evaluations: questions that were within the first model's
reach (self-distillation), new ones (capability gain), and lost ones (regression).
"""

import hashlib
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path

from rlt import flags
from rlt.checkpoints import check_writable
from rlt.console import print_progress, progress_bar
from rlt.distributed import WORLD, all_gather_object, init_distributed
from rlt.errors import UserError
from rlt.evaluations import (
    check_same_settings,
    print_comparison,
    print_results,
    read_evaluations,
    result_path,
    write_evaluation,
)
from rlt.files import write_atomically
from rlt.grading import (
    GOLD,
    GRADERS,
    MATH_TASKS,
    TASKS,
    answer_of,
    compare,
    gold_answer,
    gradable,
    grade,
    grade_all,
    over_questions,
    pass_at_k,
    pass_curve,
    same_text,
)
from rlt.rows import load_rows, map_rows
from rlt.runs import describe

__all__ = ["grade", "pass_at_k"]  # for `from evaluate import grade`, which needs no torch: main() imports it
LONG = 30_720  # tokens: Qwen2.5's context of 32,768, less 2,048 for the question
PROTOCOLS = {  # name: defaults of flags
    "ours": {},
    "skythought": {"temperature": 0.0, "samples": 1, "max_new_tokens": LONG},  # the paper's; asks for a box, as ours
    "avg@16": {"temperature": 0.6, "samples": 16, "max_new_tokens": LONG},
    "avg@64": {"temperature": 0.6, "samples": 64, "max_new_tokens": LONG},
}


def parse_flags():
    parser = flags.make_parser(__doc__)
    group = parser.add_argument_group("models and questions")
    group.add_argument("--model", nargs="+", type=flags.path, default=["toy", "runs/student"],
                       help="run folders, model folders, hub ids, toy")
    flags.add_bits(group, "--bits", "weights of the models' bases")
    group.add_argument("--task", choices=TASKS, default="toy", metavar="NAME",
                       help=f"what is asked and how it is graded: {', '.join(TASKS)}")
    flags.add_data(group, data="toy", what="what the task is graded by", columns=("question", "solution"))
    group.add_argument("--hinted", action="store_true", help="ask with each row's column `hint`; --compare: read such "
                       "evaluations, too")
    group = parser.add_argument_group("comparison, without a model")
    group.add_argument("--compare", nargs=2, type=flags.path, metavar=("BEFORE", "AFTER"),
                       help="compare the evaluations in two folders")
    group.add_argument("--floor", type=flags.path, metavar="FOLDER",
                       help="BEFORE evaluated with another --seed: what --compare finds by chance")
    group = parser.add_argument_group("answers")
    group.add_argument("--protocol", choices=PROTOCOLS, default="ours", metavar="NAME", help="defaults of the next "
                       f"three flags: {', '.join(PROTOCOLS)}; skythought is the paper's: greedy, one answer")
    group.add_argument("--samples", type=flags.number(int, 1), default=1, metavar="N", help="answers a question")
    flags.add_sampling(group, max_new_tokens=None, temperature=0.0, batch_flag="--batch-size", batch=128)
    group = parser.add_argument_group("system")
    flags.add_system(group)
    group.add_argument("--out", type=flags.path, metavar="FOLDER", help="write into a subfolder for each model here; "
                       "default: the run folder, runs/eval for other models")
    parser.set_defaults(**PROTOCOLS[parser.parse_args().protocol])
    args = parser.parse_args()  # a flag that is given wins over the protocol
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"--samples {args.samples} at --temperature 0 are all the same: pass 0.6, say")
    if not args.compare:
        flags.refuse(parser, args, "without --compare BEFORE AFTER", "floor")
    else:
        used = ("task", "hinted", "compare", "floor", "out", "quiet")
        flags.refuse(parser, args, "with --compare, which reads evaluations", *sorted({*vars(args)} - {*used}))
    if args.compare and WORLD > 1:
        parser.error("--compare runs no model: call it by python, not by torchrun")
    if args.data == "toy" and args.task != "toy" and not args.compare:
        parser.error(f"--task {args.task} needs --data, rows with {' and '.join(GOLD[args.task])}: see data/README.md")
    return parser, args


def compare_folders(args):
    """Print and write what changed between two evaluations, which are in their folders."""
    named = {"before": args.compare[0], "after": args.compare[1], "floor": args.floor}
    paths = {label: Path(folder) / f"eval_{args.task}.json" for label, folder in named.items() if folder}
    if args.hinted:
        paths |= {f"{label}, hinted": paths[label].with_stem(f"eval_{args.task}_hinted")
                  for label in ("before", "after")}
    report = compare(read_evaluations(paths))
    out = Path(args.out or named["after"]) / f"compare_{args.task}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps({"task": args.task, **named, **report, **describe(args)}) + "\n")
    print(out)
    print_comparison(report, args.floor)


# ---------------------------------------------------------------------------------------------------------
# one model


def prompt_encoder(name, prompts, context, args):
    """A function: row -> prompt ids. It raises UserError where prompt and answer are longer than the context."""

    def encode(row):
        ids = prompts.hinted_prompt(row) if args.hinted else prompts.question_prompt(row)
        if len(ids) + args.max_new_tokens > context:
            raise UserError(f"takes {len(ids)} tokens and --max-new-tokens {args.max_new_tokens} more, the context of "
                            f"{name} is {context}: lower it")
        return ids

    return encode


def sample(name, engine, prompt_ids, args, rank, world):
    """One completion for each prompt: every world-th batch on each rank, the same draws on any number of them."""
    from rlt.rollout import check_finite

    def draw(at, prompts, **settings):
        completions = engine.generate(prompts, key=(args.seed, "evaluate"), first=at, **settings)
        check_finite(name, completions)
        return [c._replace(logprobs=None) for c in completions]

    draw(0, prompt_ids[:1], max_new_tokens=1, temperature=0.0)  # see check_finite
    starts, drawn = range(0, len(prompt_ids), args.batch_size), []
    own = starts[rank::world]
    for at in progress_bar(own, desc=name, unit="batch"):
        drawn.append(draw(at, prompt_ids[at : at + args.batch_size], max_new_tokens=args.max_new_tokens,
                          temperature=args.temperature))
        print_progress(name, len(drawn) - 1, len(drawn), len(own), args.quiet)
    drawn = all_gather_object(drawn)
    return [c for i in range(len(starts)) for c in drawn[i % world][i // world]]


def summarize(name, rows, completions, outputs, args):
    """(summary, one line a sample) of a model's outputs, --samples of them for each row."""
    repeated = [row for row in rows for _ in range(args.samples)]
    golds = [gold_answer(args.task, row) for row in repeated]
    answers = [answer_of(args.task, output) for output in outputs]
    verdicts = {"grade": grade_all(args.task, outputs, repeated)}
    if args.task in MATH_TASKS:
        verdicts["string_match"] = [answer is not None and same_text(gold, answer)
                                    for gold, answer in zip(golds, answers, strict=True)]
    lines = [{"where": row["where"], "question": row["question"], "gold": golds[i], "output": outputs[i],
              "answer": answers[i], **{key: verdict[i] for key, verdict in verdicts.items()},
              "finished": completions[i].finished, "length": len(completions[i].ids)}
             for i, row in enumerate(repeated)]
    draws = {key: [[bool(right) for right in verdict[at : at + args.samples]]
                   for at in range(0, len(verdict), args.samples)] for key, verdict in verdicts.items()}
    accuracy = {key: over_questions([statistics.fmean(draw) for draw in table]) for key, table in draws.items()}
    math_verify = f"math-verify {version('math-verify')}" if args.task in MATH_TASKS else None
    return {
        "model": name, "task": args.task, "protocol": args.protocol, "grader": math_verify or GRADERS[args.task],
        "questions": len(rows), "hinted": args.hinted, "exact_match": accuracy.pop("grade"), **accuracy,
        "pass_at": pass_curve(draws["grade"]),
        "truncated": statistics.fmean(not c.finished for c in completions),
        "no_answer": statistics.fmean(answer is None for answer in answers),
        "length": statistics.fmean(len(c.ids) for c in completions),
        "timeouts": verdicts["grade"].count(None),
    }, lines


def main():
    parser, args = parse_flags()
    if args.compare:
        return compare_folders(args)
    from rlt import models
    from rlt.chat_template import vocabulary_size
    from rlt.dry_run import dry_run
    from rlt.footprint import ModelFootprint
    from rlt.prompts import Prompts, show_rows
    from rlt.rollout import make_engines

    device = models.pick_device(args.device)
    flags.choose_bits(parser, args, device)
    rank, world = init_distributed(device)
    paths = {name: result_path(name, models.resolve(name), args) for name in args.model}
    if advice := models.advice_on_task(args.task, *paths):
        raise UserError(advice)
    tokenizers = {name: models.load_tokenizer(name) for name in paths}
    prompts = {name: Prompts(tokenizer) for name, tokenizer in tokenizers.items()}
    contexts = {name: models.context_length(name) for name in paths}
    if args.max_new_tokens is None:
        args.max_new_tokens = 64 if args.task == "toy" else int(min(4096, *(n // 2 for n in contexts.values())))
    encoders = {name: prompt_encoder(name, prompts[name], contexts[name], args) for name in paths}

    # the questions: all models get the same
    rows = load_rows(models.data_source(args.data, "test"), require_solution=False, **flags.row_options(args))
    rows = gradable(args.task, rows)
    for encode in encoders.values():
        rows = [row for row, _ in map_rows(rows, encode, args.skip_bad_rows)]
    if not rows:
        raise UserError(f"no question fits: lower --max-new-tokens {args.max_new_tokens}.")
    if args.show_rows:
        return print(show_rows(next(iter(prompts.values())), rows, args.show_rows, args.skip_bad_rows))
    questions = json.dumps([[row["question"], gold_answer(args.task, row)] for row in rows])
    questions_hash = hashlib.sha256(questions.encode()).hexdigest()[:16]
    for path in paths.values():
        check_writable(path.parent)
        if args.dry_run is None:
            check_same_settings(path, args, questions_hash)

    prompt_ids = {name: [ids for row in rows for ids in [encode(row)] * args.samples]
                  for name, encode in encoders.items()}
    longest = max(len(ids) for name in paths for ids in prompt_ids[name])
    if args.dry_run is not None:
        codes = []
        for name in paths:
            print(name)
            footprint = ModelFootprint(**models.model_and_adapter_config(name), bits=args.bits,
                                       gpu=args.dry_run > 0 or device.type == "cuda")
            batch = min(args.batch_size, len(prompt_ids[name]))
            codes.append(dry_run(args, device, footprint, vocab=vocabulary_size(tokenizers[name]),
                                 row=longest + args.max_new_tokens, rollout=(batch, longest, args.max_new_tokens)))
        sys.exit(max(codes))

    results = []
    for name, engine in make_engines(args, longest, tokenizers, device):
        # 1. sample
        completions = sample(name, engine, prompt_ids[name], args, rank, world)
        del engine  # before the next model is loaded
        if rank:
            continue

        # 2. grade
        outputs = [prompts[name].turn_text(completion) for completion in completions]
        summary, lines = summarize(name, rows, completions, outputs, args)
        prompt_hash = hashlib.sha256(repr(prompts[name].question_prompt({"question": ""})).encode()).hexdigest()[:8]
        results.append(summary | {"prompt_hash": prompt_hash, "questions_hash": questions_hash})

        # 3. write the summary and every sample
        write_evaluation(paths[name], results[-1] | {"device": str(device)} | describe(args), lines)
        print(f"{paths[name]}, and every sample in {paths[name].stem}_samples.jsonl")

    if rank == 0:
        print_results(results, args)


if __name__ == "__main__":
    main()
