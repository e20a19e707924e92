"""RL on correctness, with and without hints, at a tiny size.   python -m pytest tests/test_rl_student.py"""

import json
import shutil
import zlib

from rlt.episodes import pack
from rlt.errors import UserError
from rlt.files import read_jsonl
from rlt.grading import answer_of, grade

import pytest
import torch
from conftest import call, documented_metrics, ended
from test_scripts import options

TINY = ("--steps", 2, "--limit", 60, "--prompts-per-step", 3, "--group-size", 4, "--max-new-tokens", 10,
        "--eval-rows", 4)
GUIDE = ("--failed-groups", "guide", "--rewards", 0, 0, 1)
GRADER = "rlt.grading.grade_all"


def train(folder, out, *flags):
    scope = call(folder, "rl_student.py", *TINY, "--out", out, *flags)
    return scope, read_jsonl(out / "metrics.jsonl")


@pytest.fixture
def lenient(monkeypatch):
    """An untrained student can't be right: grade by a hash of the text, one in five."""
    monkeypatch.setattr(GRADER, lambda task, outputs, rows: [zlib.crc32(text.encode()) % 5 == 0 for text in outputs])


def test_rewards_are_the_graders_verdict(toy, tmp_path):
    scope, entries = train(toy, tmp_path / "run", "--rewards", -3, -2, 5, "--model", toy / "runs/toy")
    for row, text, reward in zip(scope["batch"], scope["texts"], scope["rewards"].tolist(), strict=True):
        assert reward == (5 if grade("toy", text, row) else -3 if answer_of("toy", text) is None else -2)
    assert entries[0]["zero_groups"] == 1.0 and entries[0]["usable_groups"] == 0
    assert entries[0]["grad_norm"] == 0 and entries[0]["loss"] == 0, "groups without signal teach nothing"
    assert set(entries[0]) >= {"solved", "zero_groups", "usable_groups", "sampled_tokens", "hinted", "reward_std",
                               "length_p10", "length_p50", "length_p90", "eval_solved", "eval_solved_before"}
    assert set(entries[0]) <= documented_metrics()
    assert entries[0]["eval_solved_before"] == 0.0 and entries[1]["eval_solved_before"] is None


