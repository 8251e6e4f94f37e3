"""DPO-Positive: Pal et al. 2024 (arXiv 2402.13228, text of 3 July 2024), the Smaug models.

dpop with lambda 50 (5 to 500 gave much the same) and beta 0.3: a chosen response whose log-probability falls below the
reference's is penalised inside the sigmoid. Optimizer, batch and lengths are ours; the paper's differ by data set.

    dpo-jax dpo configs/smaug_dpop.py --model SFT_MODEL --data PAIRS.jsonl --out runs/smaug
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(loss="dpop", beta=0.3, dpop_lambda=50.0),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup_ratio=0.1),
    data=DataConfig(max_length=1024),
    train=TrainConfig(batch_size=32, epochs=1, dtype="bfloat16"),
)
