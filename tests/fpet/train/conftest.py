"""A backbone that was hardly trained, and a run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fpet.train import Config, pretrain
from train_support import TINY


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    pretrain.save_backbone(pretrain.pretrain(3)[0], path)
    return str(path)


@pytest.fixture
def config(backbone: str, tmp_path: Path) -> Config:
    return Config(weights=backbone, output=str(tmp_path / "run"), **TINY)
