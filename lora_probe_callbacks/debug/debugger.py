"""The isolated debugger of a variance path: is it the adapter, or is it the code around it?

On synthetic tokens, without the user's training code, the log-probs ``S`` of the same responses are
computed four times, and backpropagated to the adapter:

| variant | the forward | a healthy adapter |
| --- | --- | --- |
| A | through the PEFT module, adapter active before it | gets gradients |
| B | through a wrapper around that module (as DDP has one), adapter active before it | gets the same |
| C | adapters disabled during the forward | gets none |
| D | adapter activated after the forward | gets none |

What A and B show is what the adapter can do; what C and D show is how the faults look that no loss tells of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lora_probe_callbacks.debug.loading import ADAPTER, CannotLoadError, Source, load, one_line
from lora_probe_callbacks.estimators.batches import PromptBatch
from lora_probe_callbacks.estimators.directions import UpdateDirection
from lora_probe_callbacks.estimators.logprobs import sequence_logprobs
from lora_probe_callbacks.estimators.projections import Backend, per_prompt_projection
from lora_probe_callbacks.estimators.surrogates import entropy_surrogate, policy_gradient_surrogate
from lora_probe_callbacks.observe.model.inventory import Unit, take_inventory

__all__ = [
    "SCHEMA",
    "Diagnosis",
    "OnOff",
    "Projection",
    "TensorGradient",
    "Tokens",
    "VariantResult",
    "diagnose",
    "run",
]

SCHEMA = 1

# Two ways to one number agree to this, relative to its length: by the lowest precision in the forward.
_AGREE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.2}
_NUDGE = 1e-2  # standard deviation of what is added to a B of zeros

_NAMES = {
    "A": "PEFT module, adapter active before",
    "B": "wrapper, adapter active before",
    "C": "adapter disabled in the forward",
    "D": "adapter activated after the forward",
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """The synthetic batch: B prompts with G responses each; lengths are cycled through.

    Args:
        batch: B.
        G: Responses to each prompt, 2 at least.
        prompt_lens: Lengths of the prompts.
        gen_lens: Lengths of the responses.
        seed: Of the tokens and of a fresh adapter.
    """

    batch: int = 6
    G: int = 4
    prompt_lens: tuple[int, ...] = (48,)
    gen_lens: tuple[int, ...] = (64,)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class OnOff:
    """What switching the adapter on does to the logits.

    Attributes:
        delta: Largest change of a logit.
        delta_nudged: The same with B nudged away from zero (and put back), where ``delta`` is exactly 0.
        verdict: ``active``; ``b-is-zero``: a fresh adapter, which changes nothing yet; ``inactive``:
            it changes nothing whatever B is; ``not-finite``.
    """

    delta: float
    delta_nudged: float | None
    verdict: Literal["active", "b-is-zero", "inactive", "not-finite"]


@dataclass(frozen=True, slots=True)
class TensorGradient:
    """The gradient that S gives one adapter tensor.

    Attributes:
        name: Name of the tensor.
        role: ``A``, ``B`` or ``other``.
        state: ``none``, ``zero``, ``non-zero`` or ``not-finite``.
        norm: Its Euclidean norm, or None where that is no number.
    """

    name: str
    role: str
    state: Literal["none", "zero", "non-zero", "not-finite"]
    norm: float | None


@dataclass(frozen=True, slots=True)
class VariantResult:
    """One of the four variants.

    Attributes:
        variant: ``A`` to ``D``.
        what: What it does, in words.
        requires_grad: S requires a gradient.
        backward: None, or why there was none (nothing to differentiate, an error).
        difference: Largest difference of S from that of ``sequence_logprobs``, in nats.
        gradients: One entry for each adapter tensor.
    """

    variant: Literal["A", "B", "C", "D"]
    what: str
    requires_grad: bool
    backward: str | None
    difference: float
    gradients: tuple[TensorGradient, ...]

    def count(self, state: str) -> int:
        """The tensors whose gradient is in a state."""
        return sum(g.state == state for g in self.gradients)


@dataclass(frozen=True, slots=True)
class Projection:
    """The projections ``s_n`` of the E-batch by one backend.

    Attributes:
        backend: ``doubled_rank``, ``loop`` or ``alpha``.
        s: One value for each prompt, or None where the backend did not run.
        why_not: Why it did not.
        error_to_loop: Relative L2 distance from the loop.
    """

    backend: Backend
    s: tuple[float, ...] | None
    why_not: str | None
    error_to_loop: float | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the debugger has found.

    Attributes:
        tensors: Number of adapter tensors.
        layers: Number of adapted layers.
        device: Where it ran.
        dtype: The lowest floating type of the model.
        on_off: What switching the adapter on does.
        variants: A, B, C and D.
        projections: s_n by each backend.
        problems: What is wrong with the adapter itself; empty if it is sound.
        notes: What could not be judged, and why.
        conclusion: What all of it says about the user's own code.
    """

    tensors: int
    layers: int
    device: str
    dtype: str
    on_off: OnOff
    variants: tuple[VariantResult, ...]
    projections: tuple[Projection, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    conclusion: str

    @property
    def healthy(self) -> bool:
        """Nothing is wrong with the adapter itself."""
        return not self.problems


def run(source: Source, tokens: Tokens, progress: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Load a base and an adapter and look at them.

    Args:
        source: What to load.
        tokens: The synthetic batch.
        progress: Is told what begins.

    Returns:
        The diagnosis.

    Raises:
        CannotLoadError: If something cannot be loaded, or has no room for the batch.
    """
    if tokens.batch < 2 or tokens.G < 2:
        raise CannotLoadError(
            f"got --batch {tokens.batch} and --G {tokens.G}, expected at least 2 of both: one prompt has no "
            "variance, one response no leave-one-out mean"
        )
    if not tokens.prompt_lens or not tokens.gen_lens or min(*tokens.prompt_lens, *tokens.gen_lens) < 1:
        raise CannotLoadError("got lengths below 1, expected at least one token in every prompt and every response")
    torch.manual_seed(tokens.seed)
    progress("loading the base and the adapter")
    model = load(source)
    return diagnose(model, tokens, progress)


def diagnose(model: PeftModel, tokens: Tokens, progress: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Look at a loaded model; its parameters are afterwards what they were.

    Args:
        model: A PEFT model with one adapter, active and trainable.
        tokens: The synthetic batch.
        progress: Is told what begins.

    Returns:
        The diagnosis.

    Raises:
        CannotLoadError: If the model has no room for the batch.
    """
    units = [unit for unit in take_inventory([("", model)]).units if unit.adapter == ADAPTER]
    U, E = _batches(model, tokens)
    called = _Called(units)
    progress("adapter on and off")
    with called:
        on_off = _on_off(model, units, E.split(1)[0])  # one prompt will do: the logits are large
    progress("S by sequence_logprobs")
    reference = sequence_logprobs(model, E, adapter=ADAPTER).detach()
    variants = []
    for variant, what in _NAMES.items():
        progress(f"variant {variant}: {what}")
        variants.append(_variant(variant, what, model, units, E, reference))
    projections = _projections(model, U, E, tokens.seed, progress)
    dtype = _lowest(model)
    problems, notes = _judge(units, called.seen, on_off, variants, projections, dtype)
    parameter = next(iter(model.parameters()))
    return Diagnosis(
        tensors=sum(len(unit.slots) for unit in units),
        layers=len(units),
        device=str(parameter.device),
        dtype=str(dtype).removeprefix("torch."),
        on_off=on_off,
        variants=tuple(variants),
        projections=projections,
        problems=tuple(problems),
        notes=tuple(notes),
        conclusion=_conclusion(problems, on_off, variants, sum(len(unit.slots) for unit in units)),
    )


# --- the batch ----------------------------------------------------------------------------------


def _batches(model: PeftModel, tokens: Tokens) -> tuple[PromptBatch, PromptBatch]:
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


# --- on and off ---------------------------------------------------------------------------------


class _Called:
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


def _on_off(model: PeftModel, units: Sequence[Unit], batch: PromptBatch) -> OnOff:
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


# --- the variants -------------------------------------------------------------------------------


class _Wrapper(nn.Module):
    """What DistributedDataParallel is to a forward: another module object around the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _variant(
    variant: str, what: str, model: PeftModel, units: Sequence[Unit], batch: PromptBatch, reference: Tensor
) -> VariantResult:
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


# --- the projections ----------------------------------------------------------------------------


def _projections(
    model: PeftModel, U: PromptBatch, E: PromptBatch, seed: int, progress: Callable[[str], None]
) -> tuple[Projection, ...]:
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


# --- judging ------------------------------------------------------------------------------------


def _judge(
    units: Sequence[Unit],
    called: set[int],
    on_off: OnOff,
    variants: Sequence[VariantResult],
    projections: Sequence[Projection],
    dtype: torch.dtype,
) -> tuple[list[str], list[str]]:
    agree = _AGREE[dtype]
    problems, notes = [], []
    A, B = variants[0], variants[1]
    dead = _dead(A, units, called) or _dead(B, units, called)
    if on_off.verdict == "inactive" and dead:
        problems.append(
            "switching the adapter on changes no logit, whatever its B is: its scaling is 0, its A is zero, or the "
            "forward does not use its layers"
        )
    elif on_off.verdict == "inactive":
        notes.append("switching the adapter on changes no logit yet, but it gets gradients")
    if on_off.verdict == "not-finite":
        problems.append("the logits with the adapter on are not finite: the adapter, or the base, holds inf or nan")
    uncalled = [unit for i, unit in enumerate(units) if i not in called]
    if uncalled:
        notes.append(
            f"{len(uncalled)} of {len(units)} adapted layers did not run on text ({uncalled[0].layer.name}): not judged"
        )
    problems += dead
    if not dead and not _same(A, B, agree):
        problems.append("the gradients through the wrapper (B) are not those through the module (A)")
    for projection in projections:
        error = projection.error_to_loop
        if error is not None and not error <= agree:
            problems.append(
                f"s_n by {projection.backend} is {error:.2g} from the loop (relative), allowed {agree:g} in {dtype}"
            )
    return problems, notes


def _dead(variant: VariantResult, units: Sequence[Unit], called: set[int]) -> list[str]:
    """A layer whose A or B gets a signal trains; with B = 0 it is B, with A = 0 it is A."""
    if variant.backward is not None:
        return [f"variant {variant.variant}: {variant.backward}"]
    by_name = {g.name: g for g in variant.gradients}
    states = [[by_name[slot.name].state for slot in unit.slots] for unit in units]
    bad = [u for u, s in zip(units, states, strict=True) if "not-finite" in s]
    dead = [
        unit
        for i, (unit, s) in enumerate(zip(units, states, strict=True))
        if i in called and "non-zero" not in s and "not-finite" not in s
    ]
    problems = []
    if bad:
        problems.append(
            f"the gradient is not finite in {len(bad)} of {len(units)} layers (variant {variant.variant}; "
            f"{bad[0].layer.name})"
        )
    if dead:
        problems.append(
            f"{len(dead)} of {len(units)} layers get no gradient other than zero although the adapter is active "
            f"(variant {variant.variant}; {dead[0].layer.name})"
        )
    return problems


def _same(A: VariantResult, B: VariantResult, agree: float) -> bool:
    return all(
        a.state == b.state and abs((a.norm or 0) - (b.norm or 0)) <= agree * max(a.norm or 0, b.norm or 0)
        for a, b in zip(A.gradients, B.gradients, strict=True)
    )


def _conclusion(problems: Sequence[str], on_off: OnOff, variants: Sequence[VariantResult], tensors: int) -> str:
    if problems:
        return (
            f"The fault is in the adapter or its base, not in the code around them: {problems[0]}. Make the adapter "
            "anew, or save it again from a healthy run, before looking at the training code."
        )
    reached = variants[0].count("non-zero")
    rest = (
        f"; the other {tensors - reached} are exactly zero because B is still zero, as in every fresh adapter"
        if on_off.verdict == "b-is-zero" and reached < tensors
        else ""
    )
    loud = [v.variant for v in variants[2:] if v.backward is not None]
    silent = [v.variant for v in variants[2:] if v.backward is None]
    told = ""
    if loud:
        told += (
            f" In {' and '.join(loud)} the backward fails here, the lucky case: where anything else is trained "
            "(input gradients for checkpointing, a head), it runs and says nothing."
        )
    if silent:
        told += f" In {' and '.join(silent)} the backward runs without an error and the adapter gets nothing: silent."
    return (
        f"The adapter is sound: active before the forward, S gives {reached} of {tensors} tensors a gradient, through "
        f"the module (A) and through a wrapper (B){rest}. Disabled during the forward (C), or activated after it (D), "
        f"it gets none.{told} So if s_n is zero or a gradient is missing in your own run, look at the order and the "
        "objects in your code: S was computed before set_adapter or inside disable_adapter(), or on another module "
        "than the one that the direction and the optimizer were built on."
    )


def _lowest(model: PeftModel) -> torch.dtype:
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for module in model.modules():
        computed = vars(module).get("compute_dtype")
        if isinstance(computed, torch.dtype):
            types.add(computed)
    return min(types & set(_AGREE), key=lambda d: (torch.finfo(d).bits, -torch.finfo(d).eps))
