"""Healthy runs that look broken for a moment: the probe must judge them, and find nothing.

Each test trains a real model with the probe at every step. "Nothing found" alone would also be
true of a probe that looks at nothing, so the checks must have ended as passed, and late in the run.
"""

from __future__ import annotations

import contextlib
import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from peft import get_peft_model
from support.tiny import (
    VOCABULARY,
    Batches,
    Task,
    adamw,
    assert_healthy,
    judged,
    language_loss,
    llama,
    lora,
    peft_llama,
    token_batches,
)
from torch import nn

from lora_probe_callbacks import LoraProbe


def log_probabilities(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


def preference_loss(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """DPO's loss of a batch whose first half is preferred to its second."""
    margin = policy - reference
    return -nn.functional.logsigmoid(0.5 * (margin[:1] - margin[1:])).mean()


def checkpointed_llama(*, reentrant: bool) -> nn.Module:
    base = llama()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    return base


# --- a signal that is not there at first ---------------------------------------------------------


@pytest.mark.parametrize("every", [1, 50])
def test_plain_lora(every):
    report = judged(Task(peft_llama(lora_dropout=0.1)), intent={"every_n_steps": every})
    assert_healthy(report, from_step=3)


def test_warm_up_from_zero():
    def optimizers(task: Task) -> dict[str, object]:
        optimizer = adamw(task)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    assert_healthy(judged(Task(peft_llama(), optimizers=optimizers)))


@pytest.mark.parametrize("empty", [{0, 1}, {0, 1, 2}, {4, 9, 10, 11}])
def test_batches_with_zero_advantage(empty):
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        advantage = torch.zeros(2) if index in empty else torch.tensor([1.0, -1.0])
        return -(advantage * log_probabilities(task.model, ids)).mean()

    assert_healthy(judged(Task(peft_llama(), step)))


def test_first_steps_of_mixed_precision_overflow():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-9)
    rates = []

    class Scales(pl.Callback):
        def on_train_batch_end(self, *args: object) -> None:
            rates.append(scaler.get_scale())

    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    report = judged(Task(peft_llama()), plugins=[precision], callbacks=[Scales()])
    assert rates[:4] == [2.0**31, 2.0**22, 2.0**13, 2.0**13], "the recipe must overflow three times"
    assert_healthy(report)


# --- other forwards beside the training forward --------------------------------------------------


@pytest.mark.parametrize("reference_first", [True, False])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_reference_with_disabled_adapter(grad_mode, reference_first):
    def reference(task: Task, ids: torch.Tensor) -> torch.Tensor:
        with contextlib.nullcontext() if grad_mode else torch.no_grad(), task.model.disable_adapter():
            return log_probabilities(task.model, ids).detach()

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if reference_first:
            aside = reference(task, ids)
            return preference_loss(log_probabilities(task.model, ids), aside)
        policy = log_probabilities(task.model, ids)
        return preference_loss(policy, reference(task, ids))

    assert_healthy(judged(Task(peft_llama(), step)))


class PolicyAndReference(nn.Module):
    """Both forwards inside one outermost module."""

    def __init__(self, policy: nn.Module, *, reference_first: bool) -> None:
        super().__init__()
        self.policy, self.reference_first = policy, reference_first

    def reference(self, ids: torch.Tensor) -> torch.Tensor:
        with self.policy.disable_adapter():
            return log_probabilities(self.policy, ids).detach()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.reference_first:
            reference = self.reference(ids)
            return preference_loss(log_probabilities(self.policy, ids), reference)
        policy = log_probabilities(self.policy, ids)
        return preference_loss(policy, self.reference(ids))


@pytest.mark.parametrize("reference_first", [True, False])
def test_reference_inside_the_outermost_module(reference_first):
    pair = PolicyAndReference(peft_llama(), reference_first=reference_first)
    assert_healthy(judged(Task(pair, lambda task, ids, _: task.model(ids))))


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_reference_by_switching_adapters(grad_mode, declared):
    model = peft_llama()
    model.add_adapter("ref", lora())

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        with contextlib.nullcontext() if grad_mode else torch.no_grad():
            task.model.set_adapter("ref")
            reference = log_probabilities(task.model, ids).detach()
            task.model.set_adapter("default")
        return preference_loss(log_probabilities(task.model, ids), reference)

    report = judged(Task(model, step), intent={"reference_adapters": ("ref",) if declared else ()})
    assert_healthy(report, also="LP207" if declared else "")


def test_policy_is_chosen_inside_the_training_step():
    model = peft_llama()
    model.add_adapter("policy", lora())

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        with torch.no_grad():
            task.model.set_adapter("default")
            reference = log_probabilities(task.model, ids)
        task.model.set_adapter("policy")
        return preference_loss(log_probabilities(task.model, ids), reference)

    def optimizers(task: Task) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for n, p in task.named_parameters() if ".policy." in n], lr=1e-2)

    intent = {"adapter": "policy", "reference_adapters": ("default",)}
    report = judged(Task(model, step, optimizers), intent=intent)
    # At the end of a step the policy is active; default was frozen again by the switch.
    assert_healthy(report, also="LP207")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_generate_unmerge(dtype):
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if index % 2:
            with torch.no_grad():
                task.model.merge_adapter()
                task.model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
                task.model.unmerge_adapter()
        return language_loss(task, ids, index)

    # At a learning rate that keeps the adapter small beside the base, as in practice: the rounding of
    # the 16-bit base is relative to what is added.
    model = peft_llama(llama().to(dtype))
    assert_healthy(judged(Task(model, step, lambda task: adamw(task, lr=1e-3)), token_batches(17)))


