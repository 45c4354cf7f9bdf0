"""What looks like a fault of the start, the targets or a declaration, and is none: judged, and found healthy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.optimizers import create_loraplus_optimizer
from support.training import (
    VOCABULARY,
    Training,
    Watched,
    adamw,
    adapter_tensors,
    assert_healthy,
    batches,
    config,
    fit_lightning,
    llama,
    lora,
    next_token_loss,
    trained,
    watch,
)
from support.unlisted_declared import (
    EMBEDDED,
    Masters,
    Mixture,
    by_rule,
    classified,
    preference,
    pretrained,
    squares,
    teacher,
    with_new_tokens,
    with_tokens,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import BertConfig, BertForSequenceClassification, Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_probe_callbacks import LoraProbe

TIED = "ignore:Model has `tie_word_embeddings=True`"


def judged(run: Training, *codes: str, steps: int = 8, **intent: Any) -> Watched:
    """Healthy, and these checks have said so rather than nothing."""
    watched = watch(run, steps, every_n_steps=1, **intent)
    assert watched.error is None, watched.error
    assert_healthy(watched)
    verdicts = {f.code: f.status for f in watched.report.findings}
    assert {code: verdicts[code] for code in codes} == dict.fromkeys(codes, "pass"), watched.report
    return watched


def not_judged(watched: Watched, code: str) -> str:
    finding = next(f for f in watched.report.findings if f.code == code)
    assert finding.status in ("pending", "skipped")
    return finding.message


# --- LP109 --------------------------------------------------------------------------------------


def disabled_reference(model: Any, batch: Tensor) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        return next_token_loss(model, batch, 0)


def against_disabled(model: Any, batch: Tensor, step: int) -> Tensor:
    reference = disabled_reference(model, batch)
    return preference(next_token_loss(model, batch, step), reference)


def test_reference_with_adapters_disabled() -> None:
    judged(Training(lora(), against_disabled), "LP109", "LP504", reference="disabled")


def test_reference_after_the_policy() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        policy = next_token_loss(model, batch, step)
        return preference(policy, disabled_reference(model, batch))

    judged(Training(lora(), loss), "LP109", reference="disabled")


def test_native_reference_with_gradients_and_detached() -> None:
    model = llama()
    model.add_adapter(config())

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        model.disable_adapters()
        reference = next_token_loss(model, batch, 0).detach()
        model.enable_adapters()
        return preference(next_token_loss(model, batch, step), reference)

    judged(Training(model, loss), "LP109", reference="disabled")


def test_generation_and_old_log_probabilities_beside_the_reference() -> None:
    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            old = next_token_loss(model, batch, step)
            model.generate(input_ids=batch, max_new_tokens=2, do_sample=False)
        return against_disabled(model, batch, step) + (next_token_loss(model, batch, step) - old)

    judged(Training(lora(), loss), "LP109", reference="disabled")


def test_reference_of_many_steps_computed_in_the_first() -> None:
    """As GRPO does with one generation for several updates."""
    kept: dict[str, Tensor] = {}

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        if step == 0:
            kept["reference"] = disabled_reference(model, batch)
        with torch.no_grad():
            next_token_loss(model, batch, step)
        return preference(next_token_loss(model, batch, step), kept["reference"])

    judged(Training(lora(), loss), "LP109", reference="disabled")


def test_reference_computed_before_training_is_not_judged() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return preference(next_token_loss(model, batch, step), torch.tensor(4.0))

    watched = judged(Training(lora(), loss), reference="disabled")
    assert "no forward with the adapters disabled was seen" in not_judged(watched, "LP109")


def test_undeclared_reference_is_not_judged() -> None:
    watched = judged(Training(lora()))
    assert "not declared" in not_judged(watched, "LP109")


# --- LP210 --------------------------------------------------------------------------------------


def test_loraplus_of_peft() -> None:
    model = lora(**EMBEDDED)
    settings = {"lr": 1e-4, "loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-6}
    judged(Training(model, optimizer=create_loraplus_optimizer(model, AdamW, **settings)), "LP210")


@pytest.mark.parametrize(
    "faster",
    [
        pytest.param(lambda n, p: "_B" in n, id="every B"),
        pytest.param(lambda n, p: "lora_B" in n and "layers.1" in n, id="one layer"),
        pytest.param(lambda n, p: "embed" in n, id="embeddings alone"),
        pytest.param(lambda n, p: False, id="one rate"),
    ],
)
def test_rates_that_follow_a_rule(faster: Callable[[str, nn.Parameter], bool]) -> None:
    model = lora(**EMBEDDED)
    judged(Training(model, optimizer=by_rule(model, faster)), "LP210")


# --- LP407 --------------------------------------------------------------------------------------


def test_masters_made_after_the_adapter_was_restored() -> None:
    model = lora()
    trained(model)
    judged(Training(model, optimizer=Masters(adapter_tensors(model).values(), lr=1e-3)), "LP407")


@pytest.mark.parametrize("rate", [0.3, 3.0])
def test_rate_that_explains_a_leap(rate: float) -> None:
    model = lora()
    trained(model)
    watched = watch(Training(model, optimizer=SGD(adapter_tensors(model).values(), lr=rate)), every_n_steps=1)
    assert not [found for found in watched.found if found[0] == "LP407"]


def test_strong_weight_decay() -> None:
    model = lora()
    trained(model)
    optimizer = adamw(model, lr=0.95, weight_decay=1.0)
    watched = watch(Training(model, optimizer=optimizer), every_n_steps=1)
    assert not [found for found in watched.found if found[0] == "LP407"]


# --- LP408 --------------------------------------------------------------------------------------

LAGGED = {"adapter": "default", "lagged_adapters": ("teacher",)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_teacher_that_follows(dtype: torch.dtype) -> None:
    decay = 0.9999 if dtype == torch.float32 else 0.5
    run = teacher(dtype, lambda own, other: own.mul_(decay).add_(other.to(dtype), alpha=1 - decay))
    judged(run, "LP408", **LAGGED)


def test_teacher_copied_every_eighth_step() -> None:
    count = iter(range(1000))

    def follow(own: Tensor, other: Tensor) -> None:
        if next(count) // 8 % 8 == 7:
            own.copy_(other)

    judged(teacher(torch.float32, follow), "LP408", steps=24, **LAGGED)


def test_teacher_waits_for_a_trained_adapter_that_stands_still() -> None:
    """Written to in every step, with the values that it has: nothing to follow while the rate is zero."""
    run = teacher(torch.float32, lambda own, other: own.copy_(other))
    run.optimizer = adamw(run.model, lr=1e-3)
    run.scheduler = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.0 if s < 3 else 1.0)
    judged(run, "LP408", steps=12, **LAGGED)


# --- LP502 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 8}},
        {"lora_alpha": 7, "r": 3},
        EMBEDDED,
        {"use_dora": True},
        {"target_parameters": ["mlp.gate_proj.weight"]},
    ],
    ids=str,
)
def test_scaling_that_rank_and_alpha_say(changes: dict[str, Any]) -> None:
    judged(Training(lora(**changes)), "LP502", "LP503", "LP504", "LP601", "LP602", resumed=False)


def test_scaling_of_a_tuner_that_has_none() -> None:
    model = get_peft_model(llama(), VeraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    watched = judged(Training(model), "LP605")
    assert not_judged(watched, "LP502")
    assert not_judged(watched, "LP503")
    assert not_judged(watched, "LP504")


# --- LP503, LP504 -------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "mica"])
def test_fresh_adapter_is_the_identity(init: bool | str) -> None:
    judged(Training(lora(init_lora_weights=init)), "LP503", "LP504", resumed=False)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("resumed", [True, False, None])
def test_initialisation_that_takes_its_part_out_of_the_base(init: str, resumed: bool | None) -> None:
    watched = judged(Training(lora(init_lora_weights=init)), "LP503", resumed=resumed)
    assert "takes BA out of the base weight" in not_judged(watched, "LP504")


def test_frozen_a_of_lora_fa() -> None:
    model = lora()
    for name, tensor in model.named_parameters():
        if "lora_A" in name:
            tensor.requires_grad_(False)
    judged(Training(model), "LP203", "LP503", "LP504", "LP605", resumed=False, frozen=("lora_A",))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("resumed", [True, None])
def test_restored_adapter(resumed: bool | None) -> None:
    old, model = lora(**EMBEDDED), lora(**EMBEDDED)
    with torch.no_grad():
        for tensor in adapter_tensors(old).values():
            tensor.add_(0.01)
    set_peft_model_state_dict(model, get_peft_model_state_dict(old))
    judged(Training(model), "LP503", "LP504", resumed=resumed)


def test_dpo_that_goes_on_against_the_base_model() -> None:
    """Its optimizer was restored: this is not the first step."""
    model = lora()
    trained(model)
    optimizer = adamw(model)
    against_disabled(model, torch.ones(1, 4, dtype=torch.long), 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    judged(Training(model, against_disabled, optimizer=optimizer), "LP109", "LP504", reference="disabled", resumed=True)


def test_copy_of_the_adapter_as_reference_of_a_trained_one() -> None:
    model = lora()
    trained(model)
    model.add_adapter("ref", config())
    set_peft_model_state_dict(model, get_peft_model_state_dict(model), adapter_name="ref")

    def loss(model: Any, batch: Tensor, step: int) -> Tensor:
        with torch.no_grad():
            model.set_adapter("ref")
            reference = next_token_loss(model, batch, step)
            model.set_adapter("default")
        return preference(next_token_loss(model, batch, step), reference)

    judged(Training(model, loss), "LP504", adapter="default", reference_adapters=("ref",), resumed=True)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, SGD])
def test_optimizer_that_makes_its_state_before_the_first_step(kind: Any) -> None:
    model = lora()
    judged(Training(model, optimizer=kind(adapter_tensors(model).values(), lr=0.1)), "LP504")


# --- LP601, LP602 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers_to_transform": [0]}, ()),
        ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]}, ("lm_head", "q_proj")),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]}, ()),
        ({"target_modules": r".*layers\.1\..*(q|v)_proj"}, ("layers.1.",)),
        ({"target_modules": "all-linear"}, ("q_proj", "down_proj")),
        ({"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]}, ("layers.0.self_attn.q_proj",)),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, ("embed_tokens",)),
        ({"target_parameters": ["mlp.gate_proj.weight"]}, ("gate_proj.weight", "q_proj")),
        ({"rank_pattern": {r".*layers\.0\..*": 2, "layers.1.self_attn.v_proj": 3, "^model.*q_proj": 5}}, ()),
        ({"task_type": "CAUSAL_LM"}, ()),
    ],
    ids=str,
)
def test_targets_that_are_met(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    judged(Training(lora(**changes)), "LP601", "LP602", expect_targets=expected)


def test_list_for_several_architectures_with_what_counts_declared() -> None:
    model = lora(target_modules=["q_proj", "c_attn", "query_key_value"])
    judged(Training(model), "LP601", expect_targets=("q_proj",))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT")
@pytest.mark.parametrize("natively", [False, True])
def test_target_names_of_another_adapter(natively: bool) -> None:
    """Each adapter has its own list."""
    if natively:
        model: Any = llama()
        model.add_adapter(config(target_modules=["k_proj"]), "first")
    else:
        model = get_peft_model(llama(), config(target_modules=["k_proj"]), adapter_name="first")
    model.add_adapter(config() if natively else "second", "second" if natively else config())
    model.set_adapter("second")
    judged(Training(model), "LP601", adapter="second", reference_adapters=("first",))


class Quarter(nn.Module):
    """A hybrid model with attention in every fourth layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj" if i % 4 == 0 else "in_proj": nn.Linear(12, 12)}) for i in range(12)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer.values():
                x = x + part(x).tanh()
        return x


