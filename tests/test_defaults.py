"""Defaults that depend on the model, and the path from rows of one's own.   python -m pytest tests/test_defaults.py"""

import argparse
import csv
import io
import json
import math
import re
import shlex
from types import SimpleNamespace

from rlt import console, flags, models
from rlt.defaults import DEFAULTS, settle
from rlt.errors import UserError
from rlt.evaluations import print_evaluation_command
from rlt.files import read_jsonl
from rlt.rows import load_rows
from rlt.steps import advice_on_format, split_held_out

import pytest
import torch
from conftest import ROOT, call, ended, run_script
from test_scripts import parser_of

from bench import zoo

TOY = {"train_rlt.py": dict(lr=2e-3, max_new_tokens=48, eval_rows=64, student_bits=4, steps=60, warmup_steps=5),
       "rl_student.py": dict(lr=2e-3, max_new_tokens=48, eval_rows=64, steps=60, warmup_steps=5),
       "on_policy_student.py": dict(lr=2e-3, max_new_tokens=48, eval_rows=64, steps=60, warmup_steps=5),
       "distill.py": dict(max_new_tokens=48, student_bits=4),
       "sft_student.py": dict(lr=2e-3, steps=150, batch_size=64, warmup_steps=10, val_rows=64)}


class Characters:
    """A tokenizer for which every character is a token."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [*text]}


@pytest.fixture
def settled(monkeypatch, capsys):
    """settled(script, rows, *flags, toy, context) -> (args, what was printed, its parser)."""

    def run(script, rows, *flags, toy=False, context=math.inf):
        monkeypatch.setattr(models, "is_toy", lambda name: toy)
        monkeypatch.setattr(models, "context_length", lambda name: context)
        parser = parser_of.__wrapped__(script)
        args = parser.parse_args([*map(str, flags), "--model", "m"])
        args.teacher_bits = vars(args).get("teacher_bits") or 16
        capsys.readouterr()
        settle(parser, args, rows, Characters())
        return args, capsys.readouterr().out, parser

    return run


@pytest.mark.parametrize("script", TOY)
def test_the_toys_values_are_what_they_were(settled, script):
    args, printed, _ = settled(script, [{"explanation": "x" * 5000}] * 100, toy=True)
    assert {name: getattr(args, name) for name in TOY[script]} == TOY[script] and printed == ""
    json.dumps(vars(args))


@pytest.mark.parametrize("script", TOY)
def test_another_models_values(settled, script):
    """By hand, for 100 rows without explanations."""
    args, printed, parser = settled(script, [{}] * 100)
    expected = {"train_rlt.py": dict(lr=2e-5, max_new_tokens=1024, eval_rows=10, steps=60),
                "rl_student.py": dict(lr=2e-5, max_new_tokens=1024, eval_rows=10, steps=60),
                "on_policy_student.py": dict(lr=2e-5, max_new_tokens=1024, eval_rows=10, steps=60),
                "distill.py": dict(max_new_tokens=1024),
                "sft_student.py": dict(lr=1e-4, batch_size=16, val_rows=10, steps=17, warmup_steps=1)}[script]
    assert {name: getattr(args, name) for name in expected} == expected  # steps: 3 * 90 / 16, rounded up
    assert printed.startswith("chosen for this model: --") and printed.count("\n") == 1
    for name in expected.keys() - ({"steps"} if script != "sft_student.py" else set()):
        assert f"--{name.replace('_', '-')} {expected[name]:g}" in printed
        assert parser.get_default(name) == expected[name], "flags.carry leaves it out"
    json.dumps(vars(args))


@pytest.mark.parametrize("lengths, context, tokens", [
    ([], 32768, 1024), ([10, 256], 32768, 256), ([257, 3], 32768, 512), ([5000] + [9] * 50, 32768, 5120),
    ([30000], 32768, 16384), ([], 1000, 500), ([300], math.inf, 512)])
def test_room_for_the_longest_explanation(settled, lengths, context, tokens):
    rows = [{"explanation": "x" * n} for n in lengths] + [{"explanation": None}, {}]
    assert settled("distill.py", rows, context=context)[0].max_new_tokens == tokens


def test_a_flag_that_is_given_stays_and_the_toys_value_is_noticed(settled):
    flags = ("--lr", 2e-3, "--max-new-tokens", 48, "--eval-rows", 64, "--student-bits", 4)
    args, printed, _ = settled("train_rlt.py", [{}] * 100, *flags)
    assert (args.lr, args.max_new_tokens, args.eval_rows, args.student_bits) == (2e-3, 48, 64, 4)
    assert re.findall("warning: (--[a-z-]+) .* is the toy's value", printed) == ["--lr", "--max-new-tokens"]
    assert "chosen" not in printed
    assert "warning" not in settled("train_rlt.py", [{}] * 100, *flags, toy=True)[1]
    assert settled("sft_student.py", [{}] * 9, "--lora-rank", 0)[0].lr == 1e-5


def test_help_shows_both(capsys):
    with pytest.raises(SystemExit):
        parser_of.__wrapped__("train_rlt.py").parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())  # lines are broken anywhere
    assert "[0.002 on the toy, else 2e-05]" in shown


def test_the_table_is_in_the_readme():
    """Each default with both of its values."""
    text = " ".join((ROOT / "rlt/README.md").read_text().split())
    for default in DEFAULTS.values():
        assert f"| {default.toy:g} | {default.words or format(default.other, 'g')} |" in text, default


@pytest.mark.parametrize("rows, held, left", [(20, 5, 15), (20, 0, 20), (4, 3, 1)])
def test_rows_that_are_held_out(rows, held, left):
    args = argparse.Namespace(eval_every=2, eval_rows=held, prompts_per_step=1)
    kept, out = split_held_out(list(range(rows)), args)
    assert (len(kept), out) == (left, list(range(left, rows)))


def test_more_rows_to_hold_out_than_there_are():
    with pytest.raises(UserError, match="0 rows are left to train on"):
        split_held_out(list(range(50)), argparse.Namespace(eval_every=2, eval_rows=64, prompts_per_step=1))


def test_gsm8ks_chains_are_explanations(tmp_path):
    """Without calculator marks; the solution is then the number alone."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "Q", "answer": "2+1=<<2+1=3>>3\nSo 3.\n#### 3"}))
    [row] = load_rows(tmp_path / "rows.jsonl", explanation_column="answer")
    assert (row["explanation"], row["solution"]) == ("2+1=3\nSo 3.", r"\boxed{3}")
    [row] = load_rows(tmp_path / "rows.jsonl")
    assert "explanation" not in row and row["solution"].startswith("2+1=3")


