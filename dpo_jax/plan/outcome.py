"""What came out of a plan: whether each program fits, how long it takes, what it costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_jax.config import PlanRun
from dpo_jax.files.folder import as_json
from dpo_jax.plan.estimate import Estimate, assumptions, estimate
from dpo_jax.plan.hardware import GIB, Topology
from dpo_jax.plan.jobs import Job
from dpo_jax.plan.shapes import parameters


@dataclass(frozen=True)
class Outcome:
    """One program of a plan.

    Attributes:
      name: what the command calls it.
      figures: see `worker.compile_job`.
      peak: bytes of a device; None where the compiler refused without figures.
      limit: bytes that a device has.
      estimate: None where nothing was compiled.
    """

    name: str
    figures: Mapping[str, Any]
    peak: float | None
    limit: float
    estimate: Estimate | None

    @classmethod
    def of(cls, name: str, figures: Mapping[str, Any], plan: PlanRun, topology: Topology) -> "Outcome":
        """Judge a program's figures."""
        refused = figures.get("refused")
        if refused is not None:
            return cls(name, figures, refused["wanted"], refused["limit"] or topology.hardware.memory, None)
        memory = figures["memory"]
        beside = max(figures["held"] - memory["arguments"], 0.0)
        assert plan.training is not None
        roof = estimate(figures, topology, plan.training.train.dtype, plan.assume)
        return cls(name, figures, memory["peak"] + beside, topology.hardware.memory, roof)

    @property
    def fits(self) -> bool:
        """Whether the compiler took it, and it is no larger than the memory."""
        return "refused" not in self.figures and self.peak is not None and self.peak <= self.limit

    def describe(self) -> str:
        """Fits, or does not, in words."""
        peak = "more" if self.peak is None else f"{self.peak / GIB:.2f}"
        return f"{'fits' if self.fits else 'does not fit'}: {peak} of {self.limit / GIB:.2f} GiB"

    def as_json(self) -> dict[str, Any]:
        """For plan.json."""
        made = None if self.estimate is None else self.estimate.as_json()
        return {
            "program": self.name,
            "fits": self.fits,
            "peak_bytes": self.peak,
            "limit_bytes": self.limit,
            **self.figures,
            "estimate": made,
        }


@dataclass(frozen=True)
class Planned:
    """All programs of one way to run a command.

    Attributes:
      topology: the devices.
      job: of the first program: the options, the shape.
      outcomes: the programs, the training step first.
    """

    topology: Topology
    job: Job
    outcomes: tuple[Outcome, ...]

    @property
    def fits(self) -> bool:
        """Whether all of them fit."""
        return all(outcome.fits for outcome in self.outcomes)

    @property
    def worst(self) -> Outcome:
        """The program that needs most."""
        return max(self.outcomes, key=lambda outcome: float("inf") if outcome.peak is None else outcome.peak)

    @property
    def seconds(self) -> float | None:
        """Of one step, where nothing overlaps; None where a program was refused."""
        total = 0.0
        for outcome in self.outcomes:
            if outcome.estimate is None:
                return None
            total += outcome.figures["repeats"] * outcome.estimate.slowest
        return total


def as_result(options: PlanRun, made: Planned) -> dict[str, Any]:
    """What plan.json holds. Bytes, FLOPs and seconds of one run; `sent` and `memory` are those of a device."""
    job, topology = made.job, made.topology
    run = job.run
    cost = None
    if options.price_per_device_hour is not None and made.seconds is not None:
        cost = made.seconds / 3600 * topology.devices * options.price_per_device_hour
    return {
        "command": job.word,
        "topology": str(topology),
        "device": topology.hardware.kind,
        "devices": topology.devices,
        "mesh": made.outcomes[0].figures["mesh"],
        "parameters": parameters(job.shape),
        "prompt_tokens": job.prompt,
        "response_tokens": job.response,
        "fits": made.fits,
        "peak_bytes": made.worst.peak,
        "limit_bytes": made.worst.limit,
        "seconds_a_step": made.seconds,
        "dollars_a_step": cost,
        "programs": [outcome.as_json() for outcome in made.outcomes],
        "assumptions": assumptions(topology, run.train.dtype, options.assume),
        "options": as_json(run),
        "shape": as_json(job.shape),
    }
