"""A base model and an adapter from disk or hub, or one clear reason why not.

Safetensors only, and no code from the hub unless it is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from safetensors import SafetensorError, safe_open
from torch import nn

__all__ = ["ADAPTER", "CannotLoadError", "Source", "load", "one_line"]

ADAPTER = "default"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class CannotLoadError(Exception):
    """What was asked for cannot be loaded; the message says what was got, what was expected and what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """What to load, and how.

    Args:
        base: A folder, or a name on the hub.
        adapter: A folder, or a name on the hub; None for a fresh LoRA adapter on all linear layers.
        four_bit: Quantise the base to nf4.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; None for the first GPU where there is one.
        dtype: A name of a floating type; None for bfloat16 on a GPU and float32 elsewhere.
        attn: An attention implementation of transformers; None for the model's own choice.
        checkpointing: Switch gradient checkpointing on.
        trust_remote_code: Run code that comes with the base.
    """

    base: str
    adapter: str | None = None
    four_bit: bool = False
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    attn: str | None = None
    checkpointing: bool = False
    trust_remote_code: bool = False


def load(source: Source) -> PeftModel:
    """Load base and adapter, ready for a backward.

    Dropout is off, so that two forwards can be compared.

    Args:
        source: What to load.

    Returns:
        The model, its adapter (named ``"default"``) active and trainable.

    Raises:
        CannotLoadError: For a path that is not there, a corrupt file, a base that the adapter does
            not fit, a device that is missing.
    """
    device = _device(source.device)
    folder = None if source.adapter is None else _adapter_folder(source.adapter)
    config = _fresh() if folder is None else _adapter_config(folder)
    if folder is not None:
        _check_tensors(folder)
    base = _base(source, device)
    with _quiet():
        if folder is None:
            model = _fitted(lambda: get_peft_model(base, config), source)
        else:
            model = _fitted(
                lambda: PeftModel.from_pretrained(
                    base, str(folder), is_trainable=True, config=config, torch_device=str(device)
                ),
                source,
            )
            _check_complete(model, folder)
    if not any(p.requires_grad for p in model.parameters()):
        raise CannotLoadError("got an adapter without a trainable tensor, expected a LoRA adapter")
    return _without_dropout(model, training=source.checkpointing)


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line.

    Args:
        error: The error.
        most: Characters.

    Returns:
        The text.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CannotLoadError(f"got --device {name}, expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CannotLoadError(f"got --device {name}, but torch sees no CUDA device here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CannotLoadError(f"got --device {name}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise CannotLoadError(f"got --device {name}, but torch sees no MPS device here: use --device cpu")
    return device


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or Path(name).exists()


def _adapter_folder(name: str) -> Path:
    path = Path(name).expanduser()
    if not _is_path(name):
        from huggingface_hub import snapshot_download

        try:  # nothing else: a pickle that is never downloaded is never loaded
            wanted = ["adapter_config.json", "adapter_model.safetensors"]
            path = Path(snapshot_download(name, allow_patterns=wanted))
        except Exception as error:
            raise CannotLoadError(
                f"got --adapter {name}: no such folder, and from the hub: {one_line(error)}"
            ) from error
    if not path.is_dir():
        raise CannotLoadError(f"got --adapter {name}, which is no folder: expected what save_pretrained has written")
    if not (path / "adapter_config.json").is_file():
        raise CannotLoadError(f"got --adapter {name} without adapter_config.json: expected a folder of save_pretrained")
    if not (path / "adapter_model.safetensors").is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which is not loaded)" if (path / "adapter_model.bin").exists() else ""
        )
        raise CannotLoadError(
            f"got --adapter {name} without adapter_model.safetensors{pickled}: save it with safe_serialization=True"
        )
    return path


def _adapter_config(folder: Path) -> PeftConfig:
    try:
        with _quiet():
            config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise CannotLoadError(f"got a corrupt adapter_config.json in {folder}: {one_line(error)}") from error
    if not isinstance(config, LoraConfig):
        raise CannotLoadError(f"got an adapter of type {config.peft_type}, expected LoRA: no other has an A and a B")
    return config


def _check_tensors(folder: Path) -> None:
    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CannotLoadError(
            f"got a corrupt adapter_model.safetensors in {folder} ({one_line(error)}): save or download it again"
        ) from error
    if not names:
        raise CannotLoadError(
            f"got an adapter_model.safetensors in {folder} without a tensor: it was saved after merging, or sharded "
            "(DeepSpeed ZeRO-3, FSDP) without gathering"
        )


def _base(source: Source, device: torch.device) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    name = source.base
    if _is_path(name) and not Path(name).expanduser().is_dir():
        raise CannotLoadError(f"got --base {name}, which is no folder: expected what save_pretrained has written")
    where = str(Path(name).expanduser()) if _is_path(name) else name
    dtype = DTYPES[source.dtype] if source.dtype else torch.bfloat16 if device.type == "cuda" else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "device_map": {"": str(device)}}
    if source.attn is not None:
        options["attn_implementation"] = source.attn
    if source.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(where, trust_remote_code=source.trust_remote_code)
            config.use_cache = False
            base: nn.Module = AutoModelForCausalLM.from_pretrained(
                where, config=config, trust_remote_code=source.trust_remote_code, **options
            )
    except Exception as error:
        raise CannotLoadError(f"got --base {name}, which cannot be loaded: {one_line(error)}") from error
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks a layer for inference at its first forward in eval mode, and
            # what it repacked has no backward.
            vars(module)["support_avx512bf16_for_cpu"] = False
    if source.four_bit:
        base = prepare_model_for_kbit_training(base, False)  # type: ignore[no-untyped-call]
    if source.checkpointing:
        with _quiet():  # transformers 5.23 has a new name for it, 5.17 has not
            base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        base.enable_input_require_grads()  # type: ignore[operator]
    return base


def _fresh() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def _fitted(make: Any, source: Source) -> PeftModel:
    try:
        model: PeftModel = make()
    except Exception as error:
        who = "a fresh adapter" if source.adapter is None else f"--adapter {source.adapter}"
        raise CannotLoadError(
            f"got --base {source.base}, which {who} does not fit: {one_line(error)}; expected the base that the "
            "adapter was trained on"
        ) from error
    return model


def _check_complete(model: PeftModel, folder: Path) -> None:
    """PEFT only warns of tensors that are not in the file, and leaves them as they were made: fresh."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    expected = set(get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False))
    missing, unused = sorted(expected - saved), sorted(saved - expected)
    unused = [name for name in unused if "lora_" in name]  # embeddings may be saved beside the adapter
    if missing or unused:
        raise CannotLoadError(
            f"got an adapter in {folder} that does not fit the base: {len(missing)} of its {len(expected)} tensors are "
            f"not in the file{_first(missing)}, and {len(unused)} in the file have no place{_first(unused)}; expected "
            "the base that the adapter was trained on, and names as PEFT saves them"
        )


def _first(names: list[str]) -> str:
    return f" ({names[0]})" if names else ""


def _without_dropout(model: PeftModel, *, training: bool) -> PeftModel:
    """Training mode is needed for checkpointing alone."""
    model.train(training)
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.eval()
        for name, value in vars(module).items():  # the functional form, in attention (transformers 5.23)
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor the progress bars of transformers: what matters is checked here."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
