"""What can be compared in this process: an adapter that is loaded again, a merge, and any engine through a function."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from lora_probe_callbacks.restore.random import random_state_restored
from lora_probe_callbacks.serving.diagnosis import Scored
from lora_probe_callbacks.serving.errors import CannotCompareError
from lora_probe_callbacks.serving.live import LiveModel
from lora_probe_callbacks.serving.measure import LogProbs
from lora_probe_callbacks.serving.scoring import Rows, in_eval_mode, score

__all__ = ["Engine", "Merged", "Reloaded", "Target", "as_log_probs", "round_weights"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUANTISED = ("nf4", "int8")
_QUANTISED_KINDS = ("Linear4bit", "Linear8bitLt")


class Target(Protocol):
    """Something that should hold the adapter."""

    def scored(self, live: LiveModel) -> Scored:
        """Score it and its base on the tokens of the live model."""
        ...


@dataclass(frozen=True, slots=True)
class Engine:
    """Any engine, through a function.

    Args:
        score: Called as ``score(tokens, adapter)`` with lists of token ids, and True for the adapter or False for the
            base alone; returns for each sequence the log-probs of its tokens but the first, in nats.
        name: What messages call it.
    """

    score: Callable[[Rows, bool], Any]
    name: str = "the engine"

    def scored(self, live: LiveModel) -> Scored:
        """Ask twice."""
        served, base = (as_log_probs(self.score([*live.rows], on), live.rows, self.name) for on in (True, False))
        return Scored(self.name, served, base)


def as_log_probs(returned: Any, rows: Rows, who: str) -> LogProbs:
    """Log-probs as somebody returned them, one array a sequence.

    Args:
        returned: Lists, arrays or tensors of numbers.
        rows: The tokens that were asked for.
        who: Who returned them.

    Returns:
        The same as arrays.

    Raises:
        CannotCompareError: If they are not of these tokens, or not log-probs.
    """
    try:
        found = [np.asarray(row.tolist() if hasattr(row, "tolist") else row, np.float64) for row in returned]
    except (TypeError, ValueError):
        raise CannotCompareError(f"got {type(returned).__name__} from {who}, expected lists of log-probs") from None
    if len(found) != len(rows):
        raise CannotCompareError(f"got log-probs of {len(found)} sequences from {who}, expected {len(rows)}")
    for i, (values, row) in enumerate(zip(found, rows, strict=True)):
        if values.shape != (len(row) - 1,):
            raise CannotCompareError(
                f"got log-probs of shape {list(values.shape)} from {who} for sequence {i} of {len(row)} tokens, "
                f"expected [{len(row) - 1}]: one for every token but the first"
            )
    flat = np.concatenate(found)
    if not np.isfinite(flat).all() or (flat > 1e-3).any():
        raise CannotCompareError(f"got log-probs up to {flat.max():g} from {who}, expected finite ones of at most 0")
    return found


# --- loaded again -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reloaded:
    """A saved adapter, loaded onto its base again.

    Args:
        path: The folder that ``save_pretrained`` wrote.
        base: The base: a folder, or a model, which is copied; default: the one that the adapter's configuration names,
            if it is a folder, else a copy of the live one.
    """

    path: str | os.PathLike[str]
    base: str | os.PathLike[str] | nn.Module | None = None

    def scored(self, live: LiveModel) -> Scored:
        """Load it and score it."""
        path = Path(self.path)
        if not (path / "adapter_config.json").is_file():
            raise CannotCompareError(f"got {path} without adapter_config.json, expected a folder of save_pretrained")
        with _alone(f"{path} cannot be loaded"):
            base = self._base(live, path)
            off = score(in_eval_mode(base), live.rows)
            model = in_eval_mode(PeftModel.from_pretrained(base, str(path)))
            on = score(model, live.rows)
        return Scored(f"{path.name} reloaded", on, off, checkpoints=_beside(path))

    def _base(self, live: LiveModel, path: Path) -> nn.Module:
        if isinstance(self.base, nn.Module):
            return copy.deepcopy(self.base)
        named = self.base or PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        if named and Path(named).is_dir():
            inner = live.module.get_base_model() if isinstance(live.module, PeftModel) else live.module
            floating = next(p.dtype for p in inner.parameters() if p.is_floating_point())
            config = getattr(getattr(inner, "config", None), "quantization_config", None)
            return _from_pretrained(Path(named), dtype=floating, quantization_config=config)
        if self.base is not None:
            raise CannotCompareError(f"got the base {self.base}, which is no folder")
        return _bare_copy(live)


def _beside(path: Path) -> list[Path]:
    """Earlier checkpoints of the same run, the latest first."""
    found = [p for p in path.parent.glob("checkpoint-*") if p != path and (p / "adapter_config.json").is_file()]
    return sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)[:8]


# --- merged -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Merged:
    """The adapter in the weights of its base.

    Args:
        what: The folder of a merged model; or what the live model is merged into: a type, ``torch.bfloat16``,
            ``"bfloat16"``, ``"float16"``, ``"float32"``, or a quantisation, ``"nf4"``, ``"int8"``.
    """

    what: str | os.PathLike[str] | torch.dtype

    def scored(self, live: LiveModel) -> Scored:
        """Merge or load, and score in float32, so that nothing but the weights differs."""
        kind = str(self.what).removeprefix("torch.")
        known = kind in _DTYPES or kind in _QUANTISED
        folder = None if known else Path(self.what)  # type: ignore[arg-type]
        if folder is not None and not (folder / "config.json").is_file():
            raise CannotCompareError(
                f"got {folder} without config.json, expected the folder of a merged model, or one of "
                f"{', '.join((*_DTYPES, *_QUANTISED))}"
            )
        with _alone(f"{kind} cannot be merged" if known else f"{folder} cannot be loaded"):
            merged, off = _merged_copy(live)
            on: LogProbs = score(merged, live.rows)
            if folder is not None:
                loaded = _from_pretrained(folder, dtype="auto", quantization_config=None)
                kind = _kind_of(loaded)
                served = score(in_eval_mode(_in_float32(loaded)), live.rows)
            round_weights(merged, kind)
            best = score(merged, live.rows)
        if live.exact:
            on, off = live.on, live.off
        target = f"merged into {kind}" if folder is None else f"{folder.name}, merged into {kind}"
        return Scored(target, best if folder is None else served, off, on, off, best, kind, merged=True)


def _merged_copy(live: LiveModel) -> tuple[nn.Module, LogProbs]:
    """In float32: the merged model, and log-probs of its base."""
    model = in_eval_mode(copy.deepcopy(live.module))
    if _is_quantised(model):
        model = _in_float32_with_adapter(live)
    _float(model)
    if not isinstance(model, PeftModel):
        raise CannotCompareError(f"got a {type(model).__name__} with adapters, expected a PeftModel to merge")
    with model.disable_adapter():
        off = score(model, live.rows)
    return model.merge_and_unload(), off


def _in_float32_with_adapter(live: LiveModel) -> PeftModel:
    """The adapter on the base that its quantised one stands for."""
    if not isinstance(live.module, PeftModel):
        raise CannotCompareError(f"got a {type(live.module).__name__} with adapters, expected a PeftModel to merge")
    adapter = live.active[0]
    config: Any = copy.deepcopy(live.module.peft_config[adapter])
    config.init_lora_weights = True  # others would change the base
    model: PeftModel = get_peft_model(_in_float32(_bare_copy(live)), config)
    state = get_peft_model_state_dict(live.module, adapter_name=adapter, save_embedding_layers=False)
    set_peft_model_state_dict(model, state)
    in_eval_mode(model)
    return model


def round_weights(model: nn.Module, kind: str) -> None:
    """Round the weights of a model in float32 as a type or a quantisation would.

    Args:
        model: A merged model, which is changed.
        kind: ``"bfloat16"`` and the like, ``"nf4"`` or ``"int8"``.
    """
    with torch.no_grad():
        if kind in _DTYPES:
            for parameter in model.parameters():
                parameter.copy_(parameter.to(_DTYPES[kind]).to(parameter.dtype))
            return
        ask: Any = getattr(model, "get_output_embeddings", None)
        head = None if ask is None else ask()
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not head:
                module.weight.copy_(_nf4(module.weight) if kind == "nf4" else _int8(module.weight))


def _nf4(weight: torch.Tensor) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.detach().float().contiguous(), quant_type="nf4")
    unpacked: torch.Tensor = dequantize_4bit(packed, state)
    return unpacked


def _int8(weight: torch.Tensor) -> torch.Tensor:
    """The rows of LLM.int8(), each with its own largest value."""
    step = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    return (weight / step).round() * step


# --- copies -------------------------------------------------------------------------------------


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """Load and copy without warnings and without a random number; an error is one line."""
    with warnings.catch_warnings(), random_state_restored():
        warnings.simplefilter("ignore")
        try:
            yield
        except CannotCompareError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise CannotCompareError(f"{what}: {type(error).__name__}: {text}") from error


def _from_pretrained(folder: Path, *, dtype: Any, quantization_config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    more = {} if quantization_config is None else {"quantization_config": quantization_config}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **more)
    return model


def _bare_copy(live: LiveModel) -> nn.Module:
    """The live base alone."""
    model = copy.deepcopy(live.module)
    if not isinstance(model, PeftModel):
        raise CannotCompareError(f"got a {type(model).__name__} with adapters, expected base= to load them onto")
    base: nn.Module = model.unload()
    return base


def _is_quantised(model: nn.Module) -> bool:
    return any(type(m).__name__ in _QUANTISED_KINDS for m in model.modules())


def _kind_of(model: nn.Module) -> str:
    """In which type a loaded model is."""
    names = {type(m).__name__ for m in model.modules()}
    if "Linear4bit" in names:
        return "nf4"
    if "Linear8bitLt" in names:
        return "int8"
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def _in_float32(model: nn.Module) -> nn.Module:
    """The same weights in float32, those of a quantised layer as it stands for them."""
    module: Any
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module).__name__ in _QUANTISED_KINDS:
                weight, bias = dequantize_module_weight(module).detach().float(), module._parameters.get("bias")
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device)
                plain.weight.data = weight
                if bias is not None:
                    plain.bias.data = bias.detach().float()
                setattr(parent, name, plain)
    return _float(model)


def _float(model: nn.Module) -> nn.Module:
    """Tensor by tensor: a model of transformers that was quantised refuses to be asked as a whole."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model
