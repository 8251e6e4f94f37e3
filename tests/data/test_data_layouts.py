"""Every layout of columns in docs/data.md: as a pair, as a comparison, and as a dialogue."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from dpo_jax.config import DataConfig, RewardLossConfig
from dpo_jax.data.rows.comparisons import parse_comparison, parse_preference
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.layouts import LAYOUTS
from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import parse_prompt
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.rows.readable import readable, sources, together
from dpo_jax.data.sets.comparison_sets import load_comparisons, parse_responses
from dpo_jax.data.sets.dataset import load_preferences
from dpo_jax.data.sets.documents import load_documents
from dpo_jax.data.sets.prompts import load_prompts
from dpo_jax.data.sets.sequences import load_dialogues
from dpo_jax.data.sources import store_schema
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder
from dpo_jax.errors import InputError

TOKENIZER = tiny.tokenizer()
PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")


def examples() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """(section, title, rows) of every example of the page."""
    found = []
    for section in PAGE.split("\n## ")[1:]:
        for title, block in re.findall(r"### ([^\n]*)\n```json\n(.*?)```", section, re.DOTALL):
            found.append((section.partition("\n")[0], title, [json.loads(line) for line in block.splitlines()]))
    return found


EXAMPLES = examples()
DIALOGUES = ("Dialogues", "Messages")
COMPARED = [(title, row) for section, title, rows in EXAMPLES if section not in DIALOGUES for row in rows]
HELPSTEER2 = next(rows for _, title, rows in EXAMPLES if title.startswith("HelpSteer2:"))


@pytest.mark.parametrize(("title", "row"), [(t, r) for t, r in COMPARED if not t.startswith("HelpSteer2:")])
def test_preferences(title: str, row: dict[str, Any]) -> None:
    pair = parse_preference(row)
    assert (pair.messages[-1].content, pair.chosen, pair.rejected) == ("Q?", "good", "bad")
    found = parse_comparison(row)
    assert found.messages == pair.messages
    assert found.places is not None
    assert [found.responses[found.places.index(place)] for place in (0, 1)] == ["good", "bad"]
    assert sorted(parse_responses(row).responses) == ["bad", "good"]
    dialogue = parse_dialogue(row)
    assert dialogue.messages == (*pair.messages, Message("assistant", "good"))


@pytest.mark.parametrize(("title", "row"), [(t, r) for s, t, rows in EXAMPLES if s in DIALOGUES for r in rows])
def test_dialogues(title: str, row: dict[str, Any]) -> None:
    assert [m.content for m in parse_dialogue(row).messages][-2:] == ["Q?", "good"]


def test_what_prepare_makes_of_them() -> None:
    """Answers that are compared are stored as pairs, and are not taken for dialogues."""
    for section, title, rows in EXAMPLES:
        kind = "dialogues" if section in DIALOGUES or title.startswith("HelpSteer2:") else "preferences"
        kind = "preferences" if "KTO" in title else kind
        for row in rows:
            assert store_schema.kind_of(row) == kind, title
            stored = store_schema.parse(row, kind).columns
            if section not in DIALOGUES and kind == "preferences":
                assert (stored["chosen"], stored["rejected"]) == ("good", "bad"), title
    assert store_schema.kind_of({"text": "a document"}) == "text"


def test_neighbouring_rows_with_one_scored_answer() -> None:
    rows = [*HELPSTEER2, {**HELPSTEER2[0], "prompt": "other"}, {"prompt": "other", "chosen": "a", "rejected": "b"}]
    numbers, found = zip(*together(enumerate(rows, 1)), strict=True)
    assert numbers == (1, 3, 4)
    pair = parse_preference(found[0])
    assert (pair.messages[-1].content, pair.chosen, pair.rejected) == ("Q?", "good", "bad")
    assert pair.extras == {"score_chosen": 3, "score_rejected": 1}
    with pytest.raises(BadRow, match="a scored answer without another to the same prompt") as alone:
        parse_preference(found[1])
    assert alone.value.severity == "lost"
    assert found[2] is rows[3]
    by_correctness = [{**row, "score": row["correctness"]} for row in HELPSTEER2]
    ((_, row),) = together(enumerate(by_correctness, 1))
    assert parse_preference(row).chosen == "bad"


def test_neighbouring_rows_say_what_of_them_is_read(tmp_path: Path) -> None:
    data = load(tmp_path, HELPSTEER2)
    assert data.used_columns == ("helpfulness as scores", "prompt", "response as responses")
    assert "response" not in data.unused_columns


def test_every_layout_of_the_table_has_an_example() -> None:
    rows = [readable(row) for _, _, rows in EXAMPLES for row in rows]
    for layout in LAYOUTS:
        places = {place for where in layout.columns.values() for place in where.split()}
        there = [{place for where in row.sources.values() for place in where} for row in rows]
        assert any(places <= found for found in there) or layout.name == "ms-swift", layout.name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response_0": "x", "response_1": "y"}, "nothing says which response is better"),
        ({"response_0": "x", "response_1": "y", "better_response_id": -1}, "'better_response_id' does not name one"),
        ({"response_0": "x", "response_1": "y", "better_response_id": True}, "'better_response_id' does not name one"),
        ({"response_1": "x", "response_2": "y", "preference_strength": 0}, "a tie: no response is better"),
        ({"response1": "x", "response2": "y", "safer_response_id": 0}, "nothing says which|may say which"),
        ({"human_ref_A": "x", "human_ref_B": "y", "history": "Q?", "labels": 1, "score_A": 1, "score_B": 2},
         "'score_A' and 'labels' rank the replies twice, and differently"),
        ({"conversation_a": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "x"}],
          "conversation_b": [{"role": "user", "content": "R"}, {"role": "assistant", "content": "y"}],
          "winner": "model_a"}, "no shared prompt"),
        ({"generations": ["x", "y"], "winner": "tie"}, "'winner' may say which entry"),
        ({"generations": ["x", "y"]}, "nothing says which response is better"),
        ({"generations": ["x", "y"], "correctness_math_verify": [False, True]}, "'correctness_math_verify' may say"),
        ({"responses": ["x", "y"], "quality": [0.1, 0.9]}, "'quality' may say which entry"),
        ({"responses": ["x", "y"], "labels": [0, 1]}, "'labels' may say which entry"),
        ({"responses": [{"text": "x", "helpfulness": 1}, {"text": "y", "helpfulness": 4}]}, "'helpfulness' may say"),
        ({"answers": [{"text": "x", "selected": False}, {"text": "y", "selected": True}]}, "'selected' may say"),
        ({"response_1": "x", "response_2": "y", "better": 0}, "'better' does not name one .*write 1 or 2"),
        ({"response_1": "x", "response_2": "y", "preference": 1}, "'preference' may be a number of a response, or how"),
        ({"input": {"messages": 3}, "preferred_output": "x", "non_preferred_output": "y"}, "'prompt' is not text"),
        ({"input": "Q?", "preferred_output": "x", "non_preferred_output": "y"}, "'input' is no object"),
        ({"messages": "Q?", "rejected_response": "y"}, "'messages' is not a list of messages"),
    ],
)  # fmt: skip
def test_refused(row: dict[str, Any], message: str) -> None:
    prompt = {} if {"history", "conversation_a", "input", "messages"} & row.keys() else {"prompt": "Q?"}
    with pytest.raises(BadRow, match=message):
        parse_preference({**prompt, **row})


def test_two_that_are_numbered_from_one_are_named_by_those_numbers() -> None:
    row = {"instruction": "Q?", "input": "I", "output_1": "x", "output_2": "y", "preference": 1, "raw_preference": 2}
    assert parse_preference(row).chosen == "x"
    assert parse_preference({**row, "preference": 2}).chosen == "y"


@pytest.mark.parametrize("name", ["num_tokens", "token_counts", "seed", "answer_id", "lengths", "created_at"])
def test_measures_of_responses_do_not_judge_them(name: str) -> None:
    assert parse_preference({"prompt": "Q?", "responses": ["good", "bad"], name: [3, 5]}).chosen == "good"
    entries = [{"text": "good", name: 3}, {"text": "bad", name: 5}]
    assert parse_preference({"prompt": "Q?", "responses": entries}).chosen == "good"


@pytest.mark.parametrize(
    "answers",
    [
        {"chosen": "good", "rejected": "bad"},
        {"responses": ["good", "bad"]},
        {"response_a": "good", "response_b": "bad", "score_a": 2, "score_b": 1},
        {"output": "good"},
    ],
)
def test_what_was_said_before_is_read_whatever_is_asked_of_the_row(answers: dict[str, Any]) -> None:
    """`history`, and `context` below an instruction or a question, of dialogues, pairs, lists and prompts alike."""
    row = {"question": "Q?", "context": "C", "history": [["q", "a"]], "system": "S", **answers}
    turns = ["S", "q", "a", "Q?\nC"]
    assert [m.content for m in parse_prompt(row)[0]] == turns
    assert [m.content for m in parse_dialogue(row).messages] == [*turns, "good"]
    if "output" not in answers:
        assert [m.content for m in parse_preference(row).messages] == turns
    assert sources(row)["context"] == "input"
    assert "context" not in sources({"prompt": "Q?", "context": "C", **answers})
    with pytest.raises(BadRow, match="'context' and 'input' beside one prompt"):
        parse_prompt({"instruction": "Q?", "context": "C", "input": "I"})


def test_messages_that_a_table_spells() -> None:
    """They are never taken for the text of an answer, which a model would learn to write."""
    asked = {"role": "user", "content": "Q?"}
    chosen, rejected = ([asked, {"content": text, "role": "assistant"}] for text in ("good", "bad"))
    row = {"prompt": "Q?", "chosen": json.dumps(chosen, indent=1), "rejected": json.dumps(rejected)}
    pair = parse_preference(row)
    assert (pair.messages[-1].content, pair.chosen, pair.rejected) == ("Q?", "good", "bad")
    spelled = {"messages": json.dumps(chosen)}
    assert [m.content for m in parse_dialogue(spelled).messages] == ["Q?", "good"]
    assert [m.content for m in parse_prompt({"prompt": json.dumps([asked])})[0]] == ["Q?"]
    assert parse_preference({**spelled, "rejected_response": "bad"}).chosen == "good"
    for printed in (str(chosen), str(chosen).replace("}, {", "}\n {")):
        with pytest.raises(BadRow, match=r"'chosen' spells messages, and not as JSON .*json\.dumps"):
            parse_preference({**row, "chosen": printed})
    code = '[{"name": "role", "content": 1}]'
    assert parse_preference({"prompt": "Q?", "chosen": code, "rejected": "bad"}).chosen == code


def test_copies_of_the_turns_and_answers_that_are_marked_as_bad() -> None:
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "good"}]
    magpie = {"instruction": "Q?", "response": "good", "conversations": turns}
    assert [m.content for m in parse_dialogue(magpie).messages] == ["Q?", "good"]
    with pytest.raises(BadRow, match="several fields give the dialogue"):
        parse_dialogue({**magpie, "response": "other"})
    with pytest.raises(BadRow, match="'label' is false") as caught:
        parse_dialogue({"messages": turns, "label": False})
    assert caught.value.severity == "lost"


def test_calls_of_tools_are_named_whether_or_not_a_text_stands_beside_them() -> None:
    for content in (None, "", "look"):
        call = {"role": "assistant", "content": content, "tool_calls": [{"id": "1"}]}
        with pytest.raises(BadRow, match="tool_calls in 'messages'"):
            parse_dialogue({"messages": [{"role": "user", "content": "Q?"}, call]})


def test_tools_beside_the_messages_of_an_input() -> None:
    said = {"messages": [{"role": "user", "content": "Q?"}], "tools": [{"type": "function"}]}
    row = {"input": said, "preferred_output": "good", "non_preferred_output": "bad"}
    assert parse_preference(row).messages[0].tools == [{"type": "function"}]


def test_what_has_the_readers_names_stays() -> None:
    """A column under the readers' name is not replaced, and what a layout would read of it is not used."""
    row = {"prompt": "Q?", "response_0": "bad", "response_1": "good", "better_response_id": 0, "better": 1}
    assert parse_preference(row).chosen == "good"
    assert sources(row) == {"response_0": "responses", "response_1": "responses"}
    math = {"problem": "Q?", "solution": "good", "messages": [{"role": "user", "content": "Q?"},
                                                              {"role": "assistant", "content": "good"}]}  # fmt: skip
    assert sources(math) == {}
    assert [m.content for m in parse_dialogue(math).messages] == ["Q?", "good"]
    implicit = {
        "input": "I",
        "chosen": "\n\nHuman: Q?\n\nAssistant: good",
        "rejected": "\n\nHuman: Q?\n\nAssistant: bad",
    }
    assert "prompt" not in readable(implicit)
    assert parse_prompt({"problem": "Q?", "solution": "4"})[1] == "Q?"


