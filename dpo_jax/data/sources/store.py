"""Stores: TFDS data sets in array_record, read row by row at random, without TensorFlow.

`tfds:PATH`, `tfds:PATH:SPLIT` or `tfds:NAME` (a data set in $TFDS_DATA_DIR or ~/tensorflow_datasets) is one that
`dpo-jax prepare` wrote, or any other whose columns are texts, numbers and lists of them. PATH is the folder that holds
dataset_info.json, or one above it. SPLIT may slice, as TFDS does: `train[:1%]`. Without one it is the only split, or
`train`.

A folder is data: nothing in it is run. (TFDS imports whatever module features.json names; so only column types that are
named below get so far.) Folders at gs:// and the like are read through etils; their shards are copied to the user's
cache, for random access record by record over a network would starve a training run.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sources.staging import as_path, is_remote, local_copies, reaching
from dpo_jax.data.sources.store_decode import Decoder, column_types
from dpo_jax.data.sources.store_schema import FIELDS, FORMAT, Kind, Row, as_row
from dpo_jax.errors import InputError, first_line

PREFIX = "tfds:"
_INFO, _FEATURES, _METADATA = "dataset_info.json", "features.json", "metadata.json"
_BATCH = 256  # records fetched at once when all are read in order
_SPLIT = r"[A-Za-z]\w*(?:\[[^\[\]]*\])?"
_SOURCE = re.compile(rf"(?P<place>.+?)(?::(?P<split>{_SPLIT}(?:\+{_SPLIT})*))?")
_COLUMN_TYPES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "features_dict.FeaturesDict",
        "sequence_feature.Sequence",
        "text_feature.Text",
        "tensor_feature.Tensor",
        "scalar.Scalar",
        "class_label_feature.ClassLabel",
    )
}


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Store:
    """One split of a store: `len(store)`, `store[i]` (i from 0), `store.rows()`.

    Attributes:
      source: what was asked for.
      split: the split, perhaps sliced.
      kind: which of `store_schema.FIELDS` the rows are; None where `dpo-jax prepare` did not write them.
      fingerprint: SHA-256 of what is known of the records without reading them all: metadata, digests, split.
      decoder: turns a record into a row; it names the columns.
      folder: that holds its dataset_info.json, perhaps in a bucket.
    """

    source: str
    split: str
    kind: Kind | None
    fingerprint: str
    decoder: Decoder
    folder: Any
    _records: Any

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        """The row at `index`: column -> text, number, truth value or list; a column that the row lacks is left out.

        Raises `InputError` for a damaged shard, `BadRow` for text that is not UTF-8.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.source}: row {index} of {len(self)}")
        return self._row(self._fetch([index])[0], index)

    def rows(self, first: int = 0, stop: int | None = None) -> Iterator[tuple[int, Row | BadRow]]:
        """(number from 1, row) of rows in order; a `BadRow` in place of one with text that is not UTF-8.

        `first`, `stop`: indices, from 0; not given: all of them.
        """
        stop = len(self) if stop is None else stop
        for start in range(first, stop, _BATCH):
            indices = range(start, min(start + _BATCH, stop))
            for index, record in zip(indices, self._fetch(indices), strict=True):
                try:
                    yield index + 1, self._row(record, index)
                except BadRow as problem:
                    yield index + 1, problem

    def _fetch(self, indices: Any) -> list[bytes]:
        try:
            return self._records.__getitems__(list(indices))
        except (RuntimeError, ValueError, IndexError) as error:
            first, last = indices[0] + 1, indices[-1] + 1
            rows = f"row {first}" if first == last else f"rows {first} to {last}"
            raise InputError(f"{self.source}: {rows} cannot be read ({first_line(error)}); {_AGAIN}") from error

    def _row(self, record: bytes, index: int) -> Row:
        try:
            row = self.decoder(record)
        except UnicodeDecodeError as error:
            raise BadRow("invalid UTF-8", f"a text of the row, at its byte {error.start + 1}") from error
        except ValueError as error:
            raise InputError(
                f"{self.source}: row {index + 1} does not fit features.json ({first_line(error)})"
            ) from error
        return row if self.kind is None else as_row(row, self.kind)


