"""Files of every format and encoding, and hub data sets without a hub.   pytest tests/test_sources.py"""

import gzip
import json
import re
from decimal import Decimal

from rlt.errors import UserError
from rlt.rows import load_rows
from rlt.sources import read_source

import datasets
import pytest

ROWS = [{"question": "caf\u00e9 \u4f60\u2028", "solution": "a, \"b\"\nc"}, {"question": "r", "solution": "t"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'question,solution\n"caf\u00e9 \u4f60\u2028","a, ""b""\nc"\nr,t\n'


def found(path):
    return [row for _, row in read_source(path)]


def complaint(path, **options):
    with pytest.raises(UserError) as error:
        load_rows(path, **options)
    assert str(error.value).startswith(str(path)) and str(error.value).isprintable()
    return str(error.value)


# -- formats


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", LINES.replace("\n", "\r\n")),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.json", LINES),  # JSON Lines by another name
        ("rows.csv", CSV),
        ("rows.tsv", CSV.replace("question,", "question\t").replace('","', '"\t"').replace("r,t", "r\tt")),
        ("rows.CSV", CSV.replace("r,t\n", "r,t\n\n\n")),
    ],
)
def test_text_files_in_any_encoding_that_says_so(tmp_path, encoding, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    assert found(path) == ROWS
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(text.encode(encoding), mtime=0))
    assert found(packed) == ROWS
    assert [row["question"] for row in load_rows(packed, limit=1)] == [ROWS[0]["question"]]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.GZ", "rows.JSONL.gz"])
def test_what_gzip_packed_is_read_under_any_name(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES.encode()))
    assert found(tmp_path / name) == ROWS


def test_parquet(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{**ROWS[0], "messages": turns, "level": 5}, {**ROWS[1], "messages": None, "level": None}] * 700
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert found(tmp_path / "rows.parquet") == rows
    where, last = list(read_source(tmp_path / "rows.parquet"))[-1]
    assert where == f"{tmp_path / 'rows.parquet'} row 1399" and last == rows[-1]
    assert len(list(read_source(tmp_path / "rows.parquet", limit=3))) == 3
    loaded = load_rows(tmp_path / "rows.parquet", limit=2)
    assert loaded[0]["messages"] == turns and "messages" not in loaded[1]


def test_numbers_of_any_type_in_parquet_are_what_was_meant(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path, single = tmp_path / "rows.parquet", pyarrow.float32()
    money = [Decimal("72.50"), Decimal("72.00"), Decimal("0.00"), None]
    columns = {"question": ["q"] * 4, "solution": money, "share": pyarrow.array([0.1, 72, None, 1e-30], single),
               "shares": pyarrow.array([[0.1, None], [], None, [72]], pyarrow.list_(single))}
    parquet.write_table(pyarrow.table(columns), path)
    rows = load_rows(path, skip_bad=True)
    assert [row["solution"] for row in rows] == ["72.50", "72", "0"]
    assert [row["share"] for row in found(path)] == [0.1, 72.0, None, 1e-30]
    assert [row["shares"] for row in found(path)] == [[0.1, None], [], None, [72.0]]
    assert load_rows(path, limit=1, solution_column="share")[0]["solution"] == "0.1"
    big = pyarrow.array([Decimal("1E+2"), Decimal("12345678901234567890123456789012345678")], pyarrow.decimal128(38, 0))
    parquet.write_table(pyarrow.table({"problem": ["p"] * 2, "answer": big}), path)
    assert [row["answer"] for row in load_rows(path)] == ["100", "12345678901234567890123456789012345678"]


def test_a_parquet_value_that_is_no_text_is_that_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    good = pyarrow.array(["q"] * 3)
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 3, pyarrow.array([b"s", b"\xe9", b"t"]).buffers())
    parquet.write_table(pyarrow.table({"question": good, "solution": bad}), tmp_path / "rows.parquet")
    assert "row 1 has a value that can't be read" in complaint(tmp_path / "rows.parquet")
    assert [row["solution"] for row in load_rows(tmp_path / "rows.parquet", skip_bad=True)] == ["s", "t"]


