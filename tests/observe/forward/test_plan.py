"""The engine is asked which of the tensors of the last look it will come to, in place of a walk over the graph."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora_probe_callbacks import LoraProbeError, LoraProbeMonitor

STEPS, EXCHANGE = 10, 6  # after the first steps, in which every graph is walked, and between two walks


class Loop:
    """Training of one adapted layer, in a plain loop."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.model: PeftModel = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.probe = LoraProbeMonitor(self.model, self.optimizer, every_n_steps=1, verbose=False)
        self.factor = self.model.base_model.model[0].lora_A["default"]
        self.former: list[nn.Parameter] = []  # a penalty keeps them in the graph

    def exchange(self, *, tell: bool) -> None:
        """Put a new tensor in the place of A."""
        old, new = self.factor.weight, nn.Parameter(self.factor.weight.detach().clone())
        self.factor.weight = new
        if tell:
            params = self.optimizer.param_groups[0]["params"]
            params[next(i for i, p in enumerate(params) if p is old)] = new
            self.former.append(old)

    def loss(self) -> torch.Tensor:
        loss = self.model(torch.randn(8, 4)).pow(2).mean()
        for old in self.former:
            loss = loss + 0.01 * (self.factor.weight - 2 * old).pow(2).sum()
        return loss


def test_former_tensor_in_the_graph_does_not_stand_for_the_new_one() -> None:
    loop = Loop()
    with loop.probe:
        for step in range(STEPS):
            if step == EXCHANGE:
                loop.exchange(tell=True)
            loop.loss().backward()
            loop.optimizer.step()
            loop.model.zero_grad()
    assert loop.probe.report.healthy, loop.probe.report


def test_tensor_exchanged_after_the_backward_is_found_in_that_step() -> None:
    loop = Loop()
    try:
        with loop.probe:
            for step in range(STEPS):
                loop.loss().backward()
                if step == EXCHANGE:
                    loop.exchange(tell=False)
                loop.optimizer.step()
                loop.model.zero_grad()
    except LoraProbeError as error:
        found = error.findings[0]
    assert (found.code, found.step) == ("LP202", EXCHANGE)
