"""`dpo-jax demo`: controlled sentiment (Rafailov et al. 2023, section 6.1) on a real Llama, in minutes on a CPU.

    1  samples.jsonl   the model goes on with openings of reviews, several times each
    2  pairs.jsonl     VADER's lexicon judges the samples; of each opening the best and the worst make a pair
    3  before.jsonl    openings that no pair came from, continued by the model as it is
    4  dpo/            DPO on the pairs: a run like any other of `dpo-jax dpo`
    5  after.jsonl     the same unseen openings with the same random numbers, continued by the aligned model
    6  report.html, summary.json

A stage whose file is there is not done again; samples and texts go on in the middle of a file. The judge sees only
what the model wrote, not the opening.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_jax.commands import dpo
from dpo_jax.commands.config_keys import with_config_keys
from dpo_jax.complete.openings import review_openings
from dpo_jax.complete.responses import terminators
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
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically
from dpo_jax.files.jsonl import write_lines
from dpo_jax.files.log import say
from dpo_jax.judge.continuations import Writer, make_pairs
from dpo_jax.judge.reward_functions import Judge, OfText
from dpo_jax.report import demo as demo_report
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import load_tokenizer

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


def _claim(run: DemoRun, out: Path) -> None:
    """Make the folder this demo's, or refuse one that holds something else."""
    marker, settings = out / "demo.json", json.loads(json.dumps(asdict(run)))  # as the file has them: no tuples
    settings.pop("out")
    if marker.exists():
        try:
            before = json.loads(marker.read_text())
        except ValueError as error:
            raise InputError(f"{marker}: not readable; choose another --out") from error
        for name, value in settings.items():
            if before.get(name) != value:
                raise InputError(
                    f"{out}: the demo in it has --{name} {before.get(name)} and this command has {value}; "
                    "give the same value to go on with it, or choose another --out"
                )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and holds no demo; choose another --out")
    else:
        write_atomically(marker, json.dumps(settings, indent=2) + "\n")


@with_config_keys
def demo(run: DemoRun) -> Path:
    """The `demo` command; returns its folder. See the module for the stages."""
    return _demo(run, FAST if run.fast else FULL)


def _demo(run: DemoRun, size: Size) -> Path:
    out = Path(run.out)
    _claim(run, out)
    if (out / "summary.json").exists():
        say(f"{out}: this demo is finished; to run it again choose another --out")
        demo_report.show(json.loads((out / "summary.json").read_text()), out)
        return out
    openings = review_openings(run.seed)
    seen, unseen = openings[: size.prompts], openings[size.prompts : size.prompts + size.unseen]
    clock = _Clock()

    clock.stage(f"{run.model}: loading the model")
    tokenizer = load_tokenizer(run.model)
    model, variables = load_pretrained(run.model)
    encoder = ConversationEncoder(tokenizer, RAW)
    config = terminators(model, encoder, SampleConfig(size.new_tokens, temperature=TEMPERATURE))
    judge = OfText("vader", Judge())
    writer = Writer(model, tokenizer, encoder, config, size.batch_size, judge, "vader", column=SCORE)

    clock.stage(f"[1/5] {size.prompts} openings of reviews, continued {size.samples} times each")
    rows = writer.write(out / "samples.jsonl", "samples", variables, seen, size.samples, seed=run.seed)

    pairs = make_pairs(rows, SCORE)
    clock.stage(f"[2/5] best against worst by VADER: {len(pairs)} pairs ({len(seen) - len(pairs)} ties left out)")
    if not pairs:
        raise InputError(
            f"{run.model}: all its samples are equally positive, so there are no pairs; try another --seed"
        )
    write_lines(out / "pairs.jsonl", pairs)

    clock.stage(f"[3/5] {size.unseen} unseen openings before training")
    later: dict[str, Any] = {
        "openings": unseen,
        "samples": size.unseen_samples,
        "seed": (run.seed + 1) % 2**32,
        "reference": variables,
    }
    before = writer.write(out / "before.jsonl", "before", variables, **later)

    clock.stage("[4/5] DPO on the pairs")
    training = training_run(run, size)
    folder = dpo.train(training)

    clock.stage(f"[5/5] {size.unseen} unseen openings after training")
    _, aligned = load_pretrained(folder / "model")
    after = writer.write(out / "after.jsonl", "after", aligned, **later)

    seconds = clock.stop()
    summary = {"model": run.model, "seed": run.seed, "pairs": len(pairs), "prompts": size.prompts}
    summary |= demo_report.figures(before, after, seed=run.seed)
    demo_report.write(out, summary, before, after, pairs)
    write_atomically(out / "summary.json", json.dumps(summary | {"seconds": seconds}, indent=2) + "\n")
    demo_report.show(summary, out)
    say(f"{sum(seconds.values()):.0f} seconds in all")
    return out


class _Clock:
    """Announces stages and measures them."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._name, self._start = "", time.monotonic()

    def stage(self, name: str) -> None:
        """The stage before is over; this one begins."""
        self.stop()
        self._name = name
        say(name)

    def stop(self) -> dict[str, float]:
        """Seconds of all stages so far."""
        now = time.monotonic()
        if self._name:
            self._seconds[self._name] = round(now - self._start, 1)
        self._start = now
        return self._seconds
