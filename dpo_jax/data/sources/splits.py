"""Which files of a data set are which split: by the `configs` of its README.md, or else by their names.

The rules are those of the `datasets` library, as far as names tell:

* `configs` in the YAML head of README.md: configurations with `data_files` (patterns, by split) or a `data_dir`.
* `train_sft-00000-of-00003-a3ecf92756993583.parquet`: the split `train_sft`; a hash may follow the shard's number.
* `helpful-base/train.jsonl.gz`, `ultrafeedback_dev.json`: a name with train, validation (valid, dev, val) or
  test (testing, eval, evaluation) in it tells the split; so does the name of its folder.
* `CONFIG/SPLIT/0000.parquet`: the branch refs/convert/parquet, which the hub writes.
* Where no name says anything, all files are one split, `train`.

A part of a data set is named by its split, its configuration, CONFIG/SPLIT, FOLDER/SPLIT, a folder, or a file. `dev`
finds `validation`, and so on.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_jax.errors import InputError

SUFFIXES = tuple(
    f"{kind}{packed}"
    for kind in (".jsonl", ".json", ".ndjson", ".parquet", ".csv", ".tsv")
    for packed in ("", ".gz", ".zst")
)
"""Of files that are read."""

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_NO_DATA = re.compile(r"(^|.*/)(\..*|dataset_infos?\.json|dataset_dict\.json|state\.json)(/.*)?")
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}.*")
_NUMBER = re.compile(r"[-_.]?\d+$")


@dataclass(frozen=True)
class DataFile:
    """A file of a data set, `/` between its folders, and what it belongs to; "" where no name tells.

    `stem`: the path without the number of its shard and its suffixes.
    """

    path: str
    config: str
    folder: str
    split: str
    stem: str

    @property
    def place(self) -> str:
        """CONFIG/SPLIT or FOLDER/SPLIT, in words for a person."""
        return "/".join(part for part in (self.config or self.folder, self.split) if part)


def data_files(paths: Sequence[str], metadata: Mapping[str, Any]) -> list[DataFile]:
    """The files of a data set that hold rows, in order, once for each configuration that has them.

    Args: all its files; the YAML head of its README.md. Raises `InputError` where that head is not understood.
    """
    paths = sorted(path for path in paths if path.lower().endswith(SUFFIXES) and not _NO_DATA.fullmatch(path))
    configs = metadata.get("configs")
    if not configs:
        return _by_names(paths)
    found: list[DataFile] = []
    for config in configs if isinstance(configs, list) else [configs]:
        if not isinstance(config, dict):
            raise InputError("README.md: `configs` is no list of configurations")
        name = str(config.get("config_name", "default"))
        folder = str(config.get("data_dir") or "").strip("/.")
        inside = [path for path in paths if not folder or path.startswith(f"{folder}/")]
        for split, patterns in _patterns(config.get("data_files")):
            matches = [re.compile(_regex(f"{folder}/{pattern}" if folder else pattern)) for pattern in patterns]
            named = dict.fromkeys(path for match in matches for path in inside if match.fullmatch(path))
            found += [DataFile(path, name, "", split, _stem(path)) for path in named]
        if config.get("data_files") is None:
            found += [replace(file, config=name, folder="") for file in _by_names(inside)]
    return found


def in_folder(folder: Path) -> list[str]:
    """The paths of all files in a folder, from there."""
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def default_config(files: Sequence[DataFile], metadata: Mapping[str, Any]) -> str | None:
    """The configuration that is meant where none is named; None where there are several and none stands out."""
    names = list(dict.fromkeys(file.config for file in files))
    configs = metadata.get("configs")
    listed = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    chosen = [str(c.get("config_name", "default")) for c in listed if c.get("default") is True]
    return next(iter([*chosen, *(n for n in names if n == "default"), *(names if len(names) == 1 else [])]), None)


def choose(files: Sequence[DataFile], wanted: str | None, default: str | None, source: str) -> list[str]:
    """The paths of the files of one split.

    Args:
      files, default: see above.
      wanted: what stands behind the data set's name, see the module; None: its only split.
      source: the data set's name, for messages.

    Raises `InputError` where nothing, or more than one split, is meant.
    """
    own = [file for file in files if file.config == default] or list(files)
    if wanted is None:
        if default is None and len({file.config for file in files}) > 1:
            names = sorted({file.place for file in files})
            raise InputError(f"{source}: has several configurations ({_listed(names)}); name one: {source}:{names[0]}")
        return _one_split([file for file in own if file.split], source)
    wanted = wanted.strip("/")
    within, _, word = wanted.rpartition("/")
    inside = [file for file in files if within in (file.config, file.folder)] if within else own
    meant = _WORDS.get(word)
    rules = (
        [file for file in inside if file.split == word],
        [file for file in inside if meant is not None and _WORDS.get(file.split) == meant],
        [file for file in inside if meant is not None and _word(file.split) == meant],
        [file for file in files if file.split and wanted in (file.config, file.folder)],
    )
    if chosen := next(filter(None, rules), []):
        return _one_split(chosen, source)
    if named := [file.path for file in files if wanted in (file.path, file.stem)]:
        return list(dict.fromkeys(named))
    names = sorted({file.place or file.stem for file in files})
    raise InputError(f"{source}: has no split {wanted!r}; there are {_listed(names)}")


def _one_split(files: Sequence[DataFile], source: str) -> list[str]:
    splits = sorted({"/".join(filter(None, (file.config, file.split))) for file in files})
    if len(splits) > 1:
        raise InputError(f"{source}: has several splits ({_listed(splits)}); name one, e.g. {source}:{splits[-1]}")
    return list(dict.fromkeys(file.path for file in files))


def whole(paths: Sequence[str]) -> bool:
    """Whether the files, by their numbers (`-00000-of-00003`), are all of theirs; of a single one: that it has none."""
    numbers = [re.search(r"-(\d{5})-of-(\d{5})", path) for path in paths]
    if len(paths) == 1 and numbers[0] is None:
        return True
    return all(numbers) and {int(n[1]) for n in numbers if n} == set(range(int((numbers[0] or [0, 0, 0])[2])))


def _listed(names: Sequence[str]) -> str:
    return " ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


# ---------------------------------------------------------------- by README.md


def _patterns(given: Any) -> list[tuple[str, list[str]]]:
    """(split, patterns) of the value of `data_files`: a pattern, a list of them, by split or not."""
    if given is None:
        return []
    if isinstance(given, dict):
        return [(str(split), _strings(paths)) for split, paths in given.items()]
    if isinstance(given, list) and given and all(isinstance(entry, dict) for entry in given):
        return [(str(entry.get("split", "train")), _strings(entry.get("path"))) for entry in given]
    return [("train", _strings(given))]


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise InputError(f"README.md: `data_files` names {str(value)[:60]}, which is no path")
    return [each.removeprefix("./") for each in values]


def _regex(pattern: str) -> str:
    """A pattern of paths as a regular expression: `**/` any folders, `*` and `?` within a name, {a,b}, [ab]."""
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\{[^{}]*\}|\[[^\]]*\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(known.get(token) or _group(token) for token in tokens)


def _group(token: str) -> str:
    if token.startswith("{"):
        return "(?:" + "|".join(re.escape(part) for part in token[1:-1].split(",")) + ")"
    if token.startswith("[") and len(token) > 2:
        inside = token[1:-1].replace("\\", "\\\\").replace("^", "\\^")
        return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
    return re.escape(token)


# ---------------------------------------------------------------- by names


def _by_names(paths: Sequence[str]) -> list[DataFile]:
    files = [_named(path) for path in paths]
    if any(file.split for file in files):
        return files
    return [replace(file, split="train") for file in files]


def _named(path: str) -> DataFile:
    """A file whose split its name tells; "" where it tells none."""
    *folders, _ = path.split("/")
    stem = _stem(path)
    name = stem.rpartition("/")[2]
    shard = _SHARD.fullmatch(path.rpartition("/")[2])
    if shard is not None or _word(name):
        split = name
    elif folders and _word(folders[-1]):
        *folders, split = folders
    else:
        split = ""
    numbered = not name and split  # CONFIG/SPLIT/0000.parquet
    config = "/".join(folders) if numbered and folders != ["data"] else ""
    folder = "" if config or folders == ["data"] else "/".join(folders)
    return DataFile(path, config, folder, split, stem)


def _stem(path: str) -> str:
    """`data/train-00000-of-00004-0a1b.parquet` -> `data/train`: without the number of the shard and suffixes."""
    folder, slash, name = path.rpartition("/")
    shard = _SHARD.fullmatch(name)
    if shard is not None:
        return folder + slash + shard["split"]
    suffix = max((s for s in SUFFIXES if name.lower().endswith(s)), key=len)
    return folder + slash + _NUMBER.sub("", name[: -len(suffix)])


def _word(name: str) -> str | None:
    """The split that a word in `name` tells: `ultrafeedback_dev` -> validation."""
    found = (_WORDS.get(word) for word in re.split(r"[^a-z]+", name.lower()))
    return next(filter(None, found), None)
