"""Token merging in timm's vision transformers."""
