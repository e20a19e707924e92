# SPDX-License-Identifier: MIT
"""
Sample answers from one or several models, grade them, and compare.

A model sees the question alone and thinks in its tags; what it says after its thought is graded. With
--samples n the table has pass@k too, the chance that one of k answers is right, estimated without bias
(arXiv 2107.03374). Every sample is kept beside the model, so that any number can be looked into.

--compare reads two such evaluations and says what RL did in between: pass@k before and after, and how much of
the gain in pass@1 was in the model's reach before (self-distillation), how much is new (capability gain).

    toy              the text between the solution tags, word for word
    gsm8k            the last \\boxed{}, else the number after "####", else the last number; by math-verify
    math500, aime24  the last \\boxed{}; by math-verify, whose verdicts are its own: 50% is .5, (1,2) is {1,2}
    countdown        the last \\boxed{}, else the solution block: + - * /, each number once, exact fractions

    laptop, 20 seconds    python evaluate.py
    a benchmark           python evaluate.py --task math500 --data math500.jsonl --model org/model --bits 16
    what RL did           python evaluate.py --samples 64 --temperature 1 --model toy runs/rl_student
                          python evaluate.py --compare runs/toy runs/rl_student
"""

import ast
import json
import logging
import math
import operator
import re
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import runs
from prompts import SOLUTION, THOUGHT
from runs import number, read_jsonl, seed_for

GOLD = {  # the columns of a row that its answers are graded by
    "toy": ["solution"],
    "gsm8k": ["answer"],
    "math500": ["answer"],
    "aime24": ["answer"],
    "countdown": ["nums", "target"],
}


def grade(task, output, row):
    """Whether a model's output, its whole turn as text, answers the row.

    Raises ValueError where the row's own answer is missing or unreadable: that is no verdict on the output.
    math-verify takes forever on some outputs: grade_all is the one with a time limit.
    """
    gold, answer = _gold(task, row), answer_of(task, output)
    if answer is None:
        return False
    if task == "toy":
        return answer.split() == gold.split()
    if task == "countdown":
        return _reaches(answer, **gold)
    return _equivalent(gold, answer)


def answer_of(task, output):
    """The answer that an output gives, as text, or None. An output that is still thinking gives none."""
    opened, closed = (output.rfind(tag) for tag in THOUGHT)
    if opened > closed:
        return None
    said = output[closed + len(THOUGHT[1]) :] if closed >= 0 else output
    opening, closing = SOLUTION
    _, *blocks = said.split(opening)
    block = blocks[0].partition(closing)[0].strip() if len(blocks) == 1 and closing in blocks[0] else None
    if task == "toy":
        return block
    _, *boxes = re.split(r"\\boxed\s*\{", said)
    if boxes:
        return _until_closed(boxes[-1])
    if task == "gsm8k":
        _, mark, rest = said.rpartition("####")
        numbers = re.findall(r"(?<!\d)-?\d+(?:,\d{3})*(?:\.\d+)?", rest)
        return numbers[0 if mark else -1] if numbers else None
    return block if task == "countdown" else None


def gradable(task, rows):
    """The rows whose own answer the grader can read; the number of the others is printed."""
    kept = []
    for row in rows:
        gold = _gold(task, row)
        try:
            if task in ("toy", "countdown") or _equivalent(gold, gold):
                kept.append(row)
        except ValueError:
            pass
    if not kept:
        raise ValueError(f"no row has an answer that --task {task} can grade: is it the task of --data?")
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} of {len(rows)} rows have an answer the grader can't read: left out")
    return kept


def grade_all(task, outputs, rows, *, seconds=5.0, workers=2):
    """grade() of each output with its row, in processes with a time limit -> list of True, False or None.

    None counts as wrong: grading took more than `seconds`, or its process was killed, say for its memory.
    """
    rows = [{column: row.get(column) for column in [*GOLD[task], "where"]} for row in rows]
    pairs = list(zip(outputs, rows, strict=True))
    grades = [None] * len(pairs)
    with ThreadPoolExecutor(workers) as pool:
        shards = pool.map(lambda at: _grade_in_process(task, pairs[at::workers], seconds), range(workers))
        for at, shard in enumerate(shards):
            grades[at::workers] = shard
    return grades


