"""Generation for requests that come while others are being written: the rows of a batch, each with settings of its own.

`Live` holds B rows on the devices. `admit` prefills a prompt into free rows, `run` lets all rows advance by a few
tokens. What a request says depends on its prompt, its key and its settings, and on nothing that stands beside it.

B rows, K samples of one prompt, E stop tokens, S slots of cache, which grow as longer requests come, T alternatives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model import cache as caches, llama
from dpo_jax.sample import decode
from dpo_jax.sample.program import Program, Weights, make_weights

ALTERNATIVES = 20
"""T: of so many tokens the log-probabilities are kept where a request asks for them."""

_FIRST_SLOTS = 256


@dataclass(frozen=True)
class Settings:
    """How one request draws; the filters are those of `SampleConfig`, with what switches them off in place of None."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 2**31 - 1
    top_p: float = 1.0
    min_p: float = 0.0
    stop_tokens: tuple[int, ...] = ()
    alternatives: bool = False
    """Whether the likeliest tokens of every place are wanted."""


class Tops(NamedTuple):
    """The likeliest tokens of every place, int32 and float32 [B, N, T], at temperature 1 and before all filters."""

    tokens: jax.Array
    logps: jax.Array


class State(NamedTuple):
    """What lies on the devices; without the likeliest tokens where nobody will ask for them."""

    rows: decode.Rows
    tops: Tops | None


class View(NamedTuple):
    """What the host sees of all rows.

    Attributes:
      count: int32 [B]       new tokens so far.
      done:  bool [B]        nothing more will be drawn.
      tokens: int32 [B, N]   the new tokens.
      logps: float32 [B, N]  their log-probabilities before all filters: at temperature 1 where rows have those, else at
             the temperature of the draw.
      tops:  of all rows, where one of them asked for them.
    """

    count: Any
    done: Any
    tokens: Any
    logps: Any
    tops: Tops | None


def _constrain(state: State) -> State:
    tops = jax.tree.map(lambda x: meshes.constrain(x, meshes.batch_axes(x.ndim)), state.tops)
    return State(decode.constrain(state.rows), tops)


