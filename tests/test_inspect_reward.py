"""Numbers per token in rows, the page and the picture of them.   python -m pytest tests/test_inspect_reward.py"""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from rlt.errors import UserError
from rlt.files import read_jsonl
from rlt.inspection import token_numbers
from rlt.prompts import Prompts

import pytest
import torch
from conftest import ROOT, call, ended, run_script

import rewards

sys.path.insert(0, str(ROOT / "figures"))
import inspect_reward  # noqa: E402
import reward_picture  # noqa: E402
import reward_rows  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = ["<script>document.title='evil'</script>", "</p>", "&amp;", "\"'", "\u202e", "\x1b[31m", "\x00", "\n\n", "中",
        "$x_1$"]


def row(thought=(" a", " b"), kl=(0.5, 0.25), solution=("1", "\n"), logprob=(-2.0, -1.0), *, closed=True, **columns):
    """A row as distill.py writes it, of lambda 3, alpha 0.5 and a penalty of 1."""
    counted = kl or (1.0,)
    score = sum(logprob) / len(logprob) + 0.5 * min(logprob)
    divergence = sum(counted) / len(counted) + 0.5 * max(counted)
    return {
        "question": "q?", "solution": "1", "explanation": "".join(thought), "closed": closed, "leak": False,
        "score": score, "kl": divergence, "reward": score - 3 * divergence - (not closed or not thought),
        "tokens": {"thought": list(thought), "kl": list(kl), "solution": list(solution), "logprob": list(logprob)},
        **columns}


def write(path, rows, **flags):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    flags = {"lam": 3.0, "alpha": 0.5, "kl": "exact", "unclosed_penalty": 1.0} | flags
    Path(f"{path}.config.json").write_text(json.dumps({"flags": flags, "command": "distill.py"}))
    return path


# ---------------------------------------------------------------------------------------------------------
# what rows keep


def check_row(kept, lam=3.0, alpha=0.01, penalty=1.0):
    """The numbers of a row's tokens give its score, kl and reward; its tokens give its texts."""
    tokens = kept["tokens"]
    assert len(tokens["thought"]) == len(tokens["kl"]) and len(tokens["solution"]) == len(tokens["logprob"]) > 0
    assert "".join(tokens["solution"]).strip() == kept["solution"]
    assert kept["explanation"].startswith("".join(tokens["thought"]).lstrip(" "))  # the toy's words come with a blank
    counted = tokens["kl"] or [1.0]
    score = sum(tokens["logprob"]) / len(tokens["logprob"]) + alpha * min(tokens["logprob"])
    kl = sum(counted) / len(counted) + alpha * max(counted)
    assert kept["score"] == pytest.approx(score, abs=2e-4) and kept["kl"] == pytest.approx(kl, abs=2e-4)
    proper = kept["closed"] and tokens["thought"]
    assert kept["reward"] == pytest.approx(score - lam * kl - (0 if proper else penalty), abs=1e-3)


def test_samples_and_distilled_rows_keep_their_tokens(workshop, tmp_path, monkeypatch):
    """And a finished run is looked at without a model."""
    tiny = ["--limit", 80, "--prompts-per-step", 2, "--group-size", 4, "--max-new-tokens", 12, "--eval-rows", 4]
    call(workshop, "train_rlt.py", "--steps", 1, *tiny, "--out", tmp_path / "run")
    samples = read_jsonl(tmp_path / "run/samples.jsonl")
    assert len(samples) > 1 and len({sample["question"] for sample in samples}) == 1
    for sample in samples:
        check_row(sample)
    call(workshop, "distill.py", "--model", "toy-teacher", "--score-file", "runs/toy/train.jsonl", "--limit", 70,
         "--batch-size", 40, "--out", tmp_path / "rows.jsonl")
    rows = read_jsonl(tmp_path / "rows.jsonl")
    kept = [one for one in rows if "tokens" in one]
    assert len(rows) == 70 and kept == rows[:64], "the first rows of a file are enough to look at"
    assert {one["batch"] for one in kept} == {0, 1}
    for one in kept:
        check_row(one)
    monkeypatch.setattr(sys, "path", sys.path + [str(ROOT / "figures")])
    for source in ("run", "rows.jsonl"):
        call(workshop, "figures/inspect_reward.py", tmp_path / source, "--out", tmp_path / "out/page.html")
        page = (tmp_path / "out/page.html").read_text()
        assert "hardest leap" in page and ("three explanations of every tenth step" in page) == (source == "run")
        assert (tmp_path / "out/page.png").read_bytes().startswith(b"\x89PNG")


