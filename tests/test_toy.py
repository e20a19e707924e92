"""The toy: its arithmetic, authors, rows, tokenizer and packing.   python -m pytest tests/test_toy.py"""

import hashlib
import itertools
import json
import random
from collections import Counter

from rlt.models import load_tokenizer
from rlt.prompts import EXPLANATION, SOLUTION, THOUGHT, Prompts

import pytest
import torch
from conftest import ended
from torch.nn.functional import cross_entropy

from data import toy as game  # `toy` is the fixture: a folder that holds runs/toy

QUESTION = "x 3 y 7 s1 x+=y s2 y*=3 s3 swap s4 y+=5"
CHAIN = "s1 x+=y 0 7 s2 y*=3 0 1 s3 swap 1 0 s4 y+=5 1 5"
ROWS = {"n_clocks": 2, "careful": game.ROWS[0], "rooms": False}  # what python data/toy.py makes
TOY = ROWS | {"careful": game.LONG[0], "hints": False}


# -- the task


def test_a_chain_by_hand():
    assert game.chain(QUESTION) == CHAIN
    assert game.solution(QUESTION) == "1 5"


def test_every_operation_on_every_state_is_what_python_makes_of_it():
    for operation in game.operations("xy"):
        for x in range(10):
            for y in range(10):
                scope = {"x": x, "y": y}
                exec("x, y = y, x" if operation == "swap" else operation, {}, scope)
                want = f"{scope['x'] % 10} {scope['y'] % 10}"
                assert game.solution(f"x {x} y {y} s1 {operation}") == want, (operation, x, y)
    assert len(set(game.operations("xy"))) == 17


def test_three_clocks_turn_by_tables():
    table = game.TURNS["op3"]
    want = " ".join(str(table[hour]) for hour in (3, 7, 0))
    assert game.chain("x 3 y 7 z 0 s1 op3") == f"s1 op3 {want}"
    x, y, z = want.split()
    assert game.solution("x 3 y 7 z 0 s1 op3 s2 op3") == game.solution(f"x {x} y {y} z {z} s1 op3")
    assert all(sorted(table) == list(range(10)) for table in game.TURNS.values())
    written = json.dumps(game.TURNS)  # every published number of that setting rests on them
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == "660123c5e0775976"


@pytest.mark.parametrize(
    "question",
    ["", "How many?", "x 3 y", "x 3 y 7", "x 3 y 7 s1", "x 3 y 7 s2 swap", "x 3 y 12 s1 swap"]
    + ["x 3 y 7 s1 z+=1", "x 3 z 7 s1 swap", "x 3 y 7 z s1 swap", "x 3 s1 x+=1"]
    + ["x 3 y 7 s1 x-=y", "y 3 x 7 s1 swap", "x 3 y 7 s1 swap s1 swap", "x 3 y 7 s1 swap s2"],
)
def test_what_is_no_toy_question_is_refused(question):
    with pytest.raises(ValueError, match="no toy question"):
        game.chain(question)


def test_full_chains_and_giving_away():
    wrong = CHAIN.replace("s2 y*=3 0 1", "s2 y*=3 0 2")
    for text, full, given in [
        (CHAIN, True, False),
        (f"so {CHAIN}\n\n", True, False),
        (CHAIN.replace(" ", "\n"), True, False),
        (f"ans 1 5 {CHAIN}", True, True),
        ("ans 1 5", False, True),
        ("1 5", False, True),
        ("hmm 1 5 so", False, True),
        ("s4 y+=5 1 5", False, False),  # one right step, the last: skipped, not given away
        ("s3 y+=5 1 5", False, True),  # no step of this question
        ("1 s4 y+=5 1 5 5", False, False),  # not "1 5" when the step is taken out
        ("ans 5 1", False, False),
        ("ans 1 51", False, False),
        (wrong, False, False),
        (CHAIN.removesuffix(" s4 y+=5 1 5"), False, False),
        (CHAIN.replace("s2", "so s2"), False, False),
        ("", False, False),
    ]:
        assert (game.is_full_chain(QUESTION, text), game.leaks(QUESTION, text)) == (full, given), text


