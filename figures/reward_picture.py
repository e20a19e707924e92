# SPDX-License-Identifier: MIT
"""The explanations of one question as a picture: tokens shaded by KL and log-prob, and what the reward is made of."""

import textwrap
import warnings

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from plotting import BLUE, ORANGE, save
from reward_rows import equations, level, number, read_scored, visible
from study_log import LOGS

WIDTH = 78  # characters in a line of tokens
LINES = 12  # at most, of one explanation
GAP = 0.4  # columns on both sides of a marked token
SHADES = (0.0, 0.12, 0.25, 0.4, 0.55)  # opacity of the five levels
CRATE = LOGS / "crate.jsonl"


def token_lines(texts, values, marked):
    """Tokens in lines of at most WIDTH characters: lists of (column, text, value, whether it is the marked one)."""
    lines, column, ended = [[]], 0, False
    for i, (text, value) in enumerate(zip(texts, values, strict=True)):
        shown, gap = visible(text).replace("\n", ""), GAP * (i == marked)
        if column and (column + len(shown) > WIDTH or ended and text.strip("\n")):
            lines.append([])
            column = 0
        lines[-1].append((column + gap, shown, value, i == marked))
        column, ended = column + len(shown) + 2 * gap, "\n" in text
    return lines if len(lines) <= LINES else [*lines[:LINES], [(0, "...", 0.0, False)]]


def draw_tokens(axes, y, name, lines, colour, symbol, sign):
    """Lines of tokens from y downwards -> the y below them. A token's level is its shade and the weight of its line."""
    for i, line in enumerate(lines):
        if any(marked for *_, marked in line):
            y -= 0.5  # room for its number
        if i == 0:
            axes.text(-13, y, name, va="center", fontsize=7)
        for column, text, value, marked in line:
            shade = level(sign * value)
            axes.add_patch(Rectangle((column, y - 0.42), len(text), 0.84, color=colour, alpha=SHADES[shade], lw=0))
            if shade:
                axes.plot([column + 0.1, column + len(text) - 0.1], [y - 0.42] * 2, color="black", lw=0.6 * shade,
                          solid_capstyle="butt")
            if marked:
                axes.add_patch(Rectangle((column - GAP / 2, y - 0.62), len(text) + GAP, 1.14, fill=False, lw=0.9))
                axes.text(column, y + 0.5, f"{symbol} {number(value)}", va="bottom", fontsize=5.5)
            for place, character in enumerate(text):  # one by one: the columns then hold for every font
                axes.text(column + place + 0.5, y, character, ha="center", va="center", fontsize=7, parse_math=False,
                          family="monospace")
        y -= 1.5
    return y


def draw(group, settings):
    """A figure of the explanations of one question, highest reward first. group: Scored rows."""
    figure, axes = plt.subplots()
    axes.axis("off")
    y = 0.0
    for line in textwrap.wrap(visible(group[0].row["question"]).replace("↵", " "), 110)[:4]:
        axes.text(-13, y, line, va="center", fontsize=8, weight="bold", parse_math=False)
        y -= 1.2
    for scored in group:
        axes.axhline(y, color="#bbbbbb", lw=0.6)
        y -= 1.4
        for i, (name, value, parts) in enumerate(equations(scored, settings)):
            weight = "bold" if name == "reward" else "normal"
            axes.text(WIDTH + 3, y - 1.4 * i, name, va="center", fontsize=7, weight=weight)
            axes.text(WIDTH + 17, y - 1.4 * i, value, va="center", ha="right", fontsize=7, weight=weight)
            axes.text(WIDTH + 18, y - 1.4 * i, f"= {parts}", va="center", fontsize=7)
        lowest = y - 4.2
        explanation = token_lines(scored.thought, scored.token_kl, scored.hardest)
        y = draw_tokens(axes, y, scored.row.get("by", "explanation"), explanation, ORANGE, "▲", 1)
        solution = token_lines(scored.solution, scored.logprobs, scored.least)
        y = draw_tokens(axes, y, "solution", solution, BLUE, "▼", -1)
        y = min(y + 0.3, lowest)
    axes.set_xlim(-13, WIDTH + 55)
    axes.set_ylim(y, 1)
    figure.set_size_inches(11, 0.155 * (1 - y))
    return figure


def save_as(figure, path):
    """Write the figure to this path, and close it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a character that the font lacks is an empty box
        figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def crate():
    """Four explanations of one word problem, scored by SmolLM2-135M."""
    settings, (group,) = read_scored(CRATE)
    save(draw(group, settings), "reward_crate")


FIGURES = (crate,)
