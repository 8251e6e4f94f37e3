"""`dpo-jax mt-bench answer`: a model's answers to MT-Bench's questions, in FastChat's file."""

from functools import partial
from pathlib import Path

from dpo_jax.complete.writing.mt_bench_answers import check_room, write_answers
from dpo_jax.complete.writing.writer import Writer
from dpo_jax.config import MTBenchAnswerRun
from dpo_jax.data.sources.questions import read_questions
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import check_date
from dpo_jax.files.log import say
from dpo_jax.judge.loading import check_output
from dpo_jax.mesh import make_mesh
from dpo_jax.weights.opened import open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary


def answer(run: MTBenchAnswerRun) -> Path:
    """Write `run.out` (see `write_answers`) and return its path; every question is checked before the first token.

    Raises `InputError`.
    """
    out = check_output(Path(run.out).expanduser(), run.questions)
    questions = read_questions(run.questions)
    place = open_checkpoint(run.model)
    tokenizer, architecture = place.tokenizer(), place.architecture
    check_vocabulary(tokenizer, architecture)
    check_date(tokenizer, run.template, run.date)
    encoder = ConversationEncoder(tokenizer, run.template, run.date)
    check_room(encoder, questions, architecture, run.sample.max_new_tokens, run.questions)
    mesh = make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
    load = partial(load_pretrained, place, mesh=mesh, dtype=run.dtype)
    writer = Writer(load, tokenizer, encoder, run.sample, run.batch_size, mesh=mesh)
    name = run.model_id or out.name.removesuffix(".jsonl")
    rows = write_answers(writer, out, questions, model_id=name, seed=run.seed, dtype=run.dtype)
    cut = sum(row["finish_reason"] == "length" for row in rows)
    say(f"{out}: {len(questions)} questions, {len(rows)} answers of {name}, {cut} of them cut at the most new tokens")
    return out
