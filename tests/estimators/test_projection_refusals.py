"""What would be silently wrong is refused, and by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support.projection_cases import (
    VOCABULARY,
    Case,
    conv_case,
    language_case,
    language_loss,
    lora,
    random_direction,
    tokens,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lora_probe_callbacks.estimators import UpdateDirection, per_prompt_projection


def project(case: Case, **options: Any) -> torch.Tensor:
    return per_prompt_projection(case.model, case.loss_fn, random_direction(case.model), **options)


class Block(nn.Module):
    """Embeds, mixes the tokens of a sequence, and runs two layers on rows laid out in some way."""

    def __init__(self, lay_out: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.lay_out = lay_out
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        hidden = hidden + hidden.cumsum(1)
        return self.lay_out(self.down(self.up(self.lay_out(hidden)).tanh()))


def laid_out(lay_out: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> Case:
    torch.manual_seed(0)
    model = lora(Block(lay_out), target_modules=["up", "down"]).double()
    return Case(model, lambda model: model(ids).square().mean((1, 2)))


class TestSelfCheck:
    def test_the_block_itself_is_healthy(self) -> None:
        assert project(laid_out(lambda hidden: hidden, tokens(6, 6))).shape == (6,)

    def test_sequence_first_tensors_as_long_as_the_batch(self) -> None:
        case = laid_out(lambda hidden: hidden.transpose(0, 1), tokens(6, 6))
        with pytest.raises(RuntimeError, match="sequence-first"):
            project(case)

    def test_sequence_first_tensors_of_another_length(self) -> None:
        case = laid_out(lambda hidden: hidden.transpose(0, 1), tokens(6, 5))
        with pytest.raises(ValueError, match=r"returned 6 losses, but the layers got the rows of 5 examples"):
            project(case)
        with pytest.raises(ValueError, match=r"up.lora_A.default got a tensor of shape \(5, 6, 8\), expected \(6,\)"):
            project(case, example_of_row=torch.arange(6))

    def test_tokens_gathered_by_expert(self) -> None:
        """As many tokens to the expert as there are examples, but not the same ones."""
        order = torch.tensor([3, 0, 5, 1, 2, 4])
        case = laid_out(lambda hidden: hidden[order].flip(0), tokens(6, 6))
        with pytest.raises(RuntimeError, match="gathered tokens"):
            project(case)

    def test_in_batch_negatives(self) -> None:
        case = language_case()
        ids = tokens()

        def contrastive(model: Any) -> torch.Tensor:
            pooled = model(input_ids=ids).logits.mean(1)
            return -(pooled @ pooled.T).log_softmax(-1).diagonal()

        with pytest.raises(RuntimeError, match="in-batch negatives"):
            project(Case(case.model, contrastive))

    def test_a_loss_that_calls_the_model_in_chunks(self) -> None:
        """Two prompts in two chunks of two rows: the sizes agree, the sums are folded."""
        case = language_case()
        parts = tokens(4).chunk(2)

        def chunked(model: Any) -> torch.Tensor:
            return torch.stack([language_loss(ids)(model).sum() for ids in parts])

        with pytest.raises(RuntimeError, match="in chunks"):
            project(Case(case.model, chunked))
        with pytest.raises(ValueError, match=r"expected \(4,\) rows first"):
            project(Case(case.model, chunked), example_of_row=torch.arange(2).repeat_interleave(2))

    def test_a_parameter_used_outside_of_its_layer(self) -> None:
        case = language_case()
        weight = next(p for name, p in case.model.named_parameters() if "lora_A" in name)
        regularised = Case(case.model, lambda model: case.loss_fn(model) + weight.square().sum())
        with pytest.raises(RuntimeError, match="outside its layer"):
            project(regularised)

    def test_a_loss_that_differs_from_call_to_call(self) -> None:
        case = language_case()
        calls = iter(range(1, 9))
        drifting = Case(case.model, lambda model: case.loss_fn(model) * next(calls))
        with pytest.raises(RuntimeError, match="not repeatable"):
            project(drifting)

    def test_it_runs_once_for_a_model_loss_and_shape(self) -> None:
        case = language_case()
        calls = []

        def loss_fn(model: Any) -> torch.Tensor:
            calls.append(len(ids))
            return language_loss(ids)(model)

        for rows, options, expected in (
            (4, {}, [4, 4]),
            (4, {}, [4]),
            (3, {}, [3, 3]),
            (3, {"self_check": "always"}, [3, 3]),
            (5, {"self_check": "never"}, [5]),
        ):
            calls.clear()
            ids = tokens(rows)
            project(Case(case.model, loss_fn), **options)
            assert calls == expected

    def test_a_failed_check_is_not_remembered_as_passed(self) -> None:
        case = laid_out(lambda hidden: hidden.transpose(0, 1), tokens(6, 6))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="disagrees"):
                project(case)

    @pytest.mark.parametrize("seed", range(4))
    def test_bfloat16_is_not_taken_for_a_fault_nor_hides_one(self, seed: int) -> None:
        case = language_case(dtype=torch.float32)
        ids = tokens(6, 6, seed)
        direction = random_direction(case.model, seed=seed)
        mixed = laid_out(lambda hidden: hidden.transpose(0, 1), ids)
        mixed.model.float()
        with torch.autocast("cpu", torch.bfloat16):
            per_prompt_projection(case.model, language_loss(ids), direction, self_check="always")
            with pytest.raises(RuntimeError, match="sequence-first"):
                project(mixed)


@pytest.mark.parametrize("checkpoints", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_rows_that_are_not_the_losses_need_example_of_row(checkpoints: Any) -> None:
    case = language_case()
    model: Any = case.model
    if checkpoints is not None:
        model.get_base_model().gradient_checkpointing_enable(checkpoints)
    grouped = Case(model, language_loss(tokens(6), responses=3))
    with pytest.raises(ValueError, match=r"returned 2 losses, but .* rows of 6 examples.*example_of_row"):
        project(grouped)
    rows = torch.arange(3).repeat_interleave(2)
    with pytest.raises(ValueError, match=r"returned 2 losses, but .* rows of 3 examples"):
        project(grouped, example_of_row=rows)


class TestUnvisited:
    def test_layer_that_never_ran(self) -> None:
        case = language_case()
        base: Any = case.model
        base.base_model.model.model.layers[1].forward = lambda hidden, *_, **__: hidden
        with pytest.raises(RuntimeError, match=r"14 of 28 layers .*model.layers.1"):
            project(case)

    @pytest.mark.parametrize("state", ["disabled", "merged", "other"])
    def test_adapter_that_is_not_active(self, state: str) -> None:
        case = language_case()
        model: Any = case.model
        direction = random_direction(model)
        if state == "disabled":
            model.base_model.disable_adapter_layers()
        elif state == "merged":
            model.merge_adapter()
        else:
            model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
            model.double().set_adapter("other")
        with pytest.raises(RuntimeError, match="28 of 28 layers"):
            per_prompt_projection(model, case.loss_fn, direction)

    def test_loss_without_a_graph(self) -> None:
        case = language_case()
        with pytest.raises(RuntimeError, match="did not run with a graph"):
            project(Case(case.model, torch.no_grad()(case.loss_fn)))


class TestBeforeItRuns:
    """A loss that must not be called: the refusal comes first."""

    def refuse(self, model: nn.Module, match: str, **options: Any) -> None:
        def never(model: nn.Module) -> torch.Tensor:
            raise AssertionError("loss_fn was called")

        direction = options.pop("direction", None) or random_direction(model)
        with pytest.raises((NotImplementedError, ValueError), match=match):
            per_prompt_projection(model, never, direction, **options)

    def test_batch_norm_in_train_mode(self) -> None:
        model = conv_case(batch_norm=True).model
        self.refuse(model, r"norm \(BatchNorm2d\) normalises over the batch.*model.eval\(\), or backend='loop'")

    def test_attention_that_uses_the_weights_itself(self) -> None:
        class Attending(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.attention(x, x, x)[0]

        self.refuse(lora(Attending(), target_modules=["attention"]), r"attention \(MultiheadAttention\).*loop")

    def test_expert_parameters(self) -> None:
        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(2, 8, 8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.einsum("bi,eij->bj", x, self.weight)

        model = lora(nn.Sequential(Experts()), target_modules=[], target_parameters=["0.weight"])
        self.refuse(model, r"ParamWrapper.*backend='loop'")

    def test_other_variants_of_lora(self) -> None:
        model = language_case(alora_invocation_tokens=[1, 2], target_modules=["q_proj"]).model
        self.refuse(model, r"q_proj has the LoRA variant ALoraLinearVariant.*backend='loop'")

    def test_dora_on_an_embedding(self) -> None:
        model = language_case(use_dora=True, target_modules=["embed_tokens"]).model
        self.refuse(model, "DoraEmbeddingVariant")

    def test_trainable_tokens(self) -> None:
        model = language_case(trainable_token_indices=[3], target_modules=["q_proj"]).model
        self.refuse(model, r"no rule for default of .*trainable_tokens_delta \(ParameterDict\)")

    def test_layers_of_other_kinds(self) -> None:
        class Odd(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) * self.weight.sum()

        self.refuse(nn.Sequential(Odd(3, 2)), r"no rule for bias, weight of 0 \(Odd\); use backend='loop'")

    def test_forward_replaced_on_the_instance(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2))
        model[0].forward = lambda x: x
        self.refuse(model, "forward of 0 has been replaced")

    def test_alpha_on_fused_attention(self) -> None:
        model = language_case(attention="sdpa").model
        self.refuse(model, r"fused attention \(sdpa\).*use backend='doubled_rank'", backend="alpha")

    def test_alpha_on_reentrant_checkpoints(self) -> None:
        model: Any = language_case().model
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
        self.refuse(model, "reentrant checkpointing.*use backend='doubled_rank'", backend="alpha")

    def test_forward_mode(self) -> None:
        self.refuse(nn.Linear(2, 1), "jvp.*silently wrong.*Use backend='doubled_rank'", backend="jvp")

    def test_unknown_words(self) -> None:
        self.refuse(nn.Linear(2, 1), "got backend='fast', expected", backend="fast")
        self.refuse(nn.Linear(2, 1), "got self_check='once', expected", self_check="once")

    @pytest.mark.parametrize("rows", [torch.tensor([0.0]), torch.tensor([-1]), torch.zeros(1, 1, 1).long()])
    def test_rows_that_are_no_examples(self, rows: torch.Tensor) -> None:
        self.refuse(nn.Linear(2, 1), "got example_of_row of shape", example_of_row=rows)

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            self.refuse(nn.Linear(2, 1), "inference_mode cannot be undone")

    def test_directions_that_do_not_fit(self) -> None:
        model = nn.Linear(2, 1)
        self.refuse(model, "got 'weights', expected a parameter", direction={"weights": torch.ones(1, 2)})
        self.refuse(model, r"weight got shape \(2,\), expected \(1, 2\)", direction={"weight": torch.ones(2)})
        self.refuse(model, "NaN or infinity in weight", direction={"weight": torch.tensor([[1.0, torch.nan]])})
        with pytest.raises(ValueError, match="got an empty direction"):
            per_prompt_projection(model, lambda m: m.weight[0], {})

    def test_direction_of_another_module(self) -> None:
        """The bug that this project was born from: two wrappers with tensors of one name."""
        case = language_case()
        direction = UpdateDirection.from_loss(case.model, case.loss_fn, lr=0.1)
        other = language_case().model
        self.refuse(
            other,
            rf"made on .*lora_A.* of PeftModelForCausalLM at {id(case.model):#x}, another object; "
            rf"PeftModelForCausalLM at {id(other):#x} owns a tensor of the same name",
            direction=direction,
        )


def test_sharded_parameters(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model = nn.Linear(2, 1)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        direction = {"weight": torch.ones(1, 2)}
        with pytest.raises(NotImplementedError, match=r"weight is sharded over ranks \(DTensor\)"):
            per_prompt_projection(model, lambda m: m(torch.ones(3, 2))[:, 0], direction)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("L", [torch.tensor(1.0), torch.zeros(2, 2), torch.zeros(2, dtype=torch.long), 1.0])
@pytest.mark.parametrize("backend", ["doubled_rank", "loop", "alpha"])
def test_losses_of_another_shape(L: Any, backend: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"loss_fn returned .*, expected a floating tensor \[B\]"):
        per_prompt_projection(model, lambda _: L, random_direction(model), backend=backend)
