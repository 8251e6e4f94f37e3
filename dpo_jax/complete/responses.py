"""What a model writes behind prompts: text, stop strings, how it ended; in the order asked for, or as it ends."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from dpo_jax.config import SampleConfig
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.model.llama import Llama
from dpo_jax.sample import Finished, Request, beam_search, serve
from dpo_jax.weights.tokenizer import text_ids


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


def answers(
    model: Llama,
    variables: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    config: SampleConfig,
    batch_size: int,
    requests: Sequence[Request],
    raw: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[list[tuple[Request, Response]]]:
    """Responses to `requests` (pairs of a prompt's index and a sample's number), in the order in which they end.

    Each request draws with its own key, so neither the others nor `batch_size` change its text.
    """

    def text(prompt: int, ids: Sequence[int]) -> str:
        return decode(tokenizer, prompts[prompt], ids, raw=raw)

    vocabulary = text_ids(tokenizer, model.config)
    stops = StopStrings(text, config.stop_strings) if config.stop_strings else None
    if config.beams is not None:
        together = max(1, batch_size // config.beams)
        served = _search(model, variables, prompts, config, requests, together, vocabulary, mesh)
    else:
        served = serve(
            model,
            variables,
            prompts,
            jax.random.key(seed),
            config=config,
            requests=requests,
            rows=batch_size,
            ended=stops,
            vocabulary=vocabulary,
            mesh=mesh,
        )

    def response(request: Request, ids: list[int], logps: list[float]) -> Response:
        stopped = ids[-1] in config.stop_tokens
        written = text(request[0], ids[:-1] if stopped else ids)
        at = None if stops is None else stops.begin(written)
        reason = "stop" if stopped or at is not None else "length"
        return Response(ids, logps, written if at is None else written[:at], reason)

    for finished in served:
        yield [(done.request, response(*done)) for done in finished]


def _search(
    model: Llama,
    variables: Any,
    prompts: Sequence[Sequence[int]],
    config: SampleConfig,
    requests: Sequence[Request],
    together: int,
    vocabulary: int | None,
    mesh: Mesh | None,
) -> Iterator[list[Finished]]:
    """What beam search finds for each request, `together` prompts at a time."""
    for start in range(0, len(requests), together):
        some = list(requests[start : start + together])
        # The last batch is filled up with its last prompt: it needs no program of its own.
        filled = some + [some[-1]] * (min(together, len(requests)) - len(some))
        asked = [prompts[i] for i, _ in filled]
        found = beam_search(model, variables, asked, config=config, vocabulary=vocabulary, mesh=mesh)
        tokens, mask, logps = (np.asarray(x) for x in found)
        yield [Finished(r, tokens[i][mask[i]].tolist(), logps[i][mask[i]].tolist()) for i, r in enumerate(some)]


def responses(
    model: Llama,
    variables: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    config: SampleConfig,
    batch_size: int,
    first: int = 0,
    raw: bool = False,
    mesh: Mesh | None = None,
) -> Iterator[list[Response]]:
    """One response to each of `prompts[first:]`, in order, a list of `batch_size` (the last may be shorter) at a time.

    Row i (counted from 0 over all prompts) draws with its own key, so where it starts and how many go at once change no
    text.
    """
    requests = [(i, 0) for i in range(first, len(prompts))]
    following = range(first, min(first + batch_size, len(prompts)))
    ready: dict[int, Response] = {}
    for some in answers(
        model,
        variables,
        tokenizer,
        prompts,
        seed=seed,
        config=config,
        batch_size=batch_size,
        requests=requests,
        raw=raw,
        mesh=mesh,
    ):
        ready |= {index: response for (index, _), response in some}
        while all(i in ready for i in following):
            yield [ready.pop(i) for i in following]
            following = range(following.stop, min(following.stop + batch_size, len(prompts)))
            if not following:
                return


def terminators(model: Llama, encoder: ConversationEncoder, config: SampleConfig) -> SampleConfig:
    """`config` with the stop tokens of the template, the tokenizer and the model added to its own."""
    every = (*config.stop_tokens, *encoder.terminators, *model.config.stop_ids)
    return replace(config, stop_tokens=tuple(dict.fromkeys(every)))
