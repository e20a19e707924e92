# SPDX-License-Identifier: MIT
"""What the scripts share. They import it before torch."""

import os

# OpenMP's threads spin while they wait. Beside another busy process that makes a step of the toy several times slower
# (bench/busy.py measures it). OpenMP reads the variable once, when torch loads it. A user's own value stays.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
