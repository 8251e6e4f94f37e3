"""How many calls does one value make on its way through the package? Counted from the source text, or in a run.

    python tests/support/calls.py dpo_jax --start dpo_jax/commands/dpo.py:train:config        # from the text
    python tests/support/calls.py dpo_jax --trace config dpo                             # in a run
    python tests/support/calls.py dpo_jax --trace source dpo generate eval

A *call* is a place in the package (caller, line) where a function of the package is called with the value: as an
argument, or as the object whose method or property it is. The same place counts once, however often it runs. Printed:

    calls      such places
    functions  that were called so, and the files they stand in
    returns    how often the value comes back into a file that it had left, in the order in which places are first met

From the text (`--start FILE:FUNCTION:PARAMETER`; several are taken together; `PARAMETER.attribute` follows the
attribute alone). The value is the parameter, an attribute of it, a local name for either, a copy by
`dataclasses.replace`, `str`, `Path`; it is followed through arguments, constructors, fields of the objects made of it,
keyword dictionaries, and what functions return. Names are resolved through imports; a method by its class where the
receiver is `self`, `cls` or a class, else where one class alone has a method of that name. What is called through a
variable is not seen, and every branch counts.

In a run (`--trace`): the named commands run on tiny inputs (`bits_inputs.py`) under `sys.setprofile`. `config`: the
command's dataclass of options, or one of its sections, from the moment the command has it. `source`: the path that
`--model` named, as text or `Path`, or an object of the package that holds it in a field. Only what ran counts, and
nothing is missed: this is the figure to take.
"""

import argparse
import dataclasses
import inspect
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from calls_text import Journey, Package, from_text

# ---------------------------------------------------------------- following it in a run

PAIRS = "--train.batch_size 4 --train.steps 2 --data.max_length 96 --data.buckets 1 --out out"
COMMANDS = {
    "dpo": f"dpo --model @model --data @pairs.jsonl --eval_data @eval.jsonl --lora.rank 2 {PAIRS}",
    "sft": f"sft --model @model --data @chat.jsonl {PAIRS}",
    "reward": f"reward --model @model --data @rated.jsonl {PAIRS}",
    "generate": "generate --model @model --prompts @prompts.jsonl --out out.jsonl --sample.max_new_tokens 4",
    "eval": "eval --model @model --data @eval.jsonl --out out.json --data.buckets 1 --data.max_length 96",
}


class Watcher:
    """Notes the calls of package functions that are given the value, from the first that has the command's options."""

    def __init__(self, package: Path, model: str, kind: str):
        self.name, self.folder, self.model, self.kind = package.name, f"{package}{os.sep}", model, kind
        self.journey, self.sections = Journey(), ()
        self.first, self.entry = f"{package}{os.sep}__main__.py", ""
        self._ours: dict[Any, bool] = {}
        self._holds: dict[type, bool] = {}

    def ours(self, code: Any) -> bool:
        """Whether code stands in the package."""
        if code not in self._ours:
            self._ours[code] = code.co_filename.startswith(self.folder)
        return self._ours[code]

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not self.ours(code) or not code.co_flags & inspect.CO_OPTIMIZED:  # bodies of modules
            return
        more = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        count = code.co_argcount + code.co_kwonlyargcount + more
        values = [frame.f_locals.get(name) for name in code.co_varnames[:count]]
        if not self.sections:
            self.begin(frame, values)
        if self.sections and any(self.is_it(value) for value in values):
            back = self.caller(frame)
            caller, line = ("(thread)", 0) if back is None else (self.label(back.f_code), back.f_lineno)
            self.journey.add(caller, line, self.label(code), code.co_filename.removeprefix(self.folder))

    def label(self, code: Any) -> str:
        """FILE:NAME of a function."""
        return f"{code.co_filename.removeprefix(self.folder)}:{code.co_qualname}"

    def room(self, file: str) -> str:
        """The top folder of the package that a file stands in."""
        return file.removeprefix(self.folder).partition(os.sep)[0]

    def caller(self, frame: FrameType) -> FrameType | None:
        """The nearest function of the package beneath a call; None at the bottom of a thread."""
        back = frame.f_back
        while back is not None and not self.ours(back.f_code):
            back = back.f_back
        return back

    def begin(self, frame: FrameType, values: list[Any]) -> None:
        """Learn the classes of options, once a function outside the command line and the options' own files has one."""
        file, back = frame.f_code.co_filename, self.caller(frame)
        if back is not None and back.f_code.co_name == "<module>" and back.f_code.co_filename == self.first:
            self.entry = file
        for value in values:
            own = type(value).__module__.startswith(f"{self.name}.")  # else a class that the command line made
            if self.entry and own and dataclasses.is_dataclass(value) and getattr(value, "model", None) == self.model:
                home = sys.modules[type(value).__module__].__file__ or ""
                if file != self.entry and self.room(file) != self.room(home):
                    self.sections = tuple(dict.fromkeys(classes(value)))

    def is_it(self, value: Any) -> bool:
        """Whether an argument is what is followed."""
        if self.kind == "config":
            return isinstance(value, self.sections)
        if isinstance(value, str | Path):
            return str(value) == self.model
        kind = type(value)
        if kind not in self._holds:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
            self._holds[kind] = file.startswith(self.folder) and not issubclass(kind, self.sections)
        if not self._holds[kind]:
            return False
        return any(isinstance(v, str | Path) and str(v) == self.model for v in getattr(value, "__dict__", {}).values())


