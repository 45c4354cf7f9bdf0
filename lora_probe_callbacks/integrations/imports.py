"""Hears when a script imports a framework, and changes the framework's entry points then, not before.

Imports nothing heavy: this runs at the start of every Python under ``lora-probe run``, data workers included.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["watch_imports"]


def _transformers(module: ModuleType) -> None:
    from lora_probe_callbacks.integrations.attaching import attach_to_transformers

    attach_to_transformers(module.Trainer)


def _lightning(module: ModuleType) -> None:
    from lora_probe_callbacks.integrations.attaching import attach_to_lightning

    attach_to_lightning(module.Trainer)


def _accelerate(module: ModuleType) -> None:
    from lora_probe_callbacks.integrations.attaching import attach_to_accelerate

    attach_to_accelerate(module.Accelerator)


# Module that defines the class -> what is done once it is imported.
_ENTRIES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.trainer": _transformers,
    "lightning.pytorch.trainer.trainer": _lightning,
    "accelerate.accelerator": _accelerate,
}


def watch_imports() -> None:
    """Attach to the frameworks that are imported already, and to the others as they are imported."""
    sys.meta_path.insert(0, _Finder())
    for name, attach in _ENTRIES.items():
        if name in sys.modules:
            attach(sys.modules[name])


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find, and has a word after the module was run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ENTRIES:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # Python 3.11 still allows finders without
            spec: ModuleSpec | None = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _run_after(spec.loader, _ENTRIES[fullname])
                return spec
        return None


def _run_after(loader: importlib.abc.Loader, attach: Callable[[ModuleType], None]) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        try:
            attach(module)
        except Exception as error:  # a release that looks different: the script is none the wiser
            sys.stderr.write(f"lora-probe run: cannot attach to {module.__name__}: {type(error).__name__}: {error}\n")

    loader.exec_module = exec_module  # type: ignore[method-assign]
