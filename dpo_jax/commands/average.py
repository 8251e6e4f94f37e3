"""`dpo-jax average`: several models into one. The work is in `weights/averaging.py`."""

from pathlib import Path

from dpo_jax.commands.convert import spoken
from dpo_jax.config import AverageRun
from dpo_jax.errors import InputError
from dpo_jax.files.log import say, show_log
from dpo_jax.weights.averaging import average as write_average, check_alike
from dpo_jax.weights.opened import open_checkpoint


def average(run: AverageRun) -> Path:
    """Write the average of `run.models` to the folder `run.to`; returns it. Raises `InputError`."""
    show_log()
    places = [open_checkpoint(name) for name in run.models]
    seen: dict[Path, str] = {}
    for place in places:
        path = place.path.resolve()
        if path in seen:
            raise InputError(
                f"--models names {seen[path]} and {place.name}, which are one model; give it a weight instead"
            )
        seen[path] = place.name
    said = spoken(places[0])
    tokenizers = [place.tokenizer() for place in places]
    check_alike(places, tokenizers)
    shares, target = run.shares(), Path(run.to).expanduser()
    made_by = {"method": "ema" if run.ema is not None else "weighted" if run.weights else "uniform", "ema": run.ema}
    told = {"tokenizer": tokenizers[0], **said}
    write_average(places, shares, target, dtype=run.dtype, made_by=made_by, **told)
    parts = ", ".join(f"{share:.4g} {name}" for share, name in zip(shares, run.models, strict=True))
    say(f"{target}: {parts}")
    return target
