# SPDX-License-Identifier: MIT
"""
Evaluations as files and tables: where the two files of one are written, when they may be replaced, how they are read.

    eval_<task>.json             accuracy, pass@k, truncated, length, and the flags they were made with
    eval_<task>_samples.jsonl    one object a sample: question, gold, output, answer, grade
"""

import json
from pathlib import Path

from rlt.errors import UserError
from rlt.runs import read_jsonl

SETTINGS = ("samples", "temperature", "max_new_tokens", "seed", "bits", "batch_size")  # what an evaluation depends on


def percent(share):
    """A share of over_questions as text: mean and standard error."""
    error = share["standard_error"]
    return f"{100 * share['mean']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "") + " %"


def print_table(table):
    """Print rows of texts, the first of them the header, in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def result_path(name, folder, args):
    """Where the evaluation of a model is written: its run folder, or --out or runs/eval with a subfolder of its name.

    folder: what models.resolve made of the name.
    """
    run = Path(folder).parent if Path(folder).name == "final" else Path(folder)
    if args.out or not _is_run_folder(run):
        run = Path(args.out or "runs/eval") / name.strip("/").replace("/", "_")
    return run / f"eval_{args.task}{'_hinted' * args.hinted}.json"


def _is_run_folder(folder):
    """Whether a script of this repository made it: a run's config.json has its flags, the toy's folder its rows."""
    try:
        return "flags" in json.loads((folder / "config.json").read_text()) or (folder / "test.jsonl").is_file()
    except (OSError, ValueError):
        return False


def check_same_settings(path, args, questions_hash):
    """An evaluation is replaced only by one with the same settings and questions."""
    if not path.exists():
        return
    before = json.loads(path.read_text())
    now = {key: getattr(args, key) for key in SETTINGS} | {"questions_hash": questions_hash}
    before = before["flags"] | {"questions_hash": before.get("questions_hash", questions_hash)}
    different = [f"{key} = {before[key]}, now {now[key]}" for key in now if before.get(key, now[key]) != now[key]]
    if different:
        raise UserError(f"{path} was made with {'; '.join(different)}. Pass --out FOLDER to keep both.")


def read_evaluations(paths):
    """label -> draws, from label -> an eval_<task>.json, whose samples are in the same folder.

    Raises UserError where one is missing, was made with other settings or questions than `before`, or where
    `floor` has the same seed, and so the same draws.
    """
    tables, first = {}, None
    for label, path in paths.items():
        if not path.is_file():
            raise UserError(f"{path} is missing: evaluate first, --samples 64 --temperature 1, say.")
        settings = json.loads(path.read_text())["flags"]
        samples = read_jsonl(path.with_name(f"{path.stem}_samples.jsonl"))
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
