"""Ghost Attention that two CPU cores can make: SmolLM2-135M learns to stay in the language it was asked to answer in.

The experiment of Llama 2 (Touvron et al. 2023, section 3.3; `llama2_gatt.py`) with what so small a model can do
when the instruction stands right before it: answer in Spanish, French or German. The constraints are "Always answer in
Spanish." and the like, and the Spanish, French and German system prompts of a file such as BiGGen Bench's; the
questions are in English, one after another, so that nothing but the first turn says which language is wanted.
Language identification judges the answers; it does not judge their sense, which is little at 135M parameters. Only
answers that pass are learnt (--gatt.keep consistent), as rejection sampling would; the numbers are ours. Trained on
dialogues of three turns, it is judged on six. About ten minutes.

    dpo-jax gatt configs/smollm2_gatt.py --data QUESTIONS.jsonl --gatt.instructions SYSTEM_PROMPTS.jsonl --out runs/gatt
"""

from dpo_jax import config as c

config = c.GattRun(
    model="smollm2",
    out=c.ON_COMMAND_LINE,
    gatt=c.GattConfig(
        synthesised=3,
        kinds=("language",),
        languages=("es", "fr", "de"),
        short=0.5,
        dialogues=54,
        turns=3,
        train_turns="every",
        keep="consistent",
        eval_dialogues=18,
        eval_turns=6,
    ),
    sample=c.SampleConfig(max_new_tokens=24, temperature=0.7),
    sample_batch_size=18,
    lora=c.LoraConfig(rank=16),
    optimizer=c.OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=2),
    data=c.SFTDataConfig(max_length=512, buckets=3),
    train=c.TrainConfig(batch_size=4, epochs=2),
    checkpoint=c.CheckpointConfig(every=10, keep=1),
)
