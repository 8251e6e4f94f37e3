"""The reward model's step on a tiny Llama: its identities, its metrics, and what it refuses."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import TINY, gradients, make_batch, model_and_variables, pad, quick_jit, take, toy_policy, with_sgd

from dpo_jax import mesh as meshes
from dpo_jax.align import reward, sampled_softmax
from dpo_jax.align.figures import defined
from dpo_jax.config import OptimizerConfig, RewardConfig
from dpo_jax.errors import InputError
from dpo_jax.judge.figures import rewards as reward_judgement
from dpo_jax.model import heads

SMALL = dataclasses.replace(TINY, num_layers=1)
HEADS = {"multi_class": ("rating=a,b,c,d",), "multi_label": ("harm:0.5=x,y,z",)}


@pytest.fixture(scope="module")
def small():
    return model_and_variables(SMALL)


@pytest.fixture(scope="module")
def toy():
    """A policy that compiles at once, for what does not depend on the model; for layout "separate" only."""
    model, variables = toy_policy()
    width = variables["params"]["embed"]["kernel"].shape[1]
    return SimpleNamespace(apply=model.apply, config=SimpleNamespace(hidden_size=width)), variables


@pytest.fixture(scope="module")
def adapted():
    return model_and_variables(SMALL, lora=2, noise=0.3)


def comparisons(rows=8, responses=3, seed=0):
    """A batch with everything: ranks with ties, an absent response, margins, labels some of which are missing."""
    rng = np.random.default_rng(seed)
    batch = make_batch(rows, responses=responses, seed=seed)
    ranks = np.stack([rng.permutation(responses) for _ in range(rows)]).astype(np.int32)
    ranks[1] = np.minimum(ranks[1], 1)
    lengths = batch.response_lengths.copy()
    lengths[2, 1] = 0
    return dataclasses.replace(
        batch,
        response_lengths=lengths,
        ranks=ranks,
        margins=rng.random(rows).astype(np.float32),
        labels={
            "rating": rng.integers(-1, 4, (rows, responses)).astype(np.int32),
            "harm": rng.integers(-1, 2, (rows, responses, 3)).astype(np.int8),
        },
    )


def run(model, variables, batch, config):
    """One jitted step of plain gradient descent: (metrics, gradients)."""
    state = with_sgd(reward.init_state(model, variables, config))
    after, metrics = quick_jit(reward.train_step, config=config)(state, batch)
    return metrics, gradients(state, after)


def assert_same(a, b, rtol=2e-5, atol=2e-6):
    chex.assert_trees_all_close(a, b, rtol=rtol, atol=atol)


def scalars(metrics):
    return {k: v for k, v in metrics.items() if not k.startswith("rows/")}


EVERYTHING = RewardConfig(margin="column", centering=0.01, **HEADS)
SEPARATE = dataclasses.replace(EVERYTHING, layout="separate")
PLAIN = RewardConfig(layout="separate")


def test_accumulation_equals_one_big_batch(toy):
    batch = comparisons()
    batch = dataclasses.replace(batch, weights=np.asarray([1, 1, 0, 1, 1, 1, 1, 0], np.float32))
    whole, whole_gradients = run(*toy, batch, SEPARATE)
    parts, parts_gradients = run(*toy, batch, dataclasses.replace(SEPARATE, accumulate=4))
    assert whole["grad_norm"] > 0.1
    assert_same(whole, parts, rtol=1e-4)
    assert_same(whole_gradients, parts_gradients, rtol=1e-3, atol=1e-5)


def test_padding_changes_nothing(small):
    batch = comparisons()
    tight, tight_gradients = run(*small, batch, EVERYTHING)
    wide, wide_gradients = run(*small, pad(batch, 5, 9), EVERYTHING)
    assert_same(tight, wide)
    assert_same(tight_gradients, wide_gradients, rtol=1e-3)


def test_shared_prompt_equals_separate_sequences(adapted):
    batch = comparisons()
    shared, shared_gradients = run(*adapted, batch, EVERYTHING)
    separate, separate_gradients = run(*adapted, batch, dataclasses.replace(EVERYTHING, layout="separate"))
    assert set(shared_gradients) == {"adapters", "heads"}
    assert_same(shared, separate)
    assert_same(shared_gradients, separate_gradients, rtol=1e-3)


@pytest.mark.slow
def test_one_device_equals_eight(small):
    batch = comparisons()
    here, _ = run(*small, batch, EVERYTHING)
    mesh = meshes.make_mesh(2, 2, 2)
    model, variables = model_and_variables(SMALL, mesh=mesh)
    state = reward.init_state(model, variables, EVERYTHING)
    assert state.trainable["heads"]["score"]["kernel"].addressable_shards[0].data.shape[0] == SMALL.hidden_size // 2
    _, there = reward.jit_train_step(EVERYTHING, mesh)(state, meshes.put_batch(mesh, batch))
    assert_same(scalars(here), scalars(jax.device_get(there)), rtol=1e-4, atol=1e-5)


def test_filler_rows_change_nothing(toy):
    batch = comparisons(6)
    fillers = take(comparisons(8, seed=1), slice(6, 8))
    fillers = dataclasses.replace(
        fillers,
        weights=np.zeros(2, np.float32),
        rows=np.full(2, -1, np.int32),
        response_lengths=np.asarray([[7, 3, 2], [0, 0, 0]], np.int32),
        margins=np.asarray([np.nan, np.inf], np.float32),
    )
    filled = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, fillers)
    without, without_gradients = run(*toy, batch, SEPARATE)
    with_fillers, with_gradients = run(*toy, filled, SEPARATE)
    assert_same(scalars(without), scalars(with_fillers))
    assert_same(without_gradients, with_gradients, rtol=1e-3)
    np.testing.assert_array_equal(with_fillers["rows/nonfinite"], -1)


def test_order_of_the_responses_does_not_matter(toy):
    batch = comparisons()
    turned = dataclasses.replace(
        batch,
        responses=batch.responses[:, ::-1],
        response_lengths=batch.response_lengths[:, ::-1],
        ranks=batch.ranks[:, ::-1],
        labels={name: values[:, ::-1] for name, values in batch.labels.items()},
    )
    there, there_gradients = run(*toy, batch, SEPARATE)
    back, back_gradients = run(*toy, turned, SEPARATE)
    positional = ("lengths/chosen", "lengths/rejected")
    assert_same(*({k: v for k, v in scalars(m).items() if k not in positional} for m in (there, back)))
    assert_same(there_gradients, back_gradients, rtol=1e-3)


def test_swapping_a_pair_negates_its_margin(toy):
    model, variables = toy
    batch, config = make_batch(), PLAIN
    swapped = dataclasses.replace(
        batch, responses=batch.responses[:, ::-1], response_lengths=batch.response_lengths[:, ::-1]
    )
    state = reward.init_state(model, variables, config)
    step = quick_jit(reward.eval_step, config=config)
    there, back = step(state, batch), step(state, swapped)
    assert_same(there["rewards/chosen"], back["rewards/rejected"])
    margin = there["rewards/chosen"] - there["rewards/rejected"]
    assert_same(back["loss"] - there["loss"], margin, atol=1e-5)
    assert_same(there["loss"], reward.ranking_loss(there["rewards/chosen"], there["rewards/rejected"]))


def test_a_shift_of_all_scores_moves_only_the_centering(toy):
    model, variables = toy
    batch = make_batch()
    state = reward.init_state(model, variables, PLAIN)
    scores = quick_jit(reward.eval_step, config=PLAIN)(state, batch)["scores"]
    plain = reward.ranking_loss(scores[:, 0], scores[:, 1])
    assert_same(plain, reward.ranking_loss(scores[:, 0] + 3, scores[:, 1] + 3), rtol=1e-4)
    rows = quick_jit(reward.eval_step, config=dataclasses.replace(PLAIN, centering=0.1))(state, batch)
    assert_same(rows["loss"], plain + 0.1 * (scores[:, 0] + scores[:, 1]) ** 2)


@pytest.mark.parametrize(("pairs", "margin"), [("all", "none"), ("adjacent", "none"), ("all", "score_gap")])
def test_each_prompt_counts_once(toy, pairs, margin):
    """InstructGPT's Eq. 1 by hand: the mean over prompts of the mean over each prompt's pairs; each with its margin."""
    model, variables = toy
    batch = comparisons(responses=4)
    marks = (margin == "score_gap") * np.random.default_rng(2).random((8, 4)).astype(np.float32)
    batch = dataclasses.replace(batch, margins=marks)
    config = dataclasses.replace(PLAIN, pairs=pairs, margin=margin)
    state = reward.init_state(model, variables, config)
    scores = np.asarray(quick_jit(reward.eval_step, config=config)(state, batch)["scores"])
    losses, wins = [], []
    for i, row in enumerate(scores):
        there = [k for k in range(4) if batch.response_lengths[i, k]]
        levels = sorted({batch.ranks[i, k] for k in there})
        found = [
            (row[w], row[l], marks[i, w] - marks[i, l])
            for w in there
            for l in there
            if (step := levels.index(batch.ranks[i, l]) - levels.index(batch.ranks[i, w])) > 0
            and (pairs == "all" or step == 1)
        ]
        losses.append(np.mean([np.log1p(np.exp(l - w + m)) for w, l, m in found]))
        wins.append(np.mean([w > l for w, l, _ in found]))
    metrics, _ = run(model, variables, batch, config)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(wins), rtol=1e-5)
    assert metrics["rewards/accuracies"] == metrics["accuracy"]
    present = scores[batch.response_lengths > 0]
    figures = [metrics[f"{name}_reward"] for name in ("mean", "min", "max")]
    np.testing.assert_allclose(figures, [present.mean(), present.min(), present.max()], rtol=1e-4)


def test_a_tie_is_no_win_and_rows_of_ties_do_not_count(toy):
    batch = make_batch(4)
    same = batch.responses.copy()
    same[0, 1], lengths = same[0, 0], batch.response_lengths.copy()
    lengths[0, 1] = lengths[0, 0]
    batch = dataclasses.replace(batch, responses=same, response_lengths=lengths)
    model, variables = toy
    state = reward.init_state(model, variables, PLAIN)
    rows = quick_jit(reward.eval_step, config=PLAIN)(state, batch)
    assert rows["accuracy"][0] == 0
    np.testing.assert_allclose(rows["loss"][0], np.log(2), rtol=1e-5)
    tied = dataclasses.replace(batch, ranks=np.asarray([[1, 1], [0, 1], [0, 1], [0, 1]], np.int32))
    metrics, _ = run(model, variables, tied, PLAIN)
    np.testing.assert_allclose(metrics["loss"], np.mean(rows["loss"][1:]), rtol=1e-5)
    np.testing.assert_allclose(metrics["margin"], np.mean(rows["rewards/chosen"][1:] - rows["rewards/rejected"][1:]))


def test_auxiliary_heads_add_their_means(toy):
    model, variables = toy
    batch = comparisons()
    config = RewardConfig(layout="separate", **HEADS)
    metrics, grads = run(model, variables, batch, config)
    plain, plain_grads = run(model, variables, batch, PLAIN)
    total = plain["loss"] + metrics["rating/loss"] + 0.5 * metrics["harm/loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    np.testing.assert_allclose(metrics["ranking_loss"], plain["loss"], rtol=1e-5)
    assert_same(grads["heads"]["score"], plain_grads["heads"]["score"], rtol=1e-4)
    assert 0 <= metrics["rating/accuracy"] <= 1
    state = reward.init_state(model, variables, config)
    predicted = quick_jit(reward.eval_step, config=config)(state, batch)["rating/predicted"]
    known = (batch.labels["rating"] >= 0) & (batch.response_lengths > 0)
    right = np.mean(np.asarray(predicted)[known] == batch.labels["rating"][known])
    np.testing.assert_allclose(metrics["rating/accuracy"], right, rtol=1e-6)


def test_a_head_without_a_label_in_the_batch_is_undefined(toy):
    model, variables = toy
    batch = comparisons()
    labels = {name: np.full_like(values, -1) for name, values in batch.labels.items()}
    config = RewardConfig(layout="separate", **HEADS)
    metrics, grads = run(model, variables, dataclasses.replace(batch, labels=labels), config)
    chex.assert_tree_all_finite(grads)
    kept = defined({name: float(value) for name, value in metrics.items() if value.ndim == 0})
    assert np.isfinite(list(kept.values())).all()
    names = {f"{head}/{figure}" for head in ("rating", "harm") for figure in ("loss", "accuracy")}
    assert names <= set(metrics)
    assert not names & set(kept)
    np.testing.assert_allclose(kept["loss"], kept["ranking_loss"], rtol=1e-6)
    assert reward_judgement.head_figures(np.zeros((2, 2)), np.full((2, 2), -1), ("a", "b")) == {}


def test_drawn_classes_estimate_the_exact_loss(toy):
    """With every class drawn once, expected once, the sampled loss is the exact one; a step draws by its number."""
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(4, 2, 8)).astype(np.float32), rng.normal(size=(8, 20)).astype(np.float32)
    labels = rng.integers(0, 20, (4, 2)).astype(np.int32)
    every = sampled_softmax.Negatives(ids=jnp.arange(20), log_expected=jnp.zeros(20))
    got = -sampled_softmax.sampled_logps(hidden, kernel, labels, every, budget_bytes=1 << 20)
    np.testing.assert_allclose(got, reward.multi_class_loss(hidden @ kernel, labels), rtol=1e-4, atol=1e-5)

    names = ",".join(f"c{i}" for i in range(40))
    exact = RewardConfig(layout="separate", multi_class=(f"topic={names}",))
    drawn = dataclasses.replace(exact, class_negatives=30, class_proposal="log_uniform")
    batch = make_batch()
    batch = dataclasses.replace(batch, labels={"topic": rng.integers(0, 40, (8, 2)).astype(np.int32)})
    model, variables = toy
    whole, _ = run(model, variables, batch, exact)
    sampled, _ = run(model, variables, batch, drawn)
    assert sampled["topic/loss"] != whole["topic/loss"]
    np.testing.assert_allclose(sampled["topic/loss"], whole["topic/loss"], rtol=0.3)
    np.testing.assert_allclose(sampled["topic/accuracy"], whole["topic/accuracy"])  # predictions are exact
    state = reward.init_state(model, variables, drawn)
    rows = [quick_jit(reward.eval_step, config=c)(state, batch)["loss"] for c in (exact, drawn)]
    assert_same(*rows)
    split, _ = run(model, variables, batch, dataclasses.replace(drawn, accumulate=2))
    assert_same(split["topic/loss"], sampled["topic/loss"])


def test_a_reward_model_has_no_output_matrix():
    model, variables = model_and_variables(dataclasses.replace(SMALL, tie_embeddings=False))
    state = reward.init_state(model, variables, RewardConfig())
    assert "lm_head" not in state.trainable["params"]
    assert reward.init_state(model, variables, RewardConfig(seed=1)).trainable["heads"].keys() == {"score"}


def test_training_learns_the_comparisons(adapted):
    model, variables = adapted
    config = RewardConfig(**HEADS, optimizer=OptimizerConfig(learning_rate=3e-2))
    batch = comparisons()
    state = reward.init_state(model, variables, config)
    step = quick_jit(reward.train_step, config=config)
    for _ in range(25):
        state, metrics = step(state, batch)
    assert metrics["accuracy"] > 0.95
    assert metrics["rating/accuracy"] > 0.9
    assert metrics["ranking_loss"] < 0.3


def test_a_nonfinite_row_is_named_and_the_state_kept(toy):
    model, variables = toy
    config = RewardConfig(layout="separate", margin="column")
    batch = dataclasses.replace(make_batch(), margins=np.asarray([0, 0, 0, np.nan, 0, 0, 0, 0], np.float32))
    state = reward.init_state(model, variables, config)
    after, metrics = quick_jit(reward.train_step, config=config)(state, batch)
    np.testing.assert_array_equal(metrics["rows/nonfinite"], [-1, -1, -1, 4, -1, -1, -1, -1])
    chex.assert_trees_all_equal(after, state)


def test_an_abstract_state(toy):
    model, variables = toy
    abstract = jax.eval_shape(lambda: variables)
    state = reward.init_state(model, abstract, RewardConfig(layout="separate", **HEADS))
    assert isinstance(state.trainable["heads"]["harm"]["kernel"], jax.ShapeDtypeStruct)
    out, _ = jax.eval_shape(
        partial(reward.train_step, config=RewardConfig(layout="separate", **HEADS)), state, comparisons()
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(out.trainable, state.trainable)


def test_what_the_step_refuses(toy):
    model, variables = toy

    def step(batch, config):
        state = reward.init_state(model, variables, config)
        return jax.eval_shape(partial(reward.train_step, config=config), state, batch)

    with pytest.raises(InputError, match="at least 2 responses"):
        step(make_batch(responses=1), PLAIN)
    with pytest.raises(InputError, match='margin "small": the batch has no margins'):
        step(make_batch(), RewardConfig(layout="separate", margin="small"))
    with pytest.raises(InputError, match="head 'rating': the batch has no labels"):
        step(make_batch(), RewardConfig(layout="separate", **HEADS))
    three = {**variables, "heads": heads.init_heads(model, jax.random.key(0), {"rating": 3})}
    with pytest.raises(InputError, match="head 'rating' of the checkpoint has 3 classes, and the options name 4"):
        reward.init_state(model, three, RewardConfig(layout="separate", **HEADS))
