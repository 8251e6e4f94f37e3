"""The DPO step on a tiny Llama: its identities, its metrics, and what it refuses."""

import dataclasses
from functools import cache, partial
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import TINY, gradients, make_batch, model_and_variables, pad, quick_jit, take, toy_policy, with_sgd

from dpo_jax.align import dpo
from dpo_jax.align.figures import WEIGHTS, defined
from dpo_jax.config import DPOConfig, Loss, OptimizerConfig
from dpo_jax.errors import InputError
from dpo_jax.types import CHOSEN, REJECTED

SMALL = dataclasses.replace(TINY, num_layers=1)
RELATIVES = ("apo_zero_unpaired", "bco_pair", "aot", "aot_unpaired", "odpo", "sft")
"""Those of `test_dpo_relatives.py`."""
EVERY_LOSS = [name for name in get_args(Loss) if name not in RELATIVES]
COMMON = ("sigmoid", "ipo", "simpo", "orpo", "kto", "sppo_hard", "apo_down", "discopop")
"""Losses of unlike shapes; the others differ from one of them in one line, which `test_dpo_losses.py` holds."""
PLAIN = DPOConfig()
LOSSES = [pytest.param(name, marks=[] if name in COMMON else pytest.mark.slow) for name in EVERY_LOSS]


@pytest.fixture(scope="module")
def small():
    return model_and_variables(SMALL)


@pytest.fixture(scope="module")
def small_state(small):
    return start(*small)


@pytest.fixture(scope="module")
def adapted():
    return model_and_variables(SMALL, lora=2, noise=0.3)


@pytest.fixture(scope="module")
def adapted_state(adapted):
    """Of one reference as of another: its base."""
    return start(*adapted)


@cache
def toy_state():
    return start(*toy_policy())


def start(model, variables, config=PLAIN, **kwargs):
    """A state of plain gradient descent."""
    return with_sgd(dpo.init_state(model, variables, config, **kwargs))


@cache
def step_of(config):
    """One program for all batches of a shape, where their states are the same one."""
    return quick_jit(dpo.train_step, config=config)


def run(state, batch, config):
    """One jitted step of a state of `start`: (metrics, gradients)."""
    after, metrics = step_of(config)(state, batch)
    return metrics, gradients(state, after)


@cache
def toy_logps_of(masked):
    """The toy policy's sums of log-probabilities, batch -> [B, K]; no loss changes them."""
    model, variables = toy_policy()
    config = DPOConfig(mask_format_tokens=masked, layout="separate")
    return quick_jit(lambda batch: dpo.reference_logps(model.apply, variables, batch, config=config))


def assert_same(a, b, rtol=2e-5, atol=2e-6):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def scalars(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith("rows/")}


# ---------------------------------------------------------------- identities


@pytest.mark.parametrize(
    ("lora", "jit"), [(0, jax.jit), (2, quick_jit), pytest.param(2, lambda step: step, marks=pytest.mark.slow)]
)
def test_policy_equal_to_reference(small, lora, jit):
    model, variables = model_and_variables(SMALL, lora=lora) if lora else small
    config = DPOConfig(reference="live")
    step = jit(partial(dpo.train_step, config=config))
    _, metrics = step(dpo.init_state(model, variables, config), make_batch())
    np.testing.assert_array_equal(metrics["loss"], np.float32(np.log(2)))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        np.testing.assert_array_equal(metrics[name], 0)
    assert metrics["grad_norm"] > 0.1


