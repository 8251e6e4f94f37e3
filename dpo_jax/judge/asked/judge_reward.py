"""A judge as a reward: `--reward judge:FILE.yaml`, whose file holds options of `dpo-jax judge`.

    endpoint: {url: "http://127.0.0.1:8000/v1", model: M}     or     model: FOLDER
    ask: rating                                               (or expected, list, checklist)

A response whose reply has no reading, twice, has no score: nan, for which PPO stops and rejection sampling leaves the
response out. Under `list` the responses to one prompt that are judged in one call share a question. Replies are kept
beside the run, in OUT.replies, so that what goes on asks nothing twice.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.complete.asking.answers import Asker, open_asker, weights_of
from dpo_jax.complete.asking.reply_cache import key_of
from dpo_jax.complete.asking.yaml_options import fields_of, read_yaml
from dpo_jax.config import JudgeRun
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError, naming
from dpo_jax.judge.asked.judge_prompts import JudgePrompt, our_prompt, read_prompt
from dpo_jax.judge.asked.judging import Item, judge
from dpo_jax.weights.opened import open_checkpoint

log = logging.getLogger(__name__)

PREFIX = "judge:"
OPTIONS = (
    *("ask", "prompts", "prompt_name", "language", "scale", "criteria", "model", "template", "date"),
    *("batch_size", "dtype", "seed", "endpoint", "sample"),
)
"""Of `dpo-jax judge`, those that decide a score; data and files are the run's."""


def prompt_of(run: JudgeRun) -> JudgePrompt:
    """What a judge is asked. Raises `InputError` for a file or name that is none."""
    if run.prompts is not None:
        return read_prompt(run.prompts, str(run.prompt_name))
    return our_prompt(run.settled.ask, run.settled.language, run.scale)


class JudgeReward:
    """Scores of responses by an endpoint or a model that answers questions.

    Attributes:
      identity: a hash of all that decides a score; the weights of a model of this machine among it.
      everywhere: for a model of this machine; an endpoint is asked by process 0.
    """

    def __init__(self, option: str, out: str):
        """`option`: judge:FILE.yaml; `out`: the run folder. Raises `InputError` for what cannot be a reward."""
        self._option, self._run = option, read_judge(option)
        self._open = partial(open_asker, self._run, Path(f"{out}.replies").expanduser())
        self._asker: Asker | None = None
        with naming(f"--reward {option}"):
            self._prompt = prompt_of(self._run)
            if self._prompt.ask == "pair":
                raise InputError("asks for a verdict on two responses, which is no score; ask rating, expected or list")
            if self._run.model is not None:
                open_checkpoint(self._run.model)
            else:
                self._asker = self._open(None)
        self.everywhere = self._run.model is not None
        self.identity = self._identity(self._run.model)

    def _identity(self, weights: str | None) -> str:
        run = self._run
        endpoint = [getattr(run.endpoint, name) for name in ("url", "model", "temperature", "top_p", "max_tokens")]
        asked = {"prompt": self._prompt.version, "criteria": run.criteria, "seed": run.seed}
        local = [run.template, run.date, run.dtype, asdict(run.sample)] if weights is not None else []
        return f"a judge with the hash {key_of({**asked, 'endpoint': endpoint, 'weights': weights, 'local': local})}"

    @property
    def opened(self) -> bool:
        """Whether it can be asked; else `open` comes first."""
        return self._asker is not None

    def open(self, mesh: Mesh) -> "JudgeReward":
        """Read the model of this machine onto `mesh`. Raises `InputError` for one that cannot be read."""
        with naming(f"--reward {self._option}"):
            if jax.process_count() > 1:
                raise InputError("a model of this machine judges in one process; take an endpoint")
            self._asker = self._open(mesh)
            self.identity = self._identity(weights_of(self._asker))
        return self

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        """Scores float64 [N], nan where a reply has no reading. Raises `InputError` for what the asker raises."""
        assert self._asker is not None, "open() came first"
        groups = [[i] for i in range(len(responses))]
        if self._prompt.ask == "list":
            of_prompt: dict[str, list[int]] = {}
            for i, prompt in enumerate(prompts):
                of_prompt.setdefault(repr((prompt.messages, _reference(prompt))), []).append(i)
            groups = list(of_prompt.values())
        items = [
            Item(number, prompts[group[0]].messages, tuple(responses[i] for i in group), _reference(prompts[group[0]]))
            for number, group in enumerate(groups, 1)
        ]
        scores, run = np.full(len(responses), np.nan), self._run
        with naming(f"--reward {self._option}"):
            found = judge(items, self._prompt, self._asker, seed=run.seed, criteria=run.criteria)
        for group, one in zip(groups, found, strict=True):
            scores[group] = [np.nan if score is None else score for score in one.scores]
        if missing := int(np.isnan(scores).sum()):
            log.warning(
                "%s: %d of %d responses got no score: no reading of the replies", self._option, missing, len(scores)
            )
        return scores


def _reference(prompt: Prompt) -> str | None:
    found = prompt.columns.get("reference")
    return found if isinstance(found, str) else None


def read_judge(option: str, name: str = "--reward") -> JudgeRun:
    """The options in FILE.yaml of judge:FILE.yaml, checked as those of `dpo-jax judge`.

    `name`: of the option, for messages.

    Raises `InputError` for a file that is none, an unknown key, a value of another kind, or options that do not go
    together.
    """
    try:
        fields = fields_of(JudgeRun, read_yaml(option.removeprefix(PREFIX)), "", OPTIONS)
        # Neither has a meaning here: rows and scores are the run's.
        return JudgeRun(data="(the run's)", out="(the run's)", **fields)  # pyright: ignore[reportArgumentType]
    except InputError as error:
        raise InputError(f"{name} {option}: {without_dashes(error)}") from error


def without_dashes(error: InputError) -> str:
    """What is wrong with options of a file, where they stand without the dashes of a command's."""
    return re.sub(r"(?<![\w-])--(?=[a-z])", "", str(error))
