"""Hugging Face folders in and out: bit identity, sharding, and every kind of damage."""

import errno
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.weights.huggingface import layout, shards

EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny", tied=False)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def read_all(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_identical(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key].dtype, a[key].shape) == (b[key].dtype, b[key].shape), key
        assert a[key].tobytes() == b[key].tobytes(), key


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / shards.SINGLE)
    change(tensors)
    save_file(tensors, folder / shards.SINGLE, metadata={"format": "pt"})


def shard(folder: Path, pieces: int = 3) -> dict[str, str]:
    """Split the single file of a folder into `pieces` with an index; return the weight map."""
    tensors = load_file(folder / shards.SINGLE)
    (folder / shards.SINGLE).unlink()
    weight_map = {}
    for i in range(pieces):
        name = f"model-{i + 1:05d}-of-{pieces:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::pieces]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_is_bit_identical(tmp_path: Path, kind: type, tied: bool) -> None:
    folder = tiny.folder(tmp_path / "a", tied=tied)
    rewrite(folder, lambda tensors: tensors.update({k: v.astype(kind) for k, v in tensors.items()}))
    model, variables = dpo_jax.load_pretrained(folder)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    dpo_jax.save_pretrained(tmp_path / "b", model, variables, None, source=folder, dtype=kind)
    assert_identical(read_all(folder), read_all(tmp_path / "b"))


