"""Llama (Touvron et al. 2023, arXiv 2307.09288; Llama 3, arXiv 2407.21783) as one Flax Linen module.

RMSNorm before each sub-layer, rotary positions (half-split, as Hugging Face stores them), grouped-query attention,
SwiGLU, tied or untied embeddings, optional biases; and what its neighbours add, each by a field of `LlamaConfig`.

    h   = x + Attention(RMSNorm(x))
    out = h + W_down (silu(W_gate n) * W_up n),   n = RMSNorm(h)

The layers are stacked on a leading L axis and scanned, so compile time does not grow with depth. Trained adapters
(LoRA) live in their own collection, `adapters`; applying the module to {"params": ...} alone gives the base model, so
the reference policy under LoRA costs no second copy of the weights.

(One file, though long: whoever looks for a line of the model finds it here.)
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from dpo_jax import mesh as meshes
from dpo_jax.config import NO_LORA, AttentionKernel, LoraConfig, Remat
from dpo_jax.errors import InputError
from dpo_jax.model import attention, narrow, rope
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.attention import AttentionMask
from dpo_jax.model.cache import Cache, ModelCache, count_slots
from dpo_jax.model.dropout import dropped
from dpo_jax.model.products import SAVED, Shaped, matmul, precision, product, saved, scaled, shifted
from dpo_jax.model.quantised import is_quantised
from dpo_jax.model.rope import Layer, Places, rotate
from dpo_jax.types import Views

_GATES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu_tanh": partial(nn.gelu, approximate=True),
}
_ENTERS = "what enters a layer"
_REMAT_POLICIES: dict[Remat, Any] = {
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_ENTERS],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def activated(x: jax.Array, activation: str) -> jax.Array:
    """The gate's activation, rounded once. Backwards it is made again, so that nothing wider than x is kept."""
    f = _GATES[activation]
    if x.dtype == jnp.float32:
        return f(x)
    return jax.checkpoint(lambda x: f(x.astype(jnp.float32)).astype(x.dtype), prevent_cse=False)(x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32 (Zhang & Sennrich 2019, Eq. 4).

    With `wide` it is rounded after the scale, as Gemma's and OLMo 2's code does; without, before it, as Llama's.
    """

    epsilon: float
    dtype: Any
    offset: float = 0.0
    wide: bool = False

    @classmethod
    def of(cls, c: LlamaConfig, dtype: Any, name: str | None = None) -> "RMSNorm":
        """The norm of a model."""
        return cls(c.rms_norm_eps, dtype, c.norm_offset, c.wide_norms or c.norm_offset != 0, name=name)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.offset else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        if self.wide:
            return (x * (self.offset + scale.astype(jnp.float32))).astype(self.dtype)
        return scaled(x.astype(self.dtype), scale)


class Linear(nn.Module):
    """x W (+ b) (+ scale x A B where this layer has an adapter and the `adapters` collection is given).

    W is what the collection `narrow` holds, where that is given (`model/narrow.py`); a quantised one (`quantised.py`)
    stands in place of the array.
    """

    features: int
    use_bias: bool
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        narrowed = self.has_variable("narrow", "kernel")
        held = self.get_variable("params", "kernel")
        if narrowed or is_quantised(held):
            kernel = held
        else:
            kernel = self.param("kernel", nn.initializers.normal(0.02), (width, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None
        if narrowed:
            y = narrow.matmul(x, self.get_variable("narrow", "kernel"))
            y = y.astype(self.dtype) if bias is None else shifted(y, bias, self.dtype)
        else:
            y = product(x.astype(self.dtype), kernel, bias=bias)
        adapted = self.lora.rank > 0 and self.name in self.lora.targets
        if adapted and (self.is_initializing() or self.has_variable("adapters", "lora_a")):
            rank, bound = self.lora.rank, 1 / math.sqrt(width)

            def uniform() -> jax.Array:
                return jax.random.uniform(self.make_rng("params"), (width, rank), minval=-bound, maxval=bound)

            a = self.variable("adapters", "lora_a", uniform).value
            b = self.variable("adapters", "lora_b", jnp.zeros, (rank, self.features)).value
            read = x.astype(self.dtype)
            if self.has_variable("dropout", "rows"):
                read = dropped(read, *(self.get_variable("dropout", name) for name in ("rows", "rate")))
            y = y + product(self.lora.scale * matmul(read, a), b)  # scaled where it is narrow; the sum alone is kept
        return saved(y)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; with a cache, over the cached slots."""

    config: LlamaConfig
    dtype: Any
    kernel: AttentionKernel
    lora: LoraConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None,
        layer: Layer | None,
        places: Places,
        mask: AttentionMask,
    ) -> tuple[jax.Array, Cache | None]:
        c, (b, t, _) = self.config, x.shape
        bias = {"use_bias": c.attention_bias, "dtype": self.dtype, "lora": self.lora}
        inner = {**bias, "use_bias": c.attention_bias or c.qkv_bias}

        def normed(x: jax.Array, name: str, kind: str) -> jax.Array:
            return RMSNorm.of(c, self.dtype, name)(x) if c.qk_norm == kind else x

        q = Linear(c.num_heads * c.head_dim, name="q_proj", **inner)(x)
        q = normed(q, "q_norm", "projection").reshape(b, t, c.num_heads, c.head_dim)
        k = Linear(c.num_kv_heads * c.head_dim, name="k_proj", **inner)(x)
        k = normed(k, "k_norm", "projection").reshape(b, t, c.num_kv_heads, c.head_dim)
        v = Linear(c.num_kv_heads * c.head_dim, name="v_proj", **inner)(x).reshape(b, t, c.num_kv_heads, c.head_dim)
        q, k = normed(q, "q_norm", "head"), normed(k, "k_norm", "head")
        cos, sin = places.of(layer)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = meshes.constrain(q, ("batch", "length", "heads", "channels"))
        k = meshes.constrain(k, ("batch", "length", "kv", "channels"))
        v = meshes.constrain(v, ("batch", "length", "kv", "channels"))
        if cache is not None:
            first = jnp.zeros(b, jnp.int32) if mask.positions is None else mask.positions[:, 0]
            cache = cache.write(k, v, first)
            if mask.positions is not None:
                k, v = cache.read(self.dtype)
        kernel = attention.choose_kernel(
            self.kernel,
            meshes.platform(),
            prefix=mask.prefix is not None,
            views=mask.views is not None,
            packed=mask.segments is not None and mask.packed,
            cached=mask.positions is not None,
            dtype=self.dtype,
            head_dim=c.head_dim,
            length=t,
            cap=c.attention_cap,
            device=meshes.device_kind(),
        )
        windowed = None if layer is None else layer.windowed
        if cache is None:
            q, k, v = attention.whole_sequences(q, k, v)
        y = attention.attend(
            q, k, v, mask=mask, kernel=kernel, scale=c.attention_scale, cap=c.attention_cap, windowed=windowed
        )
        y = meshes.constrain(y, ("batch", "length", "heads", "channels"))
        y = y.reshape(b, t, c.num_heads * c.head_dim)
        return Linear(c.hidden_size, name="o_proj", **bias)(y), cache


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x), or GeGLU, with gelu in its tanh form (Shazeer 2020, Eq. 6)."""

    config: LlamaConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        bias = {"use_bias": c.mlp_bias, "dtype": self.dtype, "lora": self.lora}
        gate = Linear(c.intermediate_size, name="gate_proj", **bias)(x)
        up = Linear(c.intermediate_size, name="up_proj", **bias)(x)
        h = meshes.constrain(activated(gate, c.activation) * up, ("batch", "length", "mlp"))
        return Linear(c.hidden_size, name="down_proj", **bias)(h)


class Block(nn.Module):
    """One layer; the body of the scan over layers."""

    config: LlamaConfig
    dtype: Any
    kernel: AttentionKernel
    lora: LoraConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Cache | None,
        layer: Layer | None,
        places: Places,
        mask: AttentionMask,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        before, after = c.norms != "after", c.norms != "before"
        x = checkpoint_name(x, _ENTERS)

        def norm(x: jax.Array, name: str, wanted: bool = True) -> jax.Array:
            return RMSNorm.of(c, self.dtype, name)(x) if wanted else x

        def added(x: jax.Array, y: jax.Array) -> jax.Array:
            return x + (y if c.residual_scale == 1 else y * c.residual_scale)

        normed = norm(x, "input_layernorm", before)
        y, cache = Attention(c, self.dtype, self.kernel, self.lora, name="self_attn")(
            normed, cache, layer, places, mask
        )
        # As Hugging Face names them: with a norm before alone, "post_attention" is what stands before the MLP.
        y = norm(y, "post_attention_layernorm", after)
        x = meshes.constrain(added(x, y), ("batch", "length", "embed"))
        normed = norm(x, "pre_feedforward_layernorm" if after else "post_attention_layernorm", before)
        y = norm(MLP(c, self.dtype, self.lora, name="mlp")(normed), "post_feedforward_layernorm", after)
        return meshes.constrain(added(x, y), ("batch", "length", "embed")), cache


class Table(nn.Module):
    """A matrix that other methods read: the embedding [V, D] or the output head [D, V]."""

    param_name: str
    shape: tuple[int, int]

    def setup(self) -> None:
        self.value = self.param(self.param_name, nn.initializers.normal(0.02), self.shape)


class Llama(nn.Module):
    """The decoder. Parameters are made and kept float32 unless loaded otherwise; `dtype` is what it computes in.

    Attributes:
      config:    architecture.
      dtype:     dtype of activations and matrix products.
      remat:     what the backward pass recomputes: "none", "dots" (all but matrix products), "full" (whole layers),
                 "offload" (whole layers, from inputs that wait in the host's memory).
      attention: kernel; see `model/attention.py`.
      lora:      adapters, or rank 0.
      unrolled:  layers are layer_0, layer_1, ... with variables of their own (`variables.unroll`), not a scan over
                 stacked ones. XLA's CPU backend copies what a scan slices, so one token takes a third of the time.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: Remat = "dots"
    attention: AttentionKernel = "auto"
    lora: LoraConfig = NO_LORA
    unrolled: bool = False

    def setup(self) -> None:
        c = self.config
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=_REMAT_POLICIES[self.remat], prevent_cse=False)
        options = (c, self.dtype, self.attention, self.lora)
        if self.unrolled:
            self.layer = [block(*options) for _ in range(c.num_layers)]
        else:
            in_axes: Any = (0, 0, nn.broadcast, nn.broadcast)
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, "adapters": 0, "narrow": 0, "dropout": 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                out_axes=0,
                length=c.num_layers,
            )(*options)
        self.embed_tokens = Table("embedding", (c.vocab_size, c.hidden_size))
        self.norm = RMSNorm.of(c, self.dtype)
        if not (c.tie_embeddings or c.num_labels):
            self.lm_head = Table("kernel", (c.hidden_size, c.vocab_size))

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        prefix: tuple[int, int, int] | None = None,
        packed: bool = True,
        views: Views | None = None,
        cache: ModelCache | None = None,
    ) -> Any:
        """Hidden states after the final norm.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], rotary positions; default 0..T-1. With a cache they are consecutive in each row,
            and also name the slots that the new keys are written to; the default then says that the cache is empty, so
            that the tokens see themselves alone and every kernel can run.
          segments: int32 [B, T]; 0 is padding, and a token sees only its own segment. Default: all one segment.
          packed: static; False promises that each row is one segment followed by padding, which more kernels can run.
          prefix: static (P, K, R): the sequence is a prompt block of P and K response blocks of R that all see the
            prompt and not one another (`model/groups.py`).
          views: each row holds several sequences, which these say; positions are required, and segments are needed
            only by a RoPE that follows the length of a sequence.
          cache: keys and values of earlier tokens; a token at position p sees slots 0..p of its row, or those of
            them that the window leaves.

        Returns:
          [B, T, D] in `dtype`; with a cache the pair (hidden, new cache).
        """
        c = self.config
        meshes.check_length(tokens.shape[1])
        if cache is not None:
            if any(x is not None for x in (segments, prefix, views)):
                raise ValueError("with a cache, give neither segments nor prefix nor views")
            mask = AttentionMask(packed=False) if positions is None else AttentionMask(positions=positions)
        else:
            mask = AttentionMask(segments=segments, prefix=prefix, packed=packed, views=views)
        at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
        reach = (tokens.shape[1] if views is None else views.longest) if cache is None else count_slots(cache)
        if c.sliding_window is not None and reach > c.sliding_window:
            mask = dataclasses.replace(mask, window=c.sliding_window, at=at)
        angles = self._angles(at, mask, cached=cache is not None)
        # With several copies of the model each device looks up its piece of the width for all rows of its copy.
        table = meshes.for_lookup(self.embed_tokens.value, ("vocab", "embed"))
        x = jnp.take(table, meshes.constrain_in_copy(tokens, ("copies", None)), axis=0)
        x = meshes.constrain_in_copy(x, ("copies", None, "embed")).astype(self.dtype)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, self.dtype)
        x = meshes.constrain(x, ("batch", "length", "embed"))
        x, cache = self._through_layers(x, cache, self._layers(mask), self._places(*angles), mask)
        x = self.norm(x)
        if self.is_initializing() and not c.num_labels:
            self.unembedding()  # creates the head, which only `logits` and the log-probabilities use
        return x if cache is None else (x, cache)

    def _angles(self, at: jax.Array, mask: AttentionMask, *, cached: bool) -> tuple[jax.Array, jax.Array | None]:
        """The angles of tokens at positions `at` [B, T], and those of layers with a base of their own.

        Frequencies that follow the length of a sequence go by its own real tokens; through a cache, where its length
        is not known yet, they are those up to the original length (`sample.decode.limits` stops there).
        Raises `InputError` where responses share a prompt whose rotation would depend on each response.
        """
        c, lengths = self.config, None
        scaling = c.rope_scaling
        follows = scaling is not None and scaling.follows_length and not cached
        longest = at.shape[1] if mask.views is None else mask.views.longest
        if mask.prefix is not None:
            prompt, _, response = mask.prefix
            longest = prompt + response
        if scaling is not None and follows and longest > scaling.original_max_position:
            if mask.prefix is not None or (mask.views is not None and mask.segments is None):
                raise InputError(
                    f"the model's RoPE changes beyond {scaling.original_max_position} tokens, so a prompt cannot be"
                    f" shared by responses on both sides of that ({longest} tokens); set --train.layout separate"
                )
            lengths = rope.sequence_lengths(at, mask.segments)
        angles = rope.rotary_angles(at, lengths, c.rotary_dim, c.rope_theta, scaling)
        local = c.local_rope_theta
        return angles, None if local is None else rope.rotary_angles(at, None, c.rotary_dim, local, None)

    def _places(self, angles: jax.Array, local: jax.Array | None) -> Places:
        scaling = self.config.rope_scaling
        scale = 1.0 if scaling is None else scaling.scale
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if scale != 1:
            cos, sin = cos * scale, sin * scale
        return Places(cos, sin) if local is None else Places(cos, sin, jnp.cos(local), jnp.sin(local))

    def _layers(self, mask: AttentionMask) -> Layer | None:
        """What differs from layer to layer; None where nothing does."""
        c, numbers = self.config, np.arange(self.config.num_layers)
        several = c.global_layers and (mask.window is not None or c.local_rope_theta is not None)
        windowed = jnp.asarray(~np.isin(numbers, c.global_layers)) if several else None
        rotated = jnp.asarray(~np.isin(numbers, c.unrotated_layers)) if c.unrotated_layers else None
        return None if windowed is None and rotated is None else Layer(windowed, rotated)

    def _through_layers(
        self, x: jax.Array, cache: ModelCache | None, each: Layer | None, *rest: Any
    ) -> tuple[jax.Array, ModelCache | None]:
        if not self.unrolled:
            return self.layers(x, cache, each, *rest)
        assert not isinstance(cache, Cache)
        after = []
        for i, layer in enumerate(self.layer):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], each)
            x, one = layer(x, None if cache is None else cache[i], own, *rest)
            after.append(one)
        return x, None if cache is None else tuple(after)

    def unembedding(self) -> Any:
        """The output matrix [D, V], as it is kept; whoever multiplies by it rounds it, not its gradient (`rounded`).

        A `products.Shaped` where it is the embedding, and where logits are scaled or capped. Raises `InputError` for a
        reward model, which has none.
        """
        c, matrix = self.config, self._output_matrix()
        plain = c.logit_scale == 1 and c.logit_cap is None and not c.tie_embeddings
        return matrix if plain else Shaped(matrix, c.logit_scale, c.logit_cap, tied=c.tie_embeddings)

    def _output_matrix(self) -> jax.Array:
        """[D, V]; the embedding [V, D] where they are tied."""
        c = self.config
        if c.num_labels:
            raise InputError("this model is a reward model: it scores texts, and has no output matrix to write them")
        return self.embed_tokens.value if c.tie_embeddings else self.lm_head.value

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] from hidden states [..., D]. For log-probabilities of long texts use `model/logprobs.py`."""
        c = self.config
        if "lm_head" in self.variables.get("narrow", {}):
            z = narrow.matmul(hidden, self.variables["narrow"]["lm_head"]["kernel"])
        else:
            matrix = self._output_matrix().astype(self.dtype)
            spec = "...d,vd->...v" if c.tie_embeddings else "...d,dv->...v"
            z = jnp.einsum(spec, hidden, matrix, precision=precision(self.dtype), preferred_element_type=jnp.float32)
        return Shaped(None, c.logit_scale, c.logit_cap).of(z)
