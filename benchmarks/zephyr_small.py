"""`dpo-jax recipe zephyr` with SmolLM2-135M, all of it on this machine: four writers, a listwise judge, a second judge.

    python benchmarks/zephyr_small.py --data ../shared/data --out runs/zephyr_small

Writers: SmolLM2-135M-Instruct; the recipe's own dSFT model; a DPO model, trained here on `dpo_en`; and the responses of
`scored4_en`, four larger models', as a file. Prompts: Vicuna's questions, which those responses answer. Seed prompts of
the dialogues: PandaLM's shortest instructions; the teacher is SmolLM2 itself.

Judge: a language model of this machine that is asked for all responses of a prompt at once. SmolLM2 seldom keeps to the
form that is asked for, so it is taught here, by SFT on the judge's own prompts: PandaLM's responses to one instruction,
rated 5, 4, 2 and 1 in the order of how many of its comparisons people let each win, and its pairs in both orders. A
scoring function, the length of the response, rates the same responses beside it, and their agreement is printed.

An answer that runs into its limit stands in no pair; so the writers of this machine are asked to be brief, by the only
principle (`--aif.principles`), which no pair holds.

Every stage is a run folder under `--out`: the same command goes on where it stopped. What it makes of it stands in
OUT/zephyr/report.html.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import reward_models as sources

from dpo_jax import config as c

Row = dict[str, Any]
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "smollm2_zephyr.py"
LISTED = 4
"""Responses that the judge learns to rate at once: as many as answer a prompt of the recipe."""
PRINCIPLES = {"brevity": ["Answer in two or three short sentences.", "Be brief: one short paragraph is enough."]}
RATINGS = (1, 2, 4, 5)
"""Of a response that as many others of its list are behind; a judge that learns the shares of wins says 1 to most."""
LONGEST = 2400
"""Characters of a question of the judge that it learns from, at most."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pandalm, dpo_en, scored4_en")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompts", type=int, default=60, help="that the writers answer")
    parser.add_argument("--seeds", type=int, default=32, help="seed prompts of the dialogues")
    parser.add_argument("--judge_steps", type=int, default=40, help="of the judge, of 8 questions each")
    parser.add_argument("--dpo_steps", type=int, default=8, help="of the writer that DPO made, of 8 pairs each")
    parser.add_argument("--more", default="", help="options of the recipe, such as '--aif.rule best_worst'")
    return parser.parse_args()


# ---------------------------------------------------------------- what the judge learns


class Listener:
    """Keeps what a judge is asked, and does not answer."""

    def __init__(self) -> None:
        self.heard: list[tuple[Row, ...]] = []

    def ask(self, questions: Sequence[Any], done: Callable[[int], None] = lambda _: None) -> list[Any]:
        from dpo_jax.complete.asking.reply_cache import Reply

        self.heard += [tuple(dict(message) for message in question.messages) for question in questions]
        return [Reply("", "stop") for _ in questions]


def lessons(data: Path) -> list[Row]:
    """Dialogues of a judge that says what people say: as many of lists as of pairs."""
    from dpo_jax.data.rows.messages import Message
    from dpo_jax.judge.asked.feedback import feedback_prompts
    from dpo_jax.judge.asked.judge_prompts import our_prompt
    from dpo_jax.judge.asked.judging import Item, judge

    (listed,) = feedback_prompts(("instruction_following",), critique=False, language="en", templates=None).values()
    lists = list(rated_lists(data))
    pairs = [(row["prompt"], (row["chosen"], row["rejected"])) for row in sources.pandalm(data)]
    kinds: list[list[Row]] = []
    for prompt, rows in ((listed, [(asked, texts) for asked, texts, _ in lists]), (our_prompt("pair", "en"), pairs)):
        listener = Listener()
        items = [Item(n, (Message("user", asked),), texts) for n, (asked, texts) in enumerate(rows)]
        said = judge(items, prompt, listener)
        heard, found = iter(listener.heard), list[Row]()
        for n, one in enumerate(said):
            # Unanswered questions are asked once more, behind all others.
            orders = [reply["order"] for reply in one.replies[::2]]
            for order in orders:
                if prompt is listed:
                    ratings = [lists[n][2][i] for i in order]
                    reply = "\n\n".join(f"Text {i}\nRating: {rating}" for i, rating in enumerate(ratings, 1))
                else:
                    reply = f"[[{'A' if order[0] == 0 else 'B'}]]"
                messages = [*next(heard), {"role": "assistant", "content": reply}]
                if sum(len(message["content"]) for message in messages) <= LONGEST:
                    found.append({"messages": messages})
        random.Random(0).shuffle(found)
        kinds.append(found)
    return [row for both in zip(*kinds, strict=False) for row in both]


