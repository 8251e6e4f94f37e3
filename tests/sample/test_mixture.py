"""Sampling from the geometric mixture of two models, against both models by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import model_and_variables, quick_jit

from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.model.cache import Two
from dpo_jax.sample import decode, generate_mixture
from dpo_jax.sample.mixture import MixedDecoder
from dpo_jax.sample.program import Program, make_weights

SHARE, PROMPT = 0.3, [5, 9, 2, 7]


@pytest.fixture(scope="module")
def two():
    """A model with adapters that change it, and the model beneath them."""
    model, variables = model_and_variables(lora=4, noise=1.0)
    return model, variables, {"params": variables["params"]}


def exact(two, ids, temperature: float = 1.0) -> np.ndarray:
    """float64 [T, V]: log of pi^(1-a) ref^a / Z behind each token, from plain forward passes."""
    model, *both = two
    run = quick_jit(lambda variables, ids: model.apply(variables, model.apply(variables, ids), method="logits"))
    own, other = (np.asarray(jax.nn.log_softmax(run(v, np.asarray([ids]))[0] / temperature), np.float64) for v in both)
    mixed = (1 - SHARE) * own + SHARE * other
    return mixed - np.log(np.exp(mixed).sum(-1, keepdims=True))


def test_probabilities_are_the_mixtures(two) -> None:
    """Of every token, behind the prompt and behind one token more, to 1e-6."""
    model, variables, base = two
    program = Program(
        model, unrolled=True, cache="float32", implementation="threefry2x32", layout="training", mesh=None
    )
    settings = decode.settings(SampleConfig(max_new_tokens=4), model.config.vocab_size)

    @quick_jit
    def run(variables, base, prompts):
        weights = (make_weights(program, v, None) for v in (variables, base))
        decoder = MixedDecoder(program, *weights, jnp.float32(SHARE), settings)
        first, cache = decoder.prefill(prompts, jnp.asarray([4]), 16)
        assert isinstance(cache, Two)
        second, _ = decoder.step(jnp.asarray([11]), jnp.asarray([4]), cache)
        return jax.nn.softmax(first[0]), jax.nn.softmax(second[0])

    wanted = np.exp(exact(two, [*PROMPT, 11]))
    for found, row in zip(run(variables, base, jnp.asarray([PROMPT])), wanted[3:], strict=True):
        np.testing.assert_allclose(found, row, atol=1e-6)
    own = np.exp(exact((model, variables, variables), PROMPT))[-1]
    assert np.abs(own - wanted[3]).max() > 0.01, "the mixture is told from the policy"


@pytest.mark.slow
def test_what_is_drawn_and_its_log_probabilities(two) -> None:
    model, variables, base = two
    config = SampleConfig(max_new_tokens=3, temperature=0.7)
    out = generate_mixture(model, variables, base, SHARE, [PROMPT], jax.random.key(0), config=config, samples=512)
    tokens, _, logps = (np.asarray(x) for x in out)
    for row in range(3):
        wanted = exact(two, [*PROMPT, *tokens[row]], 0.7)[3:6]
        np.testing.assert_allclose(logps[row], wanted[np.arange(3), tokens[row]], atol=1e-5)
    first = np.exp(exact(two, PROMPT, 0.7)[-1])
    share = np.bincount(tokens[:, 0], minlength=len(first)) / len(tokens)
    assert 0.5 * np.abs(share - first).sum() < 0.2
    with pytest.raises(InputError, match="share 1 must lie between 0 and 1"):
        generate_mixture(model, variables, base, 1, [PROMPT], jax.random.key(0), config=config)
