"""What XLA is told when it compiles a training step for TPUs, so that collectives run beside what is computed.

By itself libtpu (0.0.42.1) gathers what is split over 4 x 4 x 4 chips of v5p with all-reduces, of zeros and one piece:
twice the bytes, and the core that computes waits. On the SparseCores of a chip the same collectives are gathers and
scatters, which run beside products (`docs/performance.md` says what that changes). Nothing is set here but where and
when collectives run: values stay as they are, but for the order in which sums over devices are added.

All are options of one compiled program; other programs of the process are compiled as ever. Whoever names one of them
in LIBTPU_INIT_ARGS has the say over all, and none is set here: so they are switched off by
`LIBTPU_INIT_ARGS=--xla_tpu_enable_sparse_core_collective_offload_all_gather=false`.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
from jax.sharding import NamedSharding

_log = logging.getLogger(__name__)

_SPARSE_CORES = {
    # Collectives are fused with products on the core that computes, or run on the SparseCores; not both.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "false",
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": "false",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": "true",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": "true",
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": "true",
    "xla_tpu_enable_3d_reduce_scatter_decomposer": "false",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_enable_async_all_gather": "true",
    "xla_tpu_use_tc_device_shape_on_sc": "true",
    "xla_sc_disable_megacore_partitioning": "true",
}
OPTIONS = {"TPU v5": _SPARSE_CORES, "TPU v6 lite": _SPARSE_CORES}
"""By `jax.Device.device_kind`: v5p and v6e."""


def jit(function: Callable[..., Any], whole: NamedSharding, **how: Any) -> Any:
    """`jax.jit(function, **how)`, with the options for the devices of `whole`."""
    return jax.jit(function, compiler_options=compiler_options(whole), **how)


def compiler_options(whole: NamedSharding) -> dict[str, str]:
    """`jax.jit`'s argument of that name, for a step on the devices of `whole`, an array's place on all of them.

    Empty for CPUs, GPUs and other TPUs, and where the installed libtpu does not know one of them: then the log says so.
    """
    devices = whole.device_set
    options = OPTIONS.get(next(iter(devices)).device_kind, {})
    own = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get("LIBTPU_INIT_ARGS", "").split()}
    if not options or len(devices) == 1 or own & options.keys() or not _known(whole, tuple(options.items())):
        return {}
    return options


@cache
def _known(whole: NamedSharding, options: tuple[tuple[str, str], ...]) -> bool:
    """Whether the compiler of these devices takes all the options: it refuses a program with one it does not know."""
    number = jax.ShapeDtypeStruct((), "float32", sharding=whole)
    try:
        jax.jit(lambda x: x, compiler_options=dict(options)).lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        if "compile option" not in said:
            raise
        _log.info("this libtpu does not take the options that overlap collectives, trains without: %s", said)
        return False
    return True
