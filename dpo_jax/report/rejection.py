"""What rejection sampling found: the figures of its iterations, and its curves (Llama 2, Figures 7 and 8).

Everything here follows from the files of the run, so a run that was killed and gone on with tells the same.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpo_jax.align import rejection
from dpo_jax.errors import InputError
from dpo_jax.files.folder import writing
from dpo_jax.files.jsonl import Row
from dpo_jax.report import html
from dpo_jax.report.samples import prompt_text
from dpo_jax.report.statistics import as_matrix, interval, moved
from dpo_jax.report.text_health import health

MANY = 24
"""Up to so many samples the curves have a point for each K; beyond, K grows by a fifth from point to point."""

Figures = dict[str, Any]
Tokens = Callable[[str], list[int]]
"""A text as ids, of which its diversity and repetition are counted."""


def text_figures(samples: Sequence[Row], ids: Tokens) -> dict[str, float]:
    """Health of the responses, and the share of them that ended by themselves."""
    found = health([ids(row["response"]) for row in samples])
    found["length"] = float(np.mean([row["tokens"] for row in samples]))  # the terminator included
    found["ended"] = float(np.mean([row["finish_reason"] == "stop" for row in samples]))
    names = ("distinct_1", "distinct_2", "distinct_3", "repetition_4", "looping", "longest_repeat", "length", "ended")
    return {name: found[name] for name in names}


def sampled(
    samples: Sequence[Row],
    scores: Sequence[Row],
    pool: Sequence[Row],
    learnt: Sequence[Row],
    ids: Tokens,
    *,
    iteration: int,
) -> dict[str, float]:
    """Figures of an iteration: of its samples, of the pool after it, and of what is learnt.

    `iteration`: its number in the pool.
    """
    prompts = len({row["row"] for row in samples})
    every = as_matrix(scores, prompts)
    usable = np.where(np.isfinite(every), every, np.nan)
    return {
        "rewards/mean": float(np.nanmean(usable)),
        "rewards/median": float(np.nanmedian(usable)),
        "rewards/max": float(np.nanmax(usable)),
        "rewards/best": float(np.nanmax(usable, axis=1).mean()),
        "rewards/pool": float(np.mean([row["score"] for row in pool])),
        "rewards/learnt": float(np.mean([row["score"] for row in learnt])),
        "pool/size": len(pool),
        "pool/learnt": len(learnt),
        "pool/from_this_iteration": float(np.mean([row["iteration"] == iteration for row in pool])),
        **{f"samples/{name}": value for name, value in text_figures(samples, ids).items()},
    }


def per_prompt(scores: Sequence[Row], prompts: int) -> np.ndarray:
    """Mean score of each held-out prompt's responses, [prompts]; NaN where none is finite."""
    every = as_matrix(scores, prompts)
    finite = np.isfinite(every)
    with np.errstate(invalid="ignore"):
        return np.where(finite, every, 0).sum(axis=1, dtype=np.float64) / finite.sum(axis=1)


def heldout(
    samples: Sequence[Row], scores: Sequence[Row], start: Sequence[Row], ids: Tokens, *, seed: int
) -> dict[str, float]:
    """Figures on the held-out prompts: the mean reward, and its change since `start`, with 95 % intervals over prompts.

    `start`: the scores of the model before the first iteration, drawn with the same random numbers.
    """
    prompts = len({row["row"] for row in samples})
    now, before = per_prompt(scores, prompts), per_prompt(start, prompts)
    both = np.isfinite(now) & np.isfinite(before)
    if not both.any():
        raise InputError("no held-out prompt has a response with a finite score before and after; mend --reward")
    low, high = interval(now[np.isfinite(now)], seed=seed)
    change_low, change_high = interval((now - before)[both], seed=seed)
    return {
        "eval_rewards/mean": float(np.nanmean(now)),
        "eval_rewards/low": low,
        "eval_rewards/high": high,
        "eval_rewards/change": float((now - before)[both].mean()),
        "eval_rewards/change_low": change_low,
        "eval_rewards/change_high": change_high,
        **{f"eval_samples/{name}": value for name, value in text_figures(samples, ids).items()},
    }


# ---------------------------------------------------------------- the reward against K