def test_validation_between_steps():
    class Validated(Task):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.log("loss", language_loss(self, batch, batch_idx))

    task, probe = Validated(peft_llama()), LoraProbe(every_n_steps=1, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        val_check_interval=3,
        callbacks=[probe],
    )
    trainer.fit(task, token_batches(20), token_batches(2))
    assert_healthy(probe.report)


def test_forward_that_fails_once_and_is_tried_again():
    """Skipping a batch that runs out of memory is a habit of training loops."""

    class Hungry(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.tries = peft_llama(), 0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.tries += 1
            loss = self.model(input_ids=ids, labels=ids).loss
            if self.tries % 3 == 2:
                raise RuntimeError("out of memory")
            return loss

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        try:
            return task.model(ids)
        except RuntimeError:
            return task.model(ids)

    assert_healthy(judged(Task(Hungry(), step)))


@pytest.mark.parametrize("declared", [True, False])
def test_ema_adapter(declared):
    model = peft_llama()
    model.add_adapter("teacher", lora())

    class Follow(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, task: Task, *args: object) -> None:
            named = dict(task.model.named_parameters())
            with torch.no_grad():
                for name, tensor in named.items():
                    if ".teacher." in name:
                        tensor.lerp_(named[name.replace(".teacher.", ".default.")], 0.1)

    report = judged(Task(model), intent={"lagged_adapters": ("teacher",) if declared else ()}, callbacks=[Follow()])
    assert_healthy(report)


def test_ema_copy_of_the_model():
    class Average(pl.Callback):
        copy: nn.Module | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, task: Task, *args: object) -> None:
            if self.copy is None:
                self.copy = copy.deepcopy(task.model)
            with torch.no_grad():
                for mine, theirs in zip(self.copy.parameters(), task.model.parameters(), strict=True):
                    mine.lerp_(theirs, 0.1)
                self.copy(input_ids=torch.ones(1, 4, dtype=torch.long))

    assert_healthy(judged(Task(peft_llama()), callbacks=[Average()]))


