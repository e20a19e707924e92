"""What goes wrong on other people's machines: nothing is lost, nothing is mixed, and it is said in one line.

python -m pytest tests/test_faults.py              python -m pytest tests/test_faults.py -m slow     with real kills
"""

import argparse
import ast
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rlt import checkpoints, errors, evaluations, locks, lora, models, rollout, runs, saving
from rlt.errors import UserError
from rlt.files import append_jsonl, read_jsonl, write_atomically
from rlt.flags import number
from rlt.rows_file import RowsFile
from rlt.steps import reward_is_dropping
from rlt.updates import Updates

import pytest
import torch
from conftest import ROOT, call, ended, metrics

TRAINERS = ("train_rlt.py", "rl_student.py", "on_policy_student.py", "sft_student.py")
RL = ("--limit", 80, "--prompts-per-step", 2, "--group-size", 4, "--max-new-tokens", 12, "--eval-rows", 4)
SMALL = {  # script: flags that make it small
    "train_rlt.py": RL,
    "rl_student.py": (*RL, "--rewards", 0, 0, 1, "--keep-zero-groups"),
    "on_policy_student.py": ("--teacher", "toy-teacher", "--limit", 80, "--prompts-per-step", 8, "--max-new-tokens", 12,
                             "--eval-rows", 4),
    "sft_student.py": ("--data", "toy", "--limit", 80, "--val-rows", 8, "--batch-size", 8),
    "distill.py": ("--model", "toy-teacher", "--limit", 20, "--batch-size", 8, "--max-new-tokens", 12),
}


def new_run(folder, resume=False, steps=9, **changes):
    flags = {"save_every": 2, "keep_checkpoints": 3, "max_bad_steps": 3, "max_grad_norm": 1.0, "lr_steps": None}
    return runs.Run(argparse.Namespace(out=str(folder), resume=resume, steps=steps, **flags | changes))


def write_weights(folder):
    for name in ("adapter_model.safetensors", "reference/adapter_model.safetensors", "optimizer.pt", "config.json"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"the weights of {name}".encode() * 99)


def run_with_checkpoints(folder, *steps):
    run = new_run(folder)
    run.start()
    for step in range(max(steps)):
        run.log({"step": step, "reward": 1.0})
        if step + 1 in steps:
            run.save(step + 1, write_weights)
    return run


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- folders that are no run


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize("config", [None, "", "{", "[]", '{"model_type": "qwen2"}', '{"flags": {}, "command": "a.py"}'])
def test_a_folder_that_is_no_run_of_this_script_is_left_alone(tmp_path, script, config):
    out = tmp_path / "out"
    (out / "final").mkdir(parents=True)
    (out / "final/model.safetensors").write_text("years of work")
    (out / "metrics.jsonl").write_text('{"step": 7}\n{"no": "step"}\n')
    if config is not None:
        (out / "config.json").write_text(config)
    before = contents(out)
    for flags in (["--resume"], []):
        _, stderr, code = ended(tmp_path, script, *flags, "--out", out)
        assert code == 2 and len(stderr.splitlines()) == 1 and "another --out" in stderr, stderr
    assert contents(out) == before


def test_a_file_that_distill_did_not_write_is_left_alone(tmp_path):
    out = tmp_path / "mine.jsonl"
    out.write_text("my rows\n")
    for flags in (["--resume"], []):
        _, stderr, code = ended(tmp_path, "distill.py", *flags, "--out", out)
        assert code == 2 and len(stderr.splitlines()) == 1 and "another --out" in stderr, stderr
    assert contents(tmp_path) == {Path("mine.jsonl"): b"my rows\n"}


def test_a_run_belongs_to_its_script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/sft_student.py", "--steps", "9"])
    run_with_checkpoints(tmp_path / "run", 2)
    assert new_run(tmp_path / "run", resume=True).step == 2
    monkeypatch.setattr(sys, "argv", ["train_rlt.py"])
    with pytest.raises(UserError, match="was written by sft_student.py, this is train_rlt.py"):
        new_run(tmp_path / "run", resume=True)


def test_a_run_may_move_and_its_paths_may_be_spelled_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    run = new_run("first", model="models/a")
    run.start()
    run.save(2, write_weights)
    os.rename("first", "second")
    for out, model in (("second", "./models/a"), (f"{tmp_path}/models/../second", f"{tmp_path}/models/a")):
        assert new_run(out, resume=True, model=model).step == 2
    with pytest.raises(UserError, match="started with --model models/a, now models/b"):
        new_run("second", resume=True, model="models/b")


def test_a_run_remembers_how_it_was_started(tmp_path, monkeypatch):
    for flags in ([], ["--resume"], ["--resume", "--out", "a run"]):
        monkeypatch.setattr(sys, "argv", ["train_rlt.py", *flags])
        new_run(tmp_path / "run", resume=bool(flags)).start()
        config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["command"] == "train_rlt.py"
    assert config["resumed_by"] == ["train_rlt.py --resume", "train_rlt.py --resume --out 'a run'"]


# -- other rows, other weights


