"""The step of supervised fine-tuning: parity with transformers, what changes nothing, and what it says."""

import dataclasses
from functools import cache, partial

import chex
import jax
import numpy as np
import optax
import pytest
from pairs import TINY, gradients, model_and_variables, quick_jit, take
from windows import JUNK, lay_out, make_sequences, one_each, packed

import dpo_jax
from dpo_jax.align import sft
from dpo_jax.config import SFTConfig
from dpo_jax.data.sets.segment_views import SegmentViews
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import RopeScaling

SMALL = dataclasses.replace(TINY, num_layers=1)
SEQUENCES = make_sequences(12)
LENGTHS = [len(ids) for ids, _ in SEQUENCES]
EXACT = SFTConfig()
SGD = optax.sgd(1.0)
SAMPLED = SFTConfig(loss="sampled", negatives=16, seed=3)


@pytest.fixture(scope="module")
def small():
    return model_and_variables(SMALL)


@cache
def compiled(config):
    return quick_jit(sft.train_step, config=config)


def start(model, variables, config=EXACT):
    """A state that goes down the gradient by a rate of 1."""
    state = sft.init_state(model, variables, config)
    return dataclasses.replace(state, tx=SGD, opt_state=SGD.init(state.trainable))


def run(model, variables, batch, config=EXACT):
    """One jitted step of plain gradient descent: (metrics, gradients)."""
    state = start(model, variables, config)
    after, metrics = compiled(config)(state, batch)
    return metrics, gradients(state, after)


@pytest.fixture(scope="module")
def padded_run(small):
    return run(*small, one_each(SEQUENCES, 12))


def assert_same(a, b, rtol=1e-5, atol=2e-6):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def figures(metrics):
    """The metrics that do not tell how the tokens were laid out."""
    return {k: v for k, v in metrics.items() if k not in ("rows/nonfinite", "padding")}