# ---------------------------------------------------------------- columns that are named, and what is said of columns


def load(tmp_path: Path, rows: list[dict[str, Any]], reader: Any = load_preferences, **data: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    rules = (RewardLossConfig(),) if reader is load_comparisons else ()
    return reader(str(path), TOKENIZER, DataConfig(max_length=64, **data), *rules, vocab_size=320)


SAFE = {"prompt": "Q?", "response_0": "bad", "response_1": "good", "better_response_id": 1, "safer_response_id": 0}


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("prompt=ask,chosen=yes,rejected=no", {"ask": "Q?", "yes": "good", "no": "bad", "prompt": "other"}),
        ("prompt=ask.text,chosen=both.a,rejected=both.b", {"ask": {"text": "Q?"}, "both": {"a": "good", "b": "bad"}}),
        ("prompt=ask,responses=tries,scores=marks", {"ask": "Q?", "tries": ["bad", "good"], "marks": [1, 2]}),
        ("better=preferred", {"prompt": "Q?", "response_1": "bad", "response_2": "good", "preferred": 2}),
        ("preference=preference", {"prompt": "Q?", "response_1": "bad", "response_2": "good", "preference": 2}),
        ("better=preference", {"prompt": "Q?", "response_1": "good", "response_2": "bad", "preference": 1}),
        ("better=safer_response_id", {**SAFE, "better_response_id": 0, "safer_response_id": 1}),
    ],
)
def test_named_columns(tmp_path: Path, columns: str, row: dict[str, Any]) -> None:
    for reader in (load_preferences, load_comparisons):
        data = load(tmp_path, [row], reader, columns=columns)
        answers = [TOKENIZER.decode(data.responses[k]).partition("<|im_end|>")[0] for k in (0, 1)]
        assert answers == ["good", "bad"]
        assert "Q?" in TOKENIZER.decode(data.prompts[0])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt", "write NAME=COLUMN"),
        ("prompt=", "write NAME=COLUMN"),
        ("promt=ask", "nothing reads 'promt'; did you mean prompt?"),
        ("prompt=a,prompt=b", "gives 'prompt' twice"),
        (
            "prompt=nowhere",
            "no row has a column 'nowhere' .--data.columns prompt=nowhere.; there are better",
        ),
        ("prompt=response_0.x", "'response_0' is no object"),
    ],
)
def test_columns_refused(tmp_path: Path, columns: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path, [SAFE], columns=columns)


