"""How an option says its default, what it may be and where it has an effect, and how it is refused: in one line."""

import dataclasses
import datetime
import inspect
import math
from collections.abc import Iterator, Mapping
from functools import cache, partial, reduce
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_type_hints

from dpo_jax.errors import InputError

ON_COMMAND_LINE = "(given on the command line)"
"""Stands in a CONFIG.py for a field that the command line must give: the model, the data, the run folder."""
SET_BY_RECIPE = "(set by the recipe)"
"""Stands in the run of a stage for what the recipe fills in: its model, its data, its folder, its reward."""
OPEN: dict[str, Any] = {"model": ON_COMMAND_LINE, "out": ON_COMMAND_LINE}
"""What nearly every CONFIG.py leaves open; the data too, which need no word."""


def require(condition: object, message: str) -> None:
    if not condition:
        raise InputError(message)


def require_day(date: str | None, option: str) -> None:
    """Refuse a day that is not written as YYYY-MM-DD."""
    try:
        same = date is None or datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        same = False
    require(same, f"{option} {date} is no day; write it as YYYY-MM-DD")


# ---------------------------------------------------------------- what a number may be


@dataclasses.dataclass(frozen=True)
class Within:
    """An interval, which stands in the type of an option: `Options` refuses numbers outside."""

    low: float
    """Its lower end."""
    high: float = math.inf
    """Its upper end."""
    ends: Literal["[]", "[)", "(]", "()"] = "[)"
    """A square one belongs to it."""
    why: str = ""
    """Said behind a refusal, where it helps."""

    def fault(self, number: float) -> str | None:
        """What is wrong with a number, to be said behind it; None where nothing is."""
        told = self._fault(number)
        return f"{told} ({self.why})" if told and self.why and math.isfinite(number) else told

    def _fault(self, number: float) -> str | None:
        above = self.low <= number if self.ends[0] == "[" else self.low < number
        if above and (number <= self.high if self.ends[1] == "]" else number < self.high):
            return None
        if self.high < math.inf:
            high = f"2^{self.high.bit_length() - 1}" if isinstance(self.high, int) and self.high > 2**16 else self.high
            return f"must lie in {self.ends[0]}{self.low}, {high}{self.ends[1]}"
        if above:
            return "must be finite"
        if self.low == -math.inf:
            return "must be a finite number"
        if self.low == 0:
            return "must be positive" if self.ends[0] == "(" else "must not be negative"
        return f"must be {'at least' if self.ends[0] == '[' else 'greater than'} {self.low}"


Count = Annotated[int, Within(1)]
Several = Annotated[int, Within(2)]
NotNegative = Annotated[float, Within(0)]
Positive = Annotated[float, Within(0, ends="()")]
Warm = Annotated[float, Within(0, ends="()", why="at 0, greedy, all samples would be equal")]
"""A temperature of several samples of one prompt."""
Finite = Annotated[float, Within(-math.inf, ends="()")]
Share = Annotated[float, Within(0, 1, "()")]
UpToOne = Annotated[float, Within(0, 1, "(]")]
Unit = Annotated[float, Within(0, 1, "[]")]
Seed = Annotated[int, Within(0, 2**32)]
RecipeSeed = Annotated[int, Within(0, 2**31)]
"""Of which other seeds are made."""


@cache
def _intervals(cls: type["Options"]) -> tuple[tuple[str, str, Within], ...]:
    """Options, their spelling, and what each may be, or each of its numbers where it takes several."""
    owners = {name: owner for owner in reversed(cls.__mro__) for name in inspect.get_annotations(owner)}
    hints = get_type_hints(cls, include_extras=True)
    intervals = ((name, found) for name, kind in hints.items() for found in _within(kind))
    return tuple((name, f"{owners[name]._prefix}{name}", found) for name, found in intervals)


def _within(kind: Any) -> Iterator[Within]:
    yield from (one for one in getattr(kind, "__metadata__", ()) if isinstance(one, Within))
    for part in get_args(kind):
        yield from _within(part)


# ---------------------------------------------------------------- fields


def not_given(
    value: Any = None, *, by: tuple[str, Mapping[str, Any]] = ("", {}), needs: str = "", **only: tuple[str, ...]
) -> Any:
    """The default of an option that is None where it was not given: then `value` stands for it.

    by: another option of the same class, and what stands for this one at some of its values. needs: one without which
    this one has no effect. only: the option on whose value that depends, and the values that it belongs to.
    """
    return dataclasses.field(default=None, metadata={"value": value, "by": by, "needs": needs, "only": only})


def part(section: Any, *, without: tuple[str, ...] = (), instead: str = "leave it out", **usual: Any) -> Any:
    """A section of a command's options, or the run of a recipe's stage.

    without: options of it (or sections inside it) that the command does not read: they are no options of the command,
    and refused where a CONFIG.py gives them, with `instead` as advice. usual: defaults other than those of `section`.
    """
    # One instance for all, since nothing in it changes.
    return dataclasses.field(
        default_factory=cache(partial(section, **usual)), metadata={"without": without, "instead": instead}
    )


def no_option(section: Any = None) -> Any:
    """A field that is no option of the command: None, or a section as it is."""
    told: Any = {"default": None} if section is None else {"default_factory": cache(section)}
    return dataclasses.field(metadata={"hidden": True}, **told)


