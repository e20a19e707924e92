# SPDX-License-Identifier: MIT
"""Errors that are made for the user."""


class UserError(ValueError):
    """Something the user can fix: a flag, a row, a folder, a model. Scripts print it as one line and exit with code 2.

    The message says what came, what was expected and what to do next. Any other exception keeps its traceback.
    """
