"""SmolLM2's SFT as the alignment handbook runs it, for the 135M model too.

Cosine schedule from 1e-3 with 10 % warm-up, 2 epochs, 8192 tokens. The batch of 128 windows, packing, the template and
a loss on all tokens are ours. Source of the rest: alignment-handbook, recipes/smollm2 (2024).

    dpo-jax sft configs/smollm2_handbook_sft.py --model SMOLLM2_BASE --data DIALOGUES.jsonl --out runs/smollm2_sft
"""

from dpo_jax.config import OPEN, OptimizerConfig, SFTDataConfig, SFTRun, TrainConfig

config = SFTRun(
    **OPEN,
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine", warmup_ratio=0.1),
    data=SFTDataConfig(template="chatml", max_length=8192, packing=True, train_on="all"),
    train=TrainConfig(batch_size=128, epochs=2, dtype="bfloat16"),
)
