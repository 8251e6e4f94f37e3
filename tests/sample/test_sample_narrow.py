"""Generation with weights and caches in fewer bits, and through unrolled layers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pairs import quick_jit
from test_sample_engine import texts

import dpo_jax
from dpo_jax import mesh as meshes
from dpo_jax.config import LoraConfig, SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model import cache as caches, narrow, variables as model_variables
from dpo_jax.sample import decode, generate, prepare, program as programs, serve

rng = np.random.default_rng(0)
PROMPTS = [rng.integers(3, 30, size).tolist() for size in (1, 9, 5)]
NEW = 12


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(model, variables), with adapters that do something."""
    folder = tiny.folder(tmp_path_factory.mktemp("narrow") / "model", seed=2)
    model, variables = dpo_jax.load_pretrained(str(folder), lora=LoraConfig(rank=2))
    adapters = jax.tree.map(lambda x: x + 0.05, variables["adapters"])
    return model, {**variables, "adapters": adapters}


def test_quantised_numbers_are_within_half_a_step():
    x = jnp.asarray(rng.normal(size=(5, 40)) * 10.0 ** rng.integers(-6, 6, (5, 1)), jnp.float32).at[2].set(0)
    values, scales = narrow.quantise(x)
    chex.assert_type(values, jnp.int8)
    np.testing.assert_array_equal(np.abs(values).max(1), [127, 127, 0, 127, 127])
    assert (np.abs(values * scales[:, None] - x) <= 0.5001 * scales[:, None]).all()


@pytest.mark.parametrize(("to", "bound"), [("bfloat16", 6e-3), ("int8", 8e-3)])
@pytest.mark.parametrize("rows", [(1,), (3, 4)])
def test_products_of_narrow_weights(to, bound, rows):
    x = jnp.asarray(rng.normal(size=(*rows, 256)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(256, 48)) * np.geomspace(1e-3, 1e3, 48), jnp.float32)
    got, want = narrow.matmul(x, narrow.narrowed(kernel.T, to)), np.matmul(x, kernel)
    assert got.dtype == jnp.float32
    assert got.shape == want.shape
    sizes = np.linalg.norm(x, axis=-1, keepdims=True) * np.linalg.norm(kernel, axis=0) / 16
    assert 0 < np.sqrt(np.mean(np.square((got - want) / sizes))) < bound


def step_logits(small, config, unrolled=True):
    """float32 [tokens, V]: logits of a text, its first half computed at once, the rest token by token."""
    model, variables = small
    program = programs.Program.of(model, config, "threefry2x32", None, variables)._replace(unrolled=unrolled)
    weights = programs.make_weights(program, variables, config.weights)
    decoder = decode.Decoder(program, weights, decode.settings(config, model.config.vocab_size))
    text = jnp.asarray(np.random.default_rng(1).integers(3, 30, (1, 24)), jnp.int32)
    first, cache = quick_jit(lambda: decoder.prefill(text[:, :12], jnp.full(1, 12), 32))()
    step = quick_jit(decoder.step)
    rows = [first]
    for t in range(12, 24):
        logits, cache = step(text[:, t], jnp.full(1, t), cache)
        rows.append(logits)
    return jax.nn.log_softmax(jnp.concatenate(rows)), cache


def test_unrolled_layers_are_the_scanned_ones(small):
    unrolled, cache = step_logits(small, SampleConfig())
    scanned, stacked = step_logits(small, SampleConfig(), unrolled=False)
    chex.assert_trees_all_close(unrolled, scanned, atol=1e-5)
    chex.assert_trees_all_close(cache, caches.unstack(stacked), atol=1e-5)
    model, variables = small
    tokens = jnp.asarray([PROMPTS[1]])
    other = model.clone(unrolled=True).apply(model_variables.unroll(variables), tokens)
    chex.assert_trees_all_close(other, model.apply(variables, tokens), atol=1e-5)


