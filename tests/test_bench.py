"""The benchmarks: their arithmetic, and a run of each at the smallest size.   python -m pytest tests/test_bench.py"""

import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from rlt.errors import UserError
from rlt.files import read_jsonl

import pytest
import torch
from conftest import ROOT, call
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2ForCausalLM

sys.path.insert(0, str(ROOT / "bench"))

import busy  # noqa: E402
import gpu  # noqa: E402
import measure  # noqa: E402
import scoring  # noqa: E402
import step  # noqa: E402


@pytest.fixture
def log(tmp_path):
    return measure.Log(tmp_path / "logs" / "log.jsonl", device="a device")


# ---------------------------------------------------------------------------------------------------------
# measuring


def test_a_log_line_has_the_entry_and_the_machine(log, capsys):
    assert log(part="a", ms=0.123456, n=3) == {"part": "a", "ms": 0.1235, "n": 3}
    assert json.loads(capsys.readouterr().out) == {"part": "a", "ms": 0.1235, "n": 3}
    assert read_jsonl(log.path) == [{"part": "a", "ms": 0.1235, "n": 3, "device": "a device"}]


def test_running_out_of_memory_is_a_result(log):
    def fail(error):
        raise error

    out_of_memory = torch.OutOfMemoryError("CUDA out of memory.")
    assert log.attempt(lambda: fail(out_of_memory), part="rollout") == dict(part="rollout", failed="out of memory")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        log.attempt(lambda: fail(RuntimeError("an illegal memory access was encountered")))
    assert log.attempt(lambda: dict(seconds=1), part="score") == dict(part="score", seconds=1)


def test_peak_bytes_on_a_cpu():
    model = torch.nn.Linear(10, 20)
    peak = measure.peak_bytes(lambda: torch.zeros(1000) + 1, model)
    assert peak == 2 * 4000 + 4 * (200 + 20)


def test_rates_are_those_of_the_operation(monkeypatch):
    monkeypatch.setattr(measure, "milliseconds", lambda function: 2.0)
    assert measure.copy_bandwidth() == 2 * 2**27 / 2e-3  # read and written
    assert measure.matmul_rate() == 2 * 1024**3 / 2e-3


# ---------------------------------------------------------------------------------------------------------
# bench/step.py


def test_the_flops_are_those_of_the_model():
    """Against torch's counter, on attention that computes the masked half too."""
    config = step.size_of("tiny").config
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.long), logits_to_keep=40)
    masked = 2 * config.num_hidden_layers * config.hidden_size * 300**2
    assert step.flops(config, [300], [40]) == counter.get_total_flops() - masked
    both = step.flops(config, [300], [40]) + step.flops(config, [20], [3])
    assert step.flops(config, [300, 20], [40, 3]) == both


def test_rows_fill_a_pass():
    size = step.size_of("7b")
    assert (size.prompt, size.micro_batch, size.vocab) == (512, 16_384 + 1024 + 2, 152_063)
    assert [step.rows_of(size, length) for length in size.lengths] == [8, 3, 1]
    row = step.scoring_row(size, 4096)
    assert len(row.thought) + len(row.teacher_end) == 4096 and len(row.teacher_prompt) == 1024


def test_between_measured_points():
    points = [(16, 9.0), (4, 3.0), (1, 1.0)]
    assert [step.between(points, x) for x in (0.5, 1, 2.5, 10, 16, 99)] == [1.0, 1.0, 2.0, 6.0, 9.0, 9.0]


