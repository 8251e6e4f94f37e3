"""Stores: rows come back as they went in, TFDS reads them too, and damaged or foreign folders say what they are."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny
from buckets import Bucket, bucket  # noqa: F401 - a fixture
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.config import DataConfig
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.preferences import parse_pair
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.documents import load_documents
from dpo_jax.data.sets.sequences import load_dialogues
from dpo_jax.data.sources import store_schema, store_writer
from dpo_jax.data.sources.files import read_rows
from dpo_jax.data.sources.store import open_store
from dpo_jax.data.sources.store_writer import Splits, SplitWriter, assemble
from dpo_jax.errors import InputError
from dpo_jax.files.log import CLOCK_KEYS, read_metrics

USER, ANSWER = {"role": "user", "content": "Grüße,\0 世界?"}, {"role": "assistant", "content": " Hallo\n"}
MARKED = {"role": "user", "content": "Say.\n\nAssistant:"}
PAIRS: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.1, "rating": "much better", "source": "x"},
    {"prompt": "a ", "chosen": " b\n", "rejected": "c", "score_chosen": 1, "score_rejected": -1e-300, "rating": 3},
    {"prompt": [USER, ANSWER, USER], "chosen": "b", "rejected": [ANSWER], "system": "Be kind."},
    {"chosen": [USER, ANSWER], "rejected": [USER, {"from": "gpt", "value": "no"}]},
    {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b ", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"chosen": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "Human: a\n\nAssistant: b\n\n"
     "Human: c\n\nAssistant: e"},
    {"prompt": "\n\nHuman: a\n\nAssistant: ", "chosen": " b", "rejected": "c"},
    {"prompt": "a\n\nAssistant:", "chosen": " b", "rejected": "c"},
    {"prompt": [MARKED], "chosen": " b", "rejected": "c"},
    {"chosen": [MARKED, ANSWER], "rejected": [MARKED, {"role": "assistant", "content": "no "}]},
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "\n\nHuman: a\n\nAssistant:", "completion": " b", "label": False, "rating": 0.25},
]  # fmt: skip
DIALOGUES: list[dict[str, Any]] = [
    {"messages": [USER, ANSWER, USER, ANSWER]},
    {"conversations": [USER, ANSWER], "system": "Be kind."},
    {"instruction": "a", "input": "b", "output": "c"},
    {"instruction": "c", "output": "d", "history": [["a", "b"]]},
    {"prompt": "\n\nHuman: a\n\nAssistant:", "completion": " b"},
    {"prompt": "a", "response": "b", "finish_reason": "length"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: b"
     "\n\nHuman: c\n\nAssistant: e"},
]  # fmt: skip


def write(
    path: Path, kind: store_schema.Kind, rows: list[dict[str, Any]], shares: dict[str, float] | None = None
) -> str:
    """A store of `rows` in `path`/1.0.0."""
    folder = path / "1.0.0"
    folder.mkdir(parents=True)
    splits = Splits(shares or {"train": 1.0})
    writers = {split: SplitWriter(folder, split) for split in splits.names}
    for row in rows:
        parsed = store_schema.parse(row, kind)
        value = store_writer.prompt_hash(store_writer.normalised(parsed.prompt))
        writers[splits.names[splits.of(value)]].add(store_schema.serialise(parsed.columns, kind))
    parts = {split: [(folder, writer.finish())] for split, writer in writers.items()}
    assemble(folder, name=store_writer.dataset_name(path), kind=kind, splits=parts, description="made up")
    return f"tfds:{path}"


def refused(source: str, *words: str) -> None:
    """Opening `source` and reading it is refused with one line that holds the words."""
    with pytest.raises(InputError) as caught:
        list(read_rows(source))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def change(path: Path, **values: Any) -> None:
    """Replace some values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---------------------------------------------------------------- round trips


