"""Where a run goes besides its folder: its card, Weights & Biases, the Hugging Face hub (on loopback)."""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub_server
import huggingface_hub
import pytest
import runs
import tiny

from dpo_jax import cli
from dpo_jax.config import ConvertRun, DPORun, PPORun
from dpo_jax.errors import InputError
from dpo_jax.files.folder import FREE, RunFolder, as_json
from dpo_jax.files.log import read_metrics
from dpo_jax.files.wandb_log import WandbLog
from dpo_jax.report import card
from dpo_jax.train import publish, session
from dpo_jax.weights import hub_upload
from dpo_jax.weights.opened import RunCheckpoint, open_checkpoint


class FakeWandb:
    """What is used of wandb, kept."""

    def __init__(self, *, broken: bool = False):
        self.started: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.finished: list[int] = []
        self.broken = broken
        self.offline, self.url, self.dir = False, "https://wandb.test/run", "nowhere"

    def Settings(self, **given: Any) -> SimpleNamespace:
        return SimpleNamespace(**given)

    def init(self, **given: Any) -> "FakeWandb":
        self.started.append(given)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict[str, Any]) -> None:
        if self.broken:
            raise RuntimeError("the line is dead\nand more")
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None, origin="here")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    return fake


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not served here
    with hub_server.hub() as there:
        monkeypatch.setenv("HF_ENDPOINT", there.url)
        monkeypatch.setenv("HF_TOKEN", there.token)
        yield there


def command_of(text: str) -> str:
    """The command in a card, without the program's name."""
    (command,) = re.findall(r"^dpo-jax (dpo .+)$", text, re.MULTILINE)
    return command


