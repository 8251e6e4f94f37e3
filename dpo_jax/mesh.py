"""The device mesh, and the one table from logical axes to mesh axes. No other file names a mesh axis.

Four mesh axes:
  data     whole copies of the model, each with its share of the batch;
  fsdp     the batch is split, and so is every parameter (gathered layer by layer when it is needed);
  context  each sequence is split, and every parameter as along fsdp; within attention the heads are split instead;
  tensor   heads, feed-forward width and vocabulary are split within a layer.

One file though long: what crosses between copies names mesh axes too.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpo_jax import overlap
from dpo_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes. A mesh axis serves one axis of an array at most: the first that asks for it gets it,
# so an activation ("batch", "length", "embed") has its embed axis whole, while a kernel ("embed", "mlp") splits it.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "copies": ("data",),
    "responses": (),
    "length": ("context",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv": ("tensor",),
    # Within attention (model/attention.py): whole sequences of some heads, not pieces of all of them.
    "queries": (),
    "keys": (),
    "query_heads": ("tensor", "context"),
    "key_heads": ("tensor", "context"),
    "channels": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "rank": (),
}

LogicalAxes = tuple[str | None, ...]
_log = logging.getLogger(__name__)


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over `devices` (default: every device of every process), with the axes `AXES`.

    One size may be -1: it takes what the others leave. Several slices lie along `data` first. Raises `InputError` when
    the sizes do not give the number of devices exactly.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"mesh {sizes}: sizes must be positive, and one of them at most -1 (meaning: the rest)")
    if free:
        if len(devices) % fixed:
            given = " or ".join(f"--mesh.{axis} {size}" for axis, size in sizes.items() if size > 1)
            raise InputError(f"mesh {sizes}: {len(devices)} devices do not divide by {fixed}; change {given}")
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise InputError(
            f"mesh {sizes} needs {fixed} devices and there are {len(devices)}; "
            "set one of --mesh.data, --mesh.fsdp, --mesh.tensor, --mesh.context to -1"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes[axis] for axis in AXES)
    # As jax.make_mesh has it: the torus of these chips may be cut along an axis of the mesh without a word.
    cut = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    try:
        laid = _laid(shape, devices, cut=cut)
    except NotImplementedError:  # what jax raises where only a cut torus gives these sizes
        _log.info("mesh %s: cuts an axis of the torus of these TPUs; sizes that it has are faster", sizes)
        laid = _laid(shape, devices, cut=True)
    return Mesh(laid, AXES, axis_types=axis_types)


def _laid(shape: tuple[int, ...], devices: list[Any], *, cut: bool) -> np.ndarray:
    """The devices as an array `shape`; `cut`: an axis of a TPU's torus may be split in parts."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        return _across_slices(shape, slices, devices, cut=cut)
    return create_device_mesh(shape, devices, allow_split_physical_axes=cut)


