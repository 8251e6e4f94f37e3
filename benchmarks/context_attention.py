"""Attention of a sequence that devices share: heads exchanged, as `--mesh.context` does it, against keys gathered.

    python benchmarks/context_attention.py [--topology v5p:2x2x2] [--tokens 32768 131072]     needs libtpu, no TPU

One attention of Llama-3.1-8B's shape (32 query heads, 8 key/value heads of 128), causal, bfloat16, splash, forwards and
backwards, each device coming and leaving with its piece of all heads; both compiled for the topology.

    heads     pieces of all heads become whole sequences of some heads, and back (`attention.whole_sequences`)
    gathered  each device keeps its queries, and gathers the keys and values of all; their gradients are summed back

Printed: what a device sends, what it holds beside its arguments, and the planner's estimate if nothing overlaps. The
products a device computes are counted by hand: in `heads` its share of the triangle, in `gathered` those of the last
piece of the queries, which sees nearly everything (contiguous pieces; a zigzag of them would even that out).
"""

import argparse
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dpo_jax import mesh as meshes
from dpo_jax.config import AssumeConfig
from dpo_jax.model import attention, attention_splash
from dpo_jax.model.attention_mask import AttentionMask
from dpo_jax.plan.estimate import estimate
from dpo_jax.plan.hardware import GIB, Topology
from dpo_jax.plan.worker import devices_of, measure

HEADS, KEYS, CHANNELS = 32, 8, 128
PRODUCTS = 2 + 3 + 4  # matrix products over all pairs: forwards, dq, dk and dv
PIECE = ("batch", "length", "heads", "channels")


def heads(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """As the model does it."""
    q, k, v = attention.whole_sequences(q, k, v)
    out = attention.attend(q, k, v, mask=AttentionMask(), kernel="splash")
    return meshes.constrain(out, PIECE)


def gathered(q: jax.Array, k: jax.Array, v: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Each device's queries against the keys of all."""
    length, pieces = q.shape[1], mesh.shape["context"]
    block = attention_splash.LARGEST
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel: Any = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([attention_splash.Causal((length, length))] * HEADS),
        block_sizes=splash_attention.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=pieces,
    )
    own, whole = PartitionSpec(None, "context"), PartitionSpec()
    places = kernel.manual_sharding_spec(NamedSharding(mesh, own))

    @partial(jax.shard_map, in_specs=(places, own, whole, whole), out_specs=own, check_vma=False)
    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v))).swapaxes(1, 2)

    return local(kernel, (q.astype(jnp.float32) / math.sqrt(CHANNELS)).astype(q.dtype), k, v)


def compiled(name: str, topology: Topology, tokens: int) -> tuple[dict[str, Any], float]:
    """Figures of one way (`worker.measure`), and the products of the busiest device in FLOPs."""
    mesh = meshes.make_mesh(1, 1, 1, topology.devices, devices=devices_of(topology))
    attend = heads if name == "heads" else partial(gathered, mesh=mesh)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array) -> Any:
        out, back = jax.vjp(attend, q, k, v)
        return out, [meshes.constrain(x, PIECE) for x in back(g)]

    place = meshes.sharding(mesh, PIECE)
    q, k = (jax.ShapeDtypeStruct((1, tokens, n, CHANNELS), jnp.bfloat16, sharding=place) for n in (HEADS, KEYS))
    with jax.set_mesh(mesh):
        figures = measure(jax.jit(both).lower(q, k, k, q).compile(), mesh)
    pieces = topology.devices
    share = 1 / pieces if name == "heads" else (2 * pieces - 1) / pieces**2
    return figures, PRODUCTS * 2 * CHANNELS * HEADS * share * tokens**2 / 2


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32_768, 131_072])
    options = parser.parse_args()
    topology = Topology.parse(options.topology)
    print("| tokens | way | sends, GiB | temporaries, GiB | collectives, ms | products, ms | all, ms |")
    print("|---|---|---|---|---|---|---|")
    for tokens in options.tokens:
        for name in ("heads", "gathered"):
            figures, flops = compiled(name, topology, tokens)
            all_devices = flops * topology.devices
            made = estimate(
                {**figures, "computed": all_devices, "flops": all_devices, "tokens": tokens},
                topology,
                "bfloat16",
                AssumeConfig(),
            )
            sent = sum(one["sent"] for one in figures["collectives"]) / GIB
            held = figures["memory"]["temporaries"] / GIB
            times = " | ".join(f"{1e3 * x:.3g}" for x in (made.links, made.compute, made.slowest))
            print(f"| {tokens:,} | {name} | {sent:.3f} | {held:.3f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
