# SPDX-License-Identifier: MIT
"""The explanations of one question as a picture: tokens shaded by KL and log-prob, and what the reward is made of."""

import textwrap

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from plotting import BLUE, ORANGE, save
from reward_rows import equations, level, number, read_scored, visible
from study_log import LOGS

WIDTH = 84  # characters in a line of tokens
LINES = 12  # at most, of one explanation
SHADES = (0.0, 0.15, 0.35, 0.6, 0.9)  # opacity of the five levels
CRATE = LOGS / "crate.jsonl"


def token_lines(texts, values, marked):
    """Tokens in lines of at most WIDTH characters: lists of (column, text, value, whether it is the marked one)."""
    lines, column = [[]], 0
    for i, (text, value) in enumerate(zip(texts, values, strict=True)):
        shown = visible(text)
        width = max(map(len, shown.split("\n")))
        if column and column + width > WIDTH:
            lines.append([])
            column = 0
        lines[-1].append((column, shown.replace("\n", ""), value, i == marked))
        column += width
        if "\n" in shown and i + 1 < len(texts):
            lines.append([])
            column = 0
    lines = [line for line in lines if line]
    return lines if len(lines) <= LINES else [*lines[:LINES], [(0, "...", 0.0, False)]]


def draw_tokens(axes, y, lines, colour, symbol, sign):
    """Lines of tokens from y downwards -> the y below them. A token's level is its shade and the weight of its line."""
    for line in lines:
        for column, text, value, marked in line:
            shade = level(sign * value)
            axes.add_patch(Rectangle((column, y - 0.42), len(text), 0.84, color=colour, alpha=SHADES[shade], lw=0))
            if shade:
                axes.plot([column + 0.1, column + len(text) - 0.1], [y - 0.42] * 2, color="black", lw=0.6 * shade,
                          solid_capstyle="butt")
            if marked:
                axes.add_patch(Rectangle((column, y - 0.5), len(text), 1, fill=False, lw=1.2))
                axes.text(column + len(text) / 2, y + 0.5, f"{symbol} {number(value)}", ha="center", va="bottom",
                          fontsize=5.5)
            for place, character in enumerate(text):  # one by one: the columns then hold for every font
                axes.text(column + place + 0.5, y, character, ha="center", va="center", fontsize=7, parse_math=False,
                          family="monospace", weight="bold" if marked else "normal")
        y -= 1.5
    return y


def draw(group, settings):
    """A figure of the explanations of one question, highest reward first. group: Scored rows."""
    laid_out = [(token_lines(x.thought, x.token_kl, x.hardest), token_lines(x.solution, x.logprobs, x.least))
                for x in group]
    question = textwrap.wrap(visible(group[0].row["question"]).replace("↵", " "), 110)[:4]
    height = sum(1.5 * (len(thought) + len(solution)) + 1.7 for thought, solution in laid_out) + len(question) + 1
    figure, axes = plt.subplots(figsize=(11, 0.155 * height + 0.3))
    axes.set_xlim(-14, WIDTH + 50)
    axes.set_ylim(-height, 1)
    axes.axis("off")
    y = 0.0
    for line in question:
        axes.text(-14, y, line, va="center", fontsize=8, weight="bold", parse_math=False)
        y -= 1.2
    y -= 1
    for scored, (thought, solution) in zip(group, laid_out, strict=True):
        axes.axhline(y + 1.1, color="#bbbbbb", lw=0.6)
        for i, (name, value, parts) in enumerate(equations(scored, settings)):
            weight = "bold" if name == "reward" else "normal"
            axes.text(WIDTH + 3, y - 1.4 * i, f"{name} {value}", va="center", fontsize=7, weight=weight)
            axes.text(WIDTH + 15, y - 1.4 * i, f"= {parts}", va="center", fontsize=7)
        axes.text(-14, y, "explanation", va="center", fontsize=7)
        y = draw_tokens(axes, y, thought, ORANGE, "▲", 1)
        axes.text(-14, y, "solution", va="center", fontsize=7)
        y = draw_tokens(axes, y, solution, BLUE, "▼", -1) - 1.2
    return figure


def save_as(figure, path):
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def crate():
    """Four explanations of one word problem, scored by SmolLM2-135M."""
    settings, (group,) = read_scored(CRATE)
    save(draw(group, settings), "reward_crate")


FIGURES = (crate,)
