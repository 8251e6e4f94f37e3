"""What a command shows on the terminal when it is done: tables, and lines below them."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_jax.headers import mended

if TYPE_CHECKING:  # it draws plots, and loads what that takes
    from dpo_jax.report import html


def table(title: str, content: "html.Table", *, left: int | None = None) -> Table:
    """A table as the terminal draws it; no text in it is markup.

    Columns behind the first `left` hold numbers, which end below each other.
    """
    made = Table(title=Text(mended(title), "table.title"))
    for i, name in enumerate(content.head):
        made.add_column(Text(mended(name)), justify="left" if left is None or i < left else "right")
    for row in content.rows:
        made.add_row(*(Text(mended(str(cell))) for cell in row))
    return made


def show(*parts: Table | str, width: int = 0) -> None:
    """Print tables, and lines as they are. `width`: columns that a table wants, else its numbers would break."""
    console = Console()
    console.width = max(console.width, width)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)
