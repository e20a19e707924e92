# SPDX-License-Identifier: MIT
"""What a terminal shows while a script works."""

import os
import sys
import time

from rlt.distributed import RANK

from tqdm import tqdm

STEP_OF_ANOTHER = "RLT_STEP_OF_ANOTHER"  # set in the environment of scripts that a script starts
_shown = {"bar": None, "at": 0.0}  # the latest bar, and when its text last changed


def progress_bar(*iterable, **options):
    """tqdm's bar, on rank 0 of a terminal alone: a file that stderr goes into gets none, nor does anybody with
    TQDM_DISABLE=1, which --quiet sets. Its `write` prints a line in any case."""
    hidden = RANK > 0 or os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false")
    _shown["bar"] = tqdm(*iterable, dynamic_ncols=True, disable=True if hidden else None, **options)
    return _shown["bar"]


def print_progress(what, before, done, total, quiet):
    """Where there is no terminal and so no bar: a line at every tenth of `total` batches, of which `before` were done
    and now `done` are."""
    if total > 1 and 10 * before // total < 10 * done // total and not quiet and not sys.stderr.isatty():
        print(f"{what}: {done} of {total} batches", flush=True)


def show_activity(text):
    """Put behind the bar what its step is doing, five times a second at most: a step may take minutes."""
    bar, now = _shown["bar"], time.monotonic()
    if bar is not None and not bar.disable and now - _shown["at"] > 0.2:
        _shown["at"] = now
        bar.set_postfix_str(text)


def print_next(command, note=""):
    """Print the command that follows this one, unless another command's user did not ask for this one."""
    if STEP_OF_ANOTHER not in os.environ:
        print(f"Next: python {command}" + (f"\n      {note}" if note else ""))
