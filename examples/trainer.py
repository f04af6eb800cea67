"""transformers' Trainer on a model that merges."""

import tempfile

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import fpet
import fpet.huggingface as hf
from fpet.data import shapes_task


class Shapes(torch.utils.data.Dataset):
    """Drawn shapes, as the Trainer takes them."""

    def __init__(self, count: int, seed: int) -> None:
        self.task = shapes_task("orientation", count, seed)

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> dict[str, object]:
        image, label = self.task[index]
        return {"pixel_values": image, "labels": label}


torch.manual_seed(0)  # in place of ViTForImageClassification.from_pretrained(…)
model = ViTForImageClassification(
    ViTConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=4,
              num_labels=8)
)  # fmt: skip
hf.apply(model, layer=2, refinement=True)
fpet.freeze(model)  # the refinement and the classifier learn

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=1, per_device_train_batch_size=32, learning_rate=1e-3, report_to=[], save_strategy="no",
        logging_steps=2, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Shapes(128, 0), eval_dataset=Shapes(64, 1))
    trainer.train()
    print(trainer.evaluate())
