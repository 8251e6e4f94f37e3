"""Dialogues -> token ids, and which of them are to be predicted.

* The ids are those of the whole rendered dialogue, up to the terminator of its last answer. What begins and ends an
  answer: see `chat_tokenizer.py`.
* An answer is its own text and the one terminator behind it; its header and what the template writes behind the
  terminator are not. A template without a turn end gets EOS behind the last answer.
* Where answers begin and end, the template says: by its `{% generation %}` marks if it has them, else by what it
  renders of the dialogue up to the answer, without it and with it. If it renders that differently once other turns
  follow (drops it, say), the row cannot be used.
* A turn that the row marks as not to be learnt (`Message.learn`) is context.
* An answer that was cut (`Dialogue.cut`) has no terminator; the text ends with it.
* A token that straddles the beginning of an answer belongs to the answer.
* A dialogue of more than `max_length` tokens keeps its start and loses its end: no false terminator. If no target is
  left, it is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.dialogues import Dialogue
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer, behind, first_token

TrainOn = Literal["answers", "last", "all"]
"""answers: every answer. last: the last answer alone. all: every token but the first."""


@dataclass(frozen=True)
class RenderedDialogue:
    """A dialogue as text, and the characters [start, end) of each answer to be predicted, its terminator included.

    Attributes:
      text: all of it, up to the end of the last answer.
      answers: those to be predicted.
      context: answers that are not, though all else may be.
      cut: the last answer has no terminator, and gets none.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    context: tuple[tuple[int, int], ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class EncodedSequence:
    """Ids int32 [t]; bool [t], True at those to be predicted; and whether the end was cut."""

    tokens: np.ndarray
    targets: np.ndarray
    cut: bool


class DialogueEncoder(ChatTokenizer):
    """Renders and tokenises dialogues with one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        train_on: TrainOn,
        date: str | None = None,
        *,
        empty_system: bool = False,
    ):
        """Args: as of `ChatTokenizer`; what is to be predicted."""
        super().__init__(tokenizer, template, date, empty_system=empty_system)
        self._train_on: TrainOn = train_on

    def render(self, dialogue: Dialogue) -> RenderedDialogue:
        """The text of a dialogue. Raises `BadRow` where the template cannot render it, or its answers are not found."""
        if self._template is None:
            if dialogue.raw is None:
                detail = "it consists of several messages; name a template that joins them"
                raise BadRow("--data.template raw takes one prompt and one answer as plain text", detail)
            prompt, answer = dialogue.raw
            self._learnt(dialogue.messages[-1:])
            return RenderedDialogue(prompt + answer, ((len(prompt), len(prompt) + len(answer)),), cut=dialogue.cut)
        messages = [
            m._replace(content=self._unclosed(m.content)) if m.role == "assistant" else m for m in dialogue.messages
        ]
        self._refuse_control(messages)
        for message in messages:
            if message.role == "assistant" and not message.content.strip():
                raise BadRow("empty turn: an answer holds nothing but terminators", "remove the row", "noise")
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        learnt, context = self._learnt(messages)
        if self._template.marks_answers:
            text, spans = self._template.render_marked(messages)
            answers = dict(zip(turns, self._marked(text, spans, messages), strict=True))
        else:
            text = self._render(messages)
            # Of the other turns nothing needs to be known, so a template that drops some of them will do.
            wanted = sorted({*learnt, *context, turns[-1]})
            answers = {i: self._between(text, messages[: i + 1], last=i == turns[-1]) for i in wanted}
        text = text[: answers[turns[-1]][1]]
        if dialogue.cut:
            text = self._without_closing(text)
            answers[turns[-1]] = (answers[turns[-1]][0], len(text))
        return RenderedDialogue(
            text, tuple(answers[i] for i in learnt), tuple(answers[i] for i in context), cut=dialogue.cut
        )

    def _learnt(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Which answers are to be learnt, and which are context though `train_on` is "all": indices of `messages`.

        Raises `BadRow` where none is left, or the row marks a turn of another role that it is not possible to heed.
        """
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        everything = self._train_on == "all"
        for message in messages:
            if message.role != "assistant" and message.learn is not None and message.learn != everything:
                if everything:
                    detail = f"one of the {message.role}, and which tokens are it is not known; learn answers alone"
                    raise BadRow("a turn that is not to be learnt, under --data.train_on all", detail)
                if message.learn:
                    detail = f"one of the {message.role}; answers are: remove its mark, or take --data.train_on all"
                    raise BadRow("a turn that is no answer is marked as one to learn", detail)
        wanted = turns if self._train_on == "answers" else turns[-1:]
        learnt = [i for i in wanted if messages[i].learn is not False]
        if not learnt and not everything:
            detail = "its marks (weight, train, loss) leave only context"
            raise BadRow("no answer of the dialogue is to be learnt", detail, "lost")
        return learnt, [i for i in turns if messages[i].learn is False] if everything else []

    def _without_closing(self, text: str) -> str:
        """`text`, which ends with an answer, without what the template writes to end it."""
        closings = (self._closing, self._control.texts.get(self._terminator, ""))
        found = next((closing for closing in closings if closing and text.endswith(closing)), "")
        return text.removesuffix(found)

    def _marked(self, text: str, spans: list[tuple[int, int]], messages: Sequence[Message]) -> list[tuple[int, int]]:
        """The answers by the template's marks: each up to its first terminator, within the mark or just behind it."""
        spoken = sum(m.role == "assistant" for m in messages)
        if len(spans) != spoken:
            detail = f"{len(spans)} of {spoken}; name another template"
            raise BadRow("the chat template's {% generation %} marks are not one an answer", detail)
        closing = self._control.texts.get(self._terminator, "")
        closing = closing if closing in self._closing else ""  # EOS that the template does not write
        found = []
        for start, end in spans:
            at = text.find(closing, start, end + len(self._closing))
            if at < 0 or start == end:
                raise BadRow(
                    "the chat template's {% generation %} marks hold no whole answer",
                    f"no {closing!r} follows {text[start:end][:40]!r}; name another template",
                )
            found.append((start, at + len(closing) if closing else end))
        return found

    def _between(self, text: str, messages: Sequence[Message], *, last: bool) -> tuple[int, int]:
        """The last answer of `messages`, a beginning of the dialogue that was rendered as `text`."""
        context, answer = messages[:-1], messages[-1].content
        whole = text if last else self._render(messages)
        thoughts = [value for key, value in messages[-1].extra if isinstance(value, str) and self.writes(key)]
        start, end = self._answer_in(whole, self._render(context, generation=True), context, answer, thoughts)
        if not last and not text.startswith(whole[:end] + self._closing):
            raise BadRow(
                "the chat template renders an answer differently once other turns follow",
                "so which tokens are answers is not known; mark them by {% generation %} in the template, name another"
                " with --data.template, or train on the last answer alone",
            )
        return start, end + len(self._closing)

    def encode(self, rows: Sequence[RenderedDialogue], max_length: int) -> list[EncodedSequence | BadRow]:
        """Ids of many dialogues at once (in parallel), cut to `max_length`; a `BadRow` where no target is left."""
        encodings = self._backend.encode_batch([row.text for row in rows], add_special_tokens=False)
        return [self._masked(row, encoding, max_length) for row, encoding in zip(rows, encodings, strict=True)]

    def _masked(self, row: RenderedDialogue, encoding: Encoding, max_length: int) -> EncodedSequence | BadRow:
        ids = list(encoding.ids)
        targets = np.full(len(ids), self._train_on == "all")
        for start, end in row.answers:
            targets[first_token(encoding, start, len(row.text)) : behind(encoding, end, len(row.text))] = True
        for start, end in row.context:
            targets[first_token(encoding, start, len(row.text)) : behind(encoding, end, len(row.text))] = False
        if not row.cut and (not ids or ids[-1] not in self._closers):
            ids.append(self._terminator)
            targets = np.append(targets, bool(row.answers) and row.answers[-1][1] == len(row.text))
        with_bos = self._with_bos(ids)
        targets = np.concatenate([np.zeros(len(with_bos) - len(ids), bool), targets])
        targets[0] = False
        tokens, targets = np.asarray(with_bos[:max_length], np.int32), targets[:max_length]
        if not targets.any():
            first = f"the first {max_length} of {len(with_bos)} tokens hold none; raise --data.max_length"
            detail = first if len(with_bos) > max_length else "there is nothing before it to predict it from"
            return BadRow("no token of an answer is left to predict", detail, "lost")
        return EncodedSequence(tokens, targets, cut=len(with_bos) > max_length)
