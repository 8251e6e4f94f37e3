"""Losses that take more than a pair's two sums, their weights and references: steps against PyTorch, and identities."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pairs import TINY, gradients, make_batch, model_and_variables, quick_jit, toy_policy, with_sgd

from dpo_jax.align import dpo
from dpo_jax.align.across import of_batch
from dpo_jax.config import DPOConfig
from dpo_jax.errors import InputError
from dpo_jax.types import CHOSEN, REJECTED

torch = pytest.importorskip("torch")
F = torch.nn.functional

SMALL = dataclasses.replace(TINY, num_layers=1)
FILLED = np.asarray([1, 1, 0, 1, 1, 1, 1, 0], np.float32)
BEFORE = {"reward_mean": 0.4, "reward_count": 10.0}


def ragged_batch(*, unpaired: bool = False):
    """Eight rows of unequal lengths, two of them fillers; scores one above the other."""
    batch = make_batch()
    lengths = batch.response_lengths.copy()
    if unpaired:
        lengths[[0, 4], REJECTED] = lengths[[3, 5], CHOSEN] = 0
    gaps = np.linspace(0.2, 3, 8).astype(np.float32)
    return dataclasses.replace(batch, weights=FILLED, response_lengths=lengths, margins=gaps)


def torch_tokens(table, batch):
    """(logps, log sum p^2, mask) [B, 2, R] of the toy policy, row by row."""
    b, k, r = batch.responses.shape
    logps, collisions, mask = [], [], []
    for i in range(b):
        for j in range(k):
            n = int(batch.response_lengths[i, j])
            prompt = batch.prompts[i, : batch.prompt_lengths[i]]
            x = table[torch.tensor(np.concatenate([prompt, batch.responses[i, j, :n]]))]
            hidden = x + torch.cumsum(x, 0) / torch.arange(1, len(x) + 1)[:, None]
            every = torch.log_softmax(hidden @ table.T, -1)[len(prompt) - 1 : len(prompt) - 1 + n]
            ids = torch.tensor(batch.responses[i, j, :n].astype(np.int64))
            pad = (0, r - n)
            logps.append(F.pad(every.gather(1, ids[:, None])[:, 0], pad))
            collisions.append(F.pad(torch.logsumexp(2 * every, -1), pad))
            mask.append(F.pad(torch.ones(n), pad))
    return (torch.stack(x).reshape(b, k, r) for x in (logps, collisions, mask))


def torch_loss(table, batch, name, beta, *, weights=None, ld=1.0, wpo=False, smoothing=0.0):
    """The loss as TRL 1.16 writes it (bco_pair as TRL before it, with the running mean); fillers left out."""
    logps, collisions, mask = torch_tokens(table, batch)
    real = torch.tensor(batch.weights) > 0
    lengths = mask.sum(-1)
    shared = torch.minimum(lengths[:, 0], lengths[:, 1])
    beyond = torch.arange(mask.shape[-1]) >= shared[:, None, None]
    sums = (logps * torch.where(beyond, ld, 1.0) * mask).sum(-1)[real]
    reference = torch.tensor(batch.reference_logps)[real]
    (lc, lr), (rc, rr) = sums.T, reference.T
    u, v = lc - rc, lr - rr
    there = lengths[real] > 0
    soft = lambda d: -F.logsigmoid(beta * d) * (1 - smoothing) - F.logsigmoid(-beta * d) * smoothing  # noqa: E731
    n = BEFORE["reward_count"]
    rewards = (beta * torch.stack([u, v], 1)).detach()
    delta = (n * BEFORE["reward_mean"] + rewards.sum()) / (n + rewards.numel())
    gaps = torch.tensor(batch.margins)[real]
    terms = {
        "sigmoid": lambda: -F.logsigmoid(beta * (u - v)),
        "ipo": lambda: (u / lengths[real, 0] - v / lengths[real, 1] - 1 / (2 * beta)) ** 2,
        "bco_pair": lambda: -F.logsigmoid(beta * u - delta) - F.logsigmoid(-(beta * v - delta)),
        "aot": lambda: soft(torch.sort(lc - lr)[0] - torch.sort(rc - rr)[0]),
        "aot_unpaired": lambda: soft(torch.sort(u)[0] - torch.sort(v)[0]),
        "odpo": lambda: -F.logsigmoid(beta * (u - v) - torch.log(gaps)),
        "sft": lambda: -logps[real, 0][mask[real, 0].bool()].mean().expand(len(u)),
        "apo_zero_unpaired": lambda: torch.cat(
            [(1 - torch.sigmoid(beta * u))[there[:, 0]], torch.sigmoid(beta * v)[there[:, 1]]]
        ),
    }
    total = torch.zeros(())
    for each, weight in zip(name.split(","), weights or [1.0] * 9, strict=False):
        loss = terms[each]()
        if wpo:
            aligned = torch.exp((logps - collisions).sum(-1) / lengths.clamp(min=1)).detach()[real]
            loss = loss * aligned.prod(1)
        total = total + loss.mean() * weight
    return total


CASES = {
    "apo_zero_unpaired": {"loss": "apo_zero_unpaired"},
    "bco_pair": {"loss": "bco_pair"},
    "aot": {"loss": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"loss": "aot_unpaired", "beta": 0.3},
    "odpo": {"loss": "odpo"},
    "mpo": {"loss": "sigmoid,bco_pair,sft", "loss_weights": "0.8,0.2,1", "nll_normalization": "token"},
    "mix": {"loss": "aot_unpaired,ipo,bco_pair,aot", "loss_weights": "0.5,0.01,2,1", "ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
    "ld": {"ld_alpha": 0.5},
}


@pytest.mark.parametrize(
    "case", [name if name in ("mix", "mpo", "wpo") else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_steps_are_torchs_in_one_batch_and_in_four(case):
    """Loss and gradient on ragged rows with fillers, the state remembering ten rewards; then what it remembers."""
    options = CASES[case]
    model, variables = toy_policy()
    batch = ragged_batch(unpaired=case == "apo_zero_unpaired")
    config = DPOConfig(**options, layout="separate")
    table = torch.tensor(np.asarray(variables["params"]["embed"]["kernel"]), requires_grad=True)
    beta = config.settled.beta
    weights = [float(w) for w in options["loss_weights"].split(",")] if "loss_weights" in options else None
    more = {"ld": options.get("ld_alpha", 1.0), "wpo": "use_weighting" in options}
    more["smoothing"] = options.get("label_smoothing", 0.0)
    expected = torch_loss(table, batch, config.loss, beta, weights=weights, **more)
    expected.backward()
    scale = float(table.grad.norm())
    for parts in (1, 4):
        accumulating = dataclasses.replace(config, accumulate=parts)
        state = with_sgd(dpo.init_state(model, variables, accumulating))
        if state.carried:
            assert {float(x) for x in state.carried.values()} == {0.0}
            state = dataclasses.replace(state, carried={k: jnp.float32(v) for k, v in BEFORE.items()})
        after, metrics = quick_jit(dpo.train_step, config=accumulating)(state, batch)
        np.testing.assert_allclose(metrics["loss"], expected.item(), rtol=2e-5)
        found = gradients(state, after)["params"]["embed"]["kernel"]
        np.testing.assert_allclose(found, table.grad, atol=2e-5 * max(scale, 1))
        for name in config.objective.losses if len(config.objective.losses) > 1 else ():
            alone = torch_loss(table, batch, name, beta, **more)
            np.testing.assert_allclose(metrics[f"loss/{name}"], alone.item(), rtol=2e-5)
        if state.carried:
            mean = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
            np.testing.assert_allclose(after.carried["reward_mean"], (4.0 + 12 * mean) / 22, rtol=1e-5)
            np.testing.assert_allclose(metrics["rewards/running_mean"], after.carried["reward_mean"])
            assert float(after.carried["reward_count"]) == 22
    if "use_weighting" in options:
        assert 0 < metrics["pair_weights"] < 1


def test_evaluation_takes_the_mean_of_the_steps_before_and_changes_nothing():
    model, variables = toy_policy()
    config, batch = DPOConfig(loss="bco_pair", layout="separate"), make_batch()
    state = dataclasses.replace(
        dpo.init_state(model, variables, config), carried={k: jnp.float32(v) for k, v in BEFORE.items()}
    )
    rows = quick_jit(dpo.eval_step, config=config)(state, batch)
    x, y = np.asarray(rows["rewards/chosen"]) - 0.4, np.asarray(rows["rewards/rejected"]) - 0.4
    np.testing.assert_allclose(rows["loss"], np.log1p(np.exp(-x)) + np.log1p(np.exp(y)), rtol=1e-5)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_row_that_is_not_finite_has_no_rank(name):
    """The others' partners are as if it were not there, and it alone is not finite."""
    rng = np.random.default_rng(3)
    policy, reference = rng.normal(size=(2, 6, 2)).astype(np.float32)
    present = np.ones((6, 2), bool)
    present[4] = False
    without = present & (np.arange(6) != 1)[:, None]
    objective = DPOConfig(loss=name).objective
    expected = of_batch(policy, reference, without, objective)
    for spoilt in (policy, reference):
        kept = spoilt[1, 0]
        spoilt[1, 0] = np.nan
        found = of_batch(policy, reference, present, objective)
        spoilt[1, 0] = kept
        for key, value in found.items():
            np.testing.assert_array_equal(np.isnan(value), np.arange(6) == 1)
            np.testing.assert_array_equal(np.delete(value, 1), np.delete(expected[key], 1))


