"""How a command talks to whoever waits for it, on stderr (stdout is for results).

lines   notes, progress and faults as people read them;
quiet   warnings and faults only (`--quiet`);
json    everything as JSON objects, one a line (`--json`), with what it is as "event": note, warning, progress, error.
"""

import json
import sys
from typing import Any, Literal

Mode = Literal["lines", "quiet", "json"]

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
    """One JSON object. Raises `OSError` where stderr cannot be written."""
    print(json.dumps(what, ensure_ascii=False), file=sys.stderr, flush=True)
