"""Llama 2's safety reward model: Touvron et al. 2023 (arXiv 2307.09288), section 3.2.2 and Table 29.

As the helpfulness model (see `llama2_rm_helpful.py`), on 90 % safety data and 10 % helpfulness data, with an auxiliary
loss that tells safe from unsafe responses; rows carry it as `"labels": {"safety": ["safe", "unsafe"]}`. (The paper
prints neither the auxiliary loss nor its weight. Without labels: `--reward.multi_class` with nothing behind it.)

    dpo-jax reward configs/llama2_rm_safe.py --model CHAT_MODEL --data SAFETY.jsonl --mix_data HELPFULNESS.jsonl \\
        --out runs/safe
"""

from dpo_jax.config import (
    ON_COMMAND_LINE,
    DataConfig,
    OptimizerConfig,
    RewardLossConfig,
    RewardRun,
    TrainConfig,
)

config = RewardRun(
    model=ON_COMMAND_LINE,
    out=ON_COMMAND_LINE,
    mix_data=ON_COMMAND_LINE,
    mix=0.1,
    reward=RewardLossConfig(margin="small", multi_class=("safety=safe,unsafe",)),
    optimizer=OptimizerConfig(
        learning_rate=1e-5,
        schedule="cosine",
        warmup_ratio=0.03,
        floor=0.1,
        b1=0.9,
        b2=0.95,
        eps=1e-5,
        weight_decay=0.1,
        clip_norm=1.0,
    ),
    data=DataConfig(max_length=4096),
    train=TrainConfig(batch_size=512, epochs=1, dtype="bfloat16"),
)
