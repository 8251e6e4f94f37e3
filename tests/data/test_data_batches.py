"""Batch shapes, their order, and the loader's position."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from dpo_jax.data.sets.batches import collate, plan_buckets
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.loader import PreferenceLoader, eval_batches
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.errors import InputError
from dpo_jax.types import PreferenceBatch


def dataset(n: int = 103, k: int = 2, seed: int = 0) -> PreferenceDataset:
    """Rows of lengths like a chat data set's; every id of row i is i + 1."""
    rng = np.random.default_rng(seed)
    prompts = np.minimum(rng.lognormal(4, 0.8, n).astype(int) + 1, 400)
    answers = np.minimum(rng.lognormal(3, 0.8, (n, k)).astype(int) + 1, 200)
    return PreferenceDataset(
        prompts=Ragged.of([np.full(p, i + 1) for i, p in enumerate(prompts)], np.int32),
        responses=Ragged.of([np.full(r, i + 1) for i, many in enumerate(answers) for r in many], np.int32),
        formats=None,
        row_numbers=np.arange(n, dtype=np.int32) + 1001,
        extras={},
        dropped=Counter(),
        rows_read=n,
        unused_columns=(),
        terminators=(2,),
        source="made up",
    )


def batches_equal(a: PreferenceBatch, b: PreferenceBatch) -> bool:
    return all(
        np.array_equal(x, y) for x, y in zip(dataclasses.astuple(a)[:6], dataclasses.astuple(b)[:6], strict=True)
    )


@pytest.mark.parametrize("buckets", [1, 2, 4, 7])
@pytest.mark.parametrize("multiple", [1, 16, 128])
def test_every_row_fits_its_shape(buckets: int, multiple: int) -> None:
    data = dataset()
    plan = plan_buckets(data.prompt_lengths, data.response_lengths, buckets=buckets, batch_size=8, multiple=multiple)
    assert 1 <= len(plan.shapes) <= buckets
    assert all(p % multiple == 0 and r % multiple == 0 for p, r in plan.shapes)
    shapes = np.asarray(plan.shapes)[plan.rows]
    assert (data.prompt_lengths <= shapes[:, 0]).all()
    assert (data.response_lengths.max(axis=1) <= shapes[:, 1]).all()


def test_more_buckets_pad_less_than_random_batches() -> None:
    data = dataset(1000)
    padding = [
        plan_buckets(data.prompt_lengths, data.response_lengths, buckets=n, batch_size=8).padding for n in (1, 2, 4, 8)
    ]
    assert padding == sorted(padding, reverse=True)
    order = np.random.default_rng(0).permutation(1000).reshape(-1, 8)
    random = 8 * (data.prompt_lengths[order].max(1).sum() + 2 * data.response_lengths[order].max((1, 2)).sum())
    real = data.prompt_lengths.sum() + data.response_lengths.sum()
    assert padding[2] < 0.85 * random / real


def test_padding_is_that_of_the_batches() -> None:
    data = dataset()
    plan = plan_buckets(data.prompt_lengths, data.response_lengths, buckets=4, batch_size=8)
    batches = [batch for _, batch in eval_batches(data, 8, 4)]
    tokens = sum(b.prompts.size + b.responses.size for b in batches)
    assert plan.padding == pytest.approx(tokens / (data.prompt_lengths.sum() + data.response_lengths.sum()))


