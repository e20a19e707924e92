"""The run folder: nothing half-written is picked up, nothing is drawn twice.   python -m pytest tests/test_runs.py"""

import argparse
import json
import math

from rlt import runs

import pytest


def start(folder, resume=False, steps=9, **flags):
    return runs.Run(argparse.Namespace(out=str(folder), resume=resume, steps=steps, **flags))


def test_seeds_are_keyed():
    keys = [(0, step, rank, batch) for step in range(9) for rank in range(3) for batch in range(3)] + [(0, "eval", 0)]
    assert len({runs.seed_for(*key) for key in keys}) == len(keys)
    assert runs.seed_for(0, 1, 2, 3) == runs.seed_for(0, 1, 2, 3) < 2**32
    assert runs.seed_for(1, 11) != runs.seed_for(11, 1)


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 10), (7, 16), (5, 1)])
def test_every_epoch_sees_every_row_once(n, size):
    drawn = [i for step in range(7 * n) for i in runs.batch_indices(n, size, step, seed=4)]
    assert len(drawn) == 7 * n * size
    epochs = [drawn[at : at + n] for at in range(0, len(drawn) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != list(range(n)) or n < 6
    assert runs.batch_indices(n, size, 3, seed=4) == drawn[3 * size : 4 * size], "a function of the step alone"


def test_the_learning_rate_by_hand():
    rates = [runs.lr_fraction(step, 10, 2, 0.1) for step in range(10)]
    assert rates[:2] == [0.5, 1.0] and rates[9] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(1 - 0.9 * 4 / 8)
    assert [runs.lr_fraction(step, 10, 0, 1.0) for step in range(10)] == [1.0] * 10
    assert runs.lr_fraction(5, 10, 2, 0.0, shape="cosine") == pytest.approx((1 + math.cos(math.pi / 2)) / 2)


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path):
    run = start(tmp_path)
    run.start()
    run.save(2, lambda folder: (folder / "weights").write_text("two"))

    def killed(folder):
        (folder / "weights").write_text("fo")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.save(4, killed)
    again = start(tmp_path, resume=True)
    assert again.step == 2 and (again.checkpoint / "weights").read_text() == "two"
    run.save(4, lambda folder: (folder / "weights").write_text("four"))
    assert start(tmp_path, resume=True).step == 4


def test_logs_are_cut_back_to_the_checkpoint(tmp_path):
    run = start(tmp_path)
    run.start()
    for step in range(5):
        run.log({"step": step, "reward": 1.0})
        run.log_samples([{"step": step, "explanation": "e"}])
        if step == 1:
            run.save(2, lambda folder: None)
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "rew')  # killed while it wrote
    again = start(tmp_path, resume=True)
    again.start()
    assert [entry["step"] for entry in runs.read_jsonl(again.metrics)] == [0, 1]
    assert [entry["step"] for entry in runs.read_jsonl(again.samples)] == [0, 1]


def test_an_existing_run_is_refused_and_left_alone(tmp_path):
    run = start(tmp_path)
    run.start()
    run.log({"step": 0, "reward": 1.0})
    before = run.metrics.read_text()
    with pytest.raises(FileExistsError, match="Pass --resume to continue a run, or another --out"):
        start(tmp_path)
    assert run.metrics.read_text() == before


def test_folders_that_are_no_run_are_refused_and_left_alone(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')
    for resume, complaint in ((False, "is there already"), (True, "holds something else than a run")):
        with pytest.raises(FileExistsError, match=complaint):
            start(model, resume=resume)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        start(tmp_path / "file", resume=True)
    assert (model / "config.json").read_text() == '{"model_type": "qwen2"}'


def test_steps_can_be_added_and_not_taken_away(tmp_path):
    run = start(tmp_path)
    run.start()
    run.save(6, lambda folder: None)
    assert start(tmp_path, resume=True, steps=12).step == 6
    with pytest.raises(ValueError, match="has done 6 steps, --steps is 3"):
        start(tmp_path, resume=True, steps=3)


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    start(tmp_path).start()
    assert json.loads((tmp_path / "config.json").read_text())["git"] is None


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    run = start(tmp_path)
    run.start()
    run.log({"step": 0, "reward": 1.0})
    again = start(tmp_path, resume=True)
    again.start()
    assert again.step == 0 and again.checkpoint is None and runs.read_jsonl(again.metrics) == []


def test_resuming_with_other_flags_or_another_base_is_refused(tmp_path):
    start(tmp_path, lr=1.0, steps=4).start(base_hash="a" * 64)
    with pytest.raises(ValueError, match="started with lr = 1.0, now it is 2.0"):
        start(tmp_path, resume=True, lr=2.0, steps=4)
    with pytest.raises(ValueError, match="by a version without the flag engine"):  # that no flag can make good
        start(tmp_path, resume=True, lr=1.0, steps=4, engine="batch")
    run = start(tmp_path, resume=True, lr=1.0, steps=8)
    with pytest.raises(ValueError, match="base_hash is not what it was when"):
        run.start(base_hash="b" * 64)
    run.start(base_hash="a" * 64)
    assert runs.digest([{"question": "q", "solution": "s"}]) != runs.digest([{"question": "q", "solution": "t"}])
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["steps"] == 8


def test_config_says_what_was_run(tmp_path):
    start(tmp_path, lr=1.0).start(device="cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["flags"]["lr"] == 1.0 and config["device"] == "cpu"
    assert config["versions"]["torch"].startswith("2.") and set(config) >= {"git", "command"}


def test_a_falling_reward_is_noticed_and_noise_is_not(tmp_path):
    wobble = [0.1 * (-1) ** i for i in range(40)]
    for name, values, expected in (
        ("falls", [-0.05 * i for i in range(30)], True),
        ("noise", [-0.001 * i + w for i, w in enumerate(wobble[:30])], False),
        ("rises", [0.05 * i for i in range(30)], False),
        ("short", [-0.05 * i for i in range(29)], False),
    ):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"step": i, "reward": v}) + "\n" for i, v in enumerate(values)))
        assert bool(runs.reward_is_dropping(path, "reward")) is expected, name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x", "got 'x', expected a whole number"),
        ("1.5", "expected a whole number"),
        ("0", "expected at least 1"),
        ("9", "expected at most 8"),
    ],
)
def test_numbers_on_the_command_line(text, complaint):
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        flags.number(int, 1, 8)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="expected more than 0"):
        flags.number(float, above=0)("0")
    for wild in ("nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a finite one"):
            flags.number(float, above=0)(wild)
    assert flags.number(int, 1, 8)("8") == 8
