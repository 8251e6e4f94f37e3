"""The parts of Ghost Attention that need no model: the moves, instructions, checks, prompts, figures."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny

from dpo_jax.align import gatt
from dpo_jax.complete.writing.gatt_dialogues import seed_of
from dpo_jax.config import GattConfig, GattRun, SampleConfig, SFTDataConfig
from dpo_jax.data.rows.dialogues import parse_dialogue
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.sets.sequences import load_dialogues
from dpo_jax.data.sources import instructions, user_turns
from dpo_jax.data.sources.attributes import identify, languages, parse_check
from dpo_jax.data.sources.instructions import parse_instruction, read_instructions, synthesise
from dpo_jax.data.tokens.encode_dialogue import DialogueEncoder
from dpo_jax.errors import InputError
from dpo_jax.report import gatt as gatt_report

USERS, ANSWERS = ("one?", "two?", "three?"), ("first.", "second.", "third.")


# ---------------------------------------------------------------- the three moves


def said(messages) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in messages]


def test_sampling_has_the_instruction_in_every_user_turn() -> None:
    assert said(gatt.asking("Be kind.", USERS, ANSWERS[:2], where="every")) == [
        ("user", "Be kind.\n\none?"),
        ("assistant", "first."),
        ("user", "Be kind.\n\ntwo?"),
        ("assistant", "second."),
        ("user", "Be kind.\n\nthree?"),
    ]
    assert said(gatt.asking("Be kind.", USERS, (), where="every")) == [("user", "Be kind.\n\none?")]


def test_training_has_it_in_the_first_turn_only() -> None:
    whole = said(gatt.training_form("Kind.", USERS, ANSWERS))
    assert [text for role, text in whole if role == "user"] == ["Kind.\n\none?", "two?", "three?"]
    assert tuple(text for role, text in whole if role == "assistant") == ANSWERS
    assert said(gatt.training_form("Kind.", USERS, ANSWERS, turn=2)) == whole[:4]
    # What the model is asked later is the same dialogue, up to the answer.
    assert said(gatt.asking("Kind.", USERS, ANSWERS[:2], where="first")) == whole[:-1]


@pytest.mark.parametrize("template", [None, "llama2", "zephyr", "chatml"])
def test_no_token_of_an_earlier_turn_is_in_the_loss(template: str | None, tmp_path: Path) -> None:
    """On the tokens: the targets are the last answer and its terminator, and nothing else."""
    tokenizer = tiny.tokenizer()
    answers = ("the good film", "a kind rude book", "hate red")
    rows = [
        {"messages": [m.as_dict() for m in gatt.training_form("quite blue", USERS, answers, turn=t)]} for t in (1, 2, 3)
    ]
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTDataConfig(template=template, train_on=gatt.TRAIN_ON)
    data = load_dialogues(str(path), tokenizer, config, train_on=config.train_on, vocab_size=320)
    assert len(data) == 3
    for turn in (1, 2, 3):
        tokens, targets = data.tokens[turn - 1], data.targets[turn - 1]
        ends = "<|im_end|>"  # the tokenizer's EOS, which all of these templates write
        assert str(tokenizer.decode(tokens[targets])).strip().replace(f" {ends}", ends) == answers[turn - 1] + ends
        assert str(tokenizer.decode(tokens[targets], skip_special_tokens=True)).strip() == answers[turn - 1]
        first = int(np.flatnonzero(targets)[0])
        assert targets[first:].all(), "one run of targets, up to the end"
        assert not targets[:first].any()
        before = tokenizer.decode(tokens[:first], skip_special_tokens=False)
        assert all(answer in before for answer in answers[: turn - 1]), "earlier answers are read, and not learnt"
        assert before.count("quite blue") == 1
    # The same mask for the encoder that drops rows before training.
    encoder = DialogueEncoder(tokenizer, template, gatt.TRAIN_ON)
    assert len(encoder.render(parse_dialogue(rows[2])).answers) == 1


# ---------------------------------------------------------------- instructions


def test_made_instructions_are_a_function_of_the_seed() -> None:
    made = synthesise(40, seed=1, combine=3)
    assert made == synthesise(40, seed=1, combine=3) != synthesise(40, seed=2, combine=3)
    assert len({one.text for one in made}) == 40
    sizes = Counter(len(one.checks) for one in made)
    assert set(sizes) == {1, 2, 3}
    for one in made:
        kinds = [check.kind for check in one.checks]
        assert len(set(kinds)) == len(kinds), "at most one constraint of a kind"
        assert one.short is not None
        assert len(one.short) < len(one.text)


def test_kinds_languages_and_the_terse_form() -> None:
    made = synthesise(5, seed=0, kinds=("language",), languages=("es", "fr"))
    assert {one.text for one in made} == {"Always answer in Spanish.", "Always answer in French."}
    assert len(made) == 5, "the list begins anew"
    assert {one.short for one in made} == {"Language: Spanish.", "Language: French."}
    (napoleon, *_) = instructions.constraints("figure")
    assert (napoleon.text, napoleon.short) == ("Always act as Napoleon from now on.", "Figure: Napoleon.")
    assert [kind for kind in instructions.KINDS if len(instructions.constraints(kind)) < 8] == []


SENTENCES = {
    "es": "Para organizar mejor el tiempo conviene hacer una lista de tareas cada mañana.",
    "fr": "Pour mieux gérer votre temps, faites une liste des tâches chaque matin.",
    "de": "Um Ihre Zeit besser einzuteilen, schreiben Sie jeden Morgen eine Liste.",
    "it": "Per gestire meglio il tempo è utile scrivere un elenco ogni mattina.",
    "pt": "Para organizar melhor o seu tempo, faça uma lista de tarefas todas as manhãs.",
    "nl": "Om je tijd beter in te delen maak je elke ochtend een lijst met taken.",
    "pl": "Aby lepiej zarządzać czasem, każdego ranka zapisz listę zadań.",
    "sv": "För att planera din tid bättre kan du skriva en lista varje morgon.",
    "tr": "Zamanınızı daha iyi kullanmak için her sabah bir liste yapın.",
    "ru": "Чтобы лучше распределять время, каждое утро составляйте список дел.",
    "ar": "لتنظيم وقتك بشكل أفضل اكتب قائمة بالمهام كل صباح.",
    "hi": "समय का बेहतर उपयोग करने के लिए हर सुबह कामों की सूची बनाएं।",
    "zh": "为了更好地安排时间,每天早上写一张任务清单。",
    "ja": "時間をうまく使うために、毎朝やることのリストを作りましょう。",
    "ko": "시간을 더 잘 쓰려면 매일 아침 할 일 목록을 만드세요.",
    "en": "To organise your time better, write a list of tasks every morning.",
}


def test_languages_of_the_list_are_told_apart() -> None:
    assert {code for _, code in instructions.LANGUAGES} == set(SENTENCES) <= set(languages())
    for one in instructions.constraints("language"):
        (check,) = one.checks
        own = check.spec.removeprefix("language:")
        assert [code for code, sentence in SENTENCES.items() if check(sentence)] == [own]
        assert not check(" \n")
    assert identify("Comment puis-je vous aider aujourd'hui ?")[0] == "fr"


@pytest.mark.parametrize(
    ("spec", "kept", "not_kept"),
    [
        ("keywords:tea, green coffee", "I love TEA!", "A steam engine for my team."),
        ("keywords:tea, green coffee", "some green coffee, please", "green tees and coffee"),
        ("keywords:Napoleon", "Moi, Napoléon", "napoleonic wars"),
        ("keywords:arr", "Arr, matey", "arrive"),
        ("keywords:茶", "我喜欢喝茶。", "我喜欢咖啡"),
        (r"^Ahoy\b", "Ahoy there", "I say Ahoy"),
        ("(?i)please$", "Sit down, PLEASE", "please sit down"),
    ],
)
def test_checks(spec: str, kept: str, not_kept: str) -> None:
    check = parse_check(spec)
    assert check(kept)
    assert not check(not_kept)
    assert not check("")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no instruction"),
        ({"instruction": " "}, "empty instruction"),
        ({"instruction": 3}, "'instruction' is not text"),
        ({"instruction": "a", "check": "(a"}, "a check is no regular expression"),
        ({"instruction": "a", "check": "language:klingon"}, "unknown language"),
        ({"instruction": "a", "check": "keywords: ,"}, "no keyword"),
        ({"instruction": "a", "check": ""}, "a check is empty"),
        ({"instruction": "a", "short": ""}, "'short' is blank"),
    ],
)
def test_instructions_that_cannot_be_read(row: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=message.replace("(", r"\(")):
        parse_instruction(row)
    path = tmp_path / "i.jsonl"
    path.write_text(json.dumps({"instruction": "Be kind."}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"1 of 2 rows cannot be used: .*\(first: row 2") as caught:
        read_instructions(str(path))
    assert "\n" not in str(caught.value)


def test_an_instruction_in_another_language_is_checked_by_it() -> None:
    spanish = {"system_prompt": "Responde siempre con una lista de tres consejos útiles."}
    assert [c.spec for c in parse_instruction(spanish).checks] == ["language:es"]
    assert parse_instruction(spanish, ("fr",)).checks == ()
    assert parse_instruction({"system_prompt": "You are a helpful assistant."}).checks == ()
    given = parse_instruction(spanish | {"check": r"\d", "short": "Tres."})
    assert ([c.kind for c in given.checks], given.short) == (["pattern"], "Tres.")


def test_real_system_prompts(shared_data: Path) -> None:
    source = str(shared_data / "biggen_bench" / "system_prompts.jsonl")
    found = read_instructions(source)
    assert len(found) == 179, "of 180, two differ in white space only"
    spoken = Counter(check.spec for one in found for check in one.checks)
    assert {"language:es", "language:fr", "language:de", "language:ko", "language:ru", "language:th"} <= set(spoken)
    assert sum(spoken.values()) <= 22, "the English ones have no check"
    few = read_instructions(source, languages=("es", "fr"))
    assert {check.spec for one in few for check in one.checks} == {"language:es", "language:fr"}


# ---------------------------------------------------------------- what users say


def test_user_turns_of_every_layout() -> None:
    parse = user_turns.parse_user_turns
    assert parse({"turns": ["a", "b"], "question_id": 1}) == ("a", "b")
    assert parse({"prompt": "a"}) == ("a",)
    chat = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "x"), ("user", "b"))]
    assert parse({"messages": chat}) == ("a", "b")
    assert parse({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "x"}]}) == ("a",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": []}, "no user turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no user turn"),
        ({"turns": ["a", " "]}, "empty turn"),
        ({"turns": "a"}, "'turns' is not a list"),
        ({"turns": [1]}, "'turns' is not text"),
        ({"text": "a"}, "missing field 'prompt'"),
    ],
)
def test_rows_without_user_turns(row: dict, message: str) -> None:
    with pytest.raises(BadRow, match=message):
        user_turns.parse_user_turns(row)


def test_prompts_of_evaluation_and_training_are_disjoint() -> None:
    rows = tuple((f"a{i % 40}", f"b{i}") for i in range(50)) + tuple((f"c{i}",) for i in range(50))
    training, held = user_turns.split(rows, 0.3, seed=3)
    assert len(training) == 70
    assert 20 <= len(held) <= 30
    assert not {t for row in training for t in row} & {t for row in held for t in row}
    assert (training, held) == user_turns.split(rows, 0.3, seed=3)
    assert held != user_turns.split(rows, 0.3, seed=4)[1]


def test_dialogues_are_chained_to_their_length() -> None:
    rows = (("a",), ("b", "c"), ("d",), ("e", "f", "g"), ("h",))
    chains = user_turns.chain(rows, turns=5, count=12, seed=0, source="D")
    assert chains == user_turns.chain(rows, turns=5, count=12, seed=0, source="D")
    assert all(len(said) == len(set(said)) == 5 for said in chains)
    assert {turn for said in chains for turn in said} == set("abcdefgh")
    # The turns of a row stay in order, one behind the other.
    assert all(said[said.index("b") + 1] == "c" for said in chains if "b" in said[:-1])
    with pytest.raises(InputError, match="D: holds 8 different user turns, and a dialogue is to have 9"):
        user_turns.chain(rows, turns=9, count=1, seed=0, source="D")


# ---------------------------------------------------------------- options and figures


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": 0}, r"--gatt\.turns 0 must be at least 1"),
        ({"short": 1.5}, "--gatt.short"),
        ({"combine": 5}, "exceeds the 4 kinds"),
        ({"kinds": ("hobby", "hobby")}, "names a kind twice"),
        ({"kinds": ("hobby",), "languages": ("es",)}, "--gatt.languages has no effect"),
        ({"synthesised": 0}, "--gatt.synthesised must be at least 1"),
        ({"instructions": "i.jsonl", "combine": 2}, "--gatt.combine has no effect"),
        ({"instructions": "i.jsonl", "kinds": ("hobby",)}, "--gatt.kinds has no effect"),
        ({"train": False, "evaluate_only": True}, "--gatt.evaluate_only trains nothing"),
        ({"train": False, "eval_turns": 3}, r"--gatt\.eval_turns has no effect"),
    ],
)
def test_options_without_effect(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GattConfig(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample": SampleConfig(beams=2)}, "--sample.beams has no effect"),
        ({"data": SFTDataConfig(template="raw")}, "--data.template raw has no turns"),
        ({"eval_data": "e", "gatt": GattConfig(holdout=0.1)}, "--gatt.holdout has no effect"),
        ({"eval_data": "e", "gatt": GattConfig(evaluate_only=True)}, "takes its prompts from --data"),
        ({"eval_data": "e", "gatt": GattConfig(train=False)}, "--eval_data has no effect with --gatt.no_train"),
        ({"gatt": GattConfig(train=False, holdout=0.2)}, "--gatt.holdout has no effect with --gatt.no_train"),
    ],
)
def test_options_that_contradict_each_other(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(GattRun(model="m", data="d", out="o"), **changes)


def test_wilson_interval() -> None:
    """Against the closed form solved another way: the ends are where a proportion q has k of n 1.96 sigma away."""
    for kept, n in ((0, 10), (3, 10), (10, 10), (55, 80)):
        share = gatt_report.Share(kept, n)
        for q in share.interval:
            assert abs(share.rate - q) == pytest.approx(1.959964 * np.sqrt(q * (1 - q) / n), abs=1e-7)
    assert str(gatt_report.Share(1, 2)) == "50% (9% to 91%)"


def answered(kept: list[list[bool]]) -> list[dict]:
    return [
        {"dialogue": i, "turn": t, "kept": k, "checks": {"hobby": k}, "ids": [1], "answer": "x"}
        for i, row in enumerate(kept)
        for t, k in enumerate(row, 1)
    ]


def test_figures_by_turn_and_their_difference() -> None:
    before = answered([[True, False, False], [True, True, False], [False, False, False]])
    after = answered([[True, True, True], [True, True, False], [True, True, True]])
    assert [share.kept for share in gatt_report.by_turn(before).values()] == [2, 1, 0]
    assert gatt_report.by_kind(after, 2) == {"hobby": gatt_report.Share(5, 6)}
    change, (low, high) = gatt_report.difference(before, after, seed=0)
    assert change == pytest.approx((1 + 0 + 1) / 3)
    assert low == pytest.approx(0)
    assert high == pytest.approx(1)
    single = gatt_report.difference(answered([[False]]), answered([[True]]), seed=0)
    assert single == (1.0, (1.0, 1.0))
    unknown = [{**row, "kept": None, "checks": {}} for row in before]
    assert gatt_report.by_turn(unknown) == {}


def test_seeds_differ_by_purpose_and_turn() -> None:
    seeds = {seed_of(s, p, t) for s in (0, 1) for p in ("training", "evaluation") for t in (1, 2)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)
