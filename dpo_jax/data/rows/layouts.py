"""The column layouts of published data sets, as one table: which of their columns is what the readers call it.

The readers (`preferences.py`, `dialogues.py`, `comparisons.py`) know one name for each thing (`readable.py` brings a
row to these):

    prompt, messages, system, history    what was said before the answer, or the whole dialogue
    completion, response, answer, output one answer
    chosen, rejected                     two answers, the better one first
    responses                            a list of answers, and one of these that judges them:
      scores, ranks                        a number for each (larger is better; 1 is the best)
      better, worse                        which of two is better or worse: 0 or 1 (1 or 2 where their columns are
                                             numbered so), `model_a` or `model_b`, or a tie
      preference                           a number from -n (the first is much better) to n (the second); 0 a tie
      annotator1, annotator2, ...          votes: 1 the first, 2 the second, 0 a tie
    score                                the score of one answer; neighbouring rows with one prompt are compared by it

A `Layout` says where they stand in a data set's rows. A new one is a line of `LAYOUTS`, and an example row in
`docs/data.md`. Columns that are null are absent. What a row has under the readers' own name stays; so a column can be
renamed first (`--data.columns better=safer_response_id`).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.data.rows import rebuilt_rows as rebuilt
from dpo_jax.data.rows.messages import SYSTEM_COLUMNS

Row = dict[str, Any]

# ---------------------------------------------------------------- what the readers read

PROMPT_COLUMNS = ("prompt", "conversations", "instruction", "question")
DIALOGUE_COLUMNS = ("messages", "conversations")
PROMPTS = (*PROMPT_COLUMNS, "messages")
"""What was said before a response."""
ANSWERS = ("completion", "response", "answer", "output")
JUDGED = ("chosen", "rejected", "responses")
PROMPT_PLACES = ("problem", "query", "input")
"""Columns that hold the prompt where no other does."""
_OTHERS = (
    "input context system history tools label labels scores ranks better worse preference score score_chosen "
    "score_rejected rating margin agreement source text turns safety"
)
NAMES = frozenset((*PROMPTS, *ANSWERS, *JUDGED, *_OTHERS.split()))
"""What a column can be called in `--data.columns`."""

LIST_COLUMNS = ("responses", "output", "outputs", "completions")
BESIDE = {"scores": -1, "overall_scores": -1, "ratings": -1, "rating": -1, "ranks": 1, "rank": 1}
"""Columns that judge a list of responses by a number for each: -1 the larger the better, 1 the smaller the better."""
REPLIES_COLUMNS = frozenset((*LIST_COLUMNS, *BESIDE, "better", "worse", "preference"))
"""Columns of several responses, and what judges them."""
EXTRA_COLUMNS = ("score_chosen", "score_rejected", "margin", "rating", "source")
"""What a pair tells beside its texts."""
_BESIDE_TEXTS = ("chosen", "rejected", "label", "input", "history", *SYSTEM_COLUMNS, "as_spelled")

PAIR_COLUMNS = frozenset((*PROMPT_COLUMNS, *_BESIDE_TEXTS, "completion", *EXTRA_COLUMNS))
"""All that a pair is read from; others are carried in many files (ids, copies): they are ignored, and named."""
COMPARISON_COLUMNS = PAIR_COLUMNS | REPLIES_COLUMNS | {"messages", "labels", "agreement"}
"""The same of a comparison, beside votes."""
RENDERED = frozenset((*DIALOGUE_COLUMNS, *PROMPT_COLUMNS, *ANSWERS))
"""Columns of a dialogue whose messages the template sees whole."""
DIALOGUE_ROW = RENDERED | REPLIES_COLUMNS | {*_BESIDE_TEXTS, "finish_reason"}
"""All that a dialogue is read from."""

# ---------------------------------------------------------------- the table


class Layout(NamedTuple):
    """Where the columns stand in the rows of a data set.

    A place is a column, one inside it (`question.full_text`), or a part of a list (`messages[:-1]`, `messages[-1]`);
    several places, in a text with spaces, are put together as a list.
    """

    name: str
    """Whose."""
    columns: Mapping[str, str]
    """Reader's name -> place. All must be there."""
    optional: Mapping[str, str] = {}
    """Likewise; read where they are there."""
    where: Callable[[Row], bool] | None = None
    """What else must hold of a row."""
    make: Callable[[Row], rebuilt.Rebuilt] | None = None
    """What the row is made into, where its columns do not hold it as they stand."""


