"""The keys of a `config.json`: which change nothing, and what becomes of one that is not known.

A key that is not read may change the model's numbers, so it stops the command, unless it is on a list below, holds
nothing (null, false, 0, empty), or the user says that it is to be ignored.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dpo_jax.errors import InputError
from dpo_jax.headers import told

OPTION = "--ignore_config_keys"

# What transformers itself writes: how the model was made or is served, and none of its numbers.
USUAL = frozenset(
    """_name_or_path architectures model_type torch_dtype dtype transformers_version use_cache pad_token_id bos_token_id
    eos_token_id initializer_range pretraining_tp is_llama_config rope_interleaved transformers.js_config auto_map
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    use_return_dict return_dict output_attentions output_hidden_states chunk_size_feed_forward num_labels id2label
    label2id problem_type task_specific_params unk_token_id finetuning_task tokenizer_class prefix sep_token_id
    decoder_start_token_id""".split()
)  # fmt: skip

# What others add to Llama and Mistral checkpoints, as harmless; named once. How to sample, how it was trained, by what.
HARMLESS = frozenset(
    """max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens unsloth_fixed unsloth_version unsloth_training_args max_sequence_length model_max_length
    max_seq_len max_seq_length seq_length tokenizer_model_max_length tokenizer_padding_side padding_side bos_token
    eos_token pad_token unk_token max_window_layers neftune_noise_alpha gradient_checkpointing use_flash_attn
    use_flash_attention _flash_attn_2_enabled use_flash_attention_2 torchscript use_bfloat16 tf_legacy_loss
    license language tags library_name model_name base_model datasets fp16 bf16 embd_pdrop resid_pdrop
    attn_pdrop hidden_dropout""".split()
)  # fmt: skip

QUANTIZED = "quantization_config"


class _Ignored:
    """Keys that the user says are to be ignored, and those of them that were met."""

    def __init__(self, keys: Collection[str], met: set[str]):
        self.keys, self.met = frozenset(keys), met


_IGNORED: ContextVar[_Ignored] = ContextVar("ignored config keys")
_NONE = _Ignored((), set())


@contextmanager
def ignoring(keys: Collection[str]) -> Iterator[set[str]]:
    """Within the block, configurations are read without `keys`. Yields the set of those that were met so far."""
    outer = _IGNORED.get(None)
    now = _Ignored(keys, set()) if outer is None else _Ignored({*keys, *outer.keys}, outer.met)
    token = _IGNORED.set(now)
    try:
        yield now.met
    finally:
        _IGNORED.reset(token)


def ignored(key: str) -> bool:
    """Whether the user says that `key` is to be ignored."""
    found = _IGNORED.get(_NONE)
    if key in found.keys:
        found.met.add(key)
    return key in found.keys


def left_unread(raw: Mapping[str, Any], asked: Collection[str], where: str, prefix: str = "") -> list[str]:
    """The keys that are not read although they hold something or are nothing that `transformers` writes.

    Args: the fields; the names of those that were read; the file, and what stands before the names, in errors.
    Raises `InputError` for one that may change the model's numbers.
    """
    found = []
    for key in sorted(raw.keys() - set(asked)):
        if not prefix and key in USUAL:
            continue
        if not (ignored(prefix + key) or not raw[key] or (not prefix and key in HARMLESS)):
            raise InputError(
                f"{where}: unknown key {prefix}{key} = {told(raw[key])}, which may change what the model computes; "
                f"if it does not, {OPTION} {prefix}{key} leaves it out"
            )
        found.append(prefix + key)
    return found


def refuse_quantized(value: Any, where: str) -> None:
    """Raise `InputError` where a configuration says that its weights are quantised; `value` is what it says."""
    if not value:
        return
    method = value.get("quant_method") if isinstance(value, dict) else None
    how = f" by {told(method)}" if method else ""
    raise InputError(
        f"{where}: {QUANTIZED}: the weights are quantised{how}, in a form that is not read; give the model that it was "
        "made from, or a GGUF file of it"
    )
