"""Whoever answers, opened by its options: an endpoint, or a model of this machine; replies are kept on the disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from dpo_jax.complete.chat_client import ChatClient, Question
from dpo_jax.complete.local_model import LocalModel
from dpo_jax.complete.reply_cache import Reply, ReplyCache
from dpo_jax.config import SampleConfig
from dpo_jax.config.judge import EndpointConfig


class Answerer:
    """Answers questions; a model's weights are read for the first question that the disk does not answer.

    Attributes:
      name: what it is called in tables.
    """

    def __init__(
        self,
        name: str,
        replies: Path,
        *,
        endpoint: EndpointConfig,
        model: str | None,
        sample: SampleConfig,
        mesh: Callable[[], Mesh],
        batch_size: int,
        dtype: str,
        template: str | None,
        date: str | None,
    ):
        """Raises `InputError` for an URL that is none."""
        self.name, self._cache = name, ReplyCache(replies)
        self._client = ChatClient(endpoint, self._cache) if endpoint.url is not None else None
        self._local: LocalModel | None = None
        self._model, self._sample, self._mesh = model, sample, mesh
        self._setting = {"batch_size": batch_size, "dtype": dtype, "template": template, "date": date}

    def ask(self, questions: Sequence[Question], done: Callable[[int], None] = lambda _: None) -> list[Reply]:
        """The replies, in order. Raises `InputError`: see `ChatClient` and `LocalModel`."""
        if not questions:
            return []
        if self._client is not None:
            return self._client.ask(questions, done)
        return self._opened().ask(questions, done)

    def _opened(self) -> LocalModel:
        if self._local is None:
            assert self._model is not None, "there is an endpoint or a model"
            self._local = LocalModel(self._model, self._cache, self._sample, mesh=self._mesh(), **self._setting)
        return self._local

    @property
    def weights(self) -> str | None:
        """The fingerprint of a model's weights, which are read for it; None of an endpoint."""
        return self._opened().weights if self._client is None else None

    def close(self) -> None:
        """Give the weights of a model up."""
        if self._local is not None:
            self._local.close()
            self._local = None

    @property
    def told(self) -> str:
        """What it cost so far, for the screen."""
        if self._client is None:
            return "" if self._local is None else f"{self._local.asked} written, {self._local.cached} from the disk"
        client = self._client
        tokens = f"{client.prompt_tokens:,} + {client.completion_tokens:,} tokens, cost {client.cost:.4f}"
        return f"{client.asked} requests, {client.cached} from the disk, {tokens}"
