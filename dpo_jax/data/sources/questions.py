"""Questions in MT-Bench's file format (FastChat's question.jsonl): id, category, turns, reference answers.

And models' answers to them, in FastChat's files: model_answer/*.jsonl, reference_answer/*.jsonl.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_jax.data.rows.cells import absent, as_number, as_whole
from dpo_jax.data.sources.files import read_rows
from dpo_jax.errors import InputError
from dpo_jax.headers import mended, told

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
"""MT-Bench's, in the order of its question ids: 81 to 90 are writing, ..., 151 to 160 humanities."""
FIRST, LAST = 81, 160
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
"""At which a category is answered (FastChat, llm_judge/common.py, temperature_config); others at `OTHERS`."""
OTHERS = 0.7
_GREEDY = 1e-4  # below it FastChat takes the likeliest token


@dataclass(frozen=True)
class Question:
    """One question, of one turn or more.

    Attributes:
      id: unique in its file.
      category: such as "writing".
      turns: what the user says, turn by turn.
      reference: answers to compare with, one a turn; empty where there are none.
      temperature: that the answers are to be sampled at whatever the category says; None: by the category.
    """

    id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    temperature: float | None = None


def temperature_of(question: Question) -> float:
    """At which its answers are sampled: its own, else its category's; 0 is greedy."""
    own = TEMPERATURES.get(question.category, OTHERS) if question.temperature is None else question.temperature
    return 0.0 if own < _GREEDY else own


def question_id(row: Mapping[str, Any], where: str) -> int:
    """`question_id` of a row. Raises `InputError`, which `where` begins."""
    found = as_whole(row.get("question_id"))
    if found is None:
        raise InputError(f"{where}: question_id = {told(row.get('question_id'))} is no whole number")
    return found


def texts(row: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    """The list of texts `row[name]`, halves of surrogate pairs as U+FFFD; empty where there is none.

    Raises `InputError`, which `where` begins.
    """
    value = row.get(name)
    if absent(value):
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise InputError(f"{where}: {name} = {told(value)} is not a list of texts")
    return tuple(map(mended, value))


def read_questions(source: str) -> dict[int, Question]:
    """The questions of a file, by id, in its order. Raises `InputError`: a missing turn, an id twice, a wrong field."""
    found: dict[int, Question] = {}
    for number, row in read_rows(source):
        where = f"{source}: row {number}"
        name, turns, category = question_id(row, where), texts(row, "turns", where), row.get("category")
        where += f" (question {name})"
        if name in found:
            raise InputError(f"{where}: this question_id stands in an earlier row; give each question one of its own")
        if not turns or not all(turn.strip() for turn in turns):
            raise InputError(f"{where}: has no text in each of its turns; `turns` is a list of what the user says")
        if not isinstance(category, str) or not category.strip():
            raise InputError(f"{where}: category = {told(category)} is no text; name one, such as writing")
        told_temperature = row.get("required_temperature")
        temperature = as_number(told_temperature)
        if not absent(told_temperature) and (temperature is None or not 0 <= temperature <= 100):
            raise InputError(f"{where}: required_temperature = {told(told_temperature)} is no number from 0 up")
        reference = texts(row, "reference", where)
        if reference and len(reference) != len(turns):
            raise InputError(f"{where}: has {len(turns)} turns and {len(reference)} reference answers; give one a turn")
        found[name] = Question(name, category, turns, reference, temperature)
    return found


def category_of(name: int, questions: Mapping[int, Question] | None) -> str | None:
    """The category of question `name`; None: it is not among `questions`, or, without them, none of MT-Bench's."""
    if questions is not None:
        return questions[name].category if name in questions else None
    return CATEGORIES[(name - FIRST) // 10] if FIRST <= name <= LAST else None


# ---------------------------------------------------------------- answers of models

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
