"""Following a value through the source text of a package, for `calls.py`."""

import ast
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Value = frozenset[str]
"""Where in an object the followed value is: "" it is the object, ".a.b" it stands in field b of field a."""
NOTHING: Value = frozenset()
ITSELF: Value = frozenset([""])
COMMON = {name for kind in (Path, str, dict, list, set, io.FileIO) for name in dir(kind)}
"""Methods of Python's own types: on an unknown receiver, `open` is more likely `Path.open` than a class's here."""
COPIES = ("str", "Path", "replace", "copy", "deepcopy", "fspath", "expanduser", "absolute", "resolve", "asdict")


@dataclass
class Journey:
    """The calls that were met, each once, in order."""

    steps: dict[tuple[str, int, str], str] = field(default_factory=dict)
    """(caller, line, called) -> file of what is called."""

    def add(self, caller: str, line: int, called: str, file: str) -> None:
        """A call."""
        self.steps.setdefault((caller, line, called), file)

    def __str__(self) -> str:
        files, returns, last, seen = list(self.steps.values()), 0, "", set()
        for file in files:
            returns += file != last and file in seen
            seen.add(file)
            last = file
        functions = len({called for _, _, called in self.steps})
        return f"{len(files)} calls, {functions} functions, {len(seen)} files, {returns} returns to a file left before"

    def listed(self) -> str:
        """A line a call."""
        return "\n".join(f"  {caller}:{line} -> {called}" for caller, line, called in self.steps)


# ---------------------------------------------------------------- the package, from its text


@dataclass
class Function:
    """A function or method of the package."""

    file: str
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: "Class | None" = None

    @property
    def label(self) -> str:
        """FILE:NAME."""
        return f"{self.file}:{self.name}"

    def decorated(self, word: str) -> bool:
        """Whether a decorator ends on the word."""
        return any(ast.unparse(d).rpartition(".")[2].partition("(")[0] == word for d in self.node.decorator_list)

    @property
    def parameters(self) -> list[str]:
        """Those that may be given by position, in order."""
        return [a.arg for a in (*self.node.args.posonlyargs, *self.node.args.args)]

    @property
    def keywords(self) -> set[str]:
        """All that may be given by name."""
        return {*self.parameters, *(a.arg for a in self.node.args.kwonlyargs)}


@dataclass
class Class:
    """A class of the package: its methods, and its fields in order."""

    name: str
    methods: dict[str, Function] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)


