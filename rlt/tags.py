# SPDX-License-Identifier: MIT
"""The tags around the sections of a turn: those of Bespoke-Stratos and of the released RLT code (custom_data/)."""

THOUGHT = ("<|begin_of_thought|>", "<|end_of_thought|>")
SOLUTION = ("<|begin_of_solution|>", "<|end_of_solution|>")
EXPLANATION = ("<|begin_of_explanation|>", "<|end_of_explanation|>")
