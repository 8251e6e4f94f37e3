"""The day that chat templates write as today's, the same for the whole of a run, whenever it is gone on with."""

import datetime
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.tokens.templates import RAW, check_date, today, writes_date
from dpo_jax.files.folder import RunFolder
from dpo_jax.processes import distributed

Run = TypeVar("Run")


def with_day(run: Run, folder: RunFolder, tokenizer: PreTrainedTokenizerBase) -> Run:
    """The options with `--data.date` filled in: as given, as the unfinished run in `folder` began with, or today.

    There is none where no template writes it: with raw texts, documents, or another template of the model's. (Reward
    models have templates of their own, so runs with a reward always have a day.) Every process calls this. Raises
    `InputError` for a day without effect, and a config.json that cannot be read.
    """
    options: Any = run
    data, judged = options.data, hasattr(options, "safety_reward")
    if not judged:
        check_date(tokenizer, data.template, data.date)
    if data.date is not None or data.template == RAW or getattr(data, "kind", None) == "text":
        return run
    if not judged and not writes_date(tokenizer, data.template):
        return run
    began = folder.resolved().get("data.date") if folder.open() == "unfinished" else None
    day = datetime.date.fromisoformat(began or today())
    ordinal = int(distributed.from_main(np.asarray(day.toordinal())))  # midnight may lie between two processes
    date = datetime.date.fromordinal(ordinal).isoformat()
    return options.filled(data={"date": date})
