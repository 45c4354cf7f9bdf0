"""DPO against the model with its adapter disabled."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

BETA = 0.1
base = small_model()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
loader = DataLoader(Texts(128), batch_size=4)


def log_probs(ids):
    logits = model(input_ids=ids).logits[:, :-1]
    per_token = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return per_token.sum(-1)


with LoraProbeMonitor(model, optimizer):
    model.train()
    for step, batch in enumerate(loader):
        with torch.no_grad(), model.disable_adapter():
            reference = log_probs(batch["input_ids"])
        policy = log_probs(batch["input_ids"])
        chosen, rejected = (policy - reference).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