_AGAIN = "the data set is damaged: fetch it or prepare it again"


def names_store(source: str) -> bool:
    """Whether `source` is to be read by `open_store`: by its prefix, or because it is the folder of a TFDS data set."""
    if source.startswith(PREFIX):
        return True
    folder = Path(source.rpartition(":")[0] if ":" in source else source).expanduser()
    return folder.is_dir() and bool(_versions(folder))


def open_store(source: str) -> Store:
    """Open one split of a store (see the module); its shards are there and whole when this returns.

    Raises:
      InputError: no such data set or split, a folder written by a newer version of this package, a missing or damaged
        file, another file format than array_record, columns that are no text or numbers.
    """
    match = _SOURCE.fullmatch(source.removeprefix(PREFIX))
    if match is None:
        raise InputError(f"{source}: names no data set; write tfds:PATH, tfds:PATH:SPLIT or tfds:NAME")
    if is_remote(match["place"]):
        with reaching(match["place"]):
            return _open(source, match["place"], match["split"])
    return _open(source, match["place"], match["split"])


def _open(source: str, place: str, asked: str | None) -> Store:
    folder = _folder(place, source)
    described = {name: _read_json(folder / name, source) for name in (_INFO, _FEATURES)}
    decoder = _decoder(described[_FEATURES], described[_INFO], source)
    ours = _ours(folder, source)
    builder = _builder(folder, source)
    split = _split(asked, list(builder.info.splits), source)
    records = _records(builder, folder, split, source)
    identity = json.dumps([described, ours, split], sort_keys=True)
    return Store(
        source=source,
        split=split,
        kind=None if ours is None else ours["kind"],
        fingerprint=hashlib.sha256(identity.encode()).hexdigest(),
        decoder=decoder,
        folder=folder,
        _records=records,
    )


# ---------------------------------------------------------------- which folder, which split


def _versions(folder: Any) -> list[Any]:
    """Folders of data sets at `folder`: itself, or those one or two levels below (version, or config and version)."""
    if (folder / _INFO).exists() and (folder / _FEATURES).exists():
        return [folder]
    for pattern in ("*", "*/*"):
        found = sorted(path.parent for path in folder.glob(f"{pattern}/{_FEATURES}"))
        found = [path for path in found if (path / _INFO).exists()]
        if found:
            return found
    return []


def _folder(place: str, source: str) -> Any:
    path = as_path(place)
    if not is_remote(place) and not path.exists():
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*", place):
            raise InputError(f"{source}: no folder {path}")
        data_dir = as_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
        if not (data_dir / place).exists():
            raise InputError(
                f"{source}: no folder {place}, and no data set of that name in {data_dir}; "
                "prepare it there with dpo-jax prepare, or give its path"
            )
        path = data_dir / place
    found = _versions(path)
    if not found:
        raise InputError(f"{source}: {path} holds no whole TFDS data set (dataset_info.json and features.json)")
    if len(found) > 1:
        names = " ".join(str(f) for f in found[:8])
        raise InputError(f"{source}: there are {len(found)} versions; name one of {names}")
    return found[0]


def _split(asked: str | None, there: list[str], source: str) -> str:
    names = " ".join(there)
    if not there:
        raise InputError(f"{source}: the data set has no rows")
    if asked is None:
        if len(there) > 1 and "train" not in there:
            raise InputError(f"{source}: there are several splits ({names}); name one as {source}:{there[0]}")
        return "train" if "train" in there else there[0]
    for part in asked.split("+"):
        name = part.partition("[")[0]
        if name not in there:
            raise InputError(f"{source}: no split {name!r}; there are {names}")
    return asked


# ---------------------------------------------------------------- what the folder says


