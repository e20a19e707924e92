"""The script: its numbers are those of the samples it wrote, and it never loses an evaluation.

python -m pytest tests/test_evaluate.py -v
"""
import itertools
import json
import math
import shutil
import statistics

from rlt import models, rollout
from rlt.answers import same_text
from rlt.errors import UserError
from rlt.evaluations import SHOWN, result_path
from rlt.files import read_jsonl
from rlt.grading import grade, over_questions
from rlt.paper import TABLE_1
from rlt.prompts import Prompts
from rlt.rows import load_rows

import pytest
import torch
from conftest import call, data_file, ended
from test_grading import AFTER, BEFORE, GPQA, write_evaluation

from bench import zoo
from evaluate import PROTOCOLS


@pytest.fixture
def folder(toy, tmp_path):
    """A folder with a toy of its own: other tests' evaluations stay as they are."""
    shutil.copytree(toy / "runs/toy", tmp_path / "runs/toy", ignore=shutil.ignore_patterns("eval_*"))
    return tmp_path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def qwen_folder(tmp_path, tiny_model, qwen_tokenizer):
    """A model folder as other people have them, with Qwen2.5's tokenizer."""
    tiny_model(len(qwen_tokenizer)).save_pretrained(tmp_path / "model")
    qwen_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def words():
    """A tokenizer that is loaded in no time: a token is a byte."""
    return zoo.tokenizer()


@pytest.fixture
def other_folder(tmp_path, tiny_model, words):
    """A model folder that is not the toy's."""
    tiny_model(len(words)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def says(monkeypatch, tokenizer, outputs):
    """Stands in for the sampler: these texts, one after the other and again."""
    texts = itertools.cycle(outputs)

    def generate(model, tokenizer_, prompts, *, max_new_tokens, **settings):
        ids = [tokenizer(next(texts) if max_new_tokens > 1 else "")["input_ids"] + [tokenizer.eos_token_id]
               for _ in prompts]
        return [rollout.Completion(one, [-0.5] * len(one), True) for one in ids]

    monkeypatch.setattr(rollout, "generate", generate)


# ---------------------------------------------------------------------------------------------------------
# numbers


def test_numbers_are_those_of_the_samples(folder, tmp_path, capsys):
    """And they don't change when it is called again."""
    flags = ("--limit", 5, "--max-new-tokens", 12, "--batch-size", 7)
    more = ("--samples", 4, "--temperature", 1, "--seed", 3, "--out", tmp_path / "out")
    call(folder, "evaluate.py", "--model", "toy", "runs/toy", *flags, *more)
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "out/toy/eval_toy.json").read_text())
    samples = read_jsonl(tmp_path / "out/toy/eval_toy_samples.jsonl")
    assert samples == read_jsonl(tmp_path / "out/runs_toy/eval_toy_samples.jsonl") and len(samples) == 20
    assert [s["where"] for s in samples[::4]] == [s["where"] for s in samples[3::4]]
    rows = load_rows(folder / "runs/toy/test.jsonl", limit=5)
    for i, sample in enumerate(samples):
        assert sample["grade"] == grade("toy", sample["output"], rows[i // 4])
        assert sample["gold"] == rows[i // 4]["solution"]
    right = [sum(s["grade"] for s in samples[at : at + 4]) for at in range(0, 20, 4)]
    assert result["questions"] == 5 and result["exact_match"]["mean"] == statistics.fmean(right) / 4
    assert result["pass_at"]["4"]["mean"] == statistics.fmean(map(bool, right))
    assert list(result["pass_at"]) == ["1", "2", "4"]
    assert result["truncated"] == statistics.fmean(not s["finished"] for s in samples)
    assert result["length"] == statistics.fmean(s["length"] for s in samples) <= 12
    assert result["flags"]["seed"] == 3 and result["timeouts"] == 0
    for word in ("exact match", "pass@2", "pass@4", "truncated", "length", result["prompt_hash"],
                 "± standard error over questions"):
        assert word in shown
    assert "(paper)" not in shown and "string match" not in shown  # the paper has no toy

    call(folder, "evaluate.py", "--model", "toy", *flags)
    greedy = read_jsonl(folder / "runs/toy/eval_toy_samples.jsonl")  # beside the model
    assert len(greedy) == 5 and "pass@" not in capsys.readouterr().out


def test_hinted(folder, tmp_path, capsys, monkeypatch):
    """The prompts have the hint, and the results are beside the plain ones."""
    prompts, seen = Prompts(models.load_tokenizer(folder / "runs/toy")), []
    generate = rollout.generate

    def recording(model, tokenizer, batch, **settings):
        seen.extend(batch if settings["max_new_tokens"] > 1 else [])
        return generate(model, tokenizer, batch, **settings)

    monkeypatch.setattr(rollout, "generate", recording)
    flags = ("--model", "toy", "--limit", 3, "--samples", 2, "--temperature", 1, "--max-new-tokens", 8)
    for hinted in ([], ["--hinted"]):
        call(folder, "evaluate.py", *flags, *hinted, "--out", tmp_path / "out")
    rows = [row for row in load_rows(folder / "runs/toy/test.jsonl", limit=3) for _ in range(2)]
    assert seen == [*map(prompts.question_prompt, rows), *map(prompts.hinted_prompt, rows)]
    kept = [json.loads((tmp_path / f"out/toy/eval_toy{end}.json").read_text()) for end in ("", "_hinted")]
    assert [result["hinted"] for result in kept] == [False, True]
    assert len(read_jsonl(tmp_path / "out/toy/eval_toy_hinted_samples.jsonl")) == 6
    plain_table, hinted_table = capsys.readouterr().out.split("toy/eval_toy_hinted.json")
    assert "toy, hinted" in hinted_table and "toy, hinted" not in plain_table
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "1", "solution": "2"}])
    with pytest.raises(UserError, match='rows.jsonl line 1 has no "hint" .columns found: question'):
        call(folder, "evaluate.py", *flags, "--hinted", "--data", rows)


