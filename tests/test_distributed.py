"""Two ranks against one process: the same updates, logs and files.   python -m pytest tests/test_ranks.py

Completions are a function of the prompt, so that ranks and one process see the same, and the optimizer is SGD: Adam
would hide a gradient of twice the length. torchrun runs this very file (see its end), all CASES in one go.
"""

import argparse
import atexit
import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

from rlt import models, runs

import pytest
import torch
from conftest import ROOT, call

import evaluate
import rewards

SMALL = ("--limit", 80, "--max-new-tokens", 12, "--eval-rows", 3, "--eval-every", 1, "--warmup-steps", 0,
         "--final-lr-fraction", 1, "--max-logprob-diff", 100, "--save-every", 1)
RLT = (*SMALL, "--prompts-per-step", 4, "--group-size", 3, "--micro-batch-tokens", 150)
STUDENT = (*SMALL, "--group-size", 4, "--rewards", 0, 0, 1, "--seed", 3)
CASES = {  # name of its output: script and flags
    "rlt": ("train_rlt.py", *RLT, "--steps", 2, "--loss", "dapo", "--updates-per-batch", 2, "--sync-ref-every", 1,
            "--lr", 0.3, "--max-grad-norm", 1e9),
    "kl": ("train_rlt.py", *RLT, "--steps", 1, "--kl", "exact", "--kl-gradient", "--lr", 30, "--max-grad-norm", 1e-3),
    "rl": ("rl_student.py", *STUDENT, "--steps", 4, "--prompts-per-step", 2, "--lr", 1, "--max-grad-norm", 1e9),
    "hints": ("rl_student.py", *STUDENT, "--steps", 2, "--prompts-per-step", 4, "--hints", "--loss", "dapo", "--lr", 1,
              "--max-grad-norm", 1e9, "--seed", 9),
    "sft": ("sft_student.py", "--data", "toy", "--limit", 80, "--steps", 3, "--batch-size", 5, "--val-rows", 7,
            "--eval-every", 1, "--warmup-steps", 0, "--lr", 0.3, "--max-grad-norm", 1e9, "--save-every", 1),
    "distilled.jsonl": ("distill.py", "--model", "toy-teacher", "--limit", 20, "--batch-size", 16, "--samples", 2,
                        "--max-new-tokens", 12, "--partition", 2),
    "evaluated": ("evaluate.py", "--model", "toy", "toy-teacher", "--limit", 10, "--batch-size", 8, "--samples", 2,
                  "--temperature", 1, "--max-new-tokens", 12),
}


def recorded(model, tokenizer, prompts, **_):
    """In generate's place: what is said depends on the prompt, and on how often it has been asked in this call."""
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


def lucky(task, outputs, rows):
    """In the grader's place: half of the questions can be solved."""
    crc = lambda text: zlib.crc32(text.encode())  # noqa: E731
    return [bool(crc(row["question"]) % 2) and crc(text) % 2 == 0 for text, row in zip(outputs, rows, strict=True)]


def lucky_now_and_then(task, outputs, rows):
    return [zlib.crc32(text.encode()) % 5 == 0 for text in outputs]


def perform(folder, out, name):
    """One of the CASES, in this process; what it writes is out/name."""
    script, *flags = CASES[name]
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):  # ranks with nothing to write end so
        if script in ("train_rlt.py", "rl_student.py", "sft_student.py"):
            patch.setattr(models, "generate", recorded)
            patch.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr))
            patch.setattr(evaluate, "grade_all", lucky_now_and_then if name == "hints" else lucky)
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


def timeless(folder):
    entries = runs.read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in e.items() if not k.startswith("t_") and k != "tokens_per_s"} for e in entries]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def apart(one, other):
    assert one.keys() == other.keys() and one
    return max((one[key] - other[key]).abs().max().item() for key in one)


# -- the update


