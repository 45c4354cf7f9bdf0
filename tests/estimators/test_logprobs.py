from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks.estimators import PromptBatch, logprobs, sequence_logprobs

EOS = 3  # also the padding token
token = st.integers(0, 19)


@functools.cache
def gpt2():
    """A float64 GPT-2: absolute positions and no float32 inside, so that padding has nowhere to hide."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=48, bos_token_id=0, eos_token_id=EOS)
    lora = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(GPT2LMHeadModel(config), lora).double().eval()


def ragged_batch(seed: int = 0, B: int = 3, G: int = 2, **options) -> PromptBatch:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> list[int]:
        length = int(torch.randint(1, 6, (1,), generator=generator))
        return torch.randint(0, 20, (length,), generator=generator).tolist()

    prompts = [draw() for _ in range(B)]
    return PromptBatch.from_ragged(prompts, [[draw() for _ in range(G)] for _ in range(B)], pad_id=EOS, **options)


def repadded(batch: PromptBatch, left: int, right: int, fill: int) -> PromptBatch:
    def pad(x: torch.Tensor, value: int) -> torch.Tensor:
        return nn.functional.pad(x, (left, right), value=value)

    return PromptBatch(
        sequences=pad(torch.where(batch.attention_mask, batch.sequences, fill), fill),
        attention_mask=pad(batch.attention_mask, 0),
        prompt_boundary=batch.prompt_boundary + left,
        response_mask=pad(batch.response_mask, 0),
        max_lengths=batch.max_lengths,
    )


def textbook_logprob(model: nn.Module, prompt: list[int], response: list[int], temperature: float = 1.0):
    """Score one response alone, without padding, masks, position ids or chunks."""
    logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
    log_pi = torch.log_softmax(logits, -1)
    return sum(log_pi[len(prompt) - 1 + t, x] for t, x in enumerate(response))


def two_adapters(tiny_llama_factory, **lora):
    model = tiny_llama_factory(**lora)
    torch.manual_seed(1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    return model


def state_of(model: nn.Module) -> dict:
    """All that a switch of adapters could leave behind."""
    named = list(model.named_modules())
    return copy.deepcopy(
        {
            "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
            "mode": {name: module.training for name, module in named},
            "hooks": {name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in named},
            "adapters": {
                name: {
                    key: vars(module).get(key, "absent")
                    for key in ("active_adapter", "_active_adapter", "_disable_adapters", "merged_adapters")
                }
                for name, module in named
            },
            "rng": torch.get_rng_state().tolist(),
        }
    )


# The value


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_textbook_sum_of_each_response_scored_alone(temperature):
    prompts, responses = [[5, 6, 7], [8]], [[[1], [2, 4, EOS]], [[9, EOS], [EOS, EOS]]]
    batch = PromptBatch.from_ragged(prompts, responses, pad_id=EOS)
    S = sequence_logprobs(gpt2(), batch, adapter="default", temperature=temperature)
    expected = [
        [textbook_logprob(gpt2(), prompt, response, temperature).item() for response in group]
        for prompt, group in zip(prompts, responses, strict=True)
    ]
    torch.testing.assert_close(S, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_log_probs_of_a_padded_llama_are_the_textbook_sum(tiny_llama_factory, attention):
    model = tiny_llama_factory(attention=attention)
    prompts, responses = [[5, 6, 7, 8], [8]], [[[1], [2, 4, EOS]], [[9, EOS], [EOS, EOS]]]
    S = sequence_logprobs(model, PromptBatch.from_ragged(prompts, responses, pad_id=EOS), adapter="default")
    expected = [
        [textbook_logprob(model, prompt, response).item() for response in group]
        for prompt, group in zip(prompts, responses, strict=True)
    ]
    assert S.dtype == torch.float32
    torch.testing.assert_close(S, torch.tensor(expected), rtol=0, atol=1e-5)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 6), token)
@settings(max_examples=40, deadline=None)
def test_padding_never_changes_log_probs(seed, B, G, left, right, fill):
    batch = ragged_batch(seed, B, G)
    S = sequence_logprobs(gpt2(), batch, adapter="default")
    padded = sequence_logprobs(gpt2(), repadded(batch, left, right, fill), adapter="default")
    assert S.shape == (B, G)
    torch.testing.assert_close(padded, S, rtol=0, atol=1e-10)


@given(st.integers(0, 999), st.permutations(range(4)))
@settings(max_examples=15, deadline=None)
def test_permuting_prompts_permutes_log_probs(seed, order):
    batch = ragged_batch(seed, B=4)
    S = sequence_logprobs(gpt2(), batch, adapter="default")
    permuted = PromptBatch(
        batch.sequences[order],
        batch.attention_mask[order],
        batch.prompt_boundary,
        batch.response_mask[order],
        batch.max_lengths[order],
    )
    torch.testing.assert_close(sequence_logprobs(gpt2(), permuted, adapter="default"), S[order], rtol=0, atol=1e-10)


def test_padding_never_changes_the_gradient():
    batch = ragged_batch(5)
    weights = [p for p in gpt2().parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(sequence_logprobs(gpt2(), b, adapter="default").sum(), weights)
        for b in (batch, repadded(batch, 3, 4, 7))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_tokens_that_the_response_mask_leaves_out_do_not_count():
    prompt, response = [5, 6], [1, 2, 3, 4]
    whole = PromptBatch.from_ragged([prompt], [[response]], pad_id=0)
    mask = whole.response_mask.clone()
    mask[0, 0, 3:5] = False
    S = sequence_logprobs(
        gpt2(),
        PromptBatch(whole.sequences, whole.attention_mask, 2, mask, whole.max_lengths),
        adapter="default",
    )
    log_pi = torch.log_softmax(gpt2()(torch.tensor([prompt + response])).logits[0], -1)
    torch.testing.assert_close(S[0, 0], log_pi[1, 1] + log_pi[4, 4])


def test_micro_batches_give_the_log_probs_of_the_whole_batch():
    batch = ragged_batch(2, B=5)
    parts = [sequence_logprobs(gpt2(), part, adapter="default") for part in batch.split(2)]
    torch.testing.assert_close(torch.cat(parts), sequence_logprobs(gpt2(), batch, adapter="default"))


# The gradient


def test_the_gradient_is_the_textbook_one(tiny_llama_factory):
    model = tiny_llama_factory(dtype=torch.float64)
    weights = [p for p in model.parameters() if p.requires_grad]
    S = sequence_logprobs(model, PromptBatch.from_ragged([[5, 6], [7]], [[[1, 2]], [[3]]], pad_id=0), adapter="default")
    expected = textbook_logprob(model, [5, 6], [1, 2]) + textbook_logprob(model, [7], [3])
    ours, theirs = torch.autograd.grad(S.sum(), weights), torch.autograd.grad(expected, weights)
    assert len(weights) == 12
    for a, b in zip(ours, theirs, strict=True):
        assert bool(b.any())
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [5, 21, 10**6])
def test_the_selected_log_softmax_is_twice_differentiable(monkeypatch, chunk, temperature):
    monkeypatch.setattr(logprobs, "_CHUNK", chunk)
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 5, (2, 3))

    def selected(z: torch.Tensor) -> torch.Tensor:
        return logprobs._selected_log_softmax(z, targets, temperature)

    reference = torch.log_softmax(logits / temperature, -1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(selected(logits), reference)
    assert torch.autograd.gradcheck(selected, logits)
    assert torch.autograd.gradgradcheck(selected, logits)


def test_a_second_derivative_through_the_model_is_that_of_autograd(tiny_llama_factory):
    model = tiny_llama_factory(dtype=torch.float64, attention="eager")
    weights = [p for p in model.parameters() if p.requires_grad]
    batch = PromptBatch.from_ragged([[5, 6]], [[[1, 2, 9]]], pad_id=0)

    def curvature(L: torch.Tensor) -> list[torch.Tensor]:
        grads = torch.autograd.grad(L, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), weights)

    ours = curvature(sequence_logprobs(model, batch, adapter="default").sum())
    for a, b in zip(ours, curvature(textbook_logprob(model, [5, 6], [1, 2, 9])), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_kept_once_and_never_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(logprobs, "_CHUNK", 64)
    logits = torch.randn(4, 8, 32).to(dtype).requires_grad_()
    targets = torch.randint(0, 32, (4, 8))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        log_pi = logprobs._selected_log_softmax(logits, targets, 1.0)
    assert sorted((x.dtype, x.numel()) for x in kept if x.is_floating_point()) == [(dtype, logits.numel())]
    reference = torch.log_softmax(logits.float(), -1).gather(-1, targets[..., None])[..., 0]
    assert log_pi.dtype == torch.float32
    torch.testing.assert_close(log_pi, reference)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), logits) for x in (log_pi, reference))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


def test_gradients_are_recorded_under_no_grad():
    batch = ragged_batch()
    with torch.no_grad():
        S = sequence_logprobs(gpt2(), batch, adapter="default")
        assert not torch.is_grad_enabled()
    weights = [p for p in gpt2().parameters() if p.requires_grad]
    assert all(bool(g.any()) for g in torch.autograd.grad(S.sum(), weights))


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"got torch.inference_mode\(\), expected"):
        sequence_logprobs(gpt2(), ragged_batch(), adapter="default")


def test_autocast_is_respected_and_log_probs_stay_in_float32(tiny_llama_factory):
    model, batch, seen = tiny_llama_factory(), ragged_batch(), []
    exact = sequence_logprobs(model, batch, adapter="default")
    handle = model.get_base_model().lm_head.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        S = sequence_logprobs(model, batch, adapter="default")
    handle.remove()
    assert seen == [torch.bfloat16]
    assert S.dtype == torch.float32
    torch.testing.assert_close(S, exact, rtol=0.02, atol=0.05)
    assert not torch.equal(S, exact)


def test_only_the_logits_that_predict_responses_are_made(tiny_llama_factory):
    model, shapes = tiny_llama_factory(), []
    model.get_base_model().lm_head.register_forward_hook(lambda *args: shapes.append(args[2].shape[1]))
    sequence_logprobs(model, PromptBatch.from_ragged([[1] * 10], [[[2, 3]]], pad_id=0), adapter="default")
    assert shapes == [3]


def test_the_model_is_told_what_is_padding(tiny_llama_factory):
    model, seen = tiny_llama_factory(), {}
    handle = model.register_forward_pre_hook(lambda *args: seen.update(args[2]), with_kwargs=True)
    batch = PromptBatch.from_ragged([[5, 6, 7], [EOS]], [[[1, EOS]], [[2]]], pad_id=EOS)
    sequence_logprobs(model, batch, adapter="default")
    handle.remove()
    assert seen["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 0]]
    assert seen["position_ids"][seen["attention_mask"].bool()].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert seen["use_cache"] is False


# The adapter


def test_the_asked_adapter_makes_the_log_probs_whichever_is_active(tiny_llama_factory):
    model, batch = two_adapters(tiny_llama_factory), ragged_batch()
    model.set_adapter("other")
    expected = sequence_logprobs(model, batch, adapter="other")
    default = sequence_logprobs(model, batch, adapter="default")
    model.set_adapter("default")
    assert torch.equal(sequence_logprobs(model, batch, adapter="other"), expected)
    assert torch.equal(sequence_logprobs(model, batch, adapter="default"), default)
    assert not torch.allclose(expected, default)


def test_several_adapters_can_be_active_together(tiny_llama_factory):
    model, batch = two_adapters(tiny_llama_factory), ragged_batch()
    together = sequence_logprobs(model, batch, adapter=["default", "other"])
    model.base_model.set_adapter(["default", "other"])
    before = state_of(model)
    assert torch.equal(sequence_logprobs(model, batch, adapter=["default", "other"]), together)
    assert state_of(model) == before
    assert not torch.allclose(sequence_logprobs(model, batch, adapter="default"), together)
    assert state_of(model) == before


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("asked", ["default", "other"])
def test_nothing_is_left_behind(tiny_llama_factory, asked, training):
    model = two_adapters(tiny_llama_factory, modules_to_save=["lm_head"]).train(training)
    next(p for n, p in model.named_parameters() if "lora_A.default" in n).requires_grad_(False)
    before = state_of(model)
    sequence_logprobs(model, ragged_batch(), adapter=asked)
    assert state_of(model) == before


def test_an_irregular_state_is_put_back_as_it_was(tiny_llama_factory):
    model = two_adapters(tiny_llama_factory)
    layers = model.get_base_model().model.layers
    layers[0].self_attn.q_proj.set_adapter("other")
    layers[1].self_attn.v_proj.enable_adapters(False)
    before = state_of(model)
    S = sequence_logprobs(model, ragged_batch(), adapter="default")
    assert state_of(model) == before
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    assert torch.equal(sequence_logprobs(model, ragged_batch(), adapter="default"), S)


def test_the_state_is_put_back_after_an_exception_in_the_forward(tiny_llama_factory):
    model = two_adapters(tiny_llama_factory, modules_to_save=["lm_head"])

    def fail(*_: object) -> None:
        raise KeyError("from the forward")

    handle = model.get_base_model().model.layers[1].register_forward_hook(fail)
    before = state_of(model)
    with pytest.raises(KeyError, match="from the forward"):
        sequence_logprobs(model, ragged_batch(), adapter="other")
    assert state_of(model) == before
    handle.remove()


def test_disabled_adapters_are_enabled_for_the_forward_only(tiny_llama_factory):
    model, batch = tiny_llama_factory(), ragged_batch()
    expected = sequence_logprobs(model, batch, adapter="default")
    with model.disable_adapter():
        before = state_of(model)
        S = sequence_logprobs(model, batch, adapter="default")
        assert state_of(model) == before
    assert torch.equal(S, expected)


def test_a_saved_module_of_the_adapter_is_used(tiny_llama_factory):
    model, batch = two_adapters(tiny_llama_factory, modules_to_save=["lm_head"]), ragged_batch()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    expected = sequence_logprobs(model, batch, adapter="default")
    model.set_adapter("other")
    assert torch.equal(sequence_logprobs(model, batch, adapter="default"), expected)


def test_a_frozen_reference_adapter_stays_frozen_and_gets_no_gradient(tiny_llama_factory):
    model = two_adapters(tiny_llama_factory)
    S = sequence_logprobs(model, ragged_batch(), adapter="other")
    assert not S.requires_grad


def test_an_inactive_adapter_that_is_trainable_gets_its_gradient(tiny_llama_factory):
    model = two_adapters(tiny_llama_factory)
    weights = [p for n, p in model.named_parameters() if ".other." in n]
    for parameter in weights:
        parameter.requires_grad_(True)
    grads = torch.autograd.grad(sequence_logprobs(model, ragged_batch(), adapter="other").sum(), weights)
    assert all(bool(g.any()) for g in grads)


def test_dropout_is_that_of_the_training_mode(tiny_llama_factory):
    model, batch = tiny_llama_factory(lora_dropout=0.5), ragged_batch()
    still = sequence_logprobs(model, batch, adapter="default")
    assert torch.equal(sequence_logprobs(model, batch, adapter="default"), still)
    model.train()
    torch.manual_seed(7)
    noisy = sequence_logprobs(model, batch, adapter="default")
    torch.manual_seed(7)
    assert torch.equal(sequence_logprobs(model, batch, adapter="default"), noisy)
    assert not torch.allclose(noisy, still)


def test_a_merged_adapter_is_refused_and_stays_merged(tiny_llama_factory):
    model = two_adapters(tiny_llama_factory)
    model.merge_adapter(["default"])
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"got adapters \['default'\] merged .* unmerge_adapter"):
        sequence_logprobs(model, ragged_batch(), adapter="other")
    assert state_of(model) == before


@pytest.mark.parametrize("adapter", ["missing", ["default", "missing"], []])
def test_an_adapter_that_is_not_there_is_refused(tiny_llama_factory, adapter):
    with pytest.raises(ValueError, match=r"got adapter \[.*\], expected one or more of \['default'\]"):
        sequence_logprobs(tiny_llama_factory(), ragged_batch(), adapter=adapter)


# Gradient checkpointing


# transformers 5.23 renamed it to activation_checkpointing_enable, which 5.17 does not have
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(tiny_llama_factory, reentrant):
    model, batch = tiny_llama_factory().train(), ragged_batch()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        sequence_logprobs(model, batch, adapter="default").sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


# transformers 5.23 renamed it to activation_checkpointing_enable, which 5.17 does not have
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_backward_under_another_adapter_is_refused(tiny_llama_factory, reentrant):
    model = two_adapters(tiny_llama_factory).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    S = sequence_logprobs(model, ragged_batch(), adapter="other")
    with pytest.raises(RuntimeError, match=r"got a backward of S while \['other'\], .* not active any more"):
        S.sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    model.set_adapter("other")
    S = sequence_logprobs(model, ragged_batch(), adapter="other")
    S.sum().backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if ".other." in n)


# What the adapter is found in


class Wrapper(nn.Module):
    """Stands for DDP, a LightningModule, a value-head model: it holds the model somewhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.inner = inner


