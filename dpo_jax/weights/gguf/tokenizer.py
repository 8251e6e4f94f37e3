"""The tokenizer inside a GGUF file: byte-level BPE or SentencePiece BPE, rebuilt as a `transformers` fast tokenizer."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_jax.errors import InputError
from dpo_jax.headers import Fields, told
from dpo_jax.weights.gguf.header import open_gguf
from dpo_jax.weights.tokenizers import sentencepiece_bpe

# Entries of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_MAX_TOKEN = 4096
"""Longest token, in characters."""

# How text is cut before merging, by `tokenizer.ggml.pre`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def cuts() -> dict[str, pre_tokenizers.PreTokenizer]:
    """How byte-level BPE cuts a text before merging, by the names that GGUF has for it."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), bytes_alone]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_QWEN2), "isolated"), bytes_alone]),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "gpt-2": pre_tokenizers.Sequence([plain]),
    }


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its special tokens, BOS rule and chat template.

    Raises `InputError` where there is none, or of a kind whose ids would not be certain to be right.
    """
    meta = _checked(path)
    tokens = meta["tokenizer.ggml.tokens"]
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, add_bos = _byte_level(path, meta)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(path, meta), True
    else:
        raise InputError(
            f"{path}: tokenizer {told(kind)} is not supported; supported are gpt2 (byte-level BPE) and llama"
        )
    backend.add_special_tokens(_added(meta, _CONTROL, special=True))
    backend.add_tokens(_added(meta, _USER_DEFINED, special=False))

    def token(name: str) -> str | None:
        index = meta.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    bos, eos = token("bos"), token("eos")
    add_bos = meta.get("tokenizer.ggml.add_bos_token", add_bos) and bos is not None
    add_eos = meta.get("tokenizer.ggml.add_eos_token", False) and eos is not None
    if add_bos or add_eos:
        surround(backend, bos if add_bos else None, eos if add_eos else None)
    special = {"bos_token": bos, "eos_token": eos, "unk_token": token("unknown"), "pad_token": token("padding")}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=meta.get(f"{meta.get('general.architecture')}.context_length") or 10**30,
        **{name: value for name, value in special.items() if value is not None},
    )
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    return tokenizer


def _checked(path: Path) -> dict[str, Any]:
    """The metadata, in which every entry that is read here is of its type, and every id is a token's."""
    meta = open_gguf(path).metadata
    fields = Fields(meta, f"{path}: metadata")
    tokens = fields.items("tokenizer.ggml.tokens", str, "texts")
    if not tokens:
        raise InputError(f"{path}: has no tokenizer (tokenizer.ggml.tokens); use a model folder with one")
    if len(set(tokens)) != len(tokens):
        raise InputError(f"{path}: a token is listed twice in tokenizer.ggml.tokens")
    if long := next((token for token in tokens if len(token) > _MAX_TOKEN), None):
        raise InputError(f"{path}: tokenizer.ggml.tokens holds {told(long)}, which is too long for a token")
    fields.items("tokenizer.ggml.merges", str, "texts")
    fields.items("tokenizer.ggml.token_type", int, "whole numbers")
    scores = fields.items("tokenizer.ggml.scores", (int, float), "numbers")
    if any(math.isnan(score) for score in scores):
        raise InputError(f"{path}: tokenizer.ggml.scores holds something that is no number")
    for name in ("bos", "eos", "unknown", "padding"):
        index = fields.maybe_whole(f"tokenizer.ggml.{name}_token_id", low=0)
        if index is not None and index >= len(tokens):
            raise InputError(f"{path}: tokenizer.ggml.{name}_token_id {index} is not a token")
    for name in ("model", "pre"):
        fields.text(f"tokenizer.ggml.{name}")
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        fields.flag(f"tokenizer.ggml.{name}", False)
    fields.text("tokenizer.chat_template")
    fields.maybe_whole(f"{fields.text('general.architecture')}.context_length", low=0)
    return meta


