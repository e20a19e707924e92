"""The study on SmolLM2: every command is one that its script takes.   python -m pytest tests/test_smollm2_study.py"""

import sys

from rlt import flags

import pytest
from conftest import ROOT, call

sys.path.insert(0, str(ROOT / "figures"))
import smollm2_results  # noqa: E402
import smollm2_study  # noqa: E402


class Recorder(smollm2_study.WordProblemJob):
    """Notes the commands of an arm; what they would have written is made up."""

    def run(self, script, *flags, out=None, seed=True):
        flags = [*flags, *(["--seed", self.seed] if seed else []), *(["--out", out] if out else [])]
        self.commands.append((script, *map(str, flags)))
        return out

    def write(self, path, rows):
        self.commands.append(("rows", "--out", path))
        self.written = rows
        return path

    def read(self, path):
        if path == smollm2_study.GSM8K:
            return [{"question": "How many?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"}] * 1000
        row = dict.fromkeys((*smollm2_study.CURVE, *smollm2_study.SOLVED, *smollm2_study.ON_POLICY_CURVE,
                             "t_rollout", "t_score", "t_update"), 1.0)
        return [{**row, "question": "How many?", "explanation": "1+2=3", "start": 1, "steps": [2], "answer": "3",
                 "output": "1+2=3", "gold": "3"}]

    def report(self, path):
        return {"exact_match": {}, "questions": 1, "length": 1}


def commands_of(arm, quick):
    job = Recorder(smollm2_study.ARMS, "smollm2", 0, arm, quick)
    student = smollm2_study.ARMS[arm](job)
    if not arm.startswith(("explanations", "training", "MultiArith")):
        assert set(job.accuracy(student)) == {"val greedy", "test greedy"}
    return job


class Parsed(Exception):
    """A script has taken its flags."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """parse(command): the flags as the script itself reads them, without doing what it does."""
    take = flags._Parser.parse_args

    def stop(parser, *args):
        raise Parsed(take(parser, *args))

    monkeypatch.setattr(flags._Parser, "parse_args", stop)

    def parse(script, *words):
        with pytest.raises(Parsed) as parsed:
            call(tmp_path, script, *words)
        return parsed.value.args[0]

    return parse


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_one_that_its_script_takes(parse, quick):
    commands = {command for arm in smollm2_study.ARMS for command in commands_of(arm, quick).commands}
    assert {script for script, *_ in commands} == {
        "rows", "data/smollm2.py", "data/word_problems.py", "sft_student.py", "train_rlt.py", "distill.py",
        "rl_student.py", "on_policy_student.py", "evaluate.py"}
    for script, *words in sorted(commands):
        if script != "rows":
            args = parse(script, *words)
            steps = getattr(args, "steps", None)  # writing, scoring and grading have none
            assert steps in ((None, 2) if quick else (None, 46, 40, 80))
            assert script == "data/smollm2.py" or args.seed == 0


def test_every_input_of_a_command_has_been_written_before():
    for arm in smollm2_study.ARMS:
        made = {smollm2_study.MULTIARITH}  # copied into the folder
        for _, *words in commands_of(arm, False).commands:
            given = dict(zip(words, words[1:], strict=False))
            for flag in ("--model", "--student", "--teacher", "--data"):
                path = given.get(flag)
                assert path is None or path in made or path.rpartition("/")[0] in made, (arm, path)
            made.add(given["--out"])


def test_an_arm_says_what_its_explanations_are_like():
    facts = commands_of("RLT", False).facts
    assert facts["explanations"] == {"reward": 1, "score": 1, "kl": 1, "closed": 1, "length": 1, "count": 1,
                                     "is_right_chain": 1, "right_steps": 1, "leak": 0}
    assert facts["curve"] == [dict.fromkeys(smollm2_study.CURVE, 1)]


def test_human_chains_are_those_of_gsm8k():
    rows = commands_of("human chains", False).written
    assert len(rows) == smollm2_study.QUESTIONS
    assert rows[0] == {"question": "How many?", "solution": "\\boxed{3}", "answer": "3", "explanation": "1 + 2 = 3"}


def test_answers_are_compared_with_the_last_result_of_their_chain():
    def sample(chain, answer, gold):
        return {"output": f"<|begin_of_thought|>{chain}<|end_of_thought|>\\boxed{{{answer}}}=9", "answer": answer,
                "gold": gold}

    samples = [sample("1+2=3\n3-5= -2", "-2", "-2"), sample("1+2=3", "10", "3"), sample("1+2=4", "10", "3"),
               sample("no result", "10", "10")]
    assert smollm2_study.answers_and_chains(samples) == {
        "right_result": 0.5, "answer_is_result": 0.25, "same_answer": 0.75}


def test_a_study_that_was_cut_short_has_its_tables(monkeypatch):
    """Rows as a study writes them, of arms that do not have all seeds."""
    shares = {f"{split} greedy": {"mean": share, "questions": 9} for split, share in (("val", 0.1), ("test", 0.2))}
    rows = [{"arm": arm, "seed": seed, "machine": "CPU", "torch": "2", "date": "today", "accuracy": shares,
             **commands_of(arm, False).facts}
            for arm, seeds in (("RLT", (0, 1)), ("warm-up teacher", (1, 2)), ("explanations of RLT", (0, 1)),
                               ("explanations of warm-up teacher", (0, 1, 2)), ("training of RLT", (0,)))
            for seed in seeds]
    monkeypatch.setattr(smollm2_results, "read_log", lambda *_: rows)
    assert "**20.0** ± 0.0 (2 seeds)" in smollm2_results.students_table()
    assert "above" not in smollm2_results.students_table(), "they have one seed in common"
    assert "+0.0 ± 0.0 points" in smollm2_results.explanations_table()
    assert "1.00 → 1.00" in smollm2_results.curves_table() and smollm2_results.rollout_text() == ""


def test_cells_of_the_table():
    """A mean with its interval, the only seed, or nothing; what the explanations are like, as far as it is known."""
    def row(seed, explanations=None, **shares):
        accuracy = {f"{split} greedy": {"mean": share} for split, share in shares.items()}
        return {"seed": seed, "accuracy": accuracy} | ({"explanations": explanations} if explanations else {})

    seeds = [0, 1, 2]
    three = [row(0, test=0.1), row(1, test=0.2), row(2, test=0.3, val=0.5)]
    assert smollm2_results.accuracy_of(three, "test", seeds) == "**20.0** ± 24.8"  # 4.303 * 10 / sqrt(3)
    assert smollm2_results.accuracy_of(three, "val", seeds) == "**50.0** (seed 2)"
    assert smollm2_results.accuracy_of(three[:2], "test", seeds) == "**15.0** ± 63.5 (2 seeds)"  # 12.706 * 5
    assert smollm2_results.accuracy_of(three[:2], "val", seeds) == ""
    shares = {"is_right_chain": 0.5, "right_steps": 0.25, "leak": 0.1}
    found = [row(0, explanations=shares | {"score": -1.0, "kl": 0.5, "reward": -2.5}), row(1, explanations=shares)]
    assert smollm2_results.explanations_of(found) == ["50 %", "25 %", "10 %", "-1.00", "0.50", "-2.50"]
    assert smollm2_results.explanations_of(three) == [""] * 6
