"""`dpo-jax demo`: controlled sentiment (Rafailov et al. 2023, section 6.1) on a real Llama, in minutes on a CPU.

    1  samples.jsonl   the model goes on with openings of reviews, several times each
    2  pairs.jsonl     VADER's lexicon judges the samples; of each opening the best and the worst make a pair
    3  before.jsonl    openings that no pair came from, continued by the model as it is
    4  dpo/            DPO on the pairs: a run like any other of `dpo-jax dpo`
    5  after.jsonl     the same unseen openings with the same random numbers, continued by the aligned model
    6  report.html, summary.json

A stage that is done is not done again (`files/stages.py`); samples and texts go on in the middle of a file. The judge
sees only what the model wrote, not the opening.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_jax.commands import dpo
from dpo_jax.complete.writing.openings import review_openings
from dpo_jax.complete.writing.writer import raw_writer
from dpo_jax.config import (
    CheckpointConfig,
    DataConfig,
    DemoRun,
    DPOLossConfig,
    DPORun,
    LoraConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.files.folder import RunFolder, as_json, write_json
from dpo_jax.files.jsonl import Row, read_lines, write_lines
from dpo_jax.files.log import say
from dpo_jax.files.stages import Figures, Stage, Stages, last_figures
from dpo_jax.judge.rewards.continuations import make_pairs, write_judged
from dpo_jax.judge.rewards.shipped import OfText, Vader
from dpo_jax.model.llama import Llama
from dpo_jax.report import demo as demo_report
from dpo_jax.report.statistics import per_prompt
from dpo_jax.weights.pretrained import load_pretrained

TEMPERATURE = 0.8
"""Of all samples. At 1 the texts of so small a model lose their thread. KL is measured at the same temperature."""

SCORE = "sentiment"
"""What the rows call a text's score."""


@dataclass(frozen=True)
class Size:
    """How much of everything. The openings of training and the unseen ones do not overlap."""

    prompts: int
    samples: int
    unseen: int
    unseen_samples: int
    new_tokens: int
    epochs: float
    batch_size: int = 48


FULL = Size(prompts=96, samples=5, unseen=48, unseen_samples=3, new_tokens=36, epochs=2)
FAST = Size(prompts=32, samples=4, unseen=24, unseen_samples=2, new_tokens=15, epochs=2, batch_size=32)


def training_run(run: DemoRun, size: Size) -> DPORun:
    """The DPO run of the demo: what `dpo-jax dpo` would be told.

    LoRA, because on a CPU it saves a third of each step. The end token of a response counts for nothing
    (`mask_format_tokens`): nearly all samples were cut at `new_tokens`, so it would teach where to stop for no reason.
    """
    out = Path(run.out)
    return DPORun(
        model=run.model,
        out=str(out / "dpo"),
        dpo=DPOLossConfig(beta=0.1, mask_format_tokens=True),
        lora=LoraConfig(rank=16),
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="linear", warmup_steps=2),
        data=DataConfig(str(out / "pairs.jsonl"), template=RAW, max_length=256, max_prompt_length=128, buckets=1),
        train=TrainConfig(epochs=size.epochs, batch_size=8, seed=run.seed),
        checkpoint=CheckpointConfig(every=1000, keep=1),
    )


def demo(run: DemoRun, size: Size | None = None) -> Path:
    """The `demo` command; returns its folder. See the module for the stages. `size`: another than --fast says."""
    size = size or (FAST if run.fast else FULL)
    out = Path(run.out)
    stages = Stages(RunFolder(out, "demo", as_json(run)))
    if stages.status == "finished":
        say(f"{out}: this demo is finished; to run it again choose another --out")
    else:
        stages.perform(_Demo(run, size).stages(), run)
        seconds = {name: stage["seconds"] for name, stage in stages.record.items()}
        before, after, pairs = (read_lines(out / f"{name}.jsonl") for name in ("before", "after", "pairs"))
        summary = {"model": run.model, "seed": run.seed, "pairs": len(pairs), "prompts": size.prompts}
        summary |= demo_report.figures(before, after, seed=run.seed)
        demo_report.write(out, summary, before, after, pairs)
        write_json(out / "summary.json", summary | {"seconds": seconds})
        stages.finish()
        say(f"{sum(seconds.values()):.0f} seconds in all")
    demo_report.show(json.loads((out / "summary.json").read_text()), out)
    return out


class _Demo:
    """The stages, and what they share: the model is read once, when the first stage needs it."""

    def __init__(self, run: DemoRun, size: Size):
        self._run, self._size, self._out = run, size, Path(run.out)

    def stages(self) -> list[Stage]:
        """All of them, in order."""
        out, size, model = self._out, self._size, self._run.model
        samples, pairs = out / "samples.jsonl", out / "pairs.jsonl"
        before, after = (functools.partial(self._unseen, name) for name in ("before", "after"))
        name, unseen = f"{size.prompts} openings of reviews, continued", f"{size.unseen} unseen openings"
        return [
            Stage(f"{name} {size.samples} times each", (model,), samples, self._samples),
            Stage("best against worst by VADER", (samples,), pairs, self._pairs),
            Stage(f"{unseen} before training", (model,), out / "before.jsonl", before),
            Stage("DPO on the pairs", (model, pairs), out / "dpo", self._train),
            Stage(f"{unseen} after training", (model, out / "dpo"), out / "after.jsonl", after),
        ]

    @functools.cached_property
    def _loaded(self) -> tuple[Llama, Any]:
        say(f"{self._run.model}: loading the model")
        return load_pretrained(self._run.model)

    def _write(self, name: str, variables: Any, openings: Sequence[str], samples: int, **told: Any) -> list[Row]:
        """What the model writes with these variables."""
        size, policy = self._size, (self._loaded[0], variables)
        sample = SampleConfig(size.new_tokens, temperature=TEMPERATURE)
        writer = raw_writer(self._run.model, policy, sample, size.batch_size)
        told |= {"judge": OfText("vader", Vader()), "name": "vader", "column": SCORE}
        return write_judged(writer, self._out / f"{name}.jsonl", name, openings, samples, **told)

    def _samples(self) -> Figures:
        seen, seed = review_openings(self._run.seed)[: self._size.prompts], self._run.seed
        rows = self._write("samples", self._loaded[1], seen, self._size.samples, seed=seed)
        return {"samples": len(rows), "mean sentiment": float(per_prompt(rows, SCORE).mean())}

    def _pairs(self) -> Figures:
        pairs = make_pairs(read_lines(self._out / "samples.jsonl"), SCORE)
        if not pairs:
            raise InputError(
                f"{self._run.model}: all its samples are equally positive, so there are no pairs; try another --seed"
            )
        write_lines(self._out / "pairs.jsonl", pairs)
        return {"pairs": len(pairs), "ties left out": self._size.prompts - len(pairs)}

    def _train(self) -> Figures:
        dpo.train(training_run(self._run, self._size))
        return last_figures(self._out / "dpo", {"loss": "loss", "accuracy": "rewards/accuracies"})

    def _unseen(self, name: str) -> Figures:
        """What the model writes, or the aligned one."""
        run, size = self._run, self._size
        model = self._loaded
        variables = model[1] if name == "before" else load_pretrained(self._out / "dpo" / "model")[1]
        unseen = review_openings(run.seed)[size.prompts : size.prompts + size.unseen]
        told = {"seed": (run.seed + 1) % 2**32, "reference": model}
        rows = self._write(name, variables, unseen, size.unseen_samples, **told)
        return {"texts": len(rows), "mean sentiment": float(per_prompt(rows, SCORE).mean())}
