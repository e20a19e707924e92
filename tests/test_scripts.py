"""The scripts, called as a user calls them, at a tiny size.   python -m pytest tests/test_scripts.py"""

import collections
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from rlt import lora, models, rollout, runs
from rlt.errors import UserError
from rlt.files import read_jsonl
from rlt.flags import _Parser
from rlt.steps import seed_for

import pytest
import torch
from conftest import ROOT, call, data_file, documented_metrics, ended, metrics, mostly_slow, run_script

import rewards

SCRIPTS = ("train_rlt.py", "distill.py", "sft_student.py", "rl_student.py", "on_policy_student.py", "evaluate.py")
TINY = ("--limit", 80, "--prompts-per-step", 2, "--group-size", 4, "--max-new-tokens", 12, "--eval-rows", 4)


def train(folder, out, *flags):
    """Two steps of train_rlt; returns its metrics without times, and its final adapter."""
    call(folder, "train_rlt.py", "--steps", 2, *TINY, "--out", out, *flags)
    return metrics(folder / out), adapter(folder / out / "final")


def adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- what the README promises


def test_every_module_has_its_line_in_the_overview():
    table = (ROOT / "rlt/README.md").read_text().partition("The reward is in")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == {path.stem for path in (ROOT / "rlt").glob("*.py")} - {"__init__"}


def test_the_readmes_commands(workshop, capsys):
    """Every python line of the README's quick start, one after the other, with flags that make it small."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```bash\n(.*?)```", text, re.S).group(1)
    commands = [part.split("#")[0].split() for line in block.splitlines() for part in line.split("&&")]
    commands = [words[1:] for words in commands if words[:1] == ["python"] and words[1] != "-m"]
    assert [words[0] for words in commands] == ["train_rlt.py", "distill.py", "sft_student.py", "evaluate.py"]
    small = {
        "train_rlt.py": ["--steps", 2, *TINY],
        "distill.py": ["--limit", 64, "--max-new-tokens", 12],
        "sft_student.py": ["--steps", 2, "--val-rows", 8],
        "evaluate.py": ["--limit", 16, "--max-new-tokens", 12],
    }
    shown = []
    for script, *flags in commands:
        call(workshop, script, *flags, *small[script])
        shown.append(capsys.readouterr().out)
    assert (workshop / "runs/teacher/final/adapter_model.safetensors").exists()
    for run in ("teacher", "student"):
        assert set(read_jsonl(workshop / f"runs/{run}/metrics.jsonl")[0]) <= documented_metrics()
    for output, following in zip(shown, ("distill.py", "sft_student.py", "evaluate.py"), strict=False):
        assert f"Next: python {following}" in output
    assert "16" in shown[-1] and "runs/student" in shown[-1] and "±" in shown[-1]
    rows = read_jsonl(workshop / "runs/distilled.jsonl")
    assert 0 < len(rows) < 64 and not any(row["foreign_tags"] for row in rows), "a teacher this raw writes tags"
    assert f"{64 - len(rows)} left out: those with tags or special tokens" in shown[1]
    first = rows[0]
    assert "\n".join(("The first:", first["question"], first["explanation"].strip(),
                      f"reward {first['reward']:.4g} | score {first['score']:.4g} | kl")) in shown[1]
    assert set(rows[0]) >= {"question", "solution", "explanation", "reward", "score", "kl", "closed", "messages"}
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]


def test_metrics_and_samples_have_their_keys(workshop, tmp_path):
    entries, _ = train(workshop, tmp_path / "run")
    keys = """step reward reward_std zero_groups score kl kl_exact kl_k1 score_min kl_max closed empty foreign_tags
              boundary_token_split leak length length_p10 length_p50 length_p90 kl_ref entropy clip_fraction
              sampler_logprob_diff loss lr grad_norm eval_reward eval_reward_before""".split()
    assert all(set(keys) == set(entry) for entry in entries)
    assert {"t_rollout", "t_score", "t_update", "tokens_per_s"} < set(
        read_jsonl(tmp_path / "run/metrics.jsonl")[0])
    assert entries[0]["kl_ref"] == 0.0, "at the start the teacher is its reference, to the bit"
    assert entries[1]["kl_ref"] > 0
    assert abs(entries[0]["sampler_logprob_diff"]) < 1e-4
    assert isinstance(entries[0]["eval_reward_before"], float) and entries[1]["eval_reward_before"] is None
    sample = read_jsonl(tmp_path / "run/samples.jsonl")[0]
    assert set(sample) >= {"question", "solution", "explanation", "reward", "closed"}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["flags"]["lam"] == 3.0 and len(config["base_hash"]) == 64


def test_the_logged_numbers_are_those_of_the_batch(workshop, tmp_path, monkeypatch):
    """By hand from the last step's rewards and completions. Rounded rewards make some groups equal."""
    plain = rewards.rlt_reward

    def rounded(*args, **options):
        reward = plain(*args, **options)
        return reward._replace(reward=reward.reward.round(decimals=-1))

    monkeypatch.setattr(rewards, "rlt_reward", rounded)
    scope = call(workshop, "train_rlt.py", "--steps", 1, *TINY, "--prompts-per-step", 6, "--unclosed-penalty", 0,
                 "--out", tmp_path / "run")
    [entry], groups = metrics(tmp_path / "run"), scope["rewards"].view(6, 4).tolist()
    equal_groups = sum(len(set(group)) == 1 for group in groups)
    assert 0 < equal_groups < 6, "the case needs both kinds"
    assert entry["zero_groups"] == pytest.approx(equal_groups / 6)
    means = [sum(group) / 4 for group in groups]
    deviations = [(sum((x - mean) ** 2 for x in group) / 3) ** 0.5 for group, mean in zip(groups, means, strict=True)]
    assert entry["reward_std"] == pytest.approx(sum(deviations) / 6, rel=1e-5)
    assert entry["reward"] == pytest.approx(sum(means) / 6, rel=1e-5)
    lengths = sorted(len(c.ids) for c in scope["completions"])
    assert entry["length"] == pytest.approx(sum(lengths) / 24)
    assert [entry[f"length_p{p}"] for p in (10, 50, 90)] == [lengths[2], lengths[12], lengths[21]]
    scored = scope["scored"]
    assert entry["kl_exact"] == pytest.approx(scored.token_kl_exact.mean().item(), rel=1e-5)
    assert entry["kl_k1"] == pytest.approx(scored.token_log_ratio.mean().item(), rel=1e-5)
    assert entry["entropy"] == pytest.approx(scored.entropies.mean().item(), rel=1e-5)
    assert entry["closed"] == sum(e.closed for e in scope["explanations"]) / 24


