"""Rollouts in windows: every token in its place once, of few shapes, as their lengths alone say."""

import numpy as np
import pytest

from dpo_jax.data.sets.group_packing import Packing
from dpo_jax.data.sets.sampled_windows import packed
from dpo_jax.types import Rollout

P, R, K = 48, 32, 4


def rollout_of(seed: int, groups: int = 12, *, mean: float = 0.5) -> Rollout:
    """Groups of K responses of about `mean` of the most tokens, whose ids say row and place."""
    rng, rows = np.random.default_rng(seed), groups * K
    zeros = np.zeros(rows, np.float32)
    return Rollout(
        prompts=np.repeat(1000 * np.arange(groups)[:, None] + np.arange(P), K, axis=0).astype(np.int32),
        prompt_lengths=np.repeat(rng.integers(1, P + 1, groups), K).astype(np.int32),
        responses=(100_000 + 1000 * np.arange(rows)[:, None] + np.arange(R)).astype(np.int32),
        response_lengths=np.clip(rng.normal(mean * R, 4, rows), 1, R).astype(np.int32),
        ended=np.ones(rows, bool),
        sampler_logps=np.zeros((rows, R), np.float32),
        reference_logps=np.zeros((rows, R), np.float32),
        values=None,
        scores=zeros,
        kl_coefficient=zeros,
        weights=zeros + 1,
        rows=np.arange(rows, dtype=np.int32),
    )


@pytest.mark.parametrize(("windows", "batches"), [(1, 1), (2, 1), (3, 2), (6, 2)])
def test_every_token_of_a_batch_stands_in_its_windows_once(windows: int, batches: int) -> None:
    rollout = rollout_of(0)
    given = np.random.default_rng(1).permutation(12).reshape(batches, -1)
    plan = packed(rollout, given, Packing(windows), K)
    assert sorted(plan.rows.ravel().tolist()) == list(range(48))
    for own, groups, source, real in zip(plan.rows, given, plan.windows.source, plan.windows.real, strict=True):
        assert set(own // K) == set(groups)  # a batch keeps its groups, its windows take them in any order
        held = own.reshape(windows, -1, K)
        for w in range(windows):
            flat = np.concatenate(
                [np.concatenate([rollout.prompts[i[0]], rollout.responses[i].ravel()]) for i in held[w]]
            )
            expected = [
                token
                for i in held[w]
                for token in [
                    *rollout.prompts[i[0], : rollout.prompt_lengths[i[0]]],
                    *(t for j in i for t in rollout.responses[j, : rollout.response_lengths[j]]),
                ]
            ]
            assert flat[source[w]][real[w]].tolist() == expected
    assert plan.real == pytest.approx(plan.windows.real.mean())


def test_rollouts_of_a_run_have_few_shapes() -> None:
    """A hundred rollouts alike, of half the most tokens: a window is not much larger than what it holds."""
    plans = [packed(rollout_of(seed), np.arange(12)[None], Packing(2), K) for seed in range(100)]
    assert len({plan.shape for plan in plans}) <= 8
    assert np.mean([plan.real for plan in plans]) > 0.8
    again = packed(rollout_of(7), np.arange(12)[None], Packing(2), K)
    assert again.shape == plans[7].shape
    full = packed(rollout_of(0, mean=9.0), np.arange(12)[None], Packing(2, multiple=1), K)
    assert full.shape.reads == 6 * K * R


def test_no_shape_is_left_out_however_long_responses_become() -> None:
    """From one token to all: no more shapes than sixteenths and quarters allow, and each holds what it is for."""
    shapes = set()
    for mean in np.linspace(0, 1.2, 60):
        plan = packed(rollout_of(3, mean=mean), np.arange(12)[None], Packing(1), K)
        assert plan.windows.real.sum() == rollout_tokens(rollout_of(3, mean=mean))
        shapes.add(plan.shape)
    assert len(shapes) <= 25


def rollout_tokens(rollout: Rollout) -> int:
    return int(rollout.prompt_lengths[::K].sum() + rollout.response_lengths.sum())
