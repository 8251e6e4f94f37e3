"""Adapters of projections that are one tensor on disk (`Family.fused`): one adapter of that tensor in PEFT's files.

Here each of the n parts has its own A and B of rank r. Their one adapter has rank n r: the A's lie one below the other,
and B holds the parts' B's in blocks along its diagonal, zeros elsewhere. rank_pattern and alpha_pattern of
adapter_config.json say so, and the scale stays alpha / r. An adapter of rank r that PEFT made itself has one A for all
parts: it is read as that A for each.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dpo_jax.errors import InputError
from dpo_jax.model.families import FAMILIES
from dpo_jax.model.llama import Llama
from dpo_jax.weights.huggingface import layout
from dpo_jax.weights.huggingface.layout import Slices

_MODULE = re.compile(r"(?P<layer>.*\.layers\.\d+)\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


def _last(module: str) -> str:
    return module.rsplit(".", 1)[-1]


def kinds(fused: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The last name of a tensor of several projections -> theirs: qkv_proj -> q_proj, k_proj, v_proj."""
    return {_last(whole): tuple(map(_last, parts)) for whole, parts in fused.items()}


KINDS = {whole: parts for family in FAMILIES.values() for whole, parts in kinds(family.fused).items()}
"""Of all families."""


def told_apart(model_type: str, targets: Sequence[str]) -> str | None:
    """What is wrong where `targets` are some of the projections of one tensor, and not the others; else None."""
    for whole, parts in kinds(FAMILIES[model_type].fused).items():
        if 0 < len(named := [part for part in parts if part in targets]) < len(parts):
            return (
                f"its files hold {', '.join(parts)} as one tensor, {whole}: --lora.targets names all of them or none,"
                f" not {' '.join(named)} alone"
            )
    return None


def named(model: Llama) -> dict[str, Any]:
    """What adapter_config.json says of the adapters' modules and of ranks that are not `r`."""
    lora, fused = model.lora, kinds(FAMILIES[model.config.model_type].fused)
    together = {whole: parts for whole, parts in fused.items() if set(parts) <= set(lora.targets)}
    gone = {part for parts in together.values() for part in parts}
    alpha = lora.scale * lora.rank
    return {
        "target_modules": [*together, *(name for name in lora.targets if name not in gone)],
        **({"rank_pattern": {whole: len(parts) * lora.rank for whole, parts in together.items()}} if together else {}),
        **({"alpha_pattern": {whole: len(parts) * alpha for whole, parts in together.items()}} if together else {}),
    }


def is_pattern(ranks: Any, alphas: Any, rank: int, alpha: float) -> bool:
    """Whether these are the rank_pattern and alpha_pattern of adapters in blocks."""
    if not isinstance(ranks, dict) or not isinstance(alphas, dict) or not set(ranks) <= set(KINDS):
        return False
    return all(ranks[name] == len(KINDS[name]) * rank for name in ranks) and alphas == {
        name: len(KINDS[name]) * alpha for name in ranks
    }


def _owners(model: Llama) -> dict[str, tuple[str, int]]:
    """A projection -> the tensor it is a part of, and which part."""
    fused = FAMILIES[model.config.model_type].fused
    return {part: (whole, i) for whole, parts in fused.items() for i, part in enumerate(parts)}


def tensors(
    model: Llama, adapters: Mapping[str, Any], dtype: Any
) -> tuple[dict[str, tuple[int, ...]], Iterator[np.ndarray]]:
    """Names and shapes of an adapter file's tensors, and their values as `layout.tensors` gives them."""
    slots = layout.adapter_slots(model)
    shapes = layout.tensor_shapes(slots)
    blank = (np.broadcast_to(np.zeros((), dtype), shape) for shape in shapes.values())
    names = {key: value.shape for key, value in _joined(model, shapes, blank)}
    values = layout.tensors(slots, adapters, dtype)
    return names, (value for _, value in _joined(model, shapes, values))


