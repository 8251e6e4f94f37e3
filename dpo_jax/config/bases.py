"""What the options of several commands begin with."""

from dataclasses import dataclass

from dpo_jax.config.devices import MeshConfig
from dpo_jax.config.options import Count, Options, Positive, not_given, part, require


@dataclass(frozen=True, kw_only=True)
class ReadsModels(Options):
    """A command that reads models."""

    ignore_config_keys: tuple[str, ...] = ()
    """Keys of a model's config.json that are not known here and change nothing: they are left out. (From Python it is
    `load_pretrained` that takes them.)"""


@dataclass(frozen=True, kw_only=True)
class AsksRewards(Options):
    """A command whose judges are functions, commands, or rewards on a server."""

    reward_timeout: Positive | None = not_given(60.0)
    """Seconds to wait for an answer of a URL (60), or for one call of your own code (600), or of a command
    of run: for one response (10)."""
    reward_memory: Count | None = not_given(1024)
    """MiB that a command of run: may take for one response."""

    def check_limits(self, *judges: str | None) -> None:
        """Refuse limits that hold for none of the judges."""
        require(
            self.reward_timeout is None or any(map(takes_timeout, judges)),
            "--reward_timeout has no effect: no judge is a URL, a function of yours, math: or run:",
        )
        runs = any(name is not None and name.startswith("run:") for name in judges)
        require(self.reward_memory is None or runs, "--reward_memory has no effect: no judge is run:COMMAND")


def takes_timeout(judge: str | None) -> bool:
    """Whether a reward may keep one waiting: a URL, a function or a command of the user, or mathematics."""
    return judge is not None and (is_url(judge) or ".py:" in judge or judge.startswith(("run:", "math:")))


def is_url(judge: str | None) -> bool:
    """Whether a reward is asked for over HTTP."""
    return judge is not None and judge.startswith(("http://", "https://"))


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
