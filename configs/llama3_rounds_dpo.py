"""Llama 3's rounds in their short form, DPO alone: the Llama 3 report (2024), section 4.1, without its other stages.

Each round: the newest model answers, --judge scores, and DPO as in `llama3_dpo.py` beside this file on the pairs graded
better or significantly better, from the best version so far. --model is an instruct model; lengths are ours.

    dpo-jax recipe llama3 configs/llama3_rounds_dpo.py --model LLAMA3_INSTRUCT --prompts PROMPTS.jsonl \
        --judge http://HOST/judge --average_over train.seed=1 optimizer.learning_rate=5e-6 --out runs/llama3
"""

from dpo_jax import config as c

SET = {"model": c.SET_BY_RECIPE, "out": c.SET_BY_RECIPE}

config = c.Llama3Run(
    model=c.ON_COMMAND_LINE,
    prompts=c.ON_COMMAND_LINE,
    judge=c.ON_COMMAND_LINE,
    out=c.ON_COMMAND_LINE,
    stages="dpo",
    rounds=6,
    rejection=c.RejectionRun(
        **SET,
        reward=c.SET_BY_RECIPE,
        sample=c.SampleConfig(max_new_tokens=1024),
        data=c.SFTDataConfig(c.SET_BY_RECIPE, template="llama3", max_length=4096, train_on="last"),
        train=c.TrainConfig(dtype="bfloat16"),
    ),
    dpo=c.derive("llama3_dpo", {**SET, "data.files": c.SET_BY_RECIPE}),
)
