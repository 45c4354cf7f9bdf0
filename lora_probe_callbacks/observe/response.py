"""What a step does to the loss, and what the gradient says that it does.

The arguments of the training forward and the cotangent ``c`` of what left the model are kept. When the
step has ended, the forward is run again: ``<c, out(theta') - out(theta)>`` is the change that the step
makes, to first order, and ``sum <g, theta' - theta>`` the one that the gradient ``g`` predicts. At
``theta +- h g / |g|`` the same gives a central difference, which a right gradient meets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks.observe.facts import StepResponse
from lora_probe_callbacks.observe.forwards import tensors_in
from lora_probe_callbacks.observe.repeat import MOST_BYTES, KeptForward, holding

__all__ = ["ResponseObserver", "aliased"]

# The perturbation h, relative to the adapter's norm. Large enough to be seen in 16 bits, and the
# third order is still small: measured on tiny models, see tests/test_step_response.py.
_SIZE = 0.005
_DOUBT = 0.1  # a central difference off by more than this is looked at twice
_SAMPLE = 1024

_Place = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # outputs, and the parameters that made them


class ResponseObserver:
    """Follows the one training forward of one step from its output to the update.

    Args:
        tensors: The adapter's tensors.
        hook: Makes a hook of a method and its first argument.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], hook: Callable[[Callable[..., None], object], Callable[..., None]]
    ) -> None:
        self._tensors = list(tensors)
        self._watched: set[int] = set()  # ids of those that carry a hook of ours
        self._hook = hook
        self._why_not: str | None = None
        self._forward: _Followed | None = None
        self._gradients: dict[int, torch.Tensor] = {}
        self._before: list[torch.Tensor] = []
        self._handles: list[RemovableHandle] = []

    # --- while the step goes on -------------------------------------------------------------

    def after(self, kept: KeptForward, output: Any) -> Any:
        """Follow a candidate.

        Args:
            kept: The candidate.
            output: What it returned.

        Returns:
            The output to hand on: where several outputs carry a graph, aliases of them, so that uses of
            one inside the model (the loss is made of the logits) are told from uses outside.
        """
        if self._why_not is not None:
            return output
        floating = [t for t in tensors_in(output) if t.is_floating_point()]
        if sum(t.numel() * t.element_size() for t in floating) > MOST_BYTES:
            self._why_not = "the outputs of the forward are larger than 256 MiB"
        else:
            self._why_not = kept.why_not() or _why_not(kept.module, self._tensors, self._watched)
        if self._why_not is not None:
            self.forget()
            return output
        for index, tensor in enumerate(self._tensors):
            if tensor.requires_grad and id(tensor) not in self._watched:
                self._watched.add(id(tensor))
                self._handles.append(tensor.register_hook(self._hook(self._add, index)))  # type: ignore[no-untyped-call]
        followed = _Followed(kept, [_sample(t) for t in floating])
        place = {id(t): index for index, t in reversed(list(enumerate(floating)))}
        outputs = {id(t): t for t in floating if t.requires_grad}
        seen = outputs
        if len(outputs) > 1:
            seen = {}
            output = aliased(output, seen)
        for former, tensor in seen.items():
            handle = tensor.register_hook(self._hook(self._receive, (followed, place[former])))  # type: ignore[no-untyped-call]
            self._handles.append(handle)
        return output

    def _add(self, index: int, gradient: torch.Tensor | None) -> None:
        # None: an operation without a backward lies between (bitsandbytes' inference kernel), or its output is unused.
        if gradient is None or self._why_not is not None:
            return
        known = self._gradients.get(index)
        try:
            # A copy: what is accumulated into .grad may be this very memory, and be clipped later.
            self._gradients[index] = gradient.detach().clone() if known is None else known.add_(gradient.detach())
        except Exception as error:  # out of memory; it would end the user's backward
            self._why_not = f"keeping the gradients raised {type(error).__name__}: {error}"
            self._gradients.clear()

    def _receive(self, where: tuple[_Followed, int], cotangent: torch.Tensor | None) -> None:
        if cotangent is None:
            return
        followed, index = where
        if self._forward is None:
            self._forward = followed
        if self._forward is not followed:
            self._why_not = "more than one training forward in this step"
            self._gradients.clear()
            self._forward.cotangents.clear()
            return
        known = followed.cotangents.get(index)
        followed.cotangents[index] = cotangent.detach() if known is None else known + cotangent.detach()

    def stepping(self, *, inside: bool = False) -> None:
        """The update is about to come: keep what it starts from, once.

        Args:
            inside: The forward comes after this moment, in a closure.
        """
        if self._why_not is not None or (self._forward is None and not inside):
            return
        if not self._before:
            self._before = [tensor.detach().clone() for tensor in self._tensors]
        if self._forward is not None:
            self._unhook()

    def forget(self) -> None:
        """Remove the hooks and let go of all tensors."""
        self._unhook()
        self._gradients.clear()
        self._before.clear()
        self._forward = None

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()

    # --- after the update -------------------------------------------------------------------

    def measure(self, step: int, framework_step: int, scale: float) -> StepResponse:
        """Run the forward again, before and after the step and around it.

        Args:
            step: The step that was made.
            framework_step: Its number in the framework.
            scale: What the loss was multiplied with.

        Returns:
            What the step did, or why that is not known.
        """
        try:
            with nullcontext() if self._forward is None else self._forward.kept.several():
                return self._measure(step, framework_step, scale)
        except Exception as error:  # the user's own code is run again: it may count its calls, or need more memory
            reason = f"run again, the forward raised {type(error).__name__}: {error}"
            return StepResponse(step=step, framework_step=framework_step, why_not=reason)

    def _measure(self, step: int, framework_step: int, scale: float) -> StepResponse:
        forward, before = self._forward, self._before
        gradients = [self._gradients.get(index) for index in range(len(self._tensors))]
        blank = StepResponse(step=step, framework_step=framework_step)
        why_not = self._why_not or self._incomplete()
        if why_not is not None or forward is None:
            return dataclasses.replace(blank, why_not=why_not)
        moving = [i for i, g in enumerate(gradients) if g is not None]
        tensors = [self._tensors[i] for i in moving]
        g = [gradient.float() for gradient in gradients if gradient is not None]
        start = [before[i] for i in moving]
        trial = _Trial(forward, self._tensors, before, tensors, start)
        with holding(self._tensors, before):
            at_start = forward.kept.run()
        why_not = forward.differs(at_start) or _not_finite([*g, *forward.cotangents.values()])
        if why_not is not None:
            return dataclasses.replace(blank, why_not=why_not)
        predicted = _dot(g, [t.detach().float() - s.float() for t, s in zip(tensors, start, strict=True)])
        measured = forward.change(at_start, forward.kept.run())
        found = dataclasses.replace(blank, predicted=predicted / scale, measured=measured / scale)
        central, sides = trial.differences(g, _SIZE, at_start)
        if abs(central - 1) <= _DOUBT or not math.isfinite(central):
            return dataclasses.replace(found, central=central)
        again, _ = trial.differences(g, 2 * _SIZE, at_start)
        own, _ = trial.differences(trial.gradients(), _SIZE, at_start)
        noise = trial.noise(g, _SIZE, at_start)
        return dataclasses.replace(found, central=central, again=again, own=own, sides=sides, noise=noise)

    def _incomplete(self) -> str | None:
        if self._forward is None or not self._forward.cotangents:
            return "no gradient arrived at the output of a watched forward"
        if not self._before or not any(bool(g.any()) for g in self._gradients.values()):
            return "no gradient arrived at the adapter"
        return self._forward.kept.changed()


