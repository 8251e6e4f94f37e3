"""What `--model M` names: a folder, a file, a hub id, or `smollm2`."""

import functools
import logging
import re
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dpo_jax.errors import InputError, first_line, nearest
from dpo_jax.headers import read_json
from dpo_jax.weights import smollm2
from dpo_jax.weights.huggingface.shards import INDEX
from dpo_jax.weights.integrity.digests import damage_seen_here
from dpo_jax.weights.integrity.folder import is_step, steps_in

_log = logging.getLogger(__name__)

Kind = Literal["huggingface", "gguf", "orbax", "peft", "checkpoint"]

# Weights, configuration and tokenizer; no pickles, and no code.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "README.md"]
_HUB_IGNORED = ["*/*", "consolidated*", "tekken.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A GGUF file of a hub repository: by its name, or by how it is quantised.
_HUB_GGUF = re.compile(rf"({_HUB_ID.pattern})(?:/([\w][\w./-]*\.gguf)|:(\w[\w-]*))")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A resolved checkpoint: what it is, where it lies on this machine, and what it was asked for as."""

    kind: Kind
    path: Path
    name: str


def resolve(source: str | Path, revision: str | None = None, *, merged: bool = False, inside: bool = False) -> Source:
    """Find the checkpoint that `source` names, downloading it where it is a hub id or `smollm2`.

    A Hugging Face folder, a `.gguf` file, a folder written by `convert` (orbax), a PEFT adapter folder, a run folder
    (its `model`; under LoRA its `adapter`, which no dtype of the weights beneath rounds; the newest of its intact
    checkpoints while it is unfinished), one of a run's checkpoints, `owner/name` on the Hugging Face hub, a GGUF file
    there (`owner/name/file.gguf`, or `owner/name:Q4_K_M` by its quantisation: that file alone is fetched), or
    `smollm2`.

    Raises `InputError` for anything else.

    Args:
      revision: of a hub repository; not given: the newest.
      merged: of a finished run with LoRA take its merged `model`, in float32, which training starts from: so a run can
        follow another with adapters of its own, or with none.
      inside: `source` is the model of a run, and no run itself.
    """
    path, name = Path(source).expanduser(), str(source)
    if not path.exists():
        if name == "smollm2":
            path = smollm2.fetch()
        elif named := _HUB_GGUF.fullmatch(name):
            path = _download_gguf(named[1], named[2], named[3], revision)
        elif _HUB_ID.fullmatch(name) and path.suffix != ".gguf":
            path = _download(name, revision=revision)
        else:
            raise InputError(
                f"{source}: no such folder or file{nearest(source)}; give a model folder, a .gguf file, a hub id, or"
                " smollm2"
            )
    if not path.is_dir():
        if path.suffix == ".gguf":
            return Source("gguf", path, name)
        raise InputError(f"{source}: not a model; give a folder, a .gguf file, a hub id, or smollm2")
    there = {f"{entry.name}/" if entry.is_dir() else entry.name for entry in path.glob("*")}
    kind = _weights_among(there)
    if kind is None and "model/" in there and not inside:  # a finished run
        adapter = (path / "adapter" / "adapter_config.json").is_file()
        inner = resolve(path / ("adapter" if adapter and not merged else "model"), inside=True)
        return inner if adapter and merged else replace(inner, name=name)
    if kind == "huggingface" and "config.json" not in there:
        raise InputError(f"{path}: config.json is missing; copy it from the original model")
    if kind is not None:
        return Source(kind, path, name)
    if pickles := sorted(entry for entry in there if entry.endswith(_PICKLES)):
        raise InputError(
            f"{path}: only pickled weights ({pickles[0]}), which are not read; save the model as safetensors, "
            "e.g. with transformers' save_pretrained"
        )
    if (path / "checkpoints").is_dir():
        return Source("checkpoint", _newest_intact(path), name)
    if is_step(path) and (path / "state").is_dir():
        return Source("checkpoint", path, name)
    if ggufs := sorted(path.glob("*.gguf")):
        raise InputError(f"{path}: give the GGUF file itself, e.g. {ggufs[0]}")
    raise InputError(f"{path}: no model here: neither safetensors nor a checkpoint of ours")


def _weights_among(there: Set[str]) -> Literal["huggingface", "orbax", "peft"] | None:
    """What the model is whose folder has these entries; None where they hold no weights that are read.

    Folders have a slash behind.
    """
    if "adapter_config.json" in there:
        return "peft"
    if {"config.json", "params/"} <= there:
        return "orbax"
    found = INDEX in there or any(entry.endswith(".safetensors") for entry in there)
    return "huggingface" if found else None


def _newest_intact(run: Path) -> Path:
    """The newest checkpoint of an unfinished run that is what was saved; those passed over are named, and left."""
    steps = steps_in(run / "checkpoints")
    if not steps:
        raise InputError(f"{run}: this run has no model and no checkpoint yet; start it again with its command")
    for step in reversed(steps):
        path = run / "checkpoints" / str(step)
        files = [(file, file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
        if _said_damaged(path, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in files)) is None:
            return path
    raise InputError(f"{run}: every checkpoint is damaged; start the run again with its command")


@functools.lru_cache(maxsize=64)
def _said_damaged(checkpoint: Path, files: tuple[tuple[Path, int, int], ...]) -> str | None:
    """What is wrong with a checkpoint, which is logged too; None where nothing is.

    Reading it all takes a while, and a command resolves its model several times: once is enough while its `files` (size
    and time of each) stay the same.
    """
    reason = damage_seen_here(checkpoint)
    if reason is None:
        try:
            step = read_json(checkpoint / "meta" / "metadata").get("step")
            reason = None if step == int(checkpoint.name) else f"its metadata are of step {step}"
        except InputError as problem:
            reason = str(problem)
    if reason is not None:
        _log.warning("checkpoint %s is damaged (%s); the one before it is looked at", checkpoint, reason)
    return reason


def config_file(source: str | Path) -> Path | None:
    """The config.json of a Hugging Face folder or hub id, without its weights; None for anything else."""
    path = Path(source).expanduser()
    if path.is_dir():  # that of a run holds its options
        found = (path / "config.json").is_file() and not (path / "run.json").is_file()
        return path / "config.json" if found else None
    if path.exists() or not _HUB_ID.fullmatch(str(source)) or path.suffix == ".gguf":
        return None
    return _download(str(source), ["config.json"]) / "config.json"


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """What goes wrong between us and the hub, as an `InputError` about `name`."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError as ConnectionFailed,  # pyright: ignore[reportPrivateImportUsage]
        LocalEntryNotFoundError,
    )

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionFailed, OSError) as error:
        raise InputError(
            f"{name}: no such folder here{nearest(name)}, and the Hugging Face hub did not give it"
            f" ({first_line(error)}); check the name and the network, log in for a gated model, or use smollm2"
        ) from error


