"""Every command of the README passes its own --dry-run on the card it is for.   pytest tests/test_readme_commands.py"""

import contextlib
import io
import json
import re
import shlex
import shutil
import sys

from rlt import distributed, dry_run, models, rows
from rlt.footprint import ModelFootprint

import pytest
from conftest import ROOT, call
from peft import LoraConfig
from small_tokenizers import make_tokenizer
from transformers import Qwen2Config

sys.path.insert(0, str(ROOT / "figures"))

import machines  # noqa: E402

SCRIPTS = ("train_rlt.py", "distill.py", "sft_student.py", "rl_student.py", "on_policy_student.py", "evaluate.py")
QWEN, STUDENT, DATA = "Qwen/Qwen2.5-7B-Instruct", "bespokelabs/Bespoke-Stratos-7B", "bespokelabs/Bespoke-Stratos-17k"


def commands():
    """(line of the README, GB of a GPU, its peak in GB where it says one, ranks, script, flags) of each command."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "README.md").read_text())
    text = re.sub(r"```sh\n[^`]*pairs\.csv[^`]*```", "", text)  # tests/test_defaults.py runs these
    recipe = re.search(r'RECIPE="(.*?)"', text, re.S)[1]
    found = []
    for line in text.splitlines():
        for launcher, script, given in re.findall(r"\b(python|torchrun [^`]*?) (\w+\.py)([^`#]*)", line):
            if script in SCRIPTS and "..." not in given:
                card = re.search(r"(\d+) GB GPU", line)
                peak = re.search(r"(\d+) GB in \w+ \(estimated\)", line)
                ranks = eval("*".join(re.findall(r"--n\w+=(\d+)", launcher)) or "1")  # digits and * alone
                found.append((line, int(card[1]) if card else 80, int(peak[1]) if peak else None, ranks, script,
                              shlex.split(given.replace("$RECIPE", recipe))))
    return found


class LayersMultiplied:
    """The ModelFootprint of a model whose layers are alike: those of two layers and of three, and the line through
    them. With one layer it would not be a line: nothing is kept of a layer while another one computes."""

    measured = {}  # one model is measured once

    def __init__(self, config, **options):
        few = [Qwen2Config(**{**config.to_dict(), "num_hidden_layers": n, "layer_types": None}) for n in (2, 3)]
        self.layers = config.num_hidden_layers
        self.key = json.dumps(few[0].to_dict(), default=str), str(sorted(options.items(), key=str))
        if self.key not in self.measured:
            self.measured[self.key] = [ModelFootprint(part, **options) for part in few], {}
        self.parts, self.known = self.measured[self.key]

    def line(self, two, three):
        return two + (three - two) * (self.layers - 2)

    def __getattr__(self, name):
        two, three = (getattr(part, name) for part in self.parts)
        return self.line(two, three) if type(two) is int else three

    def measure(self, name, *arguments):
        if (name, *arguments) not in self.known:
            values = zip(*(getattr(part, name)(*arguments) for part in self.parts), strict=True)
            self.known[name, *arguments] = [self.line(*pair) for pair in values]
        return self.known[name, *arguments]

    def forward_bytes(self, tokens):
        return self.measure("forward_bytes", tokens)

    def training_bytes(self, tokens, checkpointing):
        return self.measure("training_bytes", tokens, checkpointing)

    def generate_bytes(self, batch, prompt, new):
        """Reading the prompts and the last step are a line each; the larger of the two is not."""
        reading = self.measure("generate_bytes", batch, prompt, 2)
        last_step = self.measure("generate_bytes", batch, 2, prompt + new - 2)
        return [max(pair) for pair in zip(reading, last_step, strict=True)]


@pytest.fixture(scope="module")
def folder(workshop, tmp_path_factory):
    """What the commands read: the toy and what earlier commands leave, configs of 7B models, no weights."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(workshop / "runs/toy", folder / "runs/toy")
    for name in ("toy-teacher", "teacher", "student"):
        shutil.copytree(workshop / "runs/toy-teacher", folder / "runs" / name)
    shutil.copy(workshop / "runs/toy/train.jsonl", folder / "runs/distilled.jsonl")
    shutil.copytree(ROOT / "data", folder / "data")
    tokenizer = make_tokenizer("byte-level")
    smollm2 = machines.QWEN_7B | {"hidden_size": 576, "num_hidden_layers": 2, "num_attention_heads": 8}
    for name, sizes in ((QWEN, machines.QWEN_7B), (STUDENT, machines.QWEN_7B), ("runs/smollm2", smollm2)):
        Qwen2Config(**sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "runs/smollm2/model.safetensors").touch()  # else it would be made
    LoraConfig(r=machines.RANK, target_modules="all-linear", task_type="CAUSAL_LM",
               base_model_name_or_path=str(folder / QWEN)).save_pretrained(folder / "runs/warm-up-7b/final")
    return folder


