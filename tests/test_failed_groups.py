"""Questions whose answers all fail: AdaBack and ReLIFT.   python -m pytest tests/test_failed_groups.py"""

import json
import shutil
import signal
import zlib

from rlt import checkpoints, failed_groups, lora, models, rollout
from rlt.errors import UserError
from rlt.failed_groups import PLAIN, AdaBack, ReLift, gather_groups, restore_state, save_state
from rlt.files import read_jsonl
from rlt.grading import grade
from rlt.prompts import Prompts
from rlt.steps import batch_indices

import pytest
import torch
from conftest import call, documented_metrics, ended
from test_scripts import StandIn, stand_in  # noqa: F401 - a fixture

TINY = ("--steps", 2, "--limit", 60, "--prompts-per-step", 3, "--group-size", 4, "--max-new-tokens", 10,
        "--eval-rows", 4, "--explanation-column", "chain")
MODES = {"adaback": ("--failed-groups", "adaback"), "relift": ("--failed-groups", "relift", "--relift-rows", 4)}
GRADER = "rlt.grading.grade_all"


def train(folder, out, mode, *flags):
    scope = call(folder, "rl_student.py", *TINY, *MODES[mode], *flags, "--out", out)
    return scope, read_jsonl(out / "metrics.jsonl")


@pytest.fixture
def lenient(monkeypatch):
    """An untrained student can't be right: grade by a hash of the text, one in nine, so that most groups fail."""
    monkeypatch.setattr(GRADER, lambda task, outputs, rows: [zlib.crc32(text.encode()) % 9 == 0 for text in outputs])


@pytest.fixture
def prompts(toy):
    return Prompts(models.load_tokenizer(str(toy / "runs/toy")))


def toy_rows(toy, n):
    rows = [json.loads(line) for line in (toy / "runs/toy/train.jsonl").read_text().splitlines()[:n]]
    return [row | {"explanation": row["chain"]} for row in rows]


# -- AdaBack's intervals


def test_intervals_by_hand():
    adaback = AdaBack(2, seed=0)
    for share, success, interval in (
        (0.6, 0.0, [0.6, 1.0]),
        (0.8, 0.49, [0.8, 1.0]),  # some right answers, but fewer than half
        (0.9, 0.5, [0.0, 0.9]),  # half counts as success: hi falls, lo starts again
        (0.3, 0.25, [0.3, 0.9]),
        (0.0, 0.0, [0.3, 0.9]),  # a visit without the chain that fails says nothing new
        (0.4, 1.0, [0.0, 0.4]),
        (0.1, 0.0, [0.1, 0.4]),
        (0.0, 0.75, [0.0, 0.0]),  # solved by itself: from here on nothing is revealed
        (0.0, 0.0, [0.0, 0.0]),
    ):
        adaback.update([1], [share], [success])
        assert adaback.intervals == [[0.0, 1.0], interval]
    assert all(adaback.share(1, step) == 0 for step in range(50))


def test_shares_are_drawn_from_the_interval_by_question_and_step_alone():
    one, other = AdaBack(3, seed=4), AdaBack(3, seed=4)
    one.intervals[2] = other.intervals[2] = [0.25, 0.5]
    drawn = [one.share(2, step) for step in range(3000)]
    assert drawn[::-1] == [other.share(2, step) for step in reversed(range(3000))], "in any order, by any process"
    plain = drawn.count(0.0) / len(drawn)
    assert abs(plain - PLAIN) < 0.02
    revealed = [share for share in drawn if share]
    assert 0.25 <= min(revealed) < 0.26 and 0.49 < max(revealed) <= 0.5
    assert abs(sum(revealed) / len(revealed) - 0.375) < 0.01
    assert len({one.share(0, 7), one.share(1, 7), one.share(0, 8), AdaBack(3, seed=5).share(0, 7)}) > 2


def test_the_search_finds_what_must_be_revealed():
    """A policy that needs 0.6 of the chain, and later 0.2, is shown just above that."""
    adaback = AdaBack(1, seed=1)
    for needed in (0.6, 0.2):
        for step in range(200):
            share = adaback.share(0, step)
            adaback.update([0], [share], [float(share >= needed)])
        lo, hi = adaback.intervals[0]
        assert lo <= needed <= hi < needed + 0.02


# -- ReLIFT's buffer


