"""What judges texts of `dpo-jax ppo` and `rejection`: functions of prompts and responses that give a number each, or
one for each step of a response (`judge/rewards/step_scores.py`).

vader and others of the package, KIND or KIND:WHAT: see `judge/rewards/shipped.py`
FILE.py:FUNCTION the user's own code, see `judge/rewards/user_code.py`. The file is executed.
http(s)://...    POST {"prompts": [...], "responses": [...]}, answered by {"scores": [...]}. A token, if one is
                 needed, comes from the environment variable DPO_JAX_REWARD_TOKEN and is sent as a bearer token.
judge:FILE.yaml  an endpoint or a model that is asked for a score, see `judge/asked/judge_reward.py`
anything else    a reward model: a folder, a hub id, or a run of ours
"""

import logging
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import httpx
import numpy as np
from jax.sharding import Mesh

from dpo_jax.complete.asking.http import RETRIED, checked_url, refusal, retry_after
from dpo_jax.config import JudgedRun, JudgeRun, SafetyRun, is_url
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.data.tokens.chat_tokenizer import end_of
from dpo_jax.data.tokens.encode import ScoredEncoder
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.judge.asked.judge_reward import PREFIX, JudgeReward
from dpo_jax.judge.reward_model import RewardModel, check_score
from dpo_jax.judge.rewards.command import Command
from dpo_jax.judge.rewards.shipped import OfColumn, shipped
from dpo_jax.judge.rewards.step_scores import Steps, split
from dpo_jax.judge.rewards.user_code import PythonFunction
from dpo_jax.model.quantised import kind_of
from dpo_jax.processes import distributed
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.tokenizer import check_vocabulary

log = logging.getLogger(__name__)

TOKEN = "DPO_JAX_REWARD_TOKEN"
ATTEMPTS, FIRST_WAIT = 5, 1.0
"""Of an HTTP reward; the wait in seconds doubles from one attempt to the next."""
TRIAL = "Yes, that is so."
"""The response that a function of the user is tried out with."""


class RewardFunction(Protocol):
    """Prompts and responses in, a number for each response out.

    Attributes:
      identity: changes when the function does; a checkpoint goes on with the same one only.
      everywhere: whether every process must call it together (it computes on the mesh); else process 0 does.
    """

    identity: str
    everywhere: bool

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any: ...


class Endpoint:
    """Scores from a server. What may pass (no connection, a time-out, an overload) is tried again, then told."""

    everywhere = False

    def __init__(self, url: str, timeout: float, *, first_wait: float = FIRST_WAIT):
        checked_url(url, "--reward", TOKEN)
        self.identity, self._url, self._first_wait = url, url, first_wait
        self._timeout = timeout
        token = os.environ.get(TOKEN)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        answer = self._ask({"prompts": [prompt.plain for prompt in prompts], "responses": list(responses)})
        try:
            return answer.json()["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'--reward {self._url}: the answer is not {{"scores": [...]}}: {answer.text[:80]}'
            ) from error

    def _ask(self, body: dict[str, Any]) -> httpx.Response:
        reason, asked = "", None
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self._first_wait * 2 ** (attempt - 1) if asked is None else min(asked, self._timeout))
            asked = None
            try:
                answer = httpx.post(self._url, json=body, headers=self._headers, timeout=self._timeout)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == httpx.codes.OK:
                return answer
            reason, asked = refusal(answer), retry_after(answer.headers)
            if answer.status_code not in RETRIED:
                raise InputError(f"--reward {self._url}: {reason}")
        raise InputError(
            f"--reward {self._url}: no answer after {ATTEMPTS} attempts ({reason}); when the server is back the same"
            " command goes on from the last checkpoint"
        )


