"""A reward model that a laptop can make: SmolLM2-135M-Instruct with LoRA, on comparisons of any layout.

A tenth of the prompts is held out; of long lists of ranked replies four are kept, each prompt counting once (Ouyang et
al. 2022). The learning rate is LoRA's usual one. 100 steps of 8 pairs take some minutes on 2 cores.

    dpo-jax reward configs/smollm2_rm.py --data COMPARISONS.jsonl --out runs/rm
"""

from dpo_jax import config as c

config = c.RewardRun(
    model="smollm2",
    out=c.ON_COMMAND_LINE,
    holdout=0.1,
    reward=c.RewardLossConfig(ties="drop", centering=0.01, max_replies=4),
    lora=c.LoraConfig(rank=16),
    optimizer=c.OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=10, floor=0.1),
    data=c.DataConfig(max_length=256),
    train=c.TrainConfig(batch_size=8, steps=100),
    checkpoint=c.CheckpointConfig(every=50),
)
