"""The table of docs/models.md: every family against `transformers`, on random small models with every flag set.

    PYTHONPATH=.:tests/support python benchmarks/models.py > table.md        needs torch; about two minutes on a CPU

A row is a case of tests/support/families.py. Logits' error: largest difference of log-probabilities in float32, over
all tokens of the vocabulary, rows of 10 and of 24 tokens. Gradients': of the mean log-probability of a row, over all
tensors, relative to the largest. Round trip: tensors read and written again have the same bits and names.
"""

import tempfile
from pathlib import Path

import families
import jax.numpy as jnp
import numpy as np
from families import CASES, LENGTH, TINY
from safetensors.numpy import load_file

import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.attention import choose_kernel
from dpo_jax.weights.gguf_out import check_model


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


def _gguf(config: LlamaConfig) -> str:
    try:
        check_model(config, "")
    except InputError:
        return "no"
    return "in and out"


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
    equal = before.keys() == after.keys() and all(x.tobytes() == after[key].tobytes() for key, x in before.items())
    flags = ", ".join(key for key in CASES[case][1])
    trip = "equal" if equal else "NOT equal"
    cells = (case, flags, f"{error:.1e}", f"{gradient:.1e}", trip, _gguf(model.config), _kernels(model.config))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    print("| family | flags beside its own | log-probabilities | gradients | round trip | GGUF | kernels |")
    print("|---|---|---|---|---|---|---|")
    for case in CASES:
        print(row(case), flush=True)


if __name__ == "__main__":
    main()
