"""The batch, the adapter switched on and off, the four variants, and the projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lora_probe_callbacks.debug.loading import ADAPTER, CannotLoadError, one_line
from lora_probe_callbacks.debug.results import OnOff, Projection, TensorGradient, Tokens, VariantResult
from lora_probe_callbacks.estimators.batches import PromptBatch
from lora_probe_callbacks.estimators.directions import UpdateDirection
from lora_probe_callbacks.estimators.logprobs import sequence_logprobs
from lora_probe_callbacks.estimators.projections import Backend, per_prompt_projection
from lora_probe_callbacks.estimators.surrogates import entropy_surrogate, policy_gradient_surrogate
from lora_probe_callbacks.observe.model.inventory import Unit

__all__ = ["Called", "batches", "on_off_of", "projections_of", "variant_of"]

_NUDGE = 1e-2  # standard deviation of what is added to a B of zeros


def batches(model: PeftModel, tokens: Tokens) -> tuple[PromptBatch, PromptBatch]:
    """A U-batch with advantages and an E-batch, of random tokens, with no prompt in common."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings.weight, Tensor)
    vocabulary = embeddings.weight.shape[0]
    room = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max(tokens.prompt_lens) + max(tokens.gen_lens)
    if isinstance(room, int) and longest > room:
        raise CannotLoadError(
            f"got prompts and responses of {longest} tokens together, expected at most {room}, the positions of the "
            "base: lower --prompt-lens or --gen-lens"
        )
    generator = torch.Generator().manual_seed(tokens.seed)

    def some(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (length,), generator=generator).tolist())

    prompts: dict[tuple[int, ...], None] = {}
    for attempt in range(100 * tokens.batch):
        prompts[some(tokens.prompt_lens[attempt % len(tokens.prompt_lens)])] = None
        if len(prompts) == 2 * tokens.batch:
            break
    else:
        raise CannotLoadError(
            f"got a vocabulary of {vocabulary} tokens and prompts of {tokens.prompt_lens} tokens, expected room for "
            f"{2 * tokens.batch} different prompts: raise --prompt-lens"
        )
    device = embeddings.weight.device
    halves = [list(prompts)[: tokens.batch], list(prompts)[tokens.batch :]]
    count = tokens.batch * tokens.G
    lengths = [tokens.gen_lens[i % len(tokens.gen_lens)] for i in range(count)]
    batches = []
    for half in halves:
        responses = [some(length) for length in lengths]
        grouped = [responses[i : i + tokens.G] for i in range(0, count, tokens.G)]
        advantages = torch.randn(tokens.batch, tokens.G, generator=generator)
        batch = PromptBatch.from_ragged(half, grouped, pad_id=0, advantages=advantages)
        batches.append(batch.to(device))
    return batches[0], batches[1]


class Called:
    """Which layers run: a layer that text does not reach (a vision tower, an expert) is not judged."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self.seen: set[int] = set()

    def __enter__(self) -> None:
        self._handles = [
            unit.layer.called.register_forward_pre_hook(lambda *_, i=i: self.seen.add(i))
            for i, unit in enumerate(self._units)
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def on_off_of(model: PeftModel, units: Sequence[Unit], batch: PromptBatch) -> OnOff:
    """How far the logits move when the adapter is switched on, and where that is 0, with its B nudged."""
    with torch.no_grad():
        with model.disable_adapter():
            off = _logits(model, batch)
        delta = _largest(_logits(model, batch) - off)
        if math.isnan(delta) or math.isinf(delta):
            return OnOff(delta, None, "not-finite")
        if delta:
            return OnOff(delta, None, "active")
        with _nudged(units):
            nudged = _largest(_logits(model, batch) - off)
    return OnOff(delta, nudged, "b-is-zero" if nudged else "inactive")


@contextmanager
def _nudged(units: Sequence[Unit]) -> Iterator[None]:
    """B a little away from where it is, and back again bit by bit."""
    tensors = [t for unit in units for slot in unit.slots if slot.role == "B" and (t := slot.tensor) is not None]
    former = [t.detach().clone() for t in tensors]
    generator = torch.Generator().manual_seed(0)
    try:
        for t in tensors:
            t.data.add_(torch.randn(t.shape, generator=generator).to(t.device, t.dtype), alpha=_NUDGE)
        yield
    finally:
        for t, contents in zip(tensors, former, strict=True):
            t.data.copy_(contents)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


class _Wrapper(nn.Module):
    """What DistributedDataParallel is to a forward: another module object around the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def variant_of(
    variant: str, what: str, model: PeftModel, units: Sequence[Unit], batch: PromptBatch, reference: Tensor
) -> VariantResult:
    """S `[B, G]` by one of the ways A to D, its backward, and its distance from ``reference``."""
    model.zero_grad(set_to_none=True)
    backward: str | None = None
    S: Tensor
    if variant == "C":
        with model.disable_adapter():  # the backward inside: checkpoints run the forward again
            S = _logprobs(model, batch)
            backward = _backward(S)
    elif variant == "D":
        with _not_activated(model):
            S = _logprobs(model, batch)
        backward = _backward(S)
    else:
        S = _logprobs(_Wrapper(model) if variant == "B" else model, batch)
        backward = _backward(S)
    gradients = tuple(_gradient(slot.name, slot.role, slot.tensor) for unit in units for slot in unit.slots)
    model.zero_grad(set_to_none=True)
    return VariantResult(
        variant=variant,  # type: ignore[arg-type]
        what=what,
        requires_grad=S.requires_grad,
        backward=backward,
        difference=_largest(S.detach() - reference),
        gradients=gradients,
    )


