"""`dpo-jax mt-bench answer`: a model's answers to MT-Bench's questions, in FastChat's file."""

from pathlib import Path
from typing import Any

from dpo_jax.complete.writing.mt_bench_answers import check_room, write_answers
from dpo_jax.complete.writing.writer import open_writer
from dpo_jax.config import MTBenchAnswerRun
from dpo_jax.data.sources.questions import read_questions
from dpo_jax.data.tokens.templates import check_date
from dpo_jax.files.jsonl import check_own
from dpo_jax.files.log import say
from dpo_jax.judge.loading import check_output
from dpo_jax.mesh import make_mesh
from dpo_jax.weights.opened import open_checkpoint


def answer(run: MTBenchAnswerRun) -> Path:
    """Write `run.out` (see `write_answers`) and return its path; every question is checked before the first token.

    Raises `InputError`.
    """
    out = check_output(Path(run.out).expanduser(), run.questions)
    questions = read_questions(run.questions)
    name = run.model_id or out.name.removesuffix(".jsonl")
    check_own(out, lambda row: "choices" in row and row.get("model_id") == name, f"answers of {name}")
    place, mesh = open_checkpoint(run.model), make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    told: dict[str, Any] = {"template": run.template, "date": run.date, "dtype": run.dtype}
    writer = open_writer(place, run.sample, mesh=mesh, batch_size=run.batch_size, **told)
    check_date(writer.tokenizer, run.template, run.date)
    check_room(writer.encoder, questions, place.architecture, run.sample.max_new_tokens, run.questions)
    rows = write_answers(writer, out, questions, model_id=name, seed=run.seed, dtype=run.dtype)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    say(f"{out}: {len(questions)} questions, {len(rows)} answers of {name}, {cut} of them cut at the most new tokens")
    return out
