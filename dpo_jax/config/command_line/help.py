"""What `dpo-jax WORD --help` says: examples, the options that most people need, then the others section by section."""

import ast
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from dpo_jax.config.command_line.examples import EXAMPLES, NEEDED
from dpo_jax.config.command_line.words import Command
from dpo_jax.config.names import option
from dpo_jax.config.options import ON_COMMAND_LINE, left_out
from dpo_jax.config.values import negated

FIRST = 10
"""So many options stand first, under their own head."""
_WIDEST = 118

VOICE = {
    "quiet": "Say nothing but results, warnings and faults: no notes and no progress.",
    "json": "Progress, notes and faults as JSON objects, one a line on stderr, for programs that read them.",
}
"""Options of every command that says something while it works."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """An option as help and completion show it."""

    name: str
    """Without dashes."""
    kind: Any
    """The type of its value; None: it takes none."""
    text: str
    """What it does."""
    default: str
    """In words; empty: it must be given."""
    section: str
    """Where it stands; empty: in none."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that it takes, where they can be counted."""
        kind = _without_none(self.kind)
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        return tuple(map(str, get_args(kind))) if kind is not bool and _is_literal(kind) else ()

    @property
    def spelled(self) -> str:
        """With its value, such as --data.max_length INT."""
        if self.kind is bool:
            return f"--{self.name}, --{negated(self.name)}"
        return f"--{self.name} {_value(self.kind)}"


def _is_literal(kind: Any) -> bool:
    return bool(get_args(kind)) and all(isinstance(one, str | int) for one in get_args(kind))


def _without_none(kind: Any) -> Any:
    kinds = [one for one in get_args(kind) if one is not NoneType]
    return kinds[0] if NoneType in get_args(kind) and len(kinds) == 1 else kind


def _value(kind: Any) -> str:
    """What stands for the value: STR, {a,b}, or [INT ...] for several."""
    kind = _without_none(kind)
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        one = " ".join(map(_value, get_args(inner))) if get_origin(inner) is tuple else _value(inner)
        return f"[{one} ...]"
    if _is_literal(kind):
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_args(kind):  # one text or several
        return "STR [STR ...]"
    return kind.__name__.upper()


@cache
def _texts(cls: type) -> Mapping[str, str]:
    """Field -> the docstring below it, of a class and those that it builds on."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if dataclasses.is_dataclass(one):
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
            assert isinstance(node, ast.ClassDef)
            for field, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    found[ast.unparse(field.target)] = inspect.cleandoc(ast.literal_eval(after.value))
    return found


def shown(cls: Any, default: Any = None) -> Iterator[Shown]:
    """Every option of a command, in the order of its class. `default`: an instance, where a CONFIG.py gives one."""
    unused = left_out(cls)
    return (one for name, one in _shown(cls, default) if name not in unused)


def _shown(cls: Any, default: Any, prefix: str = "") -> Iterator[tuple[str, Shown]]:
    """Each field, by its name."""
    kinds = get_type_hints(cls)
    # What every command that reads models has is needed least.
    for field in sorted(dataclasses.fields(cls), key=lambda one: one.name == "ignore_config_keys"):
        name = prefix + field.name
        given = cls.usual(field.name) if default is None else getattr(default, field.name)
        if dataclasses.is_dataclass(field.type):
            yield from _shown(field.type, given, f"{name}.")
            continue
        stands = field.metadata.get("value") if given is None else given
        said = "" if given in (ON_COMMAND_LINE, (ON_COMMAND_LINE,)) or given is dataclasses.MISSING else _said(stands)
        spelled = option(name).removeprefix("--")
        text = " ".join(_texts(cls)[field.name].split())
        yield name, Shown(spelled, kinds[field.name], text, said, prefix.rstrip("."))


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else "none" if value is None else f"{value}"


def help_text(usage: str, word: str, command: Command, default: Any = None) -> str:
    """The whole help of a command, as wide as the terminal.

    Args:
      usage: its first line, without "usage: ".
      word, command: the command.
      default: its options, of a CONFIG.py that was given.
    """
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    cls, options = command.options, list(shown(command.options, default))
    lines = [f"usage: {usage}", "", *_filled(inspect.getdoc(cls) or command.help, width)]
    if examples := EXAMPLES.get(word):
        lines += ["", "examples:", *(f"  dpo-jax {line}" for line in examples)]
    first = _first(word, options)
    if first:
        lines += ["", "what most runs need:", *_listed(first, width)]
    rest = [one for one in options if one not in first]
    sections = dict.fromkeys(one.section for one in rest)
    for section in sorted(sections, key=lambda name: name != ""):
        head = f"{section}: {_about(cls, section)}" if section else "other options:" if first else "options:"
        lines += ["", *_filled(head, width), *_listed([one for one in rest if one.section == section], width)]
    if not command.silent:
        said = [one for one in VOICE if one not in {other.name for other in options}]
        lines += ["", "how it talks:", *_listed([Shown(name, None, VOICE[name], "off", "") for name in said], width)]
    return "\n".join([*lines, "", "-h, --help shows this"])


def _first(word: str, options: Sequence[Shown]) -> list[Shown]:
    """What must be given, and then what is needed most; nothing where there are few options anyway."""
    if len(options) <= FIRST:
        return []
    by_name = {one.name: one for one in options}
    must = [one for one in options if not one.default]
    needed = [by_name[name] for name in (*NEEDED.get(word, ()), *NEEDED[""]) if name in by_name]
    return list(dict.fromkeys((*must, *needed)))[: max(FIRST, len(must))]


def _about(cls: Any, section: str) -> str:
    """The first line of a section's docstring."""
    for name in section.split("."):
        (cls,) = (field.type for field in dataclasses.fields(cls) if field.name == name)
    text = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return " ".join(text.split())


def _filled(text: str, width: int) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", text)
    filled = [textwrap.wrap(" ".join(one.split()), width, break_on_hyphens=False) for one in paragraphs]
    return [line for number, lines in enumerate(filled) for line in ([""] * (number > 0) + lines)]


def _listed(options: Sequence[Shown], width: int) -> list[str]:
    lines = []
    for one in options:
        spelled = f"--{one.name}" if one.kind is None else one.spelled
        behind = "(required)" if not one.default else "" if one.default == "none" else f"(default: {one.default})"
        text = f"{one.text} {behind}".rstrip()
        head = f"  {spelled}".replace(",", ", ") if len(spelled) > width - 4 else f"  {spelled}"
        lines += textwrap.wrap(head, width, subsequent_indent="      ", break_on_hyphens=False)
        lines += textwrap.wrap(text, width, initial_indent="      ", subsequent_indent="      ", break_on_hyphens=False)
    return lines
