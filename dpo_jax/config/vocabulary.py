"""Options of `dpo-jax extend-vocab`."""

from dataclasses import dataclass

from dpo_jax.config.bases import ReadsModels
from dpo_jax.config.checks import Count, Several, UpToOne, not_given, require
from dpo_jax.config.names import RunOptions


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
