# SPDX-License-Identifier: MIT
"""
Countdown problems, drawn from a seed, and a solver for any: numbers, a target, and + - * / to reach it with.

    nums [76, 41, 59]  target 24   ->   59 - (76 - 41)

The level is how many numbers a problem has. Its target is drawn from the whole numbers from 1 to 100 that can be
reached, so that every problem has a solution. `data/prepare.py countdown` writes the rows.
"""

import random
from fractions import Fraction
from itertools import product

from rlt.steps import seed_for

NUMBERS, TARGETS = (1, 99), (1, 100)  # drawn from these, both ends included
LEVELS = (3, 4, 5)


def reachable(nums, *, fractions=False):
    """{value: expression} of what + - * / make of all the numbers, each used once. Three numbers take milliseconds.

    No value on the way is negative: any expression with a target above 0 can be rewritten so. fractions=True allows
    divisions with a remainder, and then nothing that can be reached is missing; it is slow beyond four numbers.
    """
    everything = (1 << len(nums)) - 1
    values = {1 << place: {number: str(number)} for place, number in enumerate(nums)}  # by subset, as bits
    for subset in range(1, everything + 1):
        if subset in values:
            continue
        found = {}
        part = (subset - 1) & subset
        while part:  # every split of the subset into two, in both orders
            for (a, left), (b, right) in product(values[part].items(), values[subset ^ part].items()):
                for value, sign in _combine(a, b, fractions):
                    if value not in found:
                        found[value] = f"({left} {sign} {right})"
            part = (part - 1) & subset
        values[subset] = found
    return {value: _without_outer_parentheses(text) for value, text in values[everything].items()}


def _combine(a, b, fractions):
    """(value, sign) of a and b, in this order; the commutative ones once."""
    if a <= b:
        yield a + b, "+"
        yield a * b, "*"
    if a >= b:
        yield a - b, "-"
    if b and (fractions or a % b == 0):
        yield Fraction(a) / b if fractions else a // b, "/"


def _without_outer_parentheses(text):
    return text[1:-1] if text.startswith("(") else text


def solve(nums, target):
    """An expression with the value `target`, or None where there is none."""
    return reachable(nums).get(target) or reachable(nums, fractions=True).get(target)


def draw_problems(count, level, seed):
    """`count` different problems as rows {"nums", "target", "expression"}: the same for the same arguments."""
    rng = random.Random(seed_for(seed, "countdown", level))
    problems = {}
    while len(problems) < count:
        nums = [rng.randint(*NUMBERS) for _ in range(level)]
        expressions = reachable(nums)
        targets = [value for value in range(TARGETS[0], TARGETS[1] + 1) if value in expressions]
        if targets:
            target = rng.choice(targets)
            problem = {"nums": nums, "target": target, "expression": expressions[target]}
            problems.setdefault((*sorted(nums), target), problem)
    return list(problems.values())
