from __future__ import annotations

import subprocess
import sys

import pytest

import lora_probe_callbacks.estimators as estimators


def test_importing_the_package_loads_no_framework():
    heavy = ["torchmetrics", "transformers", "peft", "lightning", "bitsandbytes", "scipy"]
    code = f"import sys, lora_probe_callbacks.estimators; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists_where_the_table_says():
    for name, module in estimators._PUBLIC.items():
        value = getattr(estimators, name)
        assert value.__name__ == name
        assert value.__module__ == module
    assert sorted(estimators._PUBLIC) == dir(estimators)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = estimators.no_such_name
