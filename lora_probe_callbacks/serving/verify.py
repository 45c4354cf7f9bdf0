"""Compare everything that should hold the trained adapter with the model that was trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lora_probe_callbacks.checks._base import Verdict
from lora_probe_callbacks.checks._catalogue import all_checks
from lora_probe_callbacks.facts import Facts, ServedFact, ServingFacts
from lora_probe_callbacks.report.findings import Finding
from lora_probe_callbacks.serving.diagnosis import diagnose
from lora_probe_callbacks.serving.errors import CannotCompareError
from lora_probe_callbacks.serving.limits import limits
from lora_probe_callbacks.serving.live import LiveModel
from lora_probe_callbacks.serving.report import ServingReport, ServingResult
from lora_probe_callbacks.serving.scoring import as_rows
from lora_probe_callbacks.serving.targets import Target

__all__ = ["verify_serving"]


def verify_serving(
    model: nn.Module,
    tokens: object,
    *targets: Target,
    checkpoints: Sequence[str | os.PathLike[str]] = (),
) -> ServingReport:
    """Does what reloads, merges, exports or serves the adapter behave as the trained model does?

    Both sides score the same tokens, each with the adapter and without. The model is afterwards what it was, bit for
    bit.

    Args:
        model: The trained model, its adapter active.
        tokens: Token ids, ``[sequences, tokens]`` or lists; the report says if there are too few.
        *targets: :class:`Reloaded`, :class:`Merged`, :class:`Endpoint`, :class:`Engine`.
        checkpoints: Folders of earlier states of the adapter: a target that is stale is known by them.

    Returns:
        One result for each target; ``exit_code`` is 0 if all are served, 1 if one is not, 2 if one cannot be told.

    Raises:
        CannotCompareError: If the model itself cannot be scored: no adapter, merged, sharded, or other tokens.

    Example::

        report = verify_serving(model, tokens, Reloaded("out/adapter"), Merged("bfloat16"),
                                Endpoint("http://localhost:8000", model="ad", base_model="base"))
        print(report)
    """
    live = LiveModel(model, as_rows(tokens))
    _ = live.on  # what is wrong with the model itself is raised, not told of each target
    found = limits(live)
    results = [_result(live, target, [Path(path) for path in checkpoints]) for target in targets]
    findings = [result.finding for result in results if result.finding is not None]
    return ServingReport(results, found, findings + _findings(ServingFacts(limits=found)))


def _result(live: LiveModel, target: Target, checkpoints: Sequence[Path]) -> ServingResult:
    name = type(target).__name__
    try:
        fact = diagnose(live, target.scored(live), checkpoints)
    except CannotCompareError as error:
        return ServingResult(name, error=str(error))
    except Exception as error:  # of the user's own function, or of a framework
        return ServingResult(name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return ServingResult(fact.target, fact, next(iter(_of(fact)), None))


def _of(fact: ServedFact) -> list[Finding]:
    return _findings(ServingFacts(served=(fact,)))


def _findings(facts: ServingFacts) -> list[Finding]:
    """What the checks say of it."""
    found = []
    for check in all_checks():
        if "serving" not in check.needs:
            continue
        verdict: Verdict = check.judge(Facts.of(facts))
        if verdict.status in ("warn", "fail"):
            found.append(
                Finding(
                    code=check.code,
                    name=check.name,
                    family=check.family,
                    status=verdict.status,
                    message=verdict.message,
                    evidence=verdict.evidence,
                    fix=verdict.fix or check.fix,
                    step=0,
                    framework_step=0,
                    last_step=0,
                    cause=verdict.cause,
                )
            )
    return found