class ModelReward:
    """A reward model as a judge of texts, with its own tokenizer and, but for raw texts, its own chat template.

    The score is read at the last token of the rendered template, where the model was trained to give it: every response
    is closed, a blank one and one that was cut at its longest too. What a response spells is text: a policy may write
    anything. Of prompt and response together the end is kept, as far as the model's context goes.
    """

    everywhere = True

    def __init__(self, source: str, *, raw: bool, date: str | None = None, **setting: Any):
        """`raw`: prompt and response are one text; `date`: what day it is; `setting`: as for `RewardModel.load`."""
        place = open_checkpoint(source)
        self._model, tokenizer = RewardModel.load(place, **setting), place.tokenizer()
        self.variables = self._model.variables
        check_vocabulary(tokenizer, self._model.model.config)
        self._encoder, self._raw = ScoredEncoder(tokenizer, RAW if raw else None, date), raw
        self.identity = fingerprint(self._model.variables)

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
        whole = [self._ids(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        longest = self._model.model.config.max_position
        if cut := sum(len(ids) > longest for ids in whole):
            log.warning(
                "the reward model's context of %d tokens holds the end only of %d of %d texts", longest, cut, len(whole)
            )
        found = [end_of(np.asarray(ids, np.int32), longest, self._encoder.bos).tolist() for ids in whole]
        return self._model.score_tokens([ids[:1] for ids in found], [ids[1:] for ids in found])

    def _ids(self, prompt: Prompt, response: str) -> list[int]:
        if self._raw:
            assert prompt.text is not None, "rows without a text were refused"
            return self._encoder.whole_ids(prompt.text, response)
        return self._encoder.whole_ids(prompt.messages, response)


def open_reward(judge: str, config: JudgedRun, *, mesh: Mesh, batch_size: int) -> RewardFunction:
    """The function that `judge` (`--reward` or `--safety_reward`) names; see the module.

    `mesh`, `batch_size`: where and how a reward model computes. Raises `InputError` for what cannot be opened.
    """
    function = check_reward(judge, config)
    if function is not None:
        return function
    if judge.startswith(PREFIX):
        return JudgeReward(judge, config.out).open(mesh)
    frozen = config.train.settled.frozen_dtype
    return ModelReward(
        judge,
        raw=config.data.template == RAW,
        date=config.data.date,
        mesh=mesh,
        batch_size=batch_size,
        dtype=frozen,
        compute_dtype=None if kind_of(frozen) is None else config.train.dtype,
        attention=config.train.attention,
    )


def check_reward(judge: str, config: JudgeRun | JudgedRun | SafetyRun) -> RewardFunction | None:
    """The function that `judge` names; None for a model, whose weights are not read yet.

    Raises `InputError` for what `open_reward` could not open.
    """
    if judge.startswith(PREFIX):
        asked = JudgeReward(judge, config.out or judge.removeprefix(PREFIX))
        return asked if asked.opened else None
    found = shipped(judge, timeout=config.reward_timeout, memory=config.reward_memory)
    if found is not None:
        return found
    if is_url(judge):
        return Endpoint(judge, config.settled.reward_timeout)
    if ".py:" in judge:
        return PythonFunction(judge, config.reward_timeout)
    if judge.endswith(".py"):
        raise InputError(f"--reward {judge}: which function of the file? write {judge}:FUNCTION")
    try:
        check_score(judge, open_checkpoint(judge).architecture)
    except InputError as error:
        known = "vader, length, those with a colon (docs/rewards.md), FILE.py:FUNCTION, judge:FILE.yaml, a URL"
        raise InputError(f"--reward {judge}: is none of {known}, and as a reward model: {error}") from error
    return None


def try_out(
    function: RewardFunction, prompts: Sequence[Prompt], rows: np.ndarray, name: str, *, needed: bool = False
) -> bool:
    """Call a function of the user once, before time is spent on sampling: with two prompts and a made-up response to
    each, since one number for a whole batch looks right where the batch has one row; and a command with a response that
    holds no code.

    Its columns are looked for in all `prompts`, those of `rows` int [N] in their file, and under `needed` the right
    answer of each; the other judges are not called. Returns whether it scored steps of a response.
    Raises `InputError` for what would stop the run later.
    """
    if isinstance(function, Command):
        for prompt in prompts[: distributed.is_main()]:
            function.try_out(prompt)
    elif isinstance(function, PythonFunction | OfColumn):
        function.check_columns(prompts)
        if needed and isinstance(function, OfColumn) and len(silent := rows[function.without(prompts)]):
            raise InputError(
                f"--reward {name}: {told_rows(silent)} of the prompts: no value in {function.column!r}, and nothing"
                " else judges the responses"
            )
        first = prompts[:2]
        return (
            judgement(function, first, [TRIAL] * len(first), rows[: len(first)], name, finite=False).steps is not None
        )
    return False


def scores_of(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    rows: np.ndarray,
    name: str,
    *,
    finite: bool = True,
) -> np.ndarray:
    """The scores of responses to prompts, float32 [N], the same in every process.

    `rows`: int [N], of the prompts in their file; `name`: of the judge; `finite`: refuse scores that are not.

    Raises `InputError` for anything but N (finite) numbers; rows whose scores are not finite are named.
    """
    judged = judgement(function, prompts, responses, rows, name, finite=False)
    return _all_finite(judged.scores, np.ones_like(judged.said), rows, name) if finite else judged.scores


class Judged(NamedTuple):
    """What one function says of N responses.

    Attributes:
      scores: float32 [N]; NaN where it said None.
      said: bool [N], where it said something.
      steps: those of each response, whose scores add up to its score; None where it gave none.
    """

    scores: np.ndarray
    said: np.ndarray
    steps: Steps | None


def judgement(
    function: RewardFunction,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    rows: np.ndarray,
    name: str,
    *,
    finite: bool = True,
) -> Judged:
    """As `scores_of`, with None for what the function says nothing of, and with the steps of responses."""
    both, steps = np.zeros((2, len(responses)), np.float32), None
    if function.everywhere or distributed.is_main():
        try:
            found = function(prompts, responses)
        except InputError as error:
            if not isinstance(function, PythonFunction | OfColumn):
                raise
            raise InputError(f"{error} (responses to {told_rows(rows)} of the prompts)") from error
        found, steps = split(found, responses, rows, name)
        given = [one is not None for one in found] if isinstance(found, list | tuple) else True
        scores = _checked(found, rows, name)
        both = np.stack([scores, np.broadcast_to(np.asarray(given, np.float32), scores.shape)])
    if not function.everywhere:
        both, steps = distributed.from_main(both), distributed.json_from_main(lambda: steps)
    said = both[1] > 0
    return Judged(_all_finite(both[0], said, rows, name) if finite else both[0], said, steps)


def told_rows(rows: Sequence[int] | np.ndarray, most: int = 6) -> str:
    """`row 3`, `rows 3, 5`, and of many the first ones and how many there are."""
    own = sorted({int(row) for row in rows})
    more = f" and {len(own) - most} more" if len(own) > most else ""
    return f"row{'s' * (len(own) > 1)} {', '.join(map(str, own[:most]))}{more}"


def _checked(found: Any, rows: np.ndarray, name: str) -> np.ndarray:
    if isinstance(found, list | tuple) and len(found) == len(rows):
        words = [row for row, one in zip(rows, found, strict=True) if isinstance(one, str)]
        if words:  # NumPy would read "1.5" as a number
            one = next(one for one in found if isinstance(one, str))
            raise InputError(
                f"--reward {name}: gave something that is no list of numbers: {one[:40]!r} for responses to"
                f" {told_rows(words)} of the prompts"
            )
    try:
        with np.errstate(over="ignore"):
            scores = np.asarray(found, np.float64).astype(np.float32)
    except (TypeError, ValueError, OverflowError) as error:  # the last of 10**400
        raise InputError(
            f"--reward {name}: gave something that is no list of numbers: {str(found)[:80]} (responses to"
            f" {told_rows(rows)} of the prompts)"
        ) from error
    if scores.shape != rows.shape:
        raise InputError(
            f"--reward {name}: gave scores of shape {list(scores.shape)} for {len(rows)} responses; one number each"
            f" (responses to {told_rows(rows)} of the prompts)"
        )
    return scores


def _all_finite(scores: np.ndarray, said: np.ndarray, rows: np.ndarray, name: str) -> np.ndarray:
    """`scores`; raises `InputError` where one of those that are `said` is not finite."""
    bad = rows[said & ~np.isfinite(scores)]
    if len(bad):
        raise InputError(
            f"--reward {name}: the score of responses to {told_rows(bad, most=20)} of the prompts is not finite;"
            " the last checkpoint is intact"
        )
    return scores
