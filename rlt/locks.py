# SPDX-License-Identifier: MIT
"""
One process a folder. A lock belongs to the process that holds it and is gone with it, however it ends: there are no
stale ones. The file that carries it says who holds it, and stays behind.
"""

import errno
import fcntl
import os
import platform
from contextlib import contextmanager, suppress
from pathlib import Path

from rlt.errors import UserError

_HELD = {}  # path: the open file. Closing any file of that path would give the lock back


def hold_lock(path, what):
    """Hold the lock in this file until the process ends. Raises UserError where another process has it.

    what: the folder or file that is meant, for the message. Its folder must exist. A process may ask again.
    """
    path = Path(path).resolve()
    if path in _HELD and path.exists():
        return
    try:
        file = path.open("a+")
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}. Make room, or pass another --out.") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf: a forked child does not inherit it, and NFS has it
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            print(f"{path} can't be locked ({error.strerror}): start no second run on {what}.")
            return
        raise UserError(f"{what} is in use by {holder}: wait until it has ended, or pass another --out.") from None
    _write_holder(file)
    _HELD[path] = file


@contextmanager
def exclusive(path, waiting):
    """`with exclusive(path, message) as fd:` inside, this is the only process; others print the message and wait.

    A child that gets fd (subprocess's pass_fds) has the lock, too, and keeps it if this process is killed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        _write_holder(file)
        yield file.fileno()


def _write_holder(file):
    """For messages. The lock holds without it, where the disk is full."""
    with suppress(OSError):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
