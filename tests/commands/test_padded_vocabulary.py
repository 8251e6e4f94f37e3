"""Embeddings with more rows than the tokenizer has ids, and with fewer."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer

import dpo_jax
from dpo_jax.complete.writing.writer import Writer
from dpo_jax.config import SampleConfig
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.judge.reward_model import RewardModel
from dpo_jax.model.groups import response_logps, response_predictions
from dpo_jax.sample import beam_search, generate, serve
from dpo_jax.types import PreferenceBatch
from dpo_jax.weights.huggingface.heads import padded_apart
from dpo_jax.weights.tokenizer import check_vocabulary, text_ids
from dpo_jax.weights.tokenizers.folder_tokenizer import read_tokenizer

SIZE, NEW = 24, 8
PROMPTS = [[5, 6, 7], [9, 3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model of 320 rows, of which the tests take the first `SIZE` for text."""
    return dpo_jax.load_pretrained(tiny.folder(tmp_path_factory.mktemp("padded") / "tiny", layers=1))


def test_ids_without_text_are_never_drawn(model: tuple[Any, Any]) -> None:
    key, config = jax.random.key(0), SampleConfig(NEW, top_k=30)
    assert np.asarray(generate(*model, PROMPTS, key, config=config, samples=4, vocabulary=SIZE).tokens).max() < SIZE
    requests = [(i, k) for i in range(2) for k in range(4)]
    served = serve(*model, PROMPTS, key, config=SampleConfig(NEW), requests=requests, rows=4, vocabulary=SIZE)
    assert all(max(done.tokens) < SIZE for some in served for done in some)
    found = beam_search(*model, PROMPTS, config=SampleConfig(NEW, beams=3), vocabulary=SIZE)
    assert np.asarray(found.tokens).max() < SIZE
    assert np.isfinite(np.asarray(found.logps)).all()


def test_what_is_drawn_and_what_ppo_learns_are_one_distribution(model: tuple[Any, Any]) -> None:
    """The ratio of the first update is 1, and its entropy is that of the ids that can be drawn."""
    config = SampleConfig(NEW, temperature=0.7)
    out = generate(*model, PROMPTS[:1], jax.random.key(1), config=config, vocabulary=SIZE)
    batch = PreferenceBatch(
        prompts=jnp.asarray(PROMPTS[:1]),
        prompt_lengths=jnp.asarray([3]),
        responses=out.tokens[:, None],
        response_lengths=jnp.asarray([[NEW]]),
        weights=jnp.ones(1),
        rows=jnp.zeros(1, jnp.int32),
    )
    told: dict[str, Any] = {"layout": "separate", "temperature": 0.7, "vocabulary": SIZE}
    found = response_predictions(model[0].apply, model[1], batch, **told)
    np.testing.assert_allclose(found.logps[:, 0], out.logps, atol=1e-5)
    np.testing.assert_allclose(response_logps(model[0].apply, model[1], batch, **told), found.logps, atol=1e-6)
    z = model[0].apply(model[1], found.states.whole(), method="logits")[..., :SIZE] / 0.7
    logps = jax.nn.log_softmax(z, axis=-1)
    np.testing.assert_allclose(found.entropy, -jnp.sum(jnp.exp(logps) * logps, axis=-1), rtol=1e-4)
    whole = response_logps(model[0].apply, model[1], batch, layout="separate", temperature=0.7)
    assert (np.asarray(whole[:, 0]) < np.asarray(out.logps) - 0.1).all(), "the others would have been drawn"


def test_a_padded_model_writes_only_text(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "wide", layers=1, vocab=512)
    model, variables = dpo_jax.load_pretrained(folder)
    tokenizer: Any = dpo_jax.load_tokenizer(folder)
    assert text_ids(tokenizer, model.config) == len(tokenizer) < 512
    encoder = ConversationEncoder(tokenizer, None)
    writer = Writer(lambda: (model, variables), tokenizer, encoder, SampleConfig(32), batch_size=2)
    written = writer.responses([[3, 4]], [(0, 0), (0, 1)], seed=0)
    assert max(max(response.ids) for some in written for _, response in some) < len(tokenizer)
    with pytest.raises(InputError, match=r"logit_bias names token id 400, .* 0\.\.337"):
        generate(
            model, variables, [[3]], jax.random.key(0), config=SampleConfig(4, logit_bias=((400, 1.0),)), vocabulary=338
        )


@pytest.fixture
def narrow(tmp_path: Path) -> Path:
    """A model whose tokenizer was published with a pad token, and a word, that the embedding has no rows for."""
    folder = tiny.folder(tmp_path / "narrow", layers=1)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<pad>"])
    backend.add_tokens(["<word>"])
    backend.save(str(folder / "tokenizer.json"))
    for name, entry in ("tokenizer_config.json", {"pad_token": "<pad>"}), ("config.json", {"pad_token_id": 320}):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entry))
    return folder


def test_ids_past_the_embedding_stop_a_model_only_where_they_are_used(
    narrow: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, variables = dpo_jax.load_pretrained(narrow)
    tokenizer: Any = dpo_jax.load_tokenizer(narrow)
    assert tokenizer.pad_token_id == 320
    with caplog.at_level(logging.WARNING, logger="dpo_jax"):
        check_vocabulary(tokenizer, model.config)
    assert "token '<pad>' (id 320) and 1 more: the embedding has 320 rows" in caplog.text
    dpo_jax.save_pretrained(tmp_path / "again", model, variables, tokenizer, source=narrow)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (narrow / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["pad_token_id"] is None
    ids = ConversationEncoder(tokenizer, None).prompt_ids("a <word>")
    assert max(ids) == 321
    with pytest.raises(InputError, match=r"token id 321, and the model's vocabulary is 0\.\.319"):
        generate(model, variables, [ids], jax.random.key(0), config=SampleConfig(2))


def test_another_pad_token_is_taken_where_it_has_no_row(narrow: Path) -> None:
    config = dpo_jax.load_pretrained(narrow)[0].config
    tokenizer: Any = read_tokenizer(narrow)
    changed, text = padded_apart(config, tokenizer)
    assert changed.pad_token_id == text.pad_token_id == 0


def test_a_reward_model_refuses_ids_that_it_has_no_row_for(model: tuple[Any, Any]) -> None:
    judge: Any = SimpleNamespace(model=model[0])
    with pytest.raises(InputError, match="id 320, and the reward model's embedding has 320 rows"):
        RewardModel.score_tokens(judge, [[5]], [[7, 320]])
