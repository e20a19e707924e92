# SPDX-License-Identifier: MIT
"""The numbers of metrics.jsonl for TensorBoard or Weights & Biases, too. Their packages are loaded when asked for."""

import importlib.util
import math

from rlt.errors import UserError


def check_installed(args):
    """Raise UserError where --report names a package that is missing."""
    if "report" in args and args.report and importlib.util.find_spec(args.report) is None:
        raise UserError(f"--report {args.report} needs a package that is not installed: pip install {args.report}")


def open_report(name, folder, config, first_step):
    """A function log(step, entry) that writes an entry's numbers. name: one of REPORTS.

    folder: of the run; config: what its config.json says; first_step: where a resumed run goes on.
    """
    write = REPORTS[name](folder, config, first_step)

    def log(step, entry):
        write(step, {key: value for key, value in entry.items()
                     if key != "step" and isinstance(value, int | float) and math.isfinite(value)})

    return log


def _tensorboard(folder, config, first_step):
    from torch.utils.tensorboard import SummaryWriter

    # steps after the checkpoint that a killed run has logged are hidden
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)

    def write(step, numbers):
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


def _wandb(folder, config, first_step):
    import wandb

    try:  # the id makes a resumed run go on in the same curves
        run = wandb.init(project="rlt", name=folder.name, dir=str(folder), config=config["flags"],
                         id=config["report_id"], resume="allow")
    except wandb.Error as error:
        raise UserError(f"--report wandb: {error} Or set WANDB_MODE=offline.") from None
    # wandb drops what is logged at a step of its own that it has seen, as a resumed run does: here it is a number more
    run.define_metric("*", step_metric="step")
    return lambda step, numbers: run.log(numbers | {"step": step})


REPORTS = {"tensorboard": _tensorboard, "wandb": _wandb}
