"""One round of Iterative RPO: Pang et al. 2024 (arXiv 2404.19733).

DPO with beta 0.1 plus the length-normalised negative log-likelihood of the chosen response with weight 1, learning rate
7e-7, batches of 16 pairs. The paper makes the pairs of each of its 4 rounds anew: 30 samples a problem (at 0.8,
later 1.3), right answers against wrong ones, up to 10 pairs a problem. Schedule and lengths are ours.

    dpo-jax dpo configs/iterative_rpo.py --model LAST_ROUND --data PAIRS.jsonl --out runs/rpo
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(beta=0.1, nll_coefficient=1.0, nll_normalization="sequence"),
    optimizer=OptimizerConfig(learning_rate=7e-7),
    data=DataConfig(max_length=2048),
    train=TrainConfig(batch_size=16, epochs=1, dtype="bfloat16"),
)
