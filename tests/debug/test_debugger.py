"""The isolated debugger on a tiny Llama and adapters that were saved to disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lora_probe_callbacks.debug.debugger import diagnose, run
from lora_probe_callbacks.debug.loading import CannotLoadError, Source, load
from lora_probe_callbacks.debug.results import Diagnosis, Tokens

TOKENS = Tokens(batch=2, G=2, prompt_lens=(5, 3), gen_lens=(4, 6))
Change = Callable[[str, torch.Tensor], None]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    llama().save_pretrained(path)
    return path


def llama(**config: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**({"vocab_size": 40, "max_position_embeddings": 32} | sizes | config)))


def adapter(path: Path, change: Change | None = None, on: LlamaForCausalLM | None = None, **config: Any) -> str:
    """Save an adapter whose tensors were changed; trained (no B is zero) unless they are."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(on or llama(), LoraConfig(**(settings | config)))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                (change or trained)(name, tensor)
    model.save_pretrained(path)
    return str(path)


def trained(name: str, tensor: torch.Tensor) -> None:
    if "lora_B" in name:
        tensor.normal_(std=0.05)


def fresh(name: str, tensor: torch.Tensor) -> None:
    """As LoRA begins."""


def zero(part: str) -> Change:
    def change(name: str, tensor: torch.Tensor) -> None:
        trained(name, tensor)
        if part in name:
            tensor.zero_()

    return change


def states(diagnosis: Diagnosis, variant: str) -> dict[str, int]:
    found = next(v for v in diagnosis.variants if v.variant == variant)
    return {state: n for state in ("none", "zero", "non-zero", "not-finite") if (n := found.count(state))}


def test_trained_adapter_is_reached_in_a_and_b_and_not_in_c_and_d(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path), attn="eager", device="cpu"), TOKENS)

    assert found.healthy
    assert (found.tensors, found.layers) == (8, 4)
    assert found.on_off.verdict == "active"
    assert found.on_off.delta > 0
    assert [states(found, v) for v in "ABCD"] == [{"non-zero": 8}, {"non-zero": 8}, {"none": 8}, {"none": 8}]
    assert [v.requires_grad for v in found.variants] == [True, True, False, False]
    assert "8 of 8 tensors" in found.conclusion
    assert "set_adapter" in found.conclusion


def test_s_of_variant_a_is_that_of_sequence_logprobs_and_s_of_c_is_not(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path), device="cpu"), TOKENS)

    difference = {v.variant: v.difference for v in found.variants}
    assert difference["A"] < 1e-4
    assert difference["B"] < 1e-4
    assert difference["C"] > 1e-3
    assert difference["D"] == difference["C"]


def test_the_three_backends_agree_under_eager_attention(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path), attn="eager", device="cpu"), TOKENS)

    errors = {p.backend: p.error_to_loop for p in found.projections}
    assert set(errors) == {"loop", "doubled_rank", "alpha"}
    assert all(error is not None and error < 1e-4 for error in errors.values())
    assert all(p.s is not None and any(p.s) for p in found.projections)


def test_alpha_says_why_it_cannot_run_with_fused_attention(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path), attn="sdpa", device="cpu"), TOKENS)

    alpha = next(p for p in found.projections if p.backend == "alpha")
    assert alpha.s is None
    assert "fused attention" in (alpha.why_not or "")
    assert found.healthy


@pytest.mark.parametrize("saved", [True, False])
def test_fresh_adapter_is_told_from_an_inactive_one_and_left_as_it_was(base: Path, tmp_path: Path, saved: bool) -> None:
    source = Source(str(base), adapter(tmp_path, fresh) if saved else None, device="cpu")
    model = load(source)
    before = {name: t.detach().clone() for name, t in model.named_parameters()}
    found = diagnose(model, TOKENS)

    assert found.healthy
    assert found.on_off.verdict == "b-is-zero"
    assert found.on_off.delta == 0
    assert (found.on_off.delta_nudged or 0) > 0
    assert states(found, "A") == {"zero": found.layers, "non-zero": found.layers}
    assert "B is still zero" in found.conclusion
    assert all(torch.equal(t, before[name]) and t.grad is None for name, t in model.named_parameters())
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize(
    ("change", "config", "verdict", "said"),
    [
        (zero("lora_"), {}, "inactive", "changes no logit"),
        (trained, {"lora_alpha": 0}, "inactive", "changes no logit"),
        (zero("layers.1.self_attn.q_proj.lora_"), {}, "active", "1 of 4 layers get no gradient"),
        (lambda n, t: t.fill_(float("nan")), {}, "not-finite", "not finite"),
    ],
    ids=["A and B zero", "scaling 0", "one dead layer", "nan"],
)
def test_broken_adapter_is_unhealthy(
    base: Path, tmp_path: Path, change: Change, config: dict[str, Any], verdict: str, said: str
) -> None:
    found = run(Source(str(base), adapter(tmp_path, change, **config), device="cpu"), TOKENS)

    assert not found.healthy
    assert found.on_off.verdict == verdict
    assert said in found.problems[0]
    assert found.conclusion.startswith("The fault is in the adapter")


def test_a_of_zeros_beside_a_b_that_is_not_can_train(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path, zero("lora_A")), device="cpu"), TOKENS)

    assert found.healthy
    assert states(found, "A") == {"zero": 4, "non-zero": 4}
    assert any("changes no logit yet" in note for note in found.notes)


