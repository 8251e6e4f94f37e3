"""The loader of token windows: its position, its errors, evaluation."""

import json

import jax
import numpy as np
import pytest
from sequences import dataset

from dpo_jax.data.sets.loader import TokenLoader, eval_windows
from dpo_jax.data.sets.packing import WindowBatch, collate
from dpo_jax.data.sets.sequences import SequenceDataset
from dpo_jax.data.sets.steps_loader import StepsLoader, run_length
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh, put_batch
from dpo_jax.types import TokenBatch


def equal(a: TokenBatch, b: TokenBatch) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("window", [None, 256])
def test_a_restored_position_gives_the_very_next_batch(window: int | None, workers: int) -> None:
    data = dataset()

    def loader(**change: object) -> TokenLoader:
        options: dict[str, object] = {"batch_size": 4, "seed": 5, "epochs": 2.5, "workers": workers, **change}
        return TokenLoader(data, window=window, **options)  # type: ignore[arg-type]

    whole = loader()
    per_epoch = whole.steps_per_epoch
    assert whole.total_steps == int(np.ceil(2.5 * per_epoch))
    batches, states = [], []
    for batch in whole:
        states.append(json.loads(json.dumps(whole.get_state())))
        batches.append(batch)
    assert len(batches) == whole.total_steps
    for at in (0, per_epoch - 2, per_epoch - 1, per_epoch, whole.total_steps - 2):  # within an epoch and across its end
        resumed = loader(workers=1)
        next(resumed)
        resumed.set_state(states[at])
        assert resumed.step == at + 1
        rest = list(resumed)
        assert len(rest) == whole.total_steps - at - 1
        assert all(equal(a, b) for a, b in zip(rest, batches[at + 1 :], strict=True))
        resumed.close()
    assert equal(next(loader(start_step=7)), batches[7])
    with pytest.raises(StopIteration):
        next(loader(start_step=whole.total_steps))
    for epoch in (0, 1):
        rows = np.concatenate([b.rows.ravel() for b in batches[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert sorted(rows[rows >= 0].tolist()) == data.row_numbers.tolist()
    assert not equal(batches[0], batches[per_epoch])


def test_a_position_in_other_data_is_refused() -> None:
    def loader(data: SequenceDataset | None = None, **change: object) -> TokenLoader:
        options: dict[str, object] = {"batch_size": 8, "seed": 0, "window": 256, **change}
        return TokenLoader(data or dataset(), **options)  # type: ignore[arg-type]

    state = json.loads(json.dumps(loader().get_state()))
    for other, name in (
        (loader(dataset(seed=1)), "data"),
        (loader(batch_size=4), "batch_size"),
        (loader(seed=1), "seed"),
        (loader(shuffle=False), "shuffle"),
        (loader(window=512), "windows"),
        (loader(window=None, buckets=1), "packed"),
    ):
        with pytest.raises(InputError, match=f"saved data position does not fit: .*{name}"):
            other.set_state(state)
    longer = loader(steps=100)
    longer.set_state(state)
    with pytest.raises(InputError, match="outside this run"):
        longer.set_state({**state, "step": 101})
    with pytest.raises(InputError, match=r"--train\.seed"):
        loader(seed=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_name_the_rows_and_are_no_end_of_data(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = TokenLoader(
        dataset(24), batch_size=8, seed=0, window=None, buckets=1, shuffle=False, steps=3, workers=workers
    )

    def broken(data: SequenceDataset, batch: WindowBatch, **rest: int) -> TokenBatch:
        if any(12 in window for window in batch.windows):
            raise StopIteration("the worst of exceptions for an iterator")
        return collate(data, batch, **rest)

    monkeypatch.setattr("dpo_jax.data.sets.packing.collate", broken)
    next(loader)
    for _ in range(2):  # it does not skip the batch when asked again, either
        with pytest.raises(RuntimeError, match=r"step 1: the batch of rows \[1009, .* 1016\]"):
            next(loader)
    assert loader.step == 1


@pytest.mark.parametrize("window", [None, 256])
def test_evaluation_meets_every_sequence_once_in_a_fixed_order(window: int | None) -> None:
    data = dataset(21)
    windows = eval_windows(data, batch_size=4, window=window, buckets=3)
    seen = []
    for indices, batch in windows:
        assert indices.shape == batch.rows.shape
        np.testing.assert_array_equal(batch.rows, np.where(indices >= 0, data.row_numbers[indices], -1))
        seen += indices[indices >= 0].tolist()
    assert sorted(seen) == list(range(21))
    assert len(windows) == len(list(windows))
    assert all(equal(a, b) for (_, a), (_, b) in zip(windows, windows, strict=True))


def test_the_loader_says_its_windows() -> None:
    packed = TokenLoader(dataset(), batch_size=8, seed=0, window=300)
    assert "windows of 304 tokens" in packed.summary()
    assert f"{packed.steps_per_epoch} steps an epoch" in packed.summary()
    padded = TokenLoader(dataset(), batch_size=8, seed=0, window=None, buckets=2)
    assert "at most 1 sequence;" in padded.summary()
    assert len(padded.plan.sizes) <= 2


def test_batches_go_onto_a_mesh() -> None:
    mesh = make_mesh(data=2, fsdp=4)
    batch = next(TokenLoader(dataset(), batch_size=8, seed=0, window=256, workers=0))
    placed = put_batch(mesh, batch)
    assert equal(jax.device_get(placed), batch)
    assert len(placed.tokens.sharding.device_set) == 8
    assert placed.tokens.addressable_shards[0].data.shape == (1, 256)


def test_any_function_of_the_step_can_be_loaded() -> None:
    loader = StepsLoader(
        lambda step: np.full(3, step),
        holds=lambda step: f"document {step}",
        steps_per_epoch=4,
        epochs=1.5,
        identity={"data": "x"},
        workers=1,
    )
    assert [int(batch[0]) for batch in loader] == [0, 1, 2, 3, 4, 5]
    assert loader.epoch == 1.5
    loader.set_state({"step": 2, "data": "x"})
    assert next(loader).tolist() == [2, 2, 2]
    assert run_length(4, epochs=None, steps=None) == 4
    with pytest.raises(ValueError, match="not both"):
        run_length(4, epochs=1, steps=1)
