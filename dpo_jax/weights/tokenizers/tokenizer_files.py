"""Tokenizer files of a model folder, written so that `transformers` 4 and 5 read the same ids from them.

* A tokenizer.json that was read and not changed is copied byte for byte.
* The class in tokenizer_config.json is the general one, which takes tokenizer.json as it stands; `LlamaTokenizer` of
  version 5 builds rules of its own, and version 4 does not know version 5's names.
* Further special tokens stand under `additional_special_tokens`: version 4 fails on the list that version 5 writes as
  `extra_special_tokens`.
* The chat template stands in chat_template.jinja and, for older readers, in tokenizer_config.json.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from dpo_jax.headers import read_json
from dpo_jax.weights.integrity.folder import write_json

JSON, CONFIG, PIECES = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
TOKENIZER_FILES = (
    JSON,
    CONFIG,
    PIECES,
    *"special_tokens_map.json added_tokens.json vocab.json merges.txt".split(),
    *"chat_template.jinja chat_template.json".split(),
)

# What `transformers` 5 says of the loading; BOS and EOS, which tokenizer.json puts there; code that is not run.
_NOT_SAVED = "backend is_local local_files_only add_bos_token add_eos_token added_tokens_decoder auto_map".split()


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of a model folder that `folder` does not have yet."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def save_tokenizer(tokenizer: Any, folder: Path, pieces: Path | None = None) -> None:
    """Write a `transformers` tokenizer, and the SentencePiece model `pieces`, if it is there, which other tools read.

    Its tokenizer.json is that of the folder it was loaded from where the two agree in everything that decides ids.
    """
    tokenizer.save_pretrained(folder)
    saved = read_json(folder / CONFIG)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        saved["chat_template"] = template
    cut = tokenizer.backend_tokenizer.pre_tokenizer
    if isinstance(cut, pre_tokenizers.ByteLevel):
        saved["add_prefix_space"] = cut.add_prefix_space  # version 4 sets the switch to what stands here, or to false
    write_json(folder / CONFIG, readable(saved))
    original = Path(tokenizer.name_or_path or "") / JSON
    if original.is_file() and _deciding(tokenizer.backend_tokenizer) == _deciding(Tokenizer.from_file(str(original))):
        shutil.copyfile(original, folder / JSON)
    if pieces is not None and pieces.is_file():
        shutil.copyfile(pieces, folder / PIECES)


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json of a folder with a tokenizer.json, as both versions read it."""
    saved = {k: v for k, v in config.items() if k not in _NOT_SAVED} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(saved.get("extra_special_tokens"), list):
        saved["additional_special_tokens"] = saved.pop("extra_special_tokens")
    return saved


def _deciding(backend: Tokenizer) -> dict[str, Any]:
    """What decides ids; the length to cut or to pad to is set by whoever called last."""
    return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
