"""`dpo-jax completion SHELL`: what lets a shell complete commands, options and values."""

from dpo_jax.config import CompletionRun
from dpo_jax.config.command_line.completion import script


def completion(run: CompletionRun) -> None:
    """Print the script of `run.shell`, which reads it at its start."""
    print(script(run.shell), end="")
