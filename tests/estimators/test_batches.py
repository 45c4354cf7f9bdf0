from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_probe_callbacks.estimators import PromptBatch, refuse_shared_prompts

PAD = 9
tokens = st.lists(st.integers(0, 11), min_size=1, max_size=5)


def example(**changes) -> PromptBatch:
    batch = PromptBatch.from_ragged(
        [[1, 2, 3], [4]],
        [[[5], [6, 7]], [[8, PAD], [5, 5]]],
        pad_id=PAD,
        advantages=[[1.0, -1.0], [0.5, -0.5]],
    )
    return replace(batch, **changes)


@st.composite
def ragged(draw):
    B, G = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return draw(st.lists(tokens, min_size=B, max_size=B)), draw(
        st.lists(st.lists(tokens, min_size=G, max_size=G), min_size=B, max_size=B)
    )


def test_rows_are_left_pad_prompt_response_right_pad_with_one_boundary():
    batch = example()
    assert batch.prompt_boundary == 3
    assert batch.sequences.tolist() == [
        [[1, 2, 3, 5, PAD], [1, 2, 3, 6, 7]],
        [[PAD, PAD, 4, 8, PAD], [PAD, PAD, 4, 5, 5]],
    ]
    assert batch.attention_mask.int().tolist() == [
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1]],
    ]
    assert (batch.num_prompts, batch.num_responses) == (2, 2)
    assert batch.max_lengths.tolist() == [2, 2]
    assert batch.example_of_row.tolist() == [0, 0, 1, 1]


def test_a_response_token_that_equals_the_pad_token_counts():
    assert example().response_lengths.tolist() == [[1, 2], [2, 2]]


@given(ragged())
@settings(max_examples=50, deadline=None)
def test_from_ragged_keeps_every_token_and_pads_the_rest(lists):
    prompts, responses = lists
    batch = PromptBatch.from_ragged(prompts, responses, pad_id=PAD)
    for b, prompt in enumerate(prompts):
        for g, response in enumerate(responses[b]):
            row, real, counted = batch.sequences[b, g], batch.attention_mask[b, g], batch.response_mask[b, g]
            assert row[real].tolist() == prompt + response
            assert row[counted].tolist() == response
            assert bool((row[~real] == PAD).all())
    assert batch.max_lengths.tolist() == [max(map(len, group)) for group in responses]


@given(ragged(), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_splitting_keeps_all_prompts_in_order(lists, size):
    batch = PromptBatch.from_ragged(*lists, pad_id=PAD, advantages=torch.randn(len(lists[1]), len(lists[1][0])))
    parts = batch.split(size)
    assert max(part.num_prompts for part in parts) <= size
    for field in ("sequences", "attention_mask", "response_mask", "max_lengths", "advantages"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))


def test_one_maximum_length_serves_all_prompts_and_tensors_serve_as_rows():
    batch = PromptBatch.from_ragged(
        [torch.tensor([1]), torch.tensor([2])], [[torch.tensor([3])], [[4, 5]]], pad_id=0, max_lengths=7
    )
    assert batch.max_lengths.tolist() == [7, 7]
    assert batch.sequences.tolist() == [[[1, 3, 0]], [[2, 4, 5]]]


