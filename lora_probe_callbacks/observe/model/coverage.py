"""What was asked for, and what the adapters cover.

PEFT raises only if a whole request matches nothing: one name of several that matches nothing, a misspelt
``modules_to_save``, a weight that is no module (fused experts) pass in silence. Read once, when training starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from lora_probe_callbacks.facts import Coverage, Request, TokenTable
from lora_probe_callbacks.observe.device.token_rows import TokenRows
from lora_probe_callbacks.observe.model.inventory import Unit
from lora_probe_callbacks.observe.model.wrappers import is_shard

__all__ = ["adapter_configs", "read_coverage"]

# PEFT adds these to modules_to_save for their task, whether the model has them or not (0.21).
_ADDED_BY_TASK = ("classifier", "score", "qa_outputs")
# Hybrid models carry attention in every fourth layer or more; fewer adapted layers than that were hardly meant.
_FEW, _MANY_LAYERS = 0.25, 8
_HEADS = tuple(
    f"For{task}"
    for task in (
        "SequenceClassification",
        "TokenClassification",
        "QuestionAnswering",
        "MultipleChoice",
        "ImageClassification",
        "AudioClassification",
        "VideoClassification",
    )
)


def adapter_configs(roots: Iterable[tuple[str, nn.Module]]) -> dict[str, PeftConfig]:
    """Find the configurations that a model's adapters were made from.

    Args:
        roots: (name, module) pairs.

    Returns:
        Adapter to its configuration.
    """
    found: dict[str, PeftConfig] = {}
    for _, root in roots:
        for module in root.modules():
            # A PeftModel, the tuner inside it, or a transformers model with adapters of its own.
            configs = vars(module).get("peft_config")
            for name, config in configs.items() if isinstance(configs, dict) else ():
                if isinstance(config, PeftConfig):
                    found.setdefault(name, config)
    return found


def read_coverage(
    roots: Sequence[tuple[str, nn.Module]],
    units: Sequence[Unit],
    *,
    expect_targets: Sequence[str],
    new_token_ids: Sequence[int],
) -> Coverage:
    """Compare what was asked for with what is adapted.

    Args:
        roots: (name, module) pairs that hold what is trained.
        units: The expected ones.
        expect_targets: Declared name parts.
        new_token_ids: Declared tokens.

    Returns:
        The fact.
    """
    covered = [_covered(unit) for unit in units]
    return replace(
        _of_configurations(roots, units),
        expected=tuple((part, sum(part in name for name in covered)) for part in expect_targets),
        untied=tuple(_untied(roots)),
        fresh_heads=tuple(_fresh_heads(roots)),
        tokens=tuple(_tables(roots, units, new_token_ids)) if new_token_ids else (),
    )


def _of_configurations(roots: Sequence[tuple[str, nn.Module]], units: Sequence[Unit]) -> Coverage:
    """What the configurations of the adapters ask for; the rest is left empty."""
    modules = {name: module for prefix, root in roots for name, module in root.named_modules(prefix=prefix)}
    configs = adapter_configs(roots)
    unmet: list[Request] = []
    experts: list[str] = []
    patterns: list[tuple[str, str]] = []
    unmade: list[tuple[str, tuple[str, ...]]] = []
    sparse: list[tuple[str, int, int]] = []
    for adapter in dict.fromkeys(unit.adapter for unit in units):
        config = configs.get(adapter)
        if not isinstance(config, LoraConfig):
            continue
        mine = [unit for unit in units if unit.adapter == adapter]
        covered = [_covered(unit) for unit in mine]
        fused = list(_experts_left_out(modules, config))
        experts += [name for name, _ in fused]
        taken = {entry for _, entries in fused for entry in entries}
        unmet += [r for r in _unmet(adapter, config, covered, modules) if r.name not in taken]
        patterns += _patterns(config, covered)
        unmade += _unmade(mine, config)
        sparse += _sparse(covered, config, modules)
    return Coverage(
        unmet=tuple(unmet),
        patterns=tuple(patterns),
        sparse=tuple(sparse),
        experts=tuple(experts),
        unmade=tuple(unmade),
    )


def _covered(unit: Unit) -> str:
    """Name of what a unit adapts, below the base model: a module, or a parameter of one."""
    name = unit.layer.name.rpartition("base_model.model.")[2] or unit.layer.name
    parameter = getattr(unit.layer.module, "parameter_name", None)  # of PEFT's ParamWrapper, one inside the other
    if isinstance(unit.layer.module, LoraLayer) and isinstance(parameter, str):
        name = f"{name.removesuffix('.base_layer')}.{parameter}"
        while ".base_layer." in name:
            name = name.replace(".base_layer.", ".")
    return name.removesuffix(".token_adapter")


def _names_it(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _entries(value: Any) -> list[str]:
    return [] if value is None or isinstance(value, str) else sorted(str(entry) for entry in value)


def _unmet(
    adapter: str, config: LoraConfig, covered: Sequence[str], modules: Mapping[str, nn.Module]
) -> Iterator[Request]:
    copies = [name for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper)]
    for argument in ("target_modules", "target_parameters", "modules_to_save"):
        for entry in _entries(getattr(config, argument, None)):
            if argument == "modules_to_save":
                by_task = config.task_type is not None and entry in _ADDED_BY_TASK
                met = by_task or any(name.endswith(entry) for name in copies)
            else:
                met = any(_names_it(name, entry) for name in (*covered, *copies))
                met = met or _excluded(entry, config.exclude_modules, modules)
            if not met:
                yield Request(adapter, argument, entry, any(_names_it(name, entry) for name in modules))


def _excluded(entry: str, excluded: Any, modules: Mapping[str, nn.Module]) -> bool:
    """A name was left out on purpose, so it was seen."""
    if excluded is None:
        return False
    names = [name for name in modules if _names_it(name, entry)]
    if isinstance(excluded, str):
        return any(re.search(rf"(^|\.)(?:{excluded})$", name) for name in names)
    return any(_names_it(name, str(e)) for name in names for e in excluded)


def _patterns(config: LoraConfig, covered: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, argument, None) or {}:
            # The rule of peft.utils.other.get_pattern_key, for a name whose beginning is not known.
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in covered):
                yield argument, str(key)


def _unmade(units: Sequence[Unit], config: LoraConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if not config.use_dora:
        return
    lora = [u for u in units if u.layer.lora]
    lacking = tuple(u.layer.name for u in lora if not any(s.path[0] == "lora_magnitude_vector" for s in u.slots))
    if lacking:
        yield "lora_magnitude_vector", lacking


def _sparse(
    covered: Sequence[str], config: LoraConfig, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, int, int]]:
    chosen = (config.layers_to_transform, config.layers_pattern, config.exclude_modules)
    entries = _entries(config.target_modules)
    if any(c for c in chosen if c is not None and c != 0) or config.layers_to_transform is not None or not entries:
        return
    if any(re.search(r"\d", entry) for entry in entries):
        return  # layers were named one by one
    stacks: dict[str, set[int]] = {}
    for name in covered:
        found = re.match(r"(.*?)\.(\d+)\.", name)
        if found:
            stacks.setdefault(found[1], set()).add(int(found[2]))
    for stack, indices in stacks.items():
        module = next((m for n, m in modules.items() if _names_it(n, stack)), None)
        if isinstance(module, nn.ModuleList) and len(module) >= _MANY_LAYERS and len(indices) < _FEW * len(module):
            yield stack, len(indices), len(module)


def _experts_left_out(modules: Mapping[str, nn.Module], config: LoraConfig) -> Iterator[tuple[str, list[str]]]:
    """Fused expert weights that no adapter wraps, and the requested names that meant their projections."""
    entries = _entries(config.target_modules)
    wrapped = {
        id(getattr(module.get_base_layer(), parameter))
        for module in modules.values()
        if isinstance(module, LoraLayer) and isinstance(parameter := getattr(module, "parameter_name", None), str)
    }
    for name, module in modules.items():
        if "expert" not in name.lower():
            continue
        for parameter, tensor in module._parameters.items():
            if tensor is None or tensor.ndim != 3 or not tensor.is_floating_point() or id(tensor) in wrapped:
                continue
            meant = [entry for entry in entries if _is_part_of(entry.rpartition(".")[2], parameter)]
            if meant and not name.rpartition(".")[2].startswith("lora_"):
                yield f"{name}.{parameter}", meant


def _is_part_of(projection: str, fused: str) -> bool:
    """gate_proj and up_proj are the halves of gate_up_proj, w1 and w3 those of w13."""
    stem = projection.removesuffix("_proj")
    numbered = re.match(r"([a-z]+)(\d)$", stem)
    if numbered:
        return bool(re.match(rf"{numbered[1]}\d*{numbered[2]}", fused))
    return len(stem) > 1 and stem in fused


# --- heads and tables ----------------------------------------------------------------------------


def _language_models(roots: Iterable[tuple[str, nn.Module]]) -> Iterator[nn.Module]:
    """The transformers models below the roots, each outermost one."""
    seen: set[int] = set()
    for _, root in roots:
        for module in root.modules():
            if id(module) not in seen and hasattr(type(module), "get_output_embeddings") and hasattr(module, "config"):
                seen.update(id(m) for m in module.modules())
                yield module


def _table(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _weight(module: nn.Module | None) -> torch.Tensor | None:
    """The base weight below whatever wraps a table."""
    while module is not None:
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        elif isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        else:
            weight = module._parameters.get("weight")
            return weight if isinstance(weight, torch.Tensor) else None
    return None


def _copied(module: nn.Module) -> torch.Tensor | None:
    """The weight that a ``modules_to_save`` copy trains, if a table is one."""
    for part in module.modules():
        if isinstance(part, ModulesToSaveWrapper):
            for adapter in part.active_adapters:
                if adapter in part.modules_to_save:
                    weight = getattr(part.modules_to_save[adapter], "weight", None)
                    return weight if isinstance(weight, torch.Tensor) else None
    return None


def _untied(roots: Sequence[tuple[str, nn.Module]]) -> Iterator[tuple[str, str]]:
    names = {id(module): name for prefix, root in roots for name, module in root.named_modules(prefix=prefix)}
    for model in _language_models(roots):
        tables = [_table(model, "get_input_embeddings"), _table(model, "get_output_embeddings")]
        if tables[0] is None or tables[1] is None or _weight(tables[0]) is not _weight(tables[1]):
            continue
        if _weight(tables[0]) is None:
            continue
        copies = [_copied(table) for table in tables if table is not None]
        if sum(copy is not None for copy in copies) == 1:
            trained, stays = tables if copies[0] is not None else reversed(tables)
            yield names.get(id(trained), "one"), names.get(id(stays), "the other")


def _fresh_heads(roots: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    for model in _language_models(roots):
        spread = getattr(model.config, "initializer_range", None)
        body = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
        if (
            not type(model).__name__.endswith(_HEADS)
            or not isinstance(spread, float)
            or not isinstance(body, nn.Module)
        ):
            continue
        for name, head in model.named_children():
            if head is body or not _plain_and_frozen(head):
                continue
            last = [m for m in head.modules() if isinstance(m, nn.Linear)][-1:]
            if last and _fresh(last[0], spread) and not _all_fresh(body, spread):
                yield name


def _plain_and_frozen(head: nn.Module) -> bool:
    adapted = any(isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper) for m in head.modules())
    return not adapted and not any(p.requires_grad for p in head.parameters())


def _fresh(linear: nn.Linear, spread: float) -> bool:
    """A bias of zeros, and weights of the very spread with which the architecture initialises."""
    weight = linear.weight
    if weight.device.type == "meta" or is_shard(weight) or not weight.is_floating_point() or weight.numel() < 16:
        return False
    if linear.bias is not None and bool(linear.bias.any()):
        return False
    error = 4 / (2 * weight.numel()) ** 0.5
    return bool(abs(float(weight.detach().float().std()) / spread - 1) < error)


def _all_fresh(body: nn.Module, spread: float) -> bool:
    """The whole model was made from a configuration: its head is like the rest."""
    linear = [m for m in body.modules() if isinstance(m, nn.Linear)][:4]
    return not linear or any(_fresh(m, spread) for m in linear)


def _tables(roots: Sequence[tuple[str, nn.Module]], units: Sequence[Unit], ids: Sequence[int]) -> Iterator[TokenTable]:
    """Every embedding or head of the outermost models, and the declared tokens that it does not train."""
    adapters = {unit.adapter for unit in units}
    names = {id(module): name for prefix, root in roots for name, module in root.named_modules(prefix=prefix)}
    for model in _language_models(roots):
        for side, getter in (("input", "get_input_embeddings"), ("output", "get_output_embeddings")):
            table = _table(model, getter)
            weight = _weight(table)
            if table is None or weight is None:
                continue
            trained = _trained_rows(table, adapters)
            untrained = tuple(i for i in ids if i >= len(weight) or (trained is not None and i not in trained))
            yield TokenTable(
                names.get(id(table), side), "input" if side == "input" else "output", len(weight), untrained
            )


def token_rows(roots: Sequence[tuple[str, nn.Module]], units: Sequence[Unit], ids: Sequence[int]) -> list[TokenRows]:
    """The embeddings in which rows of declared tokens train and can be watched.

    Args:
        roots: (name, module) pairs that hold what is trained.
        units: The expected ones.
        ids: Declared tokens.

    Returns:
        One entry for each.
    """
    adapters = {unit.adapter for unit in units}
    names = {id(module): name for prefix, root in roots for name, module in root.named_modules(prefix=prefix)}
    found = []
    for model in _language_models(roots):
        table = _table(model, "get_input_embeddings")
        weight = _weight(table)
        if table is not None and weight is not None:
            known = [i for i in ids if i < len(weight)]
            found.append(TokenRows(names.get(id(table), "input"), table, known, adapters))
    return [rows for rows in found if rows.watchable]


def _trained_rows(table: nn.Module, adapters: set[str]) -> set[int] | None:
    """Rows that train; None for all."""
    rows: set[int] = set()
    for part in table.modules():
        if isinstance(part, TrainableTokensLayer):
            for adapter in adapters & set(part.token_indices):
                rows.update(part.token_indices[adapter])
        elif _trains_whole(part, adapters):
            return None
    weight = _weight(table)
    return None if weight is not None and weight.requires_grad else rows


def _trains_whole(part: nn.Module, adapters: set[str]) -> bool:
    """A low-rank update of every row of a table, or a copy of the table."""
    trained: Iterable[nn.Parameter] = ()
    if isinstance(part, BaseTunerLayer):
        held = {p for unit in (part.adapter_layer_names or ()) for p in _keys(getattr(part, unit, None))}
        trained = part.parameters() if held & adapters else ()
    elif isinstance(part, ModulesToSaveWrapper):
        trained = (p for a in adapters & set(part.modules_to_save) for p in part.modules_to_save[a].parameters())
    return any(p.requires_grad for p in trained)


def _keys(container: object) -> Iterable[str]:
    return container.keys() if isinstance(container, nn.ModuleDict | nn.ParameterDict) else ()
