"""A real run that a laptop can make: SmolLM2-135M-Instruct with LoRA on Anthropic's HH pairs.

The data are `\\n\\nHuman:` / `\\n\\nAssistant:` transcripts whose common beginning is the prompt (Bai et al. 2022). The
learning rate is LoRA's usual one, not the 1e-6 of full fine-tuning. 100 steps of 8 pairs take some minutes on 2 cores.

    dpo-jax dpo configs/smollm2_hh_dpo.py --data HH.jsonl.gz --out runs/hh
"""

from dpo_jax import config as c

config = c.DPORun(
    model="smollm2",
    out=c.ON_COMMAND_LINE,
    dpo=c.DPOLossConfig(beta=0.1),
    lora=c.LoraConfig(rank=16),
    optimizer=c.OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=10, floor=0.1),
    data=c.DataConfig(max_length=256, max_prompt_length=160),
    train=c.TrainConfig(batch_size=8, steps=100),
    checkpoint=c.CheckpointConfig(every=25),
)
