"""Windows of documents: all full, nothing lost, mixtures in proportion, and every batch a function of its step."""

from collections import Counter
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest

from dpo_jax.data.sets.documents import DocumentDataset
from dpo_jax.data.sets.text_windows import (
    PERIOD,
    EvalWindows,
    Mixture,
    Stream,
    TextLoader,
    most_pieces,
    parse_sources,
    shares,
)
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.errors import InputError

BOS, EOS = 1, 2


def documents(
    count: int = 20, *, first: int = 10, longest: int = 30, seed: int = 0, name: str = "a"
) -> DocumentDataset:
    """Documents [BOS] ids EOS whose ids are all different from `first` on, over the whole data set."""
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    items, at = [], first
    for n in lengths:
        items.append(np.array([BOS, *range(at, at + n), EOS], np.uint16))
        at += n
    return DocumentDataset(
        tokens=Ragged.of(items, np.uint16),
        row_numbers=np.arange(1, count + 1, dtype=np.int32),
        dropped=Counter(),
        rows_read=count,
        unknown=0,
        unused_columns=(),
        source=name,
    )


def stream_of(data: DocumentDataset, length: int, windows: range, **options: Any) -> list[np.ndarray]:
    stream = Stream(data, length, **{"seed": 0, "shuffle": True, **options})
    return [np.concatenate([ids for ids, _, _ in stream.pieces(k)]) for k in windows]


# ---------------------------------------------------------------- the windows of one source


@pytest.mark.parametrize("length", [2, 7, 64, 1000])
def test_windows_are_full_and_together_the_stream(length: int) -> None:
    data = documents()
    count = -(-3 * data.total // length)  # three epochs
    for shuffle in (False, True):
        windows = stream_of(data, length, range(count), shuffle=shuffle)
        assert {len(w) for w in windows} == {length}
        seen = np.bincount(np.concatenate(windows), minlength=data.tokens.values.max() + 1)
        ids = seen[10:]
        # All windows that begin in three epochs: these whole, and what the last window takes of the next.
        assert ids.min() >= 3
        assert ids.max() <= 3 + -(-length // data.total)
        if not shuffle:
            whole = np.tile(data.tokens.values, 6)
            np.testing.assert_array_equal(np.concatenate(windows), whole[: count * length])


def test_each_epoch_has_its_own_order_and_all_documents() -> None:
    data = documents()
    stream = Stream(data, 16, seed=3, shuffle=True)
    orders = [stream._order(epoch)[0].tolist() for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] == Stream(data, 16, seed=3, shuffle=True)._order(0)[0].tolist()
    assert orders[0] != Stream(data, 16, seed=4, shuffle=True)._order(0)[0].tolist()
    assert orders[0] != Stream(data, 16, seed=3, shuffle=True, source=1)._order(0)[0].tolist()


def test_an_epoch_of_windows_holds_each_token_once_where_they_divide() -> None:
    data = documents(8, longest=12)
    length = 4
    data = DocumentDataset(**{**vars(data), "tokens": Ragged.of([data.tokens[0][:8], data.tokens[1][:8]], np.uint16)})
    data = DocumentDataset(**{**vars(data), "row_numbers": data.row_numbers[:2]})
    each = data.total // length
    for epoch in range(3):
        windows = stream_of(data, length, range(epoch * each, (epoch + 1) * each))
        np.testing.assert_array_equal(np.sort(np.concatenate(windows)), np.sort(data.tokens.values))


def test_the_most_pieces_of_a_window() -> None:
    for longest, length in ((3, 40), (30, 16), (5, 500), (30, 5000)):
        data = documents(longest=longest)
        stream = Stream(data, length, seed=0, shuffle=True)
        most = max(sum(1 for _ in stream.pieces(k)) for k in range(200))
        bound = most_pieces(data.lengths, length)
        assert most <= bound <= length // int(data.lengths.min()) + 2


# ---------------------------------------------------------------- batches


def loader(*sources: DocumentDataset, weights: Any = None, **options: Any) -> TextLoader:
    sources = sources or (documents(),)
    options = {"length": 16, "batch_size": 4, "seed": 0, "epochs": 2, "workers": 0, **options}
    return TextLoader(sources, weights or [None] * len(sources), **options)


def test_masked_documents_are_sequences_of_their_own() -> None:
    for batch in loader():
        tokens, segments, positions, targets = batch.tokens, batch.segments, batch.positions, batch.targets
        assert (segments > 0).all()
        begins = np.ones_like(targets)
        begins[:, 1:] = np.diff(segments, axis=1) != 0
        np.testing.assert_array_equal(positions == 0, begins)
        np.testing.assert_array_equal(targets, ~begins)
        # A new segment exactly behind an EOS, and within one the ids follow each other.
        np.testing.assert_array_equal(begins[:, 1:], tokens[:, :-1] == EOS)
        inside = ~begins[:, 1:] & (tokens[:, 1:] > EOS) & (tokens[:, :-1] > EOS)
        assert (np.diff(tokens, axis=1)[inside] == 1).all()
        assert (np.diff(positions, axis=1)[~begins[:, 1:]] == 1).all()
        np.testing.assert_array_equal((batch.rows >= 0).sum(axis=1), segments.max(axis=1))


def test_joined_documents_are_one_sequence() -> None:
    for masked, joined in zip(loader(), loader(documents="joined"), strict=True):
        np.testing.assert_array_equal(masked.tokens, joined.tokens)
        np.testing.assert_array_equal(masked.rows, joined.rows)
        assert (joined.segments == 1).all()
        np.testing.assert_array_equal(joined.positions, np.tile(np.arange(16), (4, 1)))
        np.testing.assert_array_equal(joined.targets, joined.positions > 0)


def test_rows_name_the_documents_of_each_window() -> None:
    data = documents()
    for batch in loader(data):
        for b in range(4):
            starts = [data.tokens[r - 1] for r in batch.rows[b] if r >= 0]
            held = set(np.concatenate(starts).tolist())
            assert set(batch.tokens[b].tolist()) <= held


def test_any_batch_can_be_had_at_once() -> None:
    whole = list(loader())
    assert len(whole) == 2 * -(-documents().total // 64)
    for start in (1, 3, len(whole) - 1):
        later = loader(start_step=start)
        state = later.get_state()
        assert state["step"] == start
        chex.assert_trees_all_equal(whole[start:], list(later))
        again = loader(workers=2)
        again.set_state(state)
        chex.assert_trees_all_equal(whole[start:], list(again))
        again.close()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"length": 32}, "length"),
        ({"documents": "joined"}, "documents"),
        ({"batch_size": 2}, ""),
    ],
)
def test_a_position_in_other_windows_is_refused(change: dict[str, Any], named: str) -> None:
    state = loader().get_state()
    with pytest.raises(InputError, match=f"does not fit: .*{named}.* changed"):
        loader(**change).set_state(state)