def rated_by_people(data: Path) -> dict[str, dict[str, tuple[str, float]]]:
    """instruction -> model -> its response in PandaLM, and the share of its comparisons that people let it win."""
    wins: dict[str, dict[str, list[float]]] = {}
    texts: dict[tuple[str, str], str] = {}
    for row in sources.lines(data / "pandalm" / "pairs.jsonl"):
        asked = "\n".join(filter(None, (row["instruction"], row["input"])))
        votes = [row[f"annotator{i}"] for i in (1, 2, 3)]
        for i, name in enumerate(row["cmp_key"].split("_"), 1):
            text = row[f"response{i}"]
            if isinstance(text, str) and text.strip():
                texts[asked, name] = text
                share = sum(1.0 if vote == i else 0.5 if vote == 0 else 0.0 for vote in votes) / len(votes)
                wins.setdefault(asked, {}).setdefault(name, []).append(share)
    return {
        asked: {name: (texts[asked, name], sum(found[name]) / len(found[name])) for name in sorted(found)}
        for asked, found in wins.items()
    }


def rated_lists(data: Path) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(instruction, responses, ratings) of PandaLM, each list in some orders of its models."""
    for asked, found in rated_by_people(data).items():
        for turn in range(6 if len(found) >= LISTED else 0):
            some = [found[name] for name in random.Random(f"{asked} {turn}").sample(list(found), LISTED)]
            ratings = tuple(RATINGS[sum(other < share for _, other in some)] for _, share in some)
            yield asked, tuple(text for text, _ in some), ratings


# ---------------------------------------------------------------- the run


def write_files(options: argparse.Namespace, out: Path) -> None:
    """Prompts, seed prompts, the pool and the judge."""
    scored = options.data.resolve() / "scored4_en" / "vicuna_eval.jsonl"
    prompts = [{"prompt": row["prompt"]} for row in sources.lines(scored)]
    sources.write(out / "prompts.jsonl", prompts[: options.prompts])
    asked = sorted({row["prompt"] for row in sources.pandalm(options.data)}, key=lambda text: (len(text), text))
    sources.write(out / "seeds.jsonl", [{"prompt": text} for text in asked[: options.seeds]])
    sources.write(out / "lessons.jsonl", lessons(options.data))
    sample = "batch_size: 16, sample: {max_new_tokens: 384, temperature: 0.5}"
    pool = [f"- {{name: {name}, model: '{model}', {sample}}}" for name, model in {
        "SmolLM2": options.model, "our SFT": out / "zephyr" / "sft", "our DPO": out / "dpo"}.items()]  # fmt: skip
    (out / "pool.yaml").write_text("\n".join([*pool, f"- {{name: scored4_en, responses: '{scored}'}}"]) + "\n")
    (out / "principles.json").write_text(json.dumps(PRINCIPLES) + "\n")
    (out / "judge.yaml").write_text(
        f"ask: list\nmodel: '{out / 'judge'}'\nbatch_size: 4\nsample: {{max_new_tokens: 64, temperature: 0.0}}\n"
    )


def train(options: argparse.Namespace, out: Path) -> None:
    """The judge, and the writer that DPO made."""
    from dpo_jax.commands import dpo, sft

    told: Row = {"model": options.model, "lora": c.LoraConfig(rank=16)}
    told["checkpoint"] = c.CheckpointConfig(every=10, keep=1)
    rate: Row = {"learning_rate": 2e-4, "warmup_ratio": 0.1}
    sft.train(
        c.SFTRun(
            **told,
            out=str(out / "judge"),
            optimizer=c.OptimizerConfig(**rate | {"learning_rate": 5e-4}, schedule="cosine"),
            data=c.SFTDataConfig(str(out / "lessons.jsonl"), max_length=1024),
            train=c.TrainConfig(batch_size=8, steps=options.judge_steps),
        )
    )
    dpo.train(
        c.DPORun(
            **told,
            out=str(out / "dpo"),
            optimizer=c.OptimizerConfig(**rate, schedule="linear"),
            data=c.DataConfig(str(options.data / "dpo_en" / "pairs.jsonl"), max_length=256, buckets=1, limit=64),
            train=c.TrainConfig(batch_size=8, steps=options.dpo_steps),
        )
    )


def main() -> None:
    """Write the files, train what is needed, and run the recipe."""
    from dpo_jax import cli

    options = arguments()
    out = options.out.resolve()
    if not (out / "judge.yaml").exists():
        write_files(options, out)
    train(options, out)
    files = {"seeds": "seeds.jsonl", "prompts": "prompts.jsonl", "pool": "pool.yaml"}
    words = ["recipe", "zephyr", str(CONFIG), "--model", options.model, "--out", str(out / "zephyr")]
    words += ["--dsft.model", options.model, "--aif.beside", "length"]
    words += ["--aif.principles", str(out / "principles.json"), "--judge", f"judge:{out / 'judge.yaml'}"]
    for name, file in files.items():
        words += [f"--{name}", str(out / file)]
    code = cli.main([*words, *options.more.split()])
    agreement = json.loads((out / "zephyr" / "aif" / "report.json").read_text())["agreement"] if not code else {}
    print("\n".join(f"{name}: {value}" for name, value in agreement.items()))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