def test_what_is_used_and_what_is_not(tmp_path: Path) -> None:
    data = load(tmp_path, [{**SAFE, "is_response_0_safe": True}])
    assert data.used_columns == (
        "better_response_id as better", "prompt", "response_0 as responses", "response_1 as responses",
    )  # fmt: skip
    assert data.unused_columns == ("is_response_0_safe", "safer_response_id")
    assert "columns used: better_response_id as better, prompt, response_0 as responses" in data.summary()
    data = load(tmp_path, [SAFE], columns="better=safer_response_id,prompt=prompt")
    assert "safer_response_id as better" in data.used_columns
    assert data.unused_columns == ("better_response_id",)
    for title, unread in (("Nectar", "source"), ("argilla: ", "rating")):
        row = next(rows[0] for _, name, rows in EXAMPLES if name.startswith(title))
        data = load(tmp_path, [row])
        assert unread in data.unused_columns
        assert unread not in data.used_columns
    ratings = load(tmp_path, [{"prompt": "Q?", "responses": ["bad", "good"], "rating": [1, 2]}])
    assert ratings.used_columns == ("prompt", "rating", "responses")
    dialogues = load(tmp_path, [{"conversation": [
        {"role": "user", "content": "Q?", "toxic": False}, {"role": "assistant", "content": "good"}], "turn": 1,
    }], load_dialogues)  # fmt: skip
    assert dialogues.used_columns == ("conversation as messages",)
    assert dialogues.unused_columns == ("conversation: toxic", "turn")


