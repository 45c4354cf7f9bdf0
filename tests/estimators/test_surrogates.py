from __future__ import annotations

import itertools

import pytest
import torch

from lora_probe_callbacks.estimators import PromptBatch, entropy_surrogate, nll, policy_gradient_surrogate


def make_batch(lengths: list[list[int]], **options) -> PromptBatch:
    responses = [[[1] * length for length in group] for group in lengths]
    return PromptBatch.from_ragged([[b + 2] for b in range(len(lengths))], responses, pad_id=0, **options)


BATCH = make_batch([[1, 2, 4], [3, 3, 2]], max_lengths=[5, 8], advantages=[[1.0, -2.0, 1.0], [0.5, 0.0, -0.5]])
S = torch.tensor([[-1.0, -2.5, -3.0], [-4.0, -0.5, -2.0]], dtype=torch.float64)


@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token_avg"])
def test_the_entropy_surrogate_is_its_formula(weighting):
    expected = []
    for n in range(2):
        lengths = BATCH.max_lengths[n].expand(3) if weighting == "dr_grpo" else BATCH.response_lengths[n]
        S_w = [S[n, g].item() / lengths[g].item() for g in range(3)]
        loo = [sum(S_w[h] for h in range(3) if h != g) / 2 for g in range(3)]
        expected.append(-sum((S_w[g] - loo[g]) * S[n, g].item() for g in range(3)) / 3)
    assert entropy_surrogate(S, BATCH, weighting).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_coefficient_of_the_entropy_surrogate_carries_no_gradient():
    leaf = S.clone().requires_grad_()
    entropy_surrogate(leaf, BATCH).sum().backward()
    S_w = S / BATCH.max_lengths[:, None]
    coefficient = S_w - (S_w.sum(1, keepdim=True) - S_w) / 2
    torch.testing.assert_close(leaf.grad, -coefficient / 3)


@pytest.mark.parametrize("weighting", ["dr_grpo", "per_token_avg"])
def test_the_expected_gradient_of_the_entropy_surrogate_is_that_of_the_entropy(weighting):
    # Every pair of one-token responses of a policy over four tokens, weighted by its probability.
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    batch = make_batch([[1, 1]], max_lengths=1 if weighting == "per_token_avg" else 3)
    log_pi = torch.log_softmax(logits, 0)
    entropy = -(log_pi.exp() * log_pi).sum()
    (expected,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    total = torch.zeros(4, dtype=torch.float64)
    for pair in itertools.product(range(4), repeat=2):
        probability = log_pi[list(pair)].sum().exp().item()
        L_X = entropy_surrogate(log_pi[list(pair)][None], batch, weighting)
        total += probability * torch.autograd.grad(L_X.sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(total, expected / batch.max_lengths[0])


def test_the_policy_gradient_surrogate_is_its_formula():
    expected = [
        sum(BATCH.advantages[n, g].item() / BATCH.max_lengths[n].item() * S[n, g].item() for g in range(3)) / 3
        for n in range(2)
    ]
    assert policy_gradient_surrogate(S, BATCH).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_the_mean_per_token_of_each_response():
    expected = [(1 / 1 + 2.5 / 2 + 3 / 4) / 3, (4 / 3 + 0.5 / 3 + 2 / 2) / 3]
    assert nll(S, BATCH).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_supervised_batch_has_one_response_to_each_prompt():
    batch = make_batch([[2], [4]])
    assert nll(torch.tensor([[-3.0], [-2.0]]), batch).tolist() == [1.5, 0.5]


@pytest.mark.parametrize("surrogate", [entropy_surrogate, policy_gradient_surrogate, nll])
def test_an_entry_depends_on_its_own_prompt_alone(surrogate):
    leaf = S.clone().requires_grad_()
    surrogate(leaf, BATCH)[0].backward()
    assert bool((leaf.grad[1] == 0).all())
    assert bool((leaf.grad[0] != 0).any())


@pytest.mark.parametrize("surrogate", [entropy_surrogate, policy_gradient_surrogate, nll])
def test_permuting_prompts_permutes_the_surrogate(surrogate):
    order = [1, 0]
    swapped = make_batch([[3, 3, 2], [1, 2, 4]], max_lengths=[8, 5], advantages=BATCH.advantages[order])
    assert torch.equal(surrogate(S[order], swapped), surrogate(S, BATCH)[order])


def test_one_response_has_no_leave_one_out_mean():
    with pytest.raises(ValueError, match="got G=1 response to each prompt, expected at least 2"):
        entropy_surrogate(torch.zeros(2, 1), make_batch([[2], [4]]))


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="got weighting='mean', expected 'dr_grpo' or 'per_token_avg'"):
        entropy_surrogate(S, BATCH, "mean")


def test_a_policy_gradient_without_advantages_is_refused():
    with pytest.raises(ValueError, match=r"got a batch without advantages, expected .* \[1, 2\]"):
        policy_gradient_surrogate(torch.zeros(1, 2), make_batch([[2, 3]]))


@pytest.mark.parametrize("surrogate", [entropy_surrogate, policy_gradient_surrogate, nll])
def test_log_probs_of_another_batch_are_refused(surrogate):
    with pytest.raises(ValueError, match=r"got S of shape \[6\], expected \[2, 3\]"):
        surrogate(S.flatten(), BATCH)