def test_bfloat16_stays_bfloat16(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}))
    model, variables = dpo_jax.load_pretrained(copy, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    dpo_jax.save_pretrained(tmp_path / "b", model, variables, None)
    assert_identical(read_all(copy), read_all(tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_any_mesh_gets_the_same_numbers(source: Path, tmp_path: Path, sizes: tuple[int, int, int]) -> None:
    mesh = dpo_jax.make_mesh(*sizes)
    model, whole = dpo_jax.load_pretrained(source)
    _, split = dpo_jax.load_pretrained(source, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, split)
    kernel = split["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * sizes[1] * sizes[2] == kernel.size
    dpo_jax.save_pretrained(tmp_path / "b", model, split, None)
    assert_identical(read_all(source), read_all(tmp_path / "b"))


def test_only_the_needed_slices_are_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = shards.SafetensorsReader.read

    def counting(self: shards.SafetensorsReader, key: str, index: layout.Slices) -> np.ndarray:
        values = original(self, key, index)
        if key == DOWN:
            read.append(values.size)
        return values

    monkeypatch.setattr(shards.SafetensorsReader, "read", counting)
    dpo_jax.load_pretrained(source, mesh=dpo_jax.make_mesh(data=2, fsdp=2, tensor=2))
    size = int(np.prod(load_file(source / shards.SINGLE)[DOWN].shape))
    assert sum(read) == size, "each of the four distinct shards once, though eight devices hold them"


def test_sharded_folders_in_and_out(copy: Path, tmp_path: Path) -> None:
    before = read_all(copy)
    shard(copy)
    model, variables = dpo_jax.load_pretrained(copy)
    dpo_jax.save_pretrained(tmp_path / "b", model, variables, None, shard_bytes=40_000)
    assert_identical(before, read_all(tmp_path / "b"))
    index = json.loads((tmp_path / "b" / shards.INDEX).read_text())
    files = sorted(file.name for file in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in before.values())
    for key, name in index["weight_map"].items():
        assert key in load_file(tmp_path / "b" / name)
    for name in files:
        content = load_file(tmp_path / "b" / name)
        assert len(content) == 1 or sum(value.nbytes for value in content.values()) <= 40_000


def test_what_stands_beside_the_weights_is_carried_along(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text()) | {"pretraining_tp": 1, "torch_dtype": "float16"}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    (copy / "tokenizer.model").write_bytes(b"a SentencePiece model")
    model, variables = dpo_jax.load_pretrained(copy)
    tokenizer = dpo_jax.load_tokenizer(copy)
    dpo_jax.save_pretrained(tmp_path / "b", model, variables, tokenizer, source=copy)
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["pretraining_tp"] == 1
    assert saved["torch_dtype"] == "float32"
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {
        "temperature": 0.6,
        "do_sample": True,
    }
    assert (tmp_path / "b" / "tokenizer.model").read_bytes() == b"a SentencePiece model"
    again = dpo_jax.load_tokenizer(tmp_path / "b")
    assert again("a good film <|im_end|>")["input_ids"] == tokenizer("a good film <|im_end|>")["input_ids"]
    assert (again.chat_template, again.eos_token) == (tokenizer.chat_template, tokenizer.eos_token)
    assert dpo_jax.load_pretrained(tmp_path / "b")[0].config == model.config


def test_known_buffers_and_a_tied_head_are_not_parameters(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "a", tied=True)

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(folder, add)
    _, variables = dpo_jax.load_pretrained(folder)
    assert "lm_head" not in variables["params"]

    def differ(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDING].copy()
        tensors["lm_head.weight"][-1, -1] += 1e-3

    rewrite(folder, differ)
    with pytest.raises(InputError, match=r"ties lm_head to the embedding, and lm_head\.weight differs"):
        dpo_jax.load_pretrained(folder)


def _remove(tensors: dict[str, np.ndarray]) -> None:
    del tensors[DOWN]


def _extra(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"] = tensors[DOWN]


def _bend(tensors: dict[str, np.ndarray]) -> None:
    tensors[DOWN] = np.ascontiguousarray(tensors[DOWN].T)


def _quantise(tensors: dict[str, np.ndarray]) -> None:
    tensors[DOWN] = tensors[DOWN].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove, r"tensor missing: model\.layers\.1\.mlp\.down_proj\.weight"),
        (_extra, r"unknown tensor: model\.layers\.2\.mlp\.down_proj\.weight"),
        (_bend, r"down_proj\.weight has shape \(64, 32\), and config.json asks for \(32, 64\)"),
        (_quantise, "is I8; only F32, BF16 and F16 weights are read"),
    ],
)
def test_wrong_tensors_are_refused(copy: Path, change: Callable[[dict[str, np.ndarray]], None], message: str) -> None:
    rewrite(copy, change)
    with pytest.raises(InputError, match=message) as error:
        dpo_jax.load_pretrained(copy)
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_files_are_refused(copy: Path, keep: int) -> None:
    data = (copy / shards.SINGLE).read_bytes()
    (copy / shards.SINGLE).write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"model.safetensors: truncated"):
        dpo_jax.load_pretrained(copy)


def test_a_bad_index_is_refused(copy: Path) -> None:
    weight_map = shard(copy)

    def refused(change: object, message: str) -> None:
        write_index(copy, change)
        with pytest.raises(InputError, match=message):
            dpo_jax.load_pretrained(copy)

    refused(
        weight_map | {DOWN: "model-00009-of-00009.safetensors"}, "names model-00009-of-00009.safetensors, which is not"
    )
    refused(
        weight_map | {DOWN: "../outside.safetensors"}, "'../outside.safetensors' is not the name of a safetensors file"
    )
    refused(weight_map | {DOWN: "/etc/passwd"}, "'/etc/passwd' is not the name")
    refused({k: v for k, v in weight_map.items() if k != DOWN}, f"tensor {DOWN} of .* is not named")
    elsewhere = next(name for name in weight_map.values() if name != weight_map[DOWN])
    refused(weight_map | {DOWN: elsewhere}, "is said to be in|should be in")
    refused(weight_map | {"model.ghost": weight_map[DOWN]}, "model.ghost should be in .*, and is not there")
    refused({}, "weight_map is missing or empty")
    refused([1], "weight_map is missing or empty")
    (copy / shards.INDEX).write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        dpo_jax.load_pretrained(copy)
    twice = json.dumps(weight_map)[:-1] + f', "{DOWN}": "{elsewhere}"}}'
    (copy / shards.INDEX).write_text(f'{{"weight_map": {twice}}}')
    with pytest.raises(InputError, match=f"key '{DOWN}' twice"):
        dpo_jax.load_pretrained(copy)


def test_a_tensor_in_two_files_is_refused(copy: Path) -> None:
    weight_map = shard(copy, pieces=2)
    first, second = sorted(set(weight_map.values()))
    stolen = next(key for key, name in weight_map.items() if name == first)
    tensors = load_file(copy / second) | {stolen: load_file(copy / first)[stolen]}
    save_file(tensors, copy / second, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"tensor {stolen} is in both {first} and {second}"):
        dpo_jax.load_pretrained(copy)


def test_folders_that_are_no_model_are_refused(copy: Path, tmp_path: Path) -> None:
    def refused(message: str, folder: Path = copy) -> None:
        with pytest.raises(InputError, match=message) as error:
            dpo_jax.load_pretrained(folder)
        assert str(folder) in str(error.value)

    refused("no such folder or file", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no model here", tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused("only pickled weights .*safetensors", tmp_path / "empty")
    (tmp_path / "text.txt").write_text("hello")
    refused("not a model", tmp_path / "text.txt")
    shutil.copy(copy / shards.SINGLE, copy / "model-00001-of-00001.safetensors")
    (copy / shards.SINGLE).unlink()
    refused(f"neither {shards.SINGLE} nor {shards.INDEX}")
    shutil.move(copy / "model-00001-of-00001.safetensors", copy / shards.SINGLE)
    write_index(copy, {})
    refused("holds both")
    (copy / shards.INDEX).unlink()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["FalconForCausalLM"]}))
    refused("architecture FalconForCausalLM is not supported")
    (copy / "config.json").write_text("[]")
    refused("a JSON object is expected")
    (copy / "config.json").unlink()
    refused("config.json is missing")


