"""Where a run's figures and its model go besides its own folder: Weights & Biases, the Hugging Face hub."""

from pathlib import Path

from dpo_jax.config import TrainingRun
from dpo_jax.files import wandb_log as wandb
from dpo_jax.files.folder import as_json, flatten
from dpo_jax.files.log import say
from dpo_jax.report import card
from dpo_jax.weights import hub_upload

_COORDINATOR = "distributed.coordinator"


def check(config: TrainingRun) -> None:
    """Raise `InputError`, before anything is done, for what would fail at the end of the run."""
    if config.log.wandb is not None:
        wandb.check(config.log.wandb)
    if config.push_to_hub is not None:
        hub_upload.check(config.push_to_hub)


def wandb_log(config: TrainingRun, folder: Path) -> wandb.WandbLog | None:
    """Who is told of the figures, and of the options as a model card tells them; None where nobody is asked for."""
    if config.log.wandb is None:
        return None
    told = {name: card.told(name, value) for name, value in flatten(as_json(config)).items() if name != _COORDINATOR}
    log = wandb.WandbLog(folder, config.log.wandb, told)
    if log.place is not None:
        say(f"Weights & Biases: {log.place}")
    return log


def push(repository: str, model: Path) -> None:
    """Send a model folder to the hub, and say how it went."""
    failed = hub_upload.push(repository, model)
    if failed is None:
        say(f"{model}: is now {repository} on the hub")
        return
    say(
        f"warning: {model}: could not be sent to {repository} ({failed}); it stays here, and the same command again"
        " tries once more",
        "warning",
    )
