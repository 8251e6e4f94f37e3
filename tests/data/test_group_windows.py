"""Preference groups in windows: who shares one, in which shapes, and what stands where."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax.data.sets.batches import CLASSES, length_classes, sequence_classes
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.dealing import compose
from dpo_jax.data.sets.group_packing import OF_EACH, Packing, pack_batch
from dpo_jax.data.sets.group_windows import WindowPlan, plan_windows
from dpo_jax.data.sets.loader import PreferenceLoader, eval_batches
from dpo_jax.data.sets.row_mixture import RowMixture
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.types import PreferenceBatch, Windows


def skewed(n: int, k: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompt lengths [N] and response lengths [N, K] as in dialogues: many short, a few long, prompts cut at 256."""
    rng = np.random.default_rng(seed)
    prompts = np.minimum(np.exp(rng.normal(4.7, 0.7, n)).astype(int) + 1, 256)
    return prompts, np.minimum(np.exp(rng.normal(3.4, 0.9, (n, k))).astype(int) + 1, 256)


def dataset(n: int = 103, k: int = 2, seed: int = 0) -> PreferenceDataset:
    """Prompt i holds i + 1 throughout, and its response k (i + 1) K + k + 1000, without end."""
    prompts, responses = skewed(n, k, seed)
    parts = [np.full(length, i // k * k + i % k + 1000 + k) for i, length in enumerate(responses.reshape(-1))]
    return PreferenceDataset(
        prompts=Ragged.of([np.full(length, i + 1) for i, length in enumerate(prompts)], np.int32),
        responses=Ragged.of(parts, np.int32),
        formats=None,
        row_numbers=np.arange(1001, 1001 + n, dtype=np.int32),
        extras={},
        dropped={},  # type: ignore[arg-type]
        rows_read=n,
        unused_columns=(),
        terminators=(),
        source=f"made up {seed}",
    )


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n", [3, 8, 103])
def test_an_epoch_holds_every_row_once_and_one_partial_batch_at_most(n: int, shuffle: bool) -> None:
    prompts, responses = skewed(n)
    reads = responses.sum(axis=1)
    batches = compose(prompts + reads, reads, 8, seed=3, epoch=1, shuffle=shuffle)
    assert sorted(i for rows in batches for i in rows) == list(range(n))
    assert sorted((len(rows) for rows in batches), reverse=True) == [8] * (n // 8) + [n % 8] * (n % 8 > 0)


def test_batches_have_nearly_as_many_tokens() -> None:
    prompts, responses = skewed(2000)
    reads = responses.sum(axis=1)
    totals = prompts + reads
    for size, near in ((8, 0.12), (64, 0.01)):
        whole = [rows for rows in compose(totals, reads, size, seed=0, epoch=0, shuffle=True) if len(rows) == size]
        batches = np.stack(whole)
        sums = totals[batches].sum(axis=1)
        assert np.abs(sums / sums.mean() - 1).max() < near
        assert reads[batches].sum(axis=1).std() < 0.1 * reads[batches].sum(axis=1).mean()


@pytest.mark.parametrize(("n", "size"), [(64, 2), (30, 8), (640, 64), (2000, 8)])
def test_a_shuffle_gives_every_row_others_to_share_a_batch_with(n: int, size: int) -> None:
    """Rows of different lengths; by chance two share a batch with probability (B - 1) / (N - 1)."""
    totals = np.arange(10, 10 + n)

    def together(epoch: int) -> set[tuple[int, int]]:
        batches = compose(totals, totals // 2, size, seed=0, epoch=epoch, shuffle=True)
        return {(int(i), int(j)) for rows in batches for i in rows for j in rows if i < j}

    again = [len(together(e) & together(e + 1)) / len(together(e)) for e in range(5)]
    assert np.mean(again) < (size - 1) / (n - 1) + 0.05


def test_rows_of_the_incomplete_batch_are_others_in_every_epoch() -> None:
    totals = np.arange(10, 10 + 131)
    epochs = [compose(totals, totals // 2, 64, seed=1, epoch=e, shuffle=True) for e in range(8)]
    left = [next(tuple(sorted(rows)) for rows in batches if len(rows) == 3) for batches in epochs]
    assert len({i for rows in left for i in rows}) > 16
    assert {len(rows) for batches in epochs for rows in batches[:-1]} == {3, 64}  # and it stands anywhere


def test_seeds_beyond_63_bits_differ() -> None:
    totals = np.arange(10, 74)
    one, other = (compose(totals, totals // 2, 8, seed=2**63 + i, epoch=0, shuffle=True)[0].tolist() for i in (0, 1))
    assert one != other


def test_without_a_shuffle_rows_keep_their_order() -> None:
    prompts, responses = skewed(21)
    how = {"batch_size": 4, "packing": Packing(2), "dealt": False}
    plan = plan_windows(prompts, responses, **how)
    batches = [one.indices for one in plan.epoch(0, 3, shuffle=False)]
    np.testing.assert_array_equal(np.concatenate(batches), np.arange(21))
    assert [len(rows) for rows in batches] == [4, 4, 4, 4, 4, 1]
    for rows in batches:
        plan.pack(plan.arranged(rows))
    drawn = np.asarray([5, 5, 3, 20, 0, 7])
    plan = plan_windows(prompts, responses, drawn=lambda epoch: drawn, **how)
    again = plan.epoch(0, 1, shuffle=False, order=drawn[::-1])
    np.testing.assert_array_equal(np.concatenate([one.indices for one in again]), drawn[::-1])


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    prompts, responses = skewed(64)
    reads = responses.sum(axis=1)

    def order(seed: int, epoch: int) -> str:
        return str([sorted(rows) for rows in compose(prompts + reads, reads, 8, seed=seed, epoch=epoch, shuffle=True)])

    assert order(0, 0) == order(0, 0)
    assert len({order(s, e) for s in (0, 1, 2) for e in (0, 1, 2)}) == 9
    # Pinned, so that a resumed run meets the batches it was started with, whatever NumPy's version.
    small = np.arange(10, 18)
    assert [rows.tolist() for rows in compose(small, small - 5, 4, seed=0, epoch=0, shuffle=True)] == [
        [6, 4, 3, 0],
        [7, 5, 2, 1],
    ]


def test_devices_and_micro_batches_do_not_decide_which_rows_share_a_batch() -> None:
    data = dataset()
    of = [
        [
            sorted(batch.rows.tolist())
            for batch in PreferenceLoader(data, batch_size=8, seed=0, packing=Packing(w), workers=0)
        ]
        for w in (1, 2, 8)
    ]
    assert of[0] == of[1] == of[2]


def test_resuming_gives_the_same_batches_bit_for_bit() -> None:
    def loader(packing: Packing) -> PreferenceLoader:
        return PreferenceLoader(dataset(), batch_size=8, seed=0, packing=packing, epochs=2.0, workers=0)

    whole = list(loader(Packing(2)))
    begun = loader(Packing(2))
    for _ in range(5):
        next(begun)
    again = loader(Packing(2))
    again.set_state(begun.get_state())
    for expected, got in zip(whole[5:], again, strict=True):
        for a, b in zip(*map(leaves, (expected, got)), strict=True):
            np.testing.assert_array_equal(a, b)
    other = loader(Packing(4))  # on other devices
    other.set_state(begun.get_state())
    assert sorted(next(other).rows.tolist()) == sorted(whole[5].rows.tolist())


def leaves(batch: PreferenceBatch) -> list[np.ndarray]:
    return jax.tree.leaves(batch)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("windows", [1, 4, 8])
@pytest.mark.parametrize("n", [5, 64, 1000])
def test_every_batch_of_every_epoch_has_one_of_few_shapes(n: int, windows: int) -> None:
    prompts, responses = skewed(n)
    plan = plan_windows(prompts, responses, batch_size=8, packing=Packing(windows), shuffle=True, seed=1)
    assert 1 <= len(plan.shapes) <= 4
    for epoch in (0, 1, 17, 400):
        for one in plan.epoch(1, epoch, shuffle=True):
            plan.shape_of(plan.arranged(one.indices))  # StopIteration where none holds it


@pytest.mark.parametrize("multiple", [1, 16])
def test_rows_of_as_many_tokens_need_not_be_alike(multiple: int) -> None:
    """Which of them stands first is drawn: a few have long responses, the others long prompts."""
    prompts, responses = np.full(400, 216), np.full((400, 2), 20)
    prompts[:12], responses[:12] = 16, 120
    plan = plan_windows(prompts, responses, batch_size=2, packing=Packing(1, (), multiple), shuffle=True, seed=1)
    for epoch in range(12):
        for one in plan.epoch(1, epoch, shuffle=True):
            plan.shape_of(plan.arranged(one.indices))


def test_a_mixture_may_draw_any_rows() -> None:
    prompts, responses = skewed(40)
    longest = np.argsort(prompts + responses.sum(axis=1))[-8:]
    drawn = [np.arange(40), np.repeat(longest, 5)]
    plan = plan_windows(
        prompts, responses, batch_size=8, packing=Packing(2), drawn=lambda epoch: drawn[0], shuffle=False
    )
    for one in plan.epoch(0, 1, shuffle=False, order=drawn[1]):
        plan.shape_of(plan.arranged(one.indices))


@pytest.mark.parametrize(("size", "share"), [(8, 0.95), (64, 0.99)])
def test_nearly_all_places_are_real_tokens(size: int, share: float) -> None:
    data = dataset(500)
    loader = PreferenceLoader(data, batch_size=size, seed=0, packing=Packing(1), workers=0)
    assert isinstance(loader.plan, WindowPlan)
    batches = list(loader)
    real, places = (sum(f(one.windows[0].real) for one in batches if one.windows) for f in (np.sum, np.size))
    assert real / places > share
    assert loader.plan.real == pytest.approx(real / places)
    assert real == (data.prompt_lengths + data.response_lengths.sum(axis=1)).sum()
    shapes = {tuple(x.shape for x in leaves(batch)) for batch in batches}
    assert len(shapes) == len(loader.plan.used) <= 4
    assert f"in {len(shapes)} shape" in loader.summary()
    assert f"{loader.plan.real:.1%} of the tokens" in loader.summary()


def test_attention_pads_little() -> None:
    prompts, responses = skewed(1000)
    plan = plan_windows(prompts, responses, batch_size=8, packing=Packing(1), shuffle=True)
    for (shape,) in plan.shapes:
        assert 1 <= len(shape.views) <= OF_EACH
        assert 1 <= len(shape.tails) <= OF_EACH
        assert sum(n for n, _ in shape.views) == sum(n for n, *_ in shape.tails) == 8
    (shape,), long, short = plan.shapes[0], responses.max(axis=1), responses.min(axis=1)
    scores = sum(n * length**2 for n, length in shape.views) + sum(n * q * length for n, q, length in shape.tails)
    assert scores < 2.5 * (np.square(prompts + long) + (prompts + short) * short).sum() / 125


def test_classes_of_tails_cost_least() -> None:
    """Beside every cut of few sequences."""
    rng = np.random.default_rng(0)
    longest, queries = -np.sort(-rng.integers(1, 90, 12)), rng.integers(1, 40, 12)
    found = sequence_classes(longest, queries, 1, 3)
    cuts = [np.array_split(np.arange(12), 1)]
    cuts += [np.split(np.arange(12), cut) for k in (1, 2) for cut in itertools.combinations(range(1, 12), k)]
    least = min(sum(len(of) * longest[of].max() * queries[of].max() for of in many) for many in cuts)
    assert sum(n * q * length for n, q, length in found) == least
    assert sum(n for n, *_ in found) == 12
    assert sequence_classes(longest[:0], queries[:0], 16, 3) == ()


def test_length_classes_cost_least() -> None:
    """Beside every cut of few lengths."""
    longest = np.array([90, 90, 64, 64, 33, 32, 31, 16, 16, 9, 8, 3])
    cost = sum(n * length**2 for n, length in length_classes(longest, 1))
    cuts = itertools.combinations(range(1, len(longest)), CLASSES - 1)
    parts = [np.split(longest, cut) for cut in cuts]
    assert cost == min(sum(len(part) * int(part[0]) ** 2 for part in many) for many in parts)
    assert length_classes(longest, 16)[0] == (2, 96)
    assert sum(n for n, _ in length_classes(longest, 16)) == len(longest)


# ---------------------------------------------------------------- what stands where


def sequences(batch: PreferenceBatch) -> list[list[int]]:
    """The tokens of each sequence that attention sees, of all windows."""
    (windows,) = batch.windows or ()
    flat = np.concatenate([batch.prompts, batch.responses.reshape(len(batch.prompts), -1)], axis=1)
    found = []
    for w, rows in enumerate(flat.reshape(len(windows.source), -1)):
        tokens = rows[windows.source[w]]
        for places, lengths in zip(windows.views.places, windows.views.lengths, strict=True):
            for at, length in zip(places[w], lengths[w], strict=True):
                if length:
                    assert (windows.positions[w, at[:length]] == np.arange(length)).all()
                    assert windows.real[w, at[:length]].all()
                    found.append(tokens[at[:length]].tolist())
    return found


def queries(windows: Windows) -> Iterator[tuple[int, list[int], list[int]]]:
    """(window, places of a sequence, those of them that are queries), of all; checks where answers are found."""
    views = windows.views
    whole = len(views.places) - len(views.tails)
    starts = (*(np.zeros_like(x) for x in views.lengths[:whole]), *views.starts)
    for w, real in enumerate(windows.real):
        asked = np.concatenate([x[w].reshape(-1) for x in views.queries])
        assert (asked[views.answers[w, real]] == np.flatnonzero(real)).all()
        assert (views.answers[w, ~real] == len(asked)).all()
        for at, lengths, first, own in zip(views.places, views.lengths, starts, views.queries, strict=True):
            for i in np.flatnonzero(lengths[w]):
                end, start = lengths[w, i], first[w, i]
                assert (own[w, i, : end - start] == at[w, i, start:end]).all()
                yield w, at[w, i, :end].tolist(), at[w, i, start:end].tolist()


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_windows_hold_each_prompt_once_and_attention_sees_each_response_behind_its_own(windows: int) -> None:
    rng = np.random.default_rng(0)
    batch = some_batch(rng)
    packed = pack_batch(batch, Packing(windows, multiple=8))
    (one,) = packed.windows or ()
    expected = [
        [*batch.prompts[b, : batch.prompt_lengths[b]], *batch.responses[b, k, : batch.response_lengths[b, k]]]
        for b in range(8)
        for k in range(3)
        if batch.response_lengths[b, k] and batch.weights[b]
    ]
    assert sorted(sequences(packed)) == sorted([[int(x) for x in row] for row in expected])
    found = list(queries(one))
    asked = [(w, place) for w, _, own in found for place in own]
    assert len(set(asked)) == len(asked) == one.real.sum()
    assert any(len(own) < len(places) for _, places, own in found)  # a prompt's are asked once
    there = batch.weights > 0
    alone = there & (batch.response_lengths.sum(axis=1) > 0)
    assert one.real.sum() == batch.prompt_lengths[alone].sum() + batch.response_lengths[there].sum()
    # What predicts a response token stands before it: the one before in its sequence.
    flat = np.concatenate([batch.prompts, batch.responses.reshape(8, -1)], axis=1).reshape(windows, -1)
    for b in range(8):
        w, i = divmod(b, 8 // windows)
        for k in range(3):
            length = int(batch.response_lengths[b, k] * there[b])
            spread = one.spread[w].reshape(8 // windows, 3, -1)[i, k, :length]
            assert (flat[w, one.targets[w, spread]] == batch.responses[b, k, :length]).all()
            before = [*batch.prompts[b, : batch.prompt_lengths[b]][-1:], *batch.responses[b, k, : max(length - 1, 0)]]
            assert (flat[w, one.source[w, one.reads[w, spread]]] == before[:length]).all()
            if length:
                end = one.source[w, one.ends[w].reshape(-1, 3)[i, k]]
                assert flat[w, end] == batch.responses[b, k, length - 1]


def some_batch(rng: Any) -> PreferenceBatch:
    """Eight rows of three responses, some absent, one row a filler."""
    lengths = rng.integers(0, 9, (8, 3)).astype(np.int32)
    lengths[5] = 0
    weights = np.ones(8, np.float32)
    weights[2] = 0
    ids = rng.permutation(8 * 10 + 8 * 3 * 8).astype(np.int32)
    arrays: dict[str, Any] = {
        "prompts": ids[:80].reshape(8, 10),
        "prompt_lengths": rng.integers(1, 11, 8).astype(np.int32),
        "responses": ids[80:].reshape(8, 3, 8),
        "response_lengths": lengths,
        "weights": weights,
        "rows": np.arange(8, dtype=np.int32),
    }
    return PreferenceBatch(**arrays)


def test_evaluation_holds_every_row_once() -> None:
    data = dataset(21)
    found = np.zeros(21, int)
    for indices, batch in eval_batches(data, 4, 3, packing=Packing(2)):
        real = indices >= 0
        assert (batch.weights > 0).tolist() == real.tolist()
        found[indices[real]] = batch.rows[real]
    assert found.tolist() == data.row_numbers.tolist()


def test_rows_of_a_short_run_of_a_mixture() -> None:
    data = dataclasses.replace(dataset(40), mixture=RowMixture(("a", "b"), (30, 10), (1.0, 3.0)))
    loader = PreferenceLoader(data, batch_size=8, seed=0, packing=Packing(2), steps=2, workers=0)
    seen = np.unique(np.concatenate([batch.rows for batch in loader]))
    again = np.concatenate([batch.rows[indices >= 0] for indices, batch in loader.every_row()])
    assert sorted(again) == seen.tolist()
