# SPDX-License-Identifier: MIT
"""One's own evaluations beside the results printed in the RLT paper: its Tables 1 and 2, Figure 1, and Countdown."""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt.errors import UserError
from rlt.evaluations import read_summary
from rlt.paper import COUNTDOWN, QUESTIONS, TABLE_1, TABLE_2

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from plotting import BLUE, GREY, ORANGE, RED

TITLES = {"aime24": "AIME 2024", "math500": "MATH-500", "gpqa": "GPQA diamond", "overall": "Overall: mean of the three",
          "countdown": "Countdown"}
KINDS = {  # of a bar: (colour, hatch, legend)
    "other": (GREY, "", "other models (paper)"),
    "r1": (BLUE, "///", "SFT on traces of a large model, or of an RL teacher (paper)"),
    "rlt": (RED, "", "SFT on an RLT's explanations (paper)"),
    "yours": (ORANGE, "...", "yours"),
}
NOTE = "\n* not by the paper's protocol, --protocol skythought; n: questions, where they are not the whole set"
WHISKER = "± standard error over questions, cut at 0 and 100 (the paper's: of one answer a question, computed here)"


def kind_of(name):
    """Which of KINDS a row of the paper's tables is."""
    if "RLT" in name:
        return "rlt"
    return "r1" if name.startswith(("Bespoke", "s1", "Sky-T1", "RL-teacher", "SFT")) else "other"


def read_own(folders):
    """{folder: {task: (%, standard error, text)}} of evaluations in these folders; "overall" where there are all three.

    The text is the number, with its questions where they are not the whole set, and a star where the protocol is not
    the paper's. Raises UserError where a folder has no evaluation of these tasks.
    """
    own = {}
    for folder in folders:
        found = {task: Path(folder) / f"eval_{task}.json" for task in (*QUESTIONS, "countdown")}
        found = {task: read_summary(path) for task, path in found.items() if path.is_file()}
        if not found:
            raise UserError(f"{folder} has no evaluation of {', '.join((*QUESTIONS, 'countdown'))}: expected a folder "
                            "with eval_math500.json, say, which evaluate.py --task math500 prints the path of.")
        own[str(folder)] = {task: _shown(task, summary) for task, summary in found.items()}
        if found.keys() >= QUESTIONS.keys():
            own[str(folder)]["overall"] = _overall([own[str(folder)][task] for task in QUESTIONS])
    return own


def _shown(task, summary):
    mean, error = (100 * (summary["exact_match"][key] or 0) for key in ("mean", "standard_error"))
    star = "*" if task in QUESTIONS and summary.get("protocol") != "skythought" else ""
    part = f", n = {summary['questions']}" if summary["questions"] != QUESTIONS.get(task) else ""
    return mean, error, f"{mean:.1f}{star}{part}"


def _overall(scores):
    means, errors, texts = zip(*scores, strict=True)
    mean = statistics.fmean(means)
    return mean, math.hypot(*errors) / len(errors), f"{mean:.1f}" + "*" * any("*" in text for text in texts)


def of_paper(table):
    """The same of a table of the paper. Standard errors are those of one answer to each question, computed here."""
    rows = {}
    for name, scores in table.items():
        rows[name] = {task: (score, math.sqrt(score * (100 - score) / QUESTIONS[task]), f"{score:.1f}")
                      for task, score in scores.items()}
        rows[name]["overall"] = _overall(list(rows[name].values()))
    return rows


def label(name):
    """A row's name; of a long path only its end."""
    return name if len(name) <= 36 else f"...{name[-34:]}"


