"""The house: no part larger than a reader can hold, and imports that point one way. How often a function forks is
counted by the linter."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import lora_probe_callbacks

PACKAGE = Path(lora_probe_callbacks.__file__).parent
NAME = PACKAGE.name
MODULES = {
    ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
DOORS = {f"{NAME}.{door}" for door in ("lightning", "trainer", "monitor", "_preflight", "cli")}
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
# Room to what it may know beside itself.
KNOWS = {
    "facts": set(),
    "restore": set(),
    "checks": {"facts"},
    "report": {"facts", "checks"},
    "estimators": {"restore"},
    "observe": {"facts", "restore", "_gc"},
    "distributed": {"facts", "checks", "observe"},
    "engine": {
        "facts",
        "restore",
        "checks",
        "report",
        "estimators",
        "observe",
        "distributed",
        "serving",
        "config",
        "_gc",
    },
    "debug": {"report", "estimators", "observe"},
    "faults": {"report", "monitor"},
    "serving": {"facts", "restore", "observe", "checks", "report"},
    "integrations": {"lightning", "monitor", "report", "trainer"},
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


def imports(name: str, path: Path) -> Iterator[str]:
    """Modules that a file imports when it runs, wherever in it; not for types alone."""
    tree = ast.parse(path.read_text())
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                # A public name of the package is imported from there when it is asked for.
                inner = lora_probe_callbacks._PUBLIC.get(alias.name) if source == NAME else None
                inner = inner or f"{source}.{alias.name}"
                yield inner if inner in MODULES else source
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


IMPORTS = {name: (MODULES.keys() & set(imports(name, path))) - {name} for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """The room that a module of this package is in, or its own name if it is in none."""
    return module.removeprefix(f"{NAME}.").partition(".")[0]


ROOM_IMPORTS = {room: set(KNOWS[room]) for room in KNOWS}
MODULE_IMPORTS = {name: found - {NAME} for name, found in IMPORTS.items() if name != NAME}


@pytest.mark.parametrize("known", [MODULE_IMPORTS, ROOM_IMPORTS], ids=["modules", "rooms"])
def test_imports_are_never_in_a_circle(known: dict[str, set[str]]) -> None:
    left = dict(known)
    while ready := [name for name, found in left.items() if not found & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_what_they_may(room: str) -> None:
    known = {room, *KNOWS[room]}
    found = {
        name: sorted(i for i in mine if i != NAME and room_of(i) not in known)
        for name, mine in IMPORTS.items()
        if room_of(name) == room
    }
    assert not {name: mine for name, mine in found.items() if mine}


def test_nothing_imports_a_front_door() -> None:
    allowed = {NAME, f"{NAME}.cli", f"{NAME}.faults.selftest", f"{NAME}.faults.trials"}
    allowed |= {name for name in MODULES if room_of(name) == "integrations"}  # they stand before the doors
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
