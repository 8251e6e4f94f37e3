"""`dpo-jax convert`: a checkpoint in another format. The work is in `weights/convert.py`."""

from dpo_jax.config import ConvertRun
from dpo_jax.run.config_keys import with_config_keys
from dpo_jax.run.log import say, show_log
from dpo_jax.weights import convert as formats


@with_config_keys
def convert(run: ConvertRun) -> None:
    """Write `run.source` to the folder `run.target`. Raises `InputError`."""
    show_log()
    lost = formats.convert(run.source, run.target, to=run.format, dtype=run.dtype)
    if lost is not None:
        say(f"{run.target}: rounding to {run.dtype} lost {lost:.0%} of what the adapters learnt")
    say(f"{run.target}: {run.format} checkpoint of {run.source}")
