"""How several processes work off a study.   python -m pytest tests/test_study_steps.py"""

import json
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "figures"))
import study_steps  # noqa: E402

ARMS = {"first": lambda job: job.measure("shared", "own"), "second": lambda job: job.measure("shared", "other")}


class Job(study_steps.Job):
    """An arm of steps that are measured only; the toy below it does not exist."""

    def base(self):
        pass

    def measure(self, *steps):
        for step in steps:
            self.run("sft_student.py", out=f"runs/{step}")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """work(): one process's share of the study; what it ran is in work.commands."""
    monkeypatch.setattr(study_steps, "ROOT", tmp_path)
    monkeypatch.setattr(study_steps.subprocess, "check_output", lambda *_, **__: "commit\n")
    monkeypatch.setattr(study_steps.time, "sleep", lambda _, sleep=time.sleep: sleep(0.01))
    commands = []

    def run_command(folder, command):
        out = command[command.index("--out") + 1]
        commands.append(out)
        threading.Event().wait(0.1)
        if "broken" in out:
            return 1
        (folder / out / "final").mkdir(parents=True)
        return 0

    monkeypatch.setattr(study_steps, "run_command", run_command)

    def work(arms=ARMS):
        return study_steps.work_off([Job(arms, "toy", 0, arm) for arm in arms], tmp_path / "log.jsonl")

    work.commands, work.log = commands, tmp_path / "log.jsonl"
    return work


def logged(log):
    return sorted(json.loads(line)["arm"] for line in log.read_text().splitlines())


def test_every_step_is_made_once_and_every_arm_logged_once(study):
    """Threads lock each other out as processes do: a lock belongs to an opened file."""
    workers = [threading.Thread(target=study) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(study.commands) == ["runs/other", "runs/own", "runs/shared"]
    assert logged(study.log) == ["first", "second"]
    for row in map(json.loads, study.log.read_text().splitlines()):
        assert len(row["commands"]) == 2, "a busy attempt leaves no commands"
        assert set(row["seconds"]) <= set(row["commands"])
        assert all(0.1 <= seconds < 10 for seconds in row["seconds"].values())
    assert sum(len(row["seconds"]) for row in map(json.loads, study.log.read_text().splitlines())) == 3
    study()
    assert len(study.commands) == 3


def test_a_process_waits_for_a_step_that_another_is_at(study):
    lock = Path(study.log.parent / "runs/study/toy-seed0/runs/shared.lock")
    with study_steps.only_one(lock):
        worker = threading.Thread(target=study)
        worker.start()
        worker.join(0.3)
        assert worker.is_alive() and study.commands == []
    worker.join()
    assert logged(study.log) == ["first", "second"]


def test_arms_whose_command_fails_are_left_out(study, capsys):
    failed = study({"bad": lambda job: job.measure("broken"), "good": lambda job: job.measure("own")})
    assert failed == {("toy", 0, "bad")} and logged(study.log) == ["good"]
    assert "sft_student.py --seed 0 --out runs/broken failed: see" in capsys.readouterr().out


def test_a_forked_child_never_becomes_the_study(tmp_path):
    def fail():
        raise SystemError("in the child")

    assert study_steps.fork(lambda: None) == 0
    assert study_steps.fork(lambda: 3) != 0 and study_steps.fork(fail) != 0