# ---------------------------------------------------------------- another implementation


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_those_of_transformers(tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=64, num_key_value_heads=2, initializer_range=0.15, tie_word_embeddings=tied, **shape
    )
    theirs = transformers.LlamaForCausalLM(config).float().train()
    theirs.save_pretrained(tmp_path / "weights")

    total, count, hits = torch.zeros(()), 0, 0
    for ids, targets in SEQUENCES:  # one by one: neither padding nor packing has a part in it
        logits = theirs(torch.tensor(ids[None], dtype=torch.long)).logits[0, :-1]
        labels = torch.tensor(np.where(targets, ids, -100)[1:], dtype=torch.long)
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
        hits += int((logits.argmax(-1) == labels).sum())
    (total / count).backward()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(weight.grad)  # so that the gradients can be read like a checkpoint
    theirs.save_pretrained(tmp_path / "gradients")

    model, variables = dpo_jax.load_pretrained(tmp_path / "weights")
    _, expected = dpo_jax.load_pretrained(tmp_path / "gradients")
    metrics, ours = run(model, variables, packed(SEQUENCES, 4, 30))
    np.testing.assert_allclose(metrics["loss"], float(total.detach()) / count, atol=1e-5)
    np.testing.assert_allclose(metrics["mean_token_accuracy"], hits / count, rtol=1e-6)
    assert metrics["target_tokens"] == count
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 0.05
    chex.assert_trees_all_close(ours, dict(expected), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what changes nothing


@pytest.mark.parametrize("config", [EXACT, SAMPLED], ids=lambda c: c.loss)
def test_packed_padded_and_accumulated_are_one(small, padded_run, config):
    metrics, grads = padded_run if config is EXACT else run(*small, one_each(SEQUENCES, 12), config)
    chex.assert_tree_all_finite(grads)
    for windows, accumulate in ((4, 1), (4, 4)):
        split = dataclasses.replace(config, accumulate=accumulate)
        others, other_grads = run(*small, packed(SEQUENCES, windows, 30), split)
        assert others["padding"] < metrics["padding"]
        assert_same(figures(metrics), figures(others))
        assert_same(grads, other_grads, atol=1e-5)


@pytest.mark.parametrize(("units", "accumulate"), [(1, 1), (4, 4), (2, 1)])
def test_sequences_that_attention_sees_apart_change_nothing(small, padded_run, units, accumulate):
    """`packed` has junk at padded places, and its windows are taken together two or four at a time."""
    batch = packed(SEQUENCES, 4, 30)
    seen = SegmentViews.of_batches([batch], units, multiple=4).seen(batch)
    assert seen.views.homes.shape == (units, 4 // units * 30, 1)
    metrics, grads = run(*small, seen, dataclasses.replace(EXACT, accumulate=accumulate))
    assert_same(figures(padded_run[0]), figures(metrics))
    assert_same(padded_run[1], grads, atol=1e-5)


def test_a_rotation_that_follows_the_length_follows_that_of_each_sequence():
    scaling = RopeScaling("dynamic", 2.0, original_max_position=8)
    model, variables = model_and_variables(dataclasses.replace(TINY, num_layers=1, rope_scaling=scaling))
    batch = packed(SEQUENCES, 4, 30)
    plain, seen = (run(model, variables, x) for x in (batch, SegmentViews.of_batches([batch], 2).seen(batch)))
    assert_same(plain, seen, atol=1e-5)


def test_the_promise_of_one_sequence_a_window_changes_nothing(small, padded_run):
    metrics, grads = padded_run
    promised, promised_grads = run(*small, one_each(SEQUENCES, 12), dataclasses.replace(EXACT, packed=False))
    assert_same((metrics, grads), (promised, promised_grads))


def test_padding_and_what_stands_there_change_nothing(small, padded_run):
    metrics, grads = padded_run
    wide = one_each(SEQUENCES, 17)
    assert (wide.tokens == JUNK).any()
    assert wide.targets[wide.segments == 0].all()
    others, other_grads = run(*small, wide)
    assert_same(figures(metrics), figures(others))
    assert_same(grads, other_grads)
    clean = dataclasses.replace(
        wide,
        tokens=np.where(wide.segments > 0, wide.tokens, 1),
        positions=np.where(wide.segments > 0, wide.positions, 0),
        targets=wide.targets & (wide.segments > 0),
    )
    chex.assert_trees_all_equal(run(*small, clean), (others, other_grads))


def test_a_sequence_does_not_see_its_neighbours(small):
    """The same sequence behind two different ones: its tokens get the same log-probabilities."""
    other = make_sequences(2, seed=9)
    state = sft.init_state(*small, EXACT)
    step = quick_jit(sft.eval_step, config=EXACT)
    nll = [
        step(state, lay_out([neighbour, SEQUENCES[0]], [[0, 1]], 24))["nll"]
        - step(state, lay_out([neighbour, SEQUENCES[0]], [[0]], 24))["nll"]
        for neighbour in other
    ]
    assert_same(nll[0], nll[1], atol=1e-4)


def test_evaluation_adds_up_to_the_steps_loss(small, padded_run):
    metrics, _ = padded_run
    state = sft.init_state(*small, SAMPLED)
    for batch in (one_each(SEQUENCES, 12), packed(SEQUENCES, 12, 12)):
        sums = quick_jit(sft.eval_step, config=SAMPLED)(state, batch)  # exact, though training is sampled
        assert {v.shape for v in sums.values()} == {(12,)}
        sums = {name: float(np.sum(values)) for name, values in sums.items()}
        assert sums["target_tokens"] == metrics["target_tokens"]
        np.testing.assert_allclose(sums["nll"] / sums["target_tokens"], metrics["loss"], rtol=1e-5)
        np.testing.assert_allclose(sums["correct"] / sums["target_tokens"], metrics["mean_token_accuracy"], rtol=1e-5)
        np.testing.assert_allclose(sums["entropy"] / sums["target_tokens"], metrics["entropy"], rtol=1e-5)


# ---------------------------------------------------------------- what is computed


def test_metrics(small, padded_run):
    model, variables = small
    metrics, grads = padded_run
    whole = one_each(SEQUENCES, 12)
    tokens = np.where(whole.segments > 0, whole.tokens, 0)
    logits = quick_jit(lambda v, x: model.apply(v, model.apply(v, x), method="logits"))(variables, tokens)
    logps = np.asarray(jax.nn.log_softmax(logits))
    nll, hits, entropies = [], [], []
    for (ids, targets), row in zip(SEQUENCES, logps, strict=True):
        for t in np.flatnonzero(targets):
            nll.append(-row[t - 1, ids[t]])
            hits.append(row[t - 1].argmax() == ids[t])
            entropies.append(-np.sum(np.exp(row[t - 1]) * row[t - 1]))
    expected = {
        "loss": np.mean(nll),
        "mean_token_accuracy": np.mean(hits),
        "entropy": np.mean(entropies),
        "target_tokens": len(nll),
        "tokens": sum(LENGTHS),
        "padding": 1 - sum(LENGTHS) / (12 * 12),
        "learning_rate": EXACT.optimizer.learning_rate,
        "grad_norm": np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads))),
    }
    assert_same({k: metrics[k] for k in expected}, {k: np.float32(v) for k, v in expected.items()}, rtol=1e-4)
    assert set(metrics) == set(expected) | {"rows/nonfinite"}
    np.testing.assert_array_equal(metrics["rows/nonfinite"], -1)


