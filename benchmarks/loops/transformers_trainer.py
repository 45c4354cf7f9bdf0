"""The Transformers Trainer with a loss of one's own and a callback."""

import tempfile

from peft import LoraConfig, get_peft_model
from small import Texts, small_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_probe_callbacks import LoraProbeTrainerCallback


class MyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs.loss
        return (loss, outputs) if return_outputs else loss


class Modes(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.train()
        step = state.global_step


base = small_model()
base.enable_input_require_grads()
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)
args = TrainingArguments(
    output_dir=tempfile.gettempdir(),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=32,
    learning_rate=1e-3,
    lr_scheduler_type="linear",
    logging_strategy="no",
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
)
trainer = MyTrainer(model=model, args=args, train_dataset=Texts(128), callbacks=[Modes(), LoraProbeTrainerCallback()])
trainer.train()