@contextmanager
def _not_activated(model: PeftModel) -> Iterator[None]:
    """The adapter is loaded, and `set_adapter` comes on exit."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    whole = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    try:
        for layer in layers:
            layer.set_adapter([])
        for wrapper in whole:  # these know no empty list of adapters (peft 0.21)
            wrapper.enable_adapters(False)
        yield
    finally:
        for wrapper in whole:
            wrapper.enable_adapters(True)
        model.set_adapter(ADAPTER)


def _backward(S: Tensor) -> str | None:
    if not S.requires_grad:
        return "S does not require grad: a backward would raise"
    try:
        S.mean().backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return f"the backward raised {type(error).__name__}: {one_line(error, 120)}"
    return None


def _gradient(name: str, role: str, tensor: Tensor | None) -> TensorGradient:
    g = None if tensor is None else tensor.grad
    if g is None:
        return TensorGradient(name, role, "none", None)
    norm = float(g.detach().double().norm())
    if not math.isfinite(norm):
        return TensorGradient(name, role, "not-finite", None)
    return TensorGradient(name, role, "non-zero" if norm else "zero", norm)


def _logits(call: nn.Module, batch: PromptBatch) -> Tensor:
    """The logits that predict the responses, `[B * G, T - prompt_boundary, V]`, in float32 or float64."""
    mask = batch.attention_mask.flatten(0, 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = call(batch.sequences.flatten(0, 1), attention_mask=mask.long(), position_ids=positions).logits
    responses: Tensor = logits[:, batch.prompt_boundary - 1 : -1]
    return responses.to(torch.promote_types(responses.dtype, torch.float32))


def _logprobs(call: nn.Module, batch: PromptBatch) -> Tensor:
    """S as training code often computes it, `[B, G]`: nothing is activated here."""
    log_pi = torch.log_softmax(_logits(call, batch), -1)
    targets, counted = (t.flatten(0, 1)[:, batch.prompt_boundary :] for t in (batch.sequences, batch.response_mask))
    token = log_pi.gather(-1, targets[..., None])[..., 0]
    return token.masked_fill(~counted, 0.0).sum(-1).view(batch.sequences.shape[:2])


def projections_of(
    model: PeftModel, U: PromptBatch, E: PromptBatch, seed: int, progress: Callable[[str], None]
) -> tuple[Projection, ...]:
    """s_n `[B]` of E on the direction of U by every backend, each with its relative error to the loop."""

    def policy_loss(module: nn.Module) -> Tensor:
        return policy_gradient_surrogate(sequence_logprobs(module, U, adapter=ADAPTER), U)

    def entropy_loss(module: nn.Module) -> Tensor:
        return entropy_surrogate(sequence_logprobs(module, E, adapter=ADAPTER), E)

    backends: tuple[Backend, ...] = ("loop", "doubled_rank", "alpha")
    progress("the update direction mu_Y")
    try:
        mu_Y = UpdateDirection.from_loss(model, policy_loss, lr=1.0)
    except (ValueError, RuntimeError) as error:
        why = f"there is no direction: {one_line(error)}"
        return tuple(Projection(backend, None, why, None) for backend in backends)
    found: list[Projection] = []
    loop: Tensor | None = None
    for backend in backends:
        progress(f"s_n by {backend}")
        try:
            s = per_prompt_projection(
                model,
                entropy_loss,
                mu_Y,
                example_of_row=E.example_of_row if backend == "doubled_rank" else None,
                backend=backend,
                self_check="never",  # the loop is the check
            )
        except (NotImplementedError, RuntimeError, ValueError) as error:
            found.append(Projection(backend, None, one_line(error), None))
            continue
        loop = s if backend == "loop" else loop
        length = None if loop is None else float(loop.double().norm())
        distance = None if loop is None else float((s.double() - loop.double()).norm())
        error_ = None if length is None or distance is None else distance / length if length else float(distance > 0)
        found.append(Projection(backend, tuple(s.tolist()), None, error_))
    return tuple(found)
