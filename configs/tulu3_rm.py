"""The reward model of Tulu 3 8B (Lambert et al. 2024), from the open-instruct scripts.

No margin; a linear schedule from 3e-6 over one epoch, batches of 256 pairs, 2048 tokens; the head starts as a normal
with standard deviation 1/sqrt(width + 1), as all heads do here.

    dpo-jax reward configs/tulu3_rm.py --model SFT_MODEL --data PAIRS.jsonl --out runs/tulu3_rm
"""

from dpo_jax.config import OPEN, DataConfig, OptimizerConfig, RewardRun, TrainConfig

config = RewardRun(
    **OPEN,
    optimizer=OptimizerConfig(learning_rate=3e-6, schedule="linear"),
    data=DataConfig(max_length=2048),
    train=TrainConfig(batch_size=256, epochs=1, dtype="bfloat16"),
)
