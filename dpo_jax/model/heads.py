"""Heads: linear maps from a hidden state to a few numbers, such as the score of a reward model.

    score(x, y) = h_T w        h_T [D]: the final state at the last token of x y (the terminator), w [D, 1]

The heads of a model are one more collection of its variables, always float32:

    variables["heads"][name] = {"kernel": float32 [D, n]}

`score` (n = 1) is the head of a reward model. Others stand beside it on the same state: the classes of
`align/reward.py`, the value of PPO. There is no module: a head is a matrix, and `apply` multiplies by it.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.errors import InputError
from dpo_jax.model.llama import Llama

SCORE = "score"
"""Name of the head whose one number is the reward."""

Heads = dict[str, dict[str, Any]]
_AXES: meshes.LogicalAxes = ("embed", None)


def abstract_heads(model: Llama, sizes: Mapping[str, int]) -> Heads:
    """The tree of `jax.ShapeDtypeStruct`s of heads; `sizes` is name -> n."""
    width = model.config.hidden_size
    return {name: {"kernel": jax.ShapeDtypeStruct((width, n), jnp.float32)} for name, n in sizes.items()}


def logical_axes(sizes: Mapping[str, int]) -> Heads:
    """A tree like the heads whose leaves are logical axes (see `mesh.RULES`): split along the width, as kernels are."""
    return {name: {"kernel": _AXES} for name in sizes}


def shardings(model: Llama, sizes: Mapping[str, int], mesh: Mesh) -> Heads:
    """A tree like the heads of `NamedSharding`s. Raises `InputError`, with the fix, when the width does not divide."""
    for name, leaf in abstract_heads(model, sizes).items():
        meshes.check_divisible(mesh, f"heads/{name}/kernel", leaf["kernel"].shape, _AXES)
    return {name: {"kernel": meshes.sharding(mesh, _AXES)} for name in sizes}


def init_heads(model: Llama, key: jax.Array, sizes: Mapping[str, int], *, mesh: Mesh | None = None) -> Heads:
    """Fresh heads, made in their places on `mesh`: normal with standard deviation 1 / sqrt(D + 1).

    The deviation is Tulu 3's (Lambert et al. 2024, open-instruct's reward model), after summarize-from-feedback: scores
    begin with about the deviation of the entries of the states, which is the scale of the final norm. The numbers of a
    head depend on the key and on its own name only.
    """
    deviation = 1 / math.sqrt(model.config.hidden_size + 1)

    def make(key: jax.Array) -> Heads:
        heads: Heads = {}
        for name, leaf in abstract_heads(model, sizes).items():
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            heads[name] = {"kernel": deviation * jax.random.normal(own, leaf["kernel"].shape, jnp.float32)}
        return heads

    return jax.jit(make, out_shardings=None if mesh is None else shardings(model, sizes, mesh))(key)


def heads_beside(
    model: Llama, variables: Mapping[str, Any], sizes: Mapping[str, int], *, key: jax.Array | None
) -> Heads:
    """New heads for `variables`, laid out on the mesh that its parameters lie on; abstract where they are abstract.

    `key`: of `init_heads`; None makes them 0.
    """
    leaf = jax.tree.leaves(variables["params"])[0]
    mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
    where = shardings(model, sizes, mesh) if isinstance(mesh, Mesh) else None
    if isinstance(leaf, jax.ShapeDtypeStruct):
        made = abstract_heads(model, sizes)
        return made if where is None else jax.tree.map(lambda x, place: x.update(sharding=place), made, where)
    if key is not None:
        return init_heads(model, key, sizes, mesh=mesh if where is not None else None)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract_heads(model, sizes))
    return zeros if where is None else jax.device_put(zeros, where)


def apply(variables: Mapping[str, Any], name: str, hidden: jax.Array) -> jax.Array:
    """What head `name` makes of hidden states [..., D]: float32 [..., n].

    Raises `InputError` where the variables have no such head (at trace time).
    """
    heads = variables.get("heads", {})
    if name not in heads:
        there = f"it has {', '.join(sorted(heads))}" if heads else "it has none"
        raise InputError(f"the model has no head '{name}' ({there}); load a checkpoint with it, or make it: init_heads")
    kernel = heads[name]["kernel"]
    return jnp.matmul(hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
