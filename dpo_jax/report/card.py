"""The model card: the README.md beside an exported model, as Hugging Face's hub reads one.

It may be published with the model, so it names files and folders by their own names and never by where they lie, no
address of a server and no command of the user; options that say where and how a run was computed are left out.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_jax import __version__
from dpo_jax.config.command_line.words import COMMANDS
from dpo_jax.config.names import option
from dpo_jax.data.sources.hub import names_hub, read_metadata
from dpo_jax.errors import InputError, exists
from dpo_jax.files.folder import FREE, as_json, flatten
from dpo_jax.files.log import Row, read_metrics
from dpo_jax.headers import read_json
from dpo_jax.report import html
from dpo_jax.voice import say
from dpo_jax.weights.opened import RunCheckpoint, StoredModel

FILE, PICTURE = "README.md", "training.png"

PLACES = frozenset(
    "model reference teacher value_model data data.files eval_data mix_data sft_data reward safety_reward environment"
    " out from_ to models tokenizer base_tokenizer rejection.student rejection.pool_from gatt.instructions"
    " train.sample_prompts".split()
)
"""Options whose words are files, folders, addresses or commands: they are told by `public`, all others as typed."""
_DATA = ("data.files", "eval_data", "mix_data", "sft_data")
_KEPT = ("license", "license_name", "license_link", "language")
_SMOLLM2 = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0", "language": ["en"]}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"(?:~|\.{1,2})?(?:[\w.+@-]*/)+([^\s/,:=]*)")
_TOLD = (
    "loss",
    "nll_loss",
    "objective/scores",
    "objective/kl",
    "rewards/accuracies",
    "rewards/margins",
    "mean_token_accuracy",
)
"""Figures of the last step that a card names, beside all of the evaluation."""

_LIMITS = {
    "language": (
        "What it answers was learnt from the data named here and from its base, with their errors, gaps and biases;"
        " nobody has checked that its answers are true or harmless.",
        "It follows the chat template of its tokenizer; in another form it answers worse.",
        "Figures on held-out rows are of the same source as the training data, and tell little of other uses.",
    ),
    "text": (
        "What it writes was learnt from the data named here and from its base, with their errors, gaps and biases;"
        " nobody has checked that it is true or harmless.",
        "It goes on with texts as they stand: messages, questions and instructions are no form it was taught here.",
        "Figures on held-out rows are of the same source as the training data, and tell little of other uses.",
    ),
    "reward": (
        "It gives one number a response: higher is preferred. The numbers compare responses to one prompt; they are no"
        " probabilities, and mean nothing between prompts or models.",
        "It prefers what its annotators preferred, and can be misled by length and style; a policy that is trained"
        " against it will find out how.",
    ),
}


@dataclass(frozen=True)
class Basis:
    """What a model was made from: its name for readers, and the head of its card that goes on to ours."""

    name: str
    head: Mapping[str, Any]

    @classmethod
    def of(cls, place: StoredModel) -> "Basis":
        """Of a model on this machine: by the card beside it, or the hub's name."""
        if place.name == "smollm2":
            return cls("SmolLM2-135M-Instruct", _SMOLLM2)
        head: dict[str, Any] = {}
        for folder in (place.path, place.path / "model"):
            if (folder / FILE).is_file():
                found = _head(folder / FILE)
                head = {name: found[name] for name in _KEPT if isinstance(found.get(name), str | list)}
                # Else a path of the machine that it was made on, or a file that lies there alone.
                if isinstance(found.get("base_model"), str) and _HUB_ID.fullmatch(found["base_model"]):
                    head["base_model"] = found["base_model"]
                if not str(head.get("license_link", "https://")).startswith(("https://", "http://")):
                    del head["license_link"]
        if _HUB_ID.fullmatch(place.lasting.model):  # no place on this machine
            return cls(place.name, head | {"base_model": place.name})
        return cls(public(place.name), head)


def _head(card: Path) -> dict[str, Any]:
    """The head of a card that somebody else may have written; one that cannot be read is said, and empty."""
    try:
        return dict(read_metadata(card))
    except InputError as error:
        say(f"warning: {error}; the new card has nothing of it", "warning")
        return {}