def test_the_peft_model_is_found_inside_wrappers(tiny_llama_factory):
    model, batch = tiny_llama_factory(), ragged_batch()
    expected = sequence_logprobs(model, batch, adapter="default")
    for wrapped in (Wrapper(model), Wrapper(Wrapper(model)), torch.compile(model, backend="eager")):
        assert torch.equal(sequence_logprobs(wrapped, batch, adapter="default"), expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_adapters_of_a_transformers_model_serve_without_a_peft_model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    batch = ragged_batch()
    for name in ("first", "second"):
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), name)
    wrapped, before = Wrapper(model), state_of(model)
    first = sequence_logprobs(wrapped, batch, adapter="first")
    assert state_of(model) == before
    model.set_adapter("first")
    assert torch.equal(sequence_logprobs(model, batch, adapter="first"), first)
    assert not torch.allclose(sequence_logprobs(model, batch, adapter="second"), first)


class Bigram(nn.Module):
    """The smallest language model: no configuration, no masks, plain logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def test_a_model_outside_transformers_may_return_plain_logits():
    torch.manual_seed(0)
    model = get_peft_model(Bigram(), LoraConfig(target_modules=["head"], init_lora_weights=False)).double()
    S = sequence_logprobs(model, PromptBatch.from_ragged([[5, 6]], [[[1, 2]]], pad_id=0), adapter="default")
    log_pi = torch.log_softmax(model(torch.tensor([6, 1])), -1)
    torch.testing.assert_close(S[0, 0], log_pi[0, 1] + log_pi[1, 2])


def test_a_model_that_returns_no_logits_for_every_token_is_refused():
    class Pooled(Bigram):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens).mean(1)

    model = get_peft_model(Pooled(), LoraConfig(target_modules=["head"]))
    with pytest.raises(ValueError, match=r"got Tensor with logits of shape \[6, 20\], expected \[6, .* causal"):
        sequence_logprobs(model, ragged_batch(), adapter="default")


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="got Bigram without any PEFT layer, expected a PeftModel"):
        sequence_logprobs(Bigram(), ragged_batch(), adapter="default")


def test_two_peft_models_side_by_side_are_refused(tiny_llama_factory):
    pair = nn.ModuleList([tiny_llama_factory(), tiny_llama_factory()])
    with pytest.raises(ValueError, match="got ModuleList with 2 PEFT models side by side, expected one"):
        sequence_logprobs(pair, ragged_batch(), adapter="default")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="expected a positive number"):
        sequence_logprobs(gpt2(), ragged_batch(), adapter="default", temperature=temperature)
