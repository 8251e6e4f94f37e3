"""`dpo-jax lm-eval`: tasks of lm-evaluation-harness on a model of ours."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from dpo_jax.config import LmEvalRun
from dpo_jax.data.tokens.templates import TemplateError
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically
from dpo_jax.judge.lm_eval_model import ScoredModel, adapter, check_installed, harness
from dpo_jax.judge.loading import check_output
from dpo_jax.mesh import make_mesh
from dpo_jax.weights.opened import open_checkpoint


def lm_eval(run: LmEvalRun) -> dict[str, Any]:
    """Evaluate, and print the harness's tables. Returns its results, by task and metric. Raises `InputError`."""
    outputs = [check_output(path, run.model) for path in (run.out, run.rows) if path is not None]
    if len(outputs) == 2:
        check_output(outputs[1], str(outputs[0]))
    check_installed()
    if run.include_path is not None and not Path(run.include_path).is_dir():
        raise InputError(f"{run.include_path}: no such folder; --include_path holds tasks as YAML")
    place = open_checkpoint(run.model)
    if run.apply_chat_template:
        _check_template(run, place.tokenizer())
    with harness() as manager_of:
        manager = manager_of(include_path=run.include_path)
        wanted = _loaded(run, manager)
        mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
        scored = ScoredModel(place, mesh=mesh, batch_size=run.batch_size, dtype=run.dtype, name=run.model)
        found = import_module("lm_eval").simple_evaluate(
            model=adapter(scored),
            tasks=wanted,
            task_manager=manager,
            num_fewshot=run.num_fewshot,
            limit=run.limit,
            apply_chat_template=run.apply_chat_template,
            system_instruction=run.system_instruction,
            log_samples=run.rows is not None,
        )
    rows, _ = found.pop("samples", {}), found.pop("git_hash", None)
    if run.out is not None:
        write_atomically(outputs[0], json.dumps(found, indent=2, default=str) + "\n")
    if run.rows is not None:
        lines = ({"task": task, **row} for task in rows for row in rows[task])
        text = "".join(json.dumps(line, default=str, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(outputs[-1], text)
    table = import_module("lm_eval.utils").make_table
    print(table(found))
    if found.get("groups"):
        print(table(found, "groups"))
    return found["results"]


def _loaded(run: LmEvalRun, manager: Any) -> list[Any]:
    """What --tasks names, ready to be put: tasks, and groups with all that is inside them. Raises `InputError`."""
    names = {task: manager.match_tasks([task]) for task in run.tasks}
    if unknown := [task for task, found in names.items() if not found]:
        raise InputError(f"--tasks {' '.join(unknown)}: lm-eval knows no such task; `lm_eval ls tasks` lists them")
    wanted = list(dict.fromkeys(name for found in names.values() for name in found))
    try:
        loaded = manager.load(wanted)
    except Exception as problem:  # whatever a task's file, its code or its data does
        said = " ".join(str(problem).split())[:300]
        raise InputError(f"--tasks {' '.join(wanted)}: cannot be loaded: {type(problem).__name__}: {said}") from problem
    groups = loaded["groups"].values()
    inside = {one.name for group in groups for one in group.get_all_groups()}
    inside |= {one.task_name for group in groups for one in group.get_all_tasks()}
    return [one for name, one in (*loaded["groups"].items(), *loaded["tasks"].items()) if name not in inside]


def _check_template(run: LmEvalRun, tokenizer: Any) -> None:
    """Raise `InputError` unless the tokenizer's chat template takes what this run begins each question with."""
    if not tokenizer.chat_template:
        raise InputError(f"{run.model}: its tokenizer has no chat template; leave --apply_chat_template out")
    system = [] if run.system_instruction is None else [{"role": "system", "content": run.system_instruction}]
    try:
        tokenizer.apply_chat_template([*system, {"role": "user", "content": "?"}], tokenize=False)
    except TemplateError as problem:
        advice = "--system_instruction" if system else "--apply_chat_template"
        raise InputError(f"{run.model}: its chat template refuses this: {problem}; leave {advice} out") from problem