def _joined(model: Llama, keys: Mapping[str, Any], values: Iterator[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    owners = _owners(model)
    waiting: dict[tuple[str, str], dict[tuple[int, str], np.ndarray]] = {}
    for key, value in zip(keys, values, strict=True):
        match = _MODULE.fullmatch(key)
        if match is None or match["module"] not in owners:
            yield key, value
            continue
        whole, part = owners[match["module"]]
        parts = waiting.setdefault((match["layer"], whole), {})
        parts[part, match["factor"]] = value
        count = len(FAMILIES[model.config.model_type].fused[whole])
        if len(parts) == 2 * count:
            at = f"{match['layer']}.{whole}.lora_"
            yield f"{at}A.weight", np.concatenate([parts[i, "A"] for i in range(count)])
            yield f"{at}B.weight", _diagonal([parts[i, "B"] for i in range(count)])


def _diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    whole = np.zeros(np.sum([block.shape for block in blocks], axis=0), blocks[0].dtype)
    row = column = 0
    for block in blocks:
        whole[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return whole


class FusedReader:
    """The adapters of the parts, out of an adapter file that holds those of whole tensors (a `TensorReader`)."""

    def __init__(self, inner: layout.TensorReader, model: Llama):
        """`InputError` for an adapter that is none of the parts with rank r each."""
        self.where, self.dtype, self._inner, rank = inner.where, inner.dtype, inner, model.lora.rank
        self.shapes = dict(inner.shapes)
        self._places: dict[str, tuple[str, int, int]] = {}  # a part's tensor -> the whole's, first row and column
        wanted = layout.tensor_shapes(layout.adapter_slots(model))
        fused = FAMILIES[model.config.model_type].fused
        parts: dict[str, list[str]] = {}
        for key, shape in wanted.items():
            match = _MODULE.fullmatch(key)
            if match is None or match["module"] not in (owners := _owners(model)):
                continue
            whole, part = owners[match["module"]]
            source = f"{match['layer']}.{whole}.lora_{match['factor']}.weight"
            if source not in inner.shapes:
                continue  # reported as missing, under the part's name
            is_a, count = match["factor"] == "A", len(fused[whole])
            blocks = inner.shapes[source][0 if is_a else -1] != rank
            before = parts.setdefault(source, [])
            above = [f"{match['layer']}.{one}.lora_{match['factor']}.weight" for one in fused[whole][:part]]
            row = part * rank * blocks if is_a else sum(wanted[one][0] for one in above)
            before.append(key)
            self._places[key] = source, row, 0 if is_a else part * rank * blocks
            self.shapes[key] = shape
            self.shapes.pop(source, None)
            if len(before) == count:
                ranks = count * rank if blocks else rank
                whole_shape = (ranks, shape[1]) if is_a else (sum(self.shapes[one][0] for one in before), ranks)
                self._check(source, whole_shape, blocks and not is_a, rank, before)

    def _check(self, source: str, shape: tuple[int, ...], in_blocks: bool, rank: int, parts: list[str]) -> None:
        if tuple(self._inner.shapes[source]) != shape:
            raise InputError(
                f"{self.where}: tensor {source} has shape {tuple(self._inner.shapes[source])}, and config.json asks for"
                f" {shape}"
            )
        if not in_blocks:
            return
        values = np.array(self._inner.read(source, tuple(slice(0, n, 1) for n in shape)), np.float32)
        for key in parts:
            _, row, column = self._places[key]
            values[row : row + self.shapes[key][0], column : column + rank] = 0
        if values.any():
            raise InputError(f"{self.where}: tensor {source} mixes its parts' ranks, which no adapter here can do")

    def read(self, key: str, index: Slices) -> np.ndarray:
        """A rectangle of a tensor."""
        if key not in self._places:
            return self._inner.read(key, index)
        source, *first = self._places[key]
        return self._inner.read(
            source, tuple(slice(s.start + n, s.stop + n, 1) for s, n in zip(index, first, strict=True))
        )
