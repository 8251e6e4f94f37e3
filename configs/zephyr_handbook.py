"""Zephyr's DPO as the alignment handbook runs it since 2024: another beta, schedule and batch than the paper's.

beta 0.01, AdamW, a cosine schedule from 5e-7 with 10 % warm-up, batches of 128 pairs, one epoch, 1024 tokens of which
at most 512 are prompt. Source: the alignment-handbook recipes.

    dpo-jax dpo configs/zephyr_handbook.py --model SFT_MODEL --data ULTRAFEEDBACK.jsonl --out runs/zephyr_handbook
"""

from dpo_jax.config import (
    ON_COMMAND_LINE,
    DataConfig,
    DPOLossConfig,
    DPORun,
    OptimizerConfig,
    TrainConfig,
)

config = DPORun(
    model=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    dpo=DPOLossConfig(beta=0.01),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="cosine", warmup_ratio=0.1),
    data=DataConfig(template="zephyr", max_length=1024, max_prompt_length=512),
    train=TrainConfig(batch_size=128, epochs=1, dtype="bfloat16"),
)
