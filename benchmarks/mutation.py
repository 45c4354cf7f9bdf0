"""Mutation testing of the checks: change them one at a time, and see whether their unit tests notice.

    make mutation

mutmut makes the mutants of every function in ``lora_probe_callbacks/checks``. The unit tests of the checks are pure, so
they are collected once and run in this one process against each mutant in turn, those of its own file first, up to
the first test that fails. Besides, each check is removed in turn (its verdict is always "pass"). Mutants that change
nothing but the words of a message are counted apart. Writes ``benchmarks/results/mutation.json``; what survives is
explained in ``benchmarks/mutation_survivors.json``.
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CHECKS = Path("lora_probe_callbacks", "checks")
SECONDS = 20  # a mutant that runs longer than this runs forever


@dataclass(frozen=True)
class Mutant:
    """One change of one function.

    Attributes:
        name: As mutmut calls it.
        file: The module, below the package of the checks.
        function: Name of the function.
        before: Source of the function.
        after: Source of the mutant.
    """

    name: str
    file: str
    function: str
    before: str
    after: str

    @property
    def words_alone(self) -> bool:
        """It differs in the text of strings only."""
        return _without_words(self.before) == _without_words(self.after)

    @property
    def change(self) -> str:
        """The lines that differ."""
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), lineterm="", n=0)
        return "\n".join(line.strip() for line in lines if line[0] in "+-" and line[:3] not in ("+++", "---"))


class _Wordless(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node


def _without_words(source: str) -> str:
    return ast.dump(_Wordless().visit(ast.parse(source)))


def write_mutants(folder: Path, only: str) -> list[Mutant]:
    """Copy the package and put mutmut's mutants, with its switch, in the place of the checks."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    shutil.copytree(ROOT / "lora_probe_callbacks", folder / "lora_probe_callbacks")
    mutants = []
    for path in sorted((folder / CHECKS).rglob(f"*{only}*.py" if only else "*.py")):
        made = mutate_file_contents(str(path), path.read_text())
        path.write_text(made.code)
        lines = made.code.splitlines(keepends=True)  # once: ast.get_source_segment would split them for each function
        functions = {
            node.name: "".join(lines[node.lineno - 1 : node.end_lineno])
            for node in ast.parse(made.code).body
            if isinstance(node, ast.FunctionDef)
        }
        for name in made.mutant_names:
            mangled = name.rpartition(".")[2]
            original, _, number = mangled.rpartition("__mutmut_")
            before, after = (
                functions[key].replace(key, "function", 1) for key in (f"{original}__mutmut_orig", mangled)
            )
            module = ".".join(path.relative_to(folder / CHECKS).with_suffix("").parts)
            mutants.append(Mutant(f"{path.stem}.{original[2:]} {number}", module, mangled, before, after))
    return mutants


class Runner:
    """A pytest plugin that runs the collected tests once for each mutant."""

    def __init__(self, mutants: list[Mutant]) -> None:
        self.mutants = mutants
        self.survivors: list[Mutant] = []
        self.removed_unnoticed: list[str] = []
        self.tests = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Take the place of pytest's own loop."""
        signal.signal(signal.SIGALRM, _too_long)
        self.tests = len(session.items)
        os.environ["MUTANT_UNDER_TEST"] = ""
        if failed := self._first_failure(session.items):
            raise SystemExit(f"{failed} fails without a mutant")
        for number, mutant in enumerate(self.mutants):
            os.environ["MUTANT_UNDER_TEST"] = f"lora_probe_callbacks.checks.{mutant.file}.{mutant.function}"
            own = f"test_{mutant.file.rpartition('.')[2]}.py"
            if self._first_failure(sorted(session.items, key=lambda item: item.path.name != own)) is None:
                self.survivors.append(mutant)
            if number % 100 == 99:
                print(f"{number + 1} of {len(self.mutants)}, {len(self.survivors)} survive", flush=True)
        os.environ["MUTANT_UNDER_TEST"] = ""
        self._remove_each(session.items)
        return True

    def _remove_each(self, items: list[pytest.Item]) -> None:
        from lora_probe_callbacks.checks._base import ok
        from lora_probe_callbacks.checks._catalogue import all_checks

        prefix = "lora_probe_callbacks.checks."
        modules = [
            (name, m) for name, m in list(sys.modules.items()) if name.startswith(prefix) and hasattr(m, "CHECK")
        ]
        judge_file = {m.CHECK.code: name.removeprefix(prefix) for name, m in modules}
        for check in all_checks():
            judge = check.judge
            object.__setattr__(check, "judge", lambda facts: ok())
            own = f"test_{judge_file[check.code].rpartition('.')[2]}.py"
            if self._first_failure(sorted(items, key=lambda item: item.path.name != own)) is None:
                self.removed_unnoticed.append(check.code)
            object.__setattr__(check, "judge", judge)

    def _first_failure(self, items: list[Any]) -> str | None:
        signal.alarm(SECONDS)
        try:
            for item in items:
                # No fixture but their parameters: called directly, thousands of times.
                item.obj(**(item.callspec.params if hasattr(item, "callspec") else {}))
        except (Exception, pytest.fail.Exception):
            return item.nodeid
        finally:
            signal.alarm(0)
        return None


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


def summary(runner: Runner, seconds: float, explained: dict[str, str]) -> dict[str, Any]:
    """What was counted, and every survivor with its change and why it survives."""
    of_words = [m for m in runner.mutants if m.words_alone]
    behaviour = len(runner.mutants) - len(of_words)
    survivors = [m for m in runner.survivors if not m.words_alone]
    files = collections.Counter(m.file for m in runner.mutants)
    lost = collections.Counter(m.file for m in runner.survivors)
    return {
        "versions": {p: version(p) for p in ("mutmut", "pytest")},
        "seconds": round(seconds),
        "tests": runner.tests,
        "behaviour": {
            "mutants": behaviour,
            "killed": behaviour - len(survivors),
            "fraction": round(1 - len(survivors) / behaviour, 4),
        },
        "words": {"mutants": len(of_words), "killed": sum(m not in runner.survivors for m in of_words)},
        "checks removed and nobody noticed": runner.removed_unnoticed,
        "files": {file: {"mutants": n, "survive": lost[file]} for file, n in files.items()},
        "survivors": [{"mutant": m.name, "change": m.change, "why": explained.get(m.change, "")} for m in survivors],
    }


def main(arguments: list[str] | None = None) -> None:
    """Make the mutants, run the tests against each, and write what survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="files of checks whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mutation.json")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        mutants = write_mutants(Path(folder), options.only)
        print(f"{len(mutants)} mutants", flush=True)
        sys.path.insert(0, folder)
        runner = Runner(mutants)
        settings = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=--import-mode=importlib"]
        pytest.main([*settings, f"--rootdir={ROOT}", str(ROOT / "tests" / "checks")], plugins=[runner])
    explanations = Path(__file__).with_name("mutation_survivors.json")
    explained = json.loads(explanations.read_text()) if explanations.exists() else {}
    result = summary(runner, time.perf_counter() - began, explained)
    print(json.dumps({k: v for k, v in result.items() if k not in ("files", "survivors")}, indent=1))
    for survivor in result["survivors"]:
        print(f"\n{survivor['mutant']}: {survivor['why'] or 'NOT EXPLAINED'}\n{survivor['change']}")
    if not options.only:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
