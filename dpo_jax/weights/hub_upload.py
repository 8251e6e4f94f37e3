"""A model folder onto the Hugging Face hub (or what stands at HF_ENDPOINT): checked before training, sent after it."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_jax import voice
from dpo_jax.errors import InputError

TOKEN = "HF_TOKEN"
"""Environment variable with the token; it is read from nowhere else."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check(repository: str) -> None:
    """Raise `InputError` unless `repository` is a name and the hub takes the token. Nothing is made there yet."""
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"--push_to_hub {repository}: write OWNER/NAME of a model on the hub")
    token = os.environ.get(TOKEN)
    if not token:
        raise InputError(
            f"--push_to_hub {repository}: the environment variable {TOKEN} holds no token; set it to one that may write"
            " (huggingface.co/settings/tokens)"
        )
    with _told(token) as failed:
        _api(token).whoami()
    if failed:
        raise InputError(
            f"--push_to_hub {repository}: the hub does not take the token in {TOKEN}, or is not reached ({failed[0]});"
            " check both, or leave the option out and give the same command with it when the run is finished"
        )


def push(repository: str, folder: Path) -> str | None:
    """Send a folder as one commit. A repository that is not there is made, private; one that is there stays as it is.

    Returns: what went wrong in a few words, or None. The folder is left as it is in any case.
    """
    token = os.environ.get(TOKEN, "")
    with _told(token) as failed:
        api = _api(token)
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by dpo_jax")
    return failed[0] if failed else None


def _api(token: str) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if voice.mode() != "lines" or not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="dpo_jax")


@contextmanager
def _told(token: str) -> Iterator[list[str]]:
    """Collect what goes wrong between us and the hub, in words without the token."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.errors import HTTPError as ConnectionFailed  # pyright: ignore[reportPrivateImportUsage]

    failed: list[str] = []
    try:
        yield failed
    except (HfHubHTTPError, HFValidationError, ConnectionFailed, OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        failed.append(line.replace(token, "***") if token else line)
