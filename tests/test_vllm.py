"""
vLLM against transformers in float32, on the toy.

An engine changes its process, so it lives in others: this very file, run as a script (see its end), once alone and
once by torchrun. What they measure comes back as JSON.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call, metrics, run_script

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ENDS = [1, 30]  # two turn ends: the tokenizer's, and a word
RANK = 6  # vLLM knows 1, 8, 16, ...
PROMPTS = [[2, 20 + i % 9, 31, 3] for i in range(48)]
MISSING = importlib.util.find_spec("vllm") is None
needs_vllm = pytest.mark.skipif(MISSING, reason="vLLM is missing: see requirements-vllm.txt")


# ---------------------------------------------------------------------------------------------------------
# what runs in a process of its own


def make_engine(folder, **changes):
    from rlt import models
    from rlt.vllm_engine import VLLMEngine

    options = dict(bits=32, device=CPU, max_model_len=256, stop_ids=ENDS, lora_rank=RANK) | changes
    return VLLMEngine(folder, models.load_tokenizer(folder), **options)


def make_adapters(folder):
    """(peft model, set_adapter): set_adapter(seed) gives the adapter other weights, none of them 0."""
    from rlt import lora, models

    model = models.load_lora(folder, bits=32, device=CPU, rank=RANK, alpha=12, seed=0)

    @torch.no_grad()
    def set_adapter(seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora.adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)

    return model.eval(), set_adapter


@torch.no_grad()
def log_softmax_of(model, ids, vocab, temperature):
    """(T, vocab) log-probs of the token after each of ids, by transformers."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0, :, :vocab] / (temperature or 1.0), -1)


def largest_difference(model, prompts, completions, vocab, temperature):
    """Between the engine's log-probs and transformers', over all sampled tokens; nats."""
    largest = 0.0
    for prompt, c in zip(prompts, completions, strict=True):
        rows = log_softmax_of(model, prompt + c.ids, vocab, temperature)[len(prompt) - 1 : -1]
        ours = rows.gather(1, torch.tensor(c.ids)[:, None])[:, 0]
        largest = max(largest, (ours - torch.tensor(c.logprobs)).abs().max().item())
    return largest


def message_of(call, *args, **kwargs):
    """The message of the ValueError that a call raises."""
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "no ValueError"


def measure(folder):
    """Everything that the tests want to know of one engine -> a dict for JSON."""
    out = {"errors": {}, "differences": {}}
    unknown = Path(folder).with_name("unknown")
    shutil.copytree(folder, unknown)
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyKnowsForCausalLM"]}))
    out["errors"]["rank"] = message_of(make_engine, folder, lora_rank=513)
    out["errors"]["architecture"] = message_of(make_engine, str(unknown))
    out["errors"]["device"] = message_of(make_engine, folder, device=torch.device("cuda"))

    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.set_num_threads, torch.get_num_threads(), dict(os.environ)
    engine = make_engine(folder)
    vocab = engine.vocab
    model, set_adapter = make_adapters(folder)
    torch.set_rng_state(before[0])

    def sample(prompts=PROMPTS, temperature=1.0, max_new_tokens=24, first_seed=0):
        return engine.sample(prompts, max_new_tokens=max_new_tokens, temperature=temperature,
                               seeds=range(first_seed, first_seed + len(prompts)))

    rows = {"base": sample()}
    with model.disable_adapter():
        out["differences"]["base"] = largest_difference(model, PROMPTS, rows["base"], vocab, 1.0)
    for name, seed in (("one", 1), ("two", 2), ("one again", 1)):
        set_adapter(seed)
        engine.load_adapter(model)
        rows[name] = sample(temperature=0.7)
        out["differences"][name] = largest_difference(model, PROMPTS, rows[name], vocab, 0.7)
    rows["one, second call"] = sample(temperature=0.7)
    rows["one, other seeds"] = sample(temperature=0.7, first_seed=1000)
    rows["greedy"] = sample(temperature=0.0)
    out["differences"]["greedy"] = largest_difference(model, PROMPTS, rows["greedy"], vocab, 0.0)
    out["greedy is the argmax"] = all(
        log_softmax_of(model, prompt + c.ids, vocab, 0)[len(prompt) - 1 : -1].argmax(-1).tolist() == c.ids
        for prompt, c in zip(PROMPTS, rows["greedy"], strict=True))

    draws = sample([PROMPTS[0]] * 5000, temperature=0.7, max_new_tokens=1, first_seed=10_000)
    out["draws"] = torch.bincount(torch.tensor([c.ids[0] for c in draws]), minlength=64).tolist()
    out["expected"] = (5000 * log_softmax_of(model, PROMPTS[0], vocab, 0.7)[-1].exp()).tolist()
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.7
    out["mass beyond the tokenizer"] = logits.softmax(-1)[vocab:].sum().item()

    long = [[2 + (i * j) % 50 for j in range(230)] for i in range(45)]  # 10,350 tokens, more than a step prefills
    rows["long"] = sample(long, max_new_tokens=4)
    out["differences"]["long"] = largest_difference(model, long, rows["long"], vocab, 1.0)

    changed = [name for name in before[3] if os.environ.get(name) != before[3][name]]
    out["process"] = {
        "rng": torch.equal(before[0], torch.get_rng_state()),
        "set_num_threads": torch.set_num_threads is before[1] and torch.get_num_threads() == before[2],
        "environment": changed + [name for name in os.environ if name not in before[3] and name[:5] != "VLLM_"],
    }
    out["errors"]["length"] = message_of(sample, [[2] * 250], max_new_tokens=20)
    out["errors"]["temperature"] = message_of(sample, temperature=0.001)
    out["folders"] = sum(path.name.startswith("rlt-adapter-") for path in Path(os.environ["TMPDIR"]).iterdir())
    return out | {"vocab": vocab, "rows": rows}


