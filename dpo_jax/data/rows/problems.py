"""Rows that cannot be used: how one is described, how many are told together.

Three kinds of problem, told apart because each asks for another answer:

* `bad`: the row breaks the format (a field is missing, the JSON is malformed). By default the whole file is checked and
  then refused; `--on_bad_rows skip` leaves such rows out.
* `noise`: what published sets really hold here and there, such as a blank response, or two conversations without a
  common prompt. Left out and counted while rare; above `NOISE_LIMIT` of the rows the file is not what it was taken for,
  and these rows count as bad.
* `lost`: the row is good, and the lengths or the template leave nothing to learn from. Always left out and counted.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from dpo_jax.errors import InputError

Severity = Literal["bad", "noise", "lost"]

NOISE_LIMIT = 0.02
"""Largest share of `noise` rows that is left out without asking."""

LONGEST_LINE = 200
"""Longest line of the log about a reason, in characters, beside the name of the file."""


class BadRow(InputError):
    """One row that cannot be used.

    Attributes:
      reason: short, the same for all rows with this problem: rows are counted by it.
      detail: what this row shows, and how to mend it; may be empty.
      severity: see the module's docstring.
    """

    def __init__(self, reason: str, detail: str = "", severity: Severity = "bad"):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.severity: Severity = severity


class Tally:
    """Counts problems by reason, and remembers the first row of each."""

    def __init__(self) -> None:
        self._counts: dict[Severity, Counter[str]] = {"bad": Counter(), "noise": Counter(), "lost": Counter()}
        self._first: dict[str, tuple[int, BadRow]] = {}

    def add(self, number: int, problem: BadRow) -> None:
        """Count `problem`, found in row `number`."""
        self._counts[problem.severity][problem.reason] += 1
        self._first.setdefault(problem.reason, (number, problem))

    def state(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        first = [[n, p.reason, p.detail, p.severity] for n, p in self._first.values()]
        return {"counts": {severity: dict(counts) for severity, counts in self._counts.items()}, "first": first}

    def take(self, state: Mapping[str, Any], before: int) -> None:
        """Count what the `state` of another holds, whose rows stand behind `before` others."""
        for severity, counts in self._counts.items():
            counts.update(state["counts"][severity])
        for number, *problem in state["first"]:
            self._first.setdefault(problem[0], (before + number, BadRow(*problem)))

    @property
    def dropped(self) -> Counter[str]:
        """How many rows were left out, by reason."""
        return self._counts["bad"] + self._counts["noise"] + self._counts["lost"]

    def describe(self, counts: Counter[str]) -> str:
        """`N x reason (first: row R: detail); ...`, the most frequent first."""
        return "; ".join(self._told(reason, count, None) for reason, count in counts.most_common())

    def _told(self, reason: str, count: int, longest: int | None) -> str:
        """One reason, cut at `longest` characters."""
        number, problem = self._first[reason]
        detail = f": {problem.detail}" if problem.detail else ""
        told = f"{count} x {reason} (first: row {number}{detail})"
        return told if longest is None or len(told) <= longest else f"{told[: longest - 3]}..."

    def refuse(self, source: str, rows: int) -> None:
        """Raise one `InputError` for all bad rows, if there are any among the `rows` read, or if no row is left."""
        if rows and self.dropped.total() >= rows:
            raise self.nothing_left(source, rows)
        counts, noise = self._counts["bad"], self._counts["noise"]
        rare = noise.total() <= NOISE_LIMIT * rows
        counts = counts if rare else counts + noise
        if counts:
            limit = "" if rare else f" (blank responses and the like go without asking up to {NOISE_LIMIT:.0%})"
            raise InputError(
                f"{source}: {counts.total()} of {rows} rows cannot be used: {self.describe(counts)}; mend these "
                f"{counts.total() / rows:.1%} of the rows, or leave them out with --on_bad_rows skip{limit}"
            )

    def nothing_left(self, source: str, rows: int) -> InputError:
        """What to raise where none of `rows` rows can be used, and to leave them out would leave nothing."""
        return InputError(f"{source}: none of {rows} rows can be used: {self.describe(self.dropped)}")

    def left_out(self, rows: int) -> list[str]:
        """What was left out of `rows` rows, for the log: a line for each reason, and how many they are in all."""
        count = self.dropped.total()
        lines = [self._told(reason, n, LONGEST_LINE) for reason, n in self.dropped.most_common()]
        return [*lines, f"{count} of {rows} rows ({count / rows:.1%})"] if count else []
