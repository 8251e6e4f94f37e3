"""The tokenizer of a checkpoint, and how it fits the model's embedding."""

import logging
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights.opened import StoredModel, open_checkpoint

_log = logging.getLogger(__name__)


def load_tokenizer(source: str | Path | StoredModel) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a checkpoint (`source` as for `load_pretrained`), in the form of `transformers`.

    Raises `InputError` when there is none, or it is not a fast one.
    """
    return open_checkpoint(source).tokenizer()


def text_ids(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> int | None:
    """One more than the tokenizer's largest id, where the embedding is padded: it has rows behind that. Else None."""
    size = max(tokenizer.get_vocab().values()) + 1
    return size if size < config.vocab_size else None


def _beyond(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> dict[str, int]:
    """The tokens whose ids the embedding has no row for."""
    return {token: id for token, id in tokenizer.get_vocab().items() if id >= config.vocab_size}


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> None:
    """Name tokens that the embedding has no row for, such as a pad token that was published beside Llama 2.

    They stop nothing: a text that needs one is refused where it is encoded.
    """
    if beyond := _beyond(tokenizer, config):
        token = min(beyond, key=lambda t: beyond[t])
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        rows = config.vocab_size
        _log.warning("token %r (id %d)%s: the embedding has %d rows and none for it", token, beyond[token], more, rows)


def check_published(
    tokenizer: PreTrainedTokenizerBase, config: LlamaConfig, published: Callable[[], PreTrainedTokenizerBase] | None
) -> None:
    """Check a tokenizer before it is written beside a model.

    Raises `InputError` for tokens that the embedding has no row for, but for tokens that were added to the tokenizer
    `published` with the checkpoint that the model comes from.
    """
    if beyond := _beyond(tokenizer, config):
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        known = added & (set() if published is None else published().get_vocab().keys())
        if wrong := beyond.keys() - known:
            token = max(wrong, key=lambda t: beyond[t])
            raise InputError(
                f"the tokenizer has id {beyond[token]} ({token!r}), and the model's embedding has {config.vocab_size} "
                "rows; use the model's own tokenizer, or resize the embedding with transformers' "
                "resize_token_embeddings"
            )
