"""RL on correctness, with and without hints, at a tiny size.   python -m pytest tests/test_rl_student.py"""

import json
import zlib

from rlt import runs

import pytest
import torch
from conftest import ROOT, call, said

from evaluate import answer_of, grade

TINY = (
    "--steps",
    2,
    "--limit",
    60,
    "--prompts-per-step",
    3,
    "--group-size",
    4,
    "--max-new-tokens",
    10,
    "--eval-rows",
    4,
)
GUIDE = ("--hints", "--rewards", 0, 0, 1)


def train(folder, out, *flags):
    scope = call(folder, "rl_student.py", *TINY, "--out", out, *flags)
    return scope, runs.read_jsonl(out / "metrics.jsonl")


@pytest.fixture
def lenient(monkeypatch):
    """An untrained student can't be right: grade by a hash of the text, one in five."""
    import evaluate

    lucky = lambda task, outputs, rows: [zlib.crc32(text.encode()) % 5 == 0 for text in outputs]  # noqa: E731
    monkeypatch.setattr(evaluate, "grade_all", lucky)


def test_rewards_are_the_graders_verdict(toy, tmp_path):
    scope, entries = train(toy, tmp_path / "run", "--rewards", -3, -2, 5, "--model", toy / "runs/toy")
    for row, text, reward in zip(scope["chosen"], scope["texts"], scope["rewards"].tolist(), strict=True):
        assert reward == (5 if grade("toy", text, row) else -3 if answer_of("toy", text) is None else -2)
    assert entries[0]["zero_groups"] == 1.0 and entries[0]["usable_groups"] == 0
    assert entries[0]["grad_norm"] == 0 and entries[0]["loss"] == 0, "groups without signal teach nothing"
    assert set(entries[0]) >= {"solved", "zero_groups", "usable_groups", "sampled_tokens", "hinted"}


def test_no_answer_and_a_wrong_one_are_told_apart(toy, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "answer_of", lambda task, text: None if zlib.crc32(text.encode()) % 2 else "9 9")
    scope, _ = train(toy, tmp_path / "run", "--rewards", -3, -2, 5, "--steps", 1)
    for text, reward in zip(scope["texts"], scope["rewards"].tolist(), strict=True):
        assert reward == (-3 if zlib.crc32(text.encode()) % 2 else -2)
    assert len(set(scope["rewards"].tolist())) == 2


