"""
Two ranks against one process: the same updates, logs and files.

    python -m pytest tests/test_distributed.py

Completions are a function of the prompt, so that ranks and one process see the same, and the optimizer is SGD: Adam
would hide a gradient of twice the length. torchrun runs this very file (see its end), all CASES in one go.
"""

import argparse
import atexit
import contextlib
import json
import math
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

from rlt import distributed, failed_groups, models, rollout, runs
from rlt.errors import UserError
from rlt.files import read_jsonl

import pytest
import torch
from conftest import ROOT, call, metrics

import rewards

SMALL = ("--limit", 80, "--max-new-tokens", 12, "--eval-rows", 3, "--eval-every", 1, "--warmup-steps", 0,
         "--final-lr-fraction", 1, "--max-logprob-diff", 100, "--save-every", 1)
RLT = (*SMALL, "--prompts-per-step", 4, "--group-size", 3, "--micro-batch-tokens", 150)
STUDENT = (*SMALL, "--group-size", 4, "--rewards", 0, 0, 1, "--seed", 3)
CASES = {  # name of its output: script and flags
    "rlt": ("train_rlt.py", *RLT, "--steps", 2, "--loss", "dapo", "--updates-per-batch", 2, "--sync-ref-every", 1,
            "--lr", 0.3, "--max-grad-norm", 1e9),
    "kl": ("train_rlt.py", *RLT, "--steps", 1, "--kl", "exact", "--kl-gradient", "--lr", 30, "--max-grad-norm", 1e-3),
    "rl": ("rl_student.py", *STUDENT, "--steps", 4, "--prompts-per-step", 2, "--lr", 1, "--max-grad-norm", 1e9,
           "--keep-checkpoints", 4),
    "hints": ("rl_student.py", *STUDENT, "--steps", 2, "--prompts-per-step", 4, "--failed-groups", "guide", "--loss",
              "dapo", "--lr", 1, "--max-grad-norm", 1e9, "--seed", 9),
    "adaback": ("rl_student.py", *STUDENT, "--steps", 3, "--prompts-per-step", 4, "--failed-groups", "adaback",
                "--explanation-column", "chain", "--lr", 1, "--max-grad-norm", 1e9, "--limit", 7),  # rows come again
    "relift": ("rl_student.py", *STUDENT, "--steps", 3, "--prompts-per-step", 4, "--failed-groups", "relift",
               "--relift-rows", 3, "--explanation-column", "chain", "--lr", 1, "--max-grad-norm", 1e9),
    "sft": ("sft_student.py", "--data", "toy", "--limit", 80, "--steps", 3, "--batch-size", 5, "--val-rows", 7,
            "--eval-every", 1, "--warmup-steps", 0, "--lr", 0.3, "--max-grad-norm", 1e9, "--save-every", 1),
    "distilled.jsonl": ("distill.py", "--model", "toy-teacher", "--limit", 20, "--batch-size", 16, "--samples", 2,
                        "--max-new-tokens", 12, "--partition", 2),
    "evaluated": ("evaluate.py", "--model", "toy", "toy-teacher", "--limit", 10, "--batch-size", 8, "--samples", 2,
                  "--temperature", 1, "--max-new-tokens", 12),
}


def recorded(model, tokenizer, prompts, **_):
    """In generate's place: a completion depends on its prompt, and on how often that is in this call."""
    words = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    closing = tokenizer("<|end_of_explanation|>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    asked, completions = Counter(), []
    for prompt in map(tuple, prompts):
        draw = random.Random(repr((prompt, asked[prompt])))
        asked[prompt] += 1
        finished = draw.random() < 0.8
        ids = draw.choices(words, k=draw.randint(1, 8)) + closing * finished
        completions.append(rollout.Completion(ids, [draw.uniform(-3, -1) for _ in ids], finished))
    return completions


def crc(text):
    return zlib.crc32(text.encode())


def lucky(task, outputs, rows):
    """In the grader's place: half of the questions can be solved."""
    return [bool(crc(row["question"]) % 2) and crc(text) % 2 == 0 for text, row in zip(outputs, rows, strict=True)]


def lucky_now_and_then(task, outputs, rows):
    return [crc(text) % 5 == 0 for text in outputs]


def perform(folder, out, name):
    """One of the CASES, in this process; what it writes is out/name."""
    script, *flags = CASES[name]
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):  # ranks with nothing to write end so
        if script in ("train_rlt.py", "rl_student.py", "sft_student.py"):
            patch.setattr(rollout, "generate", recorded)
            patch.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr))
            patch.setattr("rlt.grading.grade_all", lucky_now_and_then if name in ("hints", "adaback") else lucky)
        call(folder, script, *flags, "--out", Path(out) / name)


