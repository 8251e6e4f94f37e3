"""Memory and bytes read while a large many-file checkpoint is converted, loaded in shards by several processes, saved.

    python benchmarks/checkpoint_streaming.py --gib 4 --processes 4 --work /tmp/streaming

Writes a Llama folder of random bfloat16 weights in the real layout, then measures, each in processes of their own:

convert  `dpo-jax convert` to another Hugging Face folder;
load     `load_pretrained` onto a mesh over all processes (fsdp), through loopback: each holds its shards only;
save     `save_pretrained` of that sharded state: process 0 writes, no process ever holds the whole.

"peak" is the growth of the process's resident memory over what the imports took (VmHWM, Linux), "stays" what it keeps
afterwards by intention (its shards; on CPU they lie in host memory), "beyond" the difference. The bar is twice the
largest weight file. "read" counts the bytes of tensors that the process asked the files for.
"""

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, INTERMEDIATE, HEADS, VOCAB = 4096, 11008, 32, 32000  # a layer of Llama-2-7B
LAYER = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
"""Bytes of one layer in bfloat16."""


def write_model(folder: Path, gib: float, file_bytes: int) -> None:
    """A random Llama of about so many GiB in files of at most `file_bytes`, written tensor by tensor."""
    import ml_dtypes
    import numpy as np

    from dpo_jax.model.architecture import LlamaConfig
    from dpo_jax.weights.huggingface import layout, model_folder, shards

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_layers=max(1, round((gib * (1 << 30) - 4 * VOCAB * HIDDEN) / LAYER)),
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position=4096,
    )
    shapes = layout.tensor_shapes(layout.parameter_slots(config))
    rng = np.random.default_rng(0)
    largest = max(map(math.prod, shapes.values()))
    block = rng.integers(0, 1 << 14, 2 * largest, np.uint16).view(ml_dtypes.bfloat16)  # finite and positive

    def tensor(shape: tuple[int, ...]) -> np.ndarray:
        start = int(rng.integers(0, largest))  # each another stretch of the same random numbers
        return block[start : start + math.prod(shape)].reshape(shape)

    folder.mkdir(parents=True)
    shards.write_all(folder, shapes, map(tensor, shapes.values()), ml_dtypes.bfloat16, file_bytes)
    model_folder.write_configs(folder, config, ml_dtypes.bfloat16, None)


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


class Measure:
    """Time and growth of the peak of resident memory from here on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self._before, self._start = resident("VmRSS"), time.perf_counter()

    def result(self, what: str, stays: int = 0, read: int | None = None) -> str:
        peak = resident("VmHWM") - self._before
        seconds = time.perf_counter() - self._start
        return json.dumps({"what": what, "peak": peak, "stays": stays, "read": read, "seconds": seconds})


def work_convert(source: Path, target: Path, file_bytes: int) -> None:
    from dpo_jax.weights.convert import convert

    measure = Measure()
    convert(source, target, shard_bytes=file_bytes)
    print(measure.result("convert"))


def work_together(source: Path, target: Path, file_bytes: int, processes: int, me: int, address: str) -> None:
    import jax
    import jax.numpy as jnp

    import dpo_jax
    from dpo_jax.config import DistributedConfig
    from dpo_jax.processes import distributed
    from dpo_jax.weights.huggingface import shards

    distributed.initialize(DistributedConfig(coordinator=address, processes=processes, process_id=me))
    readers: list[shards.SafetensorsReader] = []
    original = shards.SafetensorsReader.__init__

    def keeping(self: shards.SafetensorsReader, *args: object) -> None:
        original(self, *args)  # type: ignore[arg-type]
        readers.append(self)

    shards.SafetensorsReader.__init__ = keeping  # type: ignore[method-assign]
    mesh = dpo_jax.make_mesh()
    distributed.barrier("ready")
    measure = Measure()
    model, variables = dpo_jax.load_pretrained(source, mesh=mesh, dtype=jnp.bfloat16)
    jax.block_until_ready(variables)
    stays = sum(shard.data.nbytes for x in jax.tree.leaves(variables) for shard in x.addressable_shards)
    print(measure.result("load", stays, sum(reader.bytes_read for reader in readers)))
    distributed.barrier("loaded")
    measure = Measure()
    dpo_jax.save_pretrained(target, model, variables, None, shard_bytes=file_bytes)
    print(measure.result("save"))


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    from dpo_jax.weights.huggingface import shards

    left, right = shards.open_folder(a), shards.open_folder(b)
    everything = [tuple(slice(0, n, 1) for n in shape) for shape in left.shapes.values()]
    return left.shapes == right.shapes and all(
        left.read(key, index).tobytes() == right.read(key, index).tobytes()
        for key, index in zip(left.shapes, everything, strict=True)
    )


def run(count: int, *words: object) -> list[list[dict]]:
    """What `count` worker processes print, each a list of measurements."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, __file__, *map(str, words)]
    workers = [
        subprocess.Popen([*command, str(i), address], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    said = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit("a worker failed; its message stands above")
    return [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=4.0, help="size of the checkpoint in GiB")
    parser.add_argument("--file_mib", type=int, default=500, help="largest weight file in MiB")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist; it is removed")
    options = parser.parse_args()
    file_bytes, work = options.file_mib << 20, options.work
    work.mkdir(parents=True)
    try:
        write_model(work / "source", options.gib, file_bytes)
        sizes = [path.stat().st_size for path in (work / "source").glob("*.safetensors")]
        total, bar = sum(sizes), 2 * max(sizes)
        print(f"{total:,} bytes in {len(sizes)} files of at most {max(sizes):,}; the bar is {bar:,}")
        tables = [run(1, "convert", work / "source", work / "converted", file_bytes)]
        print("converted: the same bits" if same(work / "source", work / "converted") else "converted: DIFFERENT")
        shutil.rmtree(work / "converted")
        count = options.processes
        tables.append(run(count, "together", work / "source", work / "saved", file_bytes, count))
        print("saved: the same bits" if same(work / "source", work / "saved") else "saved: DIFFERENT")
    finally:
        shutil.rmtree(work)
    print(f"{'':10}{'process':>8}{'peak':>16}{'stays':>16}{'beyond':>16}{'of the bar':>12}{'read':>16}{'seconds':>9}")
    for table in tables:
        for process, rows in enumerate(table):
            for row in rows:
                beyond = row["peak"] - row["stays"]
                read = "" if row["read"] is None else f"{row['read']:,}"
                print(
                    f"{row['what']:10}{process:8}{row['peak']:16,}{row['stays']:16,}{beyond:16,}{beyond / bar:11.0%}"
                    f"{read:>17}{row['seconds']:9.1f}"
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        work_convert(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["together"]:
        source, target, file_bytes, processes, me, address = sys.argv[2:]
        work_together(Path(source), Path(target), int(file_bytes), int(processes), int(me), address)
    else:
        main()
