"""Chat templates as the families' tokenizer files hold them, and ours by name: what is rendered and encoded is what
`transformers` makes."""

import runpy
from pathlib import Path

import pytest
from family_tokenizers import TEMPLATES, folder

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer
from dpo_jax.weights.tokenizers.folder_tokenizer import read_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TURNS = [("user", "was the film good?"), ("assistant", "not very."), ("user", " why  so?\n12 ")]


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


def test_the_published_table_is_what_comes_out() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "chat_templates.py"))["table"]
    assert table() in (ROOT / "docs" / "chat_templates.md").read_text()
