"""A larger vocabulary for a Llama 2 tokenizer: Chinese pieces, learnt from text and put behind the old ones.

What may become a piece. Only runs of Chinese characters and Chinese punctuation (`CHINESE`), at least one character
long, at most 16, of one script: never a space, a letter, a digit, or what English text is made of. So text without
such characters keeps its ids, whatever was learnt: no merge of it can lead to a new piece.

Why BPE. The old model merges two neighbours as long as that gives a piece, best score first, so a piece can only come
into being through two shorter ones. Every piece of a trained BPE is made of two others of it, down to single
characters; the pieces of a trained unigram model are not. On classical Chinese, 10,000 new pieces of a unigram model
leave 325 that no merge reaches, and more tokens; of the 23,296 pieces that a published Chinese extension of Llama 2
adds, 657 cannot be reached.

Which scores. SentencePiece's BPE merges in the order of scores. New pieces go on where the old scores end, in the order
in which training found them: each distinct, so the order is the one of training, and each below the old, so an old
merge comes first.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from sentencepiece import SentencePieceTrainer

from dpo_jax.errors import InputError
from dpo_jax.weights.pieces import NORMAL, SPACE, ModelProto, Pieces

LONGEST_PIECE = 16
"""Longest new piece in characters: Llama 2's own limit."""

# Radicals, CJK punctuation, Bopomofo, strokes, ideographs with their extensions, vertical, small and full-width
# punctuation. Not U+3000, which is a space; not full-width letters and digits; not kana.
_RANGES = (
    "⺀-⿟、-〿ㄅ-ㄯㆠ-㇯㐀-䶿一-鿿豈-﫿︐-︙︰-﹯！-／：-＠［-｀｛-･￠-￦"
    "\U00020000-\U000323af"
)  # fmt: skip
CHINESE = re.compile(f"[{_RANGES}]+")
"""A run of characters that new pieces may be made of."""


def extend(
    texts: Iterable[str],
    base: Pieces,
    *,
    pieces: int,
    character_coverage: float,
    max_sentence_length: int,
) -> Pieces:
    """`base` with at most `pieces` Chinese pieces more, learnt from `texts`. The same texts give the same pieces.

    New ids begin with the single characters, the most frequent first, and go on with the merges in the order in which
    they were found; so the two parts of a piece have smaller ids than the piece. There are fewer than `pieces` where
    the texts do not hold so many.

    Args:
      texts: gone through twice.
      base: the old vocabulary.
      pieces: how many new pieces.
      character_coverage: the most frequent characters that make up this share of the Chinese text get a piece each;
        others stay bytes.
      max_sentence_length: a run of Chinese characters is cut after so many.

    Raises `InputError` where the texts hold no Chinese, or `pieces` does not suffice for their characters.
    """
    counts: Counter[str] = Counter()
    for run in _runs(texts, CHINESE, max_sentence_length):
        counts.update(run)
    if not counts:
        raise InputError("the texts hold no Chinese characters; give Chinese text with --data")
    alphabet = _most_frequent(counts, character_coverage)
    characters = [c for c in alphabet if c not in base.ids]
    if len(characters) > pieces:
        raise InputError(
            f"--pieces {pieces} is too few: the texts hold {len(characters)} characters that the tokenizer does not "
            "know; raise it, or lower --character_coverage"
        )
    merged = _train(texts, alphabet, base, pieces - len(characters), max_sentence_length)
    return _append(base, [*characters, *merged])


def _runs(texts: Iterable[str], pattern: re.Pattern[str], longest: int) -> Iterator[str]:
    for text in texts:
        for run in pattern.findall(text):
            for start in range(0, len(run), longest):
                yield run[start : start + longest]


def _most_frequent(counts: Counter[str], coverage: float) -> list[str]:
    """The fewest characters that make up the share `coverage` of all, the most frequent first."""
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    seen = np.cumsum([counts[c] for c in ranked])
    return ranked[: int(np.searchsorted(seen, coverage * seen[-1])) + 1]


def _train(texts: Iterable[str], alphabet: list[str], base: Pieces, wanted: int, max_sentence_length: int) -> list[str]:
    """At most `wanted` pieces of several characters that `base` does not have, in the order of their merges."""
    if not wanted:
        return []
    known = set(alphabet)
    old = sum(len(piece) > 1 and known.issuperset(piece) for piece in base.ids)
    model = io.BytesIO()
    pattern = re.compile(f"[{re.escape(''.join(alphabet))}]+")
    SentencePieceTrainer.train(
        sentence_iterator=_runs(texts, pattern, max_sentence_length),
        model_writer=model,
        model_type="bpe",
        vocab_size=1 + len(alphabet) + old + wanted,  # 1: <unk>
        bos_id=-1,
        eos_id=-1,
        character_coverage=1.0,  # `pattern` has chosen already
        max_sentencepiece_length=LONGEST_PIECE,
        max_sentence_length=4 * max_sentence_length + 1,  # in bytes; longer ones would be dropped
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    proto = ModelProto()
    proto.ParseFromString(model.getvalue())
    found = [p.piece for p in proto.pieces if p.type == NORMAL and len(p.piece) > 1 and p.piece not in base.ids]
    return found[:wanted]


def _append(base: Pieces, new: list[str]) -> Pieces:
    """`base` with `new` behind it, scored from the lowest score of an old piece downwards."""
    proto = ModelProto()
    proto.CopyFrom(base.proto)
    # Runs of spaces have a score of their own, far below all others.
    lowest = np.floor(min(p.score for p in proto.pieces if p.piece.strip(SPACE)))
    scores = (lowest - np.arange(1, len(new) + 1)).astype(np.float32)
    if not np.all(np.diff(scores, prepend=np.float32(lowest)) < 0):
        raise InputError(f"{base.where}: its lowest score, {lowest:g}, leaves no room for distinct scores below it")
    for piece, score in zip(new, scores, strict=True):
        proto.pieces.add(piece=piece, score=float(score), type=NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return Pieces(proto, f"{base.where} with {len(new)} new pieces")
