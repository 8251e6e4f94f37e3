"""Large folders: what is read, and how much memory it takes."""

import gc
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import dpo_jax
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.weights.convert import convert
from dpo_jax.weights.huggingface import layout, model_folder, shards

STATUS = Path("/proc/self/status")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("streaming") / "model", layers=4)


def test_any_rectangle_is_read_as_it_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal(37).astype(np.float32),
        "b": rng.standard_normal((19, 23)).astype(ml_dtypes.bfloat16),
        "c": rng.standard_normal((5, 7, 11)).astype(np.float16),
        "d": np.zeros((0, 3), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    reader = shards.SafetensorsReader(tmp_path, ["x.safetensors"])
    wanted = 0
    for key, tensor in tensors.items():
        for _ in range(20):
            ends = [sorted(rng.integers(0, n + 1, 2)) for n in tensor.shape]
            index = tuple(slice(int(a), int(b), 1) for a, b in ends)
            values = reader.read(key, index)
            assert values.dtype == tensor.dtype
            np.testing.assert_array_equal(values, tensor[index])
            wanted += values.nbytes
    assert reader.bytes_read == wanted


def reading(source: Path, monkeypatch: pytest.MonkeyPatch, mesh: jax.sharding.Mesh) -> tuple[dict, int]:
    """The variables on a mesh, and how many bytes of tensors were read for them."""
    readers = []
    original = shards.SafetensorsReader.__init__

    def keeping(self: shards.SafetensorsReader, *args: object) -> None:
        original(self, *args)
        readers.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(shards.SafetensorsReader, "__init__", keeping)
        _, variables = dpo_jax.load_pretrained(source, mesh=mesh)
    return variables, sum(reader.bytes_read for reader in readers)


def test_every_byte_is_read_once_however_it_is_split(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = sum(tensor.nbytes for tensor in load_file(source / shards.SINGLE).values())
    whole, once = reading(source, monkeypatch, dpo_jax.make_mesh(data=8, fsdp=1))
    assert once == stored
    monkeypatch.setattr(layout, "PIECE_BYTES", 40_000)  # every stacked kernel in several pieces
    for sizes in ((2, 4, 1), (1, 4, 2)):
        mesh = dpo_jax.make_mesh(*sizes)
        split, read = reading(source, monkeypatch, mesh)
        assert read == stored
        jax.tree.map(np.testing.assert_array_equal, whole, split)
        kernel = split["params"]["layers"]["mlp"]["up_proj"]["kernel"]
        assert math.prod(kernel.addressable_shards[0].data.shape) * sizes[1] * sizes[2] == kernel.size


def peak() -> int:
    """The largest resident memory since it was last forgotten, in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def forget_peak() -> int:
    """Begin anew; what is resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


@pytest.mark.skipif(not STATUS.exists(), reason="Linux tells the peak of resident memory")
def test_a_large_folder_takes_less_memory_than_two_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted, loaded and saved: 140 MB in files of at most 25 MB."""
    monkeypatch.setattr(layout, "PIECE_BYTES", 16 << 20)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=128,
        max_position=256,
    )
    slots = layout.parameter_slots(config)
    shapes = layout.tensor_shapes(slots)
    block = np.random.default_rng(0).integers(0, 1 << 14, 4_194_304, np.uint16).view(ml_dtypes.bfloat16)
    folder = tmp_path / "large"
    folder.mkdir()
    tensors = (block[: math.prod(shape)].reshape(shape) for shape in shapes.values())
    shards.write_all(folder, shapes, tensors, ml_dtypes.bfloat16, 25 << 20)
    model_folder.write_configs(folder, config, ml_dtypes.bfloat16, None)
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(files) > 4
    limit = 2 * max(files)

    before = forget_peak()
    convert(folder, tmp_path / "converted", shard_bytes=20 << 20)
    assert peak() - before < limit
    assert sum(path.stat().st_size for path in (tmp_path / "converted").glob("*.safetensors")) > 0.99 * sum(files)

    before = forget_peak()
    mesh = dpo_jax.make_mesh(devices=jax.devices()[:4])
    model, variables = dpo_jax.load_pretrained(folder, mesh=mesh, dtype=jnp.bfloat16)
    stays = sum(x.nbytes for x in jax.tree.leaves(variables))
    assert peak() - before - stays < limit

    for _ in range(2):  # the first time the compiler takes memory too
        before = forget_peak()
        dpo_jax.save_pretrained(tmp_path / "saved", model, variables, None, shard_bytes=25 << 20)
    assert peak() - before < limit
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes()[-1000:] == (tmp_path / "saved" / path.name).read_bytes()[-1000:]
