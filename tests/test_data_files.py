"""Reading rows: formats, compression, and what is said about broken files."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_jax.data import files
from dpo_jax.data.files import read_rows, read_rows_or_problems
from dpo_jax.data.problems import BadRow
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_formats_are_told_by_their_bytes(tmp_path: Path, kind: str, packed: bool) -> None:
    data = {"jsonl": jsonl(ROWS), "json": json.dumps(ROWS, indent=1).encode(), "parquet": parquet(tmp_path)}[kind]
    source = write(tmp_path / "a.bin", gzip.compress(data) if packed else data)  # the name says nothing
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
    refused(str(tmp_path), "is a folder")
    refused("tfds:hh", "hh", "dpo-jax prepare")
    refused(write(tmp_path / "a.zst", b"\x28\xb5\x2f\xfd...."), "zstd")
    refused(write(tmp_path / "a.parquet", b"PAR1" + bytes(30)), "Parquet")
    if os.geteuid() != 0:
        locked = tmp_path / "locked.jsonl"
        locked.write_bytes(b"{}")
        locked.chmod(0)
        refused(str(locked), "cannot be read")


def test_broken_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(jsonl(ROWS * 50))
    refused(write(tmp_path / "short.gz", whole[:-20]), "short.gz", "cut short")
    refused(write(tmp_path / "bits.gz", whole[:40] + bytes(20) + whole[60:]), "bits.gz", "damaged")


def test_gzip_bomb_and_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BOMB_FLOOR", 2**16)
    monkeypatch.setattr(files, "MAX_LINE", 2**14)
    refused(write(tmp_path / "bomb.gz", gzip.compress(b'{"a": 1}\n' * 2**19)), "unpacks to more than")
    refused(write(tmp_path / "line.gz", gzip.compress(b" " * 2**20)), "line is longer")


def test_hub_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the hub, which split is read, and how a failure reads. The hub itself is replaced."""
    for name in ("data/train-00001-of-00002.jsonl", "data/train-00000-of-00002.jsonl", "data/test.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([{"from": name}]))
    asked = {}

    def snapshot(repository: str, **kwargs: object) -> str:
        asked.update(kwargs, repository=repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    names = [row["from"] for _, row in read_rows("owner/name:train")]
    assert names == ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]
    assert asked["repository"] == "owner/name"
    assert asked["repo_type"] == "dataset"
    assert all(p.endswith((".json", ".jsonl", ".parquet", ".gz")) for p in asked["allow_patterns"])
    refused("owner/name", "several splits", "data/test", "data/train")
    refused("owner/name:validation", "no split 'validation'")

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused("owner/name", "owner/name", "no route to host", "network")
