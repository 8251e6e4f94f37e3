"""`dpo_jax.sample.generate` against transformers, full forward passes and exact distributions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pairs import quick_jit
from scipy import stats

import dpo_jax
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model import llama, variables as model_variables
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.cache import init_cache
from dpo_jax.sample import beam_search, engine, generate, generate_with_plain_logps, serve

CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=True,
)
PROMPTS = [[1, 2, 3], [7] * 20, [50], [9, 8, 7, 6, 5, 4]]
SAMPLED = SampleConfig(max_new_tokens=12, temperature=0.9, top_k=40, top_p=0.95)


def make(config: LlamaConfig = CONFIG, seed: int = 0):
    """A random model whose next-token distributions are neither flat nor certain."""
    model = llama.Llama(config)
    variables = model_variables.init_variables(model, jax.random.key(seed))
    return model, jax.tree.map(lambda x: x * 8 if x.ndim > 1 and x.shape[-1] > 1 else x, variables)


@pytest.fixture(scope="module")
def small():
    return make()


@functools.cache
def forward(model):
    return quick_jit(lambda variables, ids: model.apply(variables, model.apply(variables, ids), method="logits"))


def full_logits(model, variables, ids):
    """float64 [T, V]: logits of a plain forward pass without a cache; padded to 48s of tokens: few compilations."""
    padded = np.zeros((1, -(-len(ids) // 48) * 48), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(forward(model)(variables, padded)[0, : len(ids)], np.float64)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def texts(generation):
    tokens, mask, _ = (np.asarray(x) for x in generation)
    return [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]


def test_cached_decode_equals_full_forward(small):
    model, variables = small
    ids = jax.random.randint(jax.random.key(1), (2, 24), 0, CONFIG.vocab_size)
    step = quick_jit(lambda variables, *args, cache: model.apply(variables, *args, cache=cache))
    cache = init_cache(CONFIG, 2, 32, jnp.float32)
    hidden, cache = step(variables, ids[:, :9], jnp.tile(jnp.arange(9), (2, 1)), cache=cache)
    states = [hidden]
    for t in range(9, 24):
        hidden, cache = step(variables, ids[:, t : t + 1], jnp.full((2, 1), t), cache=cache)
        states.append(hidden)
    cached = model.apply(variables, jnp.concatenate(states, axis=1), method="logits")
    for row in range(2):
        assert np.abs(cached[row] - full_logits(model, variables, ids[row])).max() <= 1e-4


def test_greedy_is_the_argmax_of_full_forward_passes(small):
    model, variables = small
    out = texts(generate(model, variables, PROMPTS, jax.random.key(0), config=SampleConfig(8, temperature=0)))
    for prompt, response in zip(PROMPTS, out, strict=True):
        assert len(response) == 8
        assert full_logits(model, variables, prompt + response)[len(prompt) - 1 : -1].argmax(-1).tolist() == response


@pytest.mark.parametrize("config", [SAMPLED, SampleConfig(12, temperature=0), SampleConfig(12, temperature=2.0)])
def test_logps_are_those_of_a_full_forward_before_the_filters(small, config):
    model, variables = small
    tokens, mask, logps = generate(model, variables, PROMPTS, jax.random.key(3), config=config)
    assert mask.all()
    temperature = config.temperature or 1.0
    for i, prompt in enumerate(PROMPTS):
        response = np.asarray(tokens[i]).tolist()
        logits = full_logits(model, variables, prompt + response)[len(prompt) - 1 : -1]
        want = log_softmax(logits / temperature)[np.arange(12), response]
        np.testing.assert_allclose(logps[i], want, atol=1e-4)


def test_first_token_frequencies_match_the_exact_filtered_distribution(small):
    model, variables = small
    config = SampleConfig(1, temperature=1.3, top_k=30, top_p=0.9)
    draws = 4096
    tokens, _, _ = generate(model, variables, [[5, 6, 7]] * draws, jax.random.key(4), config=config)
    p = np.exp(log_softmax(full_logits(model, variables, [5, 6, 7])[-1] / 1.3))
    order = np.argsort(-p)
    p[order[30:]] = 0
    p[order[np.searchsorted(np.cumsum(p[order]) / p.sum(), 0.9) + 1 :]] = 0
    p /= p.sum()
    counts = np.bincount(np.asarray(tokens)[:, 0], minlength=CONFIG.vocab_size)
    assert counts[p == 0].sum() == 0
    common = p * draws >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(p[common], p[~common].sum()) * draws
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3


def test_keys_matter_and_repeat(small):
    model, variables = small
    a = texts(generate(model, variables, PROMPTS, jax.random.key(0), config=SAMPLED))
    assert a == texts(generate(model, variables, PROMPTS, jax.random.key(0), config=SAMPLED))
    assert a != texts(generate(model, variables, PROMPTS, jax.random.key(1), config=SAMPLED))
    assert a == texts(generate(model, variables, PROMPTS, jax.random.PRNGKey(0), config=SAMPLED)), "old-style keys"
    same_prompt = texts(generate(model, variables, [PROMPTS[0]] * 3, jax.random.key(0), config=SAMPLED))
    assert len({tuple(x) for x in same_prompt}) == 3, "rows draw their own numbers"


def test_a_row_does_not_depend_on_neighbours_padding_or_place(small):
    model, variables = small
    key = jax.random.key(5)
    together = texts(generate(model, variables, PROMPTS, key, config=SAMPLED))
    for i, prompt in enumerate(PROMPTS):
        assert texts(generate(model, variables, [prompt], key, config=SAMPLED, row_ids=[i])) == [together[i]]
    order = [2, 0, 3, 1]
    shuffled = texts(
        generate(model, variables, [PROMPTS[i] for i in order] + [[3] * 70], key, config=SAMPLED, row_ids=[*order, 9])
    )
    assert shuffled[:4] == [together[i] for i in order]
    padded = np.full((4, 45), 100, np.int32)
    for i, prompt in enumerate(PROMPTS):
        padded[i, : len(prompt)] = prompt
    lengths = [len(p) for p in PROMPTS]
    assert texts(generate(model, variables, padded, key, config=SAMPLED, prompt_lengths=lengths)) == together


def test_a_shorter_limit_gives_a_prefix(small):
    model, variables = small
    long = texts(generate(model, variables, PROMPTS, jax.random.key(6), config=SAMPLED))
    short = dataclasses.replace(SAMPLED, max_new_tokens=5)
    assert texts(generate(model, variables, PROMPTS, jax.random.key(6), config=short)) == [x[:5] for x in long]


def test_stop_token_ends_the_row_and_belongs_to_it(small):
    model, variables = small
    free = texts(generate(model, variables, PROMPTS, jax.random.key(7), config=SAMPLED))
    stops = (free[0][3], free[1][6])
    config = dataclasses.replace(SAMPLED, stop_tokens=stops)
    tokens, mask, logps = (np.asarray(x) for x in generate(model, variables, PROMPTS, jax.random.key(7), config=config))
    for i, row in enumerate(free):
        ends = [t for t, token in enumerate(row) if token in stops]
        length = ends[0] + 1 if ends else len(row)
        assert mask[i].tolist() == [t < length for t in range(12)]
        assert tokens[i, :length].tolist() == row[:length]
        assert (tokens[i, length:] == engine.PAD).all()
        assert (logps[i, length:] == 0).all()
        assert (logps[i, :length] < 0).all()


def test_one_program_serves_all_settings_and_like_lengths(small):
    model, variables = small
    generate(model, variables, PROMPTS, jax.random.key(0), config=SampleConfig(9, temperature=0.5, top_k=3))
    compiled = engine._generate._cache_size()
    for config in (SampleConfig(16, temperature=1.5, top_k=30), SampleConfig(2, temperature=1.0, top_k=1)):
        generate(model, variables, [[1] * 17, *PROMPTS[1:]], jax.random.key(1), config=config)
    assert engine._generate._cache_size() == compiled
    assert [engine.bucket(n) for n in (1, 16, 17, 64, 65, 128, 129, 300)] == [16, 16, 32, 64, 80, 128, 160, 320]


@pytest.mark.parametrize(
    "sizes", [(2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(8, 1, 1), (1, 4, 2)])]
)
def test_a_mesh_changes_nothing(small, sizes):
    model, variables = small
    config = dataclasses.replace(CONFIG, vocab_size=104)
    model, variables = make(config)
    mesh = make_mesh(*sizes)
    alone = generate(model, variables, PROMPTS[:3], jax.random.key(8), config=SAMPLED)
    sharded = jax.device_put(variables, model_variables.shardings(model, mesh))
    split = generate(model, sharded, PROMPTS[:3], jax.random.key(8), config=SAMPLED, mesh=mesh)
    assert texts(split) == texts(alone)
    np.testing.assert_allclose(split.logps, alone.logps, atol=1e-5)


def test_a_sliding_window_changes_nothing_within_it(small):
    model, variables = small
    model = model.clone(config=dataclasses.replace(CONFIG, sliding_window=32))
    out = generate(model, variables, PROMPTS, jax.random.key(0), config=SampleConfig(12, temperature=0))
    want = generate(small[0], variables, PROMPTS, jax.random.key(0), config=SampleConfig(12, temperature=0))
    assert texts(out) == texts(want)
    # Past it the cache holds more than the window; what it changes there, `weights/test_families.py` compares.
    beyond = generate(model, variables, PROMPTS, jax.random.key(0), config=SampleConfig(13, temperature=0))
    np.testing.assert_array_equal(beyond.tokens[:, :12], out.tokens)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[1], []], {}, "prompt 1 .* is empty"),
        ([[1, 101]], {}, "token id 101"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"row_ids": [1, 2]}, "row_ids"),
        ([[1]], {"prompt_lengths": [1]}, "prompt_lengths"),
        (np.ones((2, 3)), {}, "must be integers"),
        (np.ones((2, 3), np.int32), {"prompt_lengths": [1, 4]}, "do not fit"),
    ],
)
def test_bad_input_is_one_clear_line(small, prompts, options, message):
    model, variables = small
    with pytest.raises(InputError, match=message) as caught:
        generate(model, variables, prompts, jax.random.key(0), config=SAMPLED, **options)
    assert "\n" not in str(caught.value)


def test_the_package_exports_the_function():
    assert dpo_jax.sample.generate is engine.generate


def test_samples_of_a_prompt_are_as_many_draws_of_which_the_first_is_the_only_one(small):
    model, variables = small
    alone = texts(generate(model, variables, PROMPTS, jax.random.key(5), config=SAMPLED))
    config = dataclasses.replace(SAMPLED, stop_tokens=(alone[0][3],))
    out, plain = engine.generate_with_plain_logps(
        model, variables, PROMPTS, jax.random.key(5), config=config, samples=3
    )
    rows = texts(out)
    assert rows[0] == alone[0][:4]
    for i, prompt in enumerate(PROMPTS):
        assert alone[i][: len(rows[3 * i])] == rows[3 * i]
        three = [tuple(row) for row in rows[3 * i : 3 * i + 3]]
        assert len(set(three)) == 3, "samples of a prompt differ"
        for j in range(3 * i, 3 * i + 3):
            logits = full_logits(model, variables, prompt + rows[j])[len(prompt) - 1 : -1]
            at = np.arange(len(rows[j])), rows[j]
            np.testing.assert_allclose(out.logps[j][: len(rows[j])], log_softmax(logits / 0.9)[at], atol=1e-4)
            np.testing.assert_allclose(plain[j][: len(rows[j])], log_softmax(logits)[at], atol=1e-4)
            assert not np.asarray(plain[j][len(rows[j]) :]).any()
    with pytest.raises(InputError, match="samples 0"):
        generate(model, variables, PROMPTS, jax.random.key(5), config=SAMPLED, samples=0)


def test_a_bias_outside_the_vocabulary_is_refused(small):
    model, variables = small
    with pytest.raises(InputError, match="token id 101"):
        generate(model, variables, PROMPTS, jax.random.key(0), config=SampleConfig(logit_bias=((101, 1.0),)))


def greedy_by_transformers(folder, prompts, new, stop, **options):
    """Greedy continuations by `transformers`, one row at a time, the terminator included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                eos_token_id=list(stop) or None,
                pad_token_id=0,
                **{"repetition_penalty": 1.0, **options},
            )
        rows.append(out[0, len(prompt) :].tolist())
    return rows