def test_hybrid_model_with_attention_in_every_fourth_layer() -> None:
    torch.manual_seed(0)
    judged(Training(get_peft_model(Quarter(), LoraConfig(r=2, target_modules=["q_proj"])), squares), "LP601")


# --- LP603 --------------------------------------------------------------------------------------


def classifier() -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **shape))


QUERY = {"target_modules": ["query", "value"]}


def test_classifier_of_the_tasks_type() -> None:
    base = pretrained(classifier(), "classifier")
    judged(Training(lora(base=base, task_type="SEQ_CLS", **QUERY), classified), "LP601", "LP603", "LP605")


def test_classifier_in_modules_to_save() -> None:
    base = pretrained(classifier(), "classifier")
    judged(Training(lora(base=base, modules_to_save=["classifier"], **QUERY), classified), "LP601", "LP603", "LP605")


def test_classifier_with_an_adapter() -> None:
    base = pretrained(classifier(), "classifier")
    judged(Training(lora(base=base, target_modules=["query", "classifier"]), classified), "LP603")


def test_classifier_that_is_trained_as_it_is() -> None:
    base = pretrained(classifier(), "classifier")
    model = lora(base=base, **QUERY)
    base.classifier.requires_grad_(True)
    judged(Training(model, classified), "LP603")