@pytest.mark.parametrize(("title", "rows"), [(title, rows) for _, title, rows in EXAMPLES])
def test_every_example_is_told_column_by_column(tmp_path: Path, title: str, rows: list[dict[str, Any]]) -> None:
    """Each column of each example is named once: as used, or as not used."""
    pairs = (title, rows) in [(t, r) for section, t, r in EXAMPLES if section not in DIALOGUES]
    for part in [rows] if title.startswith("HelpSteer2:") else [[row] for row in rows]:
        data = load(tmp_path, part, load_preferences if pairs else load_dialogues)
        told = [column.partition(" as ")[0] for column in data.used_columns]
        told += [column for column in data.unused_columns if ":" not in column]
        assert sorted(told) == sorted({name for row in part for name in row})


def test_named_columns_of_documents_and_prompts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"body": {"text": "the film was good"}, "ask": "Q?"}) + "\n")
    data = load_documents(str(path), TOKENIZER, vocab_size=320, columns="text=body.text")
    assert "the film was good" in TOKENIZER.decode(data.tokens[0])
    assert data.unused_columns == ("ask",)
    with pytest.raises(InputError, match="of documents only text=COLUMN is read"):
        load_documents(str(path), TOKENIZER, vocab_size=320, columns="prompt=ask")
    encoder = ConversationEncoder(TOKENIZER, None)
    prompts = load_prompts(str(path), encoder, DataConfig(columns="prompt=ask"), longest=32, vocab_size=320)
    assert prompts.prompts[0].text == "Q?"


