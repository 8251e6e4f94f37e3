"""The stages of Llama 2-Chat (see `llama2_chat.py`), from SmolLM2-135M-Instruct, small enough for two CPU cores.

Two rounds in place of four, one judge, LoRA, short answers: it shows the machinery and the shift of distribution, not a
better model. With the sentiment lexicon as the judge the answers become kinder; any other --judge will do. The numbers
are ours. PROMPTS are some dozens of questions; DIALOGUES and HELPFULNESS may hold any layouts of `dpo-jax sft` and
`dpo-jax reward`.

    dpo-jax recipe llama2_chat configs/smollm2_chat.py --sft_data DIALOGUES.jsonl --helpful_data HELPFULNESS.jsonl \
        --prompts PROMPTS.jsonl --out runs/smollm2_chat
"""

from dpo_jax import config as c

SET = {"model": c.SET_BY_RECIPE, "out": c.SET_BY_RECIPE}
STAGE = {**SET, "lora": c.LoraConfig(rank=16), "checkpoint": c.CheckpointConfig(every=10)}
ANSWER, LENGTH = 24, 128

config = c.Llama2ChatRun(
    model="smollm2",
    sft_data=c.ON_COMMAND_LINE,
    helpful_data=c.ON_COMMAND_LINE,
    prompts=c.ON_COMMAND_LINE,
    judge="vader",
    out=c.ON_COMMAND_LINE,
    recipe=c.ChatRecipeConfig(rounds=2, pair_samples=4, pair_temperature=1.0, heldout=0.25),
    sft=c.SFTRun(
        **STAGE,
        optimizer=c.OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_ratio=0.1, floor=0.1),
        data=c.SFTDataConfig(c.SET_BY_RECIPE, max_length=LENGTH, buckets=1, limit=80),
        train=c.TrainConfig(batch_size=8, steps=10),
    ),
    helpful=c.RewardRun(
        **STAGE,
        reward=c.RewardLossConfig(ties="drop", centering=0.01, max_replies=2),
        optimizer=c.OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_ratio=0.1, floor=0.1),
        data=c.DataConfig(c.SET_BY_RECIPE, max_length=LENGTH, max_prompt_length=LENGTH - ANSWER - 8, buckets=1),
        train=c.TrainConfig(batch_size=8, steps=30),
        on_bad_rows="skip",
    ),
    rejection=c.RejectionRun(
        **STAGE,
        reward=c.SET_BY_RECIPE,
        rejection=c.RejectionConfig(samples=6),
        sample=c.SampleConfig(max_new_tokens=ANSWER),
        optimizer=c.OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_ratio=0.1),
        data=c.SFTDataConfig(c.SET_BY_RECIPE, max_length=LENGTH, buckets=1, train_on="last"),
        train=c.TrainConfig(batch_size=8, epochs=2),
    ),
    ppo=c.PPORun(
        **STAGE,
        reward=c.SET_BY_RECIPE,
        ppo=c.PPOLossConfig(epochs=2, minibatches=2, kl_coefficient=0.05, value="stopped"),
        sample=c.SampleConfig(max_new_tokens=ANSWER),
        optimizer=c.OptimizerConfig(learning_rate=3e-4),
        data=c.DataConfig(c.SET_BY_RECIPE, max_length=LENGTH, max_prompt_length=LENGTH - ANSWER - 8),
        train=c.TrainConfig(batch_size=16, steps=10),
    ),
)
