# SPDX-License-Identifier: MIT
"""
The few collectives that the scripts need, over the processes that torchrun starts.

Each rank holds the models, takes its share of a step's rows, and adds its gradients to the others'. Rank 0 prints and
writes. Without torchrun there is one rank: a sum is then the number itself, and nothing is initialised.
"""

import atexit
import os
import sys
from datetime import timedelta

RANK, WORLD = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:  # under torchrun
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def init_distributed(device):
    """Join the process group -> (rank, world size). NCCL between CUDA devices, gloo between CPUs."""
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if WORLD > 1:
        if not torch.distributed.is_initialized():
            # transformers and peft import this module, whose functions take the default group as default arguments.
            # Imported after init_process_group it keeps gloo's threads alive past the end of the interpreter, and one
            # that then frees a tensor aborts the process: about one exit in some hundreds.
            import torch.distributed.nn.functional

            hook = sys.excepthook
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                timeout=timedelta(days=1),  # a rank waits as long as the slowest one samples; torchrun ends dead ones
            )
            atexit.register(torch.distributed.destroy_process_group)
            sys.excepthook = hook  # the group wraps it in one that holds lines back until it returns
        print(f"{WORLD} ranks, this one on {device}", flush=True)
    return RANK, WORLD


def all_gather_object(value):
    """The value (anything that pickles) of every rank, in their order. All ranks must call."""
    if WORLD == 1:
        return [value]
    from torch import distributed

    values = [None] * WORLD
    distributed.all_gather_object(values, value)
    return values


def barrier():
    """Wait until all ranks have come here."""
    all_gather_object(None)


def all_reduce_sum(*numbers):
    """Each number's sum over all ranks, as a list."""
    return [sum(values) for values in zip(*all_gather_object(numbers), strict=True)]


def all_reduce_mean(mean, count):
    """The mean over all ranks' items, from the mean over this rank's `count` items. None if no rank has any."""
    means = all_gather_object((mean, count))
    total = sum(n for _, n in means)
    return sum(value * (n / total) for value, n in means if n) if total else None


def all_reduce_gradients(parameters):
    """Add up every rank's gradients in one all-reduce. A rank without gradients adds zeros."""
    if WORLD == 1:
        return
    import torch

    checksum = sum(p.detach().view(torch.int32).sum() for p in parameters).item()  # exact, in any order
    assert len(set(all_gather_object(checksum))) == 1, "the ranks no longer have the same weights"
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view_as(p)
