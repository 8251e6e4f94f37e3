"""The floors of the house: who may import whom, and who may name what. Read from the source text, not by importing."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "dpo_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Floor of each room (a folder) or file of the top level. A room imports from lower floors and from itself.
FLOORS = {
    "types": 0,
    "masked": 0,
    "errors": 0,
    "headers": 0,
    "voice": 0,
    "overlap": 0,
    "mesh": 1,
    "config": 1,
    "moments": 1,
    "state": 1,
    "model": 2,
    "sample": 3,
    "weights": 3,
    "data": 3,
    "align": 4,
    "processes": 5,
    "files": 6,
    "report": 7,
    "complete": 8,
    "judge": 9,
    "train": 10,
    "plan": 11,
    "commands": 12,
    "cli": 13,
    "__main__": 14,
}

# Floors inside a room that has rooms of its own, lowest first; "." stands for files of the room itself, if it has any.
INNER = {
    "config": (".", "training", "commands", "recipes", "command_line"),
    "data": ("rows", "sources", "tokens", "sets"),
    "complete": ("writing", "asking", "serving"),
    "weights": ("integrity", "tokenizers", "huggingface", "gguf", "orbax", "."),
    "judge": ("figures", ".", "asked", "rewards"),
}
HOUSE = {"processes", "files", "report", "complete", "judge", "train", "plan", "commands"}

# Third-party packages that only some rooms may import. A package that is not listed is in nobody's house.
OWNERS = {
    "jax": {
        "types",
        "masked",
        "overlap",
        "mesh",
        "moments",
        "state",
        "model",
        "sample",
        "weights",
        "data",
        "align",
        *HOUSE,
    },
    "numpy": {"types", "masked", "mesh", "model", "sample", "weights", "data", *HOUSE},
    "flax": {"types", "state", "model", "weights", "align", "complete", "judge", "train", "plan", "commands"},
    "optax": {"moments", "state", "align", "plan"},
    "chex": {"masked", "model", "align", "sample", "data"},
    "ml_dtypes": {"weights"},
    "safetensors": {"weights"},
    "gguf": {"weights"},
    "orbax": {"weights"},
    "tokenizers": {"weights", "data"},
    "transformers": {"weights", "data", *HOUSE},
    "sentencepiece": {"weights"},
    "huggingface_hub": {"weights", "data"},
    "starlette": {"complete"},
    "uvicorn": {"commands"},
    "jinja2": {"data", "weights"},
    "pyarrow": {"data"},
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "array_record": {"data"},
    "etils": {"data", "weights"},
    "google": {"data"},
    "py3langid": {"data"},
    "rich": {"files", "report", "judge", "plan", "commands"},
    "tensorboardX": {"files", "report"},
    "matplotlib": {"report"},
    "sklearn": {"report"},
    "math_verify": {"judge"},
    "jsonschema": {"judge"},
    "referencing": {"judge"},
    "vaderSentiment": {"judge"},
    "httpx": {"complete", "judge"},
    "yaml": {"config", "report", "complete"},
    "wandb": {"files"},
}


def room_of(path: Path) -> str:
    """The room (folder) or top-level file that `path` belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            assert node.module is not None
            # `from dpo_jax import mesh` imports a room, `from dpo_jax.mesh import make_mesh` something of it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    """Rooms of this package that the file imports from."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("dpo_jax.")}
    return names - {"__version__"}


def identifiers(path: Path) -> set[str]:
    """Every name and attribute that the file mentions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def calls(path: Path) -> set[str]:
    """Last part of the name of everything that the file calls."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
    return found


def short(path: Path) -> str:
    """Name of a file for the test report."""
    return path.relative_to(PACKAGE).as_posix()


# The package's own __init__ only names what others hold, lazily.
INSIDE = [path for path in FILES if path != PACKAGE / "__init__.py"]


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in INSIDE} <= FLOORS.keys()


