"""The order in which SentencePiece's BPE merges, as the list of merges that the `tokenizers` library wants."""

from collections.abc import Mapping


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