# -- a killed run


def test_a_killed_run_resumes_bit_for_bit(workshop, tmp_path):
    """As a kill in the last step leaves it: logs that are ahead of the last checkpoint. Real kills: test_faults.py."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    flags = ["--steps", 4, *TINY, "--save-every", 2, "--eval-every", 3, "--sync-ref-every", 3, "--updates-per-batch", 2]
    call(workshop, "train_rlt.py", *flags, "--out", straight)
    shutil.copytree(straight, killed)
    for folder in ("final", "step_000004"):
        shutil.rmtree(killed / folder)
    (killed / "metrics.jsonl").open("a").write('{"step": 4, "rew')
    call(workshop, "train_rlt.py", "--out", killed, "--resume")
    assert metrics(killed) == metrics(straight) and len(metrics(killed)) == 4
    for place in ("final", "step_000004", "step_000004/reference"):
        assert equal(adapter(killed / place), adapter(straight / place)), place
    assert read_jsonl(killed / "samples.jsonl") == read_jsonl(straight / "samples.jsonl")
    assert not equal(adapter(killed / "final"), adapter(killed / "step_000002")), "the last steps did something"


def test_a_killed_distillation_loses_and_repeats_nothing(workshop, tmp_path):
    flags = ["--model", "toy-teacher", "--limit", 40, "--batch-size", 16, "--samples", 2, "--max-new-tokens", 12]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "straight.jsonl")
    straight = (tmp_path / "straight.jsonl").read_text()
    assert [*dict.fromkeys(json.loads(line)["batch"] for line in straight.splitlines())] == [0, 1, 2, 3, 4]
    for cut in (0, 100, len(straight) // 2, len(straight) - 3):
        killed = tmp_path / "killed.jsonl"
        killed.write_text(straight[:cut])
        config = (tmp_path / "straight.jsonl.config.json").read_text().replace("straight.jsonl", "killed.jsonl")
        (tmp_path / "killed.jsonl.config.json").write_text(config)
        call(workshop, "distill.py", "--out", killed, "--resume")
        assert killed.read_text() == straight
    with pytest.raises(UserError, match="killed.jsonl already exists. Pass --resume"):
        call(workshop, "distill.py", *flags, "--out", killed)
    with pytest.raises(UserError, match="started with --samples 2, now 1. Pass the flags it was started with"):
        call(workshop, "distill.py", *flags, "--samples", 1, "--out", killed, "--resume")
    assert killed.read_text() == straight


@pytest.fixture
def half_closed(monkeypatch):
    """The teacher here is hardly trained: every other explanation that it writes is cut and closed."""
    generate = rollout.generate

    def generate_and_close(model, tokenizer, *rest, **options):
        closing = tokenizer("<|end_of_explanation|>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return [rollout.Completion(c.ids[:3] + closing, c.logprobs, True) if i % 2 else c
                for i, c in enumerate(generate(model, tokenizer, *rest, **options))]

    monkeypatch.setattr(rollout, "generate", generate_and_close)


def test_best_of_n_and_unclosed(workshop, tmp_path, half_closed):
    flags = ["--model", "toy-teacher", "--limit", 24, "--samples", 4, "--max-new-tokens", 12]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "all.jsonl")
    call(workshop, "distill.py", *flags, "--out", tmp_path / "best.jsonl", "--keep", "best")
    call(workshop, "distill.py", *flags, "--out", tmp_path / "closed.jsonl", "--drop-unclosed")
    every, best, closed = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("all", "best", "closed"))
    groups = {}
    for row in every:
        groups.setdefault(row["question"], []).append(row)
    assert len(groups) > 8 and max(map(len, groups.values())) == 4 and not any(row["foreign_tags"] for row in every)
    assert best == [max(group, key=lambda row: row["reward"]) for group in groups.values()]
    assert closed == [row for row in every if row["closed"]] and 0 < len(closed) < len(every)


def test_a_resumed_student_is_the_same(workshop, tmp_path):
    for rank in (4, 0):
        flags = ["--data", "toy", "--limit", 100, "--steps", 4, "--batch-size", 8, "--save-every", 2,
                 "--lora-rank", rank, "--val-rows", 8]
        straight, killed = tmp_path / f"straight{rank}", tmp_path / f"killed{rank}"
        call(workshop, "sft_student.py", *flags, "--out", straight)
        shutil.copytree(straight, killed)
        for folder in ("final", "step_000004"):
            shutil.rmtree(killed / folder)
        config = (killed / "config.json").read_text().replace("straight", "killed")
        (killed / "config.json").write_text(config)
        call(workshop, "sft_student.py", "--out", killed, "--resume")
        assert metrics(straight) == metrics(killed) and len(metrics(killed)) == 4
        name = "adapter_model.safetensors" if rank else "model.safetensors"
        assert (straight / "final" / name).read_bytes() == (killed / "final" / name).read_bytes()


def test_a_resumed_student_draws_the_dropout_of_an_unbroken_run(workshop, tmp_path):
    call(workshop, "sft_student.py", "--data", "toy", "--limit", 40, "--steps", 1, "--val-rows", 8, "--out",
         tmp_path / "adapter")
    path = tmp_path / "adapter/final/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.5}))
    flags = ["--model", tmp_path / "adapter", "--data", "toy", "--limit", 40, "--steps", 2, "--batch-size", 8,
             "--save-every", 1, "--val-rows", 8]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    call(workshop, "sft_student.py", *flags, "--out", straight)
    shutil.copytree(straight, killed)
    for folder in ("final", "step_000002"):
        shutil.rmtree(killed / folder)
    call(workshop, "sft_student.py", *flags, "--out", killed, "--resume")
    assert metrics(straight) == metrics(killed) and equal(adapter(straight / "final"), adapter(killed / "final"))


# -- numbers that must not depend on how the work is cut


@pytest.mark.parametrize("loss", mostly_slow(["grpo", "dapo"], plain=["dapo"]))
def test_nothing_depends_on_the_micro_batch(workshop, tmp_path, loss):
    # of seed 0 the rewards of a group are so alike that dividing by their spread magnifies their rounding
    flags = ["--loss", loss, "--steps", 1, "--seed", 1]
    [big], _ = train(workshop, tmp_path / "big", *flags)
    [small], _ = train(workshop, tmp_path / "small", *flags, "--micro-batch-tokens", 60)
    # the loss is a sum of ratios times advantages that cancels to nearly 0: its rounding is theirs
    assert big.pop("loss") == pytest.approx(small.pop("loss"), abs=1e-5)
    assert big == pytest.approx(small, rel=1e-4, abs=1e-6)
    moments = [torch.load(tmp_path / f"{size}/step_000001/optimizer.pt")["state"] for size in ("big", "small")]
    for i in moments[0]:  # after one step Adam's first moment is a tenth of the gradient
        one, other = (side[i]["exp_avg"] for side in moments)
        assert (one - other).abs().max() < 1e-4 * one.abs().max() + 1e-9


def test_completion_i_belongs_to_prompt_i_over_g(workshop, tmp_path):
    scope = call(workshop, "train_rlt.py", "--steps", 1, *TINY, "--out", tmp_path / "run")
    batch, G = scope["batch"], scope["args"].group_size
    assert all(batch[i]["question"] == batch[i - i % G]["question"] for i in range(len(batch)))
    assert batch[0]["question"] != batch[G]["question"]
    for row, prompt, scoring_row in zip(batch, scope["prompt_ids"], scope["scoring_rows"], strict=True):
        assert prompt == scope["prompts"].teacher_prompt(row) == scoring_row.teacher_prompt
    advantages = scope["advantages"].view(-1, G)
    rewards = scope["rewards"].view(-1, G)
    assert torch.equal(advantages.argsort(1), rewards.argsort(1))
    held_out = {row["question"] for row in scope["held_out"]}
    assert held_out and not held_out & {row["question"] for row in scope["rows"]}


def test_an_empty_or_unclosed_explanation_is_penalised(workshop, tmp_path, monkeypatch):
    generate = rollout.generate

    def first_says_nothing(model, tokenizer, *rest, **options):
        first, *others = generate(model, tokenizer, *rest, **options)
        closed = tokenizer("<|end_of_explanation|>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return [rollout.Completion(closed, first.logprobs[:1] * len(closed), True), *others]

    monkeypatch.setattr(rollout, "generate", first_says_nothing)
    scope = call(workshop, "train_rlt.py", "--steps", 1, *TINY, "--out", tmp_path / "run", "--unclosed-penalty", 5,
                 "--max-logprob-diff", 100)
    assert scope["explanations"][0].closed and not scope["explanations"][0].thought
    assert scope["scored"].reward.kl[0].item() == pytest.approx(1.01), "both parts count as 1"
    assert read_jsonl(tmp_path / "run/metrics.jsonl")[0]["empty"] == 1 / 8
    for explanation, reward, whole in zip(
        scope["explanations"], scope["rewards"].tolist(), scope["scored"].reward.reward.tolist(), strict=True
    ):
        proper = explanation.closed and explanation.thought
        assert reward == pytest.approx(whole - (0 if proper else 5))
    assert any(not e.closed for e in scope["explanations"])


# -- flags


class Parsed(Exception):
    """Raised where a script would parse its flags."""


@functools.cache
def parser_of(script):
    """The parser that a script makes, with all of its flags."""
    def stop(parser, *_):
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as found:
        patch.setattr(_Parser, "parse_args", stop)
        call(ROOT, script)
    return found.value.args[0]


def options(script):
    """{flag: its argparse action} of a script, without --help."""
    return {action.option_strings[0]: action for action in parser_of(script)._actions if action.dest != "help"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_used(script):
    """Used: in the script, or in the functions of rlt/ that take its args."""
    text = (ROOT / script).read_text()
    shared = "".join(path.read_text() for path in (ROOT / "rlt").glob("*.py"))
    found = options(script)
    assert len(found) > 15 and all(flag.startswith("--") for flag in found)
    for flag, action in found.items():
        assert action.help and (action.nargs == 0 or action.choices or action.metavar or action.dest == flag[2:]), flag
        if flag.endswith("-column"):
            assert "flags.row_options(args)" in text, flag
        else:
            assert re.search(rf"args\.{action.dest}\b", text + shared), f"{script} {flag} does nothing"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_its_default(script):
    shown = ended(ROOT, script, "--help")
    assert shown.code == 0 and shown.stderr == ""
    for flag in options(script):
        assert re.search(rf"^  {flag}\b", shown.stdout, re.M), flag
    assert max(map(len, shown.stdout.splitlines())) <= 120
    if script == "train_rlt.py":
        assert re.search(r"--lambda L +weight of the KL in the reward \[3.0\]\n", shown.stdout)


REFUSALS = [
    ("train_rlt.py", ["--lambda", "-1"], "argument --lambda: got -1, expected at least 0"),
    ("train_rlt.py", ["--lambd", "1"], "unknown argument --lambd: did you mean --lambda?"),
    ("train_rlt.py", ["--head-chunk", "7"], "unknown argument --head-chunk: see --help"),
    ("train_rlt.py", ["--final-lr", "0.1"], "--final-lr is now --final-lr-fraction"),
    ("train_rlt.py", ["--max-sampler-gap", "1"], "--max-sampler-gap is now --max-logprob-diff"),
    ("train_rlt.py", ["--group-size", "1"], "argument --group-size: got 1, expected at least 2"),
    ("train_rlt.py", ["--temperature", "0"], "argument --temperature: got 0, expected more than 0"),
    ("train_rlt.py", ["--kl", "k3"], "argument --kl: invalid choice: 'k3'"),
    ("train_rlt.py", ["--engine", "batch"], "argument --engine: invalid choice: 'batch'"),
    ("train_rlt.py", ["--kl-gradient"], "--kl-gradient belongs to the exact KL, but --kl is sampled"),
    ("train_rlt.py", ["--kl-gradient", "--kl", "exact", "--offload-student"],
     "--kl-gradient needs the student in every update"),
    ("train_rlt.py", ["--student-bits", "8"], "argument --student-bits: invalid choice: 8"),
    ("train_rlt.py", ["--epsilon-low", "1.5"], "argument --epsilon-low: got 1.5, expected at most 0.999"),
    ("train_rlt.py", ["--epsilon-high", "0.28"], "--epsilon-high does nothing with --updates-per-batch 1"),
    ("train_rlt.py", ["--beta", "0", "--sync-ref-every", "3"], "--sync-ref-every does nothing with --beta 0"),
    ("train_rlt.py", ["--tis-cap", "3"], "--tis-cap does nothing without --engine vllm"),
    ("sft_student.py", ["--solution-in", "user"], "--solution-in does nothing without --format teacher"),
    ("distill.py", ["--solver", "--unclosed-penalty", "0"], "--unclosed-penalty does nothing with --solver"),
    ("train_rlt.py", ["--device", "tpu"], "--device tpu: expected cpu, cuda, cuda:1 or auto"),
    ("train_rlt.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist: expected a file (.jsonl"),
    ("train_rlt.py", ["--model", "runs/nowhere"], "runs/nowhere does not exist: expected a run folder"),
    ("train_rlt.py", ["--limit", "70"], "6 rows are left to train on, a step takes 16"),
    ("train_rlt.py", ["--lora-rank", "3"], "toy-teacher holds an adapter with rank 16: leave --lora-rank out"),
    ("rl_student.py", ["--lora-targets", "q"], "--lora-targets q: expected all-linear, or some of down_proj"),
    ("distill.py", ["--samples", "0"], "argument --samples: got 0, expected at least 1"),
    ("distill.py", ["--model", "runs/nowhere"], "runs/nowhere does not exist"),
    ("distill.py", ["--score-file", "x.jsonl", "--samples", 2], "--samples does nothing with --score-file"),
    ("distill.py", ["--score-file", "x.jsonl", "--solver"], "--solver does nothing with --score-file"),
    ("distill.py", ["--score-file", "x.jsonl", "--engine", "vllm"], "--engine does nothing with --score-file"),
    ("distill.py", ["--solver", "--keep", "best"], "--keep does nothing with --solver, which gives no rewards"),
    ("distill.py", ["--solver", "--lambda", 1], "--lambda does nothing with --solver"),
    ("distill.py", ["--task", "gsm8k"], "--task does nothing without --solver"),
    ("distill.py", ["--keep-wrong"], "--keep-wrong does nothing without --solver"),
    ("distill.py", ["--keep", "best"], "--keep best chooses among the --samples of a row: pass 2 or more"),
    ("distill.py", ["--solver", "--partition", 3], "--partition does nothing with --solver"),
    ("sft_student.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist: expected"),
    ("sft_student.py", ["--lora-rank", "0", "--bits", "4"], "--lora-rank 0 trains all weights, which takes --bits 32"),
    ("sft_student.py", ["--lora-rank", "0", "--lora-alpha", "8"], "--lora-alpha does nothing with --lora-rank 0"),
    ("sft_student.py", ["--data", "toy", "--limit", 64], "64 rows, --val-rows takes 64 of them"),
    ("on_policy_student.py", ["--teacher", "toy-teacher", "--steps", 5, "--lr-steps", 3],
     "the learning rate is 0 from step 3 on: pass --lr-steps 5 to raise it"),
]


@pytest.mark.parametrize(("script", "given", "complaint"), REFUSALS)
def test_bad_values_end_in_one_line(workshop, tmp_path, script, given, complaint):
    """One line that says the next move, exit code 2, and no folder left behind that blocks the next try."""
    refusal = ended(workshop, script, *given, "--out", tmp_path / "out")
    lines = [line for line in refusal.stderr.splitlines() if line.strip() and not line.startswith("usage:")]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: ") and complaint in lines[0], refusal.stderr
    assert refusal.code == 2 and not (tmp_path / "out").exists()


def test_a_refusal_in_a_process_of_its_own(workshop):
    done = run_script(workshop, "train_rlt.py", "--model", "runs/nowhere", "--out", "runs/never", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"train_rlt.py: error: runs/nowhere does not exist: expected .*\n", done.stderr), done.stderr


def test_a_defect_keeps_its_traceback(workshop, tmp_path, monkeypatch):
    """Somebody's own change that breaks: the traceback says where, and is not taken for a mistake of the user."""
    def broken(rows):
        return [][3]

    monkeypatch.setattr(runs, "digest", broken)
    defect = ended(workshop, "sft_student.py", "--data", "toy", "--limit", 80, "--out", tmp_path / "run")
    assert defect.code == 1 and not (tmp_path / "run").exists()
    trace = defect.stderr[defect.stderr.index("Traceback"):]
    assert "sft_student.py\", line" in trace and "in broken" in trace
    assert trace.endswith("IndexError: list index out of range\n") and "error: list" not in trace