@pytest.mark.parametrize("task, file, grader", [
    ("gsm8k", "gsm8k_train_1k.jsonl", "math-verify"), ("countdown", "countdown_sample.jsonl", "fractions")])
def test_public_rows(tmp_path, capsys, qwen_folder, task, file, grader):
    call(tmp_path, "evaluate.py", "--task", task, "--data", data_file(file), "--model", qwen_folder, "--limit", 3,
         "--max-new-tokens", 8, "--out", "out")
    [path] = (tmp_path / "out").rglob(f"eval_{task}.json")
    result = json.loads(path.read_text())
    assert grader in result["grader"] and grader in capsys.readouterr().out
    assert result["questions"] == 3 and result["truncated"] == 1.0 and result["length"] == 8


def test_two_verdicts_on_the_same_samples(tmp_path, capsys, other_folder, words, monkeypatch, graded_here):
    """math-verify does algebra, the string match does not; the paper's numbers are marked as such."""
    answers = [r"\boxed{2(k+1)}", r"\boxed{\dfrac12}", r"no box", r"<think>\boxed{5}, wait"]
    golds = ["2k+2", r"\frac{1}{2}", "5", "5"]
    rows = write_rows(tmp_path / "rows.jsonl", [
        {"problem": f"problem {i}", "solution": "as you see", "answer": gold} for i, gold in enumerate(golds)])
    says(monkeypatch, words, answers)
    call(tmp_path, "evaluate.py", "--task", "math500", "--data", rows, "--model", "model", "--max-new-tokens", 99)
    result = json.loads((tmp_path / "runs/eval/model/eval_math500.json").read_text())
    samples = read_jsonl(tmp_path / "runs/eval/model/eval_math500_samples.jsonl")
    assert [s["grade"] for s in samples] == [True, True, False, False]
    assert [s["string_match"] for s in samples] == [False, True, False, False]
    assert all(s["string_match"] == (s["answer"] is not None and same_text(s["gold"], s["answer"])) for s in samples)
    assert result["exact_match"]["mean"] == 0.5 and result["string_match"]["mean"] == 0.25
    shown = capsys.readouterr().out
    assert "string match" in shown and "50.0 ± 28.9 %" in shown and "25.0 ± 25.0 %" in shown
    for name in SHOWN:
        [line] = [line for line in shown.splitlines() if line.startswith(f"{name} (paper)")]
        assert f"{TABLE_1[name]['math500']:.1f} %" in line and "±" not in line
    assert "as printed in arXiv 2506.08388, not measured here" in shown


