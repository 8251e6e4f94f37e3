"""The Ghost Attention of Llama 2-Chat: Touvron et al. 2023 (arXiv 2307.09288), section 3.3 and appendix A.3.5.

Constraints are hobbies ("You enjoy tennis"), languages and public figures ("Act as Napoleon"), combined at random into
harder instructions; about half of the training dialogues hold a terser form ("Figure: Napoleon."). The loss of all
turns before the last is 0. Applied after RLHF, on samples of the newest model; the paper reports attributes kept in all
answers up to turn 20, where without it they are lost after a few turns. Fine-tuning has the numbers of the paper's SFT
(section 3.1): a cosine from 2e-5, weight decay 0.1, batches of 64, 2 epochs. What the paper does not say is ours: how
many dialogues of how many turns, and temperature 1. 20 turns in 4096 tokens leave each answer about 150.

    dpo-jax gatt configs/llama2_gatt.py --model RLHF_MODEL --data DIALOGUES.jsonl --out runs/llama2_gatt
"""

from dpo_jax import config as c

config = c.GattRun(
    **c.OPEN,
    gatt=c.GattConfig(
        synthesised=1000,
        kinds=("hobby", "language", "figure"),
        combine=3,
        short=0.5,
        dialogues=4000,
        turns=8,
        eval_dialogues=200,
        eval_turns=20,
    ),
    sample=c.SampleConfig(max_new_tokens=128),
    sample_batch_size=64,
    optimizer=c.OptimizerConfig(learning_rate=2e-5, schedule="cosine", weight_decay=0.1),
    data=c.SFTDataConfig(template="llama2", max_length=4096),
    train=c.TrainConfig(batch_size=64, epochs=2, dtype="bfloat16", remat="full"),
)
