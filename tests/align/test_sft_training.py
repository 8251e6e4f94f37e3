"""Steps of supervised fine-tuning one after another, and on real dialogues."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pairs import TINY, gradients, model_and_variables, quick_jit, with_sgd
from tokenizers_for_tests import byte_level
from windows import make_sequences, packed

from dpo_jax.align import sft
from dpo_jax.config import OptimizerConfig, SFTConfig, SFTDataConfig
from dpo_jax.data.sets.loader import eval_windows
from dpo_jax.data.sets.sequences import load_dialogues

SMALL = dataclasses.replace(TINY, num_layers=1)
SEQUENCES = make_sequences(12)


def test_training_learns_the_answers():
    """With adapters and bfloat16, the base being frozen; `test_run_sft.py` trains all weights in float32."""
    model, variables = model_and_variables(SMALL, lora=4, dtype=jnp.bfloat16)
    frozen = jax.tree.map(np.asarray, variables["params"])
    config = SFTConfig(optimizer=OptimizerConfig(learning_rate=3e-2))
    state = sft.init_state(model, variables, config)
    step = quick_jit(sft.train_step, config=config)
    batch = packed(SEQUENCES, 4, 30)
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["mean_token_accuracy"] > 0.5
    assert int(state.step) == 30
    assert set(state.trainable) == {"adapters"}
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal(frozen, jax.tree.map(np.asarray, state.variables["params"]))


def test_the_sampled_loss_learns_too():
    model, variables = model_and_variables(SMALL)
    config = SFTConfig(loss="sampled", negatives=16, optimizer=OptimizerConfig(learning_rate=5e-3))
    state = sft.init_state(model, variables, config)
    step, judge = quick_jit(sft.train_step, config=config), quick_jit(sft.eval_step, config=config)
    batch = packed(SEQUENCES, 4, 30)
    before = float(jnp.sum(judge(state, batch)["nll"]))
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert "mean_token_accuracy" not in metrics
    assert np.ptp(np.diff(losses)) > 1e-3  # another sample in each step
    assert float(jnp.sum(judge(state, batch)["nll"])) < 0.4 * before


def step_of(model, variables, batch, accumulate):
    """One step of plain gradient descent: (metrics, gradients)."""
    config = SFTConfig(accumulate=accumulate)
    state = with_sgd(sft.init_state(model, variables, config))
    after, metrics = quick_jit(sft.train_step, config=config)(state, batch)
    return metrics, gradients(state, after)


@pytest.fixture(scope="module")
def real_dialogues(shared_data):
    """Chinese dialogues of OASST1, some of several turns, the loss on their answers."""
    source = str(shared_data / "oasst_zh" / "sft.jsonl")
    tokenizer = byte_level(chat_template=tiny.TEMPLATE)
    config = SFTDataConfig(max_length=150, limit=20)
    return load_dialogues(source, tokenizer, config, vocab_size=512)


def test_real_dialogues_packed_padded_and_accumulated_are_one(real_dialogues):
    model, variables = model_and_variables(dataclasses.replace(SMALL, vocab_size=512))

    def batch(window: int | None, size: int):
        (only,) = eval_windows(real_dialogues, batch_size=size, window=window, buckets=1)
        return only[1]

    padded, packed = batch(None, len(real_dialogues)), batch(480, 8)
    assert packed.rows.shape[1] > 1
    assert packed.segments.max() > 1
    metrics, grads = step_of(model, variables, padded, 1)
    assert 0.2 < metrics["target_tokens"] / metrics["tokens"] < 0.95
    for batch_, accumulate in ((packed, 1), (packed, 4)):
        others, other_grads = step_of(model, variables, batch_, accumulate)
        assert abs(metrics["loss"] - others["loss"]) < 1e-5
        for name in ("mean_token_accuracy", "entropy", "target_tokens", "tokens", "grad_norm"):
            np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5)
        chex.assert_trees_all_close(grads, other_grads, rtol=0, atol=1e-5)
