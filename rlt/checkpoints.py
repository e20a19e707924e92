# SPDX-License-Identifier: MIT
"""
Folders of weights that are complete or refused. Each has a manifest.json with the size and the SHA-256 of every file.

A folder is written under another name, flushed to the disk and renamed. Folders without a manifest, of older runs, are
read as they are.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from rlt.errors import UserError

MANIFEST = "manifest.json"
CHECKPOINT = re.compile(r"step_([0-9]{6,})")  # other names in a run folder are not ours


def checkpoints(run_folder):
    """[(steps, folder)] of a run's checkpoints, the oldest first. They may be damaged: see `damaged_file`."""
    found = [(CHECKPOINT.fullmatch(path.name), path) for path in Path(run_folder).glob("step_*") if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def last_checkpoint(run_folder):
    """(steps, folder) of the last checkpoint, (0, None) where there is none. Raises UserError if it is damaged."""
    found = checkpoints(run_folder)
    if not found:
        return 0, None
    bad = damaged_file(found[-1][1])
    if bad:
        whole = next((path.name for _, path in reversed(found[:-1]) if not damaged_file(path)), None)
        raise UserError(f"{found[-1][1]} is damaged ({bad}): delete it to "
                        + (f"go on from {whole}." if whole else "start from the first step."))
    return found[-1]


def damaged_file(folder, suffix=""):
    """The name of the first file that is not what was written, or None. suffix: look at files that end so."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None if any(Path(folder).iterdir()) else "it is empty"
    try:
        manifest = json.loads(path.read_text())
        for name, expected in manifest.items():
            file = Path(folder) / name
            if name.endswith(suffix) and (not file.is_file() or file.stat().st_size != expected["bytes"]
                                          or _sha256(file) != expected["sha256"]):
                return name
    except (ValueError, TypeError, KeyError, AttributeError):
        return MANIFEST
    return None


def write_folder(folder, write):
    """write(path) fills a folder, which gets its name once it is complete and on the disk. Raises UserError where the
    disk is full: what is incomplete is then gone."""
    tmp_path = folder.with_name(folder.name + ".partial")
    shutil.rmtree(tmp_path, ignore_errors=True)
    try:
        tmp_path.mkdir(parents=True)
        write(tmp_path)
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(tmp_path)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                    for path in files}
        (tmp_path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in [*files, tmp_path / MANIFEST]:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    except Exception as error:
        if not is_disk_full(error):
            raise
        written = _bytes(tmp_path)
        shutil.rmtree(tmp_path, ignore_errors=True)
        raise UserError(disk_full(folder, written)) from error
    remove_folder(folder)
    tmp_path.rename(folder)


def remove_folder(folder):
    """Delete a folder. Killed on the way, it leaves nothing that has the folder's name."""
    if folder.exists():
        tmp_path = folder.with_name(folder.name + ".deleted")
        shutil.rmtree(tmp_path, ignore_errors=True)
        folder.rename(tmp_path)
        shutil.rmtree(tmp_path)


def keep_last(run_folder, n):
    """Delete all but the last n checkpoints of a run; 0 keeps all."""
    for _, path in checkpoints(run_folder)[:-n] if n else []:
        remove_folder(path)


def is_disk_full(error):
    """Whether this exception, or what it came from, says that the disk is full. Libraries raise their own types."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if re.search(r"No space left|os error (28|122)|PytorchStreamWriter failed|quota exceeded", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(path, written=0):
    """A message: what could not be written, how much it takes, and that nothing is lost."""
    folder = path.parent
    last = [step for _, step in checkpoints(folder)][-1:]
    needed = max([written, *(_bytes(step) for step in last)])
    free = shutil.disk_usage(folder).free
    size = f"it takes {'at least ' * (not last)}{needed / 1e6:,.1f} MB, " if needed else ""
    whole = f"; {last[0].name} is complete" if last else ""
    return (f"the disk is full: {path} could not be written ({size}{free / 1e6:,.1f} MB are free){whole}. Make room, "
            "then call the same command again, with --resume if it has that flag.")


def check_writable(out):
    """Raise UserError unless this folder, or the parent that exists of it, takes a file. Nothing is left behind."""
    folder = Path(out).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{out} can't be written: {error.strerror} ({folder}). Pass another --out.") from None


def _bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
