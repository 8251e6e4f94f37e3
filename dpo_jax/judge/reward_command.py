"""`--reward run:COMMAND`: a command of the user judges each response; this is how code is run that a model wrote.

The command is started once a response, without a shell, in an empty folder that is removed, and reads one line of JSON:

    {"prompt": ..., "response": "...", "code": "...", "columns": {...}}

`code` is what stands in the last fenced block of the response (all of it where there is none), `columns` are the row's.
The last line that it prints is the score. It may take so many seconds and so much memory a process (`ulimit`), gets
PATH and LANG of the environment and nothing else, so that no secret is in reach of the code, and all that it started is
ended with it. An exit status other than 0, and one that runs out of time or memory, scores 0, and how many is logged.

Limits are no sandbox: to keep the code from the network and from files, COMMAND is a container or a jail that does.
"""

import contextlib
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

from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.reward_worker import encoded

log = logging.getLogger(__name__)

SECONDS, MIB = 10.0, 1024
"""What one response may take, where the user says nothing else."""
_READ = 4096
"""Bytes of the output's end in which its last line is looked for."""
_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Memory in KiB, files in blocks of 512 bytes (64 MiB); no core files.
_LIMITED = 'ulimit -v {memory} && ulimit -t {seconds} && ulimit -f 131072 && ulimit -c 0 || exit 1; exec "$@"'


def code_of(response: str) -> str:
    """What stands in the last fenced block, or the whole response."""
    blocks = _FENCED.findall(response)
    return blocks[-1] if blocks else response


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
        self.identity, self._spec = spec, spec
        self._seconds, self._memory = timeout or SECONDS, memory or MIB
        # It runs in a folder of its own, so files are named from the root; links stay, as
        # what a virtual environment's Python is called decides which environment it is.
        self._words = [os.path.abspath(word) if Path(word).is_file() else word for word in words]
        with tempfile.TemporaryDirectory() as folder:
            tried = subprocess.run([*self._limited(), "true"], cwd=folder, capture_output=True, check=False)
        if tried.returncode:
            raise InputError(f"--reward {spec}: memory and time cannot be limited here (ulimit -v, -t, -f)")

    def _limited(self) -> list[str]:
        seconds = int(self._seconds) + 1  # of computing; the clock is watched here
        return ["/bin/sh", "-c", _LIMITED.format(memory=self._memory * 1024, seconds=seconds), "sh"]

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | str]:
        """A number each, or what was printed in the place of one. Failures are logged together."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = list(pool.map(self._one, prompts, responses))
        failed = Counter(why for _, why in found if why)
        if failed:
            told = ", ".join(f"{count} {why}" for why, count in failed.items())
            log.warning("--reward %s: of %d responses %s: they score 0", self._spec, len(responses), told)
        return [score for score, _ in found]

    def _one(self, prompt: Prompt, response: str) -> tuple[float | str, str]:
        """The score, and why there is none."""
        asked = {"prompt": prompt.plain, "response": response, "code": code_of(response)}
        line = json.dumps({**asked, "columns": dict(prompt.columns)}, default=encoded) + "\n"
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
                return 0.0, "ran out of time"
            finally:
                with contextlib.suppress(ProcessLookupError):  # with whatever it left running
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if status:
                return 0.0, "ended with an error"
            size = answer.seek(0, os.SEEK_END)
            answer.seek(max(0, size - _READ))
            printed = answer.read().decode("utf-8", "replace").split("\n")
        last = next((one.strip() for one in reversed(printed) if one.strip()), "")
        try:
            return float(last), ""
        except ValueError:
            return last[:80], ""
