"""What a checkpoint says of the adapter, the optimizer's state and the base: enough to know them again, and small.

Of every tensor a few elements; plain values, so that JSON keeps them.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lora_probe_callbacks.facts import Floats, ResumedFact
from lora_probe_callbacks.observe.checkpoint.names import bare
from lora_probe_callbacks.observe.device.transfer import Readout, local
from lora_probe_callbacks.observe.model.ownership import Ownership, ownership
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.wrappers import is_shard

__all__ = ["compared", "fingerprint", "without_optimizer"]

_FEW = 4  # elements of a tensor of the adapter and of the optimizer's state
_STATES = 128  # tensors of which the optimizer's state is kept, about
_BASE_LAYERS, _BASE_FEW = 16, 32
# How far two roundings of one number are apart, relative to the largest number of the sample.
_ROUNDING = {"torch.bfloat16": 2.0**-7, "torch.float16": 2.0**-10}


@torch.no_grad()
def fingerprint(targets: Targets) -> dict[str, Any]:
    """Take the fingerprint of what is trained.

    Args:
        targets: What is expected to train.

    Returns:
        Plain values: ``adapter``, ``optimizer`` and ``base``.
    """
    adapter, owners, base = _adapter(targets), ownership(targets.optimizers), _base(targets)
    states = _states(targets, adapter, owners)
    entries = [t for _, entries in states.values() for t in entries]
    readout = Readout()
    tickets = [_add(readout, list(adapter.values()), _FEW), _add(readout, entries, _FEW)]
    tickets.append(_add(readout, list(base.values()), _BASE_FEW))
    readout.send()
    readout.receive()
    of_adapter, of_states, of_base = (_packed(readout.get(ticket)) for ticket in tickets)
    slots = targets.slots
    return {
        "adapter": {
            "names": [bare(slots[i].name) for i in adapter],
            "roles": "".join({"A": "A", "B": "B"}.get(slots[i].role, "o") for i in adapter),
            "kinds": _kinds(adapter.values()),
            "values": of_adapter,
        },
        "optimizer": {
            "names": [bare(slots[i].name) for i in states],
            "keys": [" ".join(keys) for keys, _ in states.values()],
            "values": of_states,
            "rates": [owners[id(slots[i].tensor)].learning_rate for i in states],
        },
        "base": {"names": [bare(name) for name in base], "kinds": _kinds(base.values()), "values": of_base},
    }


def without_optimizer(state: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint that tells of no optimizer.

    Args:
        state: What :func:`fingerprint` returned.

    Returns:
        The same without the optimizer's state.
    """
    return {**state, "optimizer": {"names": [], "keys": [], "values": "", "rates": []}}


def _kinds(tensors: Iterable[torch.Tensor]) -> list[str]:
    return [f"{t.dtype}{list(t.shape)}" for t in tensors]


def _adapter(targets: Targets) -> dict[int, torch.Tensor]:
    """Slots of which this rank holds all: shards differ between ranks, and a checkpoint has one state."""
    tensors = {i: t for i, s in enumerate(targets.slots) if (t := s.tensor) is not None}
    return {i: t for i, t in tensors.items() if not is_shard(t) and t.device.type != "meta" and t.numel()}