@pytest.mark.slow
def test_a_run_is_published(
    tmp_path: Path,
    wandb: FakeWandb,
    hub: hub_server.Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DPO_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "make_mesh", runs.small_mesh)
    base = tiny.folder(tmp_path / "secret place" / "tiny", hidden=16, heads=2, kv_heads=1, layers=1)
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: zh\nbase_model: some/body\n---\n# Theirs\n")
    data = tiny.preferences(tmp_path / "secret place" / "pairs.jsonl", rows=12)
    words = ["dpo", "--model", str(base), "--data", str(data), "--holdout", "0.25", "--out", str(tmp_path / "ours")]
    words += ["--lora.rank", "2", "--lora.targets", "q_proj", "v_proj", "--train.steps", "3", "--data.shuffle", "false"]
    words += ["--train.batch_size", "2", "--data.buckets", "1", "--mesh.fsdp", "1", "--push_to_hub", "owner/model"]
    assert cli.main([*words, "--log.wandb", "tests", "--checkpoint.every", "2"]) == 0
    model = tmp_path / "ours" / "model"

    # The card: read by the hub's own library, and the command in it gives the same options.
    text = (model / "README.md").read_text()
    found = huggingface_hub.ModelCard(text).data
    assert (found.library_name, found.license, found.language, found.base_model) == (
        "transformers",
        "mit",
        "zh",
        "some/body",
    )
    assert found.tags == ["dpo_jax", "dpo"]
    assert (model / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "![training curves](training.png)" in text
    adapter = (tmp_path / "ours" / "adapter" / "README.md").read_text()
    assert "library_name: peft" in adapter
    assert command_of(adapter) == command_of(text)
    assert str(tmp_path) not in text
    assert "secret" not in text
    again = cli.parse("dpo", shlex.split(command_of(text))[1:])
    typed = as_json(cli.parse("dpo", words[1:]))
    told = {"model": "tiny", "out": "ours", "push_to_hub": None, "mesh": as_json(again)["mesh"]}
    assert as_json(again) == typed | told | {"data": typed["data"] | {"files": "pairs.jsonl"}}
    last = read_metrics(tmp_path / "ours" / "metrics.jsonl")[-1]
    assert f"| {last['eval_loss']:.4g} (step 3) |" in text
    assert len(re.findall(r"Fingerprint of the data: `[0-9a-f]{16}`", text)) == 1

    # Weights & Biases: every row of metrics.jsonl.
    (started,) = wandb.started
    assert (started["project"], started["name"], started["config"]["dpo.loss"]) == ("tests", "ours", "sigmoid")
    assert "secret" not in json.dumps(started["config"])
    assert started["settings"].x_disable_meta
    assert wandb.rows == read_metrics(tmp_path / "ours" / "metrics.jsonl")
    assert wandb.finished == [0]

    # The hub: all files of model/, in a private repository; again to a hub that is out of order, and nothing is lost.
    assert hub.repositories == {"owner/model": True}
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}
    assert "is now owner/model on the hub" in capsys.readouterr().err
    hub.broken = True
    assert cli.main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert "this run is finished" in said[0]
    assert re.match(r"dpo-jax: error: --push_to_hub owner/model: .*model could not be sent \(.*500", said[1])
    assert "the run is whole and stays here, and the same command again tries once more" in said[1]
    assert len(said) == 2
    assert hub.files == {path.name: path.read_bytes() for path in model.iterdir()}

    # A converted model brings its card along.
    assert (
        cli.main(["convert", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"])
        == 0
    )
    converted = (tmp_path / "half" / "README.md").read_text()
    assert converted.startswith(text)
    assert "dpo-jax convert --from ours --to half --dtype bfloat16" in converted
    assert (tmp_path / "half" / "training.png").is_file()
    assert str(tmp_path) not in converted


def test_what_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, hub: hub_server.Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["dpo", "--model", "m", "--data", "d", "--out", "o"]

    def refused(*words: str) -> str:
        assert cli.main([*given, *words]) == 2
        return capsys.readouterr().err

    assert "write OWNER/NAME" in refused("--push_to_hub", "model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refused("--push_to_hub", "owner/model")
    assert "does not take the token in HF_TOKEN" in said
    assert "hf_wrong" not in said
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN holds no token" in refused("--push_to_hub", "owner/model")
    assert hub.repositories == {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dpo_jax[wandb]'" in refused("--log.wandb", "p")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    assert "pip install 'dpo_jax[wandb]'" in refused("--log.wandb", "p")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert "the environment has no WANDB_API_KEY" in refused("--log.wandb", "p")


def test_a_token_with_a_line_end_works_and_is_told_nowhere(
    monkeypatch: pytest.MonkeyPatch, hub: hub_server.Hub
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{hub.token}\r\n")
    hub_upload.check("owner/model")
    for wrong in ("hf_geheim\nmore", "hf_geheim m", "hf_gehéim"):
        monkeypatch.setenv("HF_TOKEN", wrong)
        with pytest.raises(InputError, match="no token has") as raised:
            hub_upload.check("owner/model")
        assert "geh" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.role = "read"
    with pytest.raises(InputError, match="may only read"):
        hub_upload.check("owner/model")


@pytest.mark.parametrize("name", ["owner/a--b", "owner/x.git", f"owner/{'x' * 97}", "owné/r", "a/b/c", "model"])
def test_names_that_the_hub_refuses_are_refused_at_once(name: str) -> None:
    with pytest.raises(InputError, match="on the hub"):
        hub_upload.check(name)


def test_what_is_sent_is_the_model_and_takes_the_place_of_an_earlier_one(tmp_path: Path, hub: hub_server.Hub) -> None:
    sent = {"config.json": b"{}", "model-00001-of-00001.safetensors": b"new", "model.safetensors.index.json": b"{}"}
    sent |= {"README.md": b"---\ntags:\n- dpo_jax\n---\n"}
    for name, content in (sent | {".env": b"KEY", "optimizer.pt": b"0", "pairs.jsonl": b"{}", "x.py~": b""}).items():
        (tmp_path / name).write_bytes(content)
    hub.repositories["owner/model"] = False
    hub.files = {"model.safetensors": b"old", "adapter_config.json": b"{}", "notes.txt": b"theirs"}
    with pytest.raises(InputError, match="not of a model pushed from here"):
        hub_upload.check("owner/model")
    hub.files["README.md"] = sent["README.md"]
    hub_upload.check("owner/model")
    assert hub_upload.push("owner/model", tmp_path) is None
    assert hub.files == sent | {"notes.txt": b"theirs"}


def test_no_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(InputError, match="is not reached"):
        hub_upload.check("owner/model")
    assert "refused" in (hub_upload.push("owner/model", tmp_path) or "")


def test_what_goes_wrong_at_weights_and_biases_is_said_once(
    tmp_path: Path, wandb: FakeWandb, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.broken = True
    for _ in range(2):
        log = WandbLog(tmp_path, "p", {})
        log.add({"step": 1})
        log.add({"step": 2})
        log.close(failed=False)
    assert [record.message for record in caplog.records] == [
        "warning: Weights & Biases takes no more figures (the line is dead); metrics.jsonl has all of them"
    ] * 2
    assert len({started["id"] for started in wandb.started}) == 1, "a run that is gone on with goes on there"


def records(content: bytes) -> Iterator[bytes]:
    """Those of a .wandb file, which is laid out as a log of LevelDB behind seven bytes of its own: blocks of 32 KiB, in
    them pieces (checksum, length, and whether the piece is 1 whole, 2 the first, 3 one within, 4 the last)."""
    at, data = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield data
            data = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed: pip install wandb")
@pytest.mark.slow
def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.proto import wandb_internal_pb2  # type: ignore[import-not-found]

    monkeypatch.setenv("WANDB_MODE", "offline")
    log = WandbLog(tmp_path, "p", {"dpo.beta": 0.1})
    assert log.place is not None
    rows = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for row in rows:
        log.add(row)
    log.close(failed=False)
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in records(kept.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if items:
            found.append({"step": int(items["step"]), "loss": float(items["loss"])})
    assert found == rows


def test_a_card_tells_no_place_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert card.public("owner/name") == "owner/name"
    assert card.public(f"{tmp_path}/a.jsonl,~/b.jsonl,owner/set:train,../c") == "a.jsonl,b.jsonl,owner/set:train,c"
    assert card.public("tfds:/my files/prefs") == "tfds:prefs"
    assert card.public("/my files/pairs.jsonl") == "pairs.jsonl"
    assert card.public(f"{tmp_path}/reward.py:score") == "reward.py:score"
    assert card.public("https://user:word@example.org/score?key=1") == "URL"
    assert card.public("run:/bin/check --key 123") == "run:COMMAND"
    assert card.public(r"regex:\d+/\d+") == r"regex:\d+/\d+"
    run = cli.parse("ppo", ["--model", "m/n", "--data", "a/b", "--out", "/x/o", "--reward", "vader", "https://h/s"])
    assert isinstance(run, PPORun)
    line = card.command_line("ppo", as_json(run))
    assert line == "dpo-jax ppo --model m/n --data a/b --out o --reward vader URL"
    text = ["--model", "m/n", "--data", "a/b", "--data.kind", "text", "--data.separator", "</s>~~/", "--out", "o"]
    assert card.command_line("sft", as_json(cli.parse("sft", text))) == "dpo-jax sft " + shlex.join(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "folder").mkdir(parents=True)
    (tmp_path / "secret" / "a.jsonl").touch()
    told = "folder:train,a.jsonl:0.7,a.jsonl:train:0.3,owner/set:0.2"
    assert card.public("secret/folder:train,secret/a.jsonl:0.7,secret/a.jsonl:train:0.3,owner/set:0.2") == told
    assert [card.public(text) for text in ("~~~", "~~", "a" * 300)] == ["~~~", "~~", "a" * 300]


def test_every_option_that_names_a_place_is_known_as_one() -> None:
    words = ("sft", "dpo", "dpo --online", "reward", "ppo", "grpo", "distill", "rejection", "gatt", "convert")
    texts = {
        prefix + field.name
        for word in words
        for prefix, field in cli._walk(cli.COMMANDS[word].options)
        if "str" in str(field.type) and "Literal" not in str(field.type)
    }
    assert texts - card.PLACES - {name for name in texts if name.startswith(FREE)} == {
        *("data.columns", "data.template", "data.date", "data.separator", "lora.targets", "dpo.loss"),
        *("dpo.loss_weights", "sample.stop_strings", "reward.multi_class", "reward.multi_label", "gatt.languages"),
    }


def finished(folder: Path, base: Path) -> Path:
    """A run folder with what a card asks of it: two checkpoints by name, and the card of its end."""
    run = cli.parse("dpo", ["--model", str(base), "--data", "a/b", "--out", str(folder)])
    for part in ("model", "checkpoints/2", "checkpoints/4"):
        (folder / part).mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"command": "dpo", "finished": True, "given": as_json(run)}))
    (folder / "config.json").write_text(json.dumps(as_json(run)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in (1, 2, 3, 4)))
    (folder / "model" / "README.md").write_text("---\ntags: [dpo_jax]\n---\nof step 4\n")
    return folder


def test_a_converted_checkpoint_has_the_card_of_its_own_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.folder(tmp_path / "tiny", hidden=16, heads=2, kv_heads=1, layers=1)
    run = finished(tmp_path / "run", base)
    monkeypatch.setattr(RunCheckpoint, "adds_score", False)
    monkeypatch.setattr(RunCheckpoint, "beneath", open_checkpoint(base))
    place = RunCheckpoint(run / "checkpoints" / "2", str(run / "checkpoints" / "2"))
    files = card.of_conversion(place, ConvertRun(from_=place.name, to=str(tmp_path / "m.gguf"), format="gguf"))
    assert files.keys() == {"m.README.md", "m.training.png"}
    text = files["m.README.md"].decode()
    assert "after `dpo-jax dpo`, at step 2." in text
    assert "| loss | 1 (step 1) | 0.5 (step 2) |" in text
    assert "![training curves](m.training.png)" in text
    assert "llama-cli -m m.gguf\n" in text
    assert "transformers" not in text
    assert text.endswith("--format gguf\n```\n")

    # A model that only lies two folders below another's card is no checkpoint of it.
    (run / "checkpoints" / "2").rmdir()
    (run / "model" / "config.json").write_bytes((base / "config.json").read_bytes())
    shutil.copytree(base, run / "checkpoints" / "2")
    elsewhere = open_checkpoint(run / "checkpoints" / "2")
    (written,) = card.of_conversion(elsewhere, ConvertRun(from_=elsewhere.name, to=str(tmp_path / "h"))).values()
    assert "of step 4" not in written.decode()


def test_the_card_of_a_base_is_read_with_care(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.folder(tmp_path / "tiny", hidden=16, heads=2, kv_heads=1, layers=1)
    place, theirs = open_checkpoint(base), base / "README.md"
    theirs.write_text("---\nlicense: other\nlicense_link: LICENSE\nbase_model: /home/me/secret client/llama\n---\n")
    assert card.Basis.of(place).head == {"license": "other"}
    theirs.write_text("---\nlicense_link: https://x.org/l\nbase_model: a/b\n---\n")
    assert card.Basis.of(place).head == {"license_link": "https://x.org/l", "base_model": "a/b"}
    theirs.write_text("---\nlicense: [\n---\n")
    assert card.Basis.of(place).head == {}
    assert "the new card has nothing of it" in capsys.readouterr().err


def test_a_card_that_fails_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = cli.parse("dpo", ["--model", "m", "--data", "d", "--out", "o"])
    folder = RunFolder(tmp_path, "dpo", as_json(run))
    told = {"steps": "", "fingerprints": {}, "rows": [], "reward": False}
    monkeypatch.setattr(card, "of_run", lambda *_, **__: 1 / 0)
    start = open_checkpoint(tiny.folder(tmp_path / "tiny", hidden=16, heads=2, kv_heads=1, layers=1))
    assert publish.card_of(as_json(run), folder, start, adapter=False, **told) == {}
    assert "no model card could be written (ZeroDivisionError" in capsys.readouterr().err


def test_a_card_says_how_its_kind_of_model_is_used(tmp_path: Path) -> None:
    run = cli.parse("sft", ["--model", "a/b", "--data", "a.txt", "--data.kind", "text", "--out", "o"])
    told = {"steps": "", "fingerprints": {}, "rows": []}
    made = card.of_run("sft", as_json(run), as_json(run), card.Basis("a/b", {"base_model": "a/b"}), **told)
    text = made.text(picture=False)
    assert "apply_chat_template" not in text
    assert "follows the chat template" not in text
    adapter = huggingface_hub.ModelCard(dataclasses.replace(made, adapter=True).text(picture=False))
    assert (adapter.data.library_name, adapter.data.base_model) == ("peft", "a/b")
    assert "AutoPeftModelForCausalLM" in adapter.text


def test_a_card_of_a_reward_model_and_of_an_unknown_base(tmp_path: Path) -> None:
    place = open_checkpoint(tiny.folder(tmp_path / "tiny", hidden=16, heads=2, kv_heads=1, layers=1))
    run = DPORun(model=str(tmp_path / "tiny"), data="owner/set:train,other/set@main:test:0.3", out=str(tmp_path / "o"))  # pyright: ignore[reportArgumentType]
    rows = [{"step": 1, "loss": 1.0}]
    told = {"steps": "", "fingerprints": {}, "rows": rows}
    made = card.of_run("reward", as_json(run), as_json(run), card.Basis.of(place), **told, reward=True)
    files = made.files()
    assert files.keys() == {"README.md"}, "one step draws no curve"
    found = huggingface_hub.ModelCard(files["README.md"].decode())
    assert (found.data.pipeline_tag, found.data.license, found.data.datasets) == (
        "text-classification",
        "unknown",
        ["owner/set", "other/set"],
    )
    assert found.data.base_model is None
    assert "AutoModelForSequenceClassification" in found.text
    assert "Not known: no card lay beside the base." in found.text
