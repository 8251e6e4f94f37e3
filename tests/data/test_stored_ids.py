"""Ids that are stored beside the rows: the same as those of rows that are tokenised now, cut alike, read lazily."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from dpo_jax.commands import prepare as command
from dpo_jax.config import DataConfig, PrepareRun
from dpo_jax.data.sets import stored_ids
from dpo_jax.data.sets.comparison_sets import join, split_by_prompt
from dpo_jax.data.sets.dataset import PreferenceDataset, load_preferences
from dpo_jax.data.sets.documents import load_documents
from dpo_jax.data.sets.loader import PreferenceLoader
from dpo_jax.data.sets.row_mixture import RowMixture
from dpo_jax.data.sets.text_windows import TextLoader
from dpo_jax.data.tokens.ragged import StoredRagged
from dpo_jax.errors import InputError


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    found: list[dict[str, Any]] = []
    for i in range(count):
        prompt: Any = tiny.sentence(rng, rng.randint(1, 60))
        if i % 3 == 0:
            prompt = [{"role": "system", "content": "be kind"}, {"role": "user", "content": prompt}]
        row = {"prompt": prompt, "chosen": tiny.sentence(rng, rng.randint(1, 40)), "rejected": f"no {i} " * (i % 9 + 1)}
        if i % 4 == 0:
            row |= {"margin": i / 7, "source": f"s{i % 5}"}
        if i % 5 == 0:
            row["rating"] = "much better" if i % 2 else 3
        found.append(row)
    found[7]["chosen"] = "says <|im_end|> itself"  # left out: a control token
    found[8] |= {"chosen": "same start " * 30 + "a", "rejected": "same start " * 30 + "b"}  # alike where they are cut
    return found


def store(tmp_path: Path, some: list[dict[str, Any]], **options: Any) -> str:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    if not (tmp_path / "model").exists():
        tiny.folder(tmp_path / "model")
    name = options.pop("name", "set")
    run = PrepareRun(
        data=DataConfig(files=str(tmp_path / "a.jsonl")),
        to=str(tmp_path / name),
        tokenizer=str(tmp_path / "model"),
        store_ids=True,
        **options,
    )
    command.prepare(run)
    return f"tfds:{tmp_path / name}:train"


def pairs(source: str, config: DataConfig, **options: Any) -> PreferenceDataset:
    return load_preferences(source, tiny.tokenizer(), config, vocab_size=400, on_bad_rows="skip", **options)


def alike(one: PreferenceDataset, other: PreferenceDataset) -> None:
    assert len(one) == len(other)
    for name in ("prompts", "responses"):
        left, right = getattr(one, name), getattr(other, name)
        assert left.lengths.tolist() == right.lengths.tolist()
        assert left.last[left.lengths > 0].tolist() == right.last[right.lengths > 0].tolist()
        for i in range(len(left)):
            assert left[i].dtype == right[i].dtype
            assert left[i].tolist() == right[i].tolist()
    assert one.row_numbers.tolist() == other.row_numbers.tolist()
    assert (one.extras, one.cuts, one.dropped, one.problems) == (
        other.extras,
        other.cuts,
        other.dropped,
        other.problems,
    )
    assert (one.rows_read, one.terminators, one.summary()) == (other.rows_read, other.terminators, other.summary())


@pytest.mark.parametrize(
    "config", [DataConfig(), DataConfig(max_length=60), DataConfig(max_length=64, max_prompt_length=20)], ids=repr
)
def test_pairs_are_those_of_rows_tokenised_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: DataConfig
) -> None:
    source = store(tmp_path, rows(60))
    found = pairs(source, config)
    assert isinstance(found.responses, StoredRagged)
    monkeypatch.setattr("dpo_jax.data.sets.dataset.open_ids", lambda *args, **options: None)
    own = pairs(source, config)
    assert not isinstance(own.responses, StoredRagged)
    alike(found, own)
    assert len(found) == (59 if config.max_length == 1024 else 58)
    alike(found.taken([3, 1, 4]), own.taken([3, 1, 4]))
    alike(join(found, found.taken([5, 2])), join(own, own.taken([5, 2])))
    for one, other in zip(split_by_prompt(found, 0.2, 1), split_by_prompt(own, 0.2, 1), strict=True):
        alike(one, other)
    options: Any = {"batch_size": 8, "seed": 3, "steps": 9}
    for batch, other in zip(PreferenceLoader(found, **options), PreferenceLoader(own, **options), strict=True):
        assert np.array_equal(batch.prompts, other.prompts)
        assert np.array_equal(batch.responses, other.responses)


def test_no_id_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = store(tmp_path, rows(60))

    def refused(self: StoredRagged, i: int) -> np.ndarray:
        raise AssertionError(i)

    monkeypatch.setattr(StoredRagged, "__getitem__", refused)
    found = pairs(source, DataConfig())
    loader = PreferenceLoader(join(found, found), batch_size=8, seed=0)
    assert loader.get_state()["data"] == join(found, found).fingerprint
    assert "59 of 60 rows" in found.summary()
    documents = load_documents(store_text(tmp_path, 50), tiny.tokenizer(), vocab_size=400)
    text = TextLoader([documents, documents], [0.7, 0.3], length=64, batch_size=4, seed=0)
    assert text.total_steps > 10


def store_text(tmp_path: Path, count: int, name: str = "text") -> str:
    rng = random.Random(count)
    documents = [{"text": f"{i} {tiny.sentence(rng, rng.randint(1, 90))}"} for i in range(count)]
    return store(tmp_path, documents, name=name)


def test_documents_are_those_of_rows_tokenised_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = store_text(tmp_path, 70)
    found = load_documents(source, tiny.tokenizer(), vocab_size=400)
    assert isinstance(found.tokens, StoredRagged)
    monkeypatch.setattr("dpo_jax.data.sets.documents.open_ids", lambda *args, **options: None)
    own = load_documents(source, tiny.tokenizer(), vocab_size=400)
    assert (len(found), found.total, found.summary()) == (len(own), own.total, own.summary())
    assert all(found.tokens[i].tolist() == own.tokens[i].tolist() for i in range(70))
    options: Any = {"length": 32, "batch_size": 4, "seed": 1, "epochs": 2}
    both = (TextLoader([data], [None], **options) for data in (found, own))
    for one, other in zip(*both, strict=True):
        assert np.array_equal(one.tokens, other.tokens)


def test_other_ids_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = store(tmp_path, rows(20))
    for config, why in (
        (DataConfig(template="chatml"), "another tokenizer, template or day"),
        (DataConfig(limit=15), "--data.limit"),
        (DataConfig(empty_system=True), "--data.empty_system"),
    ):
        caplog.clear()
        assert not isinstance(pairs(source, config).responses, StoredRagged)
        assert why in caplog.text
    assert not isinstance(pairs(source, DataConfig(), with_format_masks=True).responses, StoredRagged)
    assert not isinstance(pairs(f"{source}[:50%]", DataConfig()).responses, StoredRagged)
    with pytest.raises(InputError, match="the model's embedding has 100 rows"):
        load_preferences(source, tiny.tokenizer(), DataConfig(), vocab_size=100)
    (tmp_path / "set" / "1.0.0" / stored_ids.file_name("train", "prompt")).unlink()
    with pytest.raises(InputError, match=r"ids-train\.prompt is missing or cut short"):
        pairs(source, DataConfig())


def test_any_number_of_processes_stores_the_same_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pairs(store(tmp_path, rows(60), name="whole", splits="train=0.8,test=0.2"), DataConfig())
    monkeypatch.setattr("dpo_jax.data.sets.pieces.PIECE_BYTES", 4000)
    for processes in (1, 2):
        store(tmp_path, rows(60), name=str(processes), processes=processes, splits="train=0.8,test=0.2")
    for path in (tmp_path / "1" / "1.0.0").glob("ids*"):
        assert path.read_bytes() == (tmp_path / "2" / "1.0.0" / path.name).read_bytes(), path.name
    alike(replace(pairs(f"tfds:{tmp_path / '2'}:train", DataConfig()), source=whole.source), whole)


def made(count: int, rng: np.random.Generator) -> PreferenceDataset:
    """So many pairs, whose ids lie anywhere in a small file."""
    ids = np.arange(100_000, dtype=np.uint32)

    def some(n: int) -> StoredRagged:
        lengths, begins = rng.integers(5, 40, n), rng.integers(0, 90_000, n)
        return replace(StoredRagged.stored(ids, str(n), lengths, lengths), begins=begins)

    return PreferenceDataset(
        prompts=some(count),
        responses=some(2 * count),
        formats=None,
        extras={},
        row_numbers=np.arange(1, count + 1, dtype=np.int32),
        source=f"of {count}",
        rows_read=count,
        dropped=Counter(),
    )


def test_positions_are_exact_at_a_large_size() -> None:
    """A mixture of two sources of a million rows goes on at any step with the batch that would have come."""
    rng = np.random.default_rng(0)
    sizes = (700_000, 300_000)
    both = made(sizes[0], rng).joined(made(sizes[1], rng))
    both = replace(both, mixture=RowMixture(("a", "b"), sizes, (0.5, 0.5)))
    options: Any = {"batch_size": 64, "seed": 5, "epochs": 2}
    loader = PreferenceLoader(both, **options)
    at = 15_000
    loader.set_state({**loader.get_state(), "step": at})
    wanted, state = [next(loader) for _ in range(3)], loader.get_state()
    assert state["step"] == at + 3
    again = PreferenceLoader(both, **options)
    again.set_state({**state, "step": at})
    for batch in wanted:
        found = next(again)
        assert np.array_equal(found.rows, batch.rows)
        assert np.array_equal(found.responses, batch.responses)