def test_pairs_come_back(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs", "preferences", PAIRS)
    back = list(read_rows(source))
    assert [number for number, _ in back] == list(range(1, len(PAIRS) + 1))
    for row, (_, again) in zip(PAIRS, back, strict=True):
        assert parse_pair(again, needs_pairs=False) == parse_pair(row, needs_pairs=False), row
        assert None not in again.values()
    assert "as_spelled" not in back[0][1]
    store = open_store(source)
    assert store.kind == "preferences"
    assert [store[i] for i in range(len(store))] == [row for _, row in back]
    with pytest.raises(IndexError):
        store[len(PAIRS)]


def test_dialogues_and_texts_come_back(tmp_path: Path) -> None:
    source = write(tmp_path / "dialogues", "dialogues", DIALOGUES)
    for row, (_, again) in zip(DIALOGUES, read_rows(source), strict=True):
        assert parse_dialogue(again) == parse_dialogue(row), row
    texts = [{"text": "\n一\r\n二 "}, {"text": "b", "source": "s", "id": 3}]
    source = write(tmp_path / "texts", "text", texts)
    assert [row for _, row in read_rows(source)] == [texts[0], {"text": "b", "source": "s"}]


def test_a_store_of_a_store_is_the_same(tmp_path: Path) -> None:
    rows = [row for _, row in read_rows(write(tmp_path / "a", "preferences", PAIRS))]
    assert [row for _, row in read_rows(write(tmp_path / "b", "preferences", rows))] == rows


@pytest.mark.parametrize("template", [None, "raw"])
@pytest.mark.parametrize("name", ["hh_harmless/train.jsonl.gz", "dpo_en/pairs.jsonl"])
def test_training_sees_the_same_pairs(shared_data: Path, tmp_path: Path, name: str, template: str | None) -> None:
    file = str(shared_data / name)
    rows = [row for _, row in list(read_rows(file))[:300]]
    kept = [row for row in rows if _parses(row)]
    source = write(tmp_path / "pairs", "preferences", kept)
    config = DataConfig(max_length=256, limit=300, template=template)
    many = [
        load_preferences(place, tiny.tokenizer(), config, vocab_size=320, on_bad_rows="skip")
        for place in (file, source)
    ]
    assert many[0].fingerprint == many[1].fingerprint
    assert many[0].extras == many[1].extras
    assert many[1].unused_columns == ()


def _parses(row: dict[str, Any]) -> bool:
    try:
        parse_pair(row)
    except BadRow:
        return False
    return True


def test_training_sees_the_same_documents(shared_data: Path, tmp_path: Path) -> None:
    file = str(shared_data / "zh_classics" / "zh_classics.jsonl")
    source = write(tmp_path / "texts", "text", [row for _, row in read_rows(file)])
    many = [load_documents(place, tiny.tokenizer(), vocab_size=320) for place in (file, f"{source}:train")]
    assert many[0].fingerprint == many[1].fingerprint


def test_training_sees_the_same_dialogues(shared_data: Path, tmp_path: Path) -> None:
    for name, template in (("oasst_zh/sft.jsonl", None), ("hh_harmless/train.jsonl.gz", "raw")):
        rows = [row for _, row in list(read_rows(str(shared_data / name)))[:200] if _is_dialogue(row)]
        file = tmp_path / f"{template}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = write(tmp_path / f"set_{template}", "dialogues", rows)
        config = DataConfig(max_length=256, template=template)
        many = [load_dialogues(place, tiny.tokenizer(), config, vocab_size=320) for place in (str(file), source)]
        assert many[0].fingerprint == many[1].fingerprint


def _is_dialogue(row: dict[str, Any]) -> bool:
    try:
        parse_dialogue(row)
    except BadRow:
        return False
    return True


@pytest.mark.slow
def test_training_from_a_store_gives_the_same_figures(tmp_path: Path) -> None:
    """The same run from the file and from the store: every figure of every step, every weight, to the bit."""
    tiny.folder(tmp_path / "model", hidden=16, heads=4, kv_heads=2)
    file = tiny.preferences(tmp_path / "pairs.jsonl", rows=20)
    assert cli.main(["prepare", "--data", str(file), "--to", str(tmp_path / "set")]) == cli.OK
    for name, source in (("file", str(file)), ("store", f"tfds:{tmp_path / 'set'}")):
        words = ["--data", source, "--eval_data", source, "--out", str(tmp_path / name), "--train.steps", "4"]
        sizes = ["--train.batch_size", "8", "--data.buckets", "1", "--data.max_length", "128"]
        assert cli.main(["dpo", "--model", str(tmp_path / "model"), *words, *sizes]) == cli.OK
    figures = [
        [{key: value for key, value in row.items() if key not in CLOCK_KEYS} for row in read_metrics(path)]
        for path in (tmp_path / "file" / "metrics.jsonl", tmp_path / "store" / "metrics.jsonl")
    ]
    assert len(figures[0]) >= 4
    assert figures[0] == figures[1]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("file", "store")]
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


