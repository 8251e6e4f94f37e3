"""What a compiled program moves, read from its HLO text: collectives by kind, and bytes to and from memory.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. The length of a loop is what
the compiler wrote beside it (`known_trip_count`), else what its condition compares its counter with. A loop whose
length depends on data (the tokens of a generation) counts `unknown_trips` times.

Bytes that a device sends, for a collective of b bytes (the whole result of an all-gather; a device's operand of the
others), inside its slice and to other slices: `hlo_groups.py`. A program for several TPU slices is that of one of them:
what crosses is a `send` to the runtime between slices, of what a device holds after the sum inside its slice.

A TPU's asynchronous collective is a chain of fusions: one starts it, others compute while it runs, one ends it; in each
of them it stands again, and its buffers go through. It counts where it starts. What a device sends in collectives that
are not asynchronous, or end before anything is computed, is counted apart (`waits`): nothing hides it. What runs on the
SparseCores of a TPU is a call of their own, begun and ended as an asynchronous collective is.

Bytes to and from memory are those of the operands and results of every instruction outside of fusions, as in XLA's
cost analysis: of a slice only the slice counts, an update in place counts what is written, and what the compiler keeps
in on-chip memory (a layout with S(n)) counts nothing.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dpo_jax.plan.hlo_groups import groups_of, sent
from dpo_jax.plan.hlo_text import Computation, Instruction, arrays, called_by, parse, root_of

_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_WORK = {"fusion", "convolution", "dot", "custom-call", "while", "call", "conditional"}
_NOTHING_MOVES = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "while",
    "call",
    "conditional",
    "iota",
}


@dataclass
class Collective:
    """All collectives of one kind, group size and number of slices in a group.

    Attributes:
      count: how often they run.
      payload: bytes they carry.
      sent: bytes that each device sends inside its slice.
      crosses: bytes that each device sends to other slices.
      waits: of `sent`, bytes while which the device computes nothing.
    """

    count: float = 0.0
    payload: float = 0.0
    sent: float = 0.0
    crosses: float = 0.0
    waits: float = 0.0


@dataclass
class Traffic:
    """What one run of a program moves, a device.

    Attributes:
      collectives: (kind, group size, slices of a group) -> what they carry.
      memory: bytes to and from memory.
      unknown_loops: loops whose length the program does not tell.
    """

    collectives: dict[tuple[str, int, int], Collective] = field(default_factory=dict)
    memory: float = 0.0
    unknown_loops: int = 0

    @property
    def sent(self) -> float:
        """Bytes that a device sends inside its slice."""
        return sum(one.sent for one in self.collectives.values())

    @property
    def crosses(self) -> float:
        """Bytes that a device sends to other slices."""
        return sum(one.crosses for one in self.collectives.values())


# ---------------------------------------------------------------- how often, and how much


def _loop_length(loop: Instruction, inside: Computation, computations: Mapping[str, Computation]) -> int | None:
    """How often a while loop runs, or None: its counter goes from `first`, by `step`, while it is less than `last`."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(found[1])
    condition, body = computations[loop.called("condition")], computations[loop.called("body")]
    start, test, after = inside[loop.operands[0]], root_of(condition), root_of(body)
    if (start.opcode, test.opcode, after.opcode) != ("tuple", "compare", "tuple") or "direction=LT" not in test.text:
        return None
    counter = _element(condition, test.operands[0])
    if counter is None:
        return None

    def fixed(computation: Computation, name: str) -> int | None:
        """A constant, also one that comes into the loop from outside and stays what it is."""
        index = _element(computation, name)
        if index is None:
            return _constant(computation, name)
        stays = _element(body, after.operands[index]) == index
        return _constant(inside, start.operands[index]) if stays else None

    first, last = _constant(inside, start.operands[counter]), fixed(condition, test.operands[1])
    step = _step(body, after.operands[counter], computations, partial(fixed, body))
    if first is None or last is None or step is None or step < 1:
        return None
    return max(-(-(last - first) // step), 0)


_BESIDE = ("async-start", "call-start")
"""Calls that run beside what follows; the second, of a TPU's SparseCores."""
_CHAINED, _STARTS, _ENDS = 'chain_id="', "AsyncCollectiveStart", "AsyncCollectiveDone"


def _goes_on(made: Instruction, inside: Computation) -> bool:
    """Whether this collective was started by a fusion before."""
    return _CHAINED in made.text and not any(_STARTS in other.text for other in inside.values())


def _hidden(made: Instruction, inside: Computation) -> bool:
    """Whether something is computed between the start of this collective and its end."""
    if _CHAINED in made.text:
        return True
    if not made.opcode.endswith("-start") or '"is_sync":true' in made.text:
        return False
    order = list(inside.values())
    start = order.index(made)
    for other in order[start + 1 :]:
        if made.name in other.operands:
            return False
        if other.opcode in _WORK and "PrepareAsync" not in other.text:  # which readies a call, and computes nothing
            return True
    return False


def _plain(computation: Computation, name: str) -> Instruction:
    """The instruction behind copies."""
    made = computation[name]
    while made.opcode in ("copy", "bitcast"):
        made = computation[made.operands[0]]
    return made


def _element(computation: Computation, name: str) -> int | None:
    """Which element of a loop's state `name` is, or None."""
    made = _plain(computation, name)
    index = re.search(r"index=(\d+)", made.text) if made.opcode == "get-tuple-element" else None
    return None if index is None else int(index[1])


def _constant(computation: Computation, name: str) -> int | None:
    made = _plain(computation, name)
    return int(made.argument) if made.opcode == "constant" and re.fullmatch(r"-?\d+", made.argument) else None


def _step(
    body: Computation, name: str, computations: Mapping[str, Computation], fixed: Callable[[str], int | None]
) -> int | None:
    """What a loop adds to its counter, whose next value is `name`; None where that is not plainly a constant."""
    made = _plain(body, name)
    if made.opcode == "fusion":
        called, outer = computations[made.called("calls")], made.operands
        made = root_of(called)
        given = {p.name: outer[int(p.argument)] for p in called.values() if p.opcode == "parameter"}
        found = [fixed(given[x]) if x in given else _constant(called, x) for x in made.operands]
    else:
        found = [fixed(x) for x in made.operands]
    steps = [value for value in found if value is not None]
    return steps[0] if made.opcode == "add" and len(steps) == 1 else None


def _collective_kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in _KINDS else None


def _collective(made: Instruction, inside: Computation, kind: str) -> tuple[str, float]:
    """Kind and payload of one."""
    whole = sum(arrays(made.shape, everywhere=True))
    given = sum(sum(arrays(inside[name].shape, everywhere=True)) for name in made.operands)
    if kind == "all-gather":
        return kind, whole - given if made.opcode.endswith("-start") else whole
    if kind == "all-reduce" and any(
        other.opcode == "dynamic-slice" and made.name in other.operands and other.root for other in inside.values()
    ):
        return "reduce-scatter", given  # a TPU's fusion of an all-reduce with the slice of it that is kept
    return kind, given


# What the runtime between TPU slices calls its transfers.
_BETWEEN = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}


def _between_slices(made: Instruction) -> str | None:
    """The kind of a transfer between TPU slices; None for any other instruction."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', made.text) if made.opcode == "send" else None
    return None if found is None else _BETWEEN[found[1]]


class _Reader:
    def __init__(self, text: str, slices: Sequence[int], unknown_trips: float):
        self.computations, self.entry = parse(text)
        self.count = len(set(slices))
        # The program of one TPU slice counts the devices of that slice.
        self.slices = [0] * (len(slices) // self.count) if "_xla_megascale" in text else slices
        self.unknown_trips = unknown_trips
        self.found = Traffic()

    def walk(self, name: str, times: float, *, fused: bool = False, hidden: bool = False) -> None:
        """Add what the computation `name` moves when it runs `times` times; within a fusion only its collectives.

        hidden: whether it runs beside others.
        """
        inside = self.computations[name]
        for made in inside.values():
            if (kind := _collective_kind(made.opcode)) is not None and not _goes_on(made, inside):
                groups = groups_of(made.text, len(self.slices))
                waits = not hidden and not _hidden(made, inside)
                self._add(*_collective(made, inside, kind), groups, self.slices, times, waits=waits)
            elif (kind := _between_slices(made)) is not None:
                given = sum(arrays(inside[made.operands[0]].shape, everywhere=True))
                whole = given * self.count if kind == "all-gather" else given
                self._add(kind, whole, np.arange(self.count)[None], range(self.count), times, waits=False)
            if made.opcode == "while":
                length = _loop_length(made, inside, self.computations)
                self.found.unknown_loops += length is None
                self.walk(made.called("body"), times * (self.unknown_trips if length is None else length))
            elif made.opcode == "fusion":
                self.walk(made.called("calls"), times, fused=True)
            elif made.opcode in ("call", "conditional", *_BESIDE):
                beside = made.opcode in _BESIDE and _hidden(made, inside)
                for called in called_by(made):
                    self.walk(called, times, hidden=beside)
            if not fused:
                self.found.memory += times * self._bytes(made, inside)

    def _add(
        self, kind: str, payload: float, groups: np.ndarray, slices: Sequence[int], times: float, *, waits: bool
    ) -> None:
        joined, within, across = sent(kind, groups, payload, slices)
        total = self.found.collectives.setdefault((kind, groups.shape[1], joined), Collective())
        total.count += times
        total.payload += times * payload
        total.sent += times * within
        total.crosses += times * across
        total.waits += times * within * waits

    def _bytes(self, made: Instruction, inside: Computation) -> float:
        if made.opcode in _NOTHING_MOVES or made.opcode.endswith(("-done", "-update")) or made.opcode in _BESIDE:
            return 0.0
        out = arrays(made.shape)

        def operand(i: int) -> float:
            return sum(arrays(inside[made.operands[i]].shape))

        if made.opcode == "fusion":
            called = self.computations[made.called("calls")]
            read = sum(min(operand(i), self._read(called, i)) for i in range(len(made.operands)))
            return read + self._written(called, out)
        if made.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * sum(out)
        if made.opcode == "dynamic-update-slice":
            return 2 * operand(1)
        if made.opcode == "scatter":
            return 3 * operand(len(made.operands) - 1)
        if made.opcode == "copy-start":  # (destination, source, context)
            return (out[0] if out else 0.0) + operand(0)
        if made.opcode == "custom-call" and not made.operands:
            return 0.0
        if made.opcode.endswith("-start"):
            out = out[len(made.operands) :]
        return sum(out) + sum(operand(i) for i in range(len(made.operands)))

    def _read(self, called: Computation, index: int) -> float:
        """Bytes that a fusion reads of its operand `index`: of slices only the slices; infinite where all of it."""
        parameter = next(
            made.name for made in called.values() if made.opcode == "parameter" and made.argument.strip() == str(index)
        )
        return sum(self._uses(called, parameter))

    def _uses(self, called: Computation, name: str) -> Iterator[float]:
        for made in called.values():
            if name not in made.operands:
                continue
            place = made.operands.index(name)
            if made.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                yield sum(arrays(made.shape, everywhere=True))
            elif made.opcode == "dynamic-update-slice" and place == 0:
                yield 0.0  # written in place
            elif made.opcode == "bitcast":
                yield from self._uses(called, made.name)
            elif made.opcode == "tuple" or _goes_on(made, called) or _ENDS in made.text:
                yield 0.0  # goes through
            elif made.opcode == "fusion":
                yield self._read(self.computations[made.called("calls")], place)
            else:
                yield math.inf

    def _written(self, called: Computation, out: list[float]) -> float:
        """Bytes that a fusion with results of `out` bytes writes: of an update in place, only the update."""
        made = root_of(called)
        if made.opcode == "tuple" and len(made.operands) == len(out):
            return sum(self._result(called, called[name], size) for name, size in zip(made.operands, out, strict=True))
        return self._result(called, made, sum(out))

    def _result(self, called: Computation, made: Instruction, out: float) -> float:
        while made.opcode == "bitcast":
            made = called[made.operands[0]]
        if made.opcode == "parameter" or _goes_on(made, called) or _ENDS in made.text:
            return 0.0
        if made.opcode != "dynamic-update-slice" or out == 0:
            return out
        return min(out, sum(arrays(called[made.operands[1]].shape, everywhere=True)))


def read_traffic(text: str, *, slices: Sequence[int], unknown_trips: float = 1.0) -> Traffic:
    """What the compiled program `text` (`compiled.as_text()`) moves on each device.

    `slices`: the slice of each device, in the order of the mesh. `unknown_trips`: how often a loop runs whose length
    depends on data.
    """
    reader = _Reader(text, slices, unknown_trips)
    reader.walk(reader.entry, 1.0)
    return reader.found
