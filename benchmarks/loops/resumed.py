"""A run that goes on from a checkpoint made by an earlier one."""

import io

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor


def build():
    model = get_peft_model(small_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return model, optimizer


def train(model, optimizer, loader):
    model.train()
    for step, batch in enumerate(loader):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


checkpoint = io.BytesIO()
model, optimizer = build()
train(model, optimizer, DataLoader(Texts(32), batch_size=4))
torch.save({"adapter": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}, checkpoint)

checkpoint.seek(0)
state = torch.load(checkpoint)
model, optimizer = build()
set_peft_model_state_dict(model, state["adapter"])
optimizer.load_state_dict(state["optimizer"])
with LoraProbeMonitor(model, optimizer):
    train(model, optimizer, DataLoader(Texts(128, seed=2), batch_size=4))
