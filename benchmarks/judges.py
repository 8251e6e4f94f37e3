"""Four judges against people's and GPT-4's labels:

    python benchmarks/judges.py --data ../shared/data --out runs/judges

Judges: the longer response; a list of friendly and unfriendly words; a reward model from SmolLM2-135M, trained here on
the pairs of PandaLM and Vicuna whose prompts are not judged (LoRA of rank 16, bfloat16); and SmolLM2-135M-Instruct as
it is, read from the probabilities of the scores 1 to 5 (`dpo-jax judge --ask expected`).

Sets: `--rows` rows of each, whole prompts drawn by `--seed` among rows of at most `--longest` characters: PandaLM
(three people), Vicuna's reviews (GPT-4), the Chinese OASST1 (ranks), and XSTest (people: on safe prompts compliance
above a partial refusal above a full one, on unsafe ones the other way round; four models' responses a row). Every judge
sees the same rows. Each step is a file or a run folder under `--out`: the same command goes on where it stopped.
`table.md` holds the figures, with 95 % bootstrap intervals over rows.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import reward_models as sources

from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    JudgeRun,
    LoraConfig,
    OptimizerConfig,
    RewardRun,
    TrainConfig,
)
from dpo_jax.config.sections import FilesConfig

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
FIGURES = ("accuracy", "accuracy_ties_half", "kappa", "ac1", "tie_rate")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pandalm, vicuna_reviews, ...")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=200, help="of each set, about: whole prompts are drawn")
    parser.add_argument("--longest", type=int, default=1200, help="characters of a prompt with a response, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100, help="of the reward model, of 8 pairs each")
    parser.add_argument("--max_length", type=int, default=256, help="of what the reward model learns from, in tokens")
    return parser.parse_args()


def xstest(data: Path) -> list[Row]:
    """A row a prompt, its four responses scored by what people call them."""
    found: dict[tuple[str, bool], Row] = {}
    for one in sources.xstest(data):
        row = found.setdefault((one["prompt"], one["unsafe"]), {"prompt": one["prompt"], "responses": [], "scores": []})
        obeys = {"1": 2, "3": 1, "2": 0}[one["label"]]
        row["responses"].append(one["text"])
        row["scores"].append(2 - obeys if one["unsafe"] else obeys)
    return list(found.values())


def short(row: Row, longest: int) -> bool:
    """Whether no response of the row is longer, with its prompt, than `longest` characters."""
    asked = "".join(str(row.get(name) or "") for name in ("instruction", "input", "prompt", "history"))
    texts = [row[name] for name in ("response1", "response2", "response_a", "response_b") if name in row]
    texts += row.get("responses", []) + row.get("output", [])
    return len(asked) + max(len(str(text)) for text in texts) <= longest


def drawn(rows: list[Row], key: str, count: int, seed: int) -> list[Row]:
    """All rows of prompts that are drawn until there are `count`."""
    prompts = sorted({row[key] for row in rows})
    random.Random(seed).shuffle(prompts)
    of = {prompt: [row for row in rows if row[key] == prompt] for prompt in prompts}
    some: list[Row] = []
    for prompt in prompts:
        some += of[prompt] if len(some) < count else []
    return some


def main() -> None:
    """Train, judge and tabulate."""
    from dpo_jax.commands.judge import judge
    from dpo_jax.commands.reward import train

    options = arguments()
    files = {name: options.data / name / "pairs.jsonl" for name in ("pandalm", "vicuna_reviews")}
    whole = {name: list(sources.lines(path)) for name, path in files.items()}
    whole["oasst_zh"] = list(sources.lines(options.data / "oasst_zh" / "ranked.jsonl"))
    whole["xstest"] = xstest(options.data)
    keys = {"pandalm": "instruction", "vicuna_reviews": "prompt", "oasst_zh": "instruction", "xstest": "prompt"}
    whole = {name: [row for row in rows if short(row, options.longest)] for name, rows in whole.items()}
    judged = {name: drawn(rows, keys[name], options.rows, options.seed) for name, rows in whole.items()}
    places = {name: sources.write(options.out / "data" / f"{name}.jsonl", rows) for name, rows in judged.items()}

    seen = {row["instruction"] for row in judged["pandalm"]} | {row["prompt"] for row in judged["vicuna_reviews"]}
    pairs = [*sources.pandalm(options.data), *sources.vicuna(options.data)]
    pairs = [row for row in pairs if row["prompt"] not in seen and row["prompt"].split("\n")[0] not in seen]
    learnt = sources.write(options.out / "data" / "train.jsonl", pairs)
    model = options.out / "reward_model"
    judges: dict[str, Row] = {
        "longer": {"function": "length"},
        "friendly words": {"function": f"{HERE / 'sentiment_lexicon.py'}:score"},
        "SmolLM2, probabilities": {"model": options.model, "ask": "expected", "dtype": "bfloat16"},
        "reward model": {"function": str(model), "dtype": "bfloat16"},
    }
    lines = ["| judge | data | pairs | accuracy (ties wrong) | ties half | kappa | AC1 | tie rate |", "|---" * 8 + "|"]
    for name, how in judges.items():
        if name == "reward model":
            train(
                RewardRun(
                    model=options.model,
                    out=str(model),
                    lora=LoraConfig(rank=16),
                    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_ratio=0.05, floor=0.1),
                    data=DataConfig(
                        str(learnt), max_length=options.max_length, max_prompt_length=options.max_length // 2
                    ),
                    train=TrainConfig(batch_size=8, steps=options.steps, seed=options.seed, dtype="bfloat16"),
                    checkpoint=CheckpointConfig(every=10, keep=1),
                )
            )
        for data, place in places.items():
            out = options.out / f"{data}-{name.replace(' ', '_').replace(',', '')}.jsonl"
            language = {"language": "zh"} if data == "oasst_zh" and "model" in how else {}
            told: Row = {"on_bad_rows": "skip", **how, **language}
            judge(JudgeRun(data=FilesConfig(str(place)), out=str(out), agreement=True, **told))
            found = json.loads(out.with_name(f"{out.name}.agreement.json").read_text())
            cells = ["{:.3f} ({:.3f} to {:.3f})".format(*found[one]) if one in found else "" for one in FIGURES]
            lines.append(f"| {name} | {data} | {found['pairs']:,} | {' | '.join(cells)} |")
            (options.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
