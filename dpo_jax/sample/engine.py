"""Batched generation as one program: a prefill over the prompts, then a `while_loop` of single tokens.

Row i draws with fold_in(key, row_ids[i]); see `sample/decode.py` for what makes a row independent of all others.

B batch, P prompt tokens, N new tokens, S cache slots, V vocabulary, K samples a prompt.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Required, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model import llama
from dpo_jax.sample import decode
from dpo_jax.sample.mixture import MixedDecoder
from dpo_jax.sample.program import Program, Weights, make_weights

PAD = decode.PAD
bucket = decode.bucket


class Generation(NamedTuple):
    """What `generate` returns; it unpacks as (tokens, mask, logps).

    Attributes:
      tokens: int32 [B K, N]    new tokens, the terminator included.
      mask:   bool [B K, N]     True at each row's own tokens, the terminator included.
      logps:  float32 [B K, N]  the model's log-probability of each token at the sampling temperature (greedy: at 1),
                                before all filters; 0 behind the end.
    """

    tokens: jax.Array
    mask: jax.Array
    logps: jax.Array


@partial(jax.jit, static_argnames=("program", "new", "slots", "samples", "plain"))
def _generate(
    weights: Weights,
    prompts: jax.Array,
    lengths: jax.Array,
    key_data: jax.Array,
    row_ids: jax.Array,
    settings: decode.Settings,
    other: Weights | None = None,
    share: jax.Array | None = None,
    *,
    program: Program,
    new: int,
    slots: int,
    samples: int,
    plain: bool,
) -> tuple[Generation, jax.Array | None]:
    """Prefill and decode. Rows of length 0 are fillers and done at once. `other`, `share`: see `generate_mixture`."""
    key = jax.random.wrap_key_data(key_data, impl=program.implementation)
    numbers = jnp.tile(jnp.arange(samples), len(prompts))
    keys = decode.row_keys(key, jnp.repeat(row_ids, samples), numbers)
    decoder = decode.Decoder(program, weights, settings)
    if other is not None and share is not None:
        decoder = MixedDecoder(program, weights, other, share, settings)
    rows = decoder.begin(prompts, lengths, keys, samples=samples, new=new, slots=slots, plain=plain)
    rows = decode.constrain(rows)
    rows = jax.lax.while_loop(lambda rows: ~jnp.all(rows.done), decoder.advance, rows)
    mask = jnp.arange(new) < rows.count[:, None]
    return decode.everywhere(program, (Generation(rows.tokens, mask, rows.logps), rows.plain))


class Options(TypedDict, total=False):
    """What `generate` and its relatives take beside the model, prompts and a key.

    config: see `SampleConfig`.
    prompt_lengths: [B], where the prompts are one array.
    row_ids: int [B], the identity of each row in the draw; default 0..B-1. The text of a row depends on the model, its
      prompt, the key and its id, and on nothing else in the batch.
    samples: K continuations of each prompt, which is computed once for all of them; rows i K to i K + K - 1 are those
      of prompt i. The first of them is what K = 1, the default, gives.
    vocabulary: ids from here on are never drawn, and have no part in the log-probabilities: rows of a padded embedding
      that stand for no text. Not given: every id may be drawn.
    mesh: the mesh that the variables are laid out on; the rows are split over it, over `context` too.
    """

    config: Required[SampleConfig]
    prompt_lengths: Sequence[int] | np.ndarray | None
    row_ids: Sequence[int] | np.ndarray | None
    samples: int
    vocabulary: int | None
    mesh: Mesh | None


def generate(
    model: llama.Llama, variables: Any, prompts: decode.Prompts, key: jax.Array, **options: Unpack[Options]
) -> Generation:
    """Continue each prompt by at most `config.max_new_tokens` tokens.

    Shapes are rounded up to a few sizes, so calls with prompts of similar length share one compiled program; so do
    calls that differ only in the numbers of their settings, or in seed.

    Args: see `Options`, and:
      model, variables: from `load_pretrained`; with an `adapters` collection the adapted model generates. For many
        calls, `prepare(model, variables, config)` in place of the variables.
      prompts: B lists of token ids, or integers [B, P] padded on the right with `prompt_lengths`.
      key: a JAX random key. The same key gives the same text, another key another text; greedy ignores it.

    Returns:
      `Generation`: tokens, mask and logps [B K, max_new_tokens]; the same on every process.

    Raises:
      InputError: no prompts, an empty one, ids outside the vocabulary, more tokens than the context
        holds, stop strings (which need a tokenizer).
    """
    return _run(model, variables, prompts, key, **options)[0]


def generate_with_plain_logps(
    model: llama.Llama, variables: Any, prompts: decode.Prompts, key: jax.Array, **options: Unpack[Options]
) -> tuple[Generation, jax.Array]:
    """`generate`, and beside it the log-probabilities at temperature 1, float32 [B K, N]; 0 behind the end."""
    out, plain = _run(model, variables, prompts, key, plain=True, **options)
    assert plain is not None
    return out, plain


def generate_mixture(
    model: llama.Llama,
    variables: Any,
    other: Any,
    share: float,
    prompts: decode.Prompts,
    key: jax.Array,
    **options: Unpack[Options],
) -> Generation:
    """`generate` from π^(1−a) π_other^a / Z, token by token (`sample/mixture.py`).

    Args:
      other: the second set of variables of the same model; without `adapters` it is the model beneath them.
      share: a, between 0 and 1, neither included.

    Returns `Generation`, whose logps are the mixture's. Raises `InputError` as `generate` does, and for `share`.
    """
    if not 0 < share < 1:
        raise InputError(f"share {share} must lie between 0 and 1; at an end one of the two models writes alone")
    return _run(model, variables, prompts, key, other=other, share=np.float32(share), **options)[0]


def lower(
    model: llama.Llama, weights: Weights, *, rows: int, prompt: int, config: SampleConfig, samples: int, mesh: Mesh
) -> Any:
    """The `jax.stages.Lowered` of `generate`, for compiling ahead of time.

    Args:
      weights: of `program.prepared_shapes`.
      rows, prompt: prompts, rounded up to the devices that split them, of at most so many tokens.
      config, samples: as for `generate`.
    """
    slots = decode.count_slots(model, prompt, config)
    key_data, implementation = decode.key_data(jax.random.key(0))
    program = Program.of(model, config, implementation, mesh, weights)
    drawn: Any = program.mesh
    rows += -rows % meshes.batch_parts(drawn)
    width = min(bucket(prompt), slots)
    with meshes.in_force(drawn):

        def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.sharding(drawn, meshes.batch_axes(len(shape))))

        return _generate.lower(
            weights,
            array(rows, width),
            array(rows),
            key_data,
            array(rows, dtype=jnp.uint32),
            decode.settings(config, model.config.vocab_size),
            program=program,
            new=bucket(config.max_new_tokens),
            slots=slots,
            samples=samples,
            plain=False,
        )


def _run(
    model: llama.Llama,
    variables: Any,
    prompts: decode.Prompts,
    key: jax.Array,
    *,
    config: SampleConfig,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
    row_ids: Sequence[int] | np.ndarray | None = None,
    samples: int = 1,
    vocabulary: int | None = None,
    mesh: Mesh | None = None,
    plain: bool = False,
    other: Any = None,
    share: np.float32 | None = None,
) -> tuple[Generation, jax.Array | None]:
    key_data, implementation = decode.key_data(key)
    program = Program.of(model, config, implementation, mesh, variables)
    table, lengths, slots = decode.batch_of(program, prompts, prompt_lengths, config)
    count = int(np.count_nonzero(lengths))
    ids = np.arange(count) if row_ids is None else np.asarray(row_ids)
    if ids.shape != (count,):
        raise InputError(f"row_ids {list(ids.shape)} must be one id for each of the {count} prompts")
    if samples < 1:
        raise InputError(f"samples {samples} must be at least 1")
    if config.beams is not None:
        raise InputError("beams draw nothing: call dpo_jax.sample.beam_search, or leave beams out")
    if config.stop_strings:
        raise InputError("stop_strings need a tokenizer: use dpo-jax generate, or stop_tokens here")
    ids = np.pad(ids.astype(np.uint32), (0, len(lengths) - count))
    settings = decode.settings(config, model.config.vocab_size, vocabulary)
    static = {"new": bucket(config.max_new_tokens), "slots": slots, "samples": samples, "plain": plain}
    with meshes.in_force(program.mesh):
        tokens, lengths, ids = meshes.put_batch(program.mesh, (table, lengths, ids))
        weights = make_weights(program, variables, config.weights)
        other = None if other is None else make_weights(program, other, config.weights)
        batch = (tokens, lengths, key_data, ids, settings, other, share)
        out, logps = _generate(weights, *batch, program=program, **static)

    def cut(x: jax.Array) -> jax.Array:
        return x[: count * samples, : config.max_new_tokens]

    return Generation(*(cut(x) for x in out)), None if logps is None else cut(logps)