@pytest.mark.parametrize("script", [*SCRIPTS, "data/toy.py"])
def test_threads_are_told_how_to_wait_before_torch_is_loaded(tmp_path, script):
    """In torch's place: a module that says what it finds. OpenMP reads the variable once, when torch loads it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").write_text(
        "import os, sys; sys.exit('found ' + os.environ.get('OMP_WAIT_POLICY', 'nothing'))")
    command = [sys.executable, ROOT / script]
    if script == "data/toy.py":  # it would make rows first
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, '{ROOT}'); from data import toy; "
                   "toy.make_model(0, 55, 32)"]
    plain = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for users, expected in ((None, "passive"), ("active", "active")):
        env = plain | {"PYTHONPATH": str(tmp_path)} | ({"OMP_WAIT_POLICY": users} if users else {})
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.stderr.splitlines()[-1] == f"found {expected}"


CHANGES = {  # flag: (another value, what must change, in which step)
    "--lambda": (0, "reward", 0),
    "--alpha": (1, "score", 0),
    "--kl": ("exact", "kl", 0),
    "--unclosed-penalty": (0, "reward", 0),
    "--solution-in": ("user", "kl", 0),
    "--temperature": (0.5, "entropy", 0),
    "--max-new-tokens": (6, "length", 0),
    "--prompts-per-step": (3, "reward", 0),
    "--group-size": (3, "reward", 0),
    "--student-bits": (32, "score", 0),
    "--teacher-bits": (4, "kl", 0),
    "--seed": (1, "reward", 0),
    "--limit": (60, "reward", 0),
    "--eval-rows": (9, "eval_reward", 1),
    "--lr": (1e-2, "kl_ref", 1),
    "--warmup-steps": (0, "lr", 0),
    "--final-lr-fraction": (1, "lr", 1),
    "--steps": (3, "lr", 1),
    "--lr-steps": (20, "lr", 1),
    "--max-grad-norm": (1e-6, "kl_ref", 1),
    "--loss": ("dr_grpo", "grad_norm", 0),
    "--beta": (5, "grad_norm", 1),
    "--advantage-scale": ("none", "grad_norm", 0),
    "--updates-per-batch": (3, "kl_ref", 1),
    "--sync-ref-every": (1, "kl_ref", 1),
    "--eval-every": (0, "eval_reward", 1),
    "--rollout-batch": (3, "reward", 0),
    "--lora-rank": (4, "kl_ref", 1),
    "--lora-alpha": (64, "kl_ref", 1),
    "--lora-targets": ("q_proj", "kl_ref", 1),
}
ELSEWHERE = {  # flag: the test that shows what it does
    "--kl-gradient": "test_kl_gradient.py",
    "--offload-student": "test_an_offloaded_student",
    "--engine": "test_another_engine",
    "--tis-cap": "test_an_engine_that_is_not_quite_the_policy",
    "--model": "test_real_rows",
    "--student": "test_real_rows",
    "--data": "test_real_rows",
    "--question-column": "test_columns_and_bad_rows",
    "--solution-column": "test_columns_and_bad_rows",
    "--skip-bad-rows": "test_columns_and_bad_rows",
    "--resume": "test_a_killed_run",
    "--save-every": "test_a_killed_run",
    "--out": "train",
    "--micro-batch-tokens": "test_nothing_depends",
    "--device": "test_bad_values",
    "--dry-run": "test_dry_run.py",
    "--quiet": "test_console.py",
    "--report": "test_console.py",
    "--show-rows": "test_rows_as_the_models_see_them",
    "--keep-checkpoints": "test_faults.py",
    "--max-bad-steps": "test_faults.py",
    "--max-logprob-diff": "test_the_sampler_gate",
    "--epsilon-low": "test_the_clip_flags",
    "--epsilon-high": "test_the_clip_flags",
    "--sync-ref-mix": "test_the_reference_moves_in_the_loop",
    "--gradient-checkpointing": "test_models.py, checkpointed gradients",
}


def test_every_flag_is_shown_to_do_something():
    assert set(CHANGES) | set(ELSEWHERE) == set(options("train_rlt.py"))
    assert not set(CHANGES) & set(ELSEWHERE)


LIVELY = ("--lr", 5e-3, "--warmup-steps", 1)  # two steps must be enough to see an effect
FIRST_OF_TWO = ("--steps", 1, "--lr-steps", 2)  # for what the first step shows


@pytest.fixture(scope="module")
def unchanged(workshop, tmp_path_factory):
    # a fresh adapter on the base, so that rank, alpha and targets are free; warm-up and decay as in a long run
    return train(workshop, tmp_path_factory.mktemp("unchanged") / "run", "--model", "toy", *LIVELY)[0]


@pytest.mark.parametrize("flag", CHANGES)
def test_changing_a_flag_changes_what_it_says(workshop, tmp_path, unchanged, flag):
    value, key, step = CHANGES[flag]
    enough = () if step else FIRST_OF_TWO
    entries, _ = train(workshop, tmp_path / "run", "--model", "toy", *LIVELY, *enough, flag, value)
    assert entries[step][key] != pytest.approx(unchanged[step][key], rel=1e-4), f"{flag} {value} left {key} as it was"
    update = "--lr --max-grad-norm --loss --beta --advantage-scale --updates-per-batch --warmup-steps"
    if flag in update.split():
        assert entries[0]["reward"] == unchanged[0]["reward"], "it acts on the update, not on the first samples"


def test_the_clip_flags(workshop, tmp_path):
    """They act from the second update on the same explanations, each on its side."""
    flags = ["--model", "toy", "--lr", 5e-2, "--warmup-steps", 0, "--updates-per-batch", 3, *FIRST_OF_TWO,
             "--eval-every", 0]
    clipped = {}
    for low, high in ((0.01, 0.01), (0.9, 0.01), (0.01, 100), (0.9, 100)):
        entries, _ = train(workshop, tmp_path / f"{low}-{high}", *flags, "--epsilon-low", low, "--epsilon-high", high)
        clipped[low, high] = entries[0]["clip_fraction"]
    assert clipped[0.9, 100] < min(clipped[0.9, 0.01], clipped[0.01, 100]) <= clipped[0.01, 0.01]
    assert train(workshop, tmp_path / "once", *FIRST_OF_TWO)[0][0]["clip_fraction"] == 0


def test_the_reference_moves_in_the_loop(workshop, tmp_path):
    """Synced whole after the first step, it is the teacher again: no KL at the start of the second, to the bit."""
    flags = ["--sync-ref-every", 1, "--lr", 5e-3, "--warmup-steps", 1]
    whole, none, some = (train(workshop, tmp_path / str(m), *flags, "--sync-ref-mix", m)[0] for m in (1, 0, 0.5))
    assert whole[1]["kl_ref"] == 0.0
    assert 0 < some[1]["kl_ref"] < none[1]["kl_ref"]


def test_the_sampler_gate(workshop, tmp_path):
    with pytest.raises(UserError, match="sampler and trainer differ by .* --max-logprob-diff is 1e-12"):
        train(workshop, tmp_path / "run", "--max-logprob-diff", 1e-12)
    assert not (tmp_path / "run/final").exists() and not list((tmp_path / "run").glob("step_*"))


def test_an_offloaded_student(workshop, tmp_path, monkeypatch):
    """It is moved before and after each scoring, which alone calls it, and the numbers stay as they are."""
    events, load, sample = [], models.load_model, rollout.generate

    def watched(name, *, bits, device, scores=False):
        model = load(name, bits=bits, device=device, scores=scores)
        if bits == 4:  # the student
            move = model.to
            model.to = lambda device: events.append("move") or move(device)
            model.model.register_forward_pre_hook(lambda *_: events.append("read"))
        return model

    def generate(*args, **options):
        events.append("sample")
        return sample(*args, **options)

    plain, _ = train(workshop, tmp_path / "plain")
    monkeypatch.setattr(rollout, "generate", generate)
    monkeypatch.setattr(models, "load_model", watched)
    entries, _ = train(workshop, tmp_path / "offloaded", "--offload-student", "--eval-every", 1)
    scoring = ["sample", "move", "read", "move"]
    assert events == ["move"] + scoring * 5, "offloaded; held-out rows; then twice a step and its held-out rows"
    for key in ("reward", "grad_norm", "eval_reward_before"):
        assert [entry[key] for entry in entries] == [entry[key] for entry in plain]


@pytest.mark.parametrize("extra", [(), ("--kl", "exact", "--kl-gradient", "--gradient-checkpointing")])
def test_a_student_that_is_the_teachers_base(workshop, tmp_path, monkeypatch, extra):
    """At the same bits it is loaded once, and every number is that of a run with a second copy."""
    loaded, load = [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda name, **options: loaded.append(name) or load(name, **options))
    flags = ("--student-bits", 32, "--sync-ref-every", 1, *extra)
    shared, _ = train(workshop, tmp_path / "shared", *flags)
    assert not loaded
    monkeypatch.setattr(models, "shares_base", lambda *_: False)
    separate, _ = train(workshop, tmp_path / "separate", *flags)
    assert loaded == [models.base_of(str(workshop / "runs/toy-teacher"))]
    clock = {"t_rollout", "t_score", "t_update", "tokens_per_s"}
    assert [{key: entry[key] for key in entry.keys() - clock} for entry in shared] == [
        {key: entry[key] for key in entry.keys() - clock} for entry in separate]
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("shared", "separate"))
    assert first["student_hash"] == second["student_hash"]


def test_a_run_goes_on_only_with_the_students_own_adapter(workshop, tmp_path):
    """The student that scores may be an adapter, and may have been trained further since."""
    small = ("--data", "toy", "--limit", 40, "--val-rows", 0, "--batch-size", 4, "--out", tmp_path / "student")
    call(workshop, "sft_student.py", *small, "--steps", 1)
    train(workshop, tmp_path / "run", "--student", tmp_path / "student")
    call(workshop, "sft_student.py", *small, "--steps", 2, "--lr-steps", 2, "--resume")
    with pytest.raises(UserError, match="student_adapter_hash is not what it was"):
        train(workshop, tmp_path / "run", "--student", tmp_path / "student", "--resume")


def test_an_sft_that_goes_on_without_out_takes_its_own_flags(workshop, tmp_path, capsys):
    """--out has another default for each --format."""
    (tmp_path / "runs").mkdir()
    for name in ("toy", "toy-teacher"):
        (tmp_path / "runs" / name).symlink_to(workshop / "runs" / name)
    flags = ("--data", "toy", "--limit", 40, "--val-rows", 0, "--batch-size", 4)
    call(tmp_path, "sft_student.py", *flags, "--steps", 2)
    call(tmp_path, "sft_student.py", "--resume")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("runs/student goes on with")]
    assert "--data toy" in line and "--steps 2" in line
    assert json.loads((tmp_path / "runs/student/config.json").read_text())["flags"]["steps"] == 2


def test_held_out_rows_that_are_never_measured_are_trained_on(workshop, tmp_path):
    flags = ("--data", "toy", "--limit", 12, "--val-rows", 4, "--batch-size", 4, "--steps", 1)
    for every, rows in ((0, 12), (1, 8)):
        call(workshop, "sft_student.py", *flags, "--eval-every", every, "--out", tmp_path / f"run{every}")
        assert json.loads((tmp_path / f"run{every}/config.json").read_text())["rows"] == rows


@pytest.mark.parametrize("script", ["train_rlt.py", "rl_student.py", "on_policy_student.py"])
def test_rows_can_be_looked_at_that_are_too_few_to_train_on(workshop, script):
    shown = ended(workshop, script, "--limit", 3, "--show-rows", 1,
                  *(["--teacher", "toy-teacher"] if script.startswith("on") else []))
    assert shown.code == 0 and shown.stdout.count("x ") >= 1, shown.stderr


def test_a_student_in_the_teachers_memory_can_not_be_offloaded(workshop, tmp_path):
    done = ended(workshop, "train_rlt.py", "--student-bits", 32, "--offload-student", "--out", tmp_path / "run")
    assert done.code == 2 and "the student is the teacher's base at the same bits" in done.stderr
    assert done.stderr.count("\n") == 1


# -- another engine


class StandIn:
    """In vLLM's place: an engine with a model of its own, that knows what is handed to it."""

    made, error = [], 0.0

    def __init__(self, base, tokenizer, *, bits, device, max_model_len, stop_ids, lora_rank=None):
        self.base, self.tokenizer, self.bits, self.max_model_len = base, tokenizer, bits, max_model_len
        self.stop_ids, self.lora_rank, self.loads, self.keys = stop_ids, lora_rank, 0, []
        self.model = models.load_model(base, bits=bits, device=device)
        StandIn.made.append(self)

    def load_adapter(self, model):
        from peft import get_peft_model

        self.loads += 1
        if self.loads == 1:
            self.model = get_peft_model(self.model, model.peft_config["default"])
        ours, theirs = (lora.adapter_parameters(m) for m in (self.model, model))
        with torch.no_grad():
            for mine, new in zip(ours, theirs, strict=True):
                mine.copy_(new)

    def generate(self, prompts, *, max_new_tokens, temperature, key, first=0):
        self.keys.append((*key, first))
        assert max(map(len, prompts)) + max_new_tokens <= self.max_model_len
        drawn = rollout.generate(self.model, self.tokenizer, prompts, max_new_tokens=max_new_tokens,
                                 temperature=temperature, seed=seed_for(*key, first))
        return [c._replace(logprobs=[p + self.error * (-1) ** i for i, p in enumerate(c.logprobs)]) for c in drawn]


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr("rlt.vllm_engine.VLLMEngine", StandIn)
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn


