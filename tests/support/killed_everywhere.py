"""A command of several stages, killed by SIGKILL once in each of them, and begun again.

    python killed_everywhere.py LOG MOMENT WORDS...      WORDS: of dpo-jax

Every start is a fork of one process that has read the modules, and has not begun to compute (`killing.py`). A stage
that trains is killed when its first checkpoint is there. Another one is killed, where MOMENT is `rows`, when the first
rows of its file are on the disk, and else, or where it writes none, when its work is done and not yet recorded. Stages
within a stage (AI feedback's, within Zephyr's) are stages too. LOG: a line for each stage that was killed, with its
output. Reports are written without pictures.
"""

import dataclasses
import gc
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import killing
import undrawn

from dpo_jax import cli
from dpo_jax.config.command_line.words import COMMANDS
from dpo_jax.files import stages
from dpo_jax.report import html

LIMIT = 400
"""Starts, at most."""


def _killed(log: Path) -> set[str]:
    return set(log.read_text().splitlines()) if log.exists() else set()


def _dying(stage: stages.Stage, log: Path, moment: str) -> stages.Stage:
    """The stage, which ends this process unless LOG says that it has done so before."""
    name = f"{stage.name} -> {stage.output}"

    def told() -> None:
        with log.open("a") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        killing.die()

    def watch(done: threading.Event) -> None:
        checkpoint = stage.output / "checkpoints" / "1"
        part = stage.output.with_name(f"{stage.output.name}.part")
        while not done.is_set():
            if checkpoint.is_dir() or (moment == "rows" and part.exists() and part.read_bytes().count(b"\n") > 1):
                told()
            time.sleep(0.001)

    def work() -> Mapping[str, Any]:
        if name in _killed(log):
            return stage.work()
        done = threading.Event()
        threading.Thread(target=watch, args=(done,), daemon=True).start()
        figures = stage.work()
        done.set()
        if name not in _killed(log):
            told()
        return figures

    return dataclasses.replace(stage, work=work)


def _run(words: Sequence[str], log: Path, moment: str) -> int:
    perform: Callable[..., None] = stages.Stages.perform

    def dying(self: stages.Stages, own: Sequence[stages.Stage], *more: Any, **named: Any) -> None:
        perform(self, [_dying(stage, log, moment) for stage in own], *more, **named)

    stages.Stages.perform = dying  # pyright: ignore[reportAttributeAccessIssue]
    # As for the run that nobody kills; the card's picture is in none of the compared files.
    html._svg, html.png_of = undrawn.svg, undrawn.png
    return cli.main(list(words))


def main(argv: Sequence[str]) -> int:
    """The exit code of the last start. Fails where one ends by itself, and not well."""
    log, moment, words = Path(argv[0]), argv[1], argv[2:]
    importlib.import_module("dpo_jax.commands." + COMMANDS[" ".join(words[:2])].function.partition(":")[0])
    gc.freeze()  # modules and programs' traces live as long as the process, which collects what it can seldom
    gc.set_threshold(20_000, 10, 10)
    for _ in range(LIMIT):
        before = len(_killed(log))
        ended = killing.forked(lambda: _run(words, log, moment))
        if not ended.killed:
            return ended.code
        assert len(_killed(log)) == before + 1, "it was killed by another"
    return 71


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
