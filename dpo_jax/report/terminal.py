"""What a command shows on the terminal when it is done: tables, and lines below them."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # it draws plots, and loads what that takes
    from dpo_jax.report import html


def table(title: str, content: "html.Table", *, left: int | None = None) -> Table:
    """A table as the terminal draws it. Columns behind the first `left` hold numbers, which end below each other."""
    made = Table(title=title)
    for i, name in enumerate(content.head):
        made.add_column(name, justify="left" if left is None or i < left else "right")
    for row in content.rows:
        made.add_row(*map(str, row))
    return made


def show(*parts: Table | str, width: int = 0) -> None:
    """Print tables, and lines as they are. `width`: columns that a table wants, else its numbers would break."""
    console = Console()
    console.width = max(console.width, width)
    for part in parts:
        if isinstance(part, str):
            console.print(part, highlight=False, soft_wrap=True)
        else:
            console.print(part)
