"""Direct Preference Optimization: Rafailov et al. 2023 (arXiv 2305.18290), appendix B, and the authors' config.

beta 0.1, batches of 64 pairs, RMSprop at 1e-6 after a linear warm-up of 150 steps, gradients clipped to norm 10,
512 tokens of which at most 256 are prompt; one epoch. For summarisation the paper takes beta 0.5 (`--dpo.beta 0.5`).
RMSprop is PyTorch's (decay 0.99, epsilon 1e-8 outside the root).

    dpo-jax dpo configs/dpo_paper.py --model SFT_MODEL --data PAIRS.jsonl --out runs/dpo_paper
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(beta=0.1),
    optimizer=OptimizerConfig(
        name="rmsprop", learning_rate=1e-6, schedule="constant", warmup_steps=150, decay=0.99, clip_norm=10.0
    ),
    data=DataConfig(max_length=512, max_prompt_length=256),
    train=TrainConfig(batch_size=64, epochs=1),
)