@pytest.mark.parametrize("unrolled", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options", [{"weights": "int8"}, {"weights": "bfloat16"}, {"cache": "int8"}, {"cache": "bfloat16"}]
)
def test_fewer_bits_cost_little(small, options, unrolled):
    exact, _ = step_logits(small, SampleConfig())
    got, cache = step_logits(small, SampleConfig(**options), unrolled)
    error = np.abs(got - exact)
    assert 0 < error.mean() < 0.05
    assert error.max() < 0.5
    held = {str(x.dtype) for x in jax.tree.leaves(cache)}
    assert held == {"int8": {"int8", "float32"}, "bfloat16": {"bfloat16"}, None: {"float32"}}[options.get("cache")]


def test_narrow_weights_replace_the_kernels(small):
    _, variables = small
    made = narrow.narrow_variables(variables, "int8")
    kept = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(made["params"])}
    assert kept == {"embedding", "scale"}
    assert made["adapters"] is variables["adapters"]
    values = {x.dtype.name for x in jax.tree.leaves(made["narrow"])}
    assert values == {"int8", "float32"}


def test_a_request_gives_the_same_text_alone_in_a_batch_and_in_the_queue(small):
    model, variables = small
    config = SampleConfig(NEW, weights="int8", cache="int8")
    key = jax.random.key(3)
    batch = texts(generate(model, variables, PROMPTS, key, config=config))
    alone = texts(generate(model, variables, PROMPTS[1:2], key, config=config, row_ids=[1]))
    assert alone[0] == batch[1]
    prepared = prepare(model, variables, config)
    assert texts(generate(model, prepared, PROMPTS, key, config=config)) == batch
    with pytest.raises(InputError, match="were prepared as int8"):
        generate(model, prepared, PROMPTS, key, config=SampleConfig(NEW))
    requests = [(i, 0) for i in range(len(PROMPTS))]
    served = serve(model, variables, PROMPTS, key, config=config, requests=requests, rows=2)
    assert {done.request[0]: done.tokens for some in served for done in some} == dict(enumerate(batch))


@pytest.mark.slow
def test_a_mesh_changes_nothing(small):
    model, variables = small
    config = SampleConfig(NEW, weights="int8", cache="int8")
    mesh = make_mesh(2, 2, 2)
    sharded = jax.device_put(variables, model_variables.shardings(model, mesh))
    got = texts(generate(model, sharded, PROMPTS, jax.random.key(3), config=config, mesh=mesh))
    assert got == texts(generate(model, variables, PROMPTS, jax.random.key(3), config=config))


def test_a_quantised_cache_is_empty_at_first(small):
    model, _ = small
    cache = caches.init_cache(model.config, 2, 8, "int8")
    assert caches.count_slots(cache) == caches.count_slots(caches.unstack(cache)) == 8
    keys, values = caches.unstack(cache)[0].read(jnp.float32)
    assert not keys.any()
    assert not values.any()


def test_unknown_types_are_refused():
    with pytest.raises(InputError, match="weights int4 must be bfloat16 or int8"):
        SampleConfig(weights="int4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cache int4 must be float32, bfloat16 or int8"):
        SampleConfig(cache="int4")  # type: ignore[arg-type]


def test_integer_products_that_are_wrong_are_noticed(small, monkeypatch):
    """As XLA's for GPUs are without autotuning: twice what they should be."""
    right = narrow._products
    monkeypatch.setattr(narrow, "_products", lambda rows, values, dtype: 2 * right(rows, values, dtype))
    narrow.check_integer_products.cache_clear()
    with pytest.raises(InputError, match=r"multiplies integers wrongly here.*autotune_level"):
        programs.Program.of(small[0], SampleConfig(NEW, weights="int8"), "threefry2x32", None, small[1])


def test_integer_products_are_checked_under_a_mesh():
    narrow.check_integer_products.cache_clear()
    with meshes.in_force(make_mesh(2, 2, 2)):
        narrow.check_integer_products()
