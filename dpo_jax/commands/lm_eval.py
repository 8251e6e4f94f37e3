"""`dpo-jax lm-eval`: tasks of lm-evaluation-harness on a model of ours."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from dpo_jax.commands.config_keys import with_config_keys
from dpo_jax.config import LmEvalRun
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically
from dpo_jax.files.log import say
from dpo_jax.judge.lm_eval_model import ScoredModel, adapter, check_installed
from dpo_jax.judge.loading import check_output
from dpo_jax.mesh import make_mesh


@with_config_keys
def lm_eval(run: LmEvalRun) -> dict[str, Any]:
    """Evaluate, and print the harness's table. Returns its results, by task and metric. Raises `InputError`."""
    outputs = [check_output(path) for path in (run.out, run.rows) if path is not None]
    check_installed()
    if run.include_path is not None and not Path(run.include_path).is_dir():
        raise InputError(f"{run.include_path}: no such folder; --include_path holds tasks as YAML")
    manager = import_module("lm_eval.tasks").TaskManager(include_path=run.include_path)
    names = {task: manager.match_tasks([task]) for task in run.tasks}
    if unknown := [task for task, found in names.items() if not found]:
        raise InputError(f"--tasks {' '.join(unknown)}: lm-eval knows no such task; `lm_eval ls tasks` lists them")
    wanted = list(dict.fromkeys(name for found in names.values() for name in found))
    try:
        loaded = manager.load(wanted)
    except Exception as problem:  # whatever a task's file, its code or its data does
        said = " ".join(str(problem).split())[:300]
        raise InputError(f"--tasks {' '.join(wanted)}: cannot be loaded: {type(problem).__name__}: {said}") from problem
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    scored = ScoredModel(run.model, mesh=mesh, batch_size=run.batch_size, dtype=run.dtype)
    if run.apply_chat_template and not scored.tokenizer.chat_template:
        raise InputError(f"{run.model}: its tokenizer has no chat template; leave --apply_chat_template out")
    found = import_module("lm_eval").simple_evaluate(
        model=adapter(scored),
        tasks=[*loaded["groups"].values()] or [*loaded["tasks"].values()],
        task_manager=manager,
        num_fewshot=run.num_fewshot,
        limit=run.limit,
        apply_chat_template=run.apply_chat_template,
        system_instruction=run.system_instruction,
        log_samples=run.rows is not None,
    )
    say(import_module("lm_eval.utils").make_table(found))
    rows = found.pop("samples", {})
    for path, content in zip(outputs, _contents(run, found, rows), strict=True):
        write_atomically(path, content)
    return found["results"]


def _contents(run: LmEvalRun, found: dict[str, Any], rows: dict[str, list[Any]]) -> list[str]:
    """Of the files that are asked for."""
    results = [json.dumps(found, indent=2, default=str) + "\n"] if run.out is not None else []
    if run.rows is None:
        return results
    lines = [json.dumps({"task": task, **row}, default=str, ensure_ascii=False) for task in rows for row in rows[task]]
    return [*results, "".join(f"{line}\n" for line in lines)]
