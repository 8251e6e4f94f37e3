"""Fixtures of tests of whole runs and recipes."""

from collections.abc import Iterator

import jax
import pytest
import undrawn

from dpo_jax.report import html


@pytest.fixture(scope="module", autouse=True, name="undrawn")
def _undrawn() -> Iterator[None]:
    """Reports have a frame for each picture; `tests/report` looks at pictures, and so does a module with a fixture of
    this name that does nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_svg", undrawn.svg)
        patch.setattr(html, "png_of", undrawn.png)
        yield


@pytest.fixture
def cheaply() -> Iterator[None]:
    """The model is tiny; compiling is not."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
