"""What wraps a module, and what that hides.

The probe does not unwrap: it finds adapted layers below whatever the user trains, and hooks the
modules above them. It must know where Python hooks do not reach, and who keeps the tensors of
several processes equal or cuts them into shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from lora_probe_callbacks.facts import WrapperKind

__all__ = [
    "DataParallel",
    "data_parallel",
    "describe",
    "hooks_fire",
    "is_compiled",
    "is_flat",
    "is_shard",
    "master_copies",
    "replicas",
    "sharded_modules",
    "shards_behind",
    "tensor_parallel",
]


def _made_by(module: nn.Module, *parts: str) -> bool:
    """Some class of a module stands in one of these packages; asking by name imports none of them."""
    return any(cls.__module__.startswith(parts) for cls in type(module).__mro__)


_DDP: WrapperKind = "DistributedDataParallel"

# Wrappers that hold several processes together, in the order in which they are looked for. What else wraps a model
# (torch.compile, Accelerate's patched forward, Lightning's module, PeftModel) leaves its tensors where they are.
# DistributedDataParallel is also what Lightning's DDPStrategy and Accelerate's prepare() make; Lightning's FSDPStrategy
# makes FullyShardedDataParallel, its ModelParallelStrategy and Accelerate's fsdp_version=2 call fully_shard.
_KINDS: dict[WrapperKind, Callable[[nn.Module], bool]] = {
    "DeepSpeed": lambda module: _made_by(module, "deepspeed.runtime.engine", "deepspeed.runtime.pipe"),
    "FullyShardedDataParallel": lambda module: _made_by(module, "torch.distributed.fsdp.fully_sharded"),
    "fully_shard": lambda module: _made_by(module, "torch.distributed.fsdp._fully_shard"),
    "DistributedDataParallel": lambda module: isinstance(module, DistributedDataParallel),
}


@dataclass(frozen=True, eq=False, slots=True)
class DataParallel:
    """The wrapper that keeps the adapter of several processes equal, or in shards.

    Attributes:
        kind: Which one.
        module: The outermost module of this kind.
        ranks: The processes that it holds together; empty where that is unknown.
        managed: Ids of the tensors that it reduces, or None where every tensor tells for itself.
    """

    kind: WrapperKind
    module: nn.Module
    ranks: tuple[int, ...]
    managed: frozenset[int] | None

    def manages(self, tensor: torch.Tensor) -> bool:
        """Tell whether the gradient of a tensor is reduced by this wrapper."""
        if self.managed is not None:
            return id(tensor) in self.managed
        return self.kind == "DeepSpeed" or is_shard(tensor)

    @property
    def joining(self) -> bool:
        """Inputs are uneven: a rank that ran out of them follows the others' reductions and nothing else."""
        config = getattr(self.module, "_join_config", None)
        return config is not None and bool(config.enable)

    @property
    def syncs(self) -> bool:
        """The next backward reduces: the module is not inside ``no_sync``."""
        return bool(getattr(self.module, "require_backward_grad_sync", True))

    @property
    def hook(self) -> bool:
        """A communication hook decides what is reduced, and when."""
        return bool(getattr(self.module, "_comm_hooks", ()))


def data_parallel(roots: Iterable[nn.Module]) -> DataParallel | None:
    """Find the wrapper that makes several processes one run.

    Args:
        roots: What is trained.

    Returns:
        The outermost wrapper of the first kind found, or None.
    """
    modules = [module for root in roots for module in root.modules()]
    for kind, matches in _KINDS.items():
        for module in modules:
            if matches(module):
                return DataParallel(kind, module, _ranks(module), _reduced(modules) if kind == _DDP else None)
    return None


def master_copies(roots: Iterable[nn.Module]) -> str:
    """Tell that DeepSpeed's optimizer steps flat master copies in the place of the model's tensors.

    The Transformers Trainer hands out the model inside the engine: then only the marks on the tensors are left
    (DeepSpeed 0.19: `_hp_mapping` under ZeRO 1 and 2, `ds_id` under ZeRO 3).

    Args:
        roots: What is trained.

    Returns:
        A reason why the optimizer cannot be judged, or the empty string.
    """
    for root in roots:
        marked = any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in root.parameters())
        if marked or any(_KINDS["DeepSpeed"](m) for m in root.modules()):
            return (
                "could not judge: DeepSpeed steps master copies of its own, in which no adapter tensor can be told "
                "apart, and clears the gradients before it does"
            )
    return ""


