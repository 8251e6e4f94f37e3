"""Rows of a run: those that are learnt from, and those that are held out; how preferences are batched."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jax.sharding import Mesh

from dpo_jax.config import DPORun, HoldoutRun, Layout, TrainingRun
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.documents import is_text, text_files
from dpo_jax.data.sets.group_packing import Packing
from dpo_jax.data.sets.loader import PreferenceLoader
from dpo_jax.data.sets.row_mixture import Rows, read_mixture
from dpo_jax.data.sets.steps_loader import RowOptions
from dpo_jax.data.sources.files import sizes
from dpo_jax.mesh import batch_parts, own_rows, pieces
from dpo_jax.processes import distributed
from dpo_jax.types import REJECTED


class FromSource(Protocol):
    """Rows that were read from a source."""

    @property
    def rows_read(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...


Read = TypeVar("Read", bound=FromSource)


def summaries(data: Any, heldout: Any) -> Iterator[str]:
    """What was read, for the log: of what is learnt from and of what is held out, each under its own name."""
    for name, part in (("training rows", data), ("held-out rows", heldout)):
        if part is not None:
            yield f"{name}: {part.summary()}"


def read_alike(source: str, read: Callable[[str], Read]) -> Read:
    """What `read` makes of a source of which all processes have the same: `files_alike` before, `rows_alike` after."""
    files_alike(source)
    found = read(source)
    rows_alike(source, found)
    return found


def files_alike(source: str) -> None:
    """Raise `SharedError`, naming process and file, where one lacks a file of a source or has it in another size.

    All processes call it.
    """
    if distributed.several():
        found = sizes(source)
        if is_text(source):  # of a folder with both, whoever reads takes one kind
            found |= {path: path.stat().st_size for path in text_files(source)}
        distributed.check_alike({_from_home(path): f"{size:,} bytes" for path, size in found.items()})


def _from_home(path: Path) -> str:
    """The path as it may be the same on hosts whose home folders differ."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def rows_alike(source: str, found: FromSource) -> None:
    """Raise `SharedError`, naming process and source, where one has read other rows. All processes call it."""
    if distributed.several():
        distributed.check_alike({f"the rows of {source}": f"{found.rows_read:,} ({found.fingerprint[:12]})"})


def read_both(
    config: HoldoutRun,
    read: Callable[[str], Rows],
    join: Callable[[Rows, Rows], Rows],
    split: Callable[[Rows, float, int], tuple[Rows, Rows]],
) -> tuple[Rows, Rows | None]:
    """All rows of `--data`, and what is held out: `--holdout` of each of its sources, or `--eval_data`.

    All processes call it, and are to have the same rows. `read`: one source. `join`, `split` (by a share and a seed):
    data sets of its kind. Raises `InputError`, for weights that are wrong too.
    """
    seed, share = config.train.seed, config.holdout
    each = partial(read_alike, read=read)
    data, heldout = read_mixture(
        config.data.files, each, join, holdout=share, split=lambda rows: split(rows, share or 0.0, seed)
    )
    if config.eval_data is not None:
        heldout, _ = read_mixture(config.eval_data, each, join, option="--eval_data", weighted=False)
    return data, heldout


def packing_of(layout: Layout, mesh: Mesh, k: int, *, accumulate: int, pairs: bool) -> Packing | None:
    """How groups of `k` responses are packed for the devices: a window for each micro-batch of each; None: they aren't.

    `pairs`: from the third on they are mismatched ones (KTO's), which are not packed with those of their rows.
    """
    if layout != "windows":
        return None
    spans = ((0, REJECTED + 1), (REJECTED + 1, k)) if pairs and k > REJECTED + 1 else ()
    return Packing(batch_parts(mesh) * accumulate, spans, math.lcm(16, pieces(mesh, "length")))


def row_options(
    config: TrainingRun, mesh: Mesh | None, *, steps: int | None = None, epochs: float | None = None
) -> RowOptions:
    """What every loader of rows takes, as a run's options say; for the devices of `mesh`, else for all rows."""
    return {
        "own": None if mesh is None else own_rows(mesh, config.train.batch_size),
        "batch_size": config.train.batch_size,
        "seed": config.train.seed,
        "shuffle": config.data.shuffle,
        "workers": config.data.workers,
        "steps": steps,
        "epochs": epochs,
    }


def preference_loader(config: TrainingRun, mesh: Mesh, data: PreferenceDataset, **length: Any) -> PreferenceLoader:
    """The batches of preference groups as a run's options say. `length`: `steps` or `epochs`."""
    layout, how = config.train.settled.layout, {"accumulate": config.train.accumulate}
    return PreferenceLoader(
        data,
        buckets=config.data.buckets,
        packing=packing_of(layout, mesh, data.responses_per_prompt, pairs=isinstance(config, DPORun), **how),
        **row_options(config, mesh, **length),
    )


def units_of(mesh: Mesh | None, accumulate: int, *, packed: bool) -> int | None:
    """Pieces of a batch of windows in which attention sees each sequence apart: see `data/sets/segment_views.py`.

    None, it goes by segments: where a window holds one sequence alone, and where the mesh splits windows.
    """
    if mesh is None or not packed or pieces(mesh, "length") > 1:
        return None
    return batch_parts(mesh) * accumulate
