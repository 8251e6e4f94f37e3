"""What a judge is asked: prompts of this project, in English and Chinese, or those of a file, read as they are.

Those of this project (`prompts/en.json`, `prompts/zh.json`) were written for it: figures that they give compare with
no published ones. `--prompts FILE` takes FastChat's judge_prompts.jsonl (lm-sys/FastChat, fastchat/llm_judge/data) and
UltraFeedback's templates (OpenBMB/UltraFeedback, src/data_annotation) as an object of name -> text. The version of a
prompt is a hash of all of it, and enters the key under which replies are kept.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from dpo_jax.data.rows.messages import Message
from dpo_jax.errors import InputError

Ask = Literal["rating", "expected", "pair", "list", "checklist"]
_FASTCHAT = {"single": "rating", "pairwise": "pair"}
_PLACE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt with places for texts.

    Attributes:
      name: for tables: "ours (en)", or the name in its file.
      ask: what is read from the reply.
      system, template: texts; {question} and the like are filled in.
      low, high: the scale.
      published: whether it is somebody's published prompt, unchanged.
      roles: how a dialogue names who speaks; `text`: what one of a list is called.
    """

    name: str
    ask: Ask
    system: str
    template: str
    low: float
    high: float
    published: bool
    roles: tuple[tuple[str, str], ...] = (("system", "System"), ("user", "User"), ("assistant", "Assistant"))
    text: str = "Text"

    @property
    def version(self) -> str:
        """Changes when anything of it does."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def places(self) -> set[str]:
        """Names of what is filled in."""
        return set(_PLACE.findall(self.template))

    def question(self, messages: Sequence[Message]) -> str:
        """What was asked: the one message as it stands, or the dialogue with who speaks."""
        if len(messages) == 1:
            return messages[0].content
        roles = dict(self.roles)
        return "\n\n".join(f"{roles.get(m.role, m.role)}: {m.content}" for m in messages)

    def messages(self, values: Mapping[str, str]) -> tuple[dict[str, str], ...]:
        """The prompt with `values` in its places; what a value spells is text. Raises `KeyError` for a missing one."""
        text = _PLACE.sub(lambda place: values[place[1]], self.template)
        system = ({"role": "system", "content": self.system},) if self.system else ()
        return (*system, {"role": "user", "content": text})


def read_ours(file: str) -> Any:
    """What a JSON file of this project's prompts holds."""
    return json.loads(resources.files("dpo_jax.judge.asked").joinpath("prompts", file).read_text(encoding="utf-8"))


def our_prompt(ask: Ask, language: str, high: float | None = None) -> JudgePrompt:
    """This project's prompt for `ask`; `high`: another end of its scale."""
    found = read_ours(f"{language}.json")
    one, roles = found[ask], tuple(found["roles"].items())
    return JudgePrompt(
        f"ours ({language}, version {found['version']})",
        ask,
        one["system"],
        one["template"],
        one["low"],
        one["high"] if high is None else high,
        published=False,
        roles=roles,
        text=found["text"],
    )


def read_prompts(file: str) -> dict[str, JudgePrompt]:
    """The prompts of a file of FastChat's or UltraFeedback's, by name. Raises `InputError` where it is none."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return {row["name"]: _fastchat(row) for row in rows}
        return _ultrafeedback(json.loads(text))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"--prompts {file}: not readable as FastChat's judge prompts (.jsonl) or UltraFeedback's templates (.json):"
            f" {type(error).__name__}: {error}"
        ) from error


def read_prompt(file: str, name: str) -> JudgePrompt:
    """The prompt `name` of such a file. Raises `InputError`: no such file, or name."""
    found = read_prompts(file)
    if name not in found:
        raise InputError(f"--prompt_name {name}: {file} holds {', '.join(found)}; choose one of them")
    return found[name]


def _fastchat(row: Mapping[str, Any]) -> JudgePrompt:
    ask, system, template = _FASTCHAT[row["type"]], row["system_prompt"], row["prompt_template"]
    low, high = (1, 10) if ask == "rating" else (0, 1)
    return JudgePrompt(row["name"], ask, system, template, low, high, published=True)  # pyright: ignore


def _ultrafeedback(templates: Mapping[str, str]) -> dict[str, JudgePrompt]:
    found = {}
    for name, text in templates.items():
        if name == "system_prompt":
            continue
        if not isinstance(text, str):
            raise TypeError(f"{name} is no text")
        critique = "{completion}" in text
        system = "" if critique else templates["system_prompt"]
        low, high = (1, 10) if critique else (1, 5)
        found[name] = JudgePrompt(name, "rating" if critique else "list", system, text, low, high, published=True)
    return found