def test_swapping_chosen_and_rejected_negates_the_rewards(small):
    model, variables = small
    config, batch = DPOConfig(), make_batch()
    swapped = jax.tree.map(lambda x: x[:, ::-1] if x.ndim > 1 and x.shape[1] == 2 else x, batch)
    state = dpo.init_state(model, variables, config)
    step = quick_jit(dpo.eval_step, config=config)
    there, back = step(state, batch), step(state, swapped)
    assert_same(there["rewards/chosen"], back["rewards/rejected"])
    assert_same(there["logps/rejected"], back["logps/chosen"])
    margin = there["rewards/chosen"] - there["rewards/rejected"]
    assert_same(back["loss"] - there["loss"], margin, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_accumulation_equals_one_big_batch(name):
    batch = make_batch(responses=3)
    batch = dataclasses.replace(batch, weights=np.asarray([1, 1, 0, 1, 1, 1, 1, 0], np.float32))
    if name == "kto":  # unpaired rows, spread unevenly over the micro-batches
        lengths = batch.response_lengths.copy()
        lengths[[0, 4], 1] = lengths[3, 0] = 0
        batch = dataclasses.replace(batch, response_lengths=lengths)
    config = DPOConfig(loss=name, nll_coefficient=0.3, nll_normalization="token", layout="separate")
    whole, whole_gradients = run(toy_state(), batch, config)
    assert np.isfinite(whole["grad_norm"])
    parts, parts_gradients = run(toy_state(), batch, dataclasses.replace(config, accumulate=4))
    assert_same(whole, parts, rtol=1e-5)
    scale = float(whole["grad_norm"])
    assert_same(whole_gradients, parts_gradients, rtol=1e-4, atol=1e-6 * max(scale, 1))


@pytest.mark.slow
def test_accumulation_of_a_llama_with_a_live_reference(adapted_state):
    batch = make_batch(responses=3)
    config = DPOConfig(loss="kto", reference="live")
    whole, whole_gradients = run(adapted_state, batch, config)
    parts, parts_gradients = run(adapted_state, batch, dataclasses.replace(config, accumulate=2))
    assert_same(whole, parts)
    assert_same(whole_gradients, parts_gradients, rtol=1e-4)


def test_padding_changes_nothing(small_state):
    batch = make_batch()
    config = DPOConfig(mask_format_tokens=True, nll_coefficient=0.1)
    tight, tight_gradients = run(small_state, batch, config)
    wide, wide_gradients = run(small_state, pad(batch, 5, 9), config)
    assert_same(tight, wide)
    assert_same(tight_gradients, wide_gradients, rtol=1e-4)


def test_shared_prompt_equals_separate_sequences(small_state):
    batch = make_batch(responses=3)
    config = DPOConfig(loss="kto")
    shared, shared_gradients = run(small_state, batch, config)
    separate, separate_gradients = run(small_state, batch, dataclasses.replace(config, layout="separate"))
    assert_same(shared, separate)
    assert_same(shared_gradients, separate_gradients, rtol=1e-4)


@pytest.mark.parametrize("mask_format_tokens", [False, True])
def test_cached_reference_equals_live_reference(adapted, adapted_state, mask_format_tokens):
    model, variables = adapted
    batch = make_batch()
    live = DPOConfig(reference="live", mask_format_tokens=mask_format_tokens)
    cached = dataclasses.replace(live, reference="cached")
    base = {"params": variables["params"]}
    logps = quick_jit(lambda base: dpo.reference_logps(model.apply, base, batch, config=cached))(base)
    assert logps.shape == (8, 2)
    there, there_gradients = run(adapted_state, dataclasses.replace(batch, reference_logps=None), live)
    here, here_gradients = run(adapted_state, dataclasses.replace(batch, reference_logps=logps), cached)
    assert abs(there["rewards/margins"]) > 1e-3
    assert_same(there, here)
    assert_same(there_gradients, here_gradients)


@pytest.mark.slow
def test_full_fine_tuning_against_its_own_copy_or_another_policy(small, small_state):
    model, variables = small
    _, other = model_and_variables(SMALL, seed=5)
    config, batch = DPOConfig(reference="live"), make_batch()
    logps = dpo.reference_logps(model.apply, other, batch, config=config)
    there, _ = run(start(model, variables, config, reference=other), batch, config)
    here, _ = run(small_state, dataclasses.replace(batch, reference_logps=logps), DPOConfig())
    assert_same(there, here)


def test_a_live_reference_stays_where_training_started(small):
    """The state is donated; its reference must not be: after some steps it still gives the first log-probabilities."""
    model, variables = small[0], jax.tree.map(jnp.copy, small[1])
    config = DPOConfig(reference="live", optimizer=OptimizerConfig(learning_rate=1e-2))
    batch = make_batch()
    logps = quick_jit(lambda variables: dpo.reference_logps(model.apply, variables, batch, config=config))
    first = logps(variables)
    state, step = dpo.init_state(model, variables, config), quick_jit(dpo.train_step, donate=(0,), config=config)
    for _ in range(3):
        state, metrics = step(state, batch)
    assert metrics["loss"] < 0.5
    assert_same(first, logps({"params": state.frozen["reference"]}))


def test_filler_rows_change_nothing(small_state):
    batch = make_batch(6)
    fillers = take(make_batch(8, seed=1), slice(6, 8))
    fillers = dataclasses.replace(
        fillers,
        weights=np.zeros(2, np.float32),
        rows=np.full(2, -1, np.int32),
        response_lengths=np.asarray([[7, 3], [0, 0]], np.int32),
        reference_logps=np.asarray([[np.nan, np.inf], [np.nan, -np.inf]], np.float32),
    )
    filled = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, fillers)
    config = DPOConfig(nll_coefficient=1.0, nll_normalization="token")
    without, without_gradients = run(small_state, batch, config)
    with_fillers, with_gradients = run(small_state, filled, config)
    assert_same(scalars(without), scalars(with_fillers))
    assert_same(without_gradients, with_gradients, rtol=1e-4)
    np.testing.assert_array_equal(with_fillers["rows/nonfinite"], -1)


