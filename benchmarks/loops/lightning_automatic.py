"""A LightningModule with automatic optimisation, accumulation and a validation loop."""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from torch.utils.data import DataLoader

from lora_probe_callbacks import LoraProbe


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(small_model(), config)

    def training_step(self, batch, step):
        output = self.model(**batch)
        loss = output.loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, step):
        loss = self.model(**batch).loss
        self.log("validation", loss)

    def configure_optimizers(self):
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, 24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


module = Module()
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=2,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    callbacks=[LoraProbe()],
    **quiet,
)
trainer.fit(module, DataLoader(Texts(112), batch_size=4), DataLoader(Texts(8, seed=1), batch_size=8))
