"""A body with LoRA and a new head, each with an optimizer of its own."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch import nn
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor


class Scorer(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
        self.head = nn.Linear(32, 1)

    def forward(self, ids):
        hidden = self.body(input_ids=ids).last_hidden_state
        return self.head(hidden[:, -1]).squeeze(-1)


config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="FEATURE_EXTRACTION")
body = get_peft_model(small_model().model, config)
model = Scorer(body)
of_body = torch.optim.AdamW([p for p in body.parameters() if p.requires_grad], lr=1e-3)
of_head = torch.optim.SGD(model.head.parameters(), lr=1e-2)
loader = DataLoader(Texts(128), batch_size=4)

with LoraProbeMonitor(model, [of_body, of_head]):
    model.train()
    for step, batch in enumerate(loader):
        scores = model(batch["input_ids"])
        target = (batch["labels"][:, 0] % 2).float()
        loss = F.binary_cross_entropy_with_logits(scores, target)
        of_body.zero_grad()
        of_head.zero_grad()
        loss.backward()
        of_body.step()
        of_head.step()
