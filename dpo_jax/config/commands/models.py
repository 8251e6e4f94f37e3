"""Options of the commands that make models of models: `convert`, `average`, `extend-vocab`."""

import math
from dataclasses import dataclass
from typing import Literal

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.names import RunOptions
from dpo_jax.config.options import (
    Count,
    NotNegative,
    Several,
    Share,
    UpToOne,
    not_given,
    require,
)


@dataclass(frozen=True)
class ConvertRun(ReadsModels):
    """Rewrite a checkpoint in another format: `dpo-jax convert`."""

    from_: str
    """A Hugging Face folder, a hub id, a .gguf file, a checkpoint or run folder of ours, or smollm2."""
    to: str
    """Folder to write; it must be new or empty. With --format gguf a new file, which ends with .gguf."""
    format: Literal["huggingface", "orbax", "gguf"] = "huggingface"
    """huggingface: config.json, safetensors and tokenizer. orbax: a checkpoint of ours. gguf: one file with tokenizer
    and chat template, for llama.cpp."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
    """Dtype to write; q8_0 (8 bits, and a scale for each 32 numbers) with --format gguf. Not given: the source's;
    float32 where adapters are merged, of which less would lose most."""


@dataclass(frozen=True)
class AverageRun(ReadsModels):
    """The average of models of one shape and tokenizer, weight by weight: `dpo-jax average`.

    Llama 3 averages models of other seeds, data or learning rates at every stage; checkpoints of one run may be
    averaged too.
    """

    models: tuple[str, ...]
    """Two or more: Hugging Face folders, hub ids, .gguf files, checkpoints or run folders of ours."""
    to: str
    """Folder to write: a Hugging Face model, and average.json, which says of what it was made. New or empty."""
    weights: tuple[NotNegative, ...] = ()
    """One for each model; divided by their sum. Not given: all alike."""
    ema: Share | None = None
    """Exponential moving average over the models in their order: the average so far times this, and the next model
    times the rest."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype to write. Not given: that of the first model. The sum is float32 in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.models) > 1, "--models names one model, and that is no average; name two or more")
        twice = [name for name in self.models if self.models.count(name) > 1]
        require(not twice, f"--models names {''.join(twice[:1])} twice; give it a weight (--weights) instead")
        require(not self.weights or self.ema is None, "--weights and --ema exclude each other")
        given, wanted = len(self.weights), len(self.models)
        require(given in (0, wanted), f"--weights has {given} numbers for {wanted} models; give one for each")
        require(not given or any(self.weights), "--weights must be 0 or more, and not all 0")

    def shares(self) -> tuple[float, ...]:
        """The weight of each model; their sum is 1."""
        n = len(self.models)
        if self.ema is not None:  # a_0 = m_0, a_t = d a_(t-1) + (1 - d) m_t
            return tuple(self.ema ** (n - 1 - i) * (1 - self.ema if i else 1) for i in range(n))
        given = self.weights or (1.0,) * n
        power = math.frexp(max(given))[1]  # a power of two changes no digit, and 1e308 + 1e308 is past all floats
        scaled = [math.ldexp(weight, -power) for weight in given]
        return tuple(weight / math.fsum(scaled) for weight in scaled)


@dataclass(frozen=True)
class ExtendVocabRun(ReadsModels, metaclass=RunOptions):
    """More pieces for a Llama 2 tokenizer, and a model with rows for them: `dpo-jax extend-vocab`.

    The first step to a Chinese Llama 2. Give --data and --pieces to learn Chinese pieces from text, or --tokenizer to
    take a tokenizer that was extended already. Old ids do not change.
    """

    model: str
    """A Hugging Face folder, a hub id, or a .gguf file, with a SentencePiece tokenizer (Llama 2, Mistral)."""
    to: str
    """Folder to write; it must be new or empty."""
    data: tuple[str, ...] = ()
    """Text: .txt files, a text a line, or files of rows with a column `text` (JSONL, JSON, Parquet), plain or .gz. Nine
    tenths are learnt from, a tenth is kept to measure; with --tokenizer all are only measured."""
    pieces: Count | None = None
    """How many pieces to add."""
    character_coverage: UpToOne | None = not_given(0.9995)
    """The most frequent characters that make up this share of the Chinese text get a piece each."""
    max_sentence_length: Several | None = not_given(4192)
    """Longest run of Chinese characters to learn from; longer ones are cut."""
    tokenizer: str | None = None
    """An extended SentencePiece model (tokenizer.model), whose first pieces are those of the model's own."""
    base_tokenizer: str | None = None
    """The model's own SentencePiece model, where its folder has no tokenizer.model."""
    pad_to_multiple_of: Count = 1
    """Round the rows of the embedding up to a multiple of this, for example the size of --mesh.tensor or 64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None:
            require(bool(self.data) and self.pieces is not None, "give --data and --pieces, or --tokenizer FILE.model")
        else:
            for name in ("pieces", "character_coverage", "max_sentence_length"):
                require(getattr(self, name) is None, f"--{name} has no effect with --tokenizer, which has its pieces")
