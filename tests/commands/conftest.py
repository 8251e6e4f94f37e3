"""Fixtures of tests of whole runs and recipes."""

from collections.abc import Iterator

import jax
import pytest

from dpo_jax.report import html


def _frame(plot: html.Plot) -> str:
    return f"<svg><!-- {html.plain(plot.title)} --></svg>"


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Reports have a frame for each picture: drawing takes up to a tenth of a tiny run, and `tests/report` looks at it.
    A module that draws has a fixture of this name which does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_svg", _frame)
        patch.setattr(html, "png_of", lambda plots: b"\x89PNG\r\n" + bytes(len(plots)))
        yield


@pytest.fixture
def cheaply() -> Iterator[None]:
    """The model is tiny; compiling is not."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
