"""The figures of a run on Weights & Biases, beside its own metrics.jsonl (`--log.wandb PROJECT`).

`pip install 'dpo_jax[wandb]'`. WANDB_API_KEY and WANDB_MODE (offline: files in the run folder, for `wandb sync`) are
read from the environment, as wandb reads them. What goes wrong there is said once and stops no run.
"""

import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError, first_line
from dpo_jax.files.folder import write_atomically

_ID = "wandb_id"
_log = logging.getLogger(__name__)


def check(project: str) -> None:
    """Raise `InputError` unless wandb is installed and knows where to write."""
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # wandb's own folder of files in the working directory is no package
        raise InputError(f"--log.wandb {project}: wandb is not installed; pip install 'dpo_jax[wandb]'")
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("offline", "disabled", "dryrun") and not os.environ.get("WANDB_API_KEY"):
        raise InputError(
            f"--log.wandb {project}: the environment has no WANDB_API_KEY; set it, or WANDB_MODE=offline to write files"
            " that `wandb sync` sends later"
        )


class WandbLog:
    """One run there; a run that is gone on with goes on there, too."""

    def __init__(self, folder: Path, project: str, options: Mapping[str, Any]):
        """Args:
        folder: the run folder; its last part is the name of the run.
        project, options: what it is filed under, and what it is told of the run.
        """
        import wandb  # pyright: ignore[reportMissingImports] - an extra

        known = folder / _ID
        if not known.exists():
            write_atomically(known, secrets.token_hex(4) + "\n")
        # Nothing of this machine goes there: no host, user or program, no source and no other process' figures.
        quiet = wandb.Settings(
            console="off", disable_git=True, save_code=False, silent=True, x_disable_meta=True, x_disable_stats=True
        )
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=project,
                name=folder.absolute().name,
                id=known.read_text().strip(),
                resume="allow",
                dir=str(folder),
                config=dict(options),
                settings=quiet,
            )
            # Steps after a checkpoint come again where a run is gone on with: they are an axis, not wandb's own count.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:  # wandb raises errors of many kinds; the run has its own log
            self._give_up(error)

    @property
    def place(self) -> str | None:
        """Where the figures are to be seen, if anywhere yet."""
        if self._run is None:
            return None
        return f"{self._run.dir} (offline: wandb sync sends it)" if self._run.offline else self._run.url

    def add(self, row: Mapping[str, float]) -> None:
        """The figures of a step, "step" among them."""
        if self._run is None:
            return
        try:
            self._run.log(dict(row))
        except Exception as error:  # as above
            self._give_up(error)

    def close(self, failed: bool) -> None:
        """Send what is left."""
        if self._run is None:
            return
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        _log.warning(
            "warning: Weights & Biases takes no more figures (%s); metrics.jsonl has all of them", first_line(error)
        )