def test_a_thought_that_the_template_opens(tmp_path, other_folder, words, monkeypatch, graded_here):
    """Cut off in it, an answer shows no tag of its own: it is none all the same."""
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
        "{% endif %}")
    words.save_pretrained(other_folder)
    rows = write_rows(tmp_path / "rows.jsonl", [{"problem": f"{i}", "solution": "so", "answer": "5"} for i in (1, 2)])
    says(monkeypatch, words, [r"maybe \boxed{5}, wait", r"maybe \boxed{7}</think> \boxed{5}"])
    call(tmp_path, "evaluate.py", "--task", "aime25", "--data", rows, "--model", "model", "--max-new-tokens", 99)
    samples = read_jsonl(tmp_path / "runs/eval/model/eval_aime25_samples.jsonl")
    assert [s["grade"] for s in samples] == [False, True] and [s["answer"] for s in samples] == [None, "5"]
    assert samples[0]["output"].startswith("<think>")


def test_gpqa(tmp_path, capsys, other_folder, words, monkeypatch):
    """Four choices in an order of their own, a letter for an answer; a null in one row leaves that row out."""
    rows = [{"Question": f"Which energy, {i}?", **GPQA} for i in range(8)]
    rows[3]["Incorrect Answer 1"] = None
    path = write_rows(tmp_path / "gpqa.jsonl", rows)
    says(monkeypatch, words, [r"\boxed{A}"])
    flags = ("--task", "gpqa", "--data", path, "--model", "model", "--max-new-tokens", 99)
    call(tmp_path, "evaluate.py", *flags, "--seed", 5)
    result = json.loads((tmp_path / "runs/eval/model/eval_gpqa.json").read_text())
    samples = read_jsonl(tmp_path / "runs/eval/model/eval_gpqa_samples.jsonl")
    assert result["questions"] == 7 and "1 of 8 rows" in capsys.readouterr().out
    for sample in samples:
        assert sample["grade"] == (sample["gold"] == "A") and f"{sample['gold']}) 10^-4 eV" in sample["question"]
    assert len({sample["gold"] for sample in samples}) > 1
    call(tmp_path, "evaluate.py", *flags, "--seed", 6, "--out", "other")
    again = read_jsonl(tmp_path / "other/model/eval_gpqa_samples.jsonl")
    assert [s["gold"] for s in again] == [s["gold"] for s in samples]  # --seed is of the draws: --floor needs it so


def test_protocols(folder, monkeypatch, capsys):
    """They change defaults; a flag that is given wins."""
    seen = []
    generate = rollout.generate

    def recording(model, tokenizer, batch, **settings):
        if settings["max_new_tokens"] > 1:
            seen.append((len(batch), settings["temperature"], settings["max_new_tokens"]))
        return generate(model, tokenizer, batch, **settings)

    monkeypatch.setattr(rollout, "generate", recording)
    assert all(set(values) <= {"temperature", "samples", "max_new_tokens"} for values in PROTOCOLS.values())
    flags = ("--model", "toy", "--limit", 2, "--max-new-tokens", 6)
    call(folder, "evaluate.py", *flags, "--protocol", "avg@16", "--out", "a")
    call(folder, "evaluate.py", *flags, "--protocol", "avg@16", "--samples", 2, "--temperature", 1, "--out", "b")
    call(folder, "evaluate.py", *flags, "--protocol", "skythought", "--out", "c")
    assert seen == [(32, 0.6, 6), (4, 1.0, 6), (2, 0.0, 6)]
    assert json.loads((folder / "a/toy/eval_toy.json").read_text())["protocol"] == "avg@16"
    assert "protocol skythought" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------
# files


def test_an_evaluation_with_other_settings_is_never_overwritten(folder):
    flags = ("--model", "toy", "--limit", 4, "--max-new-tokens", 6)
    call(folder, "evaluate.py", *flags)
    path = folder / "runs/toy/eval_toy.json"
    before = path.read_text()
    rows = (folder / "runs/toy/test.jsonl").read_text().splitlines()
    other = folder / "other.jsonl"
    other.write_text("\n".join(rows[5:9]) + "\n")
    for change, named in (
        (("--samples", 2, "--temperature", 1), "samples = 1, now 2; temperature = 0.0, now 1.0"),
        (("--seed", 1), "seed = 0, now 1"), (("--max-new-tokens", 7), "max_new_tokens = 6, now 7"),
        (("--limit", 3), "with other questions"), (("--data", other), "with other questions"),
        (("--batch-size", 3), "batch_size"),
    ):
        with pytest.raises(UserError, match="eval_toy.json was made with .*Pass --out FOLDER to keep both") as error:
            call(folder, "evaluate.py", *flags, *change)
        assert named in str(error.value) and "\n" not in str(error.value)
    assert path.read_text() == before
    call(folder, "evaluate.py", *flags)  # the same again: the model may have been trained on
    call(folder, "evaluate.py", *flags, "--seed", 1, "--out", "elsewhere")
    assert (folder / "elsewhere/toy/eval_toy.json").exists()


