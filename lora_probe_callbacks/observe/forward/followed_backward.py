"""Keep, of one backward pass of a step, what came to the outputs of the model and what came to the adapter.

With gradient accumulation that is the first of several; where several forwards share one backward, it is all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_probe_callbacks.observe.forward.backward_passes import hooked_by_others
from lora_probe_callbacks.observe.forward.candidate import tensors_in
from lora_probe_callbacks.observe.forward.loss_outside import LossTape
from lora_probe_callbacks.observe.forward.replay import MOST_BYTES, KeptForward
from lora_probe_callbacks.observe.model.wrappers import is_compiled

__all__ = ["BackwardObserver", "Followed", "aliased", "sample"]

_SAMPLE = 1024
_FORWARDS = 8  # of one backward


@dataclass(eq=False, slots=True)
class Followed:
    """A forward and the gradients that arrived at what left it.

    Attributes:
        kept: What it takes to run it again.
        samples: Some elements of every floating output.
        order: The numbers of the outputs with a graph, as they were handed on.
        cotangents: By the number of the floating output.
        large: Outputs whose gradient is too large to be kept.
        head: The output head, where it ran once.
        entered: Some elements of what entered it.
        at_head: The gradient of that.
    """

    kept: KeptForward
    samples: list[torch.Tensor]
    order: list[int] = field(default_factory=list)
    cotangents: dict[int, torch.Tensor] = field(default_factory=dict)
    large: set[int] = field(default_factory=set)
    head: nn.Module | None = None
    entered: torch.Tensor | None = None
    at_head: torch.Tensor | None = None

    @property
    def received(self) -> bool:
        """A gradient arrived at some output."""
        return bool(self.cotangents or self.large)

    @property
    def cut(self) -> nn.Module | None:
        """The output head, if what enters it stands for what leaves it: the gradient of that is too large."""
        return self.head if self.large else None

    def why_not(self) -> str | None:
        """Say why the change of the loss cannot be followed through its outputs, or None."""
        if not self.large:
            return self.kept.changed()
        if self.at_head is None or any(c.numel() > 1 for c in self.cotangents.values()):
            return "the gradient of an output is larger than 256 MiB, and no known output head could stand for it"
        return self.kept.changed()

    def ends(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The gradients that stand for the loss, and some elements of what they belong to."""
        if self.large:
            assert self.at_head is not None
            assert self.entered is not None
            return [self.at_head], [self.entered]
        return list(self.cotangents.values()), [self.samples[i] for i in self.cotangents]

    def call(self) -> list[torch.Tensor]:
        """Run it again as it is; returns what :meth:`ends` belongs to."""
        if self.cut is not None:
            return [self.kept.call_until(self.cut)]
        outputs = self.kept.call()
        return [outputs[i] for i in self.cotangents]

    def outputs(self) -> list[torch.Tensor | None]:
        """Run it again; returns the outputs with a graph, None for those without a gradient."""
        with self.kept.again(), torch.no_grad():
            found = self.kept.call()
        return [found[i] if i in self.cotangents else None for i in self.order]

    def run(self) -> list[torch.Tensor]:
        """The same without gradients, and all state comes back."""
        with self.kept.again(), torch.no_grad():
            return self.call()


