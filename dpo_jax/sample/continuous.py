"""Generation for more requests than rows: a row that is done makes room for the next request (continuous batching).

The host drives: it prefills some prompts into free rows of the cache, lets all rows advance on the devices until enough
of them are free again, collects what is finished, and goes on (the moves are those of `live.py`). A request's text is
that of `engine.generate` for the same prompt, key, row id and sample number, whatever row it gets and whoever stands
beside it.

B rows, G prompts that begin together, K samples of one prompt that do, N new tokens, S cache slots.
"""

from collections.abc import Callable, Iterator, Sequence
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
from dpo_jax.model import llama
from dpo_jax.sample import decode
from dpo_jax.sample.live import State, admit, empty, run
from dpo_jax.sample.program import Program, Weights, make_weights

CHUNK = 64
"""Tokens a row after which the host looks, if no room was made before."""

WATCHED_CHUNK = 8
"""The same where the host must look for ends in the text."""

Request = tuple[int, int]
"""Index of a prompt (it is the row id of the draw, too) and number of the sample."""


class Finished(NamedTuple):
    """What `serve` yields.

    Attributes:
      request: which one.
      tokens:  the new tokens, the terminator included.
      logps:   the model's log-probability of each at the sampling temperature (greedy: at 1), before all filters.
    """

    request: Request
    tokens: list[int]
    logps: list[float]


@partial(jax.jit, static_argnames=("program",))
def _keys(key_data: jax.Array, ids: jax.Array, numbers: jax.Array, *, program: Program) -> jax.Array:
    """uint32 [G K, W]: the key of each row that `ids` [G] and `numbers` [G, K] (row ids and samples) name."""
    key = jax.random.wrap_key_data(key_data, impl=program.implementation)
    return decode.row_keys(key, jnp.repeat(ids, numbers.shape[1]), numbers.reshape(-1))


def _units(requests: Sequence[Request], width: int) -> list[tuple[int, list[int]]]:
    """(prompt, at most `width` of its samples), the requests of a prompt together, in order of first appearance."""
    samples: dict[int, list[int]] = {}
    for prompt, number in requests:
        samples.setdefault(prompt, []).append(number)
    return [(p, s[i : i + width]) for p, s in samples.items() for i in range(0, len(s), width)]


def _groups(model: llama.Llama, sizes: Sequence[int], units: Any, config: SampleConfig) -> Iterator[tuple[int, Any]]:
    """(slots, units), long prompts first; no unit has more than twice the slots that it needs."""
    group: list[Any] = []
    slots = 0
    for unit in sorted(units, key=lambda unit: -sizes[unit[0]]):
        needed = decode.count_slots(model, sizes[unit[0]], config)
        if group and 2 * needed < slots:
            yield slots, group
            group = []
        slots = slots if group else needed
        group.append(unit)
    if group:
        yield slots, group


def serve(
    model: llama.Llama,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    config: SampleConfig,
    requests: Sequence[Request],
    rows: int,
    ended: Callable[[Request, list[int]], int | None] | None = None,
    vocabulary: int | None = None,
    mesh: Mesh | None = None,
) -> Iterator[list[Finished]]:
    """Answer `requests`, some at a time as they are finished (so not in their order).

    Args:
      model, variables, prompts, key, config, vocabulary, mesh: as in `engine.generate`; the row id of a prompt is its
        index.
      requests: (prompt, sample) pairs, all different. Samples of a prompt share its prefill, as many as there are rows.
      rows: B, how many are written at once (rounded up to what the mesh splits).
      ended: looks at a request's tokens so far, every few tokens, and returns how many of them are its whole answer, or
        None as long as it goes on. The row then stops. For ends that only the text shows.

    Raises:
      InputError: as `engine.generate`; before the first token, for prompts of all requests.
    """
    if config.beams is not None:
        raise InputError("beams draw nothing: call dpo_jax.sample.beam_search, or leave beams out")
    if config.stop_strings and ended is None:
        raise InputError("stop_strings need a tokenizer: use dpo-jax generate, or stop_tokens here")
    if rows < 1:
        raise InputError(f"rows {rows} must be at least 1")
    bits, implementation = decode.key_data(key)
    program = Program.of(model, config, implementation, mesh, variables)
    table, lengths = decode.pad_prompts(prompts, None, model.config.vocab_size)
    rows = min(rows, max(len(requests), 1))
    rows += -rows % meshes.batch_parts(program.mesh)
    with meshes.in_force(program.mesh):
        weights = make_weights(program, variables, config.weights)
    units, settings = _units(requests, rows), decode.settings(config, model.config.vocab_size, vocabulary)
    new = decode.bucket(config.max_new_tokens)
    for slots, group in _groups(model, lengths.tolist(), units, config):
        yield from _Batch(program, weights, table, lengths, bits, settings, new, rows, slots).work(group, ended)


