"""What a model writes behind a prompt: its text, stop strings in it, how it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from dpo_jax.config import SampleConfig
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.model.llama import Llama
from dpo_jax.sample import Request


@dataclass(frozen=True)
class Response:
    """What the model wrote behind one prompt.

    Attributes:
      ids: the new tokens, the terminator included, or the token that completes a stop string.
      logps: the model's log-probability of each, at the sampling temperature.
      text: without the terminator; cut in front of a stop string.
      finish_reason: "stop" at a terminator or a stop string, "length" at `max_new_tokens`.
    """

    ids: list[int]
    logps: list[float]
    text: str
    finish_reason: str


def decode(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int], *, raw: bool = False
) -> str:
    """The text of a response. `raw`: it goes on where the prompt's text ends, so a space in front of it is kept."""

    def text(ids: Sequence[int]) -> str:
        decoded = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(decoded, str)
        return decoded

    return text([*prompt, *response])[len(text(prompt)) :] if raw else text(response)


class StopStrings:
    """Finds the token that completes a stop string, in the text as it is decoded from the tokens so far.

    The whole response is decoded at each look, so what a tokenizer writes for a token in its place is what is searched.
    """

    def __init__(self, text: Callable[[int, Sequence[int]], str], strings: Sequence[str]):
        """`text(prompt index, tokens)` decodes a response."""
        self._text, self._strings = text, strings
        self._clean: dict[Request, int] = {}

    def begin(self, text: str) -> int | None:
        """Where the first stop string begins; None where there is none."""
        return min((at for at in map(text.find, self._strings) if at >= 0), default=None)

    def __call__(self, request: Request, tokens: list[int]) -> int | None:
        """How many of the tokens it takes to have a stop string; None where they hold none."""
        clean = self._clean.pop(request, 0)
        if self.begin(self._text(request[0], tokens)) is None:
            self._clean[request] = len(tokens)
            return None
        sizes = range(clean + 1, len(tokens) + 1)
        return next(n for n in sizes if self.begin(self._text(request[0], tokens[:n])) is not None)


def terminators(model: Llama, encoder: ConversationEncoder, config: SampleConfig) -> SampleConfig:
    """`config` with the stop tokens of the template, the tokenizer and the model added to its own."""
    every = (*config.stop_tokens, *encoder.terminators, *model.config.stop_ids)
    return replace(config, stop_tokens=tuple(dict.fromkeys(every)))
