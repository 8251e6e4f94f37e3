"""A minute of `fuzz.py` with a fixed seed; and faults by name, each one line."""

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
import runs
import tiny

from dpo_jax.cli import main
from dpo_jax.errors import InputError
from dpo_jax.headers import parse_json, read_json


@pytest.mark.campaign
def test_mutations_of_valid_files_end_in_success_or_in_one_line() -> None:
    """In a process of its own, which has one device, and may be ended by a library."""
    environment = {name: value for name, value in runs.one_device().items() if name != "RUST_BACKTRACE"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # files are tried here, not programs
    command = [sys.executable, fuzz.__file__, "--minutes", "0.7", "--most", "4000", "--processes", "12", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-3_000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    print(outcome)
    assert outcome["cases"] >= 100  # several hundred on two quiet cores; a busy machine has fewer
    assert outcome["processes"] == 12
    assert outcome["refused"] > outcome["cases"] / 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("fuzz") / "model", layers=1, hidden=16, heads=2, kv_heads=1, vocab=270)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with exit code 2, within seconds."""
    start = time.monotonic()
    fault, code, said = fuzz.in_process(arguments)
    assert fault is None, fault
    assert code == 2, said
    assert time.monotonic() - start < 10
    return said


def raw(code: int, payload: bytes) -> bytes:
    """A metadata value that need not be what it says."""
    return struct.pack("<I", code) + payload


# An entry of the metadata, and what is said of it. `bytes` stand for themselves.
GGUF_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "an array of 2**60 numbers": ({"x": raw(9, struct.pack("<IQ", 4, 2**60))}, "items"),
    "an array of 2**60 texts": ({"x": raw(9, struct.pack("<IQ", 8, 2**60))}, "texts in 'x', for which it is too short"),
    "a text of 2**62 bytes": ({"x": raw(8, struct.pack("<Q", 2**62))}, "a text of"),
    "a list of lists": ({"x": [[[1]]]}, "a list of lists"),
    "an unknown type": ({"x": raw(77, b"\0" * 8)}, "unknown type 77"),
    "bad UTF-8": ({"general.name": raw(8, struct.pack("<Q", 2) + b"\xff\xfe")}, "not UTF-8"),
    "a billion blocks": (
        {"llama.block_count": 10**9},
        "block_count = 1000000000 is not a whole number from 1 to 10000",
    ),
    "zero heads": ({"llama.attention.head_count": 0}, "head_count = 0 is not a whole number"),
    "heads as a list": ({"llama.attention.head_count": [2]}, r"head_count = [2] is not a whole number"),
    "heads as text": ({"llama.attention.head_count": "2"}, "head_count = '2' is not a whole number"),
    "more heads than width": ({"llama.attention.head_count": 64}, "not a multiple of num_attention_heads"),
    "a size as a fraction": ({"llama.embedding_length": 15.5}, "embedding_length = 15.5 is not a whole number"),
    "the epsilon as text": ({"llama.attention.layer_norm_rms_epsilon": "1e-5"}, "is not a number above 0"),
    "no base": ({"llama.rope.freq_base": float("nan")}, "freq_base = nan is not a number"),
    "the architecture as a list": ({"general.architecture": ["llama"]}, "architecture ['llama'] is not supported"),
    "EOS as text": ({"tokenizer.ggml.eos_token_id": "2"}, "eos_token_id = '2' is not a whole number"),
    "EOS as a list": ({"tokenizer.ggml.eos_token_id": [2]}, "eos_token_id = [2] is not a whole number"),
    "EOS beyond": ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id 1000000 is not a token"),
    "tokens as numbers": ({"tokenizer.ggml.tokens": [1, 2, 3]}, "tokens = [1, 2, 3] is not a list of texts"),
    "tokens as one text": ({"tokenizer.ggml.tokens": "abc"}, "tokens = 'abc' is not a list of texts"),
    "merges of unknown parts": ({"tokenizer.ggml.merges": ["zz qq"]}, "merges joins 'zz qq', which are no tokens"),
    "merges as numbers": ({"tokenizer.ggml.merges": [1]}, "merges = [1] is not a list of texts"),
    "types as texts": ({"tokenizer.ggml.token_type": ["a"]}, "token_type = ['a'] is not a list of whole numbers"),
    "BOS as a number": ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token = 1 is not true or false"),
    "a template as a list": ({"tokenizer.chat_template": [1]}, "chat_template = [1] is not a text"),
    "an alignment of zero": ({"general.alignment": 0}, "general.alignment = 0"),
    "one of three parts": ({"split.count": 3}, "is one of several parts"),
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_false_metadata_of_a_gguf_file(
    model: Path, tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = GGUF_FAULTS[fault]
    metadata, tensors = fuzz.gguf_file(model)
    plain: Callable[[Any], bytes] = fuzz.gguf_value
    monkeypatch.setattr(fuzz, "gguf_value", lambda v: v if isinstance(v, bytes) else plain(v))
    (tmp_path / "m.gguf").write_bytes(fuzz.gguf_bytes(metadata | change, tensors))
    assert message in refused(["convert", "--from", str(tmp_path / "m.gguf"), "--to", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 30_000, "nested deeper than 64"),
        (b'{"a":' * 30_000, "nested deeper than 64"),
        (b'{"a":' + b"[" * 90 + b"]" * 90 + b"}", "nested deeper than 64"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1e999}', "too large for any purpose"),
        (b'{"\\ud800": 1}', "half a character"),
        (b'{"a": ["\\udfff"]}', "half a character"),
        (b'{"a": 1, "a": 2}', "key 'a' twice"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "a JSON object is expected"),
        (b"", "not valid JSON"),
    ],
)
def test_json_headers_are_read_within_bounds(text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_json(text, "x.json")


def test_a_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(InputError, match="larger than 64 MiB"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["model.safetensors"], "is not the name of a safetensors file"),
        ({"a": 1}, "is not the name of a safetensors file"),
        ("a" * 5000 + ".safetensors", "is not the name of a safetensors file"),
        ("../model.safetensors", "is not the name of a safetensors file"),
        (7, "is not the name of a safetensors file"),
    ],
)
def test_an_index_names_files(
    model: Path, tmp_path: Path, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((model / "config.json").read_bytes())
    index = {"weight_map": {"lm_head.weight": value}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refused(["convert", "--from", str(tmp_path / "m"), "--to", str(tmp_path / "out")], capsys)


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {
            "padding": {
                "strategy": {"Fixed": 10**11},
                "direction": "Right",
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "",
            }
        },
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 0}, "unk_token": "a"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2**31}, "unk_token": "a"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {},
            }
        },
    ],
    ids=lambda part: next(iter(part)),
)
def test_what_makes_the_tokenizers_library_panic(
    model: Path, tmp_path: Path, part: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    for path in model.iterdir():
        (tmp_path / "m" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "m" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | part))
    data = tiny.preferences(tmp_path / "d.jsonl", rows=2)
    code = main(["inspect", "--model", str(tmp_path / "m"), "--data", str(data)])
    said = capfd.readouterr().err
    assert "panicked" not in said
    assert "Traceback" not in said
    # Padding is no part of what a text's ids are, and is left out.
    assert code == (0 if "padding" in part else 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a " * 12_000_000, "chosen": "b", "rejected": "c"}, "'prompt' is too long"),
        ({"prompt": "a", "chosen": "b" * 24_000_000, "rejected": "c"}, "'chosen' is too long"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "\ud800": 1}, "a name holds broken Unicode"),
        ({"prompt": "a", "chosen": [{"role": "user", "\udfff": "b"}], "rejected": "c"}, "a name holds broken Unicode"),
    ],
    ids=["prompt", "chosen", "name", "inner name"],
)
def test_rows_that_no_context_holds(
    model: Path, tmp_path: Path, row: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    assert message in refused(["inspect", "--model", str(model), "--data", str(tmp_path / "d.jsonl")], capsys)