@pytest.mark.parametrize("script", ["train_rlt.py", "rl_student.py"])
def test_another_engine_samples_from_the_policy_as_it_is_now(workshop, tmp_path, stand_in, monkeypatch, script):
    """The adapter is handed over at the start and after every update; one that is not is caught by the gate."""
    monkeypatch.setattr("rlt.grading.grade_all", lambda task, outputs, rows: [len(text) % 2 == 0 for text in outputs])
    lively = ("--steps", 3, *TINY, "--lr", 2e-2, "--warmup-steps", 0, "--engine", "vllm")
    call(workshop, script, *lively, "--out", tmp_path / "run")
    [engine] = stand_in.made
    assert engine.base == str(workshop / "runs/toy")
    assert engine.bits == 32 and engine.lora_rank == 16 and engine.loads == 4 and [*engine.stop_ids] == [1]
    assert len(set(engine.keys)) == len(engine.keys) > 3, "no two calls draw the same"
    entries = metrics(tmp_path / "run")
    assert all(entry["sampler_logprob_diff"] < 1e-4 for entry in entries)
    assert all(entry["tis_weight"] == pytest.approx(1, abs=1e-4) and entry["tis_capped"] == 0 for entry in entries)
    call(workshop, script, *lively, "--tis-cap", 0, "--out", tmp_path / "plain")
    assert "tis_weight" not in metrics(tmp_path / "plain")[0]
    monkeypatch.setattr(StandIn, "load_adapter", lambda self, model: None)
    with pytest.raises(UserError, match="sampler and trainer differ by .* --max-logprob-diff is 0.001"):
        call(workshop, script, *lively, "--max-logprob-diff", 1e-3, "--out", tmp_path / "stale")


