"""How a command talks to whoever waits for it, on stderr (stdout is for results).

lines   notes, progress and faults as people read them;
quiet   warnings and faults only (`--quiet`);
json    everything as JSON objects, one a line (`--json`), with what it is as "event": note, warning, progress, error.
"""

import codecs
import io
import json
import logging
import math
import os
import sys
import warnings
from typing import Any, Literal

Mode = Literal["lines", "quiet", "json"]

_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""Variables by which libraries are asked for no bars and no remarks of their own."""

_ESCAPED = "dpo_jax.escaped"  # the name by which Python's encoders know `_escaped`

_mode: Mode = "lines"


def mode() -> Mode:
    """How the running command talks."""
    return _mode


def talk(how: Mode) -> None:
    """Talk so from now on."""
    global _mode
    _mode = how


def shows_bars() -> bool:
    """Whether bars that other libraries draw may stand: on a terminal, where people read."""
    return _mode == "lines" and sys.stderr.isatty()


def say(text: str, event: Literal["note", "warning", "error"] = "note", **more: Any) -> None:
    """One line. `more`: what a JSON object says beside it. Raises `OSError` where stderr cannot be written."""
    if _mode == "json":
        tell({"event": event, "text": text, **more})
    elif _mode == "lines" or event != "note":
        print(text, file=sys.stderr, flush=True)


def tell(what: dict[str, Any]) -> None:
    """One JSON object; what is no number (a diverged loss) is null. Raises `OSError` where stderr cannot be written."""
    print(json.dumps(_finite(what), ensure_ascii=False, allow_nan=False), file=sys.stderr, flush=True)


def spell_out() -> None:
    """From now on stdout and stderr take any text: what their encoding has no bytes for (half of a surrogate pair,
    Chinese in ASCII) is spelled out as JSON spells it, \\ud83d."""
    codecs.register_error(_ESCAPED, _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPED)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)), error.end


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Notes(logging.Handler):
    """Says what is logged. (`StreamHandler` keeps the stderr of its first day, and writes into a running bar.)"""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record), "note" if record.levelno < logging.WARNING else "warning")


def listen(*libraries: str) -> None:
    """Say what the package logs, and warnings of `libraries`. With --json and --quiet Python's warnings too, and ask
    the libraries for nothing more.

    For the command line, before anything else is imported: what asks the environment asks it then.
    """
    for name, level in (("dpo_jax", logging.INFO), *((name, logging.WARNING) for name in libraries)):
        notes = logging.getLogger(name)
        if not any(isinstance(handler, Notes) for handler in notes.handlers):
            notes.addHandler(Notes())
            notes.propagate = False  # importing orbax gives the root logger a handler, which would say every note twice
            notes.setLevel(level)
    # Orbax tells of every file of a checkpoint, and logs a failed one several times before it raises it; so do the
    # event loop and the thread pool in which it writes, for each of the other files.
    for name in ("absl", "asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if _mode != "lines":
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}", "warning")
