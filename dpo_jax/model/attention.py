"""The one attention seam: plain XLA, cuDNN flash attention (NVIDIA GPUs), splash attention (TPUs).

Every kernel computes softmax(scale x q k^T + mask) v with the softmax in float32, and every kernel may see G < H
key/value heads (grouped queries: query head h reads key/value head h // (H / G)) without repeating them.

Where the mesh splits sequences (`context`), devices exchange pieces of all heads for whole sequences of some heads, and
back afterwards (Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv 2309.14509): every kernel and every mask then is what it
is without, and each device has the same share of a causal mask.

B batch, T query tokens, S key tokens, H query heads, G key/value heads, M = H / G, C channels of a head.
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from dpo_jax import mesh as meshes
from dpo_jax.errors import InputError
from dpo_jax.model import attention_splash, attention_views, attention_xla
from dpo_jax.model.attention_mask import AttentionMask

logger = logging.getLogger("dpo_jax")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: AttentionMask,
    kernel: str,
    scale: float | None = None,
    cap: float | None = None,
    windowed: jax.Array | None = None,
) -> jax.Array:
    """Attention with one of the kernels that `choose_kernel` names.

    Args:
      q: [B, T, H, C]; k, v: [B, T, G, C], or from a cache [B, G, S, C].
      mask: who sees whom.
      kernel: "xla", "cudnn" or "splash".
      scale: factor of the scores; None means 1 / sqrt(C).
      cap: scores become cap tanh(score / cap) before they are masked; "xla" and "splash".
      windowed: bool [], whether the window of the mask holds; None: it does, where there is one.

    Returns:
      [B, T, H, C], the dtype of q.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if mask.views is not None:
        plain = partial(attend, kernel=kernel, scale=scale, cap=cap, windowed=windowed)
        return attention_views.attend(q, k, v, mask, plain, ends=kernel == "xla")
    if mask.prefix is not None:
        prompt, responses, length = mask.prefix
        if q.shape[1] != prompt + responses * length:
            raise ValueError(f"prefix {mask.prefix} does not describe {q.shape[1]} tokens")
    if kernel in ("splash", "cudnn") and mask.window is not None and windowed is not None:
        # These kernels take their window when they are built; which one runs is decided layer by layer.
        one = partial(attend, kernel=kernel, scale=scale, cap=cap)
        whole = dataclasses.replace(mask, window=None, at=None)
        return jax.lax.cond(
            windowed, lambda q, k, v: one(q, k, v, mask=mask), lambda q, k, v: one(q, k, v, mask=whole), q, k, v
        )
    if kernel == "splash":
        splash = partial(attention_splash.attend, scale=scale, cap=cap)
        if mask.prefix is not None and mask.window is not None:
            # The kernel masks by places in a row, and padding stands between a prompt and its responses.
            return _row_a_response(q, k, v, mask, splash)
        return splash(q, k, v, mask)
    if kernel == "cudnn":
        if cap is not None:
            raise ValueError("cuDNN's attention does not cap scores")
        return _cudnn(q, k, v, mask, scale)
    if kernel != "xla":
        raise ValueError(f"unknown attention kernel {kernel!r}")
    return attention_xla.attend(q, k, v, mask, scale, cap, windowed)


def whole_sequences(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, H, C], keys and values [B, T, G, C] as attention wants them: whole sequences of a device's heads.

    Where more devices share the heads than there are key/value heads, these are repeated, each for its own queries.
    """
    parts = meshes.parts("key_heads")
    if meshes.parts("length") == 1:
        return q, k, v
    repeats = parts // math.gcd(k.shape[2], parts)
    if repeats > 1:  # laid out as they were, or the compiler would give up their pieces before it repeats them
        pieces = ("batch", "length", "kv", "channels")
        k, v = (meshes.constrain(jnp.repeat(x, repeats, axis=2), pieces) for x in (k, v))
    keys = ("batch", "keys", "key_heads", "channels")
    q = meshes.constrain(q, ("batch", "queries", "query_heads", "channels"))
    return q, meshes.constrain(k, keys), meshes.constrain(v, keys)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, scale: float) -> jax.Array:
    """cuDNN's flash attention: causal, rows right-padded. Responses that share a prompt each get a row with it."""
    if mask.prefix is not None:
        return _row_a_response(q, k, v, mask, partial(_cudnn, scale=scale))
    lengths = None if mask.segments is None else jnp.sum(mask.segments != 0, axis=1, dtype=jnp.int32)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None) -> jax.Array:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation="cudnn",
        )

    # Not left to the compiler: where the batch is whole it would split some of the kernel's smaller arguments.
    queries, keys = ("batch", "queries", "query_heads", None), ("batch", "keys", "key_heads", None)
    return meshes.shard_map(local, (queries, keys, keys, ("batch",)), queries)(q, k, v, lengths)


