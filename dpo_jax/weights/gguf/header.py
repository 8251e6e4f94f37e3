"""The header of a GGUF file: its metadata, and where each tensor lies.

Read here and not by the `gguf` package, whose reader believes every count that it finds: a false one makes it allocate,
loop or stop anywhere. Here each count is held against the bytes that are left, before anything is made of it.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

from dpo_jax.errors import InputError
from dpo_jax.headers import told

_ARRAY, _STRING, _BOOL = 9, 8, 7
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", _BOOL: "u1", 10: "u8", 11: "i8", 12: "f8"}
_DTYPES = {code: np.dtype(f"<{name}") for code, name in _SCALARS.items()}
_MAX_FIELDS, _MAX_ITEMS, _MAX_TENSORS, _MAX_TEXT = 1 << 16, 1 << 23, 1 << 20, 64 << 20
_MAX_AXES, _MAX_ALIGNMENT = 4, 1 << 20


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a file: its `shape` with the fastest axis last, and its first byte at `offset` of the file."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of the values along the last axis."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


@dataclass(frozen=True)
class GGUFHeader:
    """`metadata`: every entry as Python values. `tensors`: by their names, all within the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _False(Exception):
    """The header says what cannot be."""


def open_gguf(path: Path) -> GGUFHeader:
    """Parse the header of a GGUF file (tensors stay on the disk). `InputError` where it is damaged."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    return _parse(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)  # the weights and the tokenizer both want it
def _parse(path: Path, size: int, mtime_ns: int) -> GGUFHeader:
    del mtime_ns
    try:
        if size < 24:
            raise _False(f"{size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Cursor(content).header(path)
    except (_False, OSError) as error:
        raise InputError(f"{path}: truncated or not a GGUF file ({error}); fetch it again") from error


class _Cursor:
    """Reads on from where it stands, and never beyond the end."""

    def __init__(self, content: mmap.mmap):
        self._content, self._at, self._size = content, 0, len(content)

    def header(self, path: Path) -> GGUFHeader:
        if self._bytes(4) != b"GGUF":
            raise _False("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _False(f"version {version}; only 2 and 3, little-endian, are read")
        count, fields = self._count("<Q", _MAX_TENSORS, 24, "tensors"), self._count("<Q", _MAX_FIELDS, 13, "entries")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text()
            if key in metadata:
                raise _False(f"metadata {told(key)} twice")
            metadata[key] = self._value(self._number("<I"), key)
        entries = [self._tensor() for _ in range(count)]
        alignment = metadata.get("general.alignment", 32)
        power_of_two = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT and not alignment & alignment - 1
        if isinstance(alignment, bool) or not power_of_two:
            raise _False(f"general.alignment = {told(alignment)}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            tensor = GGUFTensor(name, shape, kind, start + offset)
            if name in tensors:
                raise _False(f"tensor {told(name)} twice")
            if offset % alignment or tensor.offset + math.prod(shape[:-1]) * tensor.row_bytes > self._size:
                raise _False(f"tensor {told(name)} ends beyond the file")
            tensors[name] = tensor
        return GGUFHeader(path, metadata, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, axes = self._text(), self._number("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise _False(f"tensor {told(name)} has {axes} axes")
        shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
        code, offset = self._number("<I"), self._number("<Q")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise _False(f"tensor {told(name)} is of the unknown type {code}") from None
        if not all(shape) or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise _False(f"tensor {told(name)} of type {kind.name} has shape {shape}")
        return name, shape, kind, offset

    def _value(self, code: int, key: str) -> Any:
        if code == _STRING:
            return self._text()
        if code == _ARRAY:
            return self._array(key)
        return self._plain(code, 1, key)[0]

    def _array(self, key: str) -> list[Any]:
        code = self._number("<I")
        if code == _ARRAY:
            raise _False(f"metadata {told(key)} is a list of lists, which no entry is")
        if code != _STRING:
            return self._plain(code, self._number("<Q"), key)
        return [self._text() for _ in range(self._count("<Q", _MAX_ITEMS, 8, f"texts in {told(key)}"))]

    def _plain(self, code: int, count: int, key: str) -> list[Any]:
        """Numbers, or true and false."""
        if code not in _DTYPES:
            raise _False(f"metadata {told(key)} is of the unknown type {code}")
        if count > _MAX_ITEMS:
            raise _False(f"metadata {told(key)} has {count} items")
        values = np.frombuffer(self._bytes(count * _DTYPES[code].itemsize), _DTYPES[code])
        return (values.astype(bool) if code == _BOOL else values).tolist()

    def _text(self) -> str:
        length = self._number("<Q")
        if length > _MAX_TEXT:
            raise _False(f"a text of {length} bytes")
        raw = self._bytes(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _False(f"the text {told(raw)} is not UTF-8") from None

    def _count(self, form: str, most: int, each: int, what: str) -> int:
        """How many things of at least `each` bytes follow."""
        count = self._number(form)
        if count > min(most, (self._size - self._at) // each):
            raise _False(f"{count} {what}, for which it is too short")
        return count

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, length: int) -> bytes:
        if length > self._size - self._at:
            raise _False(f"{length} bytes wanted at byte {self._at} of {self._size}")
        self._at += length
        return self._content[self._at - length : self._at]