def measure_ranks(folder):
    """One engine a rank, in a group of gloo -> rank 0's dict of what all have sampled."""
    distributed = torch.distributed
    distributed.init_process_group("gloo")
    rank, environment = distributed.get_rank(), dict(os.environ)
    engine = make_engine(folder)
    model, set_adapter = make_adapters(folder)
    set_adapter(1)
    engine.load_adapter(model)
    prompts, seeds = PROMPTS[rank::2], range(rank, len(PROMPTS), 2)
    if rank == 1:  # ranks may call as often as they like: an engine waits for no other
        engine.sample(prompts[:1], max_new_tokens=1, temperature=0.7, seeds=[0])
    completions = engine.sample(prompts, max_new_tokens=24, temperature=0.7, seeds=seeds)
    everyone = [None, None]
    distributed.all_gather_object(everyone, completions)
    total = torch.ones(1)
    distributed.all_reduce(total)
    kept = [name for name in ("RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE") if os.environ[name] == environment[name]]
    distributed.destroy_process_group()
    return rank == 0 and {"rows": everyone, "total": total.item(), "kept": kept}


# ---------------------------------------------------------------------------------------------------------
# the tests


def run_self(toy, tmp_path_factory, *launcher):
    """The JSON that this file writes when it is run as a script, and what it has printed."""
    folder = tmp_path_factory.mktemp("vllm")
    out = folder / "out.json"
    (folder / "tmp").mkdir()
    shutil.copytree(toy / "runs/toy", folder / "toy")
    done = subprocess.run(
        [sys.executable, *launcher, __file__, folder / "toy", out], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-5000:]
    return json.loads(out.read_text()), done


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory):
    return run_self(toy, tmp_path_factory)


@pytest.fixture(scope="module")
def measured(alone):
    return alone[0]


@needs_vllm
@pytest.mark.parametrize("name", ["base", "one", "two", "one again", "greedy", "long"])
def test_logprobs_are_those_of_transformers(measured, name):
    assert measured["differences"][name] < 1e-4


@needs_vllm
def test_greedy_takes_the_likeliest(measured):
    assert measured["greedy is the argmax"]


@needs_vllm
def test_the_same_seeds_draw_the_same_rows(measured):
    rows = measured["rows"]
    assert rows["one, second call"] == rows["one again"]
    assert rows["one, other seeds"] != rows["one"]


@needs_vllm
def test_an_adapter_swapped_back_samples_the_same_ids(measured):
    ids = {name: [c[0] for c in rows] for name, rows in measured["rows"].items()}
    assert ids["one again"] == ids["one"]
    assert ids["two"] != ids["one"] != ids["base"]
    assert measured["folders"] == 1, "the folder of an adapter that is no longer used is removed"