def tensor_parallel(roots: Iterable[nn.Module]) -> bool:
    """Tell whether ranks compute parts of one model: what they hold may differ by design.

    Args:
        roots: What is trained.

    Returns:
        True if a parameter is in shards, or the model was loaded with a plan for that.
    """
    for root in roots:
        if any(getattr(m, "_device_mesh", None) is not None for m in root.modules()):
            return True
        if any(is_shard(p) for p in root.parameters()):
            return True
    return False


def _ranks(module: nn.Module) -> tuple[int, ...]:
    group = getattr(module, "process_group", None)
    return tuple(dist.get_process_group_ranks(group)) if isinstance(group, dist.ProcessGroup) else ()


def _reduced(modules: Iterable[nn.Module]) -> frozenset[int]:
    """DDP reduces what required gradients when it was made; only its reducer still knows (torch 2.11 to 2.13)."""
    reducers = [m.reducer for m in modules if isinstance(m, DistributedDataParallel)]
    buckets = [bucket for reducer in reducers for bucket in reducer._get_zeros_like_grad_buckets()]
    return frozenset(id(tensor) for bucket in buckets for tensor in bucket.parameters())


def is_shard(tensor: torch.Tensor) -> bool:
    """Tell whether this rank holds a part of a tensor: other ranks hold other values by design."""
    if getattr(tensor, "_fsdp_flattened", False) or is_flat(tensor) or hasattr(tensor, "ds_id"):
        return True
    return any(not p.is_replicate() for p in _placements(tensor))


def sharded_modules(roots: Iterable[nn.Module]) -> list[FSDPModule]:
    """The modules that fully_shard was called on."""
    return [module for root in roots for module in root.modules() if isinstance(module, FSDPModule)]


def shards_behind(modules: Iterable[FSDPModule]) -> dict[int, torch.Tensor]:
    """Find the whole tensors that fully_shard shows for a while, and the shards that the optimizer knows.

    It does so inside a forward, and at its root also after one that no backward followed.

    Args:
        modules: Those that fully_shard was called on.

    Returns:
        The id of every whole tensor to its shard.
    """
    found: dict[int, torch.Tensor] = {}
    for state in [module._get_fsdp_state() for module in modules]:
        # Only its own records tell (torch 2.11 has one group a module, 2.13 a list of them).
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            for one in getattr(group, "fsdp_params", ()):
                whole = getattr(one, "_unsharded_param", None)
                if whole is not None:
                    found[id(whole)] = one.sharded_param
    return found


def is_flat(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is one of FSDP1's flat parameters, into which others were poured."""
    return bool(getattr(tensor, "_is_flat_param", False))


def replicas(tensor: torch.Tensor) -> int:
    """Count the ranks of a tensor's mesh that hold the same shard, as under hybrid sharding."""
    count = 1
    for dimension, placement in enumerate(_placements(tensor)):
        if placement.is_replicate():
            count *= tensor.device_mesh.size(dimension)  # type: ignore[attr-defined]
    return count


def _placements(tensor: torch.Tensor) -> Sequence[Any]:
    return getattr(tensor, "placements", ())


def is_compiled(module: nn.Module) -> bool:
    """Tell whether calls below ``module`` run as compiled code.

    Hooks put there would be traced into the graph, and would stay in it after their removal:
    dynamo does not guard on hooks (``torch._dynamo.config.skip_nnmodule_hook_guards``).
    There are five ways: ``torch.compile(module)``, ``module.compile()``, a compiled ``forward``, a
    compiled ``training_step``, and a LightningModule that was compiled before ``fit``.

    Args:
        module: Any module.

    Returns:
        True if hooks below it must not be installed.
    """
    return isinstance(module, OptimizedModule) or _compiled_method(module, "forward") or _calls_are_compiled(module)


def hooks_fire(module: nn.Module) -> bool:
    """Tell whether hooks on ``module`` itself run outside its compiled region.

    Args:
        module: Any module.

    Returns:
        False for modules whose calls are compiled as a whole: their own hooks are inside the region.
    """
    return isinstance(module, OptimizedModule) or not _calls_are_compiled(module)


def _calls_are_compiled(module: nn.Module) -> bool:
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
        or _compiled_method(module, "training_step")
    )


def _compiled_method(module: nn.Module, name: str) -> bool:
    method = vars(module).get(name) or getattr(type(module), name, None)
    return hasattr(method, "_torchdynamo_orig_callable")


def describe(name: str, module: nn.Module) -> str:
    """Name a module object for a person.

    Args:
        name: Qualified name, empty for the root.
        module: The object.

    Returns:
        For instance ``"model (PeftModelForCausalLM)"``.
    """
    kind = type(module).__name__
    return f"{name} ({kind})" if name else kind
