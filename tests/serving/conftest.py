from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.serving import trained
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model() -> PeftModel:
    return trained()


@pytest.fixture
def base(model: PeftModel) -> nn.Module:
    return copy.deepcopy(model).unload()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the trained adapter and an earlier state of it, on disk."""
    path = tmp_path_factory.mktemp("serving")
    model = trained()
    copy.deepcopy(model).unload().save_pretrained(path / "base")
    model.save_pretrained(path / "adapter")
    earlier(model).save_pretrained(path / "runs" / "checkpoint-1")
    return path


def earlier(model: PeftModel) -> PeftModel:
    """The adapter some steps before: nearer to where it began, and elsewhere."""
    former = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in former.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return former