def test_nan_of_absent_responses_cannot_leak(small_state):
    batch = make_batch(responses=3)
    lengths, logps = batch.response_lengths.copy(), batch.reference_logps.copy()
    lengths[0, 0] = lengths[1, 1] = lengths[2, 2] = 0
    clean = dataclasses.replace(batch, response_lengths=lengths)
    logps[lengths == 0] = np.nan
    spoilt = dataclasses.replace(clean, reference_logps=logps)
    a, b = (run(small_state, x, DPOConfig(loss="kto")) for x in (clean, spoilt))
    chex.assert_tree_all_finite(a)
    chex.assert_trees_all_equal(a, b)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("name", LOSSES)
def test_the_steps_loss_is_that_of_its_log_probabilities(name):
    model, variables = toy_policy()
    batch = make_batch(responses=3)
    config = DPOConfig(loss=name, mask_format_tokens=True, nll_coefficient=0.5, layout="separate")
    rows = quick_jit(dpo.eval_step, config=config)(dpo.init_state(model, variables, config), batch)
    sums, whole = (np.asarray(toy_logps_of(masked)(batch)) for masked in (True, False))
    real = np.arange(7) < batch.response_lengths[..., None]
    scored = (real & ~batch.format_masks).sum(-1)
    kl = np.maximum(0, np.mean(sums[:, 2] - batch.reference_logps[:, 2])) if name == "kto" else 0.0
    expected = dpo.preference_loss(
        sums[:, 0],
        sums[:, 1],
        batch.reference_logps[:, 0],
        batch.reference_logps[:, 1],
        chosen_lengths=scored[:, 0],
        rejected_lengths=scored[:, 1],
        config=config,
        chosen_nll=-whole[:, 0],
        nll_lengths=batch.response_lengths[:, 0],
        kl=kl,
    )
    assert_same(rows["loss"], expected, rtol=1e-4, atol=1e-4)
    assert_same(rows["nll"], -whole[:, 0])
    assert_same(rows["logps/chosen"], sums[:, 0])
    assert not np.allclose(sums[:, :2], whole[:, :2])


def test_metrics(small):
    model, variables = small
    batch = make_batch()
    batch = dataclasses.replace(batch, weights=np.asarray([1, 1, 1, 1, 1, 0, 1, 1], np.float32))
    config = DPOConfig(nll_coefficient=0.5, label_smoothing=0.2, optimizer=OptimizerConfig(learning_rate=0.5))
    state = dpo.init_state(model, variables, config)
    rows = take(quick_jit(dpo.eval_step, config=config)(state, batch), batch.weights > 0)
    _, metrics = quick_jit(dpo.train_step, config=config)(state, batch)
    real = take(batch, batch.weights > 0)
    chosen, rejected = np.asarray(rows["rewards/chosen"]), np.asarray(rows["rewards/rejected"])
    assert_same(chosen, 0.1 * (rows["logps/chosen"] - real.reference_logps[:, 0]), atol=1e-5)
    expected = {
        "loss": np.mean(rows["loss"]),
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": chosen.mean() - rejected.mean(),
        "rewards/accuracies": np.mean(chosen > rejected),
        "logps/chosen": np.mean(rows["logps/chosen"]),
        "logps/rejected": np.mean(rows["logps/rejected"]),
        "logps/chosen_change": chosen.mean() / 0.1,
        "lengths/chosen": real.response_lengths[:, 0].mean(),
        "lengths/rejected": real.response_lengths[:, 1].mean(),
        "tokens": real.prompt_lengths.sum() + real.response_lengths.sum(),
        "nll_loss": np.mean(rows["nll"] / real.response_lengths[:, 0]),
        "learning_rate": 0.5,
    }
    assert_same({k: metrics[k] for k in expected}, {k: np.float32(v) for k, v in expected.items()})
    weights = {name for name in metrics if name.startswith(WEIGHTS)}
    assert set(metrics) == set(expected) | weights | {"grad_norm", "rows/nonfinite"}
    assert {float(metrics[name]) for name in weights} == {7.0}
    assert {v.dtype for v in scalars(metrics).values()} == {jnp.dtype("float32")}
    assert 0 < metrics["rewards/accuracies"] < 1


