"""The tokenizer of a checkpoint."""

from pathlib import Path

import sentencepiece
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights.gguf_tokenizer import read_tokenizer
from dpo_jax.weights.merges import merges_by_score
from dpo_jax.weights.orbax_params import origin
from dpo_jax.weights.peft import base_of
from dpo_jax.weights.source import Source, resolve


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a checkpoint (`source` as for `load_pretrained`), as `transformers` loads it.

    Raises `InputError` when there is none, or it is not a fast one.
    """
    return tokenizer_of(resolve(source))


def tokenizer_of(place: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved checkpoint."""
    if place.kind == "gguf":
        return read_tokenizer(place.path)
    if place.kind == "checkpoint":
        return load_tokenizer(origin(place.path)[0])
    if not any((place.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        if place.kind == "peft":
            return load_tokenizer(base_of(place.path))
        raise InputError(
            f"{place.path}: no tokenizer.json or tokenizer.model; copy the tokenizer files of the model there"
        )
    try:
        # Without the argument transformers asks on the terminal, and runs what the folder's auto_map names on "y".
        tokenizer = AutoTokenizer.from_pretrained(str(place.path), trust_remote_code=False)
    except Exception as error:  # transformers and the Rust library beneath raise bare Exceptions for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{place.path}: its tokenizer is a program in the folder (auto_map), and none is run; save the"
                " tokenizer as a tokenizer.json of a class of transformers"
            ) from error
        raise InputError(f"{place.path}: its tokenizer files cannot be read ({reason}); fetch them again") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"{place.path}: its tokenizer has no fast form (tokenizer.json); save one with transformers")
    pieces = place.path / "tokenizer.model"
    if not (place.path / "tokenizer.json").is_file() and isinstance(tokenizer.backend_tokenizer.model, models.BPE):
        tokenizer.backend_tokenizer.model = _merged_by_score(pieces)
    return tokenizer


def _merged_by_score(path: Path) -> models.BPE:
    """SentencePiece's BPE merges in the order of their scores, as in the tokenizer.json that Llama 2 is published with.

    transformers 5 orders them by id when it finds a tokenizer.model alone, and then joins two spaces before a word
    where SentencePiece does not.
    """
    pieces = sentencepiece.SentencePieceProcessor(str(path))
    ids = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    others = (pieces.is_unknown, pieces.is_control, pieces.is_byte)
    scores = {piece: pieces.get_score(i) for piece, i in ids.items() if not any(other(i) for other in others)}
    return models.BPE(ids, merges_by_score(ids, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> None:
    """Raise `InputError` when the tokenizer can produce an id that the embedding has no row for."""
    ids = tokenizer.get_vocab()
    token = max(ids, key=lambda t: ids[t])
    if ids[token] >= config.vocab_size:
        raise InputError(
            f"the tokenizer has id {ids[token]} ({token!r}), and the model's embedding has {config.vocab_size} rows; "
            "use the model's own tokenizer, or resize the embedding with transformers' resize_token_embeddings"
        )
