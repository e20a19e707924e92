# SPDX-License-Identifier: MIT
"""
Evaluations as files and tables: where they are written, when they may be replaced, how they are read and printed.

    eval_<task>.json             exact_match, pass_at, truncated, length, and the flags they were made with
    eval_<task>_samples.jsonl    one object a sample: question, gold, output, answer, grade
"""

import argparse
import json
import shlex
from pathlib import Path

from rlt.console import print_next
from rlt.errors import UserError
from rlt.files import path_from_here, read_jsonl, write_atomically
from rlt.flags import carry, flags_of_run
from rlt.grading import task_of
from rlt.paper import QUESTIONS, TABLE_1
from rlt.rows import load_rows

SETTINGS = ("samples", "temperature", "max_new_tokens", "seed", "bits", "batch_size", "engine")  # of the draws
SHOWN = ("Qwen2.5-7B-Instruct", "Bespoke-7B", "RLT-7B", "RLT-32B")  # of the paper, below one's own results


def result_path(name, folder, args):
    """Where the evaluation of a model is written: its run folder, or --out or runs/eval with a subfolder of its name.

    folder: what models.resolve made of the name.
    """
    run = Path(path_from_here(Path(folder).parent if Path(folder).name == "final" else folder))
    if args.out or not _is_run_folder(run):
        run = Path(args.out or "runs/eval") / "_".join(part for part in Path(name).parts if part != "/")
    return run / f"eval_{args.task}{'_hinted' * args.hinted}.json"


def _is_run_folder(folder):
    """Whether a script of this repository made it: a run's config.json has its flags, the toy's folder its rows."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ("flags" in config or (folder / "test.jsonl").is_file())


def read_summary(path):
    """The summary of an evaluation. Raises UserError where the file is something else."""
    try:
        summary = json.loads(path.read_text())
        return summary | {"flags": dict(summary["flags"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not what evaluate.py writes: move it away, or pass another folder.") from None


def check_same_settings(path, args, questions_hash):
    """An evaluation is replaced only by one with the same settings and questions."""
    if not path.exists():
        return
    before = read_summary(path)
    flags, now = before["flags"], vars(args)
    different = [f"{key} = {flags[key]}, now {now[key]}" for key in SETTINGS if flags.get(key, now[key]) != now[key]]
    if before.get("questions_hash", questions_hash) != questions_hash:
        different.append("other questions, or another number of them")
    if different:
        raise UserError(f"{path} was made with {'; '.join(different)}. Pass --out FOLDER to keep both.")


def print_evaluation_command(parser, args, task=None):
    """Print the command that evaluates the student in args.out beside the model that it was trained from.

    The questions are those that its training began with: of distilled rows, those that distill.py was given. task: how
    they are graded, if the script knows.
    """
    from rlt import models

    toy, columns = models.is_toy(args.model), ("question_column", "solution_column")
    distilled = flags_of_run(args.data, "distill.py")
    asked = argparse.Namespace(**{"limit": None} | vars(args) | distilled)
    asked.data = distilled.get("score_file") or asked.data
    command = f"evaluate.py --model {shlex.quote(models.short_name(args.model))} {shlex.quote(args.out)}"
    command += carry(parser, args, "bits", "device",
                     **({"batch_size": "rollout_batch"} if "rollout_batch" in args else {}))
    if toy and asked.data == "toy":
        return print_next(command)
    if task is None and not toy:
        options = {name: getattr(asked, name, None) for name in columns}
        try:
            rows = load_rows(models.data_source(asked.data, "train"), **options, limit=100, skip_bad=True,
                             require_solution=False)
        except UserError:  # they have been moved since
            return None
        task = task_of(rows)
    elif toy:
        task = "toy"
    if task is None:
        return print(f"evaluate.py can't grade the rows of {asked.data}: it needs a column `answer`, or solutions with "
                     "a \\boxed{} answer (data/README.md).")
    for name in ("data", *columns):
        if getattr(asked, name, None):
            command += f" --{name.replace('_', '-')} {shlex.quote(str(getattr(asked, name)))}"
    command += " --skip-bad-rows" * bool(asked.skip_bad_rows)
    print_next(f"{command} --task {task}", "on the questions that it was trained on: give --data others, if you can")


def write_evaluation(path, summary, samples):
    """The two files of an evaluation: its samples, then `path`, in the same folder. So there is never a summary without
    its samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_name(f"{path.stem}_samples.jsonl"), "".join(json.dumps(line) + "\n" for line in samples))
    write_atomically(path, json.dumps(summary, indent=2) + "\n")


