"""Options of the commands about rows of data: `inspect`, `prepare`."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.names import RunOptions
from dpo_jax.config.options import Count, Options, not_given, part, require, require_day
from dpo_jax.config.sections import DataConfig, FilesConfig


@dataclass(frozen=True, kw_only=True)
class RowsRun(ReadsModels, metaclass=RunOptions):
    """A command on rows that are made into tokens for a model."""

    model: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint of ours, or smollm2."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: a bad row stops the command. skip: leave them out, counted by reason."""
    data: DataConfig = part(DataConfig, without=("shuffle", "workers"))


@dataclass(frozen=True, kw_only=True)
class InspectRun(RowsRun):
    """Show the tokens of some rows, coloured by whether the loss counts them: `dpo-jax inspect`."""

    model: str
    """Where the tokenizer is: a Hugging Face folder, a hub id, a .gguf file, or smollm2."""
    kind: Literal["preferences", "dialogues"] = "preferences"
    """How the rows are read: as pairs, or as dialogues, as `dpo-jax sft` reads them."""
    train_on: Literal["answers", "last", "all"] | None = not_given("answers")
    """What the loss counts of a dialogue: every answer, the last answer, all tokens."""
    rows: Count = 3
    """How many rows to show."""
    first: Count = 1
    """Row number (from 1) to begin at."""
    table: bool = False
    """Instead of rows: comparisons, turns, and tokens of an example, a prompt and a response, by the column `source`
    (Llama 2's Table 6)."""
    data: DataConfig = part(DataConfig, without=("shuffle", "workers", "buckets"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.table:
            require(self.kind == "preferences", "--table counts comparisons: it has no effect with --kind dialogues")
            require((self.rows, self.first) == (3, 1), "--rows and --first have no effect with --table")
            usual = DataConfig()
            for name in ("template", "date", "max_length", "max_prompt_length"):
                same = getattr(self.data, name) == getattr(usual, name)
                require(same, f"--data.{name} has no effect with --table, which counts whole texts without a template")
        if self.kind == "preferences":
            require(self.train_on is None, "--train_on has no effect without --kind dialogues")
        else:
            unlimited = self.data.max_prompt_length is None
            require(unlimited, "--data.max_prompt_length has no effect with --kind dialogues")


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
    store_ids: bool = False
    """Store the ids, too, of preferences or text: a run with this tokenizer and template need not tokenise them."""
    template: str | None = not_given(needs="store_ids")
    """Template of these ids, as --data.template of the run. Not given: the tokenizer's own."""
    date: str | None = not_given(needs="store_ids")
    """Day (YYYY-MM-DD) of these ids, where the template writes one, as --data.date of the run. Not given: today."""
    separator: str | None = None
    """What stands between the documents of text files: blank_line, or a literal. Not given: a file is one document."""
    limit: Count | None = None
    """Use only the first rows of the source."""
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    """refuse: bad rows stop the command, and nothing is written. skip: they are left out, counted by reason."""
    processes: Count | None = None
    """Processes that work on the pieces of a large source; the result is the same. Not given: one for each core."""

    data: FilesConfig = part(FilesConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        split_shares(self.splits)
        require(not self.store_ids or self.tokenizer is not None, "--store_ids: name the checkpoint with --tokenizer")
        require_day(self.date, "--date")