@dataclass
class _Batch:
    """The rows on the devices, and who has which. `table`, `lengths`: all prompts; `bits`: of the key."""

    program: Program
    weights: Weights
    table: np.ndarray
    lengths: np.ndarray
    bits: np.ndarray
    settings: decode.Settings
    new: int
    rows: int
    slots: int

    def __post_init__(self) -> None:
        self.owner: list[Request | None] = [None] * self.rows

    def work(
        self, units: list[tuple[int, list[int]]], ended: Callable[[Request, list[int]], int | None] | None
    ) -> Iterator[list[Finished]]:
        """Answer all units."""
        width = max(len(samples) for _, samples in units)
        # Waiting until a quarter of the rows is free keeps seven eighths of them busy, and prefills some at once.
        together = max(1, self.rows // (4 * width))
        waiting = list(reversed(units))
        with meshes.in_force(self.program.mesh):
            size = {"rows": self.rows, "new": self.new, "slots": self.slots, "key_words": len(self.bits)}
            state = empty(self.settings, program=self.program, plain=False, **size)
        stop = np.zeros(self.rows, bool)
        while waiting or any(owner is not None for owner in self.owner):
            while waiting:
                following = waiting[-together:][::-1]
                if self.owner.count(None) < sum(len(samples) for _, samples in following):
                    break
                del waiting[-together:]
                state = self._admit(state, following, together, width)
                stop[[i for i, owner in enumerate(self.owner) if owner is not None]] = False
            following = waiting[-together:]
            wanted = sum(len(samples) for _, samples in following) if following else self.rows
            with meshes.in_force(self.program.mesh):
                state, view = run(
                    state,
                    self.weights,
                    meshes.put_batch(self.program.mesh, stop),
                    np.int32(CHUNK if ended is None else WATCHED_CHUNK),
                    np.int32(wanted),
                    self.settings,
                    program=self.program,
                )
            count, done, tokens, logps, _ = jax.tree.map(np.asarray, view)
            finished = []
            for i, owner in enumerate(self.owner):
                if owner is None:
                    continue
                text = tokens[i, : count[i]].tolist()
                size = None if ended is None else ended(owner, text)
                if size is None and not done[i]:
                    continue
                size = len(text) if size is None else size
                finished.append(Finished(owner, text[:size], logps[i, :size].tolist()))
                self.owner[i], stop[i] = None, True
            if finished:
                yield finished

    def _admit(self, state: State, units: list[tuple[int, list[int]]], together: int, width: int) -> State:
        """Give each sample of the units a free row, and prefill them."""
        size = together + -together % meshes.batch_parts(self.program.mesh)
        longest = max(int(self.lengths[prompt]) for prompt, _ in units)
        prompts = np.zeros((size, decode.width_of(longest, self.slots)), np.int32)
        lengths, ids = np.zeros(size, np.int32), np.zeros(size, np.uint32)
        targets, numbers = np.full((size, width), self.rows, np.int32), np.zeros((size, width), np.uint32)
        free = [i for i, owner in enumerate(self.owner) if owner is None]
        for g, (prompt, samples) in enumerate(units):
            lengths[g], ids[g] = self.lengths[prompt], prompt
            prompts[g, : lengths[g]] = self.table[prompt, : lengths[g]]
            for k, sample in enumerate(samples):
                row = free.pop(0)
                self.owner[row] = (prompt, sample)
                targets[g, k], numbers[g, k] = row, sample
        with meshes.in_force(self.program.mesh):
            prompts, lengths, ids, numbers = meshes.put_batch(self.program.mesh, (prompts, lengths, ids, numbers))
            keys = _keys(self.bits, ids, numbers, program=self.program)
            where = meshes.put_batch(self.program.mesh, targets.reshape(-1))
            batch = (prompts, lengths, where, keys, self.settings)
            return admit(state, self.weights, *batch, program=self.program)
