"""The house: no part larger than a reader can hold, and imports that point one way. How often a function forks is
counted by the linter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_probe_callbacks

PACKAGE = Path(lora_probe_callbacks.__file__).parent
NAME = PACKAGE.name
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path for path in FILES
}
DOORS = {f"{NAME}.{door}" for door in ("lightning", "trainer", "monitor", "_preflight", "cli")}
# Room to the rooms that it must not know.
STRANGERS = {
    "facts": ("observe", "checks", "engine", "report", "distributed", "restore", "estimators"),
    "checks": ("observe", "engine", "report", "distributed", "restore", "estimators"),
    "observe": ("checks", "engine", "report"),
    "restore": ("observe", "checks", "engine", "report", "facts"),
    "report": ("observe", "engine"),
    "estimators": ("observe", "checks", "engine", "report"),
}


def sizes() -> Iterator[tuple[str, int, int]]:
    """Name, lines and the most that is allowed, of modules and classes."""
    for name, path in MODULES.items():
        text = path.read_text()
        yield name, text.count("\n"), 500
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                yield f"{name}.{node.name}", (node.end_lineno or 0) - node.lineno + 1, 300


def test_no_module_and_no_class_is_too_long() -> None:
    assert not {name: lines for name, lines, most in sizes() if lines > most}


def imports(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports when it runs, wherever in it; not for types alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(NAME))


IMPORTS = {name: set(imports(path)) - {name} for name, path in MODULES.items()}


def test_imports_are_never_in_a_circle() -> None:
    left = {name: {i for i in found if i in MODULES and i != NAME} for name, found in IMPORTS.items() if name != NAME}
    while ready := [name for name, found in left.items() if not found & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


@pytest.mark.parametrize("room", STRANGERS)
def test_rooms_know_only_the_rooms_below_them(room: str) -> None:
    strangers = tuple(f"{NAME}.{stranger}" for stranger in STRANGERS[room])
    found = {
        name: sorted(i for i in mine if i.startswith(strangers))
        for name, mine in IMPORTS.items()
        if name.startswith(f"{NAME}.{room}")
    }
    assert not {name: mine for name, mine in found.items() if mine}


def test_nothing_imports_a_front_door() -> None:
    allowed = {NAME, f"{NAME}.cli", f"{NAME}.faults.selftest", f"{NAME}.faults.trials"}
    found = {name: mine & DOORS for name, mine in IMPORTS.items() if name not in allowed}
    assert not {name: mine for name, mine in found.items() if mine}


def test_checks_know_no_torch() -> None:
    for path in (PACKAGE / "checks").rglob("*.py"):
        assert "torch" not in {
            part.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for part in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        }, path
