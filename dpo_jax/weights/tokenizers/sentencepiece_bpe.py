"""SentencePiece's BPE with byte fallback (Llama 2's, Mistral's), as the `tokenizers` library spells it."""

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, normalizers

SPACE = "▁"
"""What SentencePiece writes for a space."""


def merges_by_score(ids: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The pairs that join, first to last: by the score of the piece that they make, the highest first.

    Args:
      ids: piece -> id; among pairs of one score, those of lower ids come first.
      scores: piece -> score, of the pieces that text can become: no control, byte or unknown pieces.

    Where several pieces share a score, SentencePiece takes what stands furthest to the left in the text, which no fixed
    order can say. Llama 2's runs of spaces share one, and come out the same; other vocabularies may not.
    """
    merges = [
        (-score, ids[piece[:at]], ids[piece[at:]], (piece[:at], piece[at:]))
        for piece, score in scores.items()
        for at in range(1, len(piece))
        if piece[:at] in scores and piece[at:] in scores
    ]
    return [pair for *_, pair in sorted(merges)]


def bpe(ids: Mapping[str, int], scores: Mapping[str, float], unknown: str) -> models.BPE:
    """The model; `ids` and `scores` as for `merges_by_score`, `unknown`: the piece of what has neither piece nor bytes.

    transformers 5 orders merges by id when it finds a tokenizer.model alone, and then joins two spaces before a word
    where SentencePiece does not.
    """
    return models.BPE(dict(ids), merges_by_score(ids, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True)


def spaces_marked(prefix: bool) -> normalizers.Normalizer:
    """Spaces as SentencePiece writes them; `prefix`: one more is put in front of a text."""
    spaces = normalizers.Replace(" ", SPACE)
    return normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces


def whole(model: models.BPE, *, prefix: bool) -> Tokenizer:
    """The tokenizer around a model, as in the tokenizer.json that Llama 2 is published with; no BOS or EOS yet."""
    backend = Tokenizer(model)
    backend.normalizer = spaces_marked(prefix)
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return backend
