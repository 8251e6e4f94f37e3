"""A reward that is the user's own code: FILE.py:FUNCTION, called in one of two ways.

    def function(prompts, responses, COLUMN, ..., **columns): return [a number for each response]
    def function(prompts, completions, COLUMN, ..., **columns): the same, as TRL's GRPOTrainer calls it

Of the first a prompt is a text, or [{"role": ..., "content": ...}, ...] where its row holds several messages. The
second is meant where a parameter is named `completions`: all is given by keyword, and where the row's prompt is a list
of messages, prompts are lists of messages and a completion is [{"role": "assistant", "content": ...}]; else both are
texts. (`completion_ids` and `trainer_state` are TRL's own and are not given.)

Further parameters are columns of the prompts' file, as in TRL: a parameter of that name, or each column under
`**columns`, gets a list with one value a response (None where its row has none), such as the right answers that
responses are compared with.

The function runs in a process of its own (`judge/rewards/user_process.py`), loaded once, which is ended where a call
takes longer than it may. That is no sandbox: it may do whatever the user may.
"""

import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards import user_process

TIMEOUT = 600.0
"""Seconds that a call may take, where the user names no other number: scores of a whole batch, tests run and all."""
TRLS_OWN = ("completion_ids", "trainer_state", "log_extra", "log_metric")
"""Parameters that GRPOTrainer fills in, and nothing here does."""


