"""Chat templates: how messages become one text.

Named templates (`--data.template`), as Jinja:

  llama2   Touvron et al. 2023, as Meta's reference code spaces it: `[INST] user [/INST] answer </s>`, the system prompt
           inside the first user turn between <<SYS>> marks. One difference: BOS stands at the very start only.
  llama3   Dubey et al. 2024: header tokens around the role, `<|eot_id|>` after each message.
  zephyr   Tunstall et al. 2023: `<|user|>` and the like on a line of their own, EOS after each message.
  chatml   `<|im_start|>role`, the text, `<|im_end|>`.
  raw      no template: the prompt's text and the response's text as they stand, then EOS.

Without a name, the tokenizer's own `chat_template` is used. Both go through transformers' sandboxed Jinja.

`--data.empty_system` puts an empty system message before a conversation without one, as the alignment handbook did:
a few words in front of the template itself, so that a model that learnt so is spoken to so wherever it is loaded.

A template may write today's date (`strftime_now`, as Llama 3.1's "Today Date"). The day is then an option, since what a
run learns must not depend on when it is gone on with.
"""

import copy
import datetime
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.errors import InputError, first_line

RAW = "raw"
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of what an assistant thinks before it answers: keys of messages, of which a template reads one."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# The clock of transformers' templates, stopped: `dates` holds what each format that a template spells gives on the day.
# (Nothing but data may be handed to a template.) The newline at the end is not rendered.
_PINNED = """\
{%- macro strftime_now(format) -%}
{%- if format not in dates -%}
{{- raise_exception('the format of the date is not written out: ' + format) -}}
{%- endif -%}
{{- dates[format] -}}
{%- endmacro %}
"""

_TURNS = """\
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('after at most one system message, user and assistant must take turns') -}}
{%- endif -%}
{%- endfor -%}
"""

_EMPTY_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{%- set messages = [{'role': 'system', 'content': ''}] + messages -%}
{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    "llama2": _TURNS
    + """\
{%- for message in (messages[1:] if has_system else messages) -%}
{%- if message['role'] == 'user' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' if has_system and loop.first else '' -%}
{{- bos_token if loop.first -}}{{- turn_space + '[INST] ' + (system + message['content']) | trim + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] | trim + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
""",
    "llama3": """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt -}}
""",
    "zephyr": """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' -}}
{%- endfor -%}
{{- '<|assistant|>\n' if add_generation_prompt -}}
""",
    "chatml": """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
""",
}

# Tokens that each named template writes and that must be one token each, or generation could not stop at its turn end.
_NEEDED = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def today() -> str:
    """Today as YYYY-MM-DD, by the clock of this machine."""
    return datetime.date.today().isoformat()


def writes_date(tokenizer: PreTrainedTokenizerBase, template: str | None) -> bool:
    """Whether a template (by name, or the tokenizer's own) may write today's date."""
    return template != RAW and ChatTemplate(tokenizer, template).writes("strftime_now")


def check_date(tokenizer: PreTrainedTokenizerBase, template: str | None, date: str | None) -> None:
    """Raise `InputError` where a `date` was given, and the template does not write any."""
    if date is not None and not writes_date(tokenizer, template):
        raise InputError(f"the date {date} has no effect: the chat template does not write today's; leave it out")


