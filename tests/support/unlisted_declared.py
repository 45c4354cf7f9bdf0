"""Faults that no list holds, of what is declared, asked for and held at the start."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from support.recipes import Recipe, from_step, recipe, squares
from support.training import VOCABULARY, Training, adamw, adapter_tensors, config, llama, lora, next_token_loss, trained
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

DECLARED: list[Recipe] = []
unlisted = partial(recipe, into=DECLARED)

TIED = ("ignore:Model has `tie_word_embeddings=True`",)
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def preference(policy: Tensor, reference: Tensor) -> Tensor:
    return -F.logsigmoid(0.1 * (reference - policy))


def against(reference: Callable[[nn.Module, Tensor], Tensor]) -> Callable[[nn.Module, Tensor, int], Tensor]:
    """The loss of a run whose reference forward is the function given."""

    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        aside = reference(model, batch)
        return preference(next_token_loss(model, batch, step), aside)

    return loss


# --- LP109: the reference that should be disabled ------------------------------------------------


@unlisted("reference with gradients, detached, never disabled", "LP109", 3, "no forward ran", reference="disabled")
def reference_detached() -> Training:
    return Training(lora(), against(lambda model, batch: next_token_loss(model, batch, 0).detach()))


@unlisted("a copy disabled in place of the model", "LP109", 3, "no forward ran", reference="disabled")
def copy_disabled() -> Training:
    other = lora()

    def reference(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad(), other.disable_adapter():
            return next_token_loss(model, batch, 0)

    return Training(lora(), against(reference))


@unlisted("native adapters enabled too early", "LP109", 3, "no forward ran", reference="disabled")
def enabled_too_early() -> Training:
    model = llama()
    model.add_adapter(config())

    @torch.inference_mode()
    def reference(model: nn.Module, batch: Tensor) -> Tensor:
        model.disable_adapters()
        model.enable_adapters()
        return next_token_loss(model, batch, 0)

    return Training(model, against(lambda model, batch: reference(model, batch).clone()))


# --- LP210: learning rates -----------------------------------------------------------------------


def by_rule(
    model: nn.Module, faster: Callable[[str, nn.Parameter], bool], make: Any = AdamW, lr: float = 1e-3
) -> Optimizer:
    held = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return make(
        [
            {"params": [p for n, p in held if faster(n, p)], "lr": 16 * lr},
            {"params": [p for n, p in held if not faster(n, p)]},
        ],
        lr=lr,
    )


EMBEDDED = {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}
RATE = ("LP210", 0, "lora_embedding_B has the learning rate of A")


@unlisted("rule by the name of the weight", *RATE, status="warn")
def rule_by_name() -> Training:
    model = lora(**EMBEDDED)
    return Training(model, optimizer=by_rule(model, lambda n, p: n.endswith("lora_B.default.weight")))


@unlisted("rule by module, SGD", *RATE, status="warn")
def rule_by_module() -> Training:
    model = lora(**EMBEDDED)
    b = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".lora_B." in n}
    return Training(model, optimizer=by_rule(model, lambda n, p: id(p) in b, SGD, lr=1.0))


@unlisted("rule by shape, native adapters", *RATE, status="warn")
def rule_by_shape() -> Training:
    model = llama()
    model.add_adapter(config(**EMBEDDED))
    return Training(model, optimizer=by_rule(model, lambda n, p: "embed" not in n and p.shape[-1] == 4))


# --- LP407: values thrown away -------------------------------------------------------------------


class Masters(AdamW):
    """Keeps float32 copies, steps nothing else and writes them back."""

    def __init__(self, tensors: Any, **settings: Any) -> None:
        super().__init__(tensors, **settings)
        self.masters = [[p.detach().float().clone() for p in group["params"]] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, masters in zip(self.param_groups, self.masters, strict=True):
            for parameter, master in zip(group["params"], masters, strict=True):
                if parameter.grad is not None:
                    master.add_(parameter.grad.float(), alpha=-group["lr"])
                    parameter.copy_(master)
        return loss


@unlisted("float32 masters of a 16-bit adapter", "LP407", 0, "one step erased the adapter")
def masters_of_half() -> Training:
    model = get_peft_model(llama(torch.bfloat16), config(), autocast_adapter_dtype=False)
    optimizer = Masters(adapter_tensors(model).values(), lr=1e-3)
    trained(model)
    return Training(model, optimizer=optimizer)


@unlisted("adapter loaded in training", "LP407", 3, "one step erased the adapter")
def loaded_at_3() -> Training:
    model = lora()
    optimizer = Masters(adapter_tensors(model).values(), lr=1e-3)
    return Training(model, optimizer=optimizer, between_steps=from_step(3, lambda run: trained(model, std=1.0)))


@unlisted("slow weights from before", "LP407", 0, "one step erased the adapter")
def slow_weights() -> Training:
    """Lookahead whose slow weights were taken before the adapter was restored, and are written back at once."""

    class Lookahead(Masters):
        pass

    model = llama()
    model.add_adapter(config())
    optimizer = Lookahead(adapter_tensors(model).values(), lr=1e-4)
    trained(model)
    return Training(model, optimizer=optimizer)


# --- LP408: lagged adapters ----------------------------------------------------------------------


def teacher(dtype: torch.dtype, follow: Callable[[Tensor, Tensor], Any]) -> Training:
    """A run with a teacher that follows after every step."""
    model = lora()
    model.add_adapter("teacher", config())
    trained(model)
    pairs = [
        (tensor, dict(model.named_parameters())[name.replace(".teacher.", ".default.")])
        for name, tensor in model.named_parameters()
        if ".teacher." in name
    ]
    for own, other in pairs:
        own.data = other.data.to(dtype, copy=True)

    @torch.no_grad()
    def between(run: Training, step: int) -> None:
        for own, other in pairs if step else ():
            follow(own, other)

    return Training(model, between_steps=between)


LAGGED = {"adapter": "default", "lagged_adapters": ("teacher",)}


@unlisted("float16 teacher, lerp", "LP408", 3, "does not follow", "written to in 3", **LAGGED)
def float16_teacher() -> Training:
    return teacher(torch.float16, lambda own, other: own.lerp_(other.half(), 1e-6))


@unlisted("decay of 1", "LP408", 3, "does not follow", **LAGGED)
def decay_of_one() -> Training:
    return teacher(torch.float32, lambda own, other: own.mul_(1.0).add_(other, alpha=0.0))


@unlisted("teacher averaged with itself", "LP408", 3, "does not follow", **LAGGED)
def averaged_with_itself() -> Training:
    return teacher(torch.float32, lambda own, other: own.copy_(own.clone()))


@unlisted("16-bit teacher through .data", "LP408", 3, "stands still", status="warn", **LAGGED)
def through_data() -> Training:
    return teacher(torch.bfloat16, lambda own, other: own.data.mul_(0.9999).add_(other.data, alpha=1e-4))


@unlisted("nobody updates the teacher", "LP408", 100, "stands still", status="warn", steps=104, **LAGGED)
def never_updated() -> Training:
    return teacher(torch.float32, lambda own, other: None)


# --- LP502: scaling ------------------------------------------------------------------------------


def tuner_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]


@unlisted("lora_alpha of 0", "LP502", 0, "scaling of all 4 adapted layers is 0")
def alpha_of_zero() -> Training:
    return Training(lora(lora_alpha=0))


@unlisted("scaled to nothing", "LP502", 3, "scaling of all 4 adapted layers is 0")
def scaled_to_nothing() -> Training:
    model = lora()
    for layer in tuner_layers(model):
        layer.set_scale("default", 0.0)
    return Training(model, optimizer=adamw(model, weight_decay=0.0))


@unlisted("scaled to nothing in training", "LP502", 3, "scaling of all 4 adapted layers is 0")
def scaled_at_3() -> Training:
    def change(run: Training) -> None:
        for layer in tuner_layers(run.model):
            layer.scaling["default"] = 0.0

    return Training(lora(), between_steps=from_step(3, change))


@unlisted("one projection scaled to nothing", "LP502", 0, "scaling of 2 of 4", "q_proj", status="warn")
def alpha_pattern_of_zero() -> Training:
    return Training(lora(alpha_pattern={"q_proj": 0}))


@unlisted("scaled for an image and not back", "LP502", 0, "is 1, not 2", status="warn")
def left_scaled() -> Training:
    model = lora()
    for layer in tuner_layers(model):
        layer.scale_layer(0.5)
    return Training(model)


@unlisted("alpha/r under rsLoRA", "LP502", 0, "is 2, not 4", status="warn")
def scaled_as_plain_lora() -> Training:
    model = lora(use_rslora=True)
    for layer in tuner_layers(model):
        layer.scaling["default"] = layer.lora_alpha["default"] / layer.r["default"]
    return Training(model)


# --- LP503: both factors zero --------------------------------------------------------------------


def zeroed(model: nn.Module, part: str) -> None:
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            if part in name:
                tensor.zero_()


@unlisted("memory filled with zeros", "LP503", 0, "exactly zero in 4 of 4")
def all_zero() -> Training:
    model = lora()
    zeroed(model, "lora_")
    return Training(model)


@unlisted("a checkpoint of zeros", "LP503", 0, "exactly zero in 4 of 4", resumed=True)
def checkpoint_of_zeros() -> Training:
    model = lora()
    state = {name: torch.zeros_like(t) for name, t in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    return Training(model)


@unlisted("one dead layer", "LP503", 0, "exactly zero in 1 of 4", "layers.1", "v_proj")
def one_dead_layer() -> Training:
    model = lora()
    zeroed(model, "layers.1.self_attn.v_proj.lora_A")
    return Training(model)


@unlisted("dead embedding", "LP503", 0, "exactly zero in 1 of 5", "embed_tokens")
def dead_embedding() -> Training:
    model = lora(**EMBEDDED)
    zeroed(model, "lora_embedding_B")
    return Training(model)


# --- LP504: the start ----------------------------------------------------------------------------


FRESH = "the new adapter is not the identity"


@unlisted("init_lora_weights=False", "LP504", 0, FRESH, "4 of 4", resumed=False)
def random_b() -> Training:
    return Training(lora(init_lora_weights=False))


@unlisted("an old adapter loaded into a new run", "LP504", 0, FRESH, resumed=False)
def old_adapter_loaded() -> Training:
    old, model = lora(), lora()
    trained(old)
    set_peft_model_state_dict(model, get_peft_model_state_dict(old))
    return Training(model)


@unlisted("DoRA initialised anew with its base, natively", "LP504", 0, FRESH, resumed=False)
def dora_initialised() -> Training:
    model = llama()
    model.add_adapter(config(use_dora=True))
    model.init_weights()
    for tensor in adapter_tensors(model).values():
        tensor.requires_grad_(True)
    return Training(model)


@unlisted("one layer initialised anew", "LP504", 0, FRESH, "1 of 4", "layers.1", resumed=False)
def one_layer_random() -> Training:
    model = lora()
    with torch.no_grad():
        next(t for n, t in adapter_tensors(model).items() if "layers.1" in n and "lora_B" in n).normal_()
    return Training(model)


LOST = "the restored adapter is a fresh one"


@unlisted("keys of another prefix", "LP504", 0, LOST, resumed=True)
def other_prefix() -> Training:
    old, model = lora(), lora()
    trained(old)
    state = get_peft_model_state_dict(old)
    set_peft_model_state_dict(model, {k.replace("model.layers", "language_model.layers"): t for k, t in state.items()})
    return Training(model)


@unlisted("strict=False and the prefix of a module", "LP504", 0, LOST, resumed=True)
def loaded_without_strict() -> Training:
    old, model = lora(), lora()
    trained(old)
    model.load_state_dict({f"model.{k}": t for k, t in old.state_dict().items()}, strict=False)
    return Training(model)


@unlisted("deleted and added again", "LP504", 0, LOST, resumed=True)
def added_again() -> Training:
    model = lora()
    trained(model)
    model.delete_adapter("default")
    model.add_adapter("default", config())
    model.set_adapter("default")
    return Training(model)


@unlisted(
    "one projection restored of two", "LP504", 0, "2 of 4 adapted layers", "are fresh", status="warn", resumed=True
)
def restored_in_part() -> Training:
    old, model = lora(), lora()
    trained(old)
    set_peft_model_state_dict(model, {k: t for k, t in get_peft_model_state_dict(old).items() if "q_proj" in k})
    return Training(model)


@unlisted("optimizer restored, adapter not", "LP504", 0, "training goes on", "the adapter is fresh", status="warn")
def optimizer_alone_restored() -> Training:
    model = lora()
    optimizer = adamw(copy.deepcopy(model))
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    restored = adamw(model)
    restored.load_state_dict(optimizer.state_dict())
    return Training(model, optimizer=restored)


@unlisted("OLoRA against the disabled model", "LP504", 0, "the reference is not the base model", reference="disabled")
def olora_reference() -> Training:
    return Training(lora(init_lora_weights="olora"))


# --- LP601: targets ------------------------------------------------------------------------------


@unlisted("misspelt modules_to_save", "LP601", 0, "modules_to_save asks for 'lm_haed'", status="warn")
def misspelt_copy() -> Training:
    return Training(lora(modules_to_save=["lm_haed"]))


@unlisted("names of another architecture, natively", "LP601", 0, "'c_attn', 'query_key_value'", status="warn")
def names_of_another() -> Training:
    model = llama()
    model.add_adapter(config(target_modules=["q_proj", "query_key_value", "c_attn"]))
    return Training(model)


@unlisted(
    "IA3 misses what must be covered", "LP601", 0, "no adapted module has 'down_proj'", expect_targets=("down_proj",)
)
def ia3_misses() -> Training:
    model = get_peft_model(llama(), IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    return Training(model)


@unlisted(
    "upper layer left out", "LP601", 0, "no adapted module has 'layers.1.'", expect_targets=("layers.0.", "layers.1.")
)
def upper_layer_left_out() -> Training:
    return Training(lora(layers_to_transform=[0]))


class Hybrid(nn.Module):
    """Twelve layers, of which two have an attention whose projection has the name that was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj" if i % 6 == 0 else "in_proj": nn.Linear(12, 12)}) for i in range(12)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for part in layer.values():
                x = x + part(x).tanh()
        return x


