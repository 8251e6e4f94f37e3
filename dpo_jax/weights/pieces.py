"""SentencePiece models piece by piece: read from a `tokenizer.model`, and one compared with a longer one."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from dpo_jax.errors import InputError, first_line, nearest
from dpo_jax.weights.tokenizers.sentencepiece_bpe import SPACE

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # pyright: ignore[reportAttributeAccessIssue]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The types of a piece."""

_BPE = 2


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece BPE model with byte fallback that leaves its text as it is: Llama 2's, Mistral's.

    Attributes:
      proto: the `ModelProto`; piece i has id i.
      where: names it in errors.
    """

    proto: Any
    where: str

    def __len__(self) -> int:
        return len(self.proto.pieces)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece -> id."""
        return {piece.piece: i for i, piece in enumerate(self.proto.pieces)}

    @cached_property
    def processor(self) -> SentencePieceProcessor:
        """SentencePiece itself: texts to ids and back."""
        return _processor(self.proto)

    @cached_property
    def _without_prefix(self) -> SentencePieceProcessor:
        bare = ModelProto()
        bare.CopyFrom(self.proto)
        bare.normalizer_spec.add_dummy_prefix = False
        return _processor(bare)

    def spell(self, pieces: list[str]) -> list[list[int]]:
        """The ids of each text that `pieces` stand for, without the space that is put before a text.

        A character that has no piece is spelled by the bytes of its UTF-8 form.
        """
        return self._without_prefix.encode([piece.replace(SPACE, " ") for piece in pieces])

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of unk, bos, eos and pad; -1 where there is none."""
        model = self.processor
        return {"unk": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}


def _processor(proto: Any) -> SentencePieceProcessor:
    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(proto.SerializeToString())
    return model


def read_pieces(path: str | Path) -> Pieces:
    """Read a `tokenizer.model`. Raises `InputError` for another file, or a model of another kind."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file{nearest(path)}; give a SentencePiece model (tokenizer.model)")
    try:
        checked = SentencePieceProcessor(str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{path}: not a SentencePiece model, or damaged ({first_line(error)}); fetch it again"
        ) from error
    proto = ModelProto()
    proto.ParseFromString(checked.serialized_model_proto())
    _check_kind(proto, path)
    return Pieces(proto, str(path))


def _check_kind(proto: Any, path: Path) -> None:
    def refuse(what: str) -> None:
        raise InputError(f"{path}: {what}; only BPE with byte fallback, as Llama 2's and Mistral's, is supported")

    if proto.trainer_spec.model_type != _BPE:
        refuse("a SentencePiece model that is not BPE")
    types = [piece.type for piece in proto.pieces]
    if types.count(BYTE) != 256:
        refuse("a SentencePiece model without 256 byte pieces")
    if UNUSED in types:
        refuse(f"piece {types.index(UNUSED)} is marked as unused")
    rules = proto.normalizer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or not rules.escape_whitespaces:
        refuse("a SentencePiece model that changes its text before it splits it")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        refuse("a SentencePiece model that puts spaces at the end of words")


def check_extends(longer: Pieces, base: Pieces) -> None:
    """Raise `InputError` unless `longer` is `base` with more pieces behind: old ids, scores and rules are the same."""
    if len(longer) <= len(base):
        raise InputError(
            f"{longer.where}: has {len(longer)} pieces, and {base.where} has {len(base)}; there is nothing to add"
        )
    for i, (old, new) in enumerate(zip(base.proto.pieces, longer.proto.pieces, strict=False)):
        if (old.piece, old.type) != (new.piece, new.type):
            raise InputError(
                f"{longer.where}: id {i} is {new.piece!r} and was {old.piece!r} in {base.where}: old ids would move; "
                "give a tokenizer that was made by adding pieces behind those of the model's own"
            )
        if old.score != new.score:
            raise InputError(
                f"{longer.where}: piece {i} ({old.piece!r}) has score {new.score:g} and had {old.score:g}: old text "
                "would be split otherwise; give a tokenizer whose old pieces are untouched"
            )
    before, after = base.special_ids, longer.special_ids
    for name, id in before.items():
        if after[name] != id and not (name == "pad" and id < 0 and after[name] >= len(base)):
            raise InputError(
                f"{longer.where}: its {name} id is {after[name]}, and that of {base.where} is {id}; special ids must "
                "not change"
            )
    if longer.proto.normalizer_spec.add_dummy_prefix != base.proto.normalizer_spec.add_dummy_prefix:
        raise InputError(f"{longer.where}: treats the beginning of a text otherwise than {base.where} (dummy prefix)")
