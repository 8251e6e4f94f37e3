"""How many floating-point operations the mathematics of a training step needs: model FLOPs, the numerator of MFU.

The convention (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, with causal attention counted half):

    forward, a token        2 N  +  4 L H C a          N: weights of matrices, a: tokens it sees, itself included
    backward                twice that: by the inputs and by the weights, each as much as the forward pass
    frozen matrices (LoRA)  the forward pass and the gradient by the inputs, none by the weights; the adapters in full
                            (the first layer's inputs need no gradient; for one layer in L that is counted too much)

so a fully trained token costs 6 N + 12 L H C a; over a window of T tokens a is (T + 1) / 2 on average, half of what a
kernel without a causal mask computes. Documents that do not see each other are counted as such. The embedding look-up,
norms, softmax and the optimizer are not counted; nor is what is computed twice (rematerialisation, a prompt repeated
for each response) or for nothing (padding). The output head counts only where a token is to be predicted.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dpo_jax.config import LoraConfig, Objective, PPOLossConfig
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.types import CHOSEN, MISMATCHED, REJECTED, PreferenceBatch, Rollout, TokenBatch


@dataclass(frozen=True)
class Work:
    """Sums over a batch, of real tokens only.

    Attributes:
      tokens: tokens that go through the layers.
      predicted: tokens whose log-probabilities are computed.
      attended: over all tokens, how many tokens each one sees (itself too).
    """

    tokens: float
    predicted: float
    attended: float


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of one model. A pass over a matrix of n weights costs 2 n a token.

    Attributes:
      layers: weights of the matrices of all layers.
      head: weights of the output matrix.
      attention: FLOPs of one token that sees one token, in all layers.
      adapters: weights of the trained adapters; 0 where all weights are trained.
    """

    layers: int
    head: int
    attention: int
    adapters: int = 0

    @classmethod
    def of(cls, config: LlamaConfig, lora: LoraConfig | None = None, *, outputs: int | None = None) -> "ModelFlops":
        """Count them from the sizes of the model and of its adapters.

        `outputs`: columns of the output matrix that a token is multiplied with; default: the vocabulary.
        """
        width, inner = config.hidden_size, config.intermediate_size
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        shapes = {
            "q_proj": (width, query),
            "k_proj": (width, kv),
            "v_proj": (width, kv),
            "o_proj": (query, width),
            "gate_proj": (width, inner),
            "up_proj": (width, inner),
            "down_proj": (inner, width),
        }
        targets = () if lora is None or lora.rank == 0 else lora.targets
        return cls(
            layers=config.num_layers * sum(a * b for a, b in shapes.values()),
            head=width * (config.vocab_size if outputs is None else outputs),
            # q k and weights x v: 2 C each, for every head.
            attention=4 * config.num_layers * query,
            adapters=config.num_layers * sum(lora.rank * sum(shapes[name]) for name in targets) if lora else 0,
        )

    def forward(self, work: Work, *, adapted: bool = True) -> float:
        """FLOPs of a forward pass; without `adapted`, that of the model without its adapters."""
        weights = (self.layers + (self.adapters if adapted else 0)) * work.tokens + self.head * work.predicted
        return 2.0 * weights + self.attention * work.attended

    def training(self, work: Work) -> float:
        """FLOPs of a forward and a backward pass."""
        by_weights = 2.0 * (self.layers * work.tokens + self.head * work.predicted) if self.adapters else 0.0
        return 3 * self.forward(work) - by_weights

    def describe(self) -> str:
        """The convention with this model's numbers, in one line."""
        matrices = (self.layers + self.head) / 1e6
        weights = (
            f"4 a token for each of {matrices:.1f} M frozen matrix weights, 6 for each of {self.adapters / 1e6:.1f} M"
            " adapter weights"
            if self.adapters
            else f"6 a token for each of {matrices:.1f} M matrix weights"
        )
        return f"model FLOPs: {weights}, and causal attention, counted half; none for what is recomputed or padding"


def token_work(batch: TokenBatch) -> Work:
    """What next-token training on a batch of windows needs."""
    real = np.asarray(batch.segments) > 0
    return Work(
        tokens=float(real.sum()),
        predicted=float((np.asarray(batch.targets) & real).sum()),
        attended=float(np.asarray(batch.positions)[real].sum(dtype=np.float64) + real.sum()),
    )


