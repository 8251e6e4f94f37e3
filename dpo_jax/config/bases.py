"""What the options of several commands begin with."""

from dataclasses import dataclass

from dpo_jax.config.options import Options, part, require
from dpo_jax.config.sections import MeshConfig


@dataclass(frozen=True, kw_only=True)
class ReadsModels(Options):
    """A command that reads models."""

    ignore_config_keys: tuple[str, ...] = ()
    """Keys of a model's config.json that are not known here and change nothing: they are left out."""


@dataclass(frozen=True, kw_only=True)
class RunsModels(ReadsModels):
    """A command that runs models without training them."""

    mesh: MeshConfig = part(MeshConfig)


@dataclass(frozen=True, kw_only=True)
class WritesTexts(RunsModels):
    """A command that draws tokens one by one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.mesh.context == 1,
            f"--mesh.context {self.mesh.context} has no effect: this command splits no sequence; use --mesh.fsdp",
        )
