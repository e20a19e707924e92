"""Training curves of several runs over each other.   python -m pytest tests/test_compare_runs.py"""

import json
import sys

from rlt.errors import UserError

import pytest
from conftest import ROOT, call

sys.path.insert(0, str(ROOT / "figures"))
import compare_runs  # noqa: E402


@pytest.fixture
def folders(tmp_path):
    """Two runs: one of 7 steps with a measurement every third, cut short by a kill; one of one step."""
    for name, steps in (("a", 7), ("b", 1)):
        (tmp_path / name).mkdir()
        entries = [{"step": i, "reward": float(i * i), "kl": None if i == 1 else 0.5, "note": "x",
                    "eval_reward": 10.0 * i if i % 3 == 0 else None} for i in range(steps)]
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"step": 7, "re')
    return tmp_path


def test_curves_are_those_of_the_logs(folders):
    curves = compare_runs.read_curves([folders / "a", folders / "b"])
    a, b = curves.values()
    assert a == {"reward": (tuple(range(7)), (0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0)),
                 "kl": ((0, 2, 3, 4, 5, 6), (0.5,) * 6),
                 "eval_reward": ((0, 3, 6), (0.0, 30.0, 60.0))}
    assert b == {"reward": ((0,), (0.0,)), "kl": ((0,), (0.5,)), "eval_reward": ((0,), (0.0,))}
    figure = compare_runs.draw(curves, ["reward", "eval_reward", "loss"], 3)
    reward, measured, missing = figure.axes[:3]
    faint, mean, *other = reward.lines
    assert list(faint.get_ydata()) == [0, 1, 4, 9, 16, 25, 36] and list(faint.get_xdata()) == list(range(7))
    assert list(mean.get_ydata())[1:-1] == pytest.approx([5 / 3, 14 / 3, 29 / 3, 50 / 3, 77 / 3])
    assert list(measured.lines[1].get_ydata()) == [0, 30, 60] and measured.lines[1].get_marker() == "."
    assert mean.get_linestyle() != other[1].get_linestyle() and mean.get_color() != other[1].get_color()
    assert not missing.lines and len(figure.legends[0].texts) == 2


def test_a_picture_of_two_runs(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    call(folders, "figures/compare_runs.py", "a", "b", "--out", "new/curves.png")
    assert (folders / "new/curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == "new/curves.png: reward, kl, eval_reward\n"
    with pytest.raises(UserError, match="--keys rewrad is in no run, expected some of reward, kl, eval_reward."):
        call(folders, "figures/compare_runs.py", "a", "--keys", "rewrad")
    with pytest.raises(UserError, match="nowhere has no steps in metrics.jsonl: expected a run folder"):
        call(folders, "figures/compare_runs.py", "a", "nowhere")