def test_each_row_gets_its_own_numbers(qwen_tokenizer):
    """By hand from packed values; a character of several tokens, one that is cut, and values that are not finite."""
    prompts = Prompts(qwen_tokenizer)
    ids = [prompts.encode(text) for text in ("one two", "🧑‍🚀 né", "x")]
    lengths, n = [len(i) for i in ids], sum(map(len, ids))
    kl, logprobs = torch.arange(n) / 8, -torch.arange(6.0)
    kl[0], logprobs[5] = float("inf"), float("nan")
    scored = rewards.Scored(None, kl, None, None, logprobs, lengths, lengths, [1, 2, 3], kl, kl)
    rows = [rewards.Row([], i, [], [], [], prompts.encode("12345")[:k]) for k, i in enumerate(ids, 1)]
    one, two, three = (token_numbers(prompts, rows[i], scored, i) for i in range(3))
    assert one["thought"] == ["one", " two"] and one["kl"] == [None, 0.125] and one["logprob"] == [0.0]
    assert two["thought"] == ["🧑", "", "\u200d", "🚀", " né"] and two["kl"] == [0.25, 0.375, 0.5, 0.625, 0.75]
    assert three["kl"] == [(n - 1) / 8] and three["logprob"] == [-3.0, -4.0, None]
    assert prompts.token_texts(ids[1][:2]) == ["🧑", "\ufffd"], "a cut character is not lost"
    json.dumps([one, two, three], allow_nan=False)


# ---------------------------------------------------------------------------------------------------------
# what is shown


def test_a_reward_is_taken_apart():
    """score = -1.5 + 0.5 * -2 = -2.5; kl = 0.375 + 0.5 * 0.5 = 0.625; reward = -2.5 - 3 * 0.625 = -4.375."""
    settings = reward_rows.Settings(lam=3.0, alpha=0.5, kl="exact", unclosed_penalty=1.0)
    scored = reward_rows.take_apart(row(), settings)
    assert (scored.score_mean, scored.score_min, scored.kl_mean, scored.kl_max) == (-1.5, -2.0, 0.375, 0.5)
    assert (scored.hardest, scored.least, scored.penalty) == (0, 0, 0)
    assert reward_rows.equations(scored, settings) == [
        ("score", "−2.50", "mean −1.50 + 0.5 × min −2.00"), ("kl", "0.62", "mean 0.38 + 0.5 × max 0.50"),
        ("reward", "−4.38", "score −2.50 − 3 × kl 0.62")]
    empty = reward_rows.take_apart(row((), ()), settings)
    assert (empty.kl_mean, empty.kl_max, empty.hardest, empty.penalty) == (1, 1, None, 1)
    assert reward_rows.equations(empty, settings)[2] == (
        "reward", "−8.00", "score −2.50 − 3 × kl 1.50 − 1 (empty)")
    for columns, reason in (({"closed": False}, "not closed"), ({"thought": (" ", "\n")}, "empty"),
                            ({}, "other terms")):  # a closed explanation with a text has no penalty
        penalized = reward_rows.take_apart(row(**columns, reward=-5.375), settings)
        assert reward_rows.equations(penalized, settings)[2][2] == f"score −2.50 − 3 × kl 0.62 − 1 ({reason})"
    assert [reward_rows.level(nats) for nats in (-9, 0, 0.0999, 0.1, 0.5, 1, 3, 99)] == [0, 0, 0, 1, 2, 3, 4, 4]
    assert [reward_rows.number(value) for value in (-3.121, 0.0474, 5.557)] == ["−3.12", "0.047", "5.56"]


