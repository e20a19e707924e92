# SPDX-License-Identifier: MIT
"""What a terminal shows while a script works."""

import os

from rlt.distributed import RANK

from tqdm import tqdm


def progress_bar(*iterable, **options):
    """tqdm's bar, on rank 0 of a terminal alone: a file that stderr goes into gets none, nor does anybody with
    TQDM_DISABLE=1, which --quiet sets. Its `write` prints a line in any case."""
    hidden = RANK > 0 or os.environ.get("TQDM_DISABLE", "0").lower() not in ("", "0", "false")
    return tqdm(*iterable, dynamic_ncols=True, disable=True if hidden else None, **options)
