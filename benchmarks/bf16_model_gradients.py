"""Gradients of a real model in bfloat16 against float32, and against bfloat16 with every sum written out in float32.

    python benchmarks/bf16_model_gradients.py --data dpo_en.jsonl --tokens 8192

One SFT step on `--tokens` tokens of DATA's chosen responses, in rows of `--length`; AdamW and clipping are left out.
Four programs give the gradient of every parameter:

    exact      float32
    ours       bfloat16, as trained
    summed     the same program, equation by equation, but for products and sums of bfloat16 numbers: those numbers are
               turned into float32 first, summed, and only what is returned is rounded
    chunks     ours with the head in `--chunks` times as many pieces

Printed is a JSON object: |ours - exact| / |exact| and |summed - exact| / |exact| of all parameters together, the
largest ratio of the two errors over the parameters, and the largest |chunks - ours| / |ours|, each with its parameter.
Where the backend sums bfloat16 products in float32 anyway, as CPUs, TPUs and GPUs do when asked, the ratio is near 1
(other numbers are rounded) unless something else is summed in bfloat16.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bf16_gradients import errors, gradients
from jax.extend import core

import dpo_jax
from dpo_jax.align import sft
from dpo_jax.config import SFTConfig
from dpo_jax.data.sources.files import read_rows
from dpo_jax.types import TokenBatch

SUMS = ("reduce_sum", "cumsum", "scatter-add", "reduce_window_sum", "add_any")


def summed_in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which every product and sum of bfloat16 numbers is made of float32 numbers, and rounded once."""

    def run(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        out = _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return run


def _rewritten(inner: Any) -> Any:
    """A jaxpr that stands in a parameter of an equation."""
    if isinstance(inner, core.ClosedJaxpr):
        shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in inner.jaxpr.invars]
        return jax.make_jaxpr(lambda *args: _evaluate(inner.jaxpr, inner.consts, args))(*shapes)
    if isinstance(inner, core.Jaxpr):
        return _rewritten(core.ClosedJaxpr(inner, ())).jaxpr
    return tuple(map(_rewritten, inner)) if type(inner) is tuple else inner


def _evaluate(jaxpr: Any, consts: Any, args: Any) -> list[Any]:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    for one in jaxpr.eqns:
        given = [x.val if isinstance(x, core.Literal) else known[x] for x in one.invars]
        out = _bound(one, given)
        known |= dict(zip(one.outvars, out if one.primitive.multiple_results else [out], strict=True))
    return [x.val if isinstance(x, core.Literal) else known[x] for x in jaxpr.outvars]


def _bound(one: Any, given: list[Any]) -> Any:
    narrow = [jnp.result_type(x) == jnp.bfloat16 for x in given]
    product = one.primitive.name == "dot_general"
    if any(narrow) and (product or one.primitive.name in SUMS):
        wide = [x.astype(jnp.float32) if is_narrow else x for x, is_narrow in zip(given, narrow, strict=True)]
        how: dict[str, Any] = dict(one.params)
        if one.primitive.name == "scatter-add":  # binds the sum of two numbers of one dtype
            names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
            found = jax.lax.scatter_add(*wide, **{name: how[name] for name in names})
        else:
            how |= {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32} if product else {}
            found = one.primitive.bind(*wide, **how)
        return found.astype(one.outvars[0].aval.dtype)
    inner = one.params.get("call_jaxpr") or one.params.get("fun_jaxpr")
    if one.primitive.name.startswith("custom_"):  # differentiated already
        return _evaluate(inner.jaxpr, inner.consts, given)
    return one.primitive.bind(*given, **{name: _rewritten(x) for name, x in one.params.items()})


def text_of(told: Any) -> str:
    """A text, a turn, or the last of several turns."""
    last = told[-1] if isinstance(told, list) else told
    return last if isinstance(last, str) else last.get("content", last.get("value"))


def batch_of(path: str, tokenizer: Any, tokens: int, length: int) -> TokenBatch:
    """Rows of `length` tokens, one text after the other; all are predicted but the first of a row."""
    found: list[int] = []
    for _, row in read_rows(path):
        found += tokenizer.encode(text_of(row["chosen"]), add_special_tokens=False)
        if len(found) >= tokens:
            break
    if len(found) < tokens:
        raise SystemExit(f"{path}: holds {len(found)} tokens of chosen responses; give --tokens {len(found)} or less")
    ids = np.asarray(found[:tokens], np.int32).reshape(-1, length)
    targets = np.ones(ids.shape, bool)
    targets[:, 0] = False
    places = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return TokenBatch(ids, np.ones_like(ids), places, targets, np.arange(len(ids), dtype=np.int32)[:, None])


def apart(a: Any, b: Any) -> dict[str, float]:
    """|a - b| / |b| of each leaf, and of all ("all")."""
    return errors(a, b) | {"all": float(optax.tree.norm(optax.tree.sub(a, b)) / optax.tree.norm(b))}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="rows with `chosen`")
    parser.add_argument("--model", default="smollm2", help="whatever dpo-jax loads")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--chunks", type=int, default=16, help="how many times as many pieces of the head")
    options = parser.parse_args(words)
    if options.tokens % options.length:
        parser.error(f"--length {options.length} does not divide --tokens {options.tokens}")
    exact, variables = dpo_jax.load_pretrained(options.model, remat="dots")
    batch = batch_of(options.data, dpo_jax.load_tokenizer(options.model), options.tokens, options.length)
    rough, plain = exact.clone(dtype=jnp.bfloat16), SFTConfig()
    pieces = SFTConfig(head_budget_bytes=plain.head_budget_bytes // options.chunks)

    def of(name: str, model: Any, config: SFTConfig, jit: Callable[..., Any] = jax.jit) -> Any:
        begun = time.monotonic()
        step = partial(sft.train_step, config=config)
        found = jax.device_get(gradients(step, sft.init_state(model, variables, config), batch, jit=jit))
        print(f"{name}: {time.monotonic() - begun:.0f} s with compilation", file=sys.stderr, flush=True)
        return found

    want, ours = of("exact", exact, plain), of("ours", rough, plain)
    summed = of("summed", rough, plain, lambda f: jax.jit(summed_in_float32(f)))
    own, least = apart(ours, want), apart(summed, want)
    moved = apart(of("chunks", rough, pieces), ours)
    ratios = {name: own[name] / least[name] for name in own}
    worst, most = (max(found, key=found.__getitem__) for found in (ratios, moved))
    told = {"device": jax.devices()[0].device_kind, "tokens": batch.tokens.size, "error": own["all"]}
    told |= {"error, summed": least["all"], "largest ratio": [worst, ratios[worst], own[worst], least[worst]]}
    print(json.dumps(told | {"chunks move most": [most, moved[most]]}))


if __name__ == "__main__":
    main()
