"""Sections of options about devices and processes."""

import re
from dataclasses import dataclass

from dpo_jax.config.options import Count, Options, not_given, require


@dataclass(frozen=True)
class MeshConfig(Options, prefix="--mesh."):
    """How devices are arranged; see `dpo_jax/mesh.py`."""

    data: int = 1
    """Whole copies of the model, each with its share of the batch."""
    fsdp: int = -1
    """Devices that share the parameters and split the batch; -1 takes all that are left."""
    tensor: int = 1
    """Devices that share each layer's heads and width."""
    context: int = 1
    """Devices that share each sequence, for training on long ones; it must divide their length and the heads."""


@dataclass(frozen=True)
class DistributedConfig(Options, prefix="--distributed."):
    """Several processes. Cloud TPU slices and SLURM jobs are detected with `auto`; elsewhere name the coordinator."""

    auto: bool = False
    """Let jax find the cluster: Cloud TPU slices (one or several), GKE, SLURM, Open MPI."""
    coordinator: str | None = None
    """host:port of process 0."""
    processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """This process's number, from 0."""
    start_within: Count | None = not_given(300)
    """Seconds in which all processes must have started."""
    lost_after: Count | None = not_given(40)
    """Seconds without a sign of life after which a process counts as lost, and the others end."""
    stuck_after: Count | None = not_given(3600)
    """Seconds without a step or a batch of an evaluation, while training, after which all end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.coordinator is not None, self.processes is not None, self.process_id is not None]
        require(
            not (self.auto and any(given)),
            "--distributed.auto finds the cluster itself: leave coordinator, processes and process_id out",
        )
        require(
            all(given) or not any(given),
            "give --distributed.coordinator, --distributed.processes and --distributed.process_id together",
        )
        if self.coordinator is not None and self.processes is not None and self.process_id is not None:
            require(
                re.fullmatch(r".+:\d+", self.coordinator) is not None,
                f"--distributed.coordinator {self.coordinator}: write HOST:PORT of process 0",
            )
            require(
                0 <= self.process_id < self.processes,
                f"--distributed.process_id {self.process_id}: processes are numbered 0 to {self.processes - 1}"
                f" (--distributed.processes {self.processes})",
            )
        for name in ("start_within", "lost_after", "stuck_after"):
            require(
                getattr(self, name) is None or self.auto or any(given),
                f"--distributed.{name} has no effect with one process; it belongs to --distributed.auto or"
                " --distributed.coordinator",
            )
