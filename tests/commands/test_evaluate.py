"""Evaluation: figures by hand-computed numbers, tables, KL estimates, the health of texts."""

import math

import numpy as np
import pytest

from dpo_jax.judge.figures import preferences as judgement
from dpo_jax.report import text_health as text
from dpo_jax.report.statistics import kl_estimates

# The three pairs of the check values: (Lc, Lr, Rc, Rr, nc, nr).
POLICY = np.array([[-12.0, -15.0], [-20.0, -18.0], [-8.0, -9.0]])
REFERENCE = np.array([[-13.0, -14.0], [-19.0, -19.0], [-8.0, -9.0]])
LENGTHS = np.array([[4, 6], [7, 5], [3, 3]])


def test_figures_with_reference() -> None:
    found = judgement.figures(POLICY, LENGTHS, REFERENCE, beta=0.1)
    # D = [2, -2, 0]: one pair right, one wrong, and a tie, which does not count as right.
    assert found["eval_rewards/accuracies"] == pytest.approx(1 / 3)
    assert found["eval_rewards/accuracies_error"] == pytest.approx(math.sqrt(2 / 27))
    assert found["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-12)
    assert found["eval_rewards/chosen"] == pytest.approx(0.1 * (1 - 1 + 0) / 3)
    assert found["eval_logps/chosen"] == pytest.approx(-40 / 3)
    assert found["eval_logps/accuracies"] == pytest.approx(2 / 3)
    # Per token: -3 against -2.5, -2.857 against -3.6, -2.667 against -3.
    assert found["eval_logps/token_accuracies"] == pytest.approx(2 / 3)
    assert found["eval_perplexity/chosen"] == pytest.approx(math.exp(40 / 14))
    assert found["eval_reference_perplexity/rejected"] == pytest.approx(math.exp(42 / 14))
    assert found["eval_log_ratio/rejected"] == pytest.approx(0.0)
    assert found["eval_lengths/chosen_longer"] == pytest.approx(1 / 3)
    assert found["eval_lengths/accuracies"] == pytest.approx(1 / 3 + 0.5 / 3)
    assert found["eval_lengths/chosen_median"] == 4


def test_figures_without_reference_have_no_rewards() -> None:
    found = judgement.figures(POLICY, LENGTHS)
    assert not any("reward" in name or "reference" in name or "ratio" in name for name in found)
    assert found["eval_logps/rejected"] == pytest.approx(-14)


def test_policy_equal_to_reference() -> None:
    found = judgement.figures(POLICY, LENGTHS, POLICY)
    assert found["eval_rewards/accuracies"] == 0  # strict: a tie is no win
    assert found["eval_rewards/margins"] == found["eval_log_ratio/chosen"] == 0


def test_swapping_negates_the_margin() -> None:
    policy = POLICY + np.array([[1, 0]])
    there = judgement.figures(policy, LENGTHS, REFERENCE)
    back = judgement.figures(policy[:, ::-1], LENGTHS[:, ::-1], REFERENCE[:, ::-1])
    assert there["eval_rewards/margins"] == pytest.approx(-back["eval_rewards/margins"])
    assert there["eval_rewards/margins"] != 0


def test_tables() -> None:
    extras = {"rating": [3, 1, None], "source": ["a", "a", "a"], "margin": [1.0, 2.0, 3.0]}
    found = judgement.tables(POLICY, LENGTHS, REFERENCE, extras)
    assert [(row["value"], row["pairs"], row["accuracy"]) for row in found["rating"]] == [
        (1, 1, 0),
        (3, 1, 1),
        (None, 1, 0),
    ]
    assert found["rating"][1]["margin"] == pytest.approx(0.2)
    assert [(row["value"], row["pairs"]) for row in found["source"]] == [("a", 3)]
    assert found["source"][0]["accuracy"] == pytest.approx(1 / 3)


def test_tables_without_columns_or_with_too_many_values() -> None:
    assert judgement.tables(POLICY, LENGTHS, None, {}) == {}
    assert judgement.tables(POLICY, LENGTHS, None, {"rating": [None] * 3}) == {}
    many = 60
    policy, lengths = np.tile(POLICY[:1], (many, 1)), np.tile(LENGTHS[:1], (many, 1))
    assert judgement.tables(policy, lengths, None, {"source": [f"id {i}" for i in range(many)]}) == {}


def test_kl_estimates() -> None:
    policy, reference = np.array([[-1.0, -2.0], [-1.5, np.nan]]), np.array([[-1.5, -1.0], [-1.5, 0.0]])
    found = kl_estimates(policy, reference, np.array([[True, True], [True, False]]))
    # Log-ratios 0.5, -1 and 0; what is masked out does not leak.
    assert found["eval_kl"] == pytest.approx(-0.25)
    assert found["eval_kl_token"] == pytest.approx(-0.5 / 3)
    # k1 = -0.5 has k3 = 0.1487212707; here d = 0.5 and d = -1.
    k3 = (math.exp(-0.5) - 1 + 0.5) + (math.e - 2)
    assert found["eval_kl_token_k3"] == pytest.approx(k3 / 3)


def test_kl_k3_check_value() -> None:
    found = kl_estimates(np.array([[-1.0]]), np.array([[-0.5]]), np.array([[True]]))
    assert found["eval_kl_token"] == -0.5
    assert found["eval_kl_token_k3"] == pytest.approx(0.1487212707, abs=1e-9)


def test_distinct_n() -> None:
    assert text.distinct_n([[1, 2, 3], [1, 2, 4]], 1) == pytest.approx(4 / 6)
    assert text.distinct_n([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert text.distinct_n([[1], []], 2) == 0


def test_repetition_rate() -> None:
    assert text.repetition_rate(list(range(10))) == 0
    assert text.repetition_rate([7] * 10) == pytest.approx(6 / 7)  # 7 four-grams, one kind
    assert text.repetition_rate([1, 2, 3]) == 0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], 0), ([1], 0), ([1, 2, 3], 0), ([1, 2, 1], 1), ([1, 2, 3, 9, 1, 2, 3], 3), ([5] * 6, 5), ("abcabc", 3)],
)
def test_longest_repeat(tokens: list[int], expected: int) -> None:
    assert text.longest_repeat(tokens) == expected


def test_longest_repeat_agrees_with_trying_everything() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(0, 3, rng.integers(0, 15)).tolist()
        starts = range(len(tokens))
        best = max(
            (n for n in starts for i in starts for j in starts if i < j and j + n <= len(tokens)
             and tokens[i : i + n] == tokens[j : j + n]), default=0,
        )  # fmt: skip
        assert text.longest_repeat(tokens) == best


def test_health() -> None:
    found = text.health([list(range(8)), [1] * 12, []])
    assert (found["texts"], found["empty"], found["looping"]) == (3, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found["length"] == pytest.approx(20 / 3)
    assert found["longest_repeat"] == pytest.approx(11 / 3)
    assert found["longest_repeat_max"] == 11
    assert tuple(found[f"length_p{p}"] for p in (10, 50, 90)) == pytest.approx((1.6, 8, 11.2))
    assert found["distinct_1"] == pytest.approx(8 / 20)
    assert found["distinct_3"] == pytest.approx(7 / 16)
