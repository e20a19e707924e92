"""The reward against sums by hand, float64 and slow loops.   python -m pytest tests/test_rewards.py"""

import copy
import gc
import math
import runpy
import shutil
import subprocess
import sys
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

import rewards
from rewards import (
    _CHECKED,
    Row,
    UnsupportedModel,
    check_model,
    decoder,
    equal_but_for_rounding,
    implementation,
    micro_batches,
    rlt_reward,
    score_explanations,
    segment_stats,
    token_logprobs,
    token_stats,
)

V, REAL = 97, 83  # columns of the head, and of the tokenizer: primes, so that no other size looks like them
ROUNDED = 96  # columns of a chunk of logits: REAL, rounded up to 16


# ----------------------------------------------------------------------------------------------------------
# Tokens to a number a sequence


def test_reward_is_the_equations_by_hand():
    # row 0: score -0.2 mean, -0.4 min; kl 0.4 mean, 0.6 max.  row 1: one token each
    got = rlt_reward(
        torch.tensor([-0.1, -0.4, -0.1, -2.0]), [3, 1], torch.tensor([0.2, 0.6, 1.5]), [2, 1], lam=3.0, alpha=0.01
    )
    torch.testing.assert_close(got.score, torch.tensor([-0.204, -2.02]))
    torch.testing.assert_close(got.kl, torch.tensor([0.406, 1.515]))
    torch.testing.assert_close(got.reward, torch.tensor([-0.204 - 1.218, -2.02 - 4.545]))
    assert [x.tolist() for x in got[3:]] == [
        pytest.approx(x) for x in ([-0.2, -2.0], [-0.4, -2.0], [0.4, 1.5], [0.6, 1.5])
    ]


def test_lambda_and_alpha_weigh_what_they_say():
    args = torch.tensor([-1.0, -3.0]), [2], torch.tensor([1.0, 5.0]), [2]
    assert rlt_reward(*args, lam=0.0, alpha=0.0).reward.item() == -2.0
    assert rlt_reward(*args, lam=2.0, alpha=0.0).reward.item() == -2.0 - 2 * 3.0
    assert rlt_reward(*args, lam=2.0, alpha=0.5).reward.item() == -3.5 - 2 * 5.5
    assert rlt_reward(*args).reward.item() == rlt_reward(*args, lam=3.0, alpha=0.01).reward.item()


def test_segments_do_not_see_each_other():
    values, lengths = torch.randn(60), [1, 20, 7, 32]
    together = segment_stats(values, lengths)
    for i, part in enumerate(values.split(lengths)):
        alone = segment_stats(part, [len(part)])
        assert all(x[i] == y[0] for x, y in zip(together, alone, strict=True))
        assert part[together.argmin[i]] == together.min[i] and part[together.argmax[i]] == together.max[i]


def test_the_first_of_equal_extremes_is_the_position():
    got = segment_stats(torch.tensor([9.0, 2.0, 5.0, 2.0, 5.0, 3.0]), [1, 5])
    assert got.argmin.tolist() == [0, 0] and got.argmax.tolist() == [0, 1]


@pytest.mark.parametrize(
    "solution, thought, message",
    [
        ([2, 0], [1, 1], "row 1 has an empty solution"),
        ([1, 1], [0, 2], "row 0 has an empty thought"),
        ([1, 2], [1, 1], "solution has 2 tokens, but its lengths add up to 3"),
        ([], [], "solution has no rows"),
    ],
)
def test_impossible_lengths_name_the_row(solution, thought, message):
    with pytest.raises(ValueError, match=message):
        rlt_reward(torch.zeros(2), solution, torch.zeros(2), thought)


def test_solutions_and_thoughts_are_as_many():
    """One solution would be broadcast over all thoughts."""
    with pytest.raises(ValueError, match="1 solutions and 2 thoughts, expected one of each"):
        rlt_reward(torch.zeros(2), [2], torch.zeros(2), [1, 1])


# ----------------------------------------------------------------------------------------------------------
# Logits to a number a token


def oracle(teacher, student, ids, t_temperature=1.0, s_temperature=1.0):
    """The definitions in float64: log_softmax, kl_div, and -inf for the columns a side lacks."""
    width = max(teacher.shape[1], student.shape[1])
    t, s = (
        F.pad(x.double() / temperature, (0, width - x.shape[1]), value=-math.inf).log_softmax(1)
        for x, temperature in ((teacher, t_temperature), (student, s_temperature))
    )
    rows = torch.arange(len(ids))
    entropy = -(t.exp() * t).nan_to_num(nan=0.0).sum(1)
    terms = torch.where(t == -math.inf, 0.0, t.exp() * (t - s))  # a teacher's zero costs nothing, whatever s is
    return terms.sum(1), t[rows, ids], s[rows, ids], entropy


