"""Matrix products, summed in float32, and their gradients: a Linear's, the output matrix's, and what goes with them.

Whatever is summed over tokens is summed in float32, on every device: products forward and backward, and the gradients
of kernels, of scales and biases, and of rows that are looked up. A weight in float32 gets its gradient as it was
summed, not rounded to the bfloat16 of the activations in between.

XLA's CPU backend multiplies in float32 where bfloat16 is to come out, and has its fast kernels (AMX, AVX-512 BF16) only
where float32 is asked for: x 3 on such a machine. So on CPUs that is asked for everywhere, and rounded afterwards.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from dpo_jax import mesh as meshes
from dpo_jax.model.quantised import Quantised

SAVED = "product"
"""What `matmul` returns goes by this name for a rematerialisation policy."""


def precision(dtype: Any) -> jax.lax.Precision | None:
    """float32 means float32: without this, TPUs would multiply in bfloat16 and GPUs in TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


@struct.dataclass
class Rounded:
    """A weight in the dtype of activations, with the weight that its gradient belongs to.

    Rounded (and, over several devices, gathered) once, it can be read many times, chunk by chunk: what each reading
    adds to the gradient is added up in the float32 of `master`, of which nothing but that is read.

    Attributes:
      values: the weight as products read it; no gradient flows into it.
      master: float32, of the same shape.
    """

    values: jax.Array
    master: jax.Array


Weight = jax.Array | Rounded


@struct.dataclass
class Shaped:
    """An output matrix whose logits z become cap tanh(scale z / cap), or without a cap scale z, in float32.

    Attributes:
      matrix: [D, V]; tied, the embedding [V, D].
      scale: static (Granite 3, 1 / `logits_scaling`).
      cap: static (Gemma 2, arXiv 2408.00118, section 2).
      tied: static. The embedding stays as it lies: neither it nor its gradient is copied to be turned.
    """

    matrix: Any
    scale: float = struct.field(pytree_node=False, default=1.0)
    cap: float | None = struct.field(pytree_node=False, default=None)
    tied: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(D, V)."""
        return self.matrix.shape[::-1] if self.tied else self.matrix.shape

    @property
    def axes(self) -> tuple[str, str]:
        """Logical axes of `matrix`."""
        return ("vocab", "embed") if self.tied else ("embed", "vocab")

    @classmethod
    def whole(cls, unembedding: "jax.Array | Shaped") -> "Shaped":
        """A plain output matrix, too, as one of these."""
        return unembedding if isinstance(unembedding, cls) else cls(unembedding)

    def of(self, z: jax.Array) -> jax.Array:
        """What products z with the matrix become."""
        z = z if self.scale == 1 else z * self.scale
        return z if self.cap is None else capped(z, self.cap)


def capped(z: jax.Array, cap: float) -> jax.Array:
    """cap tanh(z / cap): between -cap and cap, and z where it is small."""
    return cap * jnp.tanh(z / cap)


def rounded(weight: jax.Array, dtype: Any) -> Weight:
    """`weight`, to be read in `dtype` by `matmul`, `take` and `read`; in float32 there is nothing to keep apart."""
    if jnp.dtype(dtype) == jnp.float32:
        return weight.astype(jnp.float32)
    return Rounded(jax.lax.stop_gradient(weight).astype(dtype), weight.astype(jnp.float32))


def take(weight: Weight, ids: jax.Array, axis: int) -> Weight:
    """`jnp.take` of a weight. What the places of an id add to its gradient is summed in float32."""
    return jax.tree.map(lambda x: jnp.take(x, ids, axis=axis), weight)


def read(weight: Weight) -> jax.Array:
    """The values of a weight, as something whose gradient goes where it belongs."""
    return _values_for(weight.master, weight.values) if isinstance(weight, Rounded) else weight


def matmul(x: jax.Array, kernel: Weight | Quantised, dtype: Any = None, bias: jax.Array | None = None) -> jax.Array:
    """`product`, kept for the backward pass."""
    return saved(product(x, kernel, dtype, bias))


def product(
    x: jax.Array,
    kernel: Weight | Quantised,
    dtype: Any = None,
    bias: jax.Array | None = None,
    *,
    turned: bool = False,
) -> jax.Array:
    """x [..., D] times kernel [D, F] (+ bias [F], before the sum is rounded), [..., F] in `dtype` (default: that of x).

    `turned`: the kernel is given as [F, D], and so is its gradient. Raises `ValueError` for a quantised one.
    The kernel is rounded to the dtype of x. So is the gradient that comes back, before it is multiplied; the gradient
    of the kernel never was narrower than the kernel (or, of a `Rounded` one, than its master). A quantised kernel is
    made whole for the product, and again for the gradient of x.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    sums = dtype if bias is None else jnp.dtype(jnp.float32)
    if isinstance(kernel, Quantised):
        if turned:
            raise ValueError("a quantised kernel is [D, F]")
        y: Any = _frozen_product(x, kernel, x.dtype, sums)
    elif x.dtype == jnp.float32:
        y = _product(x, read(kernel), None, sums, turned)
    elif isinstance(kernel, Rounded):
        y = _product(x, kernel.values, kernel.master, sums, turned)
    else:
        y = _product(x, kernel, None, sums, turned)
    return y if bias is None else shifted(y, bias, dtype)


