"""Run by every Python that ``lora-probe run`` starts, before the script: arranges that trainers are attached to.

Its folder stands first in PYTHONPATH; a ``sitecustomize`` of the environment's own, which it hides, is run as well.
Only the standard library is imported here, and nothing that goes wrong may end the script.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder


def _run_the_hidden_one() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _attach() -> None:
    try:
        from lora_probe_callbacks.integrations.imports import watch_imports

        watch_imports()
    except Exception as error:
        sys.stderr.write(f"lora-probe run: cannot attach in {sys.executable}: {type(error).__name__}: {error}\n")


try:
    _run_the_hidden_one()
finally:  # after it: an import hook that it installs must not stand before ours
    if "LORA_PROBE_RUN" in os.environ:
        _attach()