def assert_exact(got, want, tolerance=1e-6):
    for name, x, y in zip(got._fields, got, want, strict=True):
        assert x.dtype == torch.float32
        error = torch.where(x == y, 0.0, (x - y).abs()) / y.abs().clamp(min=1)  # inf equals inf
        assert error.max() <= tolerance, f"{name}: {error.max():.1e}"


def logits(n, v, noise=1.0, spread=4.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, v, generator=generator) * spread
    student = teacher + torch.randn(n, v, generator=generator) * noise
    return teacher, student, torch.randint(v, (n,), generator=generator)


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.7, 0.7), (0.7, 1.3)])
@pytest.mark.parametrize(
    "n, v, noise, spread",
    [(1, 1, 1, 1), (1, 7, 1, 4), (5, 1009, 1, 4), (3, 33_333, 0.01, 4), (3, 5000, 2, 10), (2, 151_936, 0.5, 3)],
)
def test_token_stats_is_float64_to_a_millionth(n, v, noise, spread, temperatures):
    teacher, student, ids = logits(n, v, noise, spread)
    got = token_stats(teacher, student, ids, teacher_temperature=temperatures[0], student_temperature=temperatures[1])
    assert_exact(got, oracle(teacher, student, ids, *temperatures))
    alone = token_logprobs(teacher, ids, temperature=temperatures[0])
    assert torch.equal(alone[0], got.teacher_logprob) and torch.equal(alone[1], got.teacher_entropy)


@pytest.mark.parametrize("offset", [(1e4, 1e4), (1e4, -1e4), (40.0, -40.0)])
def test_offsets_cost_no_digits(offset):
    teacher, student, ids = logits(4, 3001)
    teacher, student = teacher + offset[0], student + offset[1]
    got = token_stats(teacher, student, ids, teacher_temperature=0.7, student_temperature=0.9)
    assert_exact(got, oracle(teacher, student, ids, 0.7, 0.9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32(dtype):
    teacher, student, ids = logits(4, 3001)
    teacher, student = teacher.to(dtype), student.to(dtype)
    assert_exact(token_stats(teacher, student, ids), oracle(teacher, student, ids))


def test_float64_logits_stay_float64():
    teacher, student, ids = (x.double() if x.is_floating_point() else x for x in logits(4, 3001))
    for x, y in zip(token_stats(teacher, student, ids), oracle(teacher, student, ids), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_equal_models_have_no_kl_at_all():
    teacher, _, ids = logits(8, 5003, spread=10)
    assert (token_stats(teacher, teacher, ids).kl == 0).all()
    assert (token_stats(teacher, teacher.clone() + 8, ids).kl.abs() < 1e-6).all()


def test_minus_infinity_on_both_sides_or_the_teachers_costs_nothing():
    teacher, student, ids = logits(4, 1001)
    ids[:] = 500
    teacher[:, :300] = -math.inf
    student[:, :200] = -math.inf
    teacher[2, 501:] = -math.inf
    got = token_stats(teacher, student, ids, teacher_temperature=0.7)
    assert_exact(got, oracle(teacher, student, ids, 0.7))
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("gap", [0.0, 50.0, 500.0, 1e4])
def test_where_only_the_student_has_minus_infinity_kl_is_infinite(gap):
    """Also where the teacher's probability is above 0 but not in float32."""
    teacher, student, ids = logits(3, 1001)
    teacher[1, 17] = teacher[1].max() - gap
    student[1, 17] = -math.inf
    kl = token_stats(teacher, student, ids).kl
    assert kl[1] == math.inf and kl[[0, 2]].isfinite().all()


def test_a_row_without_a_distribution_is_nan_and_its_neighbours_are_not():
    teacher, student, ids = logits(3, 101)
    teacher[1] = -math.inf
    student[2] = math.nan
    kl, logprob, student_logprob, entropy = token_stats(teacher, student, ids)
    assert kl.isnan().tolist() == [False, True, True] and student_logprob.isnan().tolist() == [False, False, True]
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("wide", ["teacher", "student"])
def test_columns_beyond_vocab_are_not_there(wide):
    """Bug class: 152,064 columns against 151,936, padded with whatever the head holds."""
    teacher, student, ids = logits(4, 1000)
    junk = torch.randn(4, 128) * 50
    padded = {"teacher": teacher, "student": student}
    padded[wide] = torch.cat([padded[wide], junk], 1)
    got = token_stats(padded["teacher"], padded["student"], ids, vocab=1000)
    assert all(torch.equal(x, y) for x, y in zip(got, token_stats(teacher, student, ids), strict=True))


def test_without_vocab_a_missing_column_is_minus_infinity():
    teacher, student, ids = logits(4, 1000)
    narrow = token_stats(teacher[:, :900], student, ids % 900)
    assert_exact(narrow, oracle(teacher[:, :900], student, ids % 900))
    assert (
        narrow.kl.isfinite().all()
        and (narrow.student_logprob < token_stats(teacher[:, :900], student[:, :900], ids % 900).student_logprob).all()
    )
    assert (token_stats(teacher, student[:, :900], ids).kl == math.inf).all()


def test_an_id_without_a_column_has_no_probability():
    teacher, student, _ = logits(3, 50)
    got = token_stats(teacher, student[:, :40], torch.tensor([39, 45, -1]))
    assert got.teacher_logprob.isfinite().tolist() == [True, True, False]
    assert got.student_logprob.isfinite().tolist() == [True, False, False]


def test_strided_logits_and_ids():
    teacher, student, _ = logits(8, 300)
    ids = torch.randint(100, (4, 2))[:, 1]
    t, s = teacher[::2, ::3], student.t()[::3, ::2].t()
    assert_exact(token_stats(t, s, ids), oracle(t, s, ids))


def test_no_rows_are_no_numbers():
    assert [x.shape for x in token_stats(torch.empty(0, 9), torch.empty(0, 9), torch.empty(0).long())] == [(0,)] * 4


def test_sampled_differences_average_to_the_exact_kl():
    """KL = E[log p_teacher - log p_student] over the teacher's tokens: 200,000 draws, 5 standard errors."""
    teacher, student, _ = logits(1, 40, noise=1.0, spread=1.5)
    draws = torch.multinomial(
        teacher[0].softmax(0), 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    stats = token_stats(teacher.expand(40, -1), student.expand(40, -1), torch.arange(40))
    sampled = (stats.teacher_logprob - stats.student_logprob)[draws]
    assert abs(sampled.mean() - stats.kl[0]) < 5 * sampled.std() / math.sqrt(len(draws))
    assert sampled.min() < 0 < stats.kl[0] < sampled.max()  # and yet no single draw is the KL


def test_token_stats_in_torch_has_the_gradient_of_the_kl():
    teacher, student, ids = (x.double() if x.is_floating_point() else x for x in logits(3, 11))
    teacher[0, 3] = student[0, 3] = -40.0
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: token_stats(t, student, ids, teacher_temperature=0.7).kl, (teacher,))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t, s, i: token_stats(t, s, i, teacher_temperature=0.0), "temperature is 0.0"),
        (lambda t, s, i: token_stats(t, s, i[:2]), r"logits are \(4, 9\) and token_ids \(2,\)"),
        (lambda t, s, i: token_logprobs(t[None], i), r"expected \(N, V\)"),
        (lambda t, s, i: token_logprobs(t, i, impl="cuda"), "impl is 'cuda', expected"),
    ],
)
def test_wrong_calls_say_what_came_and_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call(*logits(4, 9))


