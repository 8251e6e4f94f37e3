"""Chat templates as the families' tokenizer files hold them: what is rendered and encoded is what `transformers` makes.

Small templates in each family's own marks: ChatML (Qwen, SmolLM3), with a system text of its own where none is given
(Qwen 2.5); Gemma's, which calls the assistant model and puts a system text before the first question; Phi-3's;
Llama 3's with BOS; Granite's roles; OLMo 2's, whose answers end in EOS.
"""

from pathlib import Path

import pytest
import tiny
from tokenizers import processors

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer
from dpo_jax.weights.folder_tokenizer import read_tokenizer

_EACH = "{% for m in messages %}"
_GO = "{% if add_generation_prompt %}"
TEMPLATES: dict[str, tuple[list[str], str, str]] = {
    "qwen": (
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
        "<|im_end|>",
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
        + _EACH + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        + _GO + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "gemma": (
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
        "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
        + _EACH + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ (first if loop.first else '') + m.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
        + _GO + "{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "phi": (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"],
        "<|end|>",
        _EACH + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + _GO + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    ),
    "llama": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        "{{ bos_token }}" + _EACH + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        + _GO + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "granite": (
        ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"],
        "<|end_of_text|>",
        _EACH + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}"
        + _GO + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
    ),
    "olmo": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"],
        "<|endoftext|>",
        "{{ bos_token }}" + _EACH + "{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        + _GO + "{{ '<|assistant|>\n' }}{% endif %}",
    ),
}  # fmt: skip
TURNS = [("user", "was the film good?"), ("assistant", "not very."), ("user", " why  so?\n12 ")]


def folder(path: Path, name: str) -> Path:
    """The files of a tokenizer of that family."""
    marks, _, template = TEMPLATES[name]
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.eos_token = {"gemma": "<eos>", "phi": "<|endoftext|>", "llama": "<|eot_id|>"}.get(name, marks[-1])
    tokenizer.eos_token = "<|endoftext|>" if name in ("qwen", "olmo") else tokenizer.eos_token
    tokenizer.bos_token = {"olmo": "<|endoftext|>", "gemma": "<bos>", "llama": "<|begin_of_text|>"}.get(name)
    if name in (
        "gemma",
        "llama",
    ):  # both the tokenizer and the template write BOS
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_what_transformers_makes(tmp_path: Path, name: str, system: bool) -> None:
    tokenizer = read_tokenizer(folder(tmp_path / "t", name))
    turns = [("system", "be kind"), *TURNS] if system else TURNS
    chat = ChatTokenizer(tokenizer, None)
    rows = [{"role": role, "content": content} for role, content in turns]
    theirs = tokenizer.apply_chat_template(rows, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chat.prompt_ids([Message(*turn) for turn in turns]) == theirs
    assert chat.terminators[0] == tokenizer.convert_tokens_to_ids(TEMPLATES[name][1])
    assert (theirs.count(tokenizer.bos_token_id) == 1) or tokenizer.bos_token is None or name == "olmo"
