"""`--ignore_config_keys`: what every command that reads a model does with it."""

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from dpo_jax.config import BenchRun, PlanRun
from dpo_jax.model.config_keys import OPTION, ignoring

logger = logging.getLogger(__name__)

Run = TypeVar("Run")
Result = TypeVar("Result")


def with_config_keys(command: Callable[[Run], Result]) -> Callable[[Run], Result]:
    """The command, in which every model is read without the keys of `run.ignore_config_keys`."""

    @wraps(command)
    def run(options: Run) -> Result:
        reads: Any = options.training if isinstance(options, PlanRun | BenchRun) else options
        keys = reads.ignore_config_keys
        with ignoring(keys) as met:
            result = command(options)
        if never := sorted(set(keys) - met):
            logger.warning("%s %s: no config.json that was read has it", OPTION, " ".join(never))
        return result

    return run
