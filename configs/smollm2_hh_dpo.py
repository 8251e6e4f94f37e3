"""A real run that a laptop can make: SmolLM2-135M-Instruct with LoRA on Anthropic's HH pairs.

The data are `\\n\\nHuman:` / `\\n\\nAssistant:` transcripts whose common beginning is the prompt (Bai et al. 2022). The
learning rate is LoRA's usual one, not the 1e-6 of full fine-tuning. 100 steps of 8 pairs take some minutes on 2 cores.

    dpo-jax dpo configs/smollm2_hh_dpo.py --data HH.jsonl.gz --out runs/hh
"""

from dpo_jax.config import (
    ON_COMMAND_LINE,
    CheckpointConfig,
    DataConfig,
    DPOLossConfig,
    DPORun,
    LoraConfig,
    OptimizerConfig,
    TrainConfig,
)

config = DPORun(
    model="smollm2",
    out=ON_COMMAND_LINE,
    dpo=DPOLossConfig(beta=0.1),
    lora=LoraConfig(rank=16),
    optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=10, floor=0.1),
    data=DataConfig(max_length=256, max_prompt_length=160),
    train=TrainConfig(batch_size=8, steps=100),
    checkpoint=CheckpointConfig(every=25),
)
