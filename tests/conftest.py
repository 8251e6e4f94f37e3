"""Fixtures that several test files share."""

import os
from pathlib import Path

# Before anything imports jax: eight CPU devices, so that every mesh can be tried.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, `../shared/data` or `$DPO_JAX_DATA`; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DPO_JAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set DPO_JAX_DATA to its folder")
    return folder