class ChatTemplate:
    """Renders conversations for one tokenizer.

    Attributes:
      name: one of the named templates, or "tokenizer" for the tokenizer's own.
      jinja: the template's text, as a tokenizer carries it; None for the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None,
        date: str | None = None,
        *,
        empty_system: bool = False,
    ):
        """Args: the tokenizer; the name of a template except raw, or None for the tokenizer's own; what day it is;
        whether an empty system message stands before a conversation without one.

        Raises `InputError` for an unknown name, a missing template, a tokenizer without the tokens it needs, or a
        template that does not write an empty system message.
        """
        self._tokenizer = tokenizer
        self._day = datetime.datetime.fromisoformat(date or today())
        self.name = name or "tokenizer"
        choices = f"choose --data.template {', '.join((*TEMPLATES, RAW))}"
        if name is not None and name not in TEMPLATES:
            raise InputError(f"--data.template {name} is unknown; {choices}")
        if name is None and not tokenizer.chat_template:
            raise InputError(f"the tokenizer has no chat template, and none is named; {choices}")
        missing = [t for t in _NEEDED.get(self.name, ()) if t not in tokenizer.get_vocab()]
        if missing:
            raise InputError(
                f"--data.template {name} writes {' '.join(missing)}, which this tokenizer does not have; "
                "choose llama2, zephyr or raw"
            )
        if tokenizer.eos_token is None and self.name in ("llama2", "zephyr"):
            raise InputError(f"--data.template {name} ends each answer with EOS, which this tokenizer does not have")
        self.jinja = TEMPLATES.get(self.name)
        if name == "llama2":
            self.jinja = f"{{%- set turn_space = '{_turn_space(tokenizer)}' -%}}\n{self.jinja}"
        if empty_system and not self._text.startswith(_EMPTY_SYSTEM):
            self.jinja = self._with_empty_system()

    def _with_empty_system(self) -> str:
        plain = (Message("user", "a"),)
        try:
            differs = self.render((Message("system", ""), *plain)) != self.render(plain)
        except BadRow as problem:
            raise InputError(f"--data.empty_system: {problem}") from problem
        if not differs:
            raise InputError("--data.empty_system has no effect: the chat template writes no empty system message")
        text = _EMPTY_SYSTEM + self._text
        for seen in ("_text", "_words", "_dates", "marks_answers"):
            self.__dict__.pop(seen, None)
        return text

    def render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """The text of a conversation; `generation` opens the assistant's answer after it.

        Raises `BadRow` where the template refuses the conversation.
        """
        return self._render(messages, generation=generation)[0]

    def writes(self, name: str) -> bool:
        """Whether the template's text names `name`, a key of messages or `tools`; reasoning has several names."""
        names = REASONING if name in REASONING else (name,)
        return any(name in self._words for name in names)

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self._text))

    def _given(self, message: Message) -> dict[str, Any]:
        """A message as the template sees it; reasoning under each of its names, as in newer `transformers`."""
        given: dict[str, Any] = {key: value for key, value in message.extra if self.writes(key)}
        if reasoning := next((given[name] for name in REASONING if name in given), None):
            given |= dict.fromkeys(REASONING, reasoning)
        return {**given, "role": message.role, "content": message.content}

    @cached_property
    def _dates(self) -> dict[str, str]:
        """What each text of the template that may be a format gives on the day; empty where it writes no date."""
        if not self.writes("strftime_now"):
            return {}
        tokens = Environment(autoescape=False).lexer.tokenize(self._text)
        formats = {token.value for token in tokens if token.type == "string"}
        return {text: self._day.strftime(text) for text in formats if "%" in text}

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template says by `{% generation %}` which of its text the assistant speaks."""
        return _GENERATION.search(self._text) is not None

    def render_marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the (start, end) characters of what the template marks as the assistant's.

        Raises `BadRow` where the template refuses the conversation.
        """
        return self._render(messages, marked=True)

    def _render(
        self, messages: Sequence[Message], *, generation: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            rendered = render_jinja_template(
                [[self._given(m) for m in messages]],
                tools=messages[0].tools,
                chat_template=self._text if not self._dates else _PINNED + self._text,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=marked,
                dates=self._dates,
                **cast(dict[str, Any], self._tokenizer.special_tokens_map),
            )
        except TemplateError as error:
            roles = " ".join(m.role for m in messages[:12])
            detail = f"{first_line(error)}; the roles are {roles}"
            raise BadRow("the chat template refuses the conversation", detail) from error
        texts, spans = cast(tuple[list[str], list[list[tuple[int, int]]]], rendered)
        return texts[0], spans[0] if marked else []

    @cached_property
    def _text(self) -> str:
        try:
            return self._tokenizer.get_chat_template(self.jinja)
        except ValueError as error:  # transformers: several named templates and no default among them
            raise InputError(
                f"the tokenizer's chat template cannot be used ({first_line(error)}); name one with --data.template"
            ) from error


def with_template(
    tokenizer: PreTrainedTokenizerBase, template: str | None, *, empty_system: bool = False
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that carries the template of a run, for who loads its model; itself where that is its own,
    and for raw.
    """
    if template == RAW or (template is None and not empty_system):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if (text := ChatTemplate(tokenizer, template, empty_system=empty_system).jinja) is not None:
        tokenizer.chat_template = text
    return tokenizer


def _turn_space(tokenizer: PreTrainedTokenizerBase) -> str:
    """What must stand between a special token and `[INST]` for it to get the ids that Meta's code gives it.

    Meta encodes each turn alone, so SentencePiece puts its dummy space in front; a Hugging Face tokenizer does so after
    a special token only if it is a `legacy` one.
    """
    alone = tokenizer("[INST]", add_special_tokens=False)["input_ids"]
    for space in ("", " "):
        ids = tokenizer(f"{tokenizer.eos_token}{space}[INST]", add_special_tokens=False)["input_ids"]
        if ids == [tokenizer.eos_token_id, *alone]:
            return space
    return ""