def test_the_recipe_adds_up():
    """Level rates: hours are completions x length / rate. A cost that grows with the context is met at its mean."""
    logged = []
    size = step.size_of("7b")._replace(lengths=(1000, 4000, 16_000))
    assert size.prompt == 500
    rows = [dict(part="score", student_bits=4, length=n, tokens_per_s=1000.0) for n in size.lengths]
    rows += [dict(part=part, length=n, tokens_per_s=500.0) for part in ("reference", "update") for n in size.lengths]
    rollouts = [dict(part="rollout", engine="transformers", context=n, tokens_per_s=1e6 / n) for n in size.lengths]
    rollouts += [dict(part="rollout", engine="transformers", context=32_000, failed="out of memory")]
    step.recipe(lambda **entry: logged.append(entry), size, rows + rollouts)
    assert [entry["length"] for entry in logged] == [1000, 2000, 4000, 8000]
    tokens = 128_000 * 4000 / 3600
    four = logged[2]
    assert four["h_score"] == pytest.approx(tokens / 1000) and four["h_update"] == pytest.approx(tokens / 500)
    assert four["h_rollout"] == pytest.approx(tokens * (1000 + 2000) / 1e6)
    parts = ("rollout", "score", "reference", "update")
    assert four["h_total"] == pytest.approx(sum(four[f"h_{part}"] for part in parts))
    assert four["h_without_rollout"] == pytest.approx(tokens * (1 / 1000 + 2 / 500))
    step.recipe(lambda **entry: logged.append(entry), size, rows)
    assert logged[4]["failed"] == "not measured: rollout"
    faster = [row | dict(engine="vllm", tokens_per_s=10 * row["tokens_per_s"]) for row in rollouts[:3]]
    skipped = [dict(part="rollout", engine="vllm", skipped="vLLM is not installed")]
    step.recipe(lambda **entry: logged.append(entry), size, rows + rollouts + faster + skipped)
    assert [entry["engine"] for entry in logged[5:]] == ["transformers"] * 4 + ["vllm"] * 4
    assert logged[7] == four and logged[11]["h_rollout"] == pytest.approx(four["h_rollout"] / 10)


@pytest.fixture
def few_tokens(monkeypatch):
    """Rollouts of few tokens: the peak is that of the longest cache all the same."""
    monkeypatch.setattr(step, "DECODED", 6)


@pytest.mark.slow
def test_it_runs_and_the_dry_run_is_right(tmp_path, few_tokens, monkeypatch):
    """Three settings, four phases each: the estimate is within a tenth of the peak."""
    out = str(tmp_path / "log.jsonl")
    monkeypatch.setattr(sys, "argv", ["step.py", "--size", "tiny", "--parts", "step", "--out", out])
    step.main()
    rows = [row for row in read_jsonl(tmp_path / "log.jsonl") if row["part"] == "step"]
    assert {row["phase"] for row in rows} == {"rollout", "score", "reference", "update"} and len(rows) in (4, 12)
    for row in rows:
        assert row["expected_gb"] == pytest.approx(row["peak_gb"], rel=0.1), row
        assert row["device"].startswith("CPU") or row["size"] == "tiny"
        assert "tokens_per_s" not in row  # the figures read speeds from the parts of that name


# ---------------------------------------------------------------------------------------------------------
# bench/scoring.py


