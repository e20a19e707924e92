# SPDX-License-Identifier: MIT
"""Optimizer steps that are taken only where the loss and the gradient are finite."""

import json
import math

from rlt.console import show_activity
from rlt.distributed import RANK, all_gather_object, all_reduce_gradients, all_reduce_sum
from rlt.errors import UserError
from rlt.files import write_atomically

import torch


class Updates:
    """The optimizer steps of a run. One with a loss or gradient that is NaN or infinite, on any rank, is skipped.

    The rows it came from go into the run folder, bad_step.json: those of the micro-batches that were not finite, or all
    of the step's rows if every micro-batch was finite. Raises UserError after --max-bad-steps of them in a row.
    """

    def __init__(self, run, optimizer, parameters, tokenizer, stats=()):
        """stats: names of numbers that micro-batches give beside their loss, to be added up as it is."""
        self.run, self.optimizer, self.parameters, self.tokenizer = run, optimizer, parameters, tokenizer
        self.names = ("loss", *stats)
        self.bad_in_a_row = 0
        self.zero_grad()

    def zero_grad(self):
        """Before the first micro-batch of an update, and where it begins again."""
        self.optimizer.zero_grad()
        self.micro_batches = []  # (rows, loss, norm of the gradient accumulated so far)
        self.sums = dict.fromkeys(self.names, 0.0)

    def backward(self, loss, rows, stats=None):
        """loss.backward(), for the loss of a micro-batch. rows: [(row, ids)] that it was computed from.

        Loss, stats and the gradient's norm stay on the device until the step: reading them here would wait for it.
        """
        loss.backward()
        show_activity(f"gradients of micro-batch {len(self.micro_batches) + 1}")
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.micro_batches.append((list(rows), loss.detach(), grad_norm))
        for name, value in {"loss": loss, **(stats or {})}.items():
            self.sums[name] += value.detach().double()

    def step(self):
        """Add up the gradients of all ranks, clip them, take an optimizer step -> loss, norm before clipping, stats.

        Loss and stats are sums over all micro-batches of all ranks.
        """
        all_reduce_gradients(self.parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.run.args.max_grad_norm).item()
        loss, *stats = all_reduce_sum(*map(float, self.sums.values()))
        self.run.weights_changed = True
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self._skip(loss, grad_norm)
        self.zero_grad()
        return loss, grad_norm, dict(zip(self.names[1:], stats, strict=True))

    def _skip(self, loss, grad_norm):
        self.bad_in_a_row += 1
        step, path = self.run.step, self.run.folder / "bad_step.json"
        found = all_gather_object([self._described(rows) for rows in self._rows_and_bad_rows()])
        everything, bad = ([row for rows in part for row in rows] for part in zip(*found, strict=True))
        what = f"step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if RANK == 0:
            report = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": bad or everything}
            write_atomically(path, json.dumps(report, indent=2) + "\n")
        if self.bad_in_a_row >= self.run.args.max_bad_steps:
            raise UserError(f"{what}: not finite for {self.bad_in_a_row} updates in a row (--max-bad-steps). The last "
                            f"one's rows are in {path}; lower --lr, or load the base in more bits.")
        print(f"{what}: the update is skipped, its rows are in {path}", flush=True)

    def _rows_and_bad_rows(self):
        """All rows, and those of micro-batches with a bad loss or gradient. Gradients add up: its first counts."""
        every, bad = [], []
        for rows, loss, grad_norm in self.micro_batches:
            every += rows
            if not loss.isfinite() or not bad and not grad_norm.isfinite():
                bad += rows
        return every, bad

    def _described(self, rows):
        return [{"where": row.get("where"), "text": self.tokenizer.decode(ids), "ids": list(ids)} for row, ids in rows]