def test_checkpointing_makes_the_disabled_adapter_silent(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path), checkpointing=True, device="cpu"), TOKENS)

    c = found.variants[2]
    assert c.requires_grad
    assert c.backward is None
    assert states(found, "C") == {"none": 8}
    assert "In C the backward runs without an error" in found.conclusion
    assert found.healthy


def test_four_bit_base_gives_the_same_projections_as_the_loop(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path), four_bit=True, device="cpu", dtype="float32"), TOKENS)

    assert found.healthy
    assert states(found, "A") == {"non-zero": 8}
    error = next(p.error_to_loop for p in found.projections if p.backend == "doubled_rank")
    assert error is not None
    assert error < 1e-3


def test_lora_dropout_does_not_move_the_log_probs(base: Path, tmp_path: Path) -> None:
    source = Source(str(base), adapter(tmp_path, lora_dropout=0.5), checkpointing=True, device="cpu")
    found = run(source, TOKENS)

    assert found.variants[0].difference < 1e-4


def test_module_that_is_saved_whole_is_an_adapter_tensor_too(base: Path, tmp_path: Path) -> None:
    found = run(Source(str(base), adapter(tmp_path, modules_to_save=["lm_head"]), device="cpu"), TOKENS)

    assert found.tensors == 9
    assert states(found, "A") == {"non-zero": 9}
    assert states(found, "D") == {"none": 9}


def test_the_same_seed_gives_the_same_diagnosis_and_another_one_does_not(base: Path, tmp_path: Path) -> None:
    source = Source(str(base), adapter(tmp_path), device="cpu")
    first, again = run(source, TOKENS), run(source, TOKENS)
    other = run(source, Tokens(batch=2, G=2, prompt_lens=(5, 3), gen_lens=(4, 6), seed=1))

    assert first == again
    assert first.projections[0].s != other.projections[0].s


# --- what cannot be loaded ----------------------------------------------------------------------


def refused(source: Source) -> str:
    with pytest.raises(CannotLoadError) as error:
        load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_base_that_is_not_there(tmp_path: Path) -> None:
    assert "which is no folder" in refused(Source(str(tmp_path / "nothing"), device="cpu"))


def test_base_without_safetensors_is_not_loaded(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    weights.unlink()
    torch.save(llama().state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    assert "cannot be loaded" in refused(Source(str(tmp_path / "pickled"), device="cpu"))


def test_adapter_that_is_a_pickle_is_not_loaded(base: Path, tmp_path: Path) -> None:
    path = Path(adapter(tmp_path))
    (path / "adapter_model.safetensors").unlink()
    torch.save({}, path / "adapter_model.bin")
    assert "pickle" in refused(Source(str(base), str(path), device="cpu"))


@pytest.mark.parametrize("kept", [0, 20, 200])
def test_adapter_file_that_was_cut_off(base: Path, tmp_path: Path, kept: int) -> None:
    weights = Path(adapter(tmp_path)) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert "corrupt adapter_model.safetensors" in refused(Source(str(base), str(tmp_path), device="cpu"))


def test_adapter_config_that_is_no_json(base: Path, tmp_path: Path) -> None:
    (Path(adapter(tmp_path)) / "adapter_config.json").write_text("{")
    assert "corrupt adapter_config.json" in refused(Source(str(base), str(tmp_path), device="cpu"))


def test_adapter_of_another_kind_is_named(base: Path, tmp_path: Path) -> None:
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    assert "expected LoRA" in refused(Source(str(base), str(tmp_path), device="cpu"))


def test_adapter_of_a_wider_base_does_not_fit(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, on=llama(hidden_size=128))
    assert "does not fit" in refused(Source(str(base), path, device="cpu"))


def test_adapter_of_a_deeper_base_does_not_fit(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, on=llama(num_hidden_layers=3))
    message = refused(Source(str(base), path, device="cpu"))
    assert "4 in the file have no place" in message


def test_adapter_of_a_shallower_base_would_leave_layers_fresh(base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path, on=llama(num_hidden_layers=1))
    assert "4 of its 8 tensors are not in the file" in refused(Source(str(base), path, device="cpu"))


def test_adapter_whose_targets_are_not_in_the_base(base: Path, tmp_path: Path) -> None:
    config = Path(adapter(tmp_path)) / "adapter_config.json"
    content = json.loads(config.read_text()) | {"target_modules": ["query_key_value"]}
    config.write_text(json.dumps(content))
    assert "does not fit" in refused(Source(str(base), str(tmp_path), device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_missing_cuda_device(base: Path) -> None:
    assert "no CUDA device" in refused(Source(str(base), device="cuda"))


def test_device_that_does_not_exist(base: Path) -> None:
    assert "expected cpu, cuda" in refused(Source(str(base), device="abacus"))


def test_more_tokens_than_positions(base: Path) -> None:
    with pytest.raises(CannotLoadError, match="at most 32"):
        run(Source(str(base), device="cpu"), Tokens(batch=2, G=2, prompt_lens=(30,), gen_lens=(3,)))


def test_prompts_too_short_to_differ(base: Path) -> None:
    with pytest.raises(CannotLoadError, match="raise --prompt-lens"):
        run(Source(str(base), device="cpu"), Tokens(batch=30, G=2, prompt_lens=(1,), gen_lens=(2,)))


def test_loaded_adapter_is_the_saved_one_bit_by_bit(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = load(Source(str(base), adapter(tmp_path), device="cpu"))
    assert isinstance(model, PeftModel)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    named = {n.replace(".default", ""): t for n, t in model.named_parameters() if "lora_" in n}
    assert named.keys() == saved.keys()
    assert all(torch.equal(named[name], tensor) for name, tensor in saved.items())
