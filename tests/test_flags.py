"""Flags, and errors that a user can fix.   python -m pytest tests/test_flags.py"""

import argparse
import json
import os
import subprocess
import sys

from rlt import errors, flags
from rlt.errors import UserError

import pytest
import torch
from conftest import ROOT


def parser(*known):
    made = flags.make_parser("What it does.\n\n    laptop    python it.py")
    for flag in known:
        made.add_argument(flag, type=flags.number(float), default=1.0, help="some number")
    return made


@pytest.fixture(autouse=True)
def hook():
    """make_parser changes how exceptions end this process."""
    before = sys.excepthook
    yield
    sys.excepthook = before


@pytest.mark.parametrize("text, complaint", [
    ("x", "got 'x', expected a whole number"),
    ("1.5", "got '1.5', expected a whole number"),
    ("", "got '', expected a whole number"),
    ("0", "got 0, expected at least 1"),
    ("9", "got 9, expected at most 8"),
])
def test_whole_numbers(text, complaint):
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        flags.number(int, 1, 8)(text)
    assert [flags.number(int, 1, 8)(good) for good in ("1", "8", " 3 ")] == [1, 8, 3]


@pytest.mark.parametrize("text, complaint", [
    ("many", "got 'many', expected a number"),
    ("0", "got 0, expected more than 0"),
    ("-1e-9", "got -1e-9, expected more than 0"),
    ("nan", "got nan, expected a finite one"),
    ("inf", "got inf, expected a finite one"),
    ("-inf", "got -inf, expected a finite one"),
])
def test_numbers(text, complaint):
    with pytest.raises(argparse.ArgumentTypeError, match=complaint):
        flags.number(float, above=0)(text)
    assert flags.number(float, above=0)("1e-9") == 1e-9 and flags.number(float, 0, 1)("1") == 1.0


def test_a_path_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert flags.path("~/rows.jsonl") == "/home/someone/rows.jsonl" and flags.path("a/~b") == "a/~b"


@pytest.mark.parametrize("given, complaint", [
    (["--group-sise", "3"], "unknown argument --group-sise: did you mean --group-size?"),
    (["--lamda=3"], "unknown argument --lamda=3: did you mean --lambda?"),
    (["--max-tokens", "3"], "unknown argument --max-tokens: did you mean --max-new-tokens?"),
    (["--wandb"], "unknown argument --wandb: see --help"),
    (["rows.jsonl"], "unknown argument rows.jsonl: see --help"),
    (["--group", "3"], "unknown argument --group"),  # no abbreviations
    (["--final-lr", "0.1"], "--final-lr is now --final-lr-fraction"),
    (["--max-sampler-gap=0.1"], "--max-sampler-gap is now --max-logprob-diff"),
    (["--lambda"], "argument --lambda: expected one argument"),
    (["--lambda", "much"], "argument --lambda: got 'much', expected a number"),
])
def test_an_unknown_flag_has_a_hint(capsys, given, complaint):
    made = parser("--group-size", "--lambda", "--max-new-tokens", "--final-lr-fraction", "--max-logprob-diff")
    with pytest.raises(SystemExit) as refusal:
        made.parse_args(given)
    assert refusal.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and "error: " + complaint in line


def test_help_shows_the_docstring_as_it_is_and_defaults_behind(capsys):
    made = parser("--lambda")
    made.add_argument("--zero", default=0, help="a zero")
    made.add_argument("--none", default=None, help="nothing")
    made.add_argument("--on", action="store_true", help="a switch")
    with pytest.raises(SystemExit):
        made.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "What it does.\n\n    laptop    python it.py\n" in shown
    for line in ("some number [1.0]", "a zero [0]", "nothing", "a switch"):
        assert line + "\n" in shown


def test_the_next_command_gets_the_flags_that_it_needs_too():
    made = parser("--lambda")
    for flag, default in (("--data", "toy"), ("--student", None), ("--max-new-tokens", 48), ("--out", "runs/teacher")):
        made.add_argument(flag, default=default)

    def carried(*given):
        args = made.parse_args(given)
        return flags.carry(made, args, "student", "data", "max_new_tokens", model="out")

    assert carried() == "" == carried("--lambda", "3"), "defaults, and what was not asked for, are left out"
    assert carried("--out", "runs/mine") == " --model runs/mine"
    assert carried("--max-new-tokens", "9", "--data", "my rows.jsonl", "--student", "org/model") == (
        " --student org/model --data 'my rows.jsonl' --max-new-tokens 9")
    assert carried("--data", "$(rm -rf ~)") == " --data '$(rm -rf ~)'"


