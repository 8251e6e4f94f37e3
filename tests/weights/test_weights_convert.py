"""Conversion between formats, orbax folders, and the checkpoints of a run as a source."""

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import dpo_jax
from dpo_jax.align import dpo
from dpo_jax.config import DPOConfig, LoraConfig
from dpo_jax.errors import InputError
from dpo_jax.weights.convert import convert
from dpo_jax.weights.huggingface import shards
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.orbax import params as orbax_params
from dpo_jax.weights.orbax.checkpoint import Checkpoints
from dpo_jax.weights.source import resolve


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("convert") / "tiny")


@pytest.fixture(scope="module")
def adapter(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model, variables = dpo_jax.load_pretrained(source, lora=LoraConfig(rank=2))
    dpo_jax.save_pretrained(folder, model, variables, None, source=source, merge=False)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in load_file(folder / shards.SINGLE).items()}


def assert_same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_to_orbax_and_back_is_bit_identical(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "orbax", to="orbax")
    assert resolve(tmp_path / "orbax").kind == "orbax"
    assert dpo_jax.load_tokenizer(tmp_path / "orbax")("good")["input_ids"]
    model, variables = dpo_jax.load_pretrained(source)
    for mesh in (None, dpo_jax.make_mesh(data=1, fsdp=4, tensor=2)):
        again, loaded = dpo_jax.load_pretrained(tmp_path / "orbax", mesh=mesh)
        assert again.config == model.config
        assert_same(loaded, variables)
    convert(tmp_path / "orbax", tmp_path / "back")
    assert weights(tmp_path / "back") == weights(source)
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast", "the name that transformers 4 knows, too"


@pytest.mark.parametrize("to", ["huggingface", "orbax", "gguf"])
def test_what_lies_beside_is_there_when_the_result_appears(source: Path, tmp_path: Path, monkeypatch, to: Any) -> None:
    """A command that is killed leaves no result that lacks its card, for it would not write over it."""
    target = tmp_path / ("out.gguf" if to == "gguf" else "out")

    def appears(scratch: Any, path: Any) -> None:
        assert Path(path) == target
        assert ((Path(scratch).parent if to == "gguf" else Path(scratch)) / "CARD.md").read_bytes() == b"a card"
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", appears)
    monkeypatch.setattr(os, "replace", appears)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, to=to, beside={"CARD.md": b"a card"})


def test_folder_to_folder_keeps_or_changes_the_dtype(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "half", dtype=jnp.bfloat16, shard_bytes=30_000)
    assert (tmp_path / "half" / shards.INDEX).is_file()
    convert(tmp_path / "half", tmp_path / "again")
    original = load_file(source / shards.SINGLE)
    for key, value in load_file(tmp_path / "again" / shards.SINGLE).items():
        assert value.tobytes() == original[key].astype(ml_dtypes.bfloat16).tobytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert(tmp_path / "again", tmp_path / "orbax", to="orbax")
    assert orbax_params.stored_dtype(tmp_path / "orbax") == jnp.bfloat16


