"""`dpo-jax plan --search`: mesh splits x rematerialisation x micro-batches, compiled until the best that fits is known.

Every candidate is the same training: the batch of a step stays what it is. What is certain without a compiler is not
compiled: candidates whose weights and optimizer alone are larger than the memory; on one mesh, those that keep more
than one that did not fit (less is recomputed, fewer micro-batches), and those that compute and move more than one that
fits.
The others are compiled in the order of a rough estimate, the most promising first, at most so many.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dpo_jax.config import DPORun, MeshConfig, PPORun, Remat, SFTRun, TrainingRun
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.run.flops import ModelFlops, Work
from dpo_jax.run.planner.hardware import Topology
from dpo_jax.run.planner.programs import Lengths
from dpo_jax.run.planner.shapes import parameters

REMATS: tuple[Remat, ...] = ("none", "dots", "full")
_AGAIN = {"none": 3.0, "dots": 3.1, "full": 4.0}  # forward passes of a training step, the backward pass counting two
MOST_TENSOR = 8  # devices that share a layer: beyond a node or a row of a slice its collectives cost too much
MOST_MICRO_BATCHES = 32


@dataclass(frozen=True)
class Candidate:
    """One way to run a step.

    Attributes:
      mesh: sizes without -1.
      remat: what the backward pass recomputes.
      accumulate: micro-batches.
      seconds: a rough estimate, to try the best first.
    """

    mesh: MeshConfig
    remat: Remat
    accumulate: int
    seconds: float

    def options(self, run: TrainingRun) -> TrainingRun:
        """A run with these options."""
        train = dataclasses.replace(run.train, remat=self.remat, accumulate=self.accumulate)
        return dataclasses.replace(run, train=train, mesh=self.mesh)

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


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def state_bytes(run: TrainingRun, shape: LlamaConfig) -> float:
    """Bytes of weights, optimizer and frozen models of all devices together, where each is held once."""
    weights = parameters(shape)
    frozen = 2 if (run.train.frozen_dtype or run.train.dtype) == "bfloat16" else 4
    moments = 8 if run.optimizer.name == "adamw" else 4
    if run.lora.rank:
        adapters = ModelFlops.of(shape, run.lora).adapters
        return weights * frozen + adapters * (4 + moments)
    size = weights * (4.0 + moments)
    if isinstance(run, DPORun) and run.dpo.reference == "live" and not run.dpo.reference_free:
        size += weights * frozen
    if isinstance(run, PPORun):
        separate = run.ppo.advantage == "gae" and run.ppo.value in (None, "separate")
        size += weights * frozen + (weights * (4 + moments) if separate else 0)
    return size


def candidates(run: TrainingRun, shape: LlamaConfig, topology: Topology, lengths: Lengths) -> list[Candidate]:
    """All ways that divide and whose state has room, the most promising first."""
    found = []
    devices, batch = topology.devices, run.train.batch_size
    minibatches = run.ppo.minibatches if isinstance(run, PPORun) else 1
    for mesh in _meshes(devices, shape):
        parts = mesh.data * mesh.fsdp
        if state_bytes(run, shape) / (devices / mesh.data) > topology.hardware.memory:
            continue
        for accumulate in _divisors(batch // minibatches, MOST_MICRO_BATCHES):
            if (batch // minibatches) % (parts * accumulate) or accumulate & (accumulate - 1):
                continue
            for remat in REMATS:
                seconds = _rough(run, shape, topology, lengths, mesh, remat, accumulate)
                found.append(Candidate(mesh, remat, accumulate, seconds))
    return sorted(found, key=lambda one: one.seconds)


def _meshes(devices: int, shape: LlamaConfig) -> Iterator[MeshConfig]:
    splits = (shape.num_heads, shape.num_kv_heads, shape.vocab_size, shape.intermediate_size)
    for tensor in _divisors(devices, MOST_TENSOR):
        for data in _divisors(devices // tensor, devices):
            fsdp = devices // tensor // data
            if all(size % tensor == 0 for size in splits) and shape.hidden_size % fsdp == 0:
                yield MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def _rough(
    run: TrainingRun,
    shape: LlamaConfig,
    topology: Topology,
    lengths: Lengths,
    mesh: MeshConfig,
    remat: Remat,
    accumulate: int,
) -> float:
    """Seconds of compute and of collectives, in bfloat16, as if nothing overlapped; for ordering only."""
    hardware, passes = topology.hardware, _AGAIN[remat]
    responses = 1 if isinstance(run, SFTRun | PPORun) else 2
    tokens = run.train.batch_size * (lengths.prompt + responses * lengths.response)
    work = Work(float(tokens), float(tokens), tokens * (lengths.prompt + lengths.response) / 2)
    compute = ModelFlops.of(shape).forward(work) * passes / topology.devices / hardware.peak(run.train.dtype)
    # Weights are gathered for the forward, the repeated forward and the backward pass, gradients scattered in float32.
    weights = parameters(shape) / mesh.tensor
    gathers = (2 if remat == "none" else 3) * accumulate * 2 * weights * (mesh.fsdp - 1) / mesh.fsdp
    scatters = 0.0 if run.lora.rank else accumulate * 4 * weights * (mesh.fsdp - 1) / mesh.fsdp
    copies = 2 * 4 * weights / mesh.fsdp * (mesh.data - 1) / mesh.data
    # Two sums over the tensor axis in each layer and pass.
    width = tokens / (mesh.data * mesh.fsdp) * shape.hidden_size * 2
    sums = 2 * shape.num_layers * passes * 2 * width * (mesh.tensor - 1) / mesh.tensor
    return compute / 0.6 + (gathers + scatters + copies + sums) / hardware.links / 0.5


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
