"""A SentencePiece model with more pieces as the fast tokenizer of `transformers`, in the manner of the model's own.

What surrounds the pieces stays as the model's folder has it: how spaces are written, BOS and EOS, added tokens, the
chat template. Where the folder has a tokenizer.model and no tokenizer.json, they are those of the tokenizer.json that
Llama 2 is published with, which gives SentencePiece's own ids for any text. The class that is saved is the general one:
`LlamaTokenizer` of transformers 5 would put rules of its own in place of the file's, and lose a leading space.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_jax.errors import InputError
from dpo_jax.headers import read_json
from dpo_jax.weights.gguf.tokenizer import surround
from dpo_jax.weights.opened import StoredModel
from dpo_jax.weights.pieces import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, read_pieces
from dpo_jax.weights.tokenizers import sentencepiece_bpe
from dpo_jax.weights.tokenizers.folder_tokenizer import has_tokenizer

_CARRIED = ("model_max_length", "padding_side", "truncation_side", "model_input_names")


def own_tokenizer(place: StoredModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model folder or GGUF file, None where it has none.

    Raises `InputError` for one that is not SentencePiece's BPE with byte fallback, such as SmolLM2's or Llama 3's.
    """
    if place.origin is not None and not has_tokenizer(place.path):
        return None
    tokenizer: Any = place.tokenizer()
    model = tokenizer.backend_tokenizer.model
    if not (isinstance(model, models.BPE) and model.byte_fallback):
        raise InputError(
            f"{place.path}: its tokenizer is not SentencePiece BPE with byte fallback, as Llama 2's and Mistral's are "
            "(SmolLM2 and Llama 3 have byte-level ones), and cannot be extended"
        )
    return tokenizer


def base_pieces(place: StoredModel, own: PreTrainedTokenizerBase | None, given: str | None) -> Pieces:
    """The SentencePiece model of a checkpoint: the file `given`, or the tokenizer.model in its folder.

    Raises `InputError` where there is none, or it is not the one that `own`, the checkpoint's tokenizer, came from.
    """
    file = place.path / "tokenizer.model"
    if given is None and (place.origin is None or not file.is_file()):
        raise InputError(
            f"{place.path}: has no tokenizer.model, the SentencePiece model to extend; give the one that belongs to it "
            "with --base_tokenizer FILE.model"
        )
    base = read_pieces(file if given is None else given)
    if own is None:
        return base
    ids = own.get_vocab()
    for i, piece in enumerate(base.proto.pieces):
        if ids.get(piece.piece) != i:
            raise InputError(
                f"{base.where}: piece {i} is {piece.piece!r}, and the tokenizer of {place.path} has {piece.piece!r} "
                f"{f'as {ids[piece.piece]}' if piece.piece in ids else 'nowhere'}; give the model's own tokenizer.model"
            )
    if len(ids) > len(base):
        id, token = min((i, token) for token, i in ids.items() if token not in base.ids)
        raise InputError(
            f"{place.path}: token {token!r}, id {id}, was added behind the {len(base)} pieces of {base.where}, where "
            "the new pieces go; begin with a model without added tokens"
        )
    return base


def fast_tokenizer(pieces: Pieces, place: StoredModel, own: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerFast:
    """`pieces` as a tokenizer of `transformers`, otherwise like `own`, the tokenizer of the checkpoint `place`."""
    like: Any = own
    if place.origin is None and like is not None:
        backend = _with_pieces(like.backend_tokenizer, pieces)
    elif (place.path / "tokenizer.json").is_file():
        assert like is not None  # the file was read
        backend = _with_pieces(Tokenizer.from_file(str(place.path / "tokenizer.json")), pieces)
        backend.post_processor = like.backend_tokenizer.post_processor  # tokenizer_config.json may overrule the file's
    else:
        settings = place.path / "tokenizer_config.json"
        backend = _published_form(pieces, read_json(settings) if settings.is_file() else {})
    for kind in (CONTROL, USER_DEFINED):
        found = [p.piece for p in pieces.proto.pieces if p.type == kind]
        backend.add_tokens([AddedToken(piece, special=kind == CONTROL, normalized=False) for piece in found])
    if like is None:
        names = {name: pieces.processor.id_to_piece(id) for name, id in pieces.special_ids.items() if id >= 0}
        special = {f"{name}_token": piece for name, piece in names.items()}
        carried: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}
    else:
        special = dict(like.special_tokens_map)
        carried = {name: getattr(like, name) for name in _CARRIED}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special, **carried
    )
    tokenizer.chat_template = None if like is None else like.chat_template
    return tokenizer


def _scores(pieces: Pieces) -> dict[str, float]:
    """Of the pieces that text can become."""
    return {p.piece: p.score for p in pieces.proto.pieces if p.type in (NORMAL, USER_DEFINED)}


def _with_pieces(backend: Tokenizer, pieces: Pieces) -> Tokenizer:
    """A copy of `backend` with the vocabulary and merges of `pieces`."""
    raw = json.loads(backend.to_str())
    merges = sentencepiece_bpe.merges_by_score(pieces.ids, _scores(pieces))
    raw["model"] |= {"vocab": pieces.ids, "merges": [list(pair) for pair in merges]}
    return Tokenizer.from_str(json.dumps(raw))


def _published_form(pieces: Pieces, settings: Mapping[str, Any]) -> Tokenizer:
    """As in Llama 2's tokenizer.json; a BOS is put before a text, unless `settings` say otherwise."""
    model = pieces.processor
    inner = sentencepiece_bpe.bpe(pieces.ids, _scores(pieces), model.id_to_piece(model.unk_id()))
    backend = sentencepiece_bpe.whole(inner, prefix=pieces.proto.normalizer_spec.add_dummy_prefix)
    unknown = [p.piece for p in pieces.proto.pieces if p.type == UNKNOWN]
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in unknown])
    bos, eos = (model.id_to_piece(id) if id >= 0 else None for id in (model.bos_id(), model.eos_id()))
    before = bos if settings.get("add_bos_token", True) else None
    behind = eos if settings.get("add_eos_token", False) else None
    if before or behind:
        surround(backend, before, behind)
    return backend
