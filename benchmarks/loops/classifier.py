"""A classifier: DoRA, a head that is saved with the adapter, SGD with momentum, early best weights."""

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from small import Texts, small_model
from torch import nn
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small_model().model
        self.score = nn.Linear(32, 4)

    def forward(self, ids):
        hidden = self.body(input_ids=ids).last_hidden_state
        return self.score(hidden.mean(1))


base = Classifier()
config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "v_proj"], modules_to_save=["score"])
model = get_peft_model(base, config)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
loader = DataLoader(Texts(128), batch_size=4)
best, best_loss = None, float("inf")

with LoraProbeMonitor(model, optimizer):
    model.train()
    for step, batch in enumerate(loader):
        logits = model(batch["input_ids"])
        target = batch["labels"][:, 0] % 4
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < best_loss:
            best_loss = loss.item()
            best = copy.deepcopy(get_peft_model_state_dict(model))
