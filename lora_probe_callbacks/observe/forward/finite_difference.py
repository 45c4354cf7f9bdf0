"""What a step does to the loss, and what the gradient says that it does.

The arguments of the training forward and the cotangent ``c`` of what left the model are kept. When the
step has ended, the forward is run again: ``<c, out(theta') - out(theta)>`` is the change that the step
makes, to first order, and ``sum <g, theta' - theta>`` the one that the gradient ``g`` predicts. At
``theta +- h g / |g|`` the same gives a central difference, which a right gradient meets. Where it does not,
a gradient is made anew at another point and asked there: see :meth:`_Trial.aside`.
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

from lora_probe_callbacks.facts import StepResponse
from lora_probe_callbacks.observe.forward.backward_passes import hooked_by_others
from lora_probe_callbacks.observe.forward.candidate import tensors_in
from lora_probe_callbacks.observe.forward.replay import MOST_BYTES, KeptForward
from lora_probe_callbacks.restore.model import holding, own_gradients

__all__ = ["ResponseObserver", "aliased"]

# The perturbation h, relative to the adapter's norm. Large enough to be seen in 16 bits, and the
# third order is still small: measured on tiny models, see tests/test_step_response.py.
_SIZE = 0.005
_ASIDE = 0.3  # how far off a second look is taken, likewise
_SAMPLE = 1024

_Place = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]  # outputs, and what the moving parameters hold


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

    def measure(
        self, step: int, framework_step: int, scale: float, unsettled: Callable[[StepResponse], bool]
    ) -> StepResponse:
        """Run the forward again, before and after the step and around it.

        Args:
            step: The step that was made.
            framework_step: Its number in the framework.
            scale: What the loss was multiplied with.
            unsettled: Says of what is measured so far whether more has to be known.

        Returns:
            What the step did, or why that is not known.
        """
        try:
            with nullcontext() if self._forward is None else self._forward.kept.several():
                return self._measure(step, framework_step, scale, unsettled)
        except Exception as error:  # the user's own code is run again: it may count its calls, or need more memory
            reason = f"run again, the forward raised {type(error).__name__}: {error}"
            return StepResponse(step=step, framework_step=framework_step, why_not=reason)

    def _measure(
        self, step: int, framework_step: int, scale: float, unsettled: Callable[[StepResponse], bool]
    ) -> StepResponse:
        found = StepResponse(step=step, framework_step=framework_step)
        forward, why_not = self._forward, self._why_not or self._incomplete()
        if why_not is not None or forward is None:
            return dataclasses.replace(found, why_not=why_not)
        if not any(bool(g.any()) for g in self._gradients.values()):
            return dataclasses.replace(found, why_not="no gradient arrived at the adapter", passing=True)
        moving = sorted(self._gradients)
        g = [self._gradients[i].float() for i in moving]
        trial = _Trial(forward, self._tensors, self._before, moving)
        if not _finite([*g, *forward.cotangents.values()]):
            return dataclasses.replace(found, why_not="the gradient is not finite", passing=True)
        here = trial.here()
        why_not = forward.differs(here[0])
        if why_not is not None:
            return dataclasses.replace(found, why_not=why_not)
        now = (forward.kept.run(), [self._tensors[i].detach() for i in moving])
        predicted, measured = _expected(g, here, now), forward.change(here, now)
        found = dataclasses.replace(found, predicted=predicted / scale, measured=measured / scale)
        behind, ahead = trial.around(g, _SIZE)
        central, *sides = (trial.ratio(g, *ends) for ends in ((behind, ahead), (here, ahead), (behind, here)))
        noise = forward.resolution(here) / abs(_expected(g, behind, ahead) or math.nan)
        found = dataclasses.replace(found, central=central, sides=(sides[0], sides[1]), noise=noise)
        # In doubt, a gradient of the outputs alone and of another place is asked, by as few forwards as will do.
        generator = torch.Generator().manual_seed(0)
        if unsettled(found):
            trial = trial.aside(generator)
            g = trial.gradients()
            found = dataclasses.replace(found, own=trial.ratio(g, *trial.around(g, _SIZE / 2)))
        if unsettled(found):
            found = dataclasses.replace(found, again=trial.ratio(g, *trial.around(g, _SIZE)))
        if unsettled(found):
            found = dataclasses.replace(found, noise=max(noise, trial.noise(g, _SIZE / 2, generator)))
        return found

    def _incomplete(self) -> str | None:
        if self._forward is None or not self._forward.cotangents:
            return "no gradient arrived at the output of a watched forward"
        if not self._before:
            return "the parameters before the step are not known"
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

    def change(self, before: _Place, after: _Place) -> float:
        """``<c, after - before>`` over the outputs that received a gradient."""
        c = list(self.cotangents.values())
        return _dot([x.float() for x in c], [after[0][i].float() - before[0][i].float() for i in self.cotangents])

    def resolution(self, here: _Place) -> float:
        """What a rounding of every output by itself makes of ``<c, out>``."""
        parts = (
            (c.float() * here[0][i].float()) * torch.finfo(here[0][i].dtype).eps for i, c in self.cotangents.items()
        )
        return math.sqrt(sum(float(part.square().sum()) for part in parts))


@dataclass(eq=False, slots=True)
class _Trial:
    """The forward around one point ``theta``."""

    forward: _Followed
    tensors: list[torch.Tensor]  # all of the adapter
    theta: list[torch.Tensor]  # what they hold there
    moving: list[int]  # which of them have a gradient

    def here(self) -> _Place:
        """What comes out at ``theta``."""
        return self._at([self.theta[i] for i in self.moving])

    def around(self, direction: Sequence[torch.Tensor], size: float) -> tuple[_Place, _Place]:
        """What comes out behind ``theta`` and ahead of it.

        Args:
            direction: Where to, one tensor for each that moves.
            size: How far, relative to the norm of the adapter.

        Returns:
            The two places.
        """
        norm = math.sqrt(_dot(direction, direction))
        h = size * self._length() / norm if norm else 0.0
        start = [self.theta[i] for i in self.moving]
        # As the parameters' own types can hold it: what is asked of the gradient is the move that was made.
        behind, ahead = (
            [(t.float() + s * h * x).to(t) for t, x in zip(start, direction, strict=True)] for s in (-1, 1)
        )
        return self._at(behind), self._at(ahead)

    def ratio(self, g: Sequence[torch.Tensor], before: _Place, after: _Place) -> float:
        """How the loss changes between two places, over what a gradient says of that: 1 where it is right."""
        expected = _expected(g, before, after)
        return self.forward.change(before, after) / expected if expected else math.nan

    def noise(self, g: Sequence[torch.Tensor], size: float, generator: torch.Generator) -> float:
        """What rounding makes of a ratio along a gradient: how far the halves of a random direction are from one line.

        Curvature is next to nothing there, and the gradient has no part in it.

        Args:
            g: The gradient here.
            size: How far, relative to the norm of the adapter.
            generator: Draws the direction.

        Returns:
            One standard deviation, of one sample.
        """
        along = 2 * size * self._length() * math.sqrt(_dot(g, g))
        (behind, ahead), here = self.around([_drawn(x, generator) for x in g], size), self.here()
        bend = self.forward.change(here, ahead) - self.forward.change(behind, here)
        return abs(bend) / math.sqrt(3) / along if along else math.inf  # three times a difference's variance

    def aside(self, generator: torch.Generator) -> _Trial:
        """Go to another point, off in a random direction.

        In 16 bits a layer's output and what the adapter adds to it are rounded to their sum. While B is about
        zero, that sum lies on the grid already, a small move rounds back to it, and the loss changes by less
        than a right gradient says, in all layers and at all small distances alike. From between the steps of
        the grid, as many elements go too far as stay behind.

        Args:
            generator: Draws the direction.

        Returns:
            The forward around that point.
        """
        drawn = [_drawn(t, generator) for t in self.theta]
        d = _ASIDE * self._length() / math.sqrt(_dot(drawn, drawn))
        theta = [(t.float() + d * x).to(t) for t, x in zip(self.theta, drawn, strict=True)]
        return _Trial(self.forward, self.tensors, theta, self.moving)

    def gradients(self) -> list[torch.Tensor]:
        """The gradient of ``<c, out>`` alone: nothing in it that did not leave through the outputs."""
        kept, cotangents = self.forward.kept, self.forward.cotangents
        leaves = [p for p in kept.module.parameters() if p.requires_grad]
        with holding(self.tensors, self.theta), own_gradients(leaves):
            with kept.again(), torch.enable_grad():
                outputs = kept.call()
                chosen = [(outputs[i], c) for i, c in cotangents.items() if outputs[i].requires_grad]
                if chosen:
                    torch.autograd.backward([o for o, _ in chosen], [c for _, c in chosen])
            moving = [self.tensors[i] for i in self.moving]
            return [torch.zeros_like(t).float() if t.grad is None else t.grad.float() for t in moving]

    def _at(self, values: list[torch.Tensor]) -> _Place:
        """What comes out where those that move hold other values."""
        theta = dict(enumerate(self.theta)) | dict(zip(self.moving, values, strict=True))
        with holding(self.tensors, list(theta.values())):
            return self.forward.kept.run(), values

    def _length(self) -> float:
        return math.sqrt(sum(float(t.float().square().sum()) for t in self.theta))


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
        if foreign or hooked_by_others(parameter):
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


def _expected(g: Sequence[torch.Tensor], before: _Place, after: _Place) -> float:
    """What a gradient says of the way between two places."""
    return _dot(g, [a.float() - b.float() for a, b in zip(after[1], before[1], strict=True)])


def _drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


def _finite(tensors: Sequence[torch.Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors)