def test_bytes_that_are_no_utf_8_are_that_rows(tmp_path):
    for name in ("rows.jsonl", "rows.csv"):
        path = tmp_path / name
        text = LINES + LINES if name == "rows.jsonl" else CSV + CSV.partition("\n")[2]
        path.write_bytes(text.encode().replace("caf\u00e9".encode(), "caf\u00e9".encode("latin-1"), 1))
        assert "is not UTF-8: save the file as UTF-8" in complaint(path)
        assert len(load_rows(path, skip_bad=True)) == 3
    (tmp_path / "rows.json").write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("latin-1", "replace"))
    assert "rows.json is not UTF-8" in complaint(tmp_path / "rows.json", skip_bad=True)


@pytest.mark.parametrize(
    ("text", "bad", "kept"),
    [
        ("question,solution\nq,s\nonly one\nq,s\n", "row 1 has 1 values for 2 columns", 2),
        ("question,solution\nq,s\nq,s,more\nq,s\n", "row 1 has 3 values for 2 columns", 2),
        ('question,solution\nq,"s"x\nq,s\n', "row 0 is not CSV", 1),
    ],
)
def test_bad_rows_of_csv(tmp_path, text, bad, kept):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    assert bad in complaint(path)
    assert len(load_rows(path, skip_bad=True)) == kept


@pytest.mark.parametrize(("text", "reason"), [
    ('question,solution\nq,s\nq,"never closed\nq,s\n',
     "line 3 opens a quote that is not closed where a value ends (read up to line 4): close it"),
    ('question,solution\nq,"two\nlines"\nq,"never closed\nq,s\n', "line 4 opens a quote"),
    ('question,solution\nq,"never closed\nq,s\nq,"s"\nq,s\n', "line 2 opens a quote that is not closed"),
    ("question,solution,solution\nq,s,t\n", 'has the column "solution" more than once'),
    ("question;solution\nq;s\n", "has one column, 'question;solution': separate columns by ',', not ';'"),
])
def test_what_would_lose_rows_of_csv_in_silence_is_refused(tmp_path, text, reason):
    """Also where bad rows are left out: what the file says of all others is not known."""
    (tmp_path / "rows.csv").write_text(text)
    for skip in (False, True):
        with pytest.raises(UserError, match=re.escape(reason)):
            load_rows(tmp_path / "rows.csv", skip_bad=skip)


def test_empty_lines_before_the_header_are_none(tmp_path):
    (tmp_path / "rows.csv").write_text("\n\nquestion,solution,,\nq,7,,\n")
    assert [row["solution"] for row in load_rows(tmp_path / "rows.csv")] == ["7"]


def test_csv_holds_long_texts_and_lists(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,solution\n"' + "long " * 100_000 + '",s\n')
    assert len(load_rows(path)[0]["question"]) == 500_000
    path.write_text('nums,target\n"[30, 100, 93]",23\n')
    [row] = load_rows(path, require_solution=False)
    assert row["nums"] == [30, 100, 93] and row["target"] == 23
    path.write_text("problem,answer\np,72\n")
    assert load_rows(path)[0]["answer"] == "72"


# -- what is no source


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.parquet", LFS, "is a Git LFS pointer, the file itself is elsewhere: get it by git lfs pull"),
        ("rows.jsonl", LFS, "is a Git LFS pointer"),
        ("rows.jsonl.gz", LFS, "is a Git LFS pointer"),
        ("rows.parquet", b"<!DOCTYPE html>", "is no Parquet file that can be read"),
        ("rows.parquet", b"", "is no Parquet file that can be read"),
        ("rows.jsonl.gz", b"plain", "can't be read"),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "can't be read"),
        ("rows.json", b'{"question": "q"}', "holds a dict, expected a list of rows"),
        ("rows.json", b'[{"question": "q"', "is not JSON"),
        ("rows.json", b"[" * 100_000, "nested too deeply"),
        ("rows.json", b"[" + b"7" * 5000 + b"]", "is not JSON (Exceeds the limit"),
        ("rows.txt", b"q", "has another format: expected a file (.jsonl, .json, .csv, .tsv, .parquet) or a hub id"),
        ("rows", b"q", "has another format"),
        ("rows.csv", b"", "has no usable rows"),
    ],
)
def test_files_that_are_no_source_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert message in complaint(path, skip_bad=True)


