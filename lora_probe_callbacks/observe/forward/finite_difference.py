"""Is the gradient that arrived the one of the loss?

With the cotangent ``c`` of what left the model, and the model's outputs ``out`` at the adapter ``theta``, the loss is
to first order ``v(theta) = <c, out(theta)>``. Its gradient is ``g``, and along any direction ``d``

    v(theta + h d) - v(theta - h d)  =  2 h <g, d>  +  O(h^3)

Both sides are measured: two forwards without gradients, and a product. Where they differ, a gradient is made anew from
the outputs alone, in 16 bits at another point: see :meth:`_Trial.aside`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from lora_probe_callbacks.facts import StepResponse
from lora_probe_callbacks.observe.forward.followed_backward import BackwardObserver, Followed, sample
from lora_probe_callbacks.restore.model import holding, own_gradients

__all__ = ["Plan", "measure"]

# The distance h |d|, relative to the adapter's norm. Large enough to be seen, and the third order is still small:
# measured on tiny models, see benchmarks/gradients.py. In 16 bits a part of the adapter has to go further.
_SIZE, _SIZE_16 = 0.005, 0.02
_ASIDE = 0.3  # how far off a second look is taken, likewise
_DIRECTIONS = 2  # in which the outputs are moved where the loss is made of them outside the model
_SAME = 1e-3  # how far the loss made again may be from what it was
_MOST = 10  # a tensor with a small gradient goes so much further than the middle one

_Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted of one touch.

    Attributes:
        choose: Which tensors to move, of those with a gradient and of those whose gradient is exactly zero.
        unsettled: Says of what is measured so far whether more has to be known.
        bends: How far from one line earlier touches have found the loss, in its own units.
        response: Also measure what the update has done to the loss.
        scale: What the loss was multiplied with.
    """

    choose: Callable[[Sequence[int], Sequence[int]], Sequence[int]]
    unsettled: Callable[[StepResponse], bool]
    bends: Sequence[float] = ()
    response: bool = False
    scale: float = 1.0


def measure(watched: BackwardObserver, plan: Plan, step: int, framework_step: int) -> StepResponse:
    """Run the forwards again around the point at which the gradient was made.

    Args:
        watched: What was kept of the step that was made.
        plan: What is wanted.
        step: Its number.
        framework_step: Its number in the framework.

    Returns:
        What was measured, or why that is not known.
    """
    found = StepResponse(step=step, framework_step=framework_step)
    try:
        with ExitStack() as kept:
            for forward in watched.forwards:
                kept.enter_context(forward.kept.several())
            return _measure(watched, plan, found)
    except Exception as error:  # the user's own code is run again: it may count its calls, or need more memory
        return dataclasses.replace(found, why_not=f"run again, the forward raised {type(error).__name__}: {error}")


def _measure(watched: BackwardObserver, plan: Plan, found: StepResponse) -> StepResponse:
    why_not = watched.incomplete()
    if why_not is not None:
        return dataclasses.replace(found, why_not=why_not)
    gradients = {i: g.float() for i, g in watched.gradients.items() if i not in watched.beyond_cut()}
    norms = dict(zip(gradients, map(float, _norms(list(gradients.values()))), strict=True))
    if not any(norms.values()):
        return dataclasses.replace(found, why_not="no gradient arrived at the adapter", passing=True)
    if not all(map(math.isfinite, norms.values())):
        return dataclasses.replace(found, why_not="the gradient is not finite", passing=True)
    moving = list(plan.choose([i for i, n in norms.items() if n], [i for i, n in norms.items() if not n]))
    trial = _Trial(watched.forwards, watched.tensors, watched.before, moving)
    found = dataclasses.replace(found, slots=tuple(moving), sixteen=trial.sixteen)
    found = _of_loss(watched, trial, found)
    if not any(norms[i] for i in moving):
        return _of_zero(trial, math.hypot(*norms.values()), plan, found)
    whole = len(moving) == sum(map(bool, norms.values()))
    found = _of_gradient(trial, {i: gradients[i] for i in moving}, plan, found, whole=whole)
    if plan.response and found.why_not is None and found.own is None:  # in doubt, there were forwards enough
        found = _response(trial, watched, gradients, plan, found)
    return found


