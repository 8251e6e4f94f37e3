"""The kills of `benchmarks/kill_campaign.py`: that each falls where it is told to, and a few of them on commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import killing

top = Path(sys.argv[2])

def work(folder):
    (folder / "a").mkdir()
    with open(folder / "a" / "x", "w") as file:
        file.write("abcdefgh")
        file.truncate(6)
        file.flush()
        os.fsync(file.fileno())
    (folder / "a" / "x").rename(folder / "y")
    (folder / "y").unlink()
    (folder / "b").mkdir()
    shutil.rmtree(folder / "b")
    (top / "elsewhere").write_text("not counted")
    return 0

def left(name, kill):
    folder = top / name
    folder.mkdir()
    watched, told = killing.Watched(folder, kill), top / "told"
    ended = killing.forked(lambda: killing.run_watched(lambda _: work(folder), [], watched, told))
    found = {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}
    return ended.code, found

kills = [(kind, when) for kind in killing.KINDS for when in (killing.BEFORE, killing.AFTER)] + [("write", killing.HALF)]
results = {f"{when} {kind}": left(f"{when} {kind}", killing.Kill(kind, 1, when)) for kind, when in kills}
results["whole"] = left("whole", None)
results["counts"] = json.loads((top / "told").read_text())["counts"]
print(json.dumps(results))
"""


def test_where_a_kill_falls(tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(ROOT / "tests" / "support"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    counts = found.pop("counts")
    assert {name: counts.get(name) for name in ("open", "write", "truncate", "fsync", "rename", "mkdir", "rmtree")} == {
        "open": 1, "write": 1, "truncate": 1, "fsync": 1, "rename": 1, "mkdir": 2, "rmtree": 1
    }  # fmt: skip
    assert found.pop("whole") == [0, {"a": None}]
    assert {code for code, _ in found.values()} == {-9}
    assert {name: files for name, (_, files) in found.items()} == {
        "before open": {"a": None},
        "after open": {"a": None, "a/x": ""},
        "before write": {"a": None, "a/x": ""},
        "half of write": {"a": None, "a/x": "abcd"},
        "after write": {"a": None, "a/x": ""},
        "before truncate": {"a": None, "a/x": ""},
        "after truncate": {"a": None, "a/x": "abcdef"},
        "before fsync": {"a": None, "a/x": "abcdef"},
        "after fsync": {"a": None, "a/x": "abcdef"},
        "before rename": {"a": None, "a/x": "abcdef"},
        "after rename": {"a": None, "y": "abcdef"},
        "before mkdir": {},
        "after mkdir": {"a": None},
        "before unlink": {"a": None, "y": "abcdef"},
        "after unlink": {"a": None},
        "before rmtree": {"a": None, "b": None},
        "after rmtree": {"a": None},
        "before rmdir": {"a": None, "b": None},
        "after rmdir": {"a": None},
    }


@pytest.mark.campaign
def test_a_small_campaign(tmp_path: Path) -> None:
    """Six kills over three commands; `--kills 100` is all of them."""
    out, script = tmp_path / "kills.json", ROOT / "benchmarks" / "kill_campaign.py"
    words = [sys.executable, str(script), "--only", "dpo", "generate", "convert", "--kills", "6", "--out", str(out)]
    done = subprocess.run(words, env=runs.one_device(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    assert [(one["command"], len(one["kills"]), one["differences"]) for one in told["commands"]] == [
        ("dpo", 2, []),
        ("generate", 2, []),
        ("convert", 2, []),
    ]
