"""Do two versions of the code compute the same bits? One short run of every command, and what came out of it.

    python tests/support/same_bits.py before.json --tree ../older-checkout  # default: the tree this file stands in
    python tests/support/same_bits.py after.json
    python tests/support/same_bits.py --compare before.json after.json      # per command; exit code 1 where they differ

Each case is one or several processes `python -m dpo_jax ...` in an empty folder, on one CPU device, with tiny random
models and rows (`bits_inputs.py`) and fixed seeds. Only the command line and the files it leaves are looked at, so that
this file serves trees in which every module has another name. `--only WORD ...` takes the cases whose label contains
one of the words, `--jobs N` runs so many at once; a file of the same commit is gone on with. Two runs of one commit on
one machine give the same file. The exit code is 1 where a command failed.

Recorded of every case: the exit codes, and of each file that the case left
  safetensors, tokenizers, array_record   sha256
  orbax checkpoints                       sha256 over the arrays (name, dtype, shape, bytes in C order)
  metrics.jsonl                           every row, without clock figures
  other .jsonl, .txt, .csv, .md           sha256 of the text
  other .json                             every value by its name, without clock figures and hashes of files
  stdout                                  sha256 of the text, where the command's result is printed
  anything else (reports, plots, TensorBoard, logs)   that it is there
Folders of the run are written <work>, today's date <today>. Left out because they differ between two runs of one
commit: clock and memory figures (`CLOCK`), `created`-like fields and lock files, the bytes of orbax's own files
(compressed in an order that is not fixed), and the text of HTML reports and plots.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bits_inputs
from bits_cases import CASES, Case

# One device, one thread for matrix products; no colours, no network, and tables of one width. XLA compiles without its
# optimisations: it is quicker, and the bits then follow from the operations and not from how XLA fuses them.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_cpu_multi_thread_eigen=false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "160",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
CLOCK = re.compile(r"second|(?<!sen)time|tflops|mfu|memory|rss|watt|kwh|energy|co2|dollar|hours|elapsed|versions?$")
DIGESTED = (".safetensors", ".array_record", ".model", ".jinja", ".npz", ".npy")
TEXTS = (".jsonl", ".txt", ".csv", ".md", ".py")

Record = dict[str, Any]


def build(folder: Path) -> None:
    """The inputs of all cases."""
    bits_inputs.build(folder)
    bits_inputs.language_model(folder / "rm2", seed=2)  # a reference that is another policy
    (folder / "plan.py").write_text(
        "from dpo_jax.config import *\n"
        "older = {'source': 'd'} if 'source' in DPORun.__dataclass_fields__ else {}  # now --data\n"
        f"config = DPORun(model={str(folder / 'model')!r}, out='o', data=DataConfig(max_length=64),\n"
        "    train=TrainConfig(batch_size=8), **older)\n"
    )


# ---------------------------------------------------------------- running


def run(case: Case, tree: Path, work: Path, environment: dict[str, str]) -> Record:
    """Run the commands of a case and say so; what they left."""
    start = time.monotonic()
    folder = work / "cases" / re.sub(r"\W+", "_", case.label)
    folder.mkdir(parents=True)
    clean = cleaner(work)
    environment = environment | {"PYTHONPATH": str(tree), "DPO_JAX_CACHE": str(work / "cache" / folder.name)}
    record: Record = {}
    for number, line in enumerate(case.commands):
        if case.between is not None and number == len(case.commands) - 1:
            case.between(folder)
        words = [re.sub(r"^@", f"{work}/inputs/", word) for word in line.split()]
        done = subprocess.run(
            [sys.executable, "-m", "dpo_jax", *words], cwd=folder, env=environment, capture_output=True, text=True
        )
        record[f"exit {number + 1}"] = done.returncode
        if done.returncode:
            record[f"stderr {number + 1}"] = clean(done.stderr)[-600:]
        if case.stdout:
            record[f"stdout {number + 1}"] = digest(clean(done.stdout).encode())
    for path, value in left_in(folder, clean):
        record[path] = value
    failed = [value for name, value in record.items() if name.startswith("stderr")]
    print(f"{time.monotonic() - start:6.1f} s  {case.label}", *failed, sep="\n    ", flush=True)
    return record


def cleaner(work: Path) -> Callable[[str], str]:
    """Takes out of a text what belongs to this one run: its folders and the day."""
    today = datetime.date.today().isoformat()
    return lambda text: text.replace(str(work), "<work>").replace(today, "<today>")


def digest(content: bytes) -> str:
    """The first 16 hex digits of the sha256: enough to tell files apart, short enough to read."""
    return hashlib.sha256(content).hexdigest()[:16]


def left_in(folder: Path, clean: Callable[[str], str]) -> Iterator[tuple[str, Any]]:
    """(file or checkpoint, its record) of everything below `folder`."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "_METADATA").exists():
            yield path.name, arrays(path)
        elif path.is_dir():
            for name, value in left_in(path, clean):
                yield f"{path.name}/{name}", value
        elif not path.name.startswith(("events.out", ".")):
            yield path.name, content(path, clean)


def content(path: Path, clean: Callable[[str], str]) -> Any:
    """The record of one file."""
    kind = path.suffix
    if path.name == "files.json":  # checksums of a checkpoint's files, in which orbax writes the time
        return "there"
    if path.name == "metrics.jsonl":
        return [without_clock(json.loads(line)) for line in path.read_text().splitlines()]
    if kind in DIGESTED or path.name.startswith("tokenizer") or ".array_record" in path.name:
        return digest(path.read_bytes())
    if kind in TEXTS:
        return digest(clean(path.read_text()).encode())
    if kind == ".json":
        try:
            return flat(without_clock(json.loads(clean(path.read_text()))))
        except ValueError:
            pass
    return "there"