def torchrun(folder, *command):
    """A command on two ranks -> the finished process and its seconds."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, command)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done, time.monotonic() - started


@pytest.fixture(scope="module")
def outputs(workshop, tmp_path_factory):
    """The folders of one process and of two ranks, all CASES in each."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    done, _ = torchrun(workshop, __file__, workshop, two, *CASES)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in CASES:
        perform(workshop, one, name)
    return one, two, done


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def difference(one, other):
    assert one.keys() == other.keys() and one
    return max((one[key] - other[key]).abs().max().item() for key in one)


# -- the update


@pytest.mark.parametrize("name", ["rlt", "kl", "rl", "hints", "adaback", "relift", "sft"])
def test_two_ranks_take_the_steps_of_one_process(outputs, workshop, name):
    one, two = (folder / name for folder in outputs[:2])
    steps = sorted(path.name for path in one.glob("step_*"))
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir()), "nothing else"
    for step in steps:
        assert difference(weights(one / step), weights(two / step)) < 1e-6, step
    if (one / steps[-1] / "reference").exists():
        assert difference(*(weights(run / steps[-1] / "reference") for run in (one, two))) < 1e-6
    started = workshop / "runs/toy-teacher/final" if name in ("rlt", "kl") else one / steps[0]
    assert difference(weights(started), weights(one / steps[-1])) > 1e-3, "a step this size would show a wrong gradient"


