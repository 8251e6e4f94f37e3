"""A model folder onto the Hugging Face hub (or what stands at HF_ENDPOINT): checked before training, sent after it."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo_jax import voice
from dpo_jax.errors import InputError
from dpo_jax.weights.integrity.folder import is_ours

TOKEN = "HF_TOKEN"
"""Environment variable with the token; it is read from nowhere else."""
TAG = "dpo_jax"
"""What a model card of ours is tagged with; a repository that holds one is one that we may write anew."""

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_EARLIER = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", "base.json", "training.png"]
_EARLIER += ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
_EARLIER += ["chat_template.*", "generation_config.json"]
"""What an earlier export may have left, as the hub's patterns go; what is sent anew is not removed."""


def check(repository: str) -> None:
    """Raise `InputError` unless a model may be sent to `repository` with the token. Nothing is made there yet."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"--push_to_hub {repository}: is no name of a model on the hub ({error})") from error
    if not _REPOSITORY.fullmatch(repository):
        raise InputError(f"--push_to_hub {repository}: write OWNER/NAME of a model on the hub")
    token = _token(repository)
    there: Any = None
    with _told(token) as failed:
        api = _api(token)
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        with suppress(RepositoryNotFoundError):
            there = api.model_info(repository)
    if failed:
        raise InputError(
            f"--push_to_hub {repository}: the hub does not take the token in {TOKEN}, or is not reached ({failed[0]});"
            " check both, or leave the option out and give the same command with it when the run is finished"
        )
    if role == "read":
        raise InputError(f"--push_to_hub {repository}: the token in {TOKEN} may only read; take one that may write")
    if there is not None and TAG not in (there.tags or ()):
        theirs = sorted({file.rfilename for file in there.siblings or ()} - {".gitattributes"})
        if theirs:  # the new weights would stand beside others, and a card be overwritten
            raise InputError(
                f"--push_to_hub {repository}: holds files that are not of a model pushed from here"
                f" ({', '.join(theirs[:3])}{', ...' if len(theirs) > 3 else ''}); name a new repository, or, where they"
                f" may be replaced, put the tag {TAG} into the head of its README.md first"
            )


def push(repository: str, folder: Path) -> str | None:
    """Send a model folder as one commit: what an export consists of, and nothing else that lies there.

    A repository that is not there is made, private; one that is there keeps its visibility and loses, in the same
    commit, what an earlier export left and this one has not, such as shards or an adapter.

    Returns: what went wrong in a few words, or None. The folder is left as it is in any case.
    """
    token = _token(repository)
    ours = [path.name for path in folder.iterdir() if is_ours(path)]
    with _told(token) as failed:
        api = _api(token)
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=ours,
            delete_patterns=_EARLIER,
            commit_message="Upload by dpo_jax",
        )
    return failed[0] if failed else None


def _token(repository: str) -> str:
    """The token, without the line end that files of the environment leave at it. Raises `InputError`."""
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise InputError(
            f"--push_to_hub {repository}: the environment variable {TOKEN} holds no token; set it to one that may write"
            " (huggingface.co/settings/tokens)"
        )
    if not re.fullmatch(r"[!-~]+", token):
        raise InputError(
            f"--push_to_hub {repository}: {TOKEN} holds blanks or letters that no token has; set it to the token alone"
        )
    return token


def _api(token: str) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    if voice.mode() != "lines" or not sys.stderr.isatty():
        disable_progress_bars()
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token, library_name="dpo_jax")


@contextmanager
def _told(token: str) -> Iterator[list[str]]:
    """Collect what goes wrong between us and the hub, in words without the token."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError as ConnectionFailed,  # pyright: ignore[reportPrivateImportUsage]
    )

    failed: list[str] = []
    try:
        yield failed
    except (HfHubHTTPError, HFValidationError, ConnectionFailed, OSError, ValueError, RuntimeError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        failed.append(line.replace(token, "***"))
