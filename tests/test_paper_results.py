"""One's own evaluations beside the paper's results.   python -m pytest tests/test_paper_results.py"""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
from conftest import call, ended

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "figures"))
from rlt.errors import UserError  # noqa: E402
from rlt.paper import COUNTDOWN, TABLE_1, TABLE_2, overall  # noqa: E402

import paper_results  # noqa: E402

OVERALL = {  # the paper's own column, which is not in rlt/paper.py
    "QwQ-32B": 65.03, "DeepSeek-R1": 82.87, "Qwen2.5-7B-Instruct": 39.17, "Bespoke-7B-1K": 42.37, "RLT-7B-1K": 47.43,
    "Bespoke-7B": 46.60, "RLT-7B": 49.50, "Qwen2.5-32B-Instruct": 53.23, "s1-32B": 66.40,
    "s1-32B + budget forcing": 69.77, "Bespoke-32B-1K": 65.60, "RLT-32B-1K": 71.37, "Sky-T1-32B": 60.83,
    "Bespoke-32B": 71.47, "RLT-32B": 73.23, "7B + RL, no cold start": 40.77, "RL-teacher traces, raw, + RL": 38.60,
    "RL-teacher traces, GPT-edited, + RL": 43.93, "Bespoke-7B + RL": 48.30, "RLT-7B + RL": 50.53,
}


def test_the_columns_give_the_overall_that_the_paper_prints():
    assert OVERALL.keys() == (TABLE_1 | TABLE_2).keys()
    for name, printed in OVERALL.items():
        assert abs(overall(name) - printed) < 0.0051, name


def write(folder, task, mean, error, questions, protocol="skythought"):
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"exact_match": {"mean": mean, "standard_error": error}, "questions": questions, "protocol": protocol}
    (folder / f"eval_{task}.json").write_text(json.dumps(summary | {"flags": {}}))


@pytest.fixture
def folders(tmp_path):
    """Evaluations of two models: one has all tasks, the other two of them, at both ends of the axis."""
    one, other = tmp_path / "one", tmp_path / "other"
    write(one, "aime24", 0.1, 0.06, 30)
    write(one, "math500", 0.75, 0.02, 500, "ours")
    write(one, "gpqa", 0.32, 0.03, 198)
    write(one, "countdown", 0.99, 0.05, 128, "ours")
    write(other, "aime24", 0.0, None, 1)
    write(other, "math500", 0.998, 0.01, 250)
    return [one, other]


def test_numbers_errors_stars_and_parts(folders):
    one, other = folders
    own = paper_results.read_own(folders)
    assert own[str(one)]["math500"] == (75.0, 2.0, "75.0*")
    mean, error, text = own[str(one)]["overall"]
    assert math.isclose(mean, (10 + 75 + 32) / 3) and text == "39.0*"
    assert math.isclose(error, math.sqrt(6**2 + 2**2 + 3**2) / 3)
    assert own[str(one)]["countdown"][2] == "99.0, n = 128"
    assert own[str(other)] == {"aime24": (0.0, 0.0, "0.0, n = 1"), "math500": (99.8, 1.0, "99.8, n = 250")}
    mean, error, text = paper_results.of_paper(TABLE_1)["RLT-7B"]["aime24"]
    assert (mean, text) == (23.3, "23.3") and math.isclose(error, 100 * math.sqrt(0.233 * 0.767 / 30))


def check(figure, numbers):
    """Whiskers end between 0 and 100, texts are inside the figure and don't overlap, all numbers are shown."""
    figure.canvas.draw()
    shown, boxes, whiskers = [], [], 0
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        for lines in axes.collections:
            for segment in getattr(lines, "get_segments", list)():
                whiskers += 1
                assert all(0 <= x <= 100 for x, _ in segment)
        texts = [text for text in axes.texts + axes.get_yticklabels() + axes.get_xticklabels()
                 if text.get_text() and text.get_visible()]
        shown += [text.get_text() for text in axes.texts]
        boxes += [text.get_window_extent() for text in texts if text.get_tightbbox() is not None
                  and (text in axes.texts or axes is figure.axes[0])]
    boxes += [text.get_window_extent() for legend in figure.legends for text in legend.get_texts()]
    boxes.append(figure._suptitle.get_window_extent())
    for box in boxes:
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(any(text.startswith(f"{number:.1f}") for text in shown) for number in numbers)
    return whiskers, shown


def test_every_number_is_drawn_and_readable(folders):
    own = paper_results.read_own(folders)
    tasks = ["aime24", "math500", "gpqa", "overall"]
    for table in (TABLE_1, TABLE_2):
        figure = paper_results.draw_table("Title", table, own, tasks)
        numbers = [number for scores in table.values() for number in scores.values()]
        whiskers, shown = check(figure, [*numbers, *(OVERALL[name] + 1e-3 for name in table), 75.0, 99.8])
        assert whiskers == 4 * len(table) + 4 + 2 and shown.count("not evaluated") == 2
    figure = paper_results.draw_countdown(own)
    check(figure, [number for found in COUNTDOWN.values() for number in found][:3])
    assert "52.3 or 55.7 or 56.6" in [text.get_text() for text in figure.axes[0].texts]  # contradictory: all


def test_bars_differ_without_colour():
    looks = [(sum(paper_results.plt.matplotlib.colors.to_rgb(colour)), hatch)
             for colour, hatch, _ in paper_results.KINDS.values()]
    for (one, hatch), (other, another) in itertools.combinations(looks, 2):
        assert hatch != another or abs(one - other) > 0.3


def test_the_command_writes_pictures_of_ones_runs_and_nothing_else(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(paper_results.plt.rcParams, "savefig.dpi", 20)  # faster
    call(tmp_path, "figures/make_figures.py", "--runs", *folders, "--out", "pictures")
    names = {"table1.png", "table2.png", "figure1.png", "countdown.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    assert f"{folders[1]} has no Overall, and is not in figure1.png" in capsys.readouterr().out
    write(tmp_path / "toy", "toy", 0.1, 0.06, 30)
    with pytest.raises(UserError, match="toy has no evaluation of aime24, math500, gpqa, countdown"):
        paper_results.read_own([tmp_path / "toy"])
    assert ended(tmp_path, "figures/make_figures.py", "--runs", "toy").code == 2
