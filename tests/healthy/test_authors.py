"""Who writes the adapter, its copies and the base beside the optimizer: the faults, and what looks like them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.doors import DOORS, watch_through
from support.training import Training, adapter_tensors, assert_found, assert_healthy, config, llama, lora, trained
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from lora_probe_callbacks import LoraProbeMonitor, faults
from lora_probe_callbacks.report.findings import LoraProbeWarning

Between = Callable[[Training, int], None]


def run(between: Between, lr: float = 1e-2, **changes: Any) -> Training:
    """An adapter that was trained before, so that A learns from the first step on."""
    model = lora(**changes)
    trained(model, std=0.02)
    tensors = [p for p in model.parameters() if p.requires_grad]
    return Training(model, optimizer=AdamW(tensors, lr=lr, weight_decay=0.0), between_steps=between)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in adapter_tensors(model).items()}


def put(model: nn.Module, state: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(state[name])


def averaged(decay: float, every: int, *, back: bool = False) -> Between:
    """A moving average that validates every so many steps."""
    average: dict[str, Tensor] = {}

    def between(run: Training, step: int) -> None:
        if not average:
            average.update(values(run.model))
        for name, tensor in adapter_tensors(run.model).items():
            average[name].lerp_(tensor.detach(), 1 - decay)
        if step and step % every == 0:
            kept = values(run.model)
            put(run.model, average)
            if back:
                put(run.model, kept)

    return between


def slow(weight: float, every: int) -> Between:
    """Lookahead from outside the optimizer."""
    state: dict[str, Tensor] = {}

    def between(run: Training, step: int) -> None:
        if not state:
            state.update(values(run.model))
        if step and step % every == 0:
            for name, tensor in adapter_tensors(run.model).items():
                state[name].lerp_(tensor.detach(), weight)
            put(run.model, state)

    return between


def loaded(*steps: int, of: int = 0) -> Between:
    """The state of one step is loaded before others."""
    state: dict[str, Tensor] = {}

    def between(run: Training, step: int) -> None:
        if step == of:
            state.update(values(run.model))
        if step in steps:
            put(run.model, state)

    return between


def restarted(every: int, *, merge: bool, only: str = "") -> Between:
    def between(run: Training, step: int) -> None:
        if not step or step % every:
            return
        with torch.no_grad():
            for name, layer in run.model.named_modules():
                if not isinstance(layer, peft.tuners.lora.Linear) or only not in name:
                    continue
                if merge:
                    layer.base_layer.weight.add_(layer.get_delta_weight("default"))
                faults.restarted_without_merging(layer)
        for tensor in adapter_tensors(run.model).values():
            run.built_optimizer().state.pop(tensor, None)

    return between


def changed(change: Callable[[Tensor], Tensor]) -> Between:
    """Every tensor is written after every step."""

    def between(run: Training, step: int) -> None:
        with torch.no_grad():
            for tensor in adapter_tensors(run.model).values() if step else ():
                tensor.copy_(change(tensor))

    return between


def bounded(norm: float) -> Between:
    return changed(lambda t: t * (norm / t.norm().clamp_min(norm)))


def perturbed() -> Between:
    noise = torch.Generator().manual_seed(0)

    def back_and_forth(tensor: Tensor) -> Tensor:
        shift = 0.1 * torch.randn(tensor.shape, generator=noise)
        return (tensor + shift) - shift

    return changed(back_and_forth)


# --- taken back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("between", "step"),
    [
        (lambda: averaged(0.999, 3), 6),
        (lambda: loaded(4, 8, 12), 8),
        (lambda: restarted(4, merge=False), 8),
    ],
    ids=["an average left in place", "an old state", "restarts without a merge"],
)
def test_what_is_taken_back_twice_fails(between: Callable[[], Between], step: int, door: str) -> None:
    watched = watch_through(door, run(between()), 14, every_n_steps=1)
    assert_found(watched, "LP409", step, "taken back", "the 2nd time")


@pytest.mark.parametrize(
    ("between", "step", "status"),
    [
        (lambda: averaged(0.999, 1), 5, "fail"),
        (lambda: averaged(0.95, 5), 15, "warn"),
        (lambda: slow(0.01, 4), 8, "fail"),
        (lambda: restarted(4, merge=False, only="layers.0"), 8, "warn"),
        (lambda: changed(lambda t: t.clamp(-1e-3, 1e-3)), 6, "fail"),
    ],
    ids=["at every step", "most of it", "hardly slow weights", "one layer", "bounded to nothing"],
)
def test_what_is_taken_back_in_part_or_always(between: Callable[[], Between], step: int, status: str) -> None:
    with pytest.warns(LoraProbeWarning) if status == "fail" else nullcontext():
        watched = watch_through("plain", run(between()), 20, every_n_steps=1, on_failure="warn")
    assert [(c, s) for c, s, _ in watched.found] == [("LP409", status)]
    assert abs(watched.found[0][2] - step) <= 1, watched.found


@pytest.mark.parametrize("after", [0, 1])
def test_what_falls_beside_a_probed_step_is_seen_at_a_sparse_cadence(after: int) -> None:
    """Validations come at round steps: before the update of a probed one, or after it."""
    state: dict[str, Tensor] = {}

    def between(run: Training, step: int) -> None:
        if not state:
            state.update(values(run.model))
        if step > after and (step - after) % 10 == 0:
            put(run.model, state)

    watched = watch_through("plain", run(between), 48, every_n_steps=20)
    assert_found(watched, "LP409", 40 + after, "taken back", "the 2nd time")


TWINS: dict[str, Callable[[], Training]] = {
    "an average that is taken out again": lambda: run(averaged(0.999, 3, back=True)),
    "an average of few steps": lambda: run(averaged(0.5, 5)),
    "Lookahead": lambda: run(slow(0.5, 5)),
    "Reptile": lambda: run(slow(0.1, 5)),
    "one rollback": lambda: run(loaded(9, of=4)),
    "one rollback to the start": lambda: run(loaded(9)),
    "restarts that merge": lambda: run(restarted(4, merge=True)),
    "a bound on norms": lambda: run(bounded(0.3)),
    "a bound on rows": lambda: run(changed(lambda t: torch.renorm(t, 2, 0, 0.1))),
    "a bound on values": lambda: run(changed(lambda t: t.clamp(-0.1, 0.1))),
    "decay from outside": lambda: run(changed(lambda t: 0.9 * t)),
    "perturbed and put back": lambda: run(perturbed()),
    "merged and unmerged in bfloat16": lambda: run(
        lambda run, step: faults.merge_unmerge_cycles(run.model, 1) if step == 5 else None,
        base=llama(torch.bfloat16),
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_what_is_written_and_stands_is_healthy(name: str) -> None:
    watched = watch_through("plain", TWINS[name](), 16, every_n_steps=1)
    assert_healthy(watched)
    assert watched.report.status == "healthy"
    verdict = next(f for f in watched.report.findings if f.code == "LP409")
    assert (verdict.status, verdict.last_step) == ("pass", 15)


@pytest.mark.parametrize("door", DOORS)
def test_writes_that_stand_are_healthy_behind_every_door(door: str) -> None:
    for between in (averaged(0.99, 3, back=True), loaded(6), restarted(4, merge=True)):
        assert_healthy(watch_through(door, run(between), 12, every_n_steps=1))


# --- what no file holds ---------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 16)
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, 64)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("rotary_cache", torch.zeros(4))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.rotary_cache.add_(0.1)
            self.scratch.add_(0.1)
        return self.out(self.norm(self.embed(ids).flatten(0, 1)))


def normed(*, frozen: bool = False, **changes: Any) -> Training:
    def loss(model: nn.Module, batch: Tensor, step: int) -> Tensor:
        for module in model.modules():
            if frozen and isinstance(module, nn.BatchNorm1d):
                module.eval()
        return nn.functional.cross_entropy(model(batch), batch.flatten())

    return Training(get_peft_model(Normed(), LoraConfig(r=4, target_modules=["out"], **changes)), loss)


@pytest.mark.parametrize("door", DOORS)
def test_running_statistics_that_no_file_holds_warn(door: str) -> None:
    watched = watch_through(door, normed(), every_n_steps=1)
    assert_found(watched, "LP808", 0, "running_mean", "running_var", "moves 2 tensors", status="warn")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("how", [{"frozen": True}, {"modules_to_save": ["norm"]}], ids=["in eval mode", "saved"])
def test_norms_that_stay_or_are_saved_are_healthy(how: dict[str, Any], door: str) -> None:
    watched = watch_through(door, normed(**how), every_n_steps=1)
    assert_healthy(watched)
    assert watched.report.status == "healthy"
    assert "LP808" in {f.code for f in watched.report.with_status("pass")}


@pytest.mark.parametrize(
    ("how", "status"), [({}, ["LP808"]), ({"frozen": True}, []), ({"modules_to_save": ["norm"]}, [])]
)
def test_file_without_the_statistics_is_another_model(how: dict[str, Any], status: list[str], tmp_path: Path) -> None:
    training = normed(**how)
    probe, fit = DOORS["plain"](training, 8, every_n_steps=1, verbose=False)
    fit()
    training.model.save_pretrained(tmp_path)
    report = probe.check_saved(tmp_path)
    assert [f.code for f in report.failures] == status
    assert report.healthy is (not status)
    reloaded, live = PeftModel.from_pretrained(Normed(), tmp_path).eval(), training.model.eval()
    ids = torch.arange(24).reshape(2, 12)
    assert torch.allclose(reloaded(ids), live(ids)) is (not status)


# --- copies that follow ---------------------------------------------------------------------------


def teacher(dtype: torch.dtype, follow: Callable[[Tensor, Tensor, int], Any], lr: float = 1e-2) -> Training:
    model = lora()
    model.add_adapter("teacher", config())
    trained(model, "default", std=0.02)
    tensors = dict(model.named_parameters())
    pairs = [(t, tensors[n.replace(".teacher.", ".default.")]) for n, t in tensors.items() if ".teacher." in n]
    for own, other in pairs:
        own.data = other.data.to(dtype, copy=True)

    @torch.no_grad()
    def between(run: Training, step: int) -> None:
        for number, (own, other) in enumerate(pairs if step else ()):
            follow(own, other, number)

    optimizer = AdamW([t for n, t in tensors.items() if ".default." in n], lr=lr)
    return Training(model, optimizer=optimizer, between_steps=between)


def average(decay: float) -> Callable[[Tensor, Tensor, int], Any]:
    return lambda own, other, number: own.mul_(decay).add_(other.to(own.dtype), alpha=1 - decay)


LAGGED = {"adapter": "default", "lagged_adapters": ("teacher",)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_that_is_lost_to_rounding_fails_though_small_elements_move(dtype: torch.dtype) -> None:
    watched = watch_through("plain", teacher(dtype, average(0.9999)), 12, every_n_steps=1, **LAGGED)
    assert [(c, s) for c, s, _ in watched.found] == [("LP408", "fail")]
    finding = watched.report.failures[0]
    assert finding.step <= 6
    assert "follows in part" in finding.message
    assert "what should move is lost" in finding.message


def test_half_of_the_tensors_left_out_of_the_average_fails() -> None:
    follow = average(0.9)
    run = teacher(torch.float32, lambda own, other, number: follow(own, other, number) if number % 2 else None)
    watched = watch_through("plain", run, 12, every_n_steps=1, **LAGGED)
    assert_found(watched, "LP408", 9, "4 of 8 tensors stand still")


@pytest.mark.parametrize(
    ("dtype", "decay", "lr"),
    [
        (torch.float32, 0.9999, 1e-2),
        (torch.float32, 0.9999, 1e-4),
        (torch.float32, 0.5, 1e-2),
        (torch.bfloat16, 0.9, 1e-2),
        (torch.bfloat16, 0.9, 1e-3),
        (torch.bfloat16, 0.0, 1e-2),
    ],
)
def test_average_that_follows_is_healthy(dtype: torch.dtype, decay: float, lr: float) -> None:
    watched = watch_through("plain", teacher(dtype, average(decay), lr), 20, every_n_steps=1, **LAGGED)
    assert_healthy(watched)
    assert watched.report.status == "healthy"


# --- the file, asked by hand ----------------------------------------------------------------------

CHANGES: dict[str, tuple[Callable[[Tensor], Tensor], bool | None, str]] = {
    "nothing": (lambda t: t, True, "pass"),
    "to bfloat16": (lambda t: t.bfloat16(), True, "pass"),
    "through bfloat16": (lambda t: t.bfloat16().float(), True, "pass"),
    "cut to bfloat16": (lambda t: (t.view(torch.int32) & ~0xFFFF).view(torch.float32), None, "warn"),
    "one part in ten million": (lambda t: t * (1 + 3e-7), None, "warn"),
    "one part in a thousand": (lambda t: t * 1.001, False, "fail"),
    "an offset": (lambda t: t + 1e-3, False, "fail"),
    "an average": (lambda t: 0.9 * t, False, "fail"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("running", [True, False])
def test_who_asks_gets_an_answer(name: str, running: bool, tmp_path: Path) -> None:
    change, healthy, status = CHANGES[name]
    model = lora()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def ask() -> None:
        model.save_pretrained(tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        save_file({n: change(t).contiguous() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        report = probe.check_saved(tmp_path)
        assert report.healthy is healthy, str(report)
        verdict = next(f for f in report.findings if f.code == "LP801")
        assert verdict.status == status
        if status in ("warn", "fail"):
            assert "of their norm in 8 of 8 tensors, most in" in verdict.message

    with LoraProbeMonitor(model, optimizer, every_n_steps=1, verbose=False) as probe:
        for step in range(6):
            ids = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(step))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if running:
            ask()
    if not running:
        ask()
    assert not probe.report.failures or not running, "a question about a file does not stop a run"


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_patterns_of_fused_experts_are_those_of_the_file(tmp_path: Path) -> None:
    """PEFT writes rank_pattern and alpha_pattern for the parameter that gate_proj and up_proj became."""
    base = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64,
            hidden_size=32,
            moe_intermediate_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    targets = ["gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    assert model.peft_config["default"].rank_pattern, "the case must be one"
    training = Training(model)
    probe, fit = DOORS["plain"](training, 4, every_n_steps=1, verbose=False)
    fit()
    model.save_pretrained(tmp_path)
    report = probe.check_saved(tmp_path)
    assert report.status == "healthy", str(report)
    assert {"LP801", "LP802"} <= {f.code for f in report.with_status("pass")}
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('gate_up_proj": 16', 'gate_up_proj": 12'))
    assert [f.code for f in probe.check_saved(tmp_path).failures] == ["LP802"]


def test_file_of_diffusers_is_compared(tmp_path: Path) -> None:
    """Under the name of a part of the pipeline, with down and up for A and B, beside another part's."""
    training = Training(lora())
    probe, fit = DOORS["plain"](training, 4, every_n_steps=1, verbose=False)
    fit()
    training.model.save_pretrained(tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    names = {
        n: n.removeprefix("base_model.model.").replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        for n in saved
    }

    def answer(prefix: str, **changes: Tensor) -> Any:
        file = {f"{prefix}{names[n]}": t for n, t in saved.items()} | changes
        save_file(file, tmp_path / "pytorch_lora_weights.safetensors")
        return probe.check_saved(tmp_path)

    assert answer("unet.").status == "healthy"
    assert answer("").status == "healthy"
    other = {"text_encoder.q_proj.lora_linear_layer.down.weight": torch.ones(2, 2)}
    assert answer("transformer.", **other).status == "healthy"
    first = f"unet.{names[next(iter(saved))]}"
    report = answer("unet.", **{first: torch.zeros(4, 32)})
    assert [(f.code, f.cause) for f in report.failures] == [("LP801", "partly")]