# -- the authors


def explanations(author, n=2000):
    rng = random.Random(author)
    return [game.explain(QUESTION, author, rng) for _ in range(n)]


def test_authors_do_as_they_are_called():
    assert set(explanations("careful")) == {CHAIN}
    right = game.steps(QUESTION)
    shown = [tuple(step for step in right if step in text) for text in explanations("skipping")]
    assert [" ".join(steps) for steps in shown] == explanations("skipping")  # right steps only, in order
    assert all(shown) and Counter(map(len, shown)).keys() == {1, 2, 3, 4}
    for text in explanations("leaking"):
        assert text.startswith("ans 1 5") and set(text.split()[3:]) <= set(game.FILLER)
    for text in explanations("rambling"):
        assert 2 <= len(text.split()) <= 8 and set(text.split()) <= {*game.FILLER, *QUESTION.split()[5::2]}


def test_who_slips_goes_on_from_there():
    wrong = total = 0
    for text in explanations("sloppy"):
        words = text.split()
        state = "3 7"
        for number, operation, x, y in zip(*(words[i::4] for i in range(4)), strict=True):
            before = dict(zip("xy", state.split(), strict=True))
            right = game.solution(f"x {before['x']} y {before['y']} s1 {operation}")
            state = f"{x} {y}"
            wrong, total = wrong + (state != right), total + 1
            if state != right:  # one register is off, not both
                assert x == right[0] or y == right[2], (number, text)
    rate = 0.25 * 0.9  # a slip draws any digit, the right one too
    assert abs(wrong / total - rate) < 4 * (rate * (1 - rate) / total) ** 0.5


def test_long_problems_are_seldom_explained_well_and_short_ones_often():
    documents = game.draw_documents(random.Random(0), set(), **TOY)
    full, steps = Counter(), Counter()
    for _ in range(8000):
        row = next(documents)
        length = len(row["question"].split()) // 2 - 2
        steps[length] += 1
        full[length] += game.is_full_chain(row["question"], row["explanation"])
    assert full[1] == steps[1]
    assert 0.5 < full[2] / steps[2] < 0.7 and 0.45 < full[3] / steps[3] < 0.6
    for length in (4, 5, 6):
        assert 0.06 < full[length] / steps[length] < 0.15
    assert abs(steps[1] / 8000 - 0.25) < 0.02 and abs(steps[6] / 8000 - 0.125) < 0.02


# -- rooms


def test_rooms_by_hand():
    left, up = game.DOORS["left"], game.DOORS["up"]
    there = up[left["b"]]
    question = "room b s1 left s2 up s3 up"
    assert game.chain(question) == f"s1 left {left['b']} s2 up {there} s3 up {up[there]}"
    assert game.solution(question) == up[there]
    row = game.make_row(question, game.SINGLE, random.Random(0))
    assert row["hint"] == f"s1 left {left['b']}" and row["explanation"] == row["chain"]
    assert all(sorted(door) == sorted(door.values()) == [*game.ROOMS] for door in game.DOORS.values())
    for no in ("room z s1 left", "room b s1 swap", "room 3 s1 left", "room b x 3 s1 left", "room b c s1 left"):
        with pytest.raises(ValueError, match="no toy question"):
            game.chain(no)


def test_authors_in_rooms_do_as_they_are_called():
    rng = random.Random(1)
    slipped = 0
    for _ in range(400):
        question = game.draw_question(rng, 5, ("room",))
        careful, sloppy, skipping, leaking, rambling = (game.explain(question, author, rng) for author in game.AUTHORS)
        assert careful == game.chain(question) and not game.leaks(question, careful)
        slipped += sloppy != careful
        room = question.split()[1]
        wrong = 0
        for door, after in zip(sloppy.split()[1::3], sloppy.split()[2::3], strict=True):
            wrong, room = wrong + (game.DOORS[door][room] != after), after  # who slips goes on from there
        assert (wrong > 0) == (sloppy != careful)
        assert not game.leaks(question, skipping) and set(skipping.split()) <= set(careful.split())
        assert leaking.startswith(f"ans {game.solution(question)}") and game.leaks(question, leaking)
        assert not {*rambling.split()} - {*game.FILLER, *game.DOORS} and not game.leaks(question, rambling)
    rate = 1 - (1 - 0.25 * 11 / 12) ** 5  # a slip leads anywhere, to the right room too
    assert abs(slipped / 400 - rate) < 4 * (rate * (1 - rate) / 400) ** 0.5