@pytest.mark.parametrize("name", ["rlt", "kl", "rl", "hints", "adaback", "relift", "sft"])
def test_two_ranks_log_the_numbers_of_one_process(outputs, name):
    alone, both = (metrics(folder / name) for folder in outputs[:2])
    assert len(alone) == len(both) > 0
    for one, other in zip(alone, both, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            # A loss is a float32 sum of terms of size 1 that all but cancel, or of KLs of nearly equal models; what it
            # leads to, the weights, is compared above
            rel, size = (1e-3 if name == "kl" else 1e-5, 1e-5) if key == "loss" else (1e-5, 1e-6)
            wanted = None if one[key] is None else pytest.approx(one[key], rel=rel, abs=size)
            assert other[key] == wanted, (one["step"], key)


@pytest.mark.parametrize("name", ["adaback", "relift"])
def test_two_ranks_note_the_failures_of_one_process(outputs, name):
    one, two = (json.loads((folder / name / "step_000003" / failed_groups.FILE).read_text()) for folder in outputs[:2])
    assert one == two
    if name == "adaback":
        assert [0.0, 1.0] not in one["intervals"] and any(lo for lo, _ in one["intervals"])


def test_the_cases_are_what_they_should_be(outputs):
    one, _, _ = outputs
    usable = [entry["usable_groups"] for entry in metrics(one / "rl")]
    assert {0, 1} <= set(usable), "both ranks without a usable group, and one of them"
    hints = metrics(one / "hints")
    assert any(0 < entry["hinted"] < 1 and entry["guided_log_ratio"] for entry in hints)
    assert any(entry["clip_fraction"] is not None for entry in hints)
    assert any(entry["usable_groups"] for entry in metrics(one / "adaback"))
    assert any(entry["relift_loss"] for entry in metrics(one / "relift"))
    rlt = metrics(one / "rlt")
    assert all(entry["grad_norm"] > 0 and entry["eval_reward"] for entry in rlt) and rlt[1]["kl_ref"] > 0
    assert metrics(one / "kl")[0]["grad_norm"] > 1e-3, "the clip acts"


def test_rank_0_alone_prints_and_writes(outputs):
    stdout = outputs[2].stdout
    assert stdout.count("2 ranks, this one on cpu") == len(CASES) and stdout.count("The student is in") == 5
    for out, ranks in zip(outputs, (1, 2), strict=False):
        assert json.loads((out / "kl/config.json").read_text())["ranks"] == ranks


def test_the_ranks_threads_end_before_the_interpreter_does(outputs):
    """A thread of the group's that is still there aborts the process now and then, after all its work."""
    _, two, _ = outputs
    left = [(two / f"threads of rank {rank}").read_text().split() for rank in range(2)]
    assert all(left) and not any("gloo" in name for names in left for name in names), left


def test_one_rank_goes_on_where_two_have_stopped(outputs, workshop, monkeypatch):
    for out in outputs[:2]:
        monkeypatch.setitem(CASES, "rlt", (*CASES["rlt"], "--steps", 3, "--resume"))
        perform(workshop, out, "rlt")
    one, two = (out / "rlt" for out in outputs[:2])
    assert [entry["step"] for entry in metrics(two)] == [0, 1, 2]
    assert difference(weights(one / "final"), weights(two / "final")) < 1e-6
    assert difference(weights(two / "step_000002"), weights(two / "final")) > 1e-4


# -- files


def test_distilled_files_are_the_same(outputs):
    one, two, _ = outputs
    batches = [row["batch"] for row in read_jsonl(one / "distilled.jsonl")]
    assert len(set(batches)) > 1, "of several batches; rows with foreign tags are left out"
    for name in ("distilled.jsonl", "distilled.within-1of2.jsonl", "distilled.overall-2of2.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_evaluations_are_the_same(outputs):
    one, two, _ = outputs
    files = sorted(path.relative_to(one / "evaluated") for path in (one / "evaluated").rglob("*.json*"))
    assert len(files) == 4
    for file in files:
        mine, theirs = ((folder / "evaluated" / file).read_text() for folder in (one, two))
        if file.suffix == ".json":  # all but how it was called
            mine, theirs = (json.loads(text) for text in (mine, theirs))
            assert {"exact_match", "truncated", "length", "pass_at"} <= mine.keys()
            for how in ("flags", "command", "git"):
                del mine[how], theirs[how]
        assert mine == theirs
    rows = read_jsonl(one / "evaluated" / files[1])
    assert len(rows) == 20 and len({row["output"] for row in rows}) > 4


# -- what goes wrong


def test_a_number_that_two_ranks_cannot_share(workshop, tmp_path):
    done, seconds = torchrun(workshop, ROOT / "train_rlt.py", "--prompts-per-step", 3, "--out", tmp_path / "run")
    complaint = "train_rlt.py: error: --prompts-per-step 3 can't be shared evenly by 2 ranks: pass 4.\n"
    assert done.returncode != 0 and done.stderr.count(complaint) == 1 and seconds < 60
    assert 'File "' not in done.stderr.split(complaint)[0] and not (tmp_path / "run").exists()


def test_one_rank_that_fails_ends_the_run(workshop, tmp_path):
    """Rank 1 meets a defect while rank 0 waits to add up."""
    done, seconds = torchrun(workshop, __file__, workshop, tmp_path, "a rank that fails")
    assert done.returncode != 0 and seconds < 90
    before, complaint, after = done.stderr.partition("ValueError: a defect on one rank")
    assert complaint and before.count("Traceback") == 1 and "in compute_rewards" in before
    ours = [line for line in after.splitlines() if f'File "{ROOT}' in line and "site-packages" not in line]
    assert not ours, "the other rank's broken connection is no news"
    assert not list((tmp_path / "rlt").glob("step_*"))


def test_the_toy_is_awaited_by_all_ranks_but_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "RANK", 1)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("rank 1 makes nothing"))
    found = []
    waiting = threading.Thread(target=lambda: found.append(models.resolve("toy")))
    waiting.start()
    time.sleep(0.1)
    assert not found and waiting.is_alive()
    (tmp_path / "runs/toy").mkdir(parents=True)
    (tmp_path / "runs/toy/model.safetensors").touch()
    waiting.join(5)
    assert found == [str(tmp_path / "runs/toy")]


