"""Every wrong engine and export is told with the right word, and every right one is served."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from support.serving import engine, scaled, set_b, tokens, trained
from support.tiny import llama, lora, quantised_llama
from torch import nn

from lora_probe_callbacks import CannotCompareError, Engine, Merged, Reloaded, ServingResult, verify_serving

from .conftest import earlier

Wrong = Callable[[PeftModel, nn.Module], nn.Module]


def result(model: nn.Module, target: Any, **more: Any) -> ServingResult:
    return verify_serving(model, tokens(), target, **more).results[0]


def only_q_and_v(name: str) -> float:
    return float(name.endswith(("q_proj", "v_proj")))


def only_the_first_layer(name: str) -> float:
    return float(".layers.0." in name)


WRONG: dict[str, tuple[Wrong, str, str, str]] = {
    "ignored": (lambda model, base: base, "ignored", "LP811", "behaves as the base"),
    "q and v alone": (
        lambda model, base: scaled(model, only_q_and_v),
        "partly",
        "LP812",
        "every k_proj, every o_proj, every gate_proj, every up_proj, every down_proj",
    ),
    "the first layer alone": (
        lambda model, base: scaled(model, only_the_first_layer),
        "partly",
        "LP812",
        "lacks the adapter in 7 of 14 layers: all of layers.1",
    ),
    "another adapter": (lambda model, base: trained(seed=9), "other-adapter", "LP813", "nor another one of this model"),
    "half the scale": (lambda model, base: scaled(model, lambda _: 0.5), "lossy", "LP814", "at 0.5 times its scale"),
    "twice": (lambda model, base: scaled(model, lambda _: 2.0), "lossy", "LP814", "at 2 times its scale"),
}


@pytest.mark.parametrize("noise", [0.0, 0.0012])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_engine(name: str, noise: float, model: PeftModel, base: nn.Module) -> None:
    wrong, verdict, code, words = WRONG[name]
    found = result(model, engine(wrong(model, base), base, noise))
    assert found.verdict == verdict, str(found)
    assert found.finding is not None
    assert (found.finding.code, found.finding.status) == (code, "fail")
    assert words in found.finding.message
    assert found.exit_code == 1


@pytest.mark.parametrize("std", [0.003, 0.03, 0.3, 3.0])
def test_right_engine_is_served_at_any_effect(std: float, base: nn.Module) -> None:
    model = trained(std=std)
    found = result(model, engine(model, base))
    assert found.verdict == "served", str(found)
    assert found.slope == pytest.approx(1.0, abs=1e-3)
    assert found.finding is None
    assert found.exit_code == 0


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_engine_in_bfloat16_is_served(live: torch.dtype, model: PeftModel, base: nn.Module) -> None:
    served, served_base = copy.deepcopy(model).bfloat16(), copy.deepcopy(base).bfloat16()
    found = result(copy.deepcopy(model).to(live), engine(served, served_base, 0.001))
    assert found.verdict == "served", str(found)
    assert found.noise > 0
    assert found.interval[0] < 1.02
    assert found.interval[1] > 0.98


def test_adapter_of_the_same_model_is_named(model: PeftModel, base: nn.Module) -> None:
    model.add_adapter("french", lora(target_modules=model.peft_config["default"].target_modules))
    set_b(model, 0.3, 5, "french")
    other = copy.deepcopy(model)
    other.set_adapter("french")
    found = result(model, engine(other, base))
    assert found.verdict == "other-adapter"
    assert found.finding is not None
    assert "is the adapter 'french' of this model" in found.finding.message


def test_earlier_state_is_known_by_its_checkpoint(model: PeftModel, base: nn.Module, folder: Path) -> None:
    stale = engine(earlier(model), base)
    found = result(model, stale, checkpoints=[folder / "runs" / "checkpoint-1"])
    assert found.verdict == "stale"
    assert found.finding is not None
    assert found.finding.code == "LP815"
    assert "runs/checkpoint-1" in found.finding.message
    assert result(model, stale).verdict == "other-adapter", "without the checkpoint nobody can tell"


def test_effect_below_the_noise_is_undecidable_and_says_what_would_settle_it(base: nn.Module) -> None:
    model = trained(std=0.001)
    found = result(model, engine(model, base, 0.02))
    assert found.verdict == "undecidable"
    assert found.exit_code == 2
    assert found.fact is not None
    assert found.fact.needed is not None
    assert found.fact.needed > found.fact.tokens


def test_fresh_adapter_is_undecidable_whatever_the_number_of_tokens(base: nn.Module) -> None:
    model = trained(std=0.0)
    found = result(model, engine(model, base))
    assert found.verdict == "undecidable"
    assert found.fact is not None
    assert found.fact.needed is None


# --- reloaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize("onto", ["the live base", "a folder", "a model"])
def test_reloaded_adapter_is_served(onto: str, model: PeftModel, base: nn.Module, folder: Path) -> None:
    bases = {"the live base": None, "a folder": folder / "base", "a model": base}
    found = result(model, Reloaded(folder / "adapter", base=bases[onto]))
    assert found.verdict == "served", str(found)
    assert found.slope == pytest.approx(1.0, abs=1e-5)
    assert found.noise < 1e-6


def test_reloaded_checkpoint_is_another_state(model: PeftModel, folder: Path) -> None:
    found = result(model, Reloaded(folder / "runs" / "checkpoint-1"), checkpoints=[folder / "runs" / "checkpoint-1"])
    assert found.verdict == "stale"


def test_reloaded_qlora_is_served(tmp_path: Path) -> None:
    model = trained(base=quantised_llama(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    found = result(model, Reloaded(tmp_path / "adapter"))
    assert found.verdict == "served", str(found)


# --- merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", torch.bfloat16, "float16", "int8"])
def test_merge_that_keeps_the_effect_is_served(kind: str | torch.dtype, model: PeftModel) -> None:
    found = result(model, Merged(kind))
    assert found.verdict == "served", str(found)


def test_merge_into_nf4_is_lossy_and_says_what_rounding_costs_at_best(model: PeftModel) -> None:
    found = result(model, Merged("nf4"))
    assert found.verdict == "lossy"
    assert found.finding is not None
    assert found.finding.code == "LP814"
    assert "rounding to nf4 costs" in found.finding.message
    assert found.fact is not None
    assert found.fact.lost == found.fact.best


def test_small_change_is_lost_in_bfloat16() -> None:
    model = trained(std=3e-5, base=llama().bfloat16().float())
    found = result(model, Merged("bfloat16"))
    assert found.verdict == "lossy", str(found)
    assert result(model, Merged("float32")).verdict == "served"


def test_merged_folder(model: PeftModel, tmp_path: Path) -> None:
    merged = copy.deepcopy(model).merge_and_unload()
    merged.save_pretrained(tmp_path / "right")
    found = result(model, Merged(tmp_path / "right"))
    assert found.verdict == "served", str(found)
    copy.deepcopy(model).unload().save_pretrained(tmp_path / "base alone")
    assert result(model, Merged(tmp_path / "base alone")).verdict == "ignored"
    scaled(model, lambda _: 2.0).merge_and_unload().save_pretrained(tmp_path / "twice")
    found = result(model, Merged(tmp_path / "twice"))
    assert found.verdict == "lossy"
    assert found.fact is not None
    assert found.fact.scale == pytest.approx(2.0, rel=0.05)


def test_merge_of_qlora_is_made_of_what_its_base_stands_for(tmp_path: Path) -> None:
    model = trained(base=quantised_llama(tmp_path / "base"))
    report = verify_serving(model, tokens(), Merged("float32"), Merged("bfloat16"), Merged("nf4"))
    assert [r.verdict for r in report.results] == ["served", "served", "lossy"], str(report)
    assert report.exit_code == 1


# --- what is left behind ------------------------------------------------------------------------


def everything(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {f"value {n}": p.detach().clone() for n, p in model.named_parameters()}
    state |= {f"version {n}": p._version for n, p in model.named_parameters()}
    state |= {f"buffer {n}": b.clone() for n, b in model.named_buffers()}
    state |= {
        f"grad {n}": None if p.grad is None else (id(p.grad), p.grad.clone()) for n, p in model.named_parameters()
    }
    state |= {f"requires {n}": p.requires_grad for n, p in model.named_parameters()}
    for name, module in model.named_modules():
        state[f"mode {name}"] = module.training
        state[f"hooks {name}"] = len(module._forward_hooks), len(module._forward_pre_hooks)
        state[f"switch {name}"] = (
            getattr(module, "_disable_adapters", None),
            str(getattr(module, "_active_adapter", None)),
        )
        state[f"scaling {name}"] = str(getattr(module, "scaling", None))
    return state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return all(map(same, a, b)) if isinstance(a, tuple) else bool(a == b)


def test_live_model_is_left_as_it_was(model: PeftModel, base: nn.Module, folder: Path) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.train()
    model(input_ids=tokens(2), labels=tokens(2)).loss.backward()
    targets = [engine(wrong, base) for wrong in (trained(seed=9), scaled(model, only_q_and_v))]
    before, stream = everything(model), torch.get_rng_state()
    for target in (Reloaded(folder / "adapter"), Merged("nf4"), *targets):
        verify_serving(model, tokens(), target, checkpoints=[folder / "runs" / "checkpoint-1"])
    after = everything(model)
    assert not [name for name in before if not same(before[name], after[name])]
    assert torch.equal(stream, torch.get_rng_state())


# --- what cannot be compared --------------------------------------------------------------------


def test_model_that_cannot_be_compared(model: PeftModel, base: nn.Module) -> None:
    with pytest.raises(CannotCompareError, match="without an active adapter"):
        verify_serving(base, tokens())
    with pytest.raises(CannotCompareError, match=r"of another tokenizer"):
        verify_serving(model, [[1, 2, 99]], engine(model, base))
    with pytest.raises(CannotCompareError, match="expected at least 2"):
        verify_serving(model, [[1]])
    with pytest.raises(CannotCompareError, match="not lists of token ids"):
        verify_serving(model, [["a", "b"]])
    model.merge_adapter()
    with pytest.raises(CannotCompareError, match="merged into 14 layers"):
        verify_serving(model, tokens())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Engine(lambda rows, adapter: 1 / 0), "ZeroDivisionError"),
        (Engine(lambda rows, adapter: [[0.0]] * len(rows)), "one for every token but the first"),
        (Engine(lambda rows, adapter: [[1.0] * (len(row) - 1) for row in rows]), "of at most 0"),
        (Engine(lambda rows, adapter: [[-math.inf] * (len(row) - 1) for row in rows]), "expected finite ones"),
        (Engine(lambda rows, adapter: None), "expected lists of log-probs"),
        (Reloaded("nowhere"), "nowhere without adapter_config.json"),
        (Merged("nowhere"), "nowhere without config.json"),
    ],
)
def test_target_that_cannot_be_compared_is_one_line(target: Any, words: str, model: PeftModel) -> None:
    report = verify_serving(model, tokens(4), target)
    assert words in report.results[0].error
    assert "\n" not in report.results[0].error
    assert report.exit_code == 2
    assert report.results[0].error in str(report)


def test_report_without_a_target_proves_nothing(model: PeftModel) -> None:
    assert verify_serving(model, tokens()).exit_code == 2


# --- what engines cannot hold -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rsLoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
        ({"r": 32}, "--max-lora-rank 32"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA of an embedding (embed_tokens)"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_bias": True}, "a bias in the adapter"),
    ],
)
def test_what_engines_cannot_hold_is_said_before_it_is_served(config: dict[str, Any], words: str) -> None:
    report = verify_serving(trained(**config), tokens(4))
    assert [words in limit for limit in report.limits].count(True) == 1, report.limits
    assert [f.code for f in report.findings] == ["LP816"]


def test_plain_lora_has_no_limits(model: PeftModel) -> None:
    report = verify_serving(model, tokens(4))
    assert report.limits == ()
    assert not report.findings
