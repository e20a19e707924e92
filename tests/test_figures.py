"""Figures and tables come from the committed logs, and are up to date.   python -m pytest tests/test_figures.py"""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "figures"))
import make_figures  # noqa: E402


def test_every_table_and_figure_is_made_from_the_committed_logs(tmp_path):
    shutil.copytree(ROOT, tmp_path / "rlt", ignore=shutil.ignore_patterns("*.png", "__pycache__", ".*", "runs"))
    tmp_path /= "rlt"
    done = subprocess.run([sys.executable, "figures/make_figures.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("README.md", "figures/README.md"):
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: run figures/make_figures.py"
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "figures").glob("*.png")}
    shown = (ROOT / "README.md").read_text() + (ROOT / "figures/README.md").read_text()
    assert all(name in shown for name in drawn)


def test_every_row_of_the_study_says_how_it_was_made():
    for line in (ROOT / "figures/logs/toy_study.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["commands"] or row["arm"] == "base", row["arm"]
        assert all(row[key] for key in ("arm", "date", "machine", "torch", "transformers", "commit", "minutes"))
        assert all(command.startswith("python ") for command in row["commands"])


def test_arms_side_by_side_are_of_the_same_seeds(monkeypatch):
    seeds = {"a": (0, 1, 2, 3), "b": (1, 3, 4), "missing": ()}
    monkeypatch.setattr(make_figures, "of", lambda arm, setting="toy": [{"seed": seed} for seed in seeds[arm]])
    rows_of = make_figures.together(seeds)
    for arm, shown in {"a": [1, 3], "b": [1, 3], "missing": []}.items():
        assert [row["seed"] for row in rows_of(arm)] == shown


def test_intervals_are_students():
    """Five values by hand: mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom 2.776."""
    mean, half = make_figures.interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)


def test_correlations_by_hand():
    pearson, spearman = make_figures.correlations(range(5), [0, 0.1, 0.2, 0.3, 9.0])
    assert spearman == pytest.approx(1) and 0.70 < pearson < 0.73
    assert make_figures.correlations(range(3), [3, 2, 1]) == (pytest.approx(-1), pytest.approx(-1))


def test_usable_groups_by_enumeration():
    for right in range(9):
        draws = [True] * right + [False] * (8 - right)
        groups = list(itertools.combinations(draws, 4))
        mixed = sum(0 < sum(group) < 4 for group in groups) / len(groups)
        assert make_figures.usable(right, 8, group=4) == pytest.approx(mixed)
        assert make_figures.all_of(8 - right, 8, group=4) == sum(not any(group) for group in groups) / len(groups)
