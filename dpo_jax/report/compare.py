"""Several runs on one page: their curves over each other, the options in which they differ, their last figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.config.names import option
from dpo_jax.errors import InputError, nearest
from dpo_jax.files.folder import RunFolder
from dpo_jax.files.log import Row, read_metrics
from dpo_jax.report import html
from dpo_jax.report.samples import compared_section, training_samples


@dataclass(frozen=True)
class Told:
    """What a run folder says.

    Attributes:
      name: in legends.
      options: resolved, by the names of the fields.
      rows: of metrics.jsonl.
      samples: what it wrote to fixed prompts (`--train.sample_every`), by step.
    """

    name: str
    options: Mapping[str, Any]
    rows: Sequence[Row]
    samples: Sequence[Mapping[str, Any]] = ()


def read_runs(places: Sequence[str]) -> list[Told]:
    """The runs in these folders. Raises `InputError` for a folder that holds none, or none that has made a step."""
    runs, seen = [], dict[Path, str]()
    for place in places:
        path = Path(place).expanduser()
        if path.resolve() in seen:
            raise InputError(f"{seen[path.resolve()]} and {place} are one run; name each once")
        seen[path.resolve()] = place
        if not (path / "run.json").is_file():
            raise InputError(f"{place}: is no run folder{nearest(place)}; give the --out of a training command")
        rows = [row for row in read_metrics(path / "metrics.jsonl") if "step" in row]
        if not rows:
            raise InputError(f"{place}: its metrics.jsonl has no step yet")
        same = [other for other in places if Path(other).expanduser().name == path.name]
        runs.append(Told(path.name if len(same) == 1 else place, _options(path), rows, training_samples(path)))
    return runs


def _options(path: Path) -> dict[str, Any]:
    try:
        return RunFolder(path, "", {}).resolved()
    except InputError as error:
        raise InputError(f"{path / 'config.json'}: not readable as the options of a run; leave this run out") from error


def sections(runs: Sequence[Told]) -> list[html.Section]:
    """What differs, the last figures, the curves, and the last samples of those that wrote some while they learnt."""
    wrote = {run.name: run.samples for run in runs if run.samples}
    return [_different(runs), _last(runs), _curves(runs), *([compared_section(wrote)] if wrote else [])]


def _different(runs: Sequence[Told]) -> html.Section:
    names = dict.fromkeys(name for run in runs for name in run.options if name != "out")
    rows = []
    for name in names:
        values = [run.options.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append((option(name), *("not given" if value is None else value for value in values)))
    if not rows:
        return html.Section("Options that differ", "None but --out.")
    return html.Section("Options that differ", table=html.Table(("option", *(run.name for run in runs)), rows))


def _last(runs: Sequence[Told]) -> html.Section:
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    cells = []
    for name in names:
        found = [next((row[name] for row in reversed(run.rows) if name in row), None) for run in runs]
        cells.append((name, *("" if value is None else f"{value:.6g}" for value in found)))
    return html.Section("Last figures", table=html.Table(("figure", *(run.name for run in runs)), cells))


def _curves(runs: Sequence[Told]) -> html.Section:
    plots = []
    for title, names in html.FIGURES:
        drawn = {name: [html.of_run(run.rows, name, run.name) for run in runs] for name in names}
        shown = {name: tuple(one for one in series if one.x) for name, series in drawn.items()}
        shown = {name: series for name, series in shown.items() if series}
        for name, series in shown.items():
            plots.append(html.Plot(title if len(shown) == 1 else f"{title} ({name})", series))
    return html.Section("Training", html.CURVES, plots=tuple(plots))
