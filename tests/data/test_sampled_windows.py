"""Rollouts in windows: every token in its place once, of few shapes, as their lengths alone say."""

import numpy as np
import pytest

from dpo_jax.data.sets.group_packing import Packing
from dpo_jax.data.sets.sampled_windows import Packed, packed
from dpo_jax.types import PreferenceBatch

P, R, K = 48, 32, 4


def groups_of(seed: int, groups: int = 12, *, mean: float = 0.5) -> PreferenceBatch:
    """Groups of K responses of about `mean` of the most tokens, whose ids say row and place."""
    rng = np.random.default_rng(seed)
    return PreferenceBatch(
        prompts=1000 * np.arange(groups)[:, None] + np.arange(P),
        prompt_lengths=rng.integers(1, P + 1, groups),
        responses=(100_000 + 1000 * np.arange(groups * K)[:, None] + np.arange(R)).reshape(groups, K, R),
        response_lengths=np.clip(rng.normal(mean * R, 4, (groups, K)), 1, R).astype(int),
        weights=np.ones(groups, np.float32),
        rows=np.arange(groups),
    )


def plan_of(batch: PreferenceBatch, windows: int, batches: int = 1, multiple: int = 16) -> tuple[np.ndarray, Packed]:
    given = np.random.default_rng(1).permutation(len(batch.rows)).reshape(batches, -1)
    packing = Packing(windows, multiple=multiple)
    return given, packed(batch.prompt_lengths, batch.response_lengths, (P, R), given, packing)


@pytest.mark.parametrize(("windows", "batches"), [(1, 1), (2, 1), (3, 2), (6, 2)])
def test_every_token_of_a_batch_stands_in_its_windows_once(windows: int, batches: int) -> None:
    batch = groups_of(0)
    given, plan = plan_of(batch, windows, batches)
    for own, groups, source, real in zip(plan.groups, given, plan.windows.source, plan.windows.real, strict=True):
        assert sorted(own) == sorted(groups)  # a batch keeps its groups, its windows take them in any order
        for w, held in enumerate(own.reshape(windows, -1)):
            flat = np.concatenate([np.append(batch.prompts[i], batch.responses[i]) for i in held])
            expected = [
                token
                for i in held
                for tokens, length in [
                    (batch.prompts[i], batch.prompt_lengths[i]),
                    *zip(batch.responses[i], batch.response_lengths[i], strict=True),
                ]
                for token in tokens[:length]
            ]
            assert flat[source[w]][real[w]].tolist() == expected
    assert plan.real == pytest.approx(plan.windows.real.mean())


def test_rollouts_of_a_run_have_few_shapes() -> None:
    """A hundred rollouts alike, of half the most tokens: a window is not much larger than what it holds."""
    plans = [plan_of(groups_of(seed), 2)[1] for seed in range(100)]
    assert len({plan.shape for plan in plans}) <= 8
    assert np.mean([plan.real for plan in plans]) > 0.8
    assert plan_of(groups_of(7), 2)[1].shape == plans[7].shape
    assert plan_of(groups_of(0, mean=9.0), 2, multiple=1)[1].shape.reads == 6 * K * R


def test_no_shape_is_left_out_however_long_responses_become() -> None:
    """From one token to all: no more shapes than sixteenths and quarters allow, and each holds what it is for."""
    shapes = set()
    for mean in np.linspace(0, 1.2, 60):
        batch = groups_of(3, mean=mean)
        _, plan = plan_of(batch, 1)
        assert plan.windows.real.sum() == batch.prompt_lengths.sum() + batch.response_lengths.sum()
        shapes.add(plan.shape)
    assert len(shapes) <= 25
