"""The losses of a reward model and the combination of two rewards, by the check values and by their identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.align import reward, rewards
from dpo_jax.config import RewardConfig, RewardLossConfig
from dpo_jax.errors import InputError

CHOSEN, REJECTED = jnp.asarray([1.2, 0.3, -0.5]), jnp.asarray([0.2, 0.8, -0.5])


def test_ranking_loss_check_values():
    plain = [0.3132616875, 0.9740769842, 0.6931471806]
    np.testing.assert_allclose(reward.ranking_loss(CHOSEN, REJECTED), plain, rtol=1e-6)
    with_margins = [0.6931471806, 1.4377643939, 0.6931471806]
    margins = jnp.asarray([1, 2 / 3, 0])
    np.testing.assert_allclose(reward.ranking_loss(CHOSEN, REJECTED, margins), with_margins, rtol=1e-6)


def test_ranking_loss_reads_differences_only():
    np.testing.assert_allclose(
        reward.ranking_loss(CHOSEN + 5, REJECTED + 5), reward.ranking_loss(CHOSEN, REJECTED), rtol=1e-5
    )
    np.testing.assert_allclose(reward.centering(CHOSEN, REJECTED), [1.96, 1.21, 1.0], rtol=1e-6)
    extreme = jax.grad(lambda x: reward.ranking_loss(x, -x).sum())(jnp.asarray([1e4, -1e4]))
    np.testing.assert_allclose(extreme, [0, -2], atol=1e-6)


def test_pairs_of_a_ranking():
    ranks = jnp.asarray([[0, 1, 2, 3], [2, 0, 0, 1], [0, 0, 0, 0], [1, 0, 5, 2]])
    present = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]], bool)

    def found(pairs):
        mask = np.asarray(reward.pair_mask(ranks, present, pairs))
        return [sorted(zip(*map(np.ndarray.tolist, np.nonzero(row)), strict=True)) for row in mask]

    assert found("all") == [
        [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)],
        [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0)],
        [],
        [(0, 2), (0, 3), (3, 2)],
    ]
    assert found("adjacent") == [
        [(0, 1), (1, 2), (2, 3)],
        [(1, 3), (2, 3), (3, 0)],
        [],
        [(0, 3), (3, 2)],
    ]


def test_multi_class_excludes_and_multi_label_does_not():
    logits = jnp.asarray([[2.0, 0.0, -1.0]])
    classes = reward.multi_class_loss(logits, jnp.asarray([1]))
    np.testing.assert_allclose(classes, np.log(np.exp([2, 0, -1]).sum()), rtol=1e-6)
    labels = jnp.asarray([[1, -1, 0]])  # the second is not known
    expected = (np.log1p(np.exp(-2.0)) + np.log1p(np.exp(-1.0))) / 2
    np.testing.assert_allclose(reward.multi_label_loss(logits, labels), [expected], rtol=1e-6)
    np.testing.assert_array_equal(reward.multi_label_loss(logits, -jnp.ones((1, 3), int)), 0)


def test_logit():
    np.testing.assert_allclose(
        rewards.logit(jnp.asarray([0.05, 0.15, 0.9])), [-2.9444389792, -1.7346010554, 2.1972245773], rtol=1e-6
    )


def test_combination_of_helpfulness_and_safety():
    helpful = jnp.asarray([0.9, 0.9, 0.9, 0.2])
    safe = jnp.asarray([0.8, 0.14, 0.15, 0.99])
    tagged = jnp.asarray([True, False, False, False])
    np.testing.assert_allclose(rewards.combine(helpful, safe, tagged), [0.8, 0.14, 0.9, 0.2])
    mask = jnp.asarray([True, True, True, False])
    whitened = rewards.whitened(rewards.logit(helpful), rewards.logit(safe), tagged, mask)
    chosen = np.log(np.asarray([0.8, 0.14, 0.9])) - np.log1p(-np.asarray([0.8, 0.14, 0.9]))
    np.testing.assert_allclose(whitened[:3], (chosen - chosen.mean()) / chosen.std(ddof=1), rtol=1e-4)


def test_auxiliary_heads_are_read_from_the_options():
    config = RewardLossConfig(multi_class=("rating=a,b,c,d", "safety:0.5=safe,unsafe"), multi_label=("harm=x",))
    assert [(h.name, len(h.classes), h.weight, h.overlapping) for h in config.heads] == [
        ("rating", 4, 1.0, False),
        ("safety", 2, 0.5, False),
        ("harm", 1, 1.0, True),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin_scale": 2.0}, r"--reward.margin_scale has no effect with --reward.margin none"),
        ({"margin": "score_gap", "margin_scale": -1.0}, "must be positive"),
        ({"multi_class": ("safety=safe",)}, "at least 2 different classes"),
        ({"multi_class": ("safety=safe,safe",)}, "different classes"),
        ({"multi_class": ("safety",)}, "write NAME=CLASS"),
        ({"multi_class": ("a:0=x,y",)}, "weight 0 must be a positive number"),
        ({"multi_class": ("score=x,y",)}, "score is the name of the reward head"),
        ({"multi_class": ("a=x,y",), "multi_label": ("a=x",)}, "head a is given twice"),
        ({"multi_class": ("a=x,y",), "class_negatives": 4}, "has no effect: no head of --reward.multi_class has more"),
        ({"class_proposal": "uniform"}, "no effect without --reward.class_negatives"),
        ({"centering": -1.0}, "must not be negative"),
        ({"max_replies": 1}, "at least 2"),
    ],
)
def test_options_without_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        RewardConfig(**options)


def test_several_rewards_as_one() -> None:
    scores = jnp.asarray([[1.0, 3.0, 2.0, jnp.nan], [10.0, 10.0, 4.0, 8.0]])
    said = jnp.isfinite(scores)
    weights = jnp.asarray([2.0, 0.5])
    np.testing.assert_allclose(rewards.weighted_sum(scores, said, weights), [7, 11, 6, 4])
    found = rewards.standardised(scores, said, 2)  # [1, 3]: mean 2, deviation sqrt 2; one alone, and equal ones: 0
    r, s = 1 / (2**0.5 + 1e-4), 2 / (8**0.5 + 1e-4)
    np.testing.assert_allclose(found, [[-r, r, 0, 0], [0, 0, -s, s]], rtol=1e-6)
