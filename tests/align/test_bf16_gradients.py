"""Gradients in bfloat16 beside those in float32, for thousands of tokens and every loss with a head."""

import functools
import json
import sys
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pairs import quick_jit

from dpo_jax.align.sampled_softmax import draw, sampled_logps
from dpo_jax.config.training.dpo import Loss
from dpo_jax.model import logprobs, products

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bf16_gradients
import bf16_model_gradients

OFTEN = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 1})
"""Of a program that runs on thousands of tokens for every loss: it takes a third of the time, and its compiling less
than that saves."""


@pytest.mark.parametrize("chunks", [2, 256])
def test_gradient_of_the_head_in_one_or_many_chunks(chunks):
    """4,096 tokens; a sum over the chunks in bfloat16 was off by 2 % with 256 of them, and sampled by 1.6 %."""
    for way, found in bf16_gradients.head_errors(8, 512, 32, 256, chunks=chunks):
        assert found["head"] < 0.005, way
        assert found["hidden"] < 0.005, way


def test_chunks_change_nothing():
    """The same program in bfloat16, in 2 chunks and in 512: rounded once, at the end."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, 512, 32)), jnp.bfloat16)
    matrix = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    targets = jnp.asarray(bf16_gradients.draw_ids(rng, 64, (4, 512)))

    def slope(budget):
        return jax.grad(lambda w: jnp.mean(logprobs.token_logps(hidden, w, targets, budget_bytes=budget)))(matrix)

    one, many = slope(1 << 30), slope(1)
    assert jnp.linalg.norm(many - one) < 1e-5 * jnp.linalg.norm(one)


def test_an_id_drawn_or_asked_for_a_thousand_times():
    """Its row of the head's gradient is a sum over all of them; in bfloat16 that stops growing at some hundreds."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(1 + 0.1 * rng.normal(size=(1, 2048, 8)), jnp.bfloat16)
    matrix = jnp.asarray(rng.normal(size=(8, 64)), jnp.float32)
    targets, drawn = jnp.full((1, 2048), 7), draw(jax.random.key(0), 64, 4096, "log_uniform")

    def slope(hidden, matrix):
        return jax.grad(lambda w: jnp.sum(sampled_logps(hidden, w, targets, drawn, budget_bytes=1 << 20)))(matrix)

    rough, exact = slope(hidden, matrix.astype(jnp.bfloat16)), slope(hidden.astype(jnp.float32), matrix)
    for token in (0, 7):
        norms = [float(jnp.linalg.norm(x[:, token].astype(jnp.float32))) for x in (rough, exact)]
        assert norms[0] == pytest.approx(norms[1], rel=0.01)


@pytest.mark.parametrize("which", ["scaled", "shifted"])
def test_scales_and_biases_sum_in_float32(which):
    """One token pulls by 1,024 and 2,000 others by 1; in bfloat16, whose steps are 8 there, these would be lost."""
    g = jnp.ones((2001, 1), jnp.bfloat16).at[0].set(1024)
    x, weight = jnp.ones((2001, 1), jnp.bfloat16), jnp.ones(1)
    shifted = functools.partial(products.shifted, dtype=jnp.bfloat16)
    f, x = (products.scaled, x) if which == "scaled" else (shifted, x.astype(jnp.float32))
    _, back = jax.vjp(f, x, weight)
    by_x, by_weight = jax.jit(back)(g)
    assert by_x.dtype == x.dtype
    assert by_weight == 3024
    text = str(jax.make_jaxpr(back)(g))
    assert "f32[1] = reduce_sum" in text
    assert "bf16[1] = reduce_sum" not in text


@pytest.mark.slow
def test_the_head_of_every_loss():
    """4,096 tokens, the same bfloat16 hidden states in both; the output matrix, or the head that a loss reads."""
    found = dict(bf16_gradients.loss_head_errors(16, 256, 32, 64, jit=quick_jit, often=OFTEN))
    assert set(found) == set(bf16_gradients.LOSSES)
    # The others give the two sums other weights, by the same functions.
    others = {"apo_zero_unpaired", "bco_pair", "aot", "aot_unpaired", "odpo", "sft"}
    assert set(bf16_gradients.PREFERENCES) | others == set(get_args(Loss))
    for loss, errors in found.items():
        for name, error in errors.items():
            assert error < 0.005, f"{loss}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "losses"),
    [
        ({}, ("sft", "reward", "ppo", "grpo", *bf16_gradients.PREFERENCES)),
        ({"tied": True, "accumulate": 1}, ("sft sampled", "dpo with nll")),
        ({"lora": 4, "accumulate": 1}, ("sft", *bf16_gradients.PREFERENCES)),
    ],
)
def test_every_parameter_of_a_model(kind, losses):
    """Two layers, 4,096 tokens, the head in pieces of one position a row, two micro-batches or one."""
    compilers: Any = {"jit": quick_jit, "often": OFTEN}
    found = dict(bf16_gradients.step_errors(16, 256, 32, 64, chunks=128, losses=losses, **compilers, **kind))
    assert set(found) == set(losses)
    for loss, errors in found.items():
        for name, error in errors.items():
            assert error < 0.02, f"{loss}: {name}"


def test_every_sum_is_written_out_in_float32() -> None:
    """Also within a loop: in bfloat16 256 + 1 is 256."""

    def function(ones: jax.Array) -> jax.Array:
        def added(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return carry.at[jnp.zeros(len(ones), jnp.int32)].add(ones), None

        return jax.lax.scan(added, jnp.zeros(1, jnp.bfloat16), None, length=1)[0]

    ones = jnp.ones(1024, jnp.bfloat16)
    assert jax.jit(function)(ones)[0] == 256
    assert jax.jit(bf16_model_gradients.summed_in_float32(function))(ones)[0] == 1024


@pytest.mark.slow
def test_a_model_against_all_sums_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.folder(tmp_path / "model", layers=2, hidden=32)
    tiny.preferences(tmp_path / "rows.jsonl", rows=40)
    words = ["--data", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model")]
    bf16_model_gradients.main([*words, "--tokens", "256", "--length", "64", "--chunks", str(2**14)])
    found = json.loads(capsys.readouterr().out)
    assert found["error"] < 0.02
    assert found["largest ratio"][1] < 1.2
    assert 0 < found["chunks move most"][1] < 2e-3, "0: the head was not computed in more pieces"