def _states(
    targets: Targets, adapter: Mapping[int, torch.Tensor], owners: Mapping[int, Ownership]
) -> dict[int, tuple[list[str], list[torch.Tensor]]]:
    """The first state that has the size of its tensor, such as Adam's first moment; of many tensors of some."""
    found = {}
    # An odd stride, so that A and B are both among them.
    for i, tensor in list(adapter.items())[:: -(-len(adapter) // _STATES) | 1]:
        own = owners.get(id(tensor))
        if own is None:
            continue
        numel = tensor.numel()
        state = targets.optimizers[own.optimizer].state.get(tensor, {})
        keys = sorted(k for k, v in state.items() if isinstance(v, torch.Tensor) and v.numel() == numel > 1)[:1]
        found[i] = (keys, [state[k] for k in keys])
    return found


def _base(targets: Targets) -> dict[str, torch.Tensor]:
    """Frozen weights under some of the adapted layers, evenly spread."""
    found: dict[str, torch.Tensor] = {}
    for unit in targets.units[:: max(1, -(-len(targets.units) // _BASE_LAYERS))]:
        weight = unit.layer.base_weight
        if weight is None or weight.requires_grad or unit.layer.merged:
            continue
        if weight.device.type != "meta" and weight.numel() and not is_shard(weight):
            found[unit.layer.name] = weight
    return found


def _add(readout: Readout, tensors: Sequence[torch.Tensor], few: int) -> range:
    """A few elements of each tensor, as rows of ``few`` numbers."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_kind.setdefault((tensor.device, tensor.dtype), []).append(index)
    rows = torch.empty(len(tensors), few, dtype=torch.float64)
    for indices in by_kind.values():
        rows[indices] = torch.stack([_few(local(tensors[i]), few) for i in indices]).cpu().double()
    return readout.add(rows.reshape(-1))


def _few(tensor: torch.Tensor, few: int) -> torch.Tensor:
    numel = tensor.numel()
    if numel < few or not tensor.is_contiguous():
        flat = tensor.reshape(-1)[:: max(1, numel // few)][:few]
        return torch.cat([flat, flat.new_zeros(few - len(flat))])
    return tensor.as_strided((few,), (numel // few,), tensor.storage_offset())


def _packed(values: Sequence[float] | Floats) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _rows(text: str, few: int) -> list[list[float]]:
    """The inverse: one row a tensor."""
    data = base64.b64decode(text)
    flat = struct.unpack(f"<{len(data) // 4}f", data)
    return [list(flat[i : i + few]) for i in range(0, len(flat), few)]


def compared(state: Mapping[str, Any], targets: Targets, source: str, *, whole: bool) -> ResumedFact | None:
    """Compare what is here with what was saved.

    Args:
        state: The fingerprint that was saved.
        targets: What is expected to train now.
        source: Where the saved state comes from.
        whole: The optimizer is restored together with it.

    Returns:
        The fact, or None if the state holds no fingerprint.
    """
    if not state or "adapter" not in state:
        return None
    now = fingerprint(targets)
    state, now = _unpacked(state), _unpacked(now)
    slot_of = {bare(slot.name): i for i, slot in enumerate(targets.slots)}
    saved, here = state["adapter"], now["adapter"]
    at = _aligned(saved, here)
    differing = [
        slot_of[here["names"][j]]
        for i, j in at.items()
        if not _agree(saved["values"][i], here["values"][j], saved["kinds"][i], here["kinds"][j])
    ]
    b_saved = [any(v) for v, r in zip(saved["values"], saved["roles"], strict=True) if r == "B"]
    b_here = [any(v) for v, r in zip(here["values"], here["roles"], strict=True) if r == "B"]
    fresh = bool(b_here) and not any(b_here) and any(b_saved)
    wrong, lost, optimizer, rates = _optimizer(state["optimizer"], now["optimizer"], saved, here, at, slot_of)
    base, layer, why_no_base = _base_apart(state.get("base", {}), now["base"])
    return ResumedFact(
        source=source,
        whole=whole,
        known=frozenset(slot_of[here["names"][j]] for j in at.values()),
        unknown=len(saved["names"]) - len(at),
        differing=tuple(differing),
        fresh=fresh,
        optimizer=optimizer,
        wrong=wrong,
        lost=lost,
        rates=rates,
        base=base,
        base_layer=layer,
        why_no_base=why_no_base,
    )


def _unpacked(state: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint with its numbers in the place of their code."""
    optimizer, base = dict(state["optimizer"]), dict(state["base"])
    rows = iter(_rows(optimizer["values"], _FEW))
    optimizer["keys"] = [keys.split() for keys in optimizer["keys"]]
    optimizer["values"] = [[next(rows) for _ in keys] for keys in optimizer["keys"]]
    base["values"] = _rows(base["values"], _BASE_FEW)
    return {
        "adapter": {**state["adapter"], "values": _rows(state["adapter"]["values"], _FEW)},
        "optimizer": optimizer,
        "base": base,
    }


def _aligned(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[int, int]:
    """Index of what was saved to index of what is here: by name; where no name fits, by order and shape."""
    index = {name: j for j, name in enumerate(here["names"])}
    found = {i: index[name] for i, name in enumerate(saved["names"]) if name in index}
    shapes = [[kind.partition("[")[2] for kind in one["kinds"]] for one in (saved, here)]
    if not found and shapes[0] == shapes[1]:
        return {i: i for i in range(len(saved["names"]))}
    return {i: j for i, j in found.items() if shapes[0][i] == shapes[1][j]}


def _agree(x: Sequence[float], y: Sequence[float], kind_a: str = "", kind_b: str = "") -> bool:
    types = {kind.partition("[")[0] for kind in (kind_a, kind_b)}
    rounding = max((_ROUNDING.get(t, 0.0) for t in types), default=0.0) if len(types) > 1 else 0.0
    tolerance = rounding * max(map(abs, x), default=0.0)
    return all(abs(p - q) <= tolerance or (p != p and q != q) for p, q in zip(x, y, strict=True))


def _optimizer(
    saved: Mapping[str, Any],
    here: Mapping[str, Any],
    adapter_saved: Mapping[str, Any],
    adapter_here: Mapping[str, Any],
    at: Mapping[int, int],
    slot_of: Mapping[str, int],
) -> tuple[tuple[tuple[int, str], ...], tuple[int, ...], frozenset[int], tuple[int, ...]]:
    """Slots with another's state, slots without one, slots compared, and slots with another's learning rate."""
    renamed = {adapter_saved["names"][i]: adapter_here["names"][j] for i, j in at.items()}
    now = {name: j for j, name in enumerate(here["names"])}
    kind_then, kind_now = (dict(zip(one["names"], one["kinds"], strict=True)) for one in (adapter_saved, adapter_here))
    wrong, lost, known, rates = [], [], set(), []
    for i, name in enumerate(saved["names"]):
        target = renamed.get(name)
        if target is None or not saved["keys"][i]:
            continue
        slot = slot_of[target]
        known.add(slot)
        j = now.get(target)
        common = [] if j is None else [k for k in saved["keys"][i] if k in here["keys"][j]]
        if j is None or not common:
            lost.append(slot)
            continue
        mine = [here["values"][j][here["keys"][j].index(k)] for k in common]
        then = [saved["values"][i][saved["keys"][i].index(k)] for k in common]
        # A state is cast to the type of its tensor when it is loaded.
        types = kind_then.get(name, ""), kind_now.get(target, "")
        if not all(_agree(x, y, *types) for x, y in zip(then, mine, strict=True)):
            owner = next(
                (saved["names"][o] for o, v in enumerate(saved["values"]) if o != i and v == here["values"][j]), ""
            )
            wrong.append((slot, owner))
        elif saved["rates"][i] != here["rates"][j] and sorted(saved["rates"]) == sorted(here["rates"]):
            rates.append(slot)
    return tuple(wrong), tuple(lost), frozenset(known), tuple(rates)


def _base_apart(saved: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[float | None, str, str | None]:
    """The largest relative distance of a sampled base weight, and where it is."""
    index = {name: j for j, name in enumerate(here["names"])}
    worst: tuple[float, str] | None = None
    for i, name in enumerate(saved.get("names", ())):
        j = index.get(name)
        if j is None:
            continue
        quantised = not all("float" in one["kinds"][k] for one, k in ((saved, i), (here, j)))
        if saved["kinds"][i] != here["kinds"][j] and quantised:
            return None, "", "the base is stored in another way than it was"
        if saved["kinds"][i].partition("[")[2] != here["kinds"][j].partition("[")[2]:
            return float("inf"), name, None
        x, y = saved["values"][i], here["values"][j]
        if quantised:  # codes
            apart = sum(p != q for p, q in zip(x, y, strict=True)) / len(x)
        else:
            size = sum(p * p for p in x) ** 0.5
            apart = sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) ** 0.5 / size if size else 0.0
        if worst is None or apart > worst[0]:
            worst = (apart, name)
    if worst is None:
        return None, "", "no base weight under the adapter was known then and is now"
    return worst[0], worst[1], None
