"""Chinese Llama 2, step 3 of 4: supervised fine-tuning on Chinese dialogues. All steps: `chinese_llama2_1_extend.py`.

From the scripts of Chinese-LLaMA-Alpaca-2 (Cui et al. 2023, arXiv 2304.08177, second edition): LoRA of rank 64 and
alpha 128 on all linear layers, AdamW, a cosine schedule from 1e-4 with 3 % warm-up, no weight decay, one epoch, 1,024
tokens, Llama 2's chat template. They train embedding and head too; here these were trained in step 2. The batch is
ours (theirs: 8 dialogues a device).

    dpo-jax sft configs/chinese_llama2_3_sft.py --model runs/zh2 --data ZH_DIALOGUES.jsonl --out runs/zh3
"""

from dpo_jax.config import OPEN, LoraConfig, OptimizerConfig, SFTDataConfig, SFTRun, TrainConfig

config = SFTRun(
    **OPEN,
    lora=LoraConfig(rank=64, alpha=128.0),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_ratio=0.03),
    data=SFTDataConfig(template="llama2", max_length=1024, packing=True),
    train=TrainConfig(batch_size=32, epochs=1, dtype="bfloat16"),
)