def test_auto_is_never_a_silent_detour(monkeypatch, capsys):
    implementation.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert [implementation("auto", "cpu") for _ in range(3)] == ["torch"] * 3
    assert capsys.readouterr().err == "rewards.py: torch on cpu\n"
    with pytest.raises(RuntimeError, match="needs a GPU, not cpu"):
        token_logprobs(*logits(2, 9)[::2], impl="triton")
    monkeypatch.setattr("rewards.triton", None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        implementation("auto", "cuda")


# ----------------------------------------------------------------------------------------------------------
# Models to rewards


def tiny(seed, **config):
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            **config,
        )
    )
    return model.eval()


@pytest.fixture(scope="module")
def pair():
    return tiny(0), tiny(1)


def make_rows(thoughts=(5, 1, 12, 3, 8), ends=(1, 0, 2, 1, 1)):
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(REAL, (n,), generator=generator).tolist()

    return [
        Row(ids(2 + i), ids(n), ids(m), ids(4 - i % 2), ids(i % 3), ids(1 + 2 * i))
        for i, (n, m) in enumerate(zip(thoughts, ends, strict=True))
    ]


@torch.no_grad()
def slow_logprobs(model, sequence, start, stop, temperature, columns=REAL):
    """(stop - start, columns) log-probs that predict sequence[start:stop]: full logits, float64."""
    full = model(torch.tensor([sequence])).logits[0, start - 1 : stop - 1, :columns]
    return (full.double() / temperature).log_softmax(-1)


def slow_score(teacher, student, row, lam, alpha, kl, temperature, columns=REAL):
    p, q, n = len(row.teacher_prompt), len(row.student_prompt), len(row.thought)
    seen = row.student_prompt + row.thought + row.bridge + row.solution
    t = slow_logprobs(teacher, row.teacher_prompt + row.thought, p, p + n, temperature, columns)
    s = slow_logprobs(student, seen, q, q + n, temperature, columns)
    solution = slow_logprobs(student, seen, len(seen) - len(row.solution), len(seen), temperature, columns)
    solution = solution.gather(1, torch.tensor(row.solution)[:, None])
    thought = torch.tensor(row.thought)[:, None]
    token_kl = (t.exp() * (t - s)).sum(1) if kl == "exact" else (t - s).gather(1, thought)
    return (solution.mean() + alpha * solution.min() - lam * (token_kl.mean() + alpha * token_kl.max())).item()