# ---------------------------------------------------------------- TFDS


def test_tfds_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path / "pairs", "preferences", PAIRS)
    builder = tfds.builder_from_directory(tmp_path / "pairs" / "1.0.0")
    source = builder.as_data_source("train")
    assert len(source) == builder.info.splits["train"].num_examples == len(PAIRS)
    assert source[0]["chosen"] == b"b"
    assert source[0]["margin"] == 0.1
    assert np.isnan(source[0]["score_chosen"])
    assert source[2]["prompt"]["role"] == [b"system", b"user", b"assistant", b"user"]
    assert all(field["description"] for field in json.loads(
        (tmp_path / "pairs" / "1.0.0" / "features.json").read_text())["featuresDict"]["features"].values()
        if "FeaturesDict" not in field["pythonClassName"])  # fmt: skip


def test_records_are_those_of_tfds() -> None:
    """Our serialiser against that of TFDS, byte for byte of the parsed records."""
    for kind, row in (("preferences", PAIRS[5]), ("dialogues", DIALOGUES[4]), ("text", {"text": "a", "source": "b"})):
        columns = store_schema.parse(row, kind).columns
        tree: dict[str, Any] = {}
        for name, type_, _ in store_schema.FIELDS[kind]:
            value = columns.get(name, float("nan") if type_ == "number" else None)
            outer, _, inner = name.partition("/")
            if type_ == "messages":
                value = [message.as_dict() for message in value]
            tree = tree | ({outer: {**tree.get(outer, {}), inner: value}} if inner else {outer: value})
        theirs = store_schema.features(kind).serialize_example(tree)
        example = store_schema.example_class()
        assert example.FromString(store_schema.serialise(columns, kind)) == example.FromString(theirs)


def foreign(folder: Path, columns: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A data set as TFDS's own writer makes it."""
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="foreign", version=tfds.core.Version("2.1.0"), data_dir=str(folder), module_name="x"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(columns))
    folder.mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, 2, file_format="array_record")
    writer.initialize_splits(["train", "test"])
    writer.add_examples({"train": rows, "test": rows[:1]})
    writer.close_all()
    return f"tfds:{folder}"


