"""Writes the ids of a store's rows: of each piece of a source, and of all pieces together (see `stored_ids.py`)."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.problems import BadRow, Tally
from dpo_jax.data.sets.documents import TOO_SHORT, DocumentEncoder
from dpo_jax.data.sets.stored_ids import ABSENT, FILES, IDS, NUMBERS, ROWS, TEXTS, file_name, identity
from dpo_jax.data.sources.store_schema import Kind, Parsed
from dpo_jax.data.tokens.encode import ConversationEncoder, Encoded
from dpo_jax.errors import InputError


class IdsPlan(NamedTuple):
    """Whose ids to store.

    Attributes: the tokenizer's checkpoint; the template and day as training takes them.
    """

    tokenizer: str
    template: str | None
    date: str | None


class IdsWriter:
    """The ids of the rows of one piece, split by split."""

    def __init__(
        self, folder: Path, splits: Sequence[str], kind: Kind, tokenizer: PreTrainedTokenizerBase, plan: IdsPlan
    ):
        """Files are written into `folder`. Raises `InputError` where the tokenizer does not suit the kind."""
        if kind not in ROWS:
            raise InputError("--store_ids: ids are stored of preferences and of text; leave it out for dialogues")
        self._kind: Kind = kind
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        self.identity = identity(tokenizer, kind, plan.template, plan.date)
        if kind == "text":
            self._documents = DocumentEncoder(tokenizer, len(tokenizer))
        else:
            self._pairs = ConversationEncoder(tokenizer, plan.template, plan.date)
        self._splits = [_Split(folder, split, kind) for split in splits]

    def add(self, rows: Sequence[Parsed], into: Sequence[int]) -> None:
        """Some more rows, and the positions of their splits."""
        numbers = []
        for split in into:
            self._splits[split].count += 1
            numbers.append(self._splits[split].count)
        encoded = self._encoded_texts(rows) if self._kind == "text" else self._encoded_pairs(rows)
        for row, number, split in zip(rows, numbers, into, strict=True):
            where, before = self._splits[split], self._unknown
            found = next(encoded)
            where.unknown += self._unknown - before
            if isinstance(found, BadRow):
                where.tally.add(number, found)
            else:
                where.add(number, row, found, self.dtype)

    @property
    def _unknown(self) -> int:
        return self._documents.unknown if self._kind == "text" else 0

    def _encoded_texts(self, rows: Sequence[Parsed]) -> Iterator[list[np.ndarray] | BadRow]:
        for ids in self._documents.encode([row.columns["text"] for row in rows]):
            yield TOO_SHORT if len(ids) - self._documents.ends < 2 else [ids]

    def _encoded_pairs(self, rows: Sequence[Parsed]) -> Iterator[Encoded | BadRow]:
        rendered: list[Any] = []
        for row in rows:
            assert row.pair is not None
            try:
                rendered.append(self._pairs.render(row.pair))
            except BadRow as problem:
                rendered.append(problem)
        encoded = iter(self._pairs.encode([one for one in rendered if not isinstance(one, BadRow)]))
        return (one if isinstance(one, BadRow) else next(encoded) for one in rendered)

    def finish(self) -> dict[str, Any]:
        """Close the files; what `assemble_ids` needs to know of them, as JSON holds it."""
        splits = {split.name: split.finish() for split in self._splits}
        return {"identity": self.identity, "dtype": np.dtype(self.dtype).str, "splits": splits}


class _Split:
    """The files of one split of a piece."""

    def __init__(self, folder: Path, name: str, kind: Kind):
        self._kind: Kind = kind
        self.name, self.count, self.unknown, self.tally = name, 0, 0, Tally()
        self._names = ("rows", *FILES[kind])
        self._files: list[BinaryIO] = [(folder / file_name(name, one)).open("wb") for one in self._names]
        self._digest = hashlib.blake2b(digest_size=16)
        self._bytes = [0] * len(self._files)
        self._largest = [0, 0]
        self._columns: set[str] = set()

    def add(self, number: int, row: Parsed, found: Any, dtype: Any) -> None:
        """The ids of one row."""
        record = np.zeros((), ROWS[self._kind])
        record["number"] = number
        parts: list[bytes] = []
        if self._kind == "text":
            ids = [found[0]]
            record["tokens"] = len(ids[0])
            parts = [ids[0].astype(dtype).tobytes()]
        else:
            ids = [found.prompt, *found.responses]
            record["prompt"], record["responses"] = len(ids[0]), [len(r) for r in found.responses]
            record["lasts"] = [r[-1] if len(r) else 0 for r in found.responses]
            record["system"] = row.columns["prompt"][0].role == "system"
            parts = [ids[0].astype(dtype).tobytes(), b"".join(r.astype(dtype).tobytes() for r in found.responses)]
            for name in NUMBERS:
                value = row.columns.get(name)
                record[name] = np.nan if value is None else value
            for name in TEXTS:
                value = row.columns.get(name)
                parts.append(b"" if value is None else value.encode())
                record[name] = ABSENT if value is None else len(parts[-1])
        largest = max(int(one.max(initial=0)) for one in ids)
        if largest > self._largest[0]:
            self._largest = [largest, number]
        self._columns.update(name for name, value in row.columns.items() if value is not None)
        for i, content in enumerate((record.tobytes(), *parts)):
            self._files[i].write(content)
            self._digest.update(content)
            self._bytes[i] += len(content)

    def finish(self) -> dict[str, Any]:
        for file in self._files:
            file.close()
        return {
            "count": self.count,
            "bytes": self._bytes,
            "digest": self._digest.hexdigest(),
            "tally": self.tally.state(),
            "largest": self._largest,
            "columns": sorted(self._columns),
            "unknown": self.unknown,
        }


def assemble_ids(
    folder: Path, kind: Kind, splits: Sequence[str], pieces: Sequence[tuple[Path, Mapping[str, Any]]]
) -> None:
    """The files of all pieces, one behind the other, and ids.json: in `folder`.

    `pieces`: where each was written, and what `IdsWriter.finish` said of it.
    """
    told: dict[str, Any] = {}
    for split in splits:
        tally, count, largest, columns = Tally(), 0, [0, 0], set[str]()
        sizes = [0] * (1 + len(FILES[kind]))
        digest = hashlib.blake2b(digest_size=16)
        for at, name in enumerate(("rows", *FILES[kind])):
            with (folder / file_name(split, name)).open("wb") as whole:
                before = 0
                for place, piece in pieces:
                    with (place / file_name(split, name)).open("rb") as part:
                        _copy(part, whole, ROWS[kind] if name == "rows" else None, before)
                    before += piece["splits"][split]["count"]
                    sizes[at] += piece["splits"][split]["bytes"][at]
        for _, piece in pieces:
            own = piece["splits"][split]
            tally.take(own["tally"], count)
            if own["largest"][0] > largest[0]:
                largest = [own["largest"][0], count + own["largest"][1]]
            count += own["count"]
            columns.update(own["columns"])
            digest.update(own["digest"].encode())
        if count:
            told[split] = {"bytes": sizes, "digest": digest.hexdigest(), "tally": tally.state(), "largest": largest}
            unknown = sum(piece["splits"][split]["unknown"] for _, piece in pieces)
            told[split] |= {"columns": sorted(columns), "unknown": unknown}
    first = pieces[0][1]
    content = {"identity": first["identity"], "dtype": first["dtype"], "splits": told}
    (folder / IDS).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy(part: BinaryIO, whole: BinaryIO, rows: np.dtype | None, before: int) -> None:
    """The content of a file; the numbers of `rows` behind `before` others."""
    if rows is None or not before:
        shutil.copyfileobj(part, whole, 2**20)
        return
    while len(found := np.fromfile(part, rows, 2**16)):
        found["number"] += before
        whole.write(found.tobytes())
