"""How one token is spelled where it stands alone: part of a character has bytes, and no text."""

import functools
import re

from transformers import PreTrainedTokenizerBase


@functools.cache
def _byte_of() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes (GPT-2's table) -> the bytes."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def spelling(tokenizer: PreTrainedTokenizerBase, id: int) -> tuple[str, bytes | None]:
    r"""The text and the bytes of a token; part of a character is written `bytes:\xe4\xbd`, as the OpenAI API does.

    Bytes are None where the vocabulary does not tell them.
    """
    text = tokenizer.decode([id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text, text.encode()
    token = tokenizer.convert_ids_to_tokens(id)
    assert isinstance(token, str)
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
        raw = bytes.fromhex(byte[1])
    elif all(character in _byte_of() for character in token):
        raw = bytes(_byte_of()[character] for character in token)
    else:
        return token, None
    return "bytes:" + "".join(f"\\x{b:02x}" for b in raw), raw
