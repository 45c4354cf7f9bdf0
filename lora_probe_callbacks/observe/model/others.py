"""The adapters that are not expected to train: do they stay as they are, and do lagged ones follow?"""

from __future__ import annotations

from collections.abc import Set

import torch

from lora_probe_callbacks.facts import Floats, OtherAdapter
from lora_probe_callbacks.observe.device.followers import Followers, Pair
from lora_probe_callbacks.observe.device.transfer import Readout, local
from lora_probe_callbacks.observe.device.updates import Fingerprints
from lora_probe_callbacks.observe.model.inventory import Slot
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = ["OtherAdapters"]


class OtherAdapters:
    """The adapters beside the expected ones.

    Args:
        targets: What is expected to train.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._ever_changed: set[str] = set()
        self.settle()

    def settle(self) -> None:
        """Begin anew with the adapters that are not expected now."""
        self._slots = self._targets.others()
        lagged = self._targets.config.lagged_adapters
        tensors = {
            name: {s.name: t for s in slots if (t := s.tensor) is not None} for name, slots in self._slots.items()
        }
        self._fingerprints = {name: Fingerprints(held) for name, held in tensors.items() if name not in lagged}
        self._copies: set[str] = set()
        self.followers = Followers({name: self._pairs(name) for name in lagged})

    def _pairs(self, name: str) -> list[Pair]:
        """The tensors of a lagged adapter, each beside the trained one of the same place in the same layer."""
        trained = {_place(s): s.tensor for s in self._targets.slots}
        slots = [(s, t) for s in self._slots.get(name, ()) if (t := s.tensor) is not None]
        return [Pair(s.name, t, trained.get(_place(s))) for s, t in slots]

    @torch.no_grad()
    def look_at_start(self) -> None:
        """Find frozen copies of what trains; the values are read once, before the first forward."""
        mine = {_place(slot): slot.tensor for slot in self._targets.slots}
        for name, slots in self._slots.items():
            pairs = [(slot.tensor, mine.get(_place(slot))) for slot in slots]
            if pairs and all(_same(theirs, ours) for theirs, ours in pairs):
                self._copies.add(name)

    def read(self, readout: Readout) -> range | None:
        """Put the norms of all adapters that must stay as they are into ``readout``. For use under ``no_grad``."""
        tickets = [prints.read(readout) for prints in self._fingerprints.values()]
        return range(tickets[0].start, tickets[-1].stop) if tickets else None

    def facts(
        self,
        before: Floats | None,
        after: Floats | None,
        was_active: Set[str],
        owners: Owners,
    ) -> tuple[OtherAdapter, ...]:
        """Each of these adapters.

        Args:
            before: Their fingerprints before the last probed update, if read.
            after: The same directly after it.
            was_active: Names that were active in some forward.
            owners: Who owns what.

        Returns:
            One fact an adapter.
        """
        if not self._slots:
            return ()
        inside, outside = self._changes(before, after)
        return tuple(
            self._fact(name, inside.get(name, ()), outside.get(name, ()), name in was_active, owners)
            for name in self._slots
        )

    def _changes(
        self, before: Floats | None, after: Floats | None
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """What changed by the step itself, and at some other time."""
        inside: dict[str, tuple[str, ...]] = {}
        outside: dict[str, tuple[str, ...]] = {}
        offset = 0
        for name, prints in self._fingerprints.items():
            part = slice(offset, offset + prints.size)
            offset += prints.size
            if before is not None:
                outside[name] = prints.changed(before[part])
            if after is not None:
                (outside if before is None else inside)[name] = prints.changed(after[part])
        return inside, outside

    def _fact(
        self, name: str, inside: tuple[str, ...], outside: tuple[str, ...], was_active: bool, owners: Owners
    ) -> OtherAdapter:
        config = self._targets.config
        reference = name in config.reference_adapters
        tensors = [t for s in self._slots[name] if (t := s.tensor) is not None]
        if inside or outside:
            self._ever_changed.add(name)
        return OtherAdapter(
            name=name,
            declared="reference" if reference else "lagged" if name in config.lagged_adapters else None,
            tensors=len(tensors),
            trainable=sum(t.requires_grad for t in tensors),
            owned=sum(owners.owns(t) for t in tensors),
            changed=inside or (outside if reference else ()),
            was_active=was_active,
            ever_changed=name in self._ever_changed,
            copy=name in self._copies,
            active_now=name in self._targets.inventory.active,
            half=any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors),
            **self.followers.counts(name),
        )


def _place(slot: Slot) -> tuple[int, tuple[str, ...]]:
    """Where a slot is, but for the name of its adapter."""
    return id(slot.layer.module), tuple(part for part in slot.path if part != slot.adapter)


def _same(theirs: torch.Tensor | None, ours: torch.Tensor | None) -> bool:
    if theirs is None or ours is None or theirs.requires_grad or theirs.shape != ours.shape:
        return False
    return theirs.device == ours.device and torch.equal(local(theirs), local(ours))
