"""A LightningModule with manual optimisation."""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbe


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(small_model(), config)
        self.model.enable_input_require_grads()
        self.model.train()

    def training_step(self, batch, step):
        optimizer = self.optimizers()
        loss = self.model(**batch).loss
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        self.log("loss", loss)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)


module = Module()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[LoraProbe()], **quiet)
trainer.fit(module, DataLoader(Texts(128), batch_size=4))