def stage(run: Any, *without: str, **usual: Any) -> Any:
    """The run of a recipe's stage, without what the recipe sets and what means nothing there. Else as `part`."""
    return part(run, without=(*_NO_STAGE, *without), **_SET, **usual)


_SET = dict.fromkeys(("model", "data", "out"), SET_BY_RECIPE)
_NO_STAGE = (
    *("model", "data.files", "data.columns", "eval_data", "out", "ignore_config_keys", "push_to_hub", "log"),
    *("checkpoint.best", "train.eval_every", "train.stop_after", "distributed"),
)


@cache
def left_out(cls: Any) -> tuple[str, ...]:
    """Names such as `train.layout` of fields inside a command's sections that are no options of it."""
    found: list[str] = []
    for field in dataclasses.fields(cls):
        if "hidden" in field.metadata:
            found += [f"{field.name}{rest}" for rest in _leaves(field.type)]
        elif dataclasses.is_dataclass(field.type):
            for name in (*field.metadata.get("without", ()), *left_out(field.type)):
                kind: Any = field.type
                for one in name.split("."):
                    kind = kind.__dataclass_fields__[one].type
                found += [f"{field.name}.{name}{rest}" for rest in _leaves(kind)]
    return tuple(dict.fromkeys(found))


def _leaves(kind: Any) -> list[str]:
    """What stands behind the name of a field of this type: `.NAME` of each option of a section."""
    return [f".{one.name}" for one in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else [""]


# ---------------------------------------------------------------- classes of options


class Options:
    """Options of which some are None where they were not given, as in `class TrainConfig(Options, prefix="--train.")`.

    They are checked by what their types and fields say (`Within`, `not_given`, `part`) when an instance is made.
    """

    settled: Any
    """Every option under its own name: as given, or what stands for it where it was not. (No field: this class is no
    dataclass.)"""
    _prefix: ClassVar[str] = "--"
    """Stands before the names of the class's own fields in messages."""

    def __init_subclass__(cls, *, prefix: str | None = None) -> None:
        if prefix is not None:
            cls._prefix = prefix

    def __post_init__(self) -> None:
        """Refuse numbers that an option does not take, and what was given and has no effect beside the others."""
        prefix, fields = self._prefix, self.fields()
        vars(self)["settled"] = SimpleNamespace(**self._settle({name: getattr(self, name) for name in fields}))
        for name, spelled, interval in _intervals(type(self)):
            given = getattr(self, name)
            for number in given if isinstance(given, tuple) else () if given is None else (given,):
                fault = interval.fault(number)
                require(fault is None, f"{spelled} {number} {fault}")
        for name, field in fields.items():
            given, needs = getattr(self, name), field.metadata.get("needs")
            if given is None:
                continue
            require(not needs or getattr(self, needs), f"{prefix}{name} has no effect without {prefix}{needs}")
            for choice, allowed in field.metadata.get("only", {}).items():
                chosen = getattr(self.settled, choice)
                require(
                    set(allowed) & set(str(chosen).split(",")),
                    f"{prefix}{name} has no effect with {prefix}{choice} {chosen}; it belongs to {', '.join(allowed)}",
                )
            for inner in field.metadata.get("without", ()):
                chosen, plain = (reduce(getattr, inner.split("."), one) for one in (given, self.usual(name)))
                idle = chosen not in (plain, ON_COMMAND_LINE, SET_BY_RECIPE)
                require(not idle, f"{prefix}{name}.{inner} has no effect here: {field.metadata['instead']}")

    @classmethod
    def fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """Of the class, by name."""
        return vars(cls)["__dataclass_fields__"]

    def given(self, name: str) -> bool:
        """Whether an option, or anything in a section, is not as it is where nothing is given."""
        return getattr(self, name) != self.usual(name)

    @classmethod
    def usual(cls, name: str) -> Any:
        """An option or a section where nothing is given."""
        field = cls.fields()[name]
        made = field.default_factory
        return field.default if made is dataclasses.MISSING else made()

    def filled(self, **found: Any) -> Self:
        """With what a run finds out by itself, of a section a mapping: nobody typed it, so nothing is refused again."""
        values = {name: getattr(self, name) for name in self.fields()} | found
        for name in (one for one, new in found.items() if isinstance(new, Mapping)):
            values[name] = getattr(self, name).filled(**found[name])
        return self.of_checked(**values)

    @classmethod
    def of_checked(cls, **values: Any) -> Self:
        """An instance of values that need no check: others have checked them, or nobody typed them."""
        if unknown := values.keys() - cls.fields().keys():
            raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
        made = object.__new__(cls)
        given = {name: values[name] if name in values else cls.usual(name) for name in cls.fields()}
        vars(made).update(given, settled=SimpleNamespace(**cls._settle(given)))
        return made

    @classmethod
    def _settle(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What every option is, where these are given and None stands for the others."""

        def instead(metadata: Mapping[str, Any]) -> Any:
            other, values = metadata.get("by", ("", {}))
            return values.get(given.get(other), metadata.get("value"))

        fields = cls.fields()
        return {name: instead(fields[name].metadata) if value is None else value for name, value in given.items()}