@pytest.mark.parametrize("name", ["rlt", "kl", "rl", "hints", "sft"])
def test_two_ranks_take_the_steps_of_one_process(outputs, workshop, name):
    one, two = (folder / name for folder in outputs[:2])
    steps = sorted(path.name for path in one.glob("step_*"))
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir()), "nothing else"
    for step in steps:
        assert apart(weights(one / step), weights(two / step)) < 1e-6, step
    if (one / steps[-1] / "reference").exists():
        assert apart(*(weights(run / steps[-1] / "reference") for run in (one, two))) < 1e-6
    started = workshop / "runs/toy-teacher/final" if name in ("rlt", "kl") else one / steps[0]
    assert apart(weights(started), weights(one / steps[-1])) > 1e-3, "a step this size would show a wrong gradient"


@pytest.mark.parametrize("name", ["rlt", "kl", "rl", "hints", "sft"])
def test_two_ranks_log_the_numbers_of_one_process(outputs, name):
    alone, both = (timeless(folder / name) for folder in outputs[:2])
    assert len(alone) == len(both) > 0
    for one, other in zip(alone, both, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            wanted = None if one[key] is None else pytest.approx(one[key], rel=1e-5, abs=1e-6)
            assert other[key] == wanted, (one["step"], key)


def test_the_cases_are_what_they_should_be(outputs):
    one, _, _ = outputs
    usable = [entry["usable_groups"] for entry in timeless(one / "rl")]
    assert {0, 1} <= set(usable), "both ranks without a usable group, and one of them"
    hints = timeless(one / "hints")
    assert any(0 < entry["hinted"] < 1 and entry["guided_log_ratio"] for entry in hints)
    assert any(entry["clip_fraction"] is not None for entry in hints)
    rlt = timeless(one / "rlt")
    assert all(entry["grad_norm"] > 0 and entry["eval_reward"] for entry in rlt) and rlt[1]["kl_ref"] > 0
    assert timeless(one / "kl")[0]["grad_norm"] > 1e-3, "the clip acts"


def test_rank_0_alone_speaks(outputs):
    said = outputs[2].stdout
    assert said.count("2 ranks, this one on cpu") == len(CASES) and said.count("The student is in") == 3
    for out, ranks in zip(outputs, (1, 2), strict=False):
        assert json.loads((out / "kl/config.json").read_text())["ranks"] == ranks


def test_the_ranks_threads_end_before_the_interpreter_does(outputs):
    """A thread of the group's that is still there aborts the process now and then, after all its work."""
    _, _, done = outputs
    left = [line for line in done.stderr.splitlines() if line.startswith("threads at the end:")]
    assert len(left) == 2 and not any("gloo" in line for line in left), left


def test_one_rank_goes_on_where_two_have_stopped(outputs, workshop, monkeypatch):
    for out in outputs[:2]:
        monkeypatch.setitem(CASES, "rlt", (*CASES["rlt"], "--steps", 3, "--resume"))
        perform(workshop, out, "rlt")
    one, two = (out / "rlt" for out in outputs[:2])
    assert [entry["step"] for entry in timeless(two)] == [0, 1, 2]
    assert apart(weights(one / "final"), weights(two / "final")) < 1e-6
    assert apart(weights(two / "step_000002"), weights(two / "final")) > 1e-4


# -- files


def test_distilled_files_are_the_same(outputs):
    one, two, _ = outputs
    batches = [row["batch"] for row in runs.read_jsonl(one / "distilled.jsonl")]
    assert len(batches) == 40 and max(batches) == 2, "an odd number of batches: one rank is idle at the end"
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
    rows = runs.read_jsonl(one / "evaluated" / files[1])
    assert len(rows) == 20 and len({row["output"] for row in rows}) > 4


# -- what goes wrong


def test_a_number_that_two_ranks_cannot_share(workshop, tmp_path):
    done, seconds = torchrun(workshop, ROOT / "train_rlt.py", "--prompts-per-step", 3, "--out", tmp_path / "run")
    complaint = "train_rlt.py: --prompts-per-step 3 can't be shared evenly by 2 ranks: pass 4.\n"
    assert done.returncode != 0 and done.stderr.count(complaint) == 1 and seconds < 60
    assert 'File "' not in done.stderr.split(complaint)[0] and not (tmp_path / "run").exists()


def test_one_rank_that_fails_ends_the_run(workshop, tmp_path):
    """Rank 1 meets a reward that is no number while rank 0 waits to add up."""
    done, seconds = torchrun(workshop, __file__, workshop, tmp_path, "a rank that fails")
    assert done.returncode != 0 and seconds < 90
    before, complaint, after = done.stderr.partition("test_ranks.py: the reward of prompt 0, sample 0 is nan")
    assert complaint and "Traceback" not in before
    assert 'File "' + str(ROOT) not in after, "the other rank's broken connection is no news"
    assert not list((tmp_path / "rlt").glob("step_*"))


def test_the_toy_is_made_by_rank_0_and_awaited_by_the_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []

    def make(command, env, **_):
        made.append((command[-1], env["WORLD_SIZE"]))
        (tmp_path / "runs/toy").mkdir(parents=True)
        (tmp_path / "runs/toy/model.safetensors").touch()

    monkeypatch.setattr(subprocess, "run", make)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    found = []
    waiting = threading.Thread(target=lambda: found.append(models.resolve("toy")))
    waiting.start()
    time.sleep(0.1)
    assert not made and not found
    monkeypatch.setenv("RANK", "0")
    assert models.resolve("toy") == str(tmp_path / "runs/toy") and made == [("runs/toy", "1")]
    monkeypatch.setenv("RANK", "1")
    waiting.join(5)
    assert found == [str(tmp_path / "runs/toy")] and len(made) == 1


def test_every_rank_has_a_device_to_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(models.pick_device("auto")) == "cuda" and str(models.pick_device("cuda:1")) == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert str(models.pick_device("auto")) == "cuda", "without torchrun a scheduler's variables mean nothing"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "some")
    for place, device in ((0, "cuda:0"), (1, "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", str(place))
        assert str(models.pick_device("auto")) == device == str(models.pick_device("cuda"))
        assert str(models.pick_device("cpu")) == "cpu"
    with pytest.raises(ValueError, match="--device cuda:1 under torchrun: .* pass cuda"):
        models.pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="rank 2 of this machine finds 2 CUDA devices .* --nproc_per_node=2"):
        models.pick_device("auto")