def test_explanations_stand_by_question_and_reward(tmp_path):
    rows = [row(question="a", reward=-1.0), row(question="b", reward=-9.0), row(question="a", reward=2.0),
            row(question="b", reward=None), {"question": "a", "reward": 0.5}]
    _, groups = reward_rows.read_scored(write(tmp_path / "rows.jsonl", rows))
    assert [[scored.reward for scored in group] for group in groups] == [[2.0, -1.0], [-9.0]]
    steps = [row(step=0, reward=-1.0), row(step=10, reward=1.0), row(step=0, reward=0.0)]
    (tmp_path / "run").mkdir()
    path = write(tmp_path / "run/samples.jsonl", steps)
    Path(f"{path}.config.json").rename(tmp_path / "run/config.json")
    _, groups = reward_rows.read_scored(tmp_path / "run")
    assert [[scored.reward for scored in group] for group in groups] == [[0.0, -1.0], [1.0]]


class Reader(HTMLParser):
    """Tags and texts of a page; its tokens as (class, text, number)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tokens, self._attributes = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._attributes = dict(attributes) if tag == "span" and "data-v" in dict(attributes) else None

    def handle_data(self, data):
        if self._attributes:
            self.tokens.append((self._attributes["class"], data, self._attributes["data-v"]))
            self._attributes = None


def test_all_text_is_escaped_and_nothing_comes_from_a_network(tmp_path):
    plain = inspect_reward.page("x", *reward_rows.read_scored(write(tmp_path / "plain", [row()])))
    evil = row(EVIL, [0.1 * i for i in range(len(EVIL))], EVIL, [-1.0] * len(EVIL), question="".join(EVIL))
    text = inspect_reward.page("".join(EVIL), *reward_rows.read_scored(write(tmp_path / "evil", [evil])))
    assert set(Reader(text).tags) == set(Reader(plain).tags) and Reader(text).tags.count("script") == 1
    assert not re.search(r"https?:|src=|url\(|@import|<link|[\x00-\x08\x1b\u202e]", text)
    shown = [token for _, token, _ in Reader(text).tokens]
    assert shown[:3] == EVIL[:3] and shown[4:7] == ["\\u202e", "\\x1b[31m", "\\x00"]


def test_a_page_of_log_ratios_says_that_they_can_be_negative():
    settings = [reward_rows.Settings(lam=3.0, alpha=0.5, kl=kl, unclosed_penalty=1.0) for kl in ("sampled", "exact")]
    assert ["can be negative" in inspect_reward.page("rows", one, []) for one in settings] == [True, False]


def test_what_is_seen_does_not_need_colour(tmp_path):
    """Every token has its number and a class that underlines; the worst ones have a symbol, once each."""
    one = row(("a", "b", "c", "d", "e"), (0.05, 0.2, 0.7, 2.0, 9.0), ("f", "g"), (-0.01, -4.0))
    text = inspect_reward.page("x", *reward_rows.read_scored(write(tmp_path / "rows", [one])))
    assert Reader(text).tokens == [
        ("t l0", "a", "0.050"), ("t l1", "b", "0.20"), ("t l2", "c", "0.70"), ("t l3", "d", "2.00"),
        ("t l4 mark", "▲e", "9.00"), ("t l0", "f", "−0.010"), ("t l4 mark", "▼g", "−4.00")]
    widths = [re.search(rf"^\.l{i} {{ border-bottom-width: (\d)px|(?<=}} )\.l{i} {{ border-bottom-width: (\d)px",
                        inspect_reward.STYLE, re.M) for i in (1, 2, 3, 4)]
    widths = [int(found[1] or found[2]) for found in widths]
    assert widths == sorted(set(widths)) and widths[0] > 0
    assert text.count('tabindex="0"') == 2, "each text is one stop of the Tab key"


PROBE = """
<script>
const results = {};
window.onerror = message => { results.error = message; };
const frame = document.createElement("iframe");
frame.style.width = "320px";
frame.srcdoc = %s;
frame.onload = () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  results.width = page.documentElement.scrollWidth;
  results.title = page.title;
  const at = () => page.getElementById("at").textContent;
  const press = key => page.activeElement.dispatchEvent(new view.KeyboardEvent("keydown", {key, bubbles: true}));
  page.querySelector('.kl[class~="text"] .t[tabindex="0"]').focus();
  results.first = at();
  press("ArrowRight"); results.second = at();
  press("End"); results.last = at();
  press("ArrowRight"); results.beyond = at();
  press("m"); results.marked = at();
  press("Home"); press("ArrowLeft"); results.home = at();
  results.stops = page.querySelectorAll('.t[tabindex="0"]').length;
  page.querySelector(".lp.text .t").dispatchEvent(new view.MouseEvent("mouseover", {bubbles: true}));
  results.pointed = at();
  const token = page.querySelector(".kl.text .l4");
  results.underline = view.getComputedStyle(token).borderBottomWidth;
  results.before = view.getComputedStyle(token, "::after").content;
  page.getElementById("numbers").click();
  results.after = view.getComputedStyle(token, "::after").content;
  document.title = "done";
  document.body.textContent = "RESULTS" + JSON.stringify(results) + "END";
};
document.body.append(frame);
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium to run the page in a browser")
def test_the_page_in_a_browser(tmp_path):
    """By keyboard and pointer, 320 pixels wide, with a long token and hostile texts."""
    thought = [" first", "second" * 30, " third", *EVIL, " last"]
    one = row(thought, [0.0, 5.0, *[0.25] * (len(thought) - 2)], ("1", "\n"), (-0.5, -0.25), question="w" * 200)
    text = inspect_reward.page("x", *reward_rows.read_scored(write(tmp_path / "rows", [one, one])))
    page = json.dumps(text).replace("</", "<\\/").replace("<!--", "<\\!--")
    (tmp_path / "probe.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{PROBE % page}</body>")
    done = subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/probe.html"],
        capture_output=True, text=True, timeout=120)
    found = re.search("RESULTS(.*)END", done.stdout)
    assert found, done.stderr[-2000:] + done.stdout[-2000:]
    results, n = json.loads(found[1]), len(thought)
    assert results == {
        "width": results["width"], "title": "Rewards of x",
        "first": f"token 1 of {n} [ first] KL 0.000", "second": f"token 2 of {n} [▲{'second' * 30}] KL 5.00",
        "last": f"token {n} of {n} [ last] KL 0.25", "beyond": f"token {n} of {n} [ last] KL 0.25",
        "marked": f"token 2 of {n} [▲{'second' * 30}] KL 5.00", "home": f"token 1 of {n} [ first] KL 0.000", "stops": 4,
        "pointed": "token 1 of 2 [▼1] log-prob −0.50", "underline": "6px", "before": "none", "after": '"5.00"'}
    assert results["width"] <= 320


