"""Zephyr's distilled SFT: Tunstall et al. 2023 (arXiv 2310.16944), section 4.2.

Cosine schedule from 2e-5 with 10 % warm-up, batches of 512 windows of 2048 tokens into which the dialogues are packed,
the loss on all tokens, on UltraChat. The paper trains for one to three epochs; this is one. Its result is the model
that configs/zephyr_ddpo.py goes on with.

    dpo-jax sft configs/zephyr_dsft.py --model MISTRAL_7B --data ULTRACHAT.jsonl --out runs/zephyr_sft
"""

from dpo_jax.config import OPEN, OptimizerConfig, SFTDataConfig, SFTRun, TrainConfig

config = SFTRun(
    **OPEN,
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", warmup_ratio=0.1),
    data=SFTDataConfig(template="zephyr", max_length=2048, packing=True, train_on="all"),
    train=TrainConfig(batch_size=512, epochs=1, dtype="bfloat16"),
)