class Worker:
    """The process with the user's function or class in it: a request at a time, each answered within so many seconds.

    Attributes:
      identity: its name, and a hash of its file.
      described: what `user_process.load` says of it.
    """

    def __init__(self, named: str, path: Path, wanted: str, timeout: float | None, environment: Mapping[str, str]):
        """Loads the file `path`.

        Args:
          named: the option as it was typed, with FILE.py:NAME.
          wanted: what NAME is to be, such as "function NAME(prompts, responses)".
          timeout: seconds that a call may take.
          environment: of the process.

        Raises `InputError` for a file that cannot be loaded, or has nothing callable of that name.
        """
        self._named, self._path, name = named, path, named.rpartition(":")[2]
        self._seconds = TIMEOUT if timeout is None else timeout
        self.identity = f"{name} of a file with the hash {hashlib.sha256(path.read_bytes()).hexdigest()}"
        # JAX of the function computes on the CPU: the devices are taken, all of their memory often, by the training.
        self._process = subprocess.Popen(
            [sys.executable, "-P", user_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # so that what it starts is ended with it, and Ctrl-C is ours alone
            env={**environment, "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"},
        )
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        self.end = weakref.finalize(self, _end, self._process)
        # The kernel takes the end of the thread that started it for the end of the whole process (prctl(2)).
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
        asked = {"load": str(path), "name": name, "sys_path": sys.path, "parent": parent}
        self.described = self._answer(asked, max(self._seconds, TIMEOUT), "loading the file")  # it may import much
        if self.described.get("absent"):
            raise InputError(f"{named}: {path} has no {wanted}")

    def ask(self, request: Mapping[str, Any], doing: str) -> dict[str, Any]:
        """The answer. Raises `InputError` for an exception, where there is none in time, or the process is gone."""
        return self._answer(request, self._seconds, doing)

    def told(self, answer: Mapping[str, Any]) -> str:
        """An exception that is an answer, in one line."""
        where = "" if answer["line"] is None else f"{self._path}, line {answer['line']}: "
        return f"{where}{answer['error']}"

    def _answer(self, request: Mapping[str, Any], seconds: float, doing: str) -> dict[str, Any]:
        assert self._process.stdin is not None, "it is a pipe"
        written = json.dumps(request, default=user_process.encoded).encode() + b"\n"
        if self._process.stdin.closed:
            raise InputError(f"{self._named}: {doing}: its process was ended before, in a call that took too long")
        try:
            self._process.stdin.write(written)
            self._process.stdin.flush()
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            raise InputError(
                f"{self._named}: {doing} took longer than {seconds:g} seconds and was ended"
                " (--reward_timeout); mend the function, or give it more"
            ) from None
        except BrokenPipeError:
            line = b""
        if not line:
            code = self._process.wait()
            raise InputError(f"{self._named}: {doing}: its process ended with the exit code {code}")
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(f"{self._named}: {self.told(answer)}")
        return answer


def _read(stream: Any, answers: "queue.Queue[bytes]") -> None:
    for line in stream:
        answers.put(line)
    answers.put(b"")


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.stdin is not None, "it is a pipe"
    with contextlib.suppress(OSError):  # what was not sent
        process.stdin.close()


class PythonFunction:
    """A function of a Python file: loaded once. Its exceptions come back as one line that names file and line."""

    everywhere = False

    def __init__(self, spec: str, timeout: float | None = None, *, environment: Mapping[str, str] = os.environ):
        """`spec`: FILE.py:FUNCTION; `timeout`: seconds that a call may take; `environment`: of the process.

        Raises `InputError` for a file or function that cannot be used.
        """
        file, _, name = spec.rpartition(":")
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(f"--reward {spec}: {file} is no file")
        wanted = f"function {name}(prompts, responses)"
        self._spec, self._worker = spec, Worker(f"--reward {spec}", path, wanted, timeout, environment)
        self.identity = self._worker.identity
        self._taken, self._needed, self._welcome, self._all = set[str](), set[str](), set[str](), False
        self._like_trl = False
        if (parameters := self._worker.described["parameters"]) is not None:
            self._read_signature(name, parameters)

    def _read_signature(self, name: str, parameters: Sequence[Sequence[Any]]) -> None:
        """How it is called, and with which columns: those it needs, those it can do without, all others.

        `parameters`: (name, kind, has a default, as written) of each.
        """
        by_keyword = {p for p, kind, *_ in parameters if kind in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")}
        self._all = any(kind == "VAR_KEYWORD" for _, kind, *_ in parameters)
        self._like_trl = "completions" in by_keyword
        positional = [
            (p, has) for p, kind, has, _ in parameters if kind in ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")
        ]
        further = [(p, has) for p, kind, has, _ in parameters if kind == "KEYWORD_ONLY"]
        if self._like_trl:
            further += positional
            self._taken = {"prompts", "completions"} & by_keyword | ({"prompts"} if self._all else set())
        else:
            if len(positional) < 2 and not any(kind == "VAR_POSITIONAL" for _, kind, *_ in parameters):
                written = ", ".join(p[3] for p in parameters)
                raise InputError(
                    f"--reward {self._spec}: {name}({written}) cannot be called; write {name}(prompts, responses) or"
                    f" {name}(prompts, responses, **columns), or, as TRL, {name}(completions, **columns)"
                )
            self._taken = {p for p, _ in positional[:2]}
            further = [*positional[2:], *further]
        for parameter, has in further:
            if parameter not in self._taken:
                (self._welcome if has else self._needed).add(parameter)

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` where the rows of `prompts` lack a column that the function must be given."""
        there = {name for prompt in prompts for name in prompt.columns}
        missing = sorted(self._needed - there)
        if missing and self._like_trl and missing[0] in TRLS_OWN:
            raise InputError(f"--reward {self._spec}: takes {missing[0]!r}, which TRL alone gives; do without it")
        if missing:
            raise InputError(
                f"--reward {self._spec}: takes {missing[0]!r}, which is no column of the prompts; they have"
                f" {', '.join(sorted(there)) or 'none beside the prompt'}"
            )

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        """What the function gives. Raises `InputError` for its exceptions, and for a call that takes too long."""
        there = {name for prompt in prompts for name in prompt.columns}
        wanted = self._needed | (there - self._taken if self._all else there & self._welcome)
        named: dict[str, Any] = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(wanted)}
        positional: list[Any] = []
        if self._like_trl:
            named["completions"] = [
                [{"role": "assistant", "content": text}] if prompt.conversational else text
                for prompt, text in zip(prompts, responses, strict=True)
            ]
            if "prompts" in self._taken:
                named["prompts"] = [prompt.as_in_trl for prompt in prompts]
        else:
            positional = [[prompt.plain for prompt in prompts], list(responses)]
        request = {"positional": positional, "named": named}
        return self._worker.ask(request, f"scoring {len(responses)} responses")["scores"]