def test_distill_goes_on_only_with_the_rows_and_weights_it_began_with(workshop, tmp_path):
    flags = [*SMALL["distill.py"], "--samples", 2, "--out", tmp_path / "out.jsonl"]
    rows = (workshop / "runs/toy/train.jsonl").read_text().splitlines(keepends=True)[:8]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(rows))
    teacher = tmp_path / "teacher"
    shutil.copytree(workshop / "runs/toy-teacher/final", teacher)
    flags += ["--data", data, "--model", teacher, "--student", "toy"]
    call(workshop, "distill.py", *flags)
    complete = (tmp_path / "out.jsonl").read_bytes()
    lines = complete.splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:9])
    cut = (tmp_path / "out.jsonl").read_bytes()

    data.write_text("".join(reversed(rows)))
    assert "rows_hash is not what it was" in ended(workshop, "distill.py", *flags, "--resume").stderr
    data.write_text("".join(rows))
    from safetensors.torch import load_file, save_file

    path = teacher / "adapter_model.safetensors"
    original, weights = path.read_bytes(), load_file(path)
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, path, {"format": "pt"})
    stderr = ended(workshop, "distill.py", *flags, "--resume").stderr
    assert f"{teacher} is damaged (adapter_model.safetensors)" in stderr
    (teacher / checkpoints.MANIFEST).unlink()
    assert "adapter_hash is not what it was" in ended(workshop, "distill.py", *flags, "--resume").stderr
    path.write_bytes(original)
    assert (tmp_path / "out.jsonl").read_bytes() == cut, "what was written is as it was"
    call(workshop, "distill.py", *flags, "--resume")
    assert (tmp_path / "out.jsonl").read_bytes() == complete


def test_a_torn_line_of_distilled_rows_is_named(tmp_path):
    args = argparse.Namespace(out=str(tmp_path / "out.jsonl"), resume=True)
    output = RowsFile(args)
    output.start(rows_hash="a")
    output.append([{"batch": 0, "reward": 1.0}, {"batch": 1, "reward": 2.0}])
    text = output.path.read_text()
    output.path.write_text(text.replace('"reward": 1.0}', '"rew'))
    with pytest.raises(UserError, match=r"out.jsonl:1 is not a JSON object"):
        RowsFile(args)
    output.path.write_text(text + '{"bat')
    assert RowsFile(args).first_batch == 1


def test_no_nan_in_a_file(tmp_path):
    output = RowsFile(argparse.Namespace(out=str(tmp_path / "out.jsonl"), resume=False))
    output.start()
    nan, inf = float("nan"), float("inf")
    output.append([{"batch": 0, "reward": 1.0, "kl": inf}, {"batch": 0, "reward": nan}, {"batch": 0, "reward": -inf}])
    assert output.path.read_text() == '{"batch": 0, "reward": 1.0, "kl": null}\n' and output.dropped == 2
    with pytest.raises(UserError, match="no reward of batch 1 is finite"):
        output.append([{"batch": 1, "reward": nan}])


# -- one process a folder


HOLD = """
import sys
from rlt.locks import hold_lock
hold_lock(sys.argv[1], "the run")
print("held", flush=True)
input()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run/.lock."""
    (tmp_path / "run").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run/.lock"], cwd=ROOT, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_has_one_process(tmp_path, holder):
    with pytest.raises(UserError, match=f"run is in use by process {holder.pid} on .*wait until it has ended"):
        new_run(tmp_path / "run").start()
    assert not (tmp_path / "run/config.json").exists()
    holder.kill()  # as kill -9
    holder.wait()
    new_run(tmp_path / "run").start()
    with pytest.raises(UserError, match="already exists"):
        new_run(tmp_path / "run")


def test_two_new_runs_that_meet_in_one_folder(tmp_path):
    first, second = new_run(tmp_path / "run"), new_run(tmp_path / "run", resume=True)  # neither finds anything
    first.start()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="was made by another process"):
        second.start()
    assert contents(tmp_path) == before


def test_the_toy_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = []

    def make(command, pass_fds, **_):
        made.append(command)
        time.sleep(0.5)
        Path("runs/toy").mkdir(parents=True)
        Path("runs/toy/model.safetensors").touch()

    monkeypatch.setattr(models.subprocess, "run", make)
    threads = [threading.Thread(target=models.resolve, args=["toy"]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and capsys.readouterr().out.count("another process is making it: waiting") == 2


def test_a_child_keeps_the_lock_of_a_killed_parent(tmp_path):
    """Else two processes would write the toy: the orphan, and the next one that asks."""
    code = ("import subprocess, sys, os, signal; from rlt.locks import exclusive\n"
            "with exclusive(sys.argv[1], 'waiting') as fd:\n"
            "    child = subprocess.Popen(['sleep', '1'], pass_fds=[fd], stdout=subprocess.DEVNULL)\n"
            "    print('held', flush=True); os.kill(os.getpid(), signal.SIGKILL)")
    subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], cwd=ROOT, stdout=subprocess.DEVNULL)
    started = time.monotonic()
    with locks.exclusive(tmp_path / "lock", "waiting"):
        assert time.monotonic() - started > 0.5


# -- numbers gone bad


class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))


def updates_of(folder, **changes):
    run = new_run(folder, **changes)
    run.start()
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(4))
    return run, weights, Updates(run, torch.optim.AdamW([weights], lr=0.1), [weights], Words())