def test_no_answer_and_a_wrong_one_are_told_apart(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("rlt.grading.answer_of", lambda task, text: None if zlib.crc32(text.encode()) % 2 else "9 9")
    scope, _ = train(toy, tmp_path / "run", "--rewards", -3, -2, 5, "--steps", 1)
    for text, reward in zip(scope["texts"], scope["rewards"].tolist(), strict=True):
        assert reward == (-3 if zlib.crc32(text.encode()) % 2 else -2)
    assert len(set(scope["rewards"].tolist())) == 2


def test_groups_with_signal_are_learned_from_and_the_rest_dropped(toy, tmp_path, lenient):
    scope, entries = train(toy, tmp_path / "run", "--steps", 1, "--prompts-per-step", 6)
    G = 4
    rewards = scope["rewards"].view(-1, G)
    mixed = (rewards != rewards[:, :1]).any(1)
    assert 0 < mixed.sum() < len(mixed), "the case needs both kinds"
    assert entries[0]["usable_groups"] == mixed.sum()
    assert entries[0]["zero_groups"] == pytest.approx(1 - mixed.sum().item() / len(mixed))
    assert entries[0]["reward_std"] == pytest.approx(rewards.std(1).mean().item())
    assert sorted(scope["kept"]) == [i for i in range(len(scope["batch"])) if mixed[i // G]]
    assert entries[0]["grad_norm"] > 0
    kept, _ = train(toy, tmp_path / "kept", "--steps", 1, "--keep-zero-groups")
    assert len(kept["kept"]) == len(kept["batch"])


def test_hinted_groups_replace_the_failed_ones(toy, tmp_path, monkeypatch):
    """A model that never solves anything plainly: every group is drawn again, from the hinted prompt."""
    calls = []

    def once_hinted(task, outputs, rows):  # nothing right at first, every other answer on the second try
        calls.append(len(outputs))
        return [len(calls) % 2 == 0 and i % 2 == 0 for i in range(len(outputs))]

    monkeypatch.setattr(GRADER, once_hinted)
    scope, [entry] = train(toy, tmp_path / "run", *GUIDE, "--steps", 1, "--eval-every", 0)
    prompts, episodes = scope["prompts"], scope["episodes"]
    assert calls == 2 * [len(episodes)] == 2 * [len(scope["batch"])]
    for e in episodes:
        assert e.hinted_prompt == prompts.hinted_prompt(e.row) != e.prompt == prompts.question_prompt(e.row)
    assert entry["hinted"] == 1.0 and entry["solved"] == 0.0 and entry["hinted_solved"] == 0.5
    assert entry["sampled_tokens"] > sum(len(c.ids) for c in scope["completions"])
    assert entry["sampler_logprob_diff"] < 1e-4, "measured where the answers were sampled: with the hint"
    # the ratio: new policy without the hint over old policy with it
    for e, i in zip(episodes, scope["kept"], strict=True):
        assert torch.allclose(e.old_logprobs, torch.tensor(scope["completions"][i].logprobs), atol=1e-4)
    naive, _ = train(toy, tmp_path / "naive", *GUIDE, "--steps", 1, "--eval-every", 0, "--hint-ratio", "naive")
    assert not torch.allclose(pack(naive["episodes"], "old_logprobs"), pack(episodes, "old_logprobs"), atol=1e-3)
    start, _ = train(toy, tmp_path / "start", *GUIDE, "--steps", 1, "--eval-every", 0, "--hint-ratio", "start")
    assert max(len(e.completion) for e in episodes) > 8
    for e, as_guide, as_naive in zip(start["episodes"], episodes, naive["episodes"], strict=True):
        assert torch.equal(e.old_logprobs[:8], as_naive.old_logprobs[:8])
        assert torch.equal(e.old_logprobs[8:], as_guide.old_logprobs[8:])


def test_a_group_that_fails_with_the_hint_too_is_dropped(toy, tmp_path):
    scope, entries = train(toy, tmp_path / "run", *GUIDE)
    assert entries[0]["hinted"] == 1.0 and entries[0]["usable_groups"] == 0 and scope["kept"] == []


def test_without_a_failed_group_hints_change_nothing(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(GRADER, lambda task, outputs, rows: [i % 3 == 0 for i in range(len(outputs))])
    plain, _ = train(toy, tmp_path / "plain", "--rewards", 0, 0, 1)
    guided, entries = train(toy, tmp_path / "guided", *GUIDE)
    assert entries[0]["hinted"] == 0.0
    for a, b in zip(plain["parameters"], guided["parameters"], strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_is_the_same(toy, tmp_path, lenient):
    flags = ("--steps", 4, "--save-every", 2, "--eval-every", 3)
    _, straight = train(toy, tmp_path / "straight", *flags)
    train(toy, tmp_path / "cut", *flags)
    for name in ("final", "step_000004"):
        shutil.rmtree(tmp_path / "cut" / name)
    call(toy, "rl_student.py", "--resume", "--out", tmp_path / "cut")
    cut = read_jsonl(tmp_path / "cut/metrics.jsonl")
    for entries in (straight, cut):
        for entry in entries:
            for key in [key for key in entry if key.startswith("t_") or key == "tokens_per_s"]:
                del entry[key]
    assert straight == cut and len(cut) == 4
    weights = [tmp_path / name / "final/adapter_model.safetensors" for name in ("straight", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--failed-groups", "guide"], "pass --rewards 0 0 1"),
        (["--failed-groups", "guide", "--rewards", "0", "0", "1", "--loss", "gspo"], "one ratio a token"),
        (["--hint-ratio", "naive"], "does nothing without --failed-groups guide"),
        (["--relift-rows", "9"], "does nothing without --failed-groups relift"),
        (["--failed-groups", "adaback", "--relift-rows", "9"], "does nothing without --failed-groups relift"),
        (["--hints"], "--hints is now --failed-groups guide"),
    ],
)
def test_what_does_not_go_together(toy, tmp_path, flags, complaint):
    refusal = ended(toy, "rl_student.py", *flags, "--out", tmp_path / "run")
    assert refusal.code == 2 and complaint in refusal.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_rows_without_a_hint_are_named(toy, tmp_path):
    row = json.loads((toy / "runs/toy/train.jsonl").read_text().splitlines()[0])
    row.pop("hint")
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 30)
    with pytest.raises(UserError, match='rows.jsonl line 1 has no "hint" .columns found: question'):
        train(toy, tmp_path / "run", *GUIDE, "--data", path)
    assert not (tmp_path / "run").exists()


def test_both_rl_scripts_have_the_same_settings():
    """Where a teacher's RL and a student's are compared, sampling and update must be the same, flag by flag."""
    ours, theirs = options("rl_student.py"), options("train_rlt.py")
    shared = ours.keys() & theirs.keys() - {"--model", "--data", "--out", "--eval-every"}
    for flag in shared:
        for what in ("default", "help", "choices", "metavar", "nargs"):
            assert getattr(ours[flag], what) == getattr(theirs[flag], what), flag
    assert shared >= {"--lr", "--steps", "--warmup-steps", "--beta", "--epsilon-low", "--epsilon-high", "--loss",
                      "--group-size", "--prompts-per-step", "--temperature", "--advantage-scale", "--tis-cap"}
    assert ours.keys() - theirs.keys() == {"--bits", "--task", "--rewards", "--keep-zero-groups", "--failed-groups",
                                           "--hint-ratio", "--relift-rows", "--explanation-column"}
