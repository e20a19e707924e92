# SPDX-License-Identifier: MIT
"""
Command-line flags that several scripts have, in groups. A script passes its own defaults and adds its own flags.
"""

import argparse
import difflib
import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path

from rlt.defaults import DEFAULTS
from rlt.distributed import RANK
from rlt.errors import FLAGS, UserError, flag_of, print_user_errors
from rlt.report import REPORTS

print_user_errors()  # before a script imports torch, which takes seconds: Ctrl-C may come in them

RENAMED = {  # old flag: what it is now. Config files of old runs are read with these, too
    "max_sampler_gap": "max_logprob_diff",
    "final_lr": "final_lr_fraction",
}
RENAMED_SWITCHES = {"hints": ("failed_groups", {True: "guide", False: "none"})}  # old switch: its flag, its values
ENGINES = ("transformers", "vllm")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is; a flag, its help and its default on one line where they fit."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=31, width=min(shutil.get_terminal_size((120, 0)).columns, 120))

    def _get_help_string(self, action):
        hidden = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        shown = action.option_strings and not hidden
        text = action.help.removesuffix(" (default: %(default)s)")  # a switch's, before Python 3.13
        return f"{text} [%(default)s]" if shown else text


class _Parser(argparse.ArgumentParser):
    """No abbreviations, a hint for a flag that is not known, and a resumed run's own flags."""

    def parse_args(self, args=None, namespace=None):
        FLAGS.update(self._option_string_actions)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._explain_unknown(unknown[0]))
        if vars(parsed).get("resume"):
            self._take_flags_of_run(parsed, self._given(args))
        if vars(parsed).get("quiet"):
            os.environ["TQDM_DISABLE"] = "1"  # for scripts that this one starts, too
        return parsed

    def _given(self, args):
        """The names of the flags that are on the command line."""
        unset = object()
        marked = argparse.Namespace(**{action.dest: unset for action in self._actions})
        return {name for name, value in vars(self.parse_known_args(args, marked)[0]).items() if value is not unset}

    def _take_flags_of_run(self, parsed, given):
        """--resume: flags that are not given are those that --out was started with, if this script has written it."""
        before, taken = flags_of_run(parsed.out, self.prog), []
        for action in self._actions:
            name, flag = action.dest, action.option_strings[0]
            if name in before and name not in given | {"resume", "show_rows", "dry_run", "quiet", "out"}:
                value, default = before[name], getattr(parsed, name)
                if value not in (default, getattr(default, "toy", default)):
                    taken.append(flag)
                    if value is not True:  # a switch
                        taken += map(str, value if isinstance(value, list) else [value])
                setattr(parsed, name, value)
        if taken:
            print(f"{parsed.out} goes on with the flags it was started with: {shlex.join(taken)}")

    def _explain_unknown(self, argument):
        flag = argument.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if name in RENAMED:
            return f"{flag} is now {flag_of(RENAMED[name])}"
        if name in RENAMED_SWITCHES:
            new, values = RENAMED_SWITCHES[name]
            return f"{flag} is now {flag_of(new)} {values[True]}"
        known = [option for action in self._actions for option in action.option_strings]
        close = difflib.get_close_matches(flag, known, n=1)
        return f"unknown argument {argument}" + (f": did you mean {close[0]}?" if close else ": see --help")


def make_parser(doc):
    """A script's parser: its docstring, examples and all, is the start of --help."""
    if not sys.stderr.isatty():  # no progress bars in files, of other packages and in scripts that this one starts
        os.environ.setdefault("TQDM_DISABLE", "1")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 prints for all
    return _Parser(description=doc.strip("\n"), usage="%(prog)s [flags]", formatter_class=_HelpFormatter,
                   allow_abbrev=False)


def flags_of_run(out, script):
    """{flag: value} that a run folder, or a file by distill.py, was started with; {} if this script did not do it."""
    if out is None:
        return {}
    path = Path(out) / "config.json" if os.path.isdir(out) else Path(f"{out}.config.json")
    try:
        config = json.loads(path.read_text())
        return renamed(config["flags"]) if config["command"].split()[0] == script else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}  # rlt/runs.py says what is wrong with it


