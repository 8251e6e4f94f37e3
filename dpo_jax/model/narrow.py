"""Weights in fewer bits, for generation: a decoding step reads every weight once, so its time is their bytes.

    bfloat16   x and W rounded to bfloat16, products summed in float32.
    int8       W_ij ~ s_j Q_ij with |Q_ij| <= 127, s_j = max_i |W_ij| / 127 (Dettmers et al. 2022, section 2.1,
               vector-wise). x is quantised likewise on the fly, row by row, and then what that left once more:
               x ~ s (q + r / 254), so x W ~ s s_j (q Q + r Q / 254), integer products summed in int32. One int8 alone
               loses ten times more to the outliers of x; the second costs more rows, not more reading of weights.

Narrow matrices are kept transposed, [F, D]: that order suits XLA's CPU backend best (integer products x 1.2 to 1.5,
bfloat16 x 1.4), and other backends choose their own. Narrow weights stand in the collection `narrow` of
a model's variables, under the names of the kernels that they stand for; a `Linear` that finds one there reads it
instead of its kernel. Nothing trains through them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.config import Narrow
from dpo_jax.errors import InputError
from dpo_jax.model.quantised import whole

_ROWS = 2
"""Products of fewer rows run as so many: XLA's CPU backend converts the matrix to float32 for a lone row."""


def quantise(x: jax.Array, axis: int = -1) -> tuple[jax.Array, jax.Array]:
    """int8 values and float32 scales (without `axis`), so that x ~ values * scales, off by half a scale at most."""
    scales = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis, keepdims=True) / 127
    values = jnp.round(x.astype(jnp.float32) / jnp.where(scales > 0, scales, 1.0)).astype(jnp.int8)
    return values, jnp.squeeze(scales, axis)


def narrowed(kernel: jax.Array, to: Narrow) -> dict[str, jax.Array]:
    """A narrow kernel from a transposed one [..., F, D]: {"values"}, and in int8 {"scales": float32 [..., F]}."""
    if to == "bfloat16":
        return {"values": kernel.astype(jnp.bfloat16)}
    values, scales = quantise(kernel)
    return {"values": values, "scales": scales}


def matmul(x: jax.Array, kernel: Mapping[str, jax.Array]) -> jax.Array:
    """float32 [..., F] from x [..., D] and a narrow kernel of values [F, D]."""
    rows, values = x.reshape(-1, x.shape[-1]), kernel["values"]
    if "scales" in kernel:
        y = _integer_products(rows.astype(jnp.float32), values) * kernel["scales"]
    else:
        y = _products(rows.astype(values.dtype), values, jnp.float32)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _products(rows: jax.Array, values: jax.Array, dtype: Any) -> jax.Array:
    """[N, F] in `dtype` from [N, D] and [F, D]."""
    padded = jnp.pad(rows, ((0, max(0, _ROWS - len(rows))), (0, 0)))
    return jnp.einsum("nd,fd->nf", padded, values, preferred_element_type=dtype)[: len(rows)]


def _integer_products(rows: jax.Array, values: jax.Array) -> jax.Array:
    """float32 [N, F] from float32 [N, D] and int8 [F, D]; the rows are quantised twice."""
    q, scales = quantise(rows)
    scales = scales[:, None]
    left = rows / jnp.where(scales > 0, scales, 1.0) - q  # within a half
    r = jnp.round(254 * left).astype(jnp.int8)
    sums = _products(jnp.concatenate([q, r]), values, jnp.int32).astype(jnp.float32)
    return (sums[: len(rows)] + sums[len(rows) :] / 254) * scales


@functools.cache
def check_integer_products() -> None:
    """Once a process: whether this backend multiplies integers rightly.

    XLA for GPUs gives twice each int8 product with `--xla_gpu_autotune_level=0` (jax 0.11.2, H200): what is sampled
    then is noise.

    Raises `InputError` where a product is wrong.
    """
    rows, values = (np.arange(n * 256).reshape(n, 256) * 37 % 255 - 127 for n in (8, 128))
    got = np.asarray(jax.jit(_products, static_argnums=2)(rows.astype(np.int8), values.astype(np.int8), jnp.int32))
    if (got != rows @ values.T).any():
        raise InputError(
            f"int8 weights: {jax.local_devices()[0].device_kind} multiplies integers wrongly here; leave "
            "--xla_gpu_autotune_level out of XLA_FLAGS, or use bfloat16"
        )


def narrow_variables(variables: Mapping[str, Any], to: Narrow) -> dict[str, Any]:
    """Variables with the collection `narrow` in place of all kernels of the layers and of the output matrix.

    Norms, biases, adapters and the embedding stay: they are little, or read a row at a time.
    """

    def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        kept, found = {}, {}
        for name, value in params.items():
            if name == "kernel":
                found[name] = narrowed(whole(value).swapaxes(-1, -2), to)
            elif isinstance(value, Mapping):
                inner, kernels = split(value)
                kept |= {name: inner} if inner else {}
                found |= {name: kernels} if kernels else {}
            else:
                kept[name] = value
        return kept, found

    kept, found = split(variables["params"])
    if "lm_head" not in found:
        found["lm_head"] = {"kernel": narrowed(kept["embed_tokens"]["embedding"], to)}
    return {**variables, "params": kept, "narrow": found}


def kind(variables: Mapping[str, Any]) -> Narrow | None:
    """What the weights of these variables were narrowed to."""
    if "narrow" not in variables:
        return None
    return "int8" if "scales" in variables["narrow"]["lm_head"]["kernel"] else "bfloat16"