def test_three_clocks_are_named_in_any_order():
    rng = random.Random(0)
    orders = {tuple(game.draw_question(rng, 4, game.CLOCKS).split()[:6:2]) for _ in range(200)}
    assert orders == {*itertools.permutations("xyz")}
    assert game.chain("z 0 x 3 y 7 s1 op3") == game.chain("x 3 y 7 z 0 s1 op3")


def test_both_tasks_are_in_base_and_rows():
    rows = game.make_rows(2, game.ROWS[0], True)
    assert [len(rows[split]) for split in ("rooms-train", "rooms-val", "rooms-test")] == [3000, 400, 800]
    assert [row["question"].startswith("room") for row in rows["both-train"]] == [False, True] * 3000
    alone = game.make_rows(**ROWS)
    assert all([row["question"] for row in rows[split]] == [row["question"] for row in alone[split]] for split in alone)
    tasks = [row["question"] for split in rows if split.startswith("rooms") for row in rows[split]]
    assert len({*tasks}) == 4200 and {len(question.split()) for question in tasks} == {10, 12}  # 4 and 5 steps
    documents = game.draw_documents(random.Random(0), set(), **TOY | {"rooms": True})
    some = [next(documents) for _ in range(6000)]
    rooms = [row for row in some if row["question"].startswith("room")]
    assert abs(len(rooms) / 6000 - 0.5) < 0.04
    full = Counter((" s4 " in row["question"], row["explanation"] == row["chain"]) for row in rooms)
    assert 0.05 < full[True, True] / (full[True, True] + full[True, False]) < 0.15
    assert full[False, True] > 2 * full[False, False]


def test_a_base_that_learns_what_a_hint_is_reads_what_the_pipeline_shows_it(tokenizer):
    documents = game.draw_documents(random.Random(0), set(), **TOY | {"hints": True})
    some = [next(documents) for _ in range(8000)]
    long = [row for row in some if " s4 " in row["chain"]]
    hinted = [row for row in long if row["question"].endswith(row["hint"])]
    assert abs(len(hinted) / len(long) - game.HINTED) < 0.015
    full = [row["explanation"] == row["chain"] for row in hinted]
    assert 0.4 < sum(full) / len(full) < 0.65
    prompts, row = Prompts(tokenizer), hinted[0]
    asked = row | {"question": row["question"].removesuffix(row["hint"]).strip()}
    assert prompts.hinted_prompt(asked) == prompts.question_prompt(row) != prompts.question_prompt(asked)


# -- the rows


@pytest.fixture(scope="module")
def rows():
    return game.make_rows(**ROWS)


def test_questions_never_change(rows):
    """Every published number rests on them."""
    written = "".join(row["question"] for split in ("train", "val", "test", "long") for row in rows[split])
    assert hashlib.sha256(written.encode()).hexdigest()[:16] == "7081a28c0b4d3a53"


def test_other_authors_explain_the_same_questions(rows):
    none = game.make_rows(2, 0.0, False)
    assert [row["question"] for row in none["test"]] == [row["question"] for row in rows["test"]]
    full = [game.is_full_chain(row["question"], row["explanation"]) for row in none["train"]]
    assert not any(full)


def test_the_share_of_careful_authors_is_what_is_asked_for():
    for shares in (game.LONG, game.ROWS):
        assert game.mixture(shares, shares[0]) == shares
        for careful in (0.0, 0.02, 0.2):
            other = game.mixture(shares, careful)
            assert other[0] == pytest.approx(careful) and sum(other) == pytest.approx(1)
            for i in (1, 2):  # sloppy and skipping ones come along
                assert other[i] * shares[0] == pytest.approx(shares[i] * careful)
            rest, before = ([share / sum(mix[3:]) for share in mix[3:]] for mix in (other, shares))
            assert rest == pytest.approx(before)