def test_lengths_far_apart_are_planned_quickly() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 32_000, (5000, 3))
    plan = plan_buckets(lengths[:, 0], lengths[:, 1:], buckets=8, batch_size=8)
    assert len(plan.shapes) == 8
    assert plan.shapes[-1] >= (lengths[:, 0].max(), lengths[:, 1:].max())


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [3, 8, 103])
def test_an_epoch_holds_every_row_once_and_one_partial_batch_at_most(n: int, shuffle: bool) -> None:
    data = dataset(n)
    plan = plan_buckets(data.prompt_lengths, data.response_lengths, buckets=4, batch_size=8)
    batches = plan.epoch(3, 1, shuffle=shuffle)
    assert sorted(i for b in batches for i in b.indices) == list(range(n))
    assert len(batches) == -(-n // 8)
    assert sorted(len(b.indices) for b in batches)[1:] == [8] * (len(batches) - 1)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    data = dataset()
    plan = plan_buckets(data.prompt_lengths, data.response_lengths, buckets=4, batch_size=8)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [b.indices.tolist() for b in plan.epoch(seed, epoch, shuffle=True)]

    assert order(0, 0) == order(0, 0)
    assert len({str(order(s, e)) for s in (0, 1, 2) for e in (0, 1, 2)}) == 9
    # Pinned, so that a resumed run meets the order it was started with, whatever NumPy's version.
    small = plan_buckets(np.full(6, 5), np.full((6, 2), 5), buckets=1, batch_size=2)
    assert [b.indices.tolist() for b in small.epoch(0, 0, shuffle=True)] == [
        [4, 3],
        [1, 5],
        [0, 2],
    ]


def test_collate_pads_on_the_right_and_marks_fillers() -> None:
    data = dataset(5).with_reference(np.arange(10).reshape(5, 2))
    batch = collate(data, np.asarray([4, 1]), (416, 208), 3)
    assert batch.prompts.shape == (3, 416)
    assert batch.responses.shape == (3, 2, 208)
    assert batch.rows.tolist() == [1005, 1002, -1]
    assert batch.weights.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(batch.prompt_lengths, data.prompt_lengths[[4, 1, 4]])
    np.testing.assert_array_equal(batch.response_lengths, data.response_lengths[[4, 1, 4]])
    np.testing.assert_array_equal(batch.reference_logps, [[8, 9], [2, 3], [8, 9]])
    for b, row in enumerate((4, 1, 4)):
        length = batch.prompt_lengths[b]
        assert (batch.prompts[b, :length] == row + 1).all()
        assert not batch.prompts[b, length:].any()
        for k in (0, 1):
            assert (batch.responses[b, k] > 0).sum() == batch.response_lengths[b, k]
    assert {a.dtype.name for a in (batch.prompts, batch.responses, batch.rows, batch.prompt_lengths)} == {"int32"}


def test_eval_batches_can_be_put_back_in_row_order() -> None:
    data = dataset(21)
    found = np.zeros(21, int)
    for indices, batch in eval_batches(data, 4, 3):
        real = indices >= 0
        assert (batch.weights > 0).tolist() == real.tolist()
        found[indices[real]] = batch.rows[real]
    assert found.tolist() == data.row_numbers.tolist()


# ---- the loader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_a_restored_position_gives_the_very_next_batch(workers: int) -> None:
    data = dataset()

    def loader(**change: object) -> PreferenceLoader:
        options: dict[str, object] = {"batch_size": 8, "seed": 5, "epochs": 2.5, "workers": workers, **change}
        return PreferenceLoader(data, **options)  # type: ignore[arg-type]

    whole = loader()
    assert whole.steps_per_epoch == 13
    assert whole.total_steps == 33
    batches, states = [], []
    for batch in whole:
        states.append(json.loads(json.dumps(whole.get_state())))
        batches.append(batch)
    assert len(batches) == 33
    for at in (0, 11, 12, 13, 31):
        resumed = loader(workers=1)
        next(resumed)
        resumed.set_state(states[at])
        assert resumed.step == at + 1
        assert batches_equal(next(resumed), batches[at + 1])
        resumed.close()
    assert batches_equal(next(loader(start_step=20)), batches[20])
    done = loader(start_step=33)
    with pytest.raises(StopIteration):
        next(done)
    assert sum(b.weights.sum() for b in batches[:13]) == len(data)


def test_a_position_in_other_data_is_refused() -> None:
    state = PreferenceLoader(dataset(), batch_size=8, seed=0).get_state()
    for other in (
        PreferenceLoader(dataset(seed=1), batch_size=8, seed=0),
        PreferenceLoader(dataset(), batch_size=4, seed=0),
        PreferenceLoader(dataset(), batch_size=8, seed=1),
        PreferenceLoader(dataset(), batch_size=8, seed=0, shuffle=False),
        PreferenceLoader(dataset(), batch_size=8, seed=0, buckets=1),
    ):
        with pytest.raises(InputError, match="saved data position does not fit"):
            other.set_state(state)
    # A longer run over the same data goes on.
    longer = PreferenceLoader(dataset(), batch_size=8, seed=0, steps=100)
    longer.set_state(state)
    with pytest.raises(InputError, match="outside this run"):
        longer.set_state({**state, "step": 101})


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_name_the_rows_and_are_no_end_of_data(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(24)
    loader = PreferenceLoader(data, batch_size=8, seed=0, shuffle=False, buckets=1, workers=workers)

    def broken(data: PreferenceDataset, indices: np.ndarray, *rest: object) -> PreferenceBatch:
        if 12 in indices:
            raise StopIteration("the worst of exceptions for an iterator")
        return collate(data, indices, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("dpo_jax.data.sets.batches.collate", broken)
    next(loader)
    for _ in range(2):  # it does not skip the batch when asked again, either
        with pytest.raises(RuntimeError, match=r"step 1: the batch of rows \[1009, .* 1016\]"):
            next(loader)
    assert loader.step == 1


def test_loader_says_its_shapes() -> None:
    loader = PreferenceLoader(dataset(), batch_size=8, seed=0)
    assert "13 steps an epoch" in loader.summary()
    assert "padded tokens" in loader.summary()
    with pytest.raises(InputError, match=r"--train\.seed"):
        PreferenceLoader(dataset(), batch_size=8, seed=-1)
