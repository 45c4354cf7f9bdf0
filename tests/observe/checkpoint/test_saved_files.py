"""Files as PEFT and others write them, read back by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from support.training import adamw, adapter_tensors, batches, config, llama, lora, next_token_loss, trained
from torch import nn

from lora_probe_callbacks import LoraProbeMonitor, ProbeReport

FILE = "adapter_model.safetensors"


def trained_probe(model: nn.Module, steps: int = 2, **intent: Any) -> LoraProbeMonitor:
    """A monitor whose context has ended after a few steps."""
    optimizer = adamw(model, lr=1e-2)
    probe = LoraProbeMonitor(model, optimizer, verbose=False, **intent)
    with probe:
        for step, batch in enumerate(batches(steps)):
            next_token_loss(model, batch, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not probe.report.failures, str(probe.report)
    return probe


def bad(report: ProbeReport) -> list[tuple[str, str]]:
    return [(f.code, f.status) for f in report.with_status("fail", "warn")]


def assert_fails(report: ProbeReport, code: str, *words: str, status: str = "fail") -> None:
    assert bad(report) == [(code, status)], str(report)
    finding = report.with_status("fail", "warn")[0]
    assert finding.fix
    assert {"got", "expected"} <= finding.evidence.keys()
    for word in words:
        assert word in finding.message, finding.message
    assert report.healthy is (False if status == "fail" else None if code == "LP807" else True)


def assert_passes(report: ProbeReport, *codes: str) -> None:
    assert not bad(report), str(report)
    assert {f.code for f in report.with_status("pass")} >= set(codes or ("LP801", "LP802", "LP805", "LP807")), str(
        report
    )
    assert report.healthy is True


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return lora()


@pytest.fixture(scope="module")
def probe(model: PeftModel) -> LoraProbeMonitor:
    return trained_probe(model)


def rewritten(model: PeftModel, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Save as PEFT does, then put other tensors into the file."""
    model.save_pretrained(folder)
    tensors = load_file(folder / FILE)
    tensors = change(tensors) or tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE)
    return folder


# --- faults: LP801 ------------------------------------------------------------------------------


