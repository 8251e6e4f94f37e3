"""Figures of a reward model by hand-computed numbers and by their identities."""

import numpy as np
import pytest

from dpo_jax.judge.figures import rewards as judgement
from dpo_jax.report import statistics

# Three pairs: right by 1, wrong by 0.5, a tie; the second's better response is longer.
SCORES = np.array([[1.2, 0.2], [0.3, 0.8], [-0.5, -0.5]])
LENGTHS = np.array([[10, 30], [90, 10], [20, 20]])


def test_figures_of_pairs() -> None:
    found = judgement.figures(SCORES, LENGTHS, None)
    assert found["eval_accuracy"] == found["eval_rewards/accuracies"] == pytest.approx(1 / 3)  # strict: a tie is no win
    assert found["eval_accuracy_error"] == pytest.approx(np.sqrt(2 / 9 / 3))
    assert found["eval_loss"] == pytest.approx(np.mean([0.3132616875, 0.9740769842, 0.6931471806]))
    assert found["eval_rewards/margins"] == pytest.approx(0.5 / 3)
    assert found["eval_lengths/accuracies"] == pytest.approx((0 + 1 + 0.5) / 3)
    assert found["eval_min_reward"] == -0.5
    better, worse = SCORES.T
    wins = [(w > l) + 0.5 * (w == l) for w in better for l in worse]
    assert found["eval_auc"] == pytest.approx(np.mean(wins))
    assert found["eval_length_correlation_within"] == pytest.approx(np.corrcoef([1, -0.5, 0], [-20, 80, 0])[0, 1])


def test_each_row_counts_once() -> None:
    scores = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    lengths = np.array([[5, 5, 5, 5], [5, 5, 0, 0]])
    ranks = np.array([[0, 1, 2, 3], [0, 1, 4, 4]])
    pairs = judgement.pairs_of(scores, lengths, ranks)
    assert len(pairs.row) == 7
    assert judgement.figures(scores, lengths, ranks)["eval_accuracy"] == pytest.approx(0.5)
    tied = judgement.pairs_of(scores, lengths, np.array([[0, 0, 1, 1], [1, 0, 4, 4]]))
    np.testing.assert_allclose(np.bincount(tied.row, tied.weight), [1, 1])
    assert judgement.figures(scores, lengths, np.array([[0, 0, 1, 1], [1, 0, 4, 4]]))["eval_accuracy"] == 1


def test_perfect_calibration() -> None:
    rng = np.random.default_rng(0)
    gap = rng.normal(0, 2, 20000)
    gap = np.where(rng.random(20000) < 1 / (1 + np.exp(-np.abs(gap))), np.abs(gap), -np.abs(gap))
    scores = np.stack([gap, np.zeros_like(gap)], 1)
    lengths = np.ones_like(scores, int)
    good = judgement.calibration(judgement.pairs_of(scores, lengths, None))
    assert good.error < 0.02
    assert good.share.sum() == pytest.approx(1)
    assert judgement.calibration(judgement.pairs_of(5 * scores, lengths, None)).error > 0.1


def test_auc_and_ranks() -> None:
    assert statistics.auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert statistics.auc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    np.testing.assert_allclose(statistics.ranked(np.array([3.0, 1.0, 3.0, 0.0])), [2.5, 1, 2.5, 0])
    assert statistics.correlation(np.ones(3), np.arange(3)) == 0


def test_tables() -> None:
    extras = {"rating": [3.0, "better", None], "source": ["x", "x", "x"], "agreement": [2 / 3, 2 / 3, 1.0]}
    found = judgement.tables(SCORES, LENGTHS, None, extras)
    assert [(g["value"], g["pairs"], g["accuracy"]) for g in found["rating"]] == [
        (3.0, 1, 1),
        ("better", 1, 0),
        (None, 1, 0),
    ]
    assert [g["value"] for g in found["agreement"]] == [0.6667, 1.0]
    by_length = found["length_difference"]
    assert [(g["value"], g["accuracy"]) for g in by_length] == [("-64 to -17", 1), ("-16 to 15", 0), (">= 64", 0)]
    many = {"source": [str(i) for i in range(60)]}
    scores = np.tile([[1.0, 0.0]], (60, 1))
    assert set(judgement.tables(scores, np.ones((60, 2), int), None, many)) == {"length_difference"}


def test_agreement_with_a_second_judge() -> None:
    same = judgement.agreement(SCORES, 3 * SCORES + 1, LENGTHS, None)
    assert same["judge/agreement"] == 1
    assert same["judge/correlation"] == pytest.approx(1)
    opposite = judgement.agreement(SCORES, -SCORES, LENGTHS, None)
    assert opposite["judge/agreement"] == pytest.approx(1 / 3)  # the tie
    assert opposite["judge/accuracy"] == pytest.approx(1 / 3)


def test_recall_of_a_head() -> None:
    predicted, labels = np.array([[0, 1], [1, 1]]), np.array([[0, 1], [0, -1]])
    assert judgement.head_figures(predicted, labels, ("safe", "unsafe")) == {
        "accuracy": pytest.approx(2 / 3),
        "recall/safe": 0.5,
        "recall/unsafe": 1,
    }
    overlapping = judgement.head_figures(np.array([[[1, 0]]]), np.array([[[1, 1]]]), ("a", "b"))
    assert overlapping == {"accuracy": 0.5, "recall/a": 1, "recall/b": 0}
