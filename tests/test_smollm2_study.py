"""The study on SmolLM2: every command is one that its script takes.   python -m pytest tests/test_smollm2_study.py"""

import sys

from rlt import flags

import pytest
from conftest import ROOT, call

sys.path.insert(0, str(ROOT / "figures"))
import smollm2_study  # noqa: E402


class Recorder(smollm2_study.WordProblemJob):
    """Notes the commands of an arm; what they would have written is made up."""

    def run(self, script, *flags, out=None, seed=True):
        flags = [*flags, *(["--seed", self.seed] if seed else []), *(["--out", out] if out else [])]
        self.commands.append((script, *map(str, flags)))
        return out

    def write(self, path, rows):
        self.commands.append(("rows", "--out", path))
        return path

    def read(self, path):
        row = dict.fromkeys((*smollm2_study.CURVE, *smollm2_study.SOLVED, "t_rollout", "t_score", "t_update"), 1.0)
        return [{**row, "question": "How many?", "explanation": "1+2=3", "start": 1, "steps": [2], "answer": "3"}]

    def report(self, path):
        return {"exact_match": {}, "questions": 1, "length": 1}


def commands_of(arm, quick):
    job = Recorder(0, arm, quick=quick)
    student = smollm2_study.ARMS[arm](job)
    if not arm.startswith(("explanations", "training")):
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
        "rl_student.py", "evaluate.py"}
    for script, *words in sorted(commands):
        if script != "rows":
            args = parse(script, *words)
            steps = getattr(args, "steps", None)  # writing, scoring and grading have none
            assert steps in ((None, 2) if quick else (None, 46, 40, 80))
            assert script == "data/smollm2.py" or args.seed == 0


def test_every_input_of_a_command_has_been_written_before():
    for arm in smollm2_study.ARMS:
        made = set()
        for _, *words in commands_of(arm, False).commands:
            given = dict(zip(words, words[1:], strict=False))
            for flag in ("--model", "--student", "--data"):
                path = given.get(flag)
                assert path is None or path in made or path.rpartition("/")[0] in made, (arm, path)
            made.add(given["--out"])


def test_an_arm_says_what_its_explanations_are_like():
    facts = commands_of("RLT", False).facts
    assert facts["explanations"] == {"reward": 1, "score": 1, "kl": 1, "closed": 1, "length": 1, "count": 1,
                                     "is_right_chain": 1, "right_steps": 1, "leak": 0}
    assert facts["curve"] == [dict.fromkeys(smollm2_study.CURVE, 1)]
