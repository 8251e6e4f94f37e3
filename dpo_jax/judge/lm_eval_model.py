"""A model of ours for EleutherAI's lm-evaluation-harness (`lm-eval` 0.4.x): what its `LM` asks of a model.

loglikelihood          log p(continuation | context) in nats, and whether greedy decoding gives the continuation
loglikelihood_rolling  log p(text), each token predicted once with as much context as the model was made for
generate_until         what it writes behind a text, up to one of the given strings

Texts become ids, and windows are laid, by the rules of the harness's own `hf` model, so that the figures are its
figures; a test compares both. The harness is imported where an adapter is made: `pip install 'dpo_jax[lm_eval]'`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dpo_jax import mesh as meshes
from dpo_jax.complete.writing.writer import Writer
from dpo_jax.config import SampleConfig
from dpo_jax.data.tokens.encode import ConversationEncoder
from dpo_jax.data.tokens.templates import RAW, TemplateError
from dpo_jax.errors import InputError
from dpo_jax.files.log import ProgressBar, show_log
from dpo_jax.model.logprobs import TokenScores, token_scores
from dpo_jax.voice import shows_bars
from dpo_jax.weights.opened import StoredModel, open_checkpoint
from dpo_jax.weights.pretrained import load_pretrained
from dpo_jax.weights.tokenizer import check_vocabulary

_log = logging.getLogger(__name__)
_MULTIPLE = 64  # lengths are padded to it, so that few shapes are compiled
_TOKENS = 256  # written at most where a task does not say it, as by the harness's `hf`


class ScoredModel:
    """A model that scores and continues token ids.

    Attributes:
      name: where it comes from.
      tokenizer: of the model.
      max_length: tokens that it was made for.
    """

    def __init__(
        self,
        source: str | StoredModel,
        *,
        mesh: Mesh,
        batch_size: int = 8,
        dtype: str = "float32",
        name: str | None = None,
    ):
        """Reads the weights. `name`: of a model that is open already.

        Raises `InputError` for what is no model, or a batch that does not divide.
        """
        if batch_size % (parts := meshes.batch_parts(mesh)):
            raise InputError(f"--batch_size {batch_size} does not divide over {parts} devices; take a multiple of it")
        place = open_checkpoint(source)
        self.name = str(source) if name is None else name
        self.tokenizer: Any = place.tokenizer()  # of Hugging Face, whose annotations cover every way to call it
        check_vocabulary(self.tokenizer, place.architecture)
        self.max_length, self._batch_size, self._mesh = place.architecture.max_position, batch_size, mesh
        self._encoder = ConversationEncoder(self.tokenizer, RAW)
        self._model, self._variables = model, _ = load_pretrained(place, mesh=mesh, dtype=dtype)

        def scores(variables: Any, batch: tuple[jax.Array, jax.Array, jax.Array]) -> TokenScores:
            tokens, lengths, places = batch
            segments = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
            hidden: Any = model.apply(variables, tokens, segments=segments, packed=False)
            targets = jnp.take_along_axis(jnp.roll(tokens, -1, axis=1), places, axis=1)
            states = jnp.take_along_axis(hidden, places[..., None], axis=1)
            return token_scores(states, model.apply(variables, method="unembedding"), targets)  # pyright: ignore

        self._scores = meshes.Replicated(scores, mesh)

    def loglikelihoods(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        label: str = "scored",
        *,
        called: Callable[[int], str] = lambda i: f"pair {i}",
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation) in ids: log p(continuation | context) in nats, and whether it is greedy.

        A context is cut at its beginning to what the model was made for. Raises `InputError` for one that is empty, and
        for a continuation that is empty or longer than the model's context; `called`: what it calls pair i.
        """
        for i, (context, continuation) in enumerate(pairs):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise InputError(
                    f"{called(i)}: a context of {len(context)} tokens and a continuation of {len(continuation)}: both "
                    f"need a token, and the model has a context of {self.max_length}"
                )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), i))
        with ProgressBar(label, len(pairs)) as bar:
            for start in range(0, len(order), self._batch_size):
                some = order[start : start + self._batch_size]
                for i, one in zip(some, self._batch([pairs[i] for i in some]), strict=True):
                    found[i] = one
                bar.update(start + len(some))
        return found

    def _batch(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        ids = [[*context, *continuation][-(self.max_length + 1) :] for context, continuation in pairs]
        width = -(-max(map(len, ids)) // _MULTIPLE) * _MULTIPLE
        scored = 1 << (max(len(continuation) for _, continuation in pairs) - 1).bit_length()
        tokens, lengths = np.zeros((self._batch_size, width), np.int32), np.ones(self._batch_size, np.int32)
        places = np.zeros((self._batch_size, scored), np.int32)
        for row, (one, (_, continuation)) in enumerate(zip(ids, pairs, strict=True)):
            # The last token predicts nothing and is no input: it stands behind them, as a target alone.
            tokens[row, : len(one)], lengths[row] = one, len(one) - 1
            first = len(one) - 1 - len(continuation)
            places[row, : len(continuation)] = np.arange(first, len(one) - 1)
        scores = self._scores(self._variables, meshes.put_batch(self._mesh, (tokens, lengths, places)))
        logps, greedy = np.asarray(scores.logps, np.float64), np.asarray(scores.correct)
        counts = [len(continuation) for _, continuation in pairs]
        return [(float(logps[row, :n].sum()), bool(greedy[row, :n].all())) for row, n in enumerate(counts)]

    def continuations(self, prompts: Sequence[Sequence[int]], sample: SampleConfig, *, seed: int = 0) -> list[str]:
        """The text behind each prompt, in order, special tokens left out; stop strings are not cut off."""
        writer = Writer(
            lambda: (self._model, self._variables),
            self.tokenizer,
            self._encoder,
            sample,
            batch_size=self._batch_size,
            mesh=self._mesh,
        )
        found, written = [""] * len(prompts), 0
        with ProgressBar("written", len(prompts)) as bar:
            for some in writer.responses(prompts, [(i, 0) for i in range(len(prompts))], seed=seed):
                for (i, _), response in some:
                    found[i] = self.tokenizer.decode(response.ids, skip_special_tokens=True)
                written += len(some)
                bar.update(written)
        return found


def check_installed() -> None:
    """Raises `InputError` where lm-eval 0.4.x is not installed."""
    advice = "pip install 'dpo_jax[lm_eval]'"
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise InputError(f"lm-evaluation-harness is not installed: {advice}") from None
    if not version.startswith("0.4."):
        raise InputError(f"lm-eval {version} is installed, and its interface is known here for 0.4.x: {advice}")


@contextmanager
def harness() -> Iterator[Any]:
    """The harness's `TaskManager`, while it talks as our commands do: its warnings are ours, and it draws bars only on
    a terminal and only in plain words. What it looks up of this machine and of the folder's git is left out."""
    show_log("lm_eval")
    shown, bar = shows_bars(), import_module("tqdm.std").tqdm
    evaluator: Any = import_module("lm_eval.evaluator")
    drawn, looked_up = bar.__init__, (evaluator.add_env_info, evaluator.get_git_commit_hash)

    def silent(self: Any, *args: Any, **told: Any) -> None:
        drawn(self, *args, **told | {"disable": True})

    try:
        version = {"lm_eval_version": metadata.version("lm_eval")}
        evaluator.add_env_info, evaluator.get_git_commit_hash = lambda found: found.update(version), lambda: None
        if not shown:
            bar.__init__ = silent
        yield import_module("lm_eval.tasks").TaskManager
    finally:
        bar.__init__ = drawn
        evaluator.add_env_info, evaluator.get_git_commit_hash = looked_up


def sampling(given: dict[str, Any], longest: int) -> SampleConfig:
    """A task's generation arguments, as the harness normalises them, for a context of `longest` tokens.

    Raises `InputError` for one that is not known here, and where nothing is left for the prompt.
    """
    own = dict(given)
    until, tokens = own.pop("until", None) or (), own.pop("max_gen_toks", _TOKENS)
    draws, temperature = bool(own.pop("do_sample", False)), float(own.pop("temperature", 0.0) or 0.0)
    draws &= temperature > 0
    names = ("top_k", "top_p", "min_p", "repetition_penalty")
    cuts = {name: own.pop(name) for name in names if own.get(name) is not None}
    neutral = {"num_beams": 1, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    cuts = {name: value for name, value in cuts.items() if value != neutral.get(name)}
    own = {name: value for name, value in own.items() if value is not None and value != neutral.get(name)}
    if own:
        raise InputError(f"a task asks for {', '.join(sorted(own))} in its generation_kwargs, which is not known here")
    if tokens >= longest:
        raise InputError(f"a task asks for {tokens} new tokens, and the model has a context of {longest}")
    if not draws:  # as Hugging Face's generate, which reads them where it draws alone
        cuts = {name: value for name, value in cuts.items() if name == "repetition_penalty"}
    stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    return SampleConfig(max_new_tokens=tokens, temperature=temperature if draws else 0.0, stop_strings=stops, **cuts)


def adapter(scored: ScoredModel) -> Any:
    """The `lm_eval.api.model.LM` of a model, for `lm_eval.simple_evaluate(model=...)`. Raises `InputError`."""
    check_installed()
    base: Any = import_module("lm_eval.api.model").TemplateLM
    shared, windows = import_module("lm_eval.models.utils"), import_module("lm_eval.utils")

    class DpoJax(base):
        """The harness's questions, put to `scored`."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = scored.tokenizer
            self.batch_size = scored._batch_size
            self._told, self._names = False, list[str]()

        @property
        def eot_token_id(self) -> Any:
            return self.tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> Any:
            own = self.tokenizer.bos_token_id
            return self.eot_token_id if own is None else own

        @property
        def max_length(self) -> int:
            return scored.max_length

        @property
        def tokenizer_name(self) -> str:
            return scored.name.replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
                add_special_tokens = False
            told: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return self.tokenizer.encode(string, **told)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            setting: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
            setting["continue_final_message"] = not add_generation_prompt
            try:
                return self.tokenizer.apply_chat_template(chat_history, **setting)
            except TemplateError as problem:
                # A task's own description: the harness's `hf` goes on without it, and so does its figure.
                rest = [message for message in chat_history if message["role"] != "system"]
                try:
                    text = self.tokenizer.apply_chat_template(rest, **setting)
                except TemplateError:
                    raise InputError(f"{scored.name}: its chat template refuses a question: {problem}") from problem
                if not self._told:
                    _log.warning("the chat template refuses system messages, and tasks' own are left out: %s", problem)
                    self._told = True
                return text

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._names = [f"task {one.task_name}, row {one.doc_id}, choice {one.idx}" for one in requests]
            for name, request in zip(self._names, requests, strict=True):
                if not request.args[1]:
                    raise InputError(f"{name}: is an empty text, which has no likelihood; mend the task's rows")
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = scored.loglikelihoods(pairs, called=self._names.__getitem__)
            for request, answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            own: list[tuple[Sequence[int], Sequence[int]]] = []
            of: list[int] = []
            for i, request in enumerate(requests):
                parts = windows.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                own += map(windows.make_disjoint_window, parts)
                of += [i] * (len(own) - len(of))
            totals = [0.0] * len(requests)
            for i, (logp, _) in zip(of, scored.loglikelihoods(own), strict=True):
                totals[i] += logp
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            found = [""] * len(requests)
            for some in groups.values():
                sample = sampling(shared.normalize_gen_kwargs(requests[some[0]].args[1], _TOKENS), self.max_length)
                room = self.max_length - sample.max_new_tokens
                texts = [self.tok_encode(requests[i].args[0])[-room:] for i in some]
                prompts = [ids or [self.prefix_token_id] for ids in texts]  # nothing to go on from: as log-likelihoods
                for i, text in zip(some, scored.continuations(prompts, sample), strict=True):
                    found[i] = shared.postprocess_generated_text(text, list(sample.stop_strings), None)
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
            return found

        def get_model_info(self) -> dict[str, Any]:
            return {"model": scored.name}

    return DpoJax()
