"""Safetensors, single file or sharded: tensors read slice by slice, and written one after the other."""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dpo_jax.errors import InputError
from dpo_jax.headers import read_json, told
from dpo_jax.weights.huggingface.layout import Slices
from dpo_jax.weights.integrity.folder import write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMES = {np.dtype(np.float32): "F32", np.dtype(ml_dtypes.bfloat16): "BF16", np.dtype(np.float16): "F16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_AHEAD = 8 << 20
"""Bytes that the kernel is asked to fetch at once where many short runs of them are wanted."""
_SHORT = 64 << 10
"""A shorter run than this is not worth a request to a disk of its own."""
# Buffers that old checkpoints carry although they follow from config.json.
_BUFFER = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: `offset` is that of its first byte in `file`."""

    file: BinaryIO
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


class SafetensorsReader:
    """The tensors of some safetensors files of one folder (a `TensorReader`).

    Every file is opened and its header checked at once, so a truncated one is found before anything is loaded. Values
    are read with positioned reads of exactly the bytes asked for, not through a memory map: the pages of a map stay in
    the process's resident memory, which would grow to the size of the checkpoint.

    Attributes:
      bytes_read: how many bytes of tensors have been read so far.
    """

    def __init__(self, folder: Path, files: Iterable[str], weight_map: Mapping[str, str] | None = None):
        self.where = str(folder)
        self.bytes_read = 0
        self._tensors: dict[str, _Tensor] = {}
        home: dict[str, str] = {}
        for name in files:
            try:
                with safe_open(folder / name, framework="np"):  # checks the header, and the file's size against it
                    file, header, start = _header(folder / name)
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{folder / name}: truncated or not a safetensors file ({error}); fetch it again"
                ) from error
            for key, entry in header.items():
                if _BUFFER.fullmatch(key):
                    continue
                if key in home:
                    raise InputError(f"{folder}: tensor {key} is in both {home[key]} and {name}")
                if weight_map is not None and weight_map.get(key) != name:
                    raise InputError(f"{folder / INDEX}: tensor {key} of {name} is {_told(weight_map.get(key))}")
                home[key] = name
                if (kind := entry["dtype"]) not in _DTYPES:
                    raise InputError(
                        f"{folder / name}: tensor {key} is {kind}; only F32, BF16 and F16 weights are read"
                    )
                at = start + entry["data_offsets"][0]
                self._tensors[key] = _Tensor(file, at, tuple(entry["shape"]), _DTYPES[kind])
        for key, name in (weight_map or {}).items():
            if key not in home and not _BUFFER.fullmatch(key):
                raise InputError(f"{folder / INDEX}: tensor {key} should be in {name}, and is not there")

        self.shapes = {key: tensor.shape for key, tensor in self._tensors.items()}
        kinds = {tensor.dtype for tensor in self._tensors.values()}
        self.dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)

    def read(self, key: str, index: Slices) -> np.ndarray:
        """A rectangle of a tensor, in the dtype of the file."""
        tensor = self._tensors[key]
        try:
            values = _read(tensor, index)
        except OSError as error:
            raise InputError(f"{self.where}: tensor {key} cannot be read ({error})") from error
        self.bytes_read += values.nbytes
        return values


def _header(path: Path) -> tuple[BinaryIO, dict[str, Any], int]:
    """The opened file, the header's entry of each tensor, and where the data begins. The file has been checked."""
    file = path.open("rb", buffering=0)
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return file, header, 8 + length


def _read(tensor: _Tensor, index: Slices) -> np.ndarray:
    """The rectangle `index` (steps of 1) of a tensor, one run of neighbouring bytes after the other."""
    values = np.empty([s.stop - s.start for s in index], tensor.dtype)
    if not values.size:
        return values
    whole = len(index)  # axes from here on are wanted whole, so they and the axis before them make one run
    while whole and values.shape[whole - 1] == tensor.shape[whole - 1]:
        whole -= 1
    strides = [math.prod(tensor.shape[axis + 1 :]) * tensor.dtype.itemsize for axis in range(len(index))]
    first = tensor.offset + sum(s.start * stride for s, stride in zip(index, strides, strict=True))
    outer = values.shape[: max(whole - 1, 0)]
    runs = values.reshape(math.prod(outer), -1).view(np.uint8)
    descriptor, fetched = tensor.file.fileno(), 0
    for run, place in zip(runs, np.ndindex(outer), strict=True):
        at = first + sum(i * stride for i, stride in zip(place, strides, strict=False))
        if len(runs) > 1 and len(run) < _SHORT and at + len(run) > fetched:
            _fetch(descriptor, at, _AHEAD)
            fetched = at + _AHEAD
        _fill(descriptor, run.data, at)
    return values


def _fetch(descriptor: int, offset: int, size: int) -> None:
    """Let the kernel read ahead, where it can be asked to (not on macOS)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Read until the buffer is full: one read gives at most 2 GiB."""
    while len(buffer):
        got = os.preadv(descriptor, [buffer], offset)
        if not got:
            raise OSError("the file has become shorter")
        buffer, offset = buffer[got:], offset + got


def _told(file: str | None) -> str:
    return "not named" if file is None else f"said to be in {file}"


def open_folder(folder: Path) -> SafetensorsReader:
    """The weights of a Hugging Face folder: `model.safetensors`, or the files that its index names."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is not meant")
    if single.is_file():
        return SafetensorsReader(folder, [SINGLE])
    if not index.is_file():
        raise InputError(f"{folder}: neither {SINGLE} nor {INDEX}; fetch the missing file")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is missing or empty")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]{,230}\.safetensors", name):
            raise InputError(f"{index}: {told(name)} is not the name of a safetensors file in this folder")
    files = dict.fromkeys(weight_map.values())
    for name in files:
        if not (folder / name).is_file():
            raise InputError(f"{index}: names {name}, which is not there; fetch it")
    return SafetensorsReader(folder, files, weight_map)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors. Raises `InputError`."""
    try:
        with safe_open(path, framework="np") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({error}); fetch it again") from error


def write_file(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[np.ndarray],
    dtype: Any,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the next `len(shapes)` of `tensors` as one safetensors file: header length, JSON header, data.

    `metadata` stands in the header. Done here because the library's own writer wants all tensors of a file in memory
    together.
    """
    dtype, offset = np.dtype(dtype), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for key, shape in shapes.items():
        end = offset + int(np.prod(shape)) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            tensor = next(tensors)
            assert tensor.shape == shape, (key, tensor.shape, shape)
            file.write(np.ascontiguousarray(tensor, dtype).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def split(shapes: Mapping[str, tuple[int, ...]], dtype: Any, shard_bytes: int) -> dict[str, list[str]]:
    """File name -> keys: consecutive tensors, as many to a file as fit into `shard_bytes` (at least one)."""
    groups: list[list[str]] = [[]]
    room = shard_bytes
    for key, shape in shapes.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(key)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def write_all(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterator[np.ndarray], dtype: Any, shard_bytes: int
) -> None:
    """Write tensors, given in the order of `shapes`, into files of at most `shard_bytes`, with an index if several."""
    files = split(shapes, dtype, shard_bytes)
    for name, keys in files.items():
        write_file(folder / name, {key: shapes[key] for key in keys}, tensors, dtype)
    if len(files) > 1:
        size = sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(dtype).itemsize
        weight_map = {key: name for name, keys in files.items() for key in keys}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