def _response(
    trial: _Trial, watched: BackwardObserver, gradients: Mapping[int, torch.Tensor], plan: Plan, found: StepResponse
) -> StepResponse:
    """What the update has done to the loss, and what the gradient says that it does."""
    moved = [watched.tensors[i].detach().float() - watched.before[i].float() for i in gradients]
    predicted = _dot(list(gradients.values()), moved)
    before = trial.kept_value()
    if before is None:
        before = trial.here().value
    after = sum(_value(f, f.run()) for f in trial.forwards)
    return dataclasses.replace(found, predicted=predicted / plan.scale, measured=(after - before) / plan.scale)


def _of_gradient(
    trial: _Trial, gradients: Mapping[int, torch.Tensor], plan: Plan, found: StepResponse, *, whole: bool
) -> StepResponse:
    g = list(gradients.values())
    size = _SIZE_16 if trial.sixteen and not whole else _SIZE
    direction = g if whole else _levelled(g)
    behind, ahead = trial.around(direction, size)
    if (why_not := trial.differs(behind, ahead)) is not None:
        return dataclasses.replace(found, why_not=why_not)
    change = _expected(g, behind, ahead)
    found = dataclasses.replace(found, central=_ratio(g, behind, ahead), change=abs(change) / plan.scale)
    found = _with_middle(found, trial, behind, ahead, trial.kept_value(), plan)
    # In doubt, a gradient of the outputs alone is asked, by as few forwards as will do.
    here = trial
    if plan.unsettled(found) and not trial.sixteen:
        found = dataclasses.replace(found, near=_ratio(g, *trial.around(direction, size / 4)))
    generator = torch.Generator().manual_seed(0)
    if plan.unsettled(found):
        # What rounding swallows makes the loss change by less than a right gradient says, never by more.
        swallowed = trial.sixteen and (found.central or 0.0) < 1
        trial = trial.aside(generator) if swallowed else trial
        g = trial.gradients()
        direction = g if whole else _levelled(g)
        found = dataclasses.replace(found, own=_ratio(g, *trial.around(direction, size / 2)))
    if plan.unsettled(found) and trial.sixteen:
        found = dataclasses.replace(found, again=_ratio(g, *trial.around(direction, size)))
    if plan.unsettled(found):
        middle = here.here()
        if (why_not := here.repeats(middle)) is not None:
            return dataclasses.replace(found, why_not=why_not)
        found = _with_middle(found, here, behind, ahead, middle.value, plan)
    if plan.unsettled(found) and trial.sixteen:
        noise = trial.noise(direction, size / 2, generator) / abs(_along(g, direction, trial, size / 2))
        found = dataclasses.replace(found, noise=max(found.noise, noise))
    return found


def _of_loss(watched: BackwardObserver, trial: _Trial, found: StepResponse) -> StepResponse:
    """Where the loss is made outside the model: is what arrived at the outputs its gradient?

    What its backward leaves out lies at right angles to what it gives, so the outputs are moved at random.

    Args:
        watched: What was kept of the step.
        trial: The forwards.
        found: What is known so far.

    Returns:
        The same, and what the loss does where the outputs are moved.
    """
    tape = watched.tape
    if tape is None or not tape.complete or any(f.large for f in watched.forwards):
        return found
    c = [f.cotangents.get(i) for f in watched.forwards for i in f.order]
    if len(watched.forwards) != watched.followed or all(x is None or x.numel() == 1 for x in c):
        return found  # the loss is made inside
    with trial.there():
        outputs = [out for f in watched.forwards for out in f.outputs()]
    middle = tape.again(outputs)
    if not abs(middle - tape.was()) <= _SAME * abs(tape.was()):
        return found  # a kernel that torch does not see, or random numbers
    worst, noise, generator = 0.0, 0.0, torch.Generator().manual_seed(found.step)
    for _ in range(_DIRECTIONS):
        drawn = [None if o is None else _drawn(o, generator) * o.float().square().mean().sqrt() for o in outputs]
        size = _SIZE_16 if trial.sixteen else _SIZE
        behind, ahead = (
            [
                None if o is None or d is None else (o.float() + s * size * d).to(o)
                for o, d in zip(outputs, drawn, strict=True)
            ]
            for s in (-1, 1)
        )
        parts = [
            x.float() * (a.float() - b.float())
            for x, a, b in zip(c, ahead, behind, strict=True)
            if x is not None and a is not None and b is not None
        ]
        unit = math.sqrt(_dot(parts, parts))  # one standard deviation of what is expected
        before, after = tape.again(behind), tape.again(ahead)
        off = after - before - float(sum(part.sum(dtype=torch.float64) for part in parts))
        if unit and abs(off) / unit >= abs(worst):
            worst, noise = off / unit, abs(after + before - 2 * middle) / math.sqrt(3) / unit
    return dataclasses.replace(found, outside=worst, outside_noise=noise)


