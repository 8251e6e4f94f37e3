"""The state of rows that are being written, and its three moves: begin (prefill), record (draw a token), advance.

A token at position p stands in slot p of its row's cache, so prompts of unequal length need no alignment: what the
prefill wrote behind the end of a short prompt is overwritten before any query can see it.

Token t of a row is drawn with fold_in(row key, t) and nothing else, so its text depends neither on its neighbours nor
on padding nor on its place in the batch.

B rows, P prompt tokens, N new tokens, S cache slots, V vocabulary, K samples a prompt.

(One file, though long: every move reads and writes all fields of the state.)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import mesh as meshes
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model import cache as caches, llama
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.sample import filters
from dpo_jax.sample.program import Program, Weights

PAD = 0
"""What stands in `Rows.tokens` behind the end of a row. `Rows.count` says where that is, not this value."""

SAMPLE = np.uint32(2**31)
"""Added to a sample's number before it is folded into its row's key; tokens count from 0 and stay below."""


Prompts = Sequence[Sequence[int]] | np.ndarray | jax.Array
"""Lists of token ids, or integers [B, P], right-padded."""


class Settings(NamedTuple):
    """Numbers of a `SampleConfig`, as arrays: changing one of them compiles nothing anew. None is off.

    Each stands for all rows, or has B in front and stands for one; then numbers that meet logits are [B, 1].
    """

    stop: Any  # int32 [stop tokens]
    vocabulary: Any  # int32 []; ids from it on are never drawn
    limit: Any  # int32 []
    temperature: Any  # float32 []; among rows of their own 0 is greedy
    top_k: Any  # int32 []
    top_p: Any  # float32 []
    min_p: Any  # float32 []
    adjustments: filters.Adjustments | None


class Rows(NamedTuple):
    """Rows that are being written; row i has `count[i]` new tokens, the newest of which is not yet in the cache.

    Attributes:
      count:   int32 [B]       new tokens so far.
      done:    bool [B]        nothing more will be drawn; also rows that nobody uses.
      lengths: int32 [B]       prompt tokens; 0 in rows that nobody uses.
      keys:    uint32 [B, W]   each row's own key, as bits.
      tokens:  int32 [B, N]    the new tokens.
      logps:   float32 [B, N]  their log-probabilities at the sampling temperature (greedy: at 1), before the filters.
      plain:   float32 [B, N]  the same at temperature 1; None where nobody asked.
      text:    int32 [B, S]    prompt and new tokens; None where no filter reads them.
      seen:    bool [B, V]     the tokens that occur there; likewise.
      cache:   keys and values.
    """

    count: jax.Array
    done: jax.Array
    lengths: jax.Array
    keys: jax.Array
    tokens: jax.Array
    logps: jax.Array
    plain: jax.Array | None
    text: jax.Array | None
    seen: jax.Array | None
    cache: caches.Caches


def bucket(length: int) -> int:
    """`length` rounded up to one of four sizes an octave (at least 16): few shapes, at most a fifth of them padding."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def settings(config: SampleConfig, vocab: int, vocabulary: int | None = None) -> Settings:
    """The numbers of `config` for a model of `vocab` ids, of which those below `vocabulary` stand for text.

    Raises `InputError` for ids outside them.
    """
    if vocabulary is not None and not 1 <= vocabulary <= vocab:
        raise InputError(f"vocabulary {vocabulary} must lie in [1, {vocab}], the rows of the model's embedding")
    ids = vocab if vocabulary is None else vocabulary
    greedy = config.temperature == 0
    stop = np.asarray(config.stop_tokens, np.int32)
    bias = None
    if config.logit_bias:
        bias = np.zeros(vocab, np.float32)
        for token, value in config.logit_bias:
            if token >= ids:
                raise InputError(f"logit_bias names token id {token}, and the model's vocabulary is 0..{ids - 1}")
            bias[token] = value
    adjustments = filters.Adjustments(
        bias=bias,
        repetition=None if config.repetition_penalty in (None, 1) else np.float32(config.repetition_penalty),
        ngram=None if config.no_repeat_ngram is None else np.int32(config.no_repeat_ngram),
        min_new=np.int32(config.min_new_tokens) if config.min_new_tokens and len(stop) else None,
        stop=stop,
    )
    return Settings(
        stop=stop,
        vocabulary=None if ids == vocab else np.int32(ids),
        limit=np.int32(config.max_new_tokens),
        temperature=None if greedy else np.float32(config.temperature),
        top_k=None if config.top_k is None else np.int32(min(config.top_k, 2**31 - 1)),
        top_p=None if config.top_p in (None, 1) else np.float32(config.top_p),
        min_p=None if config.min_p is None else np.float32(config.min_p),
        adjustments=adjustments if any(x is not None for x in adjustments[:-1]) else None,
    )


