"""Fixtures that several test files share."""

import gc
import importlib.metadata
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports jax: eight CPU devices, so that every mesh can be tried.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# As many workers as cores: more threads of PyTorch's than one each would wait for each other's cores (a test on a real
# model took 436 s so, and takes 74).
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Many tests run the same programs: what one of them compiled serves the others, and the processes that they start. Each
# worker of pytest-xdist has a folder of its own, since jax writes there without a lock.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OURS = os.environ.get("PYTEST_XDIST_WORKER") is None and _CACHE not in os.environ
if _OURS:
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="dpo_jax-compiled-")
os.environ[_CACHE] = os.path.join(os.environ[_CACHE], os.environ.get("PYTEST_XDIST_WORKER", "main"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

# The files that take longest, the longest first. Whole files go to the workers in turn: one of these left to the end
# would run alone while the other workers have nothing to do.
_LONGEST = """
tests/plan/test_tpu_compile.py tests/commands/test_recipe_llama3.py tests/commands/test_run_kill.py
tests/align/test_slices.py tests/align/test_bf16_gradients.py tests/commands/test_run_qlora.py
tests/house/test_notebooks.py tests/sample/test_sample_smollm2.py tests/house/test_fuzz.py
tests/processes/test_run_host_losses.py tests/commands/test_kill_campaign.py tests/commands/test_run_environment.py
tests/weights/test_families.py tests/align/test_ppo_shared.py tests/commands/test_recipe_llama2_chat.py
tests/commands/test_recipe_zephyr.py tests/commands/test_run_dpo.py tests/commands/test_run_ppo.py
tests/commands/test_recipe_iterative_rpo.py tests/model/test_quantised.py tests/align/test_dpo_windows.py
tests/align/test_dpo_step.py tests/commands/test_recipe_frontier.py tests/align/test_ppo_step.py
tests/commands/test_run_samples.py tests/commands/test_run_online_dpo.py tests/commands/test_run_rejection.py
tests/commands/test_zephyr_arms.py tests/align/test_dpo_devices.py tests/plan/test_published_shapes.py
tests/sample/test_sample_narrow.py tests/commands/test_run_gatt.py tests/ground/test_moments.py
tests/commands/test_full_disk.py tests/commands/test_run_reward.py tests/align/test_sft_devices.py
tests/sample/test_sample_engine.py tests/commands/test_prepare.py tests/commands/test_cli_errors.py
tests/commands/test_demo.py tests/commands/test_run_texts.py tests/sample/test_stops.py
""".split()

_SLOWER = ("slow", "multiprocess", "real", "campaign", "tpu_compile", "cuda_compile")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the package logs too, which a command says itself from its first call on."""
    from dpo_jax import voice

    voice.listen()
    monkeypatch.setattr(logging.getLogger("dpo_jax"), "propagate", True)
    return caplog


@pytest.fixture(scope="module")
def compile_roughly() -> Iterator[None]:
    """The models are tiny, compiling them is not."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training commands take as many devices as their mesh needs."""
    import runs

    from dpo_jax.train import session

    monkeypatch.setattr(session, "make_mesh", runs.small_mesh)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, `../shared/data` or `$DPO_JAX_DATA`; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DPO_JAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set DPO_JAX_DATA to its folder")
    return folder


# Tests compile hundreds of tiny programs and run each for an instant: LLVM's costlier passes and XLA's newer emitters
# take far longer than they save, more than half of the CPU. A device that waits for another one on a busy machine may
# wait long.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_QUICK += " --xla_cpu_collective_call_terminate_timeout_seconds=900"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that a jaxlib does not know ends the process
    _QUICK += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Only tests on real models, whose programs run for longer, are compiled in full, and all commands that tests
    start as processes with flags of their own: as users run them."""
    if "not real" in (config.option.markexpr or "") and _QUICK not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {_QUICK}"


def pytest_collection_finish() -> None:
    """What the tests are stays; a program's traces are tens of thousands of objects, which live as long as it does."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order within a file, and of all others, stays.

    CI finds the files of the slower tests by their markers' names (`.ci/run`), which therefore stand in them.
    """
    place = {ROOT / file: i for i, file in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    marked = {(item.path, name) for item in items for name in _SLOWER if item.get_closest_marker(name)}
    for path, name in marked:
        if f"pytest.mark.{name}" not in path.read_text(encoding="utf-8"):
            raise pytest.UsageError(f"{path}: CI looks for pytest.mark.{name} by this name; write it there")


def pytest_unconfigure() -> None:
    if _OURS:
        shutil.rmtree(Path(os.environ[_CACHE]).parent, ignore_errors=True)
