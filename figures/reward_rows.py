# SPDX-License-Identifier: MIT
"""Explanations with the numbers of their tokens, as train_rlt.py and distill.py write them: read, and taken apart."""

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rlt.errors import UserError
from rlt.files import read_jsonl

LEVELS = (0.1, 0.5, 1.0, 3.0)  # nats: where a KL, or minus a log-prob, gets the next of five shades


@dataclass(frozen=True)
class Settings:
    """What the reward of these rows was computed with: flags of train_rlt.py or distill.py."""

    lam: float
    alpha: float
    kl: str
    unclosed_penalty: float

    @property
    def kl_name(self):
        """What a token's number is called: --kl sampled takes the log-ratio of the sampled token."""
        return "KL" if self.kl == "exact" else "log-ratio"


@dataclass(frozen=True)
class Scored:
    """One explanation. Its tokens and their numbers in nats; the reward, and what it is made of."""

    row: dict
    thought: list  # texts of the explanation's tokens
    token_kl: list  # KL of each, or its log-ratio: Settings.kl
    solution: list  # texts of the solution's tokens
    logprobs: list  # the student's log-prob of each
    reward: float
    score: float
    score_mean: float
    score_min: float
    kl: float
    kl_mean: float
    kl_max: float
    penalty: float  # what the reward lacks to score - lambda * kl

    @property
    def hardest(self):
        """The position of the explanation's token with the highest KL. None: it has no token."""
        return max(range(len(self.token_kl)), key=self.token_kl.__getitem__, default=None)

    @property
    def least(self):
        """The position of the solution's token with the lowest log-prob."""
        return min(range(len(self.logprobs)), key=self.logprobs.__getitem__)


def level(nats):
    """The shade, 0 to 4, of a KL or of minus a log-prob."""
    return sum(nats >= limit for limit in LEVELS)


def read_scored(source):
    """(Settings, groups) of a run folder or of a file by distill.py: groups are lists of Scored.

    A group holds the explanations of one question (of one step, where rows have one), highest reward first. Groups are
    in the order of the file. Rows without numbers per token are left out. Raises UserError where none is left.
    """
    source = Path(source)
    rows_path, config_path = source, Path(f"{source}.config.json")
    if source.is_dir():
        rows_path, config_path = source / "samples.jsonl", source / "config.json"
    if not rows_path.exists():
        raise UserError(f"{rows_path} does not exist: expected a run folder of train_rlt.py, or a file by distill.py.")
    try:
        rows = [row for row in read_jsonl(rows_path) if "tokens" in row]
    except UserError as error:
        raise UserError(f"{error} Rows in any other format are scored with --model and --student.") from None
    if not rows:
        raise UserError(f"{rows_path} has no rewards token by token: pass --model (the teacher) and --student to score "
                        "its explanations now.")
    try:
        flags = json.loads(config_path.read_text())["flags"]
        settings = Settings(flags["lam"], flags["alpha"], flags["kl"], flags["unclosed_penalty"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{config_path} is missing or can't be read: it holds lambda and alpha of these rewards. "
                        "Restore it, or pass --model and --student to score the explanations again.") from None
    groups = {}
    for row in rows:
        if isinstance(row.get("reward"), float) and math.isfinite(row["reward"]):
            groups.setdefault((row.get("step"), row["question"]), []).append(take_apart(row, settings))
    if not groups:
        raise UserError(f"{rows_path} has no reward that is finite: teacher or student computes NaN or infinity.")
    return settings, [sorted(group, key=lambda scored: -scored.reward) for group in groups.values()]


def take_apart(row, settings):
    """Scored of one row: means and extremes from its tokens, score, kl and reward as they were logged."""
    tokens = row["tokens"]
    counted = tokens["kl"] or [1.0]  # an empty explanation counts as one token of KL 1
    return Scored(
        row, tokens["thought"], tokens["kl"], tokens["solution"], tokens["logprob"], row["reward"], row["score"],
        statistics.fmean(tokens["logprob"]), min(tokens["logprob"]), row["kl"], statistics.fmean(counted), max(counted),
        row["score"] - settings.lam * row["kl"] - row["reward"])


def equations(scored, settings):
    """[(name, value, what it is made of)] of an explanation's reward, as text: equations (3), (4) and (5)."""
    alpha, lam = f"{settings.alpha:g}", f"{settings.lam:g}"
    penalty = ""
    if abs(scored.penalty) > 1e-3:
        reason = "other terms"
        if math.isclose(scored.penalty, settings.unclosed_penalty, abs_tol=1e-3):
            if not scored.row["closed"]:
                reason = "not closed"
            elif not "".join(scored.thought).strip():
                reason = "empty"
        penalty = f" − {scored.penalty:.4g} ({reason})"
    return [
        ("score", number(scored.score), f"mean {number(scored.score_mean)} + {alpha} × min {number(scored.score_min)}"),
        ("kl", number(scored.kl), f"mean {number(scored.kl_mean)} + {alpha} × max {number(scored.kl_max)}"),
        ("reward", number(scored.reward), f"score {number(scored.score)} − {lam} × kl {number(scored.kl)}{penalty}"),
    ]


def number(value):
    """Two decimals, three of a number near 0, and a real minus sign."""
    return f"{value:.{3 if abs(value) < 0.1 else 2}f}".replace("-", "−")


def visible(text):
    """A token's text with what can't be seen made visible: a line end as ↵, control characters escaped."""
    return "".join(c if c.isprintable() else "↵\n" if c == "\n" else c.encode("unicode_escape").decode() for c in text)
