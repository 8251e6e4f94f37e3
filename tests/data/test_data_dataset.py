"""From a file to a data set: which rows are used, which refuse the file, and what is kept of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers_for_tests import byte_level, llama2

from dpo_jax.config import DataConfig
from dpo_jax.data.sets.dataset import PreferenceDataset, load_preferences, partners
from dpo_jax.data.sets.inspect import pieces
from dpo_jax.data.tokens.ragged import Ragged
from dpo_jax.errors import InputError

CHATML = DataConfig(template="chatml", max_length=64, max_prompt_length=32)


def row(i: int, **change: Any) -> dict[str, Any]:
    return {"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}", **change}


def load(tmp_path: Path, rows: list[Any], config: DataConfig = CHATML, **options: Any) -> PreferenceDataset:
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return load_preferences(str(source), byte_level(), config, vocab_size=600, **options)


def test_rows_are_kept_in_order(tmp_path: Path) -> None:
    tokenizer = byte_level()
    data = load(tmp_path, [row(0, margin=0.5), "", row(1, source="web", id=7)])
    assert len(data) == 2
    assert data.row_numbers.tolist() == [1, 3]
    assert data.extras == {"margin": [0.5, None], "source": [None, "web"]}
    assert data.unused_columns == ("id",)
    assert data.responses_per_prompt == 2
    assert data.terminators == (tokenizer.eos_token_id,)
    assert tokenizer.decode(data.responses[2]) == "good 1<|im_end|>"
    assert tokenizer.decode(data.responses[3]) == "bad 1<|im_end|>"
    assert data.prompt_lengths.tolist() == [len(data.prompts[0]), len(data.prompts[1])]
    assert data.response_lengths[1].tolist() == [len(data.responses[2]), len(data.responses[3])]
    assert "columns not used: id" in data.summary()
    assert "100.0% of them whole" in data.summary()


BAD_ROWS = [
    '{"prompt"',
    "3",
    row(1, rejected=None),
    row(2, chosen=""),
    row(3, rejected="good 3"),
    row(4, prompt=7),
    {"a": 1},
]


def test_a_file_with_bad_rows_is_refused_in_one_line_after_the_last(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, [row(0), *BAD_ROWS, row(5, chosen=" ")])
    message = str(caught.value)
    assert "\n" not in message
    assert "8 of 9 rows cannot be used" in message
    assert "2 x empty completion: 'chosen' is blank (first: row 5" in message
    for words in (
        "malformed JSON (first: row 2",
        "not an object (first: row 3",
        "'rejected' is null (first: row 4",
    ):
        assert words in message
    for words in (
        "are the same (first: row 6",
        "'prompt' is not text (first: row 7",
        "unknown column names (first: row 8",
    ):
        assert words in message
    assert "--on_bad_rows skip" in message


def test_bad_rows_are_skipped_on_request(tmp_path: Path) -> None:
    data = load(tmp_path, [row(0), *BAD_ROWS, row(5)], on_bad_rows="skip")
    assert data.row_numbers.tolist() == [1, 9]
    assert data.dropped.total() == len(BAD_ROWS)
    assert data.rows_read == 9
    assert "malformed JSON" in data.problems
    with pytest.raises(InputError, match="none of 7 rows can be used"):
        load(tmp_path, list(BAD_ROWS), on_bad_rows="skip")


def test_the_log_has_one_short_line_for_each_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    many = {f"column_{i}_of_a_wide_table": "x" for i in range(60)}
    bad = [
        {"prompt": "Q?", **many},
        many,
        {"messages": "x" * 500, "chosen": "a"},
        {"prompt": ["x" * 500], "chosen": "a", "rejected": "b"},
    ]
    bad += [{"prompt": "Q?", "responses": ["x", "y"], f"score_{'s' * 300}": 1}, {"conversation": [], "x": 1}, many]
    with caplog.at_level("WARNING", "dpo_jax"):
        load(tmp_path, [row(0), *bad], on_bad_rows="skip")
    lines = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert len(lines) > 5
    assert all(len(line) <= 200 + len("left out ") for line in lines), lines
    assert sum("2 x unknown column names (first: row 3: the columns are column_0" in line for line in lines) == 1
    assert lines[-1] == "left out 7 of 8 rows (87.5%)"


def implicit(i: int, other: str = "") -> dict[str, str]:
    head = "\n\nHuman: Question {}?{}\n\nAssistant: "
    return {"chosen": head.format(i, "") + "good", "rejected": head.format(i, other) + "bad"}


def test_implicit_prompts_may_hold_a_little_noise(tmp_path: Path) -> None:
    """A published file with a few rows without a common prompt is used; one full of them is not what it seems."""
    data = load(tmp_path, [implicit(i, " Or not?" if i == 30 else "") for i in range(60)])
    assert data.dropped == {"no shared prompt": 1}
    assert 31 not in data.row_numbers
    with pytest.raises(InputError, match=r"2 x no shared prompt \(first: row 31"):
        load(tmp_path, [implicit(i, " Or not?" if i in (30, 40) else "") for i in range(60)])


def test_the_summary_tells_how_many_responses_were_cut(tmp_path: Path) -> None:
    data = load(tmp_path, [row(0), row(1, chosen="x" * 90)])
    assert "75.0% of them whole with their terminator" in data.summary()


def test_rows_lost_to_the_lengths_are_counted_not_refused(tmp_path: Path) -> None:
    same = row(1, chosen="x" * 90 + "a", rejected="x" * 90 + "b")
    data = load(tmp_path, [row(0), same])
    assert data.dropped == {"'chosen' and 'rejected' are the same tokens": 1}
    assert data.problems.startswith("1 x")


def test_lengths_and_missing_terminator_of_cut_responses(tmp_path: Path) -> None:
    data = load(tmp_path, [row(0, prompt="q" * 100, chosen="c" * 100)])
    assert data.prompt_lengths.tolist() == [32]
    assert data.response_lengths[0, 0] == 32
    assert data.terminators[0] not in data.responses[0]
    assert data.responses[1][-1] == data.terminators[0]


def test_limit_reads_no_further(tmp_path: Path) -> None:
    config = DataConfig(template="chatml", limit=2)
    assert load(tmp_path, [row(0), row(1), "not json"], config).row_numbers.tolist() == [1, 2]


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row(0)))
    with pytest.raises(InputError, match=r"row 1: the tokenizer gives the id .* embedding has 100 rows"):
        load_preferences(str(tmp_path / "a.jsonl"), byte_level(), CHATML, vocab_size=100)


def test_template_errors_reach_the_user_with_the_row(tmp_path: Path) -> None:
    refuses = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refuses += "{{ m.role + m.content + eos_token }}{% endfor %}"
    (tmp_path / "a.jsonl").write_text(json.dumps(row(0)) + "\n" + json.dumps(row(1, system="S")))
    tokenizer = byte_level(chat_template=refuses)
    with pytest.raises(InputError, match=r"the chat template refuses the conversation \(first: row 2: no system"):
        load_preferences(str(tmp_path / "a.jsonl"), tokenizer, DataConfig(), vocab_size=600)
    with pytest.raises(InputError, match=r"--data\.template"):
        load_preferences(str(tmp_path / "a.jsonl"), byte_level(), DataConfig(), vocab_size=600)


def test_fingerprint_follows_the_ids(tmp_path: Path) -> None:
    rows = [row(i) for i in range(3)]
    first = load(tmp_path, rows).fingerprint
    assert first == load(tmp_path, [{**r, "margin": 1} for r in rows]).fingerprint
    assert first != load(tmp_path, rows[::-1]).fingerprint
    assert first != load(tmp_path, [*rows[:2], row(2, chosen="good 7")]).fingerprint
    assert first != load(tmp_path, rows, with_format_masks=True).fingerprint


def test_reference_log_probabilities_are_carried(tmp_path: Path) -> None:
    data = load(tmp_path, [row(0), row(1)])
    logps = np.asarray([[-1, -2], [-3, -4]])
    np.testing.assert_array_equal(data.with_reference(logps).reference_logps, logps.astype(np.float32))
    assert data.reference_logps is None
    with pytest.raises(ValueError, match="reference"):
        data.with_reference(logps[:1])


def test_mismatched_responses_come_from_other_prompts(tmp_path: Path) -> None:
    rows = [row(0), row(0, chosen="fine"), row(1), row(2, chosen="y" * 200)]
    data = load(tmp_path, rows, with_mismatched=True, with_format_masks=True)
    assert data.responses_per_prompt == 4
    text = [[byte_level().decode(data.responses[4 * i + k]) for k in (2, 3)] for i in range(4)]
    assert text[0] == ["good 1<|im_end|>", "bad 1<|im_end|>"]  # rows 1 and 2 share a prompt: rows 3 and 4 serve them
    assert text[1][0].startswith("yyy")
    assert text[1][1] == "bad 2<|im_end|>"
    assert text[2] == ["good 0<|im_end|>", "bad 0<|im_end|>"]  # and the other way round
    assert text[3] == ["fine<|im_end|>", "bad 0<|im_end|>"]
    assert (data.prompt_lengths[:, None] + data.response_lengths[:, 2:] <= 64).all()
    assert data.formats is not None
    np.testing.assert_array_equal(data.formats.lengths, data.responses.lengths)
    with pytest.raises(InputError, match="KTO"):
        load(tmp_path, rows[:2], with_mismatched=True)


def test_every_answer_is_mismatched_once_where_that_can_be() -> None:
    rng = np.random.default_rng(0)
    for prompts in (
        [0, 1, 2, 3],
        [0, 0, 1, 1, 2, 2],
        [0, 1, 0, 1],
        rng.integers(0, 9, 200).tolist(),
        [2, 0, 1, 0, 0, 1],
    ):
        partner = partners(Ragged.of([np.asarray([p]) for p in prompts], np.int32))
        assert partner is not None
        assert all(prompts[i] != prompts[j] for i, j in enumerate(partner))
        assert sorted(partner) == list(range(len(prompts)))
    one_large = [0, 0, 0, 0, 1, 2]  # too many of one prompt: every other answer serves it, as evenly as can be
    partner = partners(Ragged.of([np.asarray([p]) for p in one_large], np.int32))
    assert partner is not None
    assert partner.tolist() == [4, 5, 4, 5, 0, 1]
    assert partners(Ragged.of([np.asarray([7])] * 3, np.int32)) is None


def test_unpaired_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "yes", "label": True},
        {"prompt": "b", "completion": "no", "label": False},
        row(0),
    ]
    with pytest.raises(InputError, match="2 x unpaired row"):
        load(tmp_path, rows)
    data = load(tmp_path, rows, needs_pairs=False, with_mismatched=True)
    assert (data.response_lengths > 0).tolist() == [
        [True, False, True, False],
        [False, True, True, True],
        [True, True, True, False],
    ]
    assert byte_level().decode(data.responses[2]) == "no<|im_end|>"
    only = load(tmp_path, rows[:2], needs_pairs=False, with_mismatched=True)
    assert only.responses_per_prompt == 3


def test_hh_and_sharegpt_files(shared_data: Path, tmp_path: Path) -> None:
    """Of 2,000 HH rows 4 share no prompt up to the last answer and 4 have a blank answer; the others are used."""
    tokenizer = llama2(shared_data, tmp_path)
    source = str(shared_data / "hh_harmless" / "train.jsonl.gz")
    config = DataConfig(template="llama2", max_length=384, max_prompt_length=256)
    data = load_preferences(source, tokenizer, config, vocab_size=32000, with_format_masks=True)
    assert len(data) == 1992
    assert data.dropped == {"no shared prompt": 4, "empty completion: 'chosen' is blank": 4}
    assert {1255, 1689, 1951, 1953, 87, 517, 926, 1104}.isdisjoint(data.row_numbers.tolist())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for i in range(len(data)):
        assert data.prompts[i][0] == bos
        assert (data.prompts[i] == bos).sum() == 1
        for ids in (data.responses[2 * i], data.responses[2 * i + 1]):
            assert bos not in ids
            cut = len(data.prompts[i]) + len(ids) == 384
            assert (ids == eos).sum() == (0 if cut and ids[-1] != eos else 1)
            assert cut or ids[-1] == eos
    assert data.formats is not None
    assert all(data.formats[k][-1] for k in range(3984) if data.responses[k][-1] == eos)

    sharegpt = load_preferences(str(shared_data / "dpo_en" / "pairs.jsonl"), tokenizer, config, vocab_size=32000)
    assert len(sharegpt) == 240


def test_pieces_of_a_row_join_to_its_text(tmp_path: Path) -> None:
    tokenizer = byte_level()
    data = load(tmp_path, [row(0, chosen="Gr\u00fc\u00dfe \U0001f600!", rejected="x")], with_format_masks=True)
    found = pieces(data, tokenizer, 0, 0)
    assert "".join(p.text for p in found) == tokenizer.decode([*data.prompts[0], *data.responses[0]])
    assert [i for p in found for i in p.ids] == [*data.prompts[0], *data.responses[0]]
    assert found[-1].part == "terminator"
    assert {p.part for p in found} == {"prompt", "response", "terminator"}
    assert [p.counts for p in found] == [p.part != "prompt" for p in found]
    assert any(p.text == "\U0001f600" for p in found)
