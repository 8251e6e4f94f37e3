"""Options of `dpo-jax prepare`."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.checks import Count, Options, part, require
from dpo_jax.config.names import RunOptions
from dpo_jax.config.sections import FilesConfig


def split_shares(text: str) -> dict[str, float]:
    """`train=0.98,test=0.02` -> name -> share, in order. Raises `InputError`."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z]\w*)\s*=\s*(\d+(?:\.\d*)?|\.\d+)\s*", item, re.ASCII)
        if match is None:
            require(False, f"--splits {text}: {item.strip()!r} is no NAME=SHARE; write train=0.98,test=0.02")
            continue
        name, share = match[1], float(match[2])
        require(name not in shares, f"--splits {text}: {name} is there twice")
        require(share > 0, f"--splits {text}: the share of {name} must be positive")
        shares[name] = share
    total = math.fsum(shares.values())
    require(abs(total - 1) < 1e-6, f"--splits {text}: the shares add up to {total:g}, and should to 1")
    require(len(shares) <= 16, f"--splits {text}: at most 16 splits")
    return shares


@dataclass(frozen=True, kw_only=True)
class PrepareRun(Options, metaclass=RunOptions):
    """Write rows as a TFDS data set (array_record), split, validated and counted: `dpo-jax prepare`.

    --data holds preferences, dialogues or documents. What is written is read as `--data tfds:DIR` (the split train) or
    `--data tfds:DIR:test`.
    """

    to: str
    """Folder to write, new or empty; or one in a bucket (gs://...). The data set stands in 1.0.0/ in it."""
    kind: Literal["auto", "preferences", "dialogues", "text"] = "auto"
    """What the rows are. auto: as the columns of the first rows say."""
    splits: str = "train=1"
    """NAME=SHARE, separated by commas, such as train=0.98,test=0.02. A hash of the prompt decides a row's split."""
    tokenizer: str | None = None
    """Also report lengths in tokens, with the tokenizer of this checkpoint (Hugging Face folder, hub id, .gguf)."""
    separator: str | None = None
    """What stands between the documents of text files: blank_line, or a literal. Not given: a file is one document."""
    limit: Count | None = None
    """Use only the first rows of the source."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: bad rows stop the command, and nothing is written. skip: they are left out, counted by reason."""

    data: FilesConfig = part(FilesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        split_shares(self.splits)
