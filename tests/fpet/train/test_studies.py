"""Several runs, and the command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

import pytest

from fpet.train import Config, ConfigError, compare, comparison_table, sweep
from fpet.train.command import add_arguments, run
from train_support import TINY


def test_sweep_picks_on_validation_and_tests_once(config: Config) -> None:
    config = dataclasses.replace(config, epochs=1, warmup_epochs=0.0, train_count=60)
    result = sweep(config, [1.0, 0.1])
    trials = {s: json.loads((Path(config.output) / f"s-{s:g}" / "result.json").read_text()) for s in (0.1, 1.0)}
    assert all(trial["accuracy"] is None for trial in trials.values())
    best = max(trials, key=lambda s: trials[s]["val_accuracy"])
    assert result.config.scale == best and result.config.protocol == "paper" and result.accuracy is not None


def test_compare_shares_the_backbone(config: Config) -> None:
    config = dataclasses.replace(config, weights=None, pretrain_steps=2, epochs=1, warmup_epochs=0.0)
    found = compare(config, ["fpet", "avg-pool"], [0, 1])
    assert {name: len(values) for name, values in found.items()} == {"fpet": 2, "avg-pool": 2}
    files = {path.read_bytes() for path in Path(config.output).rglob("backbone.safetensors")}
    assert len(files) == 1, "every run holds a copy of the same"


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(given)


def test_command_line(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k != "progress"]
    assert run(arguments("--no-progress", f"--weights={config.weights}", f"--output={config.output}", *options)) == 0
    assert "test accuracy" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="lr: expected a finite number"):
        run(arguments("--lr=-1"))
    with pytest.raises(ConfigError, match=r"--compare: expected some of fpet.*got magic"):
        run(arguments("--compare=fpet,magic"))
    with pytest.raises(ConfigError, match=r"--compare: .*did you mean avg-pool\?"):
        run(arguments("--compare=fpet,avgpool"))
    with pytest.raises(ConfigError, match="--seeds: expected it with --compare"):
        run(arguments("--seeds=1,2"))
    with pytest.raises(ConfigError, match="--compare: expected it without --sweep-scale"):
        run(arguments("--compare=fpet", "--sweep-scale=1"))
    with pytest.raises(ConfigError, match="--seeds: expected numbers"):
        run(arguments("--compare=fpet", "--seeds=a"))


@pytest.mark.skipif("FPET_LONG_TESTS" not in os.environ, reason="takes five minutes; FPET_LONG_TESTS=1 runs it")
def test_merged_accuracy_is_within_a_point_of_unmerged_over_five_seeds(tmp_path: Path) -> None:
    """`fpet train --compare fpet,none --seeds 0,1,2,3,4`: the default task, merged in the middle block and not at all."""
    found = compare(Config(output=str(tmp_path / "compare"), progress=False), ["fpet", "none"], range(5))
    print(comparison_table(found))
    merged, plain = (sum(found[name]) / 5 for name in ("fpet", "none"))
    assert plain > 0.8
    assert merged > plain - 0.01