@needs_vllm
def test_draws_follow_the_softmax_over_the_tokenizers_vocabulary(measured):
    """Chi-square on 5,000 first tokens; rare ones are counted together."""
    draws, expected = torch.tensor(measured["draws"]), torch.tensor(measured["expected"])
    assert measured["vocab"] == len(expected) < len(draws)
    assert measured["mass beyond the tokenizer"] > 1e-3, "else nothing is tested"
    assert draws[measured["vocab"] :].sum() == 0
    draws, common = draws[: measured["vocab"]].float(), expected >= 5
    pairs = [(draws[common], expected[common])]
    if expected[~common].sum() > 0:
        pairs.append((draws[~common].sum()[None], expected[~common].sum()[None]))
    statistic = sum(((d - e) ** 2 / e).sum() for d, e in pairs)
    freedom = sum(len(d) for d, _ in pairs) - 1
    assert freedom > 10
    assert torch.special.gammaincc(torch.tensor(freedom / 2), statistic / 2) > 1e-3


@needs_vllm
def test_rows_end_at_the_first_of_two_ends(measured):
    completions = measured["rows"]["base"]
    assert {ids[-1] for ids, _, finished in completions if finished} == set(ENDS)
    assert any(not finished for *_, finished in completions)
    for ids, logprobs, finished in completions:
        assert len(ids) == len(logprobs)
        assert not set(ids[:-1]) & set(ENDS)
        assert finished == (ids[-1] in ENDS)
        assert finished or len(ids) == 24


@needs_vllm
def test_the_process_is_left_as_it_was(measured):
    assert measured["process"] == {"rng": True, "set_num_threads": True, "environment": []}


@needs_vllm
def test_it_prints_nothing_of_its_own(alone):
    assert alone[1].stdout == ""


@needs_vllm
@pytest.mark.parametrize("name, expected", [
    ("rank", "a LoRA rank of 513: vLLM takes at most 512"),
    ("architecture", "vLLM can't load .*unknown: .*NobodyKnowsForCausalLM"),
    ("device", "the installed vLLM runs on cpu, asked for was cuda"),
    ("length", "a prompt of 250 tokens and 20 new ones are more than the engine's 256"),
    ("temperature", "temperature 0.001: vLLM samples with 0"),
])
def test_errors_are_one_line(measured, name, expected):
    message = measured["errors"][name]
    assert re.match(expected, message), message
    assert "\n" not in message and len(message) < 300


def test_a_missing_vllm_names_the_command(monkeypatch):
    from rlt.vllm_engine import VLLMEngine

    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "")
    tokenizer = SimpleNamespace(__len__=lambda: 5)
    with pytest.raises(ValueError, match='^vLLM can\'t be imported .*: pip install "vllm==0.32.*$'):
        VLLMEngine("base", tokenizer, bits=32, device=CPU, max_model_len=8, stop_ids=[1])
    with pytest.raises(ValueError, match="16 or 32 bits, and 4 were asked for"):
        VLLMEngine("base", tokenizer, bits=4, device=CPU, max_model_len=8, stop_ids=[1])