def test_wpo_by_hand():
    """Of an even distribution each token has p = sum p^2 = 1 / V: every weight is 1."""
    model, variables = toy_policy()
    even = jax.tree.map(jnp.zeros_like, variables)
    for weighting in (False, True):
        config = DPOConfig(use_weighting=weighting, layout="separate")
        rows = quick_jit(dpo.eval_step, config=config)(dpo.init_state(model, even, config), make_batch())
        logps = -make_batch().response_lengths * math.log(64)
        d = 0.1 * (logps - make_batch().reference_logps)
        np.testing.assert_allclose(rows["loss"], np.log1p(np.exp(d[:, 1] - d[:, 0])), rtol=1e-4)


def test_ld_alpha_of_one_and_equal_lengths_change_nothing():
    model, variables = toy_policy()
    batch = make_batch()
    same = dataclasses.replace(batch, response_lengths=np.full_like(batch.response_lengths, 4))
    for where, ld in ((batch, 1.0), (same, 0.2)):
        plain, changed = (DPOConfig(layout="separate"), DPOConfig(layout="separate", ld_alpha=ld))
        sums = [dpo.reference_logps(model.apply, variables, where, config=c) for c in (plain, changed)]
        np.testing.assert_array_equal(*sums)
    by_hand = DPOConfig(layout="separate", ld_alpha=0.0)
    three = dataclasses.replace(batch, responses=batch.responses[:, [0, 1, 1]])
    with pytest.raises(InputError, match="the batch has 3 responses a prompt"):
        dpo.reference_logps(model.apply, variables, three, config=by_hand)
    cut = batch.response_lengths.min(axis=1, keepdims=True).repeat(2, axis=1)
    shared = dataclasses.replace(batch, response_lengths=cut)
    np.testing.assert_allclose(
        dpo.reference_logps(model.apply, variables, batch, config=by_hand),
        dpo.reference_logps(model.apply, variables, shared, config=plain),
        rtol=1e-5,
    )


