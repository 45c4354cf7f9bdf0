"""The examples of every step as it runs: which pull against it, and how much of the gradient is noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lora_probe_callbacks.estimators._owners import parameters, unwrapped
from lora_probe_callbacks.estimators._step_names import Identities
from lora_probe_callbacks.estimators._step_recorder import ExampleOfRow
from lora_probe_callbacks.estimators.directions import UpdateDirection
from lora_probe_callbacks.estimators.in_step import Direction, ExampleScores, InStep, SelfCheck

__all__ = ["ExampleProbe"]

_NAMES = ("last_step", "adam")
_TEXT = 200  # characters of an example that are recorded


class ExampleProbe:
    """What are the examples of a step to the step? As `examples=` of any front door it scores them as they train.

    | metric | of the step's examples |
    | --- | --- |
    | lora_probe/examples/negative_fraction | those whose own loss a step along the first direction would raise |
    | lora_probe/examples/signal_to_noise | |mean| / standard error of their gains |
    | lora_probe/examples/mean_cosine | between -g_n and the direction, the mean |
    | lora_probe/examples/noise_scale | tr(Sigma) / |G|^2, in examples: the batch at which noise and signal are equal |

    The noise scale is McCandlish et al. (2018, arXiv:1812.06162, appendix A.1) from |G|^2 and the mean of |g_n|^2
    within each micro-batch; single steps scatter widely, as its denominator is itself estimated: look at its median
    over steps. The record and the page list the `top` most and least helpful examples of every scored step. Each rank
    of a distributed run scores its own examples. Training is left as it was, bit by bit.

    Args:
        directions: "last_step" (what the last step has added), "adam" (what Adam would add without a new gradient), any
            direction of `per_example_scores`, or a function of the model that returns one (a validation gradient made
            anew, say). The first one makes the metrics.
        norms: |g_n| as well; without it neither mean_cosine nor noise_scale.
        gram: <g_n, g_m> as well.
        per_token: The scores of tokens as well.
        top: How many examples are listed at each end.
        every_n_steps: The cadence, from step 0.
        ids: What examples are called, as for `per_example_scores`; by default a hash of their `input_ids`, or a
            number where there are none.
        example_of_row: As there.
        tokenizer: With it, the record holds the beginning of an example's text. Without, none of it.
        self_check: As there.

    Attributes:
        latest: The scores of the last scored step.

    Raises:
        ValueError: If an argument has a value that cannot be meant.
    """

    def __init__(
        self,
        directions: Sequence[str | Direction | Callable[[nn.Module], Direction]] = ("last_step",),
        norms: bool = True,
        gram: bool = False,
        per_token: bool = False,
        top: int = 8,
        every_n_steps: int = 1,
        *,
        ids: Identities = "content_or_number",
        example_of_row: ExampleOfRow | None = None,
        tokenizer: Any = None,
        self_check: SelfCheck = "first",
    ) -> None:
        if isinstance(directions, str | Mapping | UpdateDirection):
            raise ValueError(f"directions got {type(directions).__name__}, expected a sequence: (direction,)")
        if unknown := [d for d in directions if isinstance(d, str) and d not in _NAMES]:
            raise ValueError(f"directions got {unknown[0]!r}, expected one of {_NAMES}, a direction or a function")
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps got {every_n_steps!r}, expected an integer of at least 1")
        if not directions and not norms and not gram:
            raise ValueError("got no directions, and neither norms nor gram; expected something to compute")
        self.directions = tuple(directions)
        self.norms, self.gram, self.per_token = norms, gram, per_token
        self.top = top
        self.every_n_steps = every_n_steps
        self.latest: ExampleScores | None = None
        self._ids, self._example_of_row = ids, example_of_row
        self._tokenizer = tokenizer
        self._self_check: SelfCheck = self_check

    def due(self, step: int) -> bool:
        """Whether the examples of this step are scored."""
        return step % self.every_n_steps == 0

    @property
    def wants_last_step(self) -> bool:
        """It needs the parameters from before the last step."""
        return "last_step" in self.directions

    def prepared(
        self, model: nn.Module, optimizers: Sequence[Optimizer], before: Mapping[str, torch.Tensor]
    ) -> InStep | None:
        """Make ready to watch a step.

        Args:
            model: The module that is trained.
            optimizers: Those that step it.
            before: Copies of its trainable parameters from before the last step, if there was one.

        Returns:
            What watches, or None if there is nothing to compute: before the first step there is no last one.
        """
        directions: dict[str, Direction] = {}
        for number, given in enumerate(self.directions):
            name = f"direction_{number}"
            made: Any = given
            if given == "last_step":
                name, made = "last_step", _since(model, before)
            elif given == "adam":
                name, made = "adam", _of_adam(model, optimizers)
            elif callable(given):
                name, made = getattr(given, "__name__", name), given(model)
            if made:
                directions[name] = made
        if not directions and not self.norms and not self.gram:
            return None
        return InStep(
            model,
            directions,
            norms=self.norms,
            gram=self.gram,
            per_token=self.per_token and bool(directions),
            example_of_row=self._example_of_row,
            ids=self._ids,
            self_check=self._self_check,
        )

    def metrics(self, scores: ExampleScores) -> dict[str, float]:
        """Put scores into four numbers; those that cannot be known are left out.

        Args:
            scores: Of one step.

        Returns:
            Metric name to value.
        """
        row: dict[str, float] = {}
        if scores.s is not None:
            gain = scores.gain[0].double().cpu()
            row["negative_fraction"] = float((gain < 0).double().mean())
            if len(gain) > 1 and (error := float(gain.std()) / math.sqrt(len(gain))):
                row["signal_to_noise"] = abs(float(gain.mean())) / error
            if scores.norms is not None:
                lengths = scores.norms.double().cpu() * scores.mu_norms[0] * abs(scores.scales[0])
                known = lengths > 0
                if bool(known.any()):
                    row["mean_cosine"] = float((gain[known] / lengths[known]).mean())
        if (noise := _noise_scale(scores)) is not None:
            row["noise_scale"] = noise
        return {f"lora_probe/examples/{name}": value for name, value in row.items()}

    def listing(self, scores: ExampleScores, watched: InStep, loss_scale: float = 1.0) -> dict[str, Any]:
        """Put the most and least helpful examples into words, for the record.

        Args:
            scores: Of one step.
            watched: Who watched it.
            loss_scale: What the loss was multiplied with.

        Returns:
            Mappings, lists and numbers.
        """
        if scores.s is None:
            return {}
        gain = (scores.gain[0].double() / loss_scale).tolist()
        order = sorted(range(len(gain)), key=gain.__getitem__)
        ends = {"least": order[: self.top], "most": order[::-1][: self.top]}
        texts: dict[int, str] = {}
        if self._tokenizer is not None:
            texts = watched.texts(sorted({n for end in ends.values() for n in end}), self._tokenizer.decode)
        norms = None if scores.norms is None else (scores.norms.double() / loss_scale).tolist()

        def entry(n: int) -> dict[str, Any]:
            known: dict[str, Any] = {"id": scores.ids[n], "gain": gain[n]}
            if norms is not None:
                known["norm"] = norms[n]
            return known | ({"text": texts[n][:_TEXT]} if n in texts else {})

        lists = {end: [entry(n) for n in numbers] for end, numbers in ends.items()}
        return {"direction": scores.directions[0], "count": len(gain), "checked": scores.checked, **lists}


def _noise_scale(scores: ExampleScores) -> float | None:
    """Return tr(Sigma) / |G|^2 in examples: each micro-batch estimates both, and the estimates are averaged.

    With B examples, G_B their mean gradient and g_n = B times a part of it,
    |G|^2 = (B |G_B|^2 - mean |g_n|^2) / (B - 1) and tr(Sigma) = (mean |g_n|^2 - |G_B|^2) / (1 - 1 / B).
    """
    if scores.norms is None:
        return None
    squares, noises, start = 0.0, 0.0, 0
    for B, summed in zip(scores.passes, scores.summed, strict=True):
        if B > 1:
            small = float((B * scores.norms[start : start + B].double()).square().mean())
            squares += (B * summed**2 - small) / (B - 1)
            noises += (small - summed**2) / (1 - 1 / B)
        start += B
    return noises / squares if squares > 0 else None


def _since(model: nn.Module, before: Mapping[str, torch.Tensor]) -> UpdateDirection | None:
    """Return what the last step has added, or None if nothing."""
    if not before:
        return None
    mu = UpdateDirection.from_last_step(model, before)
    return mu if mu.norm() else None


def _of_adam(model: nn.Module, optimizers: Sequence[Optimizer]) -> UpdateDirection | None:
    """Return -lr m_hat / (sqrt(v_hat) + eps), with the moments as they are; None before the first step."""
    names = {id(p): name for name, p in parameters(unwrapped(model)).items()}
    mu = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                if id(p) in names and {"exp_avg", "exp_avg_sq", "step"} <= state.keys():
                    beta_1, beta_2 = map(float, group["betas"])
                    t = float(state["step"])
                    v_hat = state["exp_avg_sq"] / (1 - beta_2**t)
                    m_hat = state["exp_avg"] / (1 - beta_1**t)
                    mu[names[id(p)]] = -float(group["lr"]) * m_hat / (v_hat.sqrt() + group["eps"])
    return UpdateDirection(mu, scale=1.0, source="adam", model=model) if mu else None
