"""DPO against a second, frozen adapter of the same model."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

base = small_model()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config, adapter_name="policy")
model.add_adapter("reference", config)
model.set_adapter("policy")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
loader = DataLoader(Texts(128), batch_size=4)


def log_probs(batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    picked = batch["labels"][:, 1:, None]
    return logits.log_softmax(-1).gather(-1, picked).squeeze(-1).sum(-1)


with LoraProbeMonitor(model, optimizer, adapter="policy", reference_adapters=("reference",)):
    model.train()
    for step, batch in enumerate(loader):
        model.set_adapter("reference")
        with torch.no_grad():
            reference = log_probs(batch)
        model.set_adapter("policy")
        policy = log_probs(batch)
        chosen, rejected = (policy - reference).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
