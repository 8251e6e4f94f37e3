"""A full disk: one line, exit code 2, and what was whole is kept. A limit on the size of files stands for it."""

import contextlib
import errno
import itertools
import json
import resource
import struct
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import pytest
import runs
import tiny
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from dpo_jax.cli import main
from dpo_jax.errors import InputError, full_disk
from dpo_jax.files.log import MetricLog
from dpo_jax.train import session as training
from dpo_jax.weights.orbax.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, pairs and prompts."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", layers=1, hidden=16, heads=2, kv_heads=1)
    tiny.preferences(folder / "pairs.jsonl", rows=12)
    prompts = "".join(json.dumps({"prompt": f"{i} what is the film"}) + "\n" for i in range(24))
    (folder / "prompts.jsonl").write_text(prompts)
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_compilation_cache():
    """The cache that the tests share would keep what this file's full disks cut off."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "make_mesh", runs.small_mesh)
    # Of a module first imported under the limit, Python keeps what had room, and other tests would read that.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@contextlib.contextmanager
def files_up_to(size: int):
    """No file grows beyond `size` bytes in here."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails(capsys: pytest.CaptureFixture[str], size: int, *words: object) -> None:
    capsys.readouterr()
    with files_up_to(size):
        assert main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    *_, last = said.strip().splitlines()
    assert last.startswith("dpo-jax: error: ")
    assert "cannot be written (File too large)" in last or "cannot be written (write() failed: File too large)" in last


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (4000, ("convert", "--from", "{}/model", "--to", "{out}")),
        (4000, ("convert", "--from", "{}/model", "--to", "{out}", "--format", "orbax")),
        (1000, ("convert", "--from", "{}/model", "--to", "{out}", "--format", "orbax")),
        (1000, ("prepare", "--data", "{}/pairs.jsonl", "--to", "{out}")),
        (400, ("logps", "--model", "{}/model", "--data", "{}/pairs.jsonl", "--out", "{out}")),
        (400, ("eval", "--model", "{}/model", "--data", "{}/pairs.jsonl", "--out", "{out}")),
    ],
)
def test_commands_with_one_result(inputs: Path, tmp_path: Path, capsys, size: int, words) -> None:
    """Nothing is left behind under the result's name."""
    out = tmp_path / "out"
    fails(capsys, size, *(word.format(inputs, out=out) for word in words))
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_generate_goes_on(inputs: Path, tmp_path: Path, capsys) -> None:
    words = ["generate", "--model", inputs / "model", "--prompts", inputs / "prompts.jsonl", "--batch_size", 4]
    words += ["--sample.max_new_tokens", 6, "--out"]
    fails(capsys, 2000, *words, tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl.part").read_bytes().splitlines()) > 4
    assert main([str(word) for word in [*words, tmp_path / "out.jsonl"]]) == 0
    assert main([str(word) for word in [*words, tmp_path / "whole.jsonl"]]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_training_goes_on_with_the_same_bits(inputs: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    words = ["dpo", "--model", inputs / "model", "--data", inputs / "pairs.jsonl", "--train.batch_size", 4]
    words += ["--train.steps", 6, "--checkpoint.every", 2, "--data.max_length", 64, "--data.buckets", 1]
    words += ["--mesh.fsdp", 1, "--out"]
    out = tmp_path / "out"
    real, unlimited = Checkpoints._check_space, resource.getrlimit(resource.RLIMIT_FSIZE)

    def check(checkpoints: Checkpoints, tree: Any) -> None:
        real(checkpoints, tree)
        if checkpoints.steps() == [2]:  # the disk is full from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (8000, unlimited[1]))

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_check_space", check)
        fails(capsys, 1 << 40, *words, out)
    assert (out / "checkpoints" / "2").is_dir()
    assert not (out / "checkpoints" / "4").exists()
    assert main([str(word) for word in [*words, out]]) == 0
    assert main([str(word) for word in [*words, tmp_path / "whole"]]) == 0
    assert runs.metrics(out) == runs.metrics(tmp_path / "whole")
    weights = [folder / "model" / "model.safetensors" for folder in (out, tmp_path / "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def raised(*errors: Exception) -> Exception:
    """The last of some exceptions, each raised while the one before was handled."""
    for before, after in itertools.pairwise(errors):
        after.__context__ = before
    return errors[-1]


def test_what_counts_as_a_full_disk() -> None:
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert full_disk(OSError(code, "whatever"))
    text = 'RESOURCE_EXHAUSTED: Error writing local file "x": [OS error 28: ENOSPC No space left on device]'
    assert full_disk(ValueError(text)) == "No space left on device"
    assert full_disk(raised(OSError(errno.ENOSPC, "full"), ValueError("x"), RuntimeError("lost"))) is not None
    assert full_disk(OSError(errno.ENOENT, "No such file")) is None
    assert full_disk(raised(KeyError("a"), ValueError("space"))) is None


def test_the_command_line_tells_of_it(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    """Wherever it happens, a terminal that is a file on the same disk included."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("dpo_jax.commands.inspect.inspect", full)
    words = ["inspect", "--model", "m", "--data", "d"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"dpo-jax: error: {tmp_path / 'x'}: cannot be written (No space left on device); free space and run the same"
        " command again: what was whole is kept\n"
    )
    monkeypatch.setattr(sys.stderr, "write", full)
    assert main(words) == 2


@pytest.mark.parametrize("size", [100, 2000])
def test_the_log_fails_once(tmp_path: Path, size: int) -> None:
    """In the thread that logs, at the figures or at the events, and not again when it is closed."""

    def write() -> None:
        with MetricLog(tmp_path, total=100) as log:
            for step in range(1, 100):
                log.write({"step": step, "loss": 1.0, "grad_norm": 1.0})
                log.sync()

    with files_up_to(size), pytest.raises(InputError, match="File too large"):
        write()
    assert [thread.name for thread in threading.enumerate() if "Event" in type(thread).__name__] == []


def test_events_are_read_by_tensorboard(tmp_path: Path) -> None:
    with MetricLog(tmp_path, total=2) as log:
        log.write({"step": 1, "loss": 0.5, "rewards/margins": 2.0})
    with MetricLog(tmp_path, total=2, start=1) as log:
        log.write({"step": 2, "loss": 0.25})
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events(first)[1:]] == [
        (1, "loss", 0.5),
        (1, "rewards/margins", 2.0),
    ]
    assert events(first)[0].file_version == "brain.Event:2"
    purge, last = events(second)[1:]
    assert (purge.step, purge.session_log.status, last.step) == (2, 1, 2)


def events(path: Path) -> list[Any]:
    """The events of a file of TFRecords."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


@pytest.mark.parametrize("line", ["[1, 2]", "7", '{"loss": 1.0}', '{"step": "2"}', '{"step": 2, "loss": {}}'])
def test_a_log_that_is_none(inputs: Path, tmp_path: Path, capsys, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 0.5}}\n{line}\n')
    with pytest.raises(InputError, match="line 2: a ") as error:
        MetricLog(tmp_path, total=4, start=2)
    assert "\n" not in str(error.value)
