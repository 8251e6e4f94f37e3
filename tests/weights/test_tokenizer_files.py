"""Tokenizers as the world publishes them: a tokenizer.json's own ids, read and exported unchanged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizer_kinds as kinds
import tokenizers_for_tests
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer
from dpo_jax.weights.tokenizers.folder_tokenizer import read_tokenizer
from dpo_jax.weights.tokenizers.tokenizer_files import save_tokenizer

TEXTS = kinds.corpus(300)


def load(folder: Path) -> Any:
    return read_tokenizer(folder)


@pytest.fixture(scope="module", params=[*kinds.PIECES, *kinds.BYTE_LEVEL])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = None
    if request.param in kinds.PIECES:
        model = request.getfixturevalue("shared_data") / "tokenizers" / "llama2.tokenizer.model"
    return kinds.write(tmp_path_factory.mktemp("kinds") / request.param, request.param, model)


def test_ids_are_those_of_the_file_before_and_after_export(published: Path, tmp_path: Path) -> None:
    tokenizer, expected = load(published), kinds.ids_of_file(published, TEXTS)
    assert tokenizer(TEXTS)["input_ids"] == expected
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for again in (load(tmp_path), theirs):
        assert again(TEXTS)["input_ids"] == expected
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.chat_template == tokenizer.chat_template
    added = len(tokenizer) - Tokenizer.from_file(str(published / "tokenizer.json")).get_vocab_size()
    assert added == (1 if published.name == "smollm2" else 0), "<|pad|> stands in tokenizer_config.json alone"
    # What version 4 reads; it fails on `extra_special_tokens` as a list and on version 5's names (`exported_ids.py`).
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & saved.keys()
    assert saved.get("additional_special_tokens", []) == tokenizer.extra_special_tokens
    assert saved.get("chat_template") == tokenizer.chat_template
    if not added:
        assert (tmp_path / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()


def test_an_added_token_is_all_that_changes(published: Path, tmp_path: Path) -> None:
    tokenizer = load(published)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    save_tokenizer(tokenizer, tmp_path)
    parts = "normalizer", "pre_tokenizer", "post_processor", "decoder"
    before, after = (json.loads((p / "tokenizer.json").read_text()) for p in (published, tmp_path))
    assert [after[part] for part in parts] == [before[part] for part in parts]
    assert after["model"]["vocab"] == before["model"]["vocab"]
    assert after["added_tokens"][: len(before["added_tokens"])] == before["added_tokens"]
    assert (after["added_tokens"][-1]["content"], after["added_tokens"][-1]["id"]) == ("<|new|>", size)
    again = load(tmp_path)
    assert again(TEXTS)["input_ids"] == kinds.ids_of_file(published, TEXTS)
    assert again("a<|new|>")["input_ids"][-1] == size


def test_one_bos_at_the_start_as_the_post_processor_says(published: Path) -> None:
    tokenizer = load(published)
    expected = [tokenizer.bos_token_id] if published.name in (*kinds.PIECES, "llama3") else []
    for text in ("a film", tokenizer.bos_token or "", f"{tokenizer.bos_token or ''}a film"):
        ids = ChatTokenizer(tokenizer, "raw").prompt_ids(text)
        assert ids[: len(expected)] == expected
        assert ids[1:].count(tokenizer.bos_token_id) == 0


def test_a_config_that_promises_another_bos_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = kinds.write(tmp_path, "llama3", None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    with caplog.at_level(logging.WARNING, logger="dpo_jax"):
        assert load(folder)("a")["input_ids"] == kinds.ids_of_file(folder, ["a"])[0]
    assert "add_bos_token is False, but tokenizer.json adds it" in caplog.text


def test_flags_and_classes_beside_the_file_change_no_id(tmp_path: Path) -> None:
    """A tokenizer_config.json that describes the file's own tokens otherwise, and names no special token."""
    folder = kinds.write(tmp_path, "smollm2", None)
    flags = {"lstrip": True, "rstrip": True, "normalized": True, "special": False, "single_word": False}
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    listed = {str(i): {"content": t.content, **flags} for i, t in backend.get_added_tokens_decoder().items()}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2TokenizerFast", "added_tokens_decoder": listed})
    )
    tokenizer = load(folder)
    assert tokenizer(TEXTS)["input_ids"] == kinds.ids_of_file(folder, TEXTS)
    assert tokenizer.eos_token == "<|endoftext|>", "the class names it"
    assert all(isinstance(t, AddedToken) and t.special for t in tokenizer.added_tokens_decoder.values())


def test_a_sentencepiece_file_alone_gives_its_own_ids(shared_data: Path, tmp_path: Path) -> None:
    tokenizer: Any = tokenizers_for_tests.llama2(shared_data, tmp_path, legacy=True)
    pieces = SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    tokenizer.backend_tokenizer.encode_special_tokens = True
    plain = [text for text in TEXTS if not any(token in text for token in kinds._CONTROL)]
    found = tokenizer(plain, add_special_tokens=False)["input_ids"]
    different = [t for t, ids in zip(plain, found, strict=True) if ids != pieces.encode(t)]
    assert not different, different[:5]