def test_groups_with_signal_are_learned_from_and_the_rest_dropped(toy, tmp_path, lenient):
    scope, entries = train(toy, tmp_path / "run", "--steps", 1)
    G = 4
    rewards = scope["rewards"].view(-1, G)
    mixed = (rewards != rewards[:, :1]).any(1)
    assert 0 < mixed.sum() < len(mixed), "the case needs both kinds"
    assert entries[0]["usable_groups"] == mixed.sum()
    assert sorted(scope["kept"]) == [i for i in range(len(scope["chosen"])) if mixed[i // G]]
    assert entries[0]["grad_norm"] > 0
    kept, _ = train(toy, tmp_path / "kept", "--steps", 1, "--keep-zero-groups")
    assert len(kept["kept"]) == len(kept["chosen"])


def test_hinted_groups_replace_the_failed_ones(toy, tmp_path, monkeypatch):
    """A model that never solves anything plainly: every group is drawn again, from the hinted prompt."""
    import evaluate

    calls = []

    def once_hinted(task, outputs, rows):  # nothing right at first, every other answer on the second try
        calls.append(len(outputs))
        return [len(calls) % 2 == 0 and i % 2 == 0 for i in range(len(outputs))]

    monkeypatch.setattr(evaluate, "grade_all", once_hinted)
    scope, [entry] = train(toy, tmp_path / "run", *GUIDE, "--steps", 1, "--eval-every", 0)
    prompts, B = scope["prompts"], len(scope["chosen"])
    assert calls == [B, B] and scope["hinted"].all()
    assert scope["sampled_from"] == [prompts.hinted_prompt(row) for row in scope["chosen"]]
    assert scope["asked"] == [prompts.question_prompt(row) for row in scope["chosen"]] != scope["sampled_from"]
    assert entry["hinted"] == 1.0 and entry["solved"] == 0.0 and entry["hinted_solved"] == 0.5
    assert entry["sampled_tokens"] > sum(len(c.ids) for c in scope["completions"])
    assert entry["sampler_logprob_diff"] < 1e-4, "the gap is taken where the answers were drawn: with the hint"
    # the ratio: new policy without the hint over old policy with it
    old = torch.cat(scope["old"])
    with torch.no_grad():
        order = [i for batch in scope["batches"] for i in batch]
        hinted = torch.cat([torch.tensor(scope["completions"][i].logprobs) for i in order])
    assert torch.allclose(old, hinted, atol=1e-4)
    naive, _ = train(toy, tmp_path / "naive", *GUIDE, "--steps", 1, "--eval-every", 0, "--hint-ratio", "naive")
    assert not torch.allclose(torch.cat(naive["old"]), old, atol=1e-3)


def test_a_group_that_fails_with_the_hint_too_is_dropped(toy, tmp_path):
    scope, entries = train(toy, tmp_path / "run", *GUIDE)
    assert entries[0]["hinted"] == 1.0 and entries[0]["usable_groups"] == 0 and scope["kept"] == []


def test_without_a_failed_group_hints_change_nothing(toy, tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate, "grade_all", lambda task, outputs, rows: [i % 3 == 0 for i in range(len(outputs))])
    plain, _ = train(toy, tmp_path / "plain", "--rewards", 0, 0, 1)
    guided, entries = train(toy, tmp_path / "guided", *GUIDE)
    assert entries[0]["hinted"] == 0.0
    for a, b in zip(plain["parameters"], guided["parameters"], strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_is_the_same(toy, tmp_path, lenient):
    import shutil

    flags = ("--steps", 4, "--save-every", 2, "--eval-every", 3)
    _, straight = train(toy, tmp_path / "straight", *flags)
    train(toy, tmp_path / "cut", *flags)
    for name in ("final", "step_000004"):
        shutil.rmtree(tmp_path / "cut" / name)
    _, cut = train(toy, tmp_path / "cut", *flags, "--resume")
    timeless = [
        [{k: v for k, v in e.items() if not k.startswith("t_") and k != "tokens_per_s"} for e in entries]
        for entries in (straight, cut)
    ]
    assert timeless[0] == timeless[1]
    assert (tmp_path / "straight/final/adapter_model.safetensors").read_bytes() == (
        tmp_path / "cut/final/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--hints"], "pass --rewards 0 0 1"),
        (["--hints", "--rewards", "0", "0", "1", "--loss", "gspo"], "one ratio a token"),
        (["--hint-ratio", "naive"], "does nothing without --hints"),
    ],
)
def test_what_does_not_go_together(toy, tmp_path, flags, complaint):
    _, stderr = said(toy, "rl_student.py", *flags, "--out", tmp_path / "run")
    assert complaint in stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_rows_without_a_hint_are_named(toy, tmp_path):
    row = json.loads((toy / "runs/toy/train.jsonl").read_text().splitlines()[0])
    row.pop("hint")
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 30)
    with pytest.raises(ValueError, match='rows.jsonl line 1 has no "hint" .columns found: question'):
        train(toy, tmp_path / "run", *GUIDE, "--data", path)
    assert not (tmp_path / "run").exists()


def test_the_two_loops_differ_where_they_must():
    """diff train_rlt.py rl_student.py is the comparison: the optimisation flags are word for word the same."""
    texts = [(ROOT / script).read_text() for script in ("train_rlt.py", "rl_student.py")]
    flags = [
        [
            line
            for line in text.splitlines()
            if 'add_argument("--lr"' in line
            or 'add_argument("--steps"' in line
            or 'add_argument("--beta"' in line
            or 'add_argument("--epsilon' in line
        ]
        for text in texts
    ]
    assert flags[0] == flags[1] and len(flags[0]) == 5
