"""Which tensor of a Hugging Face checkpoint is which leaf of our parameter tree, and how leaves are read.

A kernel is [in, out] here and [out, in] there; the L layers are one stacked leaf here and L tensors there.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import mesh as meshes
from dpo_jax.errors import InputError
from dpo_jax.model import heads
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.families import FAMILIES
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import Quantised
from dpo_jax.model.variables import abstract_variables
from dpo_jax.weights.integrity.fingerprint import quantised_as

PIECE_BYTES = 2 << 30
"""Local shards of a stacked leaf beyond this many bytes are read and placed a few layers at a time."""

QUANTISED_BYTES = 256 << 20
"""Of a leaf that is quantised as it is read so many bytes stand whole at a time, or a layer."""

GATHER_BYTES = 64 << 20
"""Tensors beyond this many bytes come together from several processes in pieces."""

Slices = tuple[slice, ...]
Tree = dict[str, Any]
Read = Callable[[str, Slices], np.ndarray]


class TensorReader(Protocol):
    """A checkpoint file or folder as a set of named tensors (Hugging Face's names, shapes and row order)."""

    where: str
    dtype: np.dtype
    """What the tensors are stored in; float32 where they differ or are quantised."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor."""

    def read(self, key: str, index: Slices) -> np.ndarray:
        """The values of a rectangle of one tensor, floating, in the dtype they are stored in or float32."""
        ...


@dataclass(frozen=True)
class Slot:
    """One leaf of our tree and the tensors that fill it.

    Attributes:
      path:       names from the root of the tree.
      keys:       one tensor a layer for a stacked leaf, otherwise one tensor.
      shape:      of the leaf, the L axis included.
      stacked:    the leaf has a leading L axis.
      transposed: the tensors are the transpose of the leaf (or of its layers).
      row:        where the leaf's rows begin in the tensors, where these hold several leaves, one below the other.
      rows:       of the tensors, where they hold several leaves.
    """

    path: tuple[str, ...]
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    transposed: bool
    row: int = 0
    rows: int | None = None

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of what each of the tensors holds of this leaf."""
        inner = self.shape[1:] if self.stacked else self.shape
        return inner[::-1] if self.transposed else inner

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each of the tensors."""
        part = self.part_shape
        return part if self.rows is None else (self.rows, *part[1:])


_LEAF_NAMES = {"embedding": "weight", "kernel": "weight", "scale": "weight", "bias": "bias"}
_ADAPTER_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def _slots(tree: Tree, prefix: str, names: Mapping[str, str]) -> list[Slot]:
    slots = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = tuple(p.key for p in path)
        module, name = list(parts[:-1]), parts[-1]
        stacked = module[0] == "layers"
        keys = []
        for layer in range(leaf.shape[0] if stacked else 1):
            where = ["layers", str(layer), *module[1:]] if stacked else module
            root = [] if where == ["lm_head"] else ["model"]
            keys.append(prefix + ".".join([*root, *where, names[name]]))
        slots.append(Slot(parts, tuple(keys), leaf.shape, stacked, name in ("kernel", "lora_a", "lora_b")))
    return slots


def parameter_slots(config: LlamaConfig) -> list[Slot]:
    """Every parameter of a model, with the tensors of a Hugging Face checkpoint that hold it."""
    return list(_parameter_slots(replace(config, **{name: _PLAIN[name] for name in _SHAPELESS})))


# What changes no tensor's name and no shape: models that differ in these alone are traced once.
_SHAPELESS = (
    *("rms_norm_eps", "rope_theta", "rope_scaling", "max_position", "sliding_window", "bos_token_id", "eos_token_ids"),
    *("pad_token_id", "further_stop_ids", "activation", "embedding_scale", "residual_scale", "attention_scale"),
    *("attention_cap", "logit_scale", "logit_cap", "global_layers", "unrotated_layers", "local_rope_theta"),
    *("partial_rotary", "wide_norms"),
)
_PLAIN = {f.name: f.default for f in fields(LlamaConfig)}


@lru_cache(maxsize=16)  # the model is traced for its shapes, which a command asks for several times
def _parameter_slots(config: LlamaConfig) -> tuple[Slot, ...]:
    slots = _slots(abstract_variables(Llama(config))["params"], "", _LEAF_NAMES)
    return tuple(_fused(slots, FAMILIES[config.model_type].fused))


def _fused(slots: list[Slot], fused: Mapping[str, Sequence[str]]) -> list[Slot]:
    """The slots with those that one tensor holds together naming it (`Family.fused`)."""
    for whole, parts in fused.items():
        for name in {slot.path[-1] for slot in slots}:
            leaves = [f"{part}.{name}" for part in parts]
            places = [(i, slot) for i, slot in enumerate(slots) if ".".join(slot.path[1:]) in leaves]
            places.sort(key=lambda one: parts.index(".".join(one[1].path[1:-1])))
            rows, row = sum(slot.part_shape[0] for _, slot in places), 0
            for i, slot in places:
                own = ".".join(slot.path[1:-1])
                keys = tuple(key.replace(own, whole) for key in slot.keys)
                slots[i] = replace(slot, keys=keys, row=row, rows=rows)
                row += slot.part_shape[0]
    return slots


def score_slot(config: LlamaConfig, prefix: str = "") -> Slot:
    """The head of a reward model, within the collection `heads`, as Hugging Face names it."""
    return Slot((heads.SCORE, "kernel"), (f"{prefix}score.weight",), (config.hidden_size, 1), False, True)


def head_slots(collection: Mapping[str, Any]) -> list[Slot]:
    """The heads of our own file `heads.safetensors`: tensor NAME.weight [n, D] for each."""
    return [
        Slot((name, "kernel"), (f"{name}.weight",), tuple(leaf["kernel"].shape), False, True)
        for name, leaf in sorted(collection.items())
    ]


def adapter_slots(model: Llama) -> list[Slot]:
    """Every LoRA factor, with the tensors of a PEFT adapter file that hold it."""
    return _slots(abstract_variables(model)["adapters"], "base_model.model.", _ADAPTER_NAMES)


def insert(tree: Tree, path: tuple[str, ...], leaf: Any) -> None:
    """tree[path[0]][path[1]]... = leaf."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def lookup(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """tree[path[0]][path[1]]..."""
    for name in path:
        tree = tree[name]
    return tree


def _natural(key: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _some(keys: set[str]) -> str:
    first = sorted(keys, key=_natural)[:3]
    return ", ".join(first) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def check_keys(slots: list[Slot], reader: TensorReader, ignored: frozenset[str] = frozenset()) -> None:
    """Raise `InputError` unless the tensors are those of `slots`, in their shapes, and (but `ignored`) no more."""
    where, shapes = reader.where, reader.shapes
    wanted = {key: slot.tensor_shape for slot in slots for key in slot.keys}
    if missing := set(wanted) - set(shapes):
        raise InputError(
            f"{where}: tensor missing: {_some(missing)}; files are missing, or config.json is another model's"
        )
    if unknown := set(shapes) - set(wanted) - ignored:
        raise InputError(
            f"{where}: unknown tensor: {_some(unknown)}; a weight that the model would not use is not ignored "
            "(is config.json another model's?)"
        )
    for key, shape in wanted.items():
        if tuple(shapes[key]) != shape:
            raise InputError(f"{where}: tensor {key} has shape {tuple(shapes[key])}, and config.json asks for {shape}")


def _read_leaf(slot: Slot, read: Read, index: Slices, dtype: np.dtype) -> np.ndarray:
    """A rectangle of a leaf, read from the matching rectangle of each of its tensors."""
    layers = index[0] if slot.stacked else slice(0, 1, 1)
    inner = index[1:] if slot.stacked else index
    outer = inner[::-1] if slot.transposed else inner
    if slot.row:
        outer = (slice(outer[0].start + slot.row, outer[0].stop + slot.row, 1), *outer[1:])
    keys = slot.keys[layers]
    block = np.empty((len(keys), *(s.stop - s.start for s in inner)), dtype)
    for row, key in zip(block, keys, strict=True):
        values = read(key, outer)
        row[...] = values.T if slot.transposed else values
    return block if slot.stacked else block[0]


def _bounds(slot: Slot, index: Slices | None) -> tuple[tuple[int, int], ...]:
    """(start, stop) on each axis of a leaf, of the index that jax gives for a shard."""
    return tuple(s.indices(n)[:2] for s, n in zip(index or (), slot.shape, strict=True))


def _load_leaf(slot: Slot, read: Read, target: jax.ShapeDtypeStruct | Quantised) -> Any:
    """A leaf in its shards; one that is large goes to the devices a few layers at a time, and is quantised there."""
    as_read: Any = target.codes if isinstance(target, Quantised) else target
    sharding = as_read.sharding
    dtype = np.dtype(np.float32 if isinstance(target, Quantised) else as_read.dtype)
    places = jax.tree.map(lambda x: x.sharding, target)
    assert sharding is not None

    def make(part: Slot, first: int) -> Any:
        piece = _load_piece(part, read, sharding, dtype)
        return quantised_as(piece, target, first) if isinstance(target, Quantised) else piece

    devices = len(sharding.device_set) // jax.process_count() or 1
    here = min(math.prod(sharding.shard_shape(slot.shape)) * devices, math.prod(slot.shape)) * dtype.itemsize
    layers = len(slot.keys)
    most = QUANTISED_BYTES if isinstance(target, Quantised) else PIECE_BYTES
    pieces = next(n for n in range(1, layers + 1) if layers % n == 0 and (here <= n * most or n == layers))
    if pieces == 1:
        return make(slot, 0)
    leaf = jax.tree.map(lambda x: jax.jit(partial(jnp.zeros, x.shape, x.dtype), out_shardings=x.sharding)(), target)
    many = layers // pieces
    put = jax.jit(
        lambda whole, piece, start: jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, start, 0), whole, piece
        ),
        donate_argnums=0,
        out_shardings=places,
    )
    for start in range(0, layers, many):
        part = replace(slot, keys=slot.keys[start : start + many], shape=(many, *slot.shape[1:]))
        leaf = put(leaf, make(part, start), np.int32(start))
        jax.block_until_ready(leaf)  # else the host reads on, and holds several pieces
    return leaf


def _load_piece(slot: Slot, read: Read, sharding: jax.sharding.Sharding, dtype: np.dtype) -> jax.Array:
    """A leaf whose local shards fit into host memory together."""
    local = {_bounds(slot, index) for index in sharding.addressable_devices_indices_map(slot.shape).values()}
    box = tuple((min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in zip(*local, strict=True))
    sizes = [math.prod(stop - start for start, stop in bounds) for bounds in (box, *local)]
    block = None
    if sizes[0] == sum(sizes[1:]):  # shards that lie side by side are read at once, in longer runs
        block = _read_leaf(slot, read, tuple(slice(*b, 1) for b in box), dtype)
    memo: dict[tuple[tuple[int, int], ...], np.ndarray] = {}  # replicas of a shard are read once

    def shard(index: Slices | None) -> np.ndarray:
        bounds = _bounds(slot, index)
        if block is not None:
            return block[tuple(slice(a - low, b - low) for (a, b), (low, _) in zip(bounds, box, strict=True))]
        if bounds not in memo:
            memo[bounds] = _read_leaf(slot, read, tuple(slice(*b, 1) for b in bounds), dtype)
        return memo[bounds]

    return jax.make_array_from_callback(slot.shape, sharding, shard)


def load_tree(slots: list[Slot], read: Read, target: Mapping[str, Any]) -> Tree:
    """Read every leaf straight into its shards.

    Beside what the devices hold, host memory takes the local shards of one leaf, or of as many of its layers as fit
    into `PIECE_BYTES`, and one tensor. Each process reads what its devices hold, once.

    Args:
      slots: what to read; run `check_keys` first.
      read: where from (`TensorReader.read`).
      target: a tree of `jax.ShapeDtypeStruct` with shardings; a `Quantised` of them is quantised as it is read.
    """
    tree: Tree = {}
    for slot in slots:
        insert(tree, slot.path, _load_leaf(slot, read, lookup(target, slot.path)))
    return tree


def placed(shapes: Any, places: Any, dtype: Any = None) -> Any:
    """A tree of shapes as a target of `load_tree`: in `dtype`, if given, at `places`; None: on the first device."""
    if places is None:
        places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=s), shapes, places)


def _in_file_order(slots: list[Slot]) -> list[tuple[list[Slot], int]]:
    """(slots, layer) of every tensor: the embedding, layer by layer, and the rest. Several where one holds several."""
    stacked = [slot for slot in slots if slot.stacked]
    single = [slot for slot in slots if not slot.stacked]
    first = [([slot], 0) for slot in single if slot.path[0] == "embed_tokens"]
    last = [([slot], 0) for slot in single if slot.path[0] != "embed_tokens"]
    layers = len(stacked[0].keys) if stacked else 0
    together: dict[str, list[Slot]] = {}
    for slot in stacked:
        together.setdefault(slot.keys[0], []).append(slot)
    groups = [sorted(group, key=lambda slot: slot.row) for group in together.values()]
    return first + [(group, layer) for layer in range(layers) for group in groups] + last


def tensor_shapes(slots: list[Slot]) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor, in the order in which `tensors` gives them."""
    return {group[0].keys[layer]: group[0].tensor_shape for group, layer in _in_file_order(slots)}


def tensors(slots: list[Slot], tree: Mapping[str, Any], dtype: Any) -> Iterator[np.ndarray]:
    """Every tensor in the order of `tensor_shapes`, whole and on the host, one at a time.

    Every process has to run through it: a tensor whose shards lie on several processes goes to process 0 in pieces,
    which all of them make; the others are given its shape with nothing behind it.
    """
    for group, layer in _in_file_order(slots):
        parts = [
            _whole(lookup(tree, slot.path), layer if slot.stacked else None, slot.transposed, np.dtype(dtype))
            for slot in group
        ]
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def _whole(leaf: Any, layer: int | None, transposed: bool, dtype: np.dtype) -> np.ndarray:
    if isinstance(leaf, Quantised):
        assert layer is not None, "kernels of layers are stacked"
        leaf, layer = _made_whole(leaf, np.int32(layer)), None
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return _gathered(leaf, layer, transposed, dtype)
    if layer is not None:
        leaf = _layer(leaf, np.int32(layer)) if isinstance(leaf, jax.Array) else leaf[layer]
    values = np.asarray(leaf)
    return np.ascontiguousarray(values.T if transposed else values, dtype)


@jax.jit
def _made_whole(leaf: Quantised, layer: jax.Array) -> jax.Array:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), leaf).whole()


