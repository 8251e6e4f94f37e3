"""Win rates, and what is left of them at equal length.

Length control is alpaca_eval's `length_controlled_minimal` (Dubois et al. 2024, "Length-Controlled AlpacaEval",
arXiv 2404.04475; alpaca_eval 0.6, metrics/glm_winrate.py):

    P(win) = sigma(theta + phi tanh(d / std d)),      d = length of the answer - length of the other one, in characters

fitted by scikit-learn's `LogisticRegressionCV`: liblinear with an L1 penalty and no intercept beside theta, ten
strengths, the one of the least log loss over five folds, seed 123. A verdict p in [0, 1] is a win of weight p and a
loss of weight 1 - p, in one fold. The controlled rate is P(win) at d = 0: sigma(theta).

Where a fold or a bootstrap sample holds no win, liblinear fits it with the signs turned; it is given one here that
weighs next to nothing.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from dpo_jax.report.statistics import interval

FOLDS, SEED = 5, 123
REFITS = 1000
"""Bootstrap samples of the controlled rate, each fitted anew at the strength that was chosen on all verdicts."""
_EPSILON = 1e-15
_NOTHING = "these verdicts say nothing about a better side at equal length"
_LEAST = 1e-12
"""Weight of a row that stands for a class of which no other row weighs anything."""


def raw_figures(verdicts: np.ndarray, *, seed: int) -> dict[str, Any]:
    """Figures of verdicts [N] in [0, 1]: `win_rate` (their mean), `interval`, `standard_error`, `discrete_win_rate`
    (a win 1, a tie 1/2), wins, losses, ties, n; as in alpaca_eval, but as shares and not per cent."""
    wins, losses = int((verdicts > 0.5).sum()), int((verdicts < 0.5).sum())
    n = len(verdicts)
    return {
        "win_rate": float(verdicts.mean()),
        "interval": list(interval(verdicts, seed=seed)),
        "standard_error": float(verdicts.std(ddof=1) / np.sqrt(n)) if n > 1 else None,
        "discrete_win_rate": (wins + (n - wins - losses) / 2) / n,
        "wins": wins,
        "losses": losses,
        "ties": n - wins - losses,
        "n": n,
    }


def design(lengths: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[N, 2]: tanh(d / std d) (with N - 1 in the standard deviation) and 1. Raises `ValueError` where d is constant."""
    gap = np.asarray(lengths, np.float64) - np.asarray(others, np.float64)
    spread = gap.std(ddof=1)
    if not spread > 0:
        raise ValueError("the gap of the lengths does not vary")
    return np.stack([np.tanh(gap / spread), np.ones_like(gap)], axis=1)


def _log_loss(y: np.ndarray, predicted: np.ndarray, chance: np.ndarray) -> float:
    """Log loss with the chances themselves, of rows that stand once as a win and once as a loss."""
    wanted = np.where(y == 1, chance, 1 - chance)
    predicted = np.clip(predicted, _EPSILON, 1 - _EPSILON)
    return float(-np.mean(wanted * np.log(predicted) + (1 - wanted) * np.log(1 - predicted)))