def public(value: str) -> str:
    """A text of an option without where things lie: the last part of each path, no address, no command."""
    if value.startswith("run:"):
        return "run:COMMAND"
    if value.startswith(("regex:", "format:")):
        return value
    value = re.sub(r"https?://[^\s,]+", "URL", value)
    return ",".join(map(_last_part, value.split(",")))


def told(name: str, value: Any) -> Any:
    """The value of option `name` as it may be told to others."""
    if name not in PLACES:
        return value
    if isinstance(value, list):
        return [told(name, one) for one in value]
    return public(value) if isinstance(value, str) else value


def _short(fingerprint: str) -> str:
    """Sixteen digits: the first of a hash, or of the hash of several things that are told in words."""
    if not re.fullmatch("[0-9a-f]{16,}", fingerprint):
        fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()
    return fingerprint[:16]


def _last_part(place: str) -> str:
    if place.startswith("/") or exists(place):  # spaces and all
        return place.rstrip("/").rpartition("/")[2]
    name, colon, part = place.rpartition(":")
    if colon and exists(name.partition(":")[0]):  # a split or a weight behind a folder or a file
        return f"{_last_part(name)}:{part}"
    if name and re.fullmatch(r"[\d.]+", part):
        return f"{_last_part(name)}:{part}"
    if names_hub(place) and not place.startswith("."):
        return place
    scheme, colon, rest = place.partition(":")
    return f"{scheme}:{rest.rpartition('/')[2]}" if colon and rest[:1] in "/~." else _PATH.sub(r"\1", place)


def command_line(word: str, given: Mapping[str, Any]) -> str:
    """The command that was typed, with the options that differ from their defaults; `given`: see `RunFolder.given`."""
    words = ["dpo-jax", *word.split()]
    options: Any = COMMANDS[word].options
    known = {name: each for name in options.fields() if (each := options.usual(name)) is not dataclasses.MISSING}
    usual = flatten(json.loads(json.dumps(known, default=dataclasses.asdict)))
    for name, value in flatten(given).items():
        if name in usual and usual[name] == value and type(usual[name]) is type(value):
            continue
        if name.startswith(FREE) and name != "out":
            continue
        words.append(option(name))
        listed = value if isinstance(value, list) else [value]
        if isinstance(value, bool):
            words.append(str(value).lower())
        else:
            words += [str(told(name, one)) for one in _flat(listed)]
    return shlex.join(words)


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else [value]


