"""Warm-up and cosine decay, two parameter groups as under LoRA+."""

import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from lora_probe_callbacks import LoraProbeMonitor

STEPS = 40
base = small_model()
config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
model = get_peft_model(base, config)
of_a = [p for n, p in model.named_parameters() if "lora_A" in n]
of_b = [p for n, p in model.named_parameters() if "lora_B" in n]
optimizer = torch.optim.AdamW([{"params": of_a, "lr": 1e-3}, {"params": of_b, "lr": 4e-3}], weight_decay=0.0)
scheduler = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=STEPS)
loader = DataLoader(Texts(128), batch_size=4)

with LoraProbeMonitor(model, optimizer):
    model.train()
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
