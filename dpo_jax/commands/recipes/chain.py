"""What recipes share: their stages done in one folder, and a training command or `dpo-jax generate` as one of them."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_jax.commands.generate import generate
from dpo_jax.config import GenerateRun, SampleConfig, TrainingRun
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.files.folder import RunFolder, as_json
from dpo_jax.files.jsonl import read_lines
from dpo_jax.files.log import show_log
from dpo_jax.files.stages import Figures, Stage, Stages, last_figures


def perform(
    name: str,
    run: Any,
    stages_of: Callable[[Any, Path], list[Stage]],
    show: Callable[[Any, Path], None],
    *,
    found: str = "summary.json",
    resolved: Any = None,
) -> Path:
    """Do the stages that are not done, and show what came out; returns the recipe's folder. Raises `InputError`.

    Args:
      name: second word of the command.
      run, resolved: its options, and those with everything filled in where that is more.
      stages_of: the stages by options and folder; it checks all that can be checked before the first of them.
      show: is given what the file `found` of the last stage holds, and the folder.
    """
    show_log()
    stages = Stages(RunFolder(Path(run.out).absolute(), f"recipe {name}", as_json(run)))
    stages.perform(stages_of(run, stages.out), run if resolved is None else resolved)
    stages.finish()
    show(json.loads((stages.out / found).read_text()), stages.out)
    return stages.out


def trained(
    train: Callable[[Any], Path],
    options: TrainingRun,
    data: str | Path,
    out: Path,
    figures: Mapping[str, str],
    **changes: Any,
) -> Figures:
    """A training command as a stage: on `data`, into the run folder `out`; gives its last figures.

    options, changes: of the command `train`, and what differs in them.
    """
    files = dataclasses.replace(options.data, files=str(data))
    train(dataclasses.replace(options, data=files, out=str(out), **changes))
    return last_figures(out, figures)


def answer(
    path: Path,
    model: str | Path,
    prompts: str | Path,
    like: TrainingRun,
    *,
    sample: SampleConfig,
    batch_size: int,
    seed: int,
    samples: int = 1,
) -> Figures:
    """Write `samples` answers of `model` to every prompt to `path`, or go on with it.

    Prompts are put as those of the training `like`, whose dtype and mesh hold here too.
    """
    if not path.exists():
        raw = like.data.template == RAW
        generate(
            GenerateRun(
                model=str(model),
                prompts=str(prompts),
                out=str(path),
                raw=raw,
                template=None if raw else like.data.template,
                date=None if raw else like.data.date,
                batch_size=batch_size,
                samples=samples,
                seed=seed,
                dtype=like.train.dtype,
                sample=sample,
                mesh=like.mesh,
            )
        )
    rows = read_lines(path)
    return {"answers": len(rows), "tokens": float(np.mean([row["tokens"] for row in rows]))}