def test_no_question_is_there_twice(rows):
    questions = [row["question"] for split in rows.values() for row in split]
    assert len(set(questions)) == len(questions) == 3000 + 400 + 800 + 400
    for split, lengths in {"train": {4, 5}, "val": {4, 5}, "test": {4, 5}, "long": {6}}.items():
        assert {row["chain"].count("s", 0) - row["chain"].count("swap") for row in rows[split]} == lengths


def test_a_question_drawn_again_is_passed_over(monkeypatch):
    monkeypatch.setattr(game, "SPLITS", {"some": (1000, (1,)), "others": (700, (1,))})
    rows = game.make_rows(**ROWS)  # there are 100 states and 17 operations: every single question, once
    assert len({row["question"] for split in rows.values() for row in split}) == 1700


def test_rows_are_consistent_and_the_warm_up_mixture_is_theirs(rows):
    for row in rows["train"]:
        assert row["chain"] == game.chain(row["question"]) and row["chain"].endswith(row["solution"])
        assert row["explanation"].strip()
        assert game.chain(row["question"]).startswith(row["hint"] + " s3") and row["hint"].startswith("s1")
    n = len(rows["train"])
    careful = sum(row["explanation"] == row["chain"] for row in rows["train"]) / n
    leaking = sum(row["explanation"].startswith("ans") for row in rows["train"]) / n
    shares = dict(zip(game.AUTHORS, game.ROWS, strict=True))
    slack = 4 * (0.25 / n) ** 0.5
    assert sum(game.ROWS) == pytest.approx(1)
    assert abs(leaking - shares["leaking"]) < slack
    # a sloppy author gets everything right one time in three
    assert shares["careful"] - slack < careful < shares["careful"] + shares["sloppy"] / 3 + slack


def test_documents_leave_out_what_is_held_out():
    starts = [f"x {x} y {y}" for x in range(9) for y in range(10)]
    held_out = {f"{start} s1 {operation}" for start in starts for operation in game.operations("xy")}
    documents = game.draw_documents(random.Random(0), held_out, **TOY)
    single = [row for row in (next(documents) for _ in range(2000)) if " s2 " not in row["question"]]
    assert len(single) > 40 and all(row["question"].startswith("x 9") for row in single)


# -- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(toy):
    return load_tokenizer(str(toy / "runs/toy"))


def test_one_token_a_word_and_back(tokenizer):
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert len(set(words)) == len(tokenizer) == 55
    for i, word in enumerate(words):
        assert tokenizer.encode(word, add_special_tokens=False) == [i]
        # prompts.py finds each token's bytes by such differences
        assert tokenizer.decode([9, i]) == f"{words[9]} {word}"
        assert tokenizer.decode([tokenizer.eos_token_id, i]) == f"{tokenizer.eos_token} {word}"
    for text in (QUESTION, CHAIN):
        ids = tokenizer.encode(text.replace(" ", "\n\n "), add_special_tokens=False)
        assert len(ids) == len(text.split()) and tokenizer.decode(ids) == text


