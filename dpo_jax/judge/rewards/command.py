"""`--reward run:COMMAND`: a command of the user judges each response; this is how code is run that a model wrote.

The command is started once a response, without a shell, in an empty folder that is removed, and reads one line of JSON:

    {"prompt": ..., "response": "...", "code": "...", "columns": {...}}

`code` is what stands in the last fenced block of the response (all of it where there is none), `columns` are the row's,
in them as texts what JSON has no values for: dates, decimals, bytes (base64). The last line that it prints is the
score. It may take so many seconds and so much memory a process (`ulimit`), gets PATH and LANG of the environment and
nothing else, so that no secret is in reach of the code. What it started is ended with it, but for what left its process
group (a session or a container of its own). An exit status other than 0, and one that runs out of time or memory,
scores 0, and how many is logged. It is tried out first, on a response without code.

Limits are no sandbox: to keep the code from the network and from files, COMMAND is a container or a jail that does.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.user_process import encoded

log = logging.getLogger(__name__)

SECONDS, MIB = 10.0, 1024
"""What one response may take, where the user says nothing else."""
_READ = 4096
"""Bytes of the output's end in which its last line is looked for."""
_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_NO_LIMIT = 99
# Memory in KiB, files in blocks of 512 bytes (64 MiB); no core files.
_LIMITED = 'ulimit -v {memory} && ulimit -t {seconds} && ulimit -f 131072 && ulimit -c 0 || exit 99; exec "$@"'
_NOT_RUN = (125, 126, 127)
"""What shells, env, timeout and docker end with where they could not run what they were told to."""
_NOT_BEGUN = "ended with an exit status of 125 to 127"
_WITHOUT_CODE = "```\n```"
"""The response that a command is tried out with: a program that does nothing, in any language."""


def code_of(response: str) -> str:
    """What stands in the last fenced block, or the whole response."""
    blocks = _FENCED.findall(response)
    return blocks[-1] if blocks else response


def _as_json(value: Any) -> Any:
    """`default` of `json.dumps`: a command knows nothing of our own encoding."""
    found = encoded(value)
    return found["value"] if isinstance(found, dict) else found


class Command:
    """A reward function that runs a command on each response."""

    everywhere = False

    def __init__(self, spec: str, command: str, timeout: float | None, memory: int | None):
        """`timeout`: seconds; `memory`: MiB. Raises `InputError` for a command that is not there, or no limits."""
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"--reward {spec}: {error}") from error
        if not words or shutil.which(words[0]) is None:
            raise InputError(f"--reward {spec}: {words[0] if words else 'nothing'} is no command that can be run")
        self._spec, self._seconds, self._memory = spec, timeout or SECONDS, memory or MIB
        # All that decides a score here: what runs out of time scores 0. What the files read or import is not in reach.
        readable = [word for word in words if os.path.isfile(word) and os.access(word, os.R_OK)]
        files = [hashlib.sha256(Path(word).read_bytes()).hexdigest() for word in readable]
        hashes = f", files with the hashes {' '.join(files)}" if files else ""
        self.identity = f"{spec} ({self._seconds:g} s, {self._memory} MiB{hashes})"
        # It runs in a folder of its own, so files are named from the root; links stay, as
        # what a virtual environment's Python is called decides which environment it is.
        self._words = [os.path.abspath(word) if os.path.isfile(word) else word for word in words]
        with tempfile.TemporaryDirectory() as folder:
            tried = subprocess.run([*self._limited(), "true"], cwd=folder, capture_output=True, check=False)
        if tried.returncode == _NO_LIMIT:
            raise InputError(f"--reward {spec}: memory and time cannot be limited here (ulimit -v, -t, -f)")
        if tried.returncode:
            raise InputError(f"--reward {spec}: no command runs in {self._memory} MiB; give more --reward_memory")

    def try_out(self, prompt: Prompt) -> None:
        """Raise `InputError` where the command cannot be run, or prints no number for a response without code."""
        status, printed = self._ended(prompt, _WITHOUT_CODE)
        if status in _NOT_RUN:
            raise InputError(
                f"--reward {self._spec}: could not run (exit status {status}, for a response without code); it has PATH"
                " and LANG of the environment alone, and works in an empty folder"
            )
        if status == 0 and isinstance(_number(printed), str):
            raise InputError(
                f"--reward {self._spec}: the last line that it prints is no number: {printed[:40]!r} (for a response"
                " without code)"
            )

    def _limited(self) -> list[str]:
        seconds = int(self._seconds) + 1  # of computing; the clock is watched here
        return ["/bin/sh", "-c", _LIMITED.format(memory=self._memory * 1024, seconds=seconds), "sh"]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | str]:
        """A number each, or what was printed in the place of one. Failures are logged together."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(self._one, prompts, responses))
        not_run = next((p for p, (_, why) in zip(prompts, found, strict=True) if why == _NOT_BEGUN), None)
        if not_run is not None:  # code that a model wrote may end so; the command itself may not
            self.try_out(not_run)
        failed = Counter(why for _, why in found if why)
        if failed:
            told = ", ".join(f"{count} {why}" for why, count in failed.items())
            log.warning("--reward %s: of %d responses %s: they score 0", self._spec, len(responses), told)
        return [score for score, _ in found]

    def _one(self, prompt: Prompt, response: str) -> tuple[float | str, str]:
        """The score, and why there is none."""
        status, printed = self._ended(prompt, response)
        if status is None:
            return 0.0, "ran out of time"
        if status in _NOT_RUN:
            return 0.0, _NOT_BEGUN
        return (0.0, "ended with an error") if status else (_number(printed), "")

    def _ended(self, prompt: Prompt, response: str) -> tuple[int | None, str]:
        """The exit status, None where there was no time for one, and the last line that was printed."""
        asked = {"prompt": prompt.plain, "response": response, "code": code_of(response)}
        line = json.dumps({**asked, "columns": dict(prompt.columns)}, default=_as_json) + "\n"
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as question,
            tempfile.TemporaryFile() as answer,
        ):
            question.write(line.encode("utf-8", "surrogatepass"))
            question.seek(0)
            kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
            process = subprocess.Popen(
                [*self._limited(), *self._words],
                stdin=question,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={**kept, "HOME": folder, "TMPDIR": folder},
                start_new_session=True,
            )
            try:
                status = process.wait(self._seconds)
            except subprocess.TimeoutExpired:
                return None, ""
            finally:
                with contextlib.suppress(ProcessLookupError):  # with whatever it left running
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            size = answer.seek(0, os.SEEK_END)
            answer.seek(max(0, size - _READ))
            printed = answer.read().decode("utf-8", "replace").split("\n")
        return status, next((one.strip() for one in reversed(printed) if one.strip()), "")


def _number(printed: str) -> float | str:
    """As a number, or what stands in the place of one."""
    try:
        return float(printed)
    except ValueError:
        return printed[:80]
