"""What the debugger is asked, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_probe_callbacks.estimators.projections import Backend

__all__ = ["SCHEMA", "Diagnosis", "OnOff", "Projection", "TensorGradient", "Tokens", "VariantResult"]

SCHEMA = 1


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
