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


def _excepthook(kind, error, trace):
    from rlt.distributed import RANK, WORLD

    ours = issubclass(kind, UserError)
    if WORLD > 1:  # torchrun ends all ranks when one has ended: by then the cause must be printed, not its echoes
        time.sleep(2 * (RANK > 0) + (not ours))
    if ours:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
    if WORLD > 1:
        sys.stderr.flush()
        os._exit(2 if ours else 1)  # at once: the process group's own clean-up may wait for ranks that wait for this
    if ours:
        raise SystemExit(2)
