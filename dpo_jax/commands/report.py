"""`dpo-jax report RUN RUN ...`: runs compared on one page."""

from pathlib import Path

from dpo_jax.config import ReportRun
from dpo_jax.errors import InputError
from dpo_jax.report import compare, html


def report(run: ReportRun) -> None:
    """Write the page. Raises `InputError` for folders that are no runs, and for a file that is there already."""
    target = Path(run.out)
    if target.exists() and not run.overwrite:
        raise InputError(f"{target}: is there already; choose another --out, or give --overwrite")
    if target.is_dir() or (target.exists() and not target.read_bytes().startswith(html.HEAD.encode())):
        raise InputError(f"{target}: is no page of dpo_jax, and is not overwritten; choose another --out")
    runs = compare.read_runs(run.runs)
    summary = f"{len(runs)} runs: {', '.join(told.name for told in runs)}."
    html.write_report(target, "Runs compared", summary, compare.sections(runs))
    print(f"{target}: {summary}")
