"""What the tests share: small models and tokenizers, made here; public rows from RLT_TEST_DATA where that is set."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rlt import errors
from rlt.files import read_jsonl

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


def mostly_slow(values, plain):
    """Values for parametrize: those of `plain` in every run, the others marked slow."""
    return [value if value in plain else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of slow.txt, which were measured to take seconds of a core, are marked slow."""
    slow = set((ROOT / "tests/slow.txt").read_text().splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)


def pytest_xdist_auto_num_workers(config):
    """Up to four processes for the whole suite; files and tests that are named run in this one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(4, os.cpu_count()) if whole else 0


def data_file(name):
    """A file of the public rows, or a skip that says why."""
    folder = os.environ.get("RLT_TEST_DATA")
    if not folder:
        pytest.skip("set RLT_TEST_DATA to a folder with the public rows (data/README.md) to run this")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"{path} is missing: this test reads it")
    return path


def run_script(cwd, script, *flags, check=True, **env):
    """Call a script as a user would, in the folder cwd."""
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """The real Qwen2.5 tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data_file("qwen2.5_tokenizer"))


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with runs/toy in it: the real toy, its base all but untrained."""
    folder = tmp_path_factory.mktemp("toy")
    call(folder, "data/toy.py", "--out", "runs/toy", "--steps", 3)
    return folder


@pytest.fixture
def tiny_model():
    """make(vocab) -> a random two-layer Qwen2, untied so that the head is its own."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    def make(vocab, seed=0, **changes):
        torch.manual_seed(seed)
        shape = dict(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.3,
        )
        model = Qwen2ForCausalLM(Qwen2Config(**{**shape, **changes}))
        model.generation_config = GenerationConfig()
        return model.eval()

    return make


@pytest.fixture
def graded_here(monkeypatch):
    """Answers are graded in this process, without a time limit: each of grading's own loads sympy for seconds."""
    from rlt import grading

    def in_this_process(pairs, seconds, workers):
        verdicts = {}
        for pair in pairs:
            try:
                verdicts[pair] = grading.equivalent(*pair)
            except errors.UserError:
                verdicts[pair] = grading.UNREADABLE
        return verdicts

    monkeypatch.setattr(grading, "_in_processes", in_this_process)


def metrics(folder):
    """The entries of a run's metrics.jsonl without the numbers that depend on the clock."""
    entries = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in entry.items() if not k.startswith("t_") and k != "tokens_per_s"} for entry in entries]


def documented_metrics():
    """The keys of metrics.jsonl that rlt/README.md explains."""
    table = (ROOT / "rlt/README.md").read_text().partition("## metrics.jsonl")[2]
    return {key for line in table.splitlines() if line.startswith("| `")
            for key in re.findall(r"`(\w+)`", line.split("|")[1])}


def call(folder, script, *flags):
    """Run a script in this process, in `folder`, as `python script flags`; returns its globals. No import twice."""
    before = sys.argv, os.getcwd(), sys.excepthook
    sys.argv = [script, *map(str, flags)]
    os.chdir(folder)
    try:
        return runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv, sys.excepthook = before[0], before[2]
        os.chdir(before[1])


class Ended(NamedTuple):
    """How a script ended before it began to work: --help, a refusal."""

    stdout: str
    stderr: str
    code: int


def ended(folder, script, *flags):
    """Run a script that ends by itself, in this process -> Ended, as its user sees it."""
    streams, argv = (io.StringIO(), io.StringIO()), sys.argv
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            call(folder, script, *flags)
        except SystemExit as error:
            code = error.code or 0
        except Exception as error:
            code, sys.argv = 1, [script]
            try:  # what make_parser has put in the place of a traceback
                errors._excepthook(type(error), error, error.__traceback__)
            except SystemExit as exit:
                code = exit.code
        else:
            raise AssertionError(f"{script} {flags} ran to its end")
        finally:
            sys.argv = argv
    return Ended(*(stream.getvalue() for stream in streams), code)


@pytest.fixture(scope="session")
def workshop(toy):
    """The toy's folder with a warm-up teacher that has seen two batches: whatever follows is real, and small."""
    call(toy, "sft_student.py", "--format", "teacher", "--steps", 2, "--limit", 300, "--out", "runs/toy-teacher")
    return toy
