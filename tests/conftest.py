"""Fixtures that several test files share."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Before anything imports jax: eight CPU devices, so that every mesh can be tried.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# Many tests run the same programs: what one of them compiled serves the others, and the processes that they start. Each
# worker of pytest-xdist has a folder of its own, since jax writes there without a lock.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OURS = os.environ.get("PYTEST_XDIST_WORKER") is None and _CACHE not in os.environ
if _OURS:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="dpo_jax-compiled-")
os.environ[_CACHE] = os.path.join(os.environ[_CACHE], os.environ.get("PYTEST_XDIST_WORKER", "main"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, `../shared/data` or `$DPO_JAX_DATA`; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DPO_JAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set DPO_JAX_DATA to its folder")
    return folder


def pytest_unconfigure() -> None:
    if _OURS:
        shutil.rmtree(Path(os.environ[_CACHE]).parent, ignore_errors=True)