def test_progress_moves_within_a_step(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    clock = iter([10.0, 10.1, 10.3])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    console._shown["at"] = 0.0
    screen = Terminal()
    with console.progress_bar(total=2, file=screen) as bar:
        for text in ("sampling token 1", "sampling token 2", "gradients"):
            console.show_activity(text)
        assert bar.postfix == "gradients" and "token 1" in screen.getvalue() and "token 2" not in screen.getvalue()


# ---------------------------------------------------------------------------------------------------------
# every command that is printed works as printed


def following(printed):
    """The words of the command after "Next: python"; there is one."""
    [command] = re.findall("Next: python (.*)\n", printed)
    return shlex.split(command)


SMALL = {"train_rlt.py": ("--steps", 1, "--prompts-per-step", 2, "--group-size", 2, "--eval-rows", 2),
         "distill.py": (), "sft_student.py": ("--steps", 1, "--batch-size", 2, "--val-rows", 2),
         "evaluate.py": ("--limit", 4, "--max-new-tokens", 8)}


@pytest.fixture
def own(tmp_path, tiny_model):
    """A model and rows that nobody knows: a vocabulary that is not the toy's, columns with names of their own."""
    tiny_model(1024).save_pretrained(tmp_path / "my model")
    zoo.tokenizer().save_pretrained(tmp_path / "my model")
    with (tmp_path / "pairs.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["Q", "A", "E"])
        writer.writerows([f"What is {i} + {i}?", f"\\boxed{{{2 * i}}}", f"Twice {i} is {2 * i}."] for i in range(1, 25))
        writer.writerow(["", "", ""])
    return tmp_path


@pytest.mark.slow
def test_from_ones_own_rows_to_an_evaluation_by_the_printed_commands(own, graded_here, capsys):
    columns = ("--question-column", "Q", "--solution-column", "A", "--skip-bad-rows")
    call(own, "sft_student.py", "--format", "teacher", "--model", "my model", "--data", "pairs.csv", *columns,
         "--explanation-column", "E", "--out", "runs/warm", "--micro-batch-tokens", 2048, *SMALL["sft_student.py"])
    scripts, out = [], capsys.readouterr().out
    while "Next:" in out:
        script, *flags = following(out)
        scripts.append(script)
        call(own, script, *flags, *SMALL[script], *(["--max-new-tokens", 8] if script == "train_rlt.py" else []))
        out = capsys.readouterr().out
    assert scripts == ["train_rlt.py", "distill.py", "sft_student.py", "evaluate.py"]
    for folder in ("runs/eval/my model", "runs/warm-rlt-distilled-student"):
        assert json.loads((own / folder / "eval_gsm8k.json").read_text())["questions"] == 4
    config = json.loads((own / "runs/warm-rlt/config.json").read_text())["flags"]
    assert config["lr"] == 2e-5
    for made in ("warm-rlt/config.json", "warm-rlt-distilled.jsonl.config.json",
                 "warm-rlt-distilled-student/config.json"):
        assert json.loads((own / "runs" / made).read_text())["flags"]["micro_batch_tokens"] == 2048, made
    assert len(read_jsonl(own / "runs/warm-rlt-distilled.jsonl")) > 2

    call(own, "rl_student.py", "--task", "gsm8k", "--model", "my model", "--data", "pairs.csv", *columns,
         "--keep-zero-groups", *SMALL["train_rlt.py"], "--max-new-tokens", 8)
    script, *flags = following(capsys.readouterr().out)
    call(own, script, *flags, *SMALL[script])
    assert (own / "runs/rl_student/eval_gsm8k.json").exists()


def readme_path():
    """The commands of the README's section "Your rows, your model", without their shell variables."""
    section = (ROOT / "README.md").read_text().partition("## Your rows, your model")[2]
    block = re.search(r"```sh\n(.*?)```", section, re.S)[1].replace("\\\n", " ")
    for name in re.findall(r'^(\w+)="', block, re.M):  # in their order
        value = re.search(f'{name}="(.*?)"', block, re.S)[1]
        block = block.replace(f"${name}", " ".join(value.split()))
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("python")]


def test_the_log_of_a_walk_has_the_readmes_commands():
    """At their own size, with the same flags in whatever order; the README says how long they took."""
    def with_flags_in_order(command):
        return sorted(re.split(r" (?=--)", " ".join(command)))

    logged = read_jsonl(ROOT / "figures/logs/readme_walk.jsonl")
    walked = [shlex.split(row["command"])[1:] for row in logged if row["section"] == "Your rows, your model"]
    walked = [words for words in walked if words[0] != "install"]
    assert list(map(with_flags_in_order, readme_path())) == list(map(with_flags_in_order, walked))
    assert all(row["rc"] == 0 for row in logged)
    hours = sum(row["seconds"] for row in logged if row["section"] == "Your rows, your model") / 3600
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert 1.4 < hours < 1.6 and "On one old core all of it took an hour and a half" in readme


@pytest.mark.slow
def test_the_readmes_path(own, graded_here, capsys):
    """Every command of "Your rows, your model", with small steps and another model, in its order."""
    with (own / "pairs.csv").open("w") as file:
        csv.writer(file).writerows([["question", "answer"], *([f"What is {i} + {i}?", 2 * i] for i in range(1, 25))])
    (own / "test.csv").write_text((own / "pairs.csv").read_text())
    scripts = []
    for script, *given in readme_path():
        given = ["my model" if flag == "smollm2" else flag for flag in given]
        scripts.append(script)
        small = [*SMALL.get(script, ()), *(["--max-new-tokens", "8"] if "--max-new-tokens" in given else [])]
        if "--show-rows" in given or "--dry-run" in given:
            assert ended(own, script, *given).code == 0
        elif script.startswith("figures/"):
            run_script(own, script, *given)
        else:
            call(own, script, *given, *small)
    assert scripts == ["data/word_problems.py", "train_rlt.py", "sft_student.py", "sft_student.py", "train_rlt.py",
                       "train_rlt.py", "figures/inspect_reward.py", "distill.py", "sft_student.py", "evaluate.py"]
    assert (own / "runs/reward.html").exists() and (own / "runs/my-student/eval_gsm8k.json").exists()


def test_the_toys_path_with_an_out_of_ones_own(workshop, capsys):
    call(workshop, "train_rlt.py", "--out", "runs/mine", "--limit", 40, "--lambda", 2, *SMALL["train_rlt.py"],
         "--max-new-tokens", 12)
    out = capsys.readouterr().out
    for script, small in (("distill.py", ("--limit", 40)), ("sft_student.py", SMALL["sft_student.py"]),
                          ("evaluate.py", SMALL["evaluate.py"])):
        assert following(out)[0] == script
        call(workshop, *following(out), *small)
        out = capsys.readouterr().out
    assert json.loads((workshop / "runs/mine-distilled.jsonl.config.json").read_text())["flags"]["lam"] == 2
    assert (workshop / "runs/mine-distilled-student/eval_toy.json").exists() and "Next" not in out


def test_a_folders_name_may_have_a_dot():
    parsed = argparse.Namespace(out="runs/Qwen2.5-7B/")
    parser = argparse.ArgumentParser()
    assert flags.following_out(parser, parsed, "-rlt") == " --out runs/Qwen2.5-7B-rlt"
    parsed.out = "runs/rows.v1.jsonl"
    assert flags.following_out(parser, parsed, "-student") == " --out runs/rows.v1-student"


def test_a_teacher_of_ones_own_does_not_take_the_toys_place(own):
    """runs/toy-teacher is what --model toy-teacher reads."""
    refused = ended(own, "sft_student.py", "--format", "teacher", "--model", "my model", "--data", "pairs.csv",
                    "--question-column", "Q", "--solution-column", "A", "--explanation-column", "E", "--skip-bad-rows")
    assert refused.code == 2 and "pass another folder for my model" in refused.stderr
    assert not (own / "runs/toy-teacher").exists()


@pytest.mark.parametrize("data", ["toy", "moved.jsonl"])
def test_a_command_that_cant_be_printed_does_not_end_a_run(toy, own, data, monkeypatch, capsys):
    """After all its steps: rows of the toy, which another model can't be graded on; rows that have been moved."""
    parser = argparse.ArgumentParser()
    model = {"model": str(own / "my model"), "out": "runs/x", "bits": 32, "device": "cpu", "skip_bad_rows": False}
    monkeypatch.chdir(toy)
    print_evaluation_command(parser, argparse.Namespace(**model, data=data))
    assert "Traceback" not in capsys.readouterr().out


def test_a_step_of_another_command_prints_no_next(tmp_path, monkeypatch, capsys):
    """The warm-up that train_rlt.py makes by itself is not to be continued by its user."""
    def make(command, env, **options):
        (tmp_path / "runs/x/final").mkdir(parents=True)
        monkeypatch.setenv(console.STEP_OF_ANOTHER, env[console.STEP_OF_ANOTHER])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models.subprocess, "run", make)
    console.print_next("distill.py")
    assert models._make_on_first_use("runs/x", ["x.py"], "x") == "runs/x"
    console.print_next("evaluate.py")
    assert re.findall("Next: .*", capsys.readouterr().out) == ["Next: python distill.py"]