def classes(value: Any) -> Iterator[type]:
    """The class of an instance of a dataclass, and of those in its fields."""
    if dataclasses.is_dataclass(value):
        yield type(value)
        for part in dataclasses.fields(value):
            yield from classes(getattr(value, part.name))


def traced(package: Path, kind: str, words: list[str], model: str) -> int:
    """Run one command in this process, watched; print the journey as JSON on the last line."""
    sys.path.insert(0, str(package.parent))
    watcher, code = Watcher(package, model, kind), 0
    sys.argv = [package.name, *words]
    threading.setprofile(watcher)
    sys.setprofile(watcher)
    try:
        runpy.run_module(package.name, run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    sys.setprofile(None)
    threading.setprofile(None)
    print(json.dumps([[*key, file] for key, file in watcher.journey.steps.items()]))
    return code


def in_a_run(package: Path, kind: str, command: str) -> Journey:
    """The journey in a run of the command on tiny inputs, in a process of its own."""
    import bits_inputs  # brings transformers, which the text does not need

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        bits_inputs.build(work / "inputs")
        words = [word.replace("@", f"{work}/inputs/") for word in COMMANDS[command].split()]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "DPO_JAX_CACHE": str(work / "cache")}
        environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "HF_HUB_OFFLINE": "1"}
        inner = [sys.executable, __file__, str(package), "--inside", kind, str(work / "inputs" / "model"), *words]
        done = subprocess.run(inner, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr[-2000:]}")
    journey = Journey()
    for caller, line, called, file in json.loads(done.stdout.splitlines()[-1]):
        journey.add(caller, line, called, file)
    return journey


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[1:2] == ["--inside"]:
        return traced(Path(words[0]), words[2], words[4:], words[3])
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("package", type=Path, help="the package's folder, dpo_jax")
    parser.add_argument("--start", nargs="+", default=[], metavar="FILE:FUNCTION:PARAMETER", help="count in the text")
    parser.add_argument("--trace", nargs="+", default=[], metavar="WORD", help="config or source, and commands to run")
    parser.add_argument("--list", action="store_true", help="show every call")
    options = parser.parse_args(words)
    package = options.package.resolve()
    found = [("text", " ".join(options.start), from_text(Package(package), options.start))] if options.start else []
    kind, *commands = options.trace or ["config"]
    if kind not in ("config", "source") or not set(commands) <= set(COMMANDS):
        parser.error(f"--trace config|source and commands of {' '.join(COMMANDS)}")
    found += [(f"run, {kind}", command, in_a_run(package, kind, command)) for command in commands]
    for how, what, journey in found:
        print(f"{how}: {what}: {journey}")
        if options.list:
            print(journey.listed())
    return 0


if __name__ == "__main__":
    sys.exit(main())
