"""The order of python/fpet's rooms, read from the source: what may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fpet

ROOT = Path(fpet.__file__).parent
FLOORS = (
    {"layers", "data", "measure", "plugins"},
    {"vit"},
    {"adapters", "comparators", "huggingface"},
    {"files"},
    {"serving", "retrieval", "train"},
    {"deploy", "visualization"},
    {"tables"},
    {"__init__", "cli", "doctor"},
    {"__main__"},
)  # a room imports from floors below its own, and from itself
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = {("retrieval", "train")}
"""What one room takes from another of its floor."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def room(module: str) -> str:
    if module.endswith(".__main__"):
        return "__main__"
    return module.split(".")[1] if "." in module else "__init__"


class Imports(ast.NodeVisitor):
    """(module, name, line, whether at import time) of every import from fpet, in a module or in a function of it."""

    def __init__(self, module: str, path: Path) -> None:
        self.found: list[tuple[str, str, int, bool]] = []
        self.package = module if path.name == "__init__.py" and module != "fpet.__init__" else module.rpartition(".")[0]
        self.depth = 0
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_FunctionDef(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == "fpet":
                self.found.append((alias.name, "", node.lineno, not self.depth))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package.split(".")[: len(self.package.split(".")) + 1 - node.level] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        if source.split(".")[0] != "fpet":
            return
        for alias in node.names:
            whole = f"{source}.{alias.name}"
            target, name = (whole, "") if whole in SOURCES else (source, alias.name)
            self.found.append((target, name, node.lineno, not self.depth))


IMPORTS = {module: Imports(module, path).found for module, path in SOURCES.items()}


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in SOURCES} == set(FLOOR)


def test_rooms_import_downwards_only() -> None:
    wrong = [
        f"{module}:{line} imports {target}"
        for module, imports in IMPORTS.items()
        for target, _, line, _ in imports
        if room(module) != room(target)
        and FLOOR[room(target)] >= FLOOR[room(module)]
        and (room(module), room(target)) not in BESIDE
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    """At import time: a package is imported before its modules, but only needs them if its face does."""
    edges = {module: {target for target, _, _, early in imports if early} for module, imports in IMPORTS.items()}
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way[way.index(module) :], module))
        if module not in done:
            for target in sorted(edges.get(module, ())):
                walk(target, (*way, module))
            done.add(module)

    for module in sorted(SOURCES):
        walk(module, ())


def test_no_private_name_crosses_rooms() -> None:
    wrong = [
        f"{module}:{line} imports {target}.{name}"
        for module, imports in IMPORTS.items()
        for target, name, line, _ in imports
        if room(module) != room(target) and (name.startswith("_") or target.rpartition(".")[2].startswith("_"))
    ]
    for module, path in SOURCES.items():  # and through a module: patch._secret
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {target.rpartition(".")[2]: target for target, name, _, _ in IMPORTS[module] if not name}
        wrong += [
            f"{module}:{node.lineno} reads {modules[node.value.id]}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and node.attr.startswith("_")
            and not node.attr.startswith("__")
            and room(modules[node.value.id]) != room(module)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [m for m, p in SOURCES.items() if p.name == "__init__.py"])
def test_no_attribute_of_a_package_hides_one_of_its_modules(package: str) -> None:
    path = SOURCES[package]
    modules = {p.stem for p in path.parent.glob("*.py")} | {p.parent.name for p in path.parent.glob("*/__init__.py")}
    hidden = {name for _, name, _, early in IMPORTS[package] if early and name in modules}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in modules:
            hidden.add(node.name)
    assert not hidden, f"{package}: {sorted(hidden)}"
