"""An evaluation every few steps that merges the adapter to be faster, and samples."""

import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

base = small_model()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(Texts(128), batch_size=4)
held_out = DataLoader(Texts(8, seed=1), batch_size=8)


def evaluate():
    model.eval()
    model.merge_adapter()
    with torch.no_grad():
        for rows in held_out:
            loss = model(**rows).loss
            model.generate(input_ids=rows["input_ids"][:2, :4], max_new_tokens=3, do_sample=False)
    model.unmerge_adapter()
    model.train()
    return loss.item()


with LoraProbeMonitor(model, optimizer):
    model.train()
    for step, batch in enumerate(loader):
        if step % 8 == 4:
            evaluate()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
