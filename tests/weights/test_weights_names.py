"""Sources by name, tokenizers, content hashes, and the package's own names."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.weights.integrity.fingerprint import fingerprint
from dpo_jax.weights.source import resolve


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("names") / "tiny")


def test_the_fingerprint_is_of_the_contents_alone(source: Path) -> None:
    _, whole = dpo_jax.load_pretrained(source)
    first = fingerprint(whole)
    for sizes in ((1, 8, 1), (2, 2, 2)):
        assert fingerprint(dpo_jax.load_pretrained(source, mesh=dpo_jax.make_mesh(*sizes))[1]) == first
    assert fingerprint(jax.tree.map(np.asarray, whole)) == first


def test_the_fingerprint_sees_every_change() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    flipped = x.copy()
    flipped.view(np.uint32)[1, 2, 3] ^= 1
    swapped = x.copy()
    swapped[0, 0], swapped[1, 2] = x[1, 2], x[0, 0]
    trees: list[Any] = [
        {"a": x},
        {"b": x},
        {"a": flipped},
        {"a": swapped},
        {"a": x.reshape(3, 2, 4)},
        {"a": x.swapaxes(0, 1)},
        {"a": x.astype(np.int32)},
        {"a": jnp.asarray(x, jnp.bfloat16)},
        {"a": -x},
        {"a": x * 0},
        {"a": -(x * 0)},  # negative zeros
        {"a": x, "b": x},
        {"a": np.zeros((), np.float32)},
        {"a": np.ones(3, bool)},
    ]
    prints = [fingerprint(tree) for tree in trees]
    assert len(set(prints)) == len(trees)
    assert prints == [fingerprint(tree) for tree in trees]


def test_a_run_folder_stands_for_its_model(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run / "model")
    (run / "config.json").write_text("{}")
    (run / "checkpoints" / "3").mkdir(parents=True)
    assert resolve(run).path == run / "model"
    assert resolve(str(run)).kind == "huggingface"


def test_hub_ids(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("owner/some-Model.1").path == source
    assert asked["name"] == "owner/some-Model.1"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])

    def offline(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find the files\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"owner/model: no such folder here, and the .* hub did not give it") as error:
        resolve("owner/model")
    assert "\n" not in str(error.value)
    for name in ("nothing", "./owner/model", "a/b/c", "owner/model.gguf", "./a/b/c.gguf", "~nobody"):
        with pytest.raises(InputError, match="no such folder or file"):
            resolve(name)


def test_a_gguf_file_of_a_hub_repository(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are listed, and one of them is fetched."""
    import huggingface_hub

    listed = [".gitattributes", "README.md", "config.json", "m.Q4_K_M.gguf", "m.Q4_K_S.gguf", "m.Q8_0.gguf"]
    listed += ["big/m-f16-00001-of-00002.gguf", "big/m-f16-00002-of-00002.gguf", "m-imatrix.gguf"]
    fetched: list[tuple[str, str]] = []

    def fetch(name: str, file: str, revision: str | None = None) -> str:
        fetched.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    for asked, file in (
        ("owner/m-GGUF/m.Q8_0.gguf", "m.Q8_0.gguf"),
        ("owner/m-GGUF:Q4_K_M", "m.Q4_K_M.gguf"),
        ("owner/m-GGUF:q8_0", "m.Q8_0.gguf"),
        ("owner/m-GGUF/big/m-f16-00002-of-00002.gguf", "big/m-f16-00002-of-00002.gguf"),
    ):
        place = resolve(asked)
        assert (place.kind, place.path) == ("gguf", tmp_path / file)
        assert fetched.pop() == ("owner/m-GGUF", file)
    for asked, message in (
        ("owner/m-GGUF:Q2_K", r"no GGUF file Q2_K \(big/"),
        ("owner/m-GGUF/other.gguf", r"no GGUF file other\.gguf \("),
        ("owner/m-GGUF:Q4_K", r"several such GGUF files \(m.Q4_K_M.gguf, m.Q4_K_S.gguf\)"),
        ("owner/m-GGUF:f16", r"several such GGUF files \(big/m-f16-00001.*name one as owner/m-GGUF/FILE\.gguf"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(asked)

    def listing(name: str, **options: Any) -> str:
        (tmp_path / "snapshot").mkdir()
        (tmp_path / "snapshot" / "config.json").write_text("{}")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", listing)
    with pytest.raises(InputError, match=r"holds GGUF files; name one, e\.g\. owner/m-GGUF/big"):
        resolve("owner/m-GGUF")
    assert not fetched

    def offline(self: Any, name: str) -> list[str]:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach it\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(InputError, match="the Hugging Face hub did not give it") as error:
        resolve("owner/m-GGUF:Q4_K_M")
    assert "\n" not in str(error.value)


def test_tokenizer_ids_are_those_of_transformers(source: Path) -> None:
    from transformers import AutoTokenizer

    ours, theirs = dpo_jax.load_tokenizer(source), AutoTokenizer.from_pretrained(source)
    for text in ("the good film", "<|im_start|>user\n12  déjà<|im_end|>", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_bad_tokenizers_are_refused(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match="tokenizer files cannot be read") as error:
        dpo_jax.load_tokenizer(folder)
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json or tokenizer\.model"):
        dpo_jax.load_tokenizer(folder)


def test_importing_the_package_is_cheap() -> None:
    """No JAX, no transformers before the first use; and all the promised names are there."""
    program = """
import sys, dpo_jax
assert not {"jax", "transformers", "torch"} & set(sys.modules), "heavy imports"
dpo_jax.masked.mean, dpo_jax.make_mesh, dpo_jax.load_pretrained, dpo_jax.load_tokenizer, dpo_jax.save_pretrained
assert callable(dpo_jax.align.dpo.preference_loss) and callable(dpo_jax.sample.generate)
try:
    dpo_jax.nonsense
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no attribute 'nonsense'" in done.stdout


_WORKER = """
import json, sys
import jax
import numpy as np
process, port, source, out = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"localhost:{port}", 2, process)
import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.weights.huggingface import layout
from dpo_jax.weights.integrity.fingerprint import fingerprint
layout.GATHER_BYTES = 3000  # tensors of this tiny model come together in many pieces
mesh = dpo_jax.make_mesh(data=1, fsdp=2, tensor=2)
model, variables = dpo_jax.load_pretrained(source, mesh=mesh)
dpo_jax.save_pretrained(out + "/saved", model, variables, dpo_jax.load_tokenizer(source), shard_bytes=40_000)
open(out + "/file", "a").close()
try:
    dpo_jax.save_pretrained(out + "/file", model, variables, None)
except InputError as error:
    print(json.dumps([fingerprint(variables), str(error)]))
"""


@pytest.mark.multiprocess
def test_two_processes_load_and_save_together(source: Path, tmp_path: Path) -> None:
    import os
    import socket

    from safetensors.numpy import load_file

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(port), str(source), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        results = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(error for _, error in results)
    said = [json.loads(out.splitlines()[-1]) for out, _ in results]
    assert said[0][0] == said[1][0] == fingerprint(dpo_jax.load_pretrained(source)[1])
    assert "is a file" in said[0][1]
    assert "process 0 could not write it" in said[1][1]
    saved: dict[str, np.ndarray] = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        saved |= load_file(file)
    original = load_file(source / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(saved[key].tobytes() == original[key].tobytes() for key in original)