def rows(*names):
    return [({"where": name}, [1, 2]) for name in names]


@pytest.mark.parametrize("bad", ["nan loss", "inf loss", "inf gradient", "nan gradient"])
def test_an_update_that_is_not_finite_is_skipped(tmp_path, bad):
    """And leaves no trace: the updates after it are those of a run that never met it."""
    outcomes = []
    for name in ("clean", "met"):
        run, weights, updates = updates_of(tmp_path / name)
        for step in range(3):
            updates.backward(weights.square().sum() / 2, rows("file:1"))
            updates.backward(weights.sum() / 2, rows("file:2", "file:3"))
            updates.step()
            if name == "met" and step == 1:
                before = weights.detach().clone()
                updates.backward(weights.sum(), rows("file:4"))
                loss = weights.sum() * float("nan" if "nan" in bad else "inf")
                if "gradient" in bad:
                    handle = weights.register_hook(lambda grad: grad.index_fill(0, torch.tensor([2]), float(bad[:3])))
                    loss = weights.sum()
                updates.backward(loss, rows("file:5", "file:6"))
                if "gradient" in bad:
                    handle.remove()
                updates.backward(weights.sum(), rows("file:7"))
                updates.step()
                assert torch.equal(weights, before)
                report = json.loads((run.folder / "bad_step.json").read_text())
                assert [row["where"] for row in report["rows"]] == ["file:5", "file:6"]
                assert report["rows"][0]["text"] == "1 2" and report["rows"][0]["ids"] == [1, 2]
        outcomes.append(weights.detach().clone())
    assert torch.equal(*outcomes)


def test_bad_updates_in_a_row_stop_the_run(tmp_path):
    _, weights, updates = updates_of(tmp_path / "run", max_bad_steps=2)

    def take(factor):
        updates.backward(weights.sum() * factor, rows("file:1"))
        updates.step()

    for factor in (float("nan"), 1.0, float("nan")):  # not in a row
        take(factor)
    with pytest.raises(UserError, match="step 0: loss -inf, gradient norm inf: not finite for 2 updates in a row"):
        take(float("inf"))


class OnDevice(torch.Tensor):
    """A tensor whose content is noted as soon as the program asks for it, and that of all that comes of it."""

    events = []
    reads = {getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__",
                                                      "__int__", "__format__", "nonzero")}

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in cls.reads:
            cls.events.append("read")
        return super().__torch_function__(function, types, args, kwargs or {})


UPDATES = [("train_rlt.py", ""), ("train_rlt.py", "--kl exact --kl-gradient"), ("rl_student.py", ""),
           ("rl_student.py", "--failed-groups guide"), ("on_policy_student.py", ""), ("sft_student.py", "")]


@pytest.mark.parametrize(("script", "flags"), UPDATES)
def test_the_host_reads_nothing_between_micro_batches(workshop, tmp_path, monkeypatch, script, flags):
    """Log-probs, losses and the gradient's norm are read once all micro-batches of an update are done: on a GPU each
    read waits until the GPU has nothing left to do."""
    from rlt import logprobs

    def on_device(function):
        def wrapped(*args, **options):
            values = function(*args, **options)  # of an update: those before it are read
            return [x.as_subclass(OnDevice) for x in values] if torch.is_grad_enabled() else values
        return wrapped

    def backward(updates, *args, plain=Updates.backward):
        OnDevice.events.append("micro-batch")
        plain(updates, *args)

    def step(updates, *args, plain=Updates.step):
        OnDevice.events.append("step")
        return plain(updates, *args)

    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: norm(grads).as_subclass(OnDevice))
    for name in ("completion_logprobs", "completion_logprobs_and_kl"):
        monkeypatch.setattr(logprobs, name, on_device(getattr(logprobs, name)))
    monkeypatch.setattr(Updates, "backward", backward)
    monkeypatch.setattr(Updates, "step", step)
    monkeypatch.setattr(OnDevice, "events", [])
    call(workshop, script, *SMALL[script], *flags.split(), "--steps", 1, "--micro-batch-tokens", 64, "--eval-every", 0,
         "--out", tmp_path / "run")
    loop, _, after = " ".join(OnDevice.events).partition(" step")
    assert loop.count("micro-batch") > 2 and "read" in after, "the test must see the reads of the step"
    assert "read" not in loop, loop


@pytest.mark.parametrize("script", TRAINERS)
def test_the_trainers_skip_and_stop(workshop, tmp_path, monkeypatch, script):
    """The losses of one step are NaN, then those of all."""
    from rlt import logprobs

    name = "completion_logprobs" + "_and_kl" * (script == "on_policy_student.py")
    plain, count = getattr(logprobs, name), [0]

    def broken(*args, **options):
        value, other = plain(*args, **options)
        if torch.is_grad_enabled():
            count[0] += 1
            if count[0] in bad:
                value, other = value * float("nan"), other * float("nan")
        return value, other

    monkeypatch.setattr(logprobs, name, broken)
    flags = ("--steps", 3, *SMALL[script], "--eval-every", 0, "--micro-batch-tokens", 10**6, "--max-bad-steps", 2)
    bad = {2}
    call(workshop, script, *flags, "--out", tmp_path / "once")
    losses = [entry["loss"] for entry in read_jsonl(tmp_path / "once/metrics.jsonl")]
    assert [loss is None for loss in losses] == [False, True, False]
    report = json.loads((tmp_path / "once/bad_step.json").read_text())
    assert report["step"] == 1 and report["loss"] == "nan"
    assert re.fullmatch(r".*train.jsonl line \d+", report["rows"][0]["where"]) and report["rows"][0]["text"]
    bad, count[0] = range(99), 0
    _, stderr, code = ended(workshop, script, *flags, "--out", tmp_path / "always")
    assert code == 2 and "not finite for 2 updates in a row (--max-bad-steps)" in stderr
    assert not list((tmp_path / "always").glob("step_*")) and not (tmp_path / "always/final").exists()


