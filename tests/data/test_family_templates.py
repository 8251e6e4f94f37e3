"""Chat templates as the families' tokenizer files hold them, and ours by name: what is rendered and encoded is what
`transformers` makes."""

import runpy
from pathlib import Path

import pytest
import tiny
from family_tokenizers import TEMPLATES, folder

from dpo_jax.config import DataConfig, SFTDataConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.tokens.chat_tokenizer import ChatTokenizer
from dpo_jax.data.tokens.templates import with_template
from dpo_jax.errors import InputError
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


@pytest.mark.parametrize("template", [None, "zephyr", "llama2", "chatml"])
def test_an_empty_system_message_where_there_is_none(tmp_path: Path, template: str | None) -> None:
    """As a row that holds it; and the exported template does so in transformers, however often it is set."""
    tokenizer = tiny.tokenizer()
    plain, with_it = ChatTokenizer(tokenizer, template), ChatTokenizer(tokenizer, template, empty_system=True)
    turns = [Message(*turn) for turn in TURNS]
    assert with_it.prompt_ids(turns) == plain.prompt_ids([Message("system", ""), *turns]) != plain.prompt_ids(turns)
    named = [Message("system", "be kind"), *turns]
    assert with_it.prompt_ids(named) == plain.prompt_ids(named)
    if template != "llama2":
        assert with_it.following_ids(turns[:1]) == plain.following_ids(turns[:1])
    exported = with_template(tokenizer, template, empty_system=True)
    again = with_template(exported, None, empty_system=True)
    assert again.chat_template == exported.chat_template
    rows = [{"role": role, "content": content} for role, content in TURNS]
    theirs = exported.apply_chat_template(rows, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert with_it.prompt_ids(turns) == theirs


def test_an_empty_system_message_that_is_not_written_is_refused() -> None:
    tokenizer = tiny.tokenizer()
    every = "{% for m in messages if m.content %}{{ m.content }}{% endfor %}"
    never = "{% for m in messages %}{{ m.content if m.role != 'system' else raise_exception('no') }}{% endfor %}"
    for template, refused in (
        (every, "has no effect: the chat template writes no"),
        (never, "--data.empty_system: the chat template refuses"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=refused):
            ChatTokenizer(tokenizer, None, empty_system=True)
    with pytest.raises(InputError, match=r"--data\.empty_system has no effect with --data\.template raw"):
        DataConfig("x.jsonl", template="raw", empty_system=True)
    with pytest.raises(InputError, match=r"--data\.empty_system has no effect with --data\.kind text"):
        SFTDataConfig("x.jsonl", kind="text", empty_system=True)


def test_the_published_table_is_what_comes_out() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "chat_templates.py"))["table"]
    assert table() in (ROOT / "docs" / "chat_templates.md").read_text()
