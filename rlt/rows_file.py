# SPDX-License-Identifier: MIT
"""The file that distill.py writes: rows in batches, and beside it <file>.config.json with what it was asked for."""

import json
import math
import os
import sys
from pathlib import Path

from rlt.checkpoints import check_writable
from rlt.distributed import RANK, barrier
from rlt.errors import UserError
from rlt.files import append_jsonl, read_jsonl, write_atomically
from rlt.locks import hold_lock
from rlt.runs import check_same_flags, check_same_hashes, config_of, continued, describe, only_looks


def check_rows_file(args):
    """Whether the file --out exists. Raises UserError where it can't be this command's: a script calls it before it
    makes or reads anything."""
    path = Path(args.out)
    if os.path.isdir(path):
        raise UserError(f"--out {path} is a folder, expected a file. Pass another --out.")
    check_writable(path.parent)
    if path.exists() and not (args.resume or only_looks(args)):
        raise UserError(f"{path} already exists. Pass --resume to continue, or another --out.")
    if path.exists() and args.resume:
        config_of(Path(f"{path}.config.json"), path, Path(sys.argv[0]).name)
    return path.exists()


class RowsFile:
    """`first_batch` is where the loop starts. Nothing is written before `start`."""

    def __init__(self, args):
        self.path, self.config_path = Path(args.out), Path(f"{args.out}.config.json")
        self.first_batch, self.written, self.dropped = 0, [], 0
        self.config, self.config_before = describe(args), {}
        self.existed = check_rows_file(args)
        if self.existed and args.resume:
            self.config_before = config_of(self.config_path, self.path, self.config["command"])
            self._lock()
            check_same_flags(self.path, self.config_before["flags"], vars(args))
            self.written = read_jsonl(self.path)
            if bad := [number for number, row in enumerate(self.written, 1) if not isinstance(row.get("batch"), int)]:
                raise UserError(f"{self.path}:{bad[0]} has no batch number: it was changed since. Pass another --out.")
            if self.written:  # the last batch may be cut short: it is sampled again
                self.first_batch = self.written[-1]["batch"]

    def _lock(self):
        if RANK == 0:
            hold_lock(self.path.with_name(f".{self.path.name}.lock"), self.path)

    def start(self, **hashes):
        """Write the config, and cut the file back to its complete batches. hashes: of the weights and rows.

        Raises UserError where they are not those that the file was begun with.
        """
        check_same_hashes(self.path, self.config_before, hashes)
        barrier()  # all ranks have read what exists
        if RANK:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
        if self.path.exists() and not self.existed:
            raise UserError(f"{self.path} was made by another process since this one started. Pass another --out.")
        config = continued(self.config, self.config_before) | hashes
        write_atomically(self.config_path, json.dumps(config, indent=2) + "\n")
        kept = [row for row in self.written if row["batch"] < self.first_batch]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def append(self, rows):
        """Add the rows of some batches. A reward that is not finite is no reward: its row is left out and counted.

        Raises UserError where no row has one: a model is then broken.
        """
        finite = [row for row in rows if math.isfinite(row.get("reward", 0.0))]
        self.dropped += len(rows) - len(finite)
        if rows and not finite:
            raise UserError(f"no reward of batch {rows[0]['batch']} is finite ({rows[0]['reward']}): teacher or "
                            "student computes NaN or infinity. Look at their weights, or load them in more bits.")
        append_jsonl(self.path, finite)
