"""Rows: schemas, bad rows, conversations, leaks.   pytest tests/test_rows.py"""

import json
import random
import time

from rlt.errors import UserError, printable
from rlt.grading import gradable
from rlt.rows import BOXED, leaks, load_rows, map_rows
from rlt.tags import SOLUTION, THOUGHT

import pytest

GOOD = {"question": "q", "solution": "s"}


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(tmp_path, *rows, **options):
    return load_rows(write(tmp_path / "rows.jsonl", rows), **options)


# -- bad rows


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ({"question": "q", "answr": "a"}, 'has no "question" and "solution"; columns found: question, answr'),
        ({"question": "q", "solution": "  "}, "has an empty solution"),
        ({"question": "", "solution": "s"}, "has an empty question"),
        ({"question": "q", "solution": [3]}, "has solution of type list, expected text"),
        ({"question": ["q"], "solution": "s"}, "has question of type list, expected text"),
        ({"question": "q", "solution": None}, "has an empty solution"),
        ('{"question": "q", "solution": NaN}', "has an empty solution"),
        ('{"question": "q", "solu', "is not JSON"),
        ("[1, 2]", "holds a list, expected an object"),
        ("null", "holds a NoneType, expected an object"),
        ('{"question": "q", "answer": ' + "7" * 5000 + "}", "is not JSON (Exceeds the limit (4300 digits)"),
        ("[" * 100_000, "is not JSON that can be read (its values are nested too deeply)"),
        ({"question": "q", "answer": "no number ####"}, 'has an answer without "#### number"'),
        ({"question": "", "answer": "#### 1"}, "has an empty question"),
        ({"question": "q", "answer": ""}, 'has an empty "answer"'),
        ({"Question": "q", "Answer": None, "id": ""}, 'has an empty "Answer"'),
        ({"instruction": "q", "input": "", "output": ""}, 'has an empty "output"'),
        ({"problem": None, "solution": "s"}, 'has an empty "problem"'),
        ({"problem": " ", "solution": "s"}, 'has an empty "problem"'),
        ({"problem": 5, "answer": "5"}, "has problem of type int, expected text"),
        ({"problem": "p", "answer": True}, "has an answer that is neither text nor a number"),
        ({"problem": "p", "answer": ["1", "2"]}, "has an answer that is neither text nor a number"),
        ('{"problem": "p", "answer": Infinity}', "has an answer that is neither text nor a number"),
        ('{"problem": "p", "answer": NaN}', 'has an empty "answer"'),
        ({"conversations": [{"from": "user", "value": "q"}]}, "has conversations without a user turn and"),
        ({"conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "<think>hm</think>\n"}]},
         "has an empty solution"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]},
         "has an empty question"),
        ({"conversations": None}, 'has an empty "conversations"'),
        ({"conversations": 5}, "has conversations without turns"),
        ({"conversations": []}, 'has an empty "conversations"'),
        ({"conversations": "[{"}, "has conversations that are no JSON"),
        ({"conversations": "[" * 100_000}, "has conversations that are no JSON"),
        ({"nums": 5, "target": 5}, 'has no "question"'),
        ({"nums": [1, None], "target": 5}, "has nums and a target that are not whole numbers"),
        ({"nums": [1, 2], "target": 3}, 'has no "question" and "solution"'),  # a solution is required here
        ({"instruction": 1, "output": "o"}, "has instruction of type int"),
        ('{"question": "half \\ud83d", "solution": "s"}', "has half a character (a lone surrogate) in its q"),
        ('{"question": "q", "solution": "s", "hint": "\\udc00"}', "has half a character (a lone surrogate) in its h"),
    ],
)
def test_bad_rows_are_named_and_can_be_skipped(tmp_path, capsys, bad, complaint):
    path = write(tmp_path / "rows.jsonl", [GOOD, "", bad, GOOD])
    with pytest.raises(UserError) as error:
        load_rows(path)
    assert str(error.value).startswith(f"{path} line 3 {complaint}")
    assert str(error.value).endswith("Fix it, or pass --skip-bad-rows to leave such rows out.")
    assert len(load_rows(path, skip_bad=True)) == 2
    assert "1 bad rows left out, the first" in capsys.readouterr().out


