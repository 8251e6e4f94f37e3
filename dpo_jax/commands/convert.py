"""`dpo-jax convert`: a checkpoint in another format. The work is in `weights/convert.py`."""

from typing import Any

from dpo_jax.config import ConvertRun
from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer
from dpo_jax.data.tokens.templates import with_template
from dpo_jax.errors import InputError
from dpo_jax.files.log import say, show_log
from dpo_jax.headers import read_json
from dpo_jax.report import card
from dpo_jax.weights import convert as formats
from dpo_jax.weights.opened import RunCheckpoint, StoredModel, open_checkpoint


def convert(run: ConvertRun) -> None:
    """Write `run.from_` to the folder `run.to`. Raises `InputError`."""
    show_log()
    place = open_checkpoint(run.from_)
    told = {**spoken(place), "beside": card.of_conversion(place, run)}
    lost = formats.convert(place, run.to, to=run.format, dtype=run.dtype, **told)
    if lost is not None:
        say(f"{run.to}: rounding to {run.dtype} lost {lost:.0%} of what the adapters learnt")
    say(f"{run.to}: {run.format} checkpoint of {run.from_}")


def spoken(place: StoredModel) -> dict[str, Any]:
    """Tokenizer and terminators of a run's checkpoint, as the finished run's `model/` would have them.

    The base has neither where the run brought the template (`--data.template`), and the model would speak on elsewhere.
    """
    if not isinstance(place, RunCheckpoint):
        return {}
    path = place.folder / "config.json"
    options = read_json(path)
    data = options.get("data")
    if not isinstance(data, dict):
        raise InputError(f"{path}: does not say how the run read its data (data)")
    tokenizer, template = place.tokenizer(), data.get("template")
    told = with_template(tokenizer, template, empty_system=bool(data.get("empty_system")))
    if isinstance(options.get("reward"), dict) or data.get("kind") == "text":  # neither a score nor a text ends answers
        return {"tokenizer": told}
    terminators = ChatTokenizer(tokenizer, template, data.get("date")).terminators
    return {"tokenizer": told, "terminators": terminators}
