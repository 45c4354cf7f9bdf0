"""The facts: what the observers hand to the checks.

Frozen dataclasses of numbers, strings and indices; what is made anew for every tensor at every decision is a named
tuple, which takes a quarter of the time. No tensor, no module and no judgement is
in here, so a check can be tested without a model, and a fact can be written to a record as it is.

A **slot** is one place that holds one adapter tensor: (module object, attribute). A **unit** is
one adapter in one adapted layer; it owns the slots of its A, its B and whatever else its variant
has. Both are numbered; the numbers are indices into ``Facts.slots`` and ``Facts.units``.
"""

from lora_probe_callbacks.facts.checkpoint import ResumedFact, SavedFact
from lora_probe_callbacks.facts.estimator import EstimatorFact
from lora_probe_callbacks.facts.facts import Facts
from lora_probe_callbacks.facts.forward import ForwardFact, StepResponse
from lora_probe_callbacks.facts.model import (
    BaseDrift,
    CopiesFact,
    Coverage,
    OtherAdapter,
    ReferenceFact,
    Request,
    SlotFact,
    StartFact,
    TokenRowsFact,
    TokenTable,
    UnitFact,
    UnitStart,
)
from lora_probe_callbacks.facts.ranks import NEAR, SAMPLE, RankReport, RanksFact, Sample, Sums, Wrapping
from lora_probe_callbacks.facts.update import GradientFact, MoveFact, SlotHistory, StepUpdate
from lora_probe_callbacks.facts.words import Mode, Moment, Role, Values, WrapperKind

__all__ = [
    "NEAR",
    "SAMPLE",
    "BaseDrift",
    "CopiesFact",
    "Coverage",
    "EstimatorFact",
    "Facts",
    "ForwardFact",
    "GradientFact",
    "Mode",
    "Moment",
    "MoveFact",
    "OtherAdapter",
    "RankReport",
    "RanksFact",
    "ReferenceFact",
    "Request",
    "ResumedFact",
    "Role",
    "Sample",
    "SavedFact",
    "SlotFact",
    "SlotHistory",
    "StartFact",
    "StepResponse",
    "StepUpdate",
    "Sums",
    "TokenRowsFact",
    "TokenTable",
    "UnitFact",
    "UnitStart",
    "Values",
    "WrapperKind",
    "Wrapping",
]
