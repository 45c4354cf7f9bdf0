"""The loop of every tutorial, with clipping."""

import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

base = small_model()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)
loader = DataLoader(Texts(128), batch_size=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

model.train()
with LoraProbeMonitor(model, optimizer):
    for step, batch in enumerate(loader):
        output = model(**batch)
        loss = output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