# ---------------------------------------------------------------- messages


def turns(*said: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in said]


USED = (("user", "weather?"), ("assistant", "look"), ("tool", "rain"), ("tool", "wind"), ("gpt", "it rains"))


def test_what_a_tool_says_is_context(tmp_path: Path) -> None:
    data = load(tmp_path, [{"messages": turns(*USED)}], load_dialogues)
    learnt = TOKENIZER.decode(data.tokens[0][data.targets[0]])
    assert learnt == "look<|im_end|>it rains<|im_end|>"
    assert "<|im_start|>tool\nrain" in TOKENIZER.decode(data.tokens[0])
    pair = parse_preference({"prompt": turns(*USED[:4]), "chosen": "good", "rejected": "bad"})
    assert [m.role for m in pair.messages] == ["user", "assistant", "tool", "tool"]
    whole = {"messages": turns(*USED)}
    with pytest.raises(InputError, match="tool"):
        load(tmp_path, [whole], load_dialogues, template="llama2")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns(("user", [{"type": "text", "text": "Q"}, {"type": "image_url", "image_url": {}}]), ("assistant", "A")),
         "a part of 'messages: content' is no text .it is of the type image_url"),
        (turns(("user", [{"type": "text"}]), ("assistant", "A")), "'messages: content: text' is not text"),
        (turns(("user", ["Q"]), ("assistant", "A")), "a part of 'messages: content' is no text .it is of the type str"),
        (turns(("user", "Q"), ("tool", "T"), ("assistant", "A")), "a tool's message out of place"),
        (turns(("user", "Q"), ("assistant", "A"), ("tool", "T"), ("user", "Q"), ("assistant", "A")), "out of place"),
        (turns(("user", "Q"), ("assistant", "A"), ("tool", "T")), "no answer at the end"),
        (turns(("critic", "Q"), ("assistant", "A")), "unknown role"),
    ],
)  # fmt: skip
def test_messages_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        parse_dialogue({"messages": messages})