def renamed(flags):
    """The flags of an old config file under the names and values of today."""
    flags = {RENAMED.get(flag, flag): value for flag, value in flags.items()}
    for switch in RENAMED_SWITCHES.keys() & flags.keys():
        new, values = RENAMED_SWITCHES[switch]
        flags[new] = values[flags.pop(switch)]
    return flags | ({"engine": "transformers"} if flags.get("engine") == "batch" else {})


def number(kind, low=None, high=None, above=None):
    """An argparse type: a finite int or float in [low, high], or greater than `above`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[kind]
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {wanted}") from None
        rules = (
            (kind is int or math.isfinite(value), "a finite one"),
            (kind is float or abs(value) < 2**63, f"at most {2**63 - 1}"),
            (low is None or value >= low, f"at least {low}"),
            (high is None or value <= high, f"at most {high}"),
            (above is None or value > above, f"more than {above}"),
        )
        for holds, rule in rules:
            if not holds:
                raise argparse.ArgumentTypeError(f"got {text}, expected {rule}")
        return value

    return parse


def path(text):
    """An argparse type: a path or a name, with ~ expanded."""
    return os.path.expanduser(text)


def refuse(parser, args, where, *names):
    """End with an error if one of these flags differs from its default. where: how it does nothing, such as "without
    --solver"."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"{flag_of(name)} does nothing {where}")


def carry(parser, args, *names, **renamed):
    """This run's flags that the next command needs, too, as text: those that differ from their defaults.

    names: flags that are called the same there. renamed: flag there = flag here, e.g. model="out".
    """
    text = ""
    for there, here in [*((name, name) for name in names), *renamed.items()]:
        value = getattr(args, here)
        if value != parser.get_default(here):
            text += f" --{there.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}")
    return text


def following_out(parser, args, ending):
    """--out of the next command, as text: beside this one's where that is not the default."""
    if args.out == parser.get_default("out"):
        return ""
    return f" --out {shlex.quote(args.out.rstrip('/').removesuffix('.jsonl') + ending)}"


def add_bits(group, flag, what, default=None):
    """default: None where `choose_bits` finds it."""
    group.add_argument(flag, type=int, choices=(4, 16, 32), default=default, metavar="BITS",
                       help=f"{what}: 32 float32, 16 bfloat16, 4 nf4"
                       + ("; default: 16 on a GPU, 32 on a CPU" if default is None else ""))


def add_student_bits(group):
    add_bits(group, "--student-bits", "weights of the student, which take no memory where it is the teacher's own base "
             "at the teacher's bits", default=4)


def choose_bits(parser, args, device):
    """Set the bits of a base that no flag names: 16 on a GPU, or where --dry-run is for one, 32 on a CPU."""
    bits = 16 if device.type == "cuda" or args.dry_run else 32
    for name in ("bits", "teacher_bits"):
        if name in args and getattr(args, name) is None:
            setattr(args, name, bits)
            parser.set_defaults(**{name: bits})  # for `carry`


def add_lora(group, lowest_rank=1):
    """The adapter that is trained. Its values come from the model's own adapter where that has one."""
    group.add_argument("--lora-rank", type=number(int, lowest_rank), metavar="R",
                       help="rank of the adapter; default: the model's own, else 16"
                       + ("; 0: train all weights" if lowest_rank == 0 else ""))
    group.add_argument("--lora-alpha", type=number(float, above=0), metavar="A",
                       help="the adapter's output is multiplied by A / rank; default: the model's own, else 32")
    group.add_argument("--lora-targets", metavar="NAMES",
                       help="layers with an adapter, with commas; default: the model's own, else all-linear")


def add_data(group, data, what="question and solution", columns=()):
    """Rows to read. columns: those that a flag names, of question, solution and explanation."""
    group.add_argument("--data", type=path, default=data, help=f"rows with {what}: file, hub id, or toy")
    for column in columns:
        group.add_argument(f"--{column}-column", metavar="NAME",
                           help=f"column with the {column}; default: by known schemas")
    group.add_argument("--limit", type=number(int, 1), metavar="N", help="use the first N rows only")
    group.add_argument("--show-rows", type=number(int, 1), metavar="N",
                       help="print the first N rows as the models see them, and stop")
    group.add_argument("--skip-bad-rows", action="store_true", help="leave out bad and over-long rows, and count them")