@jax.jit
def _layer(leaf: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _gathered(leaf: jax.Array, layer: int | None, transposed: bool, dtype: np.dtype) -> np.ndarray:
    """A tensor on process 0, through pieces that every process holds for a moment."""
    stacked, sharding = layer is not None, leaf.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    assert isinstance(sharding.mesh, jax.sharding.Mesh)
    shape, shard = leaf.shape[stacked:], sharding.shard_shape(leaf.shape)[stacked:]
    # Cut across an axis that no device has only a part of: a piece of a sharded axis lies on some of the devices, and
    # XLA would bring all of it together first.
    axis = max(range(len(shape)), key=lambda i: (shape[i] == shard[i], shape[i]))
    rows, size = shape[axis], math.prod(shape) * dtype.itemsize
    width = math.ceil(rows / math.ceil(size / GATHER_BYTES))
    apart = meshes.of_one(sharding, leaf.ndim) if stacked else sharding
    everywhere = meshes.replicated(sharding.mesh)
    whole = np.empty(shape[::-1] if transposed else shape, dtype) if jax.process_index() == 0 else None
    view = whole.T if whole is not None and transposed else whole
    for start in range(0, rows, width):
        start = min(start, rows - width)  # all pieces have one shape, and the last may repeat some rows
        piece = _piece(leaf, np.int32(layer or 0), np.int32(start), stacked, axis, width, dtype.name, apart, everywhere)
        if view is not None:
            view[(slice(None),) * axis + (slice(start, start + width),)] = np.asarray(piece.addressable_data(0))
        piece.block_until_ready()  # else several pieces are under way at once
    return np.broadcast_to(np.zeros((), dtype), shape[::-1] if transposed else shape) if whole is None else whole


@partial(jax.jit, static_argnums=(3, 4, 5, 6, 7, 8))
def _piece(
    leaf: jax.Array,
    layer: jax.Array,
    start: jax.Array,
    stacked: bool,
    axis: int,
    width: int,
    dtype: str,
    apart: jax.sharding.NamedSharding,
    everywhere: jax.sharding.NamedSharding,
) -> jax.Array:
    part = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
    part = jax.lax.dynamic_slice_in_dim(part, start, width, axis).astype(dtype)
    # Every device cuts its share; without this word XLA would bring the whole tensor together and cut then.
    part = jax.lax.with_sharding_constraint(part, apart)
    return jax.lax.with_sharding_constraint(part, everywhere)
