"""Llama 3's rounds of post-training: the Llama 3 report (2024), section 4.1.

Six rounds; K = 10 answers a prompt (the report: 10 to 30) of the best model so far; DPO as in `llama3_dpo.py` beside
this file, on pairs graded better or significantly better. People graded there; here --judge does, and the four grades
are quarters of its gaps. SFT at 1e-5 as in the report. It gives no batch sizes, schedules or lengths: those are ours.
The short form, DPO alone, is `llama3_rounds_dpo.py`.

    dpo-jax recipe llama3 configs/llama3_rounds.py --model LLAMA3_BASE --sft_data DIALOGUES.jsonl \
        --preferences COMPARISONS.jsonl --prompts PROMPTS.jsonl --judge http://HOST/judge \
        --average_over train.seed=1 optimizer.learning_rate=5e-6 --out runs/llama3
"""

from dpo_jax import config as c

SET = {"model": c.SET_BY_RECIPE, "out": c.SET_BY_RECIPE}
FINE = {"optimizer": c.OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_ratio=0.03)}
TRAIN = c.TrainConfig(batch_size=64, epochs=1, dtype="bfloat16")

config = c.Llama3Run(
    model=c.ON_COMMAND_LINE,
    prompts=c.ON_COMMAND_LINE,
    judge=c.ON_COMMAND_LINE,
    out=c.ON_COMMAND_LINE,
    sft_data=c.ON_COMMAND_LINE,
    rounds=6,
    sft=c.SFTRun(
        **SET,
        **FINE,
        data=c.SFTDataConfig(c.SET_BY_RECIPE, template="llama3", max_length=4096, packing=True),
        train=TRAIN,
    ),
    reward=c.RewardRun(
        **SET, **FINE, data=c.DataConfig(c.SET_BY_RECIPE, template="llama3", max_length=4096), train=TRAIN
    ),
    rejection=c.RejectionRun(
        **SET,
        **FINE,
        reward=c.SET_BY_RECIPE,
        rejection=c.RejectionConfig(samples=10),
        sample=c.SampleConfig(max_new_tokens=1024),
        data=c.SFTDataConfig(c.SET_BY_RECIPE, template="llama3", max_length=4096, packing=True, train_on="last"),
        train=TRAIN,
    ),
    dpo=c.derive("llama3_dpo", {**SET, "data.files": c.SET_BY_RECIPE}),
)