def _of_zero(trial: _Trial, norm: float, plan: Plan, found: StepResponse) -> StepResponse:
    """Where the gradient is exactly zero, no move must change the loss: a random one is as good as any."""
    generator = torch.Generator().manual_seed(found.step)
    direction = [_drawn(trial.tensors[i], generator) for i in trial.moving]
    behind, ahead = trial.around(direction, _SIZE)
    unit = 2 * _SIZE * trial.length() * norm  # the change along the gradient of all tensors, over the same distance
    if (why_not := trial.differs(behind, ahead)) is not None:
        return dataclasses.replace(found, why_not=why_not)
    found = dataclasses.replace(found, stray=(ahead.value - behind.value) / unit, change=unit / plan.scale)
    if plan.unsettled(found):
        found = _with_middle(found, trial, behind, ahead, trial.here().value, plan)
    if plan.unsettled(found):
        behind, ahead = trial.around(direction, _SIZE / 4)
        found = dataclasses.replace(found, near=4 * (ahead.value - behind.value) / unit)
    return found


def _with_middle(
    found: StepResponse, trial: _Trial, behind: _Place, ahead: _Place, middle: float | None, plan: Plan
) -> StepResponse:
    """Add what the middle tells: both halves of the way would lie on one line but for curvature and rounding.

    One bend alone may be small by chance, so in 16 bits the middle one of all that were seen counts as well.

    Args:
        found: What is known so far.
        trial: The forwards.
        behind: One end.
        ahead: The other.
        middle: The loss half way, None if it is not known.
        plan: What is wanted.

    Returns:
        The same, with its sides and its noise.
    """
    change = (found.change or 0.0) * plan.scale
    if not change:
        return found
    noise = trial.resolution()
    if middle is not None:
        bend = ahead.value + behind.value - 2 * middle
        found = dataclasses.replace(found, bend=abs(bend) / plan.scale)
        if found.central is not None:
            sign = math.copysign(1.0, (ahead.value - behind.value) * found.central)
            apart = sign * bend / change
            found = dataclasses.replace(found, sides=(found.central + apart, found.central - apart))
        bends = sorted([*plan.bends, abs(bend) / plan.scale])
        usual = bends[len(bends) // 2] * plan.scale if trial.sixteen else 0.0
        noise = max(noise, max(abs(bend), usual) / math.sqrt(3))  # it has three times the variance of the difference
    return dataclasses.replace(found, noise=noise / change)


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    """What comes out at one point: the loss to first order, some elements, and what the moving tensors hold there."""

    value: float
    samples: list[torch.Tensor]
    at: list[torch.Tensor]


@dataclass(eq=False, slots=True)
class _Trial:
    """The forwards around one point ``theta``."""

    forwards: list[Followed]
    tensors: list[torch.Tensor]  # all of the adapter
    theta: list[torch.Tensor]  # what they hold there
    moving: list[int]  # which of them are moved

    @property
    def sixteen(self) -> bool:
        """Something in the forward is rounded to 16 bits."""
        return any(f.kept.in_sixteen_bits() for f in self.forwards)

    def here(self) -> _Place:
        """What comes out at ``theta``."""
        return self._at([self.theta[i] for i in self.moving])

    def around(self, direction: _Tensors, size: float) -> tuple[_Place, _Place]:
        """What comes out behind ``theta`` and ahead of it.

        Args:
            direction: Where to, one tensor for each that moves.
            size: How far, relative to the norm of the adapter.

        Returns:
            The two places.
        """
        norm = math.sqrt(_dot(direction, direction))
        h = size * self.length() / norm if norm else 0.0
        start = [self.theta[i] for i in self.moving]
        # As the parameters' own types can hold it: what is asked of the gradient is the move that was made.
        behind, ahead = (
            [(t.float() + s * h * x).to(t) for t, x in zip(start, direction, strict=True)] for s in (-1, 1)
        )
        return self._at(behind), self._at(ahead)

    def kept_value(self) -> float | None:
        """The loss at the point of the step, where all that stands for it was kept; None elsewhere."""
        total = 0.0
        for forward in self.forwards:
            cotangents, samples = forward.ends()
            if any(c.numel() != s.numel() for c, s in zip(cotangents, samples, strict=True)):
                return None
            total += _dot([c.float().reshape(-1) for c in cotangents], [s.float() for s in samples])
        return total

    def differs(self, behind: _Place, ahead: _Place) -> str | None:
        """Say so if what the forward gave does not lie between two repeats, as far as that can be told."""
        samples = [s for f in self.forwards for s in f.ends()[1]]
        for a, b, s in zip(ahead.samples, behind.samples, samples, strict=True):
            if a.shape != s.shape or a.dtype != s.dtype:
                return _OTHER
            off = ((a.float() + b.float()) / 2 - s.float()).norm()
            if not bool(off <= 0.05 * s.float().norm() + (a.float() - b.float()).norm()):
                return _OTHER
        return None

    def repeats(self, here: _Place) -> str | None:
        """Say so if a repeat did not give the outputs of the forward."""
        samples = [s for f in self.forwards for s in f.ends()[1]]
        same = all(
            bool((a - b).float().norm() <= 1e-3 * b.float().norm()) for a, b in zip(here.samples, samples, strict=True)
        )
        return None if same else _OTHER

    def resolution(self) -> float:
        """What a rounding of every output by itself makes of the loss."""
        parts = 0.0
        for forward in self.forwards:
            for c, s in zip(*forward.ends(), strict=True):
                eps = torch.finfo(s.dtype).eps
                # Of a large output only some elements are kept: their mean square stands for the others'.
                parts += float(c.float().square().mean() * s.float().square().mean()) * c.numel() * eps**2
        return math.sqrt(parts)

    def noise(self, direction: _Tensors, size: float, generator: torch.Generator) -> float:
        """What rounding makes of a difference: how far the halves of a random move are from one line.

        Curvature is next to nothing there, and the gradient has no part in it.

        Args:
            direction: Says how far each tensor goes.
            size: How far all of them together, relative to the norm of the adapter.
            generator: Draws the direction.

        Returns:
            One standard deviation, of one sample.
        """
        drawn = [_drawn(x, generator) * float(x.norm() / math.sqrt(x.numel())) for x in direction]
        (behind, ahead), here = self.around(drawn, size), self.here()
        return abs(ahead.value + behind.value - 2 * here.value) / math.sqrt(3)

    def aside(self, generator: torch.Generator) -> _Trial:
        """Go to another point, off in a random direction.

        In 16 bits a layer's output and what the adapter adds to it are rounded to their sum. While B is about
        zero, that sum lies on the grid already, a small move rounds back to it, and the loss changes by less
        than a right gradient says, in all layers and at all small distances alike. From between the steps of
        the grid, as many elements go too far as stay behind.

        Args:
            generator: Draws the direction.

        Returns:
            The forwards around that point.
        """
        drawn = [_drawn(t, generator) for t in self.theta]
        d = _ASIDE * self.length() / math.sqrt(_dot(drawn, drawn))
        theta = [(t.float() + d * x).to(t) for t, x in zip(self.theta, drawn, strict=True)]
        return _Trial(self.forwards, self.tensors, theta, self.moving)

    def gradients(self) -> list[torch.Tensor]:
        """The gradient of ``<c, out>`` alone: nothing in it that did not leave through the outputs."""
        leaves = {id(p): p for f in self.forwards for p in f.kept.module.parameters() if p.requires_grad}
        with holding(self.tensors, self.theta), own_gradients(list(leaves.values())):
            for forward in self.forwards:
                with forward.kept.again(), torch.enable_grad():
                    chosen = [(o, c) for o, c in zip(forward.call(), forward.ends()[0], strict=True) if o.requires_grad]
                    if chosen:
                        torch.autograd.backward([o for o, _ in chosen], [c for _, c in chosen])
            return [self._gradient_of(self.tensors[i]) for i in self.moving]

    def _gradient_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Summed over all tensors in the same memory."""
        alike = [t for t in self.tensors if t.data_ptr() == tensor.data_ptr() and t.shape == tensor.shape]
        found = [t.grad.float() for t in alike if t.grad is not None]
        return torch.stack(found).sum(0) if found else torch.zeros_like(tensor, dtype=torch.float32)

    def there(self, values: Mapping[int, torch.Tensor] | None = None) -> AbstractContextManager[None]:
        """Inside, the adapter is at ``theta``, but for the tensors that are given values of their own."""
        theta = dict(enumerate(self.theta)) | dict(values or {})
        written = self._without_twins()
        return holding([self.tensors[i] for i in written], [theta[i] for i in written])

    def _at(self, values: list[torch.Tensor]) -> _Place:
        """What comes out where those that move hold other values."""
        value, samples = 0.0, []
        with self.there(dict(zip(self.moving, values, strict=True))):
            for forward in self.forwards:
                ends = forward.run()
                value += _value(forward, ends)
                samples += [sample(end) for end in ends]
        return _Place(value, samples, values)

    def _without_twins(self) -> list[int]:
        """One of several tensors in the same memory, the one that moves if one does: writing another undoes it."""
        chosen: dict[tuple[int, torch.Size], int] = {}
        for i in [*self.moving, *range(len(self.tensors))]:
            chosen.setdefault((self.tensors[i].data_ptr(), self.tensors[i].shape), i)
        return list(chosen.values())

    def length(self) -> float:
        """The norm of the adapter."""
        return math.hypot(*map(float, _norms(self.theta)))


_OTHER = "run again, the forward gave other outputs: state that cannot be restored, or stale casts"


def _value(forward: Followed, ends: _Tensors) -> float:
    """``<c, out>`` of one forward."""
    return _dot([c.float() for c in forward.ends()[0]], [end.float() for end in ends])


def _ratio(g: _Tensors, before: _Place, after: _Place) -> float:
    """How the loss changes between two places, over what a gradient says of that: 1 where it is right."""
    expected = _expected(g, before, after)
    return (after.value - before.value) / expected if expected else math.nan


def _expected(g: _Tensors, before: _Place, after: _Place) -> float:
    """What a gradient says of the way between two places."""
    return _dot(g, [a.float() - b.float() for a, b in zip(after.at, before.at, strict=True)])


def _along(g: _Tensors, direction: _Tensors, trial: _Trial, size: float) -> float:
    """What a gradient says of a way of that size along a direction, both halves of it."""
    norm = math.sqrt(_dot(direction, direction))
    return 2 * size * trial.length() * _dot(g, direction) / norm if norm else math.nan


def _levelled(g: _Tensors) -> list[torch.Tensor]:
    """Along the gradient, but with an equal part for each tensor: else the largest would speak for all of them.

    Args:
        g: The gradient.

    Returns:
        A direction.
    """
    norms = list(map(float, _norms(g)))
    middle = sorted(norms)[len(norms) // 2]
    return [x / n * min(1 / n, _MOST / middle) if n else x for x, n in zip(g, norms, strict=True)]


def _dot(some: _Tensors, others: _Tensors) -> float:
    return float(sum((a * b).sum(dtype=torch.float64) for a, b in zip(some, others, strict=True)))


def _norms(tensors: _Tensors) -> Collection[torch.Tensor]:
    return torch.stack([n.float() for n in torch._foreach_norm(list(tensors))]).cpu() if tensors else ()


def _drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)