def test_moving_to_a_device_keeps_every_tensor():
    moved = example().to("cpu")
    for field in ("sequences", "attention_mask", "response_mask", "max_lengths", "advantages"):
        assert torch.equal(getattr(moved, field), getattr(example(), field))
    assert moved.prompt_boundary == 3


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([], [], "got 0 prompts and 0 groups"),
        ([[1]], [[[2]], [[3]]], "got 1 prompts and 2 groups"),
        ([[1], [2]], [[[3]], [[3], [4]]], r"got \[1, 2\] responses to the prompts, expected the same number"),
        ([[1], [2]], [[], []], r"got \[0, 0\] responses"),
        ([[1], []], [[[3]], [[4]]], r"got empty prompts \[1\]"),
        ([[1], [2]], [[[3], [3]], [[4], []]], r"empty responses \(prompt, response\) \[\(1, 1\)\]"),
    ],
)
def test_ragged_lists_that_make_no_grid_are_refused(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        PromptBatch.from_ragged(prompts, responses, pad_id=0)


def test_an_all_padding_row_is_refused_by_name():
    batch = example()
    attention, response = batch.attention_mask.clone(), batch.response_mask.clone()
    attention[1, 0] = response[1, 0] = False
    with pytest.raises(ValueError, match=r"got 1 rows with no attended token .* \[\(1, 0\)\], expected"):
        replace(batch, attention_mask=attention, response_mask=response)


def test_an_empty_response_is_refused_by_name():
    response = example().response_mask.clone()
    response[0, 1] = False
    with pytest.raises(ValueError, match=r"an empty response, .* \[\(0, 1\)\], expected at least one"):
        example(response_mask=response)


def test_a_right_padded_prompt_is_refused():
    attention = example().attention_mask.clone()
    attention[0, :, 2] = False
    with pytest.raises(ValueError, match="does not run up to prompt_boundary=3"):
        example(attention_mask=attention)


def test_a_hole_in_the_prompt_is_refused():
    attention = example().attention_mask.clone()
    attention[0, :, 1] = False
    with pytest.raises(ValueError, match="does not run up to prompt_boundary=3"):
        example(attention_mask=attention)


def test_a_response_mask_on_padding_or_prompt_is_refused():
    for position in (2, 4):
        response = example().response_mask.clone()
        response[0, 0, position] = True
        with pytest.raises(ValueError, match=r"response_mask set on the prompt or on padding.*\[\(0, 0\)\]"):
            example(response_mask=response)


def test_a_response_mask_with_holes_is_accepted():
    response = example().response_mask.clone()
    response[0, 1, 3] = False
    assert example(response_mask=response).response_lengths.tolist() == [[1, 1], [2, 2]]


def test_rows_of_one_group_with_different_prompts_are_refused():
    sequences = example().sequences.clone()
    sequences[1, 1, 2] = 0
    with pytest.raises(ValueError, match=r"another prompt than the first row.*\[\(1, 1\)\]"):
        example(sequences=sequences)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": torch.zeros(2, 5, dtype=torch.long)}, r"got sequences of shape \[2, 5\]"),
        ({"sequences": torch.zeros(2, 2, 5)}, "dtype torch.float32, expected integer"),
        ({"sequences": torch.zeros(0, 2, 5, dtype=torch.long)}, r"got sequences of shape \[0, 2, 5\]"),
        (
            {"attention_mask": torch.ones(2, 2, 5, dtype=torch.long)},
            "torch.int64, expected .* and torch.bool",
        ),
        ({"response_mask": torch.ones(2, 2, 4, dtype=torch.bool)}, r"got response_mask of shape \[2, 2, 4\]"),
        ({"prompt_boundary": 0}, "got prompt_boundary=0, expected 1 to 4"),
        ({"prompt_boundary": 5}, "got prompt_boundary=5, expected 1 to 4"),
        ({"max_lengths": torch.tensor([2, 0])}, r"got max_lengths \[2, 0\], expected 2 positive"),
        ({"max_lengths": torch.tensor([2])}, r"got max_lengths \[2\], expected 2 positive"),
        ({"advantages": torch.zeros(2)}, r"got advantages of shape \[2\], expected \[2, 2\]"),
        ({"advantages": torch.zeros(2, 3)}, r"got advantages of shape \[2, 3\], expected \[2, 2\]"),
    ],
)
def test_tensors_of_the_wrong_shape_or_type_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        example(**changes)


def test_micro_batches_need_at_least_one_prompt():
    with pytest.raises(ValueError, match="got prompts_per_batch=0"):
        example().split(0)


def test_shared_prompts_are_refused_whatever_their_padding_and_responses():
    U = example()
    E = PromptBatch.from_ragged([[3, 3, 3, 3, 3], [4], [7]], [[[1]], [[2]], [[3]]], pad_id=0)
    with pytest.raises(ValueError, match=r"got 1 prompts in both .* \[\(1, 1\)\], expected none"):
        refuse_shared_prompts(U, E)


def test_disjoint_prompts_pass_although_one_is_the_end_of_another():
    E = PromptBatch.from_ragged([[2, 3], [9, 4], [9, 9, 4]], [[[1]], [[2]], [[3]]], pad_id=PAD)
    refuse_shared_prompts(example(), E)
    assert E.num_prompts == 3
