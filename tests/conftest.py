"""What the tests share: small models and tokenizers, made here; public rows from RLT_TEST_DATA where that is set."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from rlt import runs
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


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
    run_script(folder, "data/toy.py", "--out", "runs/toy", "--steps", "3")
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


def said(folder, script, *flags):
    """(stdout, stderr) of a script that ends before it works, as its user sees them: --help, or a refusal."""
    streams = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            call(folder, script, *flags)
        except SystemExit:
            pass
        except Exception:
            runs.one_line(*sys.exc_info())  # what the script has put in the place of a traceback
        else:
            raise AssertionError(f"{script} {flags} ran")
    return tuple(stream.getvalue() for stream in streams)


@pytest.fixture(scope="session")
def workshop(toy):
    """The toy's folder with a warm-up teacher that has seen two batches: whatever follows is real, and small."""
    call(toy, "sft_student.py", "--format", "teacher", "--steps", 2, "--limit", 300, "--out", "runs/toy-teacher")
    return toy
