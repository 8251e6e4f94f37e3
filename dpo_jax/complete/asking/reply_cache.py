"""Replies of endpoints on disk, by a hash of all that decides them: a run that was killed asks nothing twice."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
      text: of the answer; a refusal's text where it refused.
      finish_reason: stop, length (it was cut: nothing is read from it), content_filter, refusal, or the server's own.
      reasoning: what it gave apart as its reasoning.
      prompt_tokens, completion_tokens: as the server counts; None where it does not say.
      top: the likeliest first tokens and their log-probabilities, where they were asked for.
    """

    text: str
    finish_reason: str
    reasoning: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    top: tuple[tuple[str, float], ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it ended as an answer ends: else no verdict is read from it."""
        return self.finish_reason in ("stop", "eos", "end_turn", "stop_sequence")


def key_of(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request in canonical JSON."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class ReplyCache:
    """A folder of replies, each FOLDER/ab/abcd....json, the request beside the reply, without the server's key."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        """The reply kept under `key`. Raises `InputError` for a file that is none."""
        path = self._path(key)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["reply"]
            return Reply(**{**found, "top": tuple((str(token), float(p)) for token, p in found["top"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not readable as a reply that was kept; remove the file") from error

    def put(self, key: str, request: Mapping[str, Any], reply: Reply) -> None:
        """Keep a reply; whole on the disk when this returns. Raises `InputError` where the disk is full."""
        write_atomically(self._path(key), json.dumps({"request": request, "reply": asdict(reply)}, ensure_ascii=True))