def test_foreign_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, sequence = tfds.features.Text(), tfds.features.Sequence
    columns = {
        "prompt": text,
        "chosen": sequence({"role": text, "content": text}),
        "rejected": sequence({"role": text, "content": text}),
        "margin": np.float32,
        "rating": tfds.features.ClassLabel(num_classes=3),
        "label": np.bool_,
        "ids": sequence(np.int64),
        "nested": tfds.features.Tensor(shape=(2, 2), dtype=np.int64),
        "vector": tfds.features.Tensor(shape=(2,), dtype=np.float32),
        "big": tfds.features.Tensor(shape=(), dtype=np.float64, encoding="bytes"),
    }
    answers = [[USER, {"role": "assistant", "content": name}] for name in ("yes", "no")]
    row = {"prompt": USER["content"], "chosen": answers[0], "rejected": answers[1], "margin": 0.5, "rating": 2,
           "label": True, "ids": [1, 2], "nested": [[1, 2], [3, 4]], "vector": [1.0, 2.0], "big": 0.1}  # fmt: skip
    source = foreign(tmp_path / "foreign" / "2.1.0", columns, [row, row | {"prompt": USER["content"], "ids": []}, row])
    back = [row for _, row in read_rows(f"{source}:train")]
    assert len(back) == 3
    assert back[0] == {name: value for name, value in row.items() if name != "nested"}
    assert back[1]["ids"] == []
    assert open_store(source).decoder.left_out == ["nested"]
    pair = parse_pair(back[0])
    assert (pair.chosen, pair.rejected, pair.extras) == ("yes", "no", {"margin": 0.5, "rating": 2.0})

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name in ("tfds:foreign", "tfds:foreign:train", "tfds:foreign/2.1.0", "tfds:foreign:train[:2]+train[2:]"):
        assert len(open_store(name)) in (2, 3), name
    assert len(open_store("tfds:foreign:test")) == 1
    assert len(list(read_rows(str(tmp_path / "foreign")))) == 3  # a folder without tfds: in front
    refused("tfds:foreing", "foreing", str(tmp_path))


# ---------------------------------------------------------------- splits


def test_splits_are_stable_and_even() -> None:
    splits = Splits({"train": 0.9, "test": 0.1})
    hashes = [store_writer.prompt_hash(store_writer.normalised([("user", f"prompt {i}")])) for i in range(4000)]
    assert hashes[0] == int.from_bytes(hashlib.blake2b(b"user: prompt 0", digest_size=8).digest(), "big")
    share = np.mean([splits.of(value) for value in hashes])
    assert abs(share - 0.1) < 0.02
    assert splits.of(2**64 - 1) == 1
    assert splits.of(0) == 0
    one, other = (store_writer.normalised([("user", text)]) for text in ("Ａ  Question?\n", "a question?"))
    assert one == other


# ---------------------------------------------------------------- faults


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """The version folder of a small store with two splits."""
    rows = [{"text": f"document {i}"} for i in range(40)]
    write(tmp_path / "s", "text", rows, {"train": 0.5, "test": 0.5})
    return tmp_path / "s" / "1.0.0"


def shard(store: Path) -> Path:
    return next(store.glob("s-train.array_record-*"))


def test_which_split(store: Path) -> None:
    source = f"tfds:{store}"
    everything = sum(len(open_store(f"{source}:{split}")) for split in ("train", "test"))
    assert everything == len(open_store(f"{source}:train+test")) == 40
    assert open_store(source).split == "train"
    assert open_store(source).fingerprint != open_store(f"{source}:test").fingerprint
    refused(f"{source}:validation", "no split 'validation'", "train", "test")
    refused(f"{source}:train[:x]", "train[:x]")