def _across_slices(shape: tuple[int, ...], slices: int, devices: list[Any], *, cut: bool) -> np.ndarray:
    """The devices of several slices (TPU slices, or GPU nodes) that a slower network joins, as an array `shape`.

    The slices lie along `data`, across which only gradients travel; where `data` is too small for that also along
    `fsdp`, never along `context` or `tensor`.
    """
    data, fsdp, context, tensor = shape
    along_data = math.gcd(data, slices)
    along_fsdp = slices // along_data
    if fsdp % along_fsdp:
        raise InputError(
            f"mesh data {data}, fsdp {fsdp}, tensor {tensor}: does not divide over {slices} slices; set --mesh.data to"
            f" {slices} or a multiple of it"
        )
    if along_fsdp > 1:
        _log.info(
            "mesh: fsdp reaches over %d slices, so weights are gathered through the slower network between them in"
            " every layer; --mesh.data %d keeps that within a slice, where the model fits",
            along_fsdp,
            slices,
        )
    within = (data // along_data, fsdp // along_fsdp, context, tensor)
    return create_hybrid_device_mesh(within, (along_data, along_fsdp, 1, 1), devices, allow_split_physical_axes=cut)


def _split(axes: LogicalAxes) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array; within `sum_over_copies` not `data`, whose pieces are apart."""
    used = set(_apart(jax.sharding.get_abstract_mesh()))
    entries: list[tuple[str, ...]] = []
    for axis in axes:
        names = () if axis is None else tuple(n for n in RULES[axis] if n not in used)
        used.update(names)
        entries.append(names)
    return entries


def partition_spec(axes: LogicalAxes) -> PartitionSpec:
    """The `PartitionSpec` of an array whose axes have these logical names (None = not split)."""
    return PartitionSpec(*(names or None for names in _split(axes)))


def sharding(mesh: Mesh, axes: LogicalAxes) -> NamedSharding:
    """`partition_spec(axes)` on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def of_one(sharding: NamedSharding, ndim: int) -> NamedSharding:
    """The sharding of one element along the first axis of an array of `ndim` axes: of a layer of stacked ones."""
    axes = (*sharding.spec, *[None] * (ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*axes[1:]))


def split_as(owner: Any, shape: Sequence[int]) -> NamedSharding:
    """The sharding of an array `shape`: each axis split as that of `owner`, or whole where it is too short."""
    where, held = owner.sharding, owner.sharding.shard_shape(owner.shape)
    split = zip(shape, owner.shape, held, (*where.spec, *[None] * owner.ndim), strict=False)
    return NamedSharding(where.mesh, PartitionSpec(*(None if n % (m // own) else a for n, m, own, a in split)))


def check_divisible(mesh: Mesh, name: str, shape: Sequence[int], axes: LogicalAxes) -> None:
    """Raise `InputError`, naming the fix, when an axis of `shape` does not divide over the mesh axes that split it."""
    for size, axis, split in zip(shape, axes, _split(axes), strict=True):
        parts = math.prod(mesh.shape[n] for n in split)
        if size % parts:
            option = " x ".join(f"--mesh.{n}" for n in split if mesh.shape[n] > 1)
            raise InputError(
                f"{name} {tuple(shape)}: its {axis} axis of {size} does not divide by {parts} ({option}); "
                f"choose sizes that divide {size}"
            )


def check_heads(mesh: Mesh, heads: int) -> None:
    """Raise `InputError`, with the sizes that fit, when `heads` query heads do not divide over tensor x context."""
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    if context > 1 and heads % (tensor * context):
        fits = [str(n // tensor) for n in range(tensor, heads + 1, tensor) if heads % n == 0]
        raise InputError(
            f"--mesh.context {context}: {heads} attention heads do not divide over --mesh.tensor {tensor} x"
            f" --mesh.context; --mesh.context may be {', '.join(fits)}"
        )


def check_length(length: int) -> None:
    """Raise `InputError`, with the sizes that fit, when the mesh in force splits sequences of `length` unevenly."""
    if length % parts("length"):
        fits = ", ".join(str(n) for n in range(1, 1025) if length % n == 0)
        raise InputError(
            f"--mesh.context {parts('length')}: sequences of {length} tokens do not split evenly over it;"
            f" --mesh.context may be {fits}"
        )


def _apart(mesh: Mesh | jax.sharding.AbstractMesh) -> Sequence[str]:
    """The mesh axes along which the code that is traced sees one piece of each array."""
    return mesh.manual_axes if isinstance(mesh, jax.sharding.AbstractMesh) else ()


def _current() -> jax.sharding.AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def in_force(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """`jax.set_mesh(mesh)`; nothing where there is no mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def constrain(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Ask the compiler to lay `x` out by its logical axes. Without a mesh in force (`jax.set_mesh`) it returns `x`."""
    if _current() is None:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))


def parts(axis: str) -> int:
    """How many pieces the mesh in force splits a logical axis into; 1 without a mesh."""
    return pieces(_current(), axis)


def platform() -> str:
    """What computations are compiled for: "cpu", "gpu" or "tpu".

    The devices of the mesh in force decide, also where they are only described (ahead-of-time compilation for a
    topology that is not here); without a mesh, the default backend.
    """
    mesh = _current()
    device = None if mesh is None else mesh.abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name


def device_kind() -> str:
    """The name of the devices that computations are compiled for, as `jax.Device.device_kind` has it."""
    mesh = _current()
    device = None if mesh is None else mesh.abstract_device
    return jax.devices()[0].device_kind if device is None else device.device_kind


def shard_map(function: Callable[..., Any], inputs: Sequence[LogicalAxes], output: LogicalAxes) -> Callable[..., Any]:
    """`function` applied by every device to its own shards, for code that the compiler cannot split by itself.

    `inputs` and `output` are the logical axes of the arguments (one of which may be None) and of the result. Without a
    mesh in force, `function` itself.
    """
    if _current() is None:
        return function
    in_specs = tuple(partition_spec(axes) for axes in inputs)
    return jax.shard_map(function, in_specs=in_specs, out_specs=partition_spec(output), check_vma=False)


def for_lookup(table: jax.Array, axes: LogicalAxes) -> jax.Array:
    """`table`, laid out so that rows of it can be gathered within `sum_over_copies`: the vocabulary whole.

    XLA's partitioner aborts (`ExpandDeviceGroupsWithIota`) on a gather from a table that is split along both axes where
    another axis of the mesh is mapped over already. Elsewhere, and where only one axis is split, `table` itself.
    """
    mesh = _current()
    if mesh is None or not _apart(mesh) or parts("embed") == 1 or parts("vocab") == 1:
        return table
    return constrain(table, tuple(None if axis == "vocab" else axis for axis in axes))


def constrain_in_copy(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """`constrain` within `sum_over_copies`; elsewhere `x` itself, whose layout follows from what is around it."""
    mesh = _current()
    return constrain(x, axes) if mesh is not None and _apart(mesh) else x


def slices_of(mesh: Mesh) -> list[int]:
    """The slice (TPU slice, or GPU node) of each device of `mesh`, in its order; CPUs are slices by process."""
    return [
        device.process_index if device.platform == "cpu" else getattr(device, "slice_index", 0)
        for device in mesh.devices.flat
    ]


def copies(mesh: Mesh | None = None) -> int:
    """How many copies of the model `mesh`, or the mesh in force, holds (`data`); 1 without a mesh."""
    held = _current() if mesh is None else mesh
    return 1 if held is None else held.shape["data"]


def sum_over_copies(function: Callable[[Any], tuple[Any, Any]], rows: Any, dtype: str) -> tuple[Any, Any]:
    """(sums, rows) of `function(rows) -> (sums, rows)`, which each copy of the model (`data`) applies to its own rows.

    Only the sums cross between copies, once, when each has its own: of every array a device sends its piece along the
    other axes. They cross in `dtype`, and are summed in float32. `rows` are trees of arrays with the batch first.
    Without copies, and where sequences are split (XLA's partitioner aborts on the gathers along them), `function`
    itself; then any other `dtype` than float32 has no effect, which raises `InputError`.
    """
    if copies() == 1 or parts("length") > 1:
        if dtype != "float32":
            raise InputError(f"--train.crossing_dtype {dtype} has no effect with one copy of the model: --mesh.data 1")
        return function(rows)
    summed = _summed if dtype == "float32" else _summed_narrow

    def own(rows: Any) -> tuple[Any, Any]:
        sums, found = function(rows)
        return jax.tree.map(lambda x: summed(x.astype(jnp.float32)).astype(x.dtype), sums), found

    split = PartitionSpec("data")
    mapped = jax.shard_map(
        own, in_specs=(split,), out_specs=(PartitionSpec(), split), axis_names={"data"}, check_vma=False
    )
    return mapped(rows)


def _summed(x: jax.Array) -> jax.Array:
    """Σ of the copies' float32 arrays `x`."""
    return jax.lax.psum(x, "data")


def _summed_narrow(x: jax.Array) -> jax.Array:
    """Σ of the copies' float32 arrays `x`, of which bfloat16 crosses.

    Copy i sums part i of S in float32, of what all others send it of theirs, rounded, and sends them the sum, rounded
    again: 2 b (S - 1) / S bytes a device, as of an all-reduce, and two roundings, whatever S is. An array none of whose
    axes divides over all devices is small, and crosses as it is.

    (XLA's partitioner leaves only a permute where it is along the other mesh axes: of an all-gather or all-to-all every
    device would get the whole. An all-reduce of bfloat16 would round after every term; on CPUs XLA aborts on it, and
    widens whatever else moves as bfloat16: so what crosses is called an integer.)
    """
    mesh, whole = jax.sharding.get_abstract_mesh(), x.shape
    axis = next((i for i, size in enumerate(whole) if size % mesh.size == 0), None)
    if axis is None:
        return _summed(x)
    n = mesh.shape["data"]
    # Part i is every n-th element, from i on: so each device has a piece of each part, and nothing moves for it.
    parts, here = x.reshape(*whole[:axis], -1, n, *whole[axis + 1 :]), jax.lax.axis_index("data")

    def sent(x: jax.Array, k: int) -> jax.Array:
        """What copy i - k sends to copy i."""
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
        bits = jax.lax.ppermute(bits, "data", [(i, (i + k) % n) for i in range(n)])
        return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(x.dtype)

    def part(k: int) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(parts, (here + k) % n, axis + 1)

    total = sum((sent(part(k), k) for k in range(1, n)), start=part(0))
    total = jax.lax.reduce_precision(total, exponent_bits=8, mantissa_bits=7)  # which, unlike a cast, XLA leaves alone
    sums = parts
    for k in range(n):
        received = sent(total, k) if k else total
        sums = jax.lax.dynamic_update_index_in_dim(sums, received, (here - k) % n, axis + 1)
    return sums.reshape(whole)


def batch_axes(ndim: int) -> LogicalAxes:
    """Logical axes of a batch array: the first axis is the batch, the others are whole."""
    return ("batch",) + (None,) * (ndim - 1)


def for_sampling(mesh: Mesh, *, whole_rows: bool = False) -> Mesh:
    """The mesh on which tokens are drawn one by one: `context` joins `fsdp`, its devices take rows of their own.

    A weight lies on it exactly as on `mesh`, piece by piece (`RULES`): nothing is moved. With `whole_rows` both join
    `tensor`: their devices share every layer, and all have the same rows.
    """
    data, fsdp, context, tensor = mesh.devices.shape
    shape = (data, 1, 1, fsdp * context * tensor) if whole_rows else (data, fsdp * context, 1, tensor)
    same = shape == mesh.devices.shape
    return mesh if same else Mesh(mesh.devices.reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)


def pieces(mesh: Mesh | jax.sharding.AbstractMesh | None, axis: str) -> int:
    """How many pieces a logical axis is split into on `mesh`; 1 without one."""
    return 1 if mesh is None else math.prod(mesh.shape[n] for n in RULES[axis] if n not in _apart(mesh))


def batch_parts(mesh: Mesh | None) -> int:
    """How many pieces a batch is split into on `mesh`, if there is one: a batch size must be a multiple of it."""
    return pieces(mesh, "batch")


def device_bytes(tree: Any) -> float:
    """Bytes of a tree of arrays, or of shapes with shardings, on one device."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


def put_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Place a tree of host arrays [B, ...] on the mesh, the batch axis split; without a mesh it stays where it is.

    Every process passes the same global batch; each copies only the rows that its own devices hold (`own_rows`).
    """
    if mesh is None:
        return batch

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding(mesh, batch_axes(x.ndim)), lambda index: x[index])

    return jax.tree.map(put, batch)


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """bool [rows]: which rows of a batch of so many `put_batch` copies to devices of this process."""
    held = sharding(mesh, batch_axes(1)).addressable_devices_indices_map((rows,)).values()
    return np.isin(np.arange(rows), np.concatenate([np.arange(rows)[index] for index in held]))


def one_ahead(
    compute: Callable[[Any], Any], batches: Iterable[tuple[np.ndarray, Any]], mesh: Mesh
) -> Iterator[tuple[np.ndarray, Any]]:
    """(indices, what `compute` gives, on the host) of each (indices, batch of host arrays).

    The devices are given a batch before the results of the one before are waited for, so that they always have work.
    """
    started = ((indices, compute(put_batch(mesh, batch))) for indices, batch in batches)
    for (indices, values), _ in itertools.pairwise(itertools.chain(started, [(None, None)])):
        yield np.asarray(indices), jax.device_get(values)


class Replicated:
    """`function` jitted for one mesh; every process gets the whole result. Its arguments stay as they are."""

    def __init__(self, function: Callable[..., Any], mesh: Mesh):
        self.mesh, self._function = mesh, function
        self._jitted: dict[Any, Any] = {}

    def _jit(self, *_: Any) -> Any:
        return jax.jit(self._function, out_shardings=replicated(self.mesh))

    def _ready(self, *args: Any) -> Any:
        kind = jax.tree.structure(args[:1])  # of a state made anew, too, whose optimizer is another object
        if kind not in self._jitted:
            self._jitted[kind] = self._jit(*args)
        return self._jitted[kind]

    def __call__(self, *args: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self._ready(*args)(*args)

    def lower(self, *args: Any) -> Any:
        """`jax.jit(...).lower`, for compiling ahead of time, for `jax.ShapeDtypeStruct`s with shardings too."""
        with jax.set_mesh(self.mesh):
            return self._ready(*args).lower(*args)


class ShardedStep(Replicated):
    """`step(state, batch) -> (state, metrics)`, jitted for one mesh: the state is donated and keeps its shardings."""

    def _jit(self, *args: Any) -> Any:
        kept, whole = jax.tree.map(lambda x: x.sharding, args[0]), replicated(self.mesh)
        return overlap.jit(self._function, whole, donate_argnums=0, out_shardings=(kept, whole))
