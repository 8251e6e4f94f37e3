"""Documents of plain text: where they come from, what ids they become, which are left out."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers_for_tests import byte_level, llama2

from dpo_jax.commands.prepare import prepare
from dpo_jax.config import PrepareRun
from dpo_jax.data.sets.documents import DocumentDataset, is_text, load_documents
from dpo_jax.errors import InputError

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_id


def load(source: Path, **options: Any) -> DocumentDataset:
    return load_documents(str(source), TOKENIZER, vocab_size=600, **options)


def texts(data: DocumentDataset, tokenizer: Any = TOKENIZER) -> list[str]:
    """The documents as text, without their ends."""
    return [tokenizer.decode(data.tokens[i][:-1]) for i in range(len(data))]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_rows_of_text(tmp_path: Path) -> None:
    data = load(jsonl(tmp_path / "a.jsonl", [{"text": "Hello, you.", "title": "x"}, "", {"text": "One\n\ntwo."}]))
    assert texts(data) == ["Hello, you.", "One\n\ntwo."]
    assert [int(data.tokens[i][-1]) for i in range(2)] == [EOS, EOS]
    assert data.tokens.values.dtype == np.uint16
    assert data.row_numbers.tolist() == [1, 3]
    assert data.total == len(data.tokens.values) == data.lengths.sum()
    assert "2 of 2 documents" in data.summary()
    assert "columns not used: title" in data.summary()


def test_ids_are_as_wide_as_the_vocabulary_needs(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "Hello, you."}])
    wide = load_documents(str(source), TOKENIZER, vocab_size=2**16 + 1)
    assert wide.tokens.values.dtype == np.uint32
    assert wide.tokens.values.tolist() == load(source).tokens.values.tolist()


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffOne.\n\nTwo.\r\nThree.\n", encoding="utf-8")
    assert texts(load(tmp_path / "a.txt")) == ["One.\n\nTwo.\nThree."]
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("packed text")
    assert texts(load(tmp_path / "b.txt.gz")) == ["packed text"]


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("b.txt", "a.txt", "more/c.txt"):
        (tmp_path / name).write_text(f"I am {name}")
    (tmp_path / "README.md").write_text("not this")
    data = load(tmp_path)
    assert texts(data) == ["I am a.txt", "I am b.txt", "I am more/c.txt"]
    assert data.row_numbers.tolist() == [1, 2, 3]
    assert texts(load(tmp_path, limit=2)) == ["I am a.txt", "I am b.txt"]


@pytest.mark.parametrize(
    ("separator", "text"),
    [
        ("blank_line", "one two\nthree\n\n\n \nfour five\n\t\nsix seven\n"),
        ("<|endoftext|>", "one two\nthree<|endoftext|>\nfour five<|endoftext|><|endoftext|>six seven<|endoftext|>\n"),
    ],
)
def test_separators(tmp_path: Path, separator: str, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    data = load(tmp_path / "a.txt", separator=separator)
    assert texts(data) == ["one two\nthree", "four five", "six seven"]
    assert data.row_numbers.tolist() == [1, 2, 3]


def test_separators_across_the_blocks_of_a_large_file(tmp_path: Path) -> None:
    lines = [f"{i} " + "fox " * (i % 7) + "end" for i in range(150_000)]
    (tmp_path / "a.txt").write_text("<|sep|>".join(lines))
    assert len((tmp_path / "a.txt").read_bytes()) > 2**21
    data = load(tmp_path / "a.txt", separator="<|sep|>", limit=100_000)
    assert len(data) == 100_000
    at = np.arange(0, len(data), 997)
    assert [TOKENIZER.decode(data.tokens[int(i)][:-1]) for i in at] == [lines[i] for i in at]


def test_control_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    text = "He said <|im_end|> and <|endoftext|>."
    data = load(jsonl(tmp_path / "a.jsonl", [{"text": text}]))
    assert data.tokens[0].tolist().count(EOS) == 1
    assert texts(data) == [text]


def test_short_documents_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": t} for t in ("", "x", "the fox", "y")]
    with caplog.at_level("WARNING", "dpo_jax"):
        data = load(jsonl(tmp_path / "a.jsonl", rows))
    assert data.row_numbers.tolist() == [3]
    assert data.dropped == {"document shorter than two tokens": 3}
    assert "left out 3 x document shorter than two tokens (first: row 1)" in caplog.text
    with pytest.raises(InputError, match="none of 2 rows can be used: 2 x document shorter than two tokens"):
        load(jsonl(tmp_path / "b.jsonl", rows[:2]))


def test_bad_rows(tmp_path: Path) -> None:
    rows = [{"text": "fine text"}, {"content": "a"}, {"text": 3}, "{", '{"text": "\\ud800 x"}']
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as caught:
        load(source)
    message = str(caught.value)
    assert "4 of 5 rows cannot be used" in message
    for part in ("no column 'text' (first: row 2: the columns are content)", "row 3", "malformed JSON", "surrogate"):
        assert part in message
    assert "\n" not in message
    assert len(load(source, on_bad_rows="skip")) == 1


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text\n\nbad \xff\xfe text")
    with pytest.raises(InputError, match=r"invalid UTF-8 .*a\.txt"):
        load(tmp_path / "a.txt")
    source = jsonl(tmp_path / "a.jsonl", [{"text": "some text"}])
    with pytest.raises(InputError, match=r"--data\.separator has no effect: .*a\.jsonl holds rows"):
        load(source, separator="blank_line")
    with pytest.raises(InputError, match="embedding has 5 rows"):
        load_documents(str(source), TOKENIZER, vocab_size=5)
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nothing.txt")
    without = byte_level()
    without.eos_token = None
    with pytest.raises(InputError, match="no EOS token"):
        load_documents(str(source), without, vocab_size=600)


def test_what_is_text(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part.txt").write_text("x")
    (tmp_path / "store").mkdir()
    for name in ("dataset_info.json", "features.json", "report.txt"):
        (tmp_path / "store" / name).write_text("{}")
    assert is_text(str(tmp_path / "data"))
    assert not is_text(str(tmp_path / "store"))
    assert not is_text("owner/name:train")


# ---------------------------------------------------------------- the real Llama 2 tokenizer


def test_llama2_takes_digits_apart_and_falls_back_on_bytes(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = llama2(shared_data, tmp_path)
    text = "In 2023: 12,345.67 龘𠮷🦙 </s><s> <unk>\n  two  spaces"
    data = load_documents(str(jsonl(tmp_path / "a.jsonl", [{"text": text}])), tokenizer, vocab_size=32_000)
    ids = data.tokens[0].tolist()
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert (ids[0], ids[-1]) == (1, 2)
    assert all(len(piece.strip("▁")) == 1 for piece in pieces if any(c.isdigit() for c in piece) and piece[0] != "<")
    assert [p for p in pieces if p in set("0123456789")] == list("20231234567")
    for character in "龘𠮷🦙":
        as_bytes = [f"<0x{b:02X}>" for b in character.encode()]
        assert any(pieces[i : i + len(as_bytes)] == as_bytes for i in range(len(pieces)))
    assert not {0, 1, 2} & set(ids[1:-1]), "no <unk>, and no document that ends itself"
    assert data.unknown == 0
    assert tokenizer.decode(ids[1:-1]) == text


def test_classical_chinese_is_the_ids_of_sentencepiece(shared_data: Path, tmp_path: Path) -> None:
    import sentencepiece

    tokenizer = llama2(shared_data, tmp_path)
    source = shared_data / "zh_classics" / "zh_classics.jsonl"
    data = load_documents(str(source), tokenizer, vocab_size=32_000, limit=200)
    pieces = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    rows = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()[:200]]
    assert len(data) == 200
    for i, text in enumerate(rows):
        assert data.tokens[i].tolist() == [1, *pieces.encode(text), 2]
    assert data.unknown == 0


# ---------------------------------------------------------------- stores


def test_a_store_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": f"Document {i}, the quick\nbrown fox {'jumps ' * i}"} for i in range(7)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    prepare(PrepareRun(data=str(source), to=str(tmp_path / "store"), kind="text"))
    from_file, from_store = load(source), load_documents(f"tfds:{tmp_path / 'store'}", TOKENIZER, vocab_size=600)
    assert from_store.fingerprint == from_file.fingerprint
    assert from_store.row_numbers.tolist() == from_file.row_numbers.tolist()