def test_places_that_are_no_source_are_one_line(tmp_path):
    for name in ("missing.jsonl", "missing.csv.gz", "a/b/c/d", "rows.parquet"):
        assert "does not exist: expected a file" in complaint(tmp_path / name)
    assert "is a folder" in complaint(tmp_path)
    assert "does not exist" in complaint("./rows")
    assert "does not exist" in complaint("what is this?")
    assert "can't be read" in complaint("x" * 300)
    assert "expected a file (.jsonl, .json" in complaint("org/name-that-no-hub-has")  # offline


# -- the hub


HUB = {  # name: {config: splits}
    "openai/gsm8k": {"main": ["train", "test"], "socratic": ["train", "test"]},
    "HuggingFaceH4/MATH-500": {"default": ["test"]},
    "squad": {"plain_text": ["train"]},
    "org/with-default": {"default": ["all"], "extra": ["train"]},
}


@pytest.fixture
def hub(monkeypatch):
    def load_dataset(name, config=None, split=None):
        if name not in HUB:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nor is gated")
        if config is None and default_config(name) is None:
            raise ValueError("Config name is missing.\nPlease pick one")
        splits = HUB[name].get(config or next(iter(HUB[name])))
        if splits is None:
            raise ValueError(f"BuilderConfig '{config}' not found.")
        if split.partition("[")[0] not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {splits}.')
        return datasets.Dataset.from_list([{"question": f"{name} {config} {split}", "answer": "#### 1"}] * 2)

    def default_config(name):
        first, *others = HUB[name]
        return None if others and first != "default" else first

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: list(HUB[name]))
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", default_config)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: HUB[name][config])


@pytest.mark.parametrize(
    ("source", "loaded"),
    [
        ("openai/gsm8k:main", "openai/gsm8k main train"),
        ("openai/gsm8k:socratic@test", "openai/gsm8k socratic test"),
        ("HuggingFaceH4/MATH-500@test", "HuggingFaceH4/MATH-500 None test"),
        ("squad", "squad None train"),
        ("squad@train[:10%]", "squad None train[:10%]"),
    ],
)
def test_hub_sets_with_config_and_split(hub, source, loaded):
    rows = load_rows(source)
    assert rows[0]["question"].endswith(loaded) and rows[1]["where"] == f"{source} row 1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("openai/gsm8k", "openai/gsm8k needs a config: pass openai/gsm8k:main, or another of main, socratic"),
        ("openai/gsm8k:all", "openai/gsm8k has no config all: pass openai/gsm8k:main, or another of main, socratic"),
        ("openai/gsm8k:main@val", "openai/gsm8k:main has no split val: pass openai/gsm8k:main@train, or another of "
                                  "train, test"),
        ("HuggingFaceH4/MATH-500", "HuggingFaceH4/MATH-500 has no split train: pass HuggingFaceH4/MATH-500@test"),
        ("org/with-default", "org/with-default has no split train: pass org/with-default@all"),
        ("squad@dev[:5]", "squad has no split dev[:5]: pass squad@train"),
        ("nobody/none", "nobody/none can't be read (Dataset 'nobody/none' doesn't exist on the Hub): expected a file"),
    ],
)
def test_errors_list_what_the_hub_has(hub, source, message):
    with pytest.raises(UserError) as error:
        load_rows(source)
    assert str(error.value).startswith(message) and str(error.value).isprintable()


def test_a_file_goes_before_a_hub_set_of_its_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squad").write_text("")
    assert "squad has another format" in complaint("squad")
    (tmp_path / "rows:a@b.jsonl").write_text(LINES)
    assert found("rows:a@b.jsonl") == ROWS
