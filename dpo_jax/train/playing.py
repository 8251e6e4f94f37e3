"""Episodes: the policy and an environment speak in turn.

Tokens that the policy drew stay as it drew them: nothing is tokenised again. Every turn is drawn with the key that is
given and a number of the episode and the turn, so what an episode becomes depends on the seed, the weights and the
environment, and not on which episodes were answered beside it. Episodes wait in one line, and each call of the sampler
takes the first of them, whichever turn they are at.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.prompts import Prompt, PromptDataset
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError, naming
from dpo_jax.judge.rewards.environment import LARGEST, OPTION, Environment, Failed, Step
from dpo_jax.sample import Weights, generate
from dpo_jax.train.answered import Policy
from dpo_jax.types import Rollout

_TRIED = 2
"""Rows of the prompts that an environment is tried out on, before the weights are read."""


@dataclass(frozen=True)
class Bounds:
    """How far an episode goes.

    Attributes:
      turns: of the policy, at most.
      tokens: behind the first messages, at most, R.
      prompt: tokens of the first messages, at most.
      on_error: stop: the run; end: the episode.
    """

    turns: int
    tokens: int
    prompt: int
    on_error: str


@dataclass
class Episode:
    """One conversation as it goes on.

    Attributes:
      row: of the prompts' file.
      prompt: ids of the first messages.
      messages: all so far, the first `opening` of which the environment began with.
      ids, own, logps: behind the first messages: tokens, whether the policy drew them, and with which log-probability.
      turns: of the policy.
      score: the sum of the rewards; step_scores: each of them, behind the place in `ids` of the turn's last token.
      done: whether the environment ended it.
      ended: whether no limit did (of a turn, of turns, of tokens).
      failed: whether an error did.
    """

    row: int
    prompt: list[int]
    messages: list[Message]
    opening: int
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    turns: int = 0
    score: float = 0.0
    step_scores: list[tuple[int, float]] = field(default_factory=list)
    done: bool = False
    ended: bool = False
    failed: bool = False

    def told(self, kl: float) -> dict[str, Any]:
        """The episode as a row of a file of samples; `kl`: its divergence from the reference, in nats."""
        said = [message.as_dict() for message in self.messages]
        return {
            "row": self.row,
            "prompt": said[: self.opening],
            "response": said[self.opening :],
            "score": self.score,
            "kl": kl,
            "turns": self.turns,
            "tokens": sum(self.own),
            "ended": self.ended,
            "done": self.done,
        }


def figures(episodes: Sequence[Episode]) -> dict[str, float]:
    """environment/turns (mean turns of the policy), environment/tokens (mean tokens that are not the policy's),
    environment/done (share that the environment ended), environment/errors (share that an error of it ended).
    """
    return {
        "environment/turns": float(np.mean([e.turns for e in episodes])),
        "environment/tokens": float(np.mean([len(e.own) - sum(e.own) for e in episodes])),
        "environment/done": float(np.mean([e.done for e in episodes])),
        "environment/errors": float(np.mean([e.failed for e in episodes])),
    }


class Player:
    """Lets the policy of a run play with an environment."""

    def __init__(self, policy: Policy, environment: Environment, encoder: ConversationEncoder, bounds: Bounds):
        """`encoder`: the template; `bounds`: of an episode."""
        self._policy, self._environment, self._encoder, self._bounds = policy, environment, encoder, bounds

    def play(
        self, weights: Weights, key: jax.Array, prompts: Sequence[Prompt], rows: Sequence[int]
    ) -> tuple[list[Episode], float]:
        """An episode to its end for each row, which `prompts` hold; and the seconds that the environment took.

        `weights`: of `Policy.prepared`; `rows`: of the prompts in their file.
        """
        self._seconds = 0.0
        episodes = self._timed(lambda: _begun(self._environment, self._encoder, self._bounds.prompt, prompts, rows))
        waiting = deque(range(len(episodes)))
        while waiting:
            at = [waiting.popleft() for _ in range(min(self._policy.piece, len(waiting)))]
            self._answered(weights, key, episodes, at)
            answers = self._timed(lambda: self._environment.step([(i, episodes[i].messages) for i in at]))  # noqa: B023
            for i, answer in zip(at, answers, strict=True):
                if self._goes_on(episodes[i], answer):
                    waiting.append(i)
        return episodes, self._seconds

    def _answered(self, weights: Weights, key: jax.Array, episodes: list[Episode], at: Sequence[int]) -> None:
        """One turn of the policy in the episodes `at`."""
        filled = np.resize(np.asarray(at), self._policy.piece)  # filled up, so that all calls have as many rows
        generation = generate(
            self._policy.model,
            weights,
            [[*episodes[i].prompt, *episodes[i].ids] for i in filled],
            key,
            config=self._policy.sample,
            row_ids=[i + len(episodes) * episodes[i].turns for i in filled],
            vocabulary=self._policy.vocabulary,
            mesh=self._policy.mesh,
        )
        tokens, mask, logps = (np.asarray(x)[: len(at)] for x in generation)
        ended = self._policy.ended(tokens, mask)
        for i, drawn, count, logp, end in zip(at, tokens, mask.sum(axis=1), logps, ended, strict=True):
            episode = episodes[i]
            said = drawn[: count - int(end)]
            text = self._policy.text(np.asarray([*episode.prompt, *episode.ids]), said)
            episode.messages.append(Message("assistant", text))
            episode.ids += drawn[:count].tolist()
            episode.own += [True] * int(count)
            episode.logps += logp[:count].tolist()
            episode.turns, episode.ended = episode.turns + 1, bool(end)

    def _goes_on(self, episode: Episode, answer: Step | Failed) -> bool:
        """Whether the policy has another turn, of which the episode then holds all that stands before it."""
        if isinstance(answer, Failed):
            return self._failed(episode, answer.why)
        if abs(episode.score + answer.reward) > LARGEST:
            return self._failed(
                episode, f"rewards add up to {episode.score + answer.reward:g}, more than float32 holds"
            )
        episode.score += answer.reward
        episode.step_scores.append((len(episode.ids) - 1, answer.reward))
        episode.done = answer.done
        if answer.done or not episode.ended:  # what was cut has no terminator, and nothing can follow it
            return False
        episode.ended = False  # unless a further turn ends it
        if episode.turns >= self._bounds.turns:
            return False
        try:
            between = self._encoder.following_ids(answer.messages)
        except BadRow as problem:
            episode.ended = True
            return self._failed(episode, f"step: {problem}")
        if episode.ids[-1] not in self._encoder.terminators:  # a stop token of the user ended the turn
            between = [self._encoder.terminators[0], *between]
        if len(episode.ids) + len(between) + self._policy.sample.max_new_tokens > self._bounds.tokens:
            return False
        episode.messages += answer.messages
        episode.ids += between
        episode.own += [False] * len(between)
        episode.logps += [0.0] * len(between)
        return True

    def _failed(self, episode: Episode, why: str) -> bool:
        """The environment gave what is no answer: the run stops, or the episode does, and False comes back."""
        if self._bounds.on_error == "stop":
            raise _error(episode.row, why)
        episode.failed = True
        return False

    def _timed(self, call: Any) -> Any:
        start = time.perf_counter()
        found = call()
        self._seconds += time.perf_counter() - start
        return found

    def rollout(self, episodes: Sequence[Episode], **known: Any) -> Rollout:
        """The episodes as arrays; `known`: more of the rollout's. Their tokens are told from those between by `own`."""
        rows, width = len(episodes), padded(max(len(e.prompt) for e in episodes), self._bounds.prompt)
        prompts, responses = np.zeros((rows, width), np.int32), np.zeros((rows, self._bounds.tokens), np.int32)
        (real, own), (logps, at_turns) = (
            np.zeros((2, *responses.shape), bool),
            np.zeros((2, *responses.shape), np.float32),
        )
        for i, e in enumerate(episodes):
            prompts[i, : len(e.prompt)] = e.prompt
            at = (i, slice(len(e.ids)))
            responses[at], real[at], own[at], logps[at] = e.ids, True, e.own, e.logps
            for place, score in e.step_scores:
                at_turns[i, place] = score
        return self._policy.written(
            prompts,
            np.asarray([len(e.prompt) for e in episodes], np.int32),
            np.asarray([e.row for e in episodes], np.int32),
            responses,
            real,
            logps,
            ended=np.asarray([e.ended for e in episodes]),
            scores=np.asarray([e.score for e in episodes], np.float32),
            step_scores=at_turns,
            own=own,
            **known,
        )


def check_beginnings(episodes: Sequence[Episode], group: int) -> None:
    """Refuse episodes of one row of the prompts that begin unlike each other, where one prompt is to stand for all."""
    for i, episode in enumerate(episodes):
        if episode.prompt != episodes[i - i % group].prompt:
            raise _error(
                episode.row,
                "reset gave other first messages to another episode of the same row; add --train.layout separate",
            )


def padded(longest: int, most: int) -> int:
    """Width of prompts of `longest` tokens, and of no more than `most`: one of few, since each compiles anew."""
    return min(max(1 << (longest - 1).bit_length(), 16), -(-most // 8) * 8)


def try_out(environment: Environment, encoder: ConversationEncoder, longest: int, data: PromptDataset) -> None:
    """Begin episodes of the first rows, whose messages may have `longest` tokens, and throw them away.

    Raises `InputError` where one has no beginning, or where the template cannot go on behind an answer.
    """
    _begun(environment, encoder, longest, data.prompts[:_TRIED], [int(row) for row in data.row_numbers[:_TRIED]])
    with naming(f"{OPTION} needs turns"):
        encoder.following_ids((Message("user", "go on"),))


def _begun(
    environment: Environment, encoder: ConversationEncoder, longest: int, prompts: Sequence[Prompt], rows: Sequence[int]
) -> list[Episode]:
    episodes: list[Episode] = []
    for row, messages in zip(rows, environment.reset(prompts), strict=True):
        if isinstance(messages, Failed):
            # An episode without a beginning teaches nothing, and has no prompt to stand behind.
            raise _error(row, messages.why)
        try:
            ids = encoder.prompt_ids(messages)
        except BadRow as problem:
            raise _error(row, f"reset: {problem}") from problem
        if len(ids) > longest:
            raise _error(row, f"reset gave {len(ids)} tokens, and --data.max_length leaves {longest}")
        episodes.append(Episode(row, ids, list(messages), len(messages)))
    return episodes


def _error(row: int, why: str) -> InputError:
    return InputError(f"{OPTION}: row {row} of the prompts: {why}")
