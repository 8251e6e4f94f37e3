"""`dpo-jax plan --search`: mesh splits x rematerialisation x micro-batches, compiled until the best that fits is known.

Every candidate is the same training: the batch of a step stays what it is. What is certain without a compiler is not
compiled: candidates whose weights and optimizer alone are larger than the memory; on one mesh, those that keep more
than one that did not fit (less is recomputed, fewer micro-batches), and those that compute and move more than one that
fits.
The others are compiled in the order of rough estimates (`rough.py`), at most so many: first those that seem to have
room, the fastest first, then the others, the smallest first.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpo_jax.config import MeshConfig, PPORun, Remat, TrainingRun
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.plan.hardware import Topology
from dpo_jax.plan.programs import Lengths
from dpo_jax.plan.rough import rough_bytes, rough_seconds, state_bytes

REMATS: tuple[Remat, ...] = ("none", "dots", "full", "offload")
MOST_TENSOR = 8  # devices that share a layer: beyond a node or a row of a slice its collectives cost too much
MOST_MICRO_BATCHES = 32


@dataclass(frozen=True)
class Candidate:
    """One way to run a step.

    Attributes:
      mesh: sizes without -1.
      remat: what the backward pass recomputes.
      accumulate: micro-batches.
      seconds: a rough estimate of a step's.
      bytes: a rough estimate of the memory of one device.
    """

    mesh: MeshConfig
    remat: Remat
    accumulate: int
    seconds: float
    bytes: float

    def options(self, run: TrainingRun) -> TrainingRun:
        """A run with these options."""
        return _with(run, self.mesh, self.remat, self.accumulate)

    def describe(self) -> str:
        """In one line."""
        sizes = dataclasses.asdict(self.mesh)
        mesh = " x ".join(f"{name} {size}" for name, size in sizes.items())
        return f"{mesh}, remat {self.remat}, {self.accumulate} micro-batches"

    def takes_longer(self, other: "Candidate") -> bool:
        """Whether it is certain to take no less time than another: it recomputes as much, in as many pieces."""
        return self.mesh == other.mesh and self._place >= other._place and self.accumulate >= other.accumulate

    def keeps_more(self, other: "Candidate") -> bool:
        """Whether it is certain to need no less memory than another: it recomputes no more, in no more pieces.

        One piece needs no room for a sum of gradients, so it is compared with none of several.
        """
        comparable = (self.accumulate == 1) == (other.accumulate == 1)
        return comparable and other.takes_longer(self)

    @property
    def _place(self) -> int:
        return REMATS.index(self.remat)


def _with(run: TrainingRun, mesh: MeshConfig, remat: Remat, accumulate: int) -> TrainingRun:
    crossing = run.train.crossing_dtype if mesh.data > 1 else None  # else nothing crosses
    train = dataclasses.replace(run.train, remat=remat, accumulate=accumulate, crossing_dtype=crossing)
    return dataclasses.replace(run, train=train, mesh=mesh)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def candidates(run: TrainingRun, shape: LlamaConfig, topology: Topology, lengths: Lengths) -> list[Candidate]:
    """All ways that divide and whose state has room, the most promising first."""
    found, room = [], topology.hardware.memory
    devices, batch = topology.devices, run.train.batch_size
    minibatches = run.ppo.minibatches if isinstance(run, PPORun) else 1
    for mesh in _meshes(devices, shape):
        parts = mesh.data * mesh.fsdp
        if state_bytes(run, shape) / (devices / mesh.data) > room:
            continue
        for accumulate in _divisors(batch // minibatches, MOST_MICRO_BATCHES):
            if (batch // minibatches) % (parts * accumulate) or accumulate & (accumulate - 1):
                continue
            for remat in REMATS:
                one = _with(run, mesh, remat, accumulate)
                seconds, size = rough_seconds(one, shape, topology, lengths), rough_bytes(one, shape, lengths)
                found.append(Candidate(mesh, remat, accumulate, seconds, size))
    return sorted(found, key=lambda one: (one.bytes > room, one.seconds if one.bytes <= room else one.bytes))


def _meshes(devices: int, shape: LlamaConfig) -> Iterator[MeshConfig]:
    splits = (shape.num_heads, shape.num_kv_heads, shape.vocab_size, shape.intermediate_size)
    for tensor in _divisors(devices, MOST_TENSOR):
        for data in _divisors(devices // tensor, devices):
            fsdp = devices // tensor // data
            if all(size % tensor == 0 for size in splits) and shape.hidden_size % fsdp == 0:
                yield MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


class Frontier:
    """What is known so far, and so what need not be compiled."""

    def __init__(self, found: Sequence[Candidate]):
        if not found:
            raise InputError(
                "no mesh, rematerialisation and number of micro-batches that divides has room for the state: take more"
                " devices, --lora.rank, or another --train.batch_size"
            )
        self._left = list(found)
        self._fits: list[Candidate] = []
        self._too_large: list[Candidate] = []

    def __iter__(self) -> Iterator[Candidate]:
        while self._left:
            candidate = self._left.pop(0)
            if not self._is_known(candidate):
                yield candidate

    def _is_known(self, candidate: Candidate) -> bool:
        slower = any(candidate.takes_longer(other) for other in self._fits)
        return slower or any(candidate.keeps_more(other) for other in self._too_large)

    def return_to(self, candidate: Candidate) -> None:
        """One that was handed out, and not compiled."""
        self._left.insert(0, candidate)

    def learn(self, candidate: Candidate, fits: bool) -> None:
        """Tell what the compiler said of a candidate."""
        (self._fits if fits else self._too_large).append(candidate)

    @property
    def left(self) -> int:
        """How many are still worth compiling."""
        return sum(not self._is_known(candidate) for candidate in self._left)
