"""The variables of a `Llama`: their shapes, their places on a mesh, fresh ones, and adapters merged into their base."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dpo_jax import mesh as meshes
from dpo_jax.config import LoraConfig
from dpo_jax.model import quantised
from dpo_jax.model.llama import Llama
from dpo_jax.model.quantised import is_quantised, kind_of

# Logical axes (mesh.py) of each weight, by the name of its module; a scanned layer adds "layers" in front.
_KERNEL_AXES: dict[str, tuple[str | None, str | None]] = {
    "embed_tokens": ("vocab", "embed"),
    "lm_head": ("embed", "vocab"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv"),
    "v_proj": ("embed", "kv"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}


def _init(model: Llama) -> Callable[[jax.Array], Any]:
    return lambda key: model.clone(attention="xla").init(key, jnp.zeros((1, 1), jnp.int32))


@lru_cache(maxsize=64)
def _shapes(model: Llama) -> Any:
    """The shapes of `init`, which a command asks for time and again: a trace through the model each."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(_init(model), jax.random.key(0))
    )


def abstract_variables(model: Llama, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The tree of `jax.ShapeDtypeStruct`s of the variables; parameters in `dtype`, adapters always float32.

    With the word int8 or nf4 the kernels of the layers are `Quantised`, and other parameters in the model's own dtype.
    """
    shapes = _shapes(model)  # pyright: ignore[reportArgumentType] - flax gives modules a hash
    tree, kind = jax.tree.map(lambda x: x, dict(shapes)), kind_of(dtype)
    if kind is None:
        tree["params"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), tree["params"])
    else:

        def keep(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> Any:
            if not quantised.is_kept(path):
                return x.update(dtype=model.dtype)
            origin = jax.ShapeDtypeStruct((*x.shape[:-2], 2), jnp.uint32)
            return jax.eval_shape(partial(quantised.quantise, kind=kind), x, origin=origin)

        tree["params"] = jax.tree_util.tree_map_with_path(keep, tree["params"])
    return tree


def names_of(path: tuple[Any, ...]) -> list[str]:
    """The names along a path of the variables, those within a quantised matrix among them."""
    return [p.name if isinstance(p, jax.tree_util.GetAttrKey) else p.key for p in path]


def axes_of(path: tuple[Any, ...]) -> meshes.LogicalAxes:
    """The logical axes (see `mesh.RULES`) of the array that stands at `path` in the variables; of narrow, of unrolled
    and of quantised ones too."""
    keys = names_of(path)
    module, leaf = keys[-2], keys[-1]
    if leaf == "scale":
        inner: meshes.LogicalAxes = (None,)
    elif keys[0] == "narrow":  # kernels transposed, under the name "kernel" (model/narrow.py)
        first, last = ("embed", "vocab") if keys[1] == "lm_head" else _KERNEL_AXES[keys[-3]]
        inner = (last, first) if leaf == "values" else (last,)
    elif module == "kernel":  # a quantised one: what belongs to blocks of outputs is little, and whole everywhere
        first, last = _KERNEL_AXES[keys[-3]]
        inner = {"steps": (first, None), "middle": (), "origin": (None,)}.get(leaf, (first, last))
    else:
        first, last = _KERNEL_AXES[module]
        inner = {"bias": (last,), "lora_a": (first, "rank"), "lora_b": ("rank", last)}.get(leaf, (first, last))
    return ("layers", *inner) if "layers" in keys else inner


def logical_axes(model: Llama, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A tree like the variables whose leaves are tuples of logical axis names (see `mesh.RULES`)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: axes_of(path), abstract_variables(model, dtype))


def shardings(model: Llama, mesh: Mesh, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A tree like the variables of `NamedSharding`s. Raises `InputError`, with the fix, when sizes do not divide.

    `dtype`: see `abstract_variables`; no block of a quantised kernel lies on two devices.
    """
    c = model.config
    meshes.check_divisible(mesh, "attention heads", (c.num_heads,), ("heads",))
    meshes.check_divisible(mesh, "key/value heads", (c.num_kv_heads,), ("kv",))
    meshes.check_heads(mesh, c.num_heads)

    def place(path: tuple[Any, ...], x: jax.ShapeDtypeStruct, axes: meshes.LogicalAxes) -> NamedSharding:
        meshes.check_divisible(mesh, "/".join(names_of(path)), x.shape, axes)
        return meshes.sharding(mesh, axes)

    return jax.tree_util.tree_map_with_path(place, abstract_variables(model, dtype), logical_axes(model, dtype))


def init_variables(model: Llama, key: jax.Array, *, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Any:
    """Random variables, made directly in their places on `mesh`; the same numbers on any mesh."""

    def make(key: jax.Array) -> Any:
        tree = dict(_init(model)(key))
        tree["params"] = jax.tree.map(lambda x: x.astype(dtype), tree["params"])
        return tree

    return jax.jit(make, out_shardings=None if mesh is None else shardings(model, mesh))(key)


def init_adapters(model: Llama, key: jax.Array, *, mesh: Mesh | None = None) -> Any:
    """Fresh adapters: A uniform in +-1/sqrt(fan-in), B zero, so that the adapted model starts as the base model."""
    where = None if mesh is None else shardings(model, mesh)["adapters"]
    return jax.jit(lambda key: _init(model)(key)["adapters"], out_shardings=where)(key)


def frozen_copy(params: Mapping[str, Any], dtype: Any, compute_dtype: Any) -> dict[str, Any]:
    """A copy of parameters as they are kept where nothing trains them, in the same places.

    `dtype`: a dtype, or int8 or nf4; `compute_dtype`: of what is not quantised then.
    """
    kind = kind_of(dtype)
    if kind is None:
        return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), dict(params))

    def made(path: tuple[Any, ...], x: jax.Array) -> Any:
        if not quantised.is_kept(path):
            return jnp.array(x, compute_dtype, copy=True)
        mesh = getattr(x.sharding, "mesh", None)
        where = None
        if isinstance(mesh, Mesh):
            shape = jax.eval_shape(lambda x: quantised.quantise(x, kind), x)
            at = (jax.tree_util.DictKey("params"), *path)
            where = jax.tree_util.tree_map_with_path(lambda p, _: meshes.sharding(mesh, axes_of((*at, *p))), shape)
        return jax.jit(quantised.quantise, static_argnums=1, out_shardings=where)(x, kind)

    return jax.tree_util.tree_map_with_path(made, dict(params))


def unroll(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a scanned model as those of an unrolled one (`Llama.unrolled`)."""

    def split(collection: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in collection.items() if name != "layers"}
        stacked = collection.get("layers", {})
        leaves = jax.tree.leaves(stacked)
        layers = range(leaves[0].shape[0] if leaves else 0)
        return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in layers}

    return {name: split(collection) for name, collection in variables.items()}


def merge_adapters(variables: Mapping[str, Any], lora: LoraConfig) -> Any:
    """Parameters with W + (alpha / rank) A B in place of each adapted W; the sum is made in float32."""

    def merge(params: Any, adapters: Any) -> Any:
        if "lora_a" in adapters:
            delta = jnp.matmul(adapters["lora_a"], adapters["lora_b"], precision=jax.lax.Precision.HIGHEST)
            held = params["kernel"]
            held = held.whole() if is_quantised(held) else held
            kernel = held.astype(jnp.float32) + lora.scale * delta.astype(jnp.float32)
            return {**params, "kernel": kernel.astype(held.dtype)}
        return {k: merge(v, adapters[k]) if k in adapters else quantised.whole(v) for k, v in params.items()}

    return jax.jit(merge)(variables["params"], variables["adapters"])