def test_files_of_older_versions_are_guarded_too(folder):
    """They have no hash of their questions."""
    write_evaluation(folder / "runs/toy", BEFORE)
    with pytest.raises(UserError, match="was made with samples = 4, now 1"):
        call(folder, "evaluate.py", "--model", "toy", "--limit", 4)


def test_nothing_is_written_into_other_peoples_folders(tmp_path, other_folder):
    before = {path: path.stat().st_mtime_ns for path in other_folder.rglob("*")}
    args = ("--task", "countdown", "--data", data_file("countdown_sample.jsonl"), "--limit", 2, "--max-new-tokens", 4)
    for name in ("model", "./model/", other_folder):
        call(tmp_path, "evaluate.py", "--model", name, *args)
    assert {path: path.stat().st_mtime_ns for path in other_folder.rglob("*")} == before
    folders = {path.parent.name for path in (tmp_path / "runs/eval").rglob("eval_countdown.json")}
    assert folders == {"model", "_".join(other_folder.parts[1:])}


def test_outputs_without_an_answer_are_counted(folder, capsys):
    """One token is no answer. A share that no question differs in has no standard error."""
    call(folder, "evaluate.py", "--model", "toy", "--limit", 4, "--max-new-tokens", 1, "--out", "short")
    assert json.loads((folder / "short/toy/eval_toy.json").read_text())["no_answer"] == 1
    shown = capsys.readouterr().out
    assert "toy: no answer was found in 100.0 % of the outputs" in shown and "± 0" not in shown


def test_where_results_go(tmp_path, monkeypatch):
    """A run folder is known by its own config.json, a model folder by having another one."""
    class Args:
        task, hinted, out = "toy", False, None

    run, alien = tmp_path / "run", tmp_path / "alien"
    for folder in (run / "final", run / "step_000002", alien / "final"):
        folder.mkdir(parents=True)
    (run / "config.json").write_text('{"flags": {"lr": 1}}')
    for text in ('{"model_type": "qwen2"}', "", "[]", '"flags"'):
        (alien / "config.json").write_text(text)
        assert result_path("alien", alien, Args) == result_path("alien", alien / "final", Args)
        assert str(result_path("alien", alien, Args)) == "runs/eval/alien/eval_toy.json"
    assert result_path("run", run / "final", Args) == run / "eval_toy.json"
    monkeypatch.chdir(tmp_path)
    assert str(result_path("run", run / "final", Args)) == "run/eval_toy.json", "as one would type it"
    assert str(result_path("run/step_000002", run / "step_000002", Args)) == "runs/eval/run_step_000002/eval_toy.json"
    assert str(result_path("org/name", "org/name", Args)) == "runs/eval/org_name/eval_toy.json"
    Args.out, Args.hinted = "x", True
    assert str(result_path("run", run / "final", Args)) == "x/run/eval_toy_hinted.json"


# ---------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize("flags, complaint", [
    (("--samples", 3), "--temperature 0 are all the same: pass 0.6, say"),
    (("--task", "gsm8k"), "--task gsm8k needs --data, rows with answer"),
    (("--task", "mmlu"), "invalid choice: 'mmlu'"),
    (("--protocol", "avg@3"), "invalid choice: 'avg@3'"),
    (("--floor", "runs/toy"), "--floor does nothing without --compare"),
    (("--compare", "a", "b", "--samples", 2, "--temperature", 1), "--samples does nothing with --compare"),
    (("--compare", "a", "b", "--limit", 2), "--limit does nothing with --compare"),
    (("--compare", "a", "b", "--protocol", "avg@16"), "--protocol does nothing with --compare"),
    (("--task", "gsm8k", "--compare", "a", "b"), "a/eval_gsm8k.json is missing: evaluate first"),
    (("--samples", 0), "got 0, expected at least 1"),
    (("--temperature", -1), "got -1, expected at least 0"),
    (("--model", "runs/nobody"), "runs/nobody does not exist"),
    (("--model", "toy", "--max-new-tokens", 10**6), "context of toy is"),
])
def test_refusals(toy, capsys, flags, complaint):
    with pytest.raises((SystemExit, UserError)) as error:
        call(toy, "evaluate.py", *flags)
    assert complaint in f"{error.value} {capsys.readouterr().err}"


