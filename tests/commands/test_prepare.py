"""`dpo-jax prepare`: what it writes, what it counts, what it refuses, and that nothing half-done is left."""

import fcntl
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from buckets import Bucket, bucket  # noqa: F401 - a fixture

from dpo_jax import cli
from dpo_jax.commands import prepare as command
from dpo_jax.config import DataConfig, PrepareRun
from dpo_jax.data.sets import pieces
from dpo_jax.data.sources import duplicates, store_writer
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"prompt": f"{tiny.sentence(rng, 12)} {i}", "chosen": tiny.sentence(rng, 5), "rejected": f"no {i}", "id": i}
        for i in range(count)
    ]


def prepare(source: str, to: Path | str, **options: Any) -> dict[str, Any]:
    """Run the command; returns its report."""
    data = replace(options.pop("data", DataConfig()), files=source)
    command.prepare(PrepareRun(data=data, to=str(to), **options))
    return {} if "://" in str(to) else json.loads((Path(to) / "1.0.0" / "report.json").read_text())


def prompts(source: str) -> set[str]:
    return {row["prompt"][0]["content"] for _, row in read_rows(source)}


def test_columns_are_named_and_scored_answers_put_together(tmp_path: Path) -> None:
    """What `dpo` makes of such rows, `prepare` stores: `--data.columns`, and neighbours that score one answer each."""
    scored = [
        {"prompt": f"Q{i // 2}", "response": f"{i}", "helpfulness": i % 2, "correctness": -i, "verbosity": 1}
        for i in range(6)
    ]
    source = jsonl(tmp_path / "scored.jsonl", scored)
    for name, columns, better in (("a", None, [1, 3, 5]), ("b", "score=correctness", [0, 2, 4])):
        report = prepare(source, tmp_path / name, data=DataConfig(columns=columns))
        assert (report["kind"], report["rows_read"], report["rows_written"]) == ("preferences", 6, 3)
        assert [int(row["chosen"]) for _, row in read_rows(f"tfds:{tmp_path / name}")] == better
        other = "correctness" if columns is None else "helpfulness"
        assert report["columns_not_kept"] == [other, "verbosity"]
    report = prepare(source, tmp_path / "c", kind="dialogues", limit=3)
    assert (report["kind"], report["rows_read"], report["rows_written"]) == ("dialogues", 3, 3)
    asked = jsonl(tmp_path / "asked.jsonl", [{"ask": {"text": "Q?"}, "yes": "good", "no": "bad", "id": 1}])
    named = DataConfig(columns="prompt=ask.text,chosen=yes,rejected=no")
    report = prepare(asked, tmp_path / "d", data=named)
    assert (report["kind"], report["columns_not_kept"]) == ("preferences", ["id"])
    with pytest.raises(InputError, match=r"no row has a column 'answer' \(--data\.columns chosen=answer\)"):
        prepare(asked, tmp_path / "e", data=DataConfig(columns="chosen=answer"))
    (tmp_path / "t.txt").write_text("a text")
    with pytest.raises(InputError, match=r"--data\.columns has no effect"):
        prepare(str(tmp_path / "t.txt"), tmp_path / "f", data=named)


def test_rows_are_split_written_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(300)
    rows += [rows[0] | {"prompt": rows[0]["prompt"].upper() + "  "}]
    to = tmp_path / "My prefs"
    report = prepare(jsonl(tmp_path / "a.jsonl", rows), to, splits="train=0.8,dev=0.1,test=.1")
    assert (report["kind"], report["rows_read"], report["rows_written"]) == ("preferences", 301, 301)
    assert report["columns_not_kept"] == ["id"]
    assert sum(split["rows"] for split in report["splits"].values()) == 301
    assert sum(split["repeated_prompts"] for split in report["splits"].values()) == 1
    assert [pair["splits"] for pair in report["between_splits"]] == [
        ["train", "dev"],
        ["train", "test"],
        ["dev", "test"],
    ]
    assert all(pair["shared_prompts"] == 0 for pair in report["between_splits"])
    lengths = [len(row["prompt"]) for row in rows]
    found = report["lengths"]["prompt, characters"]
    assert (found["min"], found["max"], found["mean"]) == (min(lengths), max(lengths), round(np.mean(lengths), 1))
    assert found["p50"] == np.median(lengths)
    assert (to / "1.0.0" / "report.md").read_text().count("| train |") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["My prefs", "a.jsonl"]
    shown = capsys.readouterr()
    assert "train" in shown.out
    assert "rows/s" in shown.err
    # In the order of the file, each row once.
    back = [(name, row) for name in report["splits"] for _, row in read_rows(f"tfds:{to}:{name}")]
    assert sorted(row["rejected"] for _, row in back) == sorted(row["rejected"] for row in rows)
    order = [int(row["rejected"].split()[1]) for name, row in back if name == "train"]
    assert [i for i in order if i] == sorted(i for i in order if i)


