"""Every fault of :mod:`~lora_probe_callbacks.faults` on a tiny model: which check finds it, and when?

The runs are plain loops of a few steps on the CPU, watched as a user would watch them. A fault counts as found if the
check that it names is the only one that fails or warns, in the step that it names or before.
"""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks import faults
from lora_probe_callbacks.faults import FAULTS, Fault
from lora_probe_callbacks.monitor import LoraProbeMonitor
from lora_probe_callbacks.report.findings import Finding, LoraProbeError

__all__ = ["Outcome", "Trial", "outcome_of", "selftest", "trial_of"]

VOCABULARY, LENGTH = 64, 12


@dataclass
class Trial:
    """A run with one fault in it.

    Attributes:
        model: What is trained.
        optimizer: What steps it; AdamW over what requires gradients, if nothing else is said.
        loss: Of one batch, given the model, the token ids and the number of the step.
        between: Called before every step with its number.
        intent: What is declared to the probe.
        begins: The step in which the fault takes effect.
        scaler: A gradient scaler for the loop.
        around: Entered around the whole loop.
        set_to_none: How gradients are cleared.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    loss: Callable[[Any, Tensor, int], Tensor] = lambda model, ids, step: _next_token(model, ids)
    between: Callable[[int], None] = lambda step: None
    intent: dict[str, Any] = field(default_factory=dict)
    begins: int = 0
    scaler: torch.amp.GradScaler | None = None
    around: AbstractContextManager[Any] = field(default_factory=nullcontext)
    set_to_none: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the probe said of one fault.

    Attributes:
        fault: The fault.
        finding: What was found, the right one first; None if nothing was.
        others: Codes of what was found beside it.
        due: The last step at which it should be found.
        seconds: How long it took.
    """

    fault: Fault
    finding: Finding | None
    others: tuple[str, ...]
    due: int
    seconds: float

    @property
    def found(self) -> bool:
        """By the right check, in time, and by no other."""
        f = self.finding
        return f is not None and f.code == self.fault.code and f.step <= self.due and not self.others


def selftest() -> Iterator[Outcome]:
    """Run every fault.

    Yields:
        One outcome a fault, in the order of the entries.
    """
    for fault in sorted(FAULTS.values(), key=lambda f: (f.entry == "origin", f.entry)):
        yield outcome_of(fault)


def trial_of(fault: Fault) -> Trial:
    """The run that shows a fault.

    Args:
        fault: One of :data:`~lora_probe_callbacks.faults.FAULTS`.

    Returns:
        A run that was not started yet.
    """
    torch.manual_seed(0)
    return _TRIALS[fault.name]()


def outcome_of(fault: Fault) -> Outcome:
    """Run one fault and look at what the probe says.

    Args:
        fault: One of :data:`~lora_probe_callbacks.faults.FAULTS`.

    Returns:
        What was found.
    """
    began = time.perf_counter()
    # PEFT and torch warn of some of these themselves, among many other lines: that is not what is tested.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _quiet("transformers"):
        warnings.simplefilter("ignore")
        trial = trial_of(fault)
        findings = _findings(trial, steps=trial.begins + fault.by_step + 2)
    right = [f for f in findings if f.code == fault.code]
    first = next(iter(right or findings), None)
    return Outcome(
        fault=fault,
        finding=first,
        others=tuple(f.code for f in findings if f is not first),
        due=trial.begins + fault.by_step,
        seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _findings(trial: Trial, steps: int) -> list[Finding]:
    optimizer = _adamw(trial.model) if trial.optimizer is None else trial.optimizer
    generator = torch.Generator().manual_seed(1)
    probe = LoraProbeMonitor(
        trial.model, optimizer, scaler=trial.scaler, every_n_steps=1, verbose=False, **trial.intent
    )
    with contextlib.suppress(LoraProbeError), trial.around, probe:
        for step in range(steps):
            trial.between(step)
            ids = torch.randint(1, VOCABULARY, (2, LENGTH), generator=generator)
            loss = trial.loss(trial.model, ids, step)
            if trial.scaler is None:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            else:
                trial.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                trial.scaler.step(optimizer)
                trial.scaler.update()
            optimizer.zero_grad(set_to_none=trial.set_to_none)
    return probe.report.with_status("fail", "warn")


# --- what the runs are made of ------------------------------------------------------------------


def _llama(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type]


def _config(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **changes})


def _lora(base: Any = None, *, hook: bool = False, **changes: Any) -> PeftModel:
    model = get_peft_model(_llama() if base is None else base, _config(**changes))
    return _hooked(model) if hook else model


def _hooked(model: PeftModel) -> PeftModel:
    """As gradient checkpointing does: the inputs require gradients, and nothing raises any more."""
    model.enable_input_require_grads()
    return model


