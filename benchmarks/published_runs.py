"""What the planner predicts beside what others have published: docs/performance.md's table.

    python benchmarks/published_runs.py --out OUT             compile what is not there yet, minutes each, and show all
    python benchmarks/published_runs.py --out OUT --only 8B   runs whose name holds this

The published runs are of other programs (MaxText, NeMo, open-instruct, Levanter); what is compiled here is our own step
of the same model, devices, batch and length: the difference is that of the programs and of the planner's assumptions
together. What a source does not say is assumed, and named. Compared are tokens a second and device; a source that tells
model FLOPs alone (counted as here: 6 a token and weight, attention causal) is turned into tokens by ours.

Predicted: "overlap", all that can be hidden is; "none", nothing is, which `dpo-jax plan` goes by (`plan/estimate.py`).

Runs on H100s need `pip install --no-deps jax-cuda12-plugin jax-cuda12-pjrt`, in the version of jaxlib.
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEAKS = {"v5p": 459e12, "v5e": 197e12, "v6e": 918e12, "h100": 989e12}
"""Dense bfloat16 FLOP/s, as the sources count."""
TEXT = "sft --data.kind text --train.dtype bfloat16"
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}


@dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
      name, devices, source: as the table tells them.
      words: of `dpo-jax plan`.
      tokens: a second and device; or mfu: the share of the peak. What was published.
      assumed: what the source does not say, or is done otherwise here.
    """

    name: str
    devices: str
    source: str
    words: str
    tokens: float | None = None
    mfu: float | None = None
    assumed: str = ""


def of_70b(tokens: int, rows: int, remat: str) -> str:
    return f"{TEXT} --model_shape llama2_70b --data.max_length {tokens} --train.batch_size {rows} --train.remat {remat}"


RUNS = (
    Run(
        "Llama 2 70B, pre-training",
        "v5p:4x4x4",
        "MaxText, v5p-128",
        of_70b(4096, 256, "full"),
        tokens=692,
        assumed="4 rows of 4,096 a chip, fsdp (its llama2_70b_v5p_128); it keeps products, here all is recomputed",
    ),
    Run(
        "Llama 2 70B, pre-training",
        "v5e:16x16",
        "MaxText, v5e-256",
        of_70b(2048, 512, "full"),
        mfu=0.57,
        assumed="2 rows of 2,048 a chip, fsdp (its llama2_70b_v5e_256); it keeps q, k, v on the host, here recomputed",
    ),
    Run(
        "Llama 2 70B, pre-training",
        "v6e:16x16",
        "MaxText, v6e-256",
        of_70b(4096, 512, "full"),
        tokens=900,
        assumed="2 rows of 4,096 a chip, fsdp (its llama2_70b_4096); q, k, v as above",
    ),
    Run(
        "Llama 3.1 8B, pre-training",
        "v6e:16x16",
        "MaxText, v6e-256",
        f"{TEXT} --model_shape llama3_8b --data.max_length 8192 --train.batch_size 1024 --train.remat full",
        tokens=7207,
        assumed="4 rows of 8,192 a chip, fsdp (its llama3_1_8b_8192); it keeps layer inputs and q, k, v on the host",
    ),
    Run(
        "Llama 2 70B, pre-training",
        "h100:8x8",
        "MaxText 25.01 (DGX Cloud), 64 x H100",
        of_70b(4096, 128, "full"),
        tokens=1036,
        assumed="2 rows of 4,096 a GPU, fsdp over all 64; recomputation not said",
    ),
    Run(
        "Llama 2 7B, pre-training",
        "h100:8",
        "JAX-Toolbox, 8 x H100",
        f"{TEXT} --model_shape llama2_7b --data.max_length 4096 --train.batch_size 32 --train.remat full",
        tokens=11400,
        assumed="4 rows of 4,096 a GPU, fsdp; recomputation not said",
    ),
    Run(
        "Qwen3 32B, SFT",
        "v5p:4x4x8",
        "Levanter, marin #4510, v5p-256",
        f"{TEXT} --model MODEL --data.max_length 32768 --train.batch_size 128 --train.remat full",
        tokens=128 * 32768 / 65 / 128,
        assumed="128 rows of 32,768 in its 65 s a step, all of them real, fsdp",
    ),
    Run(
        "OLMo 2 7B, DPO",
        "h100:2x8",
        "open-instruct #1466, 16 x H100",
        "dpo --dpo.reference cached --train.layout separate --train.dtype bfloat16 --model_shape llama2_7b"
        " --data.max_length 1024 --data.max_prompt_length 512 --train.batch_size 256 --train.remat full",
        tokens=5282,
        assumed="524,288 tokens a step as 256 pairs of 1,024 a response (it packs 16,384); the shape of Llama 2 7B",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the plans")
    parser.add_argument("--only", default="", help="runs whose name, devices or source hold this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "qwen3_32b").mkdir(exist_ok=True)
    (options.out / "qwen3_32b" / "config.json").write_text(json.dumps(QWEN3_32B))
    rows = [compared(run, options.out) for run in RUNS if options.only in f"{run.name} {run.devices} {run.source}"]
    if not rows:
        sys.exit(f"--only {options.only}: no run's name, devices or source hold this")
    text = table(rows)
    (options.out / "published.md").write_text(text + "\n")
    print(text)


def compared(run: Run, out: Path) -> dict[str, Any]:
    """The published figure and ours, tokens a second and device."""
    file = out / f"{run.name}-{run.devices}.json".lower().replace(" ", "_").replace(",", "").replace(":", "_")
    if not file.exists():
        words = run.words.replace("MODEL", str(out / "qwen3_32b")).split()
        command = [sys.executable, "-m", "dpo_jax", "plan", *words, "--topology", run.devices, "--out", str(file)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode not in (0, 3):  # 3: it does not fit
            sys.exit(f"failed: {' '.join(command)}")
    plan = json.loads(file.read_text())
    (program,) = plan["programs"]
    made = program["estimate"]
    each = program["tokens"] / plan["devices"]
    peak = PEAKS[run.devices.partition(":")[0]]
    published = run.tokens or (run.mfu or 0) * peak * program["tokens"] / program["flops"]
    return {
        "run": run,
        "published": published,
        "mfu": published * program["flops"] / program["tokens"] / peak,
        "overlap": each / made["seconds_if_all_overlaps"],
        "none": each / made["seconds_if_nothing_overlaps"],
        "bound": made["bound_by"],
        "peak": program["peak_bytes"] / 2**30,
        "fits": plan["fits"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | devices | published | its MFU | predicted, overlap | none | none / published | overlap / published |"
        " longest roof | GiB | assumed |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|--:|---|",
    ]
    for row in rows:
        run: Run = row["run"]
        lines.append(
            f"| {run.name} ({run.source}) | {run.devices} | {row['published']:,.0f} | {row['mfu']:.1%} |"
            f" {row['overlap']:,.0f} | {row['none']:,.0f} | {row['none'] / row['published']:.2f} |"
            f" {row['overlap'] / row['published']:.2f} | {row['bound']} |"
            f" {row['peak']:.1f}{'' if row['fits'] else ' (does not fit)'} | {run.assumed} |"
        )
    for bound in ("none", "overlap"):
        off = [abs(row[bound] / row["published"] - 1) for row in rows]
        lines.append(f"\nMedian error of `{bound}`: {statistics.median(off):.0%} over {len(rows)} runs.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