def test_damaged_folders(store: Path, tmp_path: Path) -> None:
    source = f"tfds:{store.parent}"
    whole = shard(store).read_bytes()
    shard(store).write_bytes(whole[: len(whole) // 2])
    refused(source, shard(store).name, "damaged")
    shard(store).write_bytes(whole[:60] + bytes(8) + whole[68:])
    refused(source, "damaged")
    name = shard(store)
    name.unlink()
    refused(source, name.name, "missing")
    assert len(open_store(f"{source}:test")) > 0
    name.write_bytes(whole)
    info = (store / "dataset_info.json").read_text()
    (store / "dataset_info.json").write_text(info[:-20])
    refused(source, "dataset_info.json", "not valid JSON")
    (store / "dataset_info.json").write_text(info)
    splits = json.loads(info)["splits"]
    change(store / "dataset_info.json", splits=[split | {"shardLengths": ["7"]} for split in splits])
    refused(source, "should hold 7")
    change(store / "dataset_info.json", splits=[split | {"filepathTemplate": "../{SPLIT}"} for split in splits])
    refused(source, "outside")
    change(store / "dataset_info.json", splits=splits, fileFormat="tfrecord")
    refused(source, "tfrecord", "array_record")
    (store / "dataset_info.json").write_text(info)
    change(store / "features.json", featuresDict={"features": {"text": {"text": {}}}})
    refused(source, "features.json")
    (store / "dataset_info.json").unlink()
    refused(source, "no whole TFDS data set")
    refused(f"tfds:{tmp_path / 'nothing'}", "no folder")
    refused("tfds:", "names no data set")


def test_other_versions(store: Path) -> None:
    source = f"tfds:{store.parent}"
    metadata = store / "metadata.json"
    ours = json.loads(metadata.read_text())["dpo_jax"]
    assert (ours["format"], ours["kind"]) == (1, "text")
    change(metadata, dpo_jax=ours | {"format": 2})
    refused(source, "format 2", "reads format 1", "prepare it again")
    change(metadata, dpo_jax=ours | {"kind": "pictures"})
    refused(source, "'pictures'")
    change(metadata, dpo_jax=3)
    refused(source, "metadata.json")
    change(metadata, dpo_jax=ours)
    change(store / "dataset_info.json", version="1.2.0")
    refused(source, "1.2.0", "1.0.0")
    change(store / "dataset_info.json", version="1.0.0")
    shutil.copytree(store, store.parent / "2.0.0")
    refused(source, "2 versions", "2.0.0")


@pytest.mark.parametrize("where", ["features.json", "dataset_info.json"])
def test_nothing_in_the_folder_is_run(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """TFDS imports the module of any column type that the JSON names; such a folder is refused before."""
    (tmp_path / "hostile_columns.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    column = {"pythonClassName": "hostile_columns.Column", "text": {}}
    tree = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
            "featuresDict": {"features": {"text": column}}}  # fmt: skip
    if where == "features.json":
        (store / where).write_text(json.dumps(tree))
    else:
        change(store / where, features=tree)
    (store / "foreign.py").write_text("raise SystemExit('it ran')")
    refused(f"tfds:{store}", "hostile_columns.Column")
    assert "hostile_columns" not in sys.modules


def test_text_that_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"text": b"good"}, {"text": b"\xff"}, {"text": b"good too"}]
    source = foreign(tmp_path / "f", {"text": tfds.features.Text()}, rows)
    found = [row for _, row in open_store(source).rows()]
    assert [isinstance(row, BadRow) for row in found] == [False, True, False]
    with pytest.raises(BadRow, match="UTF-8"):
        open_store(source)[1]


# ---------------------------------------------------------------- buckets


def test_stores_in_a_bucket(store: Path, bucket: Bucket, tmp_path: Path) -> None:  # noqa: F811
    for path in store.iterdir():
        bucket.pipe_file(f"gs://bucket/s/1.0.0/{path.name}", path.read_bytes())
    want = list(read_rows(f"tfds:{store}:test"))
    assert list(read_rows("tfds:gs://bucket/s:test")) == want
    copies = list((tmp_path / "cache").rglob("*array_record*"))
    assert len(copies) == 1  # of the split that was read
    before = copies[0].stat().st_mtime_ns
    assert list(read_rows("tfds:gs://bucket/s/1.0.0:test")) == want
    assert copies[0].stat().st_mtime_ns == before
    refused("tfds:gs://bucket/none", "no whole TFDS data set")
    bucket.rm_file(f"gs://bucket/s/1.0.0/{shard(store).name}")
    refused("tfds:gs://bucket/s:train", "missing")


def test_a_bucket_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    from etils.epath import backend

    def missing(path: object) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(backend.fsspec_backend, "fs", missing)
    refused("tfds:gs://bucket/s", "gs://bucket/s", "pip install gcsfs")

    def offline(path: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(backend.fsspec_backend, "fs", offline)
    refused("tfds:gs://bucket/s", "gs://bucket/s", "cannot be reached", "no route")