def draw_bars(axes, task, rows, own):
    """Horizontal bars of a task: of the paper's rows above, of one's own below. A row without it has no bar."""
    names = [*rows, *own]
    for place, name in enumerate(reversed(names)):
        if task not in (rows | own)[name]:
            axes.annotate("not evaluated", (2, place), fontsize=6, va="center")
            continue
        mean, error, text = (rows | own)[name][task]
        colour, hatch, _ = KINDS["yours" if name in own else kind_of(name)]
        axes.barh(place, mean, 0.72, color=colour, hatch=hatch, edgecolor="white", lw=0)
        low, high = max(0, mean - error), min(100, mean + error)
        axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="none", ecolor="black", elinewidth=0.8,
                      capsize=2)
        axes.annotate(text, (high, place), (3, 0), textcoords="offset points", fontsize=6, va="center")
    axes.set_title(TITLES[task])
    axes.set_xlim(0, 140)  # room for the numbers
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("right, %")
    axes.set_yticks(range(len(names)), [label(name) for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)


def draw_table(title, table, own, tasks):
    """A figure with a panel for each task."""
    rows = of_paper(table)
    size = (2.6 + 2 * max(2, len(tasks)), 1.8 + 0.2 * len(rows | own))
    figure, panels = plt.subplots(1, len(tasks), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, task in zip(panels[0], tasks, strict=True):
        draw_bars(axes, task, rows, own)
    kinds = [KINDS[kind] for kind in dict.fromkeys([*map(kind_of, rows), *["yours"] * bool(own)])]
    handles = [Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=label) for colour, hatch, label in kinds]
    handles.append(Line2D([], [], color="black", marker="|", lw=0.8, label=WHISKER))
    figure.suptitle(title + NOTE * bool(own), fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(tasks)))
    return figure


def draw_countdown(own):
    """Countdown: the paper's own figure was not at hand, so every number that notes on it give is a mark."""
    own = {name: scores for name, scores in own.items() if "countdown" in scores}
    names = [*COUNTDOWN, *own]
    figure, axes = plt.subplots(figsize=(5.2, 1.6 + 0.25 * len(names)), layout="constrained")
    for place, name in enumerate(reversed(names)):
        if name in own:
            mean, error, text = own[name]["countdown"]
            low, high = max(0, mean - error), min(100, mean + error)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="s", color=ORANGE, ecolor="black",
                          elinewidth=0.8, capsize=2)
        else:
            colour = KINDS[kind_of(name)][0]
            axes.plot(COUNTDOWN[name], [place] * len(COUNTDOWN[name]), "o", color=colour, mfc="none")
            high, text = max(COUNTDOWN[name]), " or ".join(f"{number:.1f}" for number in COUNTDOWN[name])
        axes.annotate(text, (high, place), (6, 0), textcoords="offset points", fontsize=6, va="center")
    axes.set_yticks(range(len(names)), [label(name) for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlim(0, 125)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("right, %")
    marks = [("o", "black", "none", "each number that a note on the paper gives")]
    marks += [("s", ORANGE, ORANGE, "yours, ± standard error over its n questions")] * bool(own)
    handles = [Line2D([], [], marker=marker, color=colour, mfc=inside, ls="", label=label)
               for marker, colour, inside, label in marks]
    figure.suptitle("Countdown: yours are other questions than the paper's" if own else "Countdown", fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=1)
    return figure


def draw(folders, out):
    """Write the four figures into the folder `out`."""
    own = read_own(folders)
    compared = {name: (TABLE_1 | TABLE_2)[name] for name in (
        "Qwen2.5-7B-Instruct", "Bespoke-7B", "RLT-7B", "Qwen2.5-32B-Instruct", "Bespoke-32B", "RLT-32B",
        "7B + RL, no cold start", "Bespoke-7B + RL", "RLT-7B + RL")}
    with_overall = {name: scores for name, scores in own.items() if "overall" in scores}
    tasks = [*QUESTIONS, "overall"]
    figures = {
        "table1": draw_table("Students: Table 1 of arXiv 2506.08388", TABLE_1, own, tasks),
        "table2": draw_table("RL on correctness after SFT, 7B: Table 2 of arXiv 2506.08388", TABLE_2, own, tasks),
        "figure1": draw_table("Students and cold starts, as in Figure 1 of arXiv 2506.08388", compared, with_overall,
                              ["overall"]),
        "countdown": draw_countdown(own),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png")
        plt.close(figure)
        print(out / f"{name}.png")
    for name in own.keys() - with_overall.keys():
        print(f"{name} has no Overall, and is not in figure1.png: that takes {', '.join(QUESTIONS)}")
