"""Small tokenizers with the chat templates of the families, each in its family's own marks.

ChatML (Qwen, SmolLM3), with a system text of its own where none is given (Qwen 2.5); Gemma's, which calls the assistant
model and puts a system text before the first question; Phi-3's; Llama 3's with BOS; Granite's roles; OLMo 2's, whose
answers end in EOS.
"""

from pathlib import Path

import tiny
from tokenizers import processors

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
