"""Log-probabilities of a whole data set under a policy: computed once, and kept on disk.

A cache file stands under a hash of all that decides the numbers: the weights and architecture of the policy, the
data set as encoded (which covers tokenizer, template and lengths), the tokens that count, and the dtype of the
computation. The mesh and the batch size are not in it: they change a sum by rounding only.
"""

import hashlib
import io
import json
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.align import update
from dpo_jax.align.pair_logps import scored_sums
from dpo_jax.config import DPOConfig, Objective
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.loader import IndexedBatches
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically
from dpo_jax.files.log import ProgressBar, say
from dpo_jax.mesh import Replicated, one_ahead
from dpo_jax.model.llama import Llama
from dpo_jax.processes import distributed
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.smollm2 import cache_folder

SAVE_SECONDS = 60.0
"""An interrupted computation loses at most this much."""


def policy_logps(
    dataset: PreferenceDataset,
    model: Llama,
    variables: Mapping[str, Any],
    *,
    objective: Objective | None = None,
    mesh: Mesh,
    batches: IndexedBatches,
    label: str,
) -> np.ndarray:
    """The summed log-probabilities of the responses of `dataset` under the policy `variables`: float32 [N, K], in nats.

    Those of the rows of `batches`; NaN for others, which a short run never sees. Read from the cache where they are
    there, otherwise computed (with a progress bar, called `label`) and cached. `objective` says which tokens count
    (all, by default) and into how many micro-batches to split. Every process calls this. Raises `InputError` where one
    is not finite (the row is named), or the cache cannot be written.
    """
    objective = objective or DPOConfig().objective
    path = cache_folder() / "reference" / f"{cache_key(dataset, model, variables, objective)}.npz"
    known = _load(path, (len(dataset), dataset.responses_per_prompt))
    if np.isnan(known[batches.rows]).any():
        compute = partial(_compute(model, objective, mesh), variables)
        known = _fill(dataset, known, compute, path, mesh=mesh, batches=batches, label=label)
    elif distributed.is_main():
        say(f"{label}: {len(batches.rows):,} rows from the cache ({path})")
    return known


def cache_key(dataset: PreferenceDataset, model: Llama, variables: Mapping[str, Any], objective: Objective) -> str:
    """Hex name of the cache entry."""
    parts = {
        "version": 1,
        "weights": fingerprint(dict(variables)),
        "architecture": repr(model.config),
        "adapters": repr(model.lora) if "adapters" in variables else None,
        "data": dataset.fingerprint,
        "mask_format_tokens": objective.mask_format_tokens,
        "dtype": np.dtype(model.dtype).name,
    }
    if objective.ld_alpha < 1:
        parts["ld_alpha"] = objective.ld_alpha
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _load(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """float32 [N, K] from the cache of process 0, NaN where nothing is known yet."""
    known = np.full(shape, np.nan, np.float32)
    if distributed.is_main() and path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                logps, stored_key = file["logps"], str(file["key"])
            if logps.shape != shape or logps.dtype != np.float32 or stored_key != path.stem:
                raise ValueError(f"it holds {logps.dtype} {logps.shape} of {stored_key}")
            known = logps
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            say(f"{path}: damaged ({' '.join(str(error).split())[:100]}); computed again")
    return np.asarray(distributed.from_main(known))


def _save(path: Path, logps: np.ndarray) -> None:
    if not distributed.is_main():
        return
    buffer = io.BytesIO()
    np.savez(buffer, logps=logps, key=np.asarray(path.stem))
    try:
        write_atomically(path, buffer.getvalue())
    except InputError as error:
        raise InputError(f"{error} (DPO_JAX_CACHE names the cache)") from error


def _compute(model: Llama, objective: Objective, mesh: Mesh) -> Replicated:
    """(variables, batch on devices) -> [B, K], whole in every process."""

    def sums(variables: Any, batch: Any) -> jax.Array:
        part = partial(scored_sums, model.apply, variables, objective=objective)
        return update.map_rows(part, batch, objective.accumulate)

    return Replicated(sums, mesh)


def _fill(
    dataset: PreferenceDataset,
    known: np.ndarray,
    compute: Callable[[Any], jax.Array],
    path: Path,
    *,
    mesh: Mesh,
    batches: IndexedBatches,
    label: str,
) -> np.ndarray:
    """`known` with every NaN at a row of `batches` computed."""
    known, rows, saved_at = known.copy(), batches.rows, time.monotonic()

    def done() -> int:
        return int((~np.isnan(known[rows]).any(axis=1)).sum())

    missing = ((at, batch) for at, batch in batches if np.isnan(known[at[at >= 0]]).any())
    with ProgressBar(label, len(rows), done=done(), shown=distributed.is_main()) as bar:
        for indices, sums in one_ahead(compute, missing, mesh):
            real = indices >= 0
            for index, row in zip(indices[real], sums[real], strict=True):
                if not np.isfinite(row).all():
                    raise InputError(
                        f"row {dataset.row_numbers[index]} of the data: its log-probability under the reference is"
                        f" {row}; look at the row, or at the weights of the reference model"
                    )
            known[indices[real]] = sums[real]
            bar.update(done())
            if time.monotonic() - saved_at > SAVE_SECONDS:
                _save(path, known)
                saved_at = time.monotonic()
    _save(path, known)
    return known
