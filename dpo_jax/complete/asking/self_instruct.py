"""What a teacher writes for distilled SFT: answers, refined instructions, and both sides of a dialogue.

Zephyr (Tunstall et al. 2023, section 3, dSFT): for each seed prompt x the teacher samples an answer y, then a new
instruction x' by a prompt that refines x and y, and so on; what is learnt are pairs (x, y). UltraChat (Ding et al.
2023) goes on with a teacher that plays the user and one that answers. The prompts are this project's
(`prompts/self_instruct.json`).

A row is {"seed", "round", "messages"}; one without a whole answer, asked for twice, gets "dropped": why.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from typing import Any

from dpo_jax.complete.asking.answers import Answer, Asker, answers
from dpo_jax.complete.asking.chat_client import Question
from dpo_jax.data.rows.rouge import Kept
from dpo_jax.files.jsonl import Row
from dpo_jax.files.log import ProgressBar

_LABEL = re.compile(
    r"\A\s*\**(?:(?:the|here is (?:the|a)|my)\s+)?(?:(?:new|refined|next)\s+)?"
    r"(?:instruction|message|user|新?指令|用户)\**\s*[:：]\**\s*",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"\A([\"“「])(.*)([\"”」])\Z", re.DOTALL)
_CLOSING = {'"': '"', "“": "”", "「": "」"}
REFUSED = "the teacher refuses"


class Teacher:
    """Asks a teacher for what the stages need."""

    def __init__(self, asker: Asker, language: str, seed: int, refuses: Callable[[str], bool]):
        """Args:
        language: en or zh, of the prompts.
        seed: of all questions.
        refuses: whether a text is a refusal: no instruction, then.
        """
        text = resources.files("dpo_jax.complete").joinpath("prompts", "self_instruct.json").read_text(encoding="utf-8")
        found = json.loads(text)
        self._prompts, self._version = found[language], f"self_instruct {found['version']} {language}"
        self._asker, self._seed, self._refuses = asker, seed, refuses
        self._names = {"user": "User", "assistant": "Assistant", "system": "System"}
        if language == "zh":
            self._names = {"user": "用户", "assistant": "助手", "system": "系统"}

    def answered(self, rows: Sequence[Row]) -> list[Row]:
        """`rows` with the teacher's answer to their messages behind them."""
        questions = [Question(tuple(row["messages"]), seed=self._seed) for row in rows]
        return [_with(row, "assistant", answer) for row, answer in zip(rows, self._ask(questions), strict=True)]

    def refined(self, rows: Sequence[Row]) -> list[Row]:
        """The instructions that follow from pairs of an instruction and its answer, a round later."""
        told = [
            {"instruction": row["messages"][-2]["content"], "answer": row["messages"][-1]["content"]} for row in rows
        ]
        found = self._written("refine", told)
        made = [{"seed": row["seed"], "round": row["round"] + 1, "messages": []} for row in rows]
        return [_with(row, "user", answer) for row, answer in zip(made, found, strict=True)]

    def asked_on(self, rows: Sequence[Row]) -> list[Row]:
        """`rows` with what the teacher, as the user, says next."""
        told = [{"dialogue": self._dialogue(row["messages"])} for row in rows]
        return [_with(row, "user", answer) for row, answer in zip(rows, self._written("user", told), strict=True)]

    def _dialogue(self, messages: Iterable[dict[str, str]]) -> str:
        return "\n\n".join(f"{self._names[m['role']]}: {m['content']}" for m in messages)

    def _written(self, name: str, values: Sequence[dict[str, str]]) -> list[Answer]:
        """What the teacher writes for a prompt of ours, as a user's message."""
        texts = [re.sub(r"\{(\w+)\}", lambda place, own=own: own[place[1]], self._prompts[name]) for own in values]
        questions = [
            Question(({"role": "user", "content": text},), version=f"{self._version} {name}", seed=self._seed)
            for text in texts
        ]
        return [self._message(answer) for answer in self._ask(questions)]

    def _message(self, answer: Answer) -> Answer:
        if answer.fault is None and self._refuses(answer.text):
            return Answer("", REFUSED)
        text = _LABEL.sub("", answer.text).strip()
        quoted = _QUOTED.match(text)
        if quoted and quoted[3] == _CLOSING[quoted[1]] and quoted[1] not in quoted[2] and quoted[3] not in quoted[2]:
            text = quoted[2].strip()
        return Answer(text, answer.fault or (None if text else "empty"))

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        with ProgressBar("teacher", len(questions)) as bar:
            return answers(self._asker, questions, bar.update)


def _with(row: Row, role: str, answer: Answer) -> Row:
    if answer.fault is not None:
        return row | {"dropped": f"no {'answer' if role == 'assistant' else 'instruction'}: {answer.fault}"}
    return row | {"messages": [*row["messages"], {"role": role, "content": answer.text}]}


def unlike(rows: Sequence[Row], before: Sequence[Row], limit: float) -> list[Row]:
    """`rows`, those marked as dropped whose instruction is too close to one of `before` or to a row before it."""
    kept = Kept(limit)
    for row in before:
        kept.add(row["messages"][0]["content"])
    found: list[Any] = []
    for row in rows:
        if "dropped" not in row:
            text = row["messages"][0]["content"]
            if (close := kept.close(text)) is not None:
                row = row | {"dropped": "ROUGE-L with a kept instruction", "close_to": close[0], "rouge_l": close[1]}
            else:
                kept.add(text)
        found.append(row)
    return found