def _with_second(name: str, **changes: Any) -> PeftModel:
    model = _lora(**changes)
    model.add_adapter(name, _config(**changes))
    return model


def _adamw(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.01) -> Optimizer:
    return AdamW([{"params": [p for p in model.parameters() if p.requires_grad]}], lr=lr, weight_decay=weight_decay)


def _adapter(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if "lora_" in n]


def _next_token(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _squares(model: Any, ids: Tensor, step: int) -> Tensor:
    output: Tensor = model(ids.float() / VOCABULARY)
    return output.pow(2).mean()


def _preference(policy: Tensor, reference: Tensor) -> Tensor:
    return -F.logsigmoid(0.1 * (reference - policy))


def _against_disabled(model: Any, ids: Tensor, step: int) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        reference = _next_token(model, ids)
    return _preference(_next_token(model, ids), reference)


def _at(step: int, act: Callable[[], object]) -> Callable[[int], None]:
    def between(now: int) -> None:
        if now == step:
            act()

    return between


class _Block(nn.Module):
    """Two linear layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LENGTH, 16)
        self.second = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.first(x)
        return self.second(hidden)  # type: ignore[no-any-return]


class _Tower(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.q_proj(x)
        return hidden.relu()


class _Towers(nn.Module):
    """A vision tower on data and a language model on what it makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.language = _Tower(LENGTH, 16), _Tower(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.vision(x)
        return self.language(hidden)  # type: ignore[no-any-return]


class _Holder(nn.Module):
    """A module that holds a base model when its optimizer is built."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _llama()


# --- one run a fault ----------------------------------------------------------------------------

_TRIALS: dict[str, Callable[[], Trial]] = {}


def _trial(make: Callable[[], Trial]) -> Callable[[], Trial]:
    _TRIALS[make.__name__.removeprefix("_")] = make
    return make


@_trial
def _added_but_not_activated() -> Trial:
    model = _lora()
    faults.added_but_not_activated(model, "b", _config())
    return Trial(model, intent={"adapter": "b"})


@_trial
def _added_after_a_frozen_one() -> Trial:
    model = _hooked(faults.loaded_for_inference(_llama(), _config()))
    faults.added_after_a_frozen_one(model, "other", _config())
    return Trial(model, intent={"adapter": "other"})


@_trial
def _reference_left_trainable() -> Trial:
    model = PeftModel(_llama(), _config(inference_mode=True), adapter_name="ref")
    model.add_adapter("policy", _config())
    model.set_adapter("policy")
    faults.reference_left_trainable(model, "ref")
    return Trial(model, intent={"adapter": "policy", "reference_adapters": ("ref",)})


@_trial
def _left_disabled() -> Trial:
    model = _lora(hook=True)
    trial = Trial(model, _adamw(model))
    faults.left_disabled(model)
    return trial


@_trial
def _disabled_and_always_enabled() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        model.base_model.disable_adapter_layers()
        with faults.disabled_and_always_enabled(model):
            pass  # something else of the base model
        with torch.no_grad():
            reference = _next_token(model, ids)  # meant to be the base model
        model.base_model.enable_adapter_layers()
        return _preference(_next_token(model, ids), reference)

    return Trial(_lora(), loss=loss, intent={"reference": "disabled"})


@_trial
def _trained_before() -> Trial:
    model = _lora()
    faults.trained_before(model)
    return Trial(model, loss=_against_disabled, intent={"reference": "disabled"})


@_trial
def _reference_not_disabled() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        reference = faults.reference_not_disabled(model, input_ids=ids, labels=ids).loss
        return _preference(_next_token(model, ids), reference)

    return Trial(_lora(), loss=loss, intent={"reference": "disabled"})


@_trial
def _head_of_reference_left_trainable() -> Trial:
    model = PeftModel(_llama(), _config(inference_mode=True, modules_to_save=["lm_head"]), adapter_name="ref")
    model.add_adapter("policy", _config())
    model.set_adapter("policy")
    faults.head_of_reference_left_trainable(model, "ref")
    return Trial(model, intent={"adapter": "policy", "reference_adapters": ("ref",)})


@_trial
def _idle_adapter_stepped() -> Trial:
    model = _with_second("b")
    model.set_adapter("b")
    optimizer = AdamW(_adapter(model), lr=1e-2, weight_decay=0.1)
    between = _at(0, lambda: faults.idle_adapter_stepped(optimizer))
    return Trial(model, optimizer, between=between, intent={"adapter": "b"}, set_to_none=False)


@_trial
def _activated_after_forward() -> Trial:
    model = _hooked(_with_second("other"))

    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        output = faults.activated_after_forward(model, "default", before="other", input_ids=ids, labels=ids)
        model.set_requires_grad("other", requires_grad=False)
        result: Tensor = output.loss
        return result

    return Trial(model, loss=loss, intent={"adapter": "default", "reference_adapters": ("other",)})


@_trial
def _left_merged() -> Trial:
    model = _lora(hook=True)
    faults.left_merged(model)
    return Trial(model)


@_trial
def _merged_and_unloaded() -> Trial:
    model = _lora(hook=True)
    faults.merged_and_unloaded(model)
    return Trial(model)


@_trial
def _wrapped_again() -> Trial:
    model = _lora()
    optimizer = _adamw(model)
    return Trial(faults.wrapped_again(model, _config()), optimizer)


@_trial
def _wrapped_in_a_second_peft_model() -> Trial:
    model = _lora()
    faults.trained_before(model)
    return Trial(faults.wrapped_in_a_second_peft_model(model, _config()))


@_trial
def _resumed_and_wrapped_anew() -> Trial:
    model = _lora()
    faults.trained_before(model)
    return Trial(faults.resumed_and_wrapped_anew(model, _config()), intent={"resumed": True})


@_trial
def _skipped_because_present() -> Trial:
    model = _lora(hook=True)
    faults.skipped_because_present(model, _config())
    return Trial(model)


@_trial
def _merge_unmerge_cycles() -> Trial:
    model = _lora(_llama(torch.bfloat16))
    faults.trained_before(model, std=0.05)
    return Trial(model, between=_at(2, lambda: faults.merge_unmerge_cycles(model)), begins=2)


@_trial
def _loaded_for_inference() -> Trial:
    return Trial(_hooked(faults.loaded_for_inference(_llama(), _config())))


@_trial
def _prepared_for_kbit_after_wrapping() -> Trial:
    model = _lora()
    faults.prepared_for_kbit_after_wrapping(model)
    return Trial(model)


@_trial
def _frozen_after_wrapping() -> Trial:
    model = _lora(hook=True)
    trial = Trial(model, _adamw(model))
    faults.frozen_after_wrapping(model)
    return trial


@_trial
def _only_default_marked_trainable() -> Trial:
    model = _hooked(get_peft_model(_llama(), _config(), adapter_name="abc"))
    faults.only_default_marked_trainable(model)
    return Trial(model)


@_trial
def _unfrozen_base() -> Trial:
    model = _lora()
    faults.unfrozen_base(model)
    return Trial(model)


@_trial
def _checkpointed_without_input_gradients() -> Trial:
    model = _lora(target_modules=["q_proj", "v_proj", "lm_head"])
    faults.checkpointed_without_input_gradients(model)
    return Trial(model)


@_trial
def _tower_checkpointed_reentrant() -> Trial:
    model = get_peft_model(_Towers(), _config(target_modules=["q_proj"]))
    faults.tower_checkpointed_reentrant(model.get_base_model().vision)  # type: ignore[arg-type]
    return Trial(model, loss=_squares)


@_trial
def _recompute_with_other_dropout() -> Trial:
    model = _lora(lora_dropout=0.5)
    faults.trained_before(model)
    faults.recompute_with_other_dropout(model)
    return Trial(model.train())


@_trial
def _optimizer_before_adapter() -> Trial:
    optimizer, model = faults.optimizer_before_adapter(_llama(), _config())
    return Trial(model, optimizer)


@_trial
def _attached_when_training_starts() -> Trial:
    """The order of events of Lightning, without it."""
    holder = _Holder()
    faults.attached_when_training_starts(holder, "model", _config())
    optimizer = AdamW(holder.parameters(), lr=1e-3)
    holder.on_train_start()  # type: ignore[operator]
    return Trial(holder, optimizer, lambda holder, ids, step: _next_token(holder.model, ids))


@_trial
def _scheduler_never_stepped() -> Trial:
    model = _lora()
    optimizer = _adamw(model)
    faults.scheduler_never_stepped(optimizer)
    return Trial(model, optimizer)


@_trial
def _embedding_missing_from_loraplus() -> Trial:
    model = _lora(target_modules=["q_proj", "embed_tokens"])
    return Trial(model, faults.embedding_missing_from_loraplus(model))


@_trial
def _master_copies_from_before() -> Trial:
    model = _lora()
    optimizer = _adamw(model)
    faults.master_copies_from_before(optimizer)
    faults.trained_before(model)  # restored
    return Trial(model, optimizer)


@_trial
def _second_moment_not_representable() -> Trial:
    model = _lora()
    optimizer = _adamw(model)
    faults.second_moment_not_representable(optimizer)
    return Trial(model, optimizer)


@_trial
def _labels_all_masked() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        result: Tensor = model(**faults.labels_all_masked({"input_ids": ids})).loss
        return result

    model = _lora()
    faults.trained_before(model)
    return Trial(model, _adamw(model, weight_decay=0.1), loss)


@_trial
def _head_bypassed() -> Trial:
    model = _lora(target_modules=["q_proj", "lm_head"])
    return Trial(model, loss=lambda model, ids, step: faults.head_bypassed(model, ids))


@_trial
def _projection_inside_a_kernel() -> Trial:
    model = get_peft_model(_Block(), _config(target_modules=["first", "second"]))
    faults.projection_inside_a_kernel(model.get_base_model(), "first", "second")
    return Trial(model, loss=_squares)


@_trial
def _no_advantage() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        return faults.no_advantage(model(input_ids=ids).logits.log_softmax(-1))

    model = _lora()
    return Trial(model, _adamw(model, weight_decay=0.0), loss)


@_trial
def _casts_cached_without_gradients() -> Trial:
    model = _lora(hook=True)
    faults.casts_cached_without_gradients(model)
    return Trial(model)


@_trial
def _outer_autocast() -> Trial:
    model = _lora()
    return Trial(model, SGD(_adapter(model), lr=50.0), around=faults.outer_autocast("cpu"))


@_trial
def _base_model_called() -> Trial:
    def loss(model: Any, ids: Tensor, step: int) -> Tensor:
        result: Tensor = faults.base_model_called(model, input_ids=ids, labels=ids).loss
        return result

    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    return Trial(_hooked(get_peft_model(_llama(), prompts)), loss=loss)


@_trial
def _half_precision_adapter() -> Trial:
    model = _lora(_llama(torch.bfloat16))
    faults.half_precision_adapter(model)
    return Trial(model, _adamw(model, lr=1e-5, weight_decay=0.0))


@_trial
def _averaged_in_half_precision() -> Trial:
    model = _with_second("teacher")
    faults.trained_before(model)
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if ".teacher." in name:
            tensor.data = tensors[name.replace(".teacher.", ".default.")].data.to(torch.bfloat16)
    model.set_adapter("default")

    def between(step: int) -> None:
        if step:
            faults.averaged_in_half_precision(model, "default", "teacher")

    return Trial(model, between=between, intent={"adapter": "default", "lagged_adapters": ("teacher",)})


@_trial
def _overflowing() -> Trial:
    scaler = torch.amp.GradScaler("cpu")
    return Trial(_lora(), loss=lambda model, ids, step: faults.overflowing(_next_token(model, ids)), scaler=scaler)


@_trial
def _steps_swallowed() -> Trial:
    model = _lora()
    optimizer = _adamw(model)
    faults.steps_swallowed(optimizer)
    return Trial(model, optimizer)


@_trial
def _misspelt_target() -> Trial:
    return Trial(faults.misspelt_target(_llama(), _config()))


@_trial
def _head_dropped_by_layer_choice() -> Trial:
    return Trial(faults.head_dropped_by_layer_choice(_llama(), _config()))


@_trial
def _one_tower_only() -> Trial:
    model = faults.one_tower_only(_Towers(), _config(target_modules=["q_proj"]), "vision")
    return Trial(model, loss=_squares, intent={"expect_targets": ("vision", "language")})


@_trial
def _experts_that_are_no_modules() -> Trial:
    mixture: Any = faults.experts_that_are_no_modules(LENGTH)
    return Trial(get_peft_model(mixture, _config(target_modules=["up_proj", "down_proj"])), loss=_squares)


@_trial
def _head_copied_from_a_tie() -> Trial:
    return Trial(faults.head_copied_from_a_tie(_llama(tied=True), _config()))


@_trial
def _tokens_added_before_wrapping() -> Trial:
    model = faults.tokens_added_before_wrapping(_llama(), _config())
    return Trial(model, intent={"new_token_ids": range(VOCABULARY, VOCABULARY + 4)})


@_trial
def _target_filtered_out() -> Trial:
    model = faults.target_filtered_out(_llama(), _config(target_modules=["q_proj", "lm_head"]))
    return Trial(model, intent={"expect_targets": ("q_proj", "lm_head")})


@_trial
def _magnitude_frozen() -> Trial:
    model = _lora(use_dora=True)
    faults.magnitude_frozen(model)
    return Trial(model)


@_trial
def _principal_part_in_the_adapter() -> Trial:
    model = faults.principal_part_in_the_adapter(_llama(), _config())
    return Trial(model, loss=_against_disabled, intent={"reference": "disabled"})


@_trial
def _quantisation_error_in_the_adapter() -> Trial:
    model = _lora()
    faults.quantisation_error_in_the_adapter(model)
    return Trial(model, loss=_against_disabled, intent={"reference": "disabled"})


@_trial
def _initialised_after_wrapping() -> Trial:
    model = _lora()
    faults.initialised_after_wrapping(model)
    return Trial(model, intent={"resumed": False})


@_trial
def _pattern_that_matches_nothing() -> Trial:
    return Trial(faults.pattern_that_matches_nothing(_llama(), _config()))