@pytest.mark.parametrize("kl", ["exact", "sampled"])
@pytest.mark.parametrize("lam, alpha, temperature", [(3.0, 0.01, 0.7), (1.0, 0.5, 1.0)])
def test_scores_are_those_of_one_sequence_at_a_time(pair, kl, lam, alpha, temperature):
    """kl="sampled" with lambda 3, alpha 0.01 and 0.7 on both models is the released code's own formula."""
    rows = make_rows()
    scored = score_explanations(*pair, rows, lam=lam, alpha=alpha, kl=kl, temperature=temperature, vocab=REAL)
    want = [slow_score(*pair, row, lam, alpha, kl, temperature) for row in rows]
    torch.testing.assert_close(scored.reward.reward, torch.tensor(want), rtol=1e-5, atol=1e-5)


def bigram(table):
    """A model that sees the last token alone: row i of the table (n, n) is the distribution of what follows token i."""
    n = len(table)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=n, hidden_size=n, intermediate_size=n, num_hidden_layers=0,
                                         num_attention_heads=1, num_key_value_heads=1, rms_norm_eps=0.0))
    model.model.embed_tokens.weight.data = torch.eye(n)
    model.lm_head.weight.data = torch.tensor(table).log().T / n**0.5  # the norm multiplies by the root of n
    return model.eval()


