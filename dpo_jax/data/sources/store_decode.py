"""Records of a TFDS data set -> rows, as features.json describes them.

TFDS decodes too, whatever a column is; this reads only texts, numbers, and lists of them, in a tenth of the time.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from dpo_jax.data.sources.store_schema import Row, example_class

Values = Callable[[Any], list[Any]]
"""A tf.train.Feature -> its values."""


class Decoder:
    """Decodes the records of one data set.

    Attributes:
      columns: names of the columns that are decoded: texts, numbers, truth values, lists of them, and lists and
        dictionaries of these.
      left_out: names of the columns of any other shape, such as lists of lists.
    """

    def __init__(self, features: Row):
        """`features`: what features.json holds. A KeyError or the like where it is not as TFDS writes it."""
        self._columns: list[Callable[[Any, Row], None]] = []
        self.left_out: list[str] = []
        self.columns: list[str] = []
        for name, feature in _content(features)["features"].items():
            reader = _column(name, name, feature)
            if reader is None:
                self.left_out.append(name)
            else:
                self.columns.append(name)
                self._columns.append(reader)

    def __call__(self, record: bytes) -> Row:
        """column -> value; a column that the row lacks, or that is not a number (NaN), is left out.

        Raises UnicodeDecodeError for a text that is not UTF-8, ValueError for what is no record of these columns.
        """
        try:
            example = example_class().FromString(record)
        except DecodeError as error:
            raise ValueError(f"it is no tf.train.Example: {error}") from error
        row: Row = {}
        for column in self._columns:
            column(example.features.feature, row)
        return row


def _kind(feature: Row) -> str:
    return str(feature["pythonClassName"]).rpartition(".")[2]


def _content(feature: Row) -> Row:
    """What features.json says of a column under the one key that depends on its class."""
    (content,) = (value for key, value in feature.items() if key not in ("pythonClassName", "description"))
    return content


def _column(name: str, key: str, feature: Row) -> Callable[[Any, Row], None] | None:
    """What puts the column `key` of a record into a row as `name`; None for a column of an unknown shape."""
    kind = _kind(feature)
    if kind == "FeaturesDict":
        return _dictionary(name, key, _content(feature)["features"])
    is_list = kind == "Sequence"
    if is_list:
        feature = _content(feature)["feature"]
        if _kind(feature) == "FeaturesDict":
            return _list_of_dictionaries(name, key, _content(feature)["features"])
    found = _values(feature)
    if found is None:
        return None
    values, rank = found
    if is_list and rank:
        return None

    def read(record: Any, row: Row) -> None:
        if key not in record:
            if is_list:
                row[name] = []
            return
        items = values(record[key])
        if is_list or rank:
            row[name] = items
        elif len(items) > 1:
            raise ValueError(f"the column {key} has {len(items)} values and should have one")
        elif items and not (isinstance(items[0], float) and math.isnan(items[0])):
            row[name] = items[0]

    return read


def _dictionary(name: str, key: str, features: Row) -> Callable[[Any, Row], None] | None:
    inner = [_column(field, f"{key}/{field}", feature) for field, feature in features.items()]
    readers = [reader for reader in inner if reader is not None]
    if len(readers) < len(inner):
        return None

    def read(record: Any, row: Row) -> None:
        fields: Row = {}
        for reader in readers:
            reader(record, fields)
        if fields:
            row[name] = fields

    return read


def _list_of_dictionaries(name: str, key: str, features: Row) -> Callable[[Any, Row], None] | None:
    fields = {field: _values(feature) for field, feature in features.items()}
    if any(found is None or found[1] for found in fields.values()):
        return None
    readers = [(field, f"{key}/{field}", found[0]) for field, found in fields.items() if found is not None]

    def read(record: Any, row: Row) -> None:
        columns = [values(record[at]) if at in record else [] for _, at, values in readers]
        if len({len(column) for column in columns}) > 1:
            raise ValueError(f"the columns in {key} are not of one length")
        row[name] = [dict(zip(features, items, strict=True)) for items in zip(*columns, strict=True)]

    return read


def _values(feature: Row) -> tuple[Values, int] | None:
    """(reader of the values, 0 or 1 for the rank of the column); None for anything but texts, numbers, truth values."""
    kind = _kind(feature)
    if kind == "Text":
        return _texts, 0
    if kind == "ClassLabel":
        return _integers, 0
    if kind not in ("Tensor", "Scalar"):
        return None
    array = _content(feature)
    rank = len(array.get("shape", {}).get("dimensions", ()))
    if rank > 1:
        return None
    if array["dtype"] in ("string", "object", "str"):
        return _texts, rank
    dtype = np.dtype(array["dtype"])
    if dtype.kind not in "biuf":
        return None
    encoding = array.get("encoding") or "none"
    if encoding == "bytes" and rank == 0:
        return lambda column: [np.frombuffer(value, dtype).item() for value in column.bytes_list.value], 0
    if encoding != "none":
        return None
    if dtype.kind == "f":
        return lambda column: list(column.float_list.value), rank
    if dtype.kind == "b":
        return lambda column: [bool(value) for value in column.int64_list.value], rank
    return _integers, rank


def _texts(column: Any) -> list[str]:
    return [value.decode("utf-8") for value in column.bytes_list.value]


def _integers(column: Any) -> list[int]:
    return list(column.int64_list.value)


def column_types(features: Row) -> Iterator[str]:
    """Every class that features.json (or the like part of dataset_info.json) names; TFDS would import their modules."""
    waiting: list[Any] = [features]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
            named = (value.get("pythonClassName"), value.get("python_class_name"))
            yield from (name for name in named if isinstance(name, str))