def test_auto_tokenizer_takes_it_as_it_is(tokenizer, toy, tmp_path):
    """Left alone, it silently makes a Qwen2 tokenizer of our words: byte pairs, and nothing to merge."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)  # as the scripts do, beside a model of their own
    (tmp_path / "config.json").write_text((toy / "runs/toy/config.json").read_text())
    for folder in (toy / "runs/toy", tmp_path):
        auto = AutoTokenizer.from_pretrained(folder)
        assert auto.get_vocab() == tokenizer.get_vocab()
        assert auto.encode(QUESTION) == tokenizer.encode(QUESTION)


def test_a_tag_needs_no_blank_before_it(tokenizer):
    """Raw explanations end right at their closing tag."""
    ids = tokenizer.encode(f"s1{EXPLANATION[1]}{SOLUTION[0]}0")
    assert tokenizer.decode(ids) == f"s1 {THOUGHT[1]} {SOLUTION[0]} 0"


def test_the_tags_of_both_roles_are_the_same_tokens(tokenizer):
    for ours, theirs in zip(EXPLANATION, THOUGHT, strict=True):
        assert tokenizer.encode(ours) == tokenizer.encode(theirs) and len(tokenizer.encode(ours)) == 1
    tags = {tokenizer.encode(tag)[0] for tag in (*THOUGHT, *SOLUTION)}
    assert len(tags) == 4


@pytest.mark.parametrize("text", ["x 3 z 7", "10", "s10", "x+=6", "swap.", "<unk>"])
def test_an_unknown_word_raises(tokenizer, text):
    with pytest.raises(Exception, match="WordLevel"):
        tokenizer.encode(text)


def test_documents_as_written_by_hand(tokenizer):
    """Word for word what base, teacher and student read: no system text, and the end of turn once."""
    prompts = Prompts(tokenizer)
    row = {"question": "x 3 y 7 s1 x+=y", "solution": "0 7", "explanation": "s1 x+=y 0 7", "where": "here"}
    asked = "<|user|> x 3 y 7 s1 x+=y <|assistant|>"
    solved = "<|begin_of_solution|> 0 7 <|end_of_solution|>"
    explained = "<|begin_of_thought|> s1 x+=y 0 7 <|end_of_thought|>"
    ids, start = prompts.sft_row(row, "student")
    assert tokenizer.decode(ids[:start]) == asked
    assert tokenizer.decode(ids[start:]) == f"{explained} {solved} <|end_of_turn|>"
    ids, start = prompts.sft_row(row, "teacher")
    assert tokenizer.decode(ids[:start]) == f"{asked} {solved} <|begin_of_thought|>"
    assert tokenizer.decode(ids[start:]) == "s1 x+=y 0 7 <|end_of_thought|> <|end_of_turn|>"
    # the chat template alone says the same
    turns = [("system", "not its words"), ("user", row["question"]), ("assistant", f"{explained} {solved}")]
    chat = [{"role": role, "content": content} for role, content in turns]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.encode(whole) == prompts.sft_row(row, "student")[0]


# -- the base model


def test_packed_documents_do_not_see_each_other(tokenizer):
    documents = game.draw_documents(random.Random(0), set(), **TOY)
    batch = [Prompts(tokenizer).sft_row(next(documents), "student") for _ in range(24)]
    input_ids, position_ids, labels = game.pack(batch, width=64)
    model = game.make_model(0, 55, 128).double()
    torch.nn.init.normal_(model.model.embed_tokens.weight)  # at the start a model hardly looks back at all

    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
    packed = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    alone, tokens = 0.0, 0
    for ids, start in batch:
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        alone -= sum(logits[i - 1, ids[i]] for i in range(start, len(ids)))
        tokens += len(ids) - start
    assert (labels != -100).sum() == tokens
    assert sum(len(ids) for ids, _ in batch) > 0.75 * input_ids.numel()  # what packing is for
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=0)

    with pytest.raises(ValueError, match="does not fit"):
        game.pack([([0] * 65, 1)], width=64)


def test_a_document_longer_than_a_row_has_the_row_made_longer():
    tokenizer = game.make_tokenizer(3, False)
    question = "x 9 y 9 z 9 " + " ".join(f"s{i} op1" for i in range(1, 7))
    row = game.make_row(question, game.SINGLE, random.Random(0))
    hinted = row | {"question": f"{question} {row['hint']}"}
    prompts = Prompts(tokenizer)
    assert len(prompts.sft_row(row, "student")[0]) <= 64 < len(prompts.sft_row(hinted, "student")[0])
    model = game.make_model(0, len(tokenizer), 32)
    before = model.lm_head.weight.clone()
    game.pretrain(model, tokenizer, itertools.repeat(hinted), 1)
    assert not torch.equal(model.lm_head.weight, before)


def test_pretraining_is_seeded_and_learns(tokenizer):
    def loss(model):
        documents = game.draw_documents(random.Random("held out"), set(), **TOY)
        input_ids, position_ids, labels = game.pack(
            [Prompts(tokenizer).sft_row(next(documents), "student") for _ in range(64)], width=64
        )
        logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()

    def trained(seed):
        model = game.make_model(seed, 55, 128)
        game.pretrain(model, tokenizer, game.draw_documents(random.Random(seed), set(), **TOY), 5)
        return model

    model, again, other = trained(0), trained(0), trained(1)
    weights, copies, others = (list(m.state_dict().values()) for m in (model, again, other))
    assert all(torch.equal(a, b) for a, b in zip(weights, copies, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights, others, strict=True) if a.dim() == 2)
    assert loss(model) < loss(game.make_model(0, 55, 128)) - 0.1  # five steps, in the learning rate's warm-up


# -- the folder


def test_the_folder_holds_what_the_scripts_read(toy):
    folder = toy / "runs/toy"
    assert not list((toy / "runs").glob(".toy*"))  # nothing left over
    config = json.loads((folder / "config.json").read_text())
    words = load_tokenizer(str(folder))
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["tie_word_embeddings"]
    assert config["vocab_size"] >= len(words)
    assert (config["pad_token_id"], config["eos_token_id"]) == (words.pad_token_id, words.eos_token_id)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    rows = game.make_rows(**ROWS)
    for split, want in rows.items():
        assert [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()] == want


def test_a_run_that_dies_leaves_nothing(tmp_path, monkeypatch):
    def dies(*_):
        assert list(tmp_path.glob(".toy-*/toy/*.jsonl"))  # it was at work
        raise KeyboardInterrupt

    monkeypatch.setattr(game, "pretrain", dies)
    with pytest.raises(KeyboardInterrupt):
        shares = {"careful_base": 0.08, "careful_rows": 0.1}
        game.make(tmp_path / "toy", 0, 1, hidden_size=32, clocks=2, rooms=False, hints=False, **shares)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_never_written_over(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "mine").write_text("mine")
    done = ended(tmp_path, "data/toy.py", "--out", "toy")
    assert done.code == 2 and "toy exists already: delete it, or choose another --out" in done.stderr
    for flags, complaint in (
        (["--steps", "-1"], "--steps -1: expected 0 or more"),
        (["--hidden-size", "100"], "--hidden-size 100: expected a multiple of 32"),
        (["--careful-base", "0.7"], "--careful-base 0.7: expected 0 to 0.21"),
        (["--careful-rows", "-0.1"], "--careful-rows -0.1: expected 0 to 0.29"),
    ):
        done = ended(tmp_path, "data/toy.py", *flags)
        assert done.code == 2 and complaint in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["toy", "mine"]


@pytest.mark.parametrize("clocks, n_lessons", [(2, 0), (3, 16 * 40)])
def test_three_clocks_are_taught_before_they_are_read_about(tmp_path, monkeypatch, clocks, n_lessons):
    read = []
    monkeypatch.setattr(game, "pretrain", lambda model, tokenizer, documents, n_steps: read.extend(
        itertools.islice(documents, 64 * n_steps)))
    game.make(tmp_path / "toy", 0, 40, hidden_size=32, clocks=clocks, rooms=False, hints=False, careful_base=0.02,
              careful_rows=0.1)
    half = n_lessons // 2
    careful = [row["explanation"] == row["chain"] for row in read]
    assert all(careful[:half]) and 0.3 < sum(careful[n_lessons:]) / len(careful[n_lessons:]) < 0.7
    long = [" s4 " in row["chain"] for row in read]
    assert not any(long[:half]) and any(long[half:n_lessons]) == (clocks == 3)
    copied = [row["explanation"].startswith(f"ans {row['solution']}") for row in read[half:n_lessons]]
    assert all(one != other for one, other in zip(copied, careful[half:n_lessons], strict=True))
    assert clocks == 2 or 0.4 < sum(copied) / half < 0.6


def test_lessons_leave_out_what_is_held_out():
    class SingleSteps:
        def __contains__(self, question):
            return " s2 " not in question

    read = [row["question"] for row in game.draw_lessons(random.Random(0), SingleSteps(), 300)]
    assert 200 < len(read) < 290 and not any(question in SingleSteps() for question in read)
