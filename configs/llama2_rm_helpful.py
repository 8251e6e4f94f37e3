"""Llama 2's helpfulness reward model: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.2.

From the chat checkpoint; one epoch; 1e-5 (5e-6 at 70B), cosine to 10 %, warm-up 3 % and at least 5 steps; AdamW
.9/.95, eps 1e-5, weight decay 0.1, clip 1.0; 512 pairs; the small margins of Table 27, which did best on average in
Table 28. Rows carry a `rating`: significantly better, better, slightly better, negligibly better / unsure.

    dpo-jax reward configs/llama2_rm_helpful.py --model CHAT_MODEL --data HELPFULNESS.jsonl --out runs/helpful
"""

from dpo_jax.config import OPEN, DataConfig, OptimizerConfig, RewardLossConfig, RewardRun, TrainConfig

config = RewardRun(
    **OPEN,
    reward=RewardLossConfig(margin="small"),
    optimizer=OptimizerConfig(
        learning_rate=1e-5,
        schedule="cosine",
        warmup_ratio=0.03,
        warmup_min=5,
        floor=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
    ),
    data=DataConfig(max_length=4096),
    train=TrainConfig(batch_size=512, epochs=1, dtype="bfloat16"),
)
