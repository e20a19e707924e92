# SPDX-License-Identifier: MIT
"""The tags around the sections of a turn: those of Bespoke-Stratos and of the released RLT code (custom_data/)."""

THOUGHT = ("<|begin_of_thought|>", "<|end_of_thought|>")
SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
EXPLANATION = ("<|begin_of_explanation|>", "<|end_of_explanation|>")


def tagged_answer(thought, solution):
    """An assistant's turn of a thought, which ends with its own blank line, and a solution."""
    return f"{THOUGHT[0]}\n\n{thought}{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n{solution}\n\n{SOLUTION[1]}"
