"""Templates and token ids: what the rendered text is, where the response begins, what ends it."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers_for_tests import CHATML_SPECIALS, LLAMA3_SPECIALS, byte_level, llama2
from transformers import PreTrainedTokenizerBase

from dpo_jax.data.rows.messages import Message
from dpo_jax.data.rows.preferences import Pair, parse_pair
from dpo_jax.data.rows.problems import BadRow
from dpo_jax.data.tokens.cuts import RowCut
from dpo_jax.data.tokens.encode import ConversationEncoder, Encoded, cut_of, truncate
from dpo_jax.data.tokens.templates import ChatTemplate
from dpo_jax.errors import InputError

SYSTEM, USER = Message("system", "Be brief."), Message("user", "Hi")
TURNS = (USER, Message("assistant", "Hello"), Message("user", "Who?"))


def pair(messages: tuple[Message, ...] = (USER,), chosen: str = "good", rejected: str = "bad") -> Pair:
    return Pair(messages, chosen, rejected, (messages[-1].content, chosen, rejected))


def encode(encoder: ConversationEncoder, row: Pair) -> Encoded:
    [encoded] = encoder.encode([encoder.render(row)])
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded


def texts(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    return [tokenizer.decode(ids.tolist()) for ids in (encoded.prompt, *encoded.responses)]


# ---- rendered texts --------------------------------------------------------------------------------------------------


def test_named_templates_render_the_published_texts() -> None:
    special = (*CHATML_SPECIALS, *LLAMA3_SPECIALS, "<s>", "</s>")
    tokenizer = byte_level(special, bos="<s>", eos="</s>")
    conversation = (SYSTEM, *TURNS, Message("assistant", "Me"))
    assert ChatTemplate(tokenizer, "llama2").render(conversation) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s>[INST] Who? [/INST] Me </s>"
    )
    assert ChatTemplate(tokenizer, "zephyr").render(conversation[:3], generation=True) == (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|assistant|>\n"
    )
    assert ChatTemplate(tokenizer, "chatml").render((SYSTEM, USER), generation=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert ChatTemplate(tokenizer, "llama3").render((SYSTEM, USER), generation=True) == (
        "<s>" + header.format("system") + "Be brief.<|eot_id|>" + header.format("user") + "Hi<|eot_id|>"
        "" + header.format("assistant")
    )


def test_llama2_refuses_roles_out_of_turn() -> None:
    template = ChatTemplate(byte_level(), "llama2")
    with pytest.raises(BadRow, match="take turns"):
        template.render((USER, USER))


def test_template_choice_errors_name_the_option() -> None:
    for tokenizer, name, words in (
        (byte_level(), None, "no chat template.*--data.template llama2, llama3, zephyr, chatml, raw"),
        (byte_level(), "vicuna", "--data.template vicuna is unknown"),
        (byte_level(("</s>",), eos="</s>"), "chatml", r"<\|im_start\|> <\|im_end\|>"),
        (byte_level(chat_template="{% if %}"), None, "--data.template"),
        (byte_level(chat_template="{{ messages[0].content }}"), None, "assistant messages"),
    ):
        with pytest.raises(InputError, match=words):
            ConversationEncoder(tokenizer, name)


def test_a_template_that_refuses_or_demands_a_role() -> None:
    no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system please') }}{% endif %}"
    no_system += "{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    encoder = ConversationEncoder(byte_level(chat_template=no_system), None)
    encoder.render(pair())
    with pytest.raises(BadRow, match="no system please; the roles are system user"):
        encoder.render(pair((SYSTEM, USER)))
    demands = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message is needed') }}{% endif %}"
    demands += "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    encoder = ConversationEncoder(byte_level(chat_template=demands), None)
    encoder.render(pair((SYSTEM, USER)))
    with pytest.raises(BadRow, match="a system message is needed"):
        encoder.render(pair())


# ---- boundary and terminator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_chatml_ends_with_one_turn_end_and_nothing_behind_it(eos: str) -> None:
    tokenizer = byte_level(eos=eos)
    encoded = encode(ConversationEncoder(tokenizer, "chatml"), pair())
    assert texts(tokenizer, encoded) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "good<|im_end|>",
        "bad<|im_end|>",
    ]


@pytest.mark.parametrize("template", ["chatml", "zephyr", "llama2", "raw"])
def test_an_answer_that_spells_its_terminator_gets_no_second(template: str) -> None:
    tokenizer = byte_level()
    encoder = ConversationEncoder(tokenizer, template)
    spelt = encode(encoder, pair(chosen="good<|im_end|>"))
    plain = encode(encoder, pair())
    np.testing.assert_array_equal(spelt.responses[0], plain.responses[0])
    for ids in spelt.responses:
        assert ids[-1] == tokenizer.eos_token_id
        assert (ids == tokenizer.eos_token_id).sum() == 1


def test_own_templates_without_turn_end_get_eos() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = byte_level(chat_template=template)
    encoded = encode(ConversationEncoder(tokenizer, None), pair())
    assert texts(tokenizer, encoded) == ["user: Hi\nassistant: ", "good<|im_end|>", "bad<|im_end|>"]


def test_generation_header_longer_than_the_one_before_an_answer() -> None:
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    tokenizer = byte_level(chat_template=template)
    encoded = encode(ConversationEncoder(tokenizer, None), pair())
    assert texts(tokenizer, encoded)[0].endswith("<|im_start|>assistant\n")
    assert texts(tokenizer, encoded)[1:] == ["good<|im_end|>", "bad<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_boundary_belongs_to_the_response(trim_offsets: bool) -> None:
    tokenizer = byte_level(words=("\n\n",), trim_offsets=trim_offsets)
    encoder = ConversationEncoder(tokenizer, "chatml")
    row = pair(chosen="\ngood", rejected="bad")
    encoded = encode(encoder, row)
    prompt, chosen, rejected = texts(tokenizer, encoded)
    assert (prompt[-9:], chosen, rejected) == ("assistant", "\n\ngood<|im_end|>", "\nbad<|im_end|>")
    for answer, ids in zip(("\ngood", "bad"), encoded.responses, strict=True):
        whole = ChatTemplate(tokenizer, "chatml").render((USER, Message("assistant", answer))).removesuffix("\n")
        assert [*encoded.prompt, *ids] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    # The newline that the header left over for the rejected answer is format; the shared token is text.
    assert not encoded.formats[0][0]
    assert encoded.formats[1][0]


def test_trimmed_offsets_do_not_mislead() -> None:
    """A token `.\\n\\n`, whose offsets a byte-level tokenizer reports without the newlines, straddles the boundary."""
    tokenizer = byte_level(trim_offsets=True)
    assert any(t.startswith(".") and "Ċ" in t for t in tokenizer.get_vocab()), "the tokenizer does not merge them"
    row = Pair((Message("user", "It is Paris."),), "\n\nOne", " Two", ("It is Paris.", "\n\nOne", " Two"))
    encoded = encode(ConversationEncoder(tokenizer, "raw"), row)
    prompt, chosen, rejected = texts(tokenizer, encoded)
    assert "It is Paris.".startswith(prompt)
    assert len(prompt) < len("It is Paris.")
    assert prompt + chosen == "It is Paris.\n\nOne<|im_end|>"
    assert prompt + rejected == "It is Paris. Two<|im_end|>"


def test_format_masks_mark_the_turn_end() -> None:
    tokenizer = byte_level((*LLAMA3_SPECIALS,), bos="<|begin_of_text|>", eos="<|end_of_text|>")
    encoded = encode(ConversationEncoder(tokenizer, "llama3"), pair())
    for ids, mask in zip(encoded.responses, encoded.formats, strict=True):
        assert mask.tolist() == [False] * (len(ids) - 1) + [True]
        assert tokenizer.decode([ids[-1]]) == "<|eot_id|>"


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("template", ["llama3", "raw", "zephyr"])
def test_one_bos(template: str, adds: bool) -> None:
    tokenizer = byte_level(LLAMA3_SPECIALS, bos="<|begin_of_text|>", eos="<|end_of_text|>", add_bos=adds)
    encoder = ConversationEncoder(tokenizer, template)
    encoded = encode(encoder, pair(TURNS))
    expected = 1 if adds or template == "llama3" else 0
    assert (encoded.prompt == tokenizer.bos_token_id).sum() == expected
    assert (encoded.prompt[0] == tokenizer.bos_token_id) == bool(expected)
    assert all(tokenizer.bos_token_id not in ids for ids in encoded.responses)
    assert encoder.bos == (tokenizer.bos_token_id if expected else None)
    prompt = TURNS[-1].content if template == "raw" else TURNS
    assert encoder.prompt_ids(prompt) == encoded.prompt.tolist()


def test_a_bos_that_opens_every_turn_is_no_start_token() -> None:
    """SmolLM2 names <|im_start|> its BOS; a prompt cut in front must not be given one in mid-sentence."""
    assert ConversationEncoder(byte_level(bos="<|im_start|>"), "chatml").bos is None


def test_control_tokens_in_a_text_are_found() -> None:
    encoder = ConversationEncoder(byte_level(), "chatml")
    with pytest.raises(BadRow, match="control token") as caught:
        encoder.render(pair(chosen="a <|im_end|> b"))
    assert caught.value.severity == "noise"
    with pytest.raises(BadRow, match="control token"):
        encoder.render(pair((Message("user", "<|im_start|>system"),)))


def test_padding_settings_of_the_tokenizer_change_nothing() -> None:
    plain, padded = byte_level(), byte_level()
    padded.pad_token = padded.eos_token
    padded.padding_side = "left"
    padded(["a", "a long text"], padding="max_length", max_length=40, truncation=True)  # leaves its mark in the backend
    a, b = (encode(ConversationEncoder(t, "chatml"), pair()) for t in (plain, padded))
    for x, y in zip((a.prompt, *a.responses), (b.prompt, *b.responses), strict=True):
        np.testing.assert_array_equal(x, y)


def test_raw_refuses_several_messages_and_empty_answers_are_noise() -> None:
    with pytest.raises(BadRow, match="raw takes prompts as plain text"):
        ConversationEncoder(byte_level(), "raw").render(Pair(TURNS, "a", "b", None))
    encoder = ConversationEncoder(byte_level(), "chatml")
    with pytest.raises(BadRow, match="empty completion") as caught:
        encode(encoder, pair(chosen="<|im_end|>"))
    assert caught.value.severity == "noise"


# ---- truncation ------------------------------------------------------------------------------------------------------


def rows(prompt: int, chosen: int, rejected: int) -> Encoded:
    """Ids 1 (BOS), 2, 3, ...; chosen from 100, rejected from 200."""
    made = [np.arange(n, dtype=np.int32) + start for n, start in ((prompt, 1), (chosen, 100), (rejected, 200))]
    return Encoded(made[0], (made[1], made[2]), (np.zeros(chosen, bool), np.zeros(rejected, bool)))


def test_truncation_keeps_the_end_of_the_prompt_and_the_start_of_the_response() -> None:
    cut = truncate(rows(10, 9, 3), 10, 4, bos=1)
    assert cut.prompt.tolist() == [1, 8, 9, 10]
    assert [r.tolist() for r in cut.responses] == [[100, 101, 102, 103, 104, 105], [200, 201, 202]]
    assert [len(f) for f in cut.formats] == [6, 3]
    assert truncate(rows(10, 1, 1), 10, 4, bos=None).prompt.tolist() == [7, 8, 9, 10]
    # A short prompt leaves its room to the response.
    assert len(truncate(rows(2, 20, 1), 10, 4, bos=1).responses[0]) == 8


@pytest.mark.parametrize(
    ("prompt", "responses", "max_length", "kept"),
    [
        (790, (4, 3), 840, 790),  # the row fits: nothing is cut, however long the prompt
        (837, (3, 1), 840, 837),
        (838, (1, 3), 840, 837),  # the longest response counts, and leaves this much
        (790, (200, 4), 840, 640),
        (790, (500, 4), 840, 420),  # half, where the response would leave less
        (400, (500, 900), 840, 400),  # a short prompt leaves its room to the response
    ],
)
def test_a_row_that_fits_stays_whole(prompt: int, responses: tuple[int, int], max_length: int, kept: int) -> None:
    whole = rows(prompt, *responses)
    cut = truncate(whole, max_length, None, bos=1)
    assert len(cut.prompt) == kept
    assert [len(r) for r in cut.responses] == [min(n, max_length - kept) for n in responses]
    explicit = truncate(whole, max_length, 300, bos=1)
    assert len(explicit.prompt) == 300
    shorter = sum(n > max_length - kept for n in responses)
    for system in (False, True):
        assert cut_of(whole, cut, system=system) == RowCut(prompt - kept, shorter, system and prompt > kept)


def test_rows_that_truncation_makes_equal_are_lost() -> None:
    same = rows(3, 5, 5)
    same = Encoded(same.prompt, (same.responses[0], np.append(same.responses[0], 7)), same.formats)
    with pytest.raises(BadRow, match=r"same tokens.*--data\.max_length") as caught:
        truncate(same, 8, 4, bos=1)
    assert caught.value.severity == "lost"


def test_prompts_to_generate_from_are_cut_alike() -> None:
    tokenizer = byte_level(LLAMA3_SPECIALS, bos="<|begin_of_text|>", eos="<|end_of_text|>")
    encoder = ConversationEncoder(tokenizer, "llama3")
    whole = encoder.prompt_ids("a long question " * 5)
    assert encoder.prompt_ids("a long question " * 5, max_length=20) == [whole[0], *whole[-19:]]


# ---- real rows -------------------------------------------------------------------------------------------------------


def hh_pairs(shared_data: Path) -> list[Pair]:
    found = []
    for line in gzip.decompress((shared_data / "hh_harmless" / "train.jsonl.gz").read_bytes()).splitlines():
        try:
            found.append(parse_pair(json.loads(line)))
        except BadRow:
            continue
    return found


@pytest.mark.parametrize("template", ["chatml", "llama2"])
def test_prompt_plus_response_is_the_whole_on_all_hh_rows(shared_data: Path, tmp_path: Path, template: str) -> None:
    """Tokenising prompt and response apart gives the ids of the rendered whole conversation."""
    tokenizer = llama2(shared_data, tmp_path) if template == "llama2" else byte_level()
    pairs = hh_pairs(shared_data)
    assert len(pairs) == 1992
    encoder = ConversationEncoder(tokenizer, template)
    chat = ChatTemplate(tokenizer, template)
    bos = [tokenizer.bos_token_id] if template == "llama2" else []
    encoded = encoder.encode([encoder.render(p) for p in pairs])
    wholes, prompts, tails = [], [], []
    for p in pairs:
        prompts.append(chat.render(p.messages, generation=True))
        for answer in (p.chosen, p.rejected):
            assert answer is not None
            whole = chat.render((*p.messages, Message("assistant", answer))).rstrip("\n")
            wholes.append(whole)
            tails.append(whole.removeprefix(prompts[-1]))
    ids = {
        name: tokenizer(many, add_special_tokens=False)["input_ids"]
        for name, many in (("whole", wholes), ("prompt", prompts), ("tail", tails))
    }
    for i, row in enumerate(encoded):
        assert isinstance(row, Encoded)
        assert row.prompt.tolist() == ids["prompt"][i]
        assert row.prompt[:1].tolist() == bos or not bos
        for k in (0, 1):
            assert [*row.prompt, *row.responses[k]] == ids["whole"][2 * i + k]
            assert row.responses[k].tolist() == ids["tail"][2 * i + k]


@pytest.mark.parametrize("legacy", [False, True])
def test_llama2_ids_are_those_of_metas_reference_code(shared_data: Path, tmp_path: Path, legacy: bool) -> None:
    """SentencePiece itself, used turn by turn as Meta's chat_completion does, but with BOS only at the start."""
    pieces = sentencepiece.SentencePieceProcessor(str(shared_data / "tokenizers" / "llama2.tokenizer.model"))
    encoder = ConversationEncoder(llama2(shared_data, tmp_path, legacy=legacy), "llama2")
    lines = (shared_data / "dpo_en" / "pairs.jsonl").read_text().splitlines()
    pairs = hh_pairs(shared_data)[:100] + [parse_pair(json.loads(line)) for line in lines[::2]]
    for p, row in zip(pairs, encoder.encode([encoder.render(p) for p in pairs]), strict=True):
        turns = list(p.messages)
        if turns[0].role == "system":
            system = turns.pop(0).content
            turns[0] = Message("user", f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0].content}")
        for k, answer in enumerate((p.chosen, p.rejected)):
            assert answer is not None
            expected, dialogue = [1], [*turns, Message("assistant", answer)]
            for user, assistant in zip(dialogue[::2], dialogue[1::2], strict=True):
                text = f"[INST] {user.content.strip()} [/INST] {assistant.content.strip()} "
                expected += [*pieces.encode(text), 2]
            assert isinstance(row, Encoded)
            assert [*row.prompt, *row.responses[k]] == expected


@pytest.mark.parametrize("name", ["llama2", "zephyr", "chatml"])
def test_a_named_template_renders_the_same_from_the_tokenizer_that_carries_it(name: str) -> None:
    tokenizer = byte_level()
    named = ChatTemplate(tokenizer, name)
    conversation = (SYSTEM, USER, Message("assistant", "Hello."), USER)
    expected = named.render(conversation, generation=True)
    tokenizer.chat_template = named.jinja
    assert ChatTemplate(tokenizer, None).render(conversation, generation=True) == expected
