"""The benchmark of a step: its arithmetic, a run at the smallest size.   python -m pytest tests/test_bench_step.py"""

import bench_step
import pytest
import runs
import torch
from conftest import run_script
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM


@pytest.fixture
def config(monkeypatch):
    made = Qwen2Config(**bench_step.SIZES["tiny"][0], tie_word_embeddings=False)
    monkeypatch.setattr(bench_step, "CONFIG", made, raising=False)
    return made


def test_the_flops_are_those_of_the_model(config):
    """Against torch's counter, on attention that computes the masked half too."""
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.long), logits_to_keep=40)
    masked = 2 * config.num_hidden_layers * config.hidden_size * 300**2
    assert bench_step.flops([300], [40]) == counter.get_total_flops() - masked
    assert bench_step.flops([300, 20], [40, 3]) == bench_step.flops([300], [40]) + bench_step.flops([20], [3])


def test_between_measured_points():
    points = [(16, 9.0), (4, 3.0), (1, 1.0)]
    assert [bench_step.between(points, x) for x in (0.5, 1, 2.5, 10, 16, 99)] == [1.0, 1.0, 2.0, 6.0, 9.0, 9.0]


def test_the_recipe_adds_up(config, monkeypatch):
    """Level rates: hours are completions x length / rate. A cost that grows with the context is met at its mean."""
    logged = []
    monkeypatch.setattr(bench_step, "log", lambda **entry: logged.append(entry))
    monkeypatch.setattr(bench_step, "LENGTHS", (1000, 4000, 16000), raising=False)
    monkeypatch.setattr(bench_step, "PROMPT", 500, raising=False)
    rows = [dict(part="score", student_bits=4, length=n, tokens_per_s=1000.0) for n in (1000, 4000, 16000)]
    rows += [dict(part=p, length=n, tokens_per_s=500.0) for p in ("reference", "update") for n in (1000, 4000, 16000)]
    rows += [dict(part="rollout", engine="batch", context=n, tokens_per_s=1e6 / n) for n in (1000, 4000, 16000)]
    rows += [dict(part="rollout", engine="continuous", context=1000, failed="out of memory")]
    bench_step.recipe(rows)
    assert [entry["length"] for entry in logged[:4]] == [1000, 2000, 4000, 8000]
    tokens = 128_000 * 4000 / 3600
    four = logged[2]
    assert four["h_score"] == pytest.approx(tokens / 1000) and four["h_update"] == pytest.approx(tokens / 500)
    assert four["h_rollout"] == pytest.approx(tokens * (1000 + 2000) / 1e6)
    assert four["h_total"] == pytest.approx(sum(four[f"h_{p}"] for p in ("rollout", "score", "reference", "update")))
    assert four["h_without_rollout"] == pytest.approx(tokens * (1 / 1000 + 2 / 500))
    assert logged[4]["failed"] == "not measured: rollout"


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("continuous batching stopped: CUDA out of memory."),
    ValueError("--engine continuous would run out of memory")])
def test_running_out_of_memory_is_a_result(monkeypatch, error):
    monkeypatch.setattr(bench_step, "log", lambda **entry: entry)
    fail = lambda error: (_ for _ in ()).throw(error)  # noqa: E731
    assert bench_step.attempt(lambda: fail(error), part="rollout") == dict(part="rollout", failed="out of memory")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench_step.attempt(lambda: fail(RuntimeError("an illegal memory access was encountered")))


def test_it_runs_and_the_dry_run_is_right(tmp_path):
    """Three settings, four phases each: the estimate is within a tenth of the peak."""
    run_script(tmp_path, "tests/bench_step.py", "--size", "tiny", "--parts", "step", "--out", tmp_path / "log.jsonl")
    rows = [row for row in runs.read_jsonl(tmp_path / "log.jsonl") if row["part"] == "step"]
    assert {row["phase"] for row in rows} == {"rollout", "score", "reference", "update"} and len(rows) in (4, 12)
    for row in rows:
        assert row["expected_gb"] == pytest.approx(row["peak_gb"], rel=0.1), row
        assert row["device"].startswith("CPU") or row["size"] == "tiny"
