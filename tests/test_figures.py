"""Figures and tables come from the committed logs, and are up to date.   python -m pytest tests/test_figures.py"""

import importlib.machinery
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ended

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "figures"
sys.path.insert(0, str(FIGURES))
from rlt import dry_run  # noqa: E402
from rlt.flags import RENAMED  # noqa: E402

import benchmarks  # noqa: E402
import machines  # noqa: E402
import make_figures  # noqa: E402
import plotting  # noqa: E402
import study_log  # noqa: E402
import study_steps  # noqa: E402
import study_tables  # noqa: E402
import toy_map  # noqa: E402
import toy_results  # noqa: E402
import toy_steps  # noqa: E402
import toy_study  # noqa: E402
import toy_time  # noqa: E402

TO_CARRY = shutil.ignore_patterns("*.png", "__pycache__", ".*", "runs")


# ---------------------------------------------------------------------------------------------------------
# everything together


def test_every_table_is_made_from_the_committed_logs(tmp_path):
    pages = [tmp_path / f"{i}.md" for i in range(len(make_figures.PAGES))]
    for page, committed in zip(pages, make_figures.PAGES, strict=True):
        shutil.copy(committed, page)
    for name, write in make_figures.TABLES.items():
        make_figures.replace_block(pages, name, write())
    for page, committed in zip(pages, make_figures.PAGES, strict=True):
        assert page.read_text() == committed.read_text(), f"{committed}: run figures/make_figures.py"


@pytest.mark.slow
def test_every_table_and_figure_is_made_by_one_command(tmp_path):
    shutil.copytree(ROOT, tmp_path / "rlt", ignore=TO_CARRY)
    tmp_path /= "rlt"
    done = subprocess.run([sys.executable, "figures/make_figures.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("README.md", "figures/README.md", "rlt/README.md"):
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page}: run figures/make_figures.py"
    drawn = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {path.name for path in FIGURES.glob("*.png")}
    shown = (ROOT / "README.md").read_text() + (FIGURES / "README.md").read_text()
    assert all(name in shown for name in drawn)


def test_no_module_of_figures_hides_another():
    """A script finds its own folder first: a toy.py beside make_figures.py would be imported as data/toy.py."""
    elsewhere = [path for path in sys.path if Path(path).resolve() != FIGURES]
    ours = {path.stem for folder in (ROOT, ROOT / "data", ROOT / "rlt", ROOT / "bench") for path in folder.iterdir()}
    for path in FIGURES.glob("*.py"):
        assert path.stem not in sys.stdlib_module_names | ours
        assert importlib.machinery.PathFinder.find_spec(path.stem, elsewhere) is None, path.stem


@pytest.fixture(scope="module")
def drawn():
    """{name: figure} of all figures of the toy, drawn but not saved."""
    figures = {}

    def keep(figure, name):
        figure.tight_layout()
        figure.canvas.draw()
        figures[name] = figure

    with pytest.MonkeyPatch.context() as patch:
        for module in (toy_results, toy_map):
            patch.setattr(module, "save", keep)
            for draw in module.FIGURES:
                draw()
    yield figures
    for figure in figures.values():
        plotting.plt.close(figure)


def test_bars_and_whiskers_end_inside_the_axes_and_labels_do_not_overlap(drawn):
    assert len(drawn) == len(toy_results.FIGURES) + len(toy_map.FIGURES)
    whiskers = 0
    for name, figure in drawn.items():
        for axes in figure.axes:
            (left, right), (bottom, top) = sorted(axes.get_xlim()), sorted(axes.get_ylim())
            for lines in axes.collections:
                for segment in getattr(lines, "get_segments", list)():
                    whiskers += 1
                    for x, y in segment:
                        assert left - 1e-9 <= x <= right + 1e-9 and bottom - 1e-9 <= y <= top + 1e-9, name
            for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
                boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
                assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), f"{name}: {labels}"
    assert whiskers > 100


def test_no_figure_of_the_toy_shows_numbers_of_the_papers(drawn):
    for name, figure in drawn.items():
        words = " ".join(text.get_text() for text in figure.findobj(plotting.matplotlib.text.Text))
        assert "paper" not in words and "7B" not in words, name