@dataclass(eq=False, slots=True)
class _Followed:
    """A candidate and the gradients that arrived at its outputs."""

    kept: KeptForward
    samples: list[torch.Tensor]  # some elements of every floating output
    cotangents: dict[int, torch.Tensor] = field(default_factory=dict)  # by the number of the floating output

    def differs(self, outputs: Sequence[torch.Tensor]) -> str | None:
        """Say so if a repeat did not give the outputs of the forward."""
        again = [_sample(t) for t in outputs]
        same = len(again) == len(self.samples) and all(
            a.shape == b.shape and a.dtype == b.dtype and bool((a - b).float().norm() <= 1e-3 * b.float().norm())
            for a, b in zip(again, self.samples, strict=True)
        )
        return (
            None if same else "run again, the forward gave other outputs: state that cannot be restored, or stale casts"
        )

    def change(self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
        """``<c, after - before>`` over the outputs that received a gradient."""
        c = list(self.cotangents.values())
        return _dot([x.float() for x in c], [after[i].float() - before[i].float() for i in self.cotangents])


@dataclass(eq=False, slots=True)
class _Trial:
    """The forward at parameters around those that the step started from."""

    forward: _Followed
    every: list[torch.Tensor]
    before: list[torch.Tensor]
    tensors: list[torch.Tensor]  # those that have a gradient
    start: list[torch.Tensor]  # and what they held before the step

    def differences(
        self, g: Sequence[torch.Tensor], size: float, at_start: Sequence[torch.Tensor]
    ) -> tuple[float, tuple[float, float]]:
        """``<c, out(theta + h g/|g|) - out(theta - h g/|g|)>`` over what ``g`` says of it, and of either half.

        Args:
            g: A gradient.
            size: h, relative to the norm of the adapter.
            at_start: Outputs at ``theta``.

        Returns:
            1 where the gradient is right; the same of the half ahead and of the half behind.
        """
        norm = math.sqrt(_dot(g, g))
        if not norm or not math.isfinite(norm):
            return math.nan, (math.nan, math.nan)
        theta = [s.float() for s in self.start]
        h = size * math.sqrt(sum(float(b.float().square().sum()) for b in self.before)) / norm
        # As the parameters' own types can hold it: what is asked of the gradient is the move that was made.
        ahead = [(t + h * x).to(s) for t, x, s in zip(theta, g, self.start, strict=True)]
        behind = [(t - h * x).to(s) for t, x, s in zip(theta, g, self.start, strict=True)]
        with holding(self.every, self.before):
            with holding(self.tensors, ahead):
                up = self.forward.kept.run()
            with holding(self.tensors, behind):
                down = self.forward.kept.run()

        def ratio(before: _Place, after: _Place) -> float:
            expected = _dot(g, [a.float() - b.float() for a, b in zip(after[1], before[1], strict=True)])
            return self.forward.change(before[0], after[0]) / expected if expected else math.nan

        low, here, high = (down, behind), (at_start, theta), (up, ahead)
        return ratio(low, high), (ratio(here, high), ratio(low, here))

    def noise(self, g: Sequence[torch.Tensor], size: float, at_start: Sequence[torch.Tensor]) -> float:
        """What rounding makes of a central difference, in the units of :meth:`differences`.

        Along random directions of the same length next to nothing of ``g`` is left (one part in the root of the
        number of elements), and whatever differs from that little is noise of the forward at this distance.

        Args:
            g: The gradient.
            size: h, relative to the norm of the adapter.
            at_start: Outputs at ``theta``.

        Returns:
            Its root mean square over three directions, or the resolution of the outputs if that is more.
        """
        length = math.sqrt(sum(float(b.float().square().sum()) for b in self.before))
        largest = 2 * size * length * math.sqrt(_dot(g, g))  # what is expected along g
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(3):
            d = [torch.randn(x.shape, generator=generator).to(x) for x in g]
            h = size * length / math.sqrt(_dot(d, d))
            ahead = [(s.float() + h * x).to(s) for s, x in zip(self.start, d, strict=True)]
            behind = [(s.float() - h * x).to(s) for s, x in zip(self.start, d, strict=True)]
            with holding(self.every, self.before):
                with holding(self.tensors, ahead):
                    up = self.forward.kept.run()
                with holding(self.tensors, behind):
                    down = self.forward.kept.run()
            expected = _dot(g, [a.float() - b.float() for a, b in zip(ahead, behind, strict=True)])
            found.append((self.forward.change(down, up) - expected) ** 2)
        parts = (
            (c.float() * at_start[i].float()) * torch.finfo(at_start[i].dtype).eps
            for i, c in self.forward.cotangents.items()
        )
        resolution = math.sqrt(sum(float(part.square().sum()) for part in parts))
        return max(math.sqrt(sum(found) / len(found)), resolution) / largest if largest else math.inf

    def gradients(self) -> list[torch.Tensor]:
        """The gradient of ``<c, out>`` alone: nothing in it that did not leave through the outputs."""
        kept, cotangents = self.forward.kept, self.forward.cotangents
        leaves = [p for p in kept.module.parameters() if p.requires_grad]
        former = [p.grad for p in leaves]
        with holding(self.every, self.before):
            try:
                for p in leaves:
                    p.grad = None
                with kept.again(), torch.enable_grad():
                    outputs = kept.call()
                    chosen = [(outputs[i], c) for i, c in cotangents.items() if outputs[i].requires_grad]
                    if chosen:
                        torch.autograd.backward([o for o, _ in chosen], [c for _, c in chosen])
                return [torch.zeros_like(t).float() if t.grad is None else t.grad.float() for t in self.tensors]
            finally:
                for p, gradient in zip(leaves, former, strict=True):
                    p.grad = gradient


def aliased(output: Any, made: dict[int, torch.Tensor], depth: int = 4) -> Any:
    """Put aliases in the place of the tensors of an output that carry a graph.

    Args:
        output: What a forward returned: a tensor, or tensors in tuples, lists, mappings or dataclasses.
        made: Receives the aliases by the id of what they stand for; one for each tensor.
        depth: How deep to look.

    Returns:
        The output with aliases; containers other than tuples are the same objects.
    """
    if isinstance(output, torch.Tensor):
        if not output.requires_grad or not output.is_floating_point():
            return output
        if id(output) not in made:
            made[id(output)] = output.view_as(output)
        return made[id(output)]
    if depth == 0:
        return output
    if isinstance(output, dict):
        for key, value in list(output.items()):
            other = aliased(value, made, depth - 1)
            if other is not value:
                output[key] = other
    elif isinstance(output, list):
        output[:] = [aliased(value, made, depth - 1) for value in output]
    elif isinstance(output, tuple):
        values = [aliased(value, made, depth - 1) for value in output]
        if any(a is not b for a, b in zip(values, output, strict=True)):
            return type(output)(*values) if hasattr(output, "_fields") else tuple(values)
    elif dataclasses.is_dataclass(output) and not getattr(type(output), "__dataclass_params__").frozen:  # noqa: B009 - mypy knows no such attribute
        for part in dataclasses.fields(output):
            setattr(output, part.name, aliased(getattr(output, part.name), made, depth - 1))
    return output


def _why_not(module: nn.Module, tensors: Sequence[torch.Tensor], ours: Collection[int]) -> str | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "gradients are averaged over ranks, and outputs are of one rank"
    if any(hasattr(t, "to_local") or hasattr(t, "ds_id") for t in tensors):
        return "the adapter is sharded"
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer) and (reason := _by_design(layer)):
            return reason
    for parameter in module.parameters():
        foreign = parameter._backward_hooks and id(parameter) not in ours
        if foreign or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "a hook on a parameter changes or uses its gradient"
    return None


def _by_design(layer: BaseTunerLayer) -> str | None:
    """Why the gradient of an adapter is meant to be another one than the loss's (peft 0.21)."""
    if not isinstance(layer, LoraLayer):
        # Projected parameters, norms taken for constants, noise drawn in the forward.
        return f"{type(layer).__name__} is no LoRA layer: other tuners approximate their gradients by design"
    for variant in layer.lora_variant.values():
        kind = type(variant).__name__
        if kind.startswith("Dora"):
            return "DoRA takes the norm of the adapted weight for a constant in its gradient, by design"
        if kind.startswith("Velora"):
            return "VeLoRA makes the gradient of A from compressed activations, by design"
    return None


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].clone()


def _dot(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    return sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(some, others, strict=True))


def _not_finite(tensors: Sequence[torch.Tensor]) -> str | None:
    return None if all(bool(t.isfinite().all()) for t in tensors) else "the gradient is not finite"