def fresh(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({k: torch.zeros_like(v) for k, v in tensors.items() if "lora_B" in k})


def of_another_run(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    tensors.update({k: torch.randn(v.shape, generator=generator) * 0.1 for k, v in tensors.items()})


def one_layer_of_the_start(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({k: v + 0.01 for k, v in tensors.items() if "layers.1." in k})


def damaged(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[1, 3] += 1.0


def overflown(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({k: v / 0 for k, v in tensors.items()})


FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = {
    "K01 tensors of shape [0], as ZeRO-3 leaves them": (
        lambda t: {k: torch.empty(0) for k in t},
        ("no elements in 8 of its 8",),
    ),
    "only B gathered": (
        lambda t: {k: torch.empty(0) if "lora_A" in k else v for k, v in t.items()},
        ("no elements in 4 of its 8",),
    ),
    "K03 modules renamed": (
        lambda t: {k.replace("model.layers", "model.language_model.layers"): v for k, v in t.items()},
        ("lacks 8 of its 8", "layers.0.self_attn.q_proj.lora_A"),
    ),
    "one tower only": (lambda t: {k: v for k, v in t.items() if "layers.1." in k}, ("lacks 4 of its 8",)),
    "names of torch.compile": (
        lambda t: {f"_orig_mod.{k}": v for k, v in t.items()},
        ("names of a wrapper", "_orig_mod."),
    ),
    "names of a compiled block": (
        lambda t: {k.replace("layers.0.", "layers.0._orig_mod."): v for k, v in t.items()},
        ("names of a wrapper", "_orig_mod."),
    ),
    "names of DataParallel": (lambda t: {f"module.{k}": v for k, v in t.items()}, ("names of a wrapper", "module.")),
    "names of the tuner without PEFT's prefix": (
        lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
        ("lacks 8 of its 8",),
    ),
    "K05 a fresh adapter": (fresh, ("every B in it is zero",)),
    "another run's adapter": (of_another_run, ("nothing in common",)),
    "one layer of another time": (one_layer_of_the_start, ("differs from the live one in 4 of its 8", "layers.1.")),
    "one element of one tensor": (damaged, ("differs from the live one in 1 of its 8",)),
    "values overflown by a cast": (overflown, ("not finite",)),
    "ranks cut off": (
        lambda t: {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in t.items()},
        ("other shapes", "[2, 32], live [4, 32]"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_file_that_is_not_the_trained_adapter(
    name: str, model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path
) -> None:
    change, words = FAULTS[name]
    assert_fails(probe.check_saved(rewritten(model, tmp_path, change)), "LP801", *words)


def test_adapter_as_it_was_when_training_began(tmp_path: Path) -> None:
    model = lora()
    trained(model)
    model.save_pretrained(tmp_path / "before")
    probe = trained_probe(model)
    (tmp_path / "before" / FILE).touch()  # copied a moment ago
    assert_fails(probe.check_saved(tmp_path / "before"), "LP801", "as it was when training began")


def test_adapter_wrapped_again_before_it_was_saved(tmp_path: Path) -> None:
    """B04 the other way round: live and saved agree, and both are fresh."""
    model = lora()
    probe = trained_probe(model)
    for name, tensor in adapter_tensors(model).items():
        if "lora_B" in name:
            nn.init.zeros_(tensor)
    model.save_pretrained(tmp_path)
    assert_fails(probe.check_saved(tmp_path), "LP801", "every B in it is zero")


def test_foreign_tensors_are_warned_of(model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path) -> None:
    place = rewritten(model, tmp_path, lambda t: {**t, "base_model.model.value_head.weight": torch.ones(2)})
    assert_fails(probe.check_saved(place), "LP801", "value_head", status="warn")


def test_unmerged_model_saved_for_from_pretrained(model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path) -> None:
    """K09."""
    model.base_model.model.save_pretrained(tmp_path)
    assert_fails(probe.check_saved(tmp_path), "LP801", "names of a wrapped one")


def test_base_model_saved_in_place_of_the_merged_one(probe: LoraProbeMonitor, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert_fails(probe.check_saved(tmp_path), "LP801", "base model without the adapter")


def test_merged_model_is_not_taken_for_the_base(tmp_path: Path) -> None:
    model = lora()
    probe = trained_probe(model)
    copied = lora()
    copied.load_state_dict(model.state_dict())
    copied.merge_and_unload().save_pretrained(tmp_path)
    report = probe.check_saved(tmp_path)
    assert not bad(report), str(report)
    assert report.healthy is None
    assert all("merged" in f.message for f in report.findings)


def test_other_adapter_with_a_name_of_a_module_empties_the_file(tmp_path: Path) -> None:
    """huggingface/peft#3584: every name with ".self_attn." in it is taken for the other adapter's."""
    model = lora(target_modules=["q_proj", "v_proj", "down_proj"])
    model.add_adapter("self_attn", config())
    probe = trained_probe(model)
    model.save_pretrained(tmp_path)
    assert_fails(probe.check_saved(tmp_path), "LP801", "lacks 8 of its 12")


# --- faults: LP802 ------------------------------------------------------------------------------


def two_adapters(**other: Any) -> PeftModel:
    model = lora()
    model.add_adapter("other", config(**other))
    trained(model, "other", std=0.2)
    model.set_adapter("other")
    return model


@pytest.mark.parametrize("rank", [4, 8])
def test_the_other_adapter_was_saved(rank: int, tmp_path: Path) -> None:
    model = two_adapters(r=rank)
    trained(model, "default")
    probe = trained_probe(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert_fails(probe.check_saved(tmp_path), "LP802", "holds the adapter 'default'", "'other' is the one that trains")


def test_state_dict_of_the_default_adapter_under_the_others_name(tmp_path: Path) -> None:
    model = two_adapters()
    trained(model, "default")
    probe = trained_probe(model)
    model.save_pretrained(tmp_path)
    save_file({k: v.contiguous() for k, v in get_peft_model_state_dict(model).items()}, tmp_path / "other" / FILE)
    assert_fails(probe.check_saved(tmp_path), "LP802", "holds the adapter 'default'")


def edited(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_alpha": 16}, ("lora_alpha", "is 4 = scaling of lora_alpha 16", "2 in the model")),
        ({"r": 8, "lora_alpha": 16}, ("r of the adapter", "is 8", "and 4 in the model")),
        ({"use_rslora": True}, ("scaling", "is 4")),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, ("lora_alpha",)),
    ],
)
def test_reload_would_scale_otherwise(
    settings: dict[str, Any], words: tuple[str, ...], model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    assert_fails(probe.check_saved(edited(tmp_path, **settings)), "LP802", *words)


def test_live_scaling_changed_by_hand_is_not_in_the_file(tmp_path: Path) -> None:
    model = lora()
    probe = trained_probe(model)
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.25)
    model.save_pretrained(tmp_path)
    assert_fails(probe.check_saved(tmp_path), "LP802", "scaling")


# --- faults: LP805 ------------------------------------------------------------------------------


def test_unfrozen_embedding_is_left_behind(tmp_path: Path) -> None:
    model = lora()
    model.get_input_embeddings().weight.requires_grad_(True)
    probe = trained_probe(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_fails(probe.check_saved(tmp_path), "LP805", "trained embeddings are not in", "embed_tokens")
    save_file({"embed": model.get_input_embeddings().weight.detach().clone()}, tmp_path / "embeddings.safetensors")
    assert_fails(probe.check_saved(tmp_path), "LP805", "embed_tokens", status="warn")


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_resized_embedding_is_left_behind(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    model = get_peft_model(base, config())
    probe = trained_probe(model)
    model.save_pretrained(tmp_path / "without", save_embedding_layers=False)
    model.save_pretrained(tmp_path / "with")
    assert_fails(probe.check_saved(tmp_path / "without"), "LP805", "resized embeddings", "embed_tokens")
    assert_passes(probe.check_saved(tmp_path / "with"))


def test_unfrozen_norms_are_warned_of(tmp_path: Path) -> None:
    model = lora()
    for name, tensor in model.named_parameters():
        tensor.requires_grad_(tensor.requires_grad or "norm" in name)
    probe = trained_probe(model)
    model.save_pretrained(tmp_path)
    assert_fails(probe.check_saved(tmp_path), "LP805", "5 trained tensors beside the adapter", status="warn")


# --- healthy ------------------------------------------------------------------------------------


def dora() -> PeftModel:
    return lora(use_dora=True)


def head() -> PeftModel:
    return lora(modules_to_save=["lm_head"])


def tied_head() -> PeftModel:
    return lora(base=llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"])


def new_tokens() -> PeftModel:
    return lora(trainable_token_indices=[3, 5])


def embedding_lora() -> PeftModel:
    return lora(target_modules=["q_proj", "embed_tokens"])


def patterns() -> PeftModel:
    return lora(rank_pattern={"v_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 32}, use_rslora=True)


def biases() -> PeftModel:
    return get_peft_model(llama(attention_bias=True), config(bias="lora_only"))


def second() -> PeftModel:
    return two_adapters(r=8)


def pissa() -> PeftModel:
    return lora(init_lora_weights="pissa")


HEALTHY = (lora, dora, head, tied_head, new_tokens, embedding_lora, patterns, biases, second, pissa)


@pytest.mark.parametrize("make", HEALTHY)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`", "ignore:Model has `tie_word_embeddings")
def test_what_peft_saves_is_the_adapter(make: Callable[[], PeftModel], tmp_path: Path) -> None:
    model = make()
    probe = trained_probe(model)
    model.save_pretrained(tmp_path)
    assert_passes(probe.check_saved(tmp_path))


def test_embeddings_saved_beside_the_adapter(model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert_passes(probe.check_saved(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_copy_in_another_precision(
    dtype: torch.dtype, model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path
) -> None:
    assert_passes(probe.check_saved(rewritten(model, tmp_path, lambda t: {k: v.to(dtype) for k, v in t.items()})))


def test_pickled_adapter(model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path) -> None:
    torch.save(get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
    assert_passes(probe.check_saved(tmp_path))
    assert_passes(probe.check_saved(tmp_path / "adapter_model.bin"))


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {f"model.{k}": v for k, v in s.items()}]
)
def test_state_of_the_whole_module(
    wrap: Callable[[Any], Any], model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path
) -> None:
    torch.save(wrap(model.state_dict()), tmp_path / "all.pt")
    assert_passes(probe.check_saved(tmp_path / "all.pt"), "LP801", "LP807")


def test_trainable_tensors_alone(model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path) -> None:
    """``exclude_frozen_parameters``."""
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "few.pt")
    assert_passes(probe.check_saved(tmp_path / "few.pt"), "LP801", "LP807")


def test_state_without_a_tensor_of_the_adapter_fails(model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path) -> None:
    torch.save({n: t for n, t in model.state_dict().items() if "lora_B" not in n}, tmp_path / "few.pt")
    assert_fails(probe.check_saved(tmp_path / "few.pt"), "LP801", "lacks 4 of its 8")


def test_average_over_steps_is_not_the_live_adapter_and_may_be_meant(tmp_path: Path) -> None:
    """An EMA copy, which lags behind: what was asked is whether the file holds the adapter."""
    model = lora()
    start = {n: p.detach().clone() for n, p in adapter_tensors(model).items()}
    probe = trained_probe(model, steps=4)
    average = {
        k: 0.5 * v + 0.5 * start[k.replace(".weight", ".default.weight")]
        for k, v in get_peft_model_state_dict(model).items()
    }
    model.save_pretrained(tmp_path)
    save_file(average, tmp_path / FILE)
    report = probe.check_saved(tmp_path)
    assert bad(report) == [("LP801", "fail")], str(report)
    assert "average" in report.failures[0].fix


def test_best_checkpoint_is_older_than_the_adapter(tmp_path: Path) -> None:
    """A file saved in step 1 and asked for in step 3 is compared with what it was written from."""
    model = lora()
    optimizer = adamw(model, lr=1e-2)
    with LoraProbeMonitor(model, optimizer, verbose=False) as probe:
        for step, batch in enumerate(batches(4)):
            next_token_loss(model, batch, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                model.save_pretrained(tmp_path / "known")
                model.save_pretrained(tmp_path / "unknown")
                assert_passes(probe.check_saved(tmp_path / "known"))
                time.sleep(0.06)
        assert_passes(probe.check_saved(tmp_path / "known"))
        report = probe.check_saved(tmp_path / "unknown")
    assert not bad(report), str(report)
    assert any("older than the last step" in f.message for f in report.findings)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base", "ignore:Adapter initial was active")
def test_converted_pissa_is_not_judged(tmp_path: Path) -> None:
    model = lora(init_lora_weights="pissa")
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    probe = trained_probe(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert not bad(probe.check_saved(tmp_path / "plain")), str(probe.check_saved(tmp_path / "plain"))


def test_quantised_base(tmp_path: Path) -> None:
    from support.tiny import quantised_llama

    model = get_peft_model(quantised_llama(tmp_path / "base"), config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with LoraProbeMonitor(model, optimizer, verbose=False) as probe:
        for batch in batches(2):
            ids = batch % 32
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")
    assert_passes(probe.check_saved(tmp_path / "adapter"))
    state = load_file(tmp_path / "adapter" / FILE)
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "adapter" / FILE)
    assert_fails(probe.check_saved(tmp_path / "adapter"), "LP801", "module.")


# --- files that cannot be read ------------------------------------------------------------------


def cut(data: bytes, part: float) -> bytes:
    return data[: int(len(data) * part)]


BROKEN = {
    "empty": lambda data: b"",
    "five bytes": lambda data: data[:5],
    "cut in the header": lambda data: cut(data, 0.05),
    "cut in the middle": lambda data: cut(data, 0.5),
    "last byte missing": lambda data: data[:-1],
    "a page of an error": lambda data: b"<html>502 Bad Gateway</html>" * 9,
    "header overwritten": lambda data: data[:30] + b"\xff" * 40 + data[70:],
    "length overwritten": lambda data: b"\xff" * 8 + data[8:],
}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_named_and_nothing_raises(
    name: str, kind: str, model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    if kind == "bin":
        (tmp_path / FILE).unlink()
        torch.save(get_peft_model_state_dict(model), tmp_path / "adapter_model.bin")
    path = tmp_path / f"adapter_model.{kind}"
    path.write_bytes(BROKEN[name](path.read_bytes()))
    report = probe.check_saved(tmp_path)
    if kind == "bin" and name == "header overwritten":  # a zip's directory is at its end
        assert bad(report) in ([("LP807", "fail")], [])
        return
    assert_fails(report, "LP807", "cannot be read")


def test_broken_file_does_not_stop_a_healthy_training(tmp_path: Path) -> None:
    model = lora()
    optimizer = adamw(model)
    with LoraProbeMonitor(model, optimizer, verbose=False) as probe:
        for step, batch in enumerate(batches(3)):
            next_token_loss(model, batch, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                model.save_pretrained(tmp_path)
                (tmp_path / FILE).write_bytes(cut((tmp_path / FILE).read_bytes(), 0.7))
                assert_fails(probe.check_saved(tmp_path), "LP807", "cannot be read", status="warn")
    assert bad(probe.report) == [("LP807", "warn")]


def test_no_such_file(probe: LoraProbeMonitor, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        report = probe.check_saved(path)
        assert not bad(report)
        assert report.healthy is None
        assert {f.status for f in report.findings} == {"skipped"}


def test_file_that_another_process_writes_is_not_judged(
    model: PeftModel, probe: LoraProbeMonitor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / "whole").write_bytes(data)
    code = (
        "import sys, time, pathlib\n"
        "data = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "with open(sys.argv[2], 'wb', buffering=0) as out:\n"
        "    size = len(data) // 40\n"
        "    for i in range(0, len(data), size): out.write(data[i : i + size]); time.sleep(0.03)\n"
    )
    (tmp_path / FILE).write_bytes(data[:100])
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "whole"), str(tmp_path / FILE)])
    seen = set()
    try:
        while writer.poll() is None:
            report = probe.check_saved(tmp_path)
            seen |= {f.message.rpartition(": ")[2] for f in report.findings}
            if not any("being written" in m for m in seen):
                continue
            assert not bad(report) or writer.poll() is not None, str(report)
    finally:
        writer.wait(20)
    assert "the file is being written" in seen
    assert_passes(probe.check_saved(tmp_path))


def test_probe_that_has_not_begun_says_so(tmp_path: Path) -> None:
    model = lora()
    report = LoraProbeMonitor(model, adamw(model), verbose=False).check_saved(tmp_path)
    assert report.healthy is None
    assert all("has not begun" in f.message for f in report.findings)


def test_ignored_checks_read_nothing(tmp_path: Path) -> None:
    model = lora()
    probe = trained_probe(model, ignore=["LP8"])
    rewritten(model, tmp_path, fresh)
    assert probe.check_saved(tmp_path).findings == []
    assert "fingerprint" not in probe.state_dict()


# --- other tuners, and adapters of many tensors ---------------------------------------------------

OTHERS = {
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=6, target_r=4, total_step=100, target_modules=["q_proj"]),
    "OFT": lambda: OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "tokens": lambda: TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]),
    "prompts": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_other_tuners_save_is_never_called_wrong(kind: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), OTHERS[kind]())
    probe = trained_probe(model, select=["LP8"])
    model.save_pretrained(tmp_path)
    report = probe.check_saved(tmp_path)
    assert not bad(report), str(report)
    assert not probe.report.internal_errors
    assert report.healthy is (None if kind == "prompts" else True)


@pytest.mark.filterwarnings("ignore::lora_probe_callbacks.LoraProbeWarning")
def test_of_many_tensors_some_are_compared_at_every_save_and_all_by_hand(tmp_path: Path) -> None:
    model = lora(base=llama(layers=20, hidden_size=16, intermediate_size=16))
    optimizer = adamw(model, lr=1e-2)
    saves = 0

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight"].fill_(3.0)

    with LoraProbeMonitor(model, optimizer, verbose=False, every_n_steps=2, on_failure="warn") as probe:
        for step, batch in enumerate(batches(12)):
            next_token_loss(model, batch, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            if not probe.report.failures and step:
                saves += 1
                probe._session.files.announced(rewritten(model, tmp_path / str(step), damage))
                probe._session.files.written()
    assert 1 <= saves <= 4
    assert bad(probe.report) == [("LP801", "fail")]
    assert "differs from the live one in 1 of its 80" in probe.report.failures[0].message
    model.save_pretrained(tmp_path / "right")
    assert_passes(probe.check_saved(tmp_path / "right"))
    assert_fails(probe.check_saved(rewritten(model, tmp_path / "wrong", damage)), "LP801", "1 of its 80")