def test_the_buffer_by_hand():
    relift = ReLift(3)
    relift.add([5, 6, 7], [0.0, 0.25, 0.0])
    assert relift.take() == [] and relift.buffer == [5, 7], "one right answer is enough to stay out"
    relift.add([8, 5], [0.0, 0.0])
    assert relift.buffer == [8, 5, 7], "the newest first; a question that fails again moves to the front"
    relift.add([9], [0.0])
    assert relift.take() == [9, 8, 5] and relift.buffer == [7], "what is taken is gone, the oldest waits"
    assert relift.take() == []


# -- ranks and checkpoints


def test_ranks_interleave_the_questions_of_a_step(monkeypatch):
    questions = list(range(10, 16))
    shares = [questions[rank::3] for rank in range(3)]
    monkeypatch.setattr(failed_groups, "all_gather_object", lambda mine: shares)
    assert gather_groups(shares[0]) == questions


def test_the_state_is_restored_to_the_last_bit(tmp_path):
    adaback, relift = AdaBack(2, seed=0), ReLift(2)
    adaback.update([0, 1], [1 / 3, 0.1 + 0.2], [0, 1])
    relift.add([4, 1], [0, 0])
    for one, other in ((adaback, AdaBack(2, seed=0)), (relift, ReLift(2))):
        save_state(one, tmp_path)
        restore_state(other, tmp_path)
        assert vars(one) == vars(other)
    for text in ("", "[]", "{}"):
        (tmp_path / failed_groups.FILE).write_text(text)
        with pytest.raises(UserError, match="can't be read, delete it to go on from the one before: failed_groups"):
            restore_state(adaback, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_same(toy, tmp_path, lenient, mode):
    flags = ("--steps", 6, "--save-every", 3, "--eval-every", 0)
    flags += {"adaback": ("--limit", 3), "relift": ("--relift-rows", 3)}[mode]  # the same three rows again and again
    _, straight = train(toy, tmp_path / "straight", mode, *flags)
    train(toy, tmp_path / "cut", mode, *flags)
    for name in ("final", "step_000006"):
        shutil.rmtree(tmp_path / "cut" / name)
    call(toy, "rl_student.py", "--resume", "--out", tmp_path / "cut")
    assert_same(straight, tmp_path, "straight", "cut")
    if mode == "relift":
        steps_of_sft = [entry["step"] for entry in straight if entry["relift_loss"] is not None]
        assert min(steps_of_sft) < 3 <= max(steps_of_sft), "the optimizer's state of before matters"
        assert straight[2]["relift_buffer"] > 0, "and the buffer"
    else:
        assert len({entry["revealed"] for entry in straight}) == 6


def assert_same(straight, folder, *names):
    cut = read_jsonl(folder / names[1] / "metrics.jsonl")
    for entries in (straight, cut):
        for entry in entries:
            for key in [key for key in entry if key.startswith("t_") or key == "tokens_per_s"]:
                del entry[key]
    assert straight == cut
    last = checkpoints.last_checkpoint(folder / names[0])[1].name
    for file in ("adapter_model.safetensors", failed_groups.FILE):
        one, other = ((folder / name / last / file).read_bytes() for name in names)
        assert one == other, file


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_step_whose_questions_are_noted_is_not_abandoned(toy, tmp_path, monkeypatch, mode):
    """No group has a signal, so the policy update does nothing. A stop right after the failures were noted must not
    note them twice."""
    flags = ("--steps", 4, "--save-every", 0, "--eval-every", 0, "--prompts-per-step", 3, "--limit", 3)
    flags += ("--relift-rows", 3) if mode == "relift" else ()
    _, straight = train(toy, tmp_path / "straight", mode, *flags)
    kind, name = (AdaBack, "update") if mode == "adaback" else (ReLift, "add")
    plain, calls = getattr(kind, name), []

    def stopped(self, *args):
        plain(self, *args)
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(kind, name, stopped)
    with pytest.raises(SystemExit):
        train(toy, tmp_path / "cut", mode, *flags)
    assert checkpoints.last_checkpoint(tmp_path / "cut")[0] == 2
    call(toy, "rl_student.py", "--resume", "--out", tmp_path / "cut")
    assert len(calls) == 4
    assert_same(straight, tmp_path, "straight", "cut")


# -- what is revealed


@pytest.mark.parametrize("share", [0.0, 0.01, 0.34, 0.5, 0.999, 1.0])
def test_what_is_revealed_starts_the_sft_row(toy, prompts, share):
    for row in toy_rows(toy, 20):
        ids, start = prompts.sft_row(row, "student")
        revealed = prompts.revealed_chain(row, share)
        opened = len(prompts.student_prompt(row)) - len(prompts.question_prompt(row))
        m = len(row["chain"].split())  # in the toy a word is a token
        assert prompts.question_prompt(row) + revealed == ids[: start + len(revealed)]
        assert len(revealed) == (opened + int(share * m) if int(share * m) else 0)
    assert row["chain"].split()[:3] == prompts.tokenizer.decode(prompts.revealed_chain(row, 3.5 / m)).split()[-3:]


def test_what_is_revealed_of_a_real_text(qwen_tokenizer):
    """Tokens that hold the chain's last characters and what follows it are never revealed."""
    prompts = Prompts(qwen_tokenizer)
    row = {"question": "What is 2 + 2?", "solution": "4", "explanation": "\nTwo and two.\n\nSo it is four (4).\n"}
    ids, start = prompts.sft_row(row, "student")
    whole = prompts.revealed_chain(row, 1.0)
    assert prompts.question_prompt(row) + whole == ids[: start + len(whole)]
    text = qwen_tokenizer.decode(whole)
    assert text.startswith("<|begin_of_thought|>\n\nTwo and two.\n\nSo it is four (4") and "end_of_thought" not in text
    half = prompts.revealed_chain(row, 0.5)
    assert half == whole[: len(half)] and len(prompts.student_prompt(row)) < start + len(half) < start + len(whole)
    for text, complaint in (("\n \n", "has an empty explanation"), (None, "has an empty explanation"),
                            ("a <|end_of_thought|>", "in its explanation, which a model would take for its own tag")):
        with pytest.raises(UserError, match=complaint):
            prompts.revealed_chain(row | {"explanation": text}, 0.5)


def writes_the_rest(prompts, rows, right):
    """In generate's place: after each prompt the rest of the right answer, or nothing but the end of the turn."""
    answers = [(row, prompts.question_prompt(row), prompts.sft_row(row, "student")[0]) for row in rows]
    calls = []

    def generate(model, tokenizer, prompt_ids, **_):
        calls.append([list(ids) for ids in prompt_ids])
        completions = []
        for i, ids in enumerate(map(list, prompt_ids)):
            row, _, whole = next(answer for answer in answers if ids[: len(answer[1])] == answer[1])
            assert ids == whole[: len(ids)], "a prompt is the question and the start of its right answer"
            rest = whole[len(ids) :] if right(row, i) else [prompts.end_of_turn]
            completions.append(rollout.Completion(rest, [-1.0] * len(rest), True))
        return completions

    return generate, calls


def test_answers_are_what_is_revealed_and_what_is_written(toy, tmp_path, monkeypatch, prompts):
    """The policy writes the rest of the chain, and the grader of the toy finds the whole answer right. Every second
    question fails, and of the others one answer in four."""
    rows = toy_rows(toy, 60)
    odd = {row["question"] for row in rows[1::2]}
    generate, calls = writes_the_rest(prompts, rows, lambda row, i: row["question"] not in odd and i % 4)
    monkeypatch.setattr(rollout, "generate", generate)
    scope, entries = train(toy, tmp_path / "run", "adaback", "--prompts-per-step", 8, "--max-logprob-diff", 100,
                           "--steps", 3, "--max-new-tokens", 60)
    assert set(entries[0]) <= documented_metrics()
    G, batch, texts, revealed = 4, scope["batch"], scope["texts"], scope["revealed"]
    assert len({len(ids) for ids in revealed}) > 2, "the case needs several"
    for i, (row, text, right) in enumerate(zip(batch, texts, scope["right"].tolist(), strict=True)):
        assert revealed[i] == revealed[i - i % G], "a group shares what it reads"
        assert right == grade("toy", text, row) == (row["question"] not in odd and i % G > 0)
        assert text.split()[: len(revealed[i])] == prompts.tokenizer.decode(revealed[i]).split()
    # learned: what was sampled, after all that the policy read
    assert {row["question"] for row in batch} & odd and scope["episodes"]
    for e, i in zip(scope["episodes"], scope["kept"], strict=True):
        assert e.prompt == prompts.question_prompt(e.row) + revealed[i] and e.completion == scope["completions"][i].ids
        assert e.old_logprobs is None and e.hinted_prompt is None, "the only update's ratio is 1"
    # held-out questions are asked as they are
    questions = [prompts.question_prompt(row) for row in rows[-4:]]
    assert calls[0] == questions and calls[-1] == questions
    # the intervals, once more by hand
    intervals = {}
    for step, entry in enumerate(entries):
        shares = []
        for question in batch_indices(56, 8, step, 0):
            by_hand = AdaBack(56, 0)
            by_hand.intervals[question] = intervals.get(question, [0.0, 1.0])
            shares.append(share := by_hand.share(question, step))
            lo, hi = by_hand.intervals[question]
            fails = rows[question]["question"] in odd  # the others are right in three of four
            intervals[question] = [max(lo, share), hi] if fails else [0.0, share]
        assert entry["revealed"] == pytest.approx(sum(shares) / 8)
    assert scope["adaback"].intervals == [intervals.get(question, [0.0, 1.0]) for question in range(56)]


def test_what_is_revealed_is_not_learned(toy, tmp_path, monkeypatch, prompts):
    """The gradient is that of the completions alone, after the prompts: once more by a plain loss."""
    rows = toy_rows(toy, 60)
    generate, _ = writes_the_rest(prompts, rows, lambda row, i: i % 2)
    monkeypatch.setattr(rollout, "generate", generate)
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, weight_decay: torch.optim.SGD(parameters, lr))
    scope, [entry] = train(toy, tmp_path / "run", "adaback", "--steps", 1, "--eval-every", 0, "--max-logprob-diff", 100,
                           "--max-grad-norm", 1e9, "--beta", 0, "--max-new-tokens", 60, "--loss", "dapo")
    model = models.load_lora(str(toy / "runs/toy"), bits=32, device=torch.device("cpu"), seed=0)
    episodes, loss = scope["episodes"], 0.0
    for e in episodes:
        logits = model(input_ids=torch.tensor([e.prompt + e.completion])).logits[0, len(e.prompt) - 1 : -1]
        logprobs = logits[:, : len(prompts.tokenizer)].log_softmax(-1)[range(len(e.completion)), e.completion]
        loss -= e.advantage * (logprobs - logprobs.detach()).exp().sum() / sum(len(e.completion) for e in episodes)
    loss.backward()
    grads = [p.grad.flatten() for p in lora.adapter_parameters(model)]
    assert entry["grad_norm"] == pytest.approx(torch.cat(grads).norm().item(), rel=1e-4) and entry["grad_norm"] > 1e-3