def test_classifier_that_was_trained_before() -> None:
    base = pretrained(classifier(), "classifier")
    with torch.no_grad():
        base.classifier.bias.add_(0.01)
    judged(Training(lora(base=base, **QUERY), classified), "LP603")


def test_model_made_from_a_configuration() -> None:
    judged(Training(lora(base=classifier(), **QUERY), classified), "LP603")


# --- LP604 --------------------------------------------------------------------------------------


def resized(**changes: Any) -> Any:
    base = llama(**changes)
    base.resize_token_embeddings(VOCABULARY + 4)
    return base


NEW = tuple(range(VOCABULARY, VOCABULARY + 4))


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"trainable_token_indices": list(NEW)},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_new_tokens_that_train_and_do_not_occur(changes: dict[str, Any], tied: bool) -> None:
    """No batch holds one of them."""
    run = Training(lora(base=resized(tie_word_embeddings=tied), **changes))
    words = not_judged(judged(run, new_token_ids=NEW), "LP604")
    assert words == "the rows of the new tokens train; no probed batch that was learned from has held one of them yet"
    run = Training(lora(base=resized(tie_word_embeddings=tied), **changes), with_new_tokens)
    judged(run, "LP604", new_token_ids=NEW)


def table_that_trains(**options: Any) -> Training:
    base = resized()
    model = lora(base=base)
    base.get_input_embeddings().weight.requires_grad_(True)
    return Training(model, with_new_tokens, **options)