def pad_prompts(
    prompts: Prompts, lengths: Sequence[int] | np.ndarray | None, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32 [B, P] and lengths [B], checked; P is the longest prompt. Raises `InputError`."""
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


def limits(architecture: LlamaConfig) -> dict[str, int]:
    """How many tokens a sequence may have, by what limits it."""
    scaling = architecture.rope_scaling
    found = {"context": architecture.max_position}
    if scaling is not None and scaling.follows_length:  # beyond it other frequencies hold, in the cache too
        found["original context, beyond which its RoPE is another,"] = scaling.original_max_position
    return found


def check_context(architecture: LlamaConfig, prompt: int, config: SampleConfig) -> None:
    """Raise `InputError` where a prompt of `prompt` tokens and all new ones exceed what the model was made for."""
    for name, limit in limits(architecture).items():
        if prompt + config.max_new_tokens > limit:
            room = limit - prompt
            mend = f"lower max_new_tokens to at most {room} or shorten the prompt" if room > 0 else "shorten the prompt"
            raise InputError(
                f"a prompt of {prompt} tokens and {config.max_new_tokens} new ones exceed the model's {name} of {limit}"
                f" tokens; {mend}"
            )


def count_slots(model: llama.Llama, longest: int, config: SampleConfig) -> int:
    """Cache slots a row for prompts of at most `longest` tokens. Raises `InputError` where they do not fit the model.

    Every way to generate asks here, so none goes beyond the context.
    """
    check_context(model.config, longest, config)
    window = model.config.sliding_window
    slots = bucket(longest) + bucket(config.max_new_tokens)
    if window is None or longest + config.max_new_tokens > window:
        return slots
    return min(slots, window)


def batch_of(
    program: Program, prompts: Prompts, lengths: Sequence[int] | np.ndarray | None, config: SampleConfig
) -> tuple[np.ndarray, np.ndarray, int]:
    """(prompts int32 [B, P], lengths int32 [B], slots), with fillers of length 0 up to what the mesh splits.

    Raises `InputError` for prompts that are none, or do not fit the model.
    """
    table, sizes = pad_prompts(prompts, lengths, program.model.config.vocab_size)
    count, longest = table.shape
    slots = count_slots(program.model, longest, config)
    fillers = -count % meshes.batch_parts(program.mesh)
    table = np.pad(table, ((0, fillers), (0, min(bucket(longest), slots) - longest)))
    return table, np.pad(sizes, (0, fillers)), slots


def width_of(longest: int, slots: int) -> int:
    """Places for prompts of at most `longest` tokens that join others: few widths, for each is compiled."""
    return min(max(16, 1 << (longest - 1).bit_length()), slots)


def key_data(key: jax.Array) -> tuple[np.ndarray, str]:
    """The bits of a key and the name of its generator; host bits, because every process passes the same ones."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise InputError(f"generate takes one key and got an array of keys of shape {key.shape}; use row_ids for rows")
    return np.asarray(jax.random.key_data(key)), str(jax.random.key_impl(key))


def row_keys(key: jax.Array, row_ids: jax.Array, samples: jax.Array) -> jax.Array:
    """Bits uint32 [B, W] of each row's key. Sample 0 of a row draws what the row draws that has no other sample."""

    def one(row: jax.Array, sample: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, row)
        further = jax.random.key_data(jax.random.fold_in(own, SAMPLE + sample))
        return jnp.where(sample == 0, jax.random.key_data(own), further)

    return jax.vmap(one)(row_ids.astype(jnp.uint32), samples.astype(jnp.uint32))


def empty(
    program: Program, settings: Settings, *, rows: int, new: int, slots: int, key_words: int, plain: bool
) -> Rows:
    """Rows of which none is in use."""
    how = settings.adjustments
    cache = caches.init_cache(program.model.config, rows, slots, program.cache)
    return Rows(
        count=jnp.zeros(rows, jnp.int32),
        done=jnp.ones(rows, bool),
        lengths=jnp.zeros(rows, jnp.int32),
        keys=jnp.zeros((rows, key_words), jnp.uint32),
        tokens=jnp.full((rows, new), PAD, jnp.int32),
        logps=jnp.zeros((rows, new), jnp.float32),
        plain=jnp.zeros((rows, new), jnp.float32) if plain else None,
        text=jnp.zeros((rows, slots), jnp.int32) if how is not None and how.ngram is not None else None,
        seen=jnp.zeros((rows, program.model.config.vocab_size), bool)
        if how is not None and how.repetition is not None
        else None,
        cache=caches.unstack(cache) if program.unrolled else cache,
    )


class Decoder:
    """The moves, for one model, its weights and settings; used inside jitted functions."""

    def __init__(self, program: Program, weights: Weights, settings: Settings):
        self.program, self.weights, self.settings = program, weights, settings

    def prefill(self, prompts: jax.Array, lengths: jax.Array, slots: int) -> tuple[jax.Array, caches.Caches]:
        """float32 [B, V], the logits behind each prompt [B, P], and a cache that holds it."""
        cache: Any = caches.init_cache(self.program.model.config, len(prompts), slots, self.program.cache)
        apply: Any = partial(self.program.model.apply, self.weights.prompt)
        hidden, cache = apply(prompts, cache=cache)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        logits = apply(jnp.take_along_axis(hidden, last, axis=1)[:, 0], method="logits")
        return self._of_text(logits), caches.unstack(cache) if self.program.unrolled else cache

    def _of_text(self, logits: jax.Array) -> jax.Array:
        """The logits [B, V] of tokens that are text: what a padded embedding has behind them is never drawn."""
        size = self.settings.vocabulary
        return logits if size is None else jnp.where(jnp.arange(logits.shape[-1]) < size, logits, -jnp.inf)

    def step(self, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """float32 [B, V], the logits behind one more token a row, written to slot `positions` [B]; and the cache."""
        model = self.program.model.clone(unrolled=self.program.unrolled)
        apply: Any = partial(model.apply, self.weights.token)
        hidden, cache = apply(tokens[:, None], positions[:, None], cache=cache)
        return self._of_text(apply(hidden[:, 0], method="logits")), cache

    def begin(self, prompts: jax.Array, lengths: jax.Array, keys: jax.Array, **size: Any) -> Rows:
        """`fresh` rows with one token each."""
        return self.record(*self.fresh(prompts, lengths, keys, **size))

    def fresh(
        self,
        prompts: jax.Array,
        lengths: jax.Array,
        keys: jax.Array,
        *,
        samples: int,
        new: int,
        slots: int,
        plain: bool,
    ) -> tuple[Rows, jax.Array]:
        """B x K rows (the K samples of a prompt side by side) and the logits [B K, V] behind their prompts.

        The prompt is computed once.

        Args:
          prompts: int32 [B, P]; lengths: int32 [B], 0 in rows that nobody uses.
          keys: uint32 [B x K, W].
          new, slots: N and S.
        """
        logits, cache = self.prefill(prompts, lengths, slots)

        def copies(x: jax.Array, axis: int = 0) -> jax.Array:
            return x if samples == 1 else jnp.repeat(x, samples, axis=axis)

        rows = empty(
            self.program,
            self.settings,
            rows=len(prompts) * samples,
            new=new,
            slots=slots,
            key_words=keys.shape[1],
            plain=plain,
        )
        text, seen, at = rows.text, rows.seen, jnp.arange(len(prompts))[:, None]
        if text is not None:
            text = copies(jnp.pad(prompts, ((0, 0), (0, slots - prompts.shape[1]))))
        if seen is not None:
            real = jnp.arange(prompts.shape[1]) < lengths[:, None]
            seen = copies(jnp.zeros((len(prompts), seen.shape[1]), bool).at[at, prompts].max(real))
        lengths = copies(lengths)
        rows = rows._replace(
            done=lengths == 0,
            lengths=lengths,
            keys=keys,
            text=text,
            seen=seen,
            cache=caches.map_rows(copies, cache),
        )
        return rows, copies(logits)

    def record(self, rows: Rows, logits: jax.Array) -> Rows:
        """Draw the next token of every row that is not done from logits [B, V], and write it down."""
        s, live, adjusted = self.settings, ~rows.done, None
        if s.adjustments is not None:
            text = {"lengths": rows.lengths + rows.count, "seen": rows.seen, "text": rows.text}
            adjusted = filters.adjust(logits, s.adjustments, count=rows.count, **text)

        def noise(bits: jax.Array, count: jax.Array) -> jax.Array:
            key = jax.random.wrap_key_data(bits, impl=self.program.implementation)
            return filters.draw_noise(jax.random.fold_in(key, count), logits.shape[-1])

        token, logp = filters.pick(
            logits,
            jax.vmap(noise)(rows.keys, rows.count),
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            adjusted=adjusted,
        )
        plain, text, seen = rows.plain, rows.text, rows.seen

        def put(x: jax.Array, place: jax.Array, value: jax.Array) -> jax.Array:
            """`value` [B] at `place` [B] of x [B, N] in rows that live; no scatter: over devices it would gather."""
            here = live[:, None] & (jnp.arange(x.shape[1]) == place[:, None])
            return jnp.where(here, value[:, None], x)

        if plain is not None:
            plain = put(plain, rows.count, filters.token_logps(logits, token, jnp.float32(1)))
        if text is not None:
            text = put(text, rows.lengths + rows.count, token)
        if seen is not None:
            seen = put(seen, token, live)
        count = rows.count + live
        stopped = jnp.any(token[:, None] == s.stop, axis=1)
        return rows._replace(
            count=count,
            done=rows.done | stopped | (count >= s.limit),
            tokens=put(rows.tokens, rows.count, token),
            logps=put(rows.logps, rows.count, logp),
            plain=plain,
            text=text,
            seen=seen,
        )

    def following(self, rows: Rows) -> tuple[Rows, jax.Array]:
        """Rows whose newest token is in the cache, and the logits [B, V] behind it."""
        newest = jnp.maximum(rows.count - 1, 0)
        token = jnp.take_along_axis(rows.tokens, newest[:, None], axis=1)[:, 0]
        logits, cache = self.step(token, rows.lengths + newest, rows.cache)
        return rows._replace(cache=cache), logits

    def advance(self, rows: Rows) -> Rows:
        """One more token in every row that is not done."""
        return self.record(*self.following(rows))


def everywhere(program: Program, tree: Any) -> Any:
    """Arrays that every process may read whole."""
    if program.mesh is None:
        return tree
    where = meshes.replicated(program.mesh)
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, where), tree)


