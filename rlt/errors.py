# SPDX-License-Identifier: MIT
"""Errors that a user can fix are one line; all others keep their traceback."""

import os
import sys
import time
from pathlib import Path


class UserError(ValueError):
    """Something that the user can change: a flag, a row, a folder, a model.

    The message says what came, what was expected and what to do next. Scripts print it as one line and exit with
    code 2. Any other exception is a defect of this code, or of somebody's change to it, and keeps its traceback.
    What rows and files bring into a message can't break the line or reach the terminal: see `printable`.
    """

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text, longest=1000):
    """The text on one line: line breaks and control characters escaped, and the middle left out if it is long."""
    text = str(text)
    if len(text) > longest:
        text = f"{text[: longest // 2]} [...] {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_user_errors():
    """From here on a UserError that nobody catches is one line on stderr and exit code 2."""
    sys.excepthook = _excepthook


FLAGS = {}  # of the script that runs, with their argparse actions: an error advises no others


def flag_of(name):
    """The flag that sets this attribute of args: --lambda for lam."""
    known = {action.dest: option for option, action in FLAGS.items() if option.startswith("--")}
    return known.get(name, f"--{name.replace('_', '-')}")


def _out_of_memory():
    """What helps where a GPU's memory is full."""
    remedies = [f"a smaller {flag}" for flag in ("--micro-batch-tokens", "--rollout-batch", "--batch-size")]
    remedies = [remedy for remedy in [*remedies, "--gradient-checkpointing"] if remedy.split()[-1] in FLAGS]
    return f"Pass --dry-run to see what this takes; then {' or '.join(remedies)}.{_resume()}" if remedies else ""


def _resume():
    return " What was written goes on with --resume." if "--resume" in FLAGS else ""


def _one_line(kind, error):
    """(exit code, message) of what needs no traceback, (1, None) of all else."""
    if issubclass(kind, UserError):
        return 2, f"error: {error}"
    if issubclass(kind, KeyboardInterrupt):
        return 130, f"interrupted.{_resume()}"
    if kind.__name__ == "OutOfMemoryError":  # torch's, of a GPU; torch may not be loaded
        return 2, f"error: {printable(error, 200)} {_out_of_memory()}"
    return 1, None


def _excepthook(kind, error, trace):
    from rlt.distributed import RANK, WORLD

    code, message = _one_line(kind, error)
    if WORLD > 1:  # torchrun ends all ranks when one has ended: by then the cause must be printed, not its echoes
        time.sleep(2 * (RANK > 0) + (message is None))
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    if WORLD > 1:
        sys.stderr.flush()
        os._exit(code)  # at once: the process group's own clean-up may wait for ranks that wait for this
    if message:
        raise SystemExit(code)