def pass_at_k(n, c, k):
    """Chance that one of k samples is right, when they are drawn from n samples of which c are right.

    1 - C(n - c, k) / C(n, k) is an unbiased estimate of pass@k; 1 - (1 - c / n)^k is not.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k of n={n}, c={c}, k={k}: expected 0 <= c <= n and 1 <= k <= n.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def over_questions(values):
    """Mean of one value per question, and its standard error (None where there is one question)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def pass_curve(draws):
    """pass@k over questions, k = 1, 2, 4, ... n. draws: a row of n for each question, True where right."""
    n = len(draws[0])
    ks = sorted({*(2**i for i in range(n.bit_length())), n})
    return {k: over_questions([pass_at_k(n, sum(row), k) for row in draws]) for k in ks}


def solved_sets(before, after, k):
    """What RL did to which questions: name -> set of their indices. After arXiv 2506.13923, the draws fixed.

    before, after: draws of the same M questions, as pass_curve takes them. A question is solved if its first
    draw is right, and within reach if only another of its first k before RL is. By first draws, exactly:

        pass@1 after - pass@1 before = (|self_distillation| + |capability_gain| - |regression|) / M

    k draws can miss by chance: capability_gain_all_draws was out of reach of all n.
    """
    everyone = set(range(len(before)))
    solved, now = ({i for i in everyone if draws[i][0]} for draws in (before, after))
    reach = {i for i in everyone if any(before[i][:k])} - solved
    beyond = everyone - solved - reach
    assert len(now) - len(solved) == len(reach & now) + len(beyond & now) - len(solved - now)
    return {
        "solved_before": solved, "within_reach": reach, "out_of_reach": beyond, "solved_after": now,
        "self_distillation": reach & now, "capability_gain": beyond & now, "regression": solved - now,
        "retained": solved & now, "capability_gain_all_draws": {i for i in now if not any(before[i])},
    }


def compare(draws, k=16):
    """pass@k of label -> draws, and solved_sets of `before` and `after`, as shares and indices of questions.

    The same of `before` and `floor`, where that is there: the same model by another seed, chance and no more.
    k: 16 as in the paper, or all n draws where n is less.
    """
    before, n = draws["before"], len(draws["before"][0])
    report = {"questions": len(before), "samples": n, "reach": min(k, n), "split": {}}
    report["pass_at"] = {label: pass_curve(rows) for label, rows in draws.items()}
    for label in [label for label in ("after", "floor") if label in draws]:
        report["split"][label] = {
            name: over_questions([i in chosen for i in range(len(before))]) | {"questions": sorted(chosen)}
            for name, chosen in solved_sets(before, draws[label], k).items()
        }
    return report


def read_alike(paths):
    """label -> draws, from label -> an eval_<task>.json with its samples beside it.

    Raises FileNotFoundError where one is missing; ValueError where one was asked anything else than `before`,
    or where `floor` has the same seed, and so the same draws.
    """
    tables, first = {}, None
    for label, path in paths.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: evaluate first, --samples 64 --temperature 1, say.")
        asked = json.loads(path.read_text())["flags"]
        samples = read_jsonl(path.with_name(f"{path.stem}_samples.jsonl"))
        asked["questions"] = [(sample["question"], sample["gold"]) for sample in samples]
        first, n = first or asked, asked["samples"]
        for what in ("samples", "temperature", "max_new_tokens", "questions"):
            if asked[what] != first[what]:
                raise ValueError(f"{path} and {paths['before']} differ in {what}: evaluate both alike.")
        if label == "floor" and asked["seed"] == first["seed"]:
            raise ValueError(f"{path} has the seed of {paths['before']}: evaluate with another --seed.")
        right = [bool(sample["grade"]) for sample in samples]
        tables[label] = [right[at : at + n] for at in range(0, len(right), n)]
    return tables


# ---------------------------------------------------------------------------------------------------------
# how it is graded


def _gold(task, row):
    if task not in GOLD:
        raise ValueError(f"task {task!r}: expected one of {', '.join(GOLD)}.")
    gold = {column: row.get(column) for column in GOLD[task]}
    if None in gold.values():
        raise ValueError(f"{row['where']} has no {' and '.join(gold)}, which --task {task} is graded by.")
    if task == "countdown":
        if any(type(number) is not int for number in (*gold["nums"], gold["target"])):
            raise ValueError(f"{row['where']} has {gold}: expected whole numbers.")
        return gold
    (answer,) = gold.values()
    return answer.rpartition("####")[2].strip() if task == "gsm8k" else str(answer)


