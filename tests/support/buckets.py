"""A bucket in memory, for tests of gs:// paths."""

from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """A bucket in memory, in place of Google's."""

    protocol = ("gs", "gcs")
    store: dict[str, Any] = {}  # noqa: RUF012 - the base class keeps its files so
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return "/" + str(path).removeprefix("gs://").strip("/")

    def glob(self, path: str, **kwargs: Any) -> list[str]:
        return [name.removeprefix("/") for name in super().glob(path, **kwargs)]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    """gs:// as a `Bucket`, with an empty cache for local copies."""
    from etils.epath import backend

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Bucket.store.clear()
    filesystem = Bucket(skip_instance_cache=True)
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: filesystem)
    return filesystem