def test_an_unsafe_header_is_an_input_error(copy: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}}).encode()
    (copy / shards.SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(InputError, match="truncated"):
        dpo_jax.load_pretrained(copy)


def test_saving_is_all_or_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, variables = dpo_jax.load_pretrained(source)
    original, written = shards.write_file, []

    def full_disk(path: Path, *rest: object) -> None:
        if written:
            path.write_bytes(b"half a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "write_file", full_disk)
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)") as error:
        dpo_jax.save_pretrained(tmp_path / "out", model, variables, None, shard_bytes=40_000)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    dpo_jax.save_pretrained(tmp_path / "out", model, variables, None)
    kept = read_all(tmp_path / "out")
    written.clear()
    monkeypatch.setattr(shards, "write_file", full_disk)
    with pytest.raises(InputError):
        dpo_jax.save_pretrained(tmp_path / "out", model, variables, None, shard_bytes=40_000)
    assert_identical(kept, read_all(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_saving_is_refused(source: Path, tmp_path: Path) -> None:
    model, variables = dpo_jax.load_pretrained(source)

    def refused(path: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            dpo_jax.save_pretrained(path, model, variables, None)

    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path / "file" / "below", "cannot be written")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    refused(tmp_path / "run", "is not empty")
    assert (tmp_path / "run" / "checkpoints").is_dir()
    with pytest.raises(InputError, match="no adapters to save"):
        dpo_jax.save_pretrained(tmp_path / "x", model, variables, None, merge=False)
    (tmp_path / "empty").mkdir()
    dpo_jax.save_pretrained(tmp_path / "empty", model, variables, None)
    dpo_jax.save_pretrained(tmp_path / "empty", model, variables, None, shard_bytes=40_000)
    assert not (tmp_path / "empty" / shards.SINGLE).exists(), "an earlier model folder is replaced as a whole"


def test_a_vocabulary_beyond_the_embedding_is_refused(source: Path, tmp_path: Path) -> None:
    model, variables = dpo_jax.load_pretrained(source)
    tokenizer = dpo_jax.load_tokenizer(source)
    tokenizer.add_tokens([f"<new{i}>" for i in range(model.config.vocab_size)])
    with pytest.raises(InputError, match=r"id \d+ .*embedding has 320 rows"):
        dpo_jax.save_pretrained(tmp_path / "x", model, variables, tokenizer)


def test_meshes_that_do_not_divide_are_refused(source: Path) -> None:
    with pytest.raises(InputError, match="does not divide by"):
        dpo_jax.load_pretrained(source, mesh=dpo_jax.make_mesh(data=1, fsdp=1, tensor=8))