@pytest.mark.parametrize("script, out", [("sft_student.py", "run"), ("distill.py", "rows.jsonl")])
def test_a_dry_run_beside_a_run(workshop, tmp_path, script, out):
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run/metrics.jsonl", tmp_path / "rows.jsonl"):
        path.write_text("{}")
    model = {"sft_student.py": "toy", "distill.py": "toy-teacher"}[script]
    flags = ("--model", model, "--data", "toy", "--limit", 80, "--out", tmp_path / out)
    result = ended(workshop, script, *flags, "--dry-run", 24)
    assert result.code == 0 and "fits: " in result.stdout, result.stderr
    refused = ended(workshop, script, *flags)
    assert refused.code == 2 and "already exists" in refused.stderr
    assert [path.read_text() for path in (tmp_path / "run/metrics.jsonl", tmp_path / "rows.jsonl")] == ["{}"] * 2


def test_a_warm_up_without_explanations_says_what_to_do(own, capsys):
    refusal = ended(own, "sft_student.py", "--format", "teacher", "--model", "my model", "--data", "pairs.csv",
                    "--question-column", "Q", "--solution-column", "A", "--skip-bad-rows", "--out", "runs/w")
    [line] = refusal.stderr.splitlines()
    assert "pairs.csv has no explanations" in line and "GSM8K: --explanation-column answer" in line