def test_weights_that_are_not_finite_are_never_saved(tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny_model(64)
    next(model.parameters()).data[0, 0] = float("nan")
    with pytest.raises(UserError, match="is not written: weights have become NaN or infinite"):
        saving.save_model(model, None, tmp_path / "all")
    model = get_peft_model(tiny_model(64), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    lora.adapter_parameters(model)[-1].data[0, 0] = float("inf")
    with pytest.raises(UserError, match="is not written"):
        saving.save_model(model, None, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


# -- out of memory


@pytest.fixture
def little_memory(monkeypatch):
    """little_memory(place, times): these calls of it, counted from 1, run out of memory in the middle of their work."""
    from rlt import logprobs

    import rewards

    calls, plain = [0], {"score": rewards._score_micro_batch, "logprobs": logprobs.completion_logprobs}
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def starts_with(place, times):
        def fails():
            calls[0] += 1
            return calls[0] in times

        def score(*args, **options):
            if place == "score" and fails():
                raise out_of_memory
            return plain["score"](*args, **options)

        def completion_logprobs(model, *args, **options):
            grad = torch.is_grad_enabled()
            if place == "old log-probs" and not grad and fails():
                raise out_of_memory
            values = plain["logprobs"](model, *args, **options)
            if place == "update" and grad and fails():  # in the backward pass: some gradients are added up by then
                first = next(p for p in model.parameters() if p.requires_grad)

                def fail(_):
                    handle.remove()
                    raise out_of_memory

                handle = first.register_hook(fail)
            return values

        calls[0] = 0
        monkeypatch.setattr(rewards, "_score_micro_batch", score)
        monkeypatch.setattr(logprobs, "completion_logprobs", completion_logprobs)

    return starts_with


@pytest.mark.parametrize(("script", "place"), [
    pytest.param("train_rlt.py", "score", marks=pytest.mark.slow), ("train_rlt.py", "update"),
    pytest.param("rl_student.py", "old log-probs", marks=pytest.mark.slow), ("rl_student.py", "update"),
    ("sft_student.py", "update")])
def test_out_of_memory_halves_the_micro_batch(workshop, tmp_path, little_memory, capsys, script, place):
    """To the bit: the second micro-batch fails, and the run is the one that had the smaller ones from the start."""
    flags = ("--steps", 2, *SMALL[script], "--eval-every", 0, "--micro-batch-tokens")
    call(workshop, script, *flags, 300, "--out", tmp_path / "half")
    little_memory(place, {2})
    call(workshop, script, *flags, 600, "--out", tmp_path / "halved")
    assert "out of memory: --micro-batch-tokens is 300 from here on, half of 600." in capsys.readouterr().out
    assert metrics(tmp_path / "halved") == metrics(tmp_path / "half")
    weights = [(tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("half", "halved")]
    assert weights[0] == weights[1]
    little_memory(place, {2, 3})
    _, stderr, code = ended(workshop, script, *flags, 600, "--out", tmp_path / "too little")
    assert code == 2 and len(stderr.splitlines()) == 1 and "a smaller --micro-batch-tokens" in stderr, stderr
    assert not (tmp_path / "too little/final").exists()


# -- checkpoints


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "a bit":
        at = len(data) // 3
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "a bit"])
def test_a_damaged_checkpoint_is_named(tmp_path, how):
    run_with_checkpoints(tmp_path / "run", 4, 6, 8)
    last = tmp_path / "run/step_000008"
    files = contents(last)
    for name in files:
        damage(last / name, how)
        before = contents(tmp_path)
        if how == "missing" and name.name == checkpoints.MANIFEST:
            assert new_run(tmp_path / "run", resume=True).step == 8, "as an older run's"
        else:
            message = rf"step_000008 is damaged \({name}\): delete it to go on from step_000006\."
            with pytest.raises(UserError, match=message):
                new_run(tmp_path / "run", resume=True)
        assert contents(tmp_path) == before
        (last / name).write_bytes(files[name])
    assert new_run(tmp_path / "run", resume=True).step == 8
    damage(last / "optimizer.pt", how)
    damage(tmp_path / "run/step_000006/optimizer.pt", how)
    with pytest.raises(UserError, match="delete it to go on from step_000004"):
        new_run(tmp_path / "run", resume=True)
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "run/step_000004")
    with pytest.raises(UserError, match="step_000006 is damaged .*delete it to start from the first step"):
        new_run(tmp_path / "run", resume=True)


def test_stray_names_do_no_harm(tmp_path):
    run_with_checkpoints(tmp_path / "run", 2, 4)
    for name in ("step_000009.partial", "step_000006 (copy)", "step_7", "step_best", "step_", "step_٠٠٠٠٠٩", "steps"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run/step_000008").touch()
    (tmp_path / "run/notes.txt").touch()
    run = new_run(tmp_path / "run", resume=True)
    assert run.step == 4
    run.start()
    for step in (6, 8):  # a file has the second's name
        if step == 8:
            (tmp_path / "run/step_000008").unlink()
        run.save(step, write_weights)
    assert [step for step, _ in checkpoints.checkpoints(tmp_path / "run")] == [4, 6, 8]
    assert (tmp_path / "run/step_best").is_dir() and (tmp_path / "run/step_7").is_dir()
    (tmp_path / "run/step_000010").mkdir()
    with pytest.raises(UserError, match=r"step_000010 is damaged \(it is empty\): delete it to go on from step_000008"):
        new_run(tmp_path / "run", resume=True)


def test_checkpoints_before_the_last_n_go_once_the_new_one_is_complete(tmp_path):
    run = run_with_checkpoints(tmp_path / "run", 2, 4, 6)

    def fails(folder):
        write_weights(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.save(8, fails)
    assert [step for step, _ in checkpoints.checkpoints(run.folder)] == [2, 4, 6]
    run.save(8, write_weights)
    assert [step for step, _ in checkpoints.checkpoints(run.folder)] == [4, 6, 8]
    for keep, left in ((1, [1000000]), (0, [1000000, 1000001])):
        run.args.keep_checkpoints = keep
        run.save(left[-1], write_weights)
        assert [step for step, _ in checkpoints.checkpoints(run.folder)] == left
    assert {path.name for path in run.folder.iterdir() if path.is_dir()} == {"step_1000000", "step_1000001"}


def test_logs_are_never_shortened_in_silence(tmp_path, capsys):
    run_with_checkpoints(tmp_path / "run", 4, 6)
    log = tmp_path / "run/metrics.jsonl"
    lines = log.read_text().splitlines()

    def resumed(text):
        log.write_text(text) if text is not None else log.unlink()
        new_run(tmp_path / "run", resume=True).start()
        return log.read_text(), capsys.readouterr().out

    text, said = resumed("\n".join([*lines[:2], '{"step": 2, "rew', "\0\0\0", "[3]", *lines[4:], '{"step": 6}', "{"]))
    assert text.splitlines() == [*lines[:2], '{"step": 2, "rew', "\0\0\0", "[3]", *lines[4:]]
    assert "has lines that are not JSON objects: 3, 4, 5. They stay as they are" in said
    assert reward_is_dropping(log) is None
    text, said = resumed("".join(line + "\n" for line in lines[:3]))
    assert text.splitlines() == lines[:3] and "ends early: 6 steps were taken, it has 3 of them" in said
    text, said = resumed(None)
    assert text == "" and "metrics.jsonl is missing: 6 steps were taken" in said
    assert resumed("".join(line + "\n" for line in lines))[1] == ""


def test_a_warning_of_dropping_rewards_survives_skipped_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [{"step": i, "reward": -0.05 * i if i % 7 else None} for i in range(30)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert reward_is_dropping(path) is None


# -- disks


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EDQUOT, "Disk quota exceeded"),
                                   RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"),
                                   Exception("Error: I/O error: No space left on device (os error 28)")])
def test_a_full_disk_says_what_is_safe(tmp_path, error):
    run = run_with_checkpoints(tmp_path / "run", 4)

    def write(folder):
        write_weights(folder)
        raise error

    with pytest.raises(UserError, match=r"the disk is full: .*step_000006 could not be written \(it takes [\d.]+ MB, "
                                        r"[\d.,]+ MB are free\); step_000004 is complete\. Make room"):
        run.save(6, write)
    assert not list(run.folder.glob("*.partial"))
    assert new_run(tmp_path / "run", resume=True).step == 4


def test_a_log_on_a_full_disk():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(UserError, match="the disk is full: /dev/full could not be written"):
        append_jsonl(Path("/dev/full"), [{"step": 1}])


def test_a_lock_on_a_full_disk(tmp_path, monkeypatch):
    """It holds, and the write that matters says what is wrong."""
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", no_space)
        locks.hold_lock(tmp_path / "lock", "a run")
    assert (tmp_path / "lock").read_text() == "" and (tmp_path / "lock").resolve() in locks._HELD
    with pytest.raises(UserError, match="can't be written: Not a directory. Make room, or pass another --out"):
        locks.hold_lock(tmp_path / "lock/lock", "a run")


def test_other_files_on_a_full_disk(tmp_path, monkeypatch):
    """An evaluation, a partition, a config: the file of before stays, and no half of the new one."""
    path = tmp_path / "eval_toy.json"
    path.write_text("before")

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"the disk is full: .*eval_toy.json could not be written"):
            write_atomically(path, "after")
        assert contents(tmp_path) == {Path(path.name): b"before"}
        with pytest.raises(UserError, match=r"the disk is full: .*config.json could not be written"):
            new_run(tmp_path / "run").start()
    new_run(tmp_path / "run").start()  # the start that failed left no run behind