def _until_closed(text):
    """The text up to the brace that closes it; None if that is nothing, or the brace never comes."""
    depth = 1
    for brace in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # an escaped brace, \{, opens nothing
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[: brace.start()].strip() or None


def _equivalent(gold, answer):
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # at each call it warns that its alarm is off
    expected, got = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (gold, answer))
    if not expected:
        raise ValueError(f"math-verify can't read the row's own answer {gold!r}: leave that row out.")
    return verify(expected, got, timeout_seconds=None)  # it is not symmetric: gold goes first


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SYMBOLS = {"\\times": "*", "\\cdot": "*", "×": "*", "\\div": "/", "÷": "/", "−": "-",
           "\\left": "", "\\right": ""}
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def _reaches(expression, nums, target):
    """Whether the expression has each of the numbers exactly once, no other, and the target as its value."""
    if len(expression) > 200:
        return False
    for symbol, sign in SYMBOLS.items():
        expression = expression.replace(symbol, sign)
    while (plain := FRACTION.sub(r"((\1)/(\2))", expression)) != expression:
        expression = plain
    expression = expression.partition("=")[0].strip()  # "(3 + 4) * 2 = 14" says no more than its left side
    if not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return False
    used = []

    def value(node):
        match node:
            case ast.BinOp(left, op, right) if type(op) in OPERATIONS:  # no powers: nothing grows huge
                return OPERATIONS[type(op)](value(left), value(right))
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.Constant(number):
                used.append(number)
                return Fraction(number)
        raise ValueError("more than + - * / of whole numbers")

    try:
        return value(ast.parse(expression, mode="eval").body) == target and sorted(used) == sorted(nums)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False


