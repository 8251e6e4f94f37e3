"""`dpo-jax inspect`: what the model sees of some rows, token by token, coloured by whether the loss counts it."""

from rich.console import Console
from rich.text import Text

from dpo_jax.config import InspectRun
from dpo_jax.data.dataset import PreferenceDataset
from dpo_jax.data.inspect import Piece, pieces
from dpo_jax.errors import InputError
from dpo_jax.run.score import load_data
from dpo_jax.types import CHOSEN, REJECTED

STYLES = {"prompt": "dim", "response": "black on green", "format": "black on yellow", "terminator": "bold white on red"}
MEANINGS = {
    "prompt": "prompt, not in the loss",
    "response": "response, in the loss",
    "format": "written by the template, in the loss unless --dpo.mask_format_tokens",
    "terminator": "the token that ends the response, in the loss",
}


def inspect(run: InspectRun) -> None:
    """Print `run.rows` usable rows from row number `run.first` on. Raises `InputError`."""
    tokenizer, dataset = load_data(run.model, run.source, run.data, run.on_bad_rows, with_format_masks=True)
    shown = [i for i, number in enumerate(dataset.row_numbers) if number >= run.first][: run.rows]
    if not shown:
        raise InputError(
            f"{run.source}: no usable row from row {run.first} on; the last one is {dataset.row_numbers[-1]}"
        )
    console = Console(highlight=False)
    for i in shown:
        for side, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
            found = pieces(dataset, tokenizer, i, side)
            console.print(Text(_heading(dataset, i, side, name, found), style="bold"))
            console.print(_coloured(found), soft_wrap=True)
            console.print()
    for part, meaning in MEANINGS.items():
        console.print(Text.assemble((f" {part} ", STYLES[part]), f" {meaning}"))


def _heading(dataset: PreferenceDataset, row: int, side: int, name: str, found: list[Piece]) -> str:
    cut = "" if found[-1].part == "terminator" else ", cut by --data.max_length"
    prompt, response = dataset.prompt_lengths[row], dataset.response_lengths[row, side]
    return f"row {dataset.row_numbers[row]}, {name}: {prompt} prompt tokens, {response} response tokens{cut}"


def _coloured(found: list[Piece]) -> Text:
    """One style a part; a thin bar stands between tokens, and line ends are shown before they are obeyed."""
    text = Text()
    for i, piece in enumerate(found):
        text.append("" if i == 0 else "|", style="bright_black")
        text.append(piece.text.replace("\n", "\\n\n"), style=STYLES[piece.part])
    return text
