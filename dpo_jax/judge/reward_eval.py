"""`dpo-jax eval` of a reward model: accuracy by group, calibration, length, AUC, a second judge; tables and plots."""

from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import EvalRun, RewardLossConfig
from dpo_jax.data.sets.comparison_sets import load_comparisons
from dpo_jax.data.sets.dataset import PreferenceDataset, check_lengths
from dpo_jax.data.sets.loader import eval_batches
from dpo_jax.data.tokens import cuts
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_json
from dpo_jax.files.log import say
from dpo_jax.judge.figures import rewards as reward_judgement
from dpo_jax.judge.loading import Setting, check_output, load_vocabulary
from dpo_jax.judge.reward_model import RewardModel, check_score
from dpo_jax.report import html, terminal
from dpo_jax.report.datasets import data_section
from dpo_jax.report.statistics import correlation, ranked
from dpo_jax.weights.opened import open_checkpoint


def evaluate(run: EvalRun) -> dict[str, Any]:
    """Judge the reward model `run.model` on comparisons of any layout; ties are left out, and counted.

    The result holds `model`, `data`, `pairs` (rows), `dropped`, the figures of `reward_judgement.figures`; with
    --judge, or where the rows have scores, those of agreement; under `tables` the groups, under `calibration` the bins.
    Raises `InputError`.
    """
    if run.reference is not None or run.samples is not None:
        raise InputError("--reference and --samples have no effect: --model is a reward model, which writes no texts")
    setting = Setting.of(run.mesh, run.data, run)
    out, page = (None if path is None else check_output(path, run.data.files) for path in (run.out, run.report))
    if out is not None and page is not None:
        check_output(page, str(out))
    data, scores = _judged(run, run.model, setting)
    lengths, ranks = data.response_lengths, data.ranks
    result: dict[str, Any] = {
        "model": run.model,
        "judge": run.judge,
        "data": run.data.files,
        "pairs": len(data),
        "dropped": dict(data.dropped),
        "cut": dict(cuts.counts(data.cuts)),
        **reward_judgement.figures(scores, lengths, ranks),
    }
    if run.judge is not None:
        others = _second(run, setting, data)
        result |= reward_judgement.agreement(scores, others, lengths, ranks)
    result |= _beside_scores(data, scores)
    pairs = reward_judgement.pairs_of(scores, lengths, ranks)
    bins = reward_judgement.calibration(pairs)
    result["tables"] = reward_judgement.tables(scores, lengths, ranks, data.extras)
    result["calibration"] = [
        {"predicted": float(p), "observed": float(o), "share": float(s)}
        for p, o, s in zip(bins.predicted, bins.observed, bins.share, strict=True)
    ]
    _show(result)
    if out is not None:
        write_json(out, result)
        say(f"{out}: written")
    if page is not None:
        _write_report(page, result, data, scores, pairs, bins)
        say(f"{page}: written")
    return result


def _judged(run: EvalRun, source: str, setting: Setting) -> tuple[PreferenceDataset, np.ndarray]:
    """The comparisons as the tokenizer of `source` reads them, and its scores [N, K]."""
    place = open_checkpoint(source)
    architecture, tokenizer = load_vocabulary(place, run.data if source == run.model else None)
    check_score(source, architecture)
    rules = RewardLossConfig(ties="drop")
    data = load_comparisons(
        run.data.files, tokenizer, run.data, rules, vocab_size=architecture.vocab_size, on_bad_rows=run.on_bad_rows
    )
    check_lengths(data, architecture, run.data.max_length)
    say(data.summary())
    model, variables = setting.load(place, tokenizer)
    rewards = RewardModel(model, variables, mesh=setting.mesh, batch_size=run.batch_size)
    return data, rewards.rewards(eval_batches(data, run.batch_size, run.data.buckets), f"scores of {source}")


def _second(run: EvalRun, setting: Setting, data: PreferenceDataset) -> np.ndarray:
    """The second judge's scores of the same rows and responses."""
    assert run.judge is not None
    other, scores = _judged(run, run.judge, setting)
    if not np.array_equal(other.row_numbers, data.row_numbers) or scores.shape != data.response_lengths.shape:
        raise InputError(
            f"--judge {run.judge}: its tokenizer leaves out other rows than that of {run.model}; shorten or remove the"
            " rows that only one of them can use"
        )
    return scores


def _beside_scores(data: PreferenceDataset, scores: np.ndarray) -> dict[str, float]:
    """Spearman's correlation of the margin with the gap of the scores that the rows give, where they give some."""
    gaps = data.extras.get("score_gap", [])
    at = np.asarray([i for i, gap in enumerate(gaps) if gap is not None], int)
    if len(at) < 2:
        return {}
    margins = scores[at, 0] - scores[at, 1]
    given = np.asarray([gaps[i] for i in at], np.float64)
    correlated = correlation(ranked(margins), ranked(given))
    return {"eval_score_gap_correlation": correlated}


def _show(result: dict[str, Any]) -> None:
    """The result as tables on stdout."""
    title = f"{result['model']} on {result['pairs']:,} rows of {result['data']}"
    groups = (terminal.table(f"by {column}", _group(column, rows)) for column, rows in result["tables"].items())
    terminal.show(terminal.table(title, _figures(result)), *groups)


def _figures(result: dict[str, Any]) -> html.Table:
    rows = [(name, f"{value:.4f}") for name, value in result.items() if name.startswith(("eval_", "judge/"))]
    return html.Table(("figure", "value"), rows)


def _group(column: str, rows: list[dict[str, Any]]) -> html.Table:
    names = ("pairs", "accuracy", "error", "margin")
    cells = [
        ("(none)" if row["value"] is None else row["value"], f"{row['pairs']:g}", *(f"{row[x]:.4f}" for x in names[1:]))
        for row in rows
    ]
    return html.Table((column, *names), cells)


def _write_report(
    path: Path,
    result: dict[str, Any],
    data: PreferenceDataset,
    scores: np.ndarray,
    pairs: reward_judgement.Pairs,
    bins: reward_judgement.Calibration,
) -> None:
    present = data.response_lengths > 0
    edges = np.linspace(scores[present].min(), scores[present].max() + 1e-6, 41)

    sides = {"better": pairs.scores[:, 0], "worse": pairs.scores[:, 1]}
    by_length = _by_length(scores[present], data.response_lengths[present])
    plots = (
        html.histogram("Scores", sides, edges, x_label="score"),
        html.Plot(
            f"Reliability (ECE {bins.error:.3f})",
            (html.Series("observed accuracy", bins.predicted.tolist(), bins.observed.tolist()),),
            x_label="predicted: sigmoid of the margin",
            diagonal=True,
        ),
        html.Plot("Mean score by length", (by_length,), x_label="tokens of the response"),
    )
    groups = (html.Section(f"By {column}", table=_group(column, rows)) for column, rows in result["tables"].items())
    sections = [
        html.Section("Figures", table=_figures(result)),
        html.Section("Scores, calibration, length", "The grey line is perfect calibration.", plots=plots),
        *groups,
        data_section("Data", data),
    ]
    summary = f"{result['model']} on {result['pairs']:,} comparisons of {result['data']}."
    html.write_report(path, "Reward model evaluation", summary, sections)


def _by_length(scores: np.ndarray, lengths: np.ndarray) -> html.Series:
    """Mean score of equally many responses, from the shortest to the longest."""
    order = np.argsort(lengths, kind="stable")
    parts = [part for part in np.array_split(order, 12) if len(part)]
    return html.Series("score", [float(lengths[p].mean()) for p in parts], [float(scores[p].mean()) for p in parts])