def test_prompts_are_shared_evenly():
    for world in (1, 2, 4, 8):
        flags.check_prompts_per_rank(argparse.Namespace(prompts_per_step=8), world)
    for prompts, world, fits in ((3, 2, 4), (16, 3, 18), (1, 8, 8)):
        with pytest.raises(UserError, match=f"--prompts-per-step {prompts} .* by {world} ranks: pass {fits}"):
            flags.check_prompts_per_rank(argparse.Namespace(prompts_per_step=prompts), world)


# ----------------------------------------------------------------------------------------------------------
# A resumed run


def resumable():
    made = parser("--lambda", "--final-lr-fraction")
    made.prog = "train_rlt.py"
    made.add_argument("--rewards", nargs=2, type=float, default=[0.0, 1.0])
    made.add_argument("--limit", type=int)
    made.add_argument("--engine", choices=flags.ENGINES, default="transformers")
    made.add_argument("--failed-groups", choices=("none", "guide"), default="none")
    made.add_argument("--keep-wrong", action="store_true")
    made.add_argument("--dry-run", type=float)
    made.add_argument("--quiet", action="store_true")
    made.add_argument("--resume", action="store_true")
    made.add_argument("--out", default="runs/default")
    return made


def write_config(path, command="train_rlt.py --lambda 5", **given):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"command": command, "flags": given}))


@pytest.mark.parametrize("config", ["run/config.json", "run.config.json"])
def test_a_resumed_run_takes_its_own_flags(tmp_path, capsys, config):
    """Of a run folder and of a file by distill.py: what is not given, under the names of today; never how it began."""
    if "/" not in config:
        (tmp_path / "run").touch()
    write_config(tmp_path / config, **{"lambda": 5.0}, final_lr=0.5, rewards=[2.0, 3.0], limit=7, engine="batch",
                 hints=True, keep_wrong=True, head_chunk=9, dry_run=80.0, quiet=True, resume=False, out="elsewhere")
    out = str(tmp_path / "run")
    args = vars(resumable().parse_args(["--resume", "--out", out, "--limit", "8"]))
    assert args == {"lambda": 5.0, "final_lr_fraction": 0.5, "rewards": [2.0, 3.0], "limit": 8,
                    "failed_groups": "guide", "keep_wrong": True, "engine": "transformers", "dry_run": None,
                    "quiet": False, "resume": True,
                    "out": out}
    assert capsys.readouterr().out == (f"{out} goes on with the flags it was started with: --lambda 5.0 "
                                       "--final-lr-fraction 0.5 --rewards 2.0 3.0 --failed-groups guide "
                                       "--keep-wrong\n")
    args = vars(resumable().parse_args(["--resume", "--out", out, "--lambda", "1"]))
    assert args["lambda"] == 1.0, "given, although it is the default: it is compared with the run's, not replaced"
    assert vars(resumable().parse_args(["--out", out]))["limit"] is None, "without --resume nothing is taken"


def test_a_resumed_run_may_turn_a_switch_off(tmp_path):
    write_config(tmp_path / "config.json", offload=True)

    def offload(*given):
        made = resumable()
        flags.add_switch(made, "--offload", "to host memory")
        return made.parse_args(["--resume", "--out", str(tmp_path), *given]).offload

    assert (offload(), offload("--no-offload"), offload("--offload")) == (True, False, True)


@pytest.mark.parametrize("text", [
    None, "{", "[]", "{}", '{"flags": {"limit": 7}}', '{"flags": [], "command": "train_rlt.py"}',
    '{"flags": {"limit": 7}, "command": ""}', '{"flags": {"limit": 7}, "command": "distill.py --limit 7"}'])
def test_flags_of_another_script_or_a_broken_config_are_not_taken(tmp_path, text, capsys):
    """rlt/runs.py refuses those, in one line."""
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert resumable().parse_args(["--resume", "--out", str(tmp_path)]).limit is None
    assert resumable().parse_args(["--resume", "--out", str(tmp_path / "nowhere")]).limit is None
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------------
# Errors


SCRIPT = """
from rlt import flags, errors
flags.make_parser("A script.").parse_args()
%s
"""