def _grade_in_process(task, pairs, seconds):
    """Grades of one answer after the other, by a process that dies of one that takes too long."""
    grades = []
    command = [sys.executable, "-c", f"import evaluate; evaluate._serve({task!r}, {seconds})"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while len(grades) < len(pairs):
        with subprocess.Popen(command, cwd=Path(__file__).resolve().parent, **pipes) as worker:
            for pair in pairs[len(grades) :]:
                worker.stdin.write(json.dumps(pair) + "\n")
                worker.stdin.flush()
                reply = worker.stdout.readline()
                if not reply and worker.wait() > 0:  # below 0 a signal ended it
                    raise RuntimeError("a grading process failed: its traceback stands above")
                verdict = json.loads(reply) if reply else None
                if isinstance(verdict, str):
                    raise ValueError(verdict)
                grades.append(verdict)
                if not reply:
                    break
    return grades


def _serve(task, seconds):
    """A grading process: [output, row] on each line of stdin; on stdout the verdict, or an error's text."""
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints may pass for a verdict
    if task not in ("toy", "countdown"):
        _equivalent("1", "1")  # imports that take seconds
    for line in sys.stdin:
        # unhandled, so that it ends the process even inside one long multiplication, where no handler runs
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = grade(task, *json.loads(line))
        except ValueError as error:
            verdict = str(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    import hashlib
    from importlib.metadata import version

    import memory
    import models
    from prompts import Prompts, load_rows
    from tqdm import tqdm

    # -----------------------------------------------------------------------------------------------------
    parser = runs.flags(__doc__)
    parser.add_argument("--task", choices=GOLD, default="toy", help="what is asked, and how it is graded")
    parser.add_argument("--model", nargs="+", default=["toy", "runs/student"], help="run folders, folders, "
                        "hub ids, toy")
    parser.add_argument("--bits", type=int, choices=(4, 16, 32), default=32, help="bits of the models' bases")
    parser.add_argument("--data", default=None, help="rows: file or hub id; None: the toy's test rows")
    parser.add_argument("--limit", type=number(int, 1), default=None, help="use the first rows only")
    parser.add_argument("--hinted", action="store_true", help="ask with each row's column `hint`; --compare: "
                        "read such evaluations, too")
    # comparison
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), default=None, help="run no model, "
                        "read the evaluations in two folders")
    parser.add_argument("--floor", default=None, help="folder of BEFORE evaluated by another --seed: what "
                        "--compare finds by chance")
    # answers
    parser.add_argument("--samples", type=number(int, 1), default=1, help="answers a question")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="of sampling; 0: greedy")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=None, help="limit of an answer; "
                        "None: 64 for the toy, 4096 elsewhere")
    # system
    parser.add_argument("--batch-size", type=number(int, 1), default=128, help="answers sampled side by side")
    parser.add_argument("--engine", choices=("batch", "continuous"), default="batch", help="side by side until the "
                        "last has ended, or continuous batching, where the next one starts as soon as another ends")
    parser.add_argument("--cache-tokens", type=number(int, 1), default=2**18, help="tokens, prompts included, that "
                        "--engine continuous may hold keys and values of; 2**18 of Qwen2.5-7B take 15 GB")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of every draw")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--dry-run", nargs="?", metavar="GB", const=0.0, type=number(float, above=0),
                        help="check flags, rows and disk, estimate the memory, and stop; GB: of the GPU "
                        "meant; none: this machine")
    parser.add_argument("--out", default=None, help="folder with a folder of results for each model; "
                        "None: beside the model, or in runs/ for a hub id")
    args = parser.parse_args()
    if args.samples > 1 and args.temperature == 0:
        parser.error(f"--samples {args.samples} at --temperature 0 are all the same: pass 0.6, say")
    if args.floor and not args.compare:
        parser.error("--floor does nothing without --compare BEFORE AFTER")
    if args.compare and runs.WORLD > 1:
        parser.error("--compare runs no model: call it by python, not by torchrun")
    if args.data is None and args.task != "toy" and not args.compare:
        columns = " and ".join(GOLD[args.task])
        parser.error(f"--task {args.task} needs --data, rows with {columns}: see data/README.md")
    args.max_new_tokens = args.max_new_tokens or (64 if args.task == "toy" else 4096)
    # -----------------------------------------------------------------------------------------------------

    def percent(share):
        error = share["standard_error"]
        return f"{100 * share['mean']:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "") + " %"

    def show(table):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print()
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    # 0. or look at what is there
    if args.compare:
        named = {"before": args.compare[0], "after": args.compare[1], "floor": args.floor}
        paths = {label: Path(folder) / f"eval_{args.task}.json" for label, folder in named.items() if folder}
        if args.hinted:
            paths |= {f"{label}, hinted": paths[label].with_stem(f"eval_{args.task}_hinted")
                      for label in ("before", "after")}
        report = compare(read_alike(paths))
        out = Path(named["after"]) / f"compare_{args.task}.json"
        summary = json.dumps({"task": args.task, **named, **report, **runs.describe(args)})
        runs.write_atomically(out, summary + "\n")
        print(out)
        curves, split, n, k = (report[name] for name in ("pass_at", "split", "samples", "reach"))
        show([["pass@k", *map(str, curves["before"])],
              *([label, *map(percent, curve.values())] for label, curve in curves.items())])
        show([["before against", *split],
              *([name.replace("_", " "), *(percent(shares[name]) for shares in split.values())]
                for name in split["after"])])
        reach = f"the first {k} of {n}" if k < n else f"all {n}"
        print(f"{report['questions']} questions | solved: by the first draw | within reach: by {reach} | "
              f"floor: {args.floor or 'none, pass --floor'}")
        sys.exit()

    device = models.pick_device(args.device)
    rank, world = runs.join(device)
    folders = {name: Path(models.resolve(name)) for name in args.model}  # all of them, before any is run
    source = models.rows_of(args.data or "toy", "test")
    rows = gradable(args.task, load_rows(source, limit=args.limit, solved=args.task != "countdown"))
    asked = [row for row in rows for _ in range(args.samples)]  # question i // samples
    grader = {"toy": "exact match", "countdown": "exact fractions"}.get(args.task)
    grader = grader or f"math-verify {version('math-verify')}"
    results = []
    for name in args.model:
        tokenizer = models.load_tokenizer(name)
        prompts = Prompts(tokenizer)
        questions = [prompts.hinted(row) if args.hinted else prompts.question(row) for row in asked]
        longest, context = max(map(len, questions)), models.context_of(name)
        if longest + args.max_new_tokens > context:
            raise ValueError(f"{name} has a context of {context} tokens, the longest question has {longest}, "
                             f"--max-new-tokens is {args.max_new_tokens}: lower it, or leave the row out.")
        if args.dry_run is not None:
            shape = memory.Shape(**models.anatomy(name), bits=args.bits, gpu=args.dry_run > 0 or device.type == "cuda")
            rollout = min(args.batch_size, len(asked)), longest, args.max_new_tokens
            print(name)
            results.append(memory.dry_run(
                args, device, shape, vocab=len(tokenizer), row=longest + args.max_new_tokens, rollout=rollout))
            continue
        model = models.load_model(name, bits=args.bits, device=device)

        # 1. sample: every world-th batch on each rank, the same draws on any number of them
        starts, drawn = range(0, len(asked), args.batch_size), []
        for at in tqdm(starts[rank::world], desc=name, unit="batch", dynamic_ncols=True, disable=rank > 0):
            batch = models.generate(
                model, tokenizer, questions[at : at + args.batch_size], max_new_tokens=args.max_new_tokens,
                temperature=args.temperature, seed=seed_for(args.seed, "evaluate", at), engine=args.engine,
                cache_tokens=args.cache_tokens)
            drawn.append([c._replace(logprobs=None) for c in batch])  # nobody reads them
        drawn = runs.gather(drawn)
        completions = [c for i in range(len(starts)) for c in drawn[i % world][i // world]]
        outputs = [tokenizer.decode(c.ids[:-1] if c.finished else c.ids) for c in completions]
        del model  # before the next one is loaded
        if rank:
            continue

        # 2. grade, and count by question
        grades = grade_all(args.task, outputs, asked)
        right = [bool(verdict) for verdict in grades]
        draws = [right[at : at + args.samples] for at in range(0, len(right), args.samples)]
        results.append({
            "model": name,
            "task": args.task,
            "grader": grader,
            "questions": len(rows),
            "hinted": args.hinted,
            "exact_match": over_questions([statistics.fmean(row) for row in draws]),
            "pass_at": pass_curve(draws),
            "truncated": statistics.fmean(not c.finished for c in completions),
            "length": statistics.fmean(len(c.ids) for c in completions),
            "timeouts": grades.count(None),
            "prompt_hash": hashlib.sha256(repr(prompts.question({"question": ""})).encode()).hexdigest()[:8],
        })

        # 3. keep every sample
        folder = folders[name].parent if folders[name].name == "final" else folders[name]
        if args.out or not folder.is_dir():
            folder = Path(args.out or "runs") / name.strip("/").replace("/", "_")
            folder.mkdir(parents=True, exist_ok=True)
        kept = [{"where": row["where"], "question": row["question"], "gold": _gold(args.task, row),
                 "output": output, "answer": answer_of(args.task, output), "grade": verdict,
                 "finished": c.finished, "length": len(c.ids)}
                for row, output, verdict, c in zip(asked, outputs, grades, completions, strict=True)]
        summary = json.dumps(results[-1] | {"device": str(device)} | runs.describe(args), indent=2)
        stem = f"eval_{args.task}" + ("_hinted" if args.hinted else "")
        runs.write_atomically(folder / f"{stem}.json", summary + "\n")
        runs.write_atomically(folder / f"{stem}_samples.jsonl",
                              "".join(json.dumps(sample) + "\n" for sample in kept))
        print(f"{folder}/{stem}.json, and every sample in {stem}_samples.jsonl")

    if args.dry_run is not None:
        sys.exit(max(results))
    if rank:
        sys.exit()
    table = [["model", "task", "questions", "exact match",
              *(f"pass@{k}" for k in results[0]["pass_at"] if k > 1), "truncated", "length", "grader"]]
    for r in results:
        table.append([r["model"], r["task"] + ", hinted" * r["hinted"], str(r["questions"]),
                      percent(r["exact_match"]),
                      *(percent(share) for k, share in r["pass_at"].items() if k > 1),
                      f"{100 * r['truncated']:.1f} %", f"{r['length']:.1f}", r["grader"]])
    show(table)
    print(f"samples {args.samples} | temperature {args.temperature:g} | top_p 1 | seed {args.seed} | "
          f"max new tokens {args.max_new_tokens} | bits {args.bits} | prompt {results[0]['prompt_hash']}")
    for r in results:
        if r["timeouts"]:
            print(f"{r['model']}: the grader ran out of time on {r['timeouts']} answers: counted as wrong")
