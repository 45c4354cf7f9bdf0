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

from collections.abc import Callable

import torch
from peft import PeftModel

from lora_probe_callbacks.debug._judging import conclusion, judge, lowest_precision
from lora_probe_callbacks.debug._variants import Called, batches, on_off_of, projections_of, variant_of
from lora_probe_callbacks.debug.loading import ADAPTER, CannotLoadError, Source, load
from lora_probe_callbacks.debug.results import Diagnosis, Tokens
from lora_probe_callbacks.estimators.logprobs import sequence_logprobs
from lora_probe_callbacks.observe.model.inventory import take_inventory

__all__ = ["VARIANTS", "diagnose", "run"]

VARIANTS = {
    "A": "PEFT module, adapter active before",
    "B": "wrapper, adapter active before",
    "C": "adapter disabled in the forward",
    "D": "adapter activated after the forward",
}


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
    U, E = batches(model, tokens)
    called = Called(units)
    progress("adapter on and off")
    with called:
        on_off = on_off_of(model, units, E.split(1)[0])  # one prompt will do: the logits are large
    progress("S by sequence_logprobs")
    reference = sequence_logprobs(model, E, adapter=ADAPTER).detach()
    variants = []
    for variant, what in VARIANTS.items():
        progress(f"variant {variant}: {what}")
        variants.append(variant_of(variant, what, model, units, E, reference))
    projections = projections_of(model, U, E, tokens.seed, progress)
    dtype = lowest_precision(model)
    problems, notes = judge(units, called.seen, on_off, variants, projections, dtype)
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
        conclusion=conclusion(problems, on_off, variants, sum(len(unit.slots) for unit in units)),
    )