@pytest.mark.parametrize("script", [*TRAINERS, "distill.py", "evaluate.py"])
def test_outputs_that_cannot_be_written_are_found_before_models_are(workshop, tmp_path, monkeypatch, script):
    def not_yet(*_, **__):
        raise AssertionError("models are loaded before --out is looked at")

    monkeypatch.setattr(models, "load_model", not_yet)
    monkeypatch.setattr(models, "load_lora", not_yet)
    (tmp_path / "file").touch()
    for out in ("/proc/rlt/out", tmp_path / "file/out", tmp_path / ("x" * 300) / "out"):
        model = ["--model", "toy"] if script == "evaluate.py" else []
        _, stderr, code = ended(workshop, script, *model, "--out", out)
        assert code == 2 and len(stderr.splitlines()) == 1 and "can't be written" in stderr, stderr


# -- signals


LOOP = """
import argparse, sys, time
from rlt.runs import Run
args = argparse.Namespace(out=sys.argv[1], resume="--resume" in sys.argv, steps=9, save_every=0, keep_checkpoints=3,
                          lr_steps=None)
run = Run(args)
run.start()
for step in run.steps(iter(range(run.step, args.steps)), lambda folder: (folder / "weights").write_text(str(step))):
    print("step", step, flush=True)
    if step == 3:
        run.weights_changed = sys.argv[2] == "changed"
        print("now", flush=True)
        time.sleep(float(sys.argv[3]))
        print("after", flush=True)
    run.weights_changed = True
    run.log({"step": step})
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("weights", ["changed", "same"])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, kind, weights):
    (tmp_path / "loop.py").write_text(LOOP)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(seconds, *flags):
        return subprocess.Popen([sys.executable, "loop.py", "a run", weights, seconds, *flags], cwd=tmp_path, env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    process = start("0.5" if weights == "changed" else "60")
    while process.stdout.readline() != "now\n":
        pass
    process.send_signal(kind)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[kind], stderr
    steps = 4 if weights == "changed" else 3
    assert stdout == ("after\n" if weights == "changed" else "")
    assert f"a run has a checkpoint after {steps} steps" in stderr
    assert [step for step, _ in checkpoints.checkpoints(tmp_path / "a run")] == [steps]
    assert len(read_jsonl(tmp_path / "a run/metrics.jsonl")) == steps
    command = re.search(r"python loop.py .*", stderr)[0]
    assert command == f"python loop.py 'a run' {weights} {'0.5' if steps == 4 else '60'} --resume"
    process = start("0", "--resume")
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 0 and stdout.startswith(f"step {steps}\n"), stderr
    assert [entry["step"] for entry in read_jsonl(tmp_path / "a run/metrics.jsonl")] == list(range(9))


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP.replace("time.sleep(", "[time.sleep(0.1) for _ in range(600)], ("))
    process = subprocess.Popen([sys.executable, "loop.py", "run", "changed", "60"], cwd=tmp_path, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    while process.stdout.readline() != "now\n":
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 143
    assert not checkpoints.checkpoints(tmp_path / "run")


@pytest.mark.parametrize(("error", "code", "said"), [
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 2, "a smaller --micro-batch-tokens"),
    (UserError("a\nb"), 2, r"error: a\nb")])
def test_what_ends_in_one_line(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/train_rlt.py"])
    monkeypatch.setattr(errors, "FLAGS", {"--micro-batch-tokens", "--resume"})
    with pytest.raises(SystemExit) as ended_with:
        errors._excepthook(type(error), error, None)
    assert ended_with.value.code == code
    stderr = capsys.readouterr().err
    assert len(stderr.splitlines()) == 1 and stderr.startswith("train_rlt.py: ") and said in stderr


def test_ctrl_c_is_one_line_before_torch_is_loaded(tmp_path):
    """Importing it takes seconds. A module in its place raises what Ctrl-C does."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, ROOT / "train_rlt.py"], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "train_rlt.py: interrupted.\n")


