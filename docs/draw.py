"""Draw the two pictures of docs/architecture.md from the code: ``python docs/draw.py``.

The rooms and the arrows between them are the imports of the package, read with :mod:`ast`; the way of a gradient is
read off one real training step, by recording which module's functions run, in their order.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from importlib.util import resolve_name
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "lora_probe_callbacks"
NAME = PACKAGE.name
# Where a room stands on the sheet, from what is seen (below) to what is told (above).
PLACES = {
    "facts": (0, 0),
    "observe": (0, 1),
    "distributed": (2, 1.5),
    "restore": (-2, 0),
    "checks": (2, 0.5),
    "report": (2, 2.5),
    "estimators": (-2, 1.5),
    "engine": (0, 2.5),
    "serving": (-2, 2.75),
    "integrations": (2, 3.5),
    "doors": (0, 3.5),
}
BENT = {("engine", "facts"), ("report", "checks")}  # arrows that would run behind another room


def room_of(module: str) -> str | None:
    """The room of a module; the front doors are one."""
    parts = module.split(".")
    if parts[0] != NAME or len(parts) < 2:
        return None
    return parts[1] if (PACKAGE / parts[1]).is_dir() else "doors" if parts[1] in DOORS else None


DOORS = {"lightning", "trainer", "monitor", "_preflight"}


def imports() -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another."""
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                target = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
                pair = room_of(module), room_of(target)
                if pair[0] and pair[1] and pair[0] != pair[1]:
                    found[pair[0], pair[1]] += 1
    return found


def draw_rooms(path: Path) -> None:
    """The rooms, and who imports whom."""
    figure, axes = plt.subplots(figsize=(9, 7), layout="constrained")
    boxes = {}
    for name, (x, y) in PLACES.items():
        boxes[name] = FancyBboxPatch((x - 0.5, y - 0.15), 1, 0.3, boxstyle="round,pad=0.04", fc="white", ec="black")
        axes.add_patch(boxes[name])
        axes.text(x, y, name, ha="center", va="center", fontsize=12)
    for (source, target), number in imports().items():
        if source in boxes and target in boxes:
            ends = {"posA": PLACES[source], "posB": PLACES[target], "patchA": boxes[source], "patchB": boxes[target]}
            width = 0.6 + number / 20
            bend = "arc3,rad=0.25" if (source, target) in BENT else "arc3"
            style = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "0.45", "linewidth": width, "zorder": 0}
            axes.add_patch(FancyArrowPatch(**ends, shrinkA=1, shrinkB=1, connectionstyle=bend, **style))
    axes.set(xlim=(-2.8, 2.8), ylim=(-0.4, 3.9), title="Rooms: an arrow is an import, its width their number")
    axes.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def steps_of_a_gradient() -> list[tuple[str, str]]:
    """Room and module, in the order in which they first run, from a forward to the verdict of that step."""
    from peft import LoraConfig, get_peft_model

    from lora_probe_callbacks import LoraProbeMonitor

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen: dict[tuple[str, str], None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and (room := room_of(module)) and room != "facts":
            name = "every check" if room == "checks" else ".".join(module.split(".")[2:])
            seen.setdefault((room, name))

    with LoraProbeMonitor(model, optimizer, every_n_steps=1, verbose=False):
        for step in range(4):
            if step == 2:
                sys.setprofile(note)
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        sys.setprofile(None)
    return list(seen)


def draw_gradient(path: Path) -> None:
    """One column for each room, one line for each module, in the order of the calls."""
    steps = steps_of_a_gradient()
    rooms = list(dict.fromkeys(room for room, _ in steps))
    figure, axes = plt.subplots(figsize=(11, 0.28 * len(steps) + 1.2), layout="constrained")
    at = [(rooms.index(room), -i) for i, (room, _) in enumerate(steps)]
    axes.plot(*zip(*at, strict=True), color="0.8", linewidth=1, zorder=0)
    box = {"boxstyle": "round,pad=0.2", "fc": "white", "ec": "0.4"}
    for (_, module), (x, y) in zip(steps, at, strict=True):
        axes.text(x, y, module, ha="center", va="center", fontsize=8, bbox=box)
    axes.set_xticks(range(len(rooms)), rooms, fontsize=11)
    axes.xaxis.tick_top()
    axes.set(xlim=(-0.6, len(rooms) - 0.4), ylim=(-len(steps), 0.8), yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_rooms(HERE / "rooms.png")
    draw_gradient(HERE / "gradient.png")
