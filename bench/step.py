"""
Measure every phase of a training step on this machine, and what the paper's recipe would take. One command, one run:

    python tests/bench_step.py                 Qwen2.5-7B's dimensions, on a CUDA GPU: less than ten minutes
    python tests/bench_step.py --size tiny     the same code on a CPU: a minute

Weights are random and made on the device: nothing is downloaded. Parts
    rollout    decoding at a prefilled context, both engines: seconds of a step in which every row gets a token
    score      score_explanations, the student in 16 bits and in 4
    reference  completion_logprobs without gradient, under the reference adapter
    update     completion_logprobs and grpo_loss with gradient and backward, gradient checkpointing on
    step       all of them at the longest completions, one AdamW step included, in three settings: the peak of each
               phase beside what --dry-run expects
    recipe     GPU-hours of 125 steps x 16 questions x 64 explanations, from the phases measured before

FLOPs are the model's: 2 a parameter and token forward, 4 in an update (LoRA), causal attention, the head where it is
needed; recomputation does not count. Each measurement is a line of JSON, printed and appended to --out. What is
missing is named; running out of memory is a result.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import memory  # noqa: E402
import models  # noqa: E402
import runs  # noqa: E402
from grpo import grpo_loss  # noqa: E402
from rewards import Row, completion_logprobs, score_explanations  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SIZES = {  # Qwen2.5's, and a small one: config, the completions' lengths, tokens that a rollout holds in all
    "7b": (dict(hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152_064), (1024, 4096, 16_384), 2**18),
    "1.5b": (dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                  num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True), (1024, 4096, 16_384), 2**18),
    "tiny": (dict(hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, vocab_size=8192), (64, 256, 1024), 2**12),
}
ENGINES = ("batch", "continuous")
STEPS = 32  # decoded at each context
COMPLETIONS, PAPER = 125 * 16 * 64, 280.4  # the paper's recipe, and its H100-hours for it
RANK, ALPHA, HEAD_CHUNK = 32, 64, 1024


# ----------------------------------------------------------------------------------------------------------
# Measuring


def synchronise():
    if CUDA:
        torch.cuda.synchronize()


def seconds(function):
    synchronise()
    start = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - start


def peak_of(function, *resident):
    """Peak bytes on the device while it runs. On a CPU: the tensors it makes, and the models that are resident."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronise()
        return torch.cuda.max_memory_allocated()
    with memory.Live() as live:
        function()
    return live.peak + sum(map(nbytes, resident))


def nbytes(model):
    """Of all weights, the states of 4-bit ones included."""
    total = sum(p.nbytes for p in model.parameters())
    states = (p.quant_state for p in model.parameters() if getattr(p, "quant_state", None))
    return total + sum(x.nbytes for state in states for x in state.as_dict(packed=False).values()
                       if isinstance(x, torch.Tensor))


def attempt(function, **what):
    """Log what it returns, or that memory was not enough."""
    try:
        return log(**what, **function())
    except (RuntimeError, ValueError) as error:  # of another thread, or foreseen, where the engine is continuous
        if "out of memory" not in str(error):
            raise
        return log(**what, failed="out of memory")
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def log(**entry):
    entry = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in entry.items()}
    print(json.dumps(entry), flush=True)
    with open(args.out, "a") as file:
        file.write(json.dumps({**entry, **MACHINE}) + "\n")
    return entry


def machine():
    versions = {}
    for package in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return {"size": args.size, "device": torch.cuda.get_device_name() if CUDA else cpu, **versions, "seed": 0,
            "date": datetime.date.today().isoformat(), "git": runs._git(),
            "command": " ".join(["python tests/bench_step.py", *sys.argv[1:]])}


def matmul_rate():
    """FLOP/s of a square bf16 product on a GPU, fp32 on a CPU: the best of several."""
    n = 8192 if CUDA else 1024
    a, b = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16 if CUDA else torch.float32)
    seconds(lambda: a @ b)
    return 2 * n**3 * 10 / min(seconds(lambda: [a @ b for _ in range(10)]) for _ in range(3))


def flops(lengths, heads):
    """Of one forward pass over sequences of these lengths, with the head on so many tokens of each."""
    c = CONFIG
    h, kv = c.hidden_size, c.hidden_size * c.num_key_value_heads // c.num_attention_heads
    layer = 2 * (2 * h * h + 2 * h * kv + 3 * h * c.intermediate_size)
    attention = sum(2 * h * n * n for n in lengths)  # two products, half of them masked
    return c.num_hidden_layers * (layer * sum(lengths) + attention) + 2 * h * c.vocab_size * sum(heads)


# ----------------------------------------------------------------------------------------------------------
# Models of random weights