@pytest.mark.parametrize("script", ["train_rlt.py", "distill.py", "evaluate.py", "data/toy.py"])
def test_errors_advise_the_flags_that_the_script_has(script):
    """Where memory is full, and after Ctrl-C."""
    errors.FLAGS.clear()  # of the scripts that other tests have called
    help_text = ended(ROOT, script, "--help").stdout
    full = type("OutOfMemoryError", (RuntimeError,), {})
    said = errors._one_line(full, full("full"))[1] + errors._one_line(KeyboardInterrupt, None)[1]
    named = set(re.findall(r"--[a-z-]+", said))
    assert "full" in said and "interrupted" in said
    assert all(re.search(rf"^  {flag}\b", help_text, re.M) for flag in named), named
    assert ("--resume" in named) == (script in ("train_rlt.py", "distill.py"))


# -- models that are no models


def broken_model(folder, what):
    """A copy of a teacher or its base with one thing wrong."""
    if what == "empty folder":
        for path in list(folder.iterdir()):
            path.unlink()
    elif what.startswith("no "):
        (folder / what[3:]).unlink()
    elif what.startswith("half of "):
        damage(folder / what[8:], "cut")
    elif what.startswith("not JSON in "):
        (folder / what[12:]).write_text("{")
    elif what == "the end of a turn has no row":  # it was added, and the model not resized
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1}))
    elif what == "template":
        (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message")
    elif what == "another rank":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    elif what == "another base":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))


