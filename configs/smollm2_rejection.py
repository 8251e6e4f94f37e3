"""Rejection sampling that two CPU cores can make in ten minutes: SmolLM2-135M learns to write kind reviews.

The controlled-sentiment experiment of `dpo-jax demo` (Rafailov et al. 2023, section 6.1) with the best of ten samples
in the place of pairs: the model goes on with openings of reviews, VADER judges what it wrote, and it learns the best
continuation of each opening found so far. The numbers are ours. There are 240 openings; 60 are held out:

    python -m dpo_jax.complete.writing.openings > openings.jsonl
    head -n 120 openings.jsonl > seen.jsonl; tail -n 60 openings.jsonl > unseen.jsonl
    dpo-jax rejection configs/smollm2_rejection.py --data seen.jsonl --eval_data unseen.jsonl --out runs/kind
"""

from dpo_jax import config as c

config = c.RejectionRun(
    model="smollm2",
    eval_data=c.ON_COMMAND_LINE,
    out=c.ON_COMMAND_LINE,
    reward="vader",
    rejection=c.RejectionConfig(samples=5, temperatures=(0.8, 1.0), iterations=2, eval_samples=2),
    sample=c.SampleConfig(max_new_tokens=24),
    lora=c.LoraConfig(rank=16),
    optimizer=c.OptimizerConfig(learning_rate=5e-4, schedule="linear", warmup_steps=2),
    data=c.SFTDataConfig(template="raw", max_length=56, buckets=1, train_on="last"),
    train=c.TrainConfig(epochs=3, batch_size=8),
)
