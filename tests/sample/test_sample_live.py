"""`sample.live`: a request says the same alone, among others and after rows were used before; as `generate` where both
can say it; alternatives are those of a full forward pass."""

from typing import Any

import jax
import numpy as np
import pytest

from dpo_jax.config import SampleConfig
from dpo_jax.errors import InputError
from dpo_jax.mesh import make_mesh
from dpo_jax.model import llama, variables as model_variables
from dpo_jax.model.architecture import LlamaConfig
from dpo_jax.sample import generate
from dpo_jax.sample.live import Live, Settings

CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=1024,
)
ASKED = [
    ([1, 2, 3], Settings(9, temperature=0.0)),
    ([7] * 20, Settings(12, temperature=0.9, top_k=40, top_p=0.95, alternatives=True)),
    ([9, 8, 7, 6], Settings(300, temperature=1.3, min_p=0.01)),  # makes the cache grow
]


@pytest.fixture(scope="module")
def model():
    model = llama.Llama(CONFIG)
    variables = model_variables.init_variables(model, jax.random.key(0))
    return model, jax.tree.map(lambda x: x * 8 if x.ndim > 1 and x.shape[-1] > 1 else x, variables)


def finish(live: Live, rows: list[int]) -> list[tuple[list[int], np.ndarray]]:
    """Tokens and log-probabilities of the rows, once all are done; others go on beside them."""
    while True:
        view = live.run(3)
        if view.done[rows].all():
            found = [(view.tokens[i, : view.count[i]].tolist(), view.logps[i, : view.count[i]]) for i in rows]
            for row in rows:
                live.release(row)
            return found


def expected(model: Any, asked: tuple[list[int], Settings], seed: int) -> list[int]:
    prompt, settings = asked
    config = SampleConfig(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=None if settings.top_k > 101 else settings.top_k,
        top_p=None if settings.top_p == 1 else settings.top_p,
        min_p=settings.min_p or None,
    )
    return np.asarray(generate(model[0], model[1], [prompt], jax.random.key(seed), config=config).tokens)[0].tolist()


def test_alone_among_others_and_after_others(model) -> None:
    together, alone = Live(*model, rows=3), Live(*model, rows=1)
    rows = [together.admit(prompt, [0], i, settings)[0] for i, (prompt, settings) in enumerate(ASKED)]
    assert not together.free
    first = [finish(together, [row])[0] for row in rows]
    for i, (prompt, settings) in enumerate(ASKED):
        ((text, logps),) = finish(alone, alone.admit(prompt, [0], i, settings))
        assert text == first[i][0] == expected(model, (prompt, settings), i)
        np.testing.assert_allclose(logps, first[i][1], atol=1e-4)


def test_samples_share_a_prompt_and_stop_tokens_end_them(model) -> None:
    live = Live(*model, rows=4)
    plain = finish(live, live.admit([3, 4], [0, 1, 2], 5, Settings(8)))
    stop = plain[1][0][3]
    stopped = finish(live, live.admit([3, 4], [0, 1, 2], 5, Settings(8, stop_tokens=(stop,))))
    for (whole, _), (cut, _) in zip(plain, stopped, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert cut == whole[:end]
    assert len({tuple(tokens) for tokens, _ in plain}) == 3


def test_alternatives_are_those_of_a_forward_pass(model) -> None:
    live, prompt = Live(*model, rows=2), [5, 6, 7]
    (row,) = live.admit(prompt, [0], 1, Settings(6, alternatives=True))
    view = live.run(3)
    while not view.done[row]:
        view = live.run(3)
    ids = np.asarray([[*prompt, *view.tokens[row, :6]]])
    net, variables = model
    logits = net.apply(variables, net.apply(variables, ids), method="logits")[0, len(prompt) - 1 : -1]
    logps = np.asarray(jax.nn.log_softmax(logits))
    assert view.tops is not None
    for t in range(6):
        np.testing.assert_allclose(logps[t, view.tops.tokens[row, t]], view.tops.logps[row, t], atol=1e-4)
        np.testing.assert_allclose(np.sort(logps[t])[::-1][:20], view.tops.logps[row, t], atol=1e-4)
        np.testing.assert_allclose(logps[t, view.tokens[row, t]], view.logps[row, t], atol=1e-4)


def test_rows_split_over_a_mesh(model) -> None:
    live = Live(*model, rows=3, mesh=make_mesh(4, 1, 2))
    assert live.size == 4
    rows = [live.admit(prompt, [0], i, settings)[0] for i, (prompt, settings) in enumerate(ASKED[:2])]
    for i, row in enumerate(rows):
        assert finish(live, [row])[0][0] == expected(model, ASKED[i], i)


def test_what_does_not_fit_is_refused(model) -> None:
    live = Live(*model, rows=1, longest=64)
    with pytest.raises(InputError, match="a prompt of 60 tokens and 5 new ones exceed the 64"):
        live.admit([1] * 60, [0], 0, Settings(5))
    with pytest.raises(InputError, match=r"vocabulary is 0\.\.100"):
        live.admit([101], [0], 0, Settings(5))
    assert live.free == [0]