def test_the_picture_shows_every_token(tmp_path):
    """Lines are no longer than they may be; a line end ends one; a long explanation is cut."""
    lines = reward_picture.token_lines([" word"] * 40 + ["\n", "\n", "x" * 200], [0.0] * 43, 41)
    assert [sum(len(text) for _, text, *_ in line) for line in lines] == [75, 75, 52, 200]
    assert [len(line) for line in lines] == [15, 15, 12, 1]
    assert lines[2][-1] == (51 + reward_picture.GAP, "↵", 0.0, True)
    assert lines[3][0][0] == 0 and [column for column, *_ in lines[0][:3]] == [0, 5, 10]
    assert len(reward_picture.token_lines(["\n", "a"] * 50, [0.0] * 100, 0)) == reward_picture.LINES + 1
    settings, (group,) = reward_rows.read_scored(write(tmp_path / "rows", [row(EVIL, [0.5] * len(EVIL)), row((), ())]))
    figure = reward_picture.draw(group, settings)
    drawn = [text.get_text() for text in figure.axes[0].texts]
    assert "▲ 0.50" in drawn and "▼ −2.00" in drawn and "= score −2.50 − 3 × kl 1.50 − 1 (empty)" in drawn
    reward_picture.save_as(figure, tmp_path / "picture.png")


