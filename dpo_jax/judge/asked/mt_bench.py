"""MT-Bench's judgements as FastChat makes them (lm-sys/FastChat 0e6d3e4, llm_judge/common.py, gen_judgment.py).

A match is one answer, or the answers of two models, up to one turn. Math, reasoning and coding are judged beside a
reference answer. Of two answers the judge is asked in both orders. A reply without a reading is a score of -1, or a
winner "error"; nothing is asked again. Replies to FastChat's prompts are read as FastChat reads them, those to ours by
`verdicts.py`.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dpo_jax.complete.asking.chat_client import Question
from dpo_jax.complete.asking.reply_cache import Reply
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sources.questions import Answers, Question as Asked
from dpo_jax.errors import InputError
from dpo_jax.files.jsonl import Row
from dpo_jax.judge.asked.judge_prompts import JudgePrompt, our_prompt, read_prompts
from dpo_jax.judge.asked.judging import read
from dpo_jax.judge.asked.verdicts import Side

WITH_REFERENCE = ("math", "reasoning", "coding", "arena-hard-200")
"""Categories that are judged beside a reference answer (FastChat's NEED_REF_CATS)."""
_NAMES = {False: ("single-v1", "single-math-v1"), True: ("pair-v2", "pair-math-v1")}
_SEVERAL = "-multi-turn"
_TURNS = 2  # what FastChat's prompts of several turns have places for
_SCORES = (re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII), re.compile(r"\[(\d+\.?\d*)\]", re.ASCII))
_WINNERS: dict[str, Side] = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
_REFERENCE = {"en": "Reference answer", "zh": "参考答案"}


class Prompts:
    """What a judge is asked: FastChat's prompts of a file, or ours."""

    def __init__(self, file: str | None, language: str, *, pairs: bool):
        """Raises `InputError` for a file that is none."""
        self._file, self._language, self._pairs = file, language, pairs
        self._found = None if file is None else read_prompts(file)
        self._ours = our_prompt("pair" if pairs else "rating", language)

    def of(self, category: str, turn: int) -> JudgePrompt:
        """That for a turn (from 1) of a category. Raises `InputError` where the file has none."""
        if self._found is None:
            return self._ours
        name = _NAMES[self._pairs][category in WITH_REFERENCE] + _SEVERAL * (turn > 1)
        if turn > _TURNS:
            raise InputError(f"--prompts {self._file}: its prompts take {_TURNS} turns, and a question has {turn}")
        if name not in self._found:
            raise InputError(f"--prompts {self._file}: has no prompt {name}; it holds {', '.join(self._found)}")
        return self._found[name]

    def question(self, asked: Asked, turn: int, shown: Sequence[Sequence[str]], reference: Sequence[str]) -> Question:
        """The request for answers in the order in which they are shown: one of a model, or those of two."""
        prompt, last = self.of(asked.category, turn), turn - 1
        values = {"question": asked.turns[last], "low": f"{prompt.low:g}", "high": f"{prompt.high:g}"}
        if self._found is None:
            values |= self._own(prompt, asked, turn, shown, reference)
        for t in range(turn):
            values[f"question_{t + 1}"] = asked.turns[t]
            if reference:
                values[f"ref_answer_{t + 1}"] = reference[t]
        if self._found is not None:
            for label, answers in zip(("_a", "_b") if self._pairs else ("",), shown, strict=True):
                values[f"answer{label}"] = answers[last]
                values |= {f"answer{label}_{t + 1}": answers[t] for t in range(turn)}
        try:
            return Question(prompt.messages(values), version=prompt.version)
        except KeyError as error:
            raise InputError(
                f"--prompts {self._file}: {prompt.name} has a place {{{error.args[0]}}}, unknown"
            ) from None

    def read(self, reply: Reply, prompt: JudgePrompt) -> Any:
        """A score, or "A", "B" or "tie"; None where there is no reading, or the reply was cut or refused."""
        if self._found is None:
            return read(reply, range(1 + self._pairs), prompt, ())
        if not reply.whole:
            return None
        return _fastchat_winner(reply.text) if self._pairs else _fastchat_score(reply.text)

    def _own(
        self, prompt: JudgePrompt, asked: Asked, turn: int, shown: Sequence[Sequence[str]], reference: Sequence[str]
    ) -> dict[str, str]:
        """Our prompts have one place for what was asked: the dialogue stands there, or of pairs in the answers."""
        users = [Message("user", text) for text in asked.turns[:turn]]

        def dialogue(answers: Sequence[str]) -> list[Message]:
            said = [Message("assistant", text) for text in answers[:turn]]
            return [one for both in zip(users, said, strict=False) for one in both]

        if self._pairs:
            texts = [prompt.question(dialogue(one)) if turn > 1 else one[0] for one in shown]
            values = {"question": prompt.question(users), "answer_a": texts[0], "answer_b": texts[1]}
        else:
            values = {"question": prompt.question(dialogue(shown[0])[:-1]), "answer": shown[0][turn - 1]}
        if reference:
            told = "\n\n".join(reference[:turn])
            values["question"] += f"\n\n[{_REFERENCE[self._language]}]\n{told}"
        return values


