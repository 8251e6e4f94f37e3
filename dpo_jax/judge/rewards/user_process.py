"""The process that a reward function of the user runs in; `judge/rewards/user_code.py` starts it and speaks with it.

It is run as a script, reads the standard library alone, and speaks lines of JSON: requests on what was its stdin,
answers on what was its stdout. What the function prints goes to stderr line by line, and its own stdin is empty.

The process that started it may die at any time. On Linux the kernel then ends this one, whatever the function is at;
elsewhere it ends when its requests do, as soon as Python runs another thread (never inside of a C function that keeps
the interpreter's lock). What the function itself started is not ended with it.
"""

import base64
import ctypes
import datetime
import decimal
import importlib.util
import inspect
import io
import json
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

KIND = "\0kind"
"""Key of an object that stands for a value that JSON has none for."""
_PR_SET_PDEATHSIG = 1


def encoded(value: Any) -> Any:
    """`default` of `json.dumps`: what columns of Parquet files hold beside JSON's values."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return {KIND: type(value).__name__, "value": value.isoformat()}
    if isinstance(value, decimal.Decimal):
        return {KIND: "Decimal", "value": str(value)}
    if isinstance(value, bytes):
        return {KIND: "bytes", "value": base64.b64encode(value).decode()}
    return value.tolist() if hasattr(value, "tolist") else str(value)


def decoded(value: dict[str, Any]) -> Any:
    """`object_hook` of `json.loads`: the inverse of `encoded`."""
    kind = value.get(KIND)
    if kind in ("datetime", "date", "time"):
        return getattr(datetime, kind).fromisoformat(value["value"])
    if kind == "Decimal":
        return decimal.Decimal(value["value"])
    return base64.b64decode(value["value"]) if kind == "bytes" else value


def told(error: BaseException, path: Path) -> dict[str, Any]:
    """The exception, with the last line of the user's file that it went through."""
    own = path.resolve()
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if Path(at.filename).resolve() == own]
    if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename).resolve() == own:
        lines.append(error.lineno)
    what = " ".join(str(error).split())
    return {"error": f"{type(error).__name__}: {what}", "line": lines[-1] if lines else None}


def load(path: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """The function `name` of the file, or None, and what is answered: its parameters as (name, kind, has a default)."""
    found = importlib.util.spec_from_file_location("dpo_jax_reward_of_the_user", path)
    assert found is not None, "a file that ends in .py has a loader"
    assert found.loader is not None, "likewise"
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses of the file look themselves up there
    found.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        return None, {"absent": True}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return function, {"parameters": None}  # of a function in C nobody knows
    kinds = [(p.name, p.kind.name, p.default is not p.empty, str(p)) for p in parameters]
    return function, {"parameters": kinds}


def numbers(found: Any) -> Any:
    """What a function gave as JSON's values: arrays as lists, and a text in place of what is no number."""
    found = found.tolist() if hasattr(found, "tolist") else found
    if isinstance(found, list | tuple):
        return [numbers(one) for one in found]
    if found is None or isinstance(found, int | float):
        return found
    try:
        return str(found) if isinstance(found, str | bytes | dict) else float(found)
    except (TypeError, ValueError):
        return f"{type(found).__name__} {found}"[:80]


def played(make: Any, episodes: dict[int, Any], request: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """What environments answer: one object of the user's class `make` an episode, each by its number.

    `request["play"]` is the method, `reset` (which begins episodes, and forgets those before) or `step`, and
    `request["episodes"]` has (number, what it is given) of each. An exception is the answer of its episode alone.
    """
    answers: list[dict[str, Any]] = []
    if request["play"] == "reset":
        episodes.clear()
    for number, given in request["episodes"]:
        try:
            if request["play"] == "reset":
                episodes[number] = make()
            found = getattr(episodes[number], request["play"])(given)
            answers.append({"found": json.loads(json.dumps(found, default=encoded))})
        except (Exception, SystemExit) as error:
            answers.append(told(error, path))
    return answers


def serve(requests: "queue.Queue[str]", answers: Any) -> None:
    """Answer one request after another; in the main thread, where alarms work."""

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    path, function, episodes = Path(), None, dict[int, Any]()
    while True:
        request = json.loads(requests.get(), object_hook=decoded)
        try:
            if "load" in request:
                if request["parent"] is not None:
                    die_with(request["parent"])
                path, sys.path[:] = Path(request["load"]), request["sys_path"]
                function, described = load(path, request["name"])
                answer(**described)
            elif "play" in request:
                assert function is not None, "it was loaded"
                answer(played=played(function, episodes, request, path))
            else:
                assert function is not None, "it was loaded"
                answer(scores=numbers(function(*request["positional"], **request["named"])))
        except (Exception, SystemExit) as error:
            answer(**told(error, path))


def die_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it ends, or end it now where that has happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


def main() -> None:
    """Serve until stdin ends."""
    # Both pipes are copied to descriptors that no process inherits: what the function starts finds neither.
    source, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # it may be ended at any time
    requests: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in source:
            requests.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    serve(requests, answers)


if __name__ == "__main__":
    main()