@pytest.mark.parametrize("kl, kl_mean, kl_max", [("exact", 0.25, 0.25), ("sampled", 0.0, 1.0)])
def test_a_row_by_hand(kl, kl_mean, kl_max):
    """In bits. Probabilities are powers of 2, so each token's numbers are read off the two tables."""
    even, steep, rising = [1 / 4] * 4, [1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    teacher, student = bigram([even, even, steep, even]), bigram([steep, even, rising, even])
    row = Row(teacher_prompt=[2], thought=[0, 0], teacher_end=[3], student_prompt=[3], bridge=[2], solution=[3, 1])
    scored, bit = score_explanations(teacher, student, [row], lam=3.0, alpha=0.1, kl=kl), math.log(2)
    # token 0 after 2: steep against even; then after 0: even against steep
    numbers = {
        "token_kl_exact": [1 / 2 - 2 / 8, -1 / 4 + 2 / 4], "token_log_ratio": [-1 + 2, -2 + 1],
        "old_logprobs": [-1, -2, -2], "entropies": [1.75, 2, 2], "solution_logprobs": [-1, -2],
    }
    numbers["token_kl"] = numbers["token_kl_exact" if kl == "exact" else "token_log_ratio"]
    for name, want in numbers.items():
        torch.testing.assert_close(getattr(scored, name), torch.tensor(want) * bit, rtol=0, atol=1e-5)
    assert scored.reward.reward.item() / bit == pytest.approx(-1.5 - 0.1 * 2 - 3 * (kl_mean + 0.1 * kl_max), abs=1e-5)


def test_exact_kl_and_log_ratio_are_measured_whichever_is_the_reward(pair):
    exact, sampled = (score_explanations(*pair, make_rows(), kl=kl, temperature=0.7, vocab=REAL)
                      for kl in ("exact", "sampled"))
    assert torch.equal(exact.token_kl, exact.token_kl_exact) and torch.equal(sampled.token_kl, sampled.token_log_ratio)
    assert torch.equal(exact.token_kl_exact, sampled.token_kl_exact)
    assert torch.equal(exact.token_log_ratio, sampled.token_log_ratio)
    assert (exact.token_kl_exact >= 0).all() and exact.token_log_ratio.min() < 0
    for name in ("old_logprobs", "entropies", "solution_logprobs"):
        assert torch.equal(getattr(exact, name), getattr(sampled, name))


def test_old_logprobs_and_entropies_cover_all_that_was_sampled(pair):
    rows = make_rows()
    scored = score_explanations(*pair, rows, temperature=1.3, vocab=REAL)
    assert scored.completion_lengths == [6, 1, 14, 4, 9] and scored.thought_lengths == [5, 1, 12, 3, 8]
    for row, logprobs, entropies in zip(
        rows,
        scored.old_logprobs.split(scored.completion_lengths),
        scored.entropies.split(scored.completion_lengths),
        strict=True,
    ):
        completion, p = row.thought + row.teacher_end, len(row.teacher_prompt)
        want = slow_logprobs(pair[0], row.teacher_prompt + completion, p, p + len(completion), 1.3)
        torch.testing.assert_close(
            logprobs.double(), want.gather(1, torch.tensor(completion)[:, None])[:, 0], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(entropies.double(), -(want.exp() * want).sum(1), rtol=1e-5, atol=1e-5)


def tensors(scored):
    return [x for x in (*scored.reward, *scored[1:]) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    "size",
    [
        dict(micro_batch_tokens=1),
        dict(micro_batch_tokens=45),
        dict(head_chunk=1),
        dict(head_chunk=7, micro_batch_tokens=60),
    ],
)
def test_numbers_do_not_depend_on_micro_batches_or_chunks(pair, size):
    """A row alone, or beside a longer one, or in another order, is the same row."""
    rows = make_rows()
    whole, parts = (score_explanations(*pair, rows, vocab=REAL, **x) for x in ({}, size))
    for x, y in zip(tensors(whole), tensors(parts), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    back = score_explanations(*pair, rows[::-1], vocab=REAL, **size)
    torch.testing.assert_close(back.reward.reward.flip(0), whole.reward.reward, rtol=1e-5, atol=1e-5)
    assert [len(x) for x in back[5:8]] == [5] * 3 and back.solution_lengths == [9, 7, 5, 3, 1]


def test_micro_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 100, 7, 7, 3, 30, 31]
    batches = list(micro_batches(lengths, 62))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= 62 for batch in batches)
    assert batches[:2] == [[1], [6, 5]] and list(micro_batches([], 62)) == []


def test_a_thought_without_tokens_counts_as_one(pair):
    rows = make_rows(thoughts=(5, 0, 3), ends=(1, 2, 0))
    scored = score_explanations(*pair, rows, lam=3.0, alpha=0.01, vocab=REAL)
    assert scored.reward.kl_mean[1] == scored.reward.kl_max[1] == 1 and scored.reward.kl[1].item() == pytest.approx(
        1.01
    )
    assert scored.thought_lengths == [5, 0, 3] and len(scored.token_kl) == 8 and scored.completion_lengths == [6, 2, 3]
    for i in (0, 2):
        assert scored.reward.reward[i].item() == pytest.approx(
            slow_score(*pair, rows[i], 3.0, 0.01, "exact", 1.0), abs=1e-5
        )
    only_empty = score_explanations(*pair, [rows[1]], vocab=REAL)
    torch.testing.assert_close(only_empty.reward.reward[0], scored.reward.reward[1])


def test_wrong_rows_and_settings_stop_before_the_models_run(pair):
    rows = make_rows()
    with pytest.raises(ValueError, match="row 2 has an empty solution"):
        score_explanations(None, None, [*rows[:2], rows[2]._replace(solution=[])])
    with pytest.raises(ValueError, match="there are no rows to score"):
        score_explanations(None, None, [])
    with pytest.raises(ValueError, match="kl is 'k3', expected 'exact' or 'sampled'"):
        score_explanations(None, None, rows, kl="k3")
    with pytest.raises(ValueError, match="token ids run from .* expected 0 to 9"):
        score_explanations(*pair, rows, vocab=10)


@pytest.mark.parametrize("field", ["teacher_prompt", "thought", "teacher_end", "student_prompt", "bridge", "solution"])
@pytest.mark.parametrize("wrong", [-1, V, 10**6])
def test_ids_that_a_model_lacks_are_named_wherever_they_are(pair, field, wrong):
    """On a GPU they would end the process."""
    row = make_rows()[0]
    row = row._replace(**{field: [*getattr(row, field), wrong]})
    with pytest.raises(ValueError, match=f"token ids run from .*{wrong}.*, expected 0 to {V - 1}"):
        score_explanations(*pair, [row])


def test_where_a_head_has_fewer_rows_than_vocab_both_are_cut(pair):
    """A tokenizer may have an id that one model lacks, or both do."""
    short = copy.deepcopy(pair[1])
    short.resize_token_embeddings(REAL)
    rows, wanted = make_rows(), score_explanations(*pair, make_rows(), vocab=REAL)
    for models, vocab in (((pair[0], short), V), ((short, short), V + 5)):
        if models[0] is short:
            wanted = score_explanations(short, short, rows, vocab=REAL)
        torch.testing.assert_close(score_explanations(*models, rows, vocab=vocab).reward, wanted.reward)


def test_float64_models_are_scored_in_float64_and_reported_in_float32(pair):
    double = [copy.deepcopy(model).double() for model in pair]
    a, b = (score_explanations(*models, make_rows(), vocab=REAL) for models in (pair, double))
    assert {x.dtype for x in tensors(b)} == {torch.float32} and len(tensors(b)) == 13
    torch.testing.assert_close(a.reward.reward, b.reward.reward, rtol=1e-5, atol=1e-5)


def test_plain_tuples_are_rows_too(pair):
    rows = make_rows()
    a, b = (score_explanations(*pair, x, vocab=REAL) for x in (rows, [tuple(map(tuple, row)) for row in rows]))
    assert torch.equal(a.reward.reward, b.reward.reward)


class Watch(TorchDispatchMode):
    """Every tensor with a vocabulary in it, by its other size, and the rows that went through the head."""

    def __init__(self, *models):
        super().__init__()
        self.heads = {model.lm_head.weight.data_ptr() for model in models}
        self.rows, self.matmuls = [0], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if (
                isinstance(x, torch.Tensor)
                and x.shape[-1:] in ((REAL,), (V,), (ROUNDED,))
                and x.data_ptr() not in self.heads
            ):
                self.rows.append(x.numel() // x.shape[-1])
                if function is torch.ops.aten.mm.out:
                    self.matmuls.append((len(x), x.shape[-1]))
        return out


def test_only_needed_rows_go_through_the_heads_in_chunks(pair):
    rows = make_rows()
    for model in pair:
        check_model(model)  # once, with three tokens
    with Watch(*pair) as watch:
        score_explanations(*pair, rows, vocab=REAL, head_chunk=4, micro_batch_tokens=40)
    thought, end, solution = (sum(len(getattr(row, x)) for row in rows) for x in ("thought", "teacher_end", "solution"))
    assert sum(n for n, _ in watch.matmuls) == 2 * thought + end + solution  # each token once per model that reads it
    assert {columns for _, columns in watch.matmuls} == {REAL} and max(n for n, _ in watch.matmuls) == 4
    assert max(watch.rows) <= 4


def test_lora_teachers_are_scored_with_their_adapter(pair):
    base, student = copy.deepcopy(pair[0]), pair[1]
    teacher = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).eval()
    rows = make_rows()
    with_adapter = score_explanations(teacher, student, rows, vocab=REAL)
    want = [slow_score(teacher, student, row, 3.0, 0.01, "exact", 1.0) for row in rows]
    torch.testing.assert_close(with_adapter.reward.reward, torch.tensor(want), rtol=1e-5, atol=1e-5)
    with teacher.disable_adapter():
        without = score_explanations(teacher, student, rows, vocab=REAL)
    torch.testing.assert_close(without.reward.reward, score_explanations(*pair, rows, vocab=REAL).reward.reward)
    assert (with_adapter.reward.reward - without.reward.reward).abs().min() > 1e-3


def test_a_four_bit_student_is_scored_through_its_unquantised_head(pair, tmp_path, monkeypatch):
    import bitsandbytes.nn.modules as bnb

    monkeypatch.setattr(bnb, "has_avx512bf16", lambda: False)  # else a CPU repacks the weights and rounds to bf16
    pair[1].save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    student = Qwen2ForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bit, dtype=torch.float32, device_map={"": "cpu"}
    )
    assert type(student.model.layers[0].mlp.up_proj) is bnb.Linear4bit
    rows = make_rows()
    got = score_explanations(pair[0], student, rows, vocab=REAL).reward.reward
    want = [slow_score(pair[0], student, row, 3.0, 0.01, "exact", 1.0) for row in rows]
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-5)
    assert (got - score_explanations(*pair, rows, vocab=REAL).reward.reward).abs().max() > 1e-3