def test_a_position_in_another_mixture_is_refused() -> None:
    a, b = documents(), documents(seed=1, name="b")
    state = loader(a, b, weights=[0.7, 0.3]).get_state()
    loader(a, b, weights=[7, 3]).set_state(state)
    with pytest.raises(InputError, match="mixture changed"):
        loader(a, b, weights=[0.6, 0.4]).set_state(state)
    with pytest.raises(InputError, match="data changed"):
        loader(b, a, weights=[0.7, 0.3]).set_state(state)


def test_evaluation_sees_every_token_once() -> None:
    sources = (documents(), documents(3, first=1000, seed=1, name="b"))
    for mode in ("masked", "joined"):
        batches = EvalWindows(sources, 16, 4, mode)
        made = list(batches)
        assert len(made) == len(batches)
        chex.assert_trees_all_equal(made, list(batches))
        real = np.concatenate([b.tokens[b.segments > 0] for b in made])
        np.testing.assert_array_equal(real, np.concatenate([s.tokens.values for s in sources]))
        for batch in made:
            assert not batch.targets[batch.segments == 0].any()


# ---------------------------------------------------------------- mixtures


def test_the_mixture_keeps_its_proportions_everywhere() -> None:
    weights = [0.5, 0.3, 0.15, 0.05]
    mixture = Mixture([(str(w), w) for w in weights])
    drawn = np.array([mixture[i][0] for i in range(PERIOD + 1000)])
    for start, stop in ((0, 10), (0, 1000), (777, 1777), (PERIOD - 300, PERIOD + 300)):
        counts = np.bincount(drawn[start:stop], minlength=4)
        np.testing.assert_allclose(counts, np.array(weights) * (stop - start), atol=2)
    for n in (0, 1, 999, PERIOD, PERIOD + 500):
        np.testing.assert_array_equal(mixture.drawn(n), np.bincount(drawn[:n], minlength=4))


