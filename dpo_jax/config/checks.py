"""How an option says its default and where it has an effect, and how it is refused: in one line."""

import dataclasses
import datetime
import math
from typing import Any

from dpo_jax.errors import InputError

ON_COMMAND_LINE = "(given on the command line)"
"""Stands in a CONFIG.py for a field that the command line must give: the model, the data, the run folder."""
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


def not_given(value: Any = None, *, needs: str = "", **only: tuple[str, ...]) -> Any:
    """The default of an option that is None where it was not given: then `value` stands for it.

    needs: the option of the same class without which this one has no effect. only: the option on whose value that
    depends, and the values that it belongs to.
    """
    return dataclasses.field(default=None, metadata={"value": value, "needs": needs, "only": only})


class Options:
    """Options of which some are None where they were not given."""

    def resolved(self, name: str) -> Any:
        """Option `name`, or what stands for it where it was not given."""
        fields: dict[str, dataclasses.Field[Any]] = vars(type(self))["__dataclass_fields__"]
        given = getattr(self, name)
        return fields[name].metadata.get("value") if given is None else given

    def refuse_idle(self, prefix: str) -> None:
        """Refuse what was given and has no effect beside the others. `prefix`: of their names, such as `--dpo.`."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if getattr(self, field.name) is None or not field.metadata:
                continue
            name, needs = f"{prefix}{field.name}", field.metadata["needs"]
            require(not needs or getattr(self, needs), f"{name} has no effect without {prefix}{needs}")
            for choice, allowed in field.metadata["only"].items():
                chosen, belongs = self.resolved(choice), ", ".join(allowed)
                beside = f"{prefix}{choice} {chosen}"
                require(
                    set(allowed) & set(str(chosen).split(",")),
                    f"{name} has no effect with {beside}; it belongs to {belongs}",
                )

    def at_least(self, prefix: str, **least: int) -> None:
        """Refuse options, if they were given, that are less than so much."""
        for name, bound in least.items():
            given = getattr(self, name)
            require(given is None or given >= bound, f"{prefix}{name} must be at least {bound}")

    def positive(self, prefix: str, *names: str) -> None:
        """Refuse options, if they were given, that are not above 0, or not finite."""
        for name in names:
            given = getattr(self, name)
            require(given is None or given > 0, f"{prefix}{name} must be positive")
            require(given is None or given < math.inf, f"{prefix}{name} must be finite")