class BackwardObserver:
    """Follows the forwards of one backward pass from their outputs to the update.

    Args:
        tensors: The adapter's tensors.
        hook: Makes a hook of a method and its first argument.
        tape: Records how the loss is made of the outputs, if that is wanted.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        hook: Callable[[Callable[..., None], object], Callable[..., None]],
        tape: LossTape | None = None,
    ) -> None:
        self.tape = tape
        self.tensors = list(tensors)
        self.why_not: str | None = None
        self.gradients: dict[int, torch.Tensor] = {}
        self.before: list[torch.Tensor] = []
        self._stands_for = _tied(self.tensors)
        self._hook = hook
        self._followed: list[Followed] = []
        self._complete = False
        self._watched: set[int] = set()  # ids of those that carry a hook of ours
        self._handles: list[RemovableHandle] = []
        self._head: tuple[nn.Module, RemovableHandle] | None = None
        self._entered: list[torch.Tensor] = []  # what the output head was given in this forward

    @property
    def followed(self) -> int:
        """How many forwards there were."""
        return len(self._followed)

    @property
    def forwards(self) -> list[Followed]:
        """Those whose outputs have received a gradient."""
        return [f for f in self._followed if f.received]

    # --- forward ----------------------------------------------------------------------------

    def forward_begins(self, module: nn.Module) -> None:
        """Watch what enters the output head, whose output may be too large to keep its gradient."""
        self._let_head_go()
        self._entered.clear()
        if self.tape is not None:
            self.tape.paused = True
        if self._complete or self.why_not is not None:
            return
        head = None if any(is_compiled(m) for m in module.modules()) else output_head(module)
        if head is not None:
            hook = self._hook(self._enters, None)
            self._head = head, head.register_forward_pre_hook(hook)

    def _enters(self, _: None, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._entered += [a for a in args[:1] if isinstance(a, torch.Tensor) and a.requires_grad]

    def _let_head_go(self) -> nn.Module | None:
        head, self._head = self._head, None
        if head is None:
            return None
        head[1].remove()
        return head[0]

    def after(self, kept: KeptForward, output: Any) -> Any:
        """Follow a candidate.

        Args:
            kept: The candidate.
            output: What it returned.

        Returns:
            The output to hand on: where several outputs carry a graph, aliases of them, so that uses of
            one inside the model (the loss is made of the logits) are told from uses outside.
        """
        head, entered = self._let_head_go(), self._entered[:]
        self._entered.clear()
        if self.forwards:  # a further micro-batch: one is enough
            self._finish()
        if self._complete or self.why_not is not None:
            return output
        if len(self._followed) == _FORWARDS:
            self.why_not = f"more than {_FORWARDS} forwards in one backward"
        else:
            self.why_not = kept.why_not() or _why_not(kept.module, self.tensors, self._watched)
        if self.why_not is not None:
            self.forget()
            return output
        self._watch_tensors()
        floating = [t for t in tensors_in(output) if t.is_floating_point()]
        followed = Followed(kept, [sample(t) for t in floating])
        self._followed.append(followed)
        if head is not None and len(entered) == 1:
            followed.head, followed.entered = head, sample(entered[0])
            self._listen(entered[0], self._receive_at_head, followed)
        place = {id(t): index for index, t in reversed(list(enumerate(floating)))}
        outputs = {id(t): t for t in floating if t.requires_grad}
        seen = outputs
        if len(outputs) > 1:
            seen = {}
            output = aliased(output, seen)
        for former, tensor in seen.items():
            self._listen(tensor, self._receive, (followed, place[former]))
        followed.order = [place[former] for former in seen]
        if self.tape is not None:
            self.tape.starts_from(list(seen.values()))
        return output

    def _watch_tensors(self) -> None:
        for index, tensor in enumerate(self.tensors):
            if tensor.requires_grad and id(tensor) not in self._watched:
                self._watched.add(id(tensor))
                self._listen(tensor, self._add, self._stands_for[index])

    def _listen(self, tensor: torch.Tensor, method: Callable[..., None], first: object) -> None:
        self._handles.append(tensor.register_hook(self._hook(method, first)))  # type: ignore[no-untyped-call]

    # --- backward ---------------------------------------------------------------------------

    def _add(self, index: int, gradient: torch.Tensor | None) -> None:
        # None: an operation without a backward lies between (bitsandbytes' inference kernel), or its output is unused.
        if gradient is None or self.why_not is not None:
            return
        known = self.gradients.get(index)
        try:
            # A copy: what is accumulated into .grad may be this very memory, and be clipped later.
            self.gradients[index] = gradient.detach().clone() if known is None else known.add_(gradient.detach())
        except Exception as error:  # out of memory; it would end the user's backward
            self.why_not = f"keeping the gradients raised {type(error).__name__}: {error}"
            self.gradients.clear()

    def _receive(self, where: tuple[Followed, int], cotangent: torch.Tensor | None) -> None:
        if cotangent is None:
            return
        followed, index = where
        if index in followed.large or cotangent.numel() * cotangent.element_size() > MOST_BYTES:
            followed.large.add(index)
            return
        known = followed.cotangents.get(index)
        followed.cotangents[index] = cotangent.detach() if known is None else known + cotangent.detach()

    def _receive_at_head(self, followed: Followed, cotangent: torch.Tensor | None) -> None:
        if cotangent is not None and cotangent.numel() * cotangent.element_size() <= MOST_BYTES:
            known = followed.at_head
            followed.at_head = cotangent.detach() if known is None else known + cotangent.detach()

    def stepping(self, *, inside: bool = False) -> None:
        """The update is about to come: keep what it starts from, once.

        Args:
            inside: The forward comes after this moment, in a closure.
        """
        if self.why_not is not None or not (self.forwards or inside):
            return
        if not self.before:
            self.before = [tensor.detach().clone() for tensor in self.tensors]
        if self.forwards:
            self._finish()

    def _finish(self) -> None:
        """What was wanted is there: take the hooks away."""
        self._complete = True
        self._unhook()
        if self.tape is not None:
            self.tape.close()

    def incomplete(self) -> str | None:
        """Say what is missing to measure anything, or None."""
        if self.why_not is not None:
            return self.why_not
        if not self.forwards:
            return "no gradient arrived at the output of a watched forward"
        if not self.before:
            return "the parameters before the step are not known"
        return next((reason for f in self.forwards if (reason := f.why_not())), None)

    def beyond_cut(self) -> frozenset[int]:
        """The tensors of an output head whose input stands for its output: nothing is known of these."""
        heads = [f.cut for f in self.forwards if f.cut is not None]
        held = {id(p) for head in heads for p in head.parameters()}
        return frozenset(i for i, t in enumerate(self.tensors) if id(t) in held)

    def forget(self) -> None:
        """Remove the hooks and let go of all tensors."""
        self._let_head_go()
        self._entered.clear()
        self._unhook()
        if self.tape is not None:
            self.tape.forget()
        self.gradients.clear()
        self.before.clear()
        self._followed.clear()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watched.clear()


class _Alias(torch.autograd.Function):
    """The same numbers in the same memory, with a place of their own in the graph.

    Unlike a view, an alias keeps its hooks when it is changed in place, as the Trainer does with the loss.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


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
            made[id(output)] = _Alias.apply(output)  # type: ignore[no-untyped-call]
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


def output_head(module: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, as transformers' models name it, or None."""
    for part in module.modules():
        named = getattr(part, "get_output_embeddings", None)
        if callable(named):
            try:
                head = named()
            except Exception:  # of a model that has none
                return None
            return head if isinstance(head, nn.Module) else None
    return None


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements, all of them where there are few."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].clone()


def _tied(tensors: Sequence[torch.Tensor]) -> list[int]:
    """For each tensor the first one in the same memory: what moves one of them moves both."""
    first: dict[tuple[int, torch.Size], int] = {}
    return [first.setdefault((t.data_ptr(), t.shape), index) if t.numel() else index for index, t in enumerate(tensors)]


def _why_not(module: nn.Module, tensors: Sequence[torch.Tensor], ours: Collection[int]) -> str | None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "gradients are averaged over ranks, and outputs are of one rank"
    if any(hasattr(t, "to_local") or hasattr(t, "ds_id") for t in tensors):
        return "the adapter is sharded"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "the forward runs inside a functional transform"
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