def _row_a_response(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: AttentionMask, plain: Callable[..., jax.Array]
) -> jax.Array:
    """The shared-prefix layout for a kernel that knows right-padded causal rows only.

    Around the attention alone, each response becomes such a row: the prompt's real tokens, then its own. What the
    prompt's queries give is the same in each of them, and taken from the first. Projections, feed-forward layers and
    head, where the time goes, still see the prompt once.

    Args:
      q: [B, T, H, C]; k, v: [B, T, G, C], T = P + K R.
      plain: kernel of q, k, v and an `AttentionMask`, for rows [B K, P + R].
    """
    assert mask.prefix is not None
    P, K, R = mask.prefix
    B, L = q.shape[0], P + R
    real = jnp.ones(q.shape[:2], bool) if mask.segments is None else mask.segments != 0
    prompt = jnp.sum(real[:, :P], axis=1)[:, None]  # [B, 1]
    lengths = prompt + jnp.sum(real[:, P:].reshape(B, K, R), axis=2)  # [B, K]
    at = jnp.arange(L)
    own = P + R * jnp.arange(K)[:, None] + jnp.clip(at - prompt, 0, R - 1)[:, None]  # [B, K, L]
    source = jnp.where(at < prompt[..., None], at, own).reshape(B, K * L)

    def rows(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, source[..., None, None], axis=1).reshape(B * K, L, *x.shape[2:])

    segments = (at < lengths.reshape(B * K, 1)).astype(jnp.int32)
    mask = AttentionMask(segments=segments, packed=False, window=mask.window)
    out = plain(rows(q), rows(k), rows(v), mask).reshape(B, K, L, *q.shape[2:])
    places = (prompt + jnp.arange(R))[:, None, :, None, None]  # of a response's tokens in its row
    responses = jnp.take_along_axis(out, jnp.broadcast_to(places, (B, K, R, 1, 1)), axis=2)
    return jnp.concatenate([out[:, 0, :P], responses.reshape(B, K * R, *q.shape[2:])], axis=1)


# cuDNN's support matrix (docs.nvidia.com/cudnn, Attention, 9.18): backward passes of heads up to 128 channels, up to
# 256 on Hopper.
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
_WIDER = " (256 on Hopper)"


def choose_kernel(
    requested: str,
    platform: str,
    *,
    prefix: bool,
    views: bool = False,
    packed: bool,
    cached: bool,
    dtype: jnp.dtype,
    head_dim: int,
    length: int,
    cap: float | None = None,
    device: str = "",
) -> str:
    """The kernel that will run: what was asked for, or under "auto" the best that can run here; logged once.

    Args:
      requested: "auto", "xla", "cudnn" or "splash".
      platform: "cpu", "gpu" or "tpu": what the step is compiled for (`mesh.platform()`).
      prefix, views, packed, cached: the layout: shared prefix, sequences packed in windows, several segments in a row
        that no views take apart, keys from a cache.
      dtype: of queries and keys; head_dim: C; length: T; cap: of the scores (`attend`).
      device: its name (`mesh.device_kind()`).

    Raises:
      InputError: the kernel asked for cannot run, and why.
    """
    widest = 256 if _HOPPER.search(device) else 128
    obstacles = {
        "splash": [
            (platform != "tpu", f"it runs on TPUs, and this is compiled for {platform}"),
            (cached, "it does not read from a cache"),
            (dtype != jnp.bfloat16, f"it computes in bfloat16, and this is {jnp.dtype(dtype)}"),
        ],
        "cudnn": [
            (platform != "gpu", f"it runs on NVIDIA GPUs, and this is compiled for {platform}"),
            (cached, "it does not read from a cache"),
            (cap is not None, "it does not cap scores, and this model does"),
            (packed, "it cannot mask several segments in one row"),
            (dtype not in (jnp.bfloat16, jnp.float16), f"it computes in bfloat16, and this is {jnp.dtype(dtype)}"),
            (
                head_dim % 8 != 0 or head_dim > widest,
                f"heads of {head_dim} channels: it takes multiples of 8 up to {widest}"
                + ("" if widest > 128 else _WIDER),
            ),
        ],
        "xla": [],
    }
    reasons = {kernel: [reason for true, reason in checks if true] for kernel, checks in obstacles.items()}
    layouts = {"cached": cached, "shared-prefix": prefix, "the windows'": views, "packed": packed, "plain": True}
    layout = next(name for name, holds in layouts.items() if holds)
    # One token is the model's initialisation, or a further step of a decode whose prefill has been logged.
    log = _log_once if length > 1 else lambda message: None
    if requested == "auto":
        kernel = next(kernel for kernel, obstacle in reasons.items() if not obstacle)
        rest = "; ".join(f"not {other}: {why[0]}" for other, why in reasons.items() if why)
        log(f"attention kernel {kernel} for {layout} sequences ({rest})")
        return kernel
    if reasons[requested]:
        raise InputError(
            f"attention {requested} cannot run here: {reasons[requested][0]}; use --train.attention auto or xla"
        )
    log(f"attention kernel {requested} for {layout} sequences, as asked for")
    return requested


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)