def test_an_engine_that_is_not_quite_the_policy_is_corrected_for(workshop, tmp_path, stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "error", 0.05)
    flags = ("--steps", 1, *TINY, "--engine", "vllm", "--beta", 0)
    for cap in (0, 2, 1.01):
        call(workshop, "train_rlt.py", *flags, "--tis-cap", cap, "--out", tmp_path / str(cap))
    plain, corrected, capped = (metrics(tmp_path / str(cap))[0] for cap in (0, 2, 1.01))
    assert plain["sampler_logprob_diff"] == pytest.approx(0.05, abs=1e-4)
    assert plain["reward"] == corrected["reward"] and plain["grad_norm"] != corrected["grad_norm"]
    assert corrected["tis_capped"] == 0 and 0.4 < capped["tis_capped"] < 0.6, "every second token is above 1.01"
    assert capped["tis_weight"] < corrected["tis_weight"] == pytest.approx(1, abs=0.02)


def test_another_engine_distils(workshop, tmp_path, stand_in):
    flags = ["--model", "toy-teacher", "--limit", 6]
    for engine in ("transformers", "vllm"):
        call(workshop, "distill.py", *flags, "--max-new-tokens", 12, "--engine", engine, "--out",
             tmp_path / f"{engine}.jsonl")
    ours, theirs = (read_jsonl(tmp_path / f"{engine}.jsonl") for engine in ("transformers", "vllm"))
    assert [row["explanation"] for row in ours] == [row["explanation"] for row in theirs] and len(ours) > 1
    assert [engine.loads for engine in stand_in.made] == [1]


