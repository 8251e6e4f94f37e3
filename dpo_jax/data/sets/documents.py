"""Documents of plain text, tokenised: what a model is pre-trained on.

* A text file (.txt or .txt.gz) is one document, or several with a separator: blank lines, or a literal such as
  `<|endoftext|>`. A folder of such files is read in the order of their names. Files of rows (see `files.py`) hold one
  document a row, in the column `text`.
* Each document becomes [BOS] ids EOS, as in Llama 2: the BOS where the tokenizer adds one, the EOS always.
* A text that spells a control token (`</s>`) is text: the ids are those of its characters, as with SentencePiece. So no
  document can end itself or open a chat turn.
* Documents of fewer than two tokens of their own are left out and counted.
"""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.messages import columns_of, text_of
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.readable import column_of, parse_columns, renamed
from dpo_jax.data.sets.stored_ids import StoredIds, open_ids
from dpo_jax.data.sets.tokenised import Tokenised, fingerprint_of
from dpo_jax.data.sources.checked_rows import CheckedRows, Numbered, OnBadRows
from dpo_jax.data.sources.files import MAX_LINE, open_bytes, read_rows_or_problems
from dpo_jax.data.sources.store import names_store
from dpo_jax.data.tokens.chat_tokenizer import bare
from dpo_jax.data.tokens.ragged import Ragged, StoredRagged
from dpo_jax.errors import InputError

TOO_SHORT = BadRow("document shorter than two tokens", severity="lost")
BLANK_LINE = "blank_line"
"""The separator that means blank lines; any other is taken literally."""


@dataclass(frozen=True, kw_only=True)
class DocumentDataset(Tokenised):
    """N tokenised documents, in memory: two bytes a token where the vocabulary allows, else four.

    The rows of a text file are its documents.

    Attributes:
      tokens: N sequences of ids, uint16 or uint32, each [BOS] ids EOS.
      unknown: how many tokens are the tokenizer's <unk>.
    """

    tokens: Ragged
    unknown: int

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], with BOS and EOS."""
        return self.tokens.lengths

    @property
    def total(self) -> int:
        """Tokens of all documents together."""
        return len(self.tokens.values)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the ids and of where documents begin, in order."""
        return fingerprint_of(self.tokens.told)

    def summary(self) -> str:
        """A few lines for the log: documents used, lengths, tokens the tokenizer does not know, columns not read."""
        lengths = self.lengths
        unknown = f"{self.unknown} tokens are <unk>: the tokenizer has no bytes to fall back on"
        return self.told(
            f"{self.source}: {len(self)} of {self.rows_read} documents, {self.total} tokens with their ends; "
            f"{lengths.mean():.0f} tokens a document (longest {lengths.max()})",
            unknown if self.unknown else "",
        )


def load_documents(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    separator: str | None = None,
    limit: int | None = None,
    columns: str | None = None,
    on_bad_rows: OnBadRows = "refuse",
) -> DocumentDataset:
    """Read, check and tokenise documents.

    Args:
      source: a text file or a folder of them; or what `files.read_rows` reads, with a column `text`.
      tokenizer: a fast tokenizer with an EOS.
      vocab_size: rows of the model's embedding.
      separator: what stands between the documents of a text file: `blank_line`, or a literal. Not given: a file is one
        document.
      limit: use only so many documents.
      columns: `--data.columns`, for rows: text=COLUMN.
      on_bad_rows: see `dataset.load_preferences`.

    Raises:
      InputError: unreadable file, bad rows, no usable document, ids beyond the embedding, a tokenizer without EOS, a
        separator for files of rows.
    """
    if separator is not None and not is_text(source):
        raise InputError(f"--data.separator has no effect: {source} holds rows, and each is one document")
    place = _text_place(source, columns)
    own = (
        "--data.limit takes the first rows alone"
        if limit is not None
        else "--data.columns names another"
        if columns
        else ""
    )
    if (stored := open_ids(source, "text", tokenizer, otherwise=own)) is not None:
        return _stored(source, stored, vocab_size, on_bad_rows)
    encoder = DocumentEncoder(tokenizer, vocab_size)
    found: set[str] = set()

    def parse(row: dict[str, Any]) -> str:
        found.update(map(str, row))
        row = renamed(row, {"text": place})
        if row.get("text", "") is None:
            raise BadRow(f"'{place}' is null", "give it a text, or remove the row")
        if "text" not in row:
            raise BadRow(f"no column '{place}'", columns_of(row))
        return text_of(row["text"], place, None)

    def encode(chunk: Numbered[str]) -> Iterator[np.ndarray | BadRow]:
        for ids in encoder.encode([text for _, text in chunk]):
            short = len(ids) - encoder.ends < 2
            yield TOO_SHORT if short else ids

    read_rows = partial(rows_of, separator=separator)
    documents, read = CheckedRows(source, limit, read=read_rows).collect(parse, encode, on_bad_rows)
    return DocumentDataset(
        tokens=Ragged.of(documents, encoder.dtype),
        unknown=encoder.unknown,
        unused_columns=tuple(sorted(found - {column_of(place)})),
        **read,
    )