def test_added_rows_move_no_row(tmp_path: Path) -> None:
    rows = pairs(200)
    more = pairs(100, seed=1) + rows[::-1] + pairs(50, seed=2)
    for name, some in (("few", rows), ("many", more)):
        prepare(jsonl(tmp_path / f"{name}.jsonl", some), tmp_path / name, splits="train=0.7,test=0.3")
    for split in ("train", "test"):
        assert prompts(f"tfds:{tmp_path / 'few'}:{split}") <= prompts(f"tfds:{tmp_path / 'many'}:{split}")


def test_the_same_input_gives_the_same_data(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", pairs(50))
    for parent in ("one", "two"):
        prepare(source, tmp_path / parent / "set", splits="train=0.8,test=0.2")
    for path in (tmp_path / "one" / "set" / "1.0.0").iterdir():
        if "report" not in path.name:  # it names the folder
            assert path.read_bytes() == (tmp_path / "two" / "set" / "1.0.0" / path.name).read_bytes(), path.name


def test_kinds(tmp_path: Path) -> None:
    dialogue = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for rows, kind in (
        ([{"instruction": "a", "output": "b"}], "dialogues"),
        ([dialogue], "dialogues"),
        ([{"prompt": "a", "completion": "b"}], "dialogues"),
        ([{"prompt": "a", "completion": "b", "label": True}], "preferences"),
        ([{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}], "preferences"),
        ([{"text": "a", "title": "b", "label": 1}], "text"),
    ):
        folder = tmp_path / f"{kind}{rows[0].keys()}"
        assert prepare(jsonl(tmp_path / "a.jsonl", rows), folder)["kind"] == kind
    source = jsonl(tmp_path / "b.jsonl", pairs(3))
    assert prepare(source, tmp_path / "as_dialogues", kind="dialogues")["kind"] == "dialogues"
    row = next(read_rows(f"tfds:{tmp_path / 'as_dialogues'}"))[1]
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    with pytest.raises(InputError, match="none of 3 rows"):
        prepare(source, tmp_path / "as_text", kind="text")
    with pytest.raises(InputError, match="unknown column names"):
        prepare(jsonl(tmp_path / "c.jsonl", [{"x": 1}]), tmp_path / "none")


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree\n\n\n四\n")
    report = prepare(str(tmp_path / "a.txt"), tmp_path / "texts", separator="blank_line")
    assert report["kind"] == "text"
    assert [row["text"].strip() for _, row in read_rows(f"tfds:{tmp_path / 'texts'}")] == ["one", "two\nthree", "四"]
    with pytest.raises(InputError, match="--separator has no effect"):
        prepare(jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path / "b", separator="blank_line")


def test_token_lengths(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    rows = pairs(20)
    report = prepare(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "b", tokenizer=str(tmp_path / "model"))
    lengths = [len(tiny.tokenizer()(row["chosen"])["input_ids"]) for row in rows]
    assert report["lengths"]["chosen, tokens"]["max"] == max(lengths)


def test_bad_rows(tmp_path: Path) -> None:
    rows = [*pairs(3), '{"prompt": ', {"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError, match=r"3 of 6 rows cannot be used: .*row 4"):
        prepare(source, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
    report = prepare(source, tmp_path / "b", on_bad_rows="skip")
    assert (report["rows_read"], report["rows_written"], sum(report["dropped"].values())) == (6, 3, 3)
    assert report["dropped"]["malformed JSON"] == 1
    assert prepare(source, tmp_path / "c", limit=2)["rows_written"] == 2


def test_targets_that_are_taken(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", pairs(3))
    prepare(source, tmp_path / "b")
    with pytest.raises(InputError, match="not empty"):
        prepare(source, tmp_path / "b")
    with pytest.raises(InputError, match="is a file"):
        prepare(source, source)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", pairs(3000))
    add, seen = store_writer.SplitWriter.add, []

    def interrupted(self: Any, record: bytes) -> None:
        add(self, record)
        seen.append(record)
        if len(seen) == 2000:
            # Were the process killed here, this is all there would be: a hidden folder without dataset_info.json.
            assert not (tmp_path / "b").exists()
            assert not list(tmp_path.rglob("dataset_info.json"))
            raise error

    monkeypatch.setattr(store_writer.SplitWriter, "add", interrupted)
    with pytest.raises(error):
        prepare(source, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 2000)
    rows = pairs(100)
    report = prepare(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "b")
    shards = sorted(path.name for path in (tmp_path / "b" / "1.0.0").glob("b-train.array_record-*"))
    assert len(shards) == report["splits"]["train"]["shards"] > 3
    assert shards[0] == f"b-train.array_record-00000-of-{len(shards):05d}"
    assert [row["rejected"] for _, row in read_rows(f"tfds:{tmp_path / 'b'}")] == [row["rejected"] for row in rows]


def test_into_a_bucket(tmp_path: Path, bucket: Bucket) -> None:  # noqa: F811
    source = jsonl(tmp_path / "a.jsonl", pairs(5))
    prepare(source, "gs://bucket/prefs")
    assert len(list(read_rows("tfds:gs://bucket/prefs"))) == 5
    with pytest.raises(InputError, match="exists already"):
        prepare(source, "gs://bucket/prefs")


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ("train", "NAME=SHARE"),
        ("train=0.5,train=0.5", "twice"),
        ("train=0.5,test=0.4", "add up to 0.9"),
        ("train=1,test=0", "positive"),
        ("../x=1", "NAME=SHARE"),
    ],
)
def test_splits_that_do_not_parse(capsys: pytest.CaptureFixture[str], splits: str, words: str) -> None:
    assert cli.main(["prepare", "--data", "a", "--to", "b", "--splits", splits]) == cli.BAD_INPUT
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- near duplicates


def similarity(a: str, b: str) -> float:
    one, other = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (a, b))
    return len(one & other) / len(one | other)


def test_signatures_estimate_similarity() -> None:
    rng = random.Random(0)
    differences = []
    for _ in range(300):
        a = [rng.choice("abcdefgh一二三四") * rng.randint(1, 3) + str(rng.randint(0, 999)) for _ in range(40)]
        b = [word if rng.random() < 0.95 else "changed" for word in a]
        first, second = duplicates.signatures([" ".join(a), " ".join(b)])
        differences.append(float((first == second).mean()) - similarity(" ".join(a), " ".join(b)))
    assert abs(np.mean(differences)) < 0.01
    assert np.std(differences) < 0.07
    same = duplicates.signatures(["", "a", "", "a", "a whole sentence", "a whole sentence"])
    assert (same[0] == same[2]).all()
    assert (same[1] == same[3]).all()
    assert (same[4] == same[5]).all()
    assert (same[0] != same[4]).mean() > 0.9


def test_near_duplicates_are_found(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [
        {"prompt": " ".join(f"w{rng.randint(0, 999)}" for _ in range(30)), "chosen": "a", "rejected": "b"}
        for _ in range(600)
    ]
    rows += [row | {"prompt": row["prompt"] + " again"} for row in rows[:200]]
    report = prepare(jsonl(tmp_path / "a.jsonl", rows), tmp_path / "b", splits="train=0.6,test=0.4")
    train = prompts(f"tfds:{tmp_path / 'b'}:train")
    sides = [(row["prompt"] in train, row["prompt"] + " again" in train) for row in rows[:200]]
    assert report["splits"]["train"]["near_duplicate_prompts"] == 2 * sides.count((True, True)) > 0
    assert report["splits"]["test"]["near_duplicate_prompts"] == 2 * sides.count((False, False)) > 0
    (between,) = report["between_splits"]
    apart = sides.count((True, False)) + sides.count((False, True))
    assert between["near_duplicates_of_test_in_train"] == between["near_duplicates_of_train_in_test"] == apart > 0
    for example in between["examples"]:
        a, b = (rows[number - 1]["prompt"] for number in example["rows"])
        assert a in train
        assert b not in train
        assert abs(similarity(a, b) - example["similarity"]) < 0.25
        assert similarity(a, b) > 0.75


def test_many_equal_bands_take_no_long(tmp_path: Path) -> None:
    """Nearly equal prompts without end, which all share bands: still linear."""
    texts = [
        f"the very same long question asked again and again by everyone who comes by, number {i}" for i in range(5000)
    ]
    found = duplicates.records(texts, list(range(5000)), [i % 2 for i in range(5000)], list(range(1, 5001)))
    found.tofile(tmp_path / "prompts")
    (tmp_path / "scratch").mkdir()
    counts = duplicates.count_prompts([(tmp_path / "prompts", 0)], 2, tmp_path / "scratch")
    assert counts.distinct == [2500, 2500]
    assert counts.near[0, 1].count > 2000
    assert len(counts.near[0, 1].examples) == 5


def test_counts_in_parts_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(2)
    texts = [" ".join(f"w{rng.randint(0, 99)}" for _ in range(20)) for _ in range(400)]
    texts += [text + " again" for text in texts[:150]] + texts[:70]
    hashes = [store_writer.prompt_hash(text) for text in texts]
    found = duplicates.records(texts, hashes, [value % 3 for value in hashes], range(1, len(texts) + 1))
    files = [(tmp_path / "a", 0), (tmp_path / "b", 10)]
    found[:350].tofile(files[0][0])
    found[350:].tofile(files[1][0])
    (tmp_path / "scratch").mkdir()
    whole = duplicates.count_prompts(files, 3, tmp_path / "scratch")
    assert sum(whole.distinct) == 550
    assert sum(near.count for near in whole.near.values()) > 200
    monkeypatch.setattr(duplicates, "_DEALT", 37)
    monkeypatch.setattr(duplicates, "_CHUNK", 51)
    monkeypatch.setattr(duplicates, "_PAIRS", 7)
    parts = duplicates.count_prompts(files, 3, tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())
    assert (parts.rows, parts.distinct, parts.shared) == (whole.rows, whole.distinct, whole.shared)
    assert {pair: near.count for pair, near in parts.near.items()} == {p: near.count for p, near in whole.near.items()}


# ---------------------------------------------------------------- pieces


def same(one: Path, other: Path) -> None:
    """Two data sets hold the same files, byte for byte."""
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) for folder in (one, other)
    ]
    assert names[0] == names[1]
    for name in names[0]:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_any_number_of_processes_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 4000)
    rows: list[Any] = pairs(300)
    rows[250] = '{"prompt": '
    source = jsonl(tmp_path / "a.jsonl", rows)
    options = {"splits": "train=0.8,test=0.2", "on_bad_rows": "skip"}
    for processes in (1, 2):
        report = prepare(source, tmp_path / str(processes) / "set", processes=processes, **options)
    assert "row 251: " in report["problems"]
    assert f"{source}:251:" in report["problems"]
    assert report["splits"]["train"]["shards"] > 4
    same(tmp_path / "1" / "set", tmp_path / "2" / "set")
    order = [int(row["rejected"].split()[1]) for _, row in read_rows(f"tfds:{tmp_path / '2' / 'set'}:train")]
    assert order == sorted(order)
    monkeypatch.setattr(pieces, "PIECE_ROWS", 50)
    again = prepare(f"tfds:{tmp_path / '1' / 'set'}:train", tmp_path / "again")
    assert again["splits"]["train"]["shards"] == -(-len(order) // 50)
    assert [int(row["rejected"].split()[1]) for _, row in read_rows(f"tfds:{tmp_path / 'again'}")] == order


def test_rows_that_are_one_stand_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = [{"prompt": f"Q{i // 7}", "response": f"{i}", "score": i % 7} for i in range(210)]
    source = jsonl(tmp_path / "a.jsonl", scored)
    whole = prepare(source, tmp_path / "one" / "set")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 300)
    report = prepare(source, tmp_path / "two" / "set")
    assert report["rows_written"] == whole["rows_written"] == 30
    assert report["splits"]["train"]["shards"] > 10
    rows = [[row for _, row in read_rows(f"tfds:{tmp_path / name / 'set'}")] for name in ("one", "two")]
    assert rows[0] == rows[1]


def test_many_files_are_pieces_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    (tmp_path / "files").mkdir()
    rows: list[Any] = pairs(60)
    rows[50] = "no JSON"
    for i in range(6):
        jsonl(tmp_path / "files" / f"{i}.jsonl", rows[10 * i : 10 * i + 10])
    report = prepare(str(tmp_path / "files"), tmp_path / "set", on_bad_rows="skip")
    assert report["splits"]["train"]["shards"] > 1
    assert "row 51: " in report["problems"]
    assert [row["rejected"] for _, row in read_rows(f"tfds:{tmp_path / 'set'}")] == [
        row["rejected"] for row in rows if row != "no JSON"
    ]


RUN = """
import sys
from dpo_jax import cli
from dpo_jax.data.sets import pieces
pieces.PIECE_BYTES = 40_000
if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
"""


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    """Killed three times at any moment, at last it holds the same bytes as without."""
    source = jsonl(tmp_path / "a.jsonl", pairs(8000))
    (tmp_path / "run.py").write_text(RUN)
    words = ["prepare", "--data", source, "--splits", "train=0.9,test=0.1", "--processes", "2", "--to"]
    command = [sys.executable, str(tmp_path / "run.py"), *words, str(tmp_path / "killed" / "set")]
    done = tmp_path / "killed" / ".set.partial" / "pieces"
    for count in (1, 4, 12):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len([p for p in done.glob("*") if "." not in p.name]) < count:
            time.sleep(0.01)
        process.kill()
        assert process.wait() != 0
        assert not (tmp_path / "killed" / "set").exists()
        with pytest.raises(InputError, match="no folder"):
            list(read_rows(f"tfds:{tmp_path / 'killed' / 'set'}"))
    left = len([path for path in done.glob("*") if "." not in path.name])
    ended = subprocess.run(command, check=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert int(ended.stderr.partition(" pieces are done already")[0].split()[-3]) >= left >= 12
    assert not done.parent.exists()
    whole = [sys.executable, str(tmp_path / "run.py"), *words, str(tmp_path / "whole" / "set")]
    subprocess.run(whole, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    same(tmp_path / "killed" / "set", tmp_path / "whole" / "set")


def test_another_plan_begins_anew_and_two_at_once_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", pairs(3))
    scratch = tmp_path / ".set.partial"
    scratch.mkdir()
    (scratch / "plan.json").write_text("{}")
    (scratch / "pieces").mkdir()
    (scratch / "pieces" / "000000").mkdir()
    with (scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another dpo-jax prepare is writing it"):
            prepare(source, tmp_path / "set")
    assert scratch.exists()
    assert prepare(source, tmp_path / "set")["rows_written"] == 3
    assert not scratch.exists()


def test_what_is_left_beside_a_whole_set_goes_at_the_next_start(tmp_path: Path) -> None:
    """Killed between the last rename and the end, the command finds its set there, and tidies up."""
    source, scratch = jsonl(tmp_path / "a.jsonl", pairs(3)), tmp_path / ".set.partial"
    prepare(source, tmp_path / "set")
    (scratch / "pieces" / "000000").mkdir(parents=True)
    with (scratch / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="set"):
            prepare(source, tmp_path / "set")
        assert scratch.exists(), "another command's"
    with pytest.raises(InputError, match="set"):
        prepare(source, tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "set"]

    (tmp_path / ".other.partial" / "pieces").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(InputError, match="other"):
        prepare(source, tmp_path / "other")
    assert (tmp_path / ".other.partial" / "pieces").exists(), "of a data set that is not there yet"


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """benchmarks/streaming.py draws the curve to ten million rows."""
    import streaming

    peaks = []
    for rows in (10_000, 100_000):
        source = tmp_path / f"{rows}.jsonl"
        streaming.write_rows(source, rows)
        took, written = streaming.prepare(source, tmp_path / str(rows), "--splits", "train=0.98,test=0.02")
        assert written == rows
        peaks.append(max(took.peak, took.worker))
    assert peaks[1] < peaks[0] + 60, peaks


@pytest.mark.slow
def test_full_disk(tmp_path: Path) -> None:
    from test_cli_errors import limited

    source = jsonl(tmp_path / "a.jsonl", [{"text": random.Random(i).randbytes(400).hex()} for i in range(3000)])
    done = limited(["prepare", "--data", source, "--to", str(tmp_path / "b")], 400_000)
    assert done.returncode == cli.BAD_INPUT, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("dpo-jax: error: ")]
    assert len(errors) == 1
    assert "cannot be written" in errors[0]
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]