@pytest.mark.parametrize("named", [{"--question-column", "--solution-column"}, set()])
def test_errors_name_no_flag_but_those_for_rows(tmp_path, monkeypatch, named):
    """And those that the script has: data/prepare.py has none for columns."""
    monkeypatch.setattr("rlt.rows.FLAGS", dict.fromkeys(named))
    for other, skipping in ((GOOD, {"--skip-bad-rows"}), ({"a": "p"}, set())):
        with pytest.raises(UserError) as error:
            load(tmp_path, {"a": "q"}, other)
        flags = {word.strip(".,;") for word in str(error.value).split() if word.startswith("--")}
        assert flags == {*named, *skipping}, "where all rows are bad, there would be none left"


def test_no_row_stops_a_run_that_skips_bad_ones(tmp_path):
    """Random values in every column that a schema knows."""
    rng, numbers = random.Random(0), [0, -1, 72, 72.0, 1e-05, 1e16, float("nan"), float("inf"), 10**400]
    names = ["question", "Problem", "problem", "solution", "answer", "Answer", "conversations", "messages", "nums",
             "target", "instruction", "input", "output", "explanation", "hint", "correct answer", "deepseek_reasoning",
             "deepseek_solution", "where", "", "Body", "sQuestion", "lSolutions", "final_ans"]

    def value(depth=0):
        kind = rng.randrange(12 if depth < 3 else 7)
        if kind < 3:
            return rng.choice([" ", "text", "#### 3", "<think>a</think>b", THOUGHT[1] + SOLUTION[0], "[{}]", "\ud800"])
        if kind < 6:
            return rng.choice([*numbers, None, True])
        if kind < 7:
            return []
        if kind < 9:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        keys = ["role", "content", "from", "value", "type", "text"]
        turn = {"role": rng.choice(["user", "assistant", "gpt", "tool", 5]), "content": value(depth + 1)}
        return turn if kind < 11 else {key: value(depth + 1) for key in rng.sample(keys, 2)}

    rows = [{**GOOD, **{name: value() for name in rng.sample(names, rng.randrange(6))}} for _ in range(1500)]
    rows += [{name: value() for name in rng.sample(names, rng.randrange(6))} for _ in range(1500)]
    loaded = {}
    for required in (True, False):
        loaded[required] = load(tmp_path, GOOD, *rows, skip_bad=True, require_solution=required)
        for row in loaded[required]:
            assert row["question"].strip() and "where" in row
            assert row["solution"].strip() if required else row["solution"] is None or isinstance(row["solution"], str)
            assert all(turn.keys() == {"role", "content"} for turn in row.get("messages", []))
    assert 100 < len(loaded[True]) < len(loaded[False]) < 2500
    for options in ({"question_column": "hint"}, {"solution_column": "answer"}, {"explanation_column": "output"}):
        load(tmp_path, {**GOOD, "hint": "h", "answer": 1, "output": "o"}, *rows, skip_bad=True, **options)


def test_without_any_usable_row_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="rows.jsonl has no usable rows"):
        load(tmp_path, {"a": 1}, skip_bad=True)
    with pytest.raises(UserError, match="rows.jsonl has no usable rows"):
        load(tmp_path)