# -- SFT on failed questions


def test_the_sft_step_is_the_one_of_sft_student(toy, tmp_path):
    """On three rows that all fail: the same loss, the same weights; and the loss once more in float64."""
    from safetensors.torch import load_file

    fixed = ("--lr", 0.01, "--warmup-steps", 0, "--lr-steps", 10**9)  # a learning rate that does not fall
    scope, [entry] = train(toy, tmp_path / "run", "relift", "--steps", 1, "--relift-rows", 3, "--eval-every", 0, *fixed)
    chosen = [scope["rows"][i] for i in scope["questions"]]
    assert entry["usable_groups"] == 0 and entry["relift_buffer"] == 0 and scope["chosen"] == scope["questions"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    call(toy, "sft_student.py", "--data", tmp_path / "rows.jsonl", "--batch-size", 3, "--val-rows", 0, "--steps", 1,
         "--model", "toy", "--out", tmp_path / "sft", *fixed)
    [sft] = read_jsonl(tmp_path / "sft/metrics.jsonl")
    assert entry["relift_loss"] == pytest.approx(sft["loss"], rel=1e-6)
    one, other = (load_file(tmp_path / name / "final/adapter_model.safetensors") for name in ("run", "sft"))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-6
    assert max(one[name].abs().max() for name in one if "lora_B" in name) > 1e-3, "a step was taken"

    model = models.load_model(str(toy / "runs/toy"), bits=32, device=torch.device("cpu")).double()
    nll = tokens = 0
    for row in chosen:
        ids, start = scope["prompts"].sft_row(row, "student")
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1, : len(scope["prompts"].tokenizer)]
        nll += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").item()
        tokens += len(ids) - start
    assert entry["relift_loss"] == pytest.approx(nll / tokens, rel=1e-5)