@dataclass(frozen=True)
class Card:
    """What a card is made of.

    Attributes:
      name: of the model, as its head line.
      what: it is, in a sentence.
      word, command: the command's word and the whole line that made it.
      basis: what it was made from.
      data: options -> the names of the data sets.
      fingerprints: of the base and the data, by what they are of.
      rows: of metrics.jsonl; none of a model that was only converted.
      reward: whether it is a reward model.
      chat: whether it answers messages by a template, rather than going on with texts.
      adapter: whether only adapters are told of, in PEFT's layout.
    """

    name: str
    what: str
    word: str
    command: str
    basis: Basis
    data: Mapping[str, str]
    fingerprints: Mapping[str, str]
    rows: Sequence[Row]
    reward: bool = False
    chat: bool = True
    adapter: bool = False

    def head(self) -> dict[str, Any]:
        """The YAML head."""
        head: dict[str, Any] = {"library_name": "peft" if self.adapter else "transformers"}
        head["pipeline_tag"] = "text-classification" if self.reward else "text-generation"
        head |= {"license": "unknown"} | dict(self.basis.head)
        hub = [re.split("[@:]", name)[0] for names in self.data.values() for name in names.split(",")]
        if sets := [name for name in dict.fromkeys(hub) if _HUB_ID.fullmatch(name)]:
            head["datasets"] = sets
        return head | {"tags": ["dpo_jax", self.word.replace("--", "").replace(" ", "-")]}

    def files(self) -> dict[str, bytes]:
        """The card and its picture, by name."""
        plots = html.training_section(self.rows).plots[:4] if len(self.rows) > 1 else ()
        files = {PICTURE: html.png_of(plots)} if plots else {}
        return files | {FILE: self.text(picture=bool(plots)).encode()}

    def text(self, *, picture: bool) -> str:
        """The whole card."""
        head = yaml.safe_dump(self.head(), sort_keys=False, allow_unicode=True)
        parts = [f"---\n{head}---\n\n# {self.name}\n\n{self.what}"]
        licence = self.head()["license"]
        parts.append(f"## Base\n\n{self.basis.name}{self._hash('the starting model')}.")
        if self.data:
            cells = [f"| `{name}` | {names} |" for name, names in self.data.items()]
            parts.append("## Data\n\n| option | data |\n|---|---|\n" + "\n".join(cells))
            rest = {name: one for name, one in self.fingerprints.items() if name != "the starting model"}
            if rest:
                parts[-1] += "\n\n" + "\n".join(
                    f"Fingerprint of {name}: `{_short(one)}`." for name, one in rest.items()
                )
        parts.append(f"## How it was made\n\n```bash\n{self.command}\n```")
        parts[-1] += f"\n\nWith dpo_jax {__version__}; files and folders are told by their last names, and all other"
        parts[-1] += " options have their defaults."
        if self.rows:
            parts.append(self._results())
        if picture:
            parts.append(f"![training curves]({PICTURE})")
        parts.append("## Use\n\n" + _use(reward=self.reward, chat=self.chat, adapter=self.adapter))
        kind = "reward" if self.reward else "language" if self.chat else "text"
        limits = "\n".join(f"* {line}" for line in _LIMITS[kind])
        parts.append(f"## Limits\n\n{limits}")
        known = f"`{licence}`, that of its base."
        if licence == "unknown":
            known = "Not known: no card lay beside the base. Write it into the head of this file before you pass it on."
        parts.append(f"## Licence\n\n{known} The licences of the data apply too.")
        return "\n\n".join(parts) + "\n"

    def _hash(self, name: str) -> str:
        return f" (fingerprint of its weights `{_short(self.fingerprints[name])}`)" if name in self.fingerprints else ""

    def _results(self) -> str:
        last = self.rows[-1]["step"]
        names = [name for row in self.rows for name in row if name in _TOLD or name.startswith("eval_")]
        lines = []
        for name in dict.fromkeys(names):
            having = [row for row in self.rows if name in row]
            first, end = (f"{row[name]:.4g} (step {row['step']})" for row in (having[0], having[-1]))
            lines.append(f"| {name} | {first} | {end} |")
        table = "| figure | first | last |\n|---|---|---|\n" + "\n".join(lines)
        held = "; `eval_` figures are of held-out rows" if any(name.startswith("eval_") for name in names) else ""
        return f"## Results\n\n{last} step{'s' * (last != 1)}{held}.\n\n{table}"


def _use(*, reward: bool, chat: bool, adapter: bool) -> str:
    """Code that loads the model, as a block of Python."""
    kind = "SequenceClassification" if reward else "CausalLM"
    library, model = ("peft", "AutoPeftModelFor") if adapter else ("transformers", "AutoModelFor")
    lines = [f"from {library} import {model}{kind}", "from transformers import AutoTokenizer", ""]
    if not adapter:
        lines = [f"from transformers import {model}{kind}, AutoTokenizer", ""]
    lines += [f'model = {model}{kind}.from_pretrained("FOLDER")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")']
    if chat and not reward:
        asked = 'messages, add_generation_prompt=True, return_tensors="pt", return_dict=True'
        lines += ['messages = [{"role": "user", "content": "Hello!"}]']
        lines += [f"inputs = tokenizer.apply_chat_template({asked})"]
    elif not reward:
        lines += ['inputs = tokenizer("Once upon a time", return_tensors="pt")']
    else:
        lines += ['inputs = tokenizer("TEXT THROUGH THE CHAT TEMPLATE", return_tensors="pt")']
        lines += ["print(model(**inputs).logits)"]
    if not reward:
        lines += ["written = model.generate(**inputs, max_new_tokens=128)[0]"]
        lines += ['print(tokenizer.decode(written[inputs["input_ids"].shape[1] :], skip_special_tokens=True))']
    code = "\n".join(lines)
    return f"```python\n{code}\n```"


