"""The scripts, called as a user calls them, at a tiny size.   python -m pytest tests/test_scripts.py"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

from rlt import models, runs

import pytest
import torch
from conftest import ROOT, call, data_file, run_script, said

SCRIPTS = ("train_rlt.py", "distill.py", "sft_student.py", "rl_student.py", "evaluate.py")
TINY = ("--limit", 80, "--prompts-per-step", 2, "--group-size", 4, "--max-new-tokens", 12, "--eval-rows", 4)


def train(folder, out, *flags):
    """Two steps of train_rlt; returns its metrics without times, and its final adapter."""
    call(folder, "train_rlt.py", "--steps", 2, *TINY, "--out", out, *flags)
    return metrics(folder / out), adapter(folder / out / "final")


def metrics(folder):
    entries = runs.read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in entry.items() if not k.startswith("t_") and k != "tokens_per_s"} for entry in entries]


def adapter(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- what the README promises


def test_the_readmes_commands(workshop):
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
        done = run_script(workshop, script, *flags, *small[script])
        shown.append(done.stdout)
    assert (workshop / "runs/teacher/final/adapter_model.safetensors").exists()
    for output, following in zip(shown, ("distill.py", "sft_student.py", "evaluate.py"), strict=False):
        assert f"Next: python {following}" in output
    assert "16" in shown[-1] and "runs/student" in shown[-1] and "±" in shown[-1]
    rows = runs.read_jsonl(workshop / "runs/distilled.jsonl")
    assert len(rows) == 64
    assert set(rows[0]) >= {"question", "solution", "explanation", "reward", "score", "kl", "closed", "messages"}
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]


def test_the_readmes_recipe_for_vllm(workshop, tmp_path, monkeypatch):
    """With a stand-in for vLLM: token ids in, token ids out; then distill.py scores the file as it would its own."""
    text = (ROOT / "README.md").read_text()
    recipe = re.search(r"Explaining a large dataset with vLLM.*?```python\n(.*?)```", text, re.S).group(1)
    teacher = str(workshop / "runs/toy-teacher")
    tokenizer, asked_for = models.load_tokenizer(teacher), {}

    class LLM:
        def __init__(self, base, **options):
            assert base == models.base_of(teacher) and options["enable_lora"]

        def generate(self, asked, sampling, lora_request):
            asked_for.update(sampling)
            model = models.load_model(lora_request[2], bits=32, device=torch.device("cpu"))
            drawn = rollout.generate(model, tokenizer, [a["prompt_token_ids"] for a in asked], max_new_tokens=12,
                                    temperature=1.0, seed=0)
            reason = {True: "stop", False: "length"}
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(c.ids), finish_reason=reason[c.finished])])
                    for c in drawn]

    for name, names in (("vllm", {"LLM": LLM, "SamplingParams": dict}), ("vllm.inputs", {"TokensPrompt": dict}),
                        ("vllm.lora", {}), ("vllm.lora.request", {"LoRARequest": lambda *args: args})):
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
        vars(module).update(names)
    lines = (workshop / "runs/toy/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:40]))
    monkeypatch.setattr(sys, "argv", ["explain.py", teacher, str(tmp_path / "rows.jsonl"), str(tmp_path / "out.jsonl")])
    exec(compile(recipe, "explain.py", "exec"), {})
    assert (asked_for["top_p"], asked_for["top_k"], asked_for["stop_token_ids"]) == (1.0, 0, [tokenizer.eos_token_id])
    assert asked_for["allowed_token_ids"] == list(range(len(tokenizer)))
    rows = runs.read_jsonl(tmp_path / "out.jsonl")
    assert len(rows) == 40 and {row["closed"] for row in rows} <= {True, False}
    call(workshop, "distill.py", "--model", teacher, "--score-file", tmp_path / "out.jsonl", "--out",
         tmp_path / "scored.jsonl")
    scored = runs.read_jsonl(tmp_path / "scored.jsonl")
    for key in ("question", "explanation", "closed"):
        assert [str(row[key]).split() for row in scored] == [str(row[key]).split() for row in rows], key
    assert all(isinstance(row["reward"], float) for row in scored)


def test_metrics_and_samples_have_their_keys(workshop, tmp_path):
    entries, _ = train(workshop, tmp_path / "run")
    keys = """step reward score kl score_min kl_max closed empty boundary_token_split leak length kl_ref entropy clip_fraction
              sampler_logprob_diff loss lr grad_norm eval_reward""".split()
    assert all(set(keys) <= set(entry) for entry in entries)
    assert {"t_rollout", "t_score", "t_update", "tokens_per_s"} <= set(
        runs.read_jsonl(tmp_path / "run/metrics.jsonl")[0]
    )
    assert entries[0]["kl_ref"] == 0.0, "at the start the teacher is its reference, to the bit"
    assert entries[1]["kl_ref"] > 0
    assert abs(entries[0]["sampler_logprob_diff"]) < 1e-4
    sample = runs.read_jsonl(tmp_path / "run/samples.jsonl")[0]
    assert set(sample) >= {"question", "solution", "explanation", "reward", "closed"}
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["flags"]["lam"] == 3.0 and len(config["base_hash"]) == 64


# -- a killed run


def test_a_killed_run_resumes_bit_for_bit(workshop, tmp_path):
    straight, wanted = tmp_path / "straight", tmp_path / "killed"
    flags = ["--steps", 4, *TINY, "--save-every", 2, "--eval-every", 3, "--sync-ref-every", 3, "--updates-per-batch", 2]
    call(workshop, "train_rlt.py", *flags, "--out", straight)

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_rlt.py"), *map(str, flags), "--out", str(wanted)],
        cwd=workshop,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (wanted / "step_000002").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (wanted / "final").exists()

    call(workshop, "train_rlt.py", *flags, "--out", wanted, "--resume")
    assert metrics(wanted) == metrics(straight)
    for place in ("final", "step_000004", "step_000004/reference"):
        assert equal(adapter(wanted / place), adapter(straight / place)), place
    samples = [
        [{k: v for k, v in s.items()} for s in runs.read_jsonl(run / "samples.jsonl")] for run in (wanted, straight)
    ]
    assert samples[0] == samples[1]


def test_a_killed_distillation_loses_and_repeats_nothing(workshop, tmp_path):
    flags = ["--model", "toy-teacher", "--limit", 40, "--batch-size", 16, "--samples", 2, "--max-new-tokens", 12]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "straight.jsonl")
    straight = (tmp_path / "straight.jsonl").read_text()
    assert straight.count("\n") == 80
    for cut in (0, 100, len(straight) // 2, len(straight) - 3):
        killed = tmp_path / "killed.jsonl"
        killed.write_text(straight[:cut])
        config = (tmp_path / "straight.jsonl.config.json").read_text().replace("straight.jsonl", "killed.jsonl")
        (tmp_path / "killed.jsonl.config.json").write_text(config)
        call(workshop, "distill.py", *flags, "--out", killed, "--resume")
        assert killed.read_text() == straight
    with pytest.raises(FileExistsError, match="Pass --resume"):
        call(workshop, "distill.py", *flags, "--out", killed)
    with pytest.raises(ValueError, match="started with samples = 2, now it is 1"):
        call(
            workshop,
            "distill.py",
            "--model",
            "toy-teacher",
            "--out",
            killed,
            "--resume",
            "--limit",
            40,
            "--batch-size",
            16,
            "--max-new-tokens",
            12,
        )


def test_best_of_n_and_unclosed(workshop, tmp_path, monkeypatch):
    generate = rollout.generate

    def every_other_closes(model, tokenizer, *rest, **options):
        closing = tokenizer("<|end_of_explanation|>", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return [
            rollout.Completion(c.ids[:3] + closing, c.logprobs, True) if i % 2 else c
            for i, c in enumerate(generate(model, tokenizer, *rest, **options))
        ]

    monkeypatch.setattr(models, "generate", every_other_closes)
    flags = ["--model", "toy-teacher", "--limit", 12, "--samples", 4, "--max-new-tokens", 12]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "all.jsonl")
    call(workshop, "distill.py", *flags, "--out", tmp_path / "best.jsonl", "--keep", "best")
    call(workshop, "distill.py", *flags, "--out", tmp_path / "closed.jsonl", "--drop-unclosed")
    every, best, closed = (runs.read_jsonl(tmp_path / f"{name}.jsonl") for name in ("all", "best", "closed"))
    assert len(every) == 48 and len(best) == 12
    for i, row in enumerate(best):
        group = every[4 * i : 4 * i + 4]
        assert {r["question"] for r in group} == {row["question"]}
        assert row["reward"] == max(r["reward"] for r in group)
    assert [row["explanation"] for row in closed] == [row["explanation"] for row in every if row["closed"]]
    assert 0 < len(closed) < 48


def test_a_resumed_student_is_the_same(workshop, tmp_path):
    for rank in (4, 0):
        flags = [
            "--data",
            "toy",
            "--limit",
            100,
            "--steps",
            4,
            "--batch-size",
            8,
            "--save-every",
            2,
            "--lora-rank",
            rank,
            "--val-rows",
            8,
        ]
        straight, killed = tmp_path / f"straight{rank}", tmp_path / f"killed{rank}"
        call(workshop, "sft_student.py", *flags, "--out", straight)
        call(workshop, "sft_student.py", *flags, "--out", killed)
        for path in (killed / "final").iterdir():
            path.unlink()
        (killed / "final").rmdir()
        call(workshop, "sft_student.py", *flags, "--out", killed, "--resume")
        assert metrics(straight) == metrics(killed) and len(metrics(killed)) == 4
        name = "adapter_model.safetensors" if rank else "model.safetensors"
        assert (straight / "final" / name).read_bytes() == (killed / "final" / name).read_bytes()


# -- numbers that must not depend on how the work is cut


def test_nothing_depends_on_the_micro_batch(workshop, tmp_path):
    for loss in ("grpo", "dapo"):
        flags = ["--loss", loss, "--steps", 1]
        [big], _ = train(workshop, tmp_path / f"big-{loss}", *flags)
        [small], _ = train(workshop, tmp_path / f"small-{loss}", *flags, "--micro-batch-tokens", 60, "--head-chunk", 7)
        # the loss is a sum of ratios times advantages that cancels to nearly 0: its rounding is theirs
        assert big.pop("loss") == pytest.approx(small.pop("loss"), abs=1e-5)
        assert big == pytest.approx(small, rel=1e-4, abs=1e-6)
        moments = [
            torch.load(tmp_path / f"{size}-{loss}/step_000001/optimizer.pt")["state"] for size in ("big", "small")
        ]
        for i in moments[0]:  # after one step Adam's first moment is a tenth of the gradient
            one, other = (side[i]["exp_avg"] for side in moments)
            assert (one - other).abs().max() < 1e-4 * one.abs().max() + 1e-9


def test_completion_i_belongs_to_prompt_i_over_g(workshop, tmp_path):
    scope = call(workshop, "train_rlt.py", "--steps", 1, *TINY, "--out", tmp_path / "run")
    chosen, G = scope["chosen"], scope["args"].group_size
    assert all(chosen[i]["question"] == chosen[i - i % G]["question"] for i in range(len(chosen)))
    assert chosen[0]["question"] != chosen[G]["question"]
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

    monkeypatch.setattr(models, "generate", first_says_nothing)
    scope = call(workshop, "train_rlt.py", "--steps", 1, *TINY, "--out", tmp_path / "run", "--unclosed-penalty", 5,
                 "--max-logprob-diff", 100)
    assert scope["explanations"][0].closed and not scope["explanations"][0].thought
    assert scope["scored"].reward.kl[0].item() == pytest.approx(1.01), "both parts count as 1"
    assert runs.read_jsonl(tmp_path / "run/metrics.jsonl")[0]["empty"] == 1 / 8
    for explanation, reward, whole in zip(
        scope["explanations"], scope["rewards"].tolist(), scope["scored"].reward.reward.tolist(), strict=True
    ):
        proper = explanation.closed and explanation.thought
        assert reward == pytest.approx(whole - (0 if proper else 5))
    assert any(not e.closed for e in scope["explanations"])


# -- flags


def options(script):
    """{flag: its add_argument call} of a script."""
    tree = ast.parse((ROOT / script).read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "add_argument"]
    return {c.args[0].value: c for c in calls}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_used(script):
    text = (ROOT / script).read_text()
    found = options(script)
    assert len(found) > 8
    for flag, add in found.items():
        keywords = {k.arg: k.value for k in add.keywords}
        assert "help" in keywords, f"{script} {flag} has no help"
        dest = keywords["dest"].value if "dest" in keywords else flag.lstrip("-").replace("-", "_")
        used = re.search(rf"args\.{dest}\b", text) or (dest in ("resume", "out") and "Run(args)" in text)
        assert used, f"{script} {flag} does nothing"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_its_default(script):
    shown, _ = said(ROOT, script, "--help")
    for flag in options(script):
        assert flag in shown
    assert "(default: " in shown
    if script == "train_rlt.py":
        assert "--lambda L" in shown and "(default: 3.0)" in shown


@pytest.mark.parametrize(
    ("script", "flags", "complaint"),
    [
        ("train_rlt.py", ["--lambda", "-1"], "argument --lambda: got -1, expected at least 0"),
        ("train_rlt.py", ["--lambd", "1"], "unrecognized arguments: --lambd 1"),
        ("train_rlt.py", ["--group-size", "1"], "argument --group-size: got 1, expected at least 2"),
        ("train_rlt.py", ["--temperature", "0"], "argument --temperature: got 0, expected more than 0"),
        ("train_rlt.py", ["--kl", "k3"], "argument --kl: invalid choice: 'k3'"),
        ("train_rlt.py", ["--student-bits", "8"], "argument --student-bits: invalid choice: 8"),
        ("train_rlt.py", ["--epsilon-low", "1.5"], "argument --epsilon-low: got 1.5, expected at most 0.999"),
        ("train_rlt.py", ["--device", "tpu"], "--device tpu"),
        ("train_rlt.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl: expected a .jsonl, .json or .parquet file"),
        ("train_rlt.py", ["--model", "runs/nowhere"], "runs/nowhere is no folder"),
        ("train_rlt.py", ["--limit", "70"], "6 rows are left to train on, a step takes 16"),
        ("distill.py", ["--samples", "0"], "argument --samples: got 0, expected at least 1"),
        ("distill.py", ["--model", "runs/nowhere"], "runs/nowhere is no folder"),
        ("sft_student.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl: expected"),
        (
            "sft_student.py",
            ["--lora-rank", "0", "--bits", "4"],
            "--lora-rank 0 trains all weights, which takes --bits 32",
        ),
    ],
)
def test_bad_values_end_in_one_line(workshop, tmp_path, script, flags, complaint):
    """One line that says the next move, no traceback, and no folder left behind that blocks the next try."""
    _, stderr = said(workshop, script, *flags, "--out", tmp_path / "out")
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("usage:")]
    assert len(lines) == 1 and complaint in lines[0], stderr
    assert not (tmp_path / "out").exists()


def test_a_refusal_in_a_process_of_its_own(workshop):
    done = run_script(workshop, "train_rlt.py", "--model", "runs/nowhere", "--out", "runs/never", check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"train_rlt.py: runs/nowhere is no folder: expected .*\n", done.stderr), done.stderr
    assert run_script(workshop, "distill.py", "--samples", "0", check=False).returncode == 2


CHANGES = {  # flag: (another value, what must change, in which step)
    "--lambda": (0, "reward", 0),
    "--alpha": (1, "score", 0),
    "--kl": ("exact", "kl", 0),
    "--score-temperature": (0.5, "kl", 0),
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
    "--eval-rows": (9, "eval_reward", 0),
    "--lr": (1e-2, "kl_ref", 1),
    "--warmup-steps": (0, "lr", 0),
    "--final-lr-fraction": (1, "lr", 1),
    "--steps": (3, "lr", 1),
    "--max-grad-norm": (1e-6, "kl_ref", 1),
    "--loss": ("dr_grpo", "grad_norm", 0),
    "--beta": (5, "grad_norm", 1),
    "--advantage-scale": ("none", "grad_norm", 0),
    "--updates-per-batch": (3, "kl_ref", 1),
    "--sync-ref-every": (1, "kl_ref", 1),
    "--eval-every": (0, "eval_reward", 0),
    "--rollout-batch": (3, "reward", 0),
    "--lora-rank": (4, "kl_ref", 1),
    "--lora-alpha": (64, "kl_ref", 1),
    "--lora-targets": ("q_proj", "kl_ref", 1),
}
ELSEWHERE = {  # flag: the test that shows what it does
    "--kl-gradient": "test_kl_gradient.py",
    "--logits-dtype": "test_the_logits_of_the_reward",
    "--offload-student": "test_the_student_waits_elsewhere",
    "--engine": "test_both_engines",
    "--cache-tokens": "test_both_engines",
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
    "--head-chunk": "test_nothing_depends",
    "--device": "test_bad_values",
    "--dry-run": "test_memory.py",
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


@pytest.fixture(scope="module")
def unchanged(workshop, tmp_path_factory):
    # a fresh adapter on the base, so that rank, alpha and targets are free; warm-up and decay as in a long run
    return train(workshop, tmp_path_factory.mktemp("unchanged") / "run", "--model", "toy", *LIVELY)[0]


@pytest.mark.parametrize("flag", CHANGES)
def test_changing_a_flag_changes_what_it_says(workshop, tmp_path, unchanged, flag):
    value, key, step = CHANGES[flag]
    entries, _ = train(workshop, tmp_path / "run", "--model", "toy", *LIVELY, flag, value)
    assert entries[step][key] != pytest.approx(unchanged[step][key], rel=1e-4), f"{flag} {value} left {key} as it was"
    if flag in (
        "--lr",
        "--max-grad-norm",
        "--loss",
        "--beta",
        "--advantage-scale",
        "--updates-per-batch",
        "--warmup-steps",
    ):
        assert entries[0]["reward"] == unchanged[0]["reward"], "it acts on the update, not on the first samples"


def test_the_clip_flags(workshop, tmp_path):
    """They act from the second update on the same explanations, each on its side."""
    flags = ["--model", "toy", "--lr", 5e-2, "--warmup-steps", 0, "--updates-per-batch", 3]
    clipped = {}
    for low, high in ((0.01, 0.01), (0.9, 0.01), (0.01, 100), (0.9, 100)):
        entries, _ = train(workshop, tmp_path / f"{low}-{high}", *flags, "--epsilon-low", low, "--epsilon-high", high)
        clipped[low, high] = entries[0]["clip_fraction"]
    assert clipped[0.9, 100] < min(clipped[0.9, 0.01], clipped[0.01, 100]) <= clipped[0.01, 0.01]
    assert train(workshop, tmp_path / "once")[0][0]["clip_fraction"] == 0


def test_the_logits_of_the_reward(workshop, tmp_path):
    """Rounded to bfloat16 they move the reward a little, where the heads are bfloat16, and nothing else."""
    flags = ["--teacher-bits", 16, "--student-bits", 16, "--steps", 1]
    [exact], _ = train(workshop, tmp_path / "exact", *flags)
    [rounded], _ = train(workshop, tmp_path / "rounded", *flags, "--logits-dtype", "bfloat16")
    assert exact["length"] == rounded["length"]
    assert exact["kl"] != rounded["kl"] and exact["kl"] == pytest.approx(rounded["kl"], abs=0.05)


def test_the_reference_moves_in_the_loop(workshop, tmp_path):
    """Synced whole after the first step, it is the teacher again: no KL at the start of the second, to the bit."""
    flags = ["--sync-ref-every", 1, "--lr", 5e-3, "--warmup-steps", 1]
    whole, none, some = (train(workshop, tmp_path / str(m), *flags, "--sync-ref-mix", m)[0] for m in (1, 0, 0.5))
    assert whole[1]["kl_ref"] == 0.0
    assert 0 < some[1]["kl_ref"] < none[1]["kl_ref"]


def test_the_sampler_gate(workshop, tmp_path):
    with pytest.raises(ValueError, match="sampler and trainer disagree by .* --max-logprob-diff is 1e-12"):
        train(workshop, tmp_path / "run", "--max-logprob-diff", 1e-12)


def test_the_student_waits_elsewhere(workshop, tmp_path, monkeypatch):
    """It is moved before and after each scoring, which alone calls it, and the numbers stay as they are."""
    events, load, sample = [], models.load_model, rollout.generate

    def watched(name, bits, device):
        model = load(name, bits=bits, device=device)
        if bits == 4:  # the student
            move = model.to
            model.to = lambda device: events.append("move") or move(device)
            model.model.register_forward_pre_hook(lambda *_: events.append("read"))
        return model

    def generate(*args, **options):
        events.append("sample")
        return sample(*args, **options)

    plain, _ = train(workshop, tmp_path / "plain")
    monkeypatch.setattr(models, "generate", generate)
    monkeypatch.setattr(models, "load_model", watched)
    entries, _ = train(workshop, tmp_path / "parked", "--offload-student", "--eval-every", 1)
    scoring = ["sample", "move", "read", "move"]
    assert events == ["move"] + scoring * 4, "parked, then two steps and their held-out rows"
    assert [e["reward"] for e in entries] == [e["reward"] for e in plain]
    assert [e["grad_norm"] for e in entries] == [e["grad_norm"] for e in plain]
    _, stderr = said(workshop, "train_rlt.py", "--offload-student", "--kl", "exact", "--kl-gradient")
    assert "--kl-gradient needs the student in every update" in stderr


def test_both_engines(workshop, tmp_path):
    """In every script that samples, through a cache that holds few rows; greedy answers are the same."""
    flags = ["--engine", "continuous", "--cache-tokens", 200]
    [entry], _ = train(workshop, tmp_path / "teacher", *flags, "--steps", 1)
    assert entry["sampler_logprob_diff"] < 1e-4
    call(workshop, "rl_student.py", *TINY, *flags, "--steps", 1, "--out", tmp_path / "student")
    assert metrics(tmp_path / "student")[0]["sampler_logprob_diff"] < 1e-4
    call(workshop, "distill.py", "--model", "toy-teacher", "--limit", 6, *flags, "--out", tmp_path / "d.jsonl")
    assert len(runs.read_jsonl(tmp_path / "d.jsonl")) == 6
    for engine, *more in (("batch",), ("continuous", "--cache-tokens", 200)):
        call(workshop, "evaluate.py", "--model", "toy", "--limit", 6, "--engine", engine, *more, "--out",
             tmp_path / engine)
    said_by = [[sample["output"] for sample in runs.read_jsonl(tmp_path / f"{engine}/toy/eval_toy_samples.jsonl")]
               for engine in ("batch", "continuous")]
    assert said_by[0] == said_by[1] and len(said_by[0]) == 6


def test_columns_and_bad_rows(workshop, tmp_path):
    rows = [json.loads(line) for line in (workshop / "runs/toy/train.jsonl").read_text().splitlines()[:20]]
    renamed = [{"q": row["question"], "s": row["solution"]} for row in rows]
    renamed[3]["s"] = ""
    renamed[5]["q"] = " ".join([rows[5]["question"]] * 30)  # longer than the toy's context
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    flags = ["--steps", 1, *TINY, "--data", path, "--out", tmp_path / "run", "--question-column", "q"]
    with pytest.raises(ValueError, match='line 1 has no "solution"; columns found: q, s'):
        call(workshop, "train_rlt.py", *flags)
    flags += ["--solution-column", "s"]
    with pytest.raises(ValueError, match="line 4 has an empty solution"):
        call(workshop, "train_rlt.py", *flags)
    renamed[3]["s"] = "word"
    path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
    with pytest.raises(ValueError, match="line 4 can't be tokenized .* --skip-bad-rows"):
        call(workshop, "train_rlt.py", *flags)
    scope = call(workshop, "train_rlt.py", *flags, "--skip-bad-rows")
    assert len(scope["rows"]) + len(scope["held_out"]) == 18


# -- a real tokenizer and real rows


def test_real_rows(workshop, tmp_path, qwen_tokenizer, tiny_model):
    """From GSM8K to a saved adapter, on a random Qwen2 with Qwen2.5's tokenizer and padded vocabulary."""
    tiny_model(152064, hidden_size=16, intermediate_size=32).save_pretrained(tmp_path / "model")
    qwen_tokenizer.save_pretrained(tmp_path / "model")
    data = data_file("gsm8k_train_1k.jsonl")
    flags = ["--data", data, "--limit", 12, "--max-new-tokens", 8]
    done = run_script(
        workshop,
        "train_rlt.py",
        *flags,
        "--model",
        tmp_path / "model",
        "--steps",
        2,
        "--prompts-per-step",
        2,
        "--group-size",
        2,
        "--eval-rows",
        2,
        "--out",
        tmp_path / "teacher",
        "--temperature",
        0.7,
    )
    assert "Next: python distill.py --model" in done.stdout
    entries = metrics(tmp_path / "teacher")
    assert entries[0]["kl_ref"] == 0 and entries[0]["sampler_logprob_diff"] < 1e-4
    config = json.loads((tmp_path / "teacher/final/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    call(workshop, "distill.py", *flags, "--model", tmp_path / "teacher", "--out", tmp_path / "d.jsonl")
    assert len(runs.read_jsonl(tmp_path / "d.jsonl")) == 12
    other = models.load_tokenizer(str(workshop / "runs/toy"))
    other.save_pretrained(tmp_path / "other")
    tiny_model(64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="tokenize differently"):
        call(
            workshop,
            "train_rlt.py",
            *flags,
            "--model",
            tmp_path / "model",
            "--student",
            tmp_path / "other",
            "--out",
            tmp_path / "never",
        )


def test_long_rows_are_cut_and_counted(workshop, tmp_path, capsys):
    call(
        workshop,
        "sft_student.py",
        "--data",
        "toy",
        "--limit",
        40,
        "--val-rows",
        4,
        "--steps",
        1,
        "--max-tokens",
        30,
        "--out",
        tmp_path / "run",
    )
    found = re.search(r"(\d+) of 40 rows are longer than --max-tokens 30 and were cut", capsys.readouterr().out)
    assert found and json.loads((tmp_path / "run/config.json").read_text())["cut"] == int(found.group(1)) > 0


# -- explanations that are there already


def test_scoring_a_file_gives_the_rewards_it_was_written_with(workshop, tmp_path):
    """What distill wrote and scored, scored again from its text: the same rewards, explanation by explanation."""
    flags = ["--model", "toy-teacher", "--max-new-tokens", 12]
    call(workshop, "distill.py", *flags, "--limit", 30, "--out", tmp_path / "first.jsonl")
    call(workshop, "distill.py", *flags, "--score-file", tmp_path / "first.jsonl", "--out", tmp_path / "again.jsonl")
    first, again = (runs.read_jsonl(tmp_path / f"{name}.jsonl") for name in ("first", "again"))
    assert len({row["closed"] for row in first}) == 2, "the case needs both kinds"
    for one, other in zip(first, again, strict=True):
        assert one["explanation"].split() == other["explanation"].split() and one["closed"] == other["closed"]
        assert one["reward"] == pytest.approx(other["reward"], abs=1e-4)
    # somebody else's: the rows' own explanations
    call(
        workshop,
        "distill.py",
        *flags,
        "--score-file",
        workshop / "runs/toy/val.jsonl",
        "--out",
        tmp_path / "theirs.jsonl",
    )
    theirs = runs.read_jsonl(tmp_path / "theirs.jsonl")
    assert len(theirs) == 400 and all(row["closed"] for row in theirs)
    with pytest.raises(ValueError, match='has no "explanation"'):
        (tmp_path / "bare.jsonl").write_text('{"question": "x 3 y 7 s1 swap", "solution": "7 3"}\n')
        call(workshop, "distill.py", *flags, "--score-file", tmp_path / "bare.jsonl", "--out", tmp_path / "never.jsonl")


def test_partitions_by_rank(workshop, tmp_path):
    flags = ["--model", "toy-teacher", "--limit", 10, "--samples", 6, "--max-new-tokens", 12, "--partition", 3]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "all.jsonl")
    every = runs.read_jsonl(tmp_path / "all.jsonl")
    for name in ("overall", "within"):
        parts = [runs.read_jsonl(tmp_path / f"all.{name}-{i}of3.jsonl") for i in (1, 2, 3)]
        assert [len(part) for part in parts] == [20, 20, 20]
        key = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
        assert sorted(key(row) for part in parts for row in part) == sorted(map(key, every))
        if name == "overall":
            assert max(r["reward"] for r in parts[0]) <= min(r["reward"] for r in parts[1])
            assert max(r["reward"] for r in parts[1]) <= min(r["reward"] for r in parts[2])
        for question in {row["question"] for row in every}:
            ranks = [[r["reward"] for r in part if r["question"] == question] for part in parts]
            if name == "within":
                assert [len(rank) for rank in ranks] == [2, 2, 2]
                assert max(ranks[0]) <= min(ranks[1]) and max(ranks[1]) <= min(ranks[2])


def test_a_solver_keeps_what_the_grader_accepts(workshop, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "grade_all", lambda task, outputs, rows: [i % 3 == 0 for i in range(len(outputs))])
    flags = ["--solver", "--model", "toy", "--limit", 12, "--max-new-tokens", 12]
    call(workshop, "distill.py", *flags, "--out", tmp_path / "right.jsonl")
    call(workshop, "distill.py", *flags, "--out", tmp_path / "raw.jsonl", "--keep-wrong")
    right, raw = (runs.read_jsonl(tmp_path / f"{name}.jsonl") for name in ("right", "raw"))
    assert len(raw) == 12 and [row for row in raw if row["right"]] == right and len(right) == 4
    assert "solution" in raw[0] and raw[0]["messages"][1]["content"] == raw[0]["question"]
    call(
        workshop,
        "sft_student.py",
        "--data",
        tmp_path / "raw.jsonl",
        "--val-rows",
        2,
        "--steps",
        1,
        "--out",
        tmp_path / "s",
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--score-file", "x.jsonl", "--samples", 2],
        ["--solver", "--keep", "best"],
        ["--keep-wrong"],
        ["--solver", "--partition", 3],
    ],
)
def test_distill_flags_that_exclude_each_other(workshop, flags):
    assert "error: --" in said(workshop, "distill.py", *flags)[1]
