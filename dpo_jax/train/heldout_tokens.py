"""Figures of a language model on held-out windows of tokens, during training: the same names as in training."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import sft
from dpo_jax.config import SFTConfig
from dpo_jax.files.log import ProgressBar
from dpo_jax.mesh import put_batch
from dpo_jax.processes import distributed
from dpo_jax.state import TrainState
from dpo_jax.types import TokenBatch


class Windows(Protocol):
    """Batches that can be gone through again and again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[TokenBatch]: ...


def evaluator(windows: Windows, *, config: SFTConfig, mesh: Mesh) -> Callable[[TrainState], dict[str, float]]:
    """A function from a state to its figures on all of `windows`, for `loop.fit`.

    Returns loss (nats a target token, always exact), perplexity (its exponential), mean_token_accuracy and entropy;
    means over all target tokens, not over windows or batches.
    """
    step = sft.jit_eval_step(config, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, float] = {}

        def add(sums: Any) -> None:
            for name, values in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(np.sum(values, dtype=np.float64))

        waiting = None
        with ProgressBar("evaluation", len(windows), shown=distributed.is_main(), transient=True) as bar:
            for done, batch in enumerate(windows):
                running = step(state, put_batch(mesh, batch))
                if waiting is not None:  # one behind, so that the devices always have work
                    add(waiting)
                    bar.update(done)
                waiting = running
            add(waiting)
            bar.update(len(windows))
        return figures(totals)

    return evaluate


def figures(totals: dict[str, float]) -> dict[str, float]:
    """Means from the sums that `sft.eval_step` gives, added up over windows and batches."""
    count = totals["target_tokens"]
    loss = totals["nll"] / count
    return {
        "loss": loss,
        # e^709 is the largest that a float holds; a model as bad as that is told by its loss.
        "perplexity": math.exp(min(loss, 709.0)),
        "mean_token_accuracy": totals["correct"] / count,
        "entropy": totals["entropy"] / count,
    }
