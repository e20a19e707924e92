"""What a terminal and reports show of a run.   python -m pytest tests/test_console.py"""

import argparse
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import types

from rlt import console, report, runs
from rlt.errors import UserError
from rlt.files import read_jsonl

import pytest
from conftest import ROOT


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, rank=0, **env):
    """What a bar over two steps that prints a line after each writes -> (to stderr, to stdout)."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", out := io.StringIO())
    monkeypatch.setattr(console, "RANK", rank)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    bar = console.progress_bar(range(2), unit="step", mininterval=0)
    for step in bar:
        bar.write(f"step {step}")
    return stream.getvalue(), out.getvalue()


def test_bars_are_for_terminals(monkeypatch):
    lines = "step 0\nstep 1\n"
    err, out = shown(monkeypatch, Terminal())
    assert "2/2" in err and out == lines
    assert shown(monkeypatch, io.StringIO()) == ("", lines), "a file gets the lines alone"
    assert shown(monkeypatch, Terminal(), TQDM_DISABLE="1") == ("", lines)
    assert "2/2" in shown(monkeypatch, Terminal(), TQDM_DISABLE="0")[0]
    assert shown(monkeypatch, Terminal(), rank=1)[0] == ""


def test_files_get_a_line_at_every_tenth(monkeypatch, capsys):
    def lines(total, step=1, quiet=False):
        for before in range(0, total, step):
            console.print_progress("teacher", before, min(before + step, total), total, quiet)
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert lines(3) == ["teacher: 1 of 3 batches", "teacher: 2 of 3 batches", "teacher: 3 of 3 batches"]
    assert lines(100) == [f"teacher: {n} of 100 batches" for n in range(10, 101, 10)]
    assert lines(100, step=64) == ["teacher: 64 of 100 batches", "teacher: 100 of 100 batches"]
    assert lines(1) == lines(3, quiet=True) == []
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert lines(3) == []


def test_other_packages_and_scripts_that_are_started_write_no_bars_into_files(tmp_path):
    """tqdm is loaded after make_parser, as in scripts that make a model."""
    program = ("import sys; from rlt import flags; p = flags.make_parser('x'); p.add_argument('--quiet', "
               "action='store_true'); p.parse_args(); from tqdm import tqdm; list(tqdm(range(9)))")
    env = {key: value for key, value in os.environ.items() if key != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def new_run(folder, *, name=None, quiet=False, resume=False):
    return runs.Run(argparse.Namespace(out=str(folder), resume=resume, steps=9, keep_checkpoints=0, lr_steps=None,
                                       save_every=0, quiet=quiet, report=name))


ENTRY = {"reward": -1.5, "closed": 1, "kl_ref": None, "loss": math.nan, "note": "text", "t_score": 0.5}


def test_steps_are_counted_alike_and_quiet_is_quiet(tmp_path, capsys):
    """The number on the console is that of metrics.jsonl, samples.jsonl and reports."""
    for quiet in (False, True):
        run = new_run(tmp_path / f"run-{quiet}", quiet=quiet)
        run.start()
        bar = console.progress_bar(range(2))
        for step in run.steps(bar, lambda folder: None):
            run.log({"step": step, **ENTRY}, bar)
            run.log({"step": step + 100})  # no bar is given: nothing is printed
        printed = capsys.readouterr().out
        assert printed == "" if quiet else printed.splitlines() == [
            f"step {i} | reward -1.5 | closed 1 | loss nan | 0.5s" for i in (0, 1)]
        assert [entry["step"] for entry in read_jsonl(run.metrics)] == [0, 100, 1, 101]


def fake_package(monkeypatch, name, **contents):
    module = types.ModuleType(name)
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    """A stand-in for torch.utils.tensorboard; below, the package itself."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *scalar):
            calls.append(scalar)

        def flush(self):
            calls.append("flush")

    fake_package(monkeypatch, "tensorboard")
    fake_package(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    run = new_run(tmp_path / "run", name="tensorboard")
    assert not calls, "nothing is written before a run has started"
    run.start()
    run.log({"step": 4, **ENTRY})
    assert calls == [(f"{tmp_path}/run/tensorboard", None), ("reward", -1.5, 4), ("closed", 1, 4), ("t_score", 0.5, 4),
                     "flush"]
    again = new_run(tmp_path / "run", name="tensorboard", resume=True)
    again.step = 3
    again.start()
    assert calls[-1] == (f"{tmp_path}/run/tensorboard", 3), "what was logged after the checkpoint is hidden"


def test_wandb_gets_the_numbers_and_goes_on(tmp_path, monkeypatch):
    calls = []
    logged = types.SimpleNamespace(log=calls.append, define_metric=lambda *of, **by: calls.append((of, by)))

    def init(**options):
        calls.append(options)
        return logged

    fake_package(monkeypatch, "wandb", init=init, Error=type("Error", (Exception,), {}))
    for resume in (False, True):
        run = new_run(tmp_path / "run", name="wandb", resume=resume)
        run.start()
        run.log({"step": 4, **ENTRY})
    first, axis, numbers, second, _, again = calls
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert first["name"] == "run" and first["config"] == config["flags"] | {"resume": False}
    assert first["id"] == second["id"] == config["report_id"] and second["resume"] == "allow"
    assert axis == (("*",), {"step_metric": "step"}), "a resumed run's steps come twice, which wandb's own may not"
    assert numbers == again == {"step": 4, "reward": -1.5, "closed": 1, "t_score": 0.5}


def test_a_login_that_is_missing_is_one_line(tmp_path, monkeypatch):
    class Error(Exception):
        pass

    def init(**_):
        raise Error("api_key not configured (no-tty)")

    fake_package(monkeypatch, "wandb", init=init, Error=Error)
    with pytest.raises(UserError, match="--report wandb: api_key not configured .* WANDB_MODE=offline"):
        new_run(tmp_path / "run", name="wandb").start()


@pytest.mark.parametrize("name", report.REPORTS)
def test_a_missing_package_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=f"--report {name} needs a package that is not installed: pip install {name}"):
        new_run(tmp_path / "run", name=name)
    assert not (tmp_path / "run").exists()


def test_packages_are_not_loaded_unless_asked_for(tmp_path, monkeypatch):
    for package in ("tensorboard", "wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    run = new_run(tmp_path / "run")
    run.start()
    run.log({"step": 0, **ENTRY})


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="pip install tensorboard")
def test_the_real_tensorboard_reads_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = new_run(tmp_path / "run", name="tensorboard")
    run.start()
    for step in (0, 1):
        run.log({"step": step, **ENTRY, "reward": float(step)})
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(0, 0.0), (1, 1.0)]
    assert set(events.Tags()["scalars"]) == {"reward", "closed", "t_score"}
