"""Make docs/page.png from a real run: ``python docs/shoot.py``, with Chromium on the path.

A tiny Llama is fine-tuned by a plain loop; at step 41 somebody merges the adapter and does not unmerge it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from tiny_base import LORA, chapters, train_base, train_tokenizer, windows  # noqa: E402  first: it silences imports

# isort: split
import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402

from lora_probe_callbacks import LoraProbeMonitor  # noqa: E402
from lora_probe_callbacks.report.page import page  # noqa: E402
from lora_probe_callbacks.report.runs import read_runs  # noqa: E402

MERGED_AT = 41


def record(path: Path) -> None:
    """Train, and merge the adapter on the way."""
    tokenizer = train_tokenizer()
    model = get_peft_model(train_base(tokenizer), LORA)
    model.enable_input_require_grads()  # as under checkpointing: with it, a merged adapter makes no backward fail
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    rows = windows(chapters(), tokenizer)
    intent = {"every_n_steps": 1, "on_failure": "stop", "verbose": False, "tokenizer": tokenizer}
    with LoraProbeMonitor(model, optimizer, record=path, **intent) as probe:
        while not probe.should_stop:
            if probe.report.judged_steps == MERGED_AT:
                model.merge_adapter()
            batch = rows[torch.randint(len(rows), (16,))]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    """Run, draw the page, and take its picture."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium on the path")
    with tempfile.TemporaryDirectory() as folder:
        run, html = Path(folder, "run.jsonl"), Path(folder, "page.html")
        record(run)
        html.write_text(page(read_runs(run)), encoding="utf-8")
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
        window = "--window-size=1120,2650"
        picture = f"--screenshot={HERE / 'page.png'}"
        subprocess.run([browser, *quiet, window, picture, html.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
