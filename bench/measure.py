# SPDX-License-Identifier: MIT
"""What the benchmarks share: time, memory, the machine's ceilings, and the log."""

import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path

from rlt.footprint import AllocationTracker

import torch

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "figures" / "logs"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of models


def device_name():
    return torch.cuda.get_device_name() if CUDA else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def bfloat16_instructions():
    """Which instructions this processor has for products in bfloat16, as Linux calls them; "" for none."""
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    return " ".join(flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags)


def machine(*packages):
    """Device, versions of packages (None: not installed), and the date."""
    versions = {}
    for package in ("torch", "triton", "transformers", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": device_name(), **versions, "date": datetime.date.today().isoformat()}


class Log:
    """log(**entry): print an entry as JSON, append it to a file with what is known of the machine, and return it."""

    def __init__(self, path, **machine):
        self.path, self.machine = Path(path), machine
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, **entry):
        entry = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in entry.items()}
        print(json.dumps(entry), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry | self.machine) + "\n")
        return entry

    def attempt(self, function, **what):
        """Log what is measured and what function() returns of it. Running out of memory is a result."""
        try:
            return self(**what, **function())
        except torch.OutOfMemoryError:
            return self(**what, failed="out of memory")
        finally:
            gc.collect()
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------
# time


def seconds(function):
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def milliseconds(function):
    """The median of several calls; on a GPU with a cold L2 cache."""
    if CUDA:
        import triton

        return triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")
    return 1000 * statistics.median(seconds(function) for _ in range(5))


def copy_bandwidth():
    """Bytes/s of a copy on the device, read and written bytes counted: the ceiling of a kernel that reads."""
    source = torch.randn((2**31 if CUDA else 2**27) // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1000


def matmul_rate():
    """FLOP/s of a square product in bfloat16 on a GPU, in float32 on a CPU."""
    n = 8192 if CUDA else 1024
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=DTYPE)
    return 2 * n**3 / milliseconds(lambda: a @ b) * 1000


# ---------------------------------------------------------------------------------------------------------
# memory


def peak_bytes(function, *resident):
    """Peak bytes on the device while function() runs. On a CPU: of the tensors that it makes and of resident models."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with AllocationTracker() as tracker:
        function()
    return tracker.peak + sum(map(model_bytes, resident))


def model_bytes(model):
    """Bytes of all weights, the states of 4-bit ones included."""
    total = sum(p.nbytes for p in model.parameters())
    states = (p.quant_state for p in model.parameters() if getattr(p, "quant_state", None))
    return total + sum(x.nbytes for state in states for x in state.as_dict(packed=False).values()
                       if isinstance(x, torch.Tensor))
