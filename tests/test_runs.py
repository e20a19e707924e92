"""The run folder: nothing half-written is picked up, nothing is drawn twice.   python -m pytest tests/test_runs.py"""

import argparse
import json
import math
import time

from rlt import runs
from rlt.errors import UserError
from rlt.files import append_jsonl, read_jsonl, write_atomically
from rlt.steps import (
    StepTimer,
    batch_indices,
    check_logprob_diff,
    lr_fraction,
    quantiles,
    reward_is_dropping,
    seed_for,
    split_held_out,
)

import pytest
import torch


def start(folder, resume=False, steps=9, **flags):
    flags |= {"out": str(folder), "resume": resume, "steps": steps, "keep_checkpoints": 3, "lr_steps": None}
    return runs.Run(argparse.Namespace(**flags))


def test_seeds_are_keyed():
    keys = [(0, step, rank, batch) for step in range(9) for rank in range(3) for batch in range(3)] + [(0, "eval", 0)]
    assert len({seed_for(*key) for key in keys}) == len(keys)
    assert seed_for(0, 1, 2, 3) == seed_for(0, 1, 2, 3) < 2**32
    assert seed_for(1, 11) != seed_for(11, 1)


@pytest.mark.parametrize(("n", "size"), [(10, 3), (10, 10), (7, 16), (5, 1)])
def test_every_epoch_sees_every_row_once(n, size):
    drawn = [i for step in range(7 * n) for i in batch_indices(n, size, step, seed=4)]
    assert len(drawn) == 7 * n * size
    epochs = [drawn[at : at + n] for at in range(0, len(drawn) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != list(range(n)) or n < 6
    assert batch_indices(n, size, 3, seed=4) == drawn[3 * size : 4 * size], "a function of the step alone"


def test_the_learning_rate_by_hand():
    rates = [lr_fraction(step, 10, 2, 0.1) for step in range(10)]
    assert rates[:2] == [0.5, 1.0] and rates[9] == pytest.approx(0.1)
    assert rates[5] == pytest.approx(1 - 0.9 * 4 / 8)
    assert [lr_fraction(step, 10, 0, 1.0) for step in range(10)] == [1.0] * 10
    assert lr_fraction(5, 10, 2, 0.0, shape="cosine") == pytest.approx((1 + math.cos(math.pi * 3 / 8)) / 2)
    assert lr_fraction(0, 1, 0, 0.0) == 1 and lr_fraction(9, 10, 2, 0.0) == pytest.approx(1 / 8), "no step for nothing"
    assert lr_fraction(10, 10, 2, 0.0) == 0


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


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_ranks_the_first_saves_at_once_what_is_done(tmp_path, monkeypatch, rank):
    """torchrun kills them 30 seconds after its signal, a step may take longer. No rank ends, and none waits."""
    run = start(tmp_path)
    run.start()
    run.saved, run.step = 2, 5
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setattr(runs, "RANK", rank)
    monkeypatch.setattr(runs, "barrier", lambda: pytest.fail("the others are still in their step"))
    run._stop(15, lambda folder: (folder / "weights").write_text("five"), abandon=True)
    assert (tmp_path / "step_000005/weights").exists() == (rank == 0)
    run.weights_changed, run.step = True, 6
    run._stop(15, lambda folder: pytest.fail("in the middle of an update"), abandon=True)


@pytest.mark.parametrize("local, launcher", [
    (2, "torchrun --nproc_per_node=2 "),
    (1, "torchrun --nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT --nproc_per_node=1 ")])
def test_the_command_that_continues_a_run_of_two_ranks(monkeypatch, local, launcher):
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(runs.sys, "argv", ["train_rlt.py", "--steps", "3"])
    assert runs.resume_command() == launcher + "train_rlt.py --steps 3 --resume"


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
    assert [entry["step"] for entry in read_jsonl(again.metrics)] == [0, 1]
    assert [entry["step"] for entry in read_jsonl(again.samples)] == [0, 1]


def test_an_existing_run_is_refused_and_left_alone(tmp_path):
    run = start(tmp_path)
    run.start()
    run.log({"step": 0, "reward": 1.0})
    before = run.metrics.read_text()
    with pytest.raises(UserError, match="already exists. Pass --resume to continue a run, or another --out"):
        start(tmp_path)
    assert run.metrics.read_text() == before


@pytest.mark.parametrize("config", [
    '{"model_type": "qwen2"}', '{"flags": 3}', '{"flags": {}', "[1]", "\x00\x01", None,
], ids=["a model", "other flags", "half a file", "a list", "binary", "none"])
def test_folders_that_are_no_run_are_refused_and_left_alone(tmp_path, config):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")
    if config is not None:
        (folder / "config.json").write_text(config)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for resume, complaint in ((False, "already exists. Pass --resume"), (True, "is not empty and not a run")):
        with pytest.raises(UserError, match=complaint):
            start(folder, resume=resume)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    for resume in (False, True):
        with pytest.raises(UserError, match="file is a file, expected a folder. Pass another --out"):
            start(tmp_path / "file", resume=resume)


def test_an_empty_folder_and_none_at_all_are_begun(tmp_path):
    for resume in (False, True):
        for folder in (tmp_path / f"none-{resume}", tmp_path / f"empty-{resume}"):
            if "empty" in folder.name:
                folder.mkdir()
            run = start(folder, resume=resume)
            assert run.step == 0 and run.checkpoint is None
            assert not folder.exists() or not list(folder.iterdir()), "nothing is written before start"
            run.start()
            assert json.loads((folder / "config.json").read_text())["flags"]["out"] == str(folder)


def test_steps_can_be_added_and_not_taken_away(tmp_path):
    run = start(tmp_path)
    run.start()
    run.save(6, lambda folder: None)
    assert start(tmp_path, resume=True, steps=12, final_lr_fraction=0.1).step == 6
    with pytest.raises(UserError, match="has done 6 steps, --steps is 3: raise it"):
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
    assert again.step == 0 and again.checkpoint is None and read_jsonl(again.metrics) == []


def test_resuming_with_other_flags_or_another_base_is_refused(tmp_path):
    start(tmp_path, lr=1.0, loss="grpo", device="cpu", steps=4).start(base_hash="a" * 64)
    with pytest.raises(UserError, match="started with --loss grpo, now dapo; --lr 1.0, now 2.0. Pass the flags"):
        start(tmp_path, resume=True, lr=2.0, loss="dapo", device="cuda", steps=4)  # all at once, but the device
    run = start(tmp_path, resume=True, lr=1.0, loss="grpo", device="cuda", steps=8, new_flag=3)
    with pytest.raises(UserError, match="base_hash is not what it was when"):
        run.start(base_hash="b" * 64)
    run.start(base_hash="a" * 64)
    assert json.loads((tmp_path / "config.json").read_text())["flags"]["steps"] == 8


def test_a_run_of_an_older_version_goes_on_under_the_new_names(tmp_path):
    old = dict(lr=1.0, final_lr=0.1, max_sampler_gap=0.1, head_chunk=1024, score_temperature=None, engine="batch")
    start(tmp_path, **old).start()
    now = dict(lr=1.0, final_lr_fraction=0.1, max_logprob_diff=0.1, engine="transformers", tis_cap=2.0)
    start(tmp_path, resume=True, **now)
    with pytest.raises(UserError, match="started with --final-lr-fraction 0.1, now 0.2; --max-logprob-diff 0.1, now 9"):
        start(tmp_path, resume=True, **now | dict(final_lr_fraction=0.2, max_logprob_diff=9))
    with pytest.raises(UserError, match="--engine transformers, now vllm"):
        start(tmp_path, resume=True, **now | dict(engine="vllm"))


@pytest.mark.parametrize(("hints", "now"), [(True, "guide"), (False, "none")])
def test_a_run_with_the_old_switch_for_hints_goes_on(tmp_path, hints, now):
    start(tmp_path, hints=hints).start()
    start(tmp_path, resume=True, failed_groups=now)
    with pytest.raises(UserError, match=f"started with --failed-groups {now}, now relift"):
        start(tmp_path, resume=True, failed_groups="relift")


def test_rows_are_known_by_all_that_is_trained_on():
    row = {"question": "q", "solution": "s", "explanation": "e", "where": "line 1", "reward": 0.5}
    same = runs.digest([row])
    assert same == runs.digest([{**row, "where": "line 2", "reward": 0.1}])
    changes = {"question": "r", "solution": "t", "explanation": "f", "hint": "h", "messages": [{"content": "m"}]}
    others = [runs.digest([{**row, key: value}]) for key, value in changes.items()]
    assert len({same, *others, runs.digest([row, row]), runs.digest([])}) == 8
    gold = [runs.digest([{**row, "answer": answer}], "answer") for answer in (1, 2)]
    assert len({same, *gold}) == 3, "rewards depend on what answers are graded by"
    assert runs.digest([row, {**row, "question": "r"}]) != runs.digest([{**row, "question": "r"}, row])


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
        assert bool(reward_is_dropping(path, "reward")) is expected, name


def test_a_dropping_reward_by_another_name_and_only_when_a_window_ends(tmp_path):
    for steps, expected in ((30, True), (31, False), (39, False), (40, True)):
        path = tmp_path / str(steps)
        entries = [{"step": i, "solved": 1 - 0.02 * i, "reward": 1.0} for i in range(steps)]
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        assert bool(reward_is_dropping(path, "solved")) is expected and not reward_is_dropping(path)
    message = "the solved has dropped for 30 steps (0.71 -> 0.51 -> 0.31)."
    assert reward_is_dropping(tmp_path / "40", "solved") == message


# -- what a step measures


def test_the_sampler_may_differ_by_so_much():
    sampler, trainer = torch.tensor([-1.0, -2.0, -3.0, -4.0]), torch.tensor([-1.1, -1.9, -3.0, -4.0])
    assert check_logprob_diff(sampler, trainer, 0.06) == pytest.approx(0.05)
    with pytest.raises(UserError, match="differ by 0.05 nats a token, --max-logprob-diff is 0.04: the gradient would"):
        check_logprob_diff(sampler, trainer, 0.04)
    for broken in (math.nan, math.inf):
        with pytest.raises(UserError, match="differ by (nan|inf) nats"):
            check_logprob_diff(sampler, trainer + torch.tensor([0, 0, 0, broken]), 1e9)
    assert check_logprob_diff(torch.empty(0), torch.empty(0), 0.1) == 0.0, "nothing was learned from"


def test_quantiles_by_hand(monkeypatch):
    assert quantiles("length", range(10)) == {"length_p10": 1, "length_p50": 5, "length_p90": 9}
    assert quantiles("length", [7]) == {"length_p10": 7, "length_p50": 7, "length_p90": 7}
    assert quantiles("length", iter([3, 1, 2])) == {"length_p10": 1, "length_p50": 2, "length_p90": 3}
    values = [5] * 90 + [900] * 10
    assert quantiles("n", values)["n_p90"] == 900 and quantiles("n", values[:99])["n_p50"] == 5
    monkeypatch.setattr("rlt.steps.all_gather_object", lambda mine: [mine, [100, 200], []])
    assert quantiles("n", [1, 300]) == {"n_p10": 1, "n_p50": 200, "n_p90": 300}, "of all ranks"


def test_rows_are_held_out_from_the_end():
    rows = [{"question": str(i)} for i in range(10)]

    def split(**changes):
        return split_held_out(rows, argparse.Namespace(
            **{"eval_rows": 3, "eval_every": 5, "prompts_per_step": 7, **changes}))

    assert split() == (rows[:7], rows[7:])
    assert split(eval_every=0) == split(eval_rows=0) == (rows, [])
    with pytest.raises(UserError, match="7 rows are left to train on, a step takes 8: give more rows, or lower"):
        split(prompts_per_step=8)
    with pytest.raises(UserError, match="0 rows are left"):
        split(eval_rows=10, prompts_per_step=1)


def test_a_timer_adds_up_a_steps_phases():
    timer = StepTimer(torch.device("cpu"))
    time.sleep(0.02)
    timer.end("rollout")
    time.sleep(0.05)
    timer.end("score")
    assert list(timer.numbers) == ["t_rollout", "t_score"], "no memory to report on a CPU"
    assert timer.numbers["t_rollout"] >= 0.02 and timer.numbers["t_score"] >= 0.05
    assert timer.seconds == sum(timer.numbers.values())
    timer.end("update")
    assert timer.numbers["t_update"] < 0.05, "each phase begins where the last one ended"


def test_a_timer_on_a_gpu_waits_for_it_and_takes_each_phases_own_peak(monkeypatch):
    events, peak = [], {"bytes": 0}

    def reset(device):
        events.append("reset")
        peak["bytes"] = 1e9

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["bytes"])
    timer = StepTimer(torch.device("cuda"))
    peak["bytes"] = 5e9
    timer.end("rollout")
    timer.end("score")
    assert events == ["wait", "reset"] + ["wait", "wait", "reset"] * 2
    assert timer.numbers["peak_gb_rollout"] == 5 and timer.numbers["peak_gb_score"] == 1
    assert timer.seconds == timer.numbers["t_rollout"] + timer.numbers["t_score"], "gigabytes are no seconds"


def test_the_console_line_has_what_there_is(tmp_path):
    run = start(tmp_path)
    run.start()
    entry = {"step": 4, "reward": -1.23456, "kl": None, "eval_reward": 0.5, "secret": 3, "t_a": 1.0, "t_b": 0.26}
    line = run.log(entry)
    assert line == "step 4 | reward -1.235 | eval_reward 0.5 | 1.3s"
    assert read_jsonl(run.metrics) == [entry]


# -- files


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "one")

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError):
        write_atomically(path, "two, and more")
    assert path.read_text() == "one"
    monkeypatch.setattr("rlt.files.RANK", 1)
    append_jsonl(path, [{"step": 0}])
    assert path.read_text() == "one", "rank 0 alone writes"


def test_a_last_line_cut_short_is_left_out_and_a_broken_one_is_not(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2')
    assert [entry["step"] for entry in read_jsonl(path)] == [0, 1]
    path.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(UserError, match="log.jsonl:2 is not a JSON object"):
        read_jsonl(path)


def test_a_result_takes_the_place_of_an_older_one(tmp_path):
    run = start(tmp_path)
    run.start()
    for text in ("old", "new"):
        final = run.finish(lambda folder, text=text: (folder / text).write_text(text))
    assert final == tmp_path / "final" and {path.name for path in final.iterdir()} == {"new", "manifest.json"}
    assert not list(tmp_path.glob("*.partial"))


def test_differences_are_named_as_they_are_typed(tmp_path, monkeypatch):
    monkeypatch.setattr("rlt.errors.FLAGS", {"--lambda": argparse.Namespace(dest="lam")})
    start(tmp_path, lam=3.0).start()
    with pytest.raises(UserError, match="started with --lambda 3.0, now 1.0"):
        start(tmp_path, resume=True, lam=1.0)
