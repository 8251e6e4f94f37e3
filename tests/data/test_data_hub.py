"""Data sets of the hub, by listings of real ones: which files are which split, and what is fetched. No network."""

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_jax.data.sources.files import read_rows
from dpo_jax.data.sources.splits import choose, data_files, default_config
from dpo_jax.errors import InputError


def configs(**data_files: Any) -> str:
    """The head of a README.md with these configurations."""
    listed = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in data_files.items()
    ]
    return f"---\nlicense: mit\nconfigs: {json.dumps(listed)}\n---\n# A data set\n"


ULTRACHAT = (
    "data/test_gen-00000-of-00001-3d4cd8309148a71f.parquet",
    "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet",
    "data/train_gen-00000-of-00003-a6c9fb894be3e50b.parquet",
    "data/train_gen-00001-of-00003-d6a0402e417f35ca.parquet",
    "data/train_gen-00002-of-00003-c0db75b92a2f48fd.parquet",
    "data/train_sft-00000-of-00003-a3ecf92756993583.parquet",
    "data/train_sft-00001-of-00003-0a1804bcb6ae68c6.parquet",
    "data/train_sft-00002-of-00003-ee46ed25cfae92c6.parquet",
)
HH_FOLDERS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
HH = (
    *(f"{folder}/{split}.jsonl.gz" for folder in HH_FOLDERS for split in ("test", "train")),
    "red-team-attempts/red_team_attempts.jsonl.gz",
)
SAFE_RLHF = tuple(
    f"data/{model}/{split}.jsonl" for model in ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B") for split in ("test", "train")
)
SAFE_RLHF_CONFIGS = configs(
    default={"train": "data/*/train.jsonl", "test": "data/*/test.jsonl"},
    **{
        name.lower(): {split: f"data/{name}/{split}.jsonl" for split in ("train", "test")}
        for name in ("Alpaca-7B", "Alpaca2-7B", "Alpaca3-8B")
    },
)
HELPSTEER2 = (
    "disagreements/disagreements.jsonl.gz",
    "preference/preference.jsonl.gz",
    "train.jsonl.gz",
    "validation.jsonl.gz",
)
HELPSTEER3 = tuple(
    f"{config}/{split}.jsonl.gz" for config in ("edit", "feedback", "preference") for split in ("train", "validation")
)
SHP = tuple(
    f"reddit/{name}/{split}.json" for name in ("askacademia", "askbaking") for split in ("test", "train", "validation")
)
ULTRAFEEDBACK = tuple(f"{name}.jsonl" for name in ("evol_instruct", "false_qa", "flan", "truthful_qa", "ultrachat"))
CONVERTED = tuple(
    f"{config}/{split}/{shard}.parquet"
    for config in ("main", "socratic")
    for split in ("test", "train")
    for shard in ("0000", "0001")
)
NO_ROBOTS = tuple(f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "train_sft"))
GSM8K = tuple(
    f"{config}/{split}-00000-of-00001.parquet" for config in ("main", "socratic") for split in ("test", "train")
)
GSM8K_CONFIGS = configs(**{c: {s: f"{c}/{s}-*" for s in ("train", "test")} for c in ("main", "socratic")})

