"""Pictures of merged groups: source map, colours, borders and report, for any prefix, any grid and several layers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import numpy
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import fpet
import fpet_kernels as fk
from fpet.visualization import _draw, _recording, distinct_colours, sheet

TINY = dict(img_size=(32, 48), patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=5)  # 4×6 patches
MODELS = {
    "class token": ("vit_tiny_patch16_224", {}, 1),
    "class and distillation token": ("deit_tiny_distilled_patch16_224", {}, 2),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, 5),
    "no prefix, map pooling": ("vit_base_patch16_siglip_224", {}, 0),
    "rotary, odd grid": ("vit_small_patch16_dinov3", {"img_size": (40, 56)}, 5),  # 5×7 patches
    "keys inside the block": ("vit_tiny_patch16_224", {"block_fn": "parallel"}, 1),
}


def build(name: str = "vit_tiny_patch16_224", **arguments: object) -> nn.Module:
    if arguments.get("block_fn") == "parallel":
        from timm.models.vision_transformer import ParallelScalingBlock

        arguments["block_fn"] = ParallelScalingBlock
    torch.manual_seed(0)
    model = timm.create_model(name, **(TINY | arguments)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() == 1 else 0.2))
    return model


def image(height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def picture(width: int = 60, height: int = 50) -> Image.Image:
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def seen_merges(model: nn.Module, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """(key, split, match) of every bdm_merge that one forward makes, without refinement."""
    seen, right = [], fk.bdm_merge

    def spy(x: torch.Tensor, key: torch.Tensor, **options: object) -> fk.Merged:
        merged = right(x, key, **options)
        grid = options.get("grid_size")
        seen.append((key, options.get("split") or fk.checkerboard(*grid), merged.match))
        return merged

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr("fpet.vit.merging.bdm_merge", spy)
        model(x)
    return seen


@pytest.mark.parametrize("layers", [(1,), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_map_and_report_follow_every_match(family: str, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    name, arguments, prefix = MODELS[family]
    model = fpet.apply(build(name, **arguments), layer=layers)
    x = image(*arguments.get("img_size", (32, 48)))
    grid = [x.shape[1] // 8, x.shape[2] // 8]
    found = fpet.visualize(model, x)
    merges = seen_merges(model, x[None], monkeypatch)

    group = list(range(grid[0] * grid[1]))  # of every patch, followed match by match
    for _, split, match in merges:
        new = {int(b): i for i, b in enumerate(split.b)}
        new |= {int(a): int(m) - prefix for a, m in zip(split.a, match[0], strict=True)}
        group = [new[g] for g in group]
    assert found.source_map.shape == tuple(grid) and found.source_map.dtype == torch.int64
    assert found.source_map.flatten().tolist() == group

    report = json.loads(json.dumps(found.report))
    assert report["grid"] == grid and report["prefix_tokens"] == prefix
    counts = [group.count(g) for g in range(report["groups"])]
    assert report["groups"] == merges[-1][1].b.numel() and 0 not in counts
    assert report["group_sizes"] == {str(size): counts.count(size) for size in sorted(set(counts))}
    assert report["largest_group"] == max(counts)
    assert [m["layer"] for m in report["merges"]] == list(layers)
    pairs = []
    for (key, split, match), merge in zip(merges, report["merges"], strict=True):
        key = key[0].double().mean(0)
        here = torch.stack(
            [
                torch.cosine_similarity(key[a + prefix], key[split.b[m - prefix] + prefix], dim=0)
                for a, m in zip(split.a.tolist(), match[0].tolist(), strict=True)
            ]
        )
        others = [torch.cosine_similarity(key[a + prefix], key[b + prefix], dim=0) for a in split.a for b in split.b]
        assert (merge["tokens"], merge["left"]) == (key.shape[0], prefix + split.b.numel())
        assert merge["mean_similarity"] == pytest.approx(here.mean().item(), abs=1e-5)
        assert merge["min_similarity"] == pytest.approx(here.min().item(), abs=1e-5)
        assert merge["mean_of_all_pairs"] == pytest.approx(torch.stack(others).mean().item(), abs=1e-5)
        pairs.append(here)
    assert report["mean_similarity"] == pytest.approx(torch.cat(pairs).mean().item(), abs=1e-5)


def test_similarity_is_that_of_the_refined_key_and_of_the_measure_in_use() -> None:
    model = fpet.apply(build(), layer=1, refinement={"scale": 3.0})
    cosine = fpet.visualize(model, image())
    plain = fpet.visualize(fpet.apply(model, layer=1, refinement=False), image())
    assert cosine.report["mean_similarity"] != plain.report["mean_similarity"]
    dot = fpet.visualize(fpet.apply(model, layer=1, similarity="dot"), image())
    assert dot.report["similarity"] == "dot" and cosine.report["similarity"] == "cosine"
    # every source takes the best destination there is, so no other choice beats the mean
    for found in (cosine, plain, dot):
        assert found.report["mean_similarity"] > found.report["merges"][0]["mean_of_all_pairs"]


def test_colours_are_the_means_of_groups_and_borders_lie_between_them() -> None:
    model = fpet.apply(build(), layer=(0, 1))
    x = image()
    found = fpet.visualize(model, x, mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.1), zoom=1, border=None, colours="mean")
    drawn = numpy.asarray(found.picture).astype(int)
    assert drawn.shape == (32, 48, 3)
    shown = x * torch.tensor([0.5, 0.2, 0.1])[:, None, None] + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    groups = found.source_map.repeat_interleave(8, 0).repeat_interleave(8, 1)
    for g in range(found.report["groups"]):
        mean = shown.clamp(0, 1)[:, groups == g].mean(1) * 255
        assert (abs(drawn[(groups == g).numpy()] - mean.numpy()) <= 0.51).all()

    lined = numpy.asarray(fpet.visualize(model, x, zoom=3, border=(255, 0, 1)).picture)
    assert lined.shape == (96, 144, 3)
    line = (lined == (255, 0, 1)).all(-1)
    same = found.source_map[:, 1:] == found.source_map[:, :-1]
    for row, col in numpy.ndindex(4, 5):  # between a patch and its right neighbour, off the corners
        assert line[row * 24 + 12, (col + 1) * 24] == (not same[row, col])
    assert not line[12::24, 12::24].any(), "the middle of a patch is no border"


def test_every_group_has_a_colour_of_its_own() -> None:
    model = fpet.apply(build(), layer=1)
    found = fpet.visualize(model, image(), zoom=1, border=None, opacity=1.0)
    drawn = numpy.asarray(found.picture)[4::8, 4::8].reshape(-1, 3)
    pairs = {(int(g), tuple(map(int, colour))) for g, colour in zip(found.source_map.flatten(), drawn, strict=True)}
    assert len(pairs) == len({colour for _, colour in pairs}) == found.report["groups"]
    assert len({tuple(c) for c in distinct_colours(400).mul(255).round().int().tolist()}) == 400


def test_a_sheet_has_the_original_beside_its_groups_in_its_own_aspect_ratio() -> None:
    model = fpet.apply(build(), layer=(0, 1))
    photo = picture(90, 30)
    page = sheet(fpet.visualize(model, photo, zoom=4), photo)
    assert page.size == (2 * 192 + 24, 64 + 24 + 3 * 18)
    left, right = (numpy.asarray(page.crop((8 + i * 200, 8, 8 + i * 200 + 192, 72))) for i in (0, 1))
    assert numpy.array_equal(left, numpy.asarray(photo.resize((192, 64), Image.Resampling.BICUBIC)))
    assert not numpy.array_equal(left, right)
    assert (numpy.asarray(page)[72:] < 128).any(), "there is a caption"


def test_opacity_mixes_groups_into_the_image() -> None:
    model = fpet.apply(build(), layer=1)
    options = dict(mean=(0, 0, 0), std=(1, 1, 1), zoom=1, border=None, colours="mean")
    x = image().abs()
    clear, half, full = (
        numpy.asarray(fpet.visualize(model, x, opacity=o, **options).picture).astype(int) for o in (0.0, 0.5, 1.0)
    )
    assert (abs(clear - (x * 255).permute(1, 2, 0).numpy()) <= 0.51).all()
    assert (abs(half - (clear + full) / 2) <= 1).all() and not (clear == full).all()


def test_pictures_are_resized_whole_and_normalised_as_the_model_wants() -> None:
    model = fpet.apply(build(), layer=1)
    photo = picture()
    found = fpet.visualize(model, photo, zoom=1)
    assert found.picture.size == (48, 32)
    pixels = torch.from_numpy(numpy.array(photo.resize((48, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
    cfg = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(cfg[k])[:, None, None] for k in ("mean", "std"))
    same = fpet.visualize(model, (pixels - mean) / std, zoom=1)
    assert torch.equal(same.source_map, found.source_map)
    assert abs(numpy.asarray(same.picture).astype(int) - numpy.asarray(found.picture)).max() <= 1
    raw = fpet.visualize(model, photo, mean=(0, 0, 0), std=(1, 1, 1), zoom=1)
    assert torch.equal(fpet.visualize(model, pixels).source_map, raw.source_map)
    assert fpet.visualize(model, photo.convert("L")).report["grid"] == [4, 6]


@pytest.mark.parametrize("size", [(24, 64), (29, 50)])
def test_models_with_a_grid_of_their_input(size: tuple[int, int]) -> None:
    """Also where the last patches hang over the edge of the image."""
    model = fpet.apply(build(dynamic_img_size=True, dynamic_img_pad=True), layer=1)
    found = fpet.visualize(model, image(*size), zoom=1)
    grid = (-(-size[0] // 8), -(-size[1] // 8))
    assert tuple(found.source_map.shape) == grid and found.picture.size == size[::-1]


def test_the_edge_without_a_patch_counts_as_the_last_one() -> None:
    pixels = torch.zeros(3, 5, 7)
    pixels[0, :, 6] = 1.0
    drawn = numpy.asarray(_draw(pixels, torch.tensor([[0, 1], [2, 3]]), (2, 3), 1, 1.0, None))
    assert drawn.shape == (5, 7, 3)
    assert drawn[0, 3, 0] == drawn[0, 6, 0] == round(255 / 4) and drawn[0, 0, 0] == 0


def test_prompts_are_prefix_tokens() -> None:
    model = build()
    fpet.add_adapters(model, "vpt-deep", hidden_dim=3)
    found = fpet.visualize(fpet.apply(model.eval(), layer=1), image())
    assert found.report["prefix_tokens"] == 4 and found.report["grid"] == [4, 6]


def test_the_model_is_left_as_it_was() -> None:
    model = fpet.apply(build(), layer=(0, 2), refinement=True).eval()
    with torch.no_grad():
        before = model(image()[None])
        state = {k: v.clone() for k, v in model.state_dict().items()}
        first = fpet.visualize(model, image())
        assert torch.equal(fpet.visualize(model, image()).source_map, first.source_map)
        assert torch.equal(model(image()[None]), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError), _recording(model):
        raise RuntimeError
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_other_threads_merges_are_not_recorded() -> None:
    model = fpet.apply(build(), layer=1)
    with _recording(model) as notes, torch.no_grad():
        other = threading.Thread(target=model, args=(image()[None],))
        other.start()
        other.join()
        assert notes == []
        model(image()[None])
        assert len(notes) == 1


def test_wrapped_model_other_dtype() -> None:
    model = fpet.apply(build().double(), layer=1)
    found = fpet.visualize(nn.Sequential(model), image())
    assert torch.equal(found.source_map, fpet.visualize(model.float(), image()).source_map)


@pytest.fixture(scope="module")
def merging() -> Iterator[nn.Module]:
    yield fpet.apply(build(), layer=1)


WRONG = {
    "image: expected shape": (ValueError, (torch.zeros(2, 3, 32, 48),), {}),
    "image: expected shape (3, H, W)": (ValueError, (torch.zeros(1, 32, 48),), {}),
    "image: expected a floating-point": (TypeError, (torch.zeros(3, 32, 48, dtype=torch.uint8),), {}),
    "image: expected a PIL image": (TypeError, ("photo.png",), {}),
    "zoom": (ValueError, (image(),), {"zoom": 0}),
    "colours": (ValueError, (image(),), {"colours": "grey"}),
    "opacity": (ValueError, (image(),), {"opacity": 1.5}),
    "border": (ValueError, (image(),), {"border": (0, 0, 256)}),
    "mean": (ValueError, (image(),), {"mean": (0.5,)}),
    "std: expected three positive": (ValueError, (image(),), {"std": (1, 1, 0)}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message: str, merging: nn.Module) -> None:
    kind, args, options = WRONG[message]
    with pytest.raises(kind) as raised:
        fpet.visualize(merging, *args, **options)
    assert message in str(raised.value)


def test_models_that_do_not_merge_are_refused() -> None:
    model = build()
    with pytest.raises(TypeError, match=r"model: expected a model patched by fpet\.apply"):
        fpet.visualize(model, image())
    with pytest.raises(ValueError, match="merges somewhere"):
        fpet.visualize(fpet.apply(model), image())
    with pytest.raises(ValueError, match="evaluation mode"):
        fpet.visualize(fpet.apply(model, layer=1).train(), image())
    with pytest.raises(TypeError, match="Linear"):
        fpet.visualize(nn.Linear(2, 2), image())
