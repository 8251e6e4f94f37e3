"""Fixtures of tests of whole recipes."""

from collections.abc import Iterator

import jax
import pytest

from dpo_jax.report import html


@pytest.fixture
def cheaply(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model is tiny; compiling and drawing are not."""
    monkeypatch.setattr(html, "_svg", lambda plot: f"<svg><!-- {len(plot.series)} --></svg>")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
