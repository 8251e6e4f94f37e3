"""Heads on hidden states: where the state is taken from, how they are made, where they lie."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import TINY, make_batch, model_and_variables, pad

from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.model import groups, heads
from dpo_jax.model.llama import Llama

SMALL = dataclasses.replace(TINY, num_layers=1)


@pytest.fixture(scope="module")
def small():
    return model_and_variables(SMALL)


def plain_states(model, variables, batch):
    """[B, K, D]: every response by itself, as one unpadded sequence."""
    rows = []
    for i, prompt in enumerate(batch.prompts):
        for k, response in enumerate(batch.responses[i]):
            ids = [*prompt[: batch.prompt_lengths[i]], *response[: batch.response_lengths[i, k]]]
            padded = np.zeros((1, 16), np.int32)  # causal: what follows the last token changes nothing
            padded[0, : len(ids)] = ids
            rows.append((padded, len(ids) - 1))
    hidden = jax.jit(model.apply)(variables, np.concatenate([ids for ids, _ in rows]))
    picked = hidden[np.arange(len(rows)), [last for _, last in rows]]
    return picked.reshape(*batch.response_lengths.shape, -1)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_states_are_those_of_the_last_token(small, layout):
    model, variables = small
    batch = make_batch(4, responses=3)
    lengths = batch.response_lengths.copy()
    lengths[1, 2] = 0
    batch = dataclasses.replace(batch, response_lengths=lengths)
    states = jax.jit(lambda b: groups.response_states(model.apply, variables, b, layout=layout))(pad(batch, 3, 2))
    expected = np.asarray(plain_states(model, variables, batch)).copy()
    expected[1, 2] = 0  # absent
    np.testing.assert_allclose(states, expected, atol=2e-5)


def test_the_terminator_counts(small):
    """The score reads the last token itself: with another terminator it is another state."""
    model, variables = small
    batch = make_batch(2)
    responses = batch.responses.copy()
    for i in range(2):
        responses[i, 0, batch.response_lengths[i, 0] - 1] ^= 1
    other = dataclasses.replace(batch, responses=responses)
    here, there = (groups.response_states(model.apply, variables, b) for b in (batch, other))
    assert np.abs(here[:, 0] - there[:, 0]).max() > 1e-2
    chex.assert_trees_all_equal(here[:, 1], there[:, 1])


def test_fresh_heads():
    model = Llama(dataclasses.replace(TINY, hidden_size=4096, head_dim=1024))
    made = heads.init_heads(model, jax.random.key(0), {"score": 1, "harm": 3})
    assert jax.tree.map(jnp.shape, made) == {"score": {"kernel": (4096, 1)}, "harm": {"kernel": (4096, 3)}}
    chex.assert_trees_all_equal_shapes_and_dtypes(made, heads.abstract_heads(model, {"score": 1, "harm": 3}))
    np.testing.assert_allclose(np.std(made["harm"]["kernel"]), 1 / np.sqrt(4097), rtol=0.02)
    alone = heads.init_heads(model, jax.random.key(0), {"score": 1})
    chex.assert_trees_all_equal(alone["score"], made["score"])


def test_heads_lie_on_the_mesh():
    model, mesh = Llama(SMALL), make_mesh(2, 2, 2)
    sizes = {"score": 1, "harm": 3}
    assert heads.logical_axes(sizes)["harm"]["kernel"] == ("embed", None)
    placed = heads.init_heads(model, jax.random.key(0), sizes, mesh=mesh)
    assert placed["harm"]["kernel"].addressable_shards[0].data.shape == (SMALL.hidden_size // 2, 3)
    chex.assert_trees_all_close(placed, heads.init_heads(model, jax.random.key(0), sizes))
    wide = Llama(dataclasses.replace(SMALL, hidden_size=12))
    with pytest.raises(InputError, match=r"heads/score/kernel .* does not divide by 8 \(--mesh.fsdp\)"):
        heads.shardings(wide, sizes, make_mesh(1, 8, 1))


def test_scores_on_one_device_and_on_eight(small):
    model, variables = small
    batch = make_batch(8)
    head = heads.init_heads(model, jax.random.key(1), {"score": 1})

    def scores(variables, batch):
        return heads.apply(variables, "score", groups.response_states(model.apply, variables, batch))[..., 0]

    one = jax.jit(scores)({**variables, "heads": head}, batch)
    mesh = make_mesh(2, 2, 2)
    _, spread = model_and_variables(SMALL, mesh=mesh)
    spread = {**spread, "heads": heads.init_heads(model, jax.random.key(1), {"score": 1}, mesh=mesh)}
    with jax.set_mesh(mesh):
        eight = jax.jit(scores)(spread, put_batch(mesh, batch))
    np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_not_there():
    with pytest.raises(InputError, match=r"no head 'score' \(it has none\)"):
        heads.apply({"params": {}}, "score", jnp.ones((1, 4)))
    with pytest.raises(InputError, match=r"no head 'score' \(it has value\)"):
        heads.apply({"heads": {"value": {"kernel": jnp.ones((4, 1))}}}, "score", jnp.ones((1, 4)))
