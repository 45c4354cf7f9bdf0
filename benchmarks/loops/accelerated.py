"""Accelerate: accumulation, clipping and a schedule."""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
base = small_model()
base.enable_input_require_grads()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 60)
loader = DataLoader(Texts(256), batch_size=4)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

with LoraProbeMonitor(model, optimizer, accelerator=accelerator, log=lambda metrics, step: None):
    model.train()
    for step, batch in enumerate(loader):
        with accelerator.accumulate(model):
            output = model(**batch)
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
