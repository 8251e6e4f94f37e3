"""Options of the commands that show the package, and runs: `demo`, `report`, `configs`, `completion`."""

from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.options import Options, Seed, require


@dataclass(frozen=True)
class DemoRun(ReadsModels):
    """The whole thing on a real 135M Llama: `dpo-jax demo`.

    The controlled-sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6.1): the model writes reviews,
    a sentiment lexicon judges them, DPO learns from the pairs, and unseen prompts show what it did.
    """

    out: str = "dpo-jax-demo"
    """Folder for samples, pairs, the run and the report; an interrupted demo goes on with it."""
    fast: bool = False
    """A smaller experiment: under two minutes on two CPU cores instead of about five."""
    seed: Seed = 0
    """Seed of everything."""
    model: str = "smollm2"
    """A Hugging Face folder, a hub id, a .gguf file, or smollm2."""


@dataclass(frozen=True)
class ReportRun(Options):
    """Runs on one page: curves over each other, options that differ, last figures: `dpo-jax report RUN RUN ...`."""

    runs: tuple[str, ...]
    """Two or more run folders, finished or not."""
    out: str = "compared.html"
    """The page to write."""
    overwrite: bool = False
    """Replace the page if it is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.runs) > 1, "report compares two or more runs; each has a report.html of its own")
        require(len({*self.runs}) == len(self.runs), "--runs names a run twice")


@dataclass(frozen=True)
class ConfigsRun(Options):
    """The recipes that come with the package: `dpo-jax configs`, `dpo-jax configs show|copy NAME`."""

    action: Literal["list", "show", "copy"] = "list"
    """list: all, in a line each. show: one, as a CONFIG.py that derives from no other. copy: the same, into a file."""
    name: str | None = None
    """Which one, for show and copy."""
    to: str | None = None
    """File that copy writes. Not given: NAME.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = self.action == "list"
        require(listed or self.name is not None, f"configs {self.action} needs a name (dpo-jax configs lists them)")
        require(not listed or self.name is None, "--name has no effect with configs list")
        require(self.action == "copy" or self.to is None, f"--to has no effect with configs {self.action}")


@dataclass(frozen=True)
class CompletionRun(Options):
    """What lets a shell complete commands, options and values: `dpo-jax completion bash|zsh|fish`."""

    shell: Literal["bash", "zsh", "fish"]
    """The shell whose script is printed; it reads it at its start."""
