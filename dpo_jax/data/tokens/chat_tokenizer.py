"""A tokenizer with its chat template: what begins and ends an answer, and what a text may not spell.

* An answer ends with exactly one terminator: the control token that the template writes after an answer, else EOS.
  What the template writes behind it is no part of the answer. An answer that spells the terminator itself does not get
  a second one.
* BOS stands at the very start, once, if the template writes it or the tokenizer adds it.
* Control tokens are the special tokens, and those that were added as ordinary ones and mark turns in the template.
* What the text of a conversation spells is text, never a control token, which would end the answer early or begin a
  turn that nobody wrote. Prompts and responses that a model reads are encoded so (`control_tokens.py`). Rows to learn
  from that spell one are left out: a model would learn to write text that other programs read as the token. (With
  `raw` prompts and rows are taken as they stand.)
"""

import json
from collections.abc import Sequence
from typing import Any, Self, cast

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import DataConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.tokens.control_tokens import ControlTokens
from dpo_jax.data.tokens.templates import RAW, ChatTemplate
from dpo_jax.errors import InputError

_PROBE = "Quicksilver"


class ChatTokenizer:
    """Renders and tokenises with one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        date: str | None = None,
        *,
        empty_system: bool = False,
    ):
        """Args: a fast tokenizer; a template name (see `templates.py`), or None for the tokenizer's own; the day;
        whether an empty system message stands before a conversation without one.

        Raises `InputError` when they do not fit together.
        """
        self._backend, self._added_bos = bare(tokenizer)
        bos = cast(int | None, tokenizer.bos_token_id)
        self._eos = cast(int | None, tokenizer.eos_token_id)
        written = ChatTemplate(tokenizer, template, date, empty_system=empty_system) if template != RAW else None
        self._template = written
        probe = self._probe()
        self._control = ControlTokens(self._backend, self._control_tokens(tokenizer, probe))
        self._closers = self._control.texts.keys() - {bos, cast(int | None, tokenizer.unk_token_id)} | {self._eos}
        self._tail, self._closing, self._terminator = self._turn_end(probe[probe.rindex(_PROBE) + len(_PROBE) :])
        # Some templates open every turn with the token that the tokenizer calls BOS; there it marks no start.
        written = self._backend.encode(probe, add_special_tokens=False).ids
        self.bos = bos if bos is not None and written[0] == bos and written.count(bos) == 1 else self._added_bos

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, data: DataConfig, **more: Any) -> Self:
        """As the options of a run say."""
        return cls(tokenizer, data.template, date=data.date, empty_system=data.empty_system, **more)

    @property
    def terminators(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's turn end, and EOS."""
        return tuple(dict.fromkeys(i for i in (self._terminator, self._eos) if i is not None))

    def _probe(self) -> str:
        """A short conversation under the template: what it writes around the answer `_PROBE`."""
        if self._template is None:
            return _PROBE
        problems: list[BadRow] = []
        for system in ((), (Message("system", "a"),)):  # some templates demand a system message
            try:
                text = self._template.render((*system, Message("user", "a"), Message("assistant", _PROBE)))
            except BadRow as problem:
                problems.append(problem)
                continue
            if _PROBE in text:
                return text
            raise InputError("the chat template does not write assistant messages; name one with --data.template")
        raise InputError(f"{problems[0]}; name another with --data.template") from problems[0]

    def _control_tokens(self, tokenizer: PreTrainedTokenizerBase, probe: str) -> dict[int, str]:
        """The special tokens, and of those that were added as ordinary ones the marks of turns: id -> text.

        Marks are what the template writes around a user's text, in front of an answer (the first token: a `<think>`
        behind it is the model's to write) and behind it. Words and spaces that were added are no marks.
        """
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= added.keys() & set(tokenizer.all_special_ids)
        if self._template is None or len(special) == len(added):
            return {i: added[i] for i in sorted(special)}
        user = Message("user", "a")
        written, alone = set[int](), ""
        for messages in ((Message("system", "a"), user), (user,)):
            try:
                alone = self._render(messages)
            except BadRow:  # a template may demand a system message, or refuse one
                continue
            written |= set(self._ids(alone))
        head, _, tail = probe.rpartition(_PROBE)
        opened = [i for i in self._ids(head.removeprefix(alone)) if i in added and i not in written]
        written |= {*opened[:1], *self._ids(tail)}
        marks = {i for i in added.keys() & written if not (added[i][0].isalnum() or added[i][-1].isalnum())}
        return {i: added[i] for i in sorted(special | {i for i in marks if added[i].strip()})}

    def _ids(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _turn_end(self, tail: str) -> tuple[str, str, int]:
        """(what the template writes after an answer, the part of it that counts, the id of the terminator)."""
        encoding = self._backend.encode(tail, add_special_tokens=False)
        for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self._control.texts:
                return tail, tail[:end], token
        if self._eos is None:
            raise InputError("neither the template nor the tokenizer has a token that ends an answer; add an EOS token")
        return tail, tail.rstrip(), self._eos

    def _render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        assert self._template is not None, "raw texts are not rendered"
        text = self._template.render(messages, generation=generation)
        for message in messages:
            spellings = (message.content.strip(), json.dumps(message.content)[1:-1].strip())
            if message.role == "tool" and not any(spelled in text for spelled in spellings):
                raise BadRow("the chat template does not write what a tool says", "name another with --data.template")
        return text

    def writes(self, name: str) -> bool:
        """Whether the template writes `name`, a key of messages beside role and content, or the column `tools`."""
        return self._template is not None and self._template.writes(name)

    # ---- prompts -----------------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Sequence[Message] | str, *, max_length: int | None = None) -> list[int]:
        """Ids to generate an answer from: messages under the template, or with `raw` a text.

        Of a prompt of more than `max_length` tokens, BOS and the end are kept. Raises `BadRow` where the template
        refuses the conversation, or a control token that it spells cannot be encoded as text.
        """
        if self._template is None:
            if not isinstance(prompt, str):
                raise InputError("--data.template raw takes prompts as text, not as messages")
            found = self._ids(prompt)
        else:
            found = self._rendered_ids((Message("user", prompt),) if isinstance(prompt, str) else prompt)
        ids = np.asarray(self._with_bos(found), np.int32)
        return end_of(ids, len(ids) if max_length is None else max_length, self.bos).tolist()

    def following_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of what stands between an answer, its terminator included, and the next one: `messages`, in which what is
        spelled is text, and the template's words around them.

        Raises `BadRow` where the template refuses them there, and `InputError` for raw texts, which have no turns.
        """
        if self._template is None:
            raise InputError("--data.template raw has no turns; name a chat template")
        hidden = self._control.hide([m.content for m in messages])
        turns = list(messages)
        if hidden is not None:
            turns = [m._replace(content=content) for m, content in zip(messages, hidden, strict=True)]
        opening = (Message("user", "a"), Message("assistant", _PROBE))
        try:
            before = self._render(opening)
        except BadRow:  # a template may demand a system message
            opening = (Message("system", "a"), *opening)
            before = self._render(opening)
        whole = self._render((*opening, *turns), generation=True)
        if not whole.startswith(before):
            detail = "what it writes of an answer depends on what follows; name another template"
            raise BadRow("the chat template renders an answer differently in front of another turn", detail)
        # Behind the terminator, so that a tokenizer that begins texts differently finds no beginning here.
        end = self._control.texts.get(self._terminator, "")
        text = end + self._tail[len(self._closing) :] + whole[len(before) :]
        return (self._ids(text) if hidden is None else self._control.encode(text))[1 if end else 0 :]

    def text_ids(self, text: str) -> list[int]:
        """Ids of a text without BOS or terminator; what spells a control token in it is text."""
        return self._control.text_ids(text)

    def _rendered_ids(self, messages: Sequence[Message], *, generation: bool = True) -> list[int]:
        """Ids of a rendered conversation; what the messages spell is text.

        Raises `BadRow` where what the template writes of them beside their contents spells a control token.
        """
        self._refuse_control((), self._beside(messages))
        hidden = self._control.hide([m.content for m in messages])
        if hidden is None:
            return self._ids(self._render(messages, generation=generation))
        marked = [m._replace(content=content) for m, content in zip(messages, hidden, strict=True)]
        return self._control.encode(self._render(marked, generation=generation))

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self._added_bos is None or ids[:1] == [self._added_bos] else [self._added_bos, *ids]

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _beside(self, messages: Sequence[Message]) -> list[str]:
        """What the template may write of `messages` beside their contents, as texts."""
        written = [value for message in messages for key, value in message.extra if self.writes(key)]
        written += [message.tools for message in messages[:1] if message.tools and self.writes("tools")]
        return [value if isinstance(value, str) else repr(value) for value in written]

    def _refuse_control(self, messages: Sequence[Message], answers: Sequence[str] = ()) -> None:
        """Raise `BadRow` where a text spells a control token."""
        for text in (*(m.content for m in messages), *answers, *self._beside(messages)):
            if found := self._control.find(text):
                detail = f"{found!r} would be read as such; spell it differently"
                raise BadRow("the text holds a control token of the tokenizer", detail, "noise")

    def _unclosed(self, answer: str) -> str:
        """`answer` without terminators that it spells itself at its end."""
        closings = [self._control.texts[i] for i in self.terminators if i in self._control.texts]
        while found := next((c for c in closings if answer.rstrip().endswith(c)), None):
            answer = answer.rstrip().removesuffix(found)
        return answer

    def _answer_in(
        self, whole: str, prompt: str, context: Sequence[Message], answer: str, thoughts: Sequence[str] = ()
    ) -> tuple[int, int]:
        """Characters of `whole`, the rendered `context` and then `answer`, between which the answer's own text stands.

        `thoughts` are texts that may stand in front of it, and belong to it. `prompt` is the rendered context with an
        opened answer. Raises `BadRow` where the template writes around this answer what it does not around others.
        """
        start, end = len(prompt), len(whole) - len(self._tail)
        if not whole.startswith(prompt):
            # The header for generation may be more than what stands before a given answer (an opened <think>, say).
            bare = self._render(context)
            start = whole.rfind(answer.strip(), len(bare), end) if whole.startswith(bare) else -1
            before = (whole.find(thought.strip(), len(bare), end) for thought in thoughts)
            start = min((at for at in before if at >= 0), default=start) if start >= 0 else start
        if start < 0 or not whole.endswith(self._tail):
            detail = "what it writes around the answer depends on the answer; name another template"
            raise BadRow("the chat template renders the prompt differently with an answer", detail)
        return start, end


def bare(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, int | None]:
    """(a copy without post-processor, which adds no BOS and trims no spaces off the offsets; the BOS that it added).

    (The ids are the same.) Raises `InputError` for a tokenizer that is not a fast one.
    """
    if not tokenizer.is_fast:
        raise InputError("the tokenizer has no fast form (tokenizer.json); save one with transformers")
    backend = Tokenizer.from_str(cast(Tokenizer, tokenizer.backend_tokenizer).to_str())
    backend.post_processor = None
    backend.no_padding()
    backend.no_truncation()
    bos = cast(int | None, tokenizer.bos_token_id)
    return backend, bos if bos is not None and tokenizer("a")["input_ids"][0] == bos else None


def first_token(encoding: Encoding, character: int, length: int) -> int:
    """Index of the first token that holds `character` or a later one, of a text of `length` characters.

    (A character may vanish in normalisation.)
    """
    for position in range(character, length):
        if (token := encoding.char_to_token(position)) is not None:
            return token
    return len(encoding.ids)


def behind(encoding: Encoding, character: int, length: int) -> int:
    """Index of the first token that holds nothing in front of `character`."""
    token = first_token(encoding, character, length)
    span = encoding.token_to_chars(token) if token < len(encoding.ids) else None
    return token + (span is not None and span[0] < character)


def end_of(prompt: np.ndarray, length: int, bos: int | None) -> np.ndarray:
    """The last `length` tokens of a prompt, its BOS among them if it has one."""
    if len(prompt) <= length:
        return prompt
    if length > 1 and prompt[0] == bos:
        return np.concatenate([prompt[:1], prompt[len(prompt) - length + 1 :]])
    return prompt[len(prompt) - length :]