def test_mixed_dtypes_are_kept_exactly(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / shards.SINGLE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    save_file(tensors, mixed / shards.SINGLE)
    (mixed / "config.json").write_bytes((source / "config.json").read_bytes())
    convert(mixed, tmp_path / "out")
    saved = load_file(tmp_path / "out" / shards.SINGLE)
    assert {value.dtype for value in saved.values()} == {np.dtype(np.float32)}
    assert all((saved[key] == tensors[key].astype(np.float32)).all() for key in tensors)


def test_gguf_to_folder(source: Path, tmp_path: Path) -> None:
    from test_weights_gguf import byte_level, write

    metadata, backend = byte_level("smollm")
    wide = tiny.folder(tmp_path / "wide", hidden=64, heads=2, kv_heads=1, vocab=512)
    write(wide, tmp_path / "m.gguf", gguf.GGMLQuantizationType.Q4_0, metadata=metadata)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = dpo_jax.load_tokenizer(tmp_path / "out")
    assert tokenizer("the 12 films")["input_ids"] == backend.encode("the 12 films").ids
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert_same(dpo_jax.load_pretrained(tmp_path / "out")[1], dpo_jax.load_pretrained(tmp_path / "m.gguf")[1])
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, 1)
    write(tiny.folder(tmp_path / "small", hidden=64, heads=2, kv_heads=1), tmp_path / "s.gguf", metadata=metadata)
    with pytest.raises(InputError, match="embedding has 320 rows"):
        convert(tmp_path / "s.gguf", tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_an_adapter_folder_is_merged(source: Path, tmp_path: Path) -> None:
    model, variables = dpo_jax.load_pretrained(source, lora=LoraConfig(rank=2))
    variables["adapters"] = jax.tree.map(lambda x: x + 0.05, variables["adapters"])
    dpo_jax.save_pretrained(tmp_path / "adapter", model, variables, None, source=source, merge=False)
    dpo_jax.save_pretrained(tmp_path / "merged", model, variables, None, source=source)
    convert(tmp_path / "adapter", tmp_path / "converted")
    assert weights(tmp_path / "converted") == weights(tmp_path / "merged") != weights(source)
    assert dpo_jax.load_tokenizer(tmp_path / "adapter")("a")["input_ids"]
    again, loaded = dpo_jax.load_pretrained(tmp_path / "adapter", mesh=dpo_jax.make_mesh(data=2, fsdp=2, tensor=2))
    assert_same(loaded, variables)
    with pytest.raises(InputError, match="has adapters already"):
        dpo_jax.load_pretrained(tmp_path / "adapter", lora=LoraConfig(rank=2))
    dpo_jax.save_pretrained(tmp_path / "twice", again, loaded, None, source=tmp_path / "adapter", merge=False)
    named = json.loads((tmp_path / "twice" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(source), "not the adapter folder that the model came from, but its base"
    path = tmp_path / "twice" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(source), str(tmp_path / "adapter")))
    with pytest.raises(InputError, match="has adapters too; merge those"):
        dpo_jax.load_pretrained(tmp_path / "twice")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"target_modules": ["embed_tokens"]}, "target_modules"),
        ({"target_modules": [["q_proj"]]}, "target_modules"),
        ({"target_modules": []}, r"target_modules \[\] is not supported"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is not a number above 0"),
        ({"r": 3}, r"lora_A.weight has shape \(2, \d+\), and config.json asks for \(3"),
        ({"target_modules": ["q_proj"]}, "unknown tensor"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
    ],
)
def test_adapters_that_are_not_plain_lora_are_refused(
    adapter: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        dpo_jax.load_pretrained(tmp_path / "adapter")


def test_damaged_orbax_folders_are_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "orbax", to="orbax")
    config = json.loads((tmp_path / "orbax" / "config.json").read_text())

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message) as error:
            dpo_jax.load_pretrained(tmp_path / "orbax")
        assert "\n" not in str(error.value)

    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    refused("has shape .* and config.json asks for")
    arrays = max((tmp_path / "orbax" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole = bytearray(arrays.read_bytes())
    arrays.write_bytes(bytes(whole[:-64] + whole[:-65:-1]))  # which decodes, or does not
    refused("its checksum differs")
    arrays.write_bytes(whole)
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    refused("parameter lm_head/kernel is missing")
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(config))
    for file in (tmp_path / "orbax" / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:20])
    refused("damaged")
    (tmp_path / "orbax" / "params" / "_METADATA").unlink()
    refused("damaged")