def counts_up_to(n: int) -> list[int]:
    """Values of K for a curve of N samples."""
    counts = list(range(1, min(n, MANY) + 1))
    while counts[-1] < n:
        counts.append(min(n, -(-counts[-1] * 6 // 5)))
    return counts


def curves(scores: Sequence[Row]) -> Figures:
    """The reward of the best and of the median of K samples at each temperature, and the best temperature of each K.

    Prompts with a score that is not finite are left out; where none is left there is no K.
    """
    temperatures = list(dict.fromkeys(row["temperature"] for row in scores))
    every = as_matrix(scores, len({row["row"] for row in scores}))
    every = every[np.isfinite(every).all(axis=1)]
    n = every.shape[1] // len(temperatures)
    counts = counts_up_to(n) if len(every) else []
    parts = np.split(every, len(temperatures), axis=1) if counts else []
    found = [rejection.curve(jnp.asarray(part), counts) for part in parts]
    best = rejection.best_temperature(jnp.stack([curve.maximum for curve in found])).tolist() if found else []
    return {
        "prompts": len(every),
        "counts": counts,
        "temperatures": temperatures,
        "maximum": [curve.maximum.tolist() for curve in found],
        "median": [curve.median.tolist() for curve in found],
        "best_temperature": [temperatures[j] for j in best],
    }


def reward_plot(found: Figures, iteration: int) -> html.Plot:
    """Figure 7: maximum and median reward among K samples."""
    series = []
    for name in ("maximum", "median"):
        for temperature, values in zip(found["temperatures"], found[name], strict=bool(found["counts"])):
            series.append(html.Series(f"{name}, temperature {temperature:g}", found["counts"], values))
    return html.Plot(f"Reward among K samples, iteration {iteration}", tuple(series), x_label="K, samples of a prompt")


def temperature_plot(found: Sequence[Figures]) -> html.Plot:
    """Figure 8: the temperature at which the best of K samples is best."""
    series = tuple(
        html.Series(f"iteration {t}", each["counts"], each["best_temperature"]) for t, each in enumerate(found, 1)
    )
    return html.Plot("Best temperature for the best of K", series, x_label="K, samples of a prompt")


def iterations_plot(rows: Sequence[Row]) -> html.Plot:
    """The reward after each iteration. What iteration t sampled stands at t - 1, the iterations its model has seen."""
    series = []
    for name, label, shift in (
        ("rewards/mean", "mean sample", 1),
        ("rewards/best", "mean best of the iteration", 1),
        ("rewards/pool", "mean of the pool", 1),
        ("eval_rewards/mean", "held out", 0),
        ("eval_rewards/low", "held out, 95 % interval, low", 0),
        ("eval_rewards/high", "held out, 95 % interval, high", 0),
    ):
        points = [(row["step"] - shift, row[name]) for row in rows if name in row]
        if points:
            series.append(html.Series(label, [x for x, _ in points], [y for _, y in points]))
    return html.Plot("Reward by iterations of training", tuple(series), x_label="iterations")


# ---------------------------------------------------------------- report


def verdict(rows: Sequence[Row], prompts: int) -> str:
    """The outcome in a sentence or two, whatever it is."""
    first, last = next(row for row in rows if row["step"]), rows[-1]
    told = f"Mean reward of a sample {first['rewards/mean']:.4g} before training"
    told += f"; of the bests that were learnt last {last['rewards/learnt']:.4g}."
    if "eval_rewards/mean" not in last:
        return told
    before, low, high = rows[0]["eval_rewards/mean"], last["eval_rewards/change_low"], last["eval_rewards/change_high"]
    return (
        f"{told} On {prompts} held-out prompts the mean reward {moved(low, high)}: {before:.4g} before and"
        f" {last['eval_rewards/mean']:.4g} after, a change of {last['eval_rewards/change']:+.4g} (95 % interval"
        f" {low:+.4g} to {high:+.4g})."
    )


def write(
    out: Path,
    summary: str,
    rows: Sequence[Row],
    found: Sequence[Figures],
    pool: Sequence[Row],
    texts: Sequence[Sequence[Row]],
    options: Mapping[str, Any],
) -> None:
    """`report.html`, the curves as PNG files in `figures/`, and the figures as TensorBoard events, into a run folder.

    `rows`: of metrics.jsonl; `found`: the `curves` of each iteration; `pool`: the last one; `texts`: the held-out
    responses before the first and after the last iteration, if there are any.
    """
    _write_events(out / "tensorboard", rows)
    rewards = [reward_plot(each, t) for t, each in enumerate(found, 1)]
    named = {f"reward_by_samples_{t}": plot for t, plot in enumerate(rewards, 1)}
    named |= {"best_temperature": temperature_plot(found), "reward_by_iteration": iterations_plot(rows)}
    for name, plot in named.items():
        html.write_png(out / "figures" / f"{name}.png", plot)
    sections = [
        html.Section("Reward by iteration", plots=(named["reward_by_iteration"],), table=_table(rows)),
        html.Section(
            "What more samples would bring",
            "Expected reward of the best and of the median of K samples, over all subsets of the samples (Llama 2,"
            " Figures 7 and 8). Iteration t samples from the model that has been trained t - 1 times.",
            plots=(*rewards, named["best_temperature"]),
        ),
        *_side_by_side(texts),
        html.Section(
            "Some of what was learnt last",
            "The first rows of pool.jsonl, none picked by hand.",
            table=html.Table(
                ("prompt", "best response", "score", "iteration", "temperature"),
                [
                    (prompt_text(r["prompt"]), r["completion"], f"{r['score']:.4g}", r["iteration"], r["temperature"])
                    for r in pool[:12]
                ],
                ("prompt", "best response"),
            ),
        ),
        html.options_section(options),
    ]
    html.write_report(out / "report.html", "Rejection sampling", summary, sections)


def _write_events(folder: Path, rows: Sequence[Row]) -> None:
    from tensorboardX import SummaryWriter

    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed while it wrote the report
        with SummaryWriter(str(folder)) as events:
            for row in rows:
                for name, value in row.items():
                    if name != "step":
                        events.add_scalar(name, value, row["step"])


def _table(rows: Sequence[Row]) -> html.Table:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    cells = [(name, *(f"{row[name]:.4g}" if name in row else "" for row in rows)) for name in names]
    return html.Table(("figure", *(f"iteration {row['step']}" if row["step"] else "start" for row in rows)), cells)


def _side_by_side(texts: Sequence[Sequence[Row]]) -> list[html.Section]:
    if not texts:
        return []
    both = [(a, b) for a, b in zip(texts[0], texts[-1], strict=True) if a["sample"] == 0][:24]
    cells = [(prompt_text(a["prompt"]), a["response"], b["response"]) for a, b in both]
    table = html.Table(("prompt", "before", "after"), cells, ("prompt", "before", "after"))
    note = "Held-out prompts, the first sample of each, drawn with the same random numbers; none is picked by hand."
    return [html.Section("Texts side by side", note, table=table)]