def test_each_source_gives_its_windows_in_order() -> None:
    mixture = Mixture([("a", 2.0), ("b", 1.0)])
    expected = Counter()
    for i in [*range(200), *range(PERIOD - 5, PERIOD + 5)]:
        if i == PERIOD - 5:
            expected = Counter(dict(enumerate(mixture.drawn(i).tolist())))
        source, number = mixture[i]
        assert number == expected[source]
        expected[source] += 1


def test_the_shares_of_tokens() -> None:
    a, b = documents(name="a"), documents(40, first=2000, seed=1, name="b")
    made = loader(a, b, weights=[0.7, 0.3], steps=250, epochs=None)
    tokens = np.concatenate([batch.tokens[batch.tokens > EOS] for batch in made])
    assert (tokens < 2000).mean() == pytest.approx(0.7, abs=0.01)
    passes = made.passes(250)
    assert passes == pytest.approx([0.7 * 16000 / a.total, 0.3 * 16000 / b.total], rel=1e-3)
    text = made.summary()
    assert f"a: 70.00% of the tokens, {passes[0]:.2f} epochs in this run; messages number its rows from 1" in text
    assert "number its rows from 21" in text


def test_rows_of_a_mixture_run_on() -> None:
    a, b = documents(name="a"), documents(40, first=2000, seed=1, name="b")
    for batch in loader(a, b, weights=[1, 1]):
        for row in range(4):
            rows = batch.rows[row][batch.rows[row] >= 0]
            second = (batch.tokens[row] >= 2000).any()
            assert (rows > 20).all() if second else (rows <= 20).all()


def test_without_weights_sources_count_by_their_tokens() -> None:
    a, b = documents(name="a"), documents(60, first=2000, seed=1, name="b")
    made = loader(a, b)
    np.testing.assert_allclose(
        made.mixture.counts / PERIOD, np.array([a.total, b.total]) / (a.total + b.total), atol=1e-4
    )
    assert made.passes(made.steps_per_epoch) == pytest.approx([1, 1], rel=0.05)


def test_the_sources_of_one_word(tmp_path: Path) -> None:
    assert parse_sources("a.jsonl") == [("a.jsonl", None)]
    with pytest.raises(InputError, match="several sources in one word, as quotes"):
        parse_sources("a.jsonl:0.5 b.jsonl:0.5")
    assert parse_sources("a.jsonl:0.7,b.txt:3e-1") == [("a.jsonl", 0.7), ("b.txt", 0.3)]
    assert parse_sources("a.jsonl, owner/name:train") == [("a.jsonl", None), ("owner/name:train", None)]
    assert parse_sources("owner/name:train:2,tfds:folder:1") == [("owner/name:train", 2.0), ("tfds:folder", 1.0)]
    odd = tmp_path / "a,b:0.5"
    odd.write_text("x")
    assert parse_sources(str(odd)) == [(str(odd), None)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "-0.0"])
def test_weights_must_be_positive(weight: str) -> None:
    with pytest.raises(InputError, match=rf"b\.jsonl:{weight}: the weight {weight} must be a positive number"):
        parse_sources(f"a.jsonl:1,b.jsonl:{weight}")
    with pytest.raises(InputError, match=r"of b must be a positive number"):
        shares([("a", 1.0), ("b", float(weight))])


def test_other_faults_of_weights() -> None:
    with pytest.raises(InputError, match=r"a\.jsonl has no weight and others have"):
        parse_sources("b.jsonl:1,a.jsonl")
    with pytest.raises(InputError, match="the weight has no effect, there is one source"):
        parse_sources("a.jsonl:0.5")
    with pytest.raises(InputError, match="less than 1/100000 of all"):
        shares([("a", 1e-7), ("b", 1.0)])
    assert shares([("a", 1e300), ("b", 1e300)]).tolist() == [PERIOD // 2] * 2
    assert shares([("a", 1), ("b", 1), ("c", 1)]).sum() == PERIOD
