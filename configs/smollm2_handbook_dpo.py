"""SmolLM2's DPO as the alignment handbook runs it, for the 135M model too.

beta 0.5, a cosine schedule from 1e-6 with 10 % warm-up, 2 epochs on UltraFeedback's pairs, 1024 tokens of which at most
512 are prompt. The batch of 128 pairs is ours. Source of the rest:
alignment-handbook, recipes/smollm2 (2024).

    dpo-jax dpo configs/smollm2_handbook_dpo.py --model SFT_MODEL --data ULTRAFEEDBACK.jsonl --out runs/smollm2_dpo
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(beta=0.5),
    optimizer=OptimizerConfig(learning_rate=1e-6, schedule="cosine", warmup_ratio=0.1),
    data=DataConfig(template="chatml", max_length=1024, max_prompt_length=512),
    train=TrainConfig(batch_size=128, epochs=2, dtype="bfloat16"),
)