def test_teacher_copy_inside_the_training_step():
    teacher: list[nn.Module] = []

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        if index % 5 == 1:  # TR-DPO takes a new reference now and then
            teacher[:] = [copy.deepcopy(task.model)]
        if not teacher:
            return language_loss(task, ids, index)
        with torch.no_grad():
            reference = log_probabilities(teacher[0], ids)
        return preference_loss(log_probabilities(task.model, ids), reference)

    assert_healthy(judged(Task(peft_llama(), step)))


# --- layers that are not called, or not as usual -------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model = peft_llama(checkpointed_llama(reentrant=reentrant), lora_dropout=0.1)
    # A reentrant checkpoint hides its graph: there the gradients decide, not LP301.
    assert_healthy(judged(Task(model)), but="LP301" if reentrant else "")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.out = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inside(x)
        return self.out(self.attention(h, h, h, need_weights=False)[0])


def vectors(count: int = 20, *shape: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return Batches([torch.randn(4, *(shape or (8,)), generator=generator) for _ in range(count)])


def square(task: Task, x: torch.Tensor, index: int) -> torch.Tensor:
    return (task.model(x) - 1).square().mean()


def test_multihead_attention():
    torch.manual_seed(0)
    model = get_peft_model(Attention(), lora(target_modules=["attention"]))
    # LP307 is right about it: https://github.com/huggingface/peft/pull/3774
    assert_healthy(judged(Task(model, square), vectors(20, 3, 8), intent={"ignore": ["LP307"]}))


class Fused(nn.Module):
    """A kernel that reads the LoRA weights itself and never calls the adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.proj, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, layer = self.inside(x), self.proj
        low = nn.functional.linear(
            nn.functional.linear(h, layer.lora_A["default"].weight), layer.lora_B["default"].weight
        )
        return self.out(
            nn.functional.linear(h, layer.base_layer.weight, layer.base_layer.bias) + layer.scaling["default"] * low
        )


@pytest.mark.parametrize("empty", [set(), {0, 1, 2}, {7, 8, 9, 13, 14}])
def test_fused_kernel(empty):
    torch.manual_seed(0)
    model = get_peft_model(Fused(), lora(target_modules=["proj"]))

    def step(task: Task, x: torch.Tensor, index: int) -> torch.Tensor:
        return square(task, x, index) * (index not in empty)

    assert_healthy(judged(Task(model, step), vectors()))


class Experts(nn.Module):
    """A router that sends each batch to one expert; the second gets nothing for the first 8 batches."""

    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 16)
        expert = (lambda: nn.Linear(16, 16)) if plain else (lambda: nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
        self.experts = nn.ModuleList([expert(), expert()])
        self.out = nn.Linear(16, 1)
        self.count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return self.out(self.experts[self.count > 8 and self.count % 2](self.inside(x)))


@pytest.mark.parametrize("plain", [True, False])
def test_expert_without_a_token(plain):
    torch.manual_seed(0)
    target = ["experts.0", "experts.1"] if plain else ["experts.0.0", "experts.1.0"]
    model = get_peft_model(Experts(plain=plain), lora(target_modules=target))
    assert_healthy(judged(Task(model, square), vectors()))


class VisionLanguage(nn.Module):
    """A vision tower, a projector of one Linear and a language part."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16))
        self.projector = nn.Linear(16, 16)
        self.words = nn.Linear(8, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, text: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        h = self.words(text)
        if image is not None:
            h = h + self.projector(self.tower(image))
        return self.out(h)


def vision_language(task: Task, x: torch.Tensor, index: int) -> torch.Tensor:
    return (task.model(x, x if index >= task.first_image else None) - 1).square().mean()


def test_text_only_batches_at_first():
    torch.manual_seed(0)
    model = get_peft_model(VisionLanguage(), lora(target_modules=["tower.0", "tower.2", "projector", "words"]))
    assert_healthy(judged(Task(model, vision_language, first_image=6), vectors()))


class ReadsEveryWeight(pl.Callback):
    """Logs the norm of every parameter and gradient, and merges for a look, between backward and step."""

    def on_after_backward(self, trainer: pl.Trainer, task: Task) -> None:
        with torch.no_grad():
            task.model.merge_adapter()
            task.model.unmerge_adapter()
        self.norms = [p.norm() for p in task.parameters()] + [p.grad for p in task.parameters()]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("callbacks", [[], [ReadsEveryWeight()]], ids=["alone", "with another callback"])
def test_text_only_batches_all_along(callbacks, accumulate):
    torch.manual_seed(0)
    model = get_peft_model(VisionLanguage(), lora(target_modules=["tower.0", "tower.2", "projector", "words"]))
    task = Task(model, vision_language, first_image=1000)
    report = judged(task, vectors(), callbacks=callbacks, accumulate_grad_batches=accumulate)
    assert_healthy(report, but="LP104")
    idle = next(f for f in report.findings if f.code == "LP104")
    assert idle.status == "pending"
    assert "projector" in idle.message


# --- optimizers ----------------------------------------------------------------------------------


def test_accumulation():
    report = judged(Task(peft_llama()), token_batches(40), accumulate_grad_batches=4)
    assert_healthy(report)


def test_gradient_clipping():
    assert_healthy(judged(Task(peft_llama()), gradient_clip_val=0.1))


def test_closure_evaluated_several_times():
    def optimizers(task: Task) -> torch.optim.Optimizer:
        return torch.optim.LBFGS([p for p in task.parameters() if p.requires_grad], lr=0.1, max_iter=4)

    assert_healthy(judged(Task(peft_llama(), optimizers=optimizers)))


def test_lora_fa_by_its_optimizer():
    from peft.optimizers import create_lorafa_optimizer

    def optimizers(task: Task) -> torch.optim.Optimizer:
        return create_lorafa_optimizer(task.model, r=4, lora_alpha=8, lr=1e-2)

    assert_healthy(judged(Task(peft_llama(), optimizers=optimizers)))


def test_lora_fa_by_hand():
    model = peft_llama()
    for name, tensor in model.named_parameters():
        if "lora_A" in name:
            tensor.requires_grad_(False)
    assert_healthy(judged(Task(model)))


def test_lora_plus():
    from peft.optimizers import create_loraplus_optimizer

    def optimizers(task: Task) -> torch.optim.Optimizer:
        return create_loraplus_optimizer(task.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)

    assert_healthy(judged(Task(peft_llama(), optimizers=optimizers)))


class Critic(nn.Module):
    """A value model: an adapted language model and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = peft_llama(), nn.Linear(VOCABULARY, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(input_ids=ids).logits[:, -1])


def two_optimizers(task: Task) -> list[torch.optim.Optimizer]:
    return [adamw(task.model), adamw(task.critic)]


def step_optimizer(task: Task, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    task.manual_backward(loss)
    optimizer.step()


@pytest.mark.parametrize("toggle", [True, False])
def test_policy_and_value_models_in_manual_optimization(toggle):
    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        policy, value = task.optimizers()
        for optimizer, loss in (
            (policy, lambda: language_loss(task, ids, index)),
            (value, lambda: (task.critic(ids) - 1).square().mean()),
        ):
            if toggle:
                task.toggle_optimizer(optimizer)
            step_optimizer(task, optimizer, loss())
            if toggle:
                task.untoggle_optimizer(optimizer)

    task = Task(peft_llama(), step, two_optimizers, automatic=False, critic=Critic())
    assert_healthy(judged(task))


def test_policy_and_value_models_with_one_backward():
    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        policy, value = task.optimizers()
        policy.zero_grad(), value.zero_grad()
        task.manual_backward(language_loss(task, ids, index) + (task.critic(ids) - 1).square().mean())
        policy.step(), value.step()

    task = Task(peft_llama(), step, two_optimizers, automatic=False, critic=Critic())
    assert_healthy(judged(task))


@pytest.mark.parametrize("rollout", [True, False])
def test_critic_is_warmed_up_first(rollout):
    def step(task: Task, ids: torch.Tensor, index: int) -> None:
        policy, value = task.optimizers()
        if rollout:
            with torch.no_grad():
                task.model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        step_optimizer(task, value, (task.critic(ids) - 1).square().mean())
        if index >= 5:
            step_optimizer(task, policy, language_loss(task, ids, index))

    task = Task(peft_llama(), step, two_optimizers, automatic=False, critic=Critic())
    assert_healthy(judged(task))


def test_value_head_is_warmed_up_on_detached_states():
    """One optimizer: until the sixth step the loss reaches the head alone."""
    model = peft_llama()
    head = nn.Linear(16, 1)

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        with contextlib.nullcontext() if index >= 5 else torch.no_grad():
            out = task.model(input_ids=ids, labels=ids, output_hidden_states=True)
        value = (task.head(out.hidden_states[-1][:, -1].detach()) - 1).square().mean()
        return value + out.loss if index >= 5 else value

    assert_healthy(judged(Task(model, step, head=head)))


@pytest.mark.parametrize("ratio", [1, 5])
def test_alternating_generator_and_discriminator(ratio):
    torch.manual_seed(0)
    generator = get_peft_model(
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), lora(target_modules=["0", "2"])
    )
    critic = get_peft_model(
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), lora(target_modules=["0", "2"])
    )

    def step(task: Task, x: torch.Tensor, index: int) -> None:
        g, d = task.optimizers()
        if index % (ratio + 1) == ratio:
            step_optimizer(task, g, nn.functional.softplus(-task.critic(task.model(x))).mean())
        else:
            fake = task.model(x).detach()
            step_optimizer(
                task, d, (nn.functional.softplus(task.critic(fake)) + nn.functional.softplus(-task.critic(x))).mean()
            )

    task = Task(generator, step, two_optimizers, automatic=False, critic=critic)
    assert_healthy(judged(task, vectors(40)))


# --- precision -----------------------------------------------------------------------------------


def test_bf16_mixed():
    assert_healthy(judged(Task(peft_llama()), precision="bf16-mixed"))


def test_32_true():
    assert_healthy(judged(Task(peft_llama()), precision="32-true"))


def test_bf16_true_keeps_the_adapter_learning():
    model = peft_llama()
    report = judged(Task(model, optimizers=lambda task: adamw(task, lr=5e-2)), precision="bf16-true")
    assert_healthy(report, also="LP403")


def test_autocast_in_every_iteration():
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return language_loss(task, ids, index)

    assert_healthy(judged(Task(peft_llama(lora_dropout=0.1), step)), also="LP405")


# --- ways to hold and to call the model ----------------------------------------------------------


def test_module_that_calls_itself():
    class Calls(Task):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, labels=ids).loss

    assert_healthy(judged(Calls(peft_llama(), lambda task, ids, _: task(ids))))


@pytest.mark.parametrize("name", ["net", "policy", "_inner", "lora_A"])
def test_any_attribute_name(name):
    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, peft_llama())

        def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
            return getattr(self, name)(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self)

    assert_healthy(judged(Holder()))


def test_base_model_inside_the_peft_model_is_called():
    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        return task.model.get_base_model()(input_ids=ids, labels=ids).loss

    assert_healthy(judged(Task(peft_llama(), step)))


def test_unfrozen_norms_embeddings_and_value_head():
    model = peft_llama()
    for name, tensor in model.named_parameters():
        if "norm" in name or "embed_tokens" in name:
            tensor.requires_grad_(True)

    def step(task: Task, ids: torch.Tensor, index: int) -> torch.Tensor:
        out = task.model(input_ids=ids, labels=ids, output_hidden_states=True)
        return out.loss + (task.value(out.hidden_states[-1]) - 1).square().mean()

    assert_healthy(judged(Task(model, step, value=nn.Linear(16, 1))))