# ---------------------------------------------------------------- a reference that moves


def trained(state):
    return state.trainable["adapters" if "adapters" in state.trainable else "params"]


@pytest.mark.parametrize("lora", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_reference_that_moves(lora):
    """Hard every second step: then policy and reference are the same again. Soft every step: the mean by hand."""
    model, variables = model_and_variables(SMALL, lora=lora) if lora else toy_policy()
    batch = dataclasses.replace(make_batch(), reference_logps=None)
    hard = DPOConfig(reference="live", layout="separate", reference_sync_steps=2, reference_mixup_alpha=1.0)
    soft = dataclasses.replace(hard, reference_sync_steps=1, reference_mixup_alpha=None)
    assert soft.settled.reference_mixup_alpha == 0.6
    state, step = dpo.init_state(model, variables, hard), quick_jit(dpo.train_step, config=hard)
    state, losses = with_sgd(state), []
    for i in range(4):
        reference = state.carried["reference"]
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        assert "logps/chosen_change" not in metrics  # the log takes the first step's logps/chosen off
        of_three = map(jax.tree.leaves, (state.carried["reference"], reference, trained(state)))
        for new, old, now in zip(*of_three, strict=True):
            np.testing.assert_array_equal(new, now if i % 2 else old)
    assert losses[0] == losses[2] == np.float32(np.log(2))
    assert losses[1] != losses[0] != losses[3]
    spoilt = dataclasses.replace(batch, weights=np.full_like(batch.weights, np.nan))
    kept, _ = step(state, spoilt)
    for a, b in zip(jax.tree.leaves(kept.carried), jax.tree.leaves(state.carried), strict=True):
        np.testing.assert_array_equal(a, b)

    before = with_sgd(dpo.init_state(model, variables, soft))
    after, _ = quick_jit(dpo.train_step, config=soft)(before, batch)
    mixed = jax.tree.map(lambda a, b: 0.4 * a + 0.6 * b, trained(before), trained(after))
    for a, b in zip(jax.tree.leaves(after.carried["reference"]), jax.tree.leaves(mixed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_another_reference_is_where_it_starts_from():
    model, variables = toy_policy()
    _, other = toy_policy(seed=5)
    batch = make_batch()
    config = DPOConfig(reference="live", reference_sync_steps=4, layout="separate")
    state = dpo.init_state(model, variables, config, reference=other)
    assert state.frozen == {}
    logps = dpo.reference_logps(model.apply, other, batch, config=config)
    rows = quick_jit(dpo.eval_step, config=config)(state, batch)
    cached = DPOConfig(layout="separate")
    there = quick_jit(dpo.eval_step, config=cached)(
        dpo.init_state(model, variables, cached), dataclasses.replace(batch, reference_logps=np.asarray(logps))
    )
    np.testing.assert_allclose(rows["loss"], there["loss"], rtol=1e-5)
