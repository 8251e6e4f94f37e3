"""The stages of Llama 2-Chat (see `llama2_chat.py`), from SmolLM2-135M-Instruct, small enough for two CPU cores.

Two rounds in place of four, one judge, LoRA, short answers: it shows the machinery and the shift of distribution, not a
better model. With the sentiment lexicon as the judge the answers become kinder; any other --judge will do. The numbers
are ours. PROMPTS are some dozens of questions; DIALOGUES and HELPFULNESS may hold any layouts of `dpo-jax sft` and
`dpo-jax reward`.

    dpo-jax recipe llama2_chat configs/smollm2_chat.py --sft_data DIALOGUES.jsonl --helpful_data HELPFULNESS.jsonl \
        --prompts PROMPTS.jsonl --out runs/smollm2_chat
"""

from typing import Any

from dpo_jax.config import (
    ON_COMMAND_LINE,
    SET_BY_RECIPE,
    ChatRecipeConfig,
    CheckpointConfig,
    DataConfig,
    Llama2ChatRun,
    LoraConfig,
    OptimizerConfig,
    PPOLossConfig,
    PPORun,
    RejectionConfig,
    RejectionRun,
    RewardLossConfig,
    RewardRun,
    SampleConfig,
    SFTDataConfig,
    SFTRun,
    TrainConfig,
)

SET: dict[str, Any] = {"model": SET_BY_RECIPE, "out": SET_BY_RECIPE}
LORA: dict[str, Any] = {"lora": LoraConfig(rank=16), "checkpoint": CheckpointConfig(every=10)}
ANSWER, LENGTH = 24, 128

config = Llama2ChatRun(
    model="smollm2",
    sft_data=ON_COMMAND_LINE,
    helpful_data=ON_COMMAND_LINE,
    prompts=ON_COMMAND_LINE,
    judge="vader",
    out=ON_COMMAND_LINE,
    recipe=ChatRecipeConfig(rounds=2, pair_samples=4, pair_temperature=1.0, heldout=0.25),
    sft=SFTRun(
        **SET,
        **LORA,
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="cosine", warmup_ratio=0.1, floor=0.1),
        data=SFTDataConfig(SET_BY_RECIPE, max_length=LENGTH, buckets=1, limit=80),
        train=TrainConfig(batch_size=8, steps=10),
    ),
    helpful=RewardRun(
        **SET,
        **LORA,
        reward=RewardLossConfig(ties="drop", centering=0.01, max_replies=2),
        optimizer=OptimizerConfig(learning_rate=2e-4, schedule="cosine", warmup_ratio=0.1, floor=0.1),
        data=DataConfig(SET_BY_RECIPE, max_length=LENGTH, max_prompt_length=LENGTH - ANSWER - 8, buckets=1),
        train=TrainConfig(batch_size=8, steps=30),
        on_bad_rows="skip",
    ),
    rejection=RejectionRun(
        **SET,
        **LORA,
        reward=SET_BY_RECIPE,
        rejection=RejectionConfig(samples=6),
        sample=SampleConfig(max_new_tokens=ANSWER),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_ratio=0.1),
        data=SFTDataConfig(SET_BY_RECIPE, max_length=LENGTH, buckets=1, train_on="last"),
        train=TrainConfig(batch_size=8, epochs=2),
    ),
    ppo=PPORun(
        **SET,
        **LORA,
        reward=SET_BY_RECIPE,
        ppo=PPOLossConfig(epochs=2, minibatches=2, kl_coefficient=0.05, value="stopped"),
        sample=SampleConfig(max_new_tokens=ANSWER),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        data=DataConfig(SET_BY_RECIPE, max_length=LENGTH, max_prompt_length=LENGTH - ANSWER - 8),
        train=TrainConfig(batch_size=16, steps=10),
    ),
)