def _twice(x: np.ndarray, verdicts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each row as a win and as a loss: features [2N, 2], labels, weights."""
    labels = np.repeat([1, 0], len(x))
    return np.concatenate([x, x]), labels, np.concatenate([verdicts, 1 - verdicts])


def _with_both(labels: np.ndarray, weights: np.ndarray, sets: Iterable[np.ndarray]) -> np.ndarray:
    """The weights, with a row of either class in each of the `sets` of rows that are fitted.

    liblinear leaves out what weighs nothing, and takes the class of the first row that is left as its positive one; and
    it says on stderr, once a fit, that it misses the other. One row of weight `_LEAST` moves no coefficient beyond its
    tolerance.
    """
    weights = weights.copy()
    for rows in sets:
        for label in (0, 1):
            own = rows[labels[rows] == label]
            if not weights[own].any():
                weights[own[0]] = _LEAST
    return weights


def fit(x: np.ndarray, verdicts: np.ndarray) -> tuple[float, float, float]:
    """(theta, phi, C) of the design `x` [N, 2] and verdicts [N]; C, scikit-learn's inverse strength, chosen by folds.

    Raises `ValueError` for fewer rows than folds, and for verdicts that are all wins, or all losses.
    """
    # Not at the top: scikit-learn takes a second to import, and only this needs it.
    from sklearn import config_context
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    if len(x) < FOLDS:
        raise ValueError(f"{len(x)} verdicts are fewer than {FOLDS}")
    for all_of, name in ((1, "wins"), (0, "losses")):
        if (verdicts == all_of).all():
            raise ValueError(f"all {len(x)} verdicts are {name}, and there is nothing to fit")
    features, labels, weights = _twice(x, verdicts)
    folds, groups = GroupKFold(n_splits=FOLDS), np.tile(np.arange(len(x)), 2)
    fitted = _with_both(labels, weights, (rows for rows, _ in folds.split(features, labels, groups)))
    with config_context(enable_metadata_routing=True):
        scorer: Any = make_scorer(_log_loss, response_method="predict_proba", greater_is_better=False)
        # Its annotations, read from the defaults, call two of these texts.
        made: Any = LogisticRegressionCV
        model = made(
            cv=folds,
            scoring=scorer.set_score_request(chance=True),
            l1_ratios=(1.0,),
            solver="liblinear",
            fit_intercept=False,
            random_state=SEED,
            use_legacy_attributes=False,
        )
        model.set_fit_request(sample_weight=True)
        model.fit(features, labels, sample_weight=fitted, groups=groups, chance=weights)
    phi, theta = model.coef_[0]
    return float(theta), float(phi), float(model.C_)


def fit_at(x: np.ndarray, verdicts: np.ndarray, strength: float) -> tuple[float, float]:
    """(theta, phi) at C = `strength`: one fit, no folds."""
    from sklearn.linear_model import LogisticRegression

    features, labels, weights = _twice(x, verdicts)
    weights = _with_both(labels, weights, [np.arange(len(labels))])
    model = LogisticRegression(
        C=strength, l1_ratio=1.0, solver="liblinear", fit_intercept=False, random_state=SEED
    ).fit(features, labels, sample_weight=weights)
    phi, theta = model.coef_[0]
    return float(theta), float(phi)


def controlled_figures(verdicts: np.ndarray, lengths: np.ndarray, others: np.ndarray, *, seed: int) -> dict[str, Any]:
    """The rate at equal length: `win_rate`, `interval` (bootstrap over verdicts), theta, phi, C.

    Args:
      verdicts: [N] in [0, 1], the chance that the answer won.
      lengths, others: [N] characters of the answer and of the other one.

    Raises:
      ValueError: where there is none: fewer verdicts than folds, all of one kind, lengths whose gap does not vary, or
        a penalty, chosen by the folds, that leaves nothing (theta is 0, of all verdicts and of nearly all samples, or
        phi is 0, too): 1/2 is then no measurement.
    """
    x = design(lengths, others)
    theta, phi, strength = fit(x, verdicts)
    if theta == phi == 0:
        raise ValueError(f"the penalty that the folds chose (C = {strength:.3g}) leaves no coefficient: {_NOTHING}")
    rng, rates = np.random.default_rng(seed), []
    for _ in range(REFITS):
        drawn = rng.integers(len(x), size=len(x))
        gap = lengths[drawn] - others[drawn]
        if gap.std() > 0:
            rates.append(_sigma(fit_at(design(lengths[drawn], others[drawn]), verdicts[drawn], strength)[0]))
    low, high = np.quantile(rates, [0.025, 0.975])
    if theta == 0 and low == high:
        raise ValueError(f"the penalty that the folds chose (C = {strength:.3g}) leaves length alone: {_NOTHING}")
    return {
        "win_rate": float(_sigma(theta)),
        "interval": [float(low), float(high)],
        "theta": theta,
        "phi": phi,
        "C": strength,
    }


def _sigma(x: float) -> float:
    return float(np.exp(-np.logaddexp(0, -x)))
