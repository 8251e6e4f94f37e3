"""Batched generation with a key/value cache: one prefill over the prompts, then a `while_loop` of single tokens.

A token at position p stands in slot p of its row's cache, so prompts of unequal length need no alignment: what the
prefill wrote behind the end of a short prompt is overwritten before any query can see it.

Row i draws its token t with fold_in(fold_in(key, row_ids[i]), t) and nothing else, so its text depends neither on its
neighbours nor on padding nor on its place in the batch.

B batch, P prompt tokens, N new tokens, S cache slots, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model import llama
from dpo_jax.sample import filters

PAD = 0
"""What stands in `Generation.tokens` behind the end of a row. The mask says where that is, not this value."""


class Generation(NamedTuple):
    """What `generate` returns; it unpacks as (tokens, mask, logps).

    Attributes:
      tokens: int32 [B, N]    new tokens, the terminator included.
      mask:   bool [B, N]     True at each row's own tokens, the terminator included.
      logps:  float32 [B, N]  log-probability of each token at the sampling temperature (greedy: at temperature 1),
                              before top-k and top-p; 0 behind the end.
    """

    tokens: jax.Array
    mask: jax.Array
    logps: jax.Array


class _Settings(NamedTuple):
    """Numbers of a `SampleConfig`, as arrays: changing one of them compiles nothing anew. None is off."""

    stop: Any  # int32 [stop tokens]
    limit: Any  # int32 []
    temperature: Any  # float32 []
    top_k: Any  # int32 []
    top_p: Any  # float32 []


class _Loop(NamedTuple):
    """Carry of the decoding loop. `token` [B] is the newest one, not yet in the cache; `step` tokens are drawn."""

    step: jax.Array
    token: jax.Array
    done: jax.Array
    cache: llama.Cache
    tokens: jax.Array
    mask: jax.Array
    logps: jax.Array


def bucket(length: int) -> int:
    """`length` rounded up to one of four sizes an octave (at least 16): few shapes, at most a fifth of them padding."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _decode(
    model: llama.Llama,
    new: int,
    slots: int,
    variables: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    row_ids: jax.Array,
    settings: _Settings,
) -> Generation:
    """Prefill and decode. `new` (tokens) and `slots` are static; rows of length 0 are fillers and done at once."""
    rows = prompts.shape[0]
    forward: Callable[..., Any] = model.apply
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_ids)

    def pick(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = forward(variables, hidden, method="logits")
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step)))(row_keys)
        return filters.pick(
            logits, uniform, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )

    def record(loop: _Loop, hidden: jax.Array, cache: llama.Cache) -> _Loop:
        """Draw token `loop.step` from hidden [B, D] and write it down."""
        token, logp = pick(hidden, loop.step)
        live = ~loop.done
        token = jnp.where(live, token, PAD)
        stopped = jnp.any(token[:, None] == settings.stop, axis=1)
        return _Loop(
            step=loop.step + 1,
            token=token,
            done=loop.done | stopped,
            cache=cache,
            tokens=loop.tokens.at[:, loop.step].set(token),
            mask=loop.mask.at[:, loop.step].set(live),
            logps=loop.logps.at[:, loop.step].set(jnp.where(live, logp, 0.0)),
        )

    def advance(loop: _Loop) -> _Loop:
        positions = (jnp.maximum(lengths, 1) + loop.step - 1)[:, None]
        hidden, cache = forward(variables, loop.token[:, None], positions, cache=loop.cache)
        return record(loop, hidden[:, 0], cache)

    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
    hidden, cache = forward(variables, prompts, positions, cache=llama.init_cache(model, rows, slots))
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    start = _Loop(
        step=jnp.int32(0),
        token=jnp.zeros(rows, jnp.int32),
        done=lengths == 0,
        cache=cache,
        tokens=jnp.full((rows, new), PAD, jnp.int32),
        mask=jnp.zeros((rows, new), bool),
        logps=jnp.zeros((rows, new), jnp.float32),
    )
    loop = record(start, jnp.take_along_axis(hidden, last, axis=1)[:, 0], cache)
    loop = jax.lax.while_loop(lambda loop: (loop.step < settings.limit) & ~jnp.all(loop.done), advance, loop)
    return Generation(loop.tokens, loop.mask, loop.logps)


@partial(jax.jit, static_argnames=("model", "new", "slots", "implementation", "mesh"))
def _generate(
    variables: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    key_data: jax.Array,
    row_ids: jax.Array,
    settings: _Settings,
    *,
    model: llama.Llama,
    new: int,
    slots: int,
    implementation: str,
    mesh: Mesh | None,
) -> Generation:
    key = jax.random.wrap_key_data(key_data, impl=implementation)
    generation = _decode(model, new, slots, variables, prompts, lengths, key, row_ids, settings)
    if mesh is None:
        return generation
    # Every process may read every row.
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, meshes.replicated(mesh)), generation)