def _added(meta: Mapping[str, Any], kind: int, *, special: bool) -> list[AddedToken]:
    types = meta.get("tokenizer.ggml.token_type") or []
    return [
        AddedToken(token, special=special, normalized=False)
        for token, its in zip(meta["tokenizer.ggml.tokens"], types, strict=False)
        if its == kind
    ]


def surround(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Put BOS before and EOS after a text that is encoded with special tokens."""
    text = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pair = [*text, *[f"{piece}:1" for piece in (*([bos] if bos else []), "$B", *([eos] if eos else []))]]
    ids = [(t, backend.token_to_id(t)) for t in dict.fromkeys([bos, eos]) if t]
    template = processors.TemplateProcessing(single=text, pair=pair, special_tokens=ids)
    behind = backend.post_processor
    backend.post_processor = template if behind is None else processors.Sequence([behind, template])


def _byte_level(path: Path, meta: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    """GPT-2's byte-level BPE (Radford et al. 2019), cut as `tokenizer.ggml.pre` names it; and its BOS default."""
    cut = meta.get("tokenizer.ggml.pre", "default")
    merges = meta.get("tokenizer.ggml.merges")
    if not merges:
        raise InputError(f"{path}: tokenizer.ggml.merges is missing; convert the model again")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{path}: tokenizer.ggml.merges holds an entry that is not two tokens")
    steps = cuts().get("llama-bpe" if cut in _LLAMA3_NAMES else cut)
    if steps is None:
        known = ", ".join(("gpt-2", "smollm", "qwen2", *_LLAMA3_NAMES))
        raise InputError(
            f"{path}: pre-tokenizer {told(cut)} is not supported (supported: {known}); "
            "use the model's Hugging Face folder"
        )
    vocabulary = _vocabulary(meta)
    if stray := next((pair for pair in pairs if not {*pair, "".join(pair)} <= vocabulary.keys()), None):
        raise InputError(f"{path}: tokenizer.ggml.merges joins {told(' '.join(stray))}, which are no tokens")
    # Llama 3's vocabulary was made so that a whole piece that is a token stays one, whatever the merges say.
    model = models.BPE(vocabulary, pairs, ignore_merges=cut in _LLAMA3_NAMES)
    backend = Tokenizer(model)
    backend.pre_tokenizer = steps
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()  # as in Qwen's own tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend, cut in _LLAMA3_NAMES


def _vocabulary(meta: Mapping[str, Any]) -> dict[str, int]:
    return {token: index for index, token in enumerate(meta["tokenizer.ggml.tokens"])}


def _sentencepiece(path: Path, meta: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE with byte fallback (Llama 2, Mistral): a merge ranks by the score of the token it makes."""
    if meta.get("tokenizer.ggml.precompiled_charsmap") or meta.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise InputError(f"{path}: a SentencePiece tokenizer that normalises its text is not supported")
    scores, types = meta.get("tokenizer.ggml.scores"), meta.get("tokenizer.ggml.token_type")
    vocabulary = _vocabulary(meta)
    if not scores or not types or not len(scores) == len(types) == len(vocabulary):
        raise InputError(f"{path}: tokenizer.ggml.scores or token_type is missing or of another length than the tokens")
    if sum(its == _BYTE for its in types) != 256:
        raise InputError(f"{path}: a SentencePiece tokenizer without 256 byte tokens is not supported")
    unknown = meta.get("tokenizer.ggml.unknown_token_id", 0)
    other = (_UNKNOWN, _CONTROL, _BYTE)
    mergeable = {t: s for t, s, its in zip(vocabulary, scores, types, strict=True) if its not in other}
    model = sentencepiece_bpe.bpe(vocabulary, mergeable, meta["tokenizer.ggml.tokens"][unknown])
    return sentencepiece_bpe.whole(model, prefix=meta.get("tokenizer.ggml.add_space_prefix", True))
