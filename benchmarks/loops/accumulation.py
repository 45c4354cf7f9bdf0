"""Gradient accumulation by hand, two epochs."""

import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

ACCUMULATE = 2
base = small_model()
base.enable_input_require_grads()
config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
model = get_peft_model(base, config)
trainable = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.1)
loader = DataLoader(Texts(128), batch_size=4)

with LoraProbeMonitor(model, optimizer):
    for epoch in range(2):
        model.train()
        for step, batch in enumerate(loader):
            loss = model(**batch).loss / ACCUMULATE
            loss.backward()
            if (step + 1) % ACCUMULATE == 0:
                torch.nn.utils.clip_grad_norm_(trainable, 1.0)
                optimizer.step()
                optimizer.zero_grad()
