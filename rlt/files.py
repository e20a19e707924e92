# SPDX-License-Identifier: MIT
"""Files that are never half a file, and JSON Lines that are being appended to."""

import json
import math
import os
from contextlib import contextmanager
from pathlib import Path

from rlt.checkpoints import disk_full, is_disk_full
from rlt.distributed import RANK
from rlt.errors import UserError


def path_from_here(path):
    """A path as one would type it here: a relative one where it is below this folder, else as it is."""
    here = os.path.relpath(path)
    return str(path) if here.startswith("..") else here


def path_and_size(path):
    """What gguf.json, in a folder that was made from this GGUF file, says of the file."""
    return {"path": str(Path(path).resolve()), "bytes": Path(path).stat().st_size}


def write_atomically(path, text):
    """Write a file so that it is complete or absent: under another name, flushed to the disk, renamed.

    Raises UserError where the disk is full.
    """
    tmp_path = Path(f"{path}.{os.getpid()}.partial")  # two evaluations may end at the same time
    with full_disk_as_user_error(path):
        try:
            with tmp_path.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            tmp_path.replace(path)
        finally:
            tmp_path.unlink(missing_ok=True)


@contextmanager
def full_disk_as_user_error(path):
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(disk_full(path)) from error


def read_lines(path):
    """[(line, its object or None)] of a JSON Lines file that is being appended to, without a last line that a kill has
    cut short. [] if there is no such file. Raises UserError where it is a folder."""
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, expected a file: move it out of the way.")
    if not Path(path).exists():
        return []
    complete = Path(path).read_text(errors="replace").split("\n")[:-1]  # a complete line ends in a newline
    return [(line, _json_object(line)) for line in complete]


def _json_object(line):
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_jsonl(path):
    """Objects of a JSON Lines file that is being appended to. A last line cut short by a kill is left out; any other
    line that can't be read raises UserError."""
    lines = read_lines(path)
    for number, (line, entry) in enumerate(lines, 1):
        if entry is None:
            raise UserError(f"{path}:{number} is not a JSON object ({line[:60]!r}): restore or delete that line.")
    return [entry for _, entry in lines]


def append_jsonl(path, entries):
    """Add objects to a JSON Lines file, on rank 0 only. JSON has no NaN and no infinity: they become null."""
    if RANK == 0:
        with full_disk_as_user_error(path), path.open("a") as file:
            file.write("".join(json.dumps(_finite(entry), allow_nan=False) + "\n" for entry in entries))


def _finite(entry):
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()}
