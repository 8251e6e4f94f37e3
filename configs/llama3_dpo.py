"""DPO as in the Llama 3 report (2024, section 4.1.4).

Learning rate 1e-5, beta 0.1; header and turn-end tokens of both responses are left out of the preference term; an NLL
term of weight 0.2 on the chosen response. The report trains on the pairs of its latest rounds that raters called
"significantly better" or "better". It gives no batch size, schedule or length: those below are ours.

    dpo-jax dpo configs/llama3_dpo.py --model SFT_MODEL --data PAIRS.jsonl --out runs/llama3
"""

from dpo_jax.config import OPEN, DataConfig, DPOLossConfig, DPORun, OptimizerConfig, TrainConfig

config = DPORun(
    **OPEN,
    dpo=DPOLossConfig(beta=0.1, nll_coefficient=0.2, mask_format_tokens=True),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_ratio=0.1),
    data=DataConfig(template="llama3", max_length=2048),
    train=TrainConfig(batch_size=128, epochs=1, dtype="bfloat16"),
)
