"""Answers to MT-Bench's questions, turn by turn, as FastChat does (lm-sys/FastChat 0e6d3e4, gen_model_answer.py).

Turn 1 of all questions is written together, those of one temperature in one queue; then turn 2 behind it.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from dpo_jax.complete.writing.gatt_dialogues import seed_of
from dpo_jax.complete.writing.writer import Draw, Some, Writer
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sources.questions import Question, temperature_of
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import Row
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.sample.decode import limits


def dialogue(turns: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """What is said before the next answer: one turn more than there are answers."""
    said = [Message("user", turns[0])]
    for answer, turn in zip(answers, turns[1:], strict=False):
        said += [Message("assistant", answer), Message("user", turn)]
    return said


def check_room(
    encoder: ConversationEncoder, questions: Mapping[int, Question], architecture: LlamaConfig, new: int, source: str
) -> None:
    """Raise `InputError` for a question that, with answers of `new` tokens, may exceed what the model was made for."""
    limit = min(limits(architecture).values())
    for question in questions.values():
        turns = len(question.turns)
        asked = len(encoder.prompt_ids(dialogue(question.turns, ["a"] * (turns - 1))))
        if asked + turns * new <= limit:
            continue
        room = (limit - asked) // turns
        mend = f"lower --sample.max_new_tokens to {room}" if room > 0 else "leave it out"
        raise InputError(
            f"{source}: question {question.id} and {turns} answer{'s' * (turns > 1)} of up to {new} tokens may take"
            f" {asked + turns * new} tokens, and the model's context is {limit}; {mend}"
        )


def write_answers(
    writer: Writer, path: Path, questions: Mapping[int, Question], *, model_id: str, seed: int, dtype: str
) -> list[Row]:
    """Write `path`, a row for each question: `question_id`, `answer_id`, `model_id`, `choices`, `tstamp`.

    `choices` is [{"index": 0, "turns": [answer to each turn]}]. All but `tstamp` (seconds since 1970) is a function of
    the weights, the questions and the seed. Returns a row for each answer: `question_id`, `turn` from 1, `answer`,
    `finish_reason`, `tokens`.
    """
    asked = tuple(questions.values())
    place = {question.id: i for i, question in enumerate(asked)}
    settings = {
        "weights": writer.weights,
        "template": hashlib.sha256(
            json.dumps(
                [writer.encoder.prompt_ids(dialogue(q.turns, ["a"] * (len(q.turns) - 1))) for q in asked]
            ).encode()
        ).hexdigest(),
        "questions": [asdict(question) for question in asked],
        "sample": asdict(writer.config),
        "model_id": model_id,
        "seed": seed,
        "dtype": dtype,
    }
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def draws(rows: list[Row]) -> Iterator[Draw]:
        for turn in range(1, max(len(question.turns) for question in asked) + 1):
            said = {(row["question_id"], row["turn"]): row["answer"] for row in rows}
            now = {i: question for i, question in enumerate(asked) if len(question.turns) >= turn}
            answers = {i: [said[question.id, t] for t in range(1, turn)] for i, question in now.items()}
            prompts = [
                writer.encoder.prompt_ids(dialogue(question.turns[:turn], answers.get(i, ())))
                for i, question in enumerate(asked)
            ]
            for temperature in sorted({temperature_of(question) for question in now.values()}):
                requests = {(i, turn): (i, 0) for i, one in now.items() if temperature_of(one) == temperature}
                drawn = partial(_rows, asked, turn)
                yield Draw(prompts, requests, seed_of(seed, "mt-bench", turn), drawn, temperature)

    def form(rows: list[Row]) -> Iterator[Row]:
        for question in asked:
            own = [row["answer"] for row in rows if row["question_id"] == question.id]
            yield {
                "question_id": question.id,
                "answer_id": hashlib.sha256(f"{identity} {question.id}".encode()).hexdigest()[:22],
                "model_id": model_id,
                "choices": [{"index": 0, "turns": own}],
                "tstamp": time.time(),
            }

    return writer.write(
        path,
        "answering",
        settings,
        draws,
        total=sum(len(question.turns) for question in asked),
        key=lambda row: (place[row["question_id"]], row["turn"]),
        counted="answers",
        note=lambda rows: f"turn {rows[-1]['turn']}  ",
        form=form,
    )


def _rows(questions: Sequence[Question], turn: int, some: Some) -> Iterator[Row]:
    for (index, _), response in some:
        # A cut answer may end inside a character of several bytes. FastChat strips what a model writes.
        answer = (
            response.text.rstrip("\N{REPLACEMENT CHARACTER}") if response.finish_reason == "length" else response.text
        )
        yield {
            "question_id": questions[index].id,
            "turn": turn,
            "answer": answer.strip(),
            "finish_reason": response.finish_reason,
            "tokens": len(response.ids),
        }