@pytest.mark.parametrize("what", ["empty folder", "no config.json", "no model.safetensors", "no tokenizer.json",
                                  "half of model.safetensors", "half of config.json", "half of tokenizer.json",
                                  "not JSON in config.json", "not JSON in tokenizer_config.json", "template",
                                  "the end of a turn has no row"])
def test_a_model_that_cannot_be_read_is_one_line(workshop, tmp_path, what):
    model = tmp_path / "model"
    shutil.copytree(workshop / "runs/toy", model)
    broken_model(model, what)
    _, stderr, code = ended(workshop, "sft_student.py", *SMALL["sft_student.py"], "--model", model, "--out",
                            tmp_path / "out")
    assert code == 2 and len(stderr.splitlines()) == 1 and str(model) in stderr, stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["empty folder", "no adapter_model.safetensors", "half of adapter_model.safetensors",
                                  "half of adapter_config.json", "another rank", "another base"])
def test_an_adapter_that_cannot_be_read_is_one_line(workshop, tmp_path, what):
    model = tmp_path / "model"
    shutil.copytree(workshop / "runs/toy-teacher/final", model)
    (model / checkpoints.MANIFEST).unlink()
    broken_model(model, what)
    _, stderr, code = ended(workshop, "sft_student.py", *SMALL["sft_student.py"], "--model", model, "--out",
                            tmp_path / "out")
    assert code == 2 and len(stderr.splitlines()) == 1 and str(model) in stderr, stderr
    assert not (tmp_path / "out").exists()


def test_a_seed_that_no_generator_takes():
    with pytest.raises(argparse.ArgumentTypeError, match="expected at most"):
        number(int, 0)(str(2**70))
    with pytest.raises(argparse.ArgumentTypeError, match="expected at most"):
        number(int, 0)(str(10**400))
    for script in (*TRAINERS, "distill.py", "evaluate.py"):
        ended_with = ended(ROOT, script, "--seed", 2**70)
        assert ended_with.code == 2 and "argument --seed: got 1180591620717411303424" in ended_with.stderr
    torch.manual_seed(2**63 - 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"flags": 1}'])
def test_what_is_no_evaluation_is_one_line(workshop, tmp_path, text):
    """Where a new one would be written, and in a comparison."""
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/eval_toy.json").write_text(text)
    compared = ["--compare", tmp_path / "toy", tmp_path / "toy"]
    for flags in (["--model", "toy", "--limit", 4, "--out", tmp_path], compared):
        _, stderr, code = ended(workshop, "evaluate.py", *flags)
        assert code == 2 and len(stderr.splitlines()) == 1 and "is not what evaluate.py writes" in stderr, stderr
    assert (tmp_path / "toy/eval_toy.json").read_text() == text


def test_a_comparison_needs_all_samples(tmp_path):
    (tmp_path / "eval_toy.json").write_text('{"flags": {"samples": 2}}')
    for lines in (0, 3):
        (tmp_path / "eval_toy_samples.jsonl").write_text('{"question": "q", "gold": "g", "grade": true}\n' * lines)
        with pytest.raises(UserError, match=f"has {lines} lines, expected 2 for each question"):
            evaluations.read_evaluations({"before": tmp_path / "eval_toy.json"})


def test_a_solver_with_broken_weights_writes_nothing(workshop, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    shutil.copytree(workshop / "runs/toy", model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    _, stderr, code = ended(workshop, "distill.py", "--solver", "--model", model, "--limit", 4, "--out",
                            tmp_path / "out.jsonl")
    assert code == 2 and len(stderr.splitlines()) == 1 and "model computes log-probs that are NaN" in stderr, stderr
    assert not list(tmp_path.glob("out*"))
    broken = models.load_model(str(model), bits=32, device=torch.device("cpu"))
    words = models.load_tokenizer(str(model))
    with pytest.raises(UserError, match="Qwen2ForCausalLM computes log-probs that are NaN or infinite"):
        rollout.generate(broken, words, [[1, 2]], max_new_tokens=2, temperature=1.0, seed=0)


# -- what gets in


@pytest.mark.parametrize("script,flags", [
    ("sft_student.py", ("--format", "teacher", "--val-rows", 1)),
    ("train_rlt.py", ("--model", "toy", "--eval-rows", 1)),
    ("distill.py", ("--model", "toy-teacher")),
    ("evaluate.py", ("--task", "toy", "--model", "toy")),
])
def test_a_text_that_the_tokenizer_has_no_tokens_for_is_a_bad_row(workshop, tmp_path, script, flags):
    """The toy's tokenizer knows its own words alone. The text is the longest, whose length a default asks for."""
    good = (workshop / "runs/toy/train.jsonl").read_text().splitlines()[:5]
    bad = json.loads(good[0]) | {"question": "Wie spät ist es?", "explanation": "zwölf " * 100}
    (tmp_path / "rows.jsonl").write_text("\n".join([*good, json.dumps(bad)]) + "\n")
    shown = ended(workshop, script, *flags, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert shown.code == 2 and "line 6 can't be tokenized" in shown.stderr, shown
    assert shown.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("closed", ["yes", 1, [True]])
def test_closed_is_a_boolean(workshop, tmp_path, closed):
    row = json.loads((workshop / "runs/toy/train.jsonl").read_text().splitlines()[0])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"closed": closed}) + "\n")
    _, stderr, code = ended(workshop, "distill.py", "--model", "toy-teacher", "--score-file", tmp_path / "rows.jsonl",
                            "--out", tmp_path / "out.jsonl")
    assert code == 2 and len(stderr.splitlines()) == 1 and "rows.jsonl line 1 has closed " in stderr, stderr