class Package:
    """Functions, classes and imports of every file, by module."""

    def __init__(self, folder: Path):
        self.root = folder.resolve().parent
        self.modules: dict[str, dict[str, Any]] = {}
        self.files: dict[str, str] = {}
        self.methods: dict[str, list[Function]] = {}
        for path in sorted(folder.resolve().rglob("*.py")):
            file = path.relative_to(self.root).as_posix()
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            self.files[file] = module
            self.modules[module] = self._read(file, ast.parse(path.read_text(encoding="utf-8")))

    def _read(self, file: str, tree: ast.Module) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {(a.asname or a.name).partition(".")[0]: ("module", a.name) for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names |= {a.asname or a.name: ("from", node.module, a.name) for a in node.names}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names[node.name] = Function(file, node.name, node)
            elif isinstance(node, ast.ClassDef):
                names[node.name] = owner = Class(node.name)
                for part in node.body:
                    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                        method = Function(file, f"{node.name}.{part.name}", part, owner)
                        owner.methods[part.name] = method
                        self.methods.setdefault(part.name, []).append(method)
                    elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        owner.fields.append(part.target.id)
        return names

    def find(self, module: str, name: str) -> Any:
        """What a name means in a module: a `Function`, a `Class`, the name of a module, or None."""
        found = self.modules.get(module, {}).get(name)
        if isinstance(found, tuple):
            if found[0] == "module":
                return found[1] if found[1] in self.modules else None
            inner = f"{found[1]}.{found[2]}"
            return inner if inner in self.modules else self.find(found[1], found[2])
        return found

    def only_method(self, name: str) -> Function | None:
        """The method of this name, where one class alone has it."""
        found = self.methods.get(name, [])
        return found[0] if len(found) == 1 and name not in COMMON else None


# ---------------------------------------------------------------- following it through the text


class Follower:
    """Follows the value through functions; each function once for each way in which its parameters hold it."""

    def __init__(self, package: Package):
        self.package, self.journey = package, Journey()
        self._returns: dict[Any, Value] = {}

    def enter(self, function: Function, given: dict[str, Value]) -> Value:
        """What a call returns of the value; its inner calls are counted. (In a recursion: nothing new.)"""
        given = {name: value for name, value in given.items() if value}
        key = (function.label, frozenset(given.items()))
        if given and key not in self._returns:
            self._returns[key] = NOTHING
            self._returns[key] = Body(self, function, dict(given)).run()
        return self._returns.get(key, NOTHING)


class Body:
    """One function being read with what its names hold. Inner functions share its names."""

    def __init__(self, follower: Follower, function: Function, names: dict[str, Value]):
        self.follower, self.function, self.names = follower, function, names
        self.module = follower.package.files[function.file]
        self.result = NOTHING

    def run(self) -> Value:
        """Read it twice, since a name may be used above the line that gives it the value; what it returns."""
        for _ in range(2):
            for statement in self.function.node.body:
                self.statement(statement)
        return self.names.get("self", NOTHING) if self.function.name.endswith(".__init__") else self.result

    def statement(self, node: ast.AST) -> None:
        """Read a statement, and those inside it."""
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            value = self.value(node.value)
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                self.assign(target, value)
        elif isinstance(node, ast.Return) and node.value is not None:
            self.result |= self.value(node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self.assign(node.target, self.value(node.iter))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
            else:
                self.statement(child)

    def assign(self, target: ast.expr, value: Value) -> None:
        """Give a name, or a field of one, what it holds from now on, beside what it held."""
        if isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self.assign(part, value)
        elif isinstance(target, ast.Name) and value:
            self.names[target.id] = self.names.get(target.id, NOTHING) | value
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and value:
            held = frozenset(f".{target.attr}{place}" for place in value)
            self.names[target.value.id] = self.names.get(target.value.id, NOTHING) | held

    def value(self, node: ast.expr) -> Value:
        """Where an expression holds the value."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, NOTHING)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Dict):
            pairs = [(k, self.value(v)) for k, v in zip(node.keys, node.values, strict=True)]
            held = [f".[{k.value}]{p}" for k, v in pairs if isinstance(k, ast.Constant) for p in v]
            return frozenset(held).union(*(v for k, v in pairs if k is None))
        if isinstance(node, ast.NamedExpr):
            self.assign(node.target, found := self.value(node.value))
            return found
        if isinstance(node, ast.Compare | ast.JoinedStr | ast.FormattedValue):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.value(child)
            return NOTHING
        if isinstance(node, ast.Lambda):
            return self.value(node.body) & NOTHING
        found = NOTHING
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.comprehension):
                self.statement(child)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                found |= self.value(child)
        return NOTHING if isinstance(node, ast.UnaryOp | ast.Subscript | ast.BinOp) and "" in found else found

    def attribute(self, node: ast.Attribute) -> Value:
        """A field, or a property, which is a call."""
        held = self.value(node.value)
        method = self.method(node) if held else None
        if method is not None and (method.decorated("property") or method.decorated("cached_property")):
            if "" in held:
                self.count(node, method)
            return self.follower.enter(method, {"self": held})
        return frozenset(
            "" if not place else place.removeprefix(f".{node.attr}")
            for place in held
            if not place or place == f".{node.attr}" or place.startswith(f".{node.attr}.")
        )

    def method(self, node: ast.Attribute) -> Function | None:
        """The method that an attribute names."""
        own = self.function.owner
        if own is not None and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            return own.methods.get(node.attr) or self.follower.package.only_method(node.attr)
        return self.follower.package.only_method(node.attr)

    def target(self, node: ast.expr) -> Any:
        """The `Function` or `Class` that is called."""
        package = self.follower.package
        if isinstance(node, ast.Name):
            return self.function.owner if node.id == "cls" else package.find(self.module, node.id)
        if not isinstance(node, ast.Attribute):
            return None
        inside = self.target(node.value) if isinstance(node.value, ast.Name | ast.Attribute) else None
        if isinstance(inside, str):
            return package.find(inside, node.attr)
        return inside.methods.get(node.attr) if isinstance(inside, Class) else self.method(node)

    def call(self, node: ast.Call) -> Value:
        """Count the call if it is given the value, follow it, and say what comes back."""
        positional = [self.value(a) for a in node.args]
        named = {k.arg: self.value(k.value) for k in node.keywords if k.arg is not None}
        for keyword in node.keywords:
            for place in self.value(keyword.value) if keyword.arg is None else ():
                if place.startswith(".["):
                    key, _, rest = place[2:].partition("]")
                    named[key] = named.get(key, NOTHING) | {rest}
        receiver = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else NOTHING
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        target, called = self.target(node.func), None
        if name == "partial" and node.args:
            target, positional = self.target(node.args[0]), positional[1:]
        if not any(positional) and not any(named.values()) and not receiver:
            return NOTHING
        if isinstance(target, Class):
            called, fields = target.methods.get("__init__"), target.fields
            if called is None:
                given = {**dict(zip(fields, positional, strict=False)), **named}
                return frozenset(f".{name}{place}" for name, value in given.items() for place in value)
            receiver = NOTHING
        elif isinstance(target, Function):
            called = target
        if called is None:
            return positional[0] if name in COPIES and positional else receiver if name in COPIES else NOTHING
        parameters = called.parameters
        bound = called.owner is not None and not called.decorated("staticmethod")
        given = dict(zip(parameters[1:] if bound else parameters, positional, strict=False))
        given |= {key: value for key, value in named.items() if key in called.keywords}
        if bound and not called.decorated("classmethod"):
            given[parameters[0]] = receiver
        if any("" in value for value in given.values()):
            self.count(node, called)
        back = self.follower.enter(called, given)
        return NOTHING if name == "partial" else back

    def count(self, node: ast.expr, called: Function) -> None:
        """A call of the journey."""
        self.follower.journey.add(self.function.label, node.lineno, called.label, called.file)


def from_text(package: Package, starts: Sequence[str]) -> Journey:
    """Follow the parameters that `starts` name, FILE:FUNCTION:PARAMETER each. Raises `SystemExit` for unknown ones."""
    follower = Follower(package)
    for start in starts:
        file, name, parameter = start.split(":")
        owner, _, own = name.rpartition(".")
        module = package.modules.get(package.files.get(file, ""), {})
        function = module[owner].methods.get(own) if owner in module else module.get(own)
        parameter, dot, rest = parameter.partition(".")
        if not isinstance(function, Function) or parameter not in function.keywords:
            raise SystemExit(f"{start}: no such file, function or parameter")
        follower.enter(function, {parameter: frozenset([f"{dot}{rest}"])})
    return follower.journey