@unlisted("a hybrid model by the names of its attention", "LP601", 0, "only 2 of the 12 layers", status="warn")
def hybrid() -> Training:
    torch.manual_seed(0)
    return Training(get_peft_model(Hybrid(), LoraConfig(r=2, target_modules=["q_proj"])), squares)


# --- LP602: patterns -----------------------------------------------------------------------------


PATTERN = ("ignore:The following .* keys did not match:RuntimeWarning",)


@unlisted("alpha for a misspelt module", "LP602", 0, "alpha_pattern has 'v_porj'", status="warn", warnings=PATTERN)
def alpha_misspelt() -> Training:
    return Training(lora(alpha_pattern={"v_porj": 4, "q_proj": 16}))


@unlisted("rank for the block, not its modules", "LP602", 0, "'self_attn'", status="warn", warnings=PATTERN)
def rank_of_the_block() -> Training:
    return Training(lora(rank_pattern={"self_attn": 2}))


@unlisted("rank of a layer that is not there", "LP602", 0, r"layers\\.7", status="warn", warnings=PATTERN)
def rank_of_no_layer() -> Training:
    model = llama()
    model.add_adapter(config(rank_pattern={r".*layers\.7\..*": 2}))
    return Training(model)


# --- LP603: heads --------------------------------------------------------------------------------