# -- rows


def test_columns_and_bad_rows(workshop, tmp_path):
    rows = [json.loads(line) for line in (workshop / "runs/toy/train.jsonl").read_text().splitlines()[:20]]
    renamed = [{"q": row["question"], "s": row["solution"]} for row in rows]
    renamed[3]["s"] = ""
    renamed[5]["q"] = " ".join([rows[5]["question"]] * 30)  # longer than the toy's context
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    flags = ["--steps", 1, *TINY, "--data", path, "--out", tmp_path / "run", "--question-column", "q"]
    with pytest.raises(UserError, match='line 1 has no .*"solution"; columns found: q, s'):
        call(workshop, "train_rlt.py", *flags)
    flags += ["--solution-column", "s"]
    with pytest.raises(UserError, match="line 4 has an empty solution"):
        call(workshop, "train_rlt.py", *flags)
    renamed[3]["s"] = "word"
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    with pytest.raises(UserError, match="line 4 can't be tokenized .* --skip-bad-rows"):
        call(workshop, "train_rlt.py", *flags)
    scope = call(workshop, "train_rlt.py", *flags, "--skip-bad-rows")
    assert len(scope["rows"]) + len(scope["held_out"]) == 18


@pytest.mark.parametrize("script", ["train_rlt.py", "rl_student.py", "sft_student.py", "distill.py"])
def test_rows_as_the_models_see_them(workshop, tmp_path, script):
    shown = ended(workshop, script, "--model", "toy", "--data", "toy", "--show-rows", 2, "--out", tmp_path / "run")
    rows = [json.loads(line) for line in (workshop / "runs/toy/train.jsonl").read_text().splitlines()[:3]]
    assert shown.code == 0 and not (tmp_path / "run").exists()
    assert [row["question"] in shown.stdout for row in rows] == [True, True, False]
    assert "<|begin_of_solution|>" in shown.stdout


