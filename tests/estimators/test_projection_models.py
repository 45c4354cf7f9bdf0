"""doubled_rank against the loop, model by model and variant by variant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig
from support.projection_cases import (
    ATTENTION_AND_MLP,
    VOCABULARY,
    Case,
    base_language_model,
    bert_case,
    conv_case,
    language_case,
    language_loss,
    lora,
    quantised,
    random_direction,
    relative_error,
    tokens,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_probe_callbacks.estimators import per_prompt_projection

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

Maker = Callable[..., Case]


def assert_agrees_with_loop(case: Case, tolerance: float, **options: Any) -> None:
    direction = random_direction(case.model)
    s = per_prompt_projection(case.model, case.loss_fn, direction, self_check="always", **options)
    expected = per_prompt_projection(case.model, case.loss_fn, direction, backend="loop")
    assert expected.abs().min() > 0
    assert relative_error(s, expected) < tolerance


MODELS: dict[str, tuple[Maker, dict[str, Any]]] = {
    "llama": (language_case, {"kind": "llama"}),
    "qwen2": (language_case, {"kind": "qwen2"}),
    "gpt2": (language_case, {"kind": "gpt2"}),
    "gemma": (language_case, {"kind": "gemma"}),
    "mistral": (language_case, {"kind": "mistral"}),
    "bert": (bert_case, {}),
    "conv": (conv_case, {}),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in {"bert", "conv"}])
def test_language_models(name: str, attention: str, dtype: torch.dtype) -> None:
    make, options = MODELS[name]
    assert_agrees_with_loop(make(dtype=dtype, attention=attention, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", ["bert", "conv"])
def test_other_models(name: str, dtype: torch.dtype) -> None:
    make, options = MODELS[name]
    assert_agrees_with_loop(make(dtype=dtype, **options), TOLERANCE[dtype])


VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "rank_pattern": {"rank_pattern": {"q_proj": 5, "down_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "lora_bias": {"lora_bias": True},
    "base_bias": {"bias": "lora_only", "kind": "qwen2"},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.3},
    "dora_bias": {"use_dora": True, "kind": "qwen2"},
    "dora_conv1d": {"use_dora": True, "kind": "gpt2", "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "modules_to_save_head": {"modules_to_save": ["lm_head"], "target_modules": ATTENTION_AND_MLP},
    "modules_to_save_norm": {"modules_to_save": ["norm", "input_layernorm"]},
    "modules_to_save_gemma_norm": {"modules_to_save": ["norm"], "kind": "gemma"},
    "modules_to_save_layer_norm": {"modules_to_save": ["ln_f", "ln_1"], "kind": "gpt2"},
    "modules_to_save_conv1d": {"modules_to_save": ["c_proj"], "target_modules": ["c_attn"], "kind": "gpt2"},
    "modules_to_save_embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding_lora": {"target_modules": [*ATTENTION_AND_MLP, "embed_tokens", "lm_head"]},
    "embedding_lora_scaled": {"target_modules": ["embed_tokens", "q_proj"], "kind": "gemma"},
    "lm_head_lora": {"target_modules": [*ATTENTION_AND_MLP, "lm_head"]},
    "mica": {"init_lora_weights": "mica", "target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant: str, dtype: torch.dtype) -> None:
    # Gemma's norm multiplies in float32 whatever the model's type (transformers 5.23).
    tolerance = max(TOLERANCE[dtype], 1e-7) if variant == "modules_to_save_gemma_norm" else TOLERANCE[dtype]
    assert_agrees_with_loop(language_case(dtype=dtype, **VARIANTS[variant]), tolerance)


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.4}], ids=str)
def test_conv_variants(options: dict[str, Any]) -> None:
    assert_agrees_with_loop(conv_case(**options), 1e-10)


def test_convolution_saved_as_a_whole() -> None:
    options = {"target_modules": ["second"], "modules_to_save": ["first", "norm", "head"]}
    assert_agrees_with_loop(conv_case(**options), 1e-10)


def test_batch_norm_in_eval_mode_is_like_any_layer() -> None:
    case = conv_case(batch_norm=True)
    case.model.eval()
    assert_agrees_with_loop(case, 1e-10)


def test_bert_with_its_embeddings_and_classifier() -> None:
    case = bert_case(target_modules=["query", "word_embeddings"], modules_to_save=["classifier", "LayerNorm"])
    assert_agrees_with_loop(case, 1e-10)


def test_several_active_adapters() -> None:
    case = language_case()
    model: Any = case.model
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.double().base_model.set_adapter(["default", "second"])
    assert any("second" in name for name in random_direction(model))
    assert_agrees_with_loop(case, 1e-10)


def test_the_direction_may_hold_only_some_of_the_tensors() -> None:
    case = language_case()
    full = random_direction(case.model)
    only_b = {name: tensor for name, tensor in full.items() if "lora_B" in name}
    s = per_prompt_projection(case.model, case.loss_fn, only_b)
    assert relative_error(s, per_prompt_projection(case.model, case.loss_fn, only_b, backend="loop")) < 1e-10


def test_a_tiny_direction_does_not_vanish_in_float16() -> None:
    case = language_case(dtype=torch.float32)
    case.model.half()
    large, tiny = random_direction(case.model), {}
    tiny = {name: tensor.float() * 1e-9 for name, tensor in large.items()}
    s, scaled = (per_prompt_projection(case.model, case.loss_fn, mu, self_check="never") for mu in (large, tiny))
    assert relative_error(scaled * 1e9, s) < 1e-3


def test_several_responses_to_a_prompt() -> None:
    case = language_case()
    loss_fn = language_loss(tokens(6), responses=3)
    rows = torch.arange(2).repeat_interleave(3)
    assert_agrees_with_loop(Case(case.model, loss_fn), 1e-10, example_of_row=rows)


def test_packed_sequences_look_up_their_example_by_token() -> None:
    """Three sequences in one row, apart by position ids and a block-diagonal mask."""
    case = language_case()
    lengths = torch.tensor([5, 3, 6])
    example = torch.arange(3).repeat_interleave(lengths)
    ids = tokens(1, int(lengths.sum()))
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None]
    visible = (example[:, None] == example[None]).tril()
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)[None, None]

    def loss_fn(model: nn.Module) -> torch.Tensor:
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits[0, :-1]
        nll = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        inside = example[1:] == example[:-1]
        return torch.zeros(3, dtype=nll.dtype).index_add(0, example[1:], nll * inside)

    assert_agrees_with_loop(Case(case.model, loss_fn), 1e-10, example_of_row=example[None])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("variant", ["lora", "dora_dropout", "embedding_lora"])
def test_checkpointing(variant: str, reentrant: bool) -> None:
    case = language_case(**VARIANTS.get(variant, {}))
    direction = random_direction(case.model)
    expected = per_prompt_projection(case.model, case.loss_fn, direction, backend="loop")
    base: Any = case.model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_agrees_with_loop(case, 1e-10)
    s = per_prompt_projection(case.model, case.loss_fn, direction)
    assert relative_error(s, expected) < 1e-10


def test_reentrant_checkpoints_without_the_input_gradient_hook() -> None:
    """A plain module that nobody prepared: with its adapter frozen no input needs a gradient."""
    torch.manual_seed(0)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 8)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, self.embed(ids), use_reentrant=True)

    model = lora(Blocks(), target_modules=["0", "2"]).double()
    loss_fn = lambda model: model(tokens()).square().mean((1, 2))  # noqa: E731
    assert_agrees_with_loop(Case(model, loss_fn), 1e-10)


def test_compiled_model_is_run_as_it_is_written() -> None:
    case = language_case(dtype=torch.float32)
    direction = random_direction(case.model)
    expected = per_prompt_projection(case.model, case.loss_fn, direction, backend="loop")
    compiled: Any = torch.compile(case.model, backend="aot_eager")
    case.loss_fn(compiled).sum().backward()  # compiled before, with the layers as they were
    for model, loss_fn in (
        (compiled, case.loss_fn),
        (case.model, lambda _: case.loss_fn(compiled)),  # the loss holds the compiled model itself
    ):
        assert relative_error(per_prompt_projection(model, loss_fn, direction), expected) < 1e-5
    torch.compiler.reset()


def test_module_compiled_in_place() -> None:
    case = language_case(dtype=torch.float32)
    direction = random_direction(case.model)
    expected = per_prompt_projection(case.model, case.loss_fn, direction, backend="loop")
    case.model.compile(backend="aot_eager")
    case.loss_fn(case.model)
    assert relative_error(per_prompt_projection(case.model, case.loss_fn, direction), expected) < 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_bfloat16_autocast(where: str) -> None:
    """Both ways round differently after the same forward: 2% is a quarter of bfloat16's own error."""
    case = language_case(dtype=torch.float32, attention="sdpa")
    direction = random_direction(case.model)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)

    def inside(model: nn.Module) -> torch.Tensor:
        with autocast():
            return case.loss_fn(model)

    exact = per_prompt_projection(case.model, case.loss_fn, direction)
    if where == "inside":
        s, expected = (
            per_prompt_projection(case.model, inside, direction, backend=b, self_check=c)
            for b, c in (("doubled_rank", "always"), ("loop", "never"))
        )
    else:
        with autocast():
            s, expected = (
                per_prompt_projection(case.model, case.loss_fn, direction, backend=b, self_check=c)
                for b, c in (("doubled_rank", "always"), ("loop", "never"))
            )
    assert s.dtype == torch.float32
    assert 0 < relative_error(s, exact) < 0.08
    assert relative_error(s, expected) < 0.02


@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_bitsandbytes(quantisation: str) -> None:
    torch.manual_seed(0)
    base = base_language_model("llama", "sdpa", hidden_size=64, intermediate_size=64, head_dim=32)
    model = lora(quantised(base, quantisation), target_modules="all-linear", task_type="CAUSAL_LM")
    assert_agrees_with_loop(Case(model, language_loss(tokens())), 1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_bitsandbytes_4_bit_with_checkpoints(use_dora: bool) -> None:
    torch.manual_seed(0)
    base = base_language_model("llama", "sdpa", hidden_size=64, intermediate_size=64, head_dim=32)
    model = lora(quantised(base, "nf4"), target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    assert_agrees_with_loop(Case(model, language_loss(tokens())), 1e-5)


def test_modules_with_accelerates_device_hooks() -> None:
    case = language_case()
    direction = random_direction(case.model)
    expected = per_prompt_projection(case.model, case.loss_fn, direction)
    for module in case.model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert relative_error(per_prompt_projection(case.model, case.loss_fn, direction), expected) < 1e-12
