"""What a GGUF file says of a `transformers` tokenizer: its tokens, merges or scores, and how it cuts a text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights.gguf.tokenizer import cuts

_NO_SCORE = -1e6
"""Of pieces that no merge makes: single characters, which nothing ranks."""


def add_vocabulary(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: LlamaConfig, ends: Sequence[int]
) -> None:
    """The entries `tokenizer.*` of the metadata: a fast tokenizer's, for a model of `config`.

    `ends`: at most two ids that end a response, the tokenizer's EOS first.

    Raises `InputError` where GGUF cannot say how the tokenizer works.
    """
    if not tokenizer.is_fast:
        raise InputError("the tokenizer has no fast form (tokenizer.json), which GGUF's is made from")
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[union-attr]
    model = backend["model"]
    if model.get("type") != "BPE":
        raise InputError(f"a tokenizer of kind {model.get('type')} is not written as GGUF; BPE is")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    by_pieces = bool(model.get("byte_fallback"))
    tokens, types = _tokens(tokenizer, model, config.vocab_size, by_pieces)
    writer.add_tokenizer_model("llama" if by_pieces else "gpt2")
    writer.add_tokenizer_pre("default" if by_pieces else _cut(backend["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if by_pieces:
        writer.add_token_scores(_scores(tokens, merges))
    elif merges:
        writer.add_token_merges([" ".join(pair) for pair in merges])
    sample = tokenizer("a")["input_ids"]
    assert isinstance(sample, list)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    writer.add_add_bos_token(bos is not None and sample[0] == bos)
    writer.add_add_eos_token(eos is not None and sample[-1] == eos)
    if by_pieces:
        writer.add_add_space_prefix(
            "Prepend" in json.dumps(backend["normalizer"]) or _prepends(backend["pre_tokenizer"])
        )
    special = (bos, tokenizer.unk_token_id, tokenizer.pad_token_id)
    for id, add in zip(
        special, (writer.add_bos_token_id, writer.add_unk_token_id, writer.add_pad_token_id), strict=True
    ):
        if isinstance(id, int):
            add(id)
    for add, id in zip((writer.add_eos_token_id, writer.add_eot_token_id), ends, strict=False):
        add(id)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is not None:
        writer.add_chat_template(template)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, model: Mapping[str, Any], size: int, by_pieces: bool
) -> tuple[list[str], list[int]]:
    """Every row of the embedding: rows that stand for no token get a name that no text spells."""
    added = tokenizer.added_tokens_decoder
    known = {id: token for token, id in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for id in range(size):
        if id not in known:
            tokens.append(f"[PAD{id}]")
            types.append(TokenType.UNUSED)
            continue
        tokens.append(known[id])
        if known[id] == model.get("unk_token") and by_pieces:
            types.append(TokenType.UNKNOWN)
        elif id in added:
            types.append(TokenType.CONTROL if added[id].special else TokenType.USER_DEFINED)
        elif by_pieces and len(known[id]) == 6 and known[id].startswith("<0x"):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return tokens, [int(kind) for kind in types]


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """SentencePiece joins the pair that makes the piece of the highest score: the earlier its merge, the higher."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return [float(-rank[token]) if token in rank else _NO_SCORE for token in tokens]


def _plain(step: Any) -> Any:
    """A pre-tokenizer's description without what changes no id."""
    if step is None:
        return []
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    return [{key: value for key, value in one.items() if key != "trim_offsets"} for one in steps]


def _cut(step: Any) -> str:
    for name, known in cuts().items():
        if _plain(json.loads(known.__getstate__())) == _plain(step):
            return name
    raise InputError(
        f"the tokenizer cuts a text in a way that has no name here to write into a GGUF file; known are "
        f"{', '.join(cuts())}"
    )


def _prepends(step: Any) -> bool:
    """Whether a Metaspace step puts a space in front of a text."""
    return any(one["type"] == "Metaspace" and one.get("prepend_scheme") in ("first", "always") for one in _plain(step))