def random_model(bits, device=DEVICE):
    """A frozen Qwen2 with random weights, made on the device layer by layer: no 16-bit model exists at 4 bits."""
    from transformers import GenerationConfig, Qwen2ForCausalLM

    dtype = torch.bfloat16 if CUDA else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(CONFIG).to(dtype)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(CONFIG).to(device)
    for path, module in list(model.named_modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            made = torch.ones(p.shape, dtype=dtype, device=device)
            module.register_parameter(name, torch.nn.Parameter(made if p.dim() == 1 else made.normal_(0, 0.02), False))
        if bits == 4 and type(module) is torch.nn.Linear and module is not model.lm_head:
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], four_bits(module))
    model.tie_weights()
    model.is_loaded_in_4bit = bits == 4  # peft looks here
    model.generation_config = GenerationConfig()
    return model.eval().requires_grad_(False)


def four_bits(linear):
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        layer = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None,
                           compute_dtype=linear.weight.dtype, quant_type="nf4")
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4",
                              module=layer).to(linear.weight.device)
    layer.bias = linear.bias
    return layer


def pair(teacher_bits, student_bits):
    """The teacher, by the loader of the scripts, its AdamW with its states made, and the student."""
    load, models.load_model = models.load_model, lambda name, bits, device: random_model(bits)
    try:
        teacher = models.load_lora(str(ROOT / "tests"), bits=teacher_bits, device=DEVICE, rank=RANK, alpha=ALPHA,
                                   targets="all-linear", seed=0, reference=True, checkpointing=True)
    finally:
        models.load_model = load
    parameters = models.adapter_parameters(teacher)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    return teacher.eval(), optimizer, random_model(student_bits) if student_bits else None


def kinds():
    """Bits of the students and of the teachers' bases that can be had here: 4 needs bitsandbytes."""
    wide = 16 if CUDA else 32
    try:
        models._four_bits(DEVICE)
        return wide, 4
    except ImportError as error:
        log(part="4 bits", failed=f"bitsandbytes is not importable: {error}")
        return wide,


class Endless(list):
    """A tokenizer in name: as many words as the head, and an end of turn that lies beyond them and never comes."""

    def __init__(self):
        super().__init__(range(CONFIG.vocab_size - 1))
        self.eos_token_id, self.pad_token_id = CONFIG.vocab_size - 1, 0


def ids(n):
    return torch.randint(1, 1000, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def scoring_row(length):
    """Prompt, completion and solution of one explanation; the prompt's share as with 1,024 tokens at 16k."""
    return Row(ids(2 * PROMPT), ids(length - 2), ids(2), ids(PROMPT), ids(4), ids(PROMPT))


# ----------------------------------------------------------------------------------------------------------
# The phases


def decode(teacher, engine, batch, context):
    """The step in which rows at this context get a token each: the median of those with the most rows, up to batch."""
    from transformers import DynamicCache

    kv, size = CONFIG.num_key_value_heads, CONFIG.hidden_size // CONFIG.num_attention_heads
    dtype = torch.bfloat16 if CUDA else torch.float32
    prompts, times, new = [ids(context + 1) for _ in range(batch)], [], STEPS
    prompts[0] = prompts[0][1:]  # so that there is padding, as in life
    plain = type(teacher).generate

    def prefilled(**options):
        """generate, as if all but the last token of the prompts had been read: what they were does not matter."""
        cache = DynamicCache(config=CONFIG)
        for layer in range(CONFIG.num_hidden_layers):
            cache.update(*(torch.randn(batch, kv, context, size, device=DEVICE, dtype=dtype) for _ in range(2)), layer)
        return plain(teacher, past_key_values=cache, **options)

    def run():
        models.generate(teacher, Endless(), prompts, max_new_tokens=new, temperature=0.7, seed=0, engine=engine)

    if engine == "batch":
        teacher.generate = prefilled
    else:  # prompts are read 2048 tokens a step, and the first one must not end before the last one begins
        new += batch * context // (2048 - min(batch, 512))
    look = teacher.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: times.append((inputs[0].numel(), time.perf_counter())))
    try:
        peak = peak_of(run, teacher)
        if not CUDA:  # again, without counting bytes
            times.clear()
            run()
    finally:
        teacher.__dict__.pop("generate", None)
        look.remove()
    steps = {}  # tokens of a step: how long it took, where the next one had as many
    for (n, start), (following, end) in zip(times, times[1:], strict=False):
        if n == following <= batch:
            steps.setdefault(n, []).append(end - start)
    rows = max(n for n in steps if len(steps[n]) >= 8)
    step = statistics.median(steps[rows])
    peak = peak if CUDA or engine == "batch" else None  # the other engine works in a thread, uncounted
    return dict(rows=rows, seconds=step, tokens_per_s=rows / step, of_matmul=rows / step * flops([1], [1]) / MATMUL,
                peak_gb=peak and peak / 1e9)


