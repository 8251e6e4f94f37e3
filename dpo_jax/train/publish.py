"""Where a run's figures and its model go besides its own folder: Weights & Biases, the Hugging Face hub."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.files import wandb_log as wandb
from dpo_jax.files.folder import RunFolder, flatten
from dpo_jax.files.log import say
from dpo_jax.report import card
from dpo_jax.weights import hub_upload
from dpo_jax.weights.opened import StoredModel

_COORDINATOR = "distributed.coordinator"


def check(project: str | None, repository: str | None) -> None:
    """Raise `InputError`, before anything is done, for what would fail at the end of the run.

    `project`: on Weights & Biases; `repository`: on the hub.
    """
    if project is not None:
        wandb.check(project)
    if repository is not None:
        hub_upload.check(repository)


def wandb_log(project: str | None, options: Mapping[str, Any], folder: Path) -> wandb.WandbLog | None:
    """Who is told of the figures, and of the options as a model card tells them; None where nobody is asked for."""
    if project is None:
        return None
    told = {name: card.told(name, value) for name, value in flatten(options).items() if name != _COORDINATOR}
    log = wandb.WandbLog(folder, project, told)
    if log.place is not None:
        say(f"Weights & Biases: {log.place}")
    return log


def card_of(
    options: Mapping[str, Any], folder: RunFolder, start: StoredModel, *, steps: str, adapter: bool, **told: Any
) -> dict[str, bytes]:
    """The model card's files, by name. One that cannot be written is said, and ends no run.

    `options`: of the run, as JSON has them; `folder`: of the run; `start`: what it began with; `steps`: how many, in
    words, if any; `adapter`, `told`: see `card.Card` and `card.of_run`.
    """
    try:
        basis, after = card.Basis.of(start), f" in {steps}" if steps else ""
        made = card.of_run(folder.command, options, folder.given, basis, steps=after, **told)
        return dataclasses.replace(made, adapter=adapter).files()
    except Exception as error:  # whatever it is, what was trained is worth more than its description
        say(f"warning: {folder.path}: no model card could be written ({type(error).__name__}: {error})", "warning")
        return {}


def push(repository: str, model: Path) -> None:
    """Send a model folder to the hub, and say so. Raises `InputError` where that fails: the run itself is whole."""
    failed = hub_upload.push(repository, model)
    if failed is not None:
        raise InputError(
            f"--push_to_hub {repository}: {model} could not be sent ({failed}); the run is whole and stays here, and"
            " the same command again tries once more"
        )
    say(f"{model}: is now {repository} on the hub")