def read_evaluations(paths):
    """label -> draws, from label -> an eval_<task>.json, whose samples are in the same folder.

    Raises UserError where one is missing, was made with other settings or questions than `before`, or where
    `floor` has the same seed, and so the same draws.
    """
    tables, first = {}, None
    for label, path in paths.items():
        if not path.is_file():
            raise UserError(f"{path} is missing: evaluate first, --samples 64 --temperature 1, say.")
        settings, samples = read_summary(path)["flags"], read_jsonl(path.with_name(f"{path.stem}_samples.jsonl"))
        if not samples or len(samples) % settings["samples"]:
            raise UserError(f"{path.stem}_samples.jsonl beside {path} has {len(samples)} lines, expected "
                            f"{settings['samples']} for each question: evaluate again.")
        settings["questions"] = [(sample["question"], sample["gold"]) for sample in samples]
        first, n = first or settings, settings["samples"]
        for what in ("samples", "temperature", "max_new_tokens", "questions"):
            if settings[what] != first[what]:
                raise UserError(f"{path} and {paths['before']} differ in {what}: evaluate both alike.")
        if label == "floor" and settings["seed"] == first["seed"]:
            raise UserError(f"{path} has the seed of {paths['before']}: evaluate with another --seed.")
        right = [bool(sample["grade"]) for sample in samples]
        tables[label] = [right[at : at + n] for at in range(0, len(right), n)]
    return tables


# ---------------------------------------------------------------------------------------------------------
# tables


def percent(share):
    """A share of over_questions as text: mean and standard error. It has none where all questions are alike."""
    error = share["standard_error"]
    return f"{100 * share['mean']:.1f}" + (f" ± {100 * error:.1f}" if error else "") + " %"


def print_table(table):
    """Print rows of texts, the first of them the header, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_results(results, args):
    """The table of all models, the paper's numbers of the same task, and what the columns mean."""
    pass_ks = [k for k in results[0]["pass_at"] if k > 1]
    twice = "string_match" in results[0]
    paper = {name: TABLE_1[name][args.task] for name in SHOWN if args.task in QUESTIONS}
    table = [["model", "task", "questions", "exact match", *["string match"] * twice,
              *(f"pass@{k}" for k in pass_ks), "truncated", "length", "grader"]]
    for r in results:
        shares = [r["exact_match"], *([r["string_match"]] if twice else []), *(r["pass_at"][k] for k in pass_ks)]
        table.append([r["model"], r["task"] + ", hinted" * r["hinted"], str(r["questions"]), *map(percent, shares),
                      f"{100 * r['truncated']:.1f} %", f"{r['length']:.1f}", r["grader"]])
    for name, score in paper.items():
        blanks = [""] * (len(table[0]) - 5)
        table.append([f"{name} (paper)", args.task, "", f"{score:.1f} %", *blanks, "SkyThought's"])
    print_table(table)
    print(f"protocol {args.protocol} | samples {args.samples} | temperature {args.temperature:g} | top_p 1 | seed "
          f"{args.seed} | max new tokens {args.max_new_tokens} | bits {args.bits} | prompt {results[0]['prompt_hash']}")
    notes = ["± standard error over questions", "truncated: cut off at --max-new-tokens", "length: mean tokens"]
    notes += ["string match: the same answers, compared as text"] * twice
    notes += ["(paper): as printed in arXiv 2506.08388, not measured here"] * bool(paper)
    print(" | ".join(notes))
    for r in results:
        if r["timeouts"]:
            print(f"{r['model']}: the grader ran out of time on {r['timeouts']} answers: counted as wrong")
        if r["no_answer"]:
            print(f"{r['model']}: no answer was found in {100 * r['no_answer']:.1f} % of the outputs")


def print_comparison(report, floor):
    """pass@k of the evaluations that grading.compare has compared, and what training changed. floor: its name."""
    curves, split, n, k = (report[name] for name in ("pass_at", "split", "samples", "reach"))
    print_table([["pass@k", *map(str, curves["before"])],
                 *([label, *map(percent, curve.values())] for label, curve in curves.items())])
    print_table([["before against", *split],
                 *([name.replace("_", " "), *(percent(shares[name]) for shares in split.values())]
                   for name in split["after"])])
    reach = f"the first {k} of {n}" if k < n else f"all {n}"
    print(f"{report['questions']} questions | solved: by the first draw | within reach: by {reach} | "
          f"floor: {floor or 'none, pass --floor'}")