def test_a_template_that_leaves_tools_out(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    start = "{% for message in messages %}"
    tokenizer.chat_template = tiny.TEMPLATE.replace(start, start + "{% if message['role'] != 'tool' %}").replace(
        "{% endfor %}", "{% endif %}{% endfor %}"
    )
    encoder = DialogueEncoder(tokenizer, None, "answers")
    with pytest.raises(BadRow, match="the chat template does not write what a tool says"):
        encoder.render(parse_dialogue({"messages": turns(*USED)}))


def test_csv_of_scores_and_labels(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text('prompt,response_a,response_b,score_a,score_b\n"Q,\n?",bad,good,1,2.5\n')
    data = load_comparisons(
        str(tmp_path / "scores.csv"), TOKENIZER, DataConfig(), RewardLossConfig(margin="score_gap"), vocab_size=320
    )
    assert data.margins == [1.5]
    (tmp_path / "kto.csv").write_text("prompt,completion,label\nQ?,good,True\nR?,bad,false\n")
    data = load_preferences(str(tmp_path / "kto.csv"), TOKENIZER, DataConfig(), vocab_size=320, needs_pairs=False)
    assert (data.response_lengths > 0).tolist() == [[True, False], [False, True]]


# ---------------------------------------------------------------- rows that are made anew


def arena(prompt: Any, a: Any, b: Any, won: str = "winner_model_a") -> dict[str, Any]:
    votes = {name: int(name == won) for name in ("winner_model_a", "winner_model_b", "winner_tie")}
    return {"prompt": prompt, "response_a": a, "response_b": b, **votes}


def test_turns_and_votes_of_the_arena() -> None:
    asked, good, bad = (json.dumps([text]) for text in ("Q?", "good", "bad"))
    for row in (
        arena(asked, good, bad),
        arena(asked, bad, good, "winner_model_b"),
        arena("Q?", "good", "bad"),
        {name: str(value) for name, value in arena(asked, good, bad).items()},  # as CSV has it
        {"prompt": asked, "response_a": good, "response_b": bad, "score_a": 2, "better": 0, "score_b": 1},
    ):
        pair = parse_preference(row)
        assert (pair.messages[-1].content, pair.chosen, pair.rejected) == ("Q?", "good", "bad"), row
    several = arena('["q", "Q?"]', '["a", "good"]', '["a", "bad"]')
    assert [m.content for m in parse_preference(several).messages] == ["q", "a", "Q?"]
    assert parse_prompt({"prompt": asked, "response_a": good, "response_b": bad})[1] == "Q?"
    for row, message in (
        (arena('["q", "Q?"]', '["a", "good"]', '["b", "bad"]'), "no shared prompt"),
        (arena('["q", "Q?"]', '["a"]', '["b", "bad"]'), "do not have the same turns .*'response_a' 1"),
        (arena(asked, good, bad, "nobody"), "no vote: exactly one"),
        (arena(asked, good, bad, "winner_tie"), "a tie"),
        (arena(asked, "[null]", bad), "is not text"),
    ):
        with pytest.raises(BadRow, match=message):
            parse_preference(row)


def test_lists_of_chosen_and_of_rejected_texts(tmp_path: Path) -> None:
    row = {"prompt": "Q?", "chosen": ["good", "fine"], "rejected": ["bad", "worse", "worst"], "num_correct": 2}
    found = parse_comparison(row)
    assert (found.responses, found.places) == (("good", "fine", "bad", "worse", "worst"), (0, 0, 1, 1, 1))
    data = load(tmp_path, [row], load_comparisons)
    assert data.ranks.tolist() == [[0, 0, 1, 1, 1]]
    with pytest.raises(BadRow, match="empty completion: 'rejected' is blank"):
        parse_comparison({**row, "rejected": [" "]})


def test_a_pair_about_an_image_is_refused() -> None:
    text = json.dumps({"question": "Q?", "chosen": "good", "rejected": "bad"})
    with pytest.raises(BadRow, match=r"about an image, which no model here sees .leave the column 'image' out"):
        parse_preference({"text": text, "image": {"bytes": "x"}, "idx": 1})
    assert parse_preference({"text": text, "image": None}).chosen == "good"
    assert store_schema.kind_of({"text": '{"question": "Q?"}'}) == "text"


def test_turns_as_plain_texts() -> None:
    said = parse_dialogue({"conversations": ["a", "b", "c", "d"]}).messages
    assert [m.role for m in said] == ["user", "assistant"] * 2
    assert parse_prompt({"conversations": ["Q?"], "source": "multi"})[1] == "Q?"
    with pytest.raises(BadRow, match="no answer at the end"):
        parse_dialogue({"conversations": ["a", "b", "c"]})
    with pytest.raises(BadRow, match="'prompt' holds something that is no message"):
        parse_prompt({"prompt": ["a", "b"]})


def test_a_label_judges_the_last_turn_of_a_dialogue() -> None:
    said = turns(("system", "S"), ("user", "q"), ("assistant", "a"), ("user", "Q?"), ("assistant", "bad"))
    pair = parse_preference({"messages": said, "label": False}, needs_pairs=False)
    assert ([m.content for m in pair.messages], pair.chosen, pair.rejected) == (["S", "q", "a", "Q?"], None, "bad")
    with pytest.raises(BadRow, match=r"unpaired row .*--dpo\.loss kto"):
        parse_preference({"messages": said, "label": True})
    for prompt in ({"messages": said[:-1], "label": True}, {"messages": said[:-1], "label": "toxic"}):
        assert [m.content for m in parse_prompt(prompt)[0]] == ["S", "q", "a", "Q?"]
