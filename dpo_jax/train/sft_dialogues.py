"""What `dpo-jax sft` learns from: dialogues, packed into windows or one in each. Plain text: `sft_documents.py`."""

from dataclasses import dataclass

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import SFTRun
from dpo_jax.data.sets.dataset import check_context
from dpo_jax.data.sets.loader import TokenLoader, eval_windows
from dpo_jax.data.sets.segment_views import SegmentViews
from dpo_jax.data.sets.sequences import SequenceDataset, join_sequences, load_dialogues, split_sequences
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.report import html
from dpo_jax.report.datasets import dialogues_section
from dpo_jax.train.row_data import read_both, row_options, units_of
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

        data, held = read_both(config, read, join_sequences, split_sequences)
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
            **row_options(self.config, steps=steps, epochs=epochs),
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
