"""`--reward judge:FILE.yaml`: a judge's options as a reward, its scores, what has none, and a file that is wrong."""

import os
import re
from types import SimpleNamespace

import chat_server
import jax
import numpy as np
import pytest
import tiny

from dpo_jax import mesh
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.sets.prompts import Prompt
from dpo_jax.errors import InputError
from dpo_jax.judge.asked.judge_reward import read_judge
from dpo_jax.judge.rewards.functions import check_reward, open_reward, scores_of


def asked(count: int) -> list[Prompt]:
    return [Prompt((Message("user", f"q{i // 2}"),), None) for i in range(count)]


def option(tmp_path, text: str) -> str:
    (tmp_path / "j.yaml").write_text(text)
    return f"judge:{tmp_path / 'j.yaml'}"


def stars(body) -> str:
    text = body["messages"][-1]["content"]
    if "Text 1" in text:
        found = re.findall(r"<Text (\d)>\n(\**)", text)
        return "\n\n".join(f"#### Output for Text {i}\nRating: {len(s)}\nRationale: stars" for i, s in found)
    answer = re.search(r"\*+", text)
    return "no idea" if answer is None else f"[[{len(answer[0])}]]"


def test_scores_unparsed_replies_and_the_cache(tmp_path) -> None:
    config, rows = SimpleNamespace(out=str(tmp_path / "run")), np.asarray([4, 4, 9, 9])
    responses = ["**", "*****", "none", "*"]
    with chat_server.serving(stars) as server:
        name = option(tmp_path, f"endpoint: {{url: {server.url!r}, model: m, timeout: 5}}\nscale: 5\n")
        reward = check_reward(name, config)
        found = scores_of(reward, asked(4), responses, rows, name, finite=False)
        np.testing.assert_array_equal(found, [2, 5, np.nan, 1])
        before = sum(server.asked.values())
        assert before == 5  # the one without a reading was asked for twice
        again = check_reward(name, config)
        with pytest.raises(InputError, match="row 9 of the prompts is not finite"):
            scores_of(again, asked(4), responses, rows, name)
        assert sum(server.asked.values()) == before
        assert again.identity == reward.identity
        other = check_reward(option(tmp_path, f"endpoint: {{url: {server.url!r}, model: m}}\nscale: 4\n"), config)
        assert other.identity != reward.identity
    assert os.listdir(tmp_path / "run.replies")


def test_a_list_is_one_question_for_each_prompt(tmp_path) -> None:
    with chat_server.serving(stars) as server:
        name = option(tmp_path, f"ask: list\nendpoint: {{url: {server.url!r}, model: m}}\n")
        reward = check_reward(name, SimpleNamespace(out=str(tmp_path / "run")))
        np.testing.assert_array_equal(reward(asked(4), ["**", "*****", "***", "*"]), [2, 5, 3, 1])
        assert sum(server.asked.values()) == 2


def test_a_model_of_this_machine(tmp_path) -> None:
    folder = tiny.folder(tmp_path / "tiny", layers=1)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"name": "n", "type": "single", "system_prompt": "", "prompt_template": "{answer}"}')
    text = f"model: {folder}\ntemplate: zephyr\nprompts: {prompts}\nprompt_name: n\nsample: {{max_new_tokens: 2}}\n"
    name, config = option(tmp_path, text), SimpleNamespace(out=str(tmp_path / "run"))
    assert check_reward(name, config) is None
    one = mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    reward = open_reward(name, config, mesh=one, batch_size=8)
    assert np.isnan(reward(asked(2), ["a", "b"])).all()  # random weights write no rating
    assert read_judge(name).sample.temperature == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "the file holds no options"),
        ("a: [", "not readable as YAML"),
        ("!!python/object/apply:os.system ['true']", "not readable as YAML"),
        ("!!bool foo", "not readable as YAML"),
        ("ask: list\nask: rating", "ask stands there twice"),
        ("out: x\nmodel: m", "out is no option here; there are ask, prompts"),
        ("endpoint: {url: 'http://a/v1', model: m, api_key: k}", "endpoint.api_key is no option"),
        ("ask: rating", "give one judge: endpoint.url"),
        ("model: m\nscale: '5'", "scale '5' is not a whole number"),
        ("model: m\nask: best", "ask 'best' is not rating, expected"),
        ("model: m\ncriteria: [1]", "criteria 1 is not a text"),
        ("endpoint: {url: 'http://a/v1', model: m}\nask: pair", "is no score; ask rating, expected or list"),
        ("endpoint: {url: 'http://a/v1', model: m}\nask: checklist", "ask checklist needs criteria"),
        ("endpoint: {url: 'http://a/v1'}", "endpoint.model is missing"),
        ("model: nowhere", "nowhere"),
    ],
)
def test_a_file_that_is_wrong(text, message, tmp_path) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        check_reward(option(tmp_path, text), SimpleNamespace(out=str(tmp_path / "run")))
    assert str(error.value).startswith("--reward judge:")
    assert "\n" not in str(error.value)
