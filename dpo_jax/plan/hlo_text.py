"""The HLO text of a compiled program, as computations of instructions."""

import math
import re
from dataclasses import dataclass

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_DEFINITION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|\w+_computation)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    """All that follows the operands: attributes, called computations."""
    argument: str
    """What stands between the parentheses."""
    root: bool

    def called(self, attribute: str) -> str:
        """Name of the computation that `attribute` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        if found is None:
            raise ValueError(f"{self.opcode} {self.name} names no {attribute}")
        return found[1]


Computation = dict[str, Instruction]


def _closing(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"HLO line without its closing parenthesis: {text[:80]}")


def _instruction(line: str) -> Instruction | None:
    found = _DEFINITION.match(line)
    if found is None:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    argument = rest[opening + 1 : end - 1]
    return Instruction(
        name=found[2],
        shape=shape,
        opcode=rest[:opening],
        operands=tuple(_NAME.findall(argument)),
        text=rest[end:],
        argument=argument,
        root=found[1] is not None,
    )


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the one that is its entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (made := _instruction(line)) is not None:
            current[made.name] = made
    if not entry:
        raise ValueError("this HLO text has no entry computation")
    return computations, entry


def _array_bytes(kind: str, sizes: str, layout: str) -> float:
    if "S(" in layout or kind in ("token", "opaque"):
        return 0.0
    number = re.search(r"\d+", kind)
    bits = 8 if kind == "pred" else int(number[0]) if number else 0
    return math.prod(int(n) for n in sizes.split(",") if n) * bits / 8


def arrays(shape: str, *, everywhere: bool = False) -> list[float]:
    """Bytes of each array of a shape; 0 for those in on-chip memory, unless `everywhere`."""
    return [_array_bytes(k, sizes, "" if everywhere else layout) for k, sizes, layout in _ARRAY.findall(shape)]


def root_of(computation: Computation) -> Instruction:
    """What a computation returns."""
    return next(made for made in computation.values() if made.root)


def called_by(made: Instruction) -> list[str]:
    """Names of all computations that an instruction calls."""
    return [name for group in _CALLED.findall(made.text) for name in _NAME.findall(group)]
