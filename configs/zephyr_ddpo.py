"""Zephyr's distilled DPO: Tunstall et al. 2023 (arXiv 2310.16944), the numbers of the paper.

beta 0.1, AdamW without weight decay, a linear schedule from 5e-7 with 10 % warm-up, batches of 32 pairs, 3 epochs, on
UltraFeedback pairs: the answer with the best mean score against a random one of the other three. Lengths are those of
the released recipe (1024 tokens, of which at most 512 are prompt). The model is the dSFT model, which the paper trains
on UltraChat first.

    dpo-jax dpo configs/zephyr_ddpo.py --model DSFT_MODEL --data ULTRAFEEDBACK.jsonl --out runs/zephyr
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(beta=0.1),
    optimizer=OptimizerConfig(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1, weight_decay=0.0),
    data=DataConfig(template="zephyr", max_length=1024, max_prompt_length=512),
    train=TrainConfig(batch_size=32, epochs=3, dtype="bfloat16"),
)
