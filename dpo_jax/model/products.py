"""Matrix products, summed in float32: a Linear's, and the output matrix's.

TPUs and GPUs sum products of bfloat16 in float32 and round what comes out. XLA's CPU backend multiplies in float32
where bfloat16 is to come out, and has its fast kernels (AMX, AVX-512 BF16) only where float32 is asked for, forward and
backward: x 3 on such a machine. So on CPUs that is asked for, and rounded afterwards.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dpo_jax import mesh as meshes

SAVED = "product"
"""What `matmul` returns goes by this name for a rematerialisation policy."""


def precision(dtype: Any) -> jax.lax.Precision | None:
    """float32 means float32: without this, TPUs would multiply in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """x [..., D] times kernel [D, F], [..., F] in `dtype` (default: that of x).

    The kernel is rounded to the dtype of x. On CPUs the gradient that comes back is so, too, before it is multiplied,
    and the gradient of the kernel never was narrower than the kernel.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if x.dtype == jnp.bfloat16 and meshes.platform() == "cpu":
        y: Any = _product(x, kernel, dtype)
    else:
        exact = precision(x.dtype)
        y = jnp.matmul(x, kernel.astype(x.dtype), precision=exact, preferred_element_type=dtype)
    return saved(y)


def saved(y: jax.Array) -> jax.Array:
    """y, under a name that a rematerialisation policy may keep.

    On a CPU bfloat16 numbers are kept as integers: XLA's backend there knows no bfloat16 in an update of a slice, and
    would turn all that was kept of other layers into float32 and back again to write one layer's.
    """
    return _saved_as_bits(y) if y.dtype == jnp.bfloat16 and meshes.platform() == "cpu" else checkpoint_name(y, SAVED)


def _through_bits(y: jax.Array) -> jax.Array:
    bits = checkpoint_name(jax.lax.bitcast_convert_type(y, jnp.uint16), SAVED)
    return jax.lax.bitcast_convert_type(bits, y.dtype)


# The first pass must not call the function itself: a policy does not look into one with a gradient of its own.
_saved_as_bits = jax.custom_vjp(_through_bits)
_saved_as_bits.defvjp(lambda y: (_through_bits(y), None), lambda _, g: (g,))


def _dot(x: jax.Array, y: jax.Array, axes: tuple[Any, Any]) -> jax.Array:
    return jax.lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return _dot(x, kernel.astype(x.dtype), ((x.ndim - 1,), (0,))).astype(dtype)


def _forward(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, kernel, dtype), (x, kernel)


def _backward(_: jnp.dtype, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    g, rows = g.astype(x.dtype), tuple(range(x.ndim - 1))
    by_x = _dot(g, kernel.astype(x.dtype), ((g.ndim - 1,), (1,))).astype(x.dtype)
    return by_x, _dot(x, g, (rows, rows)).astype(kernel.dtype)


_product.defvjp(_forward, _backward)