def test_the_toy_is_made_by_the_first_rank_once_and_by_itself(tmp_path, monkeypatch):
    """The command is told that it is alone, also under torchrun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []

    def make(command, env, **_):
        made.append((Path(command[1]).name, command[-1], env["WORLD_SIZE"]))
        (tmp_path / "runs/toy").mkdir(parents=True)
        (tmp_path / "runs/toy/model.safetensors").touch()

    monkeypatch.setattr(subprocess, "run", make)
    for _ in range(2):
        assert models.resolve("toy") == str(tmp_path / "runs/toy")
    assert made == [("toy.py", "runs/toy", "1")]


@pytest.mark.parametrize("env, expected", [
    ({}, (0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "4"}, (0, 1)),  # a scheduler's variables mean nothing
    ({"RANK": "3", "WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "some"}, (3, 4)),
])
def test_there_are_ranks_under_torchrun_alone(env, expected):
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", "from rlt.distributed import RANK, WORLD; print((RANK, WORLD))"],
                          cwd=ROOT, env=plain | env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


def test_every_rank_has_a_device_to_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(models.pick_device("auto")) == "cuda" and str(models.pick_device("cuda:1")) == "cuda:1"
    monkeypatch.setattr(models, "WORLD", 4)
    for local_rank, device in ((0, "cuda:0"), (1, "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        assert str(models.pick_device("auto")) == device == str(models.pick_device("cuda"))
        assert str(models.pick_device("cpu")) == "cpu"
    with pytest.raises(UserError, match="--device cuda:1 under torchrun: .* pass cuda"):
        models.pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 of this machine finds 2 CUDA devices .* --nproc_per_node=2"):
        models.pick_device("auto")


@pytest.mark.parametrize("name, chosen", [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_device_asked_for_is_the_current_one(monkeypatch, name, chosen):
    """Also without torchrun: libraries ask for the current device, not for the model's."""
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    assert distributed.init_distributed(torch.device(name)) == (0, 1) and asked == chosen


def test_ranks_that_find_different_rows(tmp_path, monkeypatch):
    run = runs.Run(argparse.Namespace(out=str(tmp_path / "run"), resume=False, steps=1, keep_checkpoints=3,
                                      lr_steps=None))
    monkeypatch.setattr(runs, "all_gather_object", lambda thing: [thing, (*thing[:-1], "other rows")])
    with pytest.raises(UserError, match="have found different checkpoints, weights or rows"):
        run.start(base_hash="a", rows_hash="b")
    assert not (tmp_path / "run").exists()


def test_means_are_over_all_items_wherever_they_are(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda mine: [mine, (4.0, 1), (None, 0), (math.nan, 0)])
    assert distributed.all_reduce_mean(1.0, 3) == pytest.approx((3 * 1 + 4) / 4)
    monkeypatch.setattr(distributed, "all_gather_object", lambda mine: [mine, (None, 0)])
    assert distributed.all_reduce_mean(None, 0) is None
    monkeypatch.setattr(distributed, "all_gather_object", lambda mine: [mine, (10, 0.5)])
    assert distributed.all_reduce_sum(1, 2) == [11, 2.5]


def test_alone_a_sum_is_the_number_itself():
    assert distributed.all_gather_object("x") == ["x"] and distributed.all_reduce_sum(3, 0.1) == [3, 0.1]
    assert distributed.all_reduce_mean(0.1 + 0.2, 49) == 0.1 + 0.2 and distributed.all_reduce_mean(None, 0) is None
    p = torch.nn.Parameter(torch.ones(2))
    distributed.all_reduce_gradients([p])
    assert p.grad is None and not torch.distributed.is_initialized()


def fail(*_, **__):
    raise ValueError("a defect on one rank")


def write_threads(folder, rank):
    """The names of this process's threads, in a file of its own: lines of two ranks on one stderr mix."""
    names = sorted(path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
    (folder / f"threads of rank {rank}").write_text("".join(names))


if __name__ == "__main__":  # on each rank: folder, folder to write to, names of CASES
    folder, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    atexit.register(write_threads, Path(out).resolve(), distributed.RANK)  # what is registered first is called last
    if names == ["a rank that fails"]:
        rollout.generate = recorded
        if distributed.RANK == 1:
            rewards.rlt_reward = fail
        os.chdir(folder)
        sys.argv = [__file__, *map(str, CASES["rlt"][1:]), "--out", f"{out}/rlt"]
        exec(compile((ROOT / "train_rlt.py").read_text(), ROOT / "train_rlt.py", "exec"))
    for name in names:
        perform(folder, out, name)