# ---------------------------------------------------------------------------------------------------------
# what can't be shown


@pytest.mark.parametrize("rows, flags, complaint", [
    ([{"question": "q", "reward": 1.0}], {}, "has no rewards token by token: pass --model (the teacher) and --student"),
    ([row(reward=None)], {}, "has no reward that is finite"),
    ([row()], {"lam": None}, None),
])
def test_rows_that_cannot_be_shown(tmp_path, rows, flags, complaint):
    path = write(tmp_path / "rows.jsonl", rows)
    if complaint is None:  # lambda is not known
        Path(f"{path}.config.json").unlink()
        complaint = "rows.jsonl.config.json is missing or can't be read: it holds lambda and alpha"
    with pytest.raises(UserError, match=re.escape(complaint)):
        reward_rows.read_scored(path)
    (tmp_path / "rows.csv").write_text("question,solution\n1,2\n")
    with pytest.raises(UserError, match="rows.csv:1 is not a JSON object .* are scored with --model and --student"):
        reward_rows.read_scored(tmp_path / "rows.csv")
    with pytest.raises(UserError, match="nowhere does not exist: expected a run folder"):
        reward_rows.read_scored(tmp_path / "nowhere")


def test_what_the_readme_says_of_four_explanations():
    """Its words hold in the committed log, of explanations in the order of data/crate.jsonl."""
    logged = read_jsonl(ROOT / "figures/logs/crate.jsonl")
    assert [one["explanation"].strip() for one in logged] == [
        one["explanation"] for one in read_jsonl(ROOT / "data/crate.jsonl")]
    for one in logged:
        check_row(one)
    right, wrong, off_topic, bare = logged
    assert bare["score"] == max(one["score"] for one in logged) and bare["reward"] == min(o["reward"] for o in logged)
    worst = max(range(len(bare["tokens"]["kl"])), key=bare["tokens"]["kl"].__getitem__)
    assert bare["tokens"]["thought"][worst] == "4", "its digits come out of nowhere"
    assert right["reward"] > wrong["reward"] > off_topic["reward"] and wrong["kl"] < right["kl"]
    page = (ROOT / "README.md").read_text()
    assert json.loads((ROOT / "figures/logs/crate.jsonl.config.json").read_text())["command"].replace(
        "figures/logs", "runs") in page, "the command that is shown is the one that was run"


def test_flags_of_distill_go_with_a_model(tmp_path):
    refused = ended(tmp_path, "figures/inspect_reward.py", "rows.jsonl", "--student", "toy")
    assert refused.code == 2 and "unknown argument --student: flags of distill.py go with --model" in refused.stderr


@pytest.mark.slow
def test_any_rows_are_scored_now(workshop, tmp_path):
    rows = [json.loads(line) for line in (workshop / "runs/toy/train.jsonl").read_text().splitlines()[:3]]
    (workshop / "mine.jsonl").write_text("".join(
        json.dumps({"q": one["question"], "solution": one["solution"], "explanation": one["explanation"]}) + "\n"
        for one in rows))
    flags = ["--model", "toy-teacher", "--student", "toy", "--question-column", "q", "--alpha", 0.5, "--lambda", 1]
    done = run_script(workshop, "figures/inspect_reward.py", "mine.jsonl", *flags, "--out", tmp_path / "page.html",
                      check=False)
    assert done.returncode == 0, done.stderr
    assert "0.5 × min" in (tmp_path / "page.html").read_text() and "3 explanations of 3" in done.stdout
    done = run_script(workshop, "figures/inspect_reward.py", "mine.jsonl", "--model", "toy-teacher", check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "could not be scored by: python" in done.stderr
