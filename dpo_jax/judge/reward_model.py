"""A reward model as a function: texts or tokens in, float32 scores out. For rejection sampling, PPO and `score`."""

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import nn
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax import mesh as meshes
from dpo_jax.config import AttentionKernel, ClassHead, DataConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.loader import IndexedBatches, eval_batches
from dpo_jax.data.tokens import cuts
from dpo_jax.data.tokens.encode import ScoredEncoder, cut_of, truncate
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.data.tokens.templates import RAW
from dpo_jax.errors import InputError
from dpo_jax.files.log import ProgressBar
from dpo_jax.model import heads
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.groups import response_states
from dpo_jax.model.llama import Llama
from dpo_jax.types import PreferenceBatch
from dpo_jax.weights.pretrained import load_pretrained, read_classes
from dpo_jax.weights.tokenizer import check_vocabulary, load_tokenizer

log = logging.getLogger(__name__)


def check_score(source: str, architecture: LlamaConfig) -> None:
    """Raise `InputError` where a checkpoint has no score: it is a language model."""
    if not architecture.num_labels:
        raise InputError(f"{source}: has no reward head (score.weight); train one with dpo-jax reward")


class RewardModel:
    """A reward model on its devices.

    `score_tokens` is the reward function of PPO and rejection sampling; calling the object scores texts.

    Attributes:
      model, variables: with the head `score`.
      mesh: the devices.
      classes: the auxiliary heads whose classes are known.
    """

    def __init__(
        self,
        model: Llama,
        variables: Any,
        *,
        mesh: Mesh,
        batch_size: int = 8,
        multiple: int = 64,
        classes: Sequence[ClassHead] = (),
    ):
        """Args:
        model, variables: from `load_pretrained` with `mesh`.
        mesh: where they lie.
        batch_size: responses a forward pass, over all devices.
        multiple: lengths are padded to multiples of this, so that calls with other texts compile little anew.
        classes: from `read_classes`.
        """
        if batch_size % (parts := meshes.batch_parts(mesh)):
            raise InputError(
                f"a batch of {batch_size} does not divide over {parts} devices; take a multiple of {parts}"
            )
        self.model, self.variables, self.mesh = model, variables, mesh
        self.classes = tuple(classes)
        self._batch_size, self._multiple = batch_size, multiple

        def forward(variables: Any, batch: PreferenceBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
            hidden = response_states(model.apply, variables, batch)
            logits = {head: heads.apply(variables, head.name, hidden) for head in self.classes}
            chances = {h.name: nn.sigmoid(x) if h.overlapping else nn.softmax(x) for h, x in logits.items()}
            return heads.apply(variables, heads.SCORE, hidden)[..., 0], chances

        self._forward = meshes.jit_replicated(forward, mesh)

    @classmethod
    def load(
        cls,
        source: str,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 8,
        dtype: str = "float32",
        attention: AttentionKernel = "auto",
    ) -> "RewardModel":
        """From a checkpoint, as for `load_pretrained`. Raises `InputError` where it has no reward head."""
        mesh = meshes.make_mesh(1, 1, 1, devices=jax.local_devices()[:1]) if mesh is None else mesh
        model, variables = load_pretrained(source, mesh=mesh, dtype=dtype, attention=attention)
        check_score(source, model.config)
        return cls(model, variables, mesh=mesh, batch_size=batch_size, classes=read_classes(source))

    def rewards(self, batches: IndexedBatches, label: str | None = None) -> np.ndarray:
        """float64 [M, K]: the scores of the M rows in `batches`, in the order of the data set; 0 where absent."""
        return self.judge(batches, label)[0]

    def judge(self, batches: IndexedBatches, label: str | None = None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """`rewards`, and for each head of `classes` the probabilities of its classes, float64 [M, K, C]."""
        rows = np.sort(batches.rows)
        shape = len(rows), batches.dataset.responses_per_prompt
        found = np.zeros(shape)
        chances = {head.name: np.zeros((*shape, len(head.classes))) for head in self.classes}
        done, forward = 0, partial(self._forward, self.variables)
        with ProgressBar(label or "scores", len(rows), shown=label is not None) as bar:
            for indices, (scores, likely) in meshes.one_ahead(forward, batches, self.mesh):
                real = indices >= 0
                places = np.searchsorted(rows, indices[real])
                found[places] = scores[real]
                for name, values in chances.items():
                    values[places] = likely[name][real]
                done += len(places)
                bar.update(done)
        return found, chances

    def score_tokens(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> np.ndarray:
        """The score of each response to its prompt, float32 [N].

        Args:
          prompts: ids, BOS included where the tokenizer has one, at least one each.
          responses: ids up to the one to score at (the last of the rendered template), at least one each.

        Raises `InputError` for an empty one, or a sequence beyond the model's context.
        """
        longest = self.model.config.max_position
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if not len(prompt) or not len(response) or len(prompt) + len(response) > longest:
                raise InputError(
                    f"text {i}: prompt of {len(prompt)} and response of {len(response)} tokens cannot be scored; each"
                    f" takes at least one token, and both at most {longest}"
                )
        return self._scored([np.asarray(p, np.int32) for p in prompts], [np.asarray(r, np.int32) for r in responses])

    def _scored(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> np.ndarray:
        if not prompts:
            return np.zeros(0, np.float32)
        largest, rows = max(int(ids.max()) for ids in (*prompts, *responses)), self.model.config.vocab_size
        if largest >= rows:
            raise InputError(f"a text to score has the id {largest}, and the reward model's embedding has {rows} rows")
        data = PreferenceDataset(
            prompts=Ragged.of(prompts, np.int32),
            responses=Ragged.of(responses, np.int32),
            formats=None,
            row_numbers=np.arange(1, len(prompts) + 1, dtype=np.int32),
            extras={},
            dropped=Counter(),
            rows_read=len(prompts),
            unused_columns=(),
            terminators=(),
            source="texts to score",
        )
        batches = eval_batches(data, self._batch_size, 1, multiple=self._multiple)
        return self.rewards(batches)[:, 0].astype(np.float32)


class TextReward:
    """A reward function of texts: messages or texts as prompts, texts as responses."""

    def __init__(self, rewards: RewardModel, tokenizer: PreTrainedTokenizerBase, config: DataConfig):
        """`config`: template and lengths; over-long prompts lose their beginning, over-long responses their end."""
        self._rewards, self._config = rewards, config
        self._encoder = ScoredEncoder(tokenizer, config.template, config.date)

    @classmethod
    def load(cls, source: str, config: DataConfig | None = None, **setting: Any) -> "TextReward":
        """From a checkpoint with its tokenizer; `setting` as for `RewardModel.load`."""
        rewards = RewardModel.load(source, **setting)
        tokenizer = load_tokenizer(source)
        check_vocabulary(tokenizer, rewards.model.config)
        return cls(rewards, tokenizer, config or DataConfig())

    def __call__(self, prompts: Sequence[Sequence[Message] | str], responses: Sequence[str]) -> np.ndarray:
        """The score of each response to its prompt, float32 [N], at the last token of the rendered template.

        Raises `InputError` for a text that cannot be rendered, such as a blank one, with its index.
        """
        rendered = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                rendered.append(self._render(prompt, response))
            except BadRow as problem:
                raise InputError(f"text {i}: {problem}") from problem
        encoded, lost = [], []
        for i, group in enumerate(self._encoder.encode(rendered, compared=False)):
            if isinstance(group, BadRow):
                raise InputError(f"text {i}: {group}") from group
            kept = truncate(group, self._config, bos=self._encoder.bos, compared=False)
            lost.append(cut_of(group, kept, system=rendered[i].system))
            encoded.append(kept)
        if told := cuts.summary(lost):
            log.warning("texts to score %s", told)
        return self._rewards.score_tokens([e.prompt for e in encoded], [e.responses[0] for e in encoded])

    def _render(self, prompt: Sequence[Message] | str, response: str) -> Any:
        if self._config.template == RAW:
            return self._encoder.render_group((), (response,), (prompt if isinstance(prompt, str) else None, response))
        messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        return self._encoder.render_group(messages, (response,), None)