# ---------------------------------------------------------------- trouble


def test_a_batch_without_targets_is_no_step(small):
    batch = one_each(SEQUENCES, 12)
    batch = dataclasses.replace(batch, targets=np.zeros_like(batch.targets))
    state = start(*small)
    after, metrics = compiled(EXACT)(state, batch)
    assert np.isnan(metrics["loss"])
    chex.assert_trees_all_equal(after, state)
    np.testing.assert_array_equal(metrics["rows/nonfinite"][:, 0], np.arange(1, 13))


def test_nonfinite_windows_are_named_and_the_state_kept():
    """A token whose embedding is not a number spoils the window that holds it, and no other."""
    model, variables = model_and_variables(dataclasses.replace(SMALL, tie_embeddings=False))
    table = variables["params"]["embed_tokens"]["embedding"]
    rare = next(i for i in range(64) if sum(i in ids for ids, _ in SEQUENCES) == 1)
    (where,) = [i for i, (ids, targets) in enumerate(SEQUENCES) if rare in ids]
    spoilt = {"params": {**variables["params"], "embed_tokens": {"embedding": table.at[rare].set(np.nan)}}}
    sequences = list(SEQUENCES)
    ids, targets = sequences[where]
    sequences[where] = (np.concatenate([ids, ids[:1]]), np.append(targets, True))  # something is predicted from it
    config = dataclasses.replace(EXACT, accumulate=2)
    batch = packed(sequences, 4, 30)
    state = sft.init_state(model, spoilt, config)
    after, metrics = quick_jit(sft.train_step, config=config)(state, batch)
    assert np.isnan(metrics["loss"])
    holds = (batch.rows == where + 1).any(axis=1)
    np.testing.assert_array_equal(metrics["rows/nonfinite"], np.where(holds[:, None], batch.rows, -1))
    chex.assert_trees_all_equal(after, state)


def test_options_that_do_not_fit_are_refused(small):
    batch = one_each(SEQUENCES, 12)

    def refused(match, config):
        with pytest.raises(InputError, match=match) as error:
            sft.train_step(sft.init_state(*small, config), batch, config=config)
        assert "\n" not in str(error.value)

    refused("does not split into 5", SFTConfig(accumulate=5))
    refused("negatives 64: the vocabulary has only 64 ids", SFTConfig(loss="sampled", negatives=64))
    with pytest.raises(InputError, match="negatives has no effect with --sft"):
        SFTConfig(negatives=5)


@pytest.mark.slow
def test_the_step_is_pure(small):
    """Neither jitted nor tied to anything: called line by line it gives what the compiled step gives."""
    batch = take(one_each(SEQUENCES, 12), slice(0, 2))
    state = sft.init_state(*small, EXACT)
    plain, compiled = (
        step(state, batch) for step in (partial(sft.train_step, config=EXACT), quick_jit(sft.train_step, config=EXACT))
    )
    assert_same(plain[1], compiled[1], rtol=1e-4)
