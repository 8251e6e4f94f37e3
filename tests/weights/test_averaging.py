"""`dpo-jax average`: the mean of models, against numpy; what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from dpo_jax import cli
from dpo_jax.config import AverageRun
from dpo_jax.weights.averaging import average
from dpo_jax.weights.opened import open_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    return [str(tiny.folder(root / f"m{seed}", seed=seed)) for seed in range(3)]


def weights(folder: Path | str) -> dict[str, np.ndarray]:
    return load_file(Path(folder) / "model.safetensors")


def expected(models: list[str], shares: tuple[float, ...]) -> dict[str, np.ndarray]:
    """In float64."""
    each = [weights(model) for model in models]
    names = each[0].keys()
    return {n: sum(s * x[n].astype(np.float64) for s, x in zip(shares, each, strict=True)) for n in names}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "shares", "method"),
    [
        ([], (1 / 3, 1 / 3, 1 / 3), "uniform"),
        (["--weights", "1", "0", "3"], (0.25, 0.0, 0.75), "weighted"),
        (["--ema", "0.5"], (0.25, 0.25, 0.5), "ema"),  # a_1 = (m_0 + m_1) / 2, a_2 = (a_1 + m_2) / 2
    ],
)
def test_the_mean(
    models: list[str], options: list[str], shares: tuple[float, ...], method: str, tmp_path: Path
) -> None:
    to = tmp_path / "mean"
    assert cli.main(["average", "--models", *models, *options, "--to", str(to)]) == 0
    found, wanted = weights(to), expected(models, shares)
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, wanted[name], atol=1e-7)
    made = json.loads((to / "average.json").read_text())
    assert made["method"] == method
    assert [(one["model"], one["weight"]) for one in made["models"]] == list(zip(models, shares, strict=True))
    assert len({one["sha256"] for one in made["models"]}) == 3
    assert open_checkpoint(str(to)).tokenizer().get_vocab() == open_checkpoint(models[0]).tokenizer().get_vocab()


def test_bfloat16_is_rounded_once_and_shards_are_streamed(models: list[str], tmp_path: Path) -> None:
    places = [open_checkpoint(model) for model in models[:2]]
    told = {"tokenizer": places[0].tokenizer(), "made_by": {}}
    average(places, (0.5, 0.5), tmp_path / "mean", **told, dtype="bfloat16", shard_bytes=20_000)
    assert len(list((tmp_path / "mean").glob("*.safetensors"))) > 2
    import ml_dtypes

    wanted = expected(models[:2], (0.5, 0.5))
    for file in (tmp_path / "mean").glob("*.safetensors"):
        for name, values in load_file(file).items():
            single = wanted[name].astype(np.float32).astype(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(values.astype(np.float32), single.astype(np.float32))


def test_shares_of_an_ema_are_those_of_its_recursion() -> None:
    run, values = AverageRun(models=("a", "b", "c", "d"), to="x", ema=0.9), np.asarray([3.0, -1.0, 4.0, 2.0])
    mean = values[0]
    for value in values[1:]:
        mean = 0.9 * mean + 0.1 * value
    assert np.dot(run.shares(), values) == pytest.approx(mean)
    assert sum(run.shares()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1e308, 1e308), (0.5, 0.5)),
        ((1.5e308, 0.5e308, 1e308), (0.5, 1 / 6, 1 / 3)),
        ((5e-324, 5e-324), (0.5, 0.5)),
        ((0.1, 0.2, 0.7), (0.1, 0.2, 0.7)),
    ],
)
def test_shares_of_weights_of_any_size(weights: tuple[float, ...], shares: tuple[float, ...]) -> None:
    run = AverageRun(models=tuple("abc"[: len(weights)]), to="x", weights=weights)
    assert run.shares() == pytest.approx(shares, rel=1e-15)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["A"], "--models names one model, and that is no average"),
        (["A", "A"], "--models names A twice"),
        (["A", "B", "--weights", "1"], "--weights has 1 numbers for 2 models"),
        (["A", "B", "--weights", "0", "0"], "--weights must be 0 or more, and not all 0"),
        (["A", "B", "--weights", "1", "1", "--ema", ".5"], "--weights and --ema exclude each other"),
        (["A", "B", "--ema", "1"], "--ema 1.0 must lie in (0, 1)"),
    ],
)
def test_bad_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["average", "--models", *options, "--to", "x"]) == 2
    assert words in capsys.readouterr().err


def test_another_chat_template_is_told(models: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoken = shutil.copytree(models[1], tmp_path / "spoken")
    (spoken / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert cli.main(["average", "--models", models[0], str(spoken), "--to", str(tmp_path / "to")]) == 0
    assert "has another chat template than" in caplog.text


def test_other_shapes_and_tokenizers(models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = str(tiny.folder(tmp_path / "wide", hidden=16))
    other = tiny.folder(tmp_path / "other", seed=1)
    path = other / "tokenizer.json"
    spelled = json.loads(path.read_text())
    added = spelled["added_tokens"]
    added[0]["content"], old = "<|other|>", added[0]["content"]
    spelled["model"]["vocab"]["<|other|>"] = spelled["model"]["vocab"].pop(old)
    path.write_text(json.dumps(spelled).replace(old, "<|other|>"))
    link = tmp_path / "link"
    link.symlink_to(models[0])
    for second, words in (
        (wide, "wide: head_dim is 4, and 8 in"),
        (str(other), "its tokenizer is not that of"),
        (str(link), "which are one model"),
    ):
        assert cli.main(["average", "--models", models[0], second, "--to", str(tmp_path / "to")]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert not (tmp_path / "to").exists()
    assert cli.main(["average", "--models", *models[:2], "--to", models[2]]) == 2
