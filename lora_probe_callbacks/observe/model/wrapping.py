"""What holds several processes together, and what it leaves out."""

from __future__ import annotations

from lora_probe_callbacks.facts import Wrapping
from lora_probe_callbacks.observe.model.owners import Owners
from lora_probe_callbacks.observe.model.targets import Targets
from lora_probe_callbacks.observe.model.wrappers import DataParallel, tensor_parallel

__all__ = ["wrapping"]


def wrapping(
    targets: Targets, owners: Owners, parallel: DataParallel | None, called: set[int], *, synced: bool
) -> Wrapping:
    """Describe the wrapper of this process.

    Args:
        targets: What is expected to train.
        owners: Who owns it.
        parallel: The wrapper, if there is one.
        called: Ids of the modules that ran in training forwards.
        synced: The last of these forwards was outside ``no_sync``.

    Returns:
        The fact.
    """
    whole = owners.whole()
    if parallel is None:
        together = not tensor_parallel([root for _, root in targets.roots])
        return Wrapping(None, -1, None, True, False, (), len(whole) if together else 0)
    shard = next((owners.tensors[i] for i in owners.shards()), None)
    mesh = getattr(shard, "device_mesh", None)
    first = int(mesh.mesh.min()) if mesh is not None else min(parallel.ranks, default=-1)
    return Wrapping(
        kind=parallel.kind,
        first=first,
        entered=id(parallel.module) in called if called else None,
        synced=synced,
        hook=parallel.hook,
        unmanaged=tuple(i for i, t in whole.items() if t.requires_grad and not parallel.manages(t)),
        whole=len(whole),
    )
