# SPDX-License-Identifier: MIT
"""Out of memory on a GPU: the same once more, in smaller micro-batches."""

import gc

from rlt.console import show_activity

import torch


class MicroBatched:
    """Calls functions that take `micro_batch_tokens`: --micro-batch-tokens, halved where a GPU runs out of memory.

    The loss does not depend on it, since it is divided by what the whole step has; only dropout draws anew.
    """

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, function, *arguments, **options):
        """function(..., micro_batch_tokens=...). Where that runs out of memory it is called again, with half as many
        from here on: it must be a function that can begin anew. Raises torch.OutOfMemoryError if it does so again,
        which ends a script in one line (rlt/errors.py).
        """
        show_activity(function.__name__.replace("_", " "))
        try:
            return function(*arguments, micro_batch_tokens=self.tokens, **options)
        except torch.OutOfMemoryError:
            before, self.tokens = self.tokens, max(1, self.tokens // 2)
        # not in the except block: there the exception would keep the tensors of the call that failed
        gc.collect()
        torch.cuda.empty_cache()
        print(f"out of memory: --micro-batch-tokens is {self.tokens} from here on, half of {before}. The loss "
              "stays the same.", flush=True)
        return function(*arguments, micro_batch_tokens=self.tokens, **options)
