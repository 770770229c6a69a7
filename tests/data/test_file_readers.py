"""Files of every kind, compressed or damaged: the same rows, or one sentence."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spin.alignment.core.errors import InputError
from spin.alignment.data.file_readers import MAX_DEPTH, SUFFIXES, data_suffix, read_file
from spin.alignment.data.rows import stream_prompts
from spin.alignment.data.source_files import read_records

ROWS = [{"prompt": "2+3?\n„a, b“", "response": '"5"'}, {"prompt": "\u2028", "response": ""}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = '\ufeffprompt,response\r\n"2+3?\n„a, b“","""5"""\r\n\u2028,\r\n\r\n'.encode()
TSV = 'prompt\tresponse\n"2+3?\n„a, b“"\t"""5"""\n\u2028\t\n'.encode()


def rows_of(path: Path) -> list[dict]:
    return [record for _, record in read_file(path)]


def refusal(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        rows_of(path)
    assert str(path) in str(error.value)
    return str(error.value)


FILES = {
    "a.jsonl": LINES,
    "A.JSONL": LINES,
    "a.ndjson": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "joined.jsonl": b"\xef\xbb\xbf" + LINES.splitlines(True)[0] + b"\xef\xbb\xbf" + LINES.splitlines(True)[1],
    "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
    "a.json": json.dumps(ROWS).encode(),
    "a.csv": CSV,
    "a.tsv": TSV,
    "a.jsonl.gz": gzip.compress(LINES),
    "two.jsonl.gz": gzip.compress(LINES.splitlines(True)[0]) + gzip.compress(LINES.splitlines(True)[1]),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.csv.xz": lzma.compress(CSV),
    "a.jsonl.zst": pa.compress(LINES, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert rows_of(tmp_path / name) == ROWS


def test_arrow_and_feather_files(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    pyarrow.feather.write_feather(table, tmp_path / "file.arrow")
    assert rows_of(tmp_path / "stream.arrow") == rows_of(tmp_path / "file.arrow") == ROWS


def test_suffixes():
    names = ("a.jsonl.gz", "a.b.json", "a.parquet.gz", "a.gz", "a.txt", "a.CSV.ZST")
    assert [data_suffix(Path(name)) for name in names] == [".jsonl.gz", ".json", "", "", "", ".CSV.ZST"]


DEEP = b"[" * 200_000 + b"]" * 200_000
DAMAGED = {
    "deep.jsonl": (
        b'{"prompt": "q", "response": "a", "x": ' + DEEP + b"}\n",
        r"jsonl line 1 is nested more than 100 levels deep: remove the column, or the row$",
    ),
    "deep.json": (b'[{"prompt": "q"}, {"x": ' + DEEP + b"}]", "nested more than 100 levels|not JSON at row 1"),
    "deep-short.json": (b'[{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}]", "row 0 is nested more than 100 levels deep"),
    "less-deep.jsonl": (b'{"x": ' + b'{"a":' * 120 + b"1" + b"}" * 121, "line 1 is nested more than 100"),
    "less-deep.json": (b'[{"x": ' + b"[" * 120 + b"]" * 120 + b"}]", "row 0 is nested more than 100"),
    "cut.jsonl": (LINES[:-9], "line 2 is not JSON .*the file may be cut off here"),
    "twice.jsonl": (
        b'{"prompt": "a", "x": {"k": 1, "k": 2}}\n',
        "line 1 has the key 'k' twice in one object: remove one$",
    ),
    "twice.json": (b'[{"a": 1}, {"prompt": "a", "prompt": "b"}]', "row 1 has the key 'prompt' twice in one object"),
    "digits.jsonl": (b'{"id": ' + b"9" * 5000 + b"}\n", "line 1 is not JSON"),
    "object.json": (b'{\n "a": 1,\n "b": 2\n}\n', "is a single JSON object over several lines"),
    "zeros.jsonl": (bytes(1000), "line 1 is not JSON"),
    "bytes.jsonl": (bytes(range(256)), "is not UTF-8 text"),
    "utf16.jsonl": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
    "packed.jsonl": (gzip.compress(LINES), "is not UTF-8 text .* but looks like gzip"),
    "table.jsonl": (b"PAR1\xff\xff", "but looks like parquet"),
    "plain.jsonl.gz": (LINES, "is damaged or not compressed as its name says"),
    "torn.jsonl.gz": (gzip.compress(LINES)[:-20], "is damaged"),
    "torn.jsonl.zst": (pa.compress(LINES * 999, "zstd", asbytes=True)[:-20], "is damaged"),
    "torn.jsonl.bz2": (bz2.compress(LINES)[:-20], "is damaged"),
    "torn.jsonl.xz": (lzma.compress(LINES)[:-20], "is damaged"),
    "plain.jsonl.xz": (LINES, "is damaged"),
    "empty.arrow": (b"", "not a readable Arrow file"),
    "torn.arrow": (b"ARROW1\0\0", "not a readable Arrow file"),
    "torn.parquet": (b"PAR1", "not a readable parquet file"),
    "ragged.csv": (b"a,b\n1,2,3\n", "row 0 has 3 values for 2 columns"),
    "short.csv": (b"a,b\n1,2\n3\n", "row 1 has 1 values for 2 columns"),
    "twice.csv": (b"a,a\n1,2\n", "names its columns a, a: give each a name"),
    "unnamed.csv": (b"a,\n1,2\n", "give each a name"),
    "open.csv": (b'a,b\n"1,2\n', "is not a table of text"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    content, sentence = DAMAGED[name]
    message = refusal(tmp_path / name, content)
    assert re.search(sentence, message) and "\n" not in message


@pytest.mark.parametrize("more", [b"]", b'[{"prompt": "c", "response": "d"}]', b"xyz", b" " * 2**21 + b"{}"])
def test_what_follows_an_array_is_not_lost(tmp_path, more):
    assert "goes on after an array of 2 rows" in refusal(tmp_path / "a.json", json.dumps(ROWS).encode() + more)


def test_a_stream_that_was_cut_off_between_two_batches_is_refused(tmp_path):
    table, path, ends = pa.Table.from_pylist(ROWS), tmp_path / "a.arrow", []
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=1):
            writer.write_batch(batch)
            file.flush()
            ends.append(file.tell())
    whole = path.read_bytes()
    assert rows_of(path) == ROWS
    for end in ends:
        assert "lacks the marker that ends an Arrow stream" in refusal(path, whole[:end])


def test_a_missing_value_that_pandas_wrote_is_null(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\nq,nan,NaN of course\nq,<NA>,NaN\n")
    assert [list(row.values()) for row in rows_of(path)] == [["q", None, "NaN of course"], ["q", None, None]]


def test_depth_is_counted_in_levels_not_brackets(tmp_path):
    path = tmp_path / "a.jsonl"
    wide = {"x": [[1], {"a": []}] * 1000}
    path.write_text(json.dumps(wide) + "\n" + '{"x": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}")
    assert rows_of(path)[0] == wide and len(rows_of(path)) == 2


def test_long_fields_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 300_000 + ",y\n")
    assert rows_of(tmp_path / "a.csv") == [{"a": "x" * 300_000, "b": "y"}]


def test_text_of_a_parquet_file_that_is_not_utf8(tmp_path):
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"a": bad}), tmp_path / "a.parquet")
    assert "contains text that is not UTF-8" in refusal(tmp_path / "a.parquet")


def test_a_parquet_column_that_stands_twice(tmp_path):
    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "a.parquet")
    assert "has several columns named 'a'" in refusal(tmp_path / "a.parquet")


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    assert "cannot read" in refusal(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl").mkdir()
    assert "cannot read" in refusal(tmp_path / "b.jsonl")
    (tmp_path / "c.xlsx").touch()
    assert "has an unknown file type: give a file that ends in .parquet" in refusal(tmp_path / "c.xlsx")


@settings(max_examples=250, deadline=None)
@given(
    suffix=st.sampled_from([*SUFFIXES, ".jsonl.gz", ".csv.zst", ".json.bz2", ".tsv.xz"]),
    start=st.sampled_from([b"", b"[", b'[{"a": 1}', b'{"a": ', b"a,b\n", b"PAR1", b"ARROW1", *FILES.values()]),
    cut=st.integers(0, 200),
    rest=st.binary(max_size=60),
)
def test_any_bytes_are_read_or_refused(tmp_path_factory, suffix, start, cut, rest):
    path = tmp_path_factory.mktemp("fuzz") / f"a{suffix}"
    path.write_bytes(start[:cut] + rest)
    try:
        rows = list(read_records(str(path), "train"))
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error).replace(str(path), "")
    else:
        assert all(isinstance(record, dict) for _, record in rows)


def test_a_plain_row_is_read_in_few_calls(tmp_path):
    """Reading 100,000 rows took 5 s when every rare column was looked up in every row: the cost is bounded, in function calls."""
    import cProfile
    import pstats

    rows = [
        {
            "prompt_id": str(n),
            "chosen": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}],
        }
        for n in range(200)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(list(stream_prompts(str(path), "train"))) == 200  # fills the caches
    profile = cProfile.Profile()
    profile.runcall(lambda: list(stream_prompts(str(path), "train")))
    assert pstats.Stats(profile).total_calls / 200 < 150  # it was 232