def test_new_tokens_in_a_table_that_trains_as_it_is() -> None:
    judged(table_that_trains(), "LP604", new_token_ids=NEW)


def test_mask_that_keeps_the_new_rows() -> None:
    """The recipe that everybody copies: the old rows stay as they are."""
    run = table_that_trains()
    run.model.get_input_embeddings().weight.register_hook(new_rows_alone)
    judged(run, "LP604", new_token_ids=NEW)


def new_rows_alone(gradient: Tensor) -> Tensor:
    masked = gradient.clone()
    masked[:VOCABULARY] = 0
    return masked


@pytest.mark.parametrize("accumulate", [1, 3])
def test_new_token_that_only_ends_a_sequence(accumulate: int) -> None:
    """Nothing is predicted from it, so nothing arrives, and its row has no gradient for a good reason."""

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        tokens = with_tokens(batch, 64, 65)
        tokens[:, -1] = 66
        return model(input_ids=tokens, labels=tokens).loss

    judged(replace(table_that_trains(accumulate=accumulate), loss=loss), "LP604", new_token_ids=NEW)


def test_new_token_for_padding() -> None:
    base = llama()
    base.resize_token_embeddings(VOCABULARY + 4)
    table = nn.Embedding.from_pretrained(base.get_input_embeddings().weight.detach(), freeze=False, padding_idx=64)
    base.set_input_embeddings(table)
    model = lora(base=base)
    table.weight.requires_grad_(True)
    judged(Training(model, with_new_tokens), "LP604", new_token_ids=NEW)


