"""What `dpo-jax sft` learns from: dialogues, packed into windows or one in each; or documents of plain text
(`--data.kind text`) of one source or a mixture, cut into full windows.
"""

from dataclasses import dataclass

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import SFTRun
from dpo_jax.data.sets.dataset import check_context
from dpo_jax.data.sets.documents import DocumentDataset, is_text, load_documents
from dpo_jax.data.sets.loader import TokenLoader, eval_windows
from dpo_jax.data.sets.segment_views import SegmentViews
from dpo_jax.data.sets.sequences import SequenceDataset, load_dialogues, split_sequences
from dpo_jax.data.sets.text_windows import EvalWindows, TextLoader, parse_sources
from dpo_jax.errors import InputError
from dpo_jax.mesh import own_rows
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.report import html
from dpo_jax.report.datasets import dialogues_section, documents_section
from dpo_jax.train.row_data import read_alike, read_both, row_options, units_of
from dpo_jax.types import TokenBatch


@dataclass(frozen=True)
class Dialogues:
    """The dialogues of `--data` or `--eval_data`.

    Attributes:
      config: the options of the run.
      data: what was read.
    """

    config: SFTRun
    data: SequenceDataset

    @classmethod
    def load_both(
        cls, config: SFTRun, tokenizer: PreTrainedTokenizerBase, architecture: LlamaConfig
    ) -> "tuple[Dialogues, Dialogues | None]":
        """Those of `--data`, and what is held out: `--holdout` of each of its sources, or `--eval_data`.

        Raises `InputError`, also for dialogues longer than the model's context.
        """

        def read(source: str) -> SequenceDataset:
            data = load_dialogues(
                source,
                tokenizer,
                config.data,
                train_on=config.data.train_on,
                vocab_size=architecture.vocab_size,
                on_bad_rows=config.on_bad_rows,
            )
            check_context(data.source, data.row_numbers, data.lengths, architecture, config.data.max_length)
            return data

        data, held = read_both(config, read, SequenceDataset.joined, split_sequences)
        return cls(config, data), None if held is None else cls(config, held)

    @property
    def fingerprint(self) -> str:
        """Of all tokens and targets."""
        return self.data.fingerprint

    @property
    def terminators(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.data.terminators

    @property
    def first(self) -> SequenceDataset:
        """The sequences whose prompts are answered during training."""
        return self.data

    @property
    def packed(self) -> bool:
        """Whether several sequences share a window."""
        return self.config.data.packing

    @property
    def _window(self) -> int | None:
        """Tokens of a packed window; None where each dialogue has a window of its own."""
        return self.config.data.max_length if self.packed else None

    def summary(self) -> str:
        """For the log."""
        return self.data.summary()

    def loader(self, *, steps: int | None, epochs: float | None, mesh: Mesh | None = None) -> TokenLoader:
        """The windows of the whole run, for the devices of `mesh`."""
        return TokenLoader(
            self.data,
            window=self._window,
            buckets=self.config.data.buckets,
            views=units_of(mesh, self.config.train.accumulate, packed=self.packed),
            **row_options(self.config, mesh, steps=steps, epochs=epochs),
        )

    def eval_batches(self, batch_size: int, mesh: Mesh) -> list[TokenBatch]:
        """Every dialogue once."""
        buckets = self.config.data.buckets
        windows = eval_windows(self.data, batch_size=batch_size, window=self._window, buckets=buckets)
        batches, units = [batch for _, batch in windows], units_of(mesh, 1, packed=self.packed)
        if units is None:
            return batches
        views = SegmentViews.of_batches(batches, units)
        return [views.seen(batch) for batch in batches]

    def sections(self, title: str, *, steps: int | None = None) -> list[html.Section]:
        """What was read, what was left out and why, how long the sequences are and how much of them the loss counts."""
        taken = [] if steps is None else self.loader(steps=steps, epochs=None).told()
        return [dialogues_section(title, self.data, taken)]


@dataclass(frozen=True)
class Documents:
    """The documents of `--data` or `--eval_data`.

    Attributes:
      config: the options of the run.
      sources: at least one.
      weights: of the sources, None where none was given.
    """

    config: SFTRun
    sources: tuple[DocumentDataset, ...]
    weights: tuple[float | None, ...]

    @classmethod
    def load(
        cls, config: SFTRun, words: str, tokenizer: PreTrainedTokenizerBase, architecture: LlamaConfig
    ) -> "Documents":
        """Read and tokenise all sources that `words` names (see `text_windows.parse_sources`).

        Raises `InputError` for what cannot be read, and for windows longer than the model's context.
        """
        data = config.data
        if data.max_length > architecture.max_position:
            raise InputError(
                f"--data.max_length {data.max_length}: the model's context is {architecture.max_position}; windows can"
                f" be no longer, set --data.max_length to at most {architecture.max_position}"
            )
        given = [config.data.files] if config.eval_data is None else [config.data.files, config.eval_data]
        if data.separator is not None and not any(is_text(name) for each in given for name, _ in parse_sources(each)):
            raise InputError(f"--data.separator has no effect: {words} holds rows, and each is one document")
        named = parse_sources(words)

        def read(name: str) -> DocumentDataset:
            return load_documents(
                name,
                tokenizer,
                vocab_size=architecture.vocab_size,
                separator=data.separator if is_text(name) else None,
                limit=data.limit,
                columns=data.columns,
                on_bad_rows=config.on_bad_rows,
            )

        sources = tuple(read_alike(name, read) for name, _ in named)
        return cls(config, sources, tuple(weight for _, weight in named))

    @classmethod
    def load_both(
        cls, config: SFTRun, tokenizer: PreTrainedTokenizerBase, architecture: LlamaConfig
    ) -> "tuple[Documents, Documents | None]":
        """The documents of `--data`, and those of `--eval_data`."""
        data = cls.load(config, config.data.files, tokenizer, architecture)
        held = None if config.eval_data is None else cls.load(config, config.eval_data, tokenizer, architecture)
        return data, held

    @property
    def fingerprint(self) -> str:
        """Of all documents; what is made of them, the position of the loader tells."""
        return " ".join(source.fingerprint for source in self.sources)

    @property
    def terminators(self) -> tuple[int, ...]:
        """Ids that end an answer: texts hold none."""
        return ()

    @property
    def first(self) -> DocumentDataset:
        """The source whose documents are gone on with during training."""
        return self.sources[0]

    @property
    def packed(self) -> bool:
        """Whether a window holds several sequences."""
        return self.config.data.documents != "joined"

    def summary(self) -> str:
        """For the log."""
        return "\n".join(source.summary() for source in self.sources)

    def loader(self, *, steps: int | None, epochs: float | None, mesh: Mesh | None = None) -> TextLoader:
        """The windows of the whole run, for the devices of `mesh`."""
        data = self.config.data
        return TextLoader(
            self.sources,
            self.weights,
            length=data.max_length,
            documents=data.settled.documents,
            views=units_of(mesh, self.config.train.accumulate, packed=self.packed),
            **row_options(self.config, mesh, steps=steps, epochs=epochs),
        )

    def eval_batches(self, batch_size: int, mesh: Mesh) -> EvalWindows:
        """Every token once. Raises `InputError` where the sources have weights, which would change nothing."""
        if self.weights[0] is not None:
            raise InputError("the weights in --eval_data have no effect: every token is evaluated once; leave them out")
        data = self.config.data
        units = units_of(mesh, 1, packed=self.packed)
        own = own_rows(mesh, batch_size)
        return EvalWindows(self.sources, data.max_length, batch_size, data.settled.documents, units, own)

    def sections(self, title: str, *, steps: int | None = None) -> list[html.Section]:
        """What was read and left out, and with `steps` how often a run of so many goes through each source."""
        passes = None if steps is None else self.loader(steps=steps, epochs=None).passes(steps)
        often = [None] * len(self.sources) if passes is None else passes
        return [documents_section(title, source, times) for source, times in zip(self.sources, often, strict=True)]


def load_both(
    config: SFTRun, tokenizer: PreTrainedTokenizerBase, architecture: LlamaConfig
) -> tuple[Dialogues, Dialogues | None] | tuple[Documents, Documents | None]:
    """What is learnt from, and what is held out. Raises `InputError`, see `Dialogues` and `Documents`."""
    kind = Documents if config.data.kind == "text" else Dialogues
    return kind.load_both(config, tokenizer, architecture)
