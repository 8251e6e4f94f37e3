"""Options as the text of a CONFIG.py that gives them back."""

from typing import Any

from dpo_jax.config.options import ON_COMMAND_LINE, Options


def config_text(options: Any, docstring: str) -> str:
    """A CONFIG.py whose `config` equals `options` (a dataclass of `dpo_jax.config`); defaults are left out."""
    names: set[str] = set()
    body = _expression(options, names, indent="")
    imported = "".join(f"    {name},\n" for name in sorted(names, key=lambda name: (not name.isupper(), name)))
    return f'"""{docstring.strip()}\n"""\n\nfrom dpo_jax.config import (\n{imported})\n\nconfig = {body}\n'


def _expression(value: Any, names: set[str], indent: str) -> str:
    if value == ON_COMMAND_LINE and isinstance(value, str):
        names.add("ON_COMMAND_LINE")
        return "ON_COMMAND_LINE"
    if not isinstance(value, Options):
        return repr(value)
    names.add(type(value).__name__)
    inner = indent + "    "
    given = [
        f"{inner}{name}={_expression(getattr(value, name), names, inner)},\n"
        for name in value.fields()
        if value.given(name)
    ]
    inside = "".join(["\n", *given, indent]) if given else ""
    return f"{type(value).__name__}({inside})"