def test_what_a_row_says_can_not_reach_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;owned\x07\x1b[31m\r\n\u202e\u200b"
    with pytest.raises(UserError) as error:
        load(tmp_path, {evil: "q"})
    assert str(error.value).isprintable() and "\\x1b]0;owned\\x07\\x1b[31m\\r\\n\\u202e\\u200b" in str(error.value)
    load(tmp_path, {evil: "q"}, GOOD, skip_bad=True)
    assert capsys.readouterr().out.strip().isprintable()

    def refuse(row):
        raise UserError(f"has {row['question']}")

    assert map_rows([{"question": evil, "where": "here"}], refuse, skip=True) == []
    assert "has \\x1b]0;owned" in capsys.readouterr().out
    with pytest.raises(UserError, match="here has .x1b.*, or pass --skip-bad-rows"):
        map_rows([{"question": evil, "where": "here"}], refuse)
    for text in ("caf\u00e9 \u4f60 \\x1b", printable(evil)):
        assert printable(text) == text
    long = str(UserError("a" * 10_000 + " the end"))
    assert len(long) < 1100 and long.endswith("the end")


# -- schemas


ANSWERED = f"{THOUGHT[0]}\n\nHm.\n\nYes.\n\n{THOUGHT[1]}\n\n{SOLUTION[0]}\n\n\\boxed{{1}}\n\n{SOLUTION[1]}"
THINKS = "<think>\nHm.\n\nYes.\n</think>\n\n\\boxed{1}"


@pytest.mark.parametrize(
    ("name", "raw", "question", "solution", "explanation"),
    [
        ("own", {"question": "Q", "solution": "S"}, "Q", "S", None),
        ("own", {"question": "Q", "solution": "S", "explanation": "E"}, "Q", "S", "E"),
        ("Bespoke-Stratos", {"system": "S", "conversations": [{"from": "user", "value": "Q"},
                                                              {"from": "assistant", "value": ANSWERED}]},
         "Q", "\\boxed{1}", "Hm.\n\nYes."),
        ("OpenThoughts", {"problem": "Q", "deepseek_reasoning": "E", "deepseek_solution": "S", "domain": "math",
                          "ground_truth_solution": None}, "Q", "S", "E"),
        ("OpenThoughts3", {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": THINKS}]},
         "Q", "\\boxed{1}", "Hm.\n\nYes."),
        ("ShareGPT", {"id": "1", "conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"},
                                                   {"from": "gpt", "value": "A\n"}]}, "Q", "A", None),
        ("MATH-500", {"problem": "Q", "solution": "So \\boxed{1}.", "answer": "1", "subject": "Algebra", "level": 5},
         BOXED + "Q", "So \\boxed{1}.", None),
        ("AIME 2024", {"ID": "2024-I-1", "Problem": "Q", "Solution": "S", "Answer": 204}, BOXED + "Q", "S", None),
        ("AIME 2025", {"question": "Q", "answer": "70"}, BOXED + "Q", "\\boxed{70}", None),
        ("AIME 2025", {"problem_idx": 1, "problem": "Q", "answer": 70, "problem_type": ["Algebra"]}, BOXED + "Q",
         "\\boxed{70}", None),
        ("GSM8K", {"question": "Q", "answer": "He has 48/2 = <<48/2=24>>24.\n#### 1,024"}, BOXED + "Q",
         "He has 48/2 = 24.\n\\boxed{1,024}", None),
        ("SVAMP", {"ID": "chal-1", "Body": "B. ", "Question": "Q", "Equation": "( 7.0 - 4.0 )", "Answer": 3.0,
                   "Type": "Subtraction"}, BOXED + "B. Q", "\\boxed{3}", None),
        ("MultiArith", {"iIndex": 0, "lAlignments": [1], "lEquations": ["X=(2.0+1.0)"], "lSolutions": [3.0],
                        "sQuestion": " Q "}, BOXED + "Q", "\\boxed{3}", None),
        ("MultiArith", {"question": "Q", "final_ans": "3"}, BOXED + "Q", "\\boxed{3}", None),
        ("GPQA", {"Question": "Q", "Correct Answer": "5 m", "Incorrect Answer 1": "6 m", "Explanation": "E"},
         "Q", "5 m", "E"),
        ("Alpaca", {"instruction": "I", "input": "", "output": "O"}, "I", "O", None),
        ("Alpaca", {"instruction": "I", "input": "i", "output": "O", "text": "t"}, "I\n\ni", "O", None),
        ("Alpaca", {"instruction": "I", "input": "3,1,2", "output": "6"}, "I\n\n3,1,2", "6", None),  # no countdown
        ("open-r1", {"problem": "Q", "solution": "S", "answer": "1", "messages": [
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": THINKS}]}, BOXED + "Q", "S",
         "Hm.\n\nYes.\n\n"),
        ("open-r1", {"problem": "Q", "solution": None, "answer": "1", "messages": None},
         BOXED + "Q", "\\boxed{1}", None),
        ("Mixture-of-Thoughts", {"num_tokens": 9, "messages": [
            {"role": "user", "content": "Q"}, {"role": "assistant", "content": THINKS}]},
         "Q", "\\boxed{1}", "Hm.\n\nYes.\n\n"),
    ],
)
def test_schemas(tmp_path, name, raw, question, solution, explanation):
    [row] = load(tmp_path, raw)
    assert (row["question"], row["solution"], row.get("explanation")) == (question, solution, explanation)
    assert {**raw, **row}.items() >= {key: value for key, value in row.items()}.items()  # other columns are kept
    assert load(tmp_path, raw, require_solution=False)[0]["question"] == question
    nulls = {**raw, "conversations": raw.get("conversations"), "messages": raw.get("messages"), "nums": None}
    [row] = load(tmp_path, nulls)  # as a union of several data sets in Parquet has them
    assert (row["question"], row["solution"], row.get("explanation")) == (question, solution, explanation)


@pytest.mark.parametrize(
    ("answer", "text"),
    [(72, "72"), (72.0, "72"), (0.5, "0.5"), ("072", "072"), ([72], None), (10**30, "1" + 30 * "0"),
     (1e16, "1" + 16 * "0"), ("$5$", "$5$")],
)
def test_answers_of_any_type_are_text(tmp_path, answer, text):
    """As the grader reads them: no exponent. 72.0 is what a column of whole numbers with a null holds."""
    [row] = load(tmp_path, {"problem": "p", "answer": answer})
    assert row["solution"] == f"\\boxed{{{text or 72}}}"
    assert row["answer"] == (text or answer)
    [row] = load(tmp_path, {"q": "p", "a": 72, "question": "no"}, question_column="q", solution_column="a")
    assert (row["question"], row["solution"]) == ("p", "72")


def test_a_small_float_has_no_exponent_in_the_solution_and_is_not_graded(tmp_path, graded_here, capsys):
    rows = load(tmp_path, {"problem": "p", "answer": 1e-05}, {"problem": "p", "answer": "5"})
    assert [row["solution"] for row in rows] == ["\\boxed{0.00001}", "\\boxed{5}"]
    assert gradable("math500", rows) == rows[1:]
    assert "has the answer 1e-05, a rounded float" in capsys.readouterr().out


def test_an_answer_that_is_a_solution_is_taken_as_it_is(tmp_path):
    headings = "#### Step 1\n5+3=8\n#### Step 2\nSo it is 8."
    for answer in ("So \\boxed{7}.", "First this.\nThen that.", headings):
        assert load(tmp_path, {"question": "q", "answer": answer})[0]["solution"] == answer
    [row] = load(tmp_path, {"question": "q", "solution": "s", "answer": headings}, explanation_column="answer")
    assert (row["explanation"], row["solution"]) == (headings, "s")


def test_rows_without_a_solution_are_for_grading_only(tmp_path):
    countdown = {"nums": [3, 4.0, "5"], "target": 23.0}
    [row] = load(tmp_path, countdown, require_solution=False)
    assert row["solution"] is None and row["nums"] == [3, 4, 5] and row["target"] == 23
    assert "numbers 3, 4, 5 exactly once" in row["question"] and row["question"].endswith("equals 23.")
    [row] = load(tmp_path, {"problem": "p", "answer": None}, require_solution=False)
    assert (row["question"], row["solution"], row["answer"]) == ("p", None, None)
    [row] = load(tmp_path, {"question": "p", "tests": "assert"}, require_solution=False)
    assert (row["question"], row["solution"]) == ("p", None)


TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": THINKS}]


@pytest.mark.parametrize(("raw", "options", "wanted"), [
    ({**GOOD, "closed": None}, {}, {"closed": "missing"}),
    ('{"question": "q", "solution": "s", "closed": NaN}', {}, {"closed": "missing"}),
    ({**GOOD, "Closed": False, "Hint": "h"}, {}, {"closed": False, "hint": "h"}),
    ({**GOOD, "explanation": None, "messages": TURNS}, {}, {"explanation": "Hm.\n\nYes.\n\n"}),
    ({**GOOD, "explanation": " ", "messages": TURNS}, {}, {"explanation": "Hm.\n\nYes.\n\n"}),
    ({**GOOD, "Explanation": "E", "messages": TURNS}, {}, {"explanation": "E"}),
    ({"Question": "Q", "Answer": "<<1+1=2>>2\n#### 2"}, {"explanation_column": "Answer"},
     {"explanation": "2", "solution": "\\boxed{2}"}),
])
def test_upper_case_and_nulls_do_no_harm(tmp_path, raw, options, wanted):
    [row] = load(tmp_path, raw, **options)
    assert {name: row.get(name, "missing") for name in wanted} == wanted


def test_named_columns_win_and_leave_messages_out(tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    raw = {**GOOD, "explanation": "E", "messages": turns, "better": "B", "other": None}
    [row] = load(tmp_path, raw)
    assert row["messages"] == turns and row["explanation"] == "E"
    [row] = load(tmp_path, raw, explanation_column="better")
    assert "messages" not in row and row["explanation"] == "B" and row["question"] == "q"
    with pytest.raises(UserError, match='line 1 has no "worse"; columns found: question, solution'):
        load(tmp_path, raw, explanation_column="worse")
    with pytest.raises(UserError, match="line 1 has an empty explanation"):
        load(tmp_path, {**raw, "explanation": None}, explanation_column="explanation")
    with pytest.raises(UserError, match='line 1 has no "question" and "solution"'):
        load(tmp_path, {"frage": "q"}, question_column="frage")
    assert load(tmp_path, {"frage": "q"}, question_column="frage", require_solution=False)[0]["solution"] is None


def test_a_limit_counts_rows_of_the_source(tmp_path):
    rows = [{"question": str(i), "solution": "s"} for i in range(9)]
    assert [row["question"] for row in load(tmp_path, *rows, limit=3)] == ["0", "1", "2"]
    assert len(load(tmp_path, *rows, limit=100)) == 9
    assert len(load(tmp_path, rows[0], "{", rows[1], limit=2, skip_bad=True)) == 1


# -- conversations


def test_messages_of_any_form(tmp_path):
    want = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": ANSWERED}]
    for messages in (
        want,
        json.dumps(want),
        [{"from": "human", "value": "Q"}, {"from": "gpt", "value": ANSWERED}],
        [{"role": "user", "content": [{"type": "text", "text": "Q"}]},
         {"role": "assistant", "content": [{"type": "text", "text": text} for text in (ANSWERED[:9], ANSWERED[9:])]}],
        [{**turn, "tool_calls": None, "from": None, "value": None} for turn in want],
    ):
        [row] = load(tmp_path, {"messages": messages})
        assert row["messages"] == want and row["question"] == "Q" and row["solution"] == "\\boxed{1}"
        assert row["explanation"] == "Hm.\n\nYes.\n\n"  # what stands in the messages between blank lines and tag
        [row] = load(tmp_path, {**GOOD, "explanation": "E", "messages": messages})
        assert row["messages"] == want and (row["question"], row["explanation"]) == ("q", "E")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_beside_the_content_is_the_explanation(tmp_path, key):
    user = {"role": "user", "content": "Q"}
    answer = {"role": "assistant", "content": "\\boxed{1}", key: "\nHm.\n\nYes."}
    for column in ("messages", "conversations"):
        [row] = load(tmp_path, {column: [user, {"reasoning_content": None, **answer}]})
        assert (row["solution"], row["explanation"].strip()) == ("\\boxed{1}", "Hm.\n\nYes.")
    [row] = load(tmp_path, {**GOOD, "messages": [user, answer]})
    assert row["messages"] == [user, {"role": "assistant", "content": ANSWERED}], "which is what is trained on"
    for content in (ANSWERED, THINKS):  # it has its thought already
        [row] = load(tmp_path, {"messages": [user, {**answer, "content": content, key: "Hm."}]})
        assert row["messages"][1]["content"] == content
    for switch in (True, False, None, ""):
        assert "explanation" not in load(tmp_path, {"messages": [user, {**answer, key: switch}]})[0]
    with pytest.raises(UserError, match="has messages with a thought of type list, expected text"):
        load(tmp_path, {"messages": [user, {**answer, key: [{"text": "Hm."}]}]})
    with pytest.raises(UserError, match="half a character"):
        load(tmp_path, {"messages": [user, {**answer, key: "\ud800"}]})


@pytest.mark.parametrize("messages", [None, "", [], {}, [{"role": "user", "content": "Q"}]])
def test_without_an_assistants_turn_at_the_end_there_are_no_messages_to_learn(tmp_path, messages):
    """The last turn of any row with messages was learned, the user's words too."""
    [row] = load(tmp_path, {**GOOD, "explanation": "E", "messages": messages})
    assert "messages" not in row
    complaint = "has messages without a user turn and" if messages else 'has an empty "messages"'
    with pytest.raises(UserError, match=complaint):
        load(tmp_path, {"messages": messages})


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ({"role": "user"}, "without turns"),
        (["Q", "A"], "without turns"),
        ("Q", "that are no JSON"),
        ([{"role": "user", "content": None}], "no text by system, user or assistant"),
        ([{"role": "tool", "content": "x"}], "no text by system, user or assistant"),
        ([{"role": ["user"], "content": "x"}], "no text by system, user or assistant"),
        ([{"content": "x"}], "no text by system, user or assistant"),
        ([{"role": "user", "content": [{"type": "image", "url": "u"}]}], "no text by system, user or assistant"),
        ([{"role": "user", "content": "\ud800"}], "half a character"),
    ],
)
def test_messages_that_no_one_can_read_are_bad(tmp_path, messages, complaint):
    for rest in ({}, {**GOOD, "explanation": "E"}):
        with pytest.raises(UserError, match=f"line 1 has .*{complaint}"):
            load(tmp_path, {**rest, "messages": messages})


def test_a_conversation_of_many_turns_has_no_one_question(tmp_path):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(UserError, match="without a user turn and the assistant's answer .found: user, assistant, user"):
        load(tmp_path, {"messages": turns})
    assert len(load(tmp_path, {**GOOD, "messages": turns})[0]["messages"]) == 4
    for answer in (THOUGHT[0] + "never closed", f"{SOLUTION[0]}1{SOLUTION[1]}", THOUGHT[0] + THOUGHT[1]):
        with pytest.raises(UserError, match="has conversations without thought and solution in their tags"):
            load(tmp_path, {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": answer}]})


@pytest.mark.parametrize(("answer", "explanation", "solution"), [
    ("<thinking>\nhm\n</thinking>\n72", "hm", "72"),
    ("<Think>hm</THINK>72", "hm", "72"),
    ("<reasoning>\nhm\n</reasoning>\n<answer>\n72\n</answer>\n", "hm", "72"),
    ("[THINK]hm[/THINK]72", "hm", "72"),
    ("<|inner_prefix|>hm<|inner_suffix|>72", "hm", "72"),
    ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>72", "hm", "72"),
    ("<think_on><think>hm</think>72", "hm", "72"),
    ("hm</think>72", "hm", "72"),  # the prompt had opened it
    ("Sure. <think>hm</think>72", "hm", "72"),
    ("<think>h</think>m<think>!</think>72", "hm!", "72"),  # what follows the last thought counts, as in a grader
    ("<think>a <reflection>b</reflection> c</think>72", "a <reflection>b</reflection> c", "72"),
    ("<think>hm</think>vector<Thought> a; <analysis>", "hm", "vector<Thought> a; <analysis>"),
    ("vector<InternalNode> a; <Thinker>", None, "vector<InternalNode> a; <Thinker>"),
    ("<nothink>72", None, "<nothink>72"),
    ("<think>\nlet me see", None, None),
    ("Sure. <think>\nlet me see", None, None),
    ("<reasoning>let me see", None, None),
    ("<think>a</think>72<think>b", None, None),
    ("<|channel|>analysis<|message|>let me see", None, None),
])
def test_a_thought_in_any_models_tags_is_no_solution(tmp_path, answer, explanation, solution):
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": answer}]}
    if solution is None:
        with pytest.raises(UserError, match="line 1 has conversations without thought and solution in their tags"):
            load(tmp_path, row)
    else:
        [row] = load(tmp_path, row)
        assert (row.get("explanation"), row["solution"]) == (explanation, solution)


# -- leaks


@pytest.mark.parametrize(
    ("explanation", "leak"),
    [
        ("ans 0 1 so well", True),
        ("ans 0 1 so", True),
        ("ans 0 1", True),
        ("0 1", True),
        ("s1 swap 3 7 s2 x*=3 0 1 s3 y*=7 0 1", False),  # it arrives early and stays there
        ("s1 swap 3 7 s2 x+=1 4 7 s3 swap 7 4 s4 x*=3 0 1", False),
        ("s1 swap 3 7", False),
        ("", False),
        ("x 0 12 and more of it", False),
    ],
)
def test_leaks(explanation, leak):
    assert leaks(explanation, "0 1") is leak


LONG = "Twelve times ten is 120, twelve times two is 24, and the two together give what we are looking for. "
TEXT = "We have $12^2 = 144$.\n\nSo it is \\boxed{144}."


@pytest.mark.parametrize(
    ("explanation", "solution", "leak"),
    [
        ("The answer is 144.", TEXT, True),
        ("The answer is 144.", "144", True),
        ("\\boxed{144}", TEXT, True),
        ("The final answer is: $144$. " + LONG, TEXT, True),
        ("**Answer:** 144\n\n" + LONG, TEXT, True),
        ("The answer is \\boxed{144}. " + LONG, TEXT, True),
        ("#### 144\n" + LONG, TEXT, True),
        ("ANSWER = 144, as " + LONG, TEXT, True),
        (TEXT + LONG, TEXT, True),  # word for word
        (LONG + "So the answer is \\boxed{144}.", TEXT, False),  # it arrives
        (LONG + LONG + "The answer is 144.", TEXT, False),
        ("The answer is 1440. " + LONG, TEXT, False),
        ("The answer is 144.5. " + LONG, TEXT, False),
        ("The answer is 144,000. " + LONG, TEXT, False),
        ("144 is a number. " + LONG, TEXT, False),  # it may be the question's
        ("144", TEXT, True),
        ("$144$.", TEXT, True),
        ("It is **144**.", TEXT, True),
        ("12*12 = 144", TEXT, False),  # it arrives
        ("Twelve dozens are exactly 144 things", TEXT, False),
        ("The answer is therefore 144. " + LONG, TEXT, True),
        ("**Answer**: 144\n" + LONG, TEXT, True),
        ("The answer must be $144$. " + LONG, TEXT, True),
        ("The answer is not 144. " + LONG, TEXT, False),
        ("The answer is:" + ":" * 50_000 + " no", TEXT, False),  # in linear time
        ("We want 12 * 12. " + LONG, TEXT, False),
        ("", TEXT, False),
        ("The answer is 1024. " + LONG, "It is \\boxed{1,024}.", True),
        ("The answer is $\\frac{1}{2}$. " + LONG, "a \\boxed{1}, no, \\boxed{\\frac{1}{2}}", True),
        ("The answer is 1. " + LONG, "a \\boxed{1}, no, \\boxed{\\frac{1}{2}}", False),
        ("The answer is anything. " + LONG, "A long text without a box that gives no answer by itself.", False),
        ("The answer is (a+b)*c? " + LONG, "\\boxed{(a+b)*c}", True),  # no regular expression
        ("The answer is \\(144\\). " + LONG, TEXT, True),
        ("The answer must therefore be **144**. " + LONG, TEXT, True),
        ("\\fbox{144} " + LONG, TEXT, True),
        ("\\boxed{\\dfrac12} " + LONG, "\\boxed{\\frac{1}{2}}", True),  # the same in another notation
        ("\\boxed{ 1,024.0 } " + LONG, "It is \\boxed{1024}.", True),
        ("\\boxed{145} " + LONG, TEXT, False),
        ("There are 5 apples in each bag. " + LONG, "5", False),  # it may be the question's
        ("The answer is 5. " + LONG, "5", True),
        ("A train leaves. " + LONG, "A", False),
        ("The answer is A. " + LONG, "A", True),
    ],
)
def test_a_statement_of_the_boxed_answer_is_a_leak(explanation, solution, leak):
    assert leaks(explanation, solution) is leak


@pytest.mark.parametrize(("stated", "box", "same"), [
    ("1,234", "1234", True), ("$1{,}234$.", "1234", True), ("$72", "\\$72", True), ("50%", "50\\%", True),
    ("C.", "\\text{C}", True), ("**(C)**", "\\text{C}", True), ("C", "\\text{(C)}", True),
    ("Evelyn", "\\text{Evelyn}", True), ("1/2", "\\frac{1}{2}", True), ("0.5.", "\\frac12", True),
    ("\\(\\sqrt2\\)", "\\sqrt{2}", True),
    ("\\textbf{72}", "72", True), ("$x + 1$", "x+1", True), ("(3, \\pi/2)", "\\left(3,\\pi/2\\right)", True),
    ("90", "90^\\circ", True), ("72.0", "72", True),
    ("12,345", "1234", False), ("72.5", "72", False), ("172", "72", False), ("1/3", "\\frac{1}{2}", False),
    ("3 4", "34", False), ("Carla", "\\text{Evelyn}", False), ("c", "\\text{C}", False), ("(3,4)", "(3,4]", False),
    ("\\sqrt3", "\\sqrt{2}", False), ("%", "\\text{}", False), ("2(k+1)", "2k+2", False),
])
def test_a_statement_in_another_notation_is_a_leak(stated, box, same):
    """No algebra is done."""
    solution = f"So it is \\boxed{{{box}}}."
    for statement in (f"The answer is {stated} ", f"**Answer:** {stated} ", f"#### {stated} "):
        assert leaks(statement + LONG, solution) is same
        assert leaks(LONG + LONG + statement, solution) is False, "it arrives"
    for alone in (stated, f"So it is {stated}"):
        assert leaks(alone, solution) is same


@pytest.mark.parametrize("box", ["1234", "x" * 190, "x" * 10**5])
@pytest.mark.parametrize("piece", ["The answer is 1. ", "#### ", "answer,", "answer: \\(", "answer is x + 1 + "])
def test_finding_leaks_takes_linear_time(piece, box):
    started = time.process_time()
    leaks(piece * (10**5 // len(piece)), f"\\boxed{{{box}}}")
    assert time.process_time() - started < 4
