"""The model that is trained, scored with its adapter on, off, in part, or with other values; and left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_probe_callbacks.observe.checkpoint.format import UnreadableError, file_of, read_file
from lora_probe_callbacks.observe.checkpoint.names import AdapterNames, adapter_names, matched, table_of
from lora_probe_callbacks.observe.model.inventory import AdaptedLayer, Inventory, take_inventory
from lora_probe_callbacks.observe.model.wrappers import is_shard
from lora_probe_callbacks.restore.model import eager, holding
from lora_probe_callbacks.restore.module_state import module_state_restored
from lora_probe_callbacks.serving.errors import CannotCompareError
from lora_probe_callbacks.serving.measure import LogProbs
from lora_probe_callbacks.serving.scoring import Chosen, Rows, in_eval_mode, log_softmax_of, score

__all__ = ["LiveModel", "State"]

_SHORT = {torch.bfloat16, torch.float16}


@dataclass(frozen=True, slots=True)
class State:
    """What the live model is like while it is scored.

    Attributes:
        adapter: The adapters that are active; None for those that are active now.
        off: Numbers of the layers in which no adapter is active.
        scale: Factor on the scaling of LoRA.
        values: Name of a tensor in the adapter's file to other values of it.
    """

    adapter: str | None = None
    off: frozenset[int] = frozenset()
    scale: float = 1.0
    values: Mapping[str, torch.Tensor] = field(default_factory=dict)


class LiveModel:
    """A model with an adapter, and the tokens that it is scored on.

    Whatever is asked of it, the model is afterwards bit for bit what it was: mode, active adapters, random streams,
    buffers, gradients and values.

    Args:
        model: It, or wrappers around it.
        rows: Token ids.

    Raises:
        CannotCompareError: If it holds no adapter that can be switched off, or is merged or sharded.
    """

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        self.rows = rows
        self._outside = model
        self.module = _called(model)
        self.inventory: Inventory = take_inventory([("", self.module)])
        self.layers: Sequence[AdaptedLayer] = self.inventory.layers
        self._refuse()
        self._exact = True  # of the last score

    @cached_property
    def on(self) -> LogProbs:
        """Log-probs with the adapter, as the model is."""
        found = self.score()
        self.exact = self._exact
        return found

    @cached_property
    def off(self) -> LogProbs:
        """Without any adapter."""
        return self.score(self.base)

    @cached_property
    def exact(self) -> bool:
        """The model computes in float32 throughout, so that its log-probs have no noise to speak of."""
        self.score()
        return self._exact

    @property
    def base(self) -> State:
        """The state without any adapter."""
        return State(off=frozenset(range(len(self.layers))))

    def _refuse(self) -> None:
        layers = self.layers
        if not layers or not self.inventory.active:
            raise CannotCompareError(
                f"got a model without an active adapter ({type(self.module).__name__}), expected the trained one: a "
                "PeftModel that was not merged and unloaded"
            )
        if merged := [layer.name for layer in layers if layer.merged]:
            raise CannotCompareError(
                f"got a model whose adapter is merged into {len(merged)} layers, expected it beside: unmerge_adapter()"
            )
        if not all(layer.switched for layer in layers):
            raise CannotCompareError("got a prompt-learning adapter, expected one in layers that can be switched off")
        if all(layer.disabled for layer in layers):
            raise CannotCompareError(
                "got a model whose adapters are disabled, expected them enabled: enable_adapter_layers()"
            )
        slots = [slot for unit in self.inventory.units for slot in unit.slots]
        if any(t is not None and (is_shard(t) or t.numel() == 0) for t in (slot.tensor for slot in slots)):
            raise CannotCompareError(
                "got a sharded model, expected whole tensors: gather them, or compare its saved file"
            )

    # --- what can be asked ------------------------------------------------------------------

    def score(self, state: State | None = None, chosen: Chosen = log_softmax_of) -> LogProbs:
        """Log-probs of the tokens.

        Args:
            state: What the model is like meanwhile; default: as it is.
            chosen: From logits and targets to what is wanted of each token.

        Returns:
            One array a sequence.
        """
        state = state or State()
        with ExitStack() as undo:
            undo.enter_context(eager([self._outside, *self.module.modules()]))
            undo.enter_context(module_state_restored(self.module))
            undo.enter_context(self._in(state))
            in_eval_mode(self.module)
            kinds: set[torch.dtype] = set()
            undo.enter_context(_output_types(self.layers[0].module, kinds))
            found = score(self.module, self.rows, chosen)
        self._exact = not (kinds & _SHORT) and not _rounds(self.module)
        return found

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are active."""
        return self.inventory.active

    @property
    def others(self) -> list[str]:
        """The adapters that are not."""
        return [name for name in self.inventory.adapters if name not in self.active]

    def stored(self, path: Path) -> Mapping[str, torch.Tensor]:
        """The values of the active adapter in a file.

        Args:
            path: The file, or the folder that it was saved into.

        Returns:
            Name in an adapter file to values in the shape of the live tensor.

        Raises:
            CannotCompareError: If it cannot be read, or does not hold the adapter.
        """
        names = self._names
        try:
            file = read_file(file_of(path, names.adapter))
        except FileNotFoundError:
            raise CannotCompareError(
                f"got {path}, which holds no adapter: expected a folder of save_pretrained"
            ) from None
        except (UnreadableError, NotImplementedError) as error:
            raise CannotCompareError(f"got {path}, which cannot be read: {error}") from None
        form, table = table_of(file, names)
        live = names.live(form)
        at = matched(live, table, exact=form == "adapter")
        lacking = [name for name in live if name not in at or table[at[name]].shape != tuple(live[name].shape)]
        if lacking:
            raise CannotCompareError(
                f"got {path}, which does not hold {len(lacking)} of {len(live)} tensors: {lacking[0]}"
            )
        flat = file.samples({key: table[key] for key in at.values()}, whole=True)
        return {name: flat[key].view(live[name].shape) for name, key in at.items() if key in flat}

    def values(self) -> Mapping[str, torch.Tensor]:
        """Copies of the values of the active adapter, by name."""
        return {name: tensor.detach().clone() for name, tensor in self._names.live("state").items()}

    # --- states -----------------------------------------------------------------------------

    @cached_property
    def _names(self) -> AdapterNames:
        adapter = self.active[0]
        return adapter_names(adapter, [u for u in self.inventory.units if u.adapter == adapter])

    @contextmanager
    def _in(self, state: State) -> Iterator[None]:
        """Switch by the attributes behind PEFT's properties: its own functions change requires_grad as well."""
        for number, layer in enumerate(self.layers):
            held = layer.module.__dict__
            if number in state.off:
                held["_disable_adapters"] = True
            elif state.adapter is not None:
                held["_active_adapter"] = [state.adapter]
        with ExitStack() as undo:
            if state.values:
                undo.enter_context(self._holding(state.values))
            if state.scale != 1.0:
                undo.enter_context(self._scaled(state.scale))
            yield

    @contextmanager
    def _holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        live = {**self._names.live("state"), **self._names.live("adapter")}
        chosen = [name for name in values if name in live]
        tensors = [live[name] for name in chosen]
        with holding(tensors, [values[n].to(t) for n, t in zip(chosen, tensors, strict=True)]):
            yield

    @contextmanager
    def _scaled(self, factor: float) -> Iterator[None]:
        kept: list[tuple[dict[str, float], dict[str, float]]] = []
        for layer in self.layers:
            if isinstance(layer.module, LoraLayer):
                kept.append((layer.module.scaling, dict(layer.module.scaling)))
                layer.module.scaling.update({name: s * factor for name, s in layer.module.scaling.items()})
        try:
            yield
        finally:
            for scaling, former in kept:
                scaling.update(former)


def _called(model: nn.Module) -> nn.Module:
    """The model that takes token ids and has adapters, below wrappers and Lightning modules."""
    from transformers import PreTrainedModel

    candidates = (m for m in model.modules() if isinstance(m, PeftModel | PreTrainedModel))
    return next((m for m in candidates if any(isinstance(x, BaseTunerLayer) for x in m.modules())), model)


@contextmanager
def _output_types(module: nn.Module, kinds: set[torch.dtype]) -> Iterator[None]:
    """Note in which types a layer computes: of autocast and of a quantised base its weights say nothing."""

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            kinds.add(output.dtype)

    handle = module.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _rounds(module: nn.Module) -> bool:
    """It computes in less than float32 somewhere, whatever it returns."""
    inside = [m for m in module.modules() if type(m).__module__.startswith("bitsandbytes")]
    if any(getattr(m, "compute_dtype", torch.float16) in _SHORT for m in inside):
        return True
    return torch.backends.cuda.matmul.allow_tf32 and any(p.device.type == "cuda" for p in module.parameters())