def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., D] times scale [D], rounded to the dtype of x; the gradient of the scale is summed in float32."""
    return x * scale if x.dtype == jnp.float32 else _scaled(x, scale)


def shifted(y: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    """float32 y [..., F] plus bias [F], rounded to `dtype`; the gradient of the bias is summed in float32."""
    return (y + bias.astype(y.dtype)).astype(dtype)


def saved(y: jax.Array) -> jax.Array:
    """y, under a name that a rematerialisation policy may keep.

    On a CPU bfloat16 numbers are kept as integers: XLA's backend there knows no bfloat16 in an update of a slice, and
    would turn all that was kept of other layers into float32 and back again to write one layer's.
    """
    return _saved_as_bits(y) if _is_kept_as_bits(y) else checkpoint_name(y, SAVED)


def saved_in_first_pass(y: jax.Array) -> jax.Array:
    """`saved` for the first pass of a function with a gradient of its own: a policy does not look into another one."""
    return _through_bits(y) if _is_kept_as_bits(y) else checkpoint_name(y, SAVED)


def _is_kept_as_bits(y: jax.Array) -> bool:
    return y.dtype == jnp.bfloat16 and meshes.platform() == "cpu"


def _through_bits(y: jax.Array) -> jax.Array:
    bits = checkpoint_name(jax.lax.bitcast_convert_type(y, jnp.uint16), SAVED)
    return jax.lax.bitcast_convert_type(bits, y.dtype)


# The first pass must not call the function itself; see `saved_in_first_pass`.
_saved_as_bits = jax.custom_vjp(_through_bits)
_saved_as_bits.defvjp(lambda y: (_through_bits(y), None), lambda _, g: (g,))


@jax.custom_vjp
def _values_for(master: jax.Array, values: jax.Array) -> jax.Array:
    return values


@jax.custom_vjp
def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * scale.astype(x.dtype)


def _over_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """[D], the float32 sum over all axes but the last."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.float32).astype(like.dtype)


def _scaled_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    return g * scale.astype(g.dtype), _over_rows(g.astype(jnp.float32) * x.astype(jnp.float32), scale)


_values_for.defvjp(lambda _, values: (values, None), lambda _, g: (g.astype(jnp.float32), None))
_scaled.defvjp(lambda x, scale: (_scaled(x, scale), (x, scale)), _scaled_backward)


def _dot(x: jax.Array, y: jax.Array, axes: tuple[Any, Any], dtype: Any = jnp.float32) -> jax.Array:
    """In `dtype`, by way of float32 on a CPU; other devices sum in float32 whatever comes out."""
    out = jnp.float32 if meshes.platform() == "cpu" else dtype
    how: Any = {"precision": precision(x.dtype), "preferred_element_type": out}
    return jax.lax.dot_general(x, y, (axes, ((), ())), **how).astype(dtype)


def _flat(x: jax.Array) -> jax.Array:
    """[..., D], of which a product sums all axes but the last, for that product.

    On a CPU [N, D]: of several axes XLA's backend there makes a transposed copy first, element by element, which took a
    fifth of a training step. Not where devices share a sequence, whose pieces would be gathered to be joined.
    """
    return x.reshape(-1, x.shape[-1]) if meshes.platform() == "cpu" and meshes.parts("length") == 1 else x


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _product(
    x: jax.Array, kernel: jax.Array, master: jax.Array | None, dtype: jnp.dtype, turned: bool = False
) -> jax.Array:
    """x times kernel; the gradient of the kernel goes to `master` where there is one."""
    return _dot(x, kernel.astype(x.dtype), ((x.ndim - 1,), (int(turned),)), dtype)


def _forward(
    x: jax.Array, kernel: jax.Array, master: jax.Array | None, dtype: jnp.dtype, turned: bool
) -> tuple[jax.Array, Any]:
    return _product(x, kernel, master, dtype, turned), (x, kernel, None if master is None else ())


def _backward(
    _: jnp.dtype, turned: bool, saved: Any, g: jax.Array
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    x, kernel, apart = saved
    g = g.astype(x.dtype)
    by_x = _dot(g, kernel.astype(x.dtype), ((g.ndim - 1,), (1 - turned,)), x.dtype)
    x, g = _flat(x), _flat(g)
    rows = tuple(range(x.ndim - 1))
    by_kernel = _dot(*((g, x) if turned else (x, g)), (rows, rows))
    return (by_x, by_kernel.astype(kernel.dtype), None) if apart is None else (by_x, None, by_kernel)


_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _frozen_product(x: jax.Array, kernel: Quantised, read: jnp.dtype, dtype: jnp.dtype) -> jax.Array:
    """x times kernel, which is read in the dtype of x, `read`; its codes alone are kept for the gradient of x."""
    return _dot(x, kernel.whole(read), ((x.ndim - 1,), (0,)), dtype)


def _frozen_backward(read: jnp.dtype, _: jnp.dtype, kernel: Quantised, g: jax.Array) -> tuple[jax.Array, None]:
    return _dot(g.astype(read), kernel.whole(read), ((g.ndim - 1,), (1,)), read), None


_frozen_product.defvjp(lambda x, kernel, *how: (_frozen_product(x, kernel, *how), kernel), _frozen_backward)