def _read_json(path: Any, source: str) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{source}: {path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: {path} is not valid JSON ({first_line(error)}); {_AGAIN}") from error


def _decoder(features: Any, info: Any, source: str) -> Decoder:
    """Refuse column types other than those known here, before TFDS imports the modules that they name."""
    if not isinstance(features, dict) or not isinstance(info, dict) or "featuresDict" not in features:
        raise InputError(f"{source}: features.json is not in the form that TFDS writes since version 4.4; {_AGAIN}")
    for name in column_types({"features": features, "info": info.get("features")}):
        if name not in _COLUMN_TYPES:
            raise InputError(
                f"{source}: features.json has a column of the type {name[:80]!r}; only texts, numbers and lists of "
                "them are understood"
            )
    try:
        decoder = Decoder(features)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: features.json is not as TFDS writes it ({first_line(error)}); {_AGAIN}") from error
    if not decoder.columns:
        raise InputError(f"{source}: no column holds text or numbers")
    if decoder.left_out:
        log.info("%s: columns of other shapes, not read: %s", source, ", ".join(decoder.left_out))
    return decoder


def _ours(folder: Any, source: str) -> dict[str, Any] | None:
    """What `dpo-jax prepare` says of the data set, checked; None where something else wrote it."""
    path = folder / _METADATA
    ours = _read_json(path, source) if path.exists() else None
    if not isinstance(ours, dict) or "dpo_jax" not in ours:
        return None
    ours = ours["dpo_jax"]
    if not isinstance(ours, dict) or not isinstance(ours.get("format"), int):
        raise InputError(f"{source}: {path} does not say in which format the rows are; {_AGAIN}")
    if ours["format"] != FORMAT:
        raise InputError(
            f"{source}: the data set is in format {ours['format']}, and this version of dpo-jax reads format {FORMAT}; "
            "prepare it again, or use the version that wrote it"
        )
    if ours.get("kind") not in FIELDS:
        raise InputError(
            f"{source}: the data set holds rows of the kind {str(ours.get('kind'))[:40]!r}; this version of dpo-jax "
            f"knows {', '.join(FIELDS)}"
        )
    return ours


def _builder(folder: Any, source: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS checks little: what is wrong in the JSON comes out in many ways
        raise InputError(
            f"{source}: {folder} is not a readable TFDS data set ({first_line(error)}); {_AGAIN}"
        ) from error
    info = builder.info
    version = str(info.version)
    if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and folder.name != version:
        raise InputError(f"{source}: dataset_info.json is of version {version}, its folder of {folder.name}; {_AGAIN}")
    if info.file_format is None or info.file_format.value != "array_record":
        written = "an unknown format" if info.file_format is None else info.file_format.value
        raise InputError(
            f"{source}: the data set is stored as {written}, which has no random access without TensorFlow; write it "
            "again with TFDS and file_format=array_record"
        )
    return builder


# ---------------------------------------------------------------- records and rows


def _records(builder: Any, folder: Any, split: str, source: str) -> Any:
    """The data source of TFDS for the records of `split`, as bytes, after a look at every shard that it needs."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    info = builder.info
    try:
        needed = {file.filename: file.examples_in_shard for file in info.splits[split].file_instructions}
    except Exception as error:  # of a slice that TFDS does not understand, or shards without a name
        raise InputError(f"{source}: the split {split} cannot be read ({first_line(error)})") from error
    paths = [as_path(name) for name in needed]
    if any(path.parent != as_path(folder) for path in paths):
        raise InputError(f"{source}: dataset_info.json names files outside {folder}; {_AGAIN}")
    if not needed:
        raise InputError(f"{source}: the split {split} has no rows")
    for path in paths:
        if not path.exists():
            raise InputError(f"{source}: {path} is missing; {_AGAIN}")
    copies = local_copies(paths)
    for path, copy, rows in zip(paths, copies, needed.values(), strict=True):
        try:
            found = ArrayRecordReader(str(copy)).num_records()
        except RuntimeError as error:
            raise InputError(f"{source}: {path} cannot be read ({first_line(error)}); {_AGAIN}") from error
        if found != rows:
            raise InputError(f"{source}: {path} holds {found} whole rows and should hold {rows}; {_AGAIN}")
    if copies != paths:
        info.update_data_dir(str(copies[0].parent))
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
