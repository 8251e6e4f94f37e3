"""Templates that write today's date: a run keeps the day on which it began."""

import datetime
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from runs import metrics
from transformers.utils import chat_template_utils

from dpo_jax import cli, load_tokenizer
from dpo_jax.config import DataConfig, PPORun, SFTDataConfig, SFTRun
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.tokens import templates
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.errors import InputError
from dpo_jax.files.day import with_day
from dpo_jax.files.folder import RunFolder, as_json

# As Llama 3.1's template says it.
DATED = (
    """\
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "Today " + date_string + "\n" }}
"""
    + tiny.TEMPLATE
)


class Clock:
    """A clock that stands still, for this project and for `transformers`."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.day = datetime.datetime(2026, 7, 26, 23, 59)
        fake = type("datetime", (datetime.datetime,), {"now": classmethod(lambda cls, tz=None: self.day)})
        day = type("date", (datetime.date,), {"today": classmethod(lambda cls: self.day.date())})
        patch.setattr(chat_template_utils, "datetime", fake)
        patch.setattr(templates, "datetime", SimpleNamespace(datetime=datetime.datetime, date=day), raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model whose template writes today's date."""
    folder = tiny.folder(tmp_path / "model", layers=1)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


def test_the_day_of_a_template(clock: Clock, model: Path) -> None:
    tokenizer, user = load_tokenizer(model), (Message("user", "hi"),)
    begun = ConversationEncoder(tokenizer, None)
    clock.day += datetime.timedelta(1)
    first, second = "Today 26 Jul 2026", "Today 27 Jul 2026"
    assert tokenizer.decode(begun.prompt_ids(user)).startswith(first), "midnight passes while a program runs"
    assert tokenizer.decode(ConversationEncoder(tokenizer, None).prompt_ids(user)).startswith(second)
    asked = ConversationEncoder(tokenizer, None, "2026-07-26").prompt_ids(user)
    assert asked == begun.prompt_ids(user)
    theirs = tokenizer.apply_chat_template([user[0].as_dict()], tokenize=False)
    assert theirs.startswith(second), "the fake clock is that of transformers too"
    assert templates.ChatTemplate(tokenizer, None).render(user) == theirs


def test_a_run_goes_on_the_next_day(clock: Clock, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = tiny.preferences(tmp_path / "pairs.jsonl", rows=8)
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    words = ["dpo", "--model", model, "--data", pairs, "--out", tmp_path / "run", "--train.steps", "3"]
    words += ["--data.buckets", "1", "--data.workers", "0", "--mesh.data", "8", "--mesh.fsdp", "1"]
    command = list(map(str, words))
    stopped: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("dpo_jax.train.loop.StopRequest.here", lambda self: stopped.append(0) or len(stopped) >= 2)
        assert cli.main(command) == 143
    before = metrics(tmp_path / "run")
    assert len(before) < 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["date"] == "2026-07-26"
    cached = sorted((tmp_path / "cache").rglob("*.npz"))
    clock.day += datetime.timedelta(1)
    assert cli.main(command) == 0
    assert len(metrics(tmp_path / "run")) == 3
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["date"] == "2026-07-26"
    assert sorted((tmp_path / "cache").rglob("*.npz")) == cached, "the same rows, from the cache"


def test_where_a_run_has_a_day(clock: Clock, model: Path, tmp_path: Path) -> None:
    dated, plain = load_tokenizer(model), tiny.tokenizer()

    def resolved(run: SFTRun | PPORun, tokenizer: object = dated) -> str | None:
        return with_day(run, RunFolder(tmp_path / "out", "sft", as_json(run)), tokenizer).data.date

    def sft(**data: str) -> SFTRun:
        return SFTRun(model="m", out="o", data=SFTDataConfig("d", **data))

    assert resolved(sft()) == "2026-07-26"
    assert resolved(sft(date="2020-02-29")) == "2020-02-29"
    assert resolved(sft(), plain) is None
    assert resolved(sft(template="chatml")) is None
    assert resolved(sft(kind="text")) is None
    # A reward model may have a template of its own.
    assert resolved(PPORun(model="m", data="d", out="o", reward="length"), plain) == "2026-07-26"
    assert resolved(PPORun(model="m", out="o", reward="length", data=DataConfig("d", template="raw")), plain) is None
    with pytest.raises(InputError, match="the date 2020-02-29 has no effect"):
        resolved(sft(date="2020-02-29"), plain)
    for wrong in ("yesterday", "2026-7-1", "2026-02-30"):
        with pytest.raises(InputError, match="write it as YYYY-MM-DD"):
            DataConfig(date=wrong)
    with pytest.raises(InputError, match=r"no effect with --data\.template raw"):
        DataConfig(template="raw", date="2026-07-26")


def test_commands_take_the_day_that_they_are_given(
    clock: Clock, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.preferences(tmp_path / "pairs.jsonl", rows=2)
    words = ["inspect", "--model", str(model), "--data", str(rows), "--rows", "1"]
    assert cli.main([*words, "--data.date", "2020-02-29"]) == 0
    shown = capsys.readouterr().out.replace("|", "")
    assert "Today 29 Feb 2020" in shown
    assert cli.main(words) == 0
    assert "Today 26 Jul 2026" in capsys.readouterr().out.replace("|", "")
    assert cli.main([*words, "--data.template", "chatml", "--data.date", "2020-02-29"]) == 2
    assert "the date 2020-02-29 has no effect" in capsys.readouterr().err
