"""Small tokenizers, and the real Llama 2 one, for the tests of the data pipeline."""

import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dpo_jax.weights.tokenizers.folder_tokenizer import read_tokenizer

TEXT = (
    "Human Assistant user assistant system the quick brown fox jumps over a lazy dog. Hello, how are you today? "
    "I am fine, thank you! What is the capital of France? It is Paris.\n\nOne two three.\n\n"
) * 20
CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)


def byte_level(
    specials: tuple[str, ...] = CHATML_SPECIALS,
    *,
    eos: str = "<|im_end|>",
    bos: str | None = None,
    add_bos: bool = False,
    trim_offsets: bool = True,
    words: tuple[str, ...] = (),
    chat_template: str | None = None,
) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer without pad token. `words` become single tokens, wherever they stand."""
    tokenizer = Tokenizer(models.BPE())
    # No regular expression: merges may join letters with punctuation and newlines, as they may in cl100k-like ones.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=6,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.split(" "), trainer)
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w in words])
    steps: list[object] = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos and bos is not None:
        steps.append(processors.TemplateProcessing(f"{bos} $A", None, [(bos, tokenizer.token_to_id(bos))]))
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    fast.chat_template = chat_template
    return fast


def llama2(shared_data: Path, folder: Path, *, legacy: bool = False) -> PreTrainedTokenizerBase:
    """The real Llama 2 tokenizer: BOS 1 added in front, EOS 2, no pad token, no chat template."""
    shutil.copy(shared_data / "tokenizers" / "llama2.tokenizer.model", folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": legacy,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return read_tokenizer(folder)