LISTINGS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "HuggingFaceH4/ultrachat_200k": (
        ULTRACHAT,
        configs(default={s: f"data/{s}-*" for s in ("train_sft", "test_sft", "train_gen", "test_gen")}),
    ),
    "mirror/ultrachat_200k": (ULTRACHAT, None),
    "HuggingFaceH4/no_robots": (NO_ROBOTS, None),
    "Anthropic/hh-rlhf": (HH, "---\nlicense: mit\n---\n"),
    "PKU-Alignment/PKU-SafeRLHF": (SAFE_RLHF, SAFE_RLHF_CONFIGS),
    "nvidia/HelpSteer2": (HELPSTEER2, None),
    "nvidia/HelpSteer3": (
        HELPSTEER3,
        configs(**{c: {s: f"{c}/{s}.jsonl.gz" for s in ("train", "validation")} for c in ("preference", "edit")}),
    ),
    "stanfordnlp/SHP": (SHP, None),
    "openbmb/UltraFeedback": (ULTRAFEEDBACK, None),
    "openai/gsm8k": (GSM8K, GSM8K_CONFIGS),
    "openai/converted": (CONVERTED, None),
    "tatsu-lab/alpaca": (("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "dataset_infos.json"), None),
    "databricks/databricks-dolly-15k": (("databricks-dolly-15k.jsonl",), None),
    "openai/webgpt_comparisons": (("comparisons.jsonl", "webgpt_comparisons.py"), None),
    "owner/scripted": (("scripted.py", "rows.zip"), None),
    "owner/dev": (("dev.json", "train.csv"), None),
}  # fmt: skip


class Hub:
    """In place of `huggingface_hub`: lists and makes files; `fetched` are those that were asked for."""

    def __init__(self, folder: Path):
        self.folder, self.fetched, self.revisions = folder, [], set()

    def files(self, repository: str) -> list[str]:
        paths, readme = LISTINGS[repository]
        return [".gitattributes", *paths, *(["README.md"] if readme else [])]

    def list_repo_files(self, repository: str, *, repo_type: str, revision: str | None) -> list[str]:
        assert repo_type == "dataset"
        self.revisions.add(revision)
        return self.files(repository)

    def hf_hub_download(self, repository: str, name: str, *, repo_type: str, revision: str | None) -> str:
        assert name == "README.md"
        self.revisions.add(revision)
        return self.made(repository, name, (LISTINGS[repository][1] or "").encode())

    def snapshot_download(
        self, repository: str, *, allow_patterns: list[str], repo_type: str, revision: str | None
    ) -> str:
        self.revisions.add(revision)
        names = [n for n in self.files(repository) if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
        for name in names:
            self.made(repository, name, json.dumps({"from": name}).encode())
        self.fetched += names
        return str(self.folder / repository)

    def made(self, repository: str, name: str, data: bytes) -> str:
        path = self.folder / repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
    return fake


def names(source: str) -> list[str]:
    return [row["from"] for _, row in read_rows(source)]


@pytest.mark.parametrize(
    ("source", "files"),
    [
        ("HuggingFaceH4/ultrachat_200k:train_sft", ULTRACHAT[5:]),
        ("HuggingFaceH4/ultrachat_200k:default/train_gen", ULTRACHAT[2:5]),
        ("mirror/ultrachat_200k:train_sft", ULTRACHAT[5:]),
        ("mirror/ultrachat_200k:data/train_sft", ULTRACHAT[5:]),
        ("HuggingFaceH4/no_robots:train", NO_ROBOTS[1:2]),
        ("Anthropic/hh-rlhf:helpful-base/train", HH[3:4]),
        ("Anthropic/hh-rlhf:train", HH[1:8:2]),
        ("Anthropic/hh-rlhf:red-team-attempts/red_team_attempts", HH[8:]),
        ("PKU-Alignment/PKU-SafeRLHF:train", SAFE_RLHF[1::2]),
        ("PKU-Alignment/PKU-SafeRLHF:alpaca-7b/test", SAFE_RLHF[:1]),
        ("nvidia/HelpSteer2:train", HELPSTEER2[2:3]),
        ("nvidia/HelpSteer2:dev", HELPSTEER2[3:]),
        ("nvidia/HelpSteer2:preference/preference", HELPSTEER2[1:2]),
        ("nvidia/HelpSteer3:preference/val", HELPSTEER3[5:]),
        ("stanfordnlp/SHP:reddit/askbaking/train", SHP[4:5]),
        ("stanfordnlp/SHP:train", (SHP[1], SHP[4])),
        ("openbmb/UltraFeedback", ULTRAFEEDBACK),
        ("openbmb/UltraFeedback:flan", ULTRAFEEDBACK[2:3]),
        ("openai/gsm8k@e53f048856ff4f594e959d75785d2c2d37b678ee:main/train", GSM8K[1:2]),
        ("openai/converted@refs/convert/parquet:socratic/train", CONVERTED[6:]),
        ("tatsu-lab/alpaca", ("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",)),
        ("databricks/databricks-dolly-15k", ("databricks-dolly-15k.jsonl",)),
        ("openai/webgpt_comparisons", ("comparisons.jsonl",)),
        ("owner/dev:validation", ("dev.json",)),
        ("owner/dev:eval", ()),
    ],
)
def test_real_listings(hub: Hub, source: str, files: tuple[str, ...]) -> None:
    """The files of the split that was asked for, in order; nothing else is fetched."""
    if not files:
        with pytest.raises(InputError, match="no split 'eval'; there are dev train"):
            names(source)
        assert hub.fetched == []
        return
    assert names(source) == list(files)
    assert sorted(hub.fetched) == sorted(files)
    _, _, revision = source.partition(":")[0].partition("@")
    assert hub.revisions == {revision or None}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("HuggingFaceH4/ultrachat_200k", "has several splits .*test_sft.* name one, e.g. .*ultrachat_200k:"),
        ("mirror/ultrachat_200k:train", "several splits .train_gen train_sft."),
        ("Anthropic/hh-rlhf", "several splits .test train."),
        ("openai/gsm8k", "several configurations .main/test main/train socratic/test"),
        ("openai/gsm8k:main", "several splits .main/test main/train."),
        ("openai/gsm8k:validation", "no split 'validation'; there are main/test"),
        ("owner/scripted", "no JSON, JSONL, Parquet or CSV files .it has rows.zip scripted.py.*@refs/convert/parquet"),
    ],
)
def test_what_is_not_one_split_is_refused_before_anything_is_fetched(hub: Hub, source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        names(source)
    assert hub.fetched == []


def test_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched before will do where its names say that it is whole."""
    names("mirror/ultrachat_200k:train_sft")
    names("openbmb/UltraFeedback:flan")

    def offline(*_: object, **__: object) -> list[str]:
        raise ConnectionError("no route to host\nmore")

    def kept(repository: str, *, local_files_only: bool = False, **_: object) -> str:
        folder = hub.folder / repository
        if not local_files_only or not folder.is_dir():
            raise FileNotFoundError("not kept")
        return str(folder)

    monkeypatch.setattr(hub, "list_repo_files", offline)
    monkeypatch.setattr("huggingface_hub.snapshot_download", kept)
    assert names("mirror/ultrachat_200k:train_sft") == list(ULTRACHAT[5:])
    assert names("openbmb/UltraFeedback:flan") == ["flan.jsonl"]
    (hub.folder / "mirror/ultrachat_200k" / ULTRACHAT[6]).unlink()
    for source in ("mirror/ultrachat_200k:train_sft", "owner/dev"):
        with pytest.raises(InputError, match=r"cannot be fetched .no route to host.*; check the name and the network"):
            names(source)


def test_heads_of_readme() -> None:
    """`data_files` in all its forms, `data_dir`, a default that is marked."""
    paths = ["a/train.csv", "a/x/test.csv", "b/one.json", "b/two.json"]

    def chosen(metadata: dict[str, Any], wanted: str | None) -> list[str]:
        files = data_files(paths, metadata)
        return choose(files, wanted, default_config(files, metadata), "owner/name")

    assert chosen({"configs": [{"config_name": "b", "data_files": "b/*.json"}]}, None) == paths[2:]
    assert chosen({"configs": [{"data_files": ["b/two.json", "b/one.json"]}]}, "train") == [paths[3], paths[2]]
    assert chosen({"configs": [{"data_files": {"dev": "a/**/*.csv"}}]}, "validation") == [paths[0], paths[1]]
    assert chosen({"configs": [{"data_dir": "a"}]}, "test") == paths[1:2]
    several = [{"config_name": "a", "data_dir": "a"}, {"config_name": "b", "data_dir": "b", "default": True}]
    assert chosen({"configs": several}, None) == paths[2:]
    assert chosen({"configs": several}, "a/train") == paths[:1]
    assert chosen({"configs": [{"data_files": [{"split": "x", "path": ["b/{one,two}.js?n"]}]}]}, "x") == paths[2:]
    assert chosen({"configs": [{"data_files": [{"split": "x", "path": "b/[!o]*"}]}]}, "x") == paths[3:]
    with pytest.raises(InputError, match=r"README.md: `data_files` names 3"):
        data_files(paths, {"configs": [{"data_files": [{"split": "x", "path": 3}]}]})


def test_a_head_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nconfigs: [a: {\n---\n")
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"README.md: its YAML head cannot be read"):
        names(str(tmp_path))
