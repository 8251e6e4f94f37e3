"""Llama 2's supervised fine-tuning: Touvron et al. 2023 (arXiv 2307.09288), section 3.1.

Cosine schedule from 2e-5, weight decay 0.1, batches of 64 sequences of 4096 tokens, 2 epochs; dialogues are packed to
full sequences, and the loss counts the answers only. Here, unlike there, dialogues that share a sequence do not see one
another. What the paper leaves open (betas, epsilon, warm-up) is AdamW's default, and no warm-up.

    dpo-jax sft configs/llama2_sft.py --model LLAMA2_BASE --data DIALOGUES.jsonl --out runs/llama2_sft
"""

from dpo_jax.config import OPEN, OptimizerConfig, SFTDataConfig, SFTRun, TrainConfig

config = SFTRun(
    **OPEN,
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", weight_decay=0.1),
    data=SFTDataConfig(template="llama2", max_length=4096, packing=True, train_on="answers"),
    train=TrainConfig(batch_size=64, epochs=2, dtype="bfloat16"),
)