def _download(name: str, patterns: Sequence[str] = _HUB_PATTERNS, revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub(name):
        chosen = {"allow_patterns": list(patterns), "ignore_patterns": _HUB_IGNORED, "revision": revision}
        folder = Path(snapshot_download(name, **chosen))
    if patterns is _HUB_PATTERNS and not any(folder.glob("*.safetensors")) and (there := _ggufs(name)):
        raise InputError(f"{name}: holds GGUF files; name one, e.g. {name}/{there[0]} (there are {', '.join(there)})")
    return folder


def _ggufs(name: str) -> list[str]:
    """The GGUF files of a hub repository."""
    from huggingface_hub import HfApi

    with _hub(name):
        return sorted(file for file in HfApi().list_repo_files(name) if file.endswith(".gguf"))


def _download_gguf(name: str, file: str | None, kind: str | None, revision: str | None = None) -> Path:
    """The one GGUF file of a hub repository that is called `file`, or is quantised as `kind` says."""
    from huggingface_hub import hf_hub_download

    there = _ggufs(name)
    apart = re.compile(rf"(?<![^-._/]){re.escape(kind or '')}(?![^-._])", re.IGNORECASE)
    found = [f for f in there if (f == file if kind is None else apart.search(f.removesuffix(".gguf")))]
    if len(found) != 1:
        which = "several such GGUF files" if found else f"no GGUF file {file or kind}"
        listed = ", ".join(found or there) or "none at all"
        raise InputError(f"{name}: holds {which} ({listed}); name one as {name}/FILE.gguf")
    with _hub(name):
        return Path(hf_hub_download(name, found[0], revision=revision))
