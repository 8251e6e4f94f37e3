"""Responses of a rollout in pieces are those of one batch, and a long one holds up none."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from pairs import TINY, model_and_variables

from dpo_jax.config import SampleConfig
from dpo_jax.mesh import make_mesh
from dpo_jax.sample import continuous
from dpo_jax.train.answered import Answered, Policy

GROUP, ROWS, LONGEST = 2, 16, 24


@pytest.fixture(scope="module")
def answered() -> Any:
    """piece -> (tokens, mask, logps) of 8 prompts with two responses each; many end soon."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model, variables = model_and_variables(TINY, mesh=mesh)
    rng = np.random.default_rng(0)
    prompts = np.repeat(rng.integers(3, 64, (ROWS // GROUP, 9)), GROUP, axis=0).astype(np.int32)
    lengths = np.repeat(rng.integers(2, 10, ROWS // GROUP), GROUP).astype(np.int32)
    batch: Any = SimpleNamespace(prompts=prompts, prompt_lengths=lengths, rows=np.arange(ROWS))

    def drawn(piece: int, rows: np.ndarray, **options: Any) -> tuple[np.ndarray, ...]:
        parts: Any = (np.arange(8), SimpleNamespace(batch_size=ROWS))
        tokenizer: Any = None
        sample = SampleConfig(LONGEST, stop_tokens=tuple(range(8)))
        policy = Policy(model, tokenizer, sample, mesh, piece=piece, raw=True, seed=0, vocabulary=60)
        some = Answered(policy, *parts, group=GROUP)
        return some._drawn(policy.prepared(variables), batch, rows, jax.random.key(7), **options)

    return drawn


def test_pieces_change_no_text(answered: Any) -> None:
    whole = answered(ROWS, np.arange(ROWS))
    lengths = whole[1].sum(axis=1)
    assert lengths.min() < 4 < LONGEST == lengths.max(), "some are short, some are cut"
    for piece in (4, 8):
        for one, other in zip(whole, answered(piece, np.arange(ROWS)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
    some = np.array([2, 3, 6, 7, 12, 13])
    for one, other in zip(whole, answered(4, some), strict=True):
        np.testing.assert_allclose(one[some], other, atol=1e-5)
    greedy = (answered(piece, np.arange(ROWS), greedy=True) for piece in (ROWS, 4))
    for one, other in zip(*greedy, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_long_response_holds_up_none(answered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that four rows take for all responses, against pieces that wait for their longest."""
    taken = []
    run = continuous.run

    def counted(state: Any, *args: Any, **options: Any) -> Any:
        before = np.array(state.rows.count)
        state, view = run(state, *args, **options)
        taken.append(int(np.max(np.asarray(view.count) - before)))
        return state, view

    lengths = answered(ROWS, np.arange(ROWS))[1].sum(axis=1)
    waiting = int(lengths.reshape(-1, 4).max(axis=1).sum())
    monkeypatch.setattr(continuous, "run", counted)
    answered(4, np.arange(ROWS))
    assert sum(taken) < 0.8 * waiting