def row_options(args):
    """The data flags as arguments of rows.load_rows."""
    columns = {f"{column}_column": getattr(args, f"{column}_column", None)
               for column in ("question", "solution", "explanation")}
    return {**columns, "limit": args.limit, "skip_bad": args.skip_bad_rows}


def add_solution_in(group):
    group.add_argument("--solution-in", choices=("assistant", "user"), default="assistant", metavar="TURN",
                       help="turn in which the teacher sees the solution: assistant (prefilled, as released) or user")


def add_reward(group, kl):
    """The reward of an explanation. kl: the script's default for --kl."""
    group.add_argument("--lambda", dest="lam", metavar="L", type=number(float, 0), default=3.0,
                       help="weight of the KL in the reward")
    group.add_argument("--alpha", metavar="A", type=number(float, 0), default=0.01,
                       help="weight of the min and the max over tokens")
    group.add_argument("--kl", choices=("exact", "sampled"), default=kl, metavar="KIND",
                       help="exact: over the whole vocabulary; sampled: log-ratio of the sampled token (k1)")
    group.add_argument("--unclosed-penalty", type=number(float, 0), default=1.0, metavar="P",
                       help="subtracted from the reward of an explanation that is empty or does not end properly")


def add_sampling(group, *, max_new_tokens=DEFAULTS["new tokens"], temperature=1.0,
                 batch_flag="--rollout-batch", batch=256):
    """How completions are sampled."""
    low = {"low": 0} if temperature == 0 else {"above": 0}
    group.add_argument("--temperature", type=number(float, **low), default=temperature, metavar="T",
                       help="of sampling and of all log-probs" if low == {"above": 0} else "of sampling; 0: greedy")
    group.add_argument("--max-new-tokens", type=number(int, 1), default=max_new_tokens, metavar="N",
                       help="length limit of a completion, tokens")
    group.add_argument(batch_flag, type=number(int, 1), default=batch, metavar="N",
                       help="completions sampled at the same time")
    group.add_argument("--engine", choices=ENGINES, default="transformers", metavar="NAME",
                       help="what samples: transformers, or vllm (requirements-vllm.txt)")


def add_rollouts(group):
    """A step's questions, and a group of completions for each."""
    group.add_argument("--prompts-per-step", type=number(int, 1), default=16, metavar="P",
                       help="questions a step")
    group.add_argument("--group-size", type=number(int, 2), default=16, metavar="G",
                       help="completions a question")
    add_sampling(group)
    group.add_argument("--max-logprob-diff", type=number(float, above=0), default=0.1, metavar="D",
                       help="stop when sampler and trainer differ by more, nats a token on average")
    group.add_argument("--tis-cap", type=_tis_cap, default=2.0, metavar="C",
                       help="with --engine vllm: truncated importance sampling, weights up to C; 0: none")


def check_grpo(parser, args):
    """End with an error if a flag of add_grpo or add_rollouts is given that does nothing beside the others."""
    if args.beta == 0:
        refuse(parser, args, "with --beta 0", "sync_ref_every", "sync_ref_mix")
    if args.updates_per_batch == 1:
        refuse(parser, args, "with --updates-per-batch 1: a batch's first update is never clipped", "epsilon_low",
               "epsilon_high")
    if args.engine != "vllm":
        refuse(parser, args, "without --engine vllm", "tis_cap")


def check_prompts_per_rank(args, world):
    """A step's questions are shared evenly by the ranks."""
    if args.prompts_per_step % world:
        raise UserError(f"--prompts-per-step {args.prompts_per_step} can't be shared evenly by {world} ranks: pass "
                        f"{args.prompts_per_step + -args.prompts_per_step % world}.")


def _tis_cap(text):
    cap = number(float, 0)(text)
    if 0 < cap < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 or at least 1: weights are 1 where both agree")
    return cap


