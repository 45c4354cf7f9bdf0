"""Do the base weights under the adapter stay as they are?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lora_probe_callbacks.facts import BaseDrift, Floats
from lora_probe_callbacks.observe.device.transfer import PLAIN, Readout, batches, group, kind, local
from lora_probe_callbacks.observe.model.inventory import AdaptedLayer

__all__ = ["BaseSample"]

MADE_ANEW = 0.3  # cosine of what A was and is; of two random ones it is near 0, and training turns A by little


class BaseSample:
    """A few elements of a few base weights, to see whether merging has moved them.

    A restart that merges the adapter into the weight and makes it anew (ReLoRA) is no drift: where A has nothing
    in common with what it was, the weight is sampled afresh.

    Merging adds the adapter's product to the weight and unmerging subtracts it; in 16 bits and in
    quantised storage the weight does not come back to the same value
    (https://github.com/huggingface/trl/issues/6688).

    Args:
        layers: The adapted layers; ``max_layers`` of them, evenly spread, are sampled.
        max_layers: How many.
        elements: How many elements of each, at most.
    """

    @torch.no_grad()
    def __init__(self, layers: Sequence[AdaptedLayer], max_layers: int = 8, elements: int = 1024) -> None:
        usable = [(unit, layer) for unit, layer in enumerate(layers) if _at_hand(layer) is not None]
        self._elements = elements
        chosen = usable[:: max(1, math.ceil(len(usable) / max_layers))][:max_layers]
        self._units, self._layers = [unit for unit, _ in chosen], [layer for _, layer in chosen]
        self._start = [self._take(layer).clone() for layer in self._layers]
        self._partner = [self._take_a(layer).clone() for layer in self._layers]
        self._known: dict[int, tuple[float, float]] = {}  # number of a layer to its last change, and what that meant
        self._last: dict[int, float] = {}  # number of a layer to its change at the last look
        self._group()

    def _group(self) -> None:
        """Samples of one kind are compared by one kernel."""
        self._grouping = group(self._start)
        self._rows = batches([self._start[i] for i in self._grouping.order], self._grouping)

    def _take(self, layer: AdaptedLayer) -> torch.Tensor:
        weight = _at_hand(layer)
        return torch.empty(0) if weight is None else self._few(weight)

    def _take_a(self, layer: AdaptedLayer) -> torch.Tensor:
        a = next(iter(layer.module.lora_A.parameters()), None)  # type: ignore[union-attr]
        return torch.empty(0) if a is None else self._few(a).float()

    def _few(self, tensor: torch.Tensor) -> torch.Tensor:
        mine = local(tensor)
        stride = max(1, mine.numel() // self._elements)
        if type(mine) in PLAIN and mine.is_contiguous():  # one view in place of two, at every step
            return mine.as_strided((min(mine.numel(), self._elements),), (stride,))
        return mine.reshape(-1)[: stride * self._elements : stride]

    def read(self, readout: Readout) -> range | None:
        """Put the norm of the change of every sampled weight into ``readout``. For use under ``no_grad``."""
        if not self._layers:
            return None
        samples = list(map(self._take, self._layers))
        anew = [i for i, now in enumerate(samples) if kind(now) != kind(self._start[i])]
        for i in anew:  # bitsandbytes quantises at the first use, and models get moved: a new beginning
            self._start[i] = samples[i].clone()
        if anew:
            self._group()
        for i, layer in enumerate(self._layers):
            if layer.merged:  # the adapter is in the weight at this moment: that is no drift
                samples[i] = self._start[i]
        now = batches([samples[i] for i in self._grouping.order], self._grouping)
        pairs = zip(now, self._rows, strict=True)
        changes = [now.float() - start.float() if _is_plain(start) else (now != start).float() for now, start in pairs]
        return readout.add_row_norms(changes, 2)

    def moved(self, values: Floats) -> dict[int, bool]:
        """Unit to whether its weight has changed since the last look, of those that are sampled."""
        last, self._last = self._last, dict(zip(self._grouping.order, values.tolist(), strict=True))
        return {self._units[i]: change != last.get(i, 0.0) for i, change in self._last.items()}

    def fact(self, values: Floats, merges: int) -> BaseDrift:
        """The largest drift among the sampled layers."""
        drifts = {i: self._drift(i, change) for i, change in zip(self._grouping.order, values, strict=True)}
        worst = max(sorted(drifts), key=drifts.__getitem__)
        return BaseDrift(drifts[worst], self._layers[worst].name, merges, not _is_plain(self._start[worst]))

    @torch.no_grad()
    def _drift(self, i: int, change: float) -> float:
        """What a change comes to. As a rule there is none; else the device is asked once more."""
        last, drift = self._known.get(i, (0.0, 0.0))
        if change == last:
            return drift
        start, before, a = self._start[i], self._partner[i], self._take_a(self._layers[i])
        if kind(a) != kind(before):
            self._partner[i] = before = a.clone()
        size = float(start.float().norm()) if _is_plain(start) else math.sqrt(start.numel())
        then, now, apart = (float(t.norm()) for t in (before, a, a - before))
        small = change < size  # init_weights() makes the base anew as well
        if small and then * now and (then**2 + now**2 - apart**2) / (2 * then * now) < MADE_ANEW:
            self._start[i], self._partner[i] = self._take(self._layers[i]).clone(), a.clone()
            self._known.pop(i, None)
            self._last[i] = 0.0
            self._group()
            return 0.0
        # Of codes the fraction that changed, which is the square of this quotient.
        drift = (change / max(size, 1e-30)) ** (1 if _is_plain(start) else 2)
        self._known[i] = change, drift
        return drift


def _is_plain(sample: torch.Tensor) -> bool:
    """These are values, not the codes of a quantised weight."""
    return sample.is_floating_point()


def _at_hand(layer: AdaptedLayer) -> torch.Tensor | None:
    """What this rank holds of the base weight; None where it is a view into a flat parameter that is not gathered."""
    weight = layer.base_weight
    if weight is None or weight.device.type == "meta":
        return None
    mine = local(weight)
    return mine if mine.numel() and mine.untyped_storage().size() else None
