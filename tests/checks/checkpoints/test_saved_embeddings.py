from __future__ import annotations

from typing import Any

import pytest
from support.facts import bad, expect, facts, saved

from lora_probe_callbacks.checks.checkpoints.saved_embeddings import CHECK, judge

SEEN = (3, 30)
TRAINED = ("embed_tokens", "trained embedding")
RESIZED = ("lm_head", "resized embedding")
BESIDE = ("norm", "trained")


def of(*left_out: tuple[str, str], **changes: Any) -> Any:
    return judge(facts(saves=(saved(left_out=left_out, **changes),)))


@pytest.mark.parametrize(
    ("kind", "name", "what"), [(TRAINED, "embed_tokens", "trained"), (RESIZED, "lm_head", "resized")]
)
def test_embedding_that_is_left_out_fails(kind: tuple[str, str], name: str, what: str) -> None:
    expect(
        of(kind, BESIDE),
        "fail",
        f"{what} embeddings are not in out/adapter.safetensors: {name}",
        cause=what,
        got=f"1 {what} embedding(s) left out",
        expected="in the file, or in modules_to_save",
        fix="name them in modules_to_save (or trainable_token_indices)",
        seen=SEEN,
    )


def test_trained_embeddings_come_before_resized_ones() -> None:
    verdict = of(RESIZED, TRAINED)
    assert (verdict.cause, "embed_tokens" in verdict.message, "lm_head" in verdict.message) == ("trained", True, False)


def test_second_file_beside_it_makes_it_a_warning() -> None:
    verdict = of(TRAINED, beside="model.safetensors")
    assert verdict.status == "warn"
    assert verdict.evidence["got"] == "1 trained embedding(s) left out; model.safetensors may hold them"


def test_other_trained_tensors_warn() -> None:
    expect(
        of(BESIDE, ("bias", "trained")),
        "warn",
        "2 trained tensors beside the adapter are not in out/adapter.safetensors: norm, bias",
        cause="other",
        got="2 trained tensors left out",
        expected="in the file, or in modules_to_save",
        fix="if they are saved elsewhere, pass ignore=('LP805',)",
        seen=SEEN,
    )


def test_file_that_leaves_nothing_out_passes() -> None:
    expect(of(), "pass", seen=SEEN)
    assert CHECK.judge(facts()).status == "pending"


@pytest.mark.parametrize("form", ["state", "model"])
def test_checkpoint_of_a_whole_module_is_not_judged(form: str) -> None:
    assert of(TRAINED, form=form).status == "skipped"


def test_embedding_that_is_left_out_is_told_once() -> None:
    assert list(bad(facts(saves=(saved(left_out=(TRAINED,)),)))) == ["LP805"]


def test_missing_adapter_tensors_are_left_to_their_own_check() -> None:
    assert list(bad(facts(saves=(saved(missing=("x",)),)))) == ["LP801"]