def test_teacher_and_student_may_differ_in_padding_columns(pair):
    """vocab cuts both heads, so a student with fewer padding columns gives the same numbers."""
    narrow = copy.deepcopy(pair[1])
    narrow.lm_head.weight = torch.nn.Parameter(narrow.lm_head.weight[:93].clone())
    a, b = (score_explanations(pair[0], student, make_rows(), vocab=REAL) for student in (pair[1], narrow))
    torch.testing.assert_close(a.reward.reward, b.reward.reward)
    assert (score_explanations(pair[0], narrow, make_rows()).reward.kl == math.inf).all()  # and without vocab, honest


# ----------------------------------------------------------------------------------------------------------
# Which models are read right


def small(architecture, **changes):
    """A random model of transformers with an untied head, small, and large enough in its weights to tell."""
    shape = dict(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    config = getattr(transformers, f"{architecture}Config")(**{**shape, **changes})
    model = (getattr(transformers, f"{architecture}ForCausalLM", None)
             or getattr(transformers, f"{architecture}LMHeadModel"))(config)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1 or p is model.lm_head.bias:
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return model.eval()


GPT2 = dict(n_embd=32, n_layer=2, n_head=4)
ZOO = [  # architecture, what differs from the shape above, whether sequences are packed
    ("Llama", {}, True),
    ("Qwen3", {"head_dim": 8}, True),
    ("Gemma", {"head_dim": 8}, True),
    ("Phi", {}, True),  # its head has a bias
    ("GPT2", GPT2, True),  # learned positions
    ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}, True),  # learned positions, with an offset
    ("Granite", {}, True),  # a multiplier that is 1
    ("Mixtral", {"num_local_experts": 4}, True),
    ("Mistral", {"sliding_window": 4}, False),
    ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None, "sliding_window": 4}, False),
    ("Bloom", {"n_layer": 2, "n_head": 4}, False),  # distances, no positions
    ("GPTJ", {**GPT2, "rotary_dim": 4}, False),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}, False),  # looks back without attention
]


