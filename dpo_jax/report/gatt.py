"""What Ghost Attention changed: the share of answers that keep to the instruction of the first turn, turn by turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.config import GattRun
from dpo_jax.files.folder import as_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.log import say
from dpo_jax.report import html, terminal
from dpo_jax.report.statistics import interval, moved, share_interval
from dpo_jax.report.text_health import health


@dataclass(frozen=True)
class Share:
    """`kept` of `n` answers."""

    kept: int
    n: int

    @property
    def rate(self) -> float:
        """The share."""
        return self.kept / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95 % score interval."""
        return share_interval(self.rate, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.0%} ({low:.0%} to {high:.0%})"


def by_turn(rows: Sequence[Row]) -> dict[int, Share]:
    """turn -> the share of answers that pass all checks of their instruction; answers without a check do not count."""
    judged = [row for row in rows if row["kept"] is not None]
    turns = sorted({row["turn"] for row in judged})
    return {t: _share(row["kept"] for row in judged if row["turn"] == t) for t in turns}


def by_kind(rows: Sequence[Row], first: int) -> dict[str, Share]:
    """kind of check -> the share of answers that pass it, from turn `first` on."""
    found: dict[str, list[bool]] = {}
    for row in rows:
        for kind, passed in row["checks"].items():
            if row["turn"] >= first:
                found.setdefault(kind, []).append(passed)
    return {kind: _share(passed) for kind, passed in sorted(found.items())}


def _share(passed: Any) -> Share:
    values = list(passed)
    return Share(sum(values), len(values))


def difference(before: Sequence[Row], after: Sequence[Row], *, seed: int) -> tuple[float, tuple[float, float]]:
    """Mean over dialogues of (share kept after - share kept before), from the second turn on, and its 95 % interval.

    Of dialogues of one turn that turn counts. The interval is a bootstrap over dialogues, whose turns hang together.
    """
    change = _per_dialogue(after) - _per_dialogue(before)
    return float(change.mean()), interval(change, seed=seed)


def _per_dialogue(rows: Sequence[Row]) -> np.ndarray:
    groups: dict[int, list[bool]] = {}
    for row in rows:
        if row["turn"] >= _first(rows):
            groups.setdefault(row["dialogue"], []).append(row["kept"])
    return np.asarray([np.mean(groups[i]) for i in sorted(groups)])


def _first(rows: Sequence[Row]) -> int:
    """The first turn in which the instruction is no longer in sight."""
    return min(2, max(row["turn"] for row in rows))


# ---------------------------------------------------------------- the report


def write(run: GattRun, out: Path) -> None:
    """Write metrics.jsonl, consistency.png and report.html from the dialogues in `out`, and show the table."""
    names = {"before": "before", "after": "after"} if not run.gatt.evaluate_only else {"model": "before"}
    sides = {name: read_lines(out / f"{file}.jsonl") for name, file in names.items()}
    turns = {name: by_turn(rows) for name, rows in sides.items()}
    write_lines(out / "metrics.jsonl", _metrics(turns))
    shown = dict(turns)
    if not run.gatt.evaluate_only and (sampled := by_turn(read_lines(out / "samples.jsonl"))):
        shown["sampled with it in every turn"] = sampled
    plot = _plot(shown)
    html.write_png(out / "consistency.png", plot)
    found = verdict(run, sides)
    sections = [
        html.Section(
            "Consistency by turn",
            "Share of answers that pass the checks of the instruction, which stands in the first turn only, with 95 %"
            " intervals (Wilson). What each kind of check sees: dpo_jax/data/sources/attributes.py.",
            plots=(plot,),
            table=_table(shown),
        ),
        _kinds(sides),
        _texts(sides),
    ]
    if not run.gatt.evaluate_only:
        sections.append(html.run_section(out / "sft"))
    sections += [_examples(sides), html.options_section(as_json(run))]
    html.write_report(out / "report.html", "Ghost Attention", found, sections)
    title = "Answers that keep to the instruction of the first turn (95 % interval)"
    terminal.show(terminal.table(title, _table(shown)))
    say(found)