def _tops(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The T likeliest tokens [B, T] (fewer where the vocabulary has fewer) and their log-probabilities."""
    logps, tokens = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), min(ALTERNATIVES, logits.shape[-1]))
    return tokens, logps


@partial(jax.jit, static_argnames=("program", "rows", "new", "slots", "key_words", "plain"))
def empty(
    settings: decode.Settings, *, program: Program, rows: int, new: int, slots: int, key_words: int, plain: bool
) -> State:
    """Rows that nobody uses; `plain`: with log-probabilities at temperature 1, and the likeliest tokens."""
    made = decode.empty(program, settings, rows=rows, new=new, slots=slots, key_words=key_words, plain=plain)
    shape = (rows, new, min(ALTERNATIVES, program.model.config.vocab_size))
    tops = Tops(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)) if plain else None
    return _constrain(State(made, tops))


@partial(jax.jit, static_argnames=("program", "slots"))
def _grow(state: State, *, program: Program, slots: int) -> State:
    """The same rows with `slots` of cache, and room for as many tokens."""

    def wider(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots - size if i == axis else 0) for i, size in enumerate(x.shape)])

    rows, tops = state
    assert rows.plain is not None
    assert tops is not None
    rows = rows._replace(
        tokens=wider(rows.tokens, 1),
        logps=wider(rows.logps, 1),
        plain=wider(rows.plain, 1),
        cache=caches.map_rows(lambda x, axis: wider(x, axis + 2), rows.cache),
    )
    return _constrain(State(rows, Tops(*(wider(x, 1) for x in tops))))


@partial(jax.jit, static_argnames=("program",), donate_argnums=0)
def admit(
    state: State,
    weights: Weights,
    prompts: jax.Array,
    lengths: jax.Array,
    targets: jax.Array,
    keys: jax.Array,
    settings: decode.Settings,
    *,
    program: Program,
) -> State:
    """Prompts [G, P], each computed once, into the rows `targets` [G K] (B: nowhere), with the keys [G K, W]."""
    decoder = decode.Decoder(program, weights, settings)
    fresh, logits = decoder.fresh(
        prompts,
        lengths,
        keys,
        samples=len(targets) // len(prompts),
        new=state.rows.tokens.shape[1],
        slots=prompts.shape[1],
        plain=state.rows.plain is not None,
    )
    rows, tops = decode.place(state.rows, decoder.record(fresh, logits), targets), state.tops
    if tops is not None:
        tops = Tops(*(old.at[targets, 0].set(new, mode="drop") for old, new in zip(tops, _tops(logits), strict=True)))
    return _constrain(State(rows, tops))


@partial(jax.jit, static_argnames=("program", "alternatives"), donate_argnums=0)
def run(
    state: State,
    weights: Weights,
    ended: jax.Array,
    steps: jax.Array,
    wanted: jax.Array | None,
    settings: decode.Settings,
    *,
    program: Program,
    alternatives: bool = False,
) -> tuple[State, View]:
    """At most `steps` tokens a row, until `wanted` rows are done, or one more than before where nobody says how many.

    `ended` bool [B] were ended by the host.
    """
    decoder = decode.Decoder(program, weights, settings)
    state = _constrain(state._replace(rows=state.rows._replace(done=state.rows.done | ended)))
    until = jnp.minimum(jnp.sum(state.rows.done) + 1, len(state.rows.done)) if wanted is None else wanted

    def more(loop: tuple[jax.Array, State]) -> jax.Array:
        step, state = loop
        return (step < steps) & (jnp.sum(state.rows.done) < until)

    def body(loop: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        step, (rows, tops) = loop
        rows, logits = decoder.following(rows)
        if alternatives and tops is not None:
            at, column = jnp.arange(len(rows.count)), jnp.where(rows.done, rows.tokens.shape[1], rows.count)
            tops = Tops(*(x.at[at, column].set(new, mode="drop") for x, new in zip(tops, _tops(logits), strict=True)))
        return step + 1, State(decoder.record(rows, logits), tops)

    _, state = jax.lax.while_loop(more, body, (jnp.int32(0), state))
    rows, tops = state
    logps = rows.logps if rows.plain is None else rows.plain
    view = View(rows.count, rows.done, rows.tokens, logps, tops if alternatives else None)
    return _constrain(state), decode.everywhere(program, view)


class Live:
    """B rows of one model. Not for several threads."""

    def __init__(
        self,
        model: llama.Llama,
        variables: Any,
        *,
        rows: int,
        longest: int | None = None,
        vocabulary: int | None = None,
        config: SampleConfig | None = None,
        mesh: Mesh | None = None,
    ):
        """Args:
        model, variables, mesh: as for `engine.generate`.
        rows: B, rounded up to what the mesh splits.
        longest: prompt and new tokens of a request have at most so many tokens together; not given: the context.
        vocabulary: ids from here on are never drawn.
        config: `weights`, `layout` and `cache` of it say what is read, where, and kept in fewer bits.
        """
        if rows < 1:
            raise InputError(f"rows {rows} must be at least 1")
        config = SampleConfig() if config is None else config
        bits, implementation = decode.key_data(jax.random.key(0))
        self._program = Program.of(model, config, implementation, mesh, variables)
        mesh = self._program.mesh
        self.model, self.mesh = model, mesh
        self._parts = meshes.batch_parts(mesh)
        self.size = -(-rows // self._parts) * self._parts
        limits = (*decode.limits(model.config).values(), longest)
        self.longest = min(limit for limit in limits if limit is not None)
        self._vocabulary = vocabulary
        with meshes.in_force(mesh):
            self._weights = make_weights(self._program, variables, config.weights)
        self._words = len(bits)
        self._settings: list[Settings | None] = [None] * self.size
        self._ended = np.zeros(self.size, bool)
        self._slots = 0
        self._state: State | None = None

    @property
    def free(self) -> list[int]:
        """Rows that nobody uses."""
        return [i for i, settings in enumerate(self._settings) if settings is None]

    def release(self, row: int) -> None:
        """Nobody uses `row` any more."""
        self._settings[row], self._ended[row] = None, True

    def admit(self, prompt: Sequence[int], samples: Sequence[int], seed: int, settings: Settings) -> list[int]:
        """Begin a response for each number in `samples` (it and the seed decide its draw), and return their rows.

        The prompt is computed once for all of them; so many rows must be free. Raises `InputError` for a prompt that is
        empty, too long with all new tokens, or has ids outside the vocabulary.
        """
        table, _ = decode.pad_prompts([prompt], None, self.model.config.vocab_size)
        if len(prompt) + settings.max_new_tokens > self.longest:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {settings.max_new_tokens} new ones exceed the {self.longest} "
                "that the model is served with"
            )
        self._make_room(len(prompt) + settings.max_new_tokens)
        assert self._state is not None
        targets = self.free[: len(samples)]
        assert len(targets) == len(samples), "the caller looks for free rows"
        prompts = np.zeros((self._parts, decode.width_of(len(prompt), self._slots)), np.int32)
        prompts[0, : len(prompt)] = table[0]
        lengths = np.zeros(self._parts, np.int32)
        lengths[0] = len(prompt)
        everyone = self._parts * len(samples)
        where = np.full(everyone, self.size, np.int32)
        where[: len(samples)] = targets
        own = decode.row_keys(jax.random.key(seed), jnp.zeros(len(samples), jnp.uint32), jnp.asarray(samples))
        keys = np.zeros((everyone, self._words), np.uint32)
        keys[: len(samples)] = np.asarray(own)
        with meshes.in_force(self.mesh):
            arrays = meshes.put_batch(self.mesh, (prompts, lengths, where, keys, self._arrays([settings] * everyone)))
            self._state = admit(self._state, self._weights, *arrays, program=self._program)
        for row in targets:
            self._settings[row], self._ended[row] = settings, False
        return targets

    def run(self, steps: int) -> View:
        """At most `steps` more tokens in each row, fewer where a row is done before; what all rows hold now."""
        assert self._state is not None, "nothing was admitted"
        alternatives = any(s is not None and s.alternatives for s in self._settings)
        with meshes.in_force(self.mesh):
            ended, settings = meshes.put_batch(self.mesh, (self._ended, self._arrays(self._settings)))
            self._state, view = run(
                self._state,
                self._weights,
                ended,
                np.int32(steps),
                None,
                settings,
                program=self._program,
                alternatives=alternatives,
            )
        return jax.tree.map(np.asarray, view)

    def _make_room(self, needed: int) -> None:
        """Slots for a request of `needed` tokens: twice as many as before, until it fits."""
        slots = max(self._slots, _FIRST_SLOTS)
        while slots < needed:
            slots *= 2
        slots = min(slots, decode.bucket(self.longest))
        with meshes.in_force(self.mesh):
            if self._state is None:
                size = {"rows": self.size, "new": slots, "slots": slots, "key_words": self._words, "plain": True}
                self._state = empty(self._arrays(self._settings), program=self._program, **size)
            elif slots > self._slots:
                self._state = _grow(self._state, program=self._program, slots=slots)
        self._slots = slots

    def _arrays(self, rows: Sequence[Settings | None]) -> decode.Settings:
        """The settings of all rows. A filter that no row has on is left out, which changes no row's text."""
        some = [Settings(1) if s is None else s for s in rows]
        width = max(1, 1 << (max(len(s.stop_tokens) for s in some) - 1).bit_length())
        stop = np.full((len(some), width), -1, np.int32)
        for i, s in enumerate(some):
            stop[i, : len(s.stop_tokens)] = s.stop_tokens

        def column(name: str, off: float, kind: Any) -> Any:
            values = np.asarray([[getattr(s, name)] for s in some], kind)
            return None if (values == off).all() else values

        return decode.Settings(
            stop=stop,
            vocabulary=None if self._vocabulary is None else np.full((len(some), 1), self._vocabulary, np.int32),
            limit=np.asarray([s.max_new_tokens for s in some], np.int32),
            temperature=column("temperature", 0.0, np.float32),
            top_k=column("top_k", 2**31 - 1, np.int32),
            top_p=column("top_p", 1.0, np.float32),
            min_p=column("min_p", 0.0, np.float32),
            adjustments=None,
        )
