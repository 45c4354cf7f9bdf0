"""Per-prompt scalars whose gradients are the estimators: entropy, policy gradient, supervised loss.

`S` is `[B, G]`, the log-prob in nats of each response given its prompt, carrying its graph
(`sequence_logprobs`). Every result is `[B]`, entry n a function of prompt n alone.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lora_probe_callbacks.estimators.batches import PromptBatch


def entropy_surrogate(
    S: Tensor, batch: PromptBatch, weighting: Literal["dr_grpo", "per_token_avg"] = "dr_grpo"
) -> Tensor:
    """`L_X[n] = -mean_g( (S_w - S_w_LOO) * S )`, whose gradient `X_n` estimates that of the entropy.

    From `grad H = -E[ log pi * grad log pi ]` (the score-function identity): `S_w` is the length-weighted
    `S`, and `S_w_LOO`, the mean of `S_w` over the other G - 1 responses, a baseline that is independent of
    the response and so leaves the estimate unbiased: `E[X_n] = grad H(prompt n) / L_max` for "dr_grpo".
    The coefficient carries no gradient. The value of `L_X` is not the entropy; only its gradient
    means something.

    Args:
        S: Log-probs of the responses, `[B, G]`, nats.
        batch: The batch that `S` was computed on, G >= 2.
        weighting: `"dr_grpo"`: `S_w = S / L_max(prompt)`; `"per_token_avg"`: `S_w = S / L_response`.

    Returns:
        `L_X`, `[B]`.

    Raises:
        ValueError: If G = 1, `S` is not `[B, G]`, or `weighting` is none of the two.
    """
    _check_shape(S, batch)
    G = batch.num_responses
    if G < 2:
        raise ValueError(
            "got G=1 response to each prompt, expected at least 2: the leave-one-out mean is over the other "
            "G - 1 responses; sample more responses"
        )
    if weighting == "dr_grpo":
        lengths = batch.max_lengths[:, None]
    elif weighting == "per_token_avg":
        lengths = batch.response_lengths
    else:
        raise ValueError(f"got weighting={weighting!r}, expected 'dr_grpo' or 'per_token_avg'")
    S_w = S.detach() / lengths
    S_w_LOO = (S_w.sum(1, keepdim=True) - S_w) / (G - 1)
    return -((S_w - S_w_LOO) * S).mean(1)


def policy_gradient_surrogate(S: Tensor, batch: PromptBatch) -> Tensor:
    """`L_Y[n] = mean_g( (A / L_max) * S )`, whose gradient `Y_n` is prompt n's policy gradient.

    REINFORCE with the advantages `A` as given, and Dr. GRPO's length weight (Liu et al. 2025,
    arXiv:2503.20783). An update ascends it.

    Args:
        S: Log-probs of the responses, `[B, G]`, nats.
        batch: The batch that `S` was computed on, with its advantages.

    Returns:
        `L_Y`, `[B]`.

    Raises:
        ValueError: If the batch has no advantages, or `S` is not `[B, G]`.
    """
    _check_shape(S, batch)
    if batch.advantages is None:
        raise ValueError(
            f"got a batch without advantages, expected advantages of shape {list(S.shape)}: pass them to PromptBatch"
        )
    return (batch.advantages.detach() / batch.max_lengths[:, None] * S).mean(1)


def nll(S: Tensor, batch: PromptBatch) -> Tensor:
    """`L_n = mean_g( -S / L_response )`: the response's mean negative log-likelihood, nats per token.

    For supervised fine-tuning, usually with G = 1. The mean over prompts weighs every response the same;
    a trainer that averages over all tokens of a batch weighs long responses more.

    Args:
        S: Log-probs of the responses, `[B, G]`, nats.
        batch: The batch that `S` was computed on.

    Returns:
        `L`, `[B]`.
    """
    _check_shape(S, batch)
    return -(S / batch.response_lengths).mean(1)


def _check_shape(S: Tensor, batch: PromptBatch) -> None:
    expected = (batch.num_prompts, batch.num_responses)
    if S.shape != expected:
        raise ValueError(
            f"got S of shape {list(S.shape)}, expected {list(expected)}: one log-prob for each response of "
            "the batch, from sequence_logprobs on this batch"
        )