def _entries(row: Row) -> bool:
    return isinstance(row["answers"], list) and all(isinstance(entry, dict) for entry in row["answers"])


LAYOUTS = (
    # Comparisons
    Layout("Nectar, Stack Exchange", {"responses": "answers"}, where=_entries),
    Layout("PKU-SafeRLHF", {"responses": "response_0 response_1", "better": "better_response_id"}),
    Layout("HelpSteer3", {"prompt": "context", "responses": "response1 response2", "preference": "overall_preference"}),
    Layout("HelpSteer2", {"score": "helpfulness"}),
    Layout("AlpacaFarm", {"responses": "output_1 output_2", "better": "preference"}),
    Layout("HelpSteer2 preference", {"responses": "response_1 response_2", "preference": "preference_strength"}),
    Layout(
        "SHP",
        {"prompt": "history", "responses": "human_ref_A human_ref_B", "worse": "labels"},
        {"scores": "score_A score_B"},
    ),
    Layout(
        "WebGPT",
        {"prompt": "question.full_text", "responses": "answer_0 answer_1", "scores": "score_0 score_1"},
        where=lambda row: isinstance(row["question"], dict),
    ),
    Layout("Chatbot Arena", {"responses": "conversation_a conversation_b", "better": "winner"}),
    Layout("summarize_from_feedback", {"prompt": "info.post", "responses": "summaries", "better": "choice"}),
    Layout("distilabel", {"responses": "generations"}),
    Layout(
        "Chatbot Arena 55k",
        {"prompt": "prompt", "responses": "response_a response_b"},
        {"better": "winner_model_a winner_model_b winner_tie"},
        where=rebuilt.is_arena,
        make=rebuilt.arena_votes,
    ),
    Layout("RewardBench 2", {"responses": "chosen rejected"}, {}, rebuilt.is_lists_of_texts, rebuilt.ranked_lists),
    # Pairs
    Layout(
        "RLHF-V",
        {"prompt": "text", "chosen": "text", "rejected": "text"},
        where=rebuilt.is_spelled_pair,
        make=rebuilt.spelled_pair,
    ),
    Layout(
        "OpenAI",
        {"prompt": "input.messages", "chosen": "preferred_output", "rejected": "non_preferred_output"},
        {"tools": "input.tools"},
    ),
    Layout("ms-swift", {"prompt": "messages[:-1]", "chosen": "messages[-1]", "rejected": "rejected_response"}),
    Layout("ms-swift", {"prompt": "messages[:-1]", "chosen": "messages[-1]", "rejected": "rejected_messages"}),
    Layout("ms-swift", {"prompt": "query", "chosen": "response", "rejected": "rejected_response"}),
    Layout(
        "argilla",
        {"chosen": "chosen_response", "rejected": "rejected_response"},
        {"score_chosen": "chosen_avg_rating", "score_rejected": "rejected_avg_rating"},
    ),
    Layout("StackExchange paired", {"chosen": "response_j", "rejected": "response_k"}),
    # Dialogues
    Layout("ms-swift KTO", {"prompt": "messages[:-1]", "completion": "messages[-1]"}, {}, rebuilt.is_labelled_dialogue),
    Layout("WildChat, LMSYS-Chat-1M, Capybara", {"messages": "conversation"}),
    Layout("MATH, NuminaMath", {"completion": "solution"}),
)
