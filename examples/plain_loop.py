"""A timm model tuned in a plain PyTorch loop: adapters, merging, a refinement of the keys; then saved and loaded."""

import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import fpet
from fpet.data import shapes_task


def backbone() -> torch.nn.Module:
    torch.manual_seed(0)  # in place of pretrained=True
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=8)


model = backbone()
fpet.add_adapters(model, "adaptformer")
fpet.apply(model, layer=2, refinement=True)
fpet.freeze(model)
print(fpet.count_parameters(model))

data = shapes_task("orientation", count=256, seed=0)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
model.train()
for step, rows in enumerate(torch.randperm(256).split(32)):
    loss = F.cross_entropy(model(data.images[rows]), data.labels[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

with tempfile.TemporaryDirectory() as folder:
    fpet.save(model, Path(folder) / "tuned.safetensors")
    again = fpet.load(backbone(), Path(folder) / "tuned.safetensors")
with torch.no_grad():
    torch.testing.assert_close(again.eval()(data.images[:8]), model.eval()(data.images[:8]))
print("loaded: the same scores")
