"""Llama (Touvron et al. 2023, arXiv 2307.09288; Llama 3, arXiv 2407.21783) as one Flax Linen module.

Whatever `LlamaForCausalLM` and `MistralForCausalLM` checkpoints hold: RMSNorm before each sub-layer, rotary positions
(half-split, as Hugging Face stores them), grouped-query attention, SwiGLU, tied or untied embeddings, optional biases.

    h   = x + Attention(RMSNorm(x))
    out = h + W_down (silu(W_gate n) * W_up n),   n = RMSNorm(h)

The layers are stacked on a leading L axis and scanned, so compile time does not grow with depth. Trained adapters
(LoRA) live in their own collection, `adapters`; applying the module to {"params": ...} alone gives the base model, so
the reference policy under LoRA costs no second copy of the weights.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dpo_jax import mesh as meshes
from dpo_jax.config import AttentionKernel, LoraConfig, Remat
from dpo_jax.errors import InputError
from dpo_jax.model import attention, narrow
from dpo_jax.model.architecture import LlamaConfig, RopeScaling
from dpo_jax.model.cache import Cache, Caches, count_slots
from dpo_jax.model.products import SAVED, matmul, precision, scaled, shifted

_REMAT_POLICIES: dict[Remat, Any] = {
    "dots": jax.checkpoint_policies.save_only_these_names(SAVED),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each rotary pair, float32 [C / 2], radians per position (Su et al. 2021, section 3.2.2).

    Made by NumPy in float32, as other implementations do: at position 10,000 the last bit of a frequency is 6e-4 rad.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (1.0 / np.power(np.float32(theta), exponents)).astype(np.float32)
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / np.float32(scaling.factor)
    # Llama 3.1: wavelengths beyond original / low are slowed by the factor, those under original / high are kept.
    turns = scaling.original_max_position * freqs / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * freqs / scaling.factor + blend * freqs).astype(np.float32)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn each pair (x_i, x_{i + C/2}) of x [B, T, H, C] by its angle; cos and sin are [B, T, C / 2], float32."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang & Sennrich 2019, Eq. 4)."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return scaled(x.astype(self.dtype), scale)


class Linear(nn.Module):
    """x W (+ b) (+ scale x A B where this layer has an adapter and the `adapters` collection is given).

    W is what the collection `narrow` holds, where that is given (`model/narrow.py`).
    """

    features: int
    use_bias: bool
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        if self.has_variable("narrow", "kernel"):
            y = narrow.matmul(x, self.get_variable("narrow", "kernel")).astype(self.dtype)
        else:
            kernel = self.param("kernel", nn.initializers.normal(0.02), (width, self.features))
            y = matmul(x.astype(self.dtype), kernel)
        if self.use_bias:
            y = shifted(y, self.param("bias", nn.initializers.zeros, (self.features,)))
        adapted = self.lora.rank > 0 and self.name in self.lora.targets
        if adapted and (self.is_initializing() or self.has_variable("adapters", "lora_a")):
            rank, bound = self.lora.rank, 1 / math.sqrt(width)

            def uniform() -> jax.Array:
                return jax.random.uniform(self.make_rng("params"), (width, rank), minval=-bound, maxval=bound)

            a = self.variable("adapters", "lora_a", uniform).value
            b = self.variable("adapters", "lora_b", jnp.zeros, (rank, self.features)).value
            y = y + self.lora.scale * matmul(matmul(x.astype(self.dtype), a), b)
        return y


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
        cos: jax.Array,
        sin: jax.Array,
        mask: attention.AttentionMask,
    ) -> tuple[jax.Array, Cache | None]:
        c, (b, t, _) = self.config, x.shape
        bias = {"use_bias": c.attention_bias, "dtype": self.dtype, "lora": self.lora}
        q = Linear(c.num_heads * c.head_dim, name="q_proj", **bias)(x).reshape(b, t, c.num_heads, c.head_dim)
        k = Linear(c.num_kv_heads * c.head_dim, name="k_proj", **bias)(x).reshape(b, t, c.num_kv_heads, c.head_dim)
        v = Linear(c.num_kv_heads * c.head_dim, name="v_proj", **bias)(x).reshape(b, t, c.num_kv_heads, c.head_dim)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = meshes.constrain(q, ("batch", "length", "heads", "channels"))
        k = meshes.constrain(k, ("batch", "length", "kv", "channels"))
        v = meshes.constrain(v, ("batch", "length", "kv", "channels"))
        if cache is not None:
            assert mask.positions is not None
            cache = cache.write(k, v, mask.positions[:, 0])
            k, v = cache.read(self.dtype)
        kernel = attention.choose_kernel(
            self.kernel,
            meshes.platform(),
            prefix=mask.prefix is not None,
            packed=mask.segments is not None and mask.packed,
            cached=mask.positions is not None,
            dtype=self.dtype,
            head_dim=c.head_dim,
            length=t,
        )
        y = attention.attend(q, k, v, mask=mask, kernel=kernel)
        y = y.reshape(b, t, c.num_heads * c.head_dim)
        return Linear(c.hidden_size, name="o_proj", **bias)(y), cache


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x) (Shazeer 2020, Eq. 6)."""

    config: LlamaConfig
    dtype: Any
    lora: LoraConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        bias = {"use_bias": c.mlp_bias, "dtype": self.dtype, "lora": self.lora}
        gate = Linear(c.intermediate_size, name="gate_proj", **bias)(x)
        up = Linear(c.intermediate_size, name="up_proj", **bias)(x)
        h = meshes.constrain(nn.silu(gate) * up, ("batch", "length", "mlp"))
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
        cos: jax.Array,
        sin: jax.Array,
        mask: attention.AttentionMask,
    ) -> tuple[jax.Array, Cache | None]:
        epsilon = self.config.rms_norm_eps
        normed = RMSNorm(epsilon, self.dtype, name="input_layernorm")(x)
        y, cache = Attention(self.config, self.dtype, self.kernel, self.lora, name="self_attn")(
            normed, cache, cos, sin, mask
        )
        x = meshes.constrain(x + y, ("batch", "length", "embed"))
        normed = RMSNorm(epsilon, self.dtype, name="post_attention_layernorm")(x)
        x = x + MLP(self.config, self.dtype, self.lora, name="mlp")(normed)
        return meshes.constrain(x, ("batch", "length", "embed")), cache


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
      remat:     what the backward pass recomputes: "none", "dots" (all but matrix products), "full" (whole layers).
      attention: kernel; see `model/attention.py`.
      lora:      adapters, or rank 0.
      unrolled:  layers are layer_0, layer_1, ... with variables of their own (`variables.unroll`), not a scan over
                 stacked ones. XLA's CPU backend copies what a scan slices, so one token takes a third of the time.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: Remat = "dots"
    attention: AttentionKernel = "auto"
    lora: LoraConfig = LoraConfig()
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
            in_axes: Any = (0, nn.broadcast, nn.broadcast, nn.broadcast)
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, "adapters": 0, "narrow": 0},
                split_rngs={"params": True},
                in_axes=in_axes,
                out_axes=0,
                length=c.num_layers,
            )(*options)
        self.embed_tokens = Table("embedding", (c.vocab_size, c.hidden_size))
        self.norm = RMSNorm(c.rms_norm_eps, self.dtype)
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
        cache: Caches | None = None,
    ) -> Any:
        """Hidden states after the final norm.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], rotary positions; default 0..T-1. With a cache they are required, consecutive in
            each row, and also name the slots that the new keys are written to.
          segments: int32 [B, T]; 0 is padding, and a token sees only its own segment. Default: all one segment.
          packed: static; False promises that each row is one segment followed by padding, which more kernels can run.
          prefix: static (P, K, R): the sequence is a prompt block of P and K response blocks of R that all see the
            prompt and not one another (`model/groups.py`).
          cache: keys and values of earlier tokens; a token at position p sees slots 0..p of its row.

        Returns:
          [B, T, D] in `dtype`; with a cache the pair (hidden, new cache).
        """
        c = self.config
        reach = tokens.shape[1] if cache is None else count_slots(cache)
        if c.sliding_window is not None and reach > c.sliding_window:
            raise InputError(
                f"sequences of {reach} tokens exceed the model's sliding window of {c.sliding_window}, which is not "
                f"implemented beyond its length; lower --data.max_length to {c.sliding_window}"
            )
        if cache is not None:
            if positions is None or segments is not None or prefix is not None:
                raise ValueError("with a cache, give positions, and neither segments nor prefix")
            mask = attention.AttentionMask(positions=positions)
        else:
            mask = attention.AttentionMask(segments=segments, prefix=prefix, packed=packed)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        freqs = rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
        angles = positions.astype(jnp.float32)[..., None] * freqs
        x = jnp.take(self.embed_tokens.value, tokens, axis=0).astype(self.dtype)
        x = meshes.constrain(x, ("batch", "length", "embed"))
        x, cache = self._through_layers(x, cache, jnp.cos(angles), jnp.sin(angles), mask)
        x = self.norm(x)
        if self.is_initializing() and not c.num_labels:
            self.unembedding()  # creates the head, which only `logits` and the log-probabilities use
        return x if cache is None else (x, cache)

    def _through_layers(self, x: jax.Array, cache: Caches | None, *rest: Any) -> tuple[jax.Array, Caches | None]:
        if not self.unrolled:
            return self.layers(x, cache, *rest)
        assert not isinstance(cache, Cache)
        after = []
        for i, layer in enumerate(self.layer):
            x, one = layer(x, None if cache is None else cache[i], *rest)
            after.append(one)
        return x, None if cache is None else tuple(after)

    def unembedding(self) -> jax.Array:
        """The output matrix [D, V], as it is kept: the transposed embedding where they are tied.

        Whoever multiplies by it rounds it, so that its gradient need not be rounded (`products.rounded`).
        Raises `InputError` for a reward model, which has none.
        """
        if self.config.num_labels:
            raise InputError("this model is a reward model: it scores texts, and has no output matrix to write them")
        return self.embed_tokens.value.T if self.config.tie_embeddings else self.lm_head.value

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] from hidden states [..., D]. For log-probabilities of long texts use `model/logprobs.py`."""
        if "lm_head" in self.variables.get("narrow", {}):
            return narrow.matmul(hidden, self.variables["narrow"]["lm_head"]["kernel"])
        matrix, spec = self.unembedding().astype(self.dtype), "...d,dv->...v"
        if self.config.tie_embeddings:
            # The other way round, because XLA's CPU backend would copy the transposed matrix for a lone row.
            matrix, spec = matrix.T, "...d,vd->...v"
        return jnp.einsum(spec, hidden, matrix, precision=precision(self.dtype), preferred_element_type=jnp.float32)