def test_a_block_is_replaced_on_the_one_page_that_has_it(tmp_path):
    mark, end = "<!-- claims: written by figures/make_figures.py -->\n", "<!-- end of claims -->"
    one, other = tmp_path / "one.md", tmp_path / "other.md"
    one.write_text(f"before\n{mark}old\nlines\n{end}\nafter\n")
    other.write_text("nothing here\n")
    make_figures.replace_block((one, other), "claims", r"new \1 \g<0>" + "\n")
    assert one.read_text() == f"before\n{mark}new \\1 \\g<0>\n{end}\nafter\n"
    assert other.read_text() == "nothing here\n"
    with pytest.raises(ValueError, match="0 blocks are marked <!-- machines"):
        make_figures.replace_block((one, other), "machines", "text\n")
    other.write_text(one.read_text())
    with pytest.raises(ValueError, match="2 blocks"):
        make_figures.replace_block((one, other), "claims", "text\n")


# ---------------------------------------------------------------------------------------------------------
# the log, and what is computed from it


def test_every_row_of_the_study_says_how_it_was_made():
    rows = study_log.study_rows()
    for row in rows:
        assert row["commands"] or row["arm"] == "base", row["arm"]
        facts = ("setting", "arm", "date", "machine", "torch", "transformers", "commit", "minutes")
        assert all(row[key] for key in facts)
        assert all(command.startswith("python ") for command in row["commands"])
    keys = [(row["setting"], row["arm"], row["seed"]) for row in rows]
    assert len(keys) == len(set(keys)), "an arm was logged twice"


def test_the_plan_is_what_the_log_holds():
    logged = {(row["setting"], row["seed"], row["arm"]) for row in study_log.study_rows()}
    assert set(toy_study.plan()) == logged


def test_a_missing_log_names_the_command_that_makes_it():
    with pytest.raises(FileNotFoundError, match="Make it with: python bench/none.py"):
        study_log.read_log("none.jsonl", "python bench/none.py")


@pytest.fixture
def small_log(monkeypatch):
    """A log of three arms: a on seeds 0 to 3, b on 1, 3 and 4, c on no seed of the toy."""
    seeds = {("a", "toy"): (3, 0, 1, 2), ("b", "toy"): (1, 3, 4), ("c", "rooms"): (0,)}
    rows = [{"setting": setting, "arm": arm, "seed": seed, "value": 10 * seed if arm == "a" else seed}
            for (arm, setting), own in seeds.items() for seed in own]
    monkeypatch.setattr(study_log, "study_rows", lambda: rows)


def test_rows_are_of_one_arm_and_setting_by_seed(small_log):
    assert [row["seed"] for row in study_log.rows_of("a")] == [0, 1, 2, 3]
    assert study_log.rows_of("a", "rooms") == [] and study_log.rows_of("c") == []


def test_arms_side_by_side_are_of_the_same_seeds(small_log):
    seeds = {arm: [row["seed"] for row in rows] for arm, rows in study_log.paired_rows(("a", "b", "c")).items()}
    assert seeds == {"a": [1, 3], "b": [1, 3], "c": []}


def test_differences_are_paired_by_seed(small_log):
    assert study_log.differences("a", "b", lambda row: row["value"]) == [10 - 1, 30 - 3]
    assert study_log.differences("a", "c", lambda row: row["value"]) == []


def test_an_arm_costs_what_its_commands_took_wherever_they_ran():
    """Shared steps count for every arm that needs them, once each; the base and the tests for none."""
    base, teacher, tests = "python data/toy.py", "python train_rlt.py", "python evaluate.py --task toy"
    seconds = {base: 100.0, teacher: 7.0, tests: 50.0, "python sft_student.py": 2.5}
    row = {"commands": [base, teacher, "python sft_student.py", teacher, tests]}
    assert toy_time.seconds_of(row, seconds) == 9.5
    assert toy_time.seconds_of({"commands": [base, tests]}, seconds) == 0
    with pytest.raises(KeyError):
        toy_time.seconds_of({"commands": ["python distill.py"]}, seconds)


def test_what_was_measured_on_what_is_said_once():
    def row(machine, torch, date):
        return {"machine": machine, "torch": torch, "date": date}

    assert study_log.measured([row("a GPU (RL); a CPU, one thread (the rest)", "2.13", "11-27"),
                               row("a CPU, one thread", "2.11", "11-21"), row("a GPU", "2.13", "11-23")]) == (
        "a GPU and a CPU, one thread; torch 2.11 and 2.13; 11-21 to 11-27")
    assert study_log.measured([row("a GPU", "2.13", "11-23")]) == "a GPU; torch 2.13; 11-23"