@pytest.mark.parametrize("logprobs, told", [
    ([[-6.0, -1.0, -2.0], [-7.0, -0.5, -3.0]], True),
    ([[-6.0, -1.0, -2.0], [-2.0, -0.5, -3.0]], False),  # of one explanation: it may be a bad one
    ([[-2.9, -1.0, -2.0], [-2.0, -0.5, -1.0]], False),  # first, but not unlikely
    ([[-6.0, -1.0, -9.0], [-7.0, -0.5, -8.0]], False),  # another token is what makes the difference
    ([[-6.0], [-7.0]], False),  # one token: the answer itself
    ([], False),
])
def test_a_student_that_does_not_know_the_format_is_noticed(logprobs, told):
    scored = SimpleNamespace(solution_logprobs=torch.tensor(sum(logprobs, [])),
                             solution_lengths=[len(part) for part in logprobs])
    advice = advice_on_format(scored, "my model")
    assert (advice is not None) == told
    if told:
        assert "the first token of a solution a log-prob of -6.5, whatever" in advice
        assert "--model 'my model'" in advice and "--student runs/warm-student" in advice


@pytest.mark.parametrize("script", ["train_rlt.py", "distill.py"])
def test_scripts_say_so_once(own, monkeypatch, capsys, script):
    monkeypatch.setattr("rlt.steps.advice_on_format", lambda scored, name: f"look at {name}: {scored.reward.score}")
    small = {"train_rlt.py": (*SMALL["train_rlt.py"], "--steps", 2), "distill.py": ("--batch-size", 8)}[script]
    call(own, script, "--model", "my model", "--data", "pairs.csv", "--question-column", "Q", "--solution-column", "A",
         "--skip-bad-rows", "--max-new-tokens", 8, *small, "--out", "runs/out")
    assert capsys.readouterr().out.count("warning: look at my model: tensor(") == 1


def test_a_teacher_that_was_never_warmed_up_is_noticed(own, workshop, capsys):
    flags = ("--data", "pairs.csv", "--question-column", "Q", "--solution-column", "A", "--skip-bad-rows", "--out",
             "runs/cold", "--max-new-tokens", 8, *SMALL["train_rlt.py"])
    call(own, "train_rlt.py", "--model", "my model", *flags)
    shown = capsys.readouterr().out
    assert "0% of the first explanations are closed" in shown and "cut off at --max-new-tokens 8" in shown
    assert "sft_student.py --format teacher --data ROWS" in shown
