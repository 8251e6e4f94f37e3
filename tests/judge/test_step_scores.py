"""Scores of steps: what a function may give, where they stand, and what several rewards make of them."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from documented import programs

from dpo_jax.align.advantages import learning_targets
from dpo_jax.config import PPOConfig, SampleConfig
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.rewards.functions import PythonFunction, judgement, scores_of, try_out
from dpo_jax.judge.rewards.scores import Responses, scored, summed
from dpo_jax.judge.rewards.step_scores import at_tokens
from dpo_jax.train.answered import Policy
from dpo_jax.types import Rollout

ASK = Prompt((), "the film?")
TEXTS = ["a red book", "good", "", "ab"]
FOUND = [[[1, 0.5], [10, -2]], 3.0, [], ((2, 1),)]
ROWS = np.asarray([3, 4, 5, 6])


def of(found: Any) -> Any:
    def function(prompts, responses):
        return found

    function.everywhere, function.identity = False, "mine"  # pyright: ignore[reportFunctionMemberAccess]
    return function


def test_their_sum_is_the_score() -> None:
    found = judgement(of(FOUND), [ASK] * 4, TEXTS, ROWS, "mine")
    assert found.scores.tolist() == [-1.5, 3, 0, 1]
    assert found.steps == [[(1, 0.5), (10, -2.0)], [], [], [(2, 1.0)]]
    assert judgement(of([1, 2, 3, 4]), [ASK] * 4, TEXTS, ROWS, "mine").steps is None
    assert scores_of(of(FOUND), [ASK] * 4, TEXTS, ROWS, "mine").tolist() == [-1.5, 3, 0, 1]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0.5, 0.7], "gave 0.5 for a step of a response to row 3"),
        ([[1, 0.5, 2]], "no list of numbers; a number for each response, or for each of its steps"),
        ([[1, "0.5"]], "for a step of a response to row 3"),
        ([[1.0, 0.5]], "for a step of a response to row 3"),
        ([[True, 0.5]], "for a step of a response to row 3"),
        ([[1, 10**400]], "for a step of a response to row 3"),
        ([[1, float("nan")]], "for a step of a response to row 3"),
        ([[1, 1e38], [2, 3e38]], "row 3 of the prompts is not finite"),
        ([[0, 0.5]], "ends at character 0 of 10; steps end within their response, from 1 on"),
        ([[11, 0.5]], "row 3 of the prompts ends at character 11 of 10"),
    ],
)
def test_anything_else_is_one_line(steps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        judgement(of([steps, 1, 1, 1]), [ASK] * 4, TEXTS, ROWS, "mine")
    assert "\n" not in str(caught.value)


def test_several_rewards_scale_them() -> None:
    responses = Responses([ASK] * 4, TEXTS, ROWS, np.zeros(4, bool))
    judges, names = [of(FOUND), of([1.0, None, 5.0, 3.0])], ["steps", "plain"]
    plain = summed(judges, names, (2.0, 0.5), responses, group=None, finite=True)
    assert plain.total.tolist() == [-2.5, 6, 2.5, 3.5]
    assert plain.steps == [[(1, 1.0), (10, -4.0)], [], [], [(2, 2.0)]]
    each = summed(judges, names, (2.0, 0.5), responses, group=2, finite=True)
    deviation = np.std([-1.5, 3.0], ddof=1) + 1e-4
    assert each.steps is not None
    np.testing.assert_allclose([s for _, s in each.steps[0]], [2 * 0.5 / deviation, 2 * -2 / deviation], rtol=1e-6)
    assert scored(judges[:1], names[:1], responses, whiten=True, finite=True).steps == [
        [(1, 0.5), (10, -2.0)],
        [],
        [],
        [(2, 1.0)],
    ]
    with pytest.raises(InputError, match=r"--safety_reward: .* gave scores of steps"):
        scored([*judges[:1], of([1.0] * 4)], ["a", "b"], responses, whiten=True, finite=True)


@pytest.mark.parametrize("raw", [False, True])
def test_each_stands_at_the_token_that_ends_it(raw: bool) -> None:
    """Also where a character takes several tokens, and where a token is none of the text."""
    tokenizer, unused = tiny.tokenizer(), None
    ids = tokenizer.encode("a red book 😀 good", add_special_tokens=False)
    end = tokenizer.eos_token_id
    policy: Any = Policy(
        unused,  # pyright: ignore[reportArgumentType]
        tokenizer,
        SampleConfig(stop_tokens=(end,)),
        unused,  # pyright: ignore[reportArgumentType]
        piece=1,
        raw=raw,
        seed=0,
        vocabulary=None,
    )
    tokens = np.zeros((1, len(ids) + 4), np.int32)
    tokens[0, : len(ids) + 1] = [*ids, end]
    mask = np.arange(tokens.shape[1])[None] <= len(ids)
    prompt = np.asarray([tokenizer.encode("the film", add_special_tokens=False)], np.int32)
    lengths = np.asarray([prompt.shape[1]], np.int32)
    written = policy.written(prompt, lengths, np.asarray([1]), tokens, mask, np.zeros(tokens.shape, np.float32))
    (text,) = policy.texts(written)
    ends = [1, 5, text.index("😀") + 1, len(text)]
    found = policy.step_scores(written, [text], [[(e, i + 1.0) for i, e in enumerate(ends)]])
    places = {score: int(np.flatnonzero(found[0] == score)[0]) for score in (1.0, 2.0, 3.0, 4.0)}
    assert places[4.0] == len(ids), "the whole text ends with its terminator"
    for at, score in ((1, 1.0), (5, 2.0), (ends[2], 3.0)):
        until = policy.text(prompt[0], tokens[0, : places[score] + 1])
        before = policy.text(prompt[0], tokens[0, : places[score]])
        assert len(until) >= at > len(before.rstrip("\ufffd"))
    assert policy.step_scores(written, [text], None) is None
    assert found.sum() == 10


@pytest.mark.parametrize("fallback", [False, True])
def test_a_character_of_several_tokens_moves_nothing(fallback: bool) -> None:
    """Half of one is decoded as one other character, or as one a byte, which are more than the whole."""
    tokens = [b"a", b" ", b"\xf0", b"\x9f", b"\x98", b"\x80", b" b", b"c", "é".encode()[:1], "é".encode()[1:], b"d"]

    def prefix(n: int) -> str:
        data = b"".join(tokens[:n])
        if not fallback:
            return data.decode(errors="replace")
        for cut in range(4):
            with contextlib.suppress(UnicodeDecodeError):
                return data[: len(data) - cut].decode() + "\ufffd" * cut
        raise AssertionError(data)

    text = prefix(len(tokens))
    steps = [(end, float(end)) for end in range(1, len(text) + 1)]
    found = at_tokens(steps, text, len(tokens) + 1, lambda n: prefix(min(n, len(tokens))))
    assert text == "a 😀 bcéd"
    assert np.flatnonzero(found).tolist() == [0, 1, 5, 6, 7, 9, 11]
    assert found[[0, 1, 5, 6, 7, 9, 11]].tolist() == [1, 2, 3, 4 + 5, 6, 7, 8]


def test_none_alone_names_its_rows() -> None:
    responses = Responses([ASK] * 4, TEXTS, ROWS, np.zeros(4, bool))
    with pytest.raises(InputError, match="--reward mine: gave None for responses to rows 4, 6 of the prompts"):
        scored([of([1.0, None, 2.0, None])], ["mine"], responses, whiten=True, finite=True)


def test_two_steps_that_end_in_one_token_add_up() -> None:
    assert at_tokens([(1, 1.0), (2, 2.0), (3, 4.0)], "abcd", 2, lambda n: "abcd"[: 3 * n]).tolist() == [7.0, 0.0]


def rollout(step_scores: Any) -> Rollout:
    lengths = np.asarray([5, 3, 4, 2], np.int32)
    zeros = np.zeros((4, 5), np.float32)
    return Rollout(
        prompts=jax.numpy.ones((4, 2), int),
        prompt_lengths=jax.numpy.full(4, 2),
        responses=jax.numpy.ones((4, 5), int),
        response_lengths=jax.numpy.asarray(lengths),
        ended=jax.numpy.asarray([True, True, False, True]),
        sampler_logps=jax.numpy.asarray(zeros - 1),
        reference_logps=jax.numpy.asarray(zeros - 1),
        values=jax.numpy.asarray(zeros + 0.25),
        scores=jax.numpy.asarray([1.0, 2.0, -1.0, 0.5]),
        kl_coefficient=jax.numpy.zeros(4),
        weights=jax.numpy.ones(4),
        rows=jax.numpy.arange(4),
        step_scores=step_scores,
    )


def test_whole_responses_learn_from_the_sum_alone() -> None:
    """Wherever its parts stand; a single step at the end is the plain score, for every kind of return."""
    steps = np.zeros((4, 5), np.float32)
    steps[0, :3], steps[2, 1] = (0.5, -1.0, 1.0), 2.0
    last = np.zeros((4, 5), np.float32)
    last[[0, 1, 2, 3], [4, 2, 3, 1]] = [1.0, 2.0, -1.0, 0.5]
    for name, more in (("group_mean", {"group_size": 2}), ("leave_one_out", {"group_size": 4}), ("batch_mean", {})):
        config = PPOConfig(advantage=name, missing_eos_penalty=1.0, normalize_scores=True, score_clip=1.2, **more)
        whole, split, one = (learning_targets(rollout(x), config) for x in (None, steps, last))
        np.testing.assert_allclose(whole.advantages, split.advantages, atol=1e-6)
        np.testing.assert_allclose(whole.advantages, one.advantages, atol=1e-6)
        np.testing.assert_array_equal(whole.scores, split.scores)
    for config in (PPOConfig(), PPOConfig(advantage="batch_mean", returns="to_go")):
        whole, split, one = (learning_targets(rollout(x), config) for x in (None, steps, last))
        np.testing.assert_allclose(whole.advantages, one.advantages, atol=1e-6)
        assert float(abs(whole.advantages - split.advantages)[0].max()) > 0.05


def test_returns_to_go_by_hand() -> None:
    steps = np.zeros((4, 5), np.float32)
    steps[0, :3] = (0.5, -1.0, 1.0)  # of 1: .5 is left for the last token
    found = learning_targets(rollout(steps), PPOConfig(advantage="none", returns="to_go", gamma=0.5))
    assert found.rewards[0].tolist() == [0.5, -1.0, 1.0, 0.0, 0.5]
    assert found.rewards[1].tolist() == [0, 0, 2, 0, 0]
    np.testing.assert_allclose(found.advantages[0], [0.28125, -0.4375, 1.125, 0.25, 0.5], atol=1e-6)


def test_the_documented_function(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(programs("rewards.md")["steps.py"])
    function = PythonFunction(f"{tmp_path}/steps.py:by_line")
    asked = [Prompt((), "1 + 2?", {"answer": "3"}), Prompt((), "2 + 2?", {"answer": "4"})]
    texts = ["add:\n1 + 2 = 3", ""]
    found = judgement(function, asked, texts, ROWS[:2], "mine")
    assert found.steps == [[(5, -0.1), (14, 0.1), (14, 1.0)], []]
    assert found.scores.tolist() == [1, 0]
    assert try_out(function, asked, ROWS[:2], "mine")