def _key_data(key: jax.Array) -> tuple[np.ndarray, str]:
    """The bits of a key and the name of its generator; host bits, because every process passes the same ones."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise InputError(f"generate takes one key and got an array of keys of shape {key.shape}; use row_ids for rows")
    return np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key))


def _pad_prompts(
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array, lengths: Sequence[int] | np.ndarray | None, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32 [B, P] and lengths [B], checked; P is the longest prompt."""
    if isinstance(prompts, np.ndarray | jax.Array):
        table = np.asarray(prompts)
        if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
            raise InputError(f"prompts must be integers [B, P], and are {table.dtype} {list(table.shape)}")
        sizes = np.full(len(table), table.shape[1]) if lengths is None else np.asarray(lengths)
        if sizes.shape != (len(table),) or (sizes > table.shape[1]).any():
            raise InputError(f"prompt_lengths {sizes.tolist()} do not fit prompts of shape {list(table.shape)}")
        rows = [row[: max(size, 0)] for row, size in zip(table, sizes, strict=True)]
    else:
        if lengths is not None:
            raise InputError("prompt_lengths belongs to an array of prompts; a list of lists has its own lengths")
        rows = [np.asarray(row) for row in prompts]
    if not rows:
        raise InputError("there are no prompts to generate from")
    for i, row in enumerate(rows):
        if len(row) == 0:
            raise InputError(f"prompt {i} (from 0) is empty; give it at least one token, e.g. the BOS")
        if row.min() < 0 or row.max() >= vocab:
            raise InputError(
                f"prompt {i} (from 0) holds token id {row.max() if row.max() >= vocab else row.min()}, and the model's "
                f"vocabulary is 0..{vocab - 1}; use the model's own tokenizer"
            )
    sizes = np.asarray([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), sizes.max()), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded, sizes


def _settings(config: SampleConfig) -> _Settings:
    greedy = config.temperature == 0
    return _Settings(
        stop=np.asarray(config.stop_tokens, np.int32),
        limit=np.int32(config.max_new_tokens),
        temperature=None if greedy else np.float32(config.temperature),
        top_k=None if config.top_k is None else np.int32(min(config.top_k, 2**31 - 1)),
        top_p=None if config.top_p in (None, 1) else np.float32(config.top_p),
    )


def generate(
    model: llama.Llama,
    variables: Any,
    prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
    key: jax.Array,
    *,
    config: SampleConfig,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    row_ids: Sequence[int] | np.ndarray | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Continue each prompt by at most `config.max_new_tokens` tokens.

    Shapes are rounded up to a few sizes, so calls with prompts of similar length share one compiled program; so do
    calls that differ only in temperature, top-k, top-p, stop tokens (as many of them) or seed.

    Args:
      model, variables: from `load_pretrained`; with an `adapters` collection the adapted model generates.
      prompts: B lists of token ids, or integers [B, P] padded on the right with `prompt_lengths` [B].
      key: a JAX random key. The same key gives the same text, another key another text; greedy ignores it.
      config: see `SampleConfig`.
      row_ids: int [B], the identity of each row in the draw; default 0..B-1. The text of a row depends on the model,
        its prompt, `key` and its id, and on nothing else in the batch.
      mesh: the mesh that `variables` are laid out on; the rows are split over it.

    Returns:
      `Generation`: tokens, mask and logps [B, max_new_tokens]; the same on every process.

    Raises:
      InputError: no prompts, an empty one, ids outside the vocabulary, or more tokens than a sliding window holds.
    """
    padded, lengths = _pad_prompts(prompts, prompt_lengths, model.config.vocab_size)
    count, longest = padded.shape
    ids = np.arange(count) if row_ids is None else np.asarray(row_ids)
    if ids.shape != (count,):
        raise InputError(f"row_ids {list(ids.shape)} must be one id for each of the {count} prompts")
    window, asked = model.config.sliding_window, longest + config.max_new_tokens
    if window is not None and asked > window:
        raise InputError(
            f"a prompt of {longest} tokens and {config.max_new_tokens} new ones exceed the model's sliding window of "
            f"{window}; shorten the prompt or lower max_new_tokens"
        )
    slots = bucket(longest) + bucket(config.max_new_tokens)
    if window is not None:
        slots = min(slots, window)
    fillers = -count % (1 if mesh is None else meshes.batch_parts(mesh))
    padded = np.pad(padded, ((0, fillers), (0, min(bucket(longest), slots) - longest)))
    batch = (padded, np.pad(lengths, (0, fillers)), np.pad(ids.astype(np.uint32), (0, fillers)))
    key_data, implementation = _key_data(key)
    static = {"model": model, "new": bucket(config.max_new_tokens), "slots": slots, "implementation": implementation}
    if mesh is None:
        tokens, lengths, ids = batch
        out = _generate(variables, tokens, lengths, key_data, ids, _settings(config), mesh=None, **static)
    else:
        with jax.set_mesh(mesh):
            tokens, lengths, ids = meshes.put_batch(mesh, batch)
            out = _generate(variables, tokens, lengths, key_data, ids, _settings(config), mesh=mesh, **static)
    return Generation(*(x[:count, : config.max_new_tokens] for x in out))
