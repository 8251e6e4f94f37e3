"""Chinese Llama 2, step 1 of 4: Chinese pieces for the vocabulary, and rows for them in the model.

23,296 new pieces make 55,296 in all, the number of Chinese-LLaMA-2 (Cui et al. 2023, arXiv 2304.08177, and the scripts
of its second edition); each new row is the mean of the rows that spelled its piece before. The four steps, each from
the folder of the one before:

    dpo-jax extend-vocab configs/chinese_llama2_1_extend.py --model LLAMA2 --data ZH.jsonl --to runs/zh1
    dpo-jax sft configs/chinese_llama2_2_pretrain.py --model runs/zh1 --data ZH.jsonl:0.9 EN.jsonl:0.1 --out runs/zh2
    dpo-jax sft configs/chinese_llama2_3_sft.py --model runs/zh2 --data ZH_DIALOGUES.jsonl --out runs/zh3
    dpo-jax dpo configs/chinese_llama2_4_dpo.py --model runs/zh3 --data ZH_PAIRS.jsonl --out runs/zh4

From little text fewer pieces can be learnt: give `--pieces` then. To take the published tokenizer instead:
`dpo-jax extend-vocab --model LLAMA2 --tokenizer FILE.model --to runs/zh1`.
"""

from dpo_jax.config import ON_COMMAND_LINE, ExtendVocabRun

config = ExtendVocabRun(model=ON_COMMAND_LINE, to=ON_COMMAND_LINE, data=(ON_COMMAND_LINE,), pieces=23_296)
