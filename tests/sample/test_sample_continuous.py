"""A queue of requests through few rows: each gets the text that it gets alone."""

import dataclasses

import jax
import numpy as np
import pytest
from test_sample_engine import CONFIG, SAMPLED, make, texts

from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model import variables as model_variables
from dpo_jax.sample import continuous as module, generate, serve

rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 101, size).tolist() for size in (3, 20, 1, 6, 9, 14, 2, 11, 5)]
EVERY = [(i, 0) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def small():
    return make()


def run(small, *args, **options):
    model, variables = small
    return generate(model, variables, *args, **options)


@pytest.fixture(scope="module")
def alone(small):
    """The text of every prompt, and the stop tokens that make some of them short."""
    free = texts(run(small, PROMPTS, jax.random.key(1), config=SAMPLED))
    stop = (free[0][2], free[3][6], free[5][0])
    config = dataclasses.replace(SAMPLED, stop_tokens=stop)
    whole = run(small, PROMPTS, jax.random.key(1), config=config, samples=3)
    return config, texts(whole), [np.asarray(x)[m].tolist() for x, m in zip(whole.logps, whole.mask, strict=True)]


def answer(small, config, requests, rows, **options):
    """What is finished, by request."""
    model, variables = small
    found = {}
    for some in serve(
        model, variables, PROMPTS, jax.random.key(1), config=config, requests=requests, rows=rows, **options
    ):
        for done in some:
            assert done.request not in found
            assert len(done.tokens) == len(done.logps)
            found[done.request] = done
    return found


def test_a_request_alone_among_others_and_in_a_used_row(small, alone):
    config, want, logps = alone
    assert len({len(row) for row in want[::3]}) > 2, "rows end at different times"
    got = answer(small, config, EVERY, 3)
    assert sorted(got) == EVERY
    for i in range(len(PROMPTS)):
        assert got[i, 0].tokens == want[3 * i]
        np.testing.assert_allclose(got[i, 0].logps, logps[3 * i], atol=1e-4)
    assert answer(small, config, [(4, 0)], 1)[4, 0].tokens == want[12]


def test_samples_share_a_prefill_and_may_be_more_than_the_rows(small, alone, monkeypatch):
    config, want, _ = alone
    prefilled = []
    real = module._Batch._admit
    monkeypatch.setattr(
        module._Batch, "_admit", lambda self, state, units, *a: prefilled.extend(units) or real(self, state, units, *a)
    )
    requests = [(i, k) for i in range(4) for k in range(3)]
    got = answer(small, config, requests, 3)
    assert {request: done.tokens for request, done in got.items()} == {(i, k): want[3 * i + k] for i, k in requests}
    assert sorted(prefilled) == [(i, [0, 1, 2]) for i in range(4)]
    prefilled.clear()
    got = answer(small, config, requests[3:6], 2)
    assert {request: done.tokens for request, done in got.items()} == {(1, k): want[3 + k] for k in range(3)}
    assert prefilled == [(1, [0, 1]), (1, [2])]


@pytest.mark.slow
def test_penalties_follow_the_request_and_not_the_row(small):
    config = SampleConfig(12, temperature=0.9, repetition_penalty=1.5, no_repeat_ngram=2, min_new_tokens=3)
    stop = texts(run(small, PROMPTS, jax.random.key(1), config=config))[1][5]
    config = dataclasses.replace(config, stop_tokens=(stop,))
    want = texts(run(small, PROMPTS, jax.random.key(1), config=config))
    got = answer(small, config, EVERY, 3)
    assert [got[request].tokens for request in EVERY] == want


def test_the_host_may_end_a_row(small, alone, monkeypatch):
    config, want, _ = alone
    monkeypatch.setattr(module, "WATCHED_CHUNK", 2)
    looked = []

    def ended(request, tokens):
        looked.append(len(tokens))
        return 3 if len(tokens) >= 3 else None

    got = answer(small, config, EVERY, 3, ended=ended)
    assert [got[request].tokens for request in EVERY] == [row[:3] for row in want[::3]]
    assert max(looked) < 8, "a row that was ended stops"


def test_long_and_short_prompts_do_not_share_a_cache(small):
    model, _ = small
    units = [(0, [0]), (1, [0]), (2, [0]), (3, [0])]
    groups = list(module._groups(model, [10, 500, 300, 40], units, SampleConfig(32)))
    assert groups == [(32 + 512, [(1, [0]), (2, [0])]), (32 + 48, [(3, [0]), (0, [0])])]


@pytest.mark.slow
def test_a_mesh_changes_nothing(alone):
    config, _, _ = alone
    model, variables = make(dataclasses.replace(CONFIG, vocab_size=104))
    want = texts(generate(model, variables, PROMPTS, jax.random.key(1), config=config))
    mesh = make_mesh(2, 2, 2)
    sharded = jax.device_put(variables, model_variables.shardings(model, mesh))
    got = answer((model, sharded), config, EVERY, 3, mesh=mesh)
    assert [got[request].tokens for request in EVERY] == want


def test_bad_input_is_one_clear_line(small):
    config = SampleConfig(8, stop_strings=("a",))
    with pytest.raises(InputError, match="need a tokenizer"):
        answer(small, config, EVERY, 2)
    with pytest.raises(InputError, match="need a tokenizer"):
        run(small, PROMPTS, jax.random.key(1), config=config)
    with pytest.raises(InputError, match="rows 0"):
        answer(small, SAMPLED, EVERY, 0)
