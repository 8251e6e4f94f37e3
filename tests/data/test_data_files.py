"""Reading rows: formats, compression, and what is said about broken files."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sources import files, json_lines
from dpo_jax.data.sources.files import read_rows, read_rows_or_problems
from dpo_jax.errors import InputError

ROWS = [{"prompt": "Grüße?", "n": 1}, {"prompt": "b", "n": None}, {"prompt": "c", "n": 3}]


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def jsonl(rows: list[object]) -> bytes:
    return "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()


def parquet(tmp_path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t")
    return (tmp_path / "t").read_bytes()


def refused(source: str, *words: str) -> None:
    """`source` is refused with one line that holds the words."""
    with pytest.raises(InputError) as caught:
        list(read_rows(source))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_formats_are_told_by_their_bytes(tmp_path: Path, kind: str, packed: Callable[[bytes], bytes]) -> None:
    data = {"jsonl": jsonl(ROWS), "json": json.dumps(ROWS, indent=1).encode(), "parquet": parquet(tmp_path)}[kind]
    source = write(tmp_path / "a.bin", packed(data))  # the name says nothing
    assert list(read_rows(source)) == list(enumerate(ROWS, 1))


def test_jsonl_numbers_are_line_numbers(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf\n{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(read_rows(source)) == [(2, {"a": 1}), (5, {"a": 2})]


def test_a_bad_line_names_file_line_and_place(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": 2\n')
    refused(source, "a.jsonl:2", "malformed JSON", "column")
    refused(write(tmp_path / "b.jsonl", b'{"a": 1}\n{"a": "\xff"}\n'), "b.jsonl:2", "UTF-8", "byte 8")
    refused(write(tmp_path / "c.jsonl", b'{"a": 1}\n3\n'), "c.jsonl:2", "not an object", "a number")
    refused(write(tmp_path / "d.json", b'[{"a": 1}, [2]]'), "element 2", "a list")
    refused(write(tmp_path / "e.json", b'[{"a": 1},\n {"a" 2}]'), "e.json:2", "malformed JSON")
    refused(write(tmp_path / "f.jsonl", b'{"a": ' + b"[" * 100_000), "f.jsonl:1", "malformed JSON")


def test_bad_lines_can_be_passed_over(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a"\n\xff\nnull\n{"a": 5}')
    rows = list(read_rows_or_problems(source))
    assert [n for n, _ in rows] == [1, 2, 3, 4, 5]
    assert [r.reason if isinstance(r, BadRow) else "" for _, r in rows] == [
        "",
        "malformed JSON",
        "invalid UTF-8",
        "row is not an object",
        "",
    ]


def test_files_that_hold_nothing_or_are_something_else(tmp_path: Path) -> None:
    refused(str(tmp_path / "no.jsonl"), "no such file")
    refused(write(tmp_path / "empty.jsonl", b""), "holds no rows")
    refused(write(tmp_path / "blank.jsonl", b"\n \n"), "holds no rows")
    refused(write(tmp_path / "list.json", b"[]"), "holds no rows")
    (tmp_path / "none").mkdir()
    refused(str(tmp_path / "none"), "the folder holds no file of JSONL")
    refused(str(tmp_path / "*.jsonlx"), "no file matches")
    refused("tfds:hh", "hh", "dpo-jax prepare")
    refused(write(tmp_path / "a.zst", b"\x28\xb5\x2f\xfd...."), "a.zst", "zstd", "damaged")
    refused(write(tmp_path / "a.xz", b"\xfd7zXZ"), "xz", "use gzip or zstd")
    refused(write(tmp_path / "a.parquet", b"PAR1" + bytes(30)), "Parquet")
    if os.geteuid() != 0:
        locked = tmp_path / "locked.jsonl"
        locked.write_bytes(b"{}")
        locked.chmod(0)
        refused(str(locked), "cannot be read")


CSV = """\ufeffprompt,chosen,rejected,score
"He said ""so"",
and left.",good,bad,7
Grüße?,"a, b",,
"""


@pytest.mark.parametrize(("name", "packed"), [("a.csv", bytes), ("a.CSV.gz", gzip.compress), ("a.csv.zst", zstd)])
def test_csv(tmp_path: Path, name: str, packed: Callable[[bytes], bytes]) -> None:
    """Quoted line breaks and quotes, a byte order mark, empty cells; a number is a text."""
    rows = [
        {"prompt": 'He said "so",\r\nand left.', "chosen": "good", "rejected": "bad", "score": "7"},
        {"prompt": "Grüße?", "chosen": "a, b", "rejected": None, "score": None},
    ]
    text = CSV.replace("\n", "\r\n").encode()
    assert list(read_rows(write(tmp_path / name, packed(text)))) == list(enumerate(rows, 1))
    tabs = b"prompt\tchosen\nq\ta, b\n"
    assert list(read_rows(write(tmp_path / "a.tsv", tabs))) == [(1, {"prompt": "q", "chosen": "a, b"})]
    assert list(read_rows(write(tmp_path / "b.csv", b'{"a": 1}\n'))) == [(1, {"a": 1})], "its bytes say what it is"


def test_broken_csv(tmp_path: Path) -> None:
    found = list(read_rows_or_problems(write(tmp_path / "a.csv", b"a,b\n1,2\n1,2,3\n\n4\n")))
    assert found[0] == (1, {"a": "1", "b": "2"})
    assert [row.reason for _, row in found[1:] if isinstance(row, BadRow)] == ["wrong number of cells"] * 2
    refused(write(tmp_path / "quote.csv", b'a,b\n"1,2\n3,4\n'), "quote.csv, line 3", "not readable as CSV")
    refused(write(tmp_path / "twice.csv", b"a,a\n1,2\n"), "the column 'a' twice")
    refused(write(tmp_path / "bytes.csv", b"a,b\n\xff,2\n"), "row 1 or one soon after is not UTF-8")
    refused(write(tmp_path / "empty.csv", b"a,b\n"), "holds no rows")


def test_folders_and_patterns(tmp_path: Path) -> None:
    """A folder is read as the hub data set it may be a copy of; a pattern names files, in order."""
    for name in ("data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/dev.jsonl.gz", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = jsonl([{"from": name}])
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)

    def names(source: str) -> list[str]:
        return [row["from"].removeprefix("data/") for _, row in read_rows(source)]

    shards = ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert names(f"{tmp_path}:train") == names(f"{tmp_path / 'data'}/train*") == names(f"{tmp_path}/**/t*") == shards
    assert names(f"{tmp_path}:validation") == ["dev.jsonl.gz"]
    refused(str(tmp_path), "several splits (dev train)")
    refused(f"{tmp_path}:sft", "no split 'sft'; there are dev train")
    (tmp_path / "data/dev.jsonl.gz").unlink()
    assert names(str(tmp_path)) == shards
    other = tmp_path / "parts"
    other.mkdir()
    for i in (1, 2):
        (other / f"part{i}.jsonl").write_bytes(jsonl([{"from": f"part{i}"}]))
    assert names(str(other)) == ["part1", "part2"], "no name tells of splits: all of them"


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(ROWS * 50))
    refused(write(tmp_path / "short.gz", whole[:-20]), "short.gz", "cut short")
    refused(write(tmp_path / "bits.gz", whole[:40] + bytes(20) + whole[60:]), "bits.gz", "damaged")


def test_gzip_bomb_and_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BOMB_FLOOR", 2**16)
    monkeypatch.setattr(json_lines, "MAX_LINE", 2**14)
    refused(write(tmp_path / "bomb.gz", gzip.compress(b'{"a": 1}\n' * 2**19)), "unpacks to more than")
    refused(write(tmp_path / "line.gz", gzip.compress(b" " * 2**20)), "line is longer")


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd])
def test_objects_of_several_lines(tmp_path: Path, packed: Callable[[bytes], bytes]) -> None:
    """One object, or several one after another, as `json.dumps(row, indent=2)` and jq print them."""
    rows = [{**row, "inside": {"list": [{"a": 1}]}} for row in ROWS]
    printed = [json.dumps(row, indent=2, ensure_ascii=False) for row in rows]
    one = write(tmp_path / "one.json", packed(b"\xef\xbb\xbf" + printed[0].encode()))
    assert list(read_rows(one)) == [(1, rows[0])]
    several = write(tmp_path / "several.json", packed("\r\n\n".join(printed).encode()))
    assert list(read_rows(several)) == list(enumerate(rows, 1))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("beside", [{}, {"version": "1.0", "license": ["MIT"]}])
def test_one_object_around_the_rows(tmp_path: Path, indent: int | None, beside: dict, monkeypatch) -> None:
    for name in ("data", "rows", "examples", "instances"):
        text = json.dumps({**beside, name: ROWS}, indent=indent).encode()
        assert list(read_rows(write(tmp_path / "a.json", b"\xef\xbb\xbf" + text))) == list(enumerate(ROWS, 1))
    viewer = {**beside, "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)]}
    found = read_rows(write(tmp_path / "viewer.json", json.dumps(viewer, indent=indent).encode()))
    assert list(found) == list(enumerate(ROWS, 1))
    mixed = json.dumps({**beside, "data": [{"a": 1}, 2]}, indent=indent).encode()
    refused(write(tmp_path / "b.json", mixed), "b.json, element 2 of 'data', holds a number")
    splits = json.dumps({**beside, "train": ROWS, "test": ROWS}, indent=indent).encode()
    refused(write(tmp_path / "c.json", splits), "c.json: is one object whose rows stand in 'train', 'test'; write each")
    both = json.dumps({**beside, "data": ROWS, "rows": ROWS}, indent=indent).encode()
    refused(write(tmp_path / "d.json", both), "rows stand in 'data', 'rows'")
    # A list under such a name in each of several rows is a column; so are messages, or numbers, in a single one.
    rows = [{"data": [{"x": 1}], "n": i} for i in range(2)]
    text = "\n".join(json.dumps(row, indent=indent) for row in rows).encode()
    assert list(read_rows(write(tmp_path / "e.json", text))) == list(enumerate(rows, 1))
    for row in ({"messages": ROWS, **beside}, {"data": [1, 2], **beside}):
        source = write(tmp_path / "f.json", json.dumps(row, indent=indent).encode())
        assert list(read_rows(source)) == [(1, row)]
    monkeypatch.setattr(json_lines, "MAX_LINE", 40)  # as large as one likes, where the list stands first
    if not beside:
        assert list(read_rows(write(tmp_path / "a.json", json.dumps({"data": ROWS}).encode())))[-1] == (3, ROWS[2])


def test_one_row_with_lists_of_objects_is_a_row(tmp_path: Path) -> None:
    inside = [{"x": 1}, {"x": 2}]
    own = {"a.json": {"prompt": "q", "examples": inside, "response": "a"}, "b.jsonl": {"data": inside}}
    for name, row in {**own, "c.jsonl.gz": {"rows": inside, "n": 1}, "d.json": {"test": inside, "task_id": 3}}.items():
        text = json.dumps(row).encode() + b"\n"
        assert list(read_rows(write(tmp_path / name, gzip.compress(text) if "gz" in name else text))) == [(1, row)]
    assert [row for _, row in read_rows(write(tmp_path / "e.json", json.dumps({"dev": inside}).encode()))] == inside


def test_what_the_viewer_has_cut_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"row_idx": i, "row": row, "truncated_cells": ["text"] * (i == 1)} for i, row in enumerate(ROWS)]
    source = write(tmp_path / "v.json", json.dumps({"rows": rows, "num_rows_total": 5000}).encode())
    with caplog.at_level("WARNING", "dpo_jax"):
        found = [row for _, row in read_rows_or_problems(source)]
    assert found[0] == ROWS[0]
    assert "element 2 of 'rows', says so of ['text']" in str(found[1])
    assert "holds 3 rows of the 5,000" in caplog.text


def test_broken_objects_of_several_lines(tmp_path: Path) -> None:
    source = write(tmp_path / "a.json", b'{\n "a": 1\n}\n\n{\n "a": \n}\n{\n "a": 3\n}\n{\n "a"')
    found = list(read_rows_or_problems(source))
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [row if isinstance(row, dict) else row.reason for _, row in found] == [
        {"a": 1}, "malformed JSON", {"a": 3}, "malformed JSON",
    ]  # fmt: skip
    assert "a.json:5:" in str(found[1][1])
    assert "a.json:11: no line that is a closing brace alone" in str(found[3][1])


@pytest.mark.parametrize(
    ("name", "mark", "told"),
    [("a.csv", ";", "semicolons"), ("a.csv.gz", "\t", "tabs"), ("a.tsv", ",", "commas"), ("a.csv", ",", ""),
     ("a.tsv", "\t", "")],
)  # fmt: skip
def test_what_stands_between_cells_the_first_line_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, mark: str, told: str
) -> None:
    text = f'"prompt, or; question"{mark}chosen\n"a{mark}b"{mark}"x, y; z"\n'.encode()
    with caplog.at_level("WARNING", "dpo_jax"):
        found = list(read_rows(write(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)))
    assert found == [(1, {"prompt, or; question": f"a{mark}b", "chosen": "x, y; z"})]
    assert (f"{told} stand between its cells" in caplog.text) is bool(told)