def place(rows: Rows, fresh: Rows, at: jax.Array) -> Rows:
    """`rows` with those of `fresh`, which has no more slots, in the places `at` int32 [K]; B there means nowhere."""

    def put(old: jax.Array, value: jax.Array) -> jax.Array:
        return old.at[at].set(value, mode="drop")

    if rows.text is not None:
        assert fresh.text is not None
        fresh = fresh._replace(text=jnp.pad(fresh.text, ((0, 0), (0, rows.text.shape[1] - fresh.text.shape[1]))))

    def put_slots(old: jax.Array, value: jax.Array, axis: int) -> jax.Array:
        return old.at[(slice(None),) * axis + (at, slice(None), slice(value.shape[axis + 2]))].set(value, mode="drop")

    cache = caches.map_rows(put_slots, rows.cache, fresh.cache)
    rest = jax.tree.map(put, rows._replace(cache=None), fresh._replace(cache=None))
    return rest._replace(cache=cache)


def constrain(rows: Rows) -> Rows:
    """Lay rows out over the mesh in force: the rows are split."""
    cache = caches.constrain(rows.cache)
    rest = jax.tree.map(lambda x: meshes.constrain(x, meshes.batch_axes(x.ndim)), rows._replace(cache=None))
    return rest._replace(cache=cache)
