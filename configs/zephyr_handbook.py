"""Zephyr's DPO as the alignment handbook runs it since 2024: another beta, schedule and batch than the paper's.

beta 0.01, AdamW, a cosine schedule from 5e-7 with 10 % warm-up, batches of 128 pairs, one epoch, 1024 tokens of which
at most 512 are prompt. Source: the alignment-handbook recipes.

    dpo-jax dpo configs/zephyr_handbook.py --model SFT_MODEL --data ULTRAFEEDBACK.jsonl --out runs/zephyr_handbook
"""

from dpo_jax.config import derive

config = derive(
    "zephyr_ddpo",
    {
        "dpo.beta": 0.01,
        "optimizer.schedule": "cosine",
        "optimizer.weight_decay": None,
        "train.batch_size": 128,
        "train.epochs": 1,
    },
)
