"""From log-probabilities of preference pairs to the figures of `dpo-jax eval`: numpy in, plain numbers out.

Notation as in `align/losses.py`: L and R are summed log-probabilities under the policy and the reference, [N, 2] with
chosen first, and n the token counts [N, 2].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.report.statistics import Figures
from dpo_jax.types import CHOSEN, REJECTED

COLUMNS = ("rating", "source")
"""Columns of the data that get a table of their own where they are there."""

MOST_GROUPS = 50
"""A column with more values than this is no grouping (an id, a score with decimals) and gets no table."""


def _accuracy(scores: np.ndarray) -> float:
    """Share of pairs whose chosen score is strictly larger."""
    return float((scores[:, CHOSEN] > scores[:, REJECTED]).mean())


def figures(
    policy: np.ndarray, lengths: np.ndarray, reference: np.ndarray | None = None, *, beta: float = 0.1
) -> Figures:
    """The figures of N pairs.

    Args:
      policy: [N, 2] summed log-probabilities in nats.
      lengths: int [N, 2] response tokens, the terminator included.
      reference: [N, 2] like `policy`, or None.
      beta: scale of the rewards beta (L - R).

    Returns:
      Always: eval_logps/{chosen,rejected} (means of sums), eval_logps/accuracies (share of pairs with L_c > L_r),
      eval_logps/token_accuracies (the same per token, L/n), eval_perplexity/{chosen,rejected} (exp of minus all
      log-probabilities over all tokens), eval_lengths/{chosen,rejected} (means), eval_lengths/{chosen,rejected}_median,
      eval_lengths/chosen_longer (share of pairs), eval_lengths/accuracies (what choosing the longer one would score).
      With a reference: eval_rewards/{chosen,rejected,margins,accuracies} as in training, eval_rewards/accuracies_error
      (binomial standard error), eval_reference_perplexity/{chosen,rejected}, and eval_log_ratio/{chosen,rejected}
      (mean L - R per token: how far the policy has moved on these texts).
    """
    pairs = len(policy)
    result = {
        "eval_logps/accuracies": _accuracy(policy),
        "eval_logps/token_accuracies": _accuracy(policy / lengths),
        "eval_lengths/chosen_longer": float((lengths[:, CHOSEN] > lengths[:, REJECTED]).mean()),
    }
    # Choosing the longer one, ties by a coin: the score that a judge of length alone would get.
    result["eval_lengths/accuracies"] = result["eval_lengths/chosen_longer"] + 0.5 * float(
        (lengths[:, CHOSEN] == lengths[:, REJECTED]).mean()
    )
    for name, k in (("chosen", CHOSEN), ("rejected", REJECTED)):
        tokens = lengths[:, k].sum()
        result[f"eval_logps/{name}"] = float(policy[:, k].mean())
        result[f"eval_perplexity/{name}"] = float(np.exp(-policy[:, k].sum() / tokens))
        result[f"eval_lengths/{name}"] = float(lengths[:, k].mean())
        result[f"eval_lengths/{name}_median"] = float(np.median(lengths[:, k]))
        if reference is not None:
            ratio = policy[:, k] - reference[:, k]
            result[f"eval_rewards/{name}"] = float(beta * ratio.mean())
            result[f"eval_reference_perplexity/{name}"] = float(np.exp(-reference[:, k].sum() / tokens))
            result[f"eval_log_ratio/{name}"] = float(ratio.sum() / tokens)
    if reference is not None:
        accuracy = _accuracy(policy - reference)
        result["eval_rewards/margins"] = result["eval_rewards/chosen"] - result["eval_rewards/rejected"]
        result["eval_rewards/accuracies"] = accuracy
        result["eval_rewards/accuracies_error"] = float(np.sqrt(accuracy * (1 - accuracy) / pairs))
    return result


def tables(
    policy: np.ndarray,
    lengths: np.ndarray,
    reference: np.ndarray | None,
    extras: Mapping[str, Sequence[Any]],
    *,
    beta: float = 0.1,
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy and margin by value, for each of `COLUMNS` that the rows have: {column: [{value, pairs, ...}]}.

    `extras` is column -> N values. Rows without one are gathered under the value None. `accuracy` and `margin` are
    those of the rewards where there is a reference, of the summed log-probabilities otherwise.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    scores = policy if reference is None else beta * (policy - reference)
    for column in COLUMNS:
        values = [_label(value) for value in extras.get(column, ())]
        kinds = sorted(set(values), key=lambda value: (value is None, str(value)))
        if kinds in ([], [None]) or len(kinds) > MOST_GROUPS:
            continue
        found[column] = []
        for kind in kinds:
            at = np.array([value == kind for value in values])
            accuracy = _accuracy(scores[at])
            found[column].append(
                {
                    "value": kind,
                    "pairs": int(at.sum()),
                    "accuracy": accuracy,
                    "error": float(np.sqrt(accuracy * (1 - accuracy) / at.sum())),
                    "margin": float((scores[at, CHOSEN] - scores[at, REJECTED]).mean()),
                    "length_chosen": float(lengths[at, CHOSEN].mean()),
                    "length_rejected": float(lengths[at, REJECTED].mean()),
                }
            )
    return found


def _label(value: Any) -> str | int | float | bool | None:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
