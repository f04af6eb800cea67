"""``fpet retrieval``."""

from __future__ import annotations

import json

import pytest

from retrieval_support import command, tiny


def test_the_command(folder, tokenizer, tmp_path, capsys):
    model, output = tmp_path / "model", tmp_path / "run"
    tiny().save_pretrained(model)
    tokenizer.save_pretrained(model)
    common = ["--data-dir", str(folder), "--model", str(model), "--image-size", "16", "--quiet"]
    tune = ["--epochs", "1", "--batch-size", "4", "--adapter-dim", "4", "--top-k", "3", "--lr", "0.01", "--queue-size", "8"]
    assert command(["train", *common, *tune, "--output", str(output)]) == 0
    assert "epoch 1" in capsys.readouterr().out
    assert command(["evaluate", *common, "--tuned", str(output / "model.safetensors")]) == 0
    assert "R@10" in capsys.readouterr().out
    assert command(["evaluate", *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image_to_text"].keys() == {"1", "5", "10"}
    assert command(["check", "--data-dir", str(folder)]) == 1
    assert "29000" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert command(["train", "--data-dir", str(tmp_path), "--model", str(tmp_path / "none"), "--output", "x"]) == 1
    assert "no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command([])
