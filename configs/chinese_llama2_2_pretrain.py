"""Chinese Llama 2, step 2 of 4: continued pre-training on Chinese text. All steps: `chinese_llama2_1_extend.py`.

From the scripts of Chinese-LLaMA-Alpaca-2 (Cui et al. 2023, arXiv 2304.08177, second edition): AdamW, a cosine
schedule with 5 % warm-up, weight decay 0.01, one epoch. They train LoRA adapters at 2e-4, and for new pieces embedding
and head whole; here all weights are trained, the new rows with them, at 3e-5, where Llama 2's own schedule ended.
Windows and batch are ours (theirs: 512 tokens, 8 windows a device), and so is the share of English, against forgetting.

    dpo-jax sft configs/chinese_llama2_2_pretrain.py --model runs/zh1 --data ZH.jsonl:0.9 EN.jsonl:0.1 --out runs/zh2
"""

from dpo_jax.config import OPEN, OptimizerConfig, SFTDataConfig, SFTRun, TrainConfig

config = SFTRun(
    **OPEN,
    optimizer=OptimizerConfig(
        learning_rate=3e-5, schedule="cosine", warmup_ratio=0.05, floor=0.1, b2=0.95, eps=1e-5, weight_decay=0.01
    ),
    data=SFTDataConfig(kind="text", max_length=2048),
    train=TrainConfig(batch_size=128, epochs=1, dtype="bfloat16", remat="full"),
)
