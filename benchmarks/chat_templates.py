"""The table of docs/chat_templates.md: ids of dialogues, ours beside `transformers`' `apply_chat_template`.

    python benchmarks/chat_templates.py

Templates by name are asked of `transformers` as a run exports them, into a tokenizer's files and read again; those of
the families stand in small tokenizers with the families' own marks (`tests/support/family_tokenizers.py`). No network.
"""

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import family_tokenizers
import tiny
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer
from dpo_jax.data.tokens.templates import with_template
from dpo_jax.weights.tokenizers.folder_tokenizer import read_tokenizer

NAMED = {
    "llama2": [],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "zephyr": [],
    "chatml": ["<|im_start|>", "<|im_end|>"],
}
"""Templates that `--data.template` names -> the control tokens that they need."""
QUESTION = [("user", "was the film good?")]
SYSTEM = [("system", "be kind")]
TURNS = [*QUESTION, ("assistant", "not very."), ("user", " why  so?\n12 ")]
CASES = {
    "one question": QUESTION,
    "system, one question": SYSTEM + QUESTION,
    "three turns": TURNS,
    "system, three turns": SYSTEM + TURNS,
    "five turns": [*TURNS, ("assistant", "it was long."), ("user", "ok")],
}


def same_ids(chat: ChatTokenizer, theirs: PreTrainedTokenizerBase) -> list[bool]:
    """For each case, whether the ids of the prompt are those of `transformers`."""
    same = []
    for turns in CASES.values():
        rows = [{"role": role, "content": content} for role, content in turns]
        ids = theirs.apply_chat_template(rows, add_generation_prompt=True, tokenize=True, return_dict=False)
        same.append(chat.prompt_ids([Message(*turn) for turn in turns]) == ids)
    return same


def end_of(chat: ChatTokenizer, tokenizer: PreTrainedTokenizerBase) -> str:
    """What an answer ends with."""
    (end,) = tokenizer.convert_ids_to_tokens([chat.terminators[0]])
    return "EOS" if end == tokenizer.eos_token else f"`{end}`"


def table() -> str:
    """As Markdown."""
    found: dict[str, tuple[list[bool], str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, marks in NAMED.items():
            tokenizer = tiny.tokenizer()
            tokenizer.add_special_tokens({"additional_special_tokens": marks})
            exported = with_template(tokenizer, name)
            exported.save_pretrained(Path(scratch) / name)
            chat = ChatTokenizer(tokenizer, name)
            found[f"`{name}`, by name"] = same_ids(chat, read_tokenizer(Path(scratch) / name)), end_of(chat, tokenizer)
        for name in family_tokenizers.TEMPLATES:
            tokenizer = read_tokenizer(family_tokenizers.folder(Path(scratch) / f"family {name}", name))
            chat = ChatTokenizer(tokenizer, None)
            found[f"{name}, the tokenizer's own"] = same_ids(chat, tokenizer), end_of(chat, tokenizer)
    head = f"| template | {' | '.join(CASES)} | an answer ends with |\n|---|{'---|' * (len(CASES) + 1)}"
    said = {True: "same ids", False: "differs"}
    rows = (f"| {name} | {' | '.join(said[one] for one in same)} | {end} |" for name, (same, end) in found.items())
    return "\n".join([head, *(row.replace("<|", "<\\|").replace("|>", "\\|>") for row in rows)])


if __name__ == "__main__":
    print(table())
