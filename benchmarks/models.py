"""The table of docs/models.md: every family against `transformers`, on random small models with every flag set.

    PYTHONPATH=.:tests/support python benchmarks/models.py > table.md        needs torch; about three minutes on a CPU
    PYTHONPATH=.:tests/support python benchmarks/models.py --planned         the second table

A row is a case of tests/support/families.py. Logits' error: largest difference of log-probabilities in float32, over
all tokens of the vocabulary, rows of 10 and of 24 tokens. Gradients': of the mean log-probability of a row, over all
tensors, relative to the largest. bfloat16: mean error of log-probabilities against float32, ours and `transformers`',
medians over random models, and the least and largest ratio of the two. Round trip: tensors read and written again have
the same bits and names. A row of the second table is a model of tests/support/published.py, with the parameters that
the planner counts from its config.json.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import families
import jax.numpy as jnp
import numpy as np
from families import CASES, LENGTH, TINY
from published import PUBLISHED, planned
from safetensors.numpy import load_file

import dpo_jax
from dpo_jax.commands.plan import first_job
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig, from_hf
from dpo_jax.model.attention import choose_kernel
from dpo_jax.model.families import FAMILIES
from dpo_jax.plan.shapes import parameters
from dpo_jax.weights.gguf.writer import check_model


def _kernels(config: LlamaConfig) -> str:
    layout = {"prefix": False, "packed": False, "cached": False, "dtype": jnp.bfloat16, "head_dim": 64, "length": 9}
    found = ["XLA"]
    for kernel, platform in (("splash", "tpu"), ("cudnn", "gpu")):
        try:
            choose_kernel(kernel, platform, **layout, cap=config.attention_cap)
            found.append({"splash": "splash", "cudnn": "cuDNN"}[kernel])
        except InputError:
            pass
    return ", ".join(found)


def _gguf(case: str, config: LlamaConfig) -> str:
    """Whether GGUF holds the family, and which of the case's flags it has no place for, tried one after another."""
    form = FAMILIES[config.model_type].gguf
    if form is None:
        return "no"
    kept: dict[str, Any] = {}
    refused = []
    for key, value in CASES[case][1].items():
        try:
            check_model(from_hf(families.configuration(case, kept | {key: value}).to_dict()), "")
            kept[key] = value
        except InputError:
            refused.append(key)
    return form.architecture + (f", not with {', '.join(refused)}" if refused else "")


def row(case: str) -> str:
    """One line of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, again = Path(scratch) / "published", Path(scratch) / "again"
        reference = families.random_model(case, folder)
        model, variables = dpo_jax.load_pretrained(folder)
        lengths = (10, LENGTH)
        rows = [np.random.default_rng(0).integers(3, TINY["vocab_size"], (2, n)).astype(np.int32) for n in lengths]
        error = max(families.largest_error(reference, model, variables, one) for one in rows)
        gradient = families.gradient_error(reference, model, variables, rows[-1][:1])
        dpo_jax.save_pretrained(again, model, variables, None)
        before, after = (load_file(path / "model.safetensors") for path in (folder, again))
        half = families.bfloat16_errors(case, Path(scratch) / "others")
    equal = before.keys() == after.keys() and all(x.tobytes() == after[key].tobytes() for key, x in before.items())
    flags = ", ".join(key for key in CASES[case][1])
    trip = "equal" if equal else "NOT equal"
    ours, theirs, ratios = [x for x, _ in half], [y for _, y in half], [x / y for x, y in half]
    rounded = f"{median(ours):.4f}, {median(theirs):.4f} ({min(ratios):.2f} to {max(ratios):.2f})"
    numbers = (f"{error:.1e}", f"{gradient:.1e}", rounded)
    cells = (case, flags, *numbers, trip, _gguf(case, model.config), _kernels(model.config))
    return f"| {' | '.join(cells)} |"


def planned_row(name: str) -> str:
    """One line of the second table."""
    with tempfile.TemporaryDirectory() as scratch:
        _, job = first_job(planned(Path(scratch), name))
    return f"| {name} | {PUBLISHED[name][0]} | {parameters(job.shape):,} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planned", action="store_true", help="the second table: published models")
    options = parser.parse_args()
    if options.planned:
        print("\n".join(["| model | model_type | parameters |", "|---|---|---|", *map(planned_row, PUBLISHED)]))
        return
    print("| family | flags beside its own | log-probabilities | gradients | bfloat16 | round trip | GGUF | kernels |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