def test_sft_waits_until_enough_questions_have_failed(toy, tmp_path):
    scope, entries = train(toy, tmp_path / "run", "relift", "--steps", 4, "--relift-rows", 5, "--eval-every", 0,
                           "--micro-batch-tokens", 64)
    questions = [batch_indices(60, 3, step, 0) for step in range(4)]
    assert [entry["relift_buffer"] for entry in entries] == [3, 1, 4, 2]
    assert [entry["relift_loss"] is not None for entry in entries] == [False, True, False, True]
    assert set(entries[0]) <= documented_metrics()
    assert entries[1]["relift_loss"] > entries[3]["relift_loss"] > 0
    assert scope["chosen"] == [*questions[3], *questions[2][:2]], "the newest"
    assert scope["relift"].buffer == [questions[2][2], questions[0][2]]


def test_solved_questions_are_not_imitated(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(GRADER, lambda task, outputs, rows: [i % 4 == 0 for i in range(len(outputs))])
    _, entries = train(toy, tmp_path / "run", "relift", "--relift-rows", 1)
    assert all(entry["relift_buffer"] == 0 and entry["relift_loss"] is None for entry in entries)


# -- both, as their user meets them


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_an_explanation_are_named_before_models_are_loaded(toy, tmp_path, monkeypatch, mode):
    def not_yet(*_, **__):
        raise AssertionError("models are loaded before the rows are looked at")

    monkeypatch.setattr(models, "load_lora", not_yet)
    rows = toy_rows(toy, 40)
    del rows[2]["explanation"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--limit", 40, "--prompts-per-step", 4, "--eval-rows", 4, *MODES[mode], "--data", tmp_path / "rows.jsonl",
             "--model", "toy", "--out", tmp_path / "run")
    _, stderr, code = ended(toy, "rl_student.py", *flags)
    [line] = stderr.splitlines()
    assert code == 2 and not (tmp_path / "run").exists()
    assert 'rows.jsonl line 3 has no "explanation" (columns found: question' in line and "--skip-bad-rows" in line
    with pytest.raises(AssertionError, match="models are loaded"):
        call(toy, "rl_student.py", *flags, "--skip-bad-rows")


def test_a_buffer_that_never_fills_is_refused(toy, tmp_path):
    _, stderr, code = ended(toy, "rl_student.py", *TINY, "--failed-groups", "relift", "--relift-rows", 57,
                            "--out", tmp_path / "run")
    assert code == 2 and "--relift-rows 57, but there are 56 rows to train on: lower it" in stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", MODES)
def test_a_dry_run_counts_what_the_mode_adds(toy, tmp_path, mode):
    """AdaBack's prompts are longer by the chain; ReLIFT has a second AdamW."""
    shown = [ended(toy, "rl_student.py", *TINY, *flags, "--micro-batch-tokens", 1, "--dry-run", 80, "--out",
                   tmp_path / "run") for flags in ((), MODES[mode])]
    assert [ending.code for ending in shown] == [0, 0] and not (tmp_path / "run").exists()
    rows, optimizer = ([field(ending.stdout) for ending in shown] for field in (
        lambda text: int(text.partition("rows of up to ")[2].split()[0].replace(",", "")),
        lambda text: float(next(line for line in text.splitlines() if line.startswith("update")).split()[2])))
    assert (rows[1] > rows[0]) and (optimizer[1] > optimizer[0]) == (mode == "relift")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_another_engine_samples_from_the_policy_as_it_is_now(toy, tmp_path, lenient, stand_in, mode):  # noqa: F811
    """Prompts fit the length that the engine is made for, and it gets the adapter after the SFT."""
    _, entries = train(toy, tmp_path / "run", mode, "--steps", 4, "--engine", "vllm", "--lr", 2e-2, "--warmup-steps", 0)
    [engine] = StandIn.made
    assert engine.loads == 5
    assert all(entry["sampler_logprob_diff"] < 1e-4 for entry in entries)
    if mode == "relift":
        assert any(entry["relift_loss"] for entry in entries[:-1])