def test_fuzzing_finds_what_is_wrong(workshop, monkeypatch, capsys):
    """A second of it on the parsers as they are, and on one that raises where it should return."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    import fuzz

    [counts] = fuzz.fuzz(workshop, 0.02, random.Random(0))
    assert counts["failures"] == 0 and counts["texts"] > 50 and counts["pairs_of_lines"] > 200, capsys.readouterr().out
    plain = fuzz.answers.same_text

    def faulty(gold, answer):
        if "{" in answer:
            raise ZeroDivisionError
        return plain(gold, answer)

    monkeypatch.setattr(fuzz.answers, "same_text", faulty)
    [counts] = fuzz.fuzz(workshop, 0.02, random.Random(0))
    assert counts["failures"] > 0 and "answer: ZeroDivisionError: : [" in capsys.readouterr().out


def test_nothing_that_is_read_is_run():
    """No pickle, no eval or exec, no code from a model's repository; torch.load reads tensors only."""
    for path in [path for part in (".", "rlt", "data", "bench", "figures") for path in (ROOT / part).glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                names = {name.split(".")[0] for name in names}
                assert not names & {"pickle", "dill", "shelve", "marshal", "cloudpickle"}, where
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            assert not (isinstance(node.func, ast.Name) and name in ("eval", "exec")), where
            assert "trust_remote_code" not in keywords or keywords["trust_remote_code"].value is False, where
            assert not (keywords.get("shell") and getattr(keywords["shell"], "value", None)), where
            if name == "load" and ast.unparse(node.func) == "torch.load":
                assert "weights_only" in keywords and keywords["weights_only"].value is True, where


# -- the real thing: processes that are killed


# One process loads torch and the rest, once, and those that are killed are forks of it: on the CPU, for a GPU can't be
# used after a fork. How a process ends that a user has started is tested above.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rlt.models", "rewards", "peft", "transformers.models.qwen2.modeling_qwen2"])


def perform(folder, stderr, script, *flags):
    """A script in a process of its own, which ends as it would alone."""
    sys.stdout, sys.stderr = open(os.devnull, "w"), stderr.open("w")
    try:
        call(folder, script, *flags)
    except (Exception, KeyboardInterrupt) as error:
        errors._excepthook(type(error), error, error.__traceback__)
        sys.exit(1)


def start(folder, stderr, script, *flags):
    process = FORKS.Process(target=perform, args=(folder, stderr, script, *flags))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("script", TRAINERS)
def test_a_run_that_is_killed_and_stopped_again_and_again(workshop, tmp_path, script):
    """kill -9, SIGTERM, Ctrl-C, each somewhere in a step: at the end the metrics and weights are those of one run."""
    flags = (*SMALL[script], "--steps", 6, "--save-every", 2, "--device", "cpu")
    call(workshop, script, *flags, "--out", tmp_path / "straight")
    out, stderr = tmp_path / "killed", tmp_path / "stderr.txt"
    for kind, after in ((signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGINT, 4)):
        started = time.time()
        process = start(workshop, stderr, script, *flags, "--out", out, "--resume")
        while process.is_alive() and (len(read_jsonl(out / "metrics.jsonl")) < after
                                      or (out / "config.json").stat().st_mtime < started):  # still the one before
            time.sleep(0.05)
        if process.is_alive():
            os.kill(process.pid, kind)
        process.join(60)
        expected = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[kind]
        assert process.exitcode == expected, stderr.read_text()
    call(workshop, script, *flags, "--out", out, "--resume")
    assert metrics(out) == metrics(tmp_path / "straight")
    weights = [(folder / "final/adapter_model.safetensors").read_bytes() for folder in (out, tmp_path / "straight")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_on_one_run(workshop, tmp_path):
    """Started at the same time: one does the work, the other one says so."""
    stderrs = [tmp_path / f"stderr-{i}.txt" for i in range(2)]
    flags = (*RL, "--steps", 2, "--device", "cpu", "--out", tmp_path / "run")
    processes = [start(workshop, stderr, "train_rlt.py", *flags) for stderr in stderrs]
    for process in processes:
        process.join()
    stderrs = [stderr.read_text() for stderr in stderrs]
    assert sorted(process.exitcode for process in processes) == [0, 2], stderrs
    assert [entry["step"] for entry in read_jsonl(tmp_path / "run/metrics.jsonl")] == [0, 1]
    assert any("is in use by process" in text or "was made by another" in text for text in stderrs)


def test_a_log_that_is_a_folder(tmp_path):
    new_run(tmp_path / "run").start()
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics.jsonl is a folder, expected a file: move it out of the way"):
        new_run(tmp_path / "run", resume=True).start()
