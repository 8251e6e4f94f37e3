"""A model of this machine that answers questions: by writing, or by the probabilities of its first token."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.complete.asking.chat_client import Question
from dpo_jax.complete.asking.reply_cache import Reply, ReplyCache, key_of
from dpo_jax.complete.writing.writer import open_writer
from dpo_jax.config import SampleConfig
from dpo_jax.data.rows.messages import Message
from dpo_jax.errors import InputError, naming
from dpo_jax.sample import Request, check_context
from dpo_jax.weights.opened import open_checkpoint

_MULTIPLE = 64  # lengths are padded to it, so that few shapes are compiled


class LocalModel:
    """Answers as `ChatClient` does, its replies kept in the same way.

    Attributes:
      asked: questions that the model was run for.
      cached: questions that were answered from the disk.
    """

    def __init__(
        self,
        source: str,
        cache: ReplyCache,
        sample: SampleConfig,
        *,
        mesh: Mesh,
        batch_size: int,
        dtype: str,
        template: str | None = None,
        date: str | None = None,
    ):
        """Raises `InputError` for what is no model, or a batch that does not divide over the mesh."""
        if batch_size % (parts := meshes.batch_parts(mesh)):
            raise InputError(f"--batch_size {batch_size} does not divide over {parts} devices; take a multiple of it")
        place = open_checkpoint(source)
        self._architecture, self._cache = place.architecture, cache
        spoken = {"template": template, "date": date}
        told: dict[str, Any] = {name: value for name, value in spoken.items() if value is not None}
        self._writer = open_writer(place, sample, mesh=mesh, batch_size=batch_size, dtype=dtype, **told)
        self._setting, self._mesh = {"dtype": dtype, "sample": asdict(sample), **told}, mesh
        self.asked = self.cached = 0

    @property
    def weights(self) -> str:
        """The fingerprint of its weights, which are read for it."""
        return self._writer.weights

    def close(self) -> None:
        """Give the weights up."""
        self._writer.close()

    def _key(self, question: Question) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "messages": [dict(message) for message in question.messages],
            "version": question.version,
            "seed": question.seed or 0,
            "logprobs": question.logprobs,
            **self._setting,
        }

    def ask(self, questions: Sequence[Question], done: Callable[[int], None] = lambda _: None) -> list[Reply]:
        """The replies, in order; equal questions are asked once. Raises `InputError` where one is too long."""
        requests = [self._key(question) for question in questions]
        keys = [key_of(request) for request in requests]
        found = {key: reply for key in dict.fromkeys(keys) if (reply := self._cache.get(key)) is not None}
        self.cached += len(found)
        missing = {key: i for i, key in enumerate(keys) if key not in found}

        def keep(key: str, reply: Reply) -> None:
            self._cache.put(key, requests[missing[key]], reply)
            found[key] = reply
            done(len(found))

        self.asked += len(missing)
        distinct = dict(zip(keys, questions, strict=True))
        for seed in sorted({questions[i].seed or 0 for i in missing.values()}):
            for first in (False, True):
                # With those that are known: what is drawn depends on a question's place among them.
                some = [k for k, q in distinct.items() if (q.seed or 0) == seed and bool(q.logprobs) == first]
                wanted = [at for at, key in enumerate(some) if key in missing]
                if not wanted:
                    continue
                ids = [self._ids(distinct[key], first=first) for key in some]
                if first:
                    group = [some[at] for at in wanted]
                    self._read([ids[at] for at in wanted], group, [distinct[key].logprobs for key in group], keep)
                else:
                    self._write(ids, some, wanted, seed, keep)
        return [found[key] for key in keys]

    def _ids(self, question: Question, *, first: bool) -> list[int]:
        ids = self._writer.encoder.prompt_ids([Message(m["role"], m["content"]) for m in question.messages])
        new = SampleConfig(max_new_tokens=1) if first else self._writer.sample
        with naming("a question"):
            check_context(self._architecture, len(ids), new)
        return ids

    def _write(
        self,
        ids: Sequence[Sequence[int]],
        keys: Sequence[str],
        wanted: Sequence[int],
        seed: int,
        keep: Callable[..., None],
    ) -> None:
        """Answers to the questions at the places `wanted`."""
        requests: list[Request] = [(i, 0) for i in wanted]
        for some in self._writer.responses(ids, requests, seed=seed):
            for (i, _), response in some:
                keep(keys[i], Reply(response.text, response.finish_reason, "", len(ids[i]), len(response.ids)))

    def _read(
        self, ids: Sequence[Sequence[int]], keys: Sequence[str], counts: Sequence[int], keep: Callable[..., None]
    ) -> None:
        """The likeliest first tokens, in batches of one size."""
        model, variables = self._writer._loaded if ids else (None, None)
        size, tokenizer = self._writer.batch_size, self._writer.tokenizer

        def likeliest(variables: Any, batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            assert model is not None
            tokens, lengths = batch
            segments = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
            hidden = model.apply(variables, tokens, segments=segments, packed=False)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]  # pyright: ignore
            logps = jax.nn.log_softmax(model.apply(variables, last, method="logits"))  # pyright: ignore
            return jax.lax.top_k(logps, min(max(counts), logps.shape[-1]))

        run = meshes.Replicated(likeliest, self._mesh) if ids else None
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), size):
            some = order[start : start + size]
            width = -(-max(len(ids[i]) for i in some) // _MULTIPLE) * _MULTIPLE
            tokens, lengths = np.zeros((size, width), np.int32), np.ones(size, np.int32)
            for row, i in enumerate(some):
                tokens[row, : len(ids[i])], lengths[row] = ids[i], len(ids[i])
            assert run is not None
            logps, best = (np.asarray(x) for x in run(variables, meshes.put_batch(self._mesh, (tokens, lengths))))
            for row, i in enumerate(some):
                top = [(str(tokenizer.decode([int(t)])), float(p)) for t, p in zip(best[row], logps[row], strict=True)]
                keep(keys[i], Reply("", "stop", "", len(ids[i]), 0, tuple(top[: counts[i]])))
