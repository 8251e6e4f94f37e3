"""Several sources with weights: which rows an epoch holds, that a run resumes, what is held out, what is refused."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from dpo_jax.config import DataConfig
from dpo_jax.data.sets.comparison_sets import join, split_by_prompt
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.loader import PreferenceLoader, TokenLoader
from dpo_jax.data.sets.row_mixture import RowMixture, read_mixture
from dpo_jax.data.sets.sequences import SequenceDataset, load_dialogues, split_sequences
from dpo_jax.errors import InputError
from dpo_jax.train.row_data import summaries

TOKENIZER = tiny.tokenizer()
DATA = DataConfig(max_length=64)


def pairs(path: Path, name: str, rows: int) -> str:
    lines = [
        json.dumps({"prompt": f"{name} {i}", "chosen": "good", "rejected": "bad " * (i % 5) + "bad"})
        for i in range(rows)
    ]
    (path / name).write_text("\n".join(lines) + "\n")
    return str(path / name)


def read(source: str) -> Any:
    return load_preferences(source, TOKENIZER, DATA, vocab_size=320)


def read_dialogues(source: str) -> Any:
    return load_dialogues(source, TOKENIZER, DATA, vocab_size=320)


def rows_of(loader: Any) -> list[int]:
    return [int(row) for batch in loader for row in np.ravel(batch.rows) if row >= 0]


# ---------------------------------------------------------------- the draws


def test_every_epoch_keeps_the_shares_and_every_source_goes_through_epochs_of_its_own() -> None:
    mixture = RowMixture(("a", "b"), (10, 30), (0.7, 0.3))
    seen: Counter[int] = Counter()
    for epoch in range(5):
        rows = mixture.epoch(epoch, seed=3, shuffle=True)
        assert rows is not None
        assert len(rows) == 40
        assert (rows < 10).sum() == pytest.approx(28, abs=1)
        assert (rows[:20] < 10).sum() == pytest.approx(14, abs=1), "any stretch of them does too"
        seen.update(rows.tolist())
    assert {row for row in seen if row >= 10} == set(range(10, 40)), "what is left of one epoch goes on in the next"
    assert max(seen[row] for row in range(10, 40)) - min(seen[row] for row in range(10, 40)) <= 1
    assert max(seen[row] for row in range(10)) - min(seen[row] for row in range(10)) <= 1
    np.testing.assert_array_equal(mixture.epoch(4, seed=3, shuffle=True), mixture.epoch(4, seed=3, shuffle=True))
    assert (mixture.epoch(1, seed=3, shuffle=True) != mixture.epoch(1, seed=4, shuffle=True)).any()
    in_order = mixture.epoch(0, seed=3, shuffle=False)
    assert in_order is not None
    np.testing.assert_array_equal(in_order[in_order >= 10], np.arange(10, 10 + (in_order >= 10).sum()))


def test_what_is_learnt_from_and_what_is_held_out_are_told_apart(tmp_path: Path) -> None:
    source = pairs(tmp_path, "a", 8)
    data, held = read_mixture(source, read, join, holdout=0.25, split=lambda rows: split_by_prompt(rows, 0.25, 0))
    assert [line.partition(" rows;")[0] for line in summaries(data, held)] == [
        f"training rows: {source}: 6 of 8",
        f"held-out rows: {source}: 2 of 8",
    ]
    assert [line.partition(":")[0] for line in summaries(data, None)] == ["training rows"]


def test_columns_that_one_file_of_several_lacks(tmp_path: Path) -> None:
    """They are named for all files; what to do where these differ is said where there are several."""
    named = tmp_path / "named"
    named.write_text(json.dumps({"ask": "Q?", "chosen": "good", "rejected": "bad"}) + "\n")

    def read_named(source: str) -> Any:
        return load_preferences(source, TOKENIZER, replace(DATA, columns="prompt=ask"), vocab_size=320)

    other = pairs(tmp_path, "b", 3)
    assert len(read_mixture(str(named), read_named, join)[0]) == 1
    told = r"/b: no row has a column 'ask' .*every file of --data: .*dpo-jax prepare --data FILE --data\.columns"
    with pytest.raises(InputError, match=told) as caught:
        read_mixture(f"{named},{other}", read_named, join)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError) as caught:
        read_mixture(other, read_named, join)
    assert "prepare" not in str(caught.value)


def test_without_weights_every_row_comes_once_an_epoch(tmp_path: Path) -> None:
    data, _ = read_mixture(f"{pairs(tmp_path, 'a', 5)},{pairs(tmp_path, 'b', 9)}", read, join)
    loader = PreferenceLoader(data, batch_size=4, seed=0, epochs=1)
    assert sorted(rows_of(loader)) == list(range(1, 15))
    assert "b: 9 rows, 64.29% of the rows drawn, 1.00 epochs of its own" in loader.summary()


# ---------------------------------------------------------------- loaders


@pytest.mark.parametrize("shuffle", [True, False])
def test_pairs_by_weight(tmp_path: Path, shuffle: bool) -> None:
    """The shares hold, a run goes on exactly, and other weights are another run."""
    a, b = pairs(tmp_path, "a", 8), pairs(tmp_path, "b", 24)
    data, held = read_mixture(f"{a}:0.75,{b}:0.25", read, join)
    assert held is None

    def loader(**changes: Any) -> PreferenceLoader:
        return PreferenceLoader(data, batch_size=4, seed=1, shuffle=shuffle, epochs=3, workers=0, **changes)

    whole = loader()
    assert whole.steps_per_epoch == 8
    rows = [np.asarray(batch.rows).tolist() for batch in whole]
    drawn = Counter("a" if row <= 8 else "b" for row in itertools.chain(*rows))
    assert drawn["a"] == pytest.approx(72, abs=1)
    begun = loader()
    first = [np.asarray(next(begun).rows).tolist() for _ in range(10)]
    resumed = loader()
    resumed.set_state(json.loads(json.dumps(begun.get_state())))
    assert first + [np.asarray(batch.rows).tolist() for batch in resumed] == rows
    other, _ = read_mixture(f"{a}:0.5,{b}:0.5", read, join)
    with pytest.raises(InputError, match="mixture"):
        PreferenceLoader(other, batch_size=4, seed=1, shuffle=shuffle, epochs=3).set_state(begun.get_state())
    needed = np.concatenate([rows for _, rows in whole.every_row().many])
    assert sorted(data.row_numbers[needed]) == sorted({row for batch in rows for row in batch})
    assert "a: 8 rows, 75.00% of the rows drawn, 9.00 epochs of its own" in whole.summary()


@pytest.mark.parametrize("window", [None, 64])
def test_dialogues_by_weight(tmp_path: Path, window: int | None) -> None:
    a, b = pairs(tmp_path, "a", 8), pairs(tmp_path, "b", 24)
    data, _ = read_mixture(f"{a}:3,{b}:1", read_dialogues, SequenceDataset.joined)
    loader = TokenLoader(data, batch_size=4, seed=1, window=window, epochs=2, workers=0)
    drawn = rows_of(loader)
    assert len(drawn) == 64
    assert sum(row <= 8 for row in drawn) == pytest.approx(48, abs=1)
    assert "75.00% of the rows drawn, 6.00 epochs of its own" in loader.summary()


@pytest.mark.parametrize("shuffle", [True, False])
def test_packed_windows_hold_what_each_epoch_draws(tmp_path: Path, shuffle: bool) -> None:
    """No row is left out for good, the shares hold, batches keep their shape, and a run goes on exactly."""
    data, _ = read_mixture(
        f"{pairs(tmp_path, 'a', 8)}:3,{pairs(tmp_path, 'b', 24)}:1", read_dialogues, SequenceDataset.joined
    )

    def loader(**changes: Any) -> TokenLoader:
        options: dict[str, Any] = {"batch_size": 3, "seed": 1, "window": 64, "epochs": 4, "workers": 0, **changes}
        return TokenLoader(data, shuffle=shuffle, **options)

    whole = loader()
    batches = list(whole)
    assert len(batches) == whole.total_steps
    drawn = Counter(row for batch in batches for row in batch.rows.ravel().tolist() if row >= 0)
    assert drawn.total() == 4 * 32
    b = Counter({row: count for row, count in drawn.items() if row > 8})
    assert set(b) == set(range(9, 33)), "32 rows are drawn of 24: none is left out"
    assert {batch.rows.shape for batch in batches} == {batches[0].rows.shape}
    assert "a: 8 rows, 75.00% of the rows drawn, 12.00 epochs of its own" in whole.summary()
    for at in range(whole.total_steps):
        begun = loader(start_step=at, workers=2)
        np.testing.assert_array_equal(next(begun).tokens, batches[at].tokens)
        begun.close()
    assert [batch.rows.tolist() for batch in loader(epochs=None, steps=5)] == [b.rows.tolist() for b in batches[:5]]


# ---------------------------------------------------------------- held out


def test_a_share_of_the_prompts_of_each_source_is_held_out(tmp_path: Path) -> None:
    words = f"{pairs(tmp_path, 'a', 10)}:0.5,{pairs(tmp_path, 'b', 20)}:0.5"
    data, held = read_mixture(words, read, join, holdout=0.2, split=lambda rows: split_by_prompt(rows, 0.2, 0))
    assert held is not None
    assert (len(data), len(held)) == (24, 6)
    assert data.mixture is not None
    assert data.mixture.sizes == (8, 16)
    dialogues, heldout = read_mixture(
        words, read_dialogues, SequenceDataset.joined, holdout=0.2, split=lambda rows: split_sequences(rows, 0.2, 0)
    )
    assert heldout is not None
    assert (len(dialogues), len(heldout)) == (24, 6)
    texts = [{TOKENIZER.decode(part.tokens[i]) for i in range(len(part))} for part in (dialogues, heldout)]
    assert not texts[0] & texts[1]


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{a}:0.7,{b}", "b has no weight and others have"),
        ("{a}:0,{b}:1", "the weight 0 must be a positive number"),
        ("{a}:-1,{b}:1", "the weight -1 must be a positive number"),
        ("{a}:nan,{b}:1", "the weight nan must be a positive number"),
        ("{a}:0.7", "the weight has no effect, there is one source"),
        ("{a}:1e-9,{b}:1", "less than 1/100000 of all"),
        ("{a}:,{b}:1", "has no weight and others have"),
        ("{a}:half,{b}:0.5", "has no weight and others have"),
    ],
)
def test_weights_refused(tmp_path: Path, words: str, message: str) -> None:
    words = words.format(a=pairs(tmp_path, "a", 3), b=pairs(tmp_path, "b", 3))
    with pytest.raises(InputError, match=message) as caught:
        read_mixture(words, lambda source: pytest.fail(f"{source} was read before the weights were looked at"), join)
    assert "\n" not in str(caught.value)


def test_weights_of_held_out_files_mean_nothing(tmp_path: Path) -> None:
    words = f"{pairs(tmp_path, 'a', 3)}:1,{pairs(tmp_path, 'b', 3)}:2"
    with pytest.raises(InputError, match=r"--eval_data .*: the weights have no effect, every row is used once"):
        read_mixture(words, read, join, option="--eval_data", weighted=False)


def test_a_colon_in_a_file_name(tmp_path: Path) -> None:
    odd, plain = pairs(tmp_path, "a:0.5", 3), pairs(tmp_path, "b", 3)
    assert len(read_mixture(odd, read, join)[0]) == 3
    data, _ = read_mixture(f"{odd}:2,{plain}:1", read, join)
    assert data.mixture is not None
    assert data.mixture.names == (odd, plain)
    assert data.mixture.weights == (2, 1)
