"""One training run, described once and fitted by whichever front door a test asks for.

The models are real and tiny. A test changes the run (its model, its loss, its optimizer, or what
happens between two steps), fits it, and looks at what the probe reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import LoraProbe, ProbeReport

VOCABULARY = 64


# --- models -------------------------------------------------------------------------------------


def llama(dtype: torch.dtype = torch.float32, layers: int = 2, **config: Any) -> LlamaForCausalLM:
    """A Llama of some ten thousand parameters."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **config})).to(dtype)


def config(**changes: Any) -> LoraConfig:
    """LoRA of rank 4 on the attention's q and v."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def lora(*, hook: bool = False, base: nn.Module | None = None, **changes: Any) -> PeftModel:
    """A PeftModel. ``hook`` installs what gradient checkpointing installs: inputs that require gradients."""
    model = get_peft_model(llama() if base is None else base, config(**changes))
    if hook:
        model.enable_input_require_grads()
    return model


def adapter_tensors(model: nn.Module, adapter: str = "") -> dict[str, nn.Parameter]:
    """The LoRA tensors of one adapter, or of all."""
    return {n: p for n, p in model.named_parameters() if "lora_" in n and (not adapter or f".{adapter}" in n)}


def trained(model: nn.Module, adapter: str = "", std: float = 0.1) -> None:
    """Make an adapter one that was trained before: no B is zero."""
    for name, tensor in adapter_tensors(model, adapter).items():
        if "lora_B" in name:
            nn.init.normal_(tensor, std=std)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What a script gives to its optimizer."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01) -> Optimizer:
    """AdamW over what is trainable. A group may be empty, as under the Transformers Trainer."""
    return AdamW([{"params": trainable(model)}], lr=lr, weight_decay=weight_decay)


def next_token_loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    """What a causal language model returns as its loss."""
    return model(input_ids=batch, labels=batch).loss


def batches(number: int, size: int = 2) -> list[Tensor]:
    """Token ids, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (size, 12), generator=generator) for _ in range(number)]


# --- runs ---------------------------------------------------------------------------------------


@dataclass
class Training:
    """A run that any front door can fit.

    Attributes:
        model: What is trained. May be exchanged between steps.
        loss: Of one batch, given the model, the batch and its number.
        optimizer: The optimizer, or what makes it from the model.
        between_steps: Called with this run and the number of the batch that follows.
        scheduler: Makes a scheduler, stepped after every step.
        accumulate: Batches per step.
        set_to_none: How gradients are cleared.
        precision: Lightning's words: "32-true", "bf16-mixed", "16-mixed".
        around: Entered around the whole loop.
    """

    model: nn.Module
    loss: Callable[[nn.Module, Tensor, int], Tensor] = next_token_loss
    optimizer: Optimizer | Callable[[nn.Module], Optimizer] = adamw
    between_steps: Callable[[Training, int], None] = lambda run, step: None
    scheduler: Callable[[Optimizer], Any] | None = None
    accumulate: int = 1
    set_to_none: bool = True
    precision: str = "32-true"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def built_optimizer(self) -> Optimizer:
        if not isinstance(self.optimizer, Optimizer):
            self.optimizer = self.optimizer(self.model)
        return self.optimizer


class Loop(pl.LightningModule):
    """A run as a LightningModule."""

    def __init__(self, run: Training) -> None:
        super().__init__()
        self.run = run
        self.model = run.model

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        self.run.between_steps(self.run, batch_idx)
        if self.model is not self.run.model:
            self.model = self.run.model

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.run.loss(self.model, batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self.run.built_optimizer()
        if self.run.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.run.scheduler(optimizer), "interval": "step"},
        }

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=self.run.set_to_none)


def trainer(probe: pl.Callback, steps: int, **options: Any) -> pl.Trainer:
    """A Trainer that writes nothing."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        **{"max_steps": steps, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options},
        callbacks=[probe],
    )


def fit_lightning(run: Training | pl.LightningModule, probe: pl.Callback, steps: int = 8, **options: Any) -> None:
    """Fit for ``steps`` optimizer steps under Lightning."""
    module = Loop(run) if isinstance(run, Training) else run
    if isinstance(run, Training):
        options.setdefault("accumulate_grad_batches", run.accumulate)
        if run.precision == "16-mixed":
            options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]
        else:
            options.setdefault("precision", run.precision)
    around = run.around if isinstance(run, Training) else nullcontext
    data = DataLoader(batches(steps * options.get("accumulate_grad_batches", 1)), batch_size=None)
    with around():
        trainer(probe, steps, **options).fit(module, data)


# --- what the probe said ------------------------------------------------------------------------


@dataclass
class Watched:
    """A run that has ended, one way or the other."""

    report: ProbeReport
    error: BaseException | None

    @property
    def found(self) -> list[tuple[str, str, int]]:
        """Code, status and step of every failure and warning."""
        return [(f.code, f.status, f.step) for f in self.report.with_status("fail", "warn")]


def watch(run: Training | pl.LightningModule, steps: int = 8, *, fit: Any = fit_lightning, **intent: Any) -> Watched:
    """Fit with a probe, and take hold of whatever ends the run."""
    options = intent.pop("options", {})
    probe = LoraProbe(verbose=False, **intent)
    error: BaseException | None = None
    try:
        fit(run, probe, steps, **options)
    except Exception as raised:
        error = raised
    model = run.model if isinstance(run, Training) else run
    assert not left_by_the_probe(model), "hooks of the probe are left on the model"
    assert not probe.report.internal_errors, "\n".join(probe.report.internal_errors)
    return Watched(probe.report, error)


def hooks_of_the_probe(model: nn.Module) -> Iterator[str]:
    """Where the probe has left something behind."""
    for name, module in model.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            for hook in hooks.values():
                if "lora_probe_callbacks" in str(getattr(getattr(hook, "func", hook), "__module__", "")):
                    yield name


def left_by_the_probe(model: nn.Module) -> list[str]:
    """The same after a run, with what counts backward passes at a tensor while it lasts."""
    found = list(hooks_of_the_probe(model))
    for name, tensor in model.named_parameters():
        hooks = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
        if any("lora_probe_callbacks" in str(type(hook).__module__) for hook in hooks.values()):
            found.append(name)
    return found


def assert_found(
    watched: Watched,
    code: str,
    step: int,
    *words: str,
    status: str = "fail",
    evidence: Mapping[str, object] | None = None,
) -> None:
    """Exactly one finding: this code, first seen in this step, in these words, with a fix."""
    assert watched.found == [(code, status, step)], (watched.found, watched.error)
    finding = watched.report.with_status("fail", "warn")[0]
    for word in words:
        assert word in finding.message, finding.message
    assert finding.fix
    assert {"got", "expected"} <= finding.evidence.keys()
    for key, part in (evidence or {}).items():
        assert str(part) in str(finding.evidence.get(key)), finding.evidence


def assert_healthy(watched: Watched) -> None:
    """Nothing failed and nothing warned."""
    assert watched.error is None, watched.error
    assert not watched.found, list(map(str, watched.report.with_status("fail", "warn")))
