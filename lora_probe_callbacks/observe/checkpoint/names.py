"""How an adapter stands in a file: under which names, with which settings, and beside what.

The names are PEFT's own: its function that builds the state dict is given the model's parameters, copies
none of them, and tells the name of each.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftMixedModel, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from torch import nn

from lora_probe_callbacks.facts.checkpoint import LeftOut
from lora_probe_callbacks.observe.checkpoint.format import ADAPTER_FILES, StoredFile, StoredTensor, UnreadableError
from lora_probe_callbacks.observe.model.inventory import Slot, Unit
from lora_probe_callbacks.observe.model.ownership import tensors_of
from lora_probe_callbacks.observe.model.targets import Targets

__all__ = [
    "AdapterNames",
    "adapter_names",
    "bare",
    "changed_settings",
    "full_shape",
    "holds_any",
    "left_out",
    "matched",
    "plain_name",
    "strangers",
    "table_of",
]

Form = Literal["adapter", "state"]

# Names that wrappers put into the names of what they wrap; "module" only at the front, where DataParallel puts it.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_ddp_module"}
_PEFT = "base_model.model."


@lru_cache(maxsize=1 << 16)
def bare(name: str) -> str:
    """A qualified name without the names of wrappers."""
    parts = name.split(".")
    while parts and parts[0] == "module":
        del parts[0]
    return ".".join(part for part in parts if part not in _WRAPPERS)


@dataclass(eq=False, slots=True)
class AdapterNames:
    """One adapter of one model, and the names of its tensors in a file.

    Attributes:
        adapter: PEFT's name of it.
        top: The module that would save it.
        config: Its configuration.
        units: Its units.
        saved: Name in an adapter file to what gives the live tensor.
        full: Name in the state dict of the whole module, likewise.
        slots: Name in an adapter file, or of the whole module, to slot.
        made: Names of what is computed when it is saved (AdaLoRA cuts its tensors): not compared.
        other: Name of the whole module to the name in an adapter file.
        shapes: By form, name to the shape of the live tensor.
        beside: Trained tensors that are not the adapter's, as (name in a file, kind); see :func:`left_out`.
        why_not: Why its names in an adapter file are not known.
    """

    adapter: str
    top: nn.Module | None
    config: Any
    units: list[Unit]
    saved: dict[str, Callable[[], torch.Tensor | None]] = field(default_factory=dict)
    full: dict[str, Callable[[], torch.Tensor | None]] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    other: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    beside: tuple[object, list[tuple[str, LeftOut, int]]] | None = None
    why_not: str = ""

    def live(self, form: str) -> dict[str, torch.Tensor]:
        """Name to live tensor, in an adapter file or in the state of a whole module."""
        names = self.saved if form == "adapter" else self.full
        return {name: tensor for name, get in names.items() if (tensor := get()) is not None}

    def role(self, name: str) -> str:
        """A, B or other."""
        slot = self.slots.get(name)
        return "other" if slot is None else slot.role


def adapter_names(adapter: str, units: Iterable[Unit]) -> AdapterNames:
    """Find the names under which an adapter is saved.

    Args:
        adapter: Its name.
        units: Its units, all of one model.

    Returns:
        Its names; nothing in it holds a copy of a tensor.
    """
    mine = list(units)
    slots = [slot for unit in mine for slot in unit.slots]
    top = _top(mine)
    config = None if top is None else getattr(top, "peft_config", {}).get(adapter)
    names = AdapterNames(adapter, top, config, mine)
    for slot in slots:
        name = bare(slot.name)
        names.full[name] = _at(slot)
        names.slots[name] = slot
    if top is None or config is None or isinstance(top, PeftMixedModel):
        names.why_not = "no module of PEFT or transformers stands above it that would save it"
    elif config.is_prompt_learning:
        names.why_not = "prompt learning computes what it saves"
    elif getattr(top, "_tp_size", None):
        names.why_not = "its tensors are split by tensor parallelism"
    else:
        by_id = {id(t): slot for slot in slots if (t := slot.tensor) is not None}
        held = {id(t) for t in (*top.parameters(), *top.buffers())}
        for name, tensor in _state_dict(top, adapter).items():
            name = bare(name)
            name = name if isinstance(top, PeftModel) else _PEFT + name
            mine_at = by_id.get(id(tensor))
            if mine_at is not None:
                names.slots[name] = mine_at
                names.saved[name] = _at(mine_at)
            elif id(tensor) in held:  # a bias that the adapter trains, a buffer of a saved module
                names.saved[name] = _held(tensor)
            else:
                names.made.add(name)
        _complete(names, top)
    by_slot = {id(names.slots[name]): name for name in names.saved if name in names.slots}
    names.other = {n: by_slot[id(names.slots[n])] for n in names.full if id(names.slots[n]) in by_slot}
    names.shapes = {form: {n: full_shape(t) for n, t in names.live(form).items()} for form in ("adapter", "state")}
    return names


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of a whole tensor; DeepSpeed ZeRO-3 keeps it beside an empty one."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _at(slot: Slot) -> Callable[[], torch.Tensor | None]:
    return lambda: slot.tensor


def _held(tensor: torch.Tensor) -> Callable[[], torch.Tensor | None]:
    return lambda: tensor


def _complete(names: AdapterNames, top: nn.Module) -> None:
    """Name the tensors that PEFT would leave out.

    It drops every name with another adapter's name in it, of a module's too (huggingface/peft#3584, peft 0.21).
    """
    if str(getattr(names.config, "peft_type", "")).rpartition(".")[2] != "LORA":
        return
    known = {id(t) for t in names.live("adapter").values()}
    modules = {id(module): name for name, module in top.named_modules()}
    for slot in {id(s): s for u in names.units for s in u.slots}.values():
        name = modules.get(id(slot.layer.module))
        if name is None or slot.tensor is None or id(slot.tensor) in known or not slot.layer.lora:
            continue
        path = [part for part in slot.path if part != names.adapter]
        if path[0] == "lora_magnitude_vector":
            path = path[:1]
        name = bare(".".join((name, *path)))
        name = name if isinstance(top, PeftModel) else _PEFT + name
        names.slots[name] = slot
        names.saved[name] = _at(slot)


def _state_dict(top: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = dict(top.named_parameters(remove_duplicate=False))
    for path, module in top.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                held[f"{path}.{name}" if path else name] = buffer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # "auto" would ask the hub for the base model's configuration.
        saved: dict[str, torch.Tensor] = get_peft_model_state_dict(
            top, state_dict=held, adapter_name=adapter, save_embedding_layers=False
        )
    return saved


def _top(units: Iterable[Unit]) -> nn.Module | None:
    """The PeftModel above the units, else the module of transformers that holds the configuration."""
    for unit in units:
        above = (*unit.layer.chain, unit.layer.module)
        for module in above:
            if isinstance(module, PeftModel | PeftMixedModel):
                return module
        for module in above:
            if isinstance(getattr(module, "peft_config", None), dict):
                return module
    return None


def changed_settings(names: AdapterNames, folder: Path) -> list[tuple[str, str, str]]:
    """Ranks and scales that a reload would give, where they are not the live ones.

    Args:
        names: The adapter.
        folder: Where its ``adapter_config.json`` is.

    Returns:
        (setting, saved, live); empty if there is no such file.

    Raises:
        UnreadableError: If that file is damaged.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return []
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UnreadableError(f"its adapter_config.json cannot be read ({type(error).__name__})") from error
    kind = str(getattr(names.config, "peft_type", "")).rpartition(".")[2]
    if kind and saved.get("peft_type") != kind:
        return [("peft_type", str(saved.get("peft_type")), kind)]
    if kind != "LORA":  # AdaLoRA's rank is another at every step
        return []
    found: dict[str, tuple[str, str, str]] = {}
    for unit in names.units:
        layer = unit.layer.module
        if not isinstance(layer, LoraLayer) or names.adapter not in layer.scaling:
            continue
        name = _targeted(unit)
        try:
            rank = _of(saved.get("rank_pattern"), name, saved["r"])
            alpha = _of(saved.get("alpha_pattern"), name, saved["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if saved.get("use_rslora") else rank)
        except (KeyError, TypeError, ZeroDivisionError):
            return [("adapter_config.json", "no r or lora_alpha", "r and lora_alpha")]
        live_rank, live_scale = layer.r[names.adapter], layer.scaling[names.adapter]
        if not isinstance(live_rank, int) or not isinstance(live_scale, float | int):
            continue
        if rank != live_rank:
            found.setdefault("r", ("r", str(rank), str(live_rank)))
        elif not math.isclose(scale, live_scale, rel_tol=1e-6):
            what = "scaling" if alpha == layer.lora_alpha[names.adapter] else "lora_alpha"
            found.setdefault(what, (what, f"{scale:g} = scaling of lora_alpha {alpha}", f"{live_scale:g}"))
    return list(found.values())


def _targeted(unit: Unit) -> str:
    """The name that patterns are matched with: of a parameter of its own, that parameter's (peft 0.21)."""
    layer = unit.layer.module
    if not isinstance(layer, ParamWrapper):
        return bare(unit.layer.name)
    path = [part for part in bare(unit.layer.name).split(".") if part != "base_layer"]
    return ".".join((*path, layer.parameter_name))


def _of(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    if not pattern:
        return default
    return pattern.get(get_pattern_key(list(pattern), name), default)


def left_out(names: AdapterNames, targets: Targets, stored: Iterable[str]) -> list[tuple[str, LeftOut]]:
    """What was trained or resized beside the adapter, and is not in an adapter file.

    Args:
        names: The adapter.
        targets: Everything around it.
        stored: Names in the file.

    Returns:
        (name, "trained embedding", "resized embedding" or "trained").
    """
    top = names.top
    if top is None:
        return []
    key = (id(targets.inventory), [len(g["params"]) for o in targets.optimizers for g in o.param_groups])
    if names.beside is None or names.beside[0] != key:
        names.beside = (key, _beside(names, top, targets))
    if not names.beside[1]:
        return []
    in_file = {bare(name) for name in stored}
    in_file |= {name.replace(".base_layer.", ".") for name in in_file}
    # Tied tensors may stand there under either name.
    present = {tensor for name, _, tensor in names.beside[1] if name.replace(".base_layer.", ".") in in_file}
    found = {tensor: (name, kind) for name, kind, tensor in reversed(names.beside[1]) if tensor not in present}
    lost = list(reversed(found.values()))
    trained = any(kind == "trained embedding" for _, kind in lost)
    return [(name, kind) for name, kind in lost if kind != "resized embedding" or not trained]


def _beside(names: AdapterNames, top: nn.Module, targets: Targets) -> list[tuple[str, LeftOut, int]]:
    """(name in a file, kind, id of the tensor) of what is trained beside the adapter, and of resized embeddings."""
    base = top.get_base_model() if isinstance(top, PeftModel) else top
    adapters = {id(t) for u in targets.inventory.units for s in u.slots if (t := s.tensor) is not None}
    saved = {id(t) for t in names.live("adapter").values()}
    trained = {id(t) for t in tensors_of(targets.optimizers) if t.requires_grad} - adapters - saved
    embeddings = {id(w) for m in _embeddings(base) if isinstance(w := getattr(m, "weight", None), torch.Tensor)}
    resized = _resized(base, names)
    prefix = "" if isinstance(top, PeftModel) else _PEFT
    found: list[tuple[str, LeftOut, int]] = []
    for name, tensor in top.named_parameters(remove_duplicate=False) if trained or resized else ():
        if id(tensor) in trained:
            kind: LeftOut = "trained embedding" if id(tensor) in embeddings else "trained"
            found.append((prefix + bare(name), kind, id(tensor)))
        elif resized and id(tensor) in embeddings - saved:
            found.append((prefix + bare(name), "resized embedding", id(tensor)))
    return found


def _embeddings(base: nn.Module) -> list[nn.Module]:
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        method = getattr(base, ask, None)
        try:
            module = None if method is None else method()
        except NotImplementedError:
            module = None
        if isinstance(module, nn.Module):
            found.append(module)
    return found


def _resized(base: nn.Module, names: AdapterNames) -> bool:
    """The vocabulary differs from that of the model that the adapter will be put on, as far as this disk knows it."""
    source = getattr(names.config, "base_model_name_or_path", None) or getattr(base, "name_or_path", None)
    embeddings = _embeddings(base)
    if not source or not embeddings:
        return False
    weight = getattr(embeddings[0], "weight", None)
    path = Path(source) / "config.json"
    if not path.is_file():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(source, "config.json")  # asks the disk, never the network
        except Exception:  # a name that no hub knows
            return False
        if not isinstance(cached, str):
            return False
        path = Path(cached)
    try:
        before = json.loads(path.read_text()).get("vocab_size")
    except (OSError, ValueError):
        return False
    return isinstance(before, int) and isinstance(weight, torch.Tensor) and weight.shape[0] != before


# --- in a file ----------------------------------------------------------------------------------


def table_of(file: StoredFile, names: AdapterNames) -> tuple[Form, dict[str, StoredTensor]]:
    """The table of a file that holds most of an adapter, and in which form: an adapter file's, or a whole module's."""
    best: tuple[int, Form, dict[str, StoredTensor]] | None = None
    if file.path.name in ADAPTER_FILES:
        return "adapter", max(file.tables.values(), key=len, default={})
    state, saved = names.full, names.saved
    for place, table in file.tables.items():
        if place.startswith(("optimizer", "callbacks", "loops", "lr_schedulers")):
            continue
        as_saved = len(matched(saved, table, exact=True))
        as_state = len(matched(state, table, exact=False))
        form: Form = "adapter" if as_saved >= as_state else "state"
        if best is None or max(as_saved, as_state) > best[0]:
            best = (max(as_saved, as_state), form, table)
    if best is None:
        return "adapter", {}
    if not best[0] and (converted := _of_diffusers(saved, best[2])):
        return "adapter", converted
    if not best[0]:  # nothing fits: an adapter's file has nothing else in it
        return ("adapter" if best[2] and all("lora_" in key for key in best[2]) else "state"), best[2]
    return best[1], best[2]


# diffusers writes either of these, behind the name of the part of the pipeline (0.35, utils/state_dict_utils.py).
_DOWN_AND_UP = re.compile(r"\.lora(?:_linear_layer)?\.(down|up)\.")


def _of_diffusers(saved: Iterable[str], table: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """What a file of diffusers holds of this adapter, under PEFT's names; other parts of a pipeline are left out."""
    full = {name.removeprefix(_PEFT): name for name in saved}
    found = {}
    for key, stored in table.items():
        name = _DOWN_AND_UP.sub(lambda m: ".lora_A." if m[1] == "down" else ".lora_B.", bare(key))
        mine = full.get(name) or full.get(name.partition(".")[2])
        if mine is not None:
            found[mine] = stored
    return found


def holds_any(table: Mapping[str, StoredTensor], expected: Iterable[str]) -> bool:
    """Some tensor of an adapter is in a table, under whatever names above its layer."""
    tails = {name.rpartition("lora_")[2] for name in expected}
    return any(key.rpartition("lora_")[2] in tails and "lora_" in key for key in table) or bool(
        matched(expected, table, exact=False)
    )


def matched(expected: Iterable[str], table: Mapping[str, StoredTensor], *, exact: bool) -> dict[str, str]:
    """Find the names of live tensors in a file.

    The state of a whole module is restored into a module that is wrapped alike, so wrappers' names do not
    count there, nor does how far up the module stands that was saved. In an adapter file they do count, but
    for one thing: a tensor is there, under a wrong name, which is told apart from one that is not there.

    Args:
        expected: Live names.
        table: The tensors of the file.
        exact: It is an adapter file.

    Returns:
        Live name to the name in the file, for those that are there.
    """
    by_bare = {bare(key): key for key in table}
    names = list(expected)
    if exact or not names:
        return {name: by_bare[name] for name in names if name in by_bare}
    found: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            tail = ".".join(parts[start:])
            if len(parts) - start < min(len(parts), 3):
                break
            if tail in by_bare:
                found[name] = by_bare[tail]
                break
    if found:
        return found
    first = names[0]
    longer = next((key for key in by_bare if key.endswith(f".{first}")), None)
    if longer is None:
        return {}
    prefix = longer[: -len(first)]
    return {name: by_bare[prefix + name] for name in names if prefix + name in by_bare}


def strangers(
    names: AdapterNames, table: Mapping[str, StoredTensor], used: Container[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names in an adapter file that are not the adapter's.

    Args:
        names: The adapter.
        table: The tensors of the file.
        used: Those that are.

    Returns:
        Names that carry a wrapper's name, and names that stand for nothing in the model.
    """
    rest = [key for key in table if key not in used]
    wrapped = tuple(key for key in table if bare(key) != key)
    if not rest or names.top is None:
        return wrapped, ()
    known = {bare(n) for n, _ in names.top.named_parameters(remove_duplicate=False)}
    known |= {bare(n) for n, _ in names.top.named_buffers(remove_duplicate=False)}
    known |= {n.replace(".base_layer.", ".") for n in known} | {n.replace(".original_module.", ".") for n in known}
    known |= {f"{_PEFT}{n}" for n in known}
    return wrapped, tuple(key for key in rest if key not in wrapped and key not in known | names.made)


def plain_name(unit: Unit, table: Mapping[str, StoredTensor]) -> str | None:
    """The name of an adapted weight in a model that was never adapted."""
    parts = f"{bare(unit.layer.name)}.weight".split(".")
    return next((tail for i in range(len(parts)) if (tail := ".".join(parts[i:])) in table), None)