@pytest.mark.parametrize("name, chosen", [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_device_asked_for_is_the_current_one(monkeypatch, name, chosen):
    """Also without torchrun: continuous batching asks what is free on the current device, not on the model's."""
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    assert distributed.init_distributed(torch.device(name)) == (0, 1) and asked == chosen


def test_ranks_that_find_different_rows(tmp_path, monkeypatch):
    run = runs.Run(argparse.Namespace(out=str(tmp_path / "run"), resume=False, steps=1))
    monkeypatch.setattr(runs, "gather", lambda thing: [thing, (*thing[:-1], "other rows")])
    with pytest.raises(ValueError, match="have found different checkpoints, weights or rows"):
        run.start(base_hash="a", rows_hash="b")
    assert not (tmp_path / "run").exists()


def test_alone_a_sum_is_the_number_itself():
    assert distributed.all_gather_object("x") == ["x"] and distributed.all_reduce_sum(3, 0.1) == [3, 0.1]
    assert distributed.all_reduce_mean(0.1 + 0.2, 49) == 0.1 + 0.2 and distributed.all_reduce_mean(None, 0) is None
    p = torch.nn.Parameter(torch.ones(2))
    distributed.all_reduce_gradients([p])
    assert p.grad is None and not torch.distributed.is_initialized()


if __name__ == "__main__":  # on each rank: folder, folder to write to, names of CASES
    folder, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    threads = lambda: sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))  # noqa: E731
    atexit.register(lambda: print("threads at the end:", *threads(), file=sys.stderr))  # the first is called last
    if names == ["a rank that fails"]:
        rollout.generate, plain = recorded, rewards.rlt_reward
        if runs.RANK == 1:
            rewards.rlt_reward = lambda *a, **k: plain(*a, **k)._replace(reward=torch.full((6,), float("nan")))
        os.chdir(folder)
        sys.argv = [__file__, *map(str, CASES["rlt"][1:]), "--out", f"{out}/rlt"]
        exec(compile((ROOT / "train_rlt.py").read_text(), ROOT / "train_rlt.py", "exec"))
    for name in names:
        perform(folder, out, name)
