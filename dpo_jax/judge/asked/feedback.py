"""AI feedback in UltraFeedback's schema (Cui et al. 2023): a judge's ratings of several responses, aspect by aspect.

A row is {"source", "instruction" (a dialogue: "messages"), "models", "completions": [{"model", "principle",
"custom_system_prompt", "response", "annotations": {ASPECT: {"Rating", "Rationale"}}, "fine-grained_score", "critique",
"overall_score"}]}. As in the published data a rating is a text, "1" to "5" or "N/A", an aspect with kinds has "Type" (a
list), "Rationale" is then about those and "Rationale For Rating" about the rating, and `fine-grained_score` is the mean
of the ratings, N/A left out. What had no reading is null there, and counted.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_jax.complete.asking.answers import without_reasoning
from dpo_jax.data.rows.binarise import mean_of_aspects
from dpo_jax.errors import InputError
from dpo_jax.judge.asked.judge_prompts import JudgePrompt, read_ours, read_prompts

CRITIQUE = "critique"
_TYPED = ("truthfulness", "helpfulness")


def feedback_prompts(
    aspects: Sequence[str], *, critique: bool, language: str, templates: str | None
) -> dict[str, JudgePrompt]:
    """What is asked, by aspect, and `CRITIQUE`. `templates`: UltraFeedback's file; None: this project's prompts.

    Raises `InputError` for a file that lacks one.
    """
    wanted = [*aspects, *([CRITIQUE] if critique else [])]
    if templates is None:
        return {name: _ours(name, language) for name in wanted}
    found = read_prompts(templates)
    made = {}
    for name in wanted:
        names = (
            ("critique_feedback_prompt",)
            if name == CRITIQUE
            else (f"{name}_template", f"{name}_template_without_answer")
        )
        at = next((each for each in names if each in found), None)
        if at is None:
            raise InputError(f"--templates {templates}: holds no {names[0]}; it has {', '.join(found)}")
        made[name] = found[at]
    return made


def _ours(name: str, language: str) -> JudgePrompt:
    whole, like = read_ours("aspects.json"), read_ours(f"{language}.json")
    own, version = whole[language], f"ours ({language}, aspects version {whole['version']})"
    told: dict[str, Any] = {"published": False, "roles": tuple(like["roles"].items()), "text": like["text"]}
    if name == CRITIQUE:
        one = own["critique"]
        return JudgePrompt(f"{version} critique", "rating", one["system"], one["template"], 1, 10, **told)
    aspect = own["aspects"][name]
    template = own["template"].replace("{aspect}", aspect["text"])
    template = template.replace("{kinds}", own["kinds"] if aspect["kinds"] else "")
    return JudgePrompt(f"{version} {name}", "list", own["system"], template, 1, 5, **told)


def annotation(aspect: str, one: Mapping[str, Any] | None) -> dict[str, Any]:
    """A reading of a text of a list (`verdicts.Rating` as an object) in the schema; None: unparsed."""
    if one is None:
        return {"Rating": None, "Rationale": ""}
    rating = "N/A" if one["value"] is None else f"{one['value']:g}"
    if aspect not in _TYPED:
        return {"Rating": rating, "Rationale": one["rationale"]}
    types = re.findall(r"\d+", one["types"]) or ["None"]
    return {
        "Type": types,
        "Rationale": one["types_rationale"],
        "Rating": rating,
        "Rationale For Rating": one["rationale"],
    }


def list_annotations(aspect: str, judgement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each response of a row that was judged as a list, in the row's order."""
    found: list[Any] = [None] * len(judgement["scores"])
    for reply in judgement["replies"]:
        if reply["read"] is not None:
            for place, one in zip(reply["order"], reply["read"], strict=True):
                found[place] = one
    return [annotation(aspect, one) for one in found]


def critiques(judgement: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """(critique, overall score) of each response: of the reply that was read, else of the last one, without a score."""
    found: list[tuple[str, float | None]] = [("", None)] * len(judgement["scores"])
    for reply in judgement["replies"]:
        (place,) = reply["order"]
        found[place] = (without_reasoning(reply["reply"]).strip(), judgement["scores"][place])
    return found


def completed(
    row: Mapping[str, Any], judged: Mapping[str, Mapping[str, Any]], prompts: Mapping[str, JudgePrompt | None]
) -> dict[str, Any]:
    """A row in the schema: `row` holds `messages` and `completions`, `judged` what was said of it by what was asked."""
    single = [message["role"] for message in row["messages"]] == ["user"]
    asked = {"instruction": row["messages"][0]["content"]} if single else {"messages": row["messages"]}
    aspects: list[dict[str, Any]] = [{} for _ in row["completions"]]
    overall: list[tuple[str, float | None]] = [("", None) for _ in row["completions"]]
    for name, found in judged.items():
        prompt = prompts[name]
        if name == CRITIQUE:
            overall = critiques(found)
        elif prompt is not None and prompt.ask == "list":
            for one, said in zip(aspects, list_annotations(name, found), strict=True):
                one[name] = said
        else:  # one number each, of whatever scale: `Rating` is that number as it is
            aspects = [{name: {"Rating": score, "Rationale": ""}} for score in found["scores"]]
            overall = [("", score) for score in found["scores"]]
    made = [
        one | {"annotations": said, "critique": text, "overall_score": score}
        for one, said, (text, score) in zip(row["completions"], aspects, overall, strict=True)
    ]
    made = [one | {"fine-grained_score": mean_of_aspects(one)} for one in made]
    head = {"source": row["source"]} if "source" in row else {}
    return {**head, **asked, "models": [one["model"] for one in made], "completions": made, "row": row["row"]}