@pytest.mark.parametrize("name", ["x.gguf", "x.GGUF", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_names_of_files_are_no_folders(source: Path, tmp_path: Path, name: str, to: Any) -> None:
    with pytest.raises(InputError, match="names a file, and a folder is written"):
        convert(source, tmp_path / name, to=to)
    assert list(tmp_path.iterdir()) == []


def test_targets_that_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    for to in ("huggingface", "orbax"):
        with pytest.raises(InputError, match="is not empty"):
            convert(source, tmp_path / "full", to=to)  # type: ignore[arg-type]
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be written"):
            convert(source, tmp_path / "file" / "below", to=to)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def damage_and_exchange(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the checkpoints 7 and 12 turn bytes of an array of 12 round, and put a copy of 7 behind it: 7 is left."""

    def found() -> tuple[str, list[str]]:
        caplog.clear()
        place = resolve(checkpoints.parent)
        said = list(dict.fromkeys(record.getMessage() for record in caplog.records))
        caplog.clear()
        assert resolve(checkpoints.parent) == place
        assert not caplog.records  # the same is not said, and not read, again
        return place.path.name, said

    arrays = max((checkpoints / "12").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole = arrays.read_bytes()
    arrays.write_bytes(whole[:-64] + whole[:-65:-1])
    name, (said,) = found()
    assert name == "7"
    assert said.startswith(f"checkpoint {checkpoints / '12'} is damaged (state/")
    shutil.copytree(checkpoints / "7", checkpoints / "20")
    name, (said,) = found()
    assert name == "7"
    assert said.startswith(f"checkpoint {checkpoints / '20'} is damaged (its metadata are of step 7)")
    metadata = checkpoints / "20" / "meta" / "metadata"
    metadata.write_text(metadata.read_text().replace('"step": 7', '"step": 20').replace('"step":7', '"step":20'))
    name, (said,) = found()
    assert name == "7"
    assert "meta/metadata" in said


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=2, targets=("q_proj", "down_proj"))])
def test_a_run_that_is_not_finished_is_a_source(
    source: Path, tmp_path: Path, lora: LoraConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("dpo_jax"), "propagate", True)  # runs of other tests keep it to themselves
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="no model and no checkpoint yet"):
        dpo_jax.load_pretrained(run)
    mesh = dpo_jax.make_mesh(data=1, fsdp=8, tensor=1)
    model, variables = dpo_jax.load_pretrained(source, lora=lora, mesh=mesh)
    part = "adapters" if lora.rank else "params"
    variables[part] = jax.tree.map(lambda x: x * 2 + 1, variables[part])
    state = dpo.init_state(model, variables, DPOConfig())
    checkpoints = Checkpoints(run / "checkpoints", keep=2)
    for step in (7, 12):
        checkpoints.save(state.replace(step=state.step + step), data={})  # type: ignore[attr-defined]
    checkpoints.close()
    (run / "config.json").write_text(json.dumps({"model": str(source), "lora": dataclasses.asdict(lora)}))

    assert resolve(run).path.name == "12"
    caplog.clear()
    again, loaded = dpo_jax.load_pretrained(run)
    said = f"{run}: this run is not finished; its newest intact checkpoint is used: {run / 'checkpoints' / '12'}"
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dpo_jax")][:1] == [said]
    assert again.lora == lora
    assert_same(loaded, state.variables)
    assert_same(dpo_jax.load_pretrained(run / "checkpoints" / "7", mesh=mesh)[1], state.variables)
    assert open_checkpoint(run).architecture == model.config
    assert dpo_jax.load_tokenizer(run)("good")["input_ids"]
    convert(run, tmp_path / "hf")
    dpo_jax.save_pretrained(tmp_path / "direct", model, state.variables, None)
    assert weights(tmp_path / "hf") == weights(tmp_path / "direct")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    damage_and_exchange(run / "checkpoints", caplog)
    assert_same(dpo_jax.load_pretrained(run)[1], state.variables)
    with pytest.raises(InputError, match=r"12.*damaged"):
        dpo_jax.load_pretrained(run / "checkpoints" / "12")
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not say which model the run began with"):
        dpo_jax.load_pretrained(run)
