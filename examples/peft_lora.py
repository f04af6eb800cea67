"""LoRA of the peft library on a model that merges: merging first, then peft, which also saves the refinement and the head."""

import tempfile

import peft
import timm
import torch
import torch.nn.functional as F

import fpet
from fpet.data import shapes_task


def merging() -> torch.nn.Module:
    torch.manual_seed(0)  # in place of pretrained=True
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=8)
    return fpet.apply(model, layer=2, refinement=True)


config = peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head", "refinement"])
model = peft.get_peft_model(merging(), config)
model.print_trainable_parameters()

task = shapes_task("orientation", 128, seed=0)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for rows in torch.arange(128).split(32):
    loss = F.cross_entropy(model(task.images[rows]), task.labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(merging(), folder)
with torch.no_grad():
    torch.testing.assert_close(again.eval()(task.images[:8]), model.eval()(task.images[:8]))
print("loaded: the same scores")