def of_run(
    word: str,
    resolved: Mapping[str, Any],
    given: Mapping[str, Any],
    basis: Basis,
    *,
    steps: str,
    fingerprints: Mapping[str, str],
    rows: Sequence[Row],
    reward: bool = False,
) -> Card:
    """The card of a run's model.

    `resolved`, `given`: its options as `as_json` has them, nested; `basis`: what it began with; `steps`: how many, in
    words; the rest: see `Card`.
    """
    flat = flatten(resolved)
    data = {option(name): public(flat[name]) for name in _DATA if isinstance(flat.get(name), str)}
    what = f"{'A reward model' if reward else 'A language model'}: {basis.name} after `dpo-jax {word}`{steps}."
    chat = flat.get("data.kind") != "text" and flat.get("data.template") != "raw"
    name = Path(flat["out"]).absolute().name
    return Card(name, what, word, command_line(word, given), basis, data, fingerprints, rows, reward, chat)


def of_conversion(place: StoredModel, config: Any) -> dict[str, bytes]:
    """What lies beside a converted model, by name: the card that lay beside the model if it is one of ours, with what
    was done to it; else a short one."""
    target = Path(config.to).absolute()
    command = command_line("convert", as_json(config))
    done = f"\n## Converted\n\n```bash\n{command}\n```\n"
    if isinstance(place, RunCheckpoint):
        files = _of_checkpoint(place).files()
        files[FILE] += done.encode()
        return _beside(files, target, config.format)
    for folder in (place.path, place.path / "model"):
        card = folder / FILE
        if card.is_file() and "dpo_jax" in (_head(card).get("tags") or ()):
            files = {FILE: card.read_bytes() + done.encode()}
            picture = folder / PICTURE
            files |= {PICTURE: picture.read_bytes()} if picture.is_file() else {}
            return _beside(files, target, config.format)
    basis, chat = Basis.of(place), False
    with contextlib.suppress(InputError):  # a folder without a tokenizer
        chat = bool(getattr(place.tokenizer(), "chat_template", None))
    reward = bool(place.architecture.num_labels)
    what = f"{basis.name}, converted to {config.format}; its weights mean what they meant."
    card = Card(target.name, what, "convert", command, basis, {}, {}, (), reward, chat)
    return _beside(card.files(), target, config.format)


def _of_checkpoint(place: RunCheckpoint) -> Card:
    """The card of a run's model as it was at one of its checkpoints, from what the run folder says."""
    begun, step = read_json(place.folder / "run.json"), int(place.path.name)
    resolved = read_json(place.folder / "config.json")
    rows = [row for row in read_metrics(place.folder / "metrics.jsonl") if row["step"] <= step]
    try:
        basis = Basis.of(place.beneath)
    except InputError:  # it lay elsewhere then
        basis = Basis(public(str(resolved.get("model"))), {})
    told = {"steps": f", at step {step}", "fingerprints": {}, "rows": rows, "reward": place.adds_score}
    return of_run(begun["command"], resolved, begun["given"], basis, **told)


def _beside(files: dict[str, bytes], target: Path, to: str) -> dict[str, bytes]:
    """The files as they are to lie beside a model of the format `to`, whatever format they told of.

    Those beside a GGUF file are called after it.
    """
    text = files[FILE].decode()
    library = "" if to == "gguf" else "library_name: transformers\n"
    text = re.sub(r"^library_name: .*\n", library, text, count=1, flags=re.MULTILINE)
    reward, chat = "text-classification" in text, "apply_chat_template" in text
    use = _use(reward=reward, chat=chat, adapter=False)
    if to == "gguf":
        use = f"```bash\nllama-cli -m {shlex.quote(target.name)}\n```"
    pattern = re.compile(r"^## Use\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
    text = pattern.sub(lambda _: f"## Use\n\n{use}\n\n", text, count=1)
    if to != "gguf":
        return files | {FILE: text.encode()}
    named = {name: target.with_suffix(f".{name}").name for name in files}
    text = text.replace(f"]({PICTURE})", f"]({named.get(PICTURE, PICTURE)})")
    return {named[name]: text.encode() if name == FILE else content for name, content in files.items()}
