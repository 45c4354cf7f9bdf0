"""What a scored step returns, what it refuses, and that it is the step it would have been."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from support.in_step_cases import by_loop, scored
from support.projection_cases import (
    VOCABULARY,
    Case,
    conv_case,
    language_case,
    language_loss,
    lora,
    random_direction,
    relative_error,
    tokens,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_probe_callbacks.estimators import UpdateDirection, per_example_scores


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


CHECKPOINTS = pytest.mark.parametrize("checkpoints", [None, False, True], ids=["plain", "non_reentrant", "reentrant"])


def checkpointed(model: Any, reentrant: bool | None) -> Any:
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


@CHECKPOINTS
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_bit_equal(checkpoints: bool | None, autocast: bool) -> None:
    """Parameters, gradients, optimizer state and random streams after three steps, everything on and self-checked."""

    def train(watched: bool) -> dict[str, torch.Tensor]:
        case = language_case(dtype=torch.float32, attention="sdpa", lora_dropout=0.2, use_dora=True)
        model = checkpointed(case.model, checkpoints)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        direction, hooks = random_direction(model), hooks_of(model)
        torch.manual_seed(3)
        for step in range(3):
            optimizer.zero_grad()
            for micro in range(2):
                ids = tokens(4, 7, seed=10 * step + micro)
                options: dict[str, Any] = {"norms": True, "gram": True, "per_token": True, "self_check": "always"}

                def run(ids: torch.Tensor = ids) -> None:
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = language_loss(ids)(model).mean() / 2
                    loss.backward()

                if watched:
                    with per_example_scores(model, direction, **options):
                        run()
                else:
                    run()
            optimizer.step()
        assert hooks_of(model) == hooks  # those that transformers has put there
        found = dict(model.state_dict(keep_vars=False))
        found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        for number, state in enumerate(optimizer.state.values()):
            found |= {f"state {number} {k}": v for k, v in state.items()}
        return {**{n: t.clone() for n, t in found.items()}, "rng": torch.get_rng_state()}

    plain, watched = train(False), train(True)
    assert plain.keys() == watched.keys()
    assert [name for name in plain if not torch.equal(plain[name], watched[name])] == []


@CHECKPOINTS
def test_tokens_add_up_to_examples(checkpoints: bool | None) -> None:
    case = language_case()
    checkpointed(case.model, checkpoints)
    scores = scored(case, random_direction(case.model), per_token=True)
    assert scores.s is not None
    assert scores.tokens is not None
    assert scores.tokens.shape == (1, 4, 7)
    assert relative_error(scores.tokens.sum(-1), scores.s) < 1e-12
    gradients = by_loop(case)
    mu = random_direction(case.model)
    expected = sum((gradients[name] * mu[name]).flatten(1).sum(1) for name in mu)
    assert relative_error(scores.s[0], expected) < 1e-10  # type: ignore[arg-type]


def test_a_token_is_worth_its_position_in_the_last_layer() -> None:
    """A layer whose output is the loss: the score of a token is its own loss's derivative, and nothing else's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    x, mu = torch.randn(4, 5, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    with per_example_scores(model, {"0.weight": mu}, per_token=True, self_check="always") as scores:
        (model(x) ** 2).sum().backward()
    expected = (2 * model(x) * (x @ mu.T)).sum(-1).detach()
    torch.testing.assert_close(scores.tokens, expected[None])
    torch.testing.assert_close(scores.s, expected.sum(-1)[None])


def test_micro_batches_follow_one_another() -> None:
    case = language_case()
    mu = random_direction(case.model)
    whole = tokens(6, 7)
    options: dict[str, Any] = {"norms": True, "gram": True, "self_check": "always"}
    with per_example_scores(case.model, mu, **options) as joined:
        (language_loss(whole)(case.model).sum() / 6).backward()
    with per_example_scores(case.model, mu, **options) as parted:
        for part in whole.split([4, 2]):
            (language_loss(part)(case.model).sum() / 6).backward()
    assert parted.passes == [4, 2]
    assert parted.ids == [0, 1, 2, 3, 4, 5]
    for found, expected in ((parted.s, joined.s), (parted.norms, joined.norms)):
        assert found is not None
        assert expected is not None
        assert relative_error(found, expected) < 1e-12
    assert parted.gram is not None
    assert joined.gram is not None
    assert torch.isnan(parted.gram[:4, 4:]).all()
    assert relative_error(parted.gram[:4, :4], joined.gram[:4, :4]) < 1e-12


@CHECKPOINTS
@pytest.mark.parametrize("backwards", [1, 2])
def test_two_forwards_before_a_backward(checkpoints: bool | None, backwards: int) -> None:
    """Chosen and rejected, say; only reentrant checkpoints cannot tell them apart in one backward."""
    case = language_case()
    model = checkpointed(case.model, checkpoints)
    mu = random_direction(model)
    parts = [tokens(3, 7, seed=1), tokens(2, 7, seed=2)]
    expected = []
    for part in parts:
        with per_example_scores(model, mu) as scores:
            language_loss(part)(model).sum().backward()
        expected.append(scores.s)

    def both() -> Any:
        with per_example_scores(model, mu) as scores:
            losses = [language_loss(part)(model).sum() for part in parts]
            for loss in [sum(losses)] if backwards == 1 else reversed(losses):
                loss.backward()  # type: ignore[union-attr]
        return scores

    if checkpoints and backwards == 1:
        with pytest.raises(NotImplementedError, match=r"several forwards at once.*use_reentrant=False"):
            both()
        return
    assert relative_error(both().s, torch.cat(expected, 1)) < 1e-12  # type: ignore[arg-type]


def test_the_factors_of_the_loss_are_in_the_scores() -> None:
    case = language_case()
    mu = random_direction(case.model)
    with per_example_scores(case.model, mu) as scores:
        (case.loss_fn(case.model).mean() / 8).backward()
    gradient = sum((p.grad * mu[n]).sum() for n, p in case.model.named_parameters() if p.grad is not None)
    assert scores.s is not None
    torch.testing.assert_close(scores.s.sum(), gradient)
    case.model.zero_grad()
    expected = scored(case, mu).s
    assert expected is not None
    assert relative_error(scores.s * 32, expected) < 1e-12


def test_directions_and_their_scales() -> None:
    case = language_case()
    case.loss_fn(case.model).sum().backward()
    gradient = UpdateDirection.from_gradients(case.model, lr=0.5)
    case.model.zero_grad()
    mu = random_direction(case.model)
    scores = scored(case, {"descent": gradient, "step": mu}, norms=True)
    assert scores.directions == ("descent", "step")
    assert scores.scales.tolist() == [-0.5, 1.0]
    assert scores.s is not None
    torch.testing.assert_close(scores.gain, torch.stack([0.5 * scores.s[0], -scores.s[1]]))
    # The gradient's own direction: the scores are the row sums of all products, which are |G|^2 in all.
    assert abs(float(scores.s[0].sum()) / scores.summed[0] ** 2 - 1) < 1e-10
    assert abs(float(scores.mu_norms[0]) / gradient.norm() - 1) < 1e-12


def test_a_direction_may_hold_only_some_of_the_tensors() -> None:
    case = language_case()
    full = random_direction(case.model)
    a, b = ({n: t for n, t in full.items() if f"lora_{side}" in n} for side in "AB")
    scores = scored(case, {"a": a, "b": b, "full": full})
    assert scores.s is not None
    assert relative_error(scores.s[0] + scores.s[1], scores.s[2]) < 1e-12


def test_a_tiny_direction_does_not_vanish_in_float16() -> None:
    case = language_case(dtype=torch.float32)
    case.model.half()
    large = random_direction(case.model)
    tiny = {name: tensor.float() * 1e-9 for name, tensor in large.items()}
    scores = scored(case, [large, tiny], self_check="never")
    assert scores.s is not None
    assert relative_error(scores.s[1] * 1e9, scores.s[0]) < 1e-3


class TestIdentity:
    def test_by_content_column_and_function(self) -> None:
        case = language_case()
        mu = random_direction(case.model)
        ids = tokens(4, 7)

        def called(name: Any, rows: torch.Tensor) -> list[Any]:
            with per_example_scores(case.model, mu, ids=name) as scores:
                language_loss(rows)(case.model).sum().backward()
            return scores.ids

        hashes = called("content", ids)
        assert len(set(hashes)) == 4
        assert called("content", ids.flip(0)) == hashes[::-1]
        assert called(lambda args, kwargs: kwargs["input_ids"][:, 0].tolist(), ids) == ids[:, 0].tolist()
        with pytest.raises(ValueError, match="ids got 'row'"):
            called("row", ids)
        with pytest.raises(ValueError, match="ids got 1 names for 4 examples"):
            called(lambda args, kwargs: ["one"], ids)

    def test_padding_is_no_content(self) -> None:
        case = language_case()
        mu, ids = random_direction(case.model), tokens(2, 5)
        found = []
        for pad in (0, 3):
            padded = torch.nn.functional.pad(ids, (pad, 0))
            mask = torch.nn.functional.pad(torch.ones_like(ids), (pad, 0))
            with per_example_scores(case.model, mu, ids="content") as scores:
                case.model(input_ids=padded, attention_mask=mask).logits.square().sum().backward()
            found.append(scores.ids)
        assert found[0] == found[1]


class Block(nn.Module):
    """Embeds, mixes the tokens of a sequence, and runs two layers on rows laid out in some way."""

    def __init__(self, lay_out: Any) -> None:
        super().__init__()
        self.lay_out = lay_out
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        hidden = hidden + hidden.cumsum(1)
        return self.lay_out(self.down(self.up(self.lay_out(hidden)).tanh()))


def laid_out(lay_out: Any, ids: torch.Tensor) -> Case:
    torch.manual_seed(0)
    model = lora(Block(lay_out), target_modules=["up", "down"]).double()
    return Case(model, lambda model: model(ids).square().mean((1, 2)))


class TestSelfCheck:
    def test_the_block_itself_is_healthy(self) -> None:
        case = laid_out(lambda hidden: hidden, tokens(6, 6))
        assert scored(case, random_direction(case.model)).checked

    @pytest.mark.parametrize("what", [{}, {"norms": True}, {"gram": True}], ids=str)
    def test_sequence_first_tensors_as_long_as_the_batch(self, what: dict[str, Any]) -> None:
        case = laid_out(lambda hidden: hidden.transpose(0, 1), tokens(6, 6))
        with pytest.raises(RuntimeError, match="disagrees with an ordinary backward"):
            scored(case, () if what else random_direction(case.model), self_check="first", **what)

    def test_tokens_gathered_by_expert(self) -> None:
        order = torch.tensor([3, 0, 5, 1, 2, 4])
        case = laid_out(lambda hidden: hidden[order].flip(0), tokens(6, 6))
        with pytest.raises(RuntimeError, match="disagrees"):
            scored(case, random_direction(case.model))

    def test_a_loss_of_other_examples_is_shared_out_by_rows(self) -> None:
        """Of in-batch negatives, g_n is what came through the rows of n: no loss of its own, but exact."""
        case = language_case()
        ids, mu = tokens(), random_direction(case.model)
        with per_example_scores(case.model, mu, self_check="always") as scores:
            pooled = case.model(input_ids=ids).logits.mean(1)
            (-(pooled @ pooled.T).log_softmax(-1).diagonal().sum()).backward()
        gradient = sum((p.grad * mu[n]).sum() for n, p in case.model.named_parameters() if p.grad is not None)
        assert scores.checked
        torch.testing.assert_close(scores.s.sum(), gradient)  # type: ignore[union-attr]

    def test_it_runs_once_for_a_model(self) -> None:
        case = language_case()
        calls = []
        case.model.register_forward_hook(lambda *_: calls.append(1))
        mu = random_direction(case.model)
        for options, expected in (({}, 2), ({}, 1), ({"norms": True}, 2), ({"self_check": "never"}, 1)):
            calls.clear()
            assert scored(case, mu, **{"self_check": "first", **options}).checked
            assert len(calls) == expected

    def test_a_model_that_returns_its_loss_alone_is_unchecked(self) -> None:
        class Fused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(3, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x).square().mean()

        model = Fused()
        x, mu = torch.randn(4, 3), random_direction(model)
        with per_example_scores(model, mu) as scores:
            model(x).backward()
        assert not scores.checked
        assert "not of rows of examples" in str(scores.why_unchecked)
        with (
            pytest.raises(NotImplementedError, match="self_check='always' cannot be done"),
            per_example_scores(model, mu, self_check="always"),
        ):
            model(x).backward()

    def test_a_step_inside_is_found(self) -> None:
        case = language_case()
        optimizer = torch.optim.SGD([p for p in case.model.parameters() if p.requires_grad], lr=0.1)

        def step() -> None:
            with per_example_scores(case.model, random_direction(case.model)):
                case.loss_fn(case.model).sum().backward()
                optimizer.step()

        with pytest.raises(RuntimeError, match="step taken inside"):
            step()


class TestRefusals:
    def refused(self, case: Case, match: str, directions: Any = None, **options: Any) -> None:
        directions = random_direction(case.model) if directions is None else directions
        with pytest.raises((NotImplementedError, ValueError, RuntimeError), match=match):
            scored(case, directions, **options)
        assert hooks_of(case.model) == 0

    def test_sequence_first_tensors_of_another_length(self) -> None:
        case = laid_out(lambda hidden: hidden.transpose(0, 1), tokens(6, 5))
        self.refused(case, r"expected \(6,\) rows first", example_of_row=torch.arange(6))

    def test_flattened_tokens(self) -> None:
        case = language_case()
        self.refused(case, r"expected \(28,\) rows first", example_of_row=torch.arange(28))

    def test_norms_of_a_layer_that_runs_twice(self) -> None:
        torch.manual_seed(0)
        inner = nn.Linear(4, 4)
        model, x = nn.Sequential(inner, nn.Tanh(), inner).double(), torch.randn(3, 4, dtype=torch.float64)
        case = Case(model, lambda m: m(x).square().sum(1))
        assert scored(case, random_direction(model)).checked  # scores add up
        model.zero_grad()
        self.refused(case, "ran twice in one forward", norms=True)

    def test_backward_twice(self) -> None:
        case = language_case()

        def twice() -> None:
            with per_example_scores(case.model, random_direction(case.model)):
                loss = case.loss_fn(case.model).sum()
                loss.backward(retain_graph=True)
                loss.backward()

        with pytest.raises(NotImplementedError, match="second gradient of one forward"):
            twice()

    def test_compiled(self) -> None:
        case = language_case(dtype=torch.float32)
        compiled: Any = torch.compile(case.model, backend="aot_eager")
        with (
            pytest.raises(NotImplementedError, match="compiled"),
            per_example_scores(compiled, random_direction(case.model)),
        ):
            pass
        case.model.compile(backend="aot_eager")
        self.refused(case, "compiled")
        torch.compiler.reset()

    def test_batch_norm_in_train_mode(self) -> None:
        self.refused(conv_case(batch_norm=True), "normalises over the batch")

    def test_expert_parameters(self) -> None:
        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(2, 8, 8))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.einsum("bi,eij->bj", x, self.weight)

        model = lora(nn.Sequential(Experts()), target_modules=[], target_parameters=["0.weight"])
        self.refused(Case(model, lambda m: m(torch.ones(2, 8)).sum(1)), "ParamWrapper")

    def test_tokens_gathered_by_experts(self) -> None:
        case = laid_out(lambda hidden: hidden.flatten(0, 1)[:20] if hidden.dim() == 3 else hidden, tokens(6, 6))
        model = case.model
        self.refused(
            Case(model, lambda m: m(tokens(6, 6)).square().sum(1)), r"expected \(6,\)", example_of_row=torch.arange(6)
        )

    def test_trainable_tokens(self) -> None:
        case = language_case(trainable_token_indices=[3], target_modules=["q_proj"])
        self.refused(case, "no rule for default of .*trainable_tokens_delta")

    def test_nothing_passed_by(self) -> None:
        case = language_case()
        mu = random_direction(case.model)
        loss = case.loss_fn(case.model).sum()
        with pytest.raises(RuntimeError, match="no gradient passed by 28 layers"), per_example_scores(case.model, mu):
            loss.backward()
        with pytest.raises(ValueError, match="neither norms nor gram"), per_example_scores(case.model):
            pass

    def test_merged(self) -> None:
        case = language_case()
        mu, model = random_direction(case.model), case.model
        model.merge_adapter()  # type: ignore[operator]
        with pytest.raises(RuntimeError, match="not merged"), per_example_scores(model, mu):
            (case.loss_fn(model).sum() + next(p for p in model.parameters() if p.requires_grad).sum()).backward()

    def test_a_weight_used_outside_of_its_layer(self) -> None:
        case = language_case()

        class Fused(nn.Module):
            def __init__(self, inner: Any) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner[0](x) @ self.inner[1].weight.T

        model = Fused(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
        x = torch.randn(5, 3)
        self.refused(Case(model, lambda m: m(x).sum(1)), r"inner.1 \(Linear\) got a gradient without being called")
        del case

    def test_directions_that_do_not_fit(self) -> None:
        model = nn.Linear(2, 1)
        case = Case(model, lambda m: m(torch.ones(3, 2)).sum(1))
        self.refused(case, "got 'weights', expected a parameter", {"weights": torch.ones(1, 2)})
        self.refused(case, r"weight got shape \(2,\), expected \(1, 2\)", {"weight": torch.ones(2)})
        self.refused(case, "NaN or infinity", {"weight": torch.tensor([[1.0, torch.nan]])})
        other = language_case()
        direction = UpdateDirection.from_loss(other.model, other.loss_fn, lr=0.1)
        self.refused(language_case(), "another object", direction)


def test_a_backward_after_the_context_still_runs_through_a_checkpoint() -> None:
    """A guest: the checkpoint counts what was saved in its first run, so the second must save as much."""
    torch.manual_seed(0)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    model = Blocks()
    expected = copy.deepcopy(model)
    x = torch.randn(3, 4)
    expected(x).square().sum().backward()
    with pytest.raises(RuntimeError, match="no gradient passed by"), per_example_scores(model, random_direction(model)):
        loss = model(x).square().sum()
    loss.backward()
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found.grad, wanted.grad)  # type: ignore[arg-type]
    del loss
    gc.collect()
    assert hooks_of(model) == 0


def test_an_error_of_the_loop_passes_through_and_leaves_no_hook() -> None:
    case = language_case()

    def fail() -> None:
        with per_example_scores(case.model, random_direction(case.model)):
            case.loss_fn(case.model)
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert hooks_of(case.model) == 0


def test_nothing_of_a_checkpoint_is_kept() -> None:
    """Between forward and backward, inputs of checkpointed layers are gone; without checkpoints autograd has them."""
    case = language_case(dtype=torch.float32)
    model = checkpointed(case.model, False)
    seen: list[Any] = []
    inner = next(m for n, m in model.named_modules() if n.endswith("mlp.down_proj"))

    def remember(module: Any, args: Any) -> None:
        import weakref

        seen.append(weakref.ref(args[0]))

    handle = inner.register_forward_pre_hook(remember)
    with per_example_scores(model, random_direction(model), norms=True) as scores:
        loss = case.loss_fn(model).sum()
        assert len(seen) == 1
        assert seen[0]() is None
        loss.backward()
    handle.remove()
    assert scores.checked
