"""What the lengths cut off is counted and named, by every reader and by `inspect`."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from dpo_jax import cli
from dpo_jax.config import DataConfig, DPORun, PPORun, RewardLossConfig, SampleConfig
from dpo_jax.data.sets.comparison_sets import join, load_comparisons, load_responses
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.loader import PreferenceLoader
from dpo_jax.data.sets.prompts import load_prompts
from dpo_jax.data.tokens import cuts
from dpo_jax.data.tokens.cuts import RowCut
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.plan.programs import Lengths, lengths_of

TOKENIZER = tiny.tokenizer()
SYSTEM = "You are a bad film. Always answer red."
FITS = {  # 101 tokens, of them 90 and more of the prompt
    "system": SYSTEM,
    "prompt": f"question {'film ' * 20}end",
    "chosen": "good answer",
    "rejected": "bad answer",
}
LONG = FITS | {"prompt": f"question {'film ' * 80}end", "chosen": "good " * 90}
NO_SYSTEM = {name: value for name, value in LONG.items() if name != "system"}
SHORT = {"prompt": "what is red", "chosen": "film", "rejected": "book " * 150}
ROWS = [FITS, LONG, NO_SYSTEM, SHORT]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cuts") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def test_preferences_comparisons_and_responses_tell_what_they_lost(source: str) -> None:
    options: dict[str, Any] = {"vocab_size": 320}
    config = DataConfig(max_length=128)
    data = load_preferences(source, TOKENIZER, config, **options)
    fits, long, plain, short = data.cuts
    assert fits == RowCut()
    assert str(TOKENIZER.decode(data.prompts[0])).startswith(f"<|im_start|>system\n{SYSTEM}")
    assert long.prompt > 0
    assert (long.responses, long.system) == (1, True)
    assert data.prompt_lengths[1] == 64
    assert plain.prompt > 0
    assert (plain.responses, plain.system) == (1, False)
    assert short == RowCut(responses=1)
    summary = data.summary()
    for told in ("2 prompts cut", "1 system messages lost", "3 rows with a response cut"):
        assert told in summary
    assert "--data.max_length" in summary
    assert "too long" not in load_preferences(source, TOKENIZER, DataConfig(limit=1), **options).summary()
    # The shapes of batches hold the longest prompts.
    batch = next(iter(PreferenceLoader(data, batch_size=4, seed=0, buckets=1, workers=0)))
    assert batch.prompts.shape[1] >= data.prompt_lengths.max() > 64

    compared = load_comparisons(source, TOKENIZER, config, RewardLossConfig(), **options)
    assert compared.cuts == data.cuts == load_responses(source, TOKENIZER, config, **options).cuts
    part = compared.taken(compared.row_numbers[1:3] - 1)
    assert part.cuts == data.cuts[1:3]
    assert join(part, part).cuts == part.cuts * 2


def test_prompts_of_ppo(source: str) -> None:
    sample = SampleConfig(max_new_tokens=8)
    run = PPORun(model="m", out="o", reward="length", data=DataConfig(source, max_length=128), sample=sample)
    assert run.longest_prompt == 120  # what the answer leaves, and not half
    encoder = ConversationEncoder(TOKENIZER, None)
    data = load_prompts(source, encoder, run.data, longest=run.longest_prompt, vocab_size=320)
    assert data.ids.lengths.tolist()[1:3] == [120, 120]
    assert [cut.prompt > 0 for cut in data.cuts] == [False, True, True, False]
    assert [cut.system for cut in data.cuts] == [False, True, False, False]
    assert "2 prompts cut at their beginning; 1 system messages lost" in data.summary()


def test_inspect_says_what_each_row_lost(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.folder(tmp_path / "model")
    words = ["inspect", "--model", str(tmp_path / "model"), "--data", source, "--data.max_length", "128"]
    assert cli.main([*words, "--rows", "4"]) == 0
    said = capsys.readouterr()
    first, second, *_ = [line for line in said.out.splitlines() if line.startswith("row ")][::2]
    assert "cut" not in first
    assert "cut off the prompt's beginning, of its system message among them" in second
    assert "2 prompts cut at their beginning; 1 system messages lost" in said.err


def test_plans_without_a_limit_of_prompts_fill_half_of_a_row_with_them(source: str) -> None:
    run = DPORun(model="m", out="o", data=DataConfig(source, max_length=128))
    assert lengths_of(run, None, None) == Lengths(64, 64)
    run = DPORun(model="m", out="o", data=DataConfig(source, max_length=128, max_prompt_length=100))
    assert lengths_of(run, None, None) == Lengths(100, 28)


def test_a_report_counts_them() -> None:
    found = dict(cuts.counts([RowCut(), RowCut(3, 1, True), RowCut(2)]))
    assert list(found.values()) == [2, 1, 1]
    assert cuts.summary([RowCut()]) == ""
