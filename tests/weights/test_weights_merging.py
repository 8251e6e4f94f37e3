"""What adapters learnt is kept where they are merged; and the model that they stand on is known again."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import dpo_jax
from dpo_jax.config import LoraConfig
from dpo_jax.errors import InputError
from dpo_jax.model import heads
from dpo_jax.weights import source
from dpo_jax.weights.convert import convert
from dpo_jax.weights.huggingface.heads import as_reward_model
from dpo_jax.weights.integrity import base
from dpo_jax.weights.opened import open_checkpoint


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("merging") / "base", hidden=16)


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Path:
    """A finished run with LoRA on bfloat16 weights, which has learnt as little as one does."""
    model, variables = dpo_jax.load_pretrained(model_folder, dtype=jnp.bfloat16, lora=LoraConfig(rank=2))
    variables["adapters"] = jax.tree.map(lambda x: 0.003 + 0.1 * x, variables["adapters"])
    out, told = tmp_path / "run", {"source": model_folder}
    dpo_jax.save_pretrained(out / "model", model, variables, dpo_jax.load_tokenizer(model_folder), **told)
    dpo_jax.save_pretrained(out / "adapter", model, variables, None, merge=False, **told)
    return out


def learnt(folder: Path, dtype: str = "float32", start: Path | None = None) -> np.ndarray:
    """Hidden states, less those of the model it began with."""
    tokens = jnp.arange(40).reshape(2, 20)
    states = []
    for place in (folder, start):
        if place is not None:
            model, variables = dpo_jax.load_pretrained(place, dtype=dtype)
            states.append(np.asarray(model.clone(dtype=jnp.float32).apply(variables, tokens)))
    return states[0] - states[-1]


def test_merged_weights_keep_what_the_adapters_learnt(model_folder: Path, run: Path, tmp_path: Path) -> None:
    """As float32, though the run held the weights beneath in bfloat16; less is measured, and far off."""
    assert json.loads((run / "model" / "config.json").read_text())["torch_dtype"] == "float32"
    want = learnt(run / "adapter", start=model_folder)
    assert np.linalg.norm(learnt(run / "model", start=model_folder) - want) < 1e-3 * np.linalg.norm(want)
    convert(run, tmp_path / "converted")
    assert np.linalg.norm(learnt(tmp_path / "converted", start=model_folder) - want) < 1e-3 * np.linalg.norm(want)
    convert(run, tmp_path / "orbax", to="orbax")
    assert np.linalg.norm(learnt(tmp_path / "orbax", start=model_folder) - want) < 1e-3 * np.linalg.norm(want)
    lost = convert(run, tmp_path / "half", dtype=jnp.bfloat16)
    before, after, half = (load_file(x / "model.safetensors") for x in (model_folder, run / "model", tmp_path / "half"))
    rounded = {k: v.astype(half[k].dtype).astype(np.float32) for k, v in before.items()}
    update = np.concatenate([(after[k] - before[k]).ravel() for k in before])
    kept = np.concatenate([(half[k].astype(np.float32) - rounded[k]).ravel() for k in before])
    assert lost == pytest.approx(np.linalg.norm(update - kept) / np.linalg.norm(update), rel=1e-3)
    assert lost > 0.3


def test_a_run_is_read_as_base_and_adapter(run: Path) -> None:
    """In bfloat16 too nothing is rounded away; training starts from the merged weights."""
    _, variables = dpo_jax.load_pretrained(run, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(variables["adapters"])} == {jnp.dtype("float32")}
    assert open_checkpoint(run, merged=True).name == str(run / "model")
    assert open_checkpoint(run / "adapter", merged=True).name == str(run / "adapter")


def test_a_base_is_found_from_everywhere_and_known_again(
    model_folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder, tmp_path / "here" / "m")
    tiny.folder(tmp_path / "there" / "m", hidden=16, seed=5)
    monkeypatch.chdir(tmp_path / "here")
    model, variables = dpo_jax.load_pretrained("m", lora=LoraConfig(rank=2))
    dpo_jax.save_pretrained("a", model, variables, None, source="m", merge=False)
    monkeypatch.chdir(tmp_path / "there")  # where another model has that name
    for dtype in (jnp.float32, jnp.bfloat16):
        dpo_jax.load_pretrained(tmp_path / "here" / "a", dtype=dtype)
    named = json.loads((tmp_path / "here" / "a" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tmp_path / "here" / "m")

    (tmp_path / "here" / "m").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"its base model .*here/m is not there .*DPO_JAX_BASE"):
        dpo_jax.load_pretrained(tmp_path / "here" / "a")
    monkeypatch.setenv("DPO_JAX_BASE", str(tmp_path / "moved"))
    assert "adapters" in dpo_jax.load_pretrained(tmp_path / "here" / "a")[1]
    monkeypatch.setenv("DPO_JAX_BASE", "m")
    with pytest.raises(InputError, match=r"its base model m \(DPO_JAX_BASE\) has other weights than it was trained on"):
        dpo_jax.load_pretrained(tmp_path / "here" / "a")
    monkeypatch.delenv("DPO_JAX_BASE")

    shutil.copytree(tmp_path / "there" / "m", tmp_path / "here" / "m")  # in its place, another one
    with pytest.raises(InputError, match="has other weights than it was trained on"):
        convert(tmp_path / "here" / "a", tmp_path / "never")
    tensors = load_file(model_folder / "model.safetensors")
    (run / "adapter" / "base.json").write_text(json.dumps({"model": str(tmp_path / "there" / "m"), "fingerprint": "0"}))
    with pytest.raises(InputError, match=r"or use .*run/model, which holds both"):
        dpo_jax.load_pretrained(run)
    save_file(tensors, tmp_path / "there" / "m" / "model.safetensors", metadata={"format": "pt"})


def test_a_relative_base_of_another_tool_is_told(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT writes the name that it is given, and resolves it from where it runs; so it is here, but not in silence."""
    shutil.copytree(model_folder, tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    model, variables = dpo_jax.load_pretrained("m", lora=LoraConfig(rank=2))
    dpo_jax.save_pretrained("a", model, variables, None, source="m", merge=False)
    Path("a/base.json").unlink()
    named = json.loads(Path("a/adapter_config.json").read_text())
    Path("a/adapter_config.json").write_text(json.dumps(named | {"base_model_name_or_path": "m"}))
    monkeypatch.setattr(logging.getLogger("dpo_jax"), "propagate", True)
    with caplog.at_level("INFO", logger="dpo_jax"):
        dpo_jax.load_pretrained("a")
    assert f"its base model m is taken to be {tmp_path / 'm'}" in caplog.text


def test_a_hub_model_is_kept_with_its_revision(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, asked = "0123456789" * 4, []
    shutil.copytree(model_folder, tmp_path / "snapshots" / commit)

    def fetch(name, patterns=(), revision=None):
        asked.append((name, revision))
        return tmp_path / "snapshots" / commit

    monkeypatch.setattr(source, "_download", fetch)
    assert open_checkpoint("owner/name").lasting == base.Base("owner/name", commit)
    model, variables = dpo_jax.load_pretrained("owner/name", lora=LoraConfig(rank=2))
    dpo_jax.save_pretrained(tmp_path / "a", model, variables, None, source="owner/name", merge=False)
    named = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["revision"]) == ("owner/name", commit)
    (tmp_path / "a" / "base.json").unlink()  # what PEFT's own folders say is read as well
    asked.clear()
    dpo_jax.load_pretrained(tmp_path / "a")
    assert set(asked) == {("owner/name", commit)}


def test_a_reward_model_scores_the_same_merged(model_folder: Path, tmp_path: Path) -> None:
    lora = dpo_jax.load_pretrained(model_folder, dtype=jnp.bfloat16, lora=LoraConfig(rank=2))
    model, variables = as_reward_model(*lora)
    variables["heads"] = heads.init_heads(model, jax.random.key(1), {heads.SCORE: 1})
    variables["adapters"] = jax.tree.map(lambda x: x + 0.003, variables["adapters"])
    tokenizer, scores = dpo_jax.load_tokenizer(model_folder), []
    for name in ("model", "adapter"):
        merge = name == "model"
        dpo_jax.save_pretrained(tmp_path / name, model, variables, tokenizer, source=model_folder, merge=merge)
        again, loaded = dpo_jax.load_pretrained(tmp_path / name)
        scores.append(heads.apply(loaded, heads.SCORE, again.apply(loaded, jnp.arange(20)[None])))
    np.testing.assert_allclose(*scores, atol=1e-5)
