"""A real run that a laptop can make: SmolLM2-135M-Instruct with LoRA on a few hundred dialogues.

Made for small sets such as the best replies of OASST1 (Köpf et al. 2023, arXiv 2304.07327) in one language; the model
knows little Chinese, so there is much to learn from the Chinese ones. The learning rate is LoRA's usual one, not the
2e-5 of full fine-tuning. 40 steps of four windows of 256 tokens take some minutes on 2 cores.

    dpo-jax sft configs/smollm2_sft.py --data DIALOGUES.jsonl --eval_data HELD_OUT.jsonl --out runs/sft
"""

from dpo_jax import config as c

config = c.SFTRun(
    model="smollm2",
    out=c.ON_COMMAND_LINE,
    lora=c.LoraConfig(rank=16),
    optimizer=c.OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=4, floor=0.1),
    data=c.SFTDataConfig(max_length=256, packing=True, train_on="answers"),
    train=c.TrainConfig(batch_size=4, steps=40),
    checkpoint=c.CheckpointConfig(every=20),
)
