"""`--ignore_config_keys`: what every command that reads a model does with it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_jax.config import BenchRun, PlanRun
from dpo_jax.model.config_keys import OPTION, ignoring

logger = logging.getLogger(__name__)


@contextmanager
def without_keys_of(options: Any) -> Iterator[None]:
    """Within the block, in which a command runs, every model is read without the keys of its `ignore_config_keys`."""
    reads: Any = options.training if isinstance(options, PlanRun | BenchRun) else options
    keys = getattr(reads, "ignore_config_keys", ())
    with ignoring(keys) as met:
        yield
    if never := sorted(set(keys) - met):
        logger.warning("%s %s: no config.json that was read has it", OPTION, " ".join(never))