# -- a real tokenizer and real rows


def test_real_rows(workshop, tmp_path, qwen_tokenizer, tiny_model, capsys):
    """From GSM8K to a saved adapter, on a random Qwen2 with Qwen2.5's tokenizer and padded vocabulary."""
    tiny_model(152064, hidden_size=16, intermediate_size=32).save_pretrained(tmp_path / "model")
    qwen_tokenizer.save_pretrained(tmp_path / "model")
    data = data_file("gsm8k_train_1k.jsonl")
    flags = ["--data", data, "--limit", 6, "--max-new-tokens", 8]
    call(workshop, "train_rlt.py", *flags, "--model", tmp_path / "model", "--steps", 1, "--prompts-per-step", 2,
         "--group-size", 2, "--eval-rows", 2, "--out", tmp_path / "teacher", "--temperature", 0.7)
    following = shlex.split(re.search(r"Next: python distill.py (.*)\n", capsys.readouterr().out)[1])
    args = parser_of("distill.py").parse_args(following)
    assert (args.model, args.data, args.temperature, args.max_new_tokens) == (
        str(tmp_path / "teacher"), str(data), 0.7, 8)
    entries = metrics(tmp_path / "teacher")
    assert entries[0]["kl_ref"] == 0 and entries[0]["sampler_logprob_diff"] < 1e-4
    config = json.loads((tmp_path / "teacher/final/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    call(workshop, "distill.py", *flags, "--model", tmp_path / "teacher", "--out", tmp_path / "d.jsonl")
    assert len(read_jsonl(tmp_path / "d.jsonl")) == 6
    other = models.load_tokenizer(str(workshop / "runs/toy"))
    other.save_pretrained(tmp_path / "other")
    tiny_model(64).save_pretrained(tmp_path / "other")
    for script, teacher, student in (("train_rlt.py", "--model", "--student"),
                                     ("on_policy_student.py", "--teacher", "--model")):
        pair = (teacher, tmp_path / "model", student, tmp_path / "other")
        with pytest.raises(UserError, match="tokenize differently .* compared token by token. Pass models of the same"):
            call(workshop, script, "--data", data, *pair, "--max-new-tokens", 8, "--out", tmp_path / "never")


@pytest.mark.parametrize("script", [("rl_student.py", "--dry-run"), ("distill.py", "--solver", "--dry-run")])
def test_the_toys_grader_for_another_model_is_named(workshop, tmp_path, qwen_tokenizer, tiny_model, script):
    tiny_model(152064, hidden_size=16, intermediate_size=32).save_pretrained(tmp_path / "model")
    qwen_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "solution": "2", "answer": "#### 2"}\n' * 20)
    flags = ("--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 8)
    for task in ((), ("--task", "gsm8k")):
        shown = ended(workshop, *script, *flags, *task, "--out", tmp_path / "run")
        assert shown.code == 0, shown
        assert ("warning: --task toy, the default, is for questions of the toy" in shown.stdout) == (not task)


def test_long_rows_are_cut_and_counted(workshop, tmp_path, capsys):
    call(workshop, "sft_student.py", "--data", "toy", "--limit", 40, "--val-rows", 4, "--steps", 1, "--max-tokens", 30,
         "--out", tmp_path / "run")
    found = re.search(r"(\d+) of 40 rows are longer than 30 tokens and were cut", capsys.readouterr().out)
    assert found and json.loads((tmp_path / "run/config.json").read_text())["cut"] == int(found.group(1)) > 0


# -- explanations that exist already


def test_scoring_a_file_gives_the_rewards_it_was_written_with(workshop, tmp_path, half_closed):
    """What distill wrote and scored, scored again from its text: the same rewards, explanation by explanation."""
    flags = ["--model", "toy-teacher"]
    call(workshop, "distill.py", *flags, "--max-new-tokens", 12, "--limit", 30, "--out", tmp_path / "first.jsonl")
    call(workshop, "distill.py", *flags, "--score-file", tmp_path / "first.jsonl", "--out", tmp_path / "again.jsonl")
    first, again = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("first", "again"))
    assert len({row["closed"] for row in first}) == 2, "the case needs both kinds"
    for one, other in zip(first, again, strict=True):
        assert one["explanation"].split() == other["explanation"].split() and one["closed"] == other["closed"]
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
    # somebody else's: the rows' own explanations
    call(workshop, "distill.py", *flags, "--score-file", workshop / "runs/toy/val.jsonl", "--out",
         tmp_path / "theirs.jsonl")
    theirs = read_jsonl(tmp_path / "theirs.jsonl")
    assert len(theirs) == 400 and all(row["closed"] for row in theirs)
    (tmp_path / "bare.jsonl").write_text('{"question": "x 3 y 7 s1 swap", "solution": "7 3"}\n')
    with pytest.raises(UserError, match='has no "explanation"'):
        call(workshop, "distill.py", *flags, "--score-file", tmp_path / "bare.jsonl", "--out", tmp_path / "never.jsonl")


def test_partitions_by_rank(workshop, tmp_path):
    flags = ["--model", "toy-teacher", "--limit", 10, "--samples", 6, "--max-new-tokens", 12, "--partition", 3]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "all.jsonl")
    every = read_jsonl(tmp_path / "all.jsonl")
    count = collections.Counter(row["question"] for row in every)
    questions = {question for question in count if count[question] >= 3}
    assert len(every) > 20 and len(questions) > 4
    for name in ("overall", "within"):
        parts = [read_jsonl(tmp_path / f"all.{name}-{i}of3.jsonl") for i in (1, 2, 3)]
        divided = [row for row in every if name == "overall" or row["question"] in questions]
        assert sorted(json.dumps(row) for part in parts for row in part) == sorted(map(json.dumps, divided))
        for question in [None] if name == "overall" else questions:
            ranks = [[row["reward"] for row in part if question in (None, row["question"])] for part in parts]
            sizes = [len(rank) for rank in ranks]
            assert max(sizes) - min(sizes) <= 1
            ordered = [reward for rank in ranks for reward in sorted(rank)]
            assert ordered == sorted(ordered), "no reward of a part is above one of the next"


