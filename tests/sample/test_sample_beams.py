"""Beam search against transformers, token for token."""

import jax
import numpy as np
import pytest
import tiny
from test_sample_engine import full_logits, greedy_by_transformers, log_softmax, texts

import dpo_jax
from dpo_jax.cli import main
from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model import variables as model_variables
from dpo_jax.sample import beam_search, generate, serve

rng = np.random.default_rng(0)
PROMPTS = [rng.integers(3, 30, size).tolist() for size in (1, 5, 17, 9, 30)]
NEW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.folder(tmp_path_factory.mktemp("beams") / "model", seed=2)


@pytest.fixture(scope="module")
def small(folder):
    return dpo_jax.load_pretrained(str(folder))


@pytest.fixture(scope="module")
def stop(small):
    """Tokens that likely continuations hold: beams end early, late and not at all."""
    model, variables = small
    free = texts(beam_search(model, variables, PROMPTS, config=SampleConfig(NEW, beams=4)))
    return tuple(dict.fromkeys((free[0][3], free[2][9])))


@pytest.mark.parametrize("penalty", [1.0, 0.6, pytest.param(-1.5, marks=pytest.mark.slow)])
def test_it_finds_what_transformers_finds(folder, small, stop, penalty):
    model, variables = small
    config = SampleConfig(NEW, beams=4, length_penalty=penalty, stop_tokens=stop)
    found = beam_search(model, variables, PROMPTS, config=config)
    got = texts(found)
    assert got == greedy_by_transformers(folder, PROMPTS, NEW, stop, num_beams=4, length_penalty=penalty)
    assert len({len(row) for row in got}) > 1
    assert any(row[-1] in stop for row in got)
    for prompt, row, logps in zip(PROMPTS, got, np.asarray(found.logps), strict=True):
        logits = full_logits(model, variables, prompt + row)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logps[: len(row)], log_softmax(logits)[np.arange(len(row)), row], atol=1e-4)
        assert not logps[len(row) :].any()


@pytest.mark.slow
def test_filters_act_in_a_search_too(folder, small, stop):
    model, variables = small
    config = SampleConfig(
        NEW,
        beams=3,
        stop_tokens=stop,
        repetition_penalty=1.3,
        no_repeat_ngram=2,
        min_new_tokens=4,
        logit_bias=((stop[0], -1.0),),
    )
    want = greedy_by_transformers(
        folder,
        PROMPTS,
        NEW,
        stop,
        num_beams=3,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        min_new_tokens=4,
        sequence_bias=[[[stop[0]], -1.0]],
    )
    assert texts(beam_search(model, variables, PROMPTS, config=config)) == want


@pytest.mark.slow
def test_a_mesh_changes_nothing(small, stop):
    model, variables = small
    config = SampleConfig(NEW, beams=4, stop_tokens=stop)
    mesh = make_mesh(2, 2, 2)
    sharded = jax.device_put(variables, model_variables.shardings(model, mesh))
    got = texts(beam_search(model, sharded, PROMPTS[:3], config=config, mesh=mesh))
    assert got == texts(beam_search(model, variables, PROMPTS, config=config))[:3]


def test_the_command_searches(folder, small, capsys):
    assert main(["generate", "--model", str(folder), "--prompt", "we like", "--raw", "--sample.beams", "4",
                 "--sample.max_new_tokens", "8"]) == 0  # fmt: skip
    model, variables = small
    tokenizer = dpo_jax.load_tokenizer(str(folder))
    prompt = tokenizer.encode("we like")
    config = SampleConfig(8, beams=4, stop_tokens=(tokenizer.eos_token_id,))
    ids = texts(beam_search(model, variables, [prompt], config=config))[0]
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    assert "we like" + capsys.readouterr().out == whole + "\n"


def test_bad_settings_are_refused(small):
    model, variables = small
    for options, message in (
        ({"beams": 1}, "beams 1 must be at least 2"),
        ({"length_penalty": 2.0}, "length_penalty has no effect without beams"),
        ({"beams": 2, "top_k": 3}, "no effect with beams"),
        ({"beams": 2, "temperature": 0.0}, "no effect with beams"),
        ({"beams": 2, "stop_strings": ("a",)}, "stop_strings cannot end a beam search"),
        ({"beams": 2, "length_penalty": float("inf")}, "finite"),
    ):
        with pytest.raises(InputError, match=message):
            SampleConfig(**options)
    with pytest.raises(InputError, match="needs beams"):
        beam_search(model, variables, PROMPTS, config=SampleConfig())
    with pytest.raises(InputError, match="lower beams"):
        beam_search(model, variables, PROMPTS, config=SampleConfig(beams=200))
    for function, options in ((generate, {}), (serve, {"requests": [(0, 0)], "rows": 1})):
        with pytest.raises(InputError, match="beams draw nothing"):
            list(function(model, variables, PROMPTS, jax.random.key(0), config=SampleConfig(beams=2), **options))
