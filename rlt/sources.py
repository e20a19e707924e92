# SPDX-License-Identifier: MIT
"""
Rows as they come: files and hub data sets, one dict a row, or the UserError that says why one can't be read.

    rows.jsonl  rows.json  rows.csv  rows.tsv, each also packed by gzip    rows.parquet    org/name:config@split
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from pathlib import Path

from rlt.errors import UserError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
EXPECTED = f"expected a file ({', '.join(FORMATS)}) or a hub id (org/name, org/name:config@split)"
BYTE_ORDER_MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
HUB_ID = re.compile(r"(\w[\w.-]*(?:/\w[\w.-]*)?)(?::([\w.-]+))?(?:@(\S+))?")
BROKEN = re.compile("[\ud800-\udfff]")  # half a character: what is no UTF-8 is read as these


def read_source(source, limit=None):
    """(where, row) of a source, at most `limit` of them. A row that can't be read is a UserError.

    Raises UserError where nothing can be read: no such file, another format.
    """
    try:
        yield from itertools.islice(_rows(str(source)), limit)
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz that is cut off
        raise UserError(f"{source} can't be read ({error}): {EXPECTED}") from None


def _rows(source):
    path = Path(source)
    kind = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if path.is_dir():
        raise UserError(f"{source} is a folder: {EXPECTED}")
    if not path.is_file():
        if kind in FORMATS or not HUB_ID.fullmatch(source):
            raise UserError(f"{source} does not exist: {EXPECTED}")
        return _numbered(source, _hub(source))
    if kind not in FORMATS:
        raise UserError(f"{source} has another format: {EXPECTED}")
    with path.open("rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            raise UserError(f"{source} is a Git LFS pointer, the file itself is elsewhere: get it by git lfs pull")
    if kind == ".parquet":
        return _numbered(source, _parquet(path))
    if kind == ".jsonl":
        return _json_lines(source, _text(path))
    if kind == ".json":
        return _json(source, _text(path))
    return _numbered(source, _csv(source, _text(path, newline=""), "\t" if kind == ".tsv" else ","))


def _numbered(source, rows):
    return ((f"{source} row {number}", row) for number, row in enumerate(rows))


def _text(path, newline="\n"):
    """A file opened as text: UTF-8, or what its byte order mark says. Bytes that are no UTF-8 become BROKEN."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"  # so gzip's files begin
    file = gzip.open(path) if packed or path.suffix.lower() == ".gz" else path.open("rb")
    start = file.read(4)
    file.seek(0)
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    return io.TextIOWrapper(file, encoding, errors, newline)


def _json_lines(source, lines):
    with lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"{source} line {number}", _parsed(line)


def _parsed(text):
    if BROKEN.search(text):
        return UserError("is not UTF-8: save the file as UTF-8")
    try:
        return json.loads(text)
    except RecursionError:
        return UserError("is not JSON that can be read (its values are nested too deeply)")
    except json.JSONDecodeError as error:
        return UserError(f"is not JSON ({error.msg} at character {error.pos + 1})")
    except ValueError as error:  # an integer of 5,000 digits
        return UserError(f"is not JSON ({str(error).partition(';')[0]})")


def _json(source, file):
    with file:
        text = file.read()
    if re.match(r"\s*\{.*\}\s*\n\s*\{", text):  # JSON Lines by another name
        return _json_lines(source, io.StringIO(text, newline="\n"))
    table = _parsed(text)
    if isinstance(table, UserError):
        raise UserError(f"{source} {table}. Fix it, or save it as JSONL.")
    if not isinstance(table, list):
        raise UserError(f"{source} holds a {type(table).__name__}, expected a list of rows. Save it as JSONL.")
    return _numbered(source, table)


def _csv(source, file, delimiter):
    csv.field_size_limit(2**31 - 1)
    with file:
        reader, header, line = csv.reader(file, delimiter=delimiter, strict=True), [], 0
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num > line + 1:  # no row: all that is between two quotes that don't belong together
                    raise UserError(f"{source} line {line + 1} opens a quote that is not closed where a value ends "
                                    f"(read up to line {reader.line_num}): close it.") from None
                yield UserError(f"is not CSV ({error})")
                continue
            finally:
                line = reader.line_num
            if not header:  # the first line that is not empty
                header = values
                _check_header(source, header, delimiter)
            elif values and len(values) != len(header):
                yield UserError(f"has {len(values)} values for {len(header)} columns")
            elif any(map(BROKEN.search, values)):
                yield UserError("is not UTF-8: save the file as UTF-8")
            elif values:
                yield dict(zip(header, values, strict=True))


def _check_header(source, header, delimiter):
    """Raise UserError unless the columns are each named once, and are apart."""
    if twice := [name for name in header if name.strip() and header.count(name) > 1]:
        raise UserError(f'{source} has the column "{twice[0]}" more than once: rename or drop one.')
    other = next((mark for mark in ";\t,|" if len(header) == 1 and mark != delimiter and mark in header[0]), None)
    if other:
        raise UserError(f"{source} has one column, {header[0]!r}: separate columns by {delimiter!r}, not {other!r}.")


def _parquet(path):
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                batch = pyarrow.RecordBatch.from_arrays(list(map(_as_doubles, batch.columns)), batch.schema.names)
                yield from map(_parquet_row, (batch.slice(n, 1) for n in range(batch.num_rows)))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is no Parquet file that can be read ({error})") from None


def _as_doubles(column):
    """A column of 32-bit numbers, or of lists of them, as doubles by way of text: 0.1 is not 0.10000000149011612."""
    import pyarrow

    def with_floats_as(number, kind):
        if pyarrow.types.is_list(kind):
            return pyarrow.list_(with_floats_as(number, kind.value_type))
        return number if pyarrow.types.is_float32(kind) else kind

    text, double = (with_floats_as(number, column.type) for number in (pyarrow.string(), pyarrow.float64()))
    return column.cast(text).cast(double) if text != column.type else column


def _parquet_row(one):
    try:
        return one.to_pylist()[0]
    except ValueError as error:  # text that is not UTF-8, a date out of range
        return UserError(f"has a value that can't be read ({error})")


def _hub(source):
    from datasets import load_dataset

    name, config, split = HUB_ID.fullmatch(source).groups()
    try:
        return load_dataset(name, config, split=split or "train")
    except Exception as error:  # datasets raises many kinds
        raise UserError(_hub_advice(name, config, split or "train") or
                        f"{source} can't be read ({str(error).strip().partition(chr(10))[0]}): {EXPECTED}") from None


def _hub_advice(name, config, split):
    """What the data set has instead of this config or split, or None where that isn't the problem."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name, get_dataset_split_names

    try:
        configs, chosen = get_dataset_config_names(name), config or get_dataset_default_config_name(name)
        if chosen not in configs:
            asked = f"has no config {config}" if config else "needs a config"
            return f"{name} {asked}: pass {name}:{configs[0]}, or another of {', '.join(configs)}"
        splits = get_dataset_split_names(name, chosen)
    except Exception:  # no network, no such data set: what load_dataset said is all there is to say
        return None
    if re.split(r"[\[+]", split)[0] in splits:
        return None
    found = f"{name}:{config}" if config else name
    return f"{found} has no split {split}: pass {found}@{splits[0]}, or another of {', '.join(splits)}"
