"""Answers of models to MT-Bench's questions, in FastChat's files: model_answer/*.jsonl, reference_answer/*.jsonl."""

from collections.abc import Mapping, Sequence

from dpo_jax.data.sources.files import read_rows
from dpo_jax.data.sources.questions import Question, question_id, texts
from dpo_jax.errors import InputError
from dpo_jax.headers import told

Answers = dict[str, dict[int, tuple[str, ...]]]
"""By model and question: the answer to each turn, of the first choice, as FastChat takes it."""


def read_answers(sources: Sequence[str], questions: Mapping[int, Question]) -> Answers:
    """The answers of all models, in the order of the files.

    Raises `InputError`: a wrong field, a question that is not among `questions`, other turns than the question has, a
    model with two answers to one question.
    """
    found: Answers = {}
    for source in sources:
        for number, row in read_rows(source):
            where = f"{source}: row {number}"
            name, model, choices = question_id(row, where), row.get("model_id"), row.get("choices")
            if not isinstance(model, str) or not model.strip():
                raise InputError(f"{where}: model_id = {told(model)} is no text")
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                raise InputError(f"{where}: choices = {told(choices)} is not a list of objects with `turns`")
            if name not in questions:
                raise InputError(f"{where}: question {name} is not in --questions; give the set that was answered")
            turns, asked = texts(choices[0], "turns", where), len(questions[name].turns)
            if len(turns) != asked:
                raise InputError(f"{where}: question {name} has {asked} turns, and {len(turns)} answers stand here")
            own = found.setdefault(model, {})
            if name in own:
                raise InputError(f"{where}: {model} answers question {name} twice; give each model one file")
            own[name] = turns
    return found


def check_complete(answers: Answers, questions: Mapping[int, Question]) -> None:
    """Raise `InputError` for a model that has no answer to one of the questions."""
    for model, own in answers.items():
        missing = [name for name in questions if name not in own]
        if missing:
            raise InputError(
                f"--answers: {model} has no answer to {len(missing)} of {len(questions)} questions, {missing[0]} the"
                " first of them; give the file of this question set"
            )
