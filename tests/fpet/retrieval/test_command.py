"""``fpet retrieval``."""

from __future__ import annotations

import json
import socket

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


def test_what_would_fail_later_is_refused_first(folder, tmp_path, capsys, monkeypatch):
    def no_network(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", no_network)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    tune = ["train", "--data-dir", str(folder), "--quiet", "--output", str(tmp_path / "run"), "--model", "nobody/nothing"]
    assert command(tune) == 1
    said = capsys.readouterr().err
    assert said.startswith("fpet retrieval: --model: nobody/nothing can't be had") and "--model FOLDER" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert command([*tune, "--output", "/dev/null/run"]) == 1
    assert "--output: /dev/null is no folder that can be written to" in capsys.readouterr().err
    assert command([*tune, "--batch-size", "1"]) == 1
    assert "--batch-size: expected at least 2" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "model.safetensors").write_text("")
    assert command(tune) == 1
    assert "holds a run with other settings" in capsys.readouterr().err