def test_every_implementation_computes_the_same(log, monkeypatch):
    """The rates of one machine are nobody's concern; the numbers must agree with float64."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    scoring.reduce(log, 20, 300, torch.float32, copy=1e9)
    scoring.hidden(log, 20, 300, matmul=1e9)
    rows = read_jsonl(log.path)
    assert [(row["part"], row.get("kind"), row["impl"]) for row in rows] == [
        *(("reduce", kind, impl) for kind in ("stats", "logprobs") for impl in ("eager", "compile", "ours")),
        ("hidden", None, "eager"), ("hidden", None, "ours")]
    for row in rows:
        assert row["error"] < 1e-4 and row["ms"] > 0
        if row["part"] == "reduce":
            read = 20 * (300 * 4 * (1 + (row["kind"] == "stats")) + 8)
            assert row["gb_s"] == pytest.approx(read / row["ms"] / 1e6, rel=1e-2) == pytest.approx(row["of_copy"], 1e-2)


def test_the_released_way_gives_the_sampled_reward(tiny_model):
    """Two implementations of one number, which the comparison of their speeds rests on."""
    teacher, student = tiny_model(1000), tiny_model(1000, seed=1)
    rows = scoring.scoring_rows(64, 3)
    torch.testing.assert_close(scoring.released_way(teacher, student, rows),
                               scoring.our_way(teacher, student, rows, kl="sampled"), rtol=1e-4, atol=1e-4)
    assert all(len(r.teacher_prompt + r.thought + r.teacher_end) == 64 for r in rows)
    assert all(len(r.student_prompt + r.thought + r.bridge + r.solution) == 64 for r in rows)


# ---------------------------------------------------------------------------------------------------------
# bench/gpu.py


@pytest.mark.slow
def test_one_command_writes_a_log_and_a_table(tmp_path, few_tokens, monkeypatch, capsys):
    out = str(tmp_path / "gpu.jsonl")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--size", "tiny", "--parts", "step", "--out", out])
    gpu.main()
    rows = read_jsonl(tmp_path / "gpu.jsonl")
    assert [row["part"] for row in rows] == ["ceilings"] + ["step"] * 4 + ["rollout"]
    for row in rows[1:5]:
        assert row["size"] == "tiny" and row["tokens_per_s"] > 0
        assert row["expected_gb"] == pytest.approx(row["peak_gb"], rel=0.1), row
    text = (tmp_path / "gpu.md").read_text()
    assert text.split("\n\n", 1)[1] in capsys.readouterr().out and text.count("\n|") == 2 + len(rows)
    assert "| tiny, 32 and 32 bits: score, 1 x 1,024 tokens |" in text


def test_what_does_not_fit_into_the_time_is_named(tmp_path):
    call(tmp_path, "bench/gpu.py", "--size", "tiny", "--minutes", "0", "--out", tmp_path / "gpu.jsonl")
    rows = read_jsonl(tmp_path / "gpu.jsonl")
    assert [row["part"] for row in rows[1:]] == [
        "tests", "step, tiny", "vLLM, tiny", "kernels, 64 x 32000 torch.bfloat16"]
    assert all(row["skipped"] == "--minutes 0 were over" for row in rows[1:])
    assert (tmp_path / "gpu.md").read_text().count("skipped: --minutes 0 were over") == 4


def test_without_vllm_its_rollout_is_skipped_with_the_reason(log, monkeypatch):
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    gpu.measure_vllm(log, "tiny", matmul=1e9)
    row, = read_jsonl(log.path)
    assert (row["part"], row["engine"], row["size"]) == ("rollout", "vllm", "tiny") and "tokens_per_s" not in row
    assert row["skipped"].startswith("vLLM is not installed: pip install ")
    assert gpu.table([row]).splitlines()[2] == f"| tiny, vllm: rollout | skipped: {row['skipped']} |  |  |  |"


@pytest.mark.parametrize(("error", "message"), [(UserError("vLLM can't load it"), "vLLM can't load it"),
                                                (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory.")])
def test_what_vllm_refuses_is_a_result(log, monkeypatch, error, message):
    """Over the border of the two processes, which have no GPU and no vLLM to ask."""
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(step, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))

    def refuse(*_):
        raise pickle.loads(pickle.dumps(error))

    monkeypatch.setattr(step, "decode_by_vllm", refuse)
    gpu.measure_vllm(log, "tiny", matmul=1e9)
    assert read_jsonl(log.path)[0]["failed"] == message


def test_a_rollout_by_vllm_is_as_large_as_its_limits(monkeypatch):
    """Rows that would wait for others to end must not count as sampled in the same step."""
    made, asked = {}, []

    class Engine:
        def __init__(self, folder, tokenizer, **options):
            made.update(options, folder=folder, vocab=len(tokenizer.get_vocab()))
            limits = dict(cache_config=SimpleNamespace(kv_cache_size_tokens=10_000),
                          scheduler_config=SimpleNamespace(max_num_seqs=40))
            vllm = SimpleNamespace(vllm_config=SimpleNamespace(**limits), step=self.step)
            self.clock, self.llm = 0.0, SimpleNamespace(llm_engine=vllm)

        def load_adapter_folder(self, folder):
            made["adapter"] = folder

        def step(self):
            self.clock += 9.0 if self.reads_prompts else 0.5
            self.reads_prompts = False

        def generate(self, prompts, *, max_new_tokens, **_):
            asked.append((len(prompts[0]), len(prompts)))
            assert len({tuple(prompt) for prompt in prompts}) == len(prompts), "equal prompts share their cache"
            self.reads_prompts = True
            with monkeypatch.context() as patch:
                patch.setattr(step.time, "perf_counter", lambda: self.clock)
                for _ in range(max_new_tokens):
                    self.llm.llm_engine.step()

    monkeypatch.setattr(step, "VLLMEngine", Engine)
    monkeypatch.setattr(step, "save_folders", lambda config, bits, folder: folder + "/adapter")
    size = step.size_of("tiny")
    rows = step.decode_by_vllm(size, [(64, 64), (1024, 20), (1024, 4)], matmul=1e9)
    assert asked == [(64, 40), (1024, 10_000 // (1024 + 128)), (1024, 4)]
    assert [row["batch"] for row in rows] == [40, 8, 4] and [row["seconds"] for row in rows] == [0.5] * 3
    assert [row["tokens_per_s"] for row in rows] == [80, 16, 8]
    assert rows[0]["of_matmul"] == pytest.approx(80 * step.flops(size.config, [1], [1]) / 1e9)
    assert made["load_format"] == "dummy" and made["max_model_len"] == 1024 + 128 and made["vocab"] == size.vocab
    assert made["adapter"] == made["folder"] + "/adapter"


@pytest.mark.parametrize(("printed", "entry"), [
    ("5 passed, 2 skipped, 400 deselected in 12.3s\n", dict(counts=dict(passed=5, skipped=2), failures=[])),
    ("no tests ran in 0.1s\n", dict(counts={}, failures=[])),
    ("FAILED tests/test_triton.py::test_a - AssertionError\nERROR tests/test_b.py\n1 failed, 4 passed, 1 error in 3s\n",
     dict(counts=dict(failed=1, passed=4, error=1), failures=["tests/test_triton.py::test_a", "tests/test_b.py"])),
])
def test_what_the_gpu_tests_printed(log, monkeypatch, printed, entry):
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, printed, ""))
    gpu.run_tests(log, 30)
    row, = read_jsonl(log.path)
    assert row.pop("seconds") >= 0
    assert row == {"part": "tests", "device": "a device", **entry}
    counts = [f"{n} {kind}" for kind, n in row["counts"].items()] or ["none ran"]
    assert gpu.results(row)[0] == ", ".join(counts + entry["failures"]) and gpu.describe(row) == "tests"


def test_tests_that_hang_are_stopped(log, monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", hang)
    gpu.run_tests(log, 30)
    assert read_jsonl(log.path)[0]["failed"] == "stopped after 30 s"


def test_bits_are_the_widest_that_fit(monkeypatch):
    """The free memory decides: 80 GB hold two 7B models in 16 bits, 24 GB two in 4, 10 GB none."""
    size = step.size_of("7b")
    needs = {(16, 16): dict(load=40e9), (16, 4): dict(load=30e9), (4, 4): dict(load=15e9)}
    monkeypatch.setattr(gpu, "CUDA", True)
    monkeypatch.setattr(gpu, "can_quantise", lambda: True)
    monkeypatch.setattr(step, "expected_bytes", lambda size, teacher, student, **_: needs[teacher, student])
    for free, bits in ((80e9, (16, 16)), (41e9, (16, 4)), (24e9, (4, 4)), (16e9, None)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 80e9))
        assert gpu.widest_bits(size, {}) == bits
    monkeypatch.setattr(gpu, "can_quantise", lambda: False)
    assert gpu.widest_bits(size, {}) is None


# ---------------------------------------------------------------------------------------------------------
# bench/busy.py


def test_busy_processes_end_with_the_measurement():
    with pytest.raises(ZeroDivisionError), busy.busy_processes(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
        1 / 0  # noqa: B018
    assert [process.returncode for process in processes] == [-9, -9]


@pytest.mark.parametrize(("policy", "seen"), [("default", "None"), ("passive", "passive")])
def test_only_one_of_the_two_waits_passively(tmp_path, policy, seen):
    """What the environment says by the time that torch is loaded, in either way to start a script."""
    script = tmp_path / "script.py"
    script.write_text(f"import sys, os\nsys.path.insert(0, {str(ROOT)!r})\n"
                      "before = os.environ.get('OMP_WAIT_POLICY') if 'torch' in sys.modules else 'not yet'\n"
                      "import rlt\n"
                      "print(before if before != 'not yet' else os.environ.get('OMP_WAIT_POLICY'), sys.argv[1:])\n")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run([*busy.COMMANDS[policy], str(script), "--flag", "1"], env=environment, capture_output=True,
                          text=True, check=True)
    assert done.stdout.split("\n")[0] == f"{seen} ['--flag', '1']"


@pytest.mark.slow
def test_a_short_run_of_all_four_cases(workshop, tmp_path, monkeypatch, capsys):
    """The training runs are in this process: what their own would have of each policy is tested above."""
    started = []

    def run(command, **_):
        for policy, words in busy.COMMANDS.items():
            if command[: len(words) + 1] == [*words, str(ROOT / "train_rlt.py")]:
                started.append(policy)
                call(workshop, "train_rlt.py", *command[len(words) + 1 :])

    monkeypatch.setattr(busy, "subprocess", SimpleNamespace(**vars(subprocess) | {"run": run}))  # the runs start others
    monkeypatch.setattr(sys, "argv", ["busy.py", "--steps", "1", "--rounds", "1", "--out", str(tmp_path / "busy.jsonl"),
                                      "--limit", "300", "--prompts-per-step", "2", "--group-size", "2",
                                      "--max-new-tokens", "8"])
    busy.main()
    assert started == ["default", "passive"] * 2
    rows = read_jsonl(tmp_path / "busy.jsonl")
    assert [(row["wait_policy"], row["busy"]) for row in rows] == [
        ("default", 0), ("passive", 0), ("default", 1), ("passive", 1)]
    for row in rows:
        assert 0 < row["seconds"] <= row["slowest"] and row["cores"] >= 1 and row["torch"] and row["date"]
    shown = capsys.readouterr().out
    assert "ratio" in shown and "quiet, passive against default" in shown


# ---------------------------------------------------------------------------------------------------------
# bench/small_step.py


@pytest.mark.parametrize("compared, ways", [
    ("prompts", ["once", "each"]), ("sampler", ["steps", "generate"]), ("bits", [16, 32])])
def test_a_small_step_is_timed_both_ways(workshop, tmp_path, capsys, compared, ways):
    """In one precision, the script itself checks that both give the same log-probs."""
    call(workshop, "bench/small_step.py", "--compare", compared, "--model", "toy-teacher", "--data",
         "runs/toy/train.jsonl", "--group-size", 4, "--rounds", 2, "--out", tmp_path / "log.jsonl")
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [row["way"] for row in rows] == [*ways, *reversed(ways)]
    assert all(row["t_rollout"] > 0 and row["t_score"] > 0 and row["t_update"] > 0 for row in rows)
    gaps = {row["way"]: row["gap"] for row in rows}
    assert all(gaps[way] < 1e-5 for way in ways if way != 16) and (compared != "bits" or 1e-5 < gaps[16] < 0.1)
    assert "log-probs differ by at most" in capsys.readouterr().out
