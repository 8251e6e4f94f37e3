"""Ids that `dpo-jax prepare --store_ids` keeps beside the rows of a store, for runs that start without tokenising.

`ids.json` says for which tokenizer and template they are, and for each split what was left out. Of a split there are
flat files: `rows`, a record for each row that has ids (`ROWS`), and the ids (and texts) of all of them, one after
another. They are mapped, not read: a run reads the ids of the rows of its batches.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.problems import Tally
from dpo_jax.data.sources.checked_rows import OnBadRows, check_ids, settled
from dpo_jax.data.sources.staging import as_path, local_copies
from dpo_jax.data.sources.store import names_store, open_store
from dpo_jax.data.sources.store_schema import Kind
from dpo_jax.data.tokens.templates import RAW, TEMPLATES, today
from dpo_jax.errors import InputError

IDS = "ids.json"
FORMAT = 1
"""Counts the changes of these files, and those after which an encoder gives other ids."""
NUMBERS, TEXTS = ("score_chosen", "score_rejected", "margin", "rating"), ("rating_text", "source")
"""Columns beside a pair: NaN, or the length `ABSENT`, where a row has none."""
ABSENT = 2**32 - 1
ROWS: dict[Kind, np.dtype] = {
    "preferences": np.dtype(
        [("number", "<u4"), ("prompt", "<u4"), ("responses", "<u4", (2,)), ("lasts", "<u4", (2,)), ("system", "?")]
        + [(name, "<f8") for name in NUMBERS]
        + [(name, "<u4") for name in TEXTS]
    ),
    "text": np.dtype([("number", "<u4"), ("tokens", "<u4")]),
}
"""Kind -> record of a row: its number in the split, the lengths of what belongs to it in the other files, the last ids
of its responses, whether its prompt begins with a system message."""
FILES: dict[Kind, tuple[str, ...]] = {"preferences": ("prompt", "responses", *TEXTS), "text": ("tokens",)}

log = logging.getLogger(__name__)


def identity(tokenizer: PreTrainedTokenizerBase, kind: Kind, template: str | None, date: str | None) -> str:
    """SHA-256 of all that decides the ids of rows of a kind: the tokenizer, and of pairs the template and its day."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    told: list[Any] = [FORMAT, kind, cast(Any, tokenizer).backend_tokenizer.to_str(), special]
    if kind == "preferences":
        text = "" if template == RAW else TEMPLATES.get(template or "", str(tokenizer.chat_template))
        told += [template, text, (date or today()) if "strftime_now" in text else None]
        told.append([str(token) for token in tokenizer.all_special_tokens])
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


@dataclass(frozen=True)
class StoredIds:
    """The ids of one split.

    Attributes:
      rows: `ROWS` of its kind, mapped.
      files: name -> flat array, mapped: ids, or the bytes of texts.
      digest: of all of them.
      count: rows of the split.
      told: what ids.json says of the split: `tally`, `largest` (id, number of its row), `unknown`, `columns`.
    """

    rows: np.ndarray
    files: dict[str, np.ndarray]
    digest: str
    count: int
    told: dict[str, Any]

    def read(self, source: str, vocab_size: int, on_bad_rows: OnBadRows, more: Tally | None = None) -> dict[str, Any]:
        """What `CheckedRows.collect` tells of how the rows were read; `more`: what cannot be used of those with ids.

        Raises `InputError` where rows are refused, none can be used, or an id is beyond the model's embedding.
        """
        tally = Tally()
        for state in (self.told["tally"], *(() if more is None else (more.state(),))):
            tally.take(state, 0)
        largest, number = self.told["largest"]
        check_ids(largest, vocab_size, number)
        told = settled(tally, source, self.count, on_bad_rows, any_left=tally.dropped.total() < self.count)
        return {"row_numbers": self.rows["number"].astype(np.int32), **told}

    def column(self, name: str) -> list[Any]:
        """A column beside the pairs: the value of each row, None where it has none."""
        if name in NUMBERS:
            return [None if value != value else value for value in self.rows[name].tolist()]
        lengths = self.rows[name].astype(np.int64)
        there = lengths != ABSENT
        ends = np.cumsum(np.where(there, lengths, 0))
        text, once = bytes(self.files[name]), dict[bytes, str]()
        spelled = (text[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist(), strict=True))
        return [
            once.setdefault(one, one.decode()) if own else None
            for one, own in zip(spelled, there.tolist(), strict=True)
        ]


def file_name(split: str, name: str) -> str:
    """The file of that name of a split."""
    return f"ids-{split}.{name}"


def open_ids(
    source: str,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | None = None,
    date: str | None = None,
    otherwise: str = "",
) -> StoredIds | None:
    """The ids that are stored of the rows of `source`; None where there are none, or others are needed.

    (Then why is logged.) `otherwise`: why other ids are needed, if so. Raises `InputError` for a damaged store.
    """
    if not names_store(source):
        return None
    store = open_store(source)
    path = store.folder / IDS
    if store.kind != kind or not path.exists():
        return None
    told = json.loads(path.read_text())
    if not otherwise and told["identity"] != identity(tokenizer, kind, template, date):
        otherwise = "they are of another tokenizer, template or day"
    if not otherwise and store.split not in told["splits"]:
        otherwise = f"{store.split} is a part of a split, or several"
    if otherwise:
        log.warning("%s: the ids that are stored are not used: %s; rows are tokenised now", source, otherwise)
        return None
    split = told["splits"][store.split]
    paths = [as_path(store.folder) / file_name(store.split, name) for name in ("rows", *FILES[kind])]
    for one, size in zip(paths, split["bytes"], strict=True):
        if not one.exists() or (isinstance(one, Path) and one.stat().st_size != size):
            raise InputError(f"{source}: {one} is missing or cut short; fetch the data set, or prepare it again")
    copies = local_copies(paths)
    ids = np.dtype(told["dtype"])
    dtypes = [ROWS[kind], *(np.dtype(np.uint8) if name in TEXTS else ids for name in FILES[kind])]
    rows, *arrays = (
        np.memmap(one, dtype, "r") if size else np.zeros(0, dtype)
        for one, dtype, size in zip(copies, dtypes, split["bytes"], strict=True)
    )
    log.info("%s: the ids are those that are stored", source)
    return StoredIds(rows, dict(zip(FILES[kind], arrays, strict=True)), split["digest"], len(store), split)