@pytest.mark.parametrize(("kv_heads", "tied"), [(2, True), (4, False)])
def test_greedy_equals_transformers_on_tiny_models(tmp_path, kv_heads, tied):
    folder = tiny.folder(tmp_path / "model", kv_heads=kv_heads, tied=tied, seed=kv_heads)
    model, variables = dpo_jax.load_pretrained(str(folder))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 320, size).tolist() for size in (1, 5, 17, 30)]
    stop = (2,)
    config = SampleConfig(32, temperature=0, stop_tokens=stop)
    got = texts(generate(model, variables, prompts, jax.random.key(0), config=config))
    assert got == greedy_by_transformers(folder, prompts, 32, stop)


def test_greedy_with_every_adjustment_equals_transformers(tmp_path):
    folder = tiny.folder(tmp_path / "model", seed=3)
    model, variables = dpo_jax.load_pretrained(str(folder))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 20, size).tolist() for size in (1, 5, 17, 30)]
    free = texts(generate(model, variables, prompts, jax.random.key(0), config=SampleConfig(32, temperature=0)))
    stop = (free[0][1], free[1][9])
    config = SampleConfig(
        32,
        temperature=0,
        stop_tokens=stop,
        repetition_penalty=1.2,
        no_repeat_ngram=2,
        logit_bias=((free[2][0], -3.0), (9, 0.5)),
        min_new_tokens=5,
    )
    want = greedy_by_transformers(
        folder,
        prompts,
        32,
        stop,
        repetition_penalty=1.2,
        no_repeat_ngram_size=2,
        sequence_bias=[[[free[2][0]], -3.0], [[9], 0.5]],
        min_new_tokens=5,
    )
    got = texts(generate(model, variables, prompts, jax.random.key(0), config=config))
    assert got == want
    assert got != free


def test_no_way_to_generate_goes_beyond_the_context(small):
    """A prompt of 30 tokens and 40 new ones, or 33 alone, where the model was made for 32."""
    model, variables = small
    model = model.clone(config=dataclasses.replace(CONFIG, max_position=32))
    key, fits = jax.random.key(0), SampleConfig(2, temperature=0)
    prompts = [[3] * 5, [4] * 30]
    assert texts(generate(model, variables, prompts, key, config=fits))
    for given, config in ((prompts, SampleConfig(40)), ([[5] * 33], fits)):
        beams = SampleConfig(config.max_new_tokens, beams=2)
        ways = [
            lambda given=given, config=config: generate(model, variables, given, key, config=config),
            lambda given=given, config=config: generate_with_plain_logps(model, variables, given, key, config=config),
            lambda given=given, config=config: next(
                serve(model, variables, given, key, config=config, requests=[(i, 0) for i in range(len(given))], rows=2)
            ),
            lambda given=given, beams=beams: beam_search(model, variables, given, config=beams),
        ]
        for way in ways:
            with pytest.raises(InputError, match=r"exceed the model's context of 32 tokens; (lower|shorten)"):
                way()