COMMANDS = commands()


def test_the_commands_are_found():
    assert len(COMMANDS) == 4 + 1 + 2 + 1 + len(machines.PLANS), "quick start, a score, recipe, the table of machines"
    assert {script for *_, script, _ in COMMANDS} == {*SCRIPTS} - {"rl_student.py", "on_policy_student.py"}
    assert [ranks for _, _, peak, ranks, *_ in COMMANDS if peak] == [plan.gpus for plan in machines.PLANS]
    assert [gb for _, gb, peak, *_ in COMMANDS if peak] == [24, 80, 80, 80, 80]


@pytest.mark.parametrize(("line", "gb", "peak", "ranks", "script", "flags"), [
    pytest.param(*command, marks=[pytest.mark.slow] if i else []) for i, command in enumerate(COMMANDS)])
def test_a_command_of_the_readme_fits(folder, monkeypatch, line, gb, peak, ranks, script, flags):
    """With prompts of 1,024 tokens and explanations beyond the limit. The peak is the one that the README says."""
    load_rows, load_tokenizer = rows.load_rows, models.load_tokenizer

    def qwen_sized(name):
        tokenizer = load_tokenizer(name)
        if models.base_of(name).endswith("-7B") or "Qwen" in models.base_of(name):
            tokenizer.__class__ = type("Wide", (type(tokenizer),), {"__len__": lambda _: machines.VOCAB})
        return tokenizer

    def seven_b(config, **options):
        return (LayersMultiplied if config.hidden_size == 3584 else ModelFootprint)(config, **options)

    def long_rows(source, **options):
        if source != DATA:
            return load_rows(source, **options)
        row = {"question": "7 " * 100, "solution": "7 " * 316, "explanation": "7 " * 9000, "where": "row"}
        return [row] * 200

    monkeypatch.setattr(models, "load_tokenizer", qwen_sized)
    monkeypatch.setattr(rows, "load_rows", long_rows)
    monkeypatch.setattr(dry_run, "ModelFootprint", seven_b)
    monkeypatch.setattr(distributed, "init_distributed", lambda device: (0, ranks))
    out = [] if script == "evaluate.py" else ["--out", "runs/never"]
    with pytest.raises(SystemExit) as end, contextlib.redirect_stdout(io.StringIO()) as printed:
        call(folder, script, *flags, *out, "--dry-run", gb)
    verdict = printed.getvalue().splitlines()[-1]
    assert end.value.code == 0 and verdict.startswith("fits: "), f"{line}\n{printed.getvalue()}"
    if peak:
        rows_of = int(re.search(r"rows of up to ([\d,]+) tokens", printed.getvalue())[1].replace(",", ""))
        limit = int(flags[flags.index("--max-new-tokens") + 1])
        assert rows_of - limit == pytest.approx(machines.PROMPT, abs=4), "the table's prompts"
        assert float(re.search(r"fits: ([\d.]+) GB", verdict)[1]) == pytest.approx(peak, abs=0.55), "rounded"
