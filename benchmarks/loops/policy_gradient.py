"""REINFORCE with a group baseline and a KL penalty: samples, rewards, advantages, one step."""

import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbeMonitor

KL = 0.05
base = small_model()
base.enable_input_require_grads()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
loader = DataLoader(Texts(48), batch_size=2)


def token_log_probs(ids):
    logits = model(input_ids=ids).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[:, 3:]


with LoraProbeMonitor(model, optimizer, reference="disabled"):
    for step, batch in enumerate(loader):
        prompts = batch["input_ids"][:, :4].repeat_interleave(4, 0)
        model.eval()
        with torch.no_grad():
            samples = model.generate(input_ids=prompts, max_new_tokens=6, do_sample=True, top_k=0)
            with model.disable_adapter():
                reference = token_log_probs(samples)
        model.train()
        rewards = (samples[:, 4:] % 2 == 0).float().mean(-1)
        groups = rewards.view(-1, 4)
        advantages = ((groups - groups.mean(-1, keepdim=True)) / (groups.std(-1, keepdim=True) + 1e-4)).view(-1)
        policy = token_log_probs(samples)
        kl = (reference - policy).exp() - (reference - policy) - 1
        loss = -(advantages[:, None] * policy - KL * kl).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