def ended(tmp_path, line, **env):
    """A script that does this, in a process of its own -> (exit code, stdout, stderr)."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT % line)
    done = subprocess.run([sys.executable, path], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **env})
    return done.returncode, done.stdout, done.stderr


def test_a_user_error_is_one_line_and_exit_code_2(tmp_path):
    line = "raise errors.UserError('--model nowhere: expected a folder. Pass another.')"
    assert ended(tmp_path, line) == (2, "", "script.py: error: --model nowhere: expected a folder. Pass another.\n")
    caused = f"try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    {line.strip()[:-1]}) from error"
    assert ended(tmp_path, caused)[0::2] == (2, "script.py: error: --model nowhere: expected a folder. Pass another.\n")


@pytest.mark.parametrize("line, last", [
    ("raise ValueError('a defect of ours')", "ValueError: a defect of ours"),
    ("open('/no/such/file')", "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/file'"),
    ("int('three')", "ValueError: invalid literal for int() with base 10: 'three'"),
    ("{}['key']", "KeyError: 'key'"),
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("assert 1 == 2, 'never'", "AssertionError: never"),
])
def test_any_other_error_keeps_its_traceback(tmp_path, line, last):
    code, stdout, stderr = ended(tmp_path, line)
    assert code == 1 and stdout == ""
    assert stderr.startswith("Traceback (most recent call last):\n") and stderr.splitlines()[-1] == last
    assert 'script.py", line 4, in <module>' in stderr and line in stderr


def test_a_user_error_is_a_value_error():
    """Who calls the modules from a program of his own may catch it as one."""
    assert issubclass(UserError, ValueError) and str(UserError("text")) == "text"


def test_ranks_print_a_cause_before_its_echoes(monkeypatch, capsys):
    """The first rank that fails says why; the others, whose connections break, wait, and say it after."""
    waits, codes = [], []

    class Ended(Exception):
        pass

    def end(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(errors.time, "sleep", waits.append)
    monkeypatch.setattr(errors.os, "_exit", end)
    monkeypatch.setattr("rlt.distributed.WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr("rlt.distributed.RANK", rank)
        for error in (UserError("the cause"), RuntimeError("connection closed")):
            with pytest.raises(Ended):
                errors._excepthook(type(error), error, None)
    assert waits == [0, 1, 2, 3] and codes == [2, 1, 2, 1]
    assert capsys.readouterr().err.count("error: the cause\n") == 2


# ----------------------------------------------------------------------------------------------------------
# Threads, memory, bits


@pytest.mark.parametrize("users, expected", [(None, "passive"), ("active", "active"), ("", "")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(users, expected):
    """Beside another busy process threads that spin make a step several times slower. Set before torch is loaded."""
    program = ("import rlt, os, sys; print(os.environ['OMP_WAIT_POLICY']); assert 'torch' not in sys.modules; "
               "from rlt import flags, runs, distributed; assert 'torch' not in sys.modules")
    env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    env |= {} if users is None else {"OMP_WAIT_POLICY": users}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (expected + "\n", "")


@pytest.mark.parametrize(("users", "expected"), [
    ({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "x:1"}, "x:1"),
    ({"PYTORCH_ALLOC_CONF": "x:1"}, "None")])
def test_gpu_memory_grows_unless_the_user_says_otherwise(users, expected):
    """torch reads PYTORCH_ALLOC_CONF, else the older name. Neither of a user's is replaced."""
    env = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")} | users
    done = subprocess.run([sys.executable, "-c", "import rlt, os; print(os.environ.get('PYTORCH_CUDA_ALLOC_CONF'))"],
                          cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == expected + "\n"


@pytest.mark.parametrize(("device", "given", "bits"), [
    ("cpu", [], 32), ("cuda:1", [], 16), ("cpu", ["--dry-run"], 32), ("cpu", ["--dry-run", "80"], 16),
    ("cuda", ["--bits", "32"], 32), ("cpu", ["--bits", "4"], 4)])
def test_bits_of_a_base_that_no_flag_names(device, given, bits):
    parser = flags.make_parser("A script.")
    flags.add_bits(parser, "--bits", "weights")
    flags.add_bits(parser, "--student-bits", "weights", default=4)
    flags.add_system(parser)
    args = parser.parse_args(given)
    flags.choose_bits(parser, args, torch.device(device))
    assert (args.bits, args.student_bits) == (bits, 4)
    assert flags.carry(parser, args, "bits") == (f" --bits {bits}" if "--bits" in given else "")
