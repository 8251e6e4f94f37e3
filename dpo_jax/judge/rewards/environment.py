"""An environment that the policy talks with: FILE.py:NAME, a class of the user's own.

    class NAME:                                    # an object of its own for each episode, made without arguments
        def reset(self, row): return messages      # [{"role": ..., "content": ...}, ...]: what the model answers first
        def step(self, messages): return messages, reward, done

`row` holds the columns of a row of `--data`, its `prompt` among them. `step` is given the whole conversation so far, of
which the last message is the model's, and returns what it says next (the new messages alone; none where the episode is
done), a number, and whether the episode is done. Rewards of an episode are added.

The class runs in a process of its own, as reward functions do (`judge/rewards/user_code.py`), which is ended where a
call for all episodes of a turn takes too long. That is no sandbox. Of a run's processes the first one's plays.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.data.rows.messages import Message, messages_of
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.user_code import Worker
from dpo_jax.judge.rewards.user_process import KIND
from dpo_jax.processes import distributed

OPTION = "--environment"
LARGEST = float(np.finfo(np.float32).max)
"""Of rewards, and of their sum in an episode."""


class Step(NamedTuple):
    """What an environment answers a turn of the model with."""

    messages: tuple[Message, ...]
    reward: float
    done: bool


class Failed(NamedTuple):
    """An episode in which the environment went wrong, and how, in one line."""

    why: str


class Environment:
    """Plays many episodes at once."""

    def __init__(self, spec: str, timeout: float | None = None, *, environment: Mapping[str, str] = os.environ):
        """`spec`: FILE.py:NAME; `timeout`: seconds that a call may take; `environment`: of the process.

        Raises `InputError` for a file or class that cannot be used.
        """
        file, colon, name = spec.rpartition(":")
        path = Path(file).expanduser()
        if not colon or path.suffix != ".py" or not path.is_file():
            raise InputError(f"{OPTION} {spec}: {file or spec} is no file of Python; write FILE.py:NAME")
        wanted = f"class {name} with reset(row) and step(messages)"
        self._worker = Worker(f"{OPTION} {spec}", path, wanted, timeout, environment)
        self.identity = self._worker.identity

    def reset(self, prompts: Sequence[Prompt]) -> list[tuple[Message, ...] | Failed]:
        """The first messages of an episode of each row, numbered from 0; those of before are forgotten."""
        rows = [(i, {**prompt.columns, "prompt": prompt.plain}) for i, prompt in enumerate(prompts)]
        return [self._messages(found, "reset") for found in self._play("reset", rows)]

    def step(self, turns: Sequence[tuple[int, Sequence[Message]]]) -> list[Step | Failed]:
        """What the environments of some episodes, by their numbers, say to the conversations so far."""
        given = [(i, [message.as_dict() for message in messages]) for i, messages in turns]
        return [self._step(found) for found in self._play("step", given)]

    def _play(self, method: str, episodes: Sequence[tuple[int, Any]]) -> list[dict[str, Any]]:
        request = {"play": method, "episodes": list(episodes)}
        # Of several processes one plays: another answer elsewhere would be another prompt of the sampler there.
        doing = f"{method} of {len(episodes)} episodes"
        return distributed.json_from_main(lambda: self._worker.ask(request, doing))["played"]

    def _messages(self, answer: Mapping[str, Any], method: str, *, none: bool = False) -> Any:
        """The messages that `answer` holds, of which the last is not the model's; a `Failed`."""
        if "error" in answer:
            return Failed(self._worker.told(answer))
        found = answer["found"]
        if not isinstance(found, list):
            return Failed(f"{method} gave {_kind(found)} in place of a list of messages")
        if not found and none:
            return ()
        try:
            messages = messages_of(found, method)
        except BadRow as problem:
            return Failed(f"{method}: {problem}")
        if messages[-1].role == "assistant":
            return Failed(f"{method} gave a message of the assistant last, which is the model's to write")
        return messages

    def _step(self, answer: Mapping[str, Any]) -> Step | Failed:
        if "error" in answer:
            return Failed(self._worker.told(answer))
        found = answer["found"]
        if not isinstance(found, list) or len(found) != 3:
            return Failed(f"step gave {_kind(found)} in place of (messages, reward, done)")
        said, reward, done = found
        if not isinstance(done, bool):
            return Failed(f"step gave {_kind(done)} for done in place of True or False")
        if not isinstance(reward, int | float) or not abs(reward) <= LARGEST:
            return Failed(f"step gave {reward!r:.40} for a reward, which is no finite number of float32")
        messages = self._messages({"found": said}, "step", none=done)
        return messages if isinstance(messages, Failed) else Step(messages, float(reward), done)


def _kind(value: Any) -> str:
    if isinstance(value, dict) and KIND in value:  # what JSON has none for
        return str(value[KIND])
    return "None" if value is None else f"{type(value).__name__} {value!r:.40}"
