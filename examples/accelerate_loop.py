"""Hugging Face accelerate around a model that merges. ``accelerate launch examples/accelerate_loop.py`` uses every device."""

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator

import fpet
from fpet.data import shapes_task

accelerator = Accelerator()
torch.manual_seed(0)  # in place of pretrained=True
model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=8)
fpet.freeze(fpet.apply(fpet.add_adapters(model, "lora"), layer=2, refinement=True))  # before prepare, which wraps it

task = shapes_task("orientation", 256, seed=0)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(task.images, task.labels), batch_size=32, shuffle=True)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

model.train()
for images, labels in loader:
    loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
accelerator.print(
    f"loss {loss.item():.3f}, {fpet.count_parameters(accelerator.unwrap_model(model)).trainable} parameters trained"
)