def test_a_question_with_fewer_explanations_than_parts_is_in_none_within(workshop, tmp_path, capsys):
    """The first part would have them all, whatever their rewards are."""
    flags = ["--model", "toy-teacher", "--limit", 10, "--max-new-tokens", 12, "--partition", 3]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "one.jsonl")
    questions = len({row["question"] for row in read_jsonl(tmp_path / "one.jsonl")})
    assert f"{questions} questions have fewer than 3 explanations each" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("one.*of3.jsonl")) == [
        f"one.overall-{i}of3.jsonl" for i in (1, 2, 3)]


@pytest.mark.parametrize(("right", "flags", "reasons"), [
    (False, (), "those that the grader found wrong, empty answers, those with tags or special tokens"),
    (True, ("--drop-unclosed", "--max-new-tokens", 1), "unclosed ones, those with tags or special tokens")])
def test_a_file_without_rows_is_no_success(workshop, tmp_path, monkeypatch, right, flags, reasons):
    monkeypatch.setattr("rlt.grading.grade_all", lambda task, outputs, rows: [right] * len(outputs))
    model = ("--model", "toy-teacher") if right else ("--model", "toy", "--solver")
    ending = ended(workshop, "distill.py", *model, "--limit", 4, "--max-new-tokens", 4, *flags,
                   "--out", tmp_path / "none.jsonl")
    assert ending.code == 2 and f"has no rows. Left out were {reasons}: pass" in ending.stderr, ending
    assert "Next:" not in ending.stdout


def test_empty_explanations_are_counted(workshop, tmp_path, capsys):
    """A CSV file can't tell them from missing ones."""
    rows = [row | {"explanation": row["explanation"] * (n % 2)}
            for n, row in enumerate(read_jsonl(workshop / "runs/toy/train.jsonl")[:8])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data", tmp_path / "rows.jsonl", "--steps", 1, "--val-rows", 2, "--out", tmp_path / "run")
    call(workshop, "sft_student.py", *flags)
    assert "4 of 8 rows have an empty explanation" in capsys.readouterr().out
    cut = ended(workshop, "sft_student.py", *flags[:-1], tmp_path / "cut", "--max-tokens", 2)
    assert cut.code == 2 and "no row has supervised tokens within 2 tokens: raise --max-tokens" in cut.stderr


def test_a_solver_keeps_what_the_grader_accepts(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr("rlt.grading.grade_all",
                        lambda task, outputs, rows: [i % 3 == 0 for i in range(len(outputs))])
    flags = ["--solver", "--model", "toy", "--limit", 24, "--max-new-tokens", 12]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "right.jsonl")
    call(workshop, "distill.py", *flags, "--out", tmp_path / "raw.jsonl", "--keep-wrong")
    right, raw = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("right", "raw"))
    assert [row for row in raw if row["right"]] == right and 0 < len(right) < len(raw)
    assert len(raw) < 24 and not any(row["foreign_tags"] for row in raw), "an answer with special tokens is no row"
    assert "solution" in raw[0] and raw[0]["messages"][1]["content"] == raw[0]["question"]
    call(workshop, "sft_student.py", "--data", tmp_path / "raw.jsonl", "--val-rows", 2, "--steps", 1, "--out",
         tmp_path / "s")
