"""Zephyr's steps with SmolLM2-135M as student and teacher, small enough for two CPU cores.

The numbers of a laptop in place of the paper's (configs/zephyr.py): LoRA, short dialogues that the model writes itself,
a few steps of each stage, one aspect without a critique. It shows the machinery and what it measures, not a better
model.
`python benchmarks/zephyr_small.py` writes a pool of four writers and trains a judge for it.

    dpo-jax recipe zephyr configs/smollm2_zephyr.py --seeds SEEDS.jsonl --prompts PROMPTS.jsonl --pool POOL.yaml \\
        --judge judge:JUDGE.yaml --aif.beside length --out runs/smollm2_zephyr
"""

from dpo_jax import config as c

SET = {"model": c.SET_BY_RECIPE, "out": c.SET_BY_RECIPE}
STAGE = {**SET, "lora": c.LoraConfig(rank=16), "checkpoint": c.CheckpointConfig(every=10, keep=1)}
ANSWER = c.SampleConfig(max_new_tokens=192, temperature=0.5)
LENGTH = 256

config = c.ZephyrRun(
    model="smollm2",
    seeds=c.ON_COMMAND_LINE,
    prompts=c.ON_COMMAND_LINE,
    pool=c.ON_COMMAND_LINE,
    judge=c.ON_COMMAND_LINE,
    out=c.ON_COMMAND_LINE,
    heldout=0.3,
    batch_size=16,
    sample=ANSWER,
    dsft=c.DSFTRun(
        prompts=c.SET_BY_RECIPE,
        out=c.SET_BY_RECIPE,
        model="smollm2",
        batch_size=16,
        sample=c.SampleConfig(max_new_tokens=224, temperature=0.5),
    ),
    sft=c.SFTRun(
        **STAGE,
        optimizer=c.OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_ratio=0.1),
        data=c.SFTDataConfig(c.SET_BY_RECIPE, max_length=LENGTH, packing=True, train_on="all"),
        train=c.TrainConfig(batch_size=4, epochs=2),
    ),
    aif=c.AIFRun(
        prompts=c.SET_BY_RECIPE,
        pool=c.SET_BY_RECIPE,
        judge=c.SET_BY_RECIPE,
        out=c.SET_BY_RECIPE,
        aspects=("instruction_following",),
        critique=False,
    ),
    dpo=c.DPORun(
        **STAGE,
        dpo=c.DPOLossConfig(beta=0.1),
        optimizer=c.OptimizerConfig(learning_rate=2e-4, schedule="linear", warmup_ratio=0.1),
        data=c.DataConfig(c.SET_BY_RECIPE, max_length=LENGTH, max_prompt_length=LENGTH // 2, buckets=1),
        train=c.TrainConfig(batch_size=8, epochs=3),
    ),
)
