"""Llama 2's pre-training: Touvron et al. 2023 (arXiv 2307.09288), section 2.

AdamW with betas 0.9 and 0.95, epsilon 1e-5, weight decay 0.1, gradients clipped to norm 1; a cosine schedule from 3e-4
(7B, 13B; for 34B and 70B `--optimizer.learning_rate 1.5e-4`) to 10 % of it after a warm-up of 2,000 steps; windows of
4,096 tokens, 4 M tokens a step: 1,024 windows. The paper's 2 T tokens are 476,837 such steps; a run is as long as its
data unless `--train.steps` says otherwise. Documents stand end to end, each with its BOS and EOS, and see each other
(`--data.documents masked` keeps them apart).

Weights come from `--model`. Set `--train.accumulate` so that a micro-batch fits the devices, and for a run of few steps
`--optimizer.warmup_steps`. Sources are mixed by weight:

    dpo-jax sft configs/llama2_pretrain.py --model M --data WEB.jsonl:0.8 BOOKS.jsonl:0.2 --out runs/pretrain
"""

from dpo_jax.config import OPEN, OptimizerConfig, SFTDataConfig, SFTRun, TrainConfig

config = SFTRun(
    **OPEN,
    optimizer=OptimizerConfig(
        learning_rate=3e-4, schedule="cosine", warmup_steps=2000, floor=0.1, b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1
    ),
    data=SFTDataConfig(kind="text", max_length=4096, documents="joined"),
    train=TrainConfig(batch_size=1024, epochs=1, dtype="bfloat16", remat="full"),
)