@pytest.mark.parametrize("normalization", ["sequence", "token"])
@pytest.mark.parametrize("absent", [CHOSEN, REJECTED])
def test_a_side_that_a_batch_lacks_is_undefined_and_the_step_is_sound(absent: int, normalization) -> None:
    batch = make_batch(rows=4, responses=3)
    lengths = batch.response_lengths.copy()
    lengths[:, absent] = 0
    batch = dataclasses.replace(batch, response_lengths=lengths)
    config = DPOConfig(loss="kto", layout="separate", nll_coefficient=1.0, nll_normalization=normalization)
    new, metrics = step_of(config)(toy_state(), batch)
    assert int(new.step) == 1
    chex.assert_tree_all_finite(new.trainable)
    values = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
    kept = defined(values)
    side = ("chosen", "rejected")[absent]
    missing = {f"{name}/{side}" for name in ("rewards", "logps", "lengths")}
    missing |= {"rewards/margins", "rewards/accuracies"}
    missing |= {"logps/chosen_change", "nll_loss"} if absent == CHOSEN else set()
    assert {name for name in values if not name.startswith(WEIGHTS)} - set(kept) == missing
    assert np.isfinite(list(kept.values())).all()
    assert np.isnan([values[name] for name in missing]).all()
    # A broken row is another thing: its figures are there, and are NaN.
    nan = dataclasses.replace(batch, reference_logps=np.full_like(batch.reference_logps, np.nan))
    spoilt, metrics = step_of(config)(toy_state(), nan)
    kept = defined({name: float(value) for name, value in metrics.items() if value.ndim == 0})
    assert np.isnan([kept["loss"], kept[f"rewards/{('rejected', 'chosen')[absent]}"]]).all()
    assert int(spoilt.step) == 0


def test_kto_nll_by_sequence_is_a_mean_over_chosen_responses() -> None:
    batch = make_batch(rows=4, responses=3)
    lengths = batch.response_lengths.copy()
    lengths[1:, CHOSEN] = lengths[0, REJECTED] = 0
    batch = dataclasses.replace(batch, response_lengths=lengths)
    config = DPOConfig(loss="kto", layout="separate", nll_coefficient=1.0)
    with_nll, _ = run(toy_state(), batch, config)
    without, _ = run(toy_state(), batch, dataclasses.replace(config, nll_coefficient=0.0))
    logps = toy_logps_of(False)(batch)
    nll = -float(logps[0, CHOSEN]) / lengths[0, CHOSEN]
    assert float(with_nll["loss"] - without["loss"]) == pytest.approx(nll, rel=1e-5)
    assert float(with_nll["nll_loss"]) == pytest.approx(nll, rel=1e-5)
    parts, _ = run(toy_state(), batch, dataclasses.replace(config, accumulate=4))
    assert float(parts["loss"]) == pytest.approx(float(with_nll["loss"]), rel=1e-5)


def test_kto_kl_point_is_over_all_mismatched_responses() -> None:
    config, batch = DPOConfig(loss="kto", layout="separate"), make_batch(responses=4)
    lengths = batch.response_lengths.copy()
    lengths[:3, 3] = 0
    batch = dataclasses.replace(batch, response_lengths=lengths)
    ratios = np.asarray(toy_logps_of(False)(batch) - batch.reference_logps)
    found, _ = run(toy_state(), batch, config)
    there = ratios[:, 2:][lengths[:, 2:] > 0]
    assert len(there) == 13
    np.testing.assert_allclose(found["kl"], max(0.0, there.mean()), rtol=1e-4)


def test_kto_kl_point_comes_from_mismatched_responses_only():
    config, batch = DPOConfig(loss="kto", layout="separate"), make_batch(responses=3)
    logps = toy_logps_of(False)(batch)
    ratios = np.asarray(logps[:, 2] - batch.reference_logps[:, 2])
    for shift in (ratios.mean() - 1.5, ratios.mean() + 1.5):
        reference = batch.reference_logps.copy()
        reference[:, 2] += shift
        metrics, _ = run(toy_state(), dataclasses.replace(batch, reference_logps=reference), config)
        np.testing.assert_allclose(metrics["kl"], max(0.0, ratios.mean() - shift), atol=1e-4)


