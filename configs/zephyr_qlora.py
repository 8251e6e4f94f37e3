"""Zephyr's DPO with adapters on weights in 4 bits, the numbers of the alignment handbook's QLoRA run.

Rank 128, alpha 128, dropout .05, 5e-6, nf4, else as configs/zephyr_handbook.py. Source: alignment-handbook 925acdf
(2024).

    dpo-jax dpo configs/zephyr_qlora.py --model SFT_MODEL --data ULTRAFEEDBACK.jsonl --out runs/zephyr_qlora
"""

from dpo_jax.config import derive

config = derive(
    "zephyr_handbook",
    {
        "lora.rank": 128,
        "lora.alpha": 128.0,
        "optimizer.learning_rate": 5e-6,
        "lora.dropout": 0.05,
        "train.frozen_dtype": "nf4",
    },
)
