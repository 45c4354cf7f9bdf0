"""Two adapters that are active together and train together."""

import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

base = small_model()
base.enable_input_require_grads()
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
model.add_adapter("style", LoraConfig(r=2, lora_alpha=4, target_modules=["gate_proj"]))
model.base_model.set_adapter(["default", "style"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
loader = DataLoader(Texts(128), batch_size=4)

with LoraProbeMonitor(model, optimizer):
    model.train()
    for step, batch in enumerate(loader):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
