"""A second judge beside that of AI feedback: it rates the same responses, decides nothing, and is compared with it.

beside.rows.jsonl                the responses that have a score of the first judge, whose scores stand for people's
beside.jsonl                     what the second says of them, as `dpo-jax judge`
beside.jsonl.agreement.json      how far the two agree
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_jax.commands.judge import judge
from dpo_jax.config import FilesConfig, JudgeRun, MeshConfig
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import read_lines, write_lines
from dpo_jax.files.stages import Figures, Stage
from dpo_jax.judge.asked.judge_reward import PREFIX, read_judge
from dpo_jax.judge.rewards.functions import check_reward
from dpo_jax.report import feedback as feedback_report


class SecondJudge:
    """What --beside names.

    Attributes:
      agreement: the file that it makes last.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        mesh: MeshConfig,
        check_model: Callable[[str | None], None],
        reward_timeout: float | None,
    ):
        """Args: the option; the folder of all stages; devices of a model; raises `InputError` for what is no model;
        `--reward_timeout`, of a function that takes it.

        Raises `InputError` for what is no judge of several responses; nothing is asked yet.
        """
        self._name, self._rows = name, out / "beside.rows.jsonl"
        self.agreement = out / "beside.jsonl.agreement.json"
        told: dict[str, Any] = {"data": FilesConfig(str(self._rows)), "out": str(out / "beside.jsonl")}
        told |= {"agreement": True}
        if name.startswith(PREFIX):
            found = read_judge(name, "--beside")
            if found.settled.ask == "pair":
                kinds = "list, rating, expected and checklist rate several responses"
                raise InputError(f"--beside {name}: asks pair; {kinds}")
            with self._named():
                check_model(found.model)
                devices = {} if found.model is None else {"mesh": mesh}
                self._run = dataclasses.replace(found, **told, **devices, cache=str(out / "replies"))
            return
        with self._named():
            self._run = JudgeRun(**told, function=name, mesh=mesh, reward_timeout=reward_timeout)
            check_reward(name, self._run)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors by the name that the option has here; `dpo-jax judge` calls a function --reward or --function."""
        try:
            yield
        except InputError as error:
            told = str(error)
            for option in ("--reward", "--function"):
                told = told.removeprefix(f"{option} {self._name}: ")
            raise InputError(f"--beside {self._name}: {told}") from error

    def stage(self, data: Path) -> Stage:
        """It rates the responses of `data`, a file in UltraFeedback's schema."""
        return Stage(
            "a judge beside", (data, self._name.removeprefix(PREFIX)), self.agreement, lambda: self._rate(data)
        )

    def told(self) -> dict[str, str | int]:
        """For the report."""
        return feedback_report.agreement(self._name, json.loads(self.agreement.read_text()))

    def _rate(self, data: Path) -> Figures:
        rows = []
        for row in read_lines(data):
            some = [one for one in row["completions"] if one["fine-grained_score"] is not None]
            if len(some) > 1:
                asked = row.get("instruction", row.get("messages"))
                scores = [one["fine-grained_score"] for one in some]
                rows.append({"prompt": asked, "responses": [one["response"] for one in some], "scores": scores})
        if not rows:
            raise InputError(
                f"--beside {self._name}: the first judge scored no two responses of a prompt: nothing to rate"
            )
        write_lines(self._rows, rows)
        with self._named():
            judge(self._run)
        found = json.loads(self.agreement.read_text())
        return {"pairs of responses": found["pairs"], "without a verdict": found["unparsed"]}
