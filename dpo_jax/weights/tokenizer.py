"""The tokenizer of a checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights.source import Source, resolve


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a checkpoint (`source` as for `load_pretrained`), as `transformers` loads it.

    Raises `InputError` when there is none, or it is not a fast one.
    """
    return tokenizer_of(resolve(source))


def tokenizer_of(place: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved checkpoint."""
    if place.kind == "gguf":
        from dpo_jax.weights.gguf_tokenizer import read_tokenizer

        return read_tokenizer(place.path)
    if not any((place.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        if place.kind == "peft":
            from dpo_jax.weights.peft import base_of

            return load_tokenizer(base_of(place.path))
        raise InputError(
            f"{place.path}: no tokenizer.json or tokenizer.model; copy the tokenizer files of the model there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place.path))
    except Exception as error:  # transformers and the Rust library beneath raise bare Exceptions for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{place.path}: its tokenizer files cannot be read ({reason}); fetch them again") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not tokenizer.is_fast:
        raise InputError(f"{place.path}: its tokenizer has no fast form (tokenizer.json); save one with transformers")
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> None:
    """Raise `InputError` when the tokenizer can produce an id that the embedding has no row for."""
    ids = tokenizer.get_vocab()
    token = max(ids, key=lambda t: ids[t])
    if ids[token] >= config.vocab_size:
        raise InputError(
            f"the tokenizer has id {ids[token]} ({token!r}), and the model's embedding has {config.vocab_size} rows; "
            "use the model's own tokenizer, or resize the embedding with transformers' resize_token_embeddings"
        )