def without_clock(value: Any) -> Any:
    """A JSON value without entries that name a clock figure."""
    if isinstance(value, dict):
        return {key: without_clock(entry) for key, entry in value.items() if not CLOCK.search(key.lower())}
    return [without_clock(entry) for entry in value] if isinstance(value, list) else value


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict) or not value:
        return {at: value}
    pairs = ((f"{at}.{key}" if at else key, entry) for key, entry in value.items())
    return {name: leaf for key, entry in pairs for name, leaf in flat(entry, key).items()}


def arrays(path: Path) -> dict[str, str]:
    """Digests of the arrays of an orbax checkpoint, by name."""
    os.environ.update(ENVIRONMENT)
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        leaves = jax.tree_util.tree_leaves_with_path(reader.restore(path.absolute()))
    found = {}
    for where, leaf in leaves:
        array = np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        found[jax.tree_util.keystr(where)] = digest(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return found


# ---------------------------------------------------------------- comparing


def compare(before: Record, after: Record) -> bool:
    """Print what differs per case; whether nothing does."""
    same = True
    for label in dict.fromkeys([*before["cases"], *after["cases"]]):
        if label not in before["cases"] or label not in after["cases"]:
            same, where = False, "second" if label not in after["cases"] else "first"
            print(f"{label}: NOT IN THE {where.upper()} FILE")
            continue
        lines = list(differences(before["cases"][label], after["cases"][label]))
        same &= not lines
        print(f"{label}: {'DIFFERS' if lines else 'same'} ({len(before['cases'][label])} files and results)")
        for line in lines:
            print(f"    {line}")
    return same


def differences(before: Record, after: Record) -> Iterator[str]:
    """A line for each entry in which two records differ."""
    for name in sorted(before.keys() | after.keys()):
        if name not in after or name not in before:
            yield f"{name}: only in the {'first' if name in before else 'second'}"
        elif before[name] != after[name]:
            a, b = (
                {str(i): v for i, v in enumerate(x)} if isinstance(x, list) else x for x in (before[name], after[name])
            )
            if isinstance(a, dict) and isinstance(b, dict):
                a, b = flat(a), flat(b)
                changed = [key for key in sorted(a.keys() | b.keys()) if a.get(key, "-") != b.get(key, "-")]
                shown = ", ".join(f"{key} {a.get(key, '-')} -> {b.get(key, '-')}" for key in changed[:6])
                yield f"{name}: {len(changed)} of {len(a)} entries: {shown}{', ...' if len(changed) > 6 else ''}"
            else:
                yield f"{name}: {str(a)[-300:]} -> {str(b)[-300:]}"


# ---------------------------------------------------------------- command line


def commands_of(tree: Path, environment: dict[str, str]) -> list[str]:
    """The command words that `--help` of the tree lists."""
    told = subprocess.run(
        [sys.executable, "-m", "dpo_jax", "--help"],
        env=environment | {"PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"^  ((?:recipe )?[\w-]+) ", told.stdout, re.MULTILINE)


def about(tree: Path) -> Record:
    """Which commit was run, and on what."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "dpo_jax")
    libraries = {
        name: importlib.metadata.version(name) for name in ("jax", "numpy", "orbax-checkpoint", "transformers")
    }
    return {"commit": git("rev-parse", "HEAD"), "changed": bool(changed), "python": sys.version.split()[0], **libraries}


def main(argv: Sequence[str] | None = None) -> int:
    """See the module; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[2], help="the checkout to run")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="cases whose label holds a word")
    parser.add_argument("--jobs", type=int, default=2, help="cases that run at once")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="FILE", help="two files of earlier runs")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs, which then stay")
    options = parser.parse_args(argv)
    if options.compare:
        before, after = (json.loads(path.read_text()) for path in options.compare)
        print(f"{before['about']['commit'][:12]} -> {after['about']['commit'][:12]}")
        return 0 if compare(before, after) else 1
    if options.out is None:
        parser.error("give OUT.json, or --compare A.json B.json")
    tree = options.tree.resolve()
    dropped = ("XLA_", "JAX_", "PYTHON", "DPO_JAX_", "HF_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | ENVIRONMENT
    missing = [
        w
        for w in commands_of(tree, environment)
        if not any(f"{c.label} ".startswith((f"{w} ", f"{w},")) for c in CASES)
    ]
    if missing:
        print(f"no case for {', '.join(missing)}", file=sys.stderr)
    work = Path(tempfile.mkdtemp(prefix="same-bits-")) if options.keep is None else options.keep.resolve()
    results: Record = {"about": about(tree), "cases": {}}
    if options.out.exists():
        earlier = json.loads(options.out.read_text())
        if earlier["about"] != results["about"]:
            parser.error(f"{options.out} is of another commit or other libraries; choose another file")
        results = earlier
    chosen = [case for case in CASES if any(word in case.label for word in options.only)]
    try:
        build(work / "inputs")
        with ThreadPoolExecutor(options.jobs) as pool:
            waiting = [case for case in chosen if "stderr" in str(list(results["cases"].get(case.label, ["stderr"])))]
            for case, record in pool.map(lambda case: (case, run(case, tree, work, environment)), waiting):
                results["cases"][case.label] = record
                options.out.write_text(json.dumps(results, indent=1) + "\n")
    finally:
        if options.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    return int(any(name.startswith("stderr") for record in results["cases"].values() for name in record))


if __name__ == "__main__":
    sys.exit(main())
