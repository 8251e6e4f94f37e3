"""The model by itself: causality, caches, layouts, adapters, remat, sharding rules. Parity with transformers stands in
test_weights_parity.py."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import mesh as meshes
from dpo_jax.config import LoraConfig
from dpo_jax.errors import InputError
from dpo_jax.model import architecture, groups, llama, logprobs, rope, variables as model_variables
from dpo_jax.model.architecture import LlamaConfig, RopeScaling
from dpo_jax.model.cache import init_cache
from dpo_jax.types import PreferenceBatch

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def model() -> llama.Llama:
    return llama.Llama(CONFIG)


@pytest.fixture(scope="module")
def variables(model):
    return model_variables.init_variables(model, jax.random.key(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 11), 0, CONFIG.vocab_size)


def make_batch(prompt=7, response=5, seed=0) -> PreferenceBatch:
    rng = np.random.default_rng(seed)
    b, k = 3, 2
    return PreferenceBatch(
        prompts=rng.integers(0, CONFIG.vocab_size, (b, prompt)).astype(np.int32),
        prompt_lengths=np.array([7, 3, 1], np.int32),
        responses=rng.integers(0, CONFIG.vocab_size, (b, k, response)).astype(np.int32),
        response_lengths=np.array([[5, 2], [1, 4], [3, 0]], np.int32),
        weights=np.ones(b, np.float32),
        rows=np.arange(b, dtype=np.int32),
    )


def test_hidden_states_depend_on_the_past_only(model, variables, tokens):
    """Through gradients: a one-hot embedding bump at position t moves only positions >= t."""
    t = 4

    def hidden(bump):
        params = variables["params"]
        table = params["embed_tokens"]["embedding"]
        extended = jnp.concatenate([table, (table[tokens[0, t]] + bump)[None]])
        bumped = {**params, "embed_tokens": {"embedding": extended}}
        changed = tokens.at[0, t].set(CONFIG.vocab_size)
        wider = llama.Llama(architecture_with(vocab_size=CONFIG.vocab_size + 1))
        return wider.apply({"params": bumped}, changed)

    moved = jnp.abs(jax.jacrev(hidden)(jnp.zeros(CONFIG.hidden_size))).sum(axis=(2, 3))
    assert jnp.all(moved[0, :t] == 0)
    assert jnp.all(moved[0, t:] > 0)
    assert jnp.all(moved[1] == 0)


def architecture_with(**changes) -> LlamaConfig:
    return LlamaConfig(**{**CONFIG.__dict__, **changes})


@pytest.mark.parametrize("chunks", [[11], [6, 1, 1, 1, 1, 1], [1] * 11, [4, 7]])
def test_cached_decoding_equals_the_full_forward(model, variables, tokens, chunks):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    cache, start, parts = init_cache(CONFIG, 2, 16, jnp.float32), 0, []
    for size in chunks:
        piece = slice(start, start + size)
        hidden, cache = jax.jit(model.apply)(variables, tokens[:, piece], positions[:, piece], cache=cache)
        parts.append(hidden)
        start += size
    full = model.apply(variables, tokens)
    chex.assert_trees_all_close(jnp.concatenate(parts, axis=1), full, atol=1e-5)


def test_rows_of_unequal_length_decode_at_their_own_positions(model, variables, tokens):
    lengths = jnp.array([4, 7])
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    _, cache = model.apply(variables, tokens[:, :7], positions, cache=init_cache(CONFIG, 2, 12, jnp.float32))
    following = jnp.take_along_axis(tokens, lengths[:, None], axis=1)
    hidden, _ = model.apply(variables, following, lengths[:, None], cache=cache)
    full = model.apply(variables, tokens)
    expected = jnp.take_along_axis(full, lengths[:, None, None], axis=1)
    chex.assert_trees_all_close(hidden, expected, atol=1e-5)


def test_packed_segments_equal_separate_rows(model, variables, tokens):
    segments = jnp.array([[1] * 4 + [2] * 5 + [0] * 2])
    positions = jnp.array([[*range(4), *range(5), 0, 0]])
    packed = model.apply(variables, tokens[:1], positions, segments)
    chex.assert_trees_all_close(packed[:, :4], model.apply(variables, tokens[:1, :4]), atol=1e-5)
    chex.assert_trees_all_close(packed[:, 4:9], model.apply(variables, tokens[:1, 4:9]), atol=1e-5)
    chex.assert_tree_all_finite(packed)


def whole_sequence_logps(model, variables, batch, i, k):
    p, r = int(batch.prompt_lengths[i]), int(batch.response_lengths[i, k])
    sequence = np.concatenate([batch.prompts[i, :p], batch.responses[i, k, :r]])[None]
    z = model.apply(variables, jax.jit(model.apply)(variables, sequence), method="logits")
    logp = jax.nn.log_softmax(z)[0]
    return np.array([logp[p - 1 + j, sequence[0, p + j]] for j in range(r)])


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_group_log_probabilities_equal_whole_sequences(model, variables, layout):
    batch = make_batch()
    logps = jax.jit(lambda b: groups.response_logps(model.apply, variables, b, layout=layout))(batch)
    for i in range(3):
        for k in range(2):
            n = batch.response_lengths[i, k]
            np.testing.assert_allclose(logps[i, k, :n], whole_sequence_logps(model, variables, batch, i, k), atol=1e-5)
            assert np.all(logps[i, k, n:] == 0)


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_padding_changes_nothing(model, variables, layout):
    """Neither its amount, nor what stands in it (here: ids far outside the vocabulary)."""
    batch = make_batch()

    def padded(x, lengths, width):
        out = np.full((*x.shape[:-1], width), 10**6, np.int32)
        out[..., : x.shape[-1]] = x
        return np.where(np.arange(width) < lengths[..., None], out, 10**6)

    wide = batch.replace(
        prompts=padded(batch.prompts, batch.prompt_lengths, 16),
        responses=padded(batch.responses, batch.response_lengths, 9),
    )

    def loss(v, b):
        return groups.response_logps(model.apply, v, b, layout=layout).sum()

    step = jax.jit(jax.value_and_grad(loss))
    one, one_grad = step(variables, batch)
    two, two_grad = step(variables, wide)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    chex.assert_trees_all_close(one_grad, two_grad, atol=2e-5)


def test_layouts_have_the_same_gradients(model, variables):
    def loss(v, layout):
        logps = groups.response_logps(model.apply, v, make_batch(), layout=layout)
        return jnp.sum(logps * jnp.arange(5))

    shared, separate = (
        jax.jit(jax.grad(loss), static_argnums=1)(variables, layout) for layout in ("shared", "separate")
    )
    chex.assert_trees_all_close(shared, separate, atol=5e-5)


@pytest.mark.parametrize("remat", ["none", "offload", pytest.param("full", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(model, variables, remat):
    def grads(m):
        return jax.jit(jax.grad(lambda v: groups.response_logps(m.apply, v, make_batch()).sum()))(variables)

    chex.assert_trees_all_close(grads(model.clone(remat=remat)), grads(model), atol=2e-5)


def test_chunks_of_the_head_change_nothing():
    h = jax.random.normal(jax.random.key(0), (2, 13, 8))
    w = jax.random.normal(jax.random.key(1), (8, 50))
    y = jax.random.randint(jax.random.key(2), (2, 13), 0, 50)
    exact = jnp.take_along_axis(jax.nn.log_softmax((h @ w) / 0.7), y[..., None], axis=-1)[..., 0]
    for budget in (1, 4 * 2 * 50 * 3, 2**30):
        got = logprobs.token_logps(h, w, y, temperature=0.7, budget_bytes=budget)
        chex.assert_trees_all_close(got, exact, atol=1e-5)
    assert logprobs.chunk_length(2, 13, 50, 4 * 2 * 50 * 3) == 3
    assert logprobs.chunk_length(2, 13, 50, 2**30) == 7, "the whole array must not exist, even where it fits"
    assert logprobs.chunk_length(2, 13, 50, 1) == 1


def test_adapters_start_as_the_base_model_and_merge(tokens):
    lora = LoraConfig(rank=2, alpha=6, targets=("q_proj", "down_proj"))
    model = llama.Llama(CONFIG, lora=lora)
    variables = model_variables.init_variables(model, jax.random.key(3))
    assert set(variables["adapters"]["layers"]["self_attn"]) == {"q_proj"}
    assert set(variables["adapters"]["layers"]["mlp"]) == {"down_proj"}
    base = model.apply({"params": variables["params"]}, tokens)
    chex.assert_trees_all_equal(model.apply(variables, tokens), base)
    chex.assert_trees_all_equal(model_variables.init_adapters(model, jax.random.key(3)), variables["adapters"])

    moved = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(4), x.shape), variables["adapters"])
    adapted = model.apply({"params": variables["params"], "adapters": moved}, tokens)
    assert jnp.abs(adapted - base).max() > 1e-2
    merged = model_variables.merge_adapters({"params": variables["params"], "adapters": moved}, lora)
    chex.assert_trees_all_close(llama.Llama(CONFIG).apply({"params": merged}, tokens), adapted, atol=1e-5)


def test_bfloat16_computes_near_float32(model, variables, tokens):
    half = model.clone(dtype=jnp.bfloat16)
    hidden = half.apply(variables, tokens)
    assert hidden.dtype == jnp.bfloat16
    exact = model.apply(variables, tokens)
    assert jnp.abs(hidden - exact).max() < 0.1 * jnp.abs(exact).max()
    assert half.apply(variables, hidden, method="logits").dtype == jnp.float32


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 64)])
def test_rotary_frequencies_equal_those_of_transformers(scaling):
    transformers = pytest.importorskip("transformers")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    config = transformers.LlamaConfig(**architecture.to_hf(architecture_with(rope_theta=5e5, rope_scaling=scaling)))
    if scaling is None:
        ours, theirs = rope.rotary_frequencies(8, 5e5, None), 1 / 5e5 ** (np.arange(0, 8, 2) / 8)
    else:
        ours = rope.rotary_frequencies(8, 5e5, scaling)
        theirs = rope_utils.ROPE_INIT_FUNCTIONS[scaling.kind](config, "cpu")[0].numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-7)


@pytest.mark.parametrize(
    "split", [(2, 2, 2), *(pytest.param(split, marks=pytest.mark.slow) for split in [(8, 1, 1), (1, 8, 1), (1, 4, 2)])]
)
def test_weights_are_the_same_on_every_mesh(split):
    model = llama.Llama(architecture_with(vocab_size=96))
    mesh = meshes.make_mesh(*split)
    sharded = model_variables.init_variables(model, jax.random.key(0), mesh=mesh)
    chex.assert_trees_all_equal(
        jax.device_get(sharded), jax.device_get(model_variables.init_variables(model, jax.random.key(0)))
    )
    kernel = sharded["params"]["layers"]["mlp"]["gate_proj"]["kernel"]
    local = kernel.addressable_shards[0].data.shape
    assert local == (3, 32 // split[1], 48 // split[2])


def test_sizes_that_do_not_divide_are_refused_with_the_fix(model):
    with pytest.raises(InputError, match=r"key/value heads.*--mesh\.tensor"):
        model_variables.shardings(model, meshes.make_mesh(1, 2, 4))
    with pytest.raises(InputError, match=r"embed_tokens/embedding \(97, 32\).*vocab.*--mesh\.tensor"):
        model_variables.shardings(model, meshes.make_mesh(1, 4, 2))
    with pytest.raises(InputError, match="there are 8"):
        meshes.make_mesh(3, 1, 1)
    with pytest.raises(InputError, match="do not divide"):
        meshes.make_mesh(3, -1, 1)
    with pytest.raises(InputError, match="at most -1"):
        meshes.make_mesh(-1, -1, 1)


def test_a_sliding_window_changes_what_lies_beyond_it_alone(tokens):
    """tests/weights/test_families.py holds the values against transformers'."""
    plain, near = (llama.Llama(architecture_with(sliding_window=n, model_type="mistral")) for n in (None, 8))
    variables = model_variables.init_variables(plain, jax.random.key(0))
    a, b = (np.asarray(model.apply(variables, tokens)) for model in (plain, near))
    np.testing.assert_allclose(a[:, :8], b[:, :8], atol=1e-6)
    assert (np.abs(a[:, 8:] - b[:, 8:]).max(axis=-1) > 1e-6).all()


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        architecture_with(rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64), eos_token_ids=(1, 2), bos_token_id=0),
        architecture_with(rope_scaling=RopeScaling("linear", 2.0), attention_bias=True, mlp_bias=True),
        architecture_with(model_type="mistral", sliding_window=4096, tie_embeddings=False),
    ],
)
def test_architecture_goes_to_hugging_face_and_back(config):
    assert architecture.from_hf(architecture.to_hf(config)) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("architectures", ["MixtralForCausalLM"]),
        ("rope_scaling", {"rope_type": "axial", "factor": 4.0}),
        ("attention_dropout", 0.1),
        ("quantization_config", {"bits": 4}),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("logit_scale", 2.0),
        ("hidden_size", None),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused_by_name(key, value):
    raw = architecture.to_hf(CONFIG)
    if key == "rope_scaling":
        raw.pop("rope_parameters")
    with pytest.raises(InputError, match=r"^folder/config\.json: "):
        architecture.from_hf({**raw, key: value}, "folder/config.json")
