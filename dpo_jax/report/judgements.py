"""FastChat's judgement files (lm-sys/FastChat 0e6d3e4, fastchat/llm_judge), single and pairwise, as figures.

A single judgement scores one answer of one model: the mean of a model is over all its judgements, both turns alike
(`show_result.py`). A pairwise one asks twice, with the two answers in either order: a win only where both name the
same model, all else a tie; win rate = wins / n, adjusted win rate = (wins + ties / 2) / n.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from dpo_jax.data.rows.cells import as_number, as_whole, present
from dpo_jax.data.sources.files import read_rows
from dpo_jax.data.sources.questions import FIRST, LAST, Question, category_of, question_id
from dpo_jax.errors import InputError
from dpo_jax.headers import told

Kind = Literal["single", "pair"]
UNPARSED = -1
"""The score of a judgement in which FastChat found none."""
_MOST = 1e9  # beyond it no scale ends, and sums may
_ERROR = "$ERROR$"
_WINNERS = ("model_1", "model_2", "tie", "error")
_NOT_READ = "rows are to be judgements of FastChat, with `model` and `score`, or with `model_1`, `model_2`, `g1_winner`"


@dataclass(frozen=True)
class Judgement:
    """One judgement.

    Attributes:
      models: of the one answer, or of the two.
      score: of the one answer; None of two.
      winners: what the judge said with the answers in order 1, 2 and in order 2, 1; empty of one answer.
    """

    turn: int
    category: str
    models: tuple[str, ...]
    score: float | None = None
    winners: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgements:
    """A file of judgements.

    Attributes:
      rows: those that count.
      judges: who judged with which prompts, as the file says, such as "gpt-4 single-v1".
      left_out: "unparsed" (of score -1), "error" -> rows that do not count.
      repeated: rows that judge again what an earlier row has judged; they count, as in FastChat.
    """

    kind: Kind
    rows: tuple[Judgement, ...]
    judges: tuple[str, ...]
    left_out: Mapping[str, tuple[Judgement, ...]]
    repeated: int


def read_judgements(source: str, questions: Mapping[int, Question] | None = None) -> Judgements:
    """The judgements of a file.

    Raises:
      InputError: no judgement; both kinds in one file; two judges or two versions of a prompt; a question that is not
        among `questions`, or without them not one of MT-Bench; a model against itself; a wrong field.
    """
    rows: list[Judgement] = []
    kinds: dict[Kind, int] = {}
    judges: dict[str, None] = {}
    versions: dict[str, tuple[str, int]] = {}
    seen: set[Any] = set()
    left: dict[str, list[Judgement]] = {"unparsed": [], "error": []}
    repeated = 0
    for number, cells in read_rows(source):
        where, row = f"{source}: row {number}", present(cells)
        kind: Kind = "pair" if "g1_winner" in row or "model_1" in row else "single"
        if kind == "single" and "model" not in row:
            raise InputError(f"{where}: no judgement; {_NOT_READ}")
        kinds.setdefault(kind, number)
        if len(kinds) > 1:
            raise InputError(f"{where}: is {kind}, and row {min(kinds.values())} is not; give each kind its own file")
        for name, version in _prompt(row, where):
            _check_version(versions, name, version, where, number)
        if isinstance(judge := row.get("judge"), list):
            judges[" ".join(judge)] = None
        what, judged = _row(row, kind, where, questions)
        key = (question_id(row, where), what.turn, what.models)
        repeated += key in seen
        seen.add(key)
        if judged is None:
            rows.append(what)
        else:
            left[judged].append(what)
    counted = {reason: tuple(some) for reason, some in left.items()}
    return Judgements("pair" if "pair" in kinds else "single", tuple(rows), tuple(judges), counted, repeated)


def _prompt(row: Mapping[str, Any], where: str) -> Iterable[tuple[str, str]]:
    """What must be the same in all rows: (what it is called, what it is)."""
    judge = row.get("judge")
    if judge is None:
        return
    if not isinstance(judge, list) or len(judge) != 2 or not all(isinstance(name, str) for name in judge):
        raise InputError(f"{where}: judge = {told(judge)} is not [judge, prompt], as FastChat writes it")
    yield "judge", judge[0]
    # single-v1, single-v1-multi-turn: one prompt for one and for two turns; pair-v2 goes with pair-math-v1.
    name = judge[1].removesuffix("-multi-turn")
    family = re.sub(r"-v\d+(?=-|$)", "", name)
    yield f"prompt {family}", name


def _check_version(versions: dict[str, tuple[str, int]], name: str, version: str, where: str, number: int) -> None:
    first, at = versions.setdefault(name, (version, number))
    if first != version:
        raise InputError(
            f"{where}: {name.partition(' ')[0]} {version}, and row {at} has {first}: means over both compare nothing;"
            " split the file"
        )


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: {name} = {told(value)} is no text")
    return value


def _row(
    row: Mapping[str, Any], kind: Kind, where: str, questions: Mapping[int, Question] | None
) -> tuple[Judgement, Literal["unparsed", "error"] | None]:
    """What a row says, and why it does not count."""
    name, turn = question_id(row, where), as_whole(row.get("turn", 1))
    if turn is None or not 1 <= turn <= 100:
        raise InputError(f"{where}: turn = {told(row['turn'])} is no whole number from 1 up")
    category = category_of(name, questions)
    if category is None:
        if questions is None:
            raise InputError(
                f"{where}: question {name} is none of MT-Bench's, {FIRST} to {LAST}: its category stands in the"
                " question file; give it as --questions FILE"
            )
        raise InputError(f"{where}: question {name} is not in --questions; give the set that was judged")
    failed = bool(row.get("error")) or row.get("judgment") == _ERROR
    if kind == "single":
        models, score = (_text(row, "model", where),), as_number(row.get("score"))
        if failed:
            return Judgement(turn, category, models), "error"
        if score is None or score > _MOST:
            raise InputError(f"{where}: score = {told(row.get('score'))} is no number up to {_MOST:g}")
        if score == UNPARSED:
            return Judgement(turn, category, models), "unparsed"
        if score < 0:
            raise InputError(f"{where}: score = {score:g} is negative; {UNPARSED} alone means that there is none")
        return Judgement(turn, category, models, score), None
    models = (_text(row, "model_1", where), _text(row, "model_2", where))
    if models[0] == models[1]:
        raise InputError(f"{where}: names {models[0]} twice; a model is not compared with itself")
    winners = (row.get("g1_winner"), row.get("g2_winner"))
    for at, winner in enumerate(winners, 1):
        if winner not in _WINNERS and not failed:
            raise InputError(f"{where}: g{at}_winner = {told(winner)} is none of {', '.join(_WINNERS)}")
    if failed or "error" in winners:
        return Judgement(turn, category, models), "error"
    return Judgement(turn, category, models, None, tuple(str(winner) for winner in winners)), None


class Chosen(NamedTuple):
    """Judgements that were asked for: those that count, how many do not, and models of which none does."""

    rows: tuple[Judgement, ...]
    left_out: dict[str, int]
    without: tuple[str, ...]


def chosen(found: Judgements, models: Sequence[str], baseline: str | None) -> Chosen:
    """The judgements of `models` (all of them named; none given: all), and of pairs those with `baseline`.

    Raises `InputError` for a name that is not in the file, and where nothing is left.
    """

    def asked(rows: Iterable[Judgement]) -> tuple[Judgement, ...]:
        of_models = (row for row in rows if not models or set(row.models) <= set(models))
        return tuple(row for row in of_models if baseline is None or baseline in row.models)

    there = sorted({name for row in found.rows for name in row.models})
    for name in (*models, *([] if baseline is None else [baseline])):
        if name not in there:
            raise InputError(f"{name} has no judgement that counts; those with one are {', '.join(there) or 'none'}")
    if baseline is not None and found.kind == "single":
        raise InputError("--baseline has no effect on single judgements: leave it out")
    rows, others = asked(found.rows), {reason: asked(some) for reason, some in found.left_out.items()}
    for name in models:
        if rows and not any(name in row.models for row in rows):
            raise InputError(f"--models {name}: no judgement of it is left among those of the others; leave it out")
    if not rows:
        told = f"{len(others['unparsed'])} unparsed, {len(others['error'])} with an error"
        elsewhere = ", the others of models that were not asked for" if models or baseline is not None else ""
        raise InputError(f"none of the judgements counts: {told}{elsewhere}")
    counting = {name for row in rows for name in row.models}
    without = sorted({name for some in others.values() for row in some for name in row.models} - counting)
    return Chosen(rows, {reason: len(some) for reason, some in others.items()}, tuple(without))


def summary(kind: Kind, rows: Sequence[Judgement], models: Sequence[str] = ()) -> dict[str, Any]:
    """{model: figures}, JSON-able, best model first (or in the order of `models`).

    Single: {"mean", "n", "turns": {"1": mean}, "categories": {name: mean}, "turn_categories": {"1": {name: mean}}}, and
    "counts" with the numbers behind them. Pair: {"wins", "losses", "ties", "n", "win_rate", "loss_rate",
    "win_rate_adjusted", "swap_consistency"}, and the same under "turns" and "categories".
    """
    names = list(models) or sorted({name for row in rows for name in row.models})
    made = {name: (_single if kind == "single" else _pair)(rows, name) for name in names}
    best = "mean" if kind == "single" else "win_rate_adjusted"
    return made if models else dict(sorted(made.items(), key=lambda item: (-item[1][best], item[0])))


def _by(
    rows: Iterable[Judgement], by: Literal["turn", "category"], figure: Callable[[list[Judgement]], Any]
) -> dict[str, Any]:
    """The figure of each turn, or of each category."""
    groups: dict[str, list[Judgement]] = {}
    for row in rows:
        groups.setdefault(str(getattr(row, by)), []).append(row)
    return {name: figure(groups[name]) for name in (sorted(groups) if by == "turn" else groups)}


def _mean(rows: Sequence[Judgement]) -> float:
    return math.fsum(row.score for row in rows if row.score is not None) / len(rows)


def _single(rows: Sequence[Judgement], model: str) -> dict[str, Any]:
    own = [row for row in rows if row.models == (model,)]
    return {
        "mean": _mean(own),
        "n": len(own),
        "turns": _by(own, "turn", _mean),
        "categories": _by(own, "category", _mean),
        "turn_categories": _by(own, "turn", lambda of_turn: _by(of_turn, "category", _mean)),
        "counts": {"turns": _by(own, "turn", len), "categories": _by(own, "category", len)},
    }


def outcome(row: Judgement, model: str) -> Literal["win", "loss", "tie"]:
    """What a pair is to `model`, one of its two: a win only where both orders agree, all else a tie."""
    first, second = row.winners
    if first == "tie" or first != second:
        return "tie"
    return "win" if row.models[("model_1", "model_2").index(first)] == model else "loss"


def swap_consistency(rows: Sequence[Judgement]) -> float:
    """Share of pairs in which both orders say the same, a tie included."""
    return sum(len(set(row.winners)) == 1 for row in rows) / len(rows)


def _tally(model: str, rows: Sequence[Judgement]) -> dict[str, float]:
    said = [outcome(row, model) for row in rows]
    wins, losses, ties, n = said.count("win"), said.count("loss"), said.count("tie"), len(said)
    return {
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "n": n,
        "win_rate": wins / n,
        "loss_rate": losses / n,
        "win_rate_adjusted": (wins + 0.5 * ties) / n,
        "swap_consistency": swap_consistency(rows),
    }


def _pair(rows: Sequence[Judgement], model: str) -> dict[str, Any]:
    own, tally = [row for row in rows if model in row.models], partial(_tally, model)
    return {**tally(own), "turns": _by(own, "turn", tally), "categories": _by(own, "category", tally)}