def test_the_toys_questions_are_for_the_toy(toy, qwen_folder):
    """A language model would be wrong on all of them, and nothing would say why."""
    with pytest.raises(UserError, match=f"which {qwen_folder} is not: pass another --task"):
        call(toy, "evaluate.py", "--model", "toy", qwen_folder)


def test_questions_that_are_too_long_are_left_out_on_demand(folder, capsys):
    """For all models alike, so that they answer the same questions."""
    lengths = [len(Prompts(models.load_tokenizer(folder / "runs/toy")).question_prompt(row))
               for row in load_rows(folder / "runs/toy/test.jsonl", limit=20)]
    context = models.context_length(folder / "runs/toy")
    room = context - statistics.median_high(lengths)
    flags = ("--model", "toy", "--limit", 20, "--max-new-tokens", room, "--batch-size", 64)
    with pytest.raises(UserError, match="test.jsonl line .* takes .* the context of toy is"):
        call(folder, "evaluate.py", *flags)
    call(folder, "evaluate.py", *flags, "--skip-bad-rows")
    fit = sum(length + room <= context for length in lengths)
    assert json.loads((folder / "runs/toy/eval_toy.json").read_text())["questions"] == fit < 20
    assert f"{20 - fit} of 20 rows left out" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_model_is_no_evaluation(tmp_path, other_folder, tiny_model, words, temperature, value):
    """0 % would be a number. One line, and nothing is written."""
    model = tiny_model(len(words))
    with torch.no_grad():
        model.lm_head.weight[7, 0] = value
    model.save_pretrained(other_folder)
    flags = ("--data", data_file("countdown_sample.jsonl"), "--limit", 2, "--max-new-tokens", 4)
    stdout, stderr, code = ended(tmp_path, "evaluate.py", "--task", "countdown", "--model", "model", *flags,
                                 "--temperature", temperature)
    assert code == 2 and "exact match" not in stdout
    [line] = [line for line in stderr.splitlines() if "evaluate.py" in line]
    assert "computes log-probs that are NaN or infinite" in line and "Traceback" not in stderr
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------------------------------------------------
# comparison


def test_compare(tmp_path, capsys):
    """Grades that took too long (2 stands for None) are wrong; no model is loaded."""
    write_evaluation(tmp_path / "before", BEFORE)
    write_evaluation(tmp_path / "after", [[2, *AFTER[0][1:]], *AFTER[1:]])
    write_evaluation(tmp_path / "other", [[0] * 4, *BEFORE[1:]], seed=1)
    for folder, table in (("before", AFTER), ("after", BEFORE)):
        write_evaluation(tmp_path / folder, table, "eval_toy_hinted")
    call(tmp_path, "evaluate.py", "--compare", "before", "after", "--floor", "other", "--hinted")
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "after/compare_toy.json").read_text())
    assert report["floor"] == "other" and report["before"] == "before"
    assert list(report["pass_at"]) == ["before", "after", "floor", "before, hinted", "after, hinted"]
    assert report["pass_at"]["before, hinted"]["4"]["mean"] == statistics.fmean(map(any, AFTER))
    assert report["split"]["after"]["regression"]["questions"] == [0, 1]
    assert report["split"]["floor"]["regression"] == over_questions([1] + [0] * 7) | {"questions": [0]}
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "pass@k 1 2 4" in lines and "before against after floor" in lines
    assert "self distillation 25.0 ± 16.4 % 0.0 %" in lines
    assert "8 questions | solved: by the first draw | within reach: by all 4 | floor: other" in lines
    call(tmp_path, "evaluate.py", "--compare", "before", "after", "--out", "there")
    assert "floor" not in json.loads((tmp_path / "there/compare_toy.json").read_text())["split"]


def test_a_refused_comparison_is_one_line(tmp_path):
    write_evaluation(tmp_path / "before", BEFORE), write_evaluation(tmp_path / "after", AFTER[1:])
    done = ended(tmp_path, "evaluate.py", "--compare", "before", "after")
    assert done.code == 2 and not done.stdout
    [line] = done.stderr.splitlines()
    assert "evaluate.py: error: after/eval_toy.json and before/eval_toy.json differ in questions" in line
    assert not (tmp_path / "after/compare_toy.json").exists()
