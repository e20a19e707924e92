# SPDX-License-Identifier: MIT
"""
Defaults that depend on the model: the toy's numbers suit the toy alone.

--help shows both. Where a flag is not given, `settle` puts the right one in its place once the rows are read, prints
what it chose for another model, and config.json has it like any other value.
"""

from contextlib import suppress
from math import ceil
from typing import Any, NamedTuple

from rlt.chat_template import tokenize
from rlt.errors import UserError, flag_of

SHORT, STEP = 1024, 256  # tokens of a completion if nothing is known of its length; lengths are rounded up to STEP
MAY_BE_THE_TOYS = ("lr", "max_new_tokens")  # where the toy's value hurts a real model


class ByModel(NamedTuple):
    """A default that is `toy` on the toy, and `other` on another model: a value, or a function of the flags and Rows.
    words: what --help says of a function."""

    toy: float
    other: Any
    words: str = ""

    def __str__(self):
        return f"{self.toy:g} on the toy, else {self.words or format(self.other, 'g')}"


class Rows(NamedTuple):
    """What defaults depend on."""

    count: int
    longest: int  # explanation, tokens; 0: there are none
    context: float  # tokens that the model can read


def _max_new_tokens(args, rows):
    return int(min(ceil(rows.longest / STEP) * STEP or SHORT, rows.context // 2))


def _steps(args, rows):
    return max(1, ceil(3 * (rows.count - args.val_rows) / args.batch_size))


DEFAULTS = {  # in this order: later ones may be made of earlier ones
    "held-out rows": ByModel(64, lambda args, rows: min(64, rows.count // 10), "a tenth of the rows, at most 64"),
    "new tokens": ByModel(48, _max_new_tokens, f"the rows' longest explanation, rounded up to {STEP}s, or {SHORT} "
                          "where they have none; at most half the context"),
    "RL lr": ByModel(2e-3, 2e-5),
    "SFT batch": ByModel(64, 16),
    "SFT steps": ByModel(150, _steps, "three epochs"),
    "SFT lr": ByModel(2e-3, lambda args, rows: 1e-5 if args.lora_rank == 0 else 1e-4, "1e-4, all weights 1e-5"),
    "SFT warm-up": ByModel(10, lambda args, rows: args.steps // 10, "a tenth of --steps"),
}


def settle(parser, args, rows, tokenizer):
    """Put a value in the place of every default of DEFAULTS in args, and print those of another model than the toy.

    rows: as load_rows gives them. The parser gets the values, too, so that flags.carry leaves them out.
    """
    from rlt import models

    toy, chosen = models.is_toy(args.model), []
    facts = Rows(len(rows), _longest_explanation(rows, tokenizer), models.context_length(args.model))
    for default in DEFAULTS.values():
        for name in [name for name, value in vars(args).items() if value is default]:
            value = default.toy if toy else default.other
            if callable(value):
                value = value(args, facts)
            setattr(args, name, value)
            parser.set_defaults(**{name: value})
            chosen.append(name)
    if toy:
        return
    chosen += [name for name in ("bits", "teacher_bits") if name in args and parser.get_default(name)]  # choose_bits
    if chosen:
        print("chosen for this model:", *(f"{flag_of(name)} {getattr(args, name):g}" for name in chosen))
    for name in MAY_BE_THE_TOYS:
        default = parser.get_default(name)  # still what it was where the flag is given
        if isinstance(default, ByModel) and getattr(args, name) == default.toy:
            print(f"warning: {flag_of(name)} {getattr(args, name):g} is the toy's value: leave the flag out for one "
                  "that suits this model")


def _longest_explanation(rows, tokenizer):
    """Tokens of the longest explanation, as those with the most characters tell."""
    texts = sorted((row["explanation"] for row in rows if isinstance(row.get("explanation"), str)), key=len)[-10:]
    lengths = [0]
    for text in texts:
        with suppress(UserError):  # whoever reads the rows names this one
            lengths.append(len(tokenize(tokenizer, text)["input_ids"]))
    return max(lengths)
