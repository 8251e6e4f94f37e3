"""The launch scripts: they parse, their dry runs print commands that dpo-jax understands, bad options are one line."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from dpo_jax import cli

LAUNCH = Path(__file__).resolve().parents[2] / "configs" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
COMMAND = ["dpo", "--model", "/mnt/a model", "--data", "/mnt/pairs.jsonl", "--out", "/mnt/run"]
GCLOUD = ("--name", "n", "--zone", "z")
CLUSTER = ("--cluster", "c", "--zone", "z")
JOBSET = ("--image", "registry/dpo_jax:1", "--claim", "shared")
SCHEMAS = Path(__file__).resolve().parents[1] / "support" / "schemas"


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", str(LAUNCH / script), *words], capture_output=True, text=True, check=False)


def dry(script: str, *words: str) -> list[list[str]]:
    """The words of each command that the script would run."""
    done = run(script, *words)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]


def options_of(words: list[str]) -> cli.Any:
    """What dpo-jax makes of the words from `dpo` on."""
    start = words.index("dpo")
    return cli.parse("dpo", words[start + 1 : words.index("--distributed.auto") + 1])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(path)], check=False).returncode == 0
    usage = run(path.name, "--help").stdout
    source = path.read_text()
    for line in usage.splitlines():
        if line.startswith("  --"):
            assert f"    {line.split()[0]})" in source, f"an option that is not read: {line}"


def test_the_command_arrives_as_typed() -> None:
    _, slurm = dry("slurm.sh", "--nodes", "2", "--dry_run", "--", *COMMAND)
    tpu = shlex.split(dry("tpu_vm.sh", "run", *GCLOUD, "--dry_run", "--", *COMMAND)[0][-1].removeprefix("--command="))
    (xpk,) = dry("gke_xpk.sh", "run", *CLUSTER, "--dry_run", "--", *COMMAND)
    inside = shlex.split(next(word for word in xpk if word.startswith("--command=")).removeprefix("--command="))
    for words in (slurm, tpu, inside):
        options = options_of(words)
        assert (options.model, options.out, options.distributed.auto) == ("/mnt/a model", "/mnt/run", True)


def valid(raw: str, schema: str) -> cli.Any:
    """What a YAML file says, checked against a kept schema."""
    found = yaml.safe_load(raw)
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / schema).read_text())).validate(found)
    return found


def test_a_jobset_is_one() -> None:
    """Its schema, one pod a host, the command as typed, and which exit codes start it again."""
    words = ["dpo", "--model", '/a "b" $(c)\\', *COMMAND[3:]]
    options = (*JOBSET, "--slices", "2", "--topology", "4x8", "--restarts", "5")
    found = valid(run("jobset.sh", "run", *options, "--dry_run", "--", *words).stdout, "jobset.json")
    (job,) = found["spec"]["replicatedJobs"]
    inside = job["template"]["spec"]
    assert (job["replicas"], inside["parallelism"], inside["completions"]) == (2, 8, 8)
    (container,) = inside["template"]["spec"]["containers"]
    assert container["command"] == ["dpo-jax", *(w.replace("$", "$$") for w in words), "--distributed.auto"]
    assert options_of(container["command"]).out == "/mnt/run"
    failure = found["spec"]["failurePolicy"]
    assert (failure["maxRestarts"], [rule["action"] for rule in failure["rules"]]) == (5, ["FailJobSet"])
    assert failure["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]  # 1 and 2 only: not 75, not 143
    assert [rule["onExitCodes"]["values"] for rule in inside["podFailurePolicy"]["rules"]] == [[1, 2]]


def test_a_manifest_that_is_none_is_refused() -> None:
    raw = run("jobset.sh", "run", *JOBSET, "--dry_run", "--", *COMMAND).stdout
    for right, wrong in (
        ("restartPolicy: Never", "restartPolicy: 1"),
        ("maxRestarts", "maxRestart"),
        ("values", "value"),
    ):
        assert right in raw
        with pytest.raises(jsonschema.ValidationError):
            valid(raw.replace(right, wrong), "jobset.json")


def test_a_skypilot_task_is_one() -> None:
    raw = (LAUNCH / "skypilot.yaml").read_text()
    found = valid(raw, "skypilot.json")
    assert found["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 143]
    words = [*found["envs"]["COMMAND"].split(), "--model", "m", "--data", "d", "--out", "o"]
    assert cli.parse(words[0], words[1:]).mesh.data == found["num_nodes"]
    assert subprocess.run(["bash", "-n"], input=found["run"] + found["setup"], text=True, check=False).returncode == 0
    with pytest.raises(jsonschema.ValidationError):
        valid(raw.replace("recover_on_exit_codes", "recover_on_codes"), "skypilot.json")


def test_options_arrive() -> None:
    submit, start = dry("slurm.sh", "--nodes", "4", "--gpus", "2", "--partition", "p", "--dry_run", "--", *COMMAND)
    assert {"--nodes=4", "--ntasks-per-node=2", "--partition=p", "--requeue"} <= set(submit)
    assert start[0] == "srun"
    (create,) = dry("tpu_vm.sh", "create", *GCLOUD, "--slices", "2", "--spot", "--dry_run")
    assert {"--node-count=2", "--node-prefix=n", "--spot", "--zone=z"} <= set(create)
    (create,) = dry("gke_xpk.sh", "create", *CLUSTER, "--tpu", "v5p-128", "--dry_run")
    assert {"--tpu-type=v5p-128", "--num-slices=1"} <= set(create)
    for action, end in (("stop", "kill -TERM"), ("status", "--format"), ("delete", "--force"), ("install", "uv")):
        assert any(end in word for words in dry("tpu_vm.sh", action, *GCLOUD, "--dry_run") for word in words)
    assert dry("gke_xpk.sh", "stop", *CLUSTER, "--dry_run")[0][:3] == ["xpk", "workload", "delete"]
    assert dry("jobset.sh", "stop", "--name", "n", "--dry_run") == [["kubectl", "delete", "jobset", "n"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("slurm.sh", "--dry_run", "--", "dpo"), "no --out"),
        (("slurm.sh", "--node", "2", "--", "dpo", "--out", "x"), "unknown option --node"),
        (("tpu_vm.sh", "stop", *GCLOUD, "--spot"), "belong to create"),
        (("tpu_vm.sh", "run", *GCLOUD), "after --"),
        (("gke_xpk.sh", "delete", *CLUSTER, "--restarts", "3"), "belongs to run"),
        (("jobset.sh", "run", *JOBSET), "after --"),
        (("jobset.sh", "run", *JOBSET, "--chips", "3", "--", *COMMAND), "has 16 chips"),
        (("jobset.sh", "run", *JOBSET, "--topology", "4", "--", *COMMAND), "write it as 4x4"),
        (("jobset.sh", "stop", "--slices", "2"), "belongs to run"),
        (("gke_xpk.sh", "run", "--zone", "z", "--", "dpo"), "--cluster is missing"),
    ],
)
def test_bad_options_are_one_line(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
