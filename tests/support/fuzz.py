"""Mutations of small valid files through the command line: each ends in success or in one line, soon, in little memory.

`test_fuzz.py` runs a minute of it with a fixed seed. A longer run, here for ten minutes:

    python tests/support/fuzz.py --minutes 10 --seed 1

A fault is anything but exit code 0, or 2 with exactly one line `dpo-jax: error: ...`: an exception that comes out (a
panic of a Rust library among them), a traceback on the terminal, a case that takes more than `LIMIT` seconds. What made
it is kept in the folder that the fault names.
"""

import argparse
import contextlib
import copy
import dataclasses
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import started
import tiny

from dpo_jax.cli import main
from dpo_jax.weights.convert import convert
from dpo_jax.weights.gguf.header import open_gguf

LIMIT = 30.0
"""Seconds that one case may take, on a machine that does other things too."""
RESUMED = 150.0
"""Seconds that a run may take which goes on: it loads, compiles, trains a step, exports and draws its report."""
MEMORY = 2 << 30
"""Bytes that the process may grow by over all cases."""

NUMBERS = (-1, 0, 1, 2, 3, 7, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 10**9, 10**18)
ODD: tuple[Any, ...] = (
    *NUMBERS, None, True, False, 0.0, -0.5, 0.1, 1.5, 1e-320, 1e308, "", " ", "0", "12", "true", "llama", "</s>", "é🙂",
    "../x", "/dev/zero", "a" * 3000, "x\n\x00\ty", [], {}, [[]], [{}], {"a": 1}, [1, "a", None], ["a"] * 50, [0] * 50,
    {"rope_type": "linear"}, ["LlamaForCausalLM"], 10**40, [[[[1]]]],
)  # fmt: skip
# Values that JSON text may spell, and that no JSON writer gives.
SPELLED = (
    "NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', '{"\\udfff": 1}', '{"a": 1, "a": 2}', "[" * 30000,
    "[" * 500 + "]" * 500, '{"a":' * 20000, "tru", "'a'", "1.", "\x01", '"\x01"', "",
)  # fmt: skip


class Hang(BaseException):
    """A case ran into the time limit."""


# ---------------------------------------------------------------- mutations


def bytes_mutated(data: bytes, rng: random.Random) -> bytes:
    """A few changes of bytes: cut, flipped, overwritten, repeated, taken out, moved."""
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not raw:
            break
        at = rng.randrange(min(len(raw), rng.choice((16, 64, 512, 4096, len(raw)))))
        length = rng.choice((1, 1, 2, 4, 8, 8, 64, 1000))
        kind = rng.randrange(8)
        if kind == 0:
            del raw[at:]
        elif kind == 1:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            raw[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f", b"[", b'"', b" ")) * length
        elif kind == 3:
            raw[at:at] = raw[at : at + length] * rng.choice((1, 2, 50))
        elif kind == 4:
            del raw[at : at + length]
        elif kind == 5:
            raw[at : at + length] = rng.randbytes(length)
        elif kind == 6:
            value = rng.choice(NUMBERS) + rng.choice((0, 0, 1))
            form = rng.choice(("<I", "<Q", ">I", ">Q"))
            raw[at : at + struct.calcsize(form)] = struct.pack(form, value % (1 << 8 * struct.calcsize(form)))
        else:
            other = rng.randrange(len(raw))
            raw[at : at + length] = raw[other : other + length]
    return bytes(raw)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of dictionaries and lists, at most a few of each list."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    for name, value in items:
        yield from places(value, (*path, name))


def tree_mutated(tree: Any, rng: random.Random, odd: tuple[Any, ...] = ODD) -> Any:
    """One or a few values replaced, taken out, repeated, renamed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        path = rng.choice([p for p in places(tree) if p] or [()])
        if not path:
            return rng.choice(odd)
        parent = tree
        for name in path[:-1]:
            parent = parent[name]
        value, kind = parent[path[-1]], rng.randrange(10)
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("", "a", "é", "new_key", "x" * 300))] = parent.pop(path[-1])
        elif kind == 2:
            parent[path[-1]] = str(value)[:1000]
        elif kind == 3:
            parent[path[-1]] = [value] * rng.choice((1, 2, 20))
        elif kind == 4 and isinstance(value, list):
            rng.shuffle(value)
        elif kind == 5 and isinstance(value, list):
            parent[path[-1]] = value[: len(value) // 2]
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(odd))
    return tree


def json_mutated(data: bytes, rng: random.Random) -> bytes:
    """JSON with other values, and now and then with what is no JSON."""
    try:
        tree = tree_mutated(json.loads(data), rng)
    except ValueError:  # the file is no JSON
        return bytes_mutated(data, rng)
    if rng.random() < 0.25:
        return json.dumps(tree_mutated(tree, rng, ("@@",))).replace('"@@"', rng.choice(SPELLED), 1).encode()
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def lines_mutated(data: bytes, rng: random.Random) -> bytes:
    """JSON lines, one of them mutated."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = json_mutated(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def text_or_bytes(mutate: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """Either of the two kinds of mutation."""
    return lambda data, rng: bytes_mutated(data, rng) if rng.random() < 0.4 else mutate(data, rng)


def safetensors_mutated(data: bytes, rng: random.Random) -> bytes:
    """Another header before the same tensors."""
    length = int.from_bytes(data[:8], "little")
    header = json_mutated(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


# ---------------------------------------------------------------- GGUF


def gguf_value(value: Any) -> bytes:
    """A metadata value with its type in front."""
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return (
            struct.pack("<II", 4, value)
            if 0 <= value < 2**32
            else struct.pack("<Iq", 11, max(-(2**63), min(value, 2**63 - 1)))
        )
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, list):
        items = [gguf_value(v) for v in value] or [struct.pack("<I", 4)]
        same = [item[4:] for item in items if item[:4] == items[0][:4]] if value else []
        return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(same)) + b"".join(same)
    text = str(value if value is not None else "").encode("utf-8", "surrogatepass")
    return struct.pack("<IQ", 8, len(text)) + text


def gguf_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    """A GGUF file: entries, and for each tensor [shape, type, values]."""
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(gguf_text(key) + gguf_value(value) for key, value in metadata.items())
    data = b""
    for name, (shape, kind, values) in tensors.items():
        head += gguf_text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += values + bytes(-len(values) % 32)
    return head + bytes(-len(head) % 32) + data


def gguf_file(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of the tiny model."""
    config = json.loads((folder / "config.json").read_text())
    backend = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(m) if isinstance(m, list) else m for m in backend["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tiny.TEMPLATE,
    }
    from safetensors.numpy import load_file

    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q"}
    names |= {"self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")} | {"model.layers.": "blk."}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for key, value in load_file(folder / "model.safetensors").items():
        for name, short in names.items():
            key = key.replace(name, short)
        tensors[key] = [list(value.shape), 0, value.astype(np.float32).tobytes()]
    return metadata, tensors


def gguf_mutated(folder: Path) -> Callable[[bytes, random.Random], bytes]:
    """Other metadata, other shapes and types, or other bytes."""
    metadata, tensors = gguf_file(folder)

    def mutate(data: bytes, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.45:
            return bytes_mutated(data[: len(data) if kind < 0.2 else 8000], rng) + data[8000:] * (kind >= 0.2)
        if kind < 0.85:
            changed = tree_mutated(metadata, rng)
            return gguf_bytes(changed if isinstance(changed, dict) else {}, tensors)
        changed = dict(tensors)
        name = rng.choice(list(changed))
        shape, code, values = changed[name]
        shape, code = list(shape), rng.choice((code, 1, 2, 8, 12, 14, 30, 99))
        shape[rng.randrange(len(shape))] = abs(rng.choice(NUMBERS))
        changed[name] = [shape * rng.choice((1, 1, 2)), code, values]
        return gguf_bytes(metadata, changed)

    return mutate


# ---------------------------------------------------------------- Parquet


def parquet_mutated(data: bytes, rng: random.Random) -> bytes:
    """Other columns: dates, decimals, nested and binary ones, among those that are wanted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    rows = len(table)
    columns = {
        "date": pa.array([2**62] * rows, pa.timestamp("us")),
        "nanoseconds": pa.array([2**61 + 1] * rows, pa.timestamp("ns")),
        "day": pa.array([-(2**31)] * rows, pa.date32()),
        "bytes": pa.array([rng.randbytes(9)] * rows, pa.binary()),
        "struct": pa.array([{"a": [1, None]}] * rows),
        "list": pa.array([[{"role": "user", "content": "a"}]] * rows),
        "null": pa.nulls(rows),
        "number": pa.array([float("nan")] * rows),
        "map": pa.array([[("a", 1)]] * rows, pa.map_(pa.string(), pa.int32())),
        "long": pa.array(["a b " * 20000] * rows),
        "dictionary": pa.array(["a"] * rows).dictionary_encode(),
    }
    for _ in range(rng.choice((1, 2, 3))):
        value = columns[rng.choice(list(columns))]
        name = rng.choice([*table.column_names, "rating", "score", "system", "messages", "extra"])
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, value)
        else:
            table = table.append_column(name, value)
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


# ---------------------------------------------------------------- cases


@dataclass
class Kind:
    """A file to mutate: `base` is its folder, `name` the file there, `arguments` the command on the mutated folder."""

    base: Path
    name: str
    arguments: Callable[[Path], list[str]]
    mutate: Callable[[bytes, random.Random], bytes]
    weight: int = 20
    limit: float = LIMIT


@dataclass
class Outcome:
    """What a run of cases found."""

    cases: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: tuple[float, str] = (0.0, "")
    grown: int = 0
    faults: list[str] = field(default_factory=list)
    each: dict[str, int] = field(default_factory=dict)
    processes: int = 0

    def note(self, work: Path, name: str, content: bytes, fault: str | None, said: str) -> None:
        """Keep what made a fault, if there was one."""
        if fault is not None:
            kept = work / "faults" / f"{len(self.faults)}-{name.replace(' ', '-')}"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(content)
            self.faults.append(f"{name} (kept as {kept}): {fault}\n{said[-500:]}")

    def __str__(self) -> str:
        each = ", ".join(f"{name} {count}" for name, count in sorted(self.each.items()))
        return (
            f"{self.cases} cases in {self.seconds:.0f} s ({self.refused} refused, {len(self.faults)} faults); slowest "
            f"{self.slowest[0]:.1f} s ({self.slowest[1]}); resident memory grew by {self.grown >> 20} MiB; {each}"
        )


def kinds(work: Path) -> dict[str, Kind]:
    """The files of a tiny model and of data."""
    model = tiny.folder(work / "model", layers=1, hidden=16, heads=2, kv_heads=1, vocab=270)
    data = tiny.preferences(work / "data" / "pairs.jsonl", rows=4) if (work / "data").mkdir() is None else None
    assert data is not None
    sharded = work / "sharded"
    convert(model, sharded, shard_bytes=8000)
    metadata, tensors = gguf_file(model)
    (work / "gguf").mkdir()
    (work / "gguf" / "m.gguf").write_bytes(gguf_bytes(metadata, tensors))
    open_gguf(work / "gguf" / "m.gguf")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (work / "parquet").mkdir()
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), work / "parquet" / "pairs.parquet")

    def converted(name: str = "") -> Callable[[Path], list[str]]:
        return lambda folder: ["convert", "--from", str(folder / name), "--to", str(folder / "converted")]

    def inspected(name: str) -> Callable[[Path], list[str]]:
        return lambda folder: ["inspect", "--model", str(model), "--data", str(folder / name), "--rows", "1"]

    def inspecting(folder: Path) -> list[str]:
        return ["inspect", "--model", str(folder), "--data", str(data), "--rows", "1"]

    trees = text_or_bytes(json_mutated)
    header = text_or_bytes(safetensors_mutated)
    tables = text_or_bytes(parquet_mutated)
    return {
        "gguf": Kind(work / "gguf", "m.gguf", converted("m.gguf"), gguf_mutated(model), 40),
        "safetensors": Kind(model, "model.safetensors", converted(), header),
        "index": Kind(sharded, "model.safetensors.index.json", converted(), trees),
        "config": Kind(model, "config.json", converted(), trees, 40),
        "tokenizer": Kind(model, "tokenizer.json", inspecting, trees),
        "tokenizer_config": Kind(model, "tokenizer_config.json", inspecting, trees, 10),
        "jsonl": Kind(data.parent, data.name, inspected(data.name), text_or_bytes(lines_mutated), 40),
        "parquet": Kind(work / "parquet", "pairs.parquet", inspected("pairs.parquet"), tables),
    }


def kinds_of_a_run(work: Path) -> dict[str, Kind]:
    """The files of a run with adapters, finished and not, after `kinds`. Each case loads a model, so they are rarer."""
    model, data = work / "model", work / "data" / "pairs.jsonl"
    run = work / "run"
    training = ["--model", str(model), "--data", str(data), "--train.batch_size", "2", "--data.max_length", "96"]
    training += ["--data.buckets", "1", "--checkpoint.every", "1", "--train.steps", "2"]
    assert main(["dpo", *training, "--out", str(run), "--lora.rank", "2"]) == 0
    unfinished = work / "unfinished"
    shutil.copytree(run, unfinished)
    for name in ("model", "adapter"):
        shutil.rmtree(unfinished / name, ignore_errors=True)
    marker = json.loads((unfinished / "run.json").read_text()) | {"finished": False}
    (unfinished / "run.json").write_text(json.dumps(marker))

    def converted(name: str = "") -> Callable[[Path], list[str]]:
        return lambda folder: ["convert", "--from", str(folder / name), "--to", str(folder / "converted")]

    def resumed(folder: Path) -> list[str]:
        return ["dpo", *training, "--lora.rank", "2", "--out", str(folder)]

    newest = max((unfinished / "checkpoints").iterdir(), key=lambda p: int(p.name) if p.name.isdigit() else -1)
    step = newest.relative_to(unfinished)
    trees, header = text_or_bytes(json_mutated), text_or_bytes(safetensors_mutated)
    adapter, weights = "adapter_config.json", "adapter_model.safetensors"
    found = {
        "adapter": Kind(run / "adapter", adapter, converted(), trees, 6),
        "adapter weights": Kind(run / "adapter", weights, converted(), header, 6),
        "run.json finished": Kind(run, "run.json", resumed, trees, 2, RESUMED),
        "run.json": Kind(unfinished, "run.json", resumed, trees, 1, RESUMED),
        "run's config": Kind(unfinished, "config.json", converted(str(step)), trees, 4),
        "metrics": Kind(unfinished, "metrics.jsonl", resumed, text_or_bytes(lines_mutated), 1, RESUMED),
        "orbax arrays": Kind(unfinished, str(step / "state" / "_METADATA"), converted(str(step)), trees, 4),
    }
    for path in sorted((newest / "meta").rglob("*")) + sorted(newest.glob("*.json")) + sorted(newest.glob("_CHECK*")):
        if path.is_file():
            name = str(path.relative_to(unfinished))
            found[f"checkpoint {path.name}"] = Kind(unfinished, name, resumed, trees, 1, RESUMED)
    return found


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """`Hang` after so many seconds; where the interpreter does not come to raise it, the stack and an exit."""

    def ring(signum: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def prepared(kind: Kind, work: Path, rng: random.Random) -> tuple[list[str], bytes]:
    """A folder with one file mutated: the command on it, and that file's content."""
    case = work / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(kind.base, case)
    content = kind.mutate((case / kind.name).read_bytes(), rng)
    (case / kind.name).write_bytes(content)
    return kind.arguments(case), content


def verdict(code: Any, said: str) -> str | None:
    """What is wrong with how a case ended, or None."""
    lines = [line for line in said.splitlines() if line.startswith("dpo-jax: error:")]
    if "Traceback" in said or "panicked" in said:
        return "a traceback on the terminal"
    if code == 0:
        return None
    if code != 2:
        return f"exit code {code}"
    return None if len(lines) == 1 and len(lines[0]) < 4000 else f"{len(lines)} lines of error"


def in_process(arguments: list[str], limit: float = LIMIT) -> tuple[str | None, int, str]:
    """The fault of a command, its exit code, and what it said."""
    out, fault, code = io.StringIO(), None, -1
    try:
        with deadline(limit), contextlib.redirect_stderr(out), contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
    except Hang:
        fault = f"took more than {limit:.0f} s: {''.join(traceback.format_exc()[-1500:])}"
    except BaseException as error:  # what comes out is what is looked for, panics of Rust libraries among it
        if isinstance(error, KeyboardInterrupt):
            raise
        fault = f"{type(error).__name__}: {traceback.format_exc()[-2500:]}"
    return fault or verdict(code, out.getvalue()), code, out.getvalue()


def as_process(arguments: list[str]) -> tuple[str | None, int, str]:
    """`in_process`, in a process of its own."""
    process = started.start(arguments, os.environ)
    try:
        _, said = process.communicate(6 * LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"took more than {6 * LIMIT:.0f} s", -1, ""
    code = process.wait()
    return verdict(code, said), code, said


def resident() -> int:
    """The largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(work: Path, *, seed: int, seconds: float, most: int, only: str | None = None, processes: int = 0) -> Outcome:
    """Run cases until the time is up or there were `most`; then `processes` more as processes."""
    os.environ["DPO_JAX_CACHE"] = str(work / "cache")
    found = kinds(work)
    if only is None or only not in found:
        found |= kinds_of_a_run(work)
    found = {name: kind for name, kind in found.items() if only in (None, name)}
    order = [name for name, kind in found.items() for _ in range(kind.weight)]
    rng, outcome = random.Random(seed), Outcome()
    random.Random(seed).shuffle(order)
    for name in found:  # unmutated, each ends well; what is compiled once is compiled here
        kind = found[name]
        case = work / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(kind.base, case)
        fault, code, said = in_process(kind.arguments(case), kind.limit)
        assert code == 0, (name, fault, said)
    start, before = time.monotonic(), resident()
    while outcome.cases < most and time.monotonic() - start < seconds:
        name = order[outcome.cases % len(order)]
        case_seed = rng.getrandbits(48)
        arguments, content = prepared(found[name], work, random.Random(case_seed))
        began = time.monotonic()
        fault, code, said = in_process(arguments, found[name].limit)
        took = time.monotonic() - began
        outcome.cases += 1
        outcome.refused += code == 2
        outcome.each[name] = outcome.each.get(name, 0) + 1
        outcome.slowest = max(outcome.slowest, (took, f"{name} {case_seed}"))
        outcome.note(work, name, content, fault, said)
    outcome.seconds, outcome.grown = time.monotonic() - start, resident() - before
    names = [order[i % len(order)] for i in range(processes)]
    places = [work / f"process-{i}" for i in range(processes)]
    cases = [
        prepared(found[n], at, random.Random(seed + i)) for i, (n, at) in enumerate(zip(names, places, strict=True))
    ]
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(as_process, (arguments for arguments, _ in cases))
        for name, (_, content), (fault, _, said) in zip(names, cases, ends, strict=True):
            outcome.processes += 1
            outcome.note(work, name, content, fault, said)
    return outcome


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--most", type=int, default=10**9, help="cases at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of file")
    parser.add_argument("--processes", type=int, default=0, help="so many cases more, as processes")
    parser.add_argument("--json", action="store_true", help="the figures as one line of JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    result = fuzz(
        folder,
        seed=options.seed,
        seconds=60 * options.minutes,
        most=options.most,
        only=options.only,
        processes=options.processes,
    )
    for text in result.faults:
        print(text, end="\n\n")
    print(json.dumps(dataclasses.asdict(result)) if options.json else result)
    if not result.faults:
        shutil.rmtree(folder)
    sys.exit(bool(result.faults) or result.grown > MEMORY)
