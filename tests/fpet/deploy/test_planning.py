"""Plans: what rows say can be worked out by hand, recommendations follow the rows, and the model stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import fpet
from fpet.deploy import Plan, PlanRow, plan
from fpet.deploy.planning import candidates, picture


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=4)


def row(layers: tuple[int, ...], ratio: float, agreement: float | None, accuracy: float | None = None) -> PlanRow:
    return PlanRow(layers, ratio, ratio, ratio, ratio, agreement, agreement, accuracy)


def test_rows_of_a_model_and_its_images(tmp_path: Path) -> None:
    tuned = fpet.apply(model(), layer=3, refinement=True)
    x = torch.rand(6, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = {choice: fpet.apply(model(), layer=choice).eval()(x).argmax(-1) for choice in ((), (2,), (1, 3))}
    found = plan(
        tuned, image_size=(160, 160), images=x, labels=expected[()], layers=[(2,), (1, 3)], seconds=0.1, batch_size=2,
    )  # fmt: skip
    assert [r.layers for r in found.rows] == [(), (2,), (1, 3)]
    plain, one, two = found.rows
    assert plain.agreement == plain.accuracy == 1 and plain.time_ratio == 1 and found.drop(plain) == 0
    assert one.agreement == float((expected[(2,)] == expected[()]).double().mean()) == one.accuracy
    assert plain.gmac > one.gmac > two.gmac and plain.memory_gb > one.memory_gb > two.memory_gb
    assert tuned.training and tuned.fpet_config.layers == (3,) and tuned.blocks[3].refinement is not None
    table = found.table()
    assert "1+3" in table and "accuracy" in table and "6 images" in table
    picture(found, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as drawn:
        assert drawn.size[0] > 600


def test_without_images_there_are_times_alone() -> None:
    found = plan(model(), image_size=(160, 160), layers=[(2,)], seconds=0.1, batch_size=1)
    assert found.rows[1].agreement is None and "same class" not in found.table()
    with pytest.raises(ValueError, match="max_drop: needs images"):
        found.recommend(max_drop=1.0)


def test_recommendations_follow_the_rows() -> None:
    rows = [row((), 1.0, 1.0), row((1,), 0.6, 0.9), row((3,), 0.8, 0.995), row((5,), 0.95, 1.0)]
    found = Plan(rows, [])
    assert found.recommend(max_drop=0.5) == rows[2]
    assert found.recommend(max_drop=20) == rows[1]
    assert found.recommend(speed_up=1.2) == rows[2]
    assert found.recommend(speed_up=3.0) is None
    judged = Plan([row((), 1.0, 1.0, 0.8), row((1,), 0.6, 0.9, 0.81), row((3,), 0.8, 0.99, 0.7)], [])
    assert judged.recommend(max_drop=0.0) == judged.rows[1], "accuracy counts where there are labels"
    with pytest.raises(ValueError, match="expected one of them"):
        found.recommend()


def test_candidates_are_every_layer_and_some_pairs() -> None:
    assert candidates(12) == [*((i,) for i in range(12)), (3, 6), (3, 9), (4, 8), (6, 9)]
    assert candidates(2) == [(0,), (1,), (0, 1)]