def add_optimizer(group, *, steps, lr, warmup_steps):
    group.add_argument("--steps", type=number(int, 1), default=steps, metavar="N",
                       help="steps; in RL each is one batch of samples")
    group.add_argument("--lr", type=number(float, above=0), default=lr, help="peak learning rate (AdamW)")
    group.add_argument("--warmup-steps", type=number(int, 0), default=warmup_steps, metavar="N",
                       help="steps in which the learning rate rises to --lr")
    group.add_argument("--lr-steps", type=number(int, 1), metavar="N",
                       help="step at which it reaches its last value; default: --steps, of a resumed run its first")
    group.add_argument("--max-grad-norm", type=number(float, above=0), default=1.0, metavar="X",
                       help="the gradient's norm is clipped to this")
    group.add_argument("--max-bad-steps", type=number(int, 1), default=3, metavar="N",
                       help="stop after N updates in a row whose loss or gradient is not finite; each is skipped")


def add_grpo(group, losses):
    """The policy update. losses: the names of grpo.py."""
    add_optimizer(group, steps=60, lr=DEFAULTS["RL lr"], warmup_steps=5)
    group.add_argument("--final-lr-fraction", type=number(float, 0, 1), default=0.1, metavar="F",
                       help="the learning rate falls linearly to this fraction of --lr; 1: constant, as released")
    group.add_argument("--loss", choices=losses, default="grpo", metavar="NAME",
                       help=f"how tokens and sequences are averaged: {', '.join(losses)}")
    group.add_argument("--advantage-scale", choices=("std", "none"), default="std", metavar="S",
                       help="std: advantages are divided by the group's standard deviation; none: they are not")
    group.add_argument("--epsilon-low", type=number(float, 0, 0.999), default=0.2, metavar="E",
                       help="the ratio is clipped at 1 - E")
    group.add_argument("--epsilon-high", type=number(float, 0), default=0.2, metavar="E",
                       help="the ratio is clipped at 1 + E")
    group.add_argument("--updates-per-batch", type=number(int, 1), default=1, metavar="N",
                       help="optimizer steps on the same completions; the clip acts from the second on")
    group.add_argument("--beta", type=number(float, 0), default=0.04, metavar="B",
                       help="weight of the KL to the reference policy; 0: no reference pass")
    group.add_argument("--sync-ref-every", type=number(int, 0), default=32, metavar="N",
                       help="steps between moves of the reference towards the policy; 0: never")
    group.add_argument("--sync-ref-mix", type=number(float, 0, 1), default=0.9, metavar="M",
                       help="share of the policy in the new reference; LoRA's A and B are averaged separately")


def add_micro_batches(group):
    group.add_argument("--micro-batch-tokens", type=number(int, 1), default=8192, metavar="N",
                       help="tokens of one forward pass")


def add_switch(group, flag, what):
    """A switch that a resumed run may turn off again, by --no-flag."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=what)


def add_checkpointing(group):
    add_switch(group, "--gradient-checkpointing", "recompute activations in the backward pass: less memory, a third "
               "more time")


def add_system(group):
    group.add_argument("--seed", type=number(int, 0), default=0, metavar="N", help="seed of every draw")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
    group.add_argument("--dry-run", nargs="?", metavar="GB", const=0.0, type=number(float, above=0),
                       help="check flags, rows and disk, estimate the memory, and stop; GB: memory of the GPU meant")
    group.add_argument("--quiet", action="store_true", help="no progress bar, and no line a step")


def add_run_folder(group, out, *, save_every, eval_every, eval_what, eval_flag="--eval-rows"):
    """Where a training run writes. eval_what: what is measured on the held-out rows."""
    group.add_argument("--out", type=path, default=out, metavar="FOLDER", help="run folder")
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out, or "
                       "start; flags that are not given are those that it was started with")
    group.add_argument("--report", choices=REPORTS, metavar="NAME", help="also log the numbers of metrics.jsonl to: "
                       "tensorboard (files in the run folder), wandb")
    group.add_argument("--save-every", type=number(int, 0), default=save_every, metavar="N",
                       help="steps between checkpoints; 0: at the end only")
    group.add_argument("--keep-checkpoints", type=number(int, 0), default=3, metavar="N",
                       help="the last N checkpoints are kept; 0: all")
    group.add_argument("--eval-every", type=number(int, 0), default=eval_every, metavar="N",
                       help=f"steps between measurements of the {eval_what}; 0: never")
    group.add_argument(eval_flag, type=number(int, 0), default=DEFAULTS["held-out rows"], metavar="N",
                       help="rows at the end of --data that are held out for it")
