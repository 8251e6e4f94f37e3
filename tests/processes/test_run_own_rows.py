"""Two processes on a prepared store: each reads the rows that its own devices hold, and learns what one would alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
import tiny
from safetensors.numpy import load_file

from dpo_jax.commands import prepare as command
from dpo_jax.config import DataConfig, PrepareRun

BATCH, ROWS = 8, 24
KINDS = ("pairs", "texts")
COUNTING = """
import json, sys
import numpy as np
from dpo_jax import cli, mesh
from dpo_jax.data.tokens.ragged import StoredRagged
from dpo_jax.train import row_data, session, sft_data

read = [0]
class Counted(np.ndarray):
    def __getitem__(self, key):
        got = np.asarray(super().__getitem__(key))
        read[0] += got.nbytes
        return got

stored = StoredRagged.stored.__func__
StoredRagged.stored = classmethod(
    lambda cls, file, *args, **options: stored(cls, np.asarray(file).view(Counted), *args, **options)
)
everything, *words = sys.argv[1:]
if everything == "all":
    for module in (row_data, session, sft_data):
        module.own_rows = lambda mesh, rows: np.ones(rows, bool)
code = cli.main(words)
print(json.dumps(read[0]))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and two prepared stores: pairs, and documents."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.folder(folder / "model", layers=1, hidden=16, kv_heads=4)
    tiny.preferences(folder / "pairs.jsonl", rows=ROWS)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    texts = [f"{row['prompt']} {row['chosen']} {row['rejected']}" for row in rows] * 4
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} {t}"}) + "\n" for i, t in enumerate(texts)))
    for name in ("pairs", "texts"):
        source = DataConfig(files=str(folder / f"{name}.jsonl"))
        tokenizer = str(folder / "model")
        command.prepare(PrepareRun(data=source, to=str(folder / name), tokenizer=tokenizer, store_ids=True))
    return folder


def words(inputs: Path, out: Path, kind: str, mesh: tuple[int, int, int]) -> list[str]:
    """An epoch of DPO on cached reference log-probabilities with held-out rows; or of a language model."""
    found = ["dpo" if kind == "pairs" else "sft", "--model", f"{inputs}/model", "--data", f"tfds:{inputs}/{kind}:train"]
    found += ["--eval_data", f"tfds:{inputs}/{kind}:train", "--out", str(out), "--train.batch_size", str(BATCH)]
    found += ["--optimizer.learning_rate", "3e-3", "--data.max_length", "256" if kind == "pairs" else "64"]
    found += ["--data.buckets", "1"] if kind == "pairs" else ["--data.kind", "text"]
    for name, size in zip(("data", "fsdp", "tensor"), mesh, strict=True):
        found += [f"--mesh.{name}", str(size)]
    return found


def trained(
    inputs: Path, out: Path, kind: str, mesh: tuple[int, int, int], *, processes: int = 2, reads: str = "own"
) -> list[int]:
    """Train; how many bytes of ids each process read."""
    program = ("-c", COUNTING, reads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_JAX_CACHE", f"{out}-cache")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        told = words(inputs, out, kind, mesh)
        started = runs.start_together(told, processes, program=program, devices=4 // processes)
    counts = []
    for process in started:
        said, error = process.communicate(timeout=600)
        assert process.returncode == 0, error[-3000:]
        counts.append(int(said.splitlines()[-1]))
    return counts


def ids_of(inputs: Path, kind: str) -> int:
    """Bytes of all ids of a store."""
    names = ("prompt", "responses") if kind == "pairs" else ("tokens",)
    return sum(next((inputs / kind).rglob(f"ids-train.{name}")).stat().st_size for name in names)


def same(out: Path, other: Path, within: float = 0) -> None:
    """Metrics and weights of two runs; `within`: a tolerance, relative and absolute."""
    ours, theirs = runs.metrics(out), runs.metrics(other)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for row, wanted in zip(ours, theirs, strict=True):
        assert row == (pytest.approx(wanted, rel=within, abs=within) if within else wanted)
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (out, other))
    for name in right:
        np.testing.assert_allclose(left[name], right[name], rtol=within, atol=within, err_msg=name)


@pytest.fixture(scope="module")
def alone(inputs: Path) -> dict[str, int]:
    """Runs of one process in folders of their names; how many bytes of ids each read."""
    return {kind: trained(inputs, inputs / f"one-{kind}", kind, (2, 2, 1), processes=1)[0] for kind in KINDS}


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", KINDS)
def test_each_process_reads_half(inputs: Path, alone: dict[str, int], tmp_path: Path, kind: str) -> None:
    """The same bits as of two processes that read all rows, and, up to the order of sums, as of one process."""
    mesh = (2, 2, 1)
    halves = trained(inputs, tmp_path / "own", kind, mesh)
    wholes = trained(inputs, tmp_path / "all", kind, mesh, reads="all")
    all_ids = ids_of(inputs, kind)
    # Pairs: the reference's pass, the epoch, and one evaluation behind it; text: before it, too, and whole windows.
    assert [alone[kind]] * 2 == wholes
    assert alone[kind] == (3 * all_ids if kind == "pairs" else pytest.approx(3 * all_ids, rel=0.15))
    assert sum(halves) == alone[kind]
    assert all(0.4 * alone[kind] < half < 0.6 * alone[kind] for half in halves)
    same(tmp_path / "own", tmp_path / "all")
    same(tmp_path / "own", inputs / f"one-{kind}", 1e-4)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("mesh", "share"), [((1, 2, 2), 0.5), ((1, 1, 4), 1.0)])
def test_rows_that_several_processes_hold(
    inputs: Path, alone: dict[str, int], tmp_path: Path, mesh: tuple[int, int, int], share: float
) -> None:
    """`tensor` within the processes halves what each reads; over both of them each holds, and reads, every row."""
    read = trained(inputs, tmp_path / "own", "pairs", mesh)
    assert read == pytest.approx([share * alone["pairs"]] * 2, rel=0.2 if share < 1 else 0)
    assert sum(read) == 2 * share * alone["pairs"]
    same(tmp_path / "own", inputs / "one-pairs", 1e-4)
