"""`dpo-jax extend-vocab`: Chinese pieces for a Llama 2 tokenizer, and rows for them in the model.

Of the text, the tenth whose SHA-256 says so is kept from learning: the same tenth however the rows are ordered, and
whatever is added to them.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedTokenizerFast

from dpo_jax.config import ExtendVocabRun
from dpo_jax.data.sources.files import open_bytes, read_rows
from dpo_jax.errors import InputError, nearest
from dpo_jax.files.log import say
from dpo_jax.report import html, terminal
from dpo_jax.weights import resize, vocabulary
from dpo_jax.weights.integrity.folder import check_free
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pieces import NORMAL, SPACE, Pieces, check_extends, read_pieces
from dpo_jax.weights.pieces_tokenizer import base_pieces, fast_tokenizer, own_tokenizer

HELD_OUT = 10
"""One text in so many is kept from learning."""
MEASURED = 20_000
"""So many texts of each part are measured, the first ones."""
_BATCH = 256


@dataclass
class Figures:
    """What two vocabularies make of the same texts.

    Attributes:
      texts, characters: how many.
      before, after: tokens under the old and the new vocabulary, without BOS.
      returning: texts that come back from their new ids.
      agreeing: texts to which `transformers` gives the ids that SentencePiece gives.
      used: new ids that occur.
    """

    texts: int = 0
    characters: int = 0
    before: int = 0
    after: int = 0
    returning: int = 0
    agreeing: int = 0
    used: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Extension:
    """A longer vocabulary, tried out.

    Attributes:
      base, longer: the vocabularies.
      tokenizer: `longer` for `transformers`.
      parts: figures by part of the text; "pieces" are the texts of the pieces themselves.
      split_as_before: how many old pieces' own texts have the same ids as before, of how many.
      reached: how many new pieces' own texts become that one piece, of how many.
    """

    base: Pieces
    longer: Pieces
    tokenizer: PreTrainedTokenizerFast
    parts: dict[str, Figures]
    split_as_before: tuple[int, int]
    reached: tuple[int, int]


def extend_vocab(run: ExtendVocabRun) -> Extension:
    """Write `run.to`, print what changed, and return it. Raises `InputError`."""
    target = Path(run.to)
    check_free(target, replace=False)
    place = open_checkpoint(run.model)
    if place.tensors is None:
        raise InputError(f"{run.model}: is no Hugging Face folder; make one with dpo-jax convert --from {run.model}")
    own = own_tokenizer(place)
    base = base_pieces(place, own, run.base_tokenizer)
    resize.check_rows(place.architecture, base, place.path)
    texts = Texts(run.data)
    if run.tokenizer is not None:
        longer = read_pieces(run.tokenizer)
        parts = {"given text": texts} if run.data else {}
    else:
        parts = {"text learnt from": texts.part(held_out=False), "held-out tenth": texts.part(held_out=True)}
        longer = _learn(run, parts["text learnt from"], base)
    check_extends(longer, base)
    extension = _try_out(base, longer, fast_tokenizer(longer, place, own), parts)
    rows = resize.write_resized(place, target, base, longer, extension.tokenizer, multiple=run.pad_to_multiple_of)
    _show(extension, rows)
    say(f"{target}: {run.model} with {rows} rows")
    return extension


def _learn(run: ExtendVocabRun, texts: "Texts", base: Pieces) -> Pieces:
    assert run.pieces is not None
    if next(iter(texts), None) is None:
        raise InputError(f"--data {' '.join(run.data)}: no text is left to learn from when a tenth is kept; give more")
    chosen = {name: getattr(run.settled, name) for name in ("character_coverage", "max_sentence_length")}
    longer = vocabulary.extend(texts, base, pieces=run.pieces, **chosen)
    if (found := len(longer) - len(base)) < run.pieces:
        say(f"the text gives {found} new pieces, not {run.pieces}")
    return longer


# ---------------------------------------------------------------- text


class Texts:
    """The texts of some files, again each time they are iterated over. `part`: one side of the hash split."""

    def __init__(self, paths: tuple[str, ...], held_out: bool | None = None):
        self._paths = paths
        self._held_out = held_out

    def part(self, *, held_out: bool) -> "Texts":
        return Texts(self._paths, held_out)

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            for text in _lines(Path(path)) if path.lower().endswith((".txt", ".txt.gz")) else _column(path):
                if self._held_out is None or self._held_out == is_held_out(text):
                    yield text


def is_held_out(text: str) -> bool:
    """Whether the hash of a text puts it into the tenth that is only measured."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT == 0


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank."""
    if not path.is_file():
        raise InputError(f"{path}: no such file{nearest(path)}")
    try:
        with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as lines:
            yield from (line.rstrip("\n") for line in lines if not line.isspace())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


def _column(source: str) -> Iterator[str]:
    """The column `text` of a file of rows."""
    for number, row in read_rows(source):
        text = row.get("text")
        if not isinstance(text, str):
            found = f"its columns are {', '.join(map(str, row))}" if "text" not in row else f"it holds {text!r:.40}"
            raise InputError(f"{source}: row {number} has no text in the column `text` ({found})")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{source}: row {number} holds half a character (a lone surrogate); mend it") from error
        yield text


# ---------------------------------------------------------------- figures


def _try_out(base: Pieces, longer: Pieces, tokenizer: PreTrainedTokenizerFast, parts: dict[str, Texts]) -> Extension:
    """Measure `longer` on texts and on its own pieces."""
    names = [p.piece for p in longer.proto.pieces]
    old = [names[i] for i, p in enumerate(base.proto.pieces) if p.type == NORMAL]
    new = names[len(base) :]
    same = sum(a == b for a, b in zip(base.spell(old), longer.spell(old), strict=True))
    reached = sum(ids == [i] for i, ids in enumerate(longer.spell(new), len(base)))
    spelled = [name.replace(SPACE, " ") for name in (*old, *new)]
    figures = {"pieces": measure(spelled, base, longer, tokenizer)}
    for part, texts in parts.items():
        figures[part] = measure(itertools.islice(texts, MEASURED), base, longer, tokenizer)
    return Extension(base, longer, tokenizer, figures, (same, len(old)), (reached, len(new)))


def measure(texts: Iterable[str], base: Pieces, longer: Pieces, tokenizer: PreTrainedTokenizerFast) -> Figures:
    """Encode, decode and count."""
    figures, stream = Figures(), iter(texts)
    fast = tokenizer.backend_tokenizer
    names_are_text, fast.encode_special_tokens = fast.encode_special_tokens, True  # "</s>" is four characters here
    while batch := list(itertools.islice(stream, _BATCH)):
        before, after = base.processor.encode(batch), longer.processor.encode(batch)
        back = longer.processor.decode(after)
        others = fast.encode_batch_fast(batch, add_special_tokens=False)
        figures.texts += len(batch)
        figures.characters += sum(map(len, batch))
        figures.before += sum(map(len, before))
        figures.after += sum(map(len, after))
        figures.returning += sum(text == now for text, now in zip(batch, back, strict=True))
        figures.agreeing += sum(ids == other.ids for ids, other in zip(after, others, strict=True))
        figures.used.update(id for ids in after for id in ids if id >= len(base))
    fast.encode_special_tokens = names_are_text
    return figures


def _show(extension: Extension, rows: int) -> None:
    old, new = len(extension.base), len(extension.longer)
    parts = {name: f for name, f in extension.parts.items() if name != "pieces" and f.characters}
    if parts:
        cells = []
        for name, f in parts.items():
            rates = [f"{count / f.characters:.3f}" for count in (f.before, f.after)]
            cells.append((name, f"{f.texts:,}", f"{f.characters:,}", *rates, f"{f.after / f.before:.1%}"))
        head = ("", "texts", "characters", "before", "after", "share")
        terminal.show(terminal.table("tokens a character", html.Table(head, cells), left=1))
    table = Table(show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("pieces", f"{old:,} -> {new:,}")
    table.add_row("rows of the embedding", f"{old:,} -> {rows:,}")
    table.add_row("old ids unchanged", f"{old:,} of {old:,}")
    table.add_row("old pieces whose text keeps its ids", "{:,} of {:,}".format(*extension.split_as_before))
    table.add_row("new pieces that text can become", "{:,} of {:,}".format(*extension.reached))
    if parts:
        used = len(set().union(*(f.used for f in parts.values())))
        table.add_row("new pieces in use in this text", f"{used:,} of {new - old:,}")
    tried = extension.parts.values()
    texts, returning, agreeing = (sum(getattr(f, n) for f in tried) for n in ("texts", "returning", "agreeing"))
    table.add_row("texts, the pieces' own too, that come back from their ids", f"{returning:,} of {texts:,}")
    table.add_row("texts with the same ids in transformers", f"{agreeing:,} of {texts:,}")
    terminal.show(table)
    if agreeing < texts:
        terminal.show(
            f"{texts - agreeing:,} texts have other ids in transformers than in SentencePiece: where new pieces share "
            "a score, SentencePiece takes the leftmost, which no list of merges can say. Train and serve with one of "
            "the two."
        )
