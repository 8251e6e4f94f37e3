"""Meshes over several slices: what lies along which axis."""

from dataclasses import dataclass

import numpy as np
import pytest

from dpo_jax import mesh as meshes
from dpo_jax.errors import InputError


@dataclass(frozen=True)
class Device:
    """What is read of a device of a GPU node."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "some GPU"
    process_index: int = 0


def slices_of(shape: tuple[int, int, int, int], slices: int) -> np.ndarray:
    """The slice of every device of the mesh."""
    count = int(np.prod(shape))
    devices = [Device(i, i * slices // count) for i in range(count)]
    return np.vectorize(lambda device: device.slice_index)(meshes._across_slices(shape, slices, devices, cut=False))


def test_slices_lie_along_data() -> None:
    along = slices_of((4, 2, 2, 2), 2)
    assert along.shape == (4, 2, 2, 2)
    assert (along == np.array([0, 0, 1, 1])[:, None, None, None]).all()


def test_what_data_cannot_take_lies_along_fsdp(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="dpo_jax"):
        along = slices_of((2, 4, 1, 2), 4)
    assert (along == np.array([[0, 0, 1, 1], [2, 2, 3, 3]])[:, :, None, None]).all()
    assert "--mesh.data 4 keeps that within a slice" in caplog.text


def test_context_and_tensor_never_reach_over_slices() -> None:
    with pytest.raises(InputError, match=r"set --mesh\.data to 2 or a multiple"):
        slices_of((1, 1, 2, 4), 2)
