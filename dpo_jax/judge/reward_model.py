"""A reward model as a function: tokens in, float32 scores out. For rejection sampling, PPO and `score`."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax import nn
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.config import AttentionKernel, ClassHead
from dpo_jax.data.sets.dataset import PreferenceDataset
from dpo_jax.data.sets.loader import IndexedBatches, eval_batches
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.errors import InputError
from dpo_jax.files.log import ProgressBar
from dpo_jax.model import heads
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.model.groups import response_states
from dpo_jax.model.llama import Llama
from dpo_jax.types import PreferenceBatch
from dpo_jax.weights.opened import StoredModel, open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained


def check_score(source: str, architecture: LlamaConfig) -> None:
    """Raise `InputError` where a checkpoint has no score: it is a language model."""
    if not architecture.num_labels:
        raise InputError(f"{source}: has no reward head (score.weight); train one with dpo-jax reward")


@lru_cache(maxsize=2)
def _forward(model: Llama, classes: tuple[ClassHead, ...], mesh: Mesh) -> meshes.Replicated:
    """Scores and chances of a batch. The same for models of one shape, as rounds have them, and compiled once."""

    def forward(variables: Any, batch: PreferenceBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden = response_states(model.apply, variables, batch)
        logits = {head: heads.apply(variables, head.name, hidden) for head in classes}
        chances = {h.name: nn.sigmoid(x) if h.overlapping else nn.softmax(x) for h, x in logits.items()}
        return heads.apply(variables, heads.SCORE, hidden)[..., 0], chances

    return meshes.Replicated(forward, mesh)


class RewardModel:
    """A reward model on its devices.

    `score_tokens` is the reward function of PPO and rejection sampling; of texts it is `rewards.functions.ModelReward`.

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
        classes: of the opened checkpoint.
        """
        if batch_size % (parts := meshes.batch_parts(mesh)):
            raise InputError(
                f"a batch of {batch_size} does not divide over {parts} devices; take a multiple of {parts}"
            )
        self.model, self.variables, self.mesh = model, variables, mesh
        self.classes = tuple(classes)
        self._batch_size, self._multiple = batch_size, multiple
        # flax gives modules the hash of their fields, which type checkers do not see.
        self._forward = _forward(model, self.classes, mesh)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(
        cls,
        source: str | StoredModel,
        *,
        mesh: Mesh | None = None,
        batch_size: int = 8,
        dtype: str = "float32",
        compute_dtype: str | None = None,
        attention: AttentionKernel = "auto",
    ) -> "RewardModel":
        """From a checkpoint, as for `load_pretrained`. Raises `InputError` where it has no reward head."""
        mesh = meshes.make_mesh(1, 1, 1, devices=jax.local_devices()[:1]) if mesh is None else mesh
        source = open_checkpoint(source)
        how: dict[str, Any] = {"dtype": dtype, "compute_dtype": compute_dtype, "attention": attention}
        model, variables = load_pretrained(source, mesh=mesh, **how)
        check_score(source.name, model.config)
        return cls(model, variables, mesh=mesh, batch_size=batch_size, classes=source.classes)

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
        if not prompts:
            return np.zeros(0, np.float32)
        largest, rows = max(max(ids) for ids in (*prompts, *responses)), self.model.config.vocab_size
        if largest >= rows:
            raise InputError(f"a text to score has the id {largest}, and the reward model's embedding has {rows} rows")
        data = PreferenceDataset(
            prompts=Ragged.of([np.asarray(ids, np.int32) for ids in prompts], np.int32),
            responses=Ragged.of([np.asarray(ids, np.int32) for ids in responses], np.int32),
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
