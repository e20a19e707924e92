# SPDX-License-Identifier: MIT
"""Optimizer steps that are taken only where the loss and the gradient are finite."""

import json
import math

from rlt.distributed import RANK, all_gather_object, all_reduce_gradients, all_reduce_sum
from rlt.errors import UserError
from rlt.runs import write_atomically

import torch


class Updates:
    """The optimizer steps of a run. One with a loss or gradient that is NaN or infinite, on any rank, is skipped.

    The rows it came from go into the run folder, bad_step.json: those of the micro-batches that were not finite, or of
    the whole step where each of them was. Raises UserError after --max-bad-steps of them in a row.
    """

    def __init__(self, run, optimizer, parameters, tokenizer):
        self.run, self.optimizer, self.parameters, self.tokenizer = run, optimizer, parameters, tokenizer
        self.bad_in_a_row = 0
        self.zero_grad()

    def zero_grad(self):
        """Before the first micro-batch of an update, and where it begins again."""
        self.optimizer.zero_grad()
        self.rows, self.bad_rows = [], []

    def backward(self, loss, rows):
        """loss.backward(), for the loss of a micro-batch. rows: [(row, ids)] that it was computed from."""
        loss.backward()
        rows = list(rows)
        self.rows += rows
        if not math.isfinite(loss.item()) or not self.bad_rows and not math.isfinite(self._grad_norm()):
            self.bad_rows += rows  # once one was bad, the gradient stays so

    def _grad_norm(self):
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]).item()

    def step(self, loss):
        """Add up the gradients of all ranks, clip them, and take an optimizer step -> the norm before clipping.

        loss: this rank's share of the step's loss.
        """
        all_reduce_gradients(self.parameters)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.run.args.max_grad_norm).item()
        (loss,) = all_reduce_sum(loss)
        self.run.weights_changed = True
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step()
            self.bad_in_a_row = 0
        else:
            self._skip(loss, grad_norm)
        self.zero_grad()
        return grad_norm

    def _skip(self, loss, grad_norm):
        self.bad_in_a_row += 1
        step, path = self.run.step, self.run.folder / "bad_step.json"
        found = all_gather_object([self._described(rows) for rows in (self.rows, self.bad_rows)])
        everything, bad = ([row for rows in part for row in rows] for part in zip(*found, strict=True))
        what = f"step {step + 1}: loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        if RANK == 0:
            report = {"step": step, "loss": str(loss), "grad_norm": str(grad_norm), "rows": bad or everything}
            write_atomically(path, json.dumps(report, indent=2) + "\n")
        if self.bad_in_a_row >= self.run.args.max_bad_steps:
            raise UserError(f"{what}: not finite for {self.bad_in_a_row} updates in a row (--max-bad-steps). The last "
                            f"one's rows are in {path}; lower --lr, or load the base in more bits.")
        print(f"{what}: the update is skipped, its rows are in {path}", flush=True)

    def _described(self, rows):
        return [{"where": row.get("where"), "text": self.tokenizer.decode(ids), "ids": list(ids)} for row, ids in rows]
