"""A model that answers while others ask: a thread that owns the rows of `sample.live`, and text as it comes.

What is asked for is a `Question`; what comes back are `Piece`s, in order for each choice, handed to the question's
`deliver`. A question's text depends on its prompt, seed and settings, and on nobody who asks beside it.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dpo_jax.complete.writing.responses import StopStrings, decode
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.sample.live import Live, Settings, View

_STEPS = 4
"""Tokens a row between two looks of the host."""
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder writes for bytes that are no whole character yet."""


class Token(NamedTuple):
    """One token of a response: its id, log-probability at temperature 1, and the likeliest in its place, best first."""

    id: int
    logp: float
    tops: tuple[tuple[int, float], ...] = ()


class Piece(NamedTuple):
    """What is new of one choice.

    Attributes:
      choice: number of the response, from 0.
      text: continues that of the pieces before.
      tokens: likewise, the terminator among them; a text may come some pieces behind its tokens.
      finish_reason: "stop" at a terminator or a stop string, "length" at the most tokens; None as long as it goes on.
    """

    choice: int
    text: str
    tokens: Sequence[Token]
    finish_reason: str | None


class Busy(Exception):
    """Too many questions are waiting."""


@dataclass
class Question:
    """What is asked.

    Attributes:
      prompt: ids.
      settings: how to draw; its stop tokens are all that end a response.
      deliver: called from another thread with each piece, or with the exception that ends the question.
      choices: how many responses; each draws with `seed` and its number.
      raw: the text goes on with the prompt's.
    """

    prompt: Sequence[int]
    settings: Settings
    deliver: Callable[[Piece | Exception], None]
    choices: int = 1
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    raw: bool = False
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: int = 0

    @property
    def left(self) -> int:
        """Choices that are not begun."""
        return self.choices - self.begun


@dataclass
class _Row:
    """One response that is being written, and what of it was delivered."""

    question: Question
    choice: int
    characters: int = 0
    tokens: int = 0


