"""`dpo-jax configs`: the recipes that come with the package, shown, or copied to be changed."""

import ast
from pathlib import Path

from dpo_jax.config import ConfigsRun, derive
from dpo_jax.config.command_line.config_text import config_text
from dpo_jax.config.command_line.shipped import find, shipped
from dpo_jax.errors import InputError
from dpo_jax.files.folder import write_atomically


def configs(run: ConfigsRun) -> None:
    """List the recipes, print one, or write it into a file. Raises `InputError` for a name or file that will not do."""
    if run.name is None:
        paths = shipped()
        width = max(map(len, paths), default=0)
        print("\n".join(f"{name:<{width}}  {_docstring(path).splitlines()[0]}" for name, path in paths.items()))
        return
    text = whole(run.name)
    if run.action == "show":
        print(text, end="")
        return
    target = Path(run.to or f"{run.name}.py")
    if target.exists():
        raise InputError(f"{target}: is there already; choose another --to")
    write_atomically(target, text.replace(f"configs/{run.name}.py", str(target)))
    print(f"{target}: written; change what you like, and give it as CONFIG.py")


def whole(name: str) -> str:
    """The recipe as the text of a CONFIG.py that derives from no other: it stays as it is when that one changes."""
    return config_text(derive(name), _docstring(find(name)).replace("\\", "\\\\"))


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