def _fastchat_score(text: str) -> float | int | None:
    """The first number in double brackets, else the first in single ones, whatever its size."""
    found = next(filter(None, (pattern.search(text) for pattern in _SCORES)), None)
    if found is None:
        return None
    return float(found[1]) if "." in found[1] else int(found[1])


def _fastchat_winner(text: str) -> Side | None:
    """The first of [[A]], [[B]], [[C]], in this order, that stands anywhere."""
    return next((side for mark, side in _WINNERS.items() if mark in text), None)


@dataclass(frozen=True)
class Match:
    """What is judged: a question up to `turn`, and the answer of one model or of two."""

    asked: Asked
    turn: int
    models: tuple[str, ...]

    def orders(self) -> list[tuple[str, ...]]:
        """The models in the orders in which their answers are shown."""
        return [self.models] if len(self.models) == 1 else [self.models, self.models[::-1]]


def matches(questions: Mapping[int, Asked], models: Sequence[str], mode: str, baseline: str | None) -> list[Match]:
    """Everything that is judged, turn after turn. Raises `InputError` where the models do not suffice."""
    if mode != "single" and len(models) < 2:
        raise InputError(f"--mode {mode} compares models, and --answers holds {', '.join(models)} alone")
    if mode == "pairwise-baseline" and baseline not in models:
        raise InputError(f"--baseline {baseline} is none of --answers: {', '.join(models)}")
    sides: list[tuple[str, ...]] = [(model,) for model in models]
    if mode == "pairwise-baseline":
        sides = [(model, str(baseline)) for model in models if model != baseline]
    elif mode == "pairwise-all":
        sides = list(combinations(models, 2))
    most = max(len(asked.turns) for asked in questions.values())
    return [
        Match(asked, turn, side)
        for turn in range(1, most + 1)
        for side in sides
        for asked in questions.values()
        if len(asked.turns) >= turn
    ]


def reference_of(asked: Asked, references: Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    """What its answers are compared with; empty for other categories. Raises `InputError` where it is missing."""
    if asked.category not in WITH_REFERENCE:
        return ()
    found = tuple(references.get(asked.id, asked.reference))
    if not found:
        raise InputError(
            f"question {asked.id} is of {asked.category}, which is judged beside a reference answer, and has none; give"
            " --references FILE (FastChat's reference_answer), or `reference` in --questions"
        )
    return found


def requests(
    match: Match, prompts: Prompts, answers: Answers, references: Mapping[int, Sequence[str]]
) -> list[Question]:
    """What a judge is asked of a match, in the order of `Match.orders`."""
    reference = reference_of(match.asked, references)
    return [
        prompts.question(match.asked, match.turn, [answers[model][match.asked.id] for model in order], reference)
        for order in match.orders()
    ]


def rows(
    some: Sequence[Match], asked: Sequence[Sequence[Question]], replies: Iterator[Reply], prompts: Prompts, judge: str
) -> Iterator[Row]:
    """A row of FastChat's for each match. `replies`: to all questions, one after the other."""
    for match, questions in zip(some, asked, strict=True):
        prompt = prompts.of(match.asked.category, match.turn)
        said = [(question.messages[-1]["content"], next(replies)) for question in questions]
        found = [prompts.read(reply, prompt) for _, reply in said]
        row: Row = {"question_id": match.asked.id}
        if len(match.models) == 1:
            [(text, reply)], [score] = said, found
            row |= {"model": match.models[0], "judge": [judge, prompt.name], "user_prompt": text}
            row |= {"judgment": reply.text, "score": -1 if score is None else score}
        else:
            row |= {"model_1": match.models[0], "model_2": match.models[1]}
            for g, winners in ((0, ("model_1", "model_2")), (1, ("model_2", "model_1"))):
                sides = {"A": winners[0], "B": winners[1], "tie": "tie", None: "error"}
                row[f"g{g + 1}_winner"] = sides[found[g]]
            row["judge"] = [judge, prompt.name]
            for g, (text, reply) in enumerate(said, 1):
                row |= {f"g{g}_user_prompt": text, f"g{g}_judgment": reply.text}
        yield row | {"turn": match.turn, "tstamp": time.time()}