@pytest.mark.parametrize("architecture, changes, packs", ZOO, ids=[entry[0] for entry in ZOO])
def test_log_probs_are_the_models_own_for_any_architecture(architecture, changes, packs, capsys):
    model = small(architecture, **changes)
    rows = [row._replace(thought=[], bridge=[]) for row in make_rows()]
    want = []
    for row in rows:  # before the model is given another attention
        n = len(row.student_prompt)
        logprobs = slow_logprobs(model, row.student_prompt + row.solution, n, n + len(row.solution), 1.0)
        want.append(logprobs.gather(1, torch.tensor(row.solution)[:, None])[:, 0])
    assert check_model(model) is packs
    assert ("reads sequences one by one" in capsys.readouterr().err) is not packs
    got = score_explanations(model, model, rows, vocab=REAL).solution_logprobs
    torch.testing.assert_close(got.double(), torch.cat(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0], ids=["small logits", "large logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture, changes", [
    ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}),
    ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 1000.0}),  # without effect on logits of usual size
    ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 1e5}),
])
def test_a_head_that_caps_its_logits_is_refused(architecture, changes, size, dtype):
    """However small the logits are that the model makes today, for which a soft cap at 30 does nothing."""
    model = small(architecture, **changes).to(dtype).train()
    with torch.no_grad():
        model.get_output_embeddings().weight *= size
    with pytest.raises(UnsupportedModel, match=f"{architecture}ForCausalLM does more to its logits"):
        score_explanations(model, model, make_rows(), vocab=REAL)
    assert model.training and not model.get_decoder()._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture, changes, scale", [
    ("Granite", {"logits_scaling": 6.0}, 1 / 6),
    ("Cohere", {"logit_scale": 0.0625}, 1 / 16),
    ("Cohere", {"logit_scale": 1.01}, 1.01),  # less than bfloat16 rounds logits by
    ("MiniCPM3", {"dim_model_base": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "num_key_value_heads": 4}, 0.5),
])
def test_a_number_that_multiplies_all_logits_is_part_of_the_head(architecture, changes, scale, dtype):
    model, rows = small(architecture, **changes).to(dtype), make_rows()
    assert check_model(model)
    assert _CHECKED[model].logit_scale == pytest.approx(scale, rel=1e-12), "not as rounded as its type"
    want = []
    for row in rows:
        n, ids = len(row.teacher_prompt), row.teacher_prompt + row.thought + row.teacher_end
        states = decoder(model)(torch.tensor([ids[:-1]]), use_cache=False).last_hidden_state[0, n - 1 :].double()
        logits = scale * (states @ model.lm_head.weight[:REAL].double().T)
        want.append(logits.log_softmax(1).gather(1, torch.tensor(ids[n:])[:, None])[:, 0])
    got = score_explanations(model, model, rows, vocab=REAL).old_logprobs
    torch.testing.assert_close(got.double(), torch.cat(want), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


def test_a_number_and_a_bias_are_refused():
    model = small("Cohere", logit_scale=0.5)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(V))
    with pytest.raises(UnsupportedModel, match="CohereForCausalLM does more to its logits"):
        check_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_the_head_counts(dtype):
    model, [row, *_] = small("Phi").to(dtype), make_rows()
    with torch.no_grad():
        model.lm_head.bias *= 20
        seen = torch.tensor([row.student_prompt + row.thought + row.bridge])
        states = model.get_decoder()(seen, use_cache=False).last_hidden_state[0, -1].double()
    weight, bias = model.lm_head.weight[:REAL].double(), model.lm_head.bias[:REAL].double()
    assert (bias > 1).any()
    got = score_explanations(model, model, [row], vocab=REAL).solution_logprobs
    want = (weight @ states + bias).log_softmax(0)[row.solution]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4)