def pretrained(model: nn.Module, head: str) -> nn.Module:
    """Give the body other weights than those of its initialisation, as a checkpoint does."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not name.startswith(head) and tensor.ndim == 2:
                tensor.mul_(3).add_(0.01)
    return model


def classified(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    return model(input_ids=batch, labels=torch.tensor([0, 1])).loss


def tagged(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    return model(input_ids=batch, labels=batch % 2).loss


def bert(kind: Any, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(BertConfig(max_position_embeddings=32, **{**TINY, **changes}))


HEAD = "looks freshly initialised, is frozen"


@unlisted("classifier without task_type", "LP603", 0, "classifier", HEAD, status="warn")
def classifier_frozen() -> Training:
    base = pretrained(bert(BertForSequenceClassification), "classifier")
    return Training(lora(base=base, target_modules=["query", "value"]), classified)


@unlisted("token classifier, natively", "LP603", 0, "classifier", HEAD, status="warn")
def tagger_frozen() -> Training:
    base = pretrained(bert(BertForTokenClassification), "classifier")
    base.add_adapter(config(target_modules=["query", "value"]))
    return Training(base, tagged)


@unlisted("score of a Llama", "LP603", 0, "score", HEAD, status="warn")
def score_frozen() -> Training:
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(num_key_value_heads=2, pad_token_id=0, use_cache=False, **TINY))
    return Training(lora(base=pretrained(base, "score")), classified)


@unlisted("frozen with the task's own type", "LP605", 0, "every modules_to_save", "frozen")
def head_frozen_afterwards() -> Training:
    model = lora(
        base=pretrained(bert(BertForSequenceClassification), "classifier"),
        target_modules=["query"],
        task_type="SEQ_CLS",
    )
    for name, tensor in model.named_parameters():
        if "modules_to_save" in name:
            tensor.requires_grad_(False)
    return Training(model, classified)


# --- LP604: new tokens ---------------------------------------------------------------------------


def resized() -> nn.Module:
    base = llama()
    base.resize_token_embeddings(VOCABULARY + 4)
    return base


@unlisted("two of four tokens listed", "LP604", 0, "rows of 2 of 4", "token 66, 67", new_token_ids=range(64, 68))
def half_of_the_tokens() -> Training:
    return Training(lora(base=resized(), trainable_token_indices=[64, 65]))


@unlisted("tables not resized", "LP604", 0, "token 64 has no row: the tables hold 64", new_token_ids=range(64, 68))
def not_resized() -> Training:
    return Training(lora(modules_to_save=["embed_tokens", "lm_head"]))


@unlisted(
    "head alone saved",
    "LP604",
    0,
    "the head learns",
    "embed_tokens does not",
    status="warn",
    new_token_ids=range(64, 68),
)
def head_alone() -> Training:
    return Training(lora(base=resized(), modules_to_save=["lm_head"]))


@unlisted("wrong ids, natively", "LP604", 0, "rows of 4 of 4", new_token_ids=range(64, 68))
def wrong_ids() -> Training:
    model = resized()
    model.add_adapter(config(trainable_token_indices=[0, 1, 2, 3]))
    return Training(model)


def with_tokens(batch: Tensor, *tokens: int) -> Tensor:
    """A batch that holds these tokens, in the middle."""
    batch = batch.clone()
    for position, token in enumerate(tokens, start=2):
        batch[:, position] = token
    return batch


def with_new_tokens(model: nn.Module, batch: Tensor, step: int) -> Tensor:
    tokens = with_tokens(batch, 64, 65, 66, 67)
    return model(input_ids=tokens, labels=tokens).loss


STARVED = ("LP604", 1, "get no gradient", "though one arrives for them", "cannot learn")


def masked_rows(kept: slice, **changes: Any) -> Training:
    """Every row but some gets a gradient of zero, by a hook on the weight that trains."""
    model = lora(base=resized(), **changes)
    if not changes:
        model.get_input_embeddings().weight.requires_grad_(True)
    table = model.get_input_embeddings()
    weight = next(p for p in table.parameters() if p.requires_grad)

    def mask(gradient: Tensor) -> Tensor:
        masked = torch.zeros_like(gradient)
        masked[kept] = gradient[kept]
        return masked

    weight.register_hook(mask)
    return Training(model, with_new_tokens, optimizer=lambda m: adamw(m, weight_decay=0.0))


@unlisted("mask that keeps the old rows", *STARVED, "4 of 4", new_token_ids=range(64, 68))
def old_rows_kept() -> Training:
    return masked_rows(slice(0, 64))


@unlisted("mask off by two", *STARVED, "2 of 4", "token 64, 65 cannot", new_token_ids=range(64, 68))
def mask_off_by_two() -> Training:
    return masked_rows(slice(66, 68), modules_to_save=["embed_tokens"])


@unlisted("mask on the rows of trainable tokens", *STARVED, "token 66, 67 cannot", new_token_ids=range(64, 68))
def delta_masked() -> Training:
    return masked_rows(slice(0, 2), trainable_token_indices=[64, 65, 66, 67])


@unlisted("mask on LoRA of the embedding", *STARVED, "4 of 4", new_token_ids=range(64, 68))
def embedding_adapter_masked() -> Training:
    model = lora(base=resized(), target_modules=["q_proj", "embed_tokens"])
    weight = next(p for n, p in model.named_parameters() if "lora_embedding_A" in n)
    weight.register_hook(lambda g: torch.cat([g[:, :64], torch.zeros_like(g[:, 64:])], dim=1))
    return Training(model, with_new_tokens)


@unlisted("rows zeroed after the backward", *STARVED, "4 of 4", new_token_ids=range(64, 68))
def rows_zeroed() -> Training:
    model = lora(base=resized())
    weight = model.get_input_embeddings().weight
    weight.requires_grad_(True)

    def zero(weight: Tensor) -> None:
        weight.grad[64:] = 0

    weight.register_post_accumulate_grad_hook(zero)
    return Training(model, with_new_tokens)


# --- LP605: parts --------------------------------------------------------------------------------


@unlisted("modules_to_save frozen", "LP605", 0, "every modules_to_save of the adapter is frozen, 1 tensors")
def copy_frozen() -> Training:
    model = lora(modules_to_save=["lm_head"])
    for name, tensor in model.named_parameters():
        if "modules_to_save" in name:
            tensor.requires_grad_(False)
    return Training(model)


@unlisted("token rows frozen", "LP605", 0, "every trainable_tokens_delta")
def rows_frozen() -> Training:
    model = lora(trainable_token_indices=[1, 2])
    for name, tensor in model.named_parameters():
        if "trainable_tokens_delta" in name:
            tensor.requires_grad_(False)
    return Training(model)


@unlisted("DoRA by an afterthought", "LP605", 0, "4 adapted layers have no lora_magnitude_vector")
def dora_afterwards() -> Training:
    model = lora()
    model.peft_config["default"].use_dora = True
    return Training(model)


@unlisted("magnitude frozen in training, natively", "LP605", 0, "every lora_magnitude_vector")
def magnitude_frozen() -> Training:
    model = llama()
    model.add_adapter(config(use_dora=True))
    for name, tensor in model.named_parameters():
        if "magnitude" in name:
            tensor.requires_grad_(False)
    return Training(model)


# --- LP606: experts ------------------------------------------------------------------------------


class Experts(nn.Module):
    """Fused weights under the names of one family or another."""

    def __init__(self, up: str, down: str) -> None:
        super().__init__()
        self.up, self.down = up, down
        setattr(self, up, nn.Parameter(torch.randn(3, 24, 12) / 12))
        setattr(self, down, nn.Parameter(torch.randn(3, 12, 24) / 12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eoi->beo", x, getattr(self, self.up)).relu()
        return torch.einsum("beo,eio->bi", hidden, getattr(self, self.down))


class Layer(nn.Module):
    def __init__(self, up: str, down: str) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 12)
        self.block_sparse_moe = nn.ModuleDict({"experts": Experts(up, down)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block_sparse_moe["experts"](self.q_proj(x))


class Mixture(nn.Module):
    def __init__(self, up: str, down: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(up, down) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mixture(up: str, down: str, targets: list[str], **changes: Any) -> Training:
    torch.manual_seed(0)
    return Training(get_peft_model(Mixture(up, down), LoraConfig(r=2, target_modules=targets, **changes)), squares)


@unlisted("w1, w3 and w2 in fused form", "LP606", 0, "4 fused expert weights", "w13", status="warn")
def fused_letters() -> Training:
    return mixture("w13", "w2", ["q_proj", "w1", "w2", "w3"])


@unlisted("gate and up in one", "LP606", 0, "4 fused expert weights", "gate_up_proj", status="warn")
def fused_gate() -> Training:
    return mixture("gate_up_proj", "down_proj", ["q_proj", "gate_proj", "up_proj", "down_proj"])


@unlisted("one of two expert weights named", "LP606", 0, "2 fused expert weights", "gate_up_proj", status="warn")
def one_of_two() -> Training:
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    return mixture("gate_up_proj", "down_proj", targets, target_parameters=["experts.down_proj"])


# --- LP607: tied tables --------------------------------------------------------------------------


@unlisted(
    "embedding alone saved", "LP607", 0, "embed_tokens is trained as a copy", "lm_head", status="warn", warnings=TIED
)
def embedding_alone() -> Training:
    return Training(lora(base=llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"]))


@unlisted("head alone saved, natively", "LP607", 0, "lm_head is trained as a copy", status="warn", warnings=TIED)
def native_head_alone() -> Training:
    model = llama(tie_word_embeddings=True)
    model.add_adapter(config(modules_to_save=["lm_head"]))
    return Training(model)


@unlisted(
    "GPT-2's head",
    "LP607",
    0,
    "lm_head is trained as a copy",
    "wte",
    status="warn",
    warnings=(*TIED, "ignore:fan_in_fan_out is set to False"),
)
def gpt2_head() -> Training:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, use_cache=False))
    return Training(lora(base=base, target_modules=["c_attn"], modules_to_save=["lm_head"]))