def preference_work(batch: PreferenceBatch, first: int, last: int) -> Work:
    """What the responses first..last - 1 of a batch need, each prompt computed once."""
    weights = np.asarray(batch.weights, np.float64) > 0
    prompts = np.asarray(batch.prompt_lengths, np.float64)[weights]
    responses = np.asarray(batch.response_lengths, np.float64)[weights, first:last]
    seen = prompts * (prompts + 1) / 2
    seen_by_responses = responses * prompts[:, None] + responses * (responses + 1) / 2
    return Work(
        tokens=float(prompts.sum() + responses.sum()),
        predicted=float(responses.sum()),
        attended=float(seen.sum() + seen_by_responses.sum()),
    )


def sft_flops(model: ModelFlops) -> Callable[[TokenBatch], float]:
    """Batch -> FLOPs of a step of next-token training."""
    return lambda batch: model.training(token_work(batch))


def reward_flops(model: ModelFlops) -> Callable[[PreferenceBatch], float]:
    """Batch -> FLOPs of a step of a reward model, whose head reads the last token of each response only."""

    def flops(batch: PreferenceBatch) -> float:
        work = preference_work(batch, 0, batch.response_lengths.shape[1])
        scored = (np.asarray(batch.response_lengths) > 0)[np.asarray(batch.weights) > 0].sum()
        return model.training(replace(work, predicted=float(scored)))

    return flops


def dpo_flops(model: ModelFlops, objective: Objective) -> Callable[[PreferenceBatch], float]:
    """Batch -> FLOPs of a step of preference training: the policy on the pair, and the forward passes beside it.

    Those are the live reference's, for kto that of the policy over the mismatched responses, and for losses that take
    something across micro-batches both over the pair once more.
    """
    live, moving = objective.live, objective.moving

    def flops(batch: PreferenceBatch) -> float:
        pair = preference_work(batch, CHOSEN, REJECTED + 1)
        beside = model.forward(pair, adapted=moving) if live else 0.0
        total = model.training(pair) + beside
        if objective.takes_across and objective.accumulate > 1:
            total += model.forward(pair) + beside
        if objective.loss == "kto":
            mismatched = preference_work(batch, MISMATCHED, batch.response_lengths.shape[1])
            total += model.forward(mismatched) + (model.forward(mismatched, adapted=moving) if live else 0.0)
        return total

    return flops


def online_dpo_flops(model: ModelFlops, samples: int) -> Callable[[PreferenceBatch], float]:
    """Batch of pairs -> FLOPs of its iteration: sampling, the reference, the update; not the judge.

    Of `samples` responses to a prompt those that are in no pair are taken to be as long as those that are.
    """

    def flops(batch: PreferenceBatch) -> float:
        pair = preference_work(batch, CHOSEN, REJECTED + 1)
        written = model.forward(pair) + model.forward(pair, adapted=False)
        return written * samples / 2 + model.training(pair)

    return flops


def distill_flops(student: ModelFlops, teacher: ModelFlops) -> Callable[[PreferenceBatch], float]:
    """Batch -> FLOPs of its iteration: the teacher's forward pass and the student's update; not the sampling."""

    def flops(batch: PreferenceBatch) -> float:
        work = preference_work(batch, 0, 1)
        return teacher.forward(work) + student.training(work)

    return flops


def ppo_flops(model: ModelFlops, config: PPOLossConfig) -> Callable[[Rollout], float]:
    """Rollout -> FLOPs of its iteration: sampling, the reference, what is measured before the updates, the updates; not
    the reward.

    A separate value model costs what the policy's trunk costs.
    """
    separate = config.critic == "separate"
    shared = config.critic is not None and not separate

    def flops(rollout: Rollout) -> float:
        work = preference_work(rollout.groups(config.group), 0, config.group)
        trunk = replace(work, predicted=0.0)
        measured = model.forward(work) + model.forward(work, adapted=False)
        if config.stores_old_logps:
            measured += model.forward(work) + (model.forward(trunk) if separate else 0.0)
        else:
            measured += model.forward(trunk) if separate or shared else 0.0
        update = model.training(work) + (model.training(trunk) if separate else 0.0)
        return measured + config.passes * update

    return flops