def _stored(source: str, stored: StoredIds, vocab_size: int, on_bad_rows: OnBadRows) -> DocumentDataset:
    """The documents whose ids are stored. They are read when they are asked for."""
    read = stored.read(source, vocab_size, on_bad_rows)
    lengths = stored.rows["tokens"].astype(np.int64)
    return DocumentDataset(
        tokens=StoredRagged.stored(stored.files["tokens"], stored.digest, lengths, lengths),
        unknown=stored.told["unknown"],
        unused_columns=tuple(name for name in stored.told["columns"] if name != "text"),
        **read,
    )


class DocumentEncoder:
    """Texts to [BOS] ids EOS.

    Attributes:
      dtype: of the ids.
      ends: how many tokens BOS and EOS are together.
      unknown: how many <unk> there were so far.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self._backend, bos = bare(tokenizer)
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token, which ends each document; add one to it")
        self._backend.encode_special_tokens = True  # names of control tokens are text
        self._first = [] if bos is None else [bos]
        self._last = [cast(int, tokenizer.eos_token_id)]
        self._unk = cast(int | None, tokenizer.unk_token_id)
        self._vocab_size = vocab_size
        self.dtype: Any = np.uint16 if vocab_size <= 2**16 else np.uint32
        self.ends = len(self._first) + len(self._last)
        self.unknown = 0

    def encode(self, texts: list[str]) -> Iterator[np.ndarray]:
        """Ids of each text. Raises `InputError` for an id that the model's embedding has no row for."""
        for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False):
            ids = np.asarray([*self._first, *encoding.ids, *self._last], np.int64)
            if ids.max() >= self._vocab_size:
                raise InputError(
                    f"the tokenizer gives the id {ids.max()}, and the model's embedding has {self._vocab_size} rows; "
                    "use the model's own tokenizer"
                )
            if self._unk not in (None, *self._first, *self._last):
                self.unknown += int(np.count_nonzero(ids == self._unk))
            yield ids.astype(self.dtype)


# ---------------------------------------------------------------- reading


def _text_place(source: str, columns: str | None) -> str:
    """Where a row has its document, by `--data.columns`. Raises `InputError` for other columns, and for text files."""
    places = parse_columns(columns)
    if places.keys() - {"text"} or (places and is_text(source)):
        detail = "a text file has no columns" if is_text(source) else "of documents only text=COLUMN is read"
        raise InputError(f"--data.columns {columns} has no effect on {source}: {detail}")
    return places.get("text", "text")


def is_text(source: str) -> bool:
    """Whether `source` is a text file, or a folder with text files in it, and not a file of rows or a store."""
    path = Path(source).expanduser()
    if path.is_file():
        return _is_text_name(path)
    return path.is_dir() and not names_store(source) and any(map(_is_text_name, path.rglob("*")))


def _is_text_name(path: Path) -> bool:
    return path.name.lower().endswith((".txt", ".txt.gz"))


def rows_of(source: str, separator: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """The rows of a source; of text files their documents as such, numbered from 1 over all files."""
    if not is_text(source):
        yield from read_rows_or_problems(source)
        return
    number = 0
    for file in text_files(source):
        try:
            for row in documents_in(file, separator):
                number += 1
                yield number, row
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error


def text_files(source: str) -> list[Path]:
    """The files of a source that `is_text`, in order."""
    path = Path(source).expanduser()
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if _is_text_name(p) and p.is_file())


def documents_in(file: Path, separator: str | None) -> Iterator[dict[str, Any] | BadRow]:
    """The documents of a text file as rows. Raises `OSError`."""
    try:
        for text in _pieces(file, separator):
            yield {"text": text}
    except UnicodeDecodeError:
        yield BadRow("invalid UTF-8", f"in {file}, the rest of which cannot be read; save it as UTF-8")


def _pieces(path: Path, separator: str | None) -> Iterator[str]:
    """The documents of one file, line breaks around them removed; between two separators there may be none."""
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
        if separator is None:
            whole = stream.read(MAX_LINE + 1)
            _check_size(path, whole, "name what stands between documents with --data.separator")
            yield whole.strip("\n")
            return
        boundary = re.compile(r"\n[ \t]*\n" if separator == BLANK_LINE else re.escape(separator))
        rest = ""
        while chunk := stream.read(2**20):
            *done, rest = boundary.split(rest + chunk)
            _check_size(path, rest, f"is {separator!r} what stands between documents?")
            yield from filter(None, (piece.strip("\n") for piece in done))
        if rest := rest.strip("\n"):
            yield rest


def _check_size(path: Path, text: str, advice: str) -> None:
    if len(text) > MAX_LINE:
        raise InputError(f"{path}: a document of more than {MAX_LINE >> 20} million characters; {advice}")
