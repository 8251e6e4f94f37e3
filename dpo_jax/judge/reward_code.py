"""A reward that is the user's own code: FILE.py:FUNCTION.

    def function(prompts, responses, COLUMN, ..., **columns): return [a number for each response]

A prompt is a text, or [{"role": ..., "content": ...}, ...] where its row holds several messages. As in TRL, further
parameters are columns of the prompts' file: a parameter of that name, or each column under `**columns`, gets a list
with one value a response (None where its row has none), such as the right answers that responses are compared with.
"""

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError


class PythonFunction:
    """A function of a Python file: loaded once. Its exceptions come back as one line that names file and line."""

    everywhere = False

    def __init__(self, spec: str):
        """`spec`: FILE.py:FUNCTION. Raises `InputError` for a file or function that cannot be used."""
        file, _, name = spec.rpartition(":")
        self._path = path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(f"--reward {spec}: {file} is no file")
        self._spec = spec
        self.identity = f"{name} of a file with the hash {hashlib.sha256(path.read_bytes()).hexdigest()}"
        found = importlib.util.spec_from_file_location("dpo_jax_reward_of_the_user", path)
        assert found is not None, "a file that ends in .py has a loader"
        assert found.loader is not None, "likewise"
        module = importlib.util.module_from_spec(found)
        try:
            sys.modules[found.name] = module  # dataclasses of the file look themselves up there
            found.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise self._told(error) from error
        function = getattr(module, name, None)
        if not callable(function):
            raise InputError(f"--reward {spec}: {file} has no function {name}(prompts, responses)")
        self._function: Callable[..., Any] = function
        self._read_signature(name)

    def _read_signature(self, name: str) -> None:
        """Which columns it wants: those it needs, those it can do without, and whether it takes all others."""
        self._taken, self._needed, self._welcome, self._all = set[str](), set[str](), set[str](), False
        try:
            parameters = list(inspect.signature(self._function).parameters.values())
        except (TypeError, ValueError):
            return  # of a function in C nobody knows; it is called with prompts and responses
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 2 and not any(p.kind == p.VAR_POSITIONAL for p in parameters):
            written = ", ".join(map(str, parameters))
            raise InputError(
                f"--reward {self._spec}: {name}({written}) cannot be called; write {name}(prompts, responses) or"
                f" {name}(prompts, responses, **columns)"
            )
        self._taken = {p.name for p in positional[:2]}
        for p in (*positional[2:], *(p for p in parameters if p.kind == p.KEYWORD_ONLY)):
            (self._needed if p.default is p.empty else self._welcome).add(p.name)
        self._all = any(p.kind == p.VAR_KEYWORD for p in parameters)

    def check_columns(self, prompts: Sequence[Prompt]) -> None:
        """Raise `InputError` where the rows of `prompts` lack a column that the function must be given."""
        there = {name for prompt in prompts for name in prompt.columns}
        missing = sorted(self._needed - there)
        if missing:
            raise InputError(
                f"--reward {self._spec}: takes {missing[0]!r}, which is no column of the prompts; they have"
                f" {', '.join(sorted(there)) or 'none beside the prompt'}"
            )

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        """What the function gives. Raises `InputError` for its exceptions."""
        there = {name for prompt in prompts for name in prompt.columns}
        wanted = self._needed | (there - self._taken if self._all else there & self._welcome)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in sorted(wanted)}
        try:
            return self._function([prompt.plain for prompt in prompts], list(responses), **columns)
        except (Exception, SystemExit) as error:
            raise self._told(error) from error

    def _told(self, error: BaseException) -> InputError:
        """The exception in one line, with the last line of the user's file that it went through."""
        own = self._path.resolve()
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if Path(at.filename).resolve() == own]
        if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename).resolve() == own:
            lines.append(error.lineno)
        where = f"{self._path}, line {lines[-1]}: " if lines else ""
        what = " ".join(str(error).split())
        return InputError(f"--reward {self._spec}: {where}{type(error).__name__}: {what}")