def rollout(teacher, rows):
    for context in LENGTHS:
        batch = max(1, HELD // context)
        for engine in ENGINES:
            what = dict(part="rollout", engine=engine, context=context, batch=batch)
            rows.append(attempt(lambda e=engine, b=batch, c=context: decode(teacher, e, b, c), **what))


def measured(function, work, completions, length, *resident):
    peak = peak_of(function, *resident)  # and a warm-up
    took = seconds(function)
    return dict(seconds=took, tokens_per_s=completions * length / took, of_matmul=work / took / MATMUL,
                peak_gb=peak / 1e9)


def scoring(teacher, student, length, count):
    rows = [scoring_row(length)] * count
    told, seen = 2 * PROMPT + length, 2 * PROMPT + length + 2
    work = flops([told] * count, [length] * count) + flops([seen] * count, [length + PROMPT] * count)

    def score():
        score_explanations(teacher, student, rows, temperature=0.7, vocab=CONFIG.vocab_size - 1, kl="sampled",
                           head_chunk=HEAD_CHUNK, micro_batch_tokens=MICRO)

    return measured(score, work, count, length, teacher, student)


def log_probs(teacher, length, count):
    row = scoring_row(length)
    return completion_logprobs(teacher, [row.teacher_prompt] * count, [row.thought + row.teacher_end] * count,
                               temperature=0.7, vocab=CONFIG.vocab_size - 1, head_chunk=HEAD_CHUNK)[0]


def referring(teacher, length, count):
    def reference():
        with models.using(teacher, "reference"):
            log_probs(teacher, length, count)

    work = flops([2 * PROMPT + length] * count, [length] * count)
    return measured(reference, work, count, length, teacher)


def learn(teacher, length, count):
    """One micro-batch of train_rlt's update."""
    teacher.train()
    policy = log_probs(teacher, length, count)
    loss, _ = grpo_loss(policy, policy.detach(), policy.detach(), torch.linspace(-1, 1, count, device=DEVICE),
                        torch.tensor([length] * count), denominator=count, beta=0.04)
    loss.backward()
    teacher.eval()


def updating(teacher, optimizer, length, count):
    """Parameters: 2 forward, 2 backward; attention: 1 forward, 2 backward; the head: as parameters."""
    told = [2 * PROMPT + length] * count
    forward, attention = flops(told, [length] * count), 2 * CONFIG.hidden_size * CONFIG.num_hidden_layers
    work = 2 * forward + attention * sum(n * n for n in told)

    def update():
        learn(teacher, length, count)
        optimizer.zero_grad()

    return measured(update, work, count, length, teacher)


def whole_step(teacher_bits, student_bits, parked):
    """Peaks of all phases at the longest completions, and what memory.phases expects of them."""
    teacher, optimizer, student = pair(teacher_bits, student_bits)
    state = 0 if CUDA else 2 * sum(p.nbytes for p in models.adapter_parameters(teacher))
    length, batch = LENGTHS[-1], max(1, HELD // LENGTHS[-1] // 2)
    shapes = (memory.Shape(CONFIG, bits=teacher_bits, gpu=CUDA, rank=RANK, trained="adapter", reference=True),
              memory.Shape(CONFIG, bits=student_bits, gpu=CUDA))
    expected = memory.phases(
        *shapes, vocab=CONFIG.vocab_size - 1, head_chunk=HEAD_CHUNK, tokens=2 * PROMPT + length + 2, scored=True,
        learned=True, reference=True, rollout=(batch, 1, length + STEPS), checkpointing=True, parked=parked)
    setting = dict(part="step", teacher_bits=teacher_bits, student_bits=student_bits, offload_student=parked,
                   length=length)

    def place(where):
        student.to(where)
        return [teacher] if parked and where != DEVICE else [teacher, student]

    def last():
        learn(teacher, length, 1)
        learn(teacher, length, 1)  # with the first one's gradients there
        torch.nn.utils.clip_grad_norm_(models.adapter_parameters(teacher), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for phase in ("score", "rollout", "reference", "update"):
        here = place(DEVICE if phase == "score" or not parked else "cpu")
        run = {
            "score": lambda: scoring(teacher, student, length, 1)["peak_gb"] * 1e9,
            "rollout": lambda: decode(teacher, "batch", batch, length)["peak_gb"] * 1e9,
            "reference": lambda: referring(teacher, length, 1)["peak_gb"] * 1e9,
            "update": lambda: peak_of(last, teacher),
        }[phase]

        def compare(run=run, phase=phase, here=here):
            beside = state if phase == "score" or CUDA else state + sum(map(nbytes, here[1:]))
            peak, expectation = run() + (0 if CUDA else beside), expected[phase]["total"]
            return dict(peak_gb=peak / 1e9, expected_gb=expectation / 1e9, ratio=expectation / peak)

        attempt(compare, **setting, phase=phase)


# ----------------------------------------------------------------------------------------------------------
# The recipe


def between(points, x):
    """The line through measured points (x, y), level below the first and above the last."""
    points = sorted(points)
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def recipe(rows):
    """Hours of the paper's 125 steps, were every completion of the mean length: seconds a token, interpolated."""
    done = [row for row in rows if "tokens_per_s" in row]
    for engine in ENGINES:
        for bits in sorted({row["student_bits"] for row in done if row["part"] == "score"}):
            points = {
                "rollout": [(row["context"], 1 / row["tokens_per_s"]) for row in done if row.get("engine") == engine],
                "score": [(row["length"], 1 / row["tokens_per_s"]) for row in done if row.get("student_bits") == bits],
                **{part: [(row["length"], 1 / row["tokens_per_s"]) for row in done if row["part"] == part]
                   for part in ("reference", "update")}}
            if not all(points.values()):
                log(part="recipe", engine=engine, student_bits=bits,
                    failed=f"not measured: {', '.join(p for p in points if not points[p])}")
                continue
            for mean in (LENGTHS[0], 2 * LENGTHS[0], LENGTHS[1], 2 * LENGTHS[1]):
                parts = {part: between(points[part], mean) for part in ("score", "reference", "update")}
                contexts = [2 * PROMPT + mean * (i + 0.5) / 64 for i in range(64)]  # a completion meets all of them
                parts["rollout"] = sum(between(points["rollout"], c) for c in contexts) / 64
                hours = {f"h_{part}": COMPLETIONS * mean * a_token / 3600 for part, a_token in parts.items()}
                log(part="recipe", engine=engine, student_bits=bits, length=mean, **hours, h_total=sum(hours.values()),
                    h_without_rollout=sum(hours.values()) - hours["h_rollout"], h_paper=PAPER)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="7b", help="of the models")
    parser.add_argument("--parts", nargs="+", choices=("rollout", "score", "reference", "update", "step", "recipe"),
                        default=["rollout", "score", "reference", "update", "step", "recipe"], help="what to measure")
    parser.add_argument("--out", default=ROOT / "figures/logs/bench_step.jsonl", help="JSONL to append to")
    args = parser.parse_args()
    if not CUDA and args.size != "tiny":
        parser.error(f"--size {args.size} needs a CUDA GPU, and there is none here: pass --size tiny")

    from transformers import Qwen2Config

    sizes, LENGTHS, HELD = SIZES[args.size]
    CONFIG = Qwen2Config(**{"tie_word_embeddings": False, **sizes}, max_position_embeddings=32_768,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    PROMPT = LENGTHS[-1] // 32  # tokens of a question, and of its solution
    MICRO = LENGTHS[-1] + 2 * PROMPT + 2  # tokens of a pass: the longest row goes alone
    torch.manual_seed(0)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    MACHINE = machine()
    MATMUL = matmul_rate()
    log(part="ceiling", matmul_tflop_s=MATMUL / 1e12)
    wide, *four = kinds()

    rows = []
    teacher, optimizer, _ = pair(wide, None)
    if "rollout" in args.parts:
        rollout(teacher, rows)
    counts = {length: max(1, MICRO // (length + 2 * PROMPT + 2)) for length in LENGTHS}
    for bits in [wide, *four] if "score" in args.parts else []:
        student = random_model(bits)
        for length, count in counts.items():
            rows.append(attempt(lambda n=length, c=count, s=student: scoring(teacher, s, n, c), part="score",
                                student_bits=bits, length=length, rows=count))
        del student
    for length, count in counts.items():
        if "reference" in args.parts:
            rows.append(attempt(lambda n=length, c=count: referring(teacher, n, c), part="reference", length=length,
                                rows=count))
        if "update" in args.parts:
            rows.append(attempt(lambda n=length, c=count: updating(teacher, optimizer, n, c), part="update",
                                length=length, rows=count))
    del teacher, optimizer
    gc.collect()
    if "step" in args.parts:
        for teacher_bits, student_bits, parked in ((wide, wide, False), *((wide, 4, True), (4, 4, True)) * bool(four)):
            whole_step(teacher_bits, student_bits, parked)
    if "recipe" in args.parts:
        recipe(rows)
