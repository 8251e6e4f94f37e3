"""The tokenizer in a model folder.

Where a folder has a tokenizer.json, what that file says is the truth: the ids of a text are those that the `tokenizers`
library gives with it. `transformers` 5 builds pipelines of its own for some classes (`LlamaTokenizer`), which give
other ids from one minor version to the next, so no class but the general one is asked. From the other files come the
names of the special tokens, the chat template, and tokens that tokenizer.json lacks, behind its own. Whether BOS and
EOS are put around a text is the post-processor's word, too; a tokenizer_config.json that says otherwise is named.
"""

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_jax.errors import InputError, first_line
from dpo_jax.headers import read_json
from dpo_jax.weights.tokenizers import sentencepiece_bpe

_log = logging.getLogger(__name__)

# Special tokens that a class of `transformers` has where no file of the folder names them.
_OF_CLASS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}


_GAP = 100_000
"""How many ids a tokenizer may leave out beside as many as it has tokens."""
_TRIED = ("a", "é 🙂 你\n\t12")
"""Texts that a tokenizer must be able to encode: some of what is wrong in its file shows only then."""


@contextmanager
def _panics_unsaid() -> Iterator[None]:
    """Keep from the terminal what the Rust library writes to descriptor 2 when it panics; all else is passed on."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            said.seek(0)
            if b"panicked at" not in (text := said.read()):
                os.write(2, text)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder. Raises `InputError` when there is none, or it is not a fast one."""
    try:
        if (folder / "tokenizer.json").is_file():
            with _panics_unsaid():
                return _as_in_file(folder / "tokenizer.json")
        if not (folder / "tokenizer.model").is_file():
            what = "no tokenizer.json or tokenizer.model; copy the tokenizer files of the model there"
            raise InputError(f"{folder}: {what}")
        # Without the argument transformers asks on the terminal, and runs what the folder's auto_map names on "y".
        # Looked up here, since that attribute alone loads PyTorch where it is installed: two seconds for each command.
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except InputError:
        raise
    except BaseException as error:  # transformers and the Rust library beneath raise bare Exceptions, or panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{folder}: its tokenizer is a program in the folder (auto_map), and none is run; save the"
                " tokenizer as a tokenizer.json of a class of transformers"
            ) from error
        raise InputError(f"{folder}: its tokenizer files cannot be read ({reason}); fetch them again") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{folder}: its tokenizer has no fast form (tokenizer.json); save one with transformers")
    if isinstance(tokenizer.backend_tokenizer.model, models.BPE):
        _as_sentencepiece(tokenizer.backend_tokenizer, folder)
    return tokenizer


def _as_in_file(path: Path) -> PreTrainedTokenizerFast:
    """What a tokenizer.json says, with what stands beside it; see the module."""
    file = Tokenizer.from_file(str(path))
    file.no_padding()  # a false length here ends the process, and neither has a part in what a text's ids are
    file.no_truncation()
    ids = file.get_vocab(with_added_tokens=False).values()
    if len(set(ids)) != len(ids):
        raise InputError(f"{path}: two tokens have the same id; fetch the file again")
    if max(ids, default=0) > 2 * len(ids) + _GAP:  # the library goes through all ids up to the largest, in memory
        raise InputError(f"{path}: a token has the id {max(ids)}, far beyond all others; mend it")
    for text in _TRIED:
        file.encode(text)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(path.parent), trust_remote_code=False)
    settings = path.with_name("tokenizer_config.json")
    config = read_json(settings) if settings.is_file() else {}
    vocabulary = file.get_vocab()
    for name, token in _OF_CLASS.get(str(config.get("tokenizer_class")).removesuffix("Fast"), {}).items():
        if getattr(tokenizer, name) is None and name not in config and token in vocabulary:
            setattr(tokenizer, name, token)
    known = {token.content for token in file.get_added_tokens_decoder().values()}
    file.add_tokens([t for _, t in sorted(tokenizer.added_tokens_decoder.items()) if t.content not in known])
    # transformers has added them too, but also changed the file's own tokens, its post-processor where it has none, and
    # in some versions the way it splits a text.
    tokenizer._tokenizer = file
    _compare_ends(tokenizer, config, settings)
    return tokenizer


def _compare_ends(tokenizer: Any, config: dict[str, Any], where: Path) -> None:
    """Name a tokenizer_config.json that promises another BOS or EOS than the post-processor writes."""
    ids = tokenizer.backend_tokenizer.encode("a").ids
    for name, id, found in (("bos", tokenizer.bos_token_id, ids[:1]), ("eos", tokenizer.eos_token_id, ids[-1:])):
        said, added = config.get(f"add_{name}_token"), id is not None and found == [id]
        if id is not None and isinstance(said, bool) and said != added:
            does = "adds it" if added else "adds none"
            _log.warning("%s: add_%s_token is %s, but tokenizer.json %s, which counts", where, name, said, does)


def _as_sentencepiece(backend: Tokenizer, folder: Path) -> None:
    """Make what transformers 5 builds from a tokenizer.model alone give SentencePiece's ids.

    Where `legacy` is false, a text that begins with a space gets no other in front: so it was meant.
    """
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    others = (pieces.is_unknown, pieces.is_control, pieces.is_byte)
    scores = {piece: pieces.get_score(i) for piece, i in ids.items() if not any(other(i) for other in others)}
    backend.model = sentencepiece_bpe.bpe(ids, scores, "<unk>")
    settings = folder / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    if config.get("legacy") is not False:
        backend.normalizer = sentencepiece_bpe.spaces_marked(config.get("add_prefix_space") is not False)
        backend.pre_tokenizer = None