def test_other_heads_and_adapters_are_refused(pair):
    rows = make_rows()
    base = copy.deepcopy(pair[0])
    score_explanations(base, pair[1], rows)  # also one that has been used without
    adapted = get_peft_model(base, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(UnsupportedModel, match="the head of Qwen2ForCausalLM is a peft.*Linear.* leaves lm_head alone"):
        score_explanations(adapted, pair[1], rows)
    prefix = get_peft_model(copy.deepcopy(pair[0]), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModel, match="prompt-learning"):
        score_explanations(pair[0], prefix, rows)
    shape = dict(vocab_size=V, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, tie_word_embeddings=False)
    encoder_decoder = transformers.T5ForConditionalGeneration(transformers.T5Config(**shape))
    with pytest.raises(UnsupportedModel, match="T5For.* can't be checked .* expected a decoder-only"):
        score_explanations(encoder_decoder, pair[1], rows)
    assert issubclass(UnsupportedModel, ValueError)


class Shifted(torch.nn.Module):
    """A layer that mixes in the state of the token before, wherever a sequence may begin: packing leaks through it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states, **options):
        states = states + F.pad(states, (0, 0, 1, 0))[:, :-1]
        return self.layer(states, **options)


class Strict(torch.nn.Module):
    """A layer that does not know the argument that packing passes on."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                position_embeddings=None):
        return self.layer(states, attention_mask=attention_mask, position_embeddings=position_embeddings)


class Forgetful(Strict):
    """A layer that loses the argument on the way: its attention has a mask of no columns."""

    def forward(self, states, packed=None, **options):
        return self.layer(states, **options)


@pytest.mark.parametrize("layer", [Shifted, Strict, Forgetful])
@pytest.mark.parametrize("at", [0, 1])
def test_a_model_whose_packing_leaks_or_crashes_is_read_one_by_one(layer, at, capsys):
    model, student, rows = tiny(0), tiny(1), make_rows()
    model.model.layers[at] = layer(model.model.layers[at])
    scored = score_explanations(model, student, rows, vocab=REAL)
    want = [slow_score(model, student, row, 3.0, 0.01, "exact", 1.0) for row in rows]
    torch.testing.assert_close(scored.reward.reward, torch.tensor(want), rtol=1e-5, atol=1e-5)
    assert check_model(model) is False and check_model(student) is True
    assert model.config._attn_implementation == "sdpa", "as it came"
    assert capsys.readouterr().err.count("reads sequences one by one") == 1, "said once"


def test_equal_but_for_rounding_by_hand():
    """Relative to a row's largest value: 0, 1/4 and 2. In float32 the worst row decides, in 16 bits most rows."""
    theirs = torch.tensor([[1.0, -2.0], [4.0, 0.0], [0.5, 0.5]])
    ours = theirs + torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    cases = (0.2, False, False), (0.25, False, True), (1.9, False, True), (2.0, True, True)
    for tolerance, float32, bfloat16 in cases:
        assert equal_but_for_rounding(ours, theirs, tolerance, 0.0, torch.float32) is float32
        assert equal_but_for_rounding(ours.bfloat16(), theirs, 0.0, tolerance, torch.bfloat16) is bfloat16
    assert not equal_but_for_rounding(torch.cat([ours[:1]] * 2), theirs[[0, 2]], 0.0, 0.1, torch.float16), "half is few"
    ours[2, 0] = torch.nan
    for dtype in (torch.float32, torch.bfloat16):
        assert not equal_but_for_rounding(ours, theirs, 9.0, 9.0, dtype)
    assert equal_but_for_rounding(torch.zeros(1, 2), torch.zeros(1, 2), 0.0, 0.0, torch.float32)


@pytest.mark.parametrize("dtype, tokens, packs", [
    (torch.bfloat16, 5, True), (torch.bfloat16, 9, False), (torch.float32, 5, False), (torch.float32, 0, True)])
def test_rounding_of_some_tokens_does_not_stop_packing(dtype, tokens, packs, monkeypatch, capsys):
    """In bfloat16 an adapter can make some tokens of a sequence (13 in the check) depend on the order of sums, which
    packing changes. To read such a model one by one would take ten times as long."""
    packed = rewards._packed_states

    def some_are_rounded(model, packing):
        states = packed(model, packing)
        states[19 : 19 + tokens] *= 1.5
        return states

    monkeypatch.setattr(rewards, "_packed_states", some_are_rounded)
    assert check_model(tiny(0).to(dtype)) is packs
    assert ("reads sequences one by one" in capsys.readouterr().err) is not packs


def test_a_model_is_checked_once_and_left_as_it_was():
    model, passes = tiny(0, attention_dropout=0.5).train(), []
    model.model.layers[0].mlp.eval()
    modes, weights = [module.training for module in model.modules()], copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    model.model.register_forward_hook(lambda *_: passes.append(1))
    assert check_model(model) is True, "also in train mode, with dropout"
    assert len(passes) == 6, "the head, masks, states, logits, packed twice"
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state), "what is drawn next does not change"
    assert all(p.grad is None for p in model.parameters()) and len(model.model._forward_hooks) == 1
    assert check_model(model) and check_model(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert len(passes) == 6, "nor does an adapter make it another model"


def test_a_check_does_not_keep_models_alive():
    model = tiny(0)
    check_model(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_check_of_the_toy_takes_less_than_a_second(toy):
    model = transformers.AutoModelForCausalLM.from_pretrained(toy / "runs/toy")
    started = time.process_time()
    assert check_model(model)
    assert time.process_time() - started < 1


# ----------------------------------------------------------------------------------------------------------
# The file alone


def test_the_file_alone_needs_nothing_but_torch(tmp_path):
    shutil.copy(ROOT / "rewards.py", tmp_path)
    for name in ("triton", "transformers", "peft", "numpy"):
        (tmp_path / "without" / name).mkdir(parents=True)
        (tmp_path / "without" / name / "__init__.py").write_text("raise ModuleNotFoundError('not here')")
    program = (
        "import sys, runpy; sys.path.insert(0, 'without'); sys.argv = ['rewards.py']; "
        "runpy.run_path('rewards.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "rewards.py: torch on cpu" in done.stderr and "reward -1.489422   by hand -1.489422" in done.stdout


def test_unknown_arguments_are_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rewards.py", "--chek"])
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(ROOT / "rewards.py"), run_name="__main__")
    assert refusal.value.code == "unknown arguments ['--chek']: pass none, or --check"  # to stderr, exit code 1