def test_new_tokens_beside_batches_without_a_signal() -> None:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        return with_new_tokens(model, batch, step) * (step > 2)

    judged(replace(table_that_trains(), loss=loss), "LP604", new_token_ids=NEW)


def test_rows_are_watched_and_nothing_changes() -> None:
    def trained_weights(*, probed: bool) -> list[Tensor]:
        run = table_that_trains()
        if probed:
            judged(run, "LP604", new_token_ids=NEW)
        else:
            fit_lightning(run, Callback(), 8)
        return [p.detach() for p in run.model.parameters()]

    pairs = zip(trained_weights(probed=True), trained_weights(probed=False), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_new_tokens_under_checkpointing(reentrant: bool) -> None:
    run = table_that_trains()
    run.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    run.model.train()
    judged(run, "LP604", new_token_ids=NEW)


# --- LP605, LP606, LP607 ------------------------------------------------------------------------


def test_magnitude_declared_frozen() -> None:
    model = lora(use_dora=True)
    for name, tensor in model.named_parameters():
        if "magnitude" in name:
            tensor.requires_grad_(False)
    judged(Training(model), "LP203", "LP404", "LP605", frozen=("lora_magnitude_vector",))


def test_prompt_tuning_has_one_part() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    judged(Training(model), "LP605")


def mixture(targets: list[str], **changes: Any) -> Training:
    torch.manual_seed(0)
    model = Mixture("gate_up_proj", "down_proj")
    return Training(get_peft_model(model, LoraConfig(r=2, target_modules=targets, **changes)), squares)


@pytest.mark.parametrize(
    ("targets", "changes", "expected"),
    [
        (["q_proj"], {}, ()),  # attention alone was asked for
        (["q_proj"], {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}, ("experts",)),
        (["q_proj", "down_proj"], {}, ("q_proj",)),  # declared: this is what counts
    ],
)
def test_experts_that_are_covered_or_not_meant(
    targets: list[str], changes: dict[str, Any], expected: tuple[str, ...]
) -> None:
    judged(mixture(targets, **changes), "LP601", "LP606", expect_targets=expected)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # peft 0.21, of patterns of its own
@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj", "gate_proj", "up_proj", "down_proj"], "all-linear"]
)
def test_experts_that_peft_converts(targets: Any) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCABULARY, use_cache=False, **shape, **heads, **experts))
    judged(Training(lora(base=base, target_modules=targets)), "LP601", "LP602", "LP606")


@pytest.mark.filterwarnings(TIED)
@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1, 2]},
        {},
    ],
    ids=str,
)
def test_tied_tables(changes: dict[str, Any]) -> None:
    judged(Training(lora(base=llama(tie_word_embeddings=True), **changes)), "LP607")


def test_head_saved_of_tables_that_are_not_tied() -> None:
    judged(Training(lora(modules_to_save=["lm_head"])), "LP605", "LP607")


def test_one_look_at_the_start_changes_nothing() -> None:
    """The values that are read before the first forward are those that training starts from."""
    model = lora(use_dora=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    twin: PeftModel = copy.deepcopy(model)
    judged(Training(model), resumed=False, expect_targets=("q_proj",), new_token_ids=(), reference="disabled")
    plain = Training(twin)
    optimizer = plain.built_optimizer()
    for step, batch in enumerate(batches(8)):
        plain.loss(twin, batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in twin.state_dict().items())
    assert any(not torch.equal(after[n], t) for n, t in before.items())


def test_model_that_cannot_be_asked_for_its_tables_ends_these_checks_alone() -> None:
    """Its own code raises when its embeddings are asked for."""
    base = llama()
    model = lora(base=base)

    class Broken(type(base)):
        def get_input_embeddings(self) -> nn.Module:
            raise RuntimeError("the embeddings live on another host")

    base.__class__ = Broken
    probe = LoraProbe(verbose=False, every_n_steps=1)
    fit_lightning(Training(model), probe)
    status = {f.code: f.status for f in probe.report.findings}
    assert {status[code] for code in ("LP503", "LP504", "LP601", "LP607")} == {"skipped"}
    assert status["LP203"] == status["LP302"] == "pass"
    assert len(probe.report.internal_errors) == 1
