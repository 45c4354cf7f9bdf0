"""The language between the rooms: observers hand facts in, checks and proofs read them.

Frozen dataclasses of numbers, strings and columns. No tensor, no module and no judgement is in here, so a check can
be tested without a model, and a fact can be written to a record as it is.

A **slot** is one place that holds one adapter tensor: (module object, attribute). A **unit** is
one adapter in one adapted layer; it owns the slots of its A, its B and whatever else its variant
has. Both are numbered; the numbers are indices into the columns of ``Facts.slots`` and into ``Facts.units``.
"""

from lora_probe_callbacks.facts.checkpoint import FileFacts, ResumedFact, SavedFact
from lora_probe_callbacks.facts.columns import (
    Bools,
    Floats,
    Gradients,
    History,
    Ints,
    Slots,
    Update,
    count,
    indices,
    mask,
)
from lora_probe_callbacks.facts.device import DeviceFacts
from lora_probe_callbacks.facts.estimator import EstimatorFact, EstimatorFacts
from lora_probe_callbacks.facts.facts import Facts
from lora_probe_callbacks.facts.forward import Calls, ForwardFact, ForwardFacts, ReferenceFact, StepResponse
from lora_probe_callbacks.facts.model import (
    BaseDrift,
    CopiesFact,
    Coverage,
    ModelFacts,
    OtherAdapter,
    Request,
    StartFact,
    TokenRowsFact,
    TokenTable,
    UnitFact,
    UnitStart,
)
from lora_probe_callbacks.facts.path import FEW, Look, Path
from lora_probe_callbacks.facts.proof import CLAIMS, Claim, Proof
from lora_probe_callbacks.facts.ranks import NEAR, SAMPLE, RankFacts, RankReport, RanksFact, Sample, Sums, Wrapping
from lora_probe_callbacks.facts.run import Accumulation, RunFacts, When
from lora_probe_callbacks.facts.serving import RolloutFact, RolloutVerdict, ServedFact, ServingFacts, ServingVerdict
from lora_probe_callbacks.facts.supervision import SampleRow, Supervision, SupervisionFacts, SupervisionTotals
from lora_probe_callbacks.facts.words import Mode, Moment, Role, WrapperKind

__all__ = [
    "CLAIMS",
    "FEW",
    "NEAR",
    "SAMPLE",
    "Accumulation",
    "BaseDrift",
    "Bools",
    "Calls",
    "Claim",
    "CopiesFact",
    "Coverage",
    "DeviceFacts",
    "EstimatorFact",
    "EstimatorFacts",
    "Facts",
    "FileFacts",
    "Floats",
    "ForwardFact",
    "ForwardFacts",
    "Gradients",
    "History",
    "Ints",
    "Look",
    "Mode",
    "ModelFacts",
    "Moment",
    "OtherAdapter",
    "Path",
    "Proof",
    "RankFacts",
    "RankReport",
    "RanksFact",
    "ReferenceFact",
    "Request",
    "ResumedFact",
    "Role",
    "RolloutFact",
    "RolloutVerdict",
    "RunFacts",
    "Sample",
    "SampleRow",
    "SavedFact",
    "ServedFact",
    "ServingFacts",
    "ServingVerdict",
    "Slots",
    "StartFact",
    "StepResponse",
    "Sums",
    "Supervision",
    "SupervisionFacts",
    "SupervisionTotals",
    "TokenRowsFact",
    "TokenTable",
    "UnitFact",
    "UnitStart",
    "Update",
    "When",
    "WrapperKind",
    "Wrapping",
    "count",
    "indices",
    "mask",
]
