# SPDX-License-Identifier: MIT
"""
Training curves of several runs over each other, from their metrics.jsonl.

    python figures/compare_runs.py runs/teacher runs/other
    python figures/compare_runs.py runs/a runs/b --keys reward kl --out curves.png

A panel a quantity: faint lines are single steps, strong ones running means over --window steps. What is not measured at
every step has dots and no mean.
"""

import sys
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt import flags
from rlt.errors import UserError
from rlt.files import read_jsonl

import matplotlib.pyplot as plt
from plotting import BLUE, GREY, ORANGE, PURPLE, RED, smooth

KEYS = ("reward", "score", "kl", "solved", "closed", "leak", "length", "entropy", "kl_ref", "loss", "eval_reward",
        "eval_solved", "val_loss")  # shown where a run has logged them
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))  # runs differ without colour, too


def read_curves(folders):
    """{folder: {key: (steps, values)}} of the runs. Raises UserError where one has no metrics."""
    curves = {}
    for folder in folders:
        entries = read_jsonl(Path(folder) / "metrics.jsonl")
        if not entries:
            raise UserError(f"{folder} has no steps in metrics.jsonl: expected a run folder. Pass another.")
        numbers = [{key: value for key, value in entry.items() if isinstance(value, int | float)} for entry in entries]
        keys = dict.fromkeys(key for entry in numbers for key in entry if key != "step")
        curves[str(folder)] = {key: tuple(zip(*[(entry["step"], entry[key]) for entry in numbers if key in entry],
                                              strict=True)) for key in keys}
    return curves


def draw(curves, keys, window):
    """A figure of a panel for each key; a run that has not logged a key is missing from its panel."""
    columns = min(4, len(keys))
    figure, grid = plt.subplots(-(-len(keys) // columns), columns, squeeze=False, layout="constrained",
                                figsize=(2.8 * columns, 2.2 * -(-len(keys) // columns)))
    panels = dict(zip(keys, grid.flat, strict=False))
    for panel in grid.flat[len(keys):]:
        panel.axis("off")
    lines, colours, styles = {}, cycle((RED, BLUE, ORANGE, PURPLE, GREY)), cycle(STYLES)
    for (name, run), colour, style in zip(curves.items(), colours, styles, strict=False):
        for key in run.keys() & panels.keys():
            steps, values = run[key]
            panels[key].plot(steps, values, color=colour, alpha=0.25, lw=0.7)
            every_step = len(steps) > 1 and len(steps) == steps[-1] - steps[0] + 1
            lines[name], = panels[key].plot(steps, smooth(values, window) if every_step else values, color=colour,
                                            ls=style, lw=1.4, marker="" if every_step else ".")
    for key, panel in panels.items():
        panel.set_title(key)
        panel.set_xlabel("step")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2)
    return figure


def main():
    parser = flags.make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=flags.path, metavar="RUN", help="run folders")
    parser.add_argument("--keys", nargs="+", metavar="KEY", help="quantities of metrics.jsonl; default: the usual ones")
    parser.add_argument("--window", type=flags.number(int, 1), default=5, metavar="N", help="steps of a running mean")
    parser.add_argument("--out", type=Path, default=Path("runs/curves.png"), metavar="FILE", help="the picture")
    args = parser.parse_args()
    curves = read_curves(args.runs)
    logged = dict.fromkeys(key for run in curves.values() for key in run)
    unknown = [key for key in args.keys or () if key not in logged]
    if unknown:
        raise UserError(f"--keys {unknown[0]} is in no run, expected some of {', '.join(logged)}.")
    keys = args.keys or [key for key in KEYS if key in logged]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, keys, args.window).savefig(args.out)
    print(f"{args.out}: {', '.join(keys)}")


if __name__ == "__main__":
    main()