def test_intervals_are_students():
    """Five values by hand: mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom 2.776."""
    mean, half = study_log.interval([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(2.776 * (2.5 / 5) ** 0.5)
    mean, half = study_log.interval([7.0])
    assert mean == 7 and math.isnan(half)


def test_whiskers_are_cut_where_the_measure_ends():
    """Three values by hand: mean 80, standard deviation 20, t 4.303: half the interval is 49.7."""
    half = 4.303 * 20 / 3**0.5
    assert half == pytest.approx(49.687, abs=1e-3)
    mean, error = plotting.whisker([60, 80, 100], highest=100)
    assert mean == 80 and error == [[pytest.approx(half)], [20]]
    mean, error = plotting.whisker([0, 20, 40], highest=math.inf)
    assert mean == 20 and error == [[20], [pytest.approx(half)]]
    assert plotting.whisker([50], highest=100) == (50, None)


def test_correlations_by_hand():
    pearson, spearman = study_log.correlations(range(5), [0, 0.1, 0.2, 0.3, 9.0])
    assert spearman == pytest.approx(1) and 0.70 < pearson < 0.73
    assert study_log.correlations(range(3), [3, 2, 1]) == (pytest.approx(-1), pytest.approx(-1))


def test_equal_values_share_their_rank():
    assert study_log.ranks([5, 1, 5, 9]) == [1.5, 0, 1.5, 3]
    # Spearman of (0, 1, 2, 3) with ranks (0.5, 0.5, 2.5, 2.5): covariance 4, variances 5 and 4
    assert study_log.correlations(range(4), [1, 1, 2, 2])[1] == pytest.approx(4 / 20**0.5)


@pytest.mark.parametrize("values, expected", [
    ([1, 2, 3, 4, 5], "holds"), ([-1, -2, -3, -4, -5], "the opposite holds"), ([0, 0, 0], "no clear difference"),
    ([-1, 2, 3], "no clear difference"), ([5], "one seed"),
])
def test_verdicts(values, expected):
    assert study_tables.verdict(values) == expected


def test_every_claim_has_values_and_says_what_it_is():
    claims = [claim for subject in study_tables.claims().values() for claim in subject]
    assert len({claim.text for claim in claims}) >= 38 and all(claim.values and claim.measure for claim in claims)
    table = study_tables.claims_table()
    assert table.count("\n| ") == len(claims) + 2 * len(study_tables.claims())  # a head and a line under it each
    assert all(line.count("|") == 7 for line in table.splitlines() if line.startswith("|"))


# ---------------------------------------------------------------------------------------------------------
# usable groups


def test_usable_groups_by_enumeration():
    for correct in range(9):
        draws = [True] * correct + [False] * (8 - correct)
        groups = list(itertools.combinations(draws, 4))
        mixed = sum(0 < sum(group) < 4 for group in groups) / len(groups)
        assert toy_map.usable(correct, 8, group=4) == pytest.approx(mixed)
        assert toy_map.all_from(8 - correct, 8, group=4) == sum(not any(group) for group in groups) / len(groups)


def test_usable_groups_are_counted_by_correct_answers():
    """Three questions: none correct and half of the hinted ones; 2 of 32, both in the second half; all correct."""
    rows = [{"signal": {"plain": [[0, 0], [0, 2]], "hinted": [[8, 8], [16, 16]]}},
            {"signal": {"plain": [[16, 16]], "hinted": [[16, 16]]}}]
    groups = toy_map.usable_groups(rows)
    assert list(groups) == [0, 2, 32]
    questions, plain, plain_predicted, guided, guided_predicted = groups[0]
    assert (questions, plain, plain_predicted, guided) == (1, 0, 0, 1) and guided_predicted == toy_map.usable(16, 32)
    questions, plain, plain_predicted, guided, guided_predicted = groups[2]
    both_outside = 16 * 15 / (32 * 31)  # the group misses both correct answers
    assert (questions, plain, guided) == (1, 0, 0)  # all hinted samples are correct: no signal either
    assert plain_predicted == pytest.approx(1 - both_outside) and guided_predicted == pytest.approx(1 - both_outside)
    assert groups[32] == (1, 0, 0, 0, 0)


# ---------------------------------------------------------------------------------------------------------
# the study's commands


class Recorder(toy_steps.ToyJob):
    """Notes the commands of an arm; what they would have written is made up."""

    def run(self, script, *flags, out=None, seed=True):
        flags = [*flags, *(["--seed", self.seed] if seed else []), *(["--out", out] if out else [])]
        self.commands.append([script, *map(str, flags)])
        return out

    def write(self, path, rows):
        return path

    def read(self, path):
        return [defaultdict(float, question="x 3 y 7 s1 x+=y", explanation="s1 x+=y 0 7", chain="s1 x+=y 0 7")]

    def report(self, path):
        return defaultdict(dict)


def commands_of(setting, seed, arm, quick=False):
    job = Recorder(toy_study.ARMS, setting, seed, arm, quick)
    job.base()
    student = toy_study.ARMS[arm](job)
    if student:
        job.accuracy(student)
    return job.commands


@pytest.fixture(scope="module")
def commands():
    return [command for job in toy_study.plan() for quick in (False, True) for command in commands_of(*job, quick)]


@pytest.mark.parametrize("script", ["data/toy.py", "train_rlt.py", "rl_student.py", "on_policy_student.py",
                                    "sft_student.py", "distill.py", "evaluate.py"])
def test_every_flag_of_the_study_exists(commands, script, tmp_path, monkeypatch):
    used = {word for command in commands if command[0] == script for word in command if word.startswith("--")}
    assert len(used) > 3
    monkeypatch.setenv("COLUMNS", "200")
    known = ended(tmp_path, script, "--help").stdout.replace("=", " ").split()
    assert not used - {word.strip("[],") for word in known}


def test_every_input_of_a_command_has_been_written_before(commands):
    """Models and rows under runs/ are outputs of earlier commands of the same arm."""
    for setting, seed, arm in toy_study.plan():
        made = set()
        for script, *flags in commands_of(setting, seed, arm):
            inputs = [after for flag, after in zip(flags, flags[1:], strict=False)
                      if flag in ("--model", "--student", "--teacher", "--data") and after.startswith("runs/")]
            for path in inputs:
                whole = path in made or path.rpartition("/")[0] in made
                replaced = path == f"runs/{study_steps.file_name(arm)}.jsonl" or "ground-truth" in path
                replaced = replaced or path == "runs/chains.jsonl"
                assert whole or replaced or ".within-" in path, (arm, script, path)
            made |= {after for flag, after in zip(flags, flags[1:], strict=False) if flag == "--out"}


def settings_of(command):
    """A command's script, flags and values, without files, and without --kl: its default has changed since."""
    script, *words = command
    if script == "rl_student.py":  # of the log; data/toy.py still has the switch
        words = [new for word in words for new in (("--failed-groups", "guide") if word == "--hints" else (word,))]
    flags, left_out = [], False
    for word in words:
        if word.startswith("--"):
            left_out = word in ("--data", "--model", "--student", "--out", "--compare", "--floor", "--kl", "--resume")
            word = "--" + RENAMED.get(word[2:].replace("-", "_"), word[2:]).replace("_", "-")
        if not left_out:
            flags.append(word)
    return script, *flags


def test_commands_are_those_of_the_log():
    """What an arm is today is what was measured: the same scripts with the same settings, whatever the files' names."""
    for row in study_log.study_rows():
        logged = {settings_of(command.split()[1:]) for command in row["commands"]}
        today = {settings_of(command) for command in commands_of(row["setting"], row["seed"], row["arm"])}
        once_not_logged = {command for command in today if command[0] == "data/toy.py" or "teacher" in command}
        missing = today - logged - once_not_logged
        assert not missing, (row["setting"], row["seed"], row["arm"], missing)


@pytest.mark.slow
def test_a_quick_arm_runs(tmp_path):
    shutil.copytree(ROOT, tmp_path / "rlt", ignore=shutil.ignore_patterns("*.png", "__pycache__", "runs"))
    arm = "solutions only"
    done = subprocess.run([sys.executable, "figures/toy_study.py", "--quick", "--settings", "toy", "--arms", arm],
                          cwd=tmp_path / "rlt", capture_output=True, text=True)
    log = tmp_path / "rlt/runs/study/quick-toy-seed0/log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    row, = [json.loads(line) for line in (tmp_path / "rlt/runs/study/quick.jsonl").read_text().splitlines()]
    assert row["arm"] == arm and set(row["accuracy"]) == {"val greedy", "test greedy", "test sampled"}
    again = subprocess.run([sys.executable, "figures/toy_study.py", "--quick", "--settings", "toy", "--arms", arm],
                           cwd=tmp_path / "rlt", capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == "", "a finished arm is not run again"


# ---------------------------------------------------------------------------------------------------------
# benchmarks


def test_a_repeated_measurement_replaces_the_first():
    rows = [{"a": 1, "ms": 5}, {"a": 2, "ms": 6}, {"a": 1, "ms": 7}]
    assert benchmarks.last_of_each(rows, lambda row: row["a"]) == [{"a": 1, "ms": 7}, {"a": 2, "ms": 6}]


def test_the_table_of_models_by_hand(monkeypatch):
    log = [("B", "refused", "caps them (badly), which is bad"), ("C", "packed", ""), ("a", "packed", ""),
           ("E", "refused", "can't be checked (x): expected y"), ("D", "one by one", "odd"),
           ("F", "refused", "caps them")]
    rows = [dict(zip(("architecture", "read", "why"), entry, strict=True)) for entry in log]
    monkeypatch.setattr(benchmarks, "read_log", lambda *_: rows)
    assert benchmarks.models_table().splitlines()[2:] == [
        "| packed into one row | a · C |", "| one by one | D (odd) |", "| refused: caps them | B · F |",
        "| refused: can't be checked | E |"]


def test_the_machine_table_recommends_what_fits():
    """Peaks and hours are rlt/dry_run.py's, and the page is up to date (above): each row's command is what is meant."""
    page = (ROOT / "README.md").read_text()
    for plan in machines.PLANS:
        words = plan.command.split()
        flags = dict(zip(words, words[1:], strict=False))
        assert int(flags["--teacher-bits"]) == plan.teacher_bits and flags["--student-bits"] == "4"
        assert int(flags["--max-new-tokens"]) == plan.max_new_tokens
        assert int(flags["--rollout-batch"]) == plan.rollout_batch
        assert ("--offload-student" in flags) == plan.offload_student
        assert flags.get("--engine", "transformers") == plan.engine
        assert math.prod(int(word.split("=")[1]) for word in words if "--n" in word) == plan.gpus
        row = re.search(re.escape(f"| {plan.name} | `{plan.command}` | ")
                        + r"(\d+) GB in (\w+) \(estimated\) \| ([\d,]+) to ([\d,]+) \(estimated\)", page)
        assert row, plan.name
        peak, low, high = (float(number.replace(",", "")) for number in row.group(1, 3, 4))
        assert 1e9 * peak + dry_run.MARGIN < plan.memory and row[2] in benchmarks.PHASES and low < high


@pytest.mark.slow
def test_the_machines_peaks_are_estimated_with_this_code():
    logged = {row["command"]: row["peaks"] for row in study_log.read_log(machines.LOG.name, "")}
    assert logged == {plan.command: machines.peaks(plan) for plan in machines.PLANS}, "run figures/machines.py"


# ---------------------------------------------------------------------------------------------------------
# faults


def test_the_list_of_faults_adds_up_the_log(monkeypatch):
    known = {"device": "a machine", "date": "2026-01-02", "seed": 0, "seconds": 9}
    rows = [
        {"part": "kills", "script": "a.py", "kills": 3, "runs": 2, "identical": 2, "failures": 0},
        {"part": "kills", "script": "b.py", "kills": 4, "runs": 2, "identical": 1, "failures": 1},
        {"part": "folders", "refused": 5, "resumed": 6, "failures": 1},
        {"part": "folders", "refused": 1, "resumed": 1, "failures": 0, "date": "2026-01-03"},
        {"part": "fuzz", "minutes": 1.5, "texts": 1000, "failures": 0, "slowest_s": 0.25},
        {"part": "fuzz", "minutes": 2, "texts": 234, "failures": 3, "slowest_s": 0.125},
    ]
    monkeypatch.setattr(benchmarks, "read_log", lambda name, command: [known | row for row in rows])
    first, _, *lines = benchmarks.faults_list().splitlines()
    assert first.endswith("On a machine, by 2026-01-03:")
    kills, folders, fuzz = lines  # what is not in the log is not on the page
    assert "4 runs, ended 7 times by" in kills and "(a.py 3, b.py 4)" in kills and "3 of them left" in kills
    assert folders.startswith("- 14 run folders") and "6 refused" in folders and "7 resumed" in folders
    assert "3.5 minutes" in fuzz and "1,234 texts: 3 failures" in fuzz and "more than 0.25 s" in fuzz
