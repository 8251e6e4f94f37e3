"""Chinese Llama 2, step 4 of 4: DPO on Chinese preferences. All steps: `chinese_llama2_1_extend.py`.

beta 0.1 is the paper's (Rafailov et al. 2023); the rest, which no published run sets for this model, is ours: LoRA as
in step 3 (the reference is then the model without adapters), a cosine schedule from 5e-6, 1,024 tokens.

    dpo-jax dpo configs/chinese_llama2_4_dpo.py --model runs/zh3 --data ZH_PAIRS.jsonl --out runs/zh4
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, LoraConfig, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(beta=0.1),
    lora=LoraConfig(rank=64, alpha=128.0),
    optimizer=OptimizerConfig(learning_rate=5e-6, schedule="cosine", warmup_ratio=0.1),
    data=DataConfig(template="llama2", max_length=1024),
    train=TrainConfig(batch_size=64, epochs=1, dtype="bfloat16"),
)
