# SPDX-License-Identifier: MIT
"""What the scripts share. They import it before torch."""

import os

# OpenMP's threads spin while they wait. Beside another busy process that makes a step of the toy several times slower
# (bench/busy.py measures it). OpenMP reads the variable once, when torch loads it. A user's own value stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Blocks of GPU memory that grow: passes of other lengths would leave gaps that no later tensor fits into. torch reads
# the variables, an old name and a new one, when it first uses CUDA. vLLM gets along with it outside of its sleep mode.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