@needs_vllm
def test_every_rank_has_an_engine_of_its_own(measured, toy, tmp_path_factory):
    out, _ = run_self(toy, tmp_path_factory, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert out["total"] == 2 and len(out["kept"]) == 3
    ids = [None] * len(PROMPTS)
    ids[0::2], ids[1::2] = ([c[0] for c in rows] for rows in out["rows"])
    assert ids == [c[0] for c in measured["rows"]["one"]], "seeds alone decide, not the rank"


@needs_vllm
def test_a_rollout_of_random_weights_is_measured(tmp_path, monkeypatch):
    """bench/gpu.py's: config.json and an adapter are all that the engine gets."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import measure
    import step

    size, log = step.size_of("tiny"), measure.Log(tmp_path / "log.jsonl", device="a device")
    row, = step.measure_vllm(log, size, [(256, 3)], matmul=1e9)
    assert (row["part"], row["engine"], row["context"], row["batch"]) == ("rollout", "vllm", 256, 3), row
    assert row["tokens_per_s"] == pytest.approx(3 / row["seconds"], rel=1e-3) and 1e-4 < row["seconds"] < 10


SMALL = ("--limit", 80, "--prompts-per-step", 2, "--group-size", 4, "--max-new-tokens", 12, "--eval-rows", 2,
         "--save-every", 1, "--engine", "vllm")


@needs_vllm
def test_a_teacher_trains_and_goes_on_as_if_it_had_not_stopped(workshop, tmp_path):
    flags = ("train_rlt.py", *SMALL, "--lr-steps", 3, "--lr", 2e-2, "--warmup-steps", 0)
    run_script(workshop, *flags, "--steps", 3, "--out", tmp_path / "once")
    run_script(workshop, *flags, "--steps", 2, "--out", tmp_path / "twice")
    run_script(workshop, *flags, "--steps", 3, "--out", tmp_path / "twice", "--resume")
    once, twice = metrics(tmp_path / "once"), metrics(tmp_path / "twice")
    assert len(once) == 3
    for one, other in zip(once, twice, strict=True):
        assert one["sampler_logprob_diff"] < 1e-4 and one["tis_weight"] == pytest.approx(1, abs=1e-4)
        assert {**one, "eval_reward": None} == {**other, "eval_reward": None}  # the shorter run measures at its own end
    weights = [(tmp_path / name / "final/adapter_model.safetensors").read_bytes() for name in ("once", "twice")]
    assert weights[0] == weights[1]


@needs_vllm
def test_the_other_scripts_sample_with_it(workshop, tmp_path):
    few = ("--limit", 6, "--max-new-tokens", 12, "--engine", "vllm")
    run_script(workshop, "distill.py", "--model", "toy-teacher", *few, "--samples", 2, "--out", tmp_path / "rows.jsonl")
    assert (tmp_path / "rows.jsonl").read_text()  # those that are not empty
    run_script(workshop, "evaluate.py", "--model", "toy", *few, "--out", tmp_path / "evaluated")
    [report] = (tmp_path / "evaluated").glob("*/eval_toy.json")
    assert json.loads(report.read_text())["questions"] == 6
    for script, flags in (("rl_student.py", ("--failed-groups", "guide", "--rewards", 0, 0, 1)),
                          ("on_policy_student.py", ("--teacher", "toy-teacher"))):
        sizes = [*SMALL[:4], *SMALL[6 if script.startswith("on") else 4 :]]  # one has no groups
        run_script(workshop, script, *sizes, *flags, "--steps", 1, "--out", tmp_path / script)
        [entry] = metrics(tmp_path / script)
        assert entry["sampler_logprob_diff"] < 1e-4 or not entry["usable_groups"], entry


PLAIN = """
import json
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

llm = LLM("runs/full/final", dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=4, enable_lora=True,
          max_lora_rank=16)
greedy = SamplingParams(temperature=0, max_tokens=8)
for lora in (None, LoRARequest("teacher", 1, "runs/toy-teacher/final")):
    out, = llm.generate(["x 3 y 7 s1 x+=y"], greedy, lora_request=lora, use_tqdm=False)
    print("OUT", json.dumps([list(out.prompt_token_ids), list(out.outputs[0].token_ids)]))
"""


@needs_vllm
def test_a_result_is_served_by_vllm_alone(workshop):
    """Its own loaders of weights, tokenizer and adapter: all that `vllm serve` needs."""
    from rlt import models

    from transformers import AutoModelForCausalLM, AutoTokenizer

    call(workshop, "sft_student.py", "--data", "toy", "--lora-rank", 0, "--lr", 1e-3, "--steps", 1, "--limit", 100,
         "--out", "runs/full")
    environment = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=workshop, capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("OUT ")]
    final = workshop / "runs/full/final"
    ids = AutoTokenizer.from_pretrained(final)("x 3 y 7 s1 x+=y")["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    adapted = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    adapted.load_adapter(str(workshop / "runs/toy-teacher/final"))
    vocab = len(models.load_tokenizer(str(final)))
    for (prompt, new), model in zip(found, (plain, adapted), strict=True):
        assert prompt == ids and len(new) == 8
        logits = log_softmax_of(model.eval(), prompt + new, vocab, 0)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 1e-3, "greedy"
    assert found[0] != found[1]


if __name__ == "__main__":
    result = (measure_ranks if "RANK" in os.environ else measure)(sys.argv[1])
    if result:
        Path(sys.argv[2]).write_text(json.dumps(result))
