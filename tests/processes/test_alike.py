"""All processes have the same code, packages and options, or the one that differs is named."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from dpo_jax.config import DistributedConfig
from dpo_jax.errors import InputError
from dpo_jax.files.folder import as_json, flatten
from dpo_jax.processes import alike


def told(*values: str, name: str = "jax") -> list[dict]:
    return [{"host": f"h{i}", "facts": {"Python": "3.12", name: value}} for i, value in enumerate(values)]


def test_the_odd_one_is_named() -> None:
    assert alike.difference(told("1", "1", "1")) is None
    said = alike.difference(told("1", "2", "2"))
    assert said is not None
    assert said.startswith("process 0 on h0 differs in jax: 1 there, 2 in process 1 on h1; start all with the same")
    said = alike.difference(told("1", "2"))
    assert (said or "").startswith("process 1 on h1 differs in jax: 2 there, 1 in process 0 on h0;")
    assert "so have 1 more something else" in (alike.difference(told("1", "2", "1", "3")) or "")


def test_an_option_that_one_lacks() -> None:
    two = told("5", "5", name="--train.steps")
    del two[1]["facts"]["--train.steps"]
    assert "process 1 on h1 differs in --train.steps: nothing there, 5 in process 0" in (alike.difference(two) or "")


def test_what_may_differ() -> None:
    one, two = (DistributedConfig(coordinator=f"{me}:1", processes=2, process_id=me) for me in range(2))
    flat = [flatten({"distributed": as_json(config)}) for config in (one, two)]
    assert flat[0] != flat[1]
    assert alike.options_of(flat[0]) == alike.options_of(flat[1])
    assert alike.options_of(flat[0])["--distributed.processes"] == "2"


def test_what_is_installed_is_the_same_twice() -> None:
    assert alike.installed() == alike.installed()
    assert {"the code of dpo_jax", "Python", *alike.PACKAGES} == alike.installed().keys()


class Store(dict):
    """A coordination service's store; the clock stands still where something is missing."""

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self
        self[key] = value

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        while key not in self:
            pass
        return self[key]


def test_all_end_with_the_same_line() -> None:
    store = Store()

    def join(me: int) -> str:
        alike.check(store, me, 3, "a", {"data": "x"}, within=9)
        with pytest.raises(InputError) as error:
            alike.check(store, me, 3, "b", {"data": "y" if me == 2 else "x"}, within=9)
        return str(error.value)

    with ThreadPoolExecutor(3) as pool:
        lines = set(pool.map(join, range(3)))
    assert len(lines) == 1
    assert "process 2 on " in lines.pop()