@pytest.mark.parametrize("path", INSIDE, ids=short)
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    for other in rooms_imported(path) - {room}:
        assert other in FLOORS, f"{short(path)} imports dpo_jax.{other}, which is no room"
        lower = FLOORS[other] < FLOORS[room]
        # The files of floors 0 and 1 are small and few: within such a floor they may know each other, without a circle.
        beside = FLOORS[other] == FLOORS[room] <= 1
        assert lower or beside, f"{short(path)} (floor {FLOORS[room]}) imports {other} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", [path for path in INSIDE if room_of(path) in INNER], ids=short)
def test_imports_go_down_inside_a_room(path: Path) -> None:
    room, *inner = path.relative_to(PACKAGE).parts
    floors = INNER[room]
    if inner == ["__init__.py"]:
        return
    own = inner[0] if len(inner) > 1 else "."
    assert own in floors, f"{short(path)}: belongs into one of {floors}"
    for name in imports(path):
        if name.startswith(f"dpo_jax.{room}."):
            other = name.split(".")[2] if name.split(".")[2] in floors else "."
            assert floors.index(other) <= floors.index(own), f"{short(path)} imports {name}, which is above it"


def test_the_low_floors_have_no_circle() -> None:
    low = {room_of(p): rooms_imported(p) for p in INSIDE if FLOORS[room_of(p)] <= 1}
    done: set[str] = set()
    while low.keys() - done:
        ready = {room for room in low.keys() - done if low[room] - {room} <= done}
        assert ready, f"circular imports among {sorted(low.keys() - done)}"
        done |= ready


@pytest.mark.parametrize("path", INSIDE, ids=short)
def test_libraries_stay_with_their_owners(path: Path) -> None:
    for name in {name.split(".")[0] for name in imports(path)} - {"dpo_jax"} - set(sys.stdlib_module_names):
        assert name in OWNERS, f"{short(path)} imports {name}, which no room owns"
        assert room_of(path) in OWNERS[name], f"{short(path)} imports {name}; only {sorted(OWNERS[name])} may"


@pytest.mark.parametrize("path", INSIDE, ids=short)
def test_only_the_model_knows_linen(path: Path) -> None:
    if room_of(path) != "model":
        assert not any(name.startswith("flax.linen") for name in imports(path)), short(path)


@pytest.mark.parametrize("path", INSIDE, ids=short)
def test_only_mesh_names_mesh_axes(path: Path) -> None:
    if room_of(path) == "mesh":
        return
    made = calls(path) & {"PartitionSpec", "P", "NamedSharding", "Mesh", "AbstractMesh"}
    assert not made, f"{short(path)} makes {sorted(made)}; ask mesh.py for a sharding by logical axes"
    words = {
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
    }
    if short(path) == "config/sections.py":
        words -= {"tensor"}  # a value of --sample.layout
    assert not words, f"{short(path)} names the mesh axes {sorted(words)}"


@pytest.mark.parametrize("path", INSIDE, ids=short)
def test_only_the_command_line_reads_arguments(path: Path) -> None:
    if room_of(path) != "cli":
        assert "argv" not in identifiers(path), short(path)
        assert "argparse" not in set(imports(path)), short(path)


@pytest.mark.parametrize("path", [p for p in INSIDE if room_of(p) in ("align", "model", "types", "masked")], ids=short)
def test_algorithms_see_no_files_clocks_or_loggers(path: Path) -> None:
    modules = {name.split(".")[0] for name in imports(path)}
    if path.name == "attention.py":  # says once which kernel runs
        modules -= {"logging"}
    assert not modules & {"os", "io", "pathlib", "shutil", "time", "random", "logging", "sys"}, short(path)
    assert not calls(path) & {"open", "print", "save", "load", "savez"}, short(path)


@pytest.mark.parametrize("path", INSIDE, ids=short)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, f"{short(path)} answers more than one question"


@pytest.mark.parametrize("path", FILES, ids=short)
def test_no_exception_is_swallowed(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            named = "" if node.type is None else ast.unparse(node.type)
            broad = named in ("", "Exception", "BaseException")
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            where = f"{short(path)}:{node.lineno}"
            says_why = "  # " in lines[node.lineno - 1]
            assert not broad or raises or says_why, f"{where} catches everything, goes on, and does not say why"
            only_pass = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not only_pass, f"{where} drops {named}; use contextlib.suppress, or mend it"
