"""`dpo-jax inspect`: what the model sees of some rows, token by token, coloured by whether the loss counts it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_jax.config import InspectRun
from dpo_jax.data.sets.dataset import check_context
from dpo_jax.data.sets.inspect import Piece, comparison_table, pieces, sequence_pieces
from dpo_jax.data.sets.sequences import load_dialogues
from dpo_jax.data.sets.text_windows import parse_sources
from dpo_jax.errors import InputError
from dpo_jax.files.log import say
from dpo_jax.judge.loading import load_data, load_vocabulary
from dpo_jax.report import html, terminal
from dpo_jax.types import CHOSEN, REJECTED
from dpo_jax.weights.opened import open_checkpoint

STYLES = {"prompt": "dim", "response": "black on green", "format": "black on yellow", "terminator": "bold white on red"}
MEANINGS = {
    "prompt": "not in the loss",
    "response": "response, in the loss",
    "format": "written by the template, in the loss unless --dpo.mask_format_tokens",
    "terminator": "the token that ends the response, in the loss",
}


def inspect(run: InspectRun) -> None:
    """Print `run.rows` usable rows from row number `run.first` on, of each file (weights mean nothing here).

    Raises `InputError`.
    """
    console = Console(highlight=False)
    if run.table:
        console.print(_table(run))
        return
    for name, _ in parse_sources(run.data.files):
        each = replace(run, data=replace(run.data, files=name))
        for heading, found in _pairs(each) if run.kind == "preferences" else _dialogues(each):
            console.print(Text(heading, style="bold"), soft_wrap=True)
            console.print(_coloured(found), soft_wrap=True)
            console.print()
    for part, meaning in MEANINGS.items():
        if part != "format" or run.kind == "preferences":
            console.print(Text.assemble((f" {part} ", STYLES[part]), f" {meaning}"))


def _table(run: InspectRun) -> Table:
    """Comparisons by source, file by file."""
    _, tokenizer = load_vocabulary(open_checkpoint(run.model), run.data)
    head = ("source", "comparisons", "turns", "tokens of an example", "of a prompt", "of a response")
    told: dict[str, Any] = {"columns": run.data.columns, "limit": run.data.limit, "on_bad_rows": run.on_bad_rows}
    rows = []
    for name, _ in parse_sources(run.data.files):
        for source, figures in comparison_table(name, tokenizer, **told):
            count, *means = figures.figures()
            rows.append((source, f"{count:,}", *(f"{mean:.1f}" for mean in means)))
    return terminal.table(f"{run.data.files}: means, tokens without a template", html.Table(head, rows), left=1)


def _pairs(run: InspectRun) -> Iterator[tuple[str, list[Piece]]]:
    place, data = open_checkpoint(run.model), run.data
    tokenizer, dataset = load_data(place, data.files, data, run.on_bad_rows, with_format_masks=True)
    for i in _shown(run, dataset.row_numbers):
        for side, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
            found = pieces(dataset, tokenizer, i, side)
            prompt, response = dataset.prompt_lengths[i], dataset.response_lengths[i, side]
            heading = f"row {dataset.row_numbers[i]}, {name}: {prompt} prompt tokens, {response} response tokens"
            yield heading + dataset.cuts[i].told() + _cut(found), found


def _dialogues(run: InspectRun) -> Iterator[tuple[str, list[Piece]]]:
    architecture, tokenizer = load_vocabulary(open_checkpoint(run.model), run.data)
    dataset = load_dialogues(
        run.data.files,
        tokenizer,
        run.data,
        train_on=run.settled.train_on,
        vocab_size=architecture.vocab_size,
        on_bad_rows=run.on_bad_rows,
    )
    check_context(run.data.files, dataset.row_numbers, dataset.lengths, architecture, run.data.max_length)
    say(dataset.summary())
    for i in _shown(run, dataset.row_numbers):
        found = sequence_pieces(dataset, tokenizer, i)
        counted = f"{dataset.lengths[i]} tokens, {dataset.target_lengths[i]} of them in the loss"
        yield f"row {dataset.row_numbers[i]}: {counted}{_cut(found)}", found


def _shown(run: InspectRun, row_numbers: np.ndarray) -> Sequence[int]:
    """Positions in the data set of the rows to show."""
    shown = np.flatnonzero(row_numbers >= run.first)[: run.rows].tolist()
    if not shown:
        raise InputError(f"{run.data.files}: no usable row from row {run.first} on; the last one is {row_numbers[-1]}")
    return shown


def _cut(found: list[Piece]) -> str:
    return "" if found[-1].part == "terminator" else ", cut by --data.max_length"


def _coloured(found: list[Piece]) -> Text:
    """One style a part; a thin bar stands between tokens, and line ends are shown before they are obeyed."""
    text = Text()
    for i, piece in enumerate(found):
        text.append("" if i == 0 else "|", style="bright_black")
        text.append(piece.text.replace("\n", "\\n\n"), style=STYLES[piece.part])
    return text
