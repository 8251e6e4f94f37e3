"""Length-normalised DPO as in Tulu 3 8B (Lambert et al. 2024), from the open-instruct scripts.

sigmoid_norm with beta 5, a linear schedule from 5e-7 with 10 % warm-up, batches of 128 pairs, one epoch, 2048 tokens.

    dpo-jax dpo configs/tulu3_dpo.py --model SFT_MODEL --data PAIRS.jsonl --out runs/tulu3
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(loss="sigmoid_norm", beta=5.0),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1),
    data=DataConfig(max_length=2048),
    train=TrainConfig(batch_size=128, epochs=1, dtype="bfloat16"),
)
