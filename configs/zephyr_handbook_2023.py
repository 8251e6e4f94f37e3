"""Zephyr's DPO as the alignment handbook released it in 2023: RMSprop, where the paper says AdamW.

beta 0.1, a linear schedule from 5e-7 with 10 % warm-up, batches of 32 pairs, 3 epochs, 1024 tokens of which at most 512
are prompt. Source: alignment-handbook before f0ffa0d.

    dpo-jax dpo configs/zephyr_handbook_2023.py --model DSFT_MODEL --data ULTRAFEEDBACK.jsonl --out runs/zephyr
"""

from dpo_jax.config import derive

config = derive("zephyr_ddpo", {"optimizer.name": "rmsprop", "optimizer.weight_decay": None})