class Talker(threading.Thread):
    """Answers questions to one model, as many at once as it has rows, others in the order in which they came."""

    def __init__(self, name: str, live: Live, tokenizer: PreTrainedTokenizerBase, template: str | None, waiting: int):
        """Args: what the model is called; `waiting`: how many questions may wait."""
        super().__init__(name=f"talker-{name}", daemon=True)
        self.model, self.tokenizer = name, tokenizer
        self.chat = ConversationEncoder(tokenizer, template)
        self.plain = ConversationEncoder(tokenizer, RAW)
        self.longest = live.longest
        self.vocab_size = live.model.config.vocab_size
        ends = (*self.chat.terminators, *live.model.config.stop_ids)
        self.terminators = tuple(dict.fromkeys(ends))
        self._live, self._most = live, waiting
        self._changed = threading.Condition()  # guards the two that follow
        self._waiting: deque[Question] = deque()
        self._closing = False
        self._rows: dict[int, _Row] = {}
        self._failed: Exception | None = None

    def ask(self, question: Question) -> None:
        """Put a question into the queue. Raises `Busy`, or `InputError` for a prompt that is too long."""
        if self._failed is not None:
            raise RuntimeError(f"{self.model} no longer answers: {self._failed}")
        needed = len(question.prompt) + question.settings.max_new_tokens
        if needed > self.longest:
            raise InputError(
                f"the prompt has {len(question.prompt)} tokens, and with {question.settings.max_new_tokens} new ones "
                f"it exceeds the {self.longest} tokens that {self.model} is served with"
            )
        with self._changed:
            if sum(not waits.cancelled.is_set() for waits in self._waiting) >= self._most:
                raise Busy(f"{self._most} requests are waiting for {self.model}")
            self._waiting.append(question)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; questions that are open get an exception."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        """The thread: admit, write some tokens, deliver."""
        try:
            while not self._idle():
                self._admit()
                if self._rows:
                    self._deliver(self._live.run(_STEPS))
            self._failed = RuntimeError("the server is stopping")
        except Exception as error:  # it is told to everybody who asked, and to who asks later
            logging.getLogger(__name__).exception("%s stopped answering", self.model)
            self._failed = error
        with self._changed:
            left = [*(row.question for row in self._rows.values()), *self._waiting]
        for question in {id(q): q for q in left}.values():
            question.deliver(RuntimeError(f"{self.model} no longer answers: {self._failed}"))

    def _idle(self) -> bool:
        """Wait until there is something to do. True: there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._rows or self._waiting)
            return self._closing

    def _admit(self) -> None:
        while free := len(self._live.free):
            with self._changed:
                while self._waiting and (self._waiting[0].cancelled.is_set() or not self._waiting[0].left):
                    self._waiting.popleft()
                if not self._waiting:
                    return
                question = self._waiting[0]
            left = question.left
            some = 1 << (min(free, left).bit_length() - 1)  # few numbers: each is compiled
            choices = range(question.begun, question.begun + some)
            try:
                rows = self._live.admit(question.prompt, choices, question.seed, question.settings)
            except InputError as error:
                question.cancelled.set()
                question.deliver(error)
                continue
            question.begun += some
            self._rows |= {row: _Row(question, choice) for row, choice in zip(rows, choices, strict=True)}

    def _deliver(self, view: View) -> None:
        for at, row in list(self._rows.items()):
            question = row.question
            if question.cancelled.is_set():
                self._release(at)
                continue
            ids = view.tokens[at, : view.count[at]].tolist()
            piece = self._piece(row, ids, bool(view.done[at]), view, at)
            if piece.finish_reason is not None:
                self._release(at)
            if piece.text or piece.tokens or piece.finish_reason:
                question.deliver(piece)

    def _release(self, at: int) -> None:
        self._live.release(at)
        del self._rows[at]

    def _text(self, question: Question, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, question.prompt, ids, raw=question.raw)

    def _piece(self, row: _Row, ids: list[int], done: bool, view: View, at: int) -> Piece:
        question = row.question
        ended = done and ids[-1] in question.settings.stop_tokens
        text = self._text(question, ids[:-1] if ended else ids)
        stops = StopStrings(lambda _, some: self._text(question, some), question.stop_strings)
        cut = stops.begin(text)
        if cut is not None:  # the tokens up to the one that completes it
            ids, text = ids[: stops((at, row.choice), ids)], text[:cut]
        reason = "stop" if ended or cut is not None else "length" if done else None
        if reason is None:
            text = text[: len(text) - _undecided(text, question.stop_strings)]
        new = text[row.characters :]
        tokens = [self._token(question, view, at, t) for t in range(row.tokens, len(ids))]
        row.characters, row.tokens = max(row.characters, len(text)), max(row.tokens, len(ids))
        return Piece(row.choice, new, tokens, reason)

    def _token(self, question: Question, view: View, at: int, t: int) -> Token:
        token, logp = int(view.tokens[at, t]), float(view.logps[at, t])
        if view.tops is None or not question.settings.alternatives:
            return Token(token, logp)
        tops = zip(view.tops.tokens[at, t].tolist(), view.tops.logps[at, t].tolist(), strict=True)
        return Token(token, logp, tuple(tops))


def _undecided(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may still become another character, or a stop string."""
    incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
    begun = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(incomplete, max(begun, default=0))


def stream(talker: Talker, question: Question) -> Any:
    """Ask, and yield the pieces until all choices are finished; ends the question where the caller leaves early.

    Raises what `Talker.ask` raises, and what the question ended with. `deliver` is set here.
    """
    pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
    question = replace(question, deliver=pieces.put)
    talker.ask(question)
    left = question.choices
    try:
        while left:
            piece = pieces.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish_reason is not None
            yield piece
    finally:
        question.cancelled.set()
