"""One saving after another: seconds a step and memory of DPO on real pairs, SmolLM2-135M, all else as it was before.

    python benchmarks/ladder.py --data hh.jsonl.gz --pairs 4 --rows 12
    python benchmarks/ladder.py --data hh.jsonl.gz --only windows cached

Each rung is a process of its own (that of `benchmarks/pair_steps.py`, with the options that RUNGS names), one at a
time, so that its peak memory is its own and nothing else runs; --rounds goes up the ladder again. The pairs are the
same on all rungs (with shapes of batches, pairs of like length share one); every shape is compiled, and the first batch
learnt once, before a pass over all batches is timed. One line of JSON, with each step's loss, behind the table.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pair_steps
from peers import Worker, use_cores

SCRIPT = pair_steps.__file__


class Rung(NamedTuple):
    """What is switched on: how the table says it; the options; whether the reference is cached."""

    says: str
    options: str
    reference: str = "live"


LORA = pair_steps.LORA
RUNGS = {
    "padded": Rung("each response with its prompt, padded to the longest", "--train.layout separate --data.buckets 1"),
    "buckets": Rung("+ four shapes of batches (`--data.buckets`)", "--train.layout separate"),
    "shared": Rung("+ a prompt computed once (`--train.layout shared`)", "--train.layout shared"),
    "windows": Rung("+ packed, real tokens only (`windows`, the default)", ""),
    "cached": Rung("+ cached reference (`--dpo.reference cached`)", "", "cached"),
    "lora": Rung("+ LoRA of rank 16", LORA, "cached"),
    "full": Rung("+ `--train.remat full`", f"{LORA} --train.remat full", "cached"),
    "bfloat16": Rung("+ `--train.dtype bfloat16`", f"{LORA} --train.remat full --train.dtype bfloat16", "cached"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference rows")
    parser.add_argument("--rows", type=int, default=12, help="of these, the first usable ones: the pass that is timed")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNGS), default=list(RUNGS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--model", default="smollm2", help="whatever dpo-jax loads")
    options = parser.parse_args()
    use_cores(options.cores)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        pair_steps.write_rows(argparse.Namespace(**vars(options), trainer="dpo"), Path(folder))
        for _ in range(options.rounds):
            for name in options.only:
                found[name].append(climbed(RUNGS[name], options, folder))
                print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
    print(table(found, options.pairs))
    print(json.dumps({"pairs": options.pairs, "rows": options.rows, **found}))


def climbed(rung: Rung, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """A rung's seconds a step, peak GiB, places for each real token, and the losses of its steps."""
    words = ["--data", options.data, "--rows", str(options.rows), "--pairs", str(options.pairs), "--cores"]
    words += [str(options.cores), "--model", options.model, "--reference", rung.reference, f"--options={rung.options}"]
    batches = options.rows // options.pairs
    with Worker("ours", sys.executable, SCRIPT, [*words, "--folder", folder]) as worker:
        turns = [worker.turn(0), *(worker.turn(i) for i in range(batches))][1:]
    return {
        "seconds": sum(turn["seconds"] for turn in turns) / batches,
        "peak": turns[-1]["peak"],
        "places": sum(turn["places"] for turn in turns) / sum(turn["real"] for turn in turns),
        "shapes": worker.ready["shapes"],
        "losses": [turn["loss"] for turn in turns],
    }


def table(found: dict[str, list[dict[str, Any]]], pairs: int) -> str:
    first, *_ = found.values()
    slowest = median(one["seconds"] for one in first)
    lines = [f"| {pairs} pairs a step | s a step | times as fast | GiB | places a real token | shapes |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for name, rounds in found.items():
        seconds, one = median(each["seconds"] for each in rounds), rounds[-1]
        peak = max(each["peak"] for each in rounds)
        lines.append(
            f"| {RUNGS[name].says} | {seconds:.2f} | {slowest / seconds:.2f} | {peak:.1f} | {one['places']:.2f} |"
            f" {one['shapes']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
