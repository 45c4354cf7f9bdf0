"""An exponential moving average of the adapter, put in for every evaluation and taken out again."""

import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

DECAY = 0.9
base = small_model()
base.enable_input_require_grads()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)
trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
average = {n: p.detach().clone() for n, p in trainable.items()}
optimizer = torch.optim.AdamW(trainable.values(), lr=1e-3)
loader = DataLoader(Texts(128), batch_size=4)
held_out = DataLoader(Texts(8, seed=1), batch_size=8)


@torch.no_grad()
def copy_into_model(values):
    for name, value in values.items():
        trainable[name].copy_(value)


with LoraProbeMonitor(model, optimizer):
    model.train()
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in average.items():
            value.lerp_(trainable[name].detach(), 1 - DECAY)
        if (step + 1) % 5 == 0:
            trained = {n: p.detach().clone() for n, p in trainable.items()}
            copy_into_model(average)
            model.eval()
            with torch.no_grad():
                losses = [model(**rows).loss.item() for rows in held_out]
            model.train()
            copy_into_model(trained)