def verdict(run: GattRun, sides: Mapping[str, Sequence[Row]]) -> str:
    """The outcome in one sentence, whatever it is."""
    rows = list(sides.values())[-1]
    first = _first(rows)
    counted = {name: _share(row["kept"] for row in side if row["turn"] >= first) for name, side in sides.items()}
    about = f"of {len({row['dialogue'] for row in rows})} unseen dialogues, turn {first} on"
    if "after" not in sides:
        share = counted["model"]
        return f"{share.rate:.1%} of the answers keep to the instruction of the first turn ({about})."
    change, (low, high) = difference(sides["before"], sides["after"], seed=run.train.seed)
    return (
        f"The share of answers that keep to the instruction of the first turn {moved(low, high)}:"
        f" {counted['before'].rate:.1%} before, {counted['after'].rate:.1%} after, {change:+.1%} (95 % interval"
        f" {low:+.1%} to {high:+.1%}; {about})."
    )


def _metrics(turns: Mapping[str, Mapping[int, Share]]) -> list[Row]:
    """One object a turn: the share of each side with its interval, and how many answers it is of."""
    rows = []
    for turn in next(iter(turns.values())):
        row: Row = {"turn": turn}
        for name, shares in turns.items():
            low, high = shares[turn].interval
            row |= {
                f"consistency/{name}": shares[turn].rate,
                f"consistency/{name}_low": low,
                f"consistency/{name}_high": high,
                f"answers/{name}": shares[turn].n,
            }
        rows.append(row)
    return rows


def _plot(sides: Mapping[str, Mapping[int, Share]]) -> html.Plot:
    series = []
    for name, shares in sides.items():
        ends = [share.interval for share in shares.values()]
        band = ([low for low, _ in ends], [high for _, high in ends])
        series.append(html.Series(name, list(shares), [share.rate for share in shares.values()], band))
    return html.Plot("Answers that keep to the instruction", tuple(series), x_label="turn")


def _table(sides: Mapping[str, Mapping[int, Share]]) -> html.Table:
    turns = sorted({turn for shares in sides.values() for turn in shares})
    rows = [(turn, *(str(shares[turn]) if turn in shares else "" for shares in sides.values())) for turn in turns]
    return html.Table(("turn", *sides), rows)


def _kinds(sides: Mapping[str, Sequence[Row]]) -> html.Section:
    found = {name: by_kind(rows, _first(rows)) for name, rows in sides.items()}
    kinds = next(iter(found.values()))
    rows = [(kind, kinds[kind].n, *(str(shares[kind]) for shares in found.values())) for kind in kinds]
    note = (
        "The checks one by one, over all turns but the first. Turns of a dialogue hang together, so the intervals are"
    )
    return html.Section("By kind of constraint", f"{note} narrow.", table=html.Table(("kind", "n", *found), rows))


def _texts(sides: Mapping[str, Sequence[Row]]) -> html.Section:
    found = {name: health([row["ids"] for row in rows]) for name, rows in sides.items()}
    lines = (
        ("tokens an answer", "length", ".1f"),
        ("distinct tokens / tokens", "distinct_1", ".3f"),
        ("repeated 4-grams in an answer", "repetition_4", ".1%"),
        ("empty answers", "empty", ".1%"),
    )
    rows = [(line, *(format(h[key], form) for h in found.values())) for line, key, form in lines]
    return html.Section("The answers", table=html.Table(("", *found), rows))


def _examples(sides: Mapping[str, Sequence[Row]], dialogues: int = 4) -> html.Section:
    marked = {
        name: [f"{'+' if row['kept'] else '-'} {row['answer']}" for row in rows if row["dialogue"] < dialogues]
        for name, rows in sides.items()
    }
    asked = [row for row in next(iter(sides.values())) if row["dialogue"] < dialogues]
    rows = [
        (row["instruction"] if row["turn"] == 1 else "", row["turn"], row["user"], *texts)
        for row, *texts in zip(asked, *marked.values(), strict=True)
    ]
    head = ("instruction", "turn", "user", *marked)
    note = "The first dialogues; none is picked by hand. + keeps to the instruction, - does not."
    return html.Section("Dialogues", note, table=html.Table(head, rows, ("instruction", "user", *marked)))
