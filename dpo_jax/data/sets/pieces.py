"""A source cut into pieces, each of which can be read alone, in any order and by any process.

A piece is a part of a file of JSON lines, one or several whole files, or some rows of a store. How a source is cut
depends on its files alone. Rows that are read as one (see `readable.together`) stand in one piece.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.documents import documents_in, is_text, text_files
from dpo_jax.data.sources.files import plain_lines, read_file, resolve
from dpo_jax.data.sources.json_lines import Part, json_lines, parts_of
from dpo_jax.data.sources.store import names_store, open_store
from dpo_jax.errors import InputError

Row = dict[str, Any]

PIECE_BYTES = 64 * 2**20
"""About how much of a source is one piece."""
PIECE_ROWS = 2**16
"""Rows of a store in one piece."""


class Span(NamedTuple):
    """A file, or `part` of one of JSON lines; or of a store its rows from `part.before` on, `part.lines` of them.

    `last`: it is the end of its file.
    """

    place: str
    part: Part | None
    last: bool = True


Piece = tuple[Span, ...]


def pieces_of(source: str, joined: Callable[[list[Row | BadRow]], bool], *, whole: bool) -> list[Piece]:
    """The pieces of a source, in order.

    Args:
      source: see `documents.rows_of`.
      joined: see `json_lines.parts_of`.
      whole: all of it is one piece.

    Raises `InputError` for sources that cannot be read.
    """
    if names_store(source):
        count = len(open_store(source))
        size = count if whole else PIECE_ROWS
        return [(Span(source, Part(0, 0, at, min(size, count - at))),) for at in range(0, count, size)]
    spans: list[tuple[Span, int]] = []
    text = is_text(source)
    for path in text_files(source) if text else resolve(source):
        try:
            size = path.stat().st_size
            if not (text or whole) and size > PIECE_BYTES and plain_lines(path):
                parts = parts_of(path, PIECE_BYTES, joined)
                spans += [(Span(str(path), part, part is parts[-1]), part.size) for part in parts]
            else:
                spans.append((Span(str(path), None), size))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return _grouped(spans, whole)


def _grouped(spans: list[tuple[Span, int]], whole: bool) -> list[Piece]:
    """Spans with their sizes, put together to pieces."""
    pieces: list[list[Span]] = [[]]
    room = PIECE_BYTES
    for span, size in spans:
        if pieces[-1] and size > room and not whole:
            pieces.append([])
            room = PIECE_BYTES
        pieces[-1].append(span)
        room -= size
    return [tuple(piece) for piece in pieces]


class PieceRows:
    """The rows of a piece: iterating yields (number, row or what is wrong with it), once.

    Attributes:
      numbers: how many numbers the piece takes, when all is read: those of the next piece stand behind them. In files
        of JSON lines the lines are counted, elsewhere rows.
    """

    def __init__(self, piece: Piece, separator: str | None):
        """`separator`: see `documents.rows_of`."""
        self._piece, self._separator = piece, separator
        self.numbers = 0

    def __iter__(self) -> Iterator[tuple[int, Row | BadRow]]:
        for span in self._piece:
            base, before = self.numbers, 0 if span.part is None else span.part.before
            for number, row in self._rows(span):
                self.numbers = base + number - before
                yield self.numbers, row
            if span.part is not None and not span.last:
                self.numbers = base + span.part.lines

    def _rows(self, span: Span) -> Iterator[tuple[int, Row | BadRow]]:
        if span.part is not None and names_store(span.place):
            yield from open_store(span.place).rows(span.part.before, span.part.before + span.part.lines)
            return
        path = Path(span.place)
        try:
            if span.part is not None:
                with path.open("rb") as file:
                    file.seek(span.part.start)
                    yield from json_lines(path, file, before=span.part.before, size=span.part.size)
            elif is_text(span.place):
                yield from enumerate(documents_in(path, self._separator), 1)
            else:
                yield from read_file(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