def test_learning_rate_and_step_count():
    model, variables = toy_policy()
    config = DPOConfig(optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2), layout="separate")
    state, rates = dpo.init_state(model, variables, config), []
    step = quick_jit(dpo.train_step, config=config)
    for _ in range(4):
        state, metrics = step(state, make_batch())
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [1e-3, 2e-3, 3e-3, 3e-3], rtol=1e-6)
    assert int(state.step) == 4


@pytest.mark.parametrize(
    ("lora", "dtype"),
    [
        (0, jnp.float32),
        pytest.param(0, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(4, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_training_learns_the_preferences(small, lora, dtype):
    model, variables = model_and_variables(SMALL, lora=lora) if lora else small
    model = model.clone(dtype=dtype)
    if lora:
        variables = {**variables, "params": jax.tree.map(lambda x: x.astype(dtype), variables["params"])}
    config = DPOConfig(reference="live", optimizer=OptimizerConfig(learning_rate=2e-2 if lora else 5e-3))
    state = dpo.init_state(model, variables, config)
    step = quick_jit(dpo.train_step, config=config)
    for _ in range(15):
        state, metrics = step(state, make_batch())
    assert metrics["loss"] < 0.3
    assert metrics["rewards/accuracies"] == 1
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


def test_bfloat16_compute_stays_near_float32(small, small_state):
    model, variables = small
    batch, config = make_batch(), DPOConfig()
    exact, _ = run(small_state, batch, config)
    rough, _ = run(start(model.clone(dtype=jnp.bfloat16), variables), batch, config)
    np.testing.assert_allclose(rough["loss"], exact["loss"], rtol=0.05)
    np.testing.assert_allclose(rough["logps/chosen"], exact["logps/chosen"], rtol=0.02)


# ---------------------------------------------------------------- trouble


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nonfinite_row_is_named_and_the_state_kept(accumulate):
    model, variables = toy_policy()
    batch = make_batch()
    reference = batch.reference_logps.copy()
    reference[4, 1], reference[5, 0] = np.nan, np.inf
    config = DPOConfig(accumulate=accumulate, layout="separate")
    state = dpo.init_state(model, variables, config)
    step = quick_jit(dpo.train_step, config=config)
    after, metrics = step(state, dataclasses.replace(batch, reference_logps=reference))
    assert not np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(metrics["rows/nonfinite"], [-1, -1, -1, -1, 5, 6, -1, -1])
    chex.assert_trees_all_equal(after, state)
    after, metrics = step(state, batch)
    assert np.isfinite(metrics["loss"])
    np.testing.assert_array_equal(metrics["rows/nonfinite"], -1)
    assert int(after.step) == 1


def test_nonfinite_weights_show_in_every_row(small_state):
    spoilt = jax.tree.map(lambda x: x.at[0].set(jnp.nan), small_state.trainable)
    _, metrics = step_of(DPOConfig())(dataclasses.replace(small_state, trainable=spoilt), make_batch())
    np.testing.assert_array_equal(metrics["rows/nonfinite"], np.arange(1, 9))


def test_missing_pieces_are_refused(small):
    model, variables = small
    batch, config = make_batch(), DPOConfig()
    state = dpo.init_state(model, variables, config)

    def refused(match, batch, config):
        with pytest.raises(InputError, match=match) as error:
            dpo.train_step(state, batch, config=config)
        assert "\n" not in str(error.value)

    refused("no reference_logps", dataclasses.replace(batch, reference_logps=None), config)
    refused("holds no reference policy", batch, DPOConfig(reference="live"))
    refused("must have 2 responses", take(batch, (slice(None),)).replace(responses=batch.responses[:, :1]), config)
    refused("must have 3 responses", batch, DPOConfig(loss="kto"))
    refused("does not split into 3", batch, DPOConfig(accumulate=3))
    refused("format_masks", dataclasses.replace(batch, format_masks=None), DPOConfig(mask_format_tokens=True))
    with pytest.raises(InputError, match="no effect"):
        dpo.init_state(model, variables, config, reference=variables)


def test_reference_free_losses_need_no_reference():
    model, variables = toy_policy()
    batch = dataclasses.replace(make_batch(), reference_logps=None)
    for name in ("simpo", "orpo"):
        config = DPOConfig(loss=name, layout="separate")
        _, metrics = quick_jit(dpo.train_step, config=config)(dpo.init_state(model, variables, config), batch)
        assert np.isfinite(metrics["loss"])
        assert -30 < metrics["rewards/chosen"] / config.settled.beta < -1  # nats a token
