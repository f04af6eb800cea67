"""Seeing what a model merges: :func:`visualize`, and the command ``fpet visualize IMAGE --model NAME``."""

from __future__ import annotations

import argparse
import colorsys
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from fpet_kernels.reference import average_heads, compute_dtype, match_scores, refine_key

from .data import read_image
from .vit.merging import MergeStep
from .vit.models import merged_features
from .vit.patch import find_model

__all__ = ["Visualization", "visualize"]


class Visualization(NamedTuple):
    """What :func:`visualize` returns.

    Attributes:
        picture: the image, every group of merged patches in a colour, outlined.
        source_map: (H, W) int64 on the CPU, over the patch grid: the number of each patch's group, in range(groups). Groups
            are numbered as their tokens are ordered in the last block, prefix tokens not counted.
        report: what can be said in numbers, all of it JSON: ``grid`` [H, W]; ``prefix_tokens``; ``groups``;
            ``group_sizes``, how many groups there are of each number of patches; ``largest_group`` in patches;
            ``similarity``, the measure ("cosine" or "dot"); ``mean_similarity`` of all merged pairs; and ``merges``, for
            each merging block its ``layer``, ``tokens`` before, tokens ``left``, ``mean_similarity`` and ``min_similarity``
            of its pairs and, to compare, ``mean_of_all_pairs`` that could have been merged there.
    """

    picture: Image.Image
    source_map: Tensor
    report: dict[str, Any]


@dataclass
class _Recorded:
    """A merge step that also notes how similar the merged pairs were."""

    step: MergeStep
    layer: int
    notes: list[tuple[dict[str, Any], Tensor]]

    def merge(self, x: Tensor, key: Tensor, refinement: Any) -> Any:
        merged = self.step.merge(x, key, refinement)
        batch, n = x.shape[:2]
        weights = None if refinement is None else refinement.weights(batch, n)
        w_down, w_up, scale, mask = (None, None, 1.0, None) if weights is None else weights
        keys = average_heads(key, compute_dtype(x, key, w_down))
        refined = refine_key(keys, w_down, w_up, scale, mask, None)
        split: Any = self.step.split
        prefix = n - split.num_tokens
        a, b = split.on(x.device)
        scores = match_scores(refined, a, b, prefix, self.step.similarity)
        pairs = scores.gather(-1, merged.match[..., None] - prefix)
        note = {
            "layer": self.layer, "tokens": n, "left": merged.tokens.shape[1], "mean_similarity": pairs.mean().item(),
            "min_similarity": pairs.min().item(), "mean_of_all_pairs": scores.mean().item(),
        }  # fmt: skip
        self.notes.append((note, pairs.flatten()))
        return merged


@contextmanager
def _recording(inner: Any) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """Notes of every merge that this thread makes in ``inner`` meanwhile; other threads' forwards go on unnoticed."""
    notes: list[tuple[dict[str, Any], Tensor]] = []
    thread = threading.get_ident()

    def hook_of(layer: int) -> Any:
        def hook(_block: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() != thread or kwargs.get("merge") is None:
                return None
            return args, {**kwargs, "merge": _Recorded(kwargs["merge"], layer, notes)}

        return hook

    handles = [inner.blocks[i].register_forward_pre_hook(hook_of(i), with_kwargs=True) for i in inner.fpet_config.layers]
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def visualize(
    model: nn.Module,
    image: Image.Image | Tensor,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    zoom: int = 2,
    colours: str = "distinct",
    opacity: float | None = None,
    border: tuple[int, int, int] | None = (255, 255, 255),
) -> Visualization:
    """Shows which patches of an image the model has merged in the end, through all its merging layers.

    Runs the model once, in evaluation mode, as it is: on its device, in its dtype. The model is left as it was.

    Args:
        model: what :func:`fpet.apply` returned with at least one layer, or a wrapper of it.
        image: a picture, which is resized to the model's input size as a whole (bicubic, the aspect is not kept) and
            normalised; or a tensor (3, H, W) or (1, 3, H, W), which goes into the model as it is.
        mean, std: three numbers each for red, green and blue in [0, 1]: what the model's input is normalised with. None
            takes the model's own (``pretrained_cfg``). A model tuned on images without normalisation wants (0, 0, 0) and
            (1, 1, 1).
        zoom: pixels of the picture for one of the model's input, along each side.
        colours: "distinct", a colour of its own for each group, as Fig. A3 of the paper has it; or "mean", that of its pixels.
        opacity: of the groups' colours over the image, 0 to 1; None: 0.6 for distinct ones, 1 for means.
        border: red, green and blue of the outlines, 0 to 255 each; None draws none.

    Returns:
        :class:`Visualization`: ``picture``, ``source_map``, ``report``.

    Raises:
        TypeError: the model is not patched, or the image is neither picture nor tensor. ValueError: the model merges
            nowhere or is in training mode, or another argument's value.
    """
    inner: Any = find_model(model)
    config = getattr(inner, "fpet_config", None)
    if config is None:
        raise TypeError(f"model: expected a model patched by fpet.apply, got {type(inner).__name__}")
    if not config.layers:
        raise ValueError("model: expected a model that merges somewhere, got one with layer=None: fpet.apply(model, layer=…)")
    if inner.training:
        raise ValueError("model: expected evaluation mode, as dropout would change the groups: model.eval()")
    if isinstance(zoom, bool) or not isinstance(zoom, int) or zoom < 1:
        raise ValueError(f"zoom: expected a positive integer, got {zoom!r}")
    if colours not in ("distinct", "mean"):
        raise ValueError(f"colours: expected 'distinct' or 'mean', got {colours!r}")
    opacity = (0.6 if colours == "distinct" else 1.0) if opacity is None else opacity
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number from 0 to 1, got {opacity!r}")
    if border is not None and (len(border) != 3 or not all(0 <= value <= 255 for value in border)):
        raise ValueError(f"border: expected None or three numbers from 0 to 255, got {border!r}")
    shift, spread = _normalisation(inner, mean, std)
    tensor, pixels = _input(inner, image, shift, spread)

    with _recording(inner) as notes:
        found = merged_features(model, tensor)
    height, width = (int(side) for side in inner.patch_embed.dynamic_feat_size(tuple(tensor.shape[-2:])))
    prefix = found.source.shape[1] - height * width
    source_map = (found.source[0, prefix:] - prefix).reshape(height, width).cpu()

    sizes = torch.bincount(source_map.flatten(), minlength=found.tokens.shape[1] - prefix)
    report = {
        "grid": [height, width],
        "prefix_tokens": prefix,
        "groups": sizes.numel(),
        "group_sizes": {size: int(count) for size, count in enumerate(torch.bincount(sizes)) if count},
        "largest_group": int(sizes.max()),
        "similarity": config.similarity,
        "mean_similarity": torch.cat([pairs for _, pairs in notes]).mean().item(),
        "merges": [note for note, _ in notes],
    }
    ratio = inner.patch_embed.feat_ratio(as_scalar=False)
    palette = distinct_colours(sizes.numel()) if colours == "distinct" else None
    return Visualization(_draw(pixels, source_map, ratio, zoom, opacity, border, palette), source_map, report)


def distinct_colours(count: int) -> Tensor:
    """(count, 3) in [0, 1]: hues a golden section apart, so that neighbours in number differ much, in three shades."""
    shades = ((0.85, 0.95), (0.55, 0.85), (0.95, 0.65))
    return torch.tensor([colorsys.hsv_to_rgb(i * 0.618034 % 1, *shades[i % 3]) for i in range(count)])


def sheet(found: Visualization, original: Image.Image) -> Image.Image:
    """``original`` and its groups side by side in its own aspect ratio, with a caption of layers and counts below.

    Args:
        found: what :func:`visualize` returned for it. original: what the model saw, whole.
    """
    scale = max(found.picture.size) / max(original.size)
    size = (max(1, round(original.width * scale)), max(1, round(original.height * scale)))
    panels = (
        original.convert("RGB").resize(size, Image.Resampling.BICUBIC),
        found.picture.resize(size, Image.Resampling.BICUBIC),
    )
    # In ASCII: the font that Pillow carries lacks arrows and the multiplication sign.
    lines = [f"layer {m['layer']}: {m['tokens']} tokens to {m['left']}" for m in found.report["merges"]]
    height, width = found.report["grid"]
    lines.append(
        f"{height} x {width} patches in {found.report['groups']} groups, the largest of {found.report['largest_group']}"
    )
    gap, row = 8, 18
    page = Image.new("RGB", (max(2 * size[0] + 3 * gap, 360), size[1] + 3 * gap + row * len(lines)), "white")
    for i, panel in enumerate(panels):
        page.paste(panel, (gap + i * (size[0] + gap), gap))
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        draw.text((gap, size[1] + 2 * gap + i * row), line, fill="black", font=ImageFont.load_default(14))
    return page


def _normalisation(inner: Any, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """(3, 1, 1) each, float32."""
    from timm.data import resolve_model_data_config

    own = resolve_model_data_config(inner)
    pair = []
    for name, given in (("mean", mean), ("std", std)):
        values = own[name] if given is None else given
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name}: expected three {'positive ' if name == 'std' else ''}numbers, got {values!r}")
        pair.append(torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1))
    return pair[0], pair[1]


def _input(inner: Any, image: Any, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """The model's input (1, 3, H, W), and the same as (3, H, W) float32 in [0, 1] on the CPU."""
    like = next(p for p in inner.patch_embed.parameters() if p.is_floating_point())
    if isinstance(image, Image.Image):
        size = inner.patch_embed.img_size
        if size is None:  # the model takes what comes, in whole patches
            ratios = inner.patch_embed.feat_ratio(as_scalar=False)
            size = [max(2, round(side / r)) * r for side, r in zip((image.height, image.width), ratios, strict=True)]
        resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(resized)).permute(2, 0, 1).float() / 255
        tensor = ((pixels - mean) / std)[None]
    elif isinstance(image, Tensor):
        tensor = image[None] if image.dim() == 3 else image
        if tensor.dim() != 4 or tuple(tensor.shape[:2]) != (1, 3):
            raise ValueError(f"image: expected shape (3, H, W) or (1, 3, H, W), got {tuple(image.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"image: expected a floating-point tensor, normalised for the model, got {image.dtype}")
        pixels = (tensor[0].float().cpu() * std + mean).clamp(0, 1)
    else:
        raise TypeError(f"image: expected a PIL image or a torch.Tensor, got {type(image).__name__}")
    return tensor.to(like.device, like.dtype), pixels


def _draw(
    pixels: Tensor, source_map: Tensor, ratio: tuple[int, int], zoom: int, opacity: float,
    border: tuple[int, int, int] | None, palette: Tensor | None = None,
) -> Image.Image:  # fmt: skip
    """``pixels`` (3, H, W), each drawn towards its group's colour in ``palette``, or its mean colour; ``ratio``: pixels of a
    patch, down and across."""
    height, width = pixels.shape[1:]
    # A last patch may be cut off by the image's edge, or the edge left without a patch: the nearest one counts.
    rows = (torch.arange(height) // ratio[0]).clamp(max=source_map.shape[0] - 1)
    columns = (torch.arange(width) // ratio[1]).clamp(max=source_map.shape[1] - 1)
    groups = source_map[rows[:, None], columns]
    flat, colours = groups.flatten(), pixels.flatten(1).T
    count = int(flat.max()) + 1
    total = colours.new_zeros(count, 3).index_add_(0, flat, colours)
    means = palette if palette is not None else total / torch.bincount(flat, minlength=count).clamp(min=1)[:, None]
    mixed = torch.lerp(colours, means[flat], opacity).reshape(height, width, 3)
    mixed, groups = (t.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1) for t in (mixed, groups))
    drawn = (mixed * 255).round().to(torch.uint8)
    if border is not None:
        edge = torch.zeros_like(groups, dtype=torch.bool)
        edge[1:] |= groups[1:] != groups[:-1]
        edge[:, 1:] |= groups[:, 1:] != groups[:, :-1]
        drawn[edge] = torch.tensor(border, dtype=torch.uint8)
    return Image.fromarray(drawn.numpy())


# --- the command -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fpet visualize``."""
    add = parser.add_argument
    add("image", metavar="IMAGE", help="any picture that Pillow opens")
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--run", metavar="RUN", help="folder of a run of fpet train; or")
    whose.add_argument("--model", metavar="NAME", help="of timm: vit_base_patch16_224, …")
    add("--layer", type=_layers, metavar="N[,N…]", help="0-based blocks that merge; default: the checkpoint's, or the middle")
    add("--pretrained", action="store_true", help="timm's pretrained weights, downloaded where they are not there yet")
    add("--weights", metavar="FILE", help="weights of the backbone from a file that timm can read")
    add("--checkpoint", metavar="FILE", help="what was tuned, as fpet.save wrote it; its merging layers are taken")
    add("--image-size", type=_size, metavar="H[,W]", help="pixels of the model's input; default: the model's own")
    add("--similarity", choices=("cosine", "dot"), help="cosine (default): as the authors' code; dot: as the paper prints")
    add("--no-normalize", action="store_true", help="pixels in [0, 1] go in as they are, as in the recipe of the paper")
    add("--zoom", type=int, default=2, metavar="N", help="pixels of the picture per pixel of the input; default 2")
    add("--colours", choices=("distinct", "mean"), default="distinct", help="of the groups: distinct (default), or their means")
    add("--opacity", type=float, metavar="X", help="of the groups over the image, 0 to 1; default 0.6, for means 1")
    add("--groups-only", action="store_true", help="the groups alone, without the original beside them and the caption")
    add("--device", default="cpu", help="cpu (default), cuda, …")
    add("--out", metavar="FILE", help="the picture; default: IMAGE's name with -groups.png, in the current folder")
    add("--overwrite", action="store_true", help="a picture that is there")
    add("--json", action="store_true", help="print report and source map as JSON")


def _integers(text: str, what: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}") from None


def _layers(text: str) -> tuple[int, ...]:
    return _integers(text, "block indices separated by commas")


def _size(text: str) -> tuple[int, int]:
    sides = _integers(text, "one or two numbers of pixels, separated by a comma")
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"expected one or two positive numbers of pixels, got {text!r}")
    return sides[0], sides[-1]


def run(options: argparse.Namespace) -> int:
    """``fpet visualize``: writes the picture, prints the report; returns the exit status."""
    out = Path(options.out or f"{Path(options.image).stem}-groups.png")
    if out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out: expected a name that ends like a picture's (.png, .jpg, …), got {out}")
    if out.resolve() == Path(options.image).resolve():
        raise ValueError(f"--out: expected another file than IMAGE, got {out} for both")
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"--out: {out} is there already; give another name, or add --overwrite")
    image = read_image(options.image)
    settings: dict[str, Any] = {"zoom": options.zoom, "opacity": options.opacity, "colours": options.colours}
    if options.run is not None:
        shown: Any
        model, shown, prepared = _of_run(options, image)
        settings |= {"mean": prepared.mean, "std": prepared.std}
    else:
        model, shown = _build(options), image
        if options.no_normalize:
            settings |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    model = model.eval().to(options.device)
    found = visualize(model, shown, **settings)
    if isinstance(shown, Tensor) and prepared.crop_mode != "squash":  # the model saw a part of the image
        image = visualize(model, shown, **settings | {"opacity": 0.0, "border": None}).picture
    (found.picture if options.groups_only else sheet(found, image)).save(out)
    if options.json:
        print(json.dumps({**found.report, "source_map": found.source_map.tolist(), "picture": str(out)}))
        return 0
    print("\n".join(_lines(found.report)))
    if not (options.pretrained or options.weights or options.run):
        print("The backbone's weights are random: groups follow colours at best. See --pretrained and --weights.")
    print(f"picture: {out}")
    return 0


def _of_run(options: argparse.Namespace, image: Image.Image) -> tuple[nn.Module, Tensor, Any]:
    """A run's model, its input made of ``image`` as in evaluation, and how it was made."""
    from .data.preprocessing import Preprocessing
    from .files.modelfile import read_file
    from .train.build import load_run
    from .train.folder import MODEL

    given = [name for name in ("layer", "weights", "checkpoint", "image_size", "similarity") if getattr(options, name)]
    if given or options.pretrained or options.no_normalize:
        raise ValueError("--run: it says all about its model; give none of --layer, --weights, --checkpoint, …")
    loaded = load_run(options.run)
    inner: Any = find_model(loaded.model)
    if getattr(inner, "fpet_config", None) is None or not inner.fpet_config.layers:
        raise ValueError(f"--run: {options.run} merges nothing")
    prepared = Preprocessing.from_dict(read_file(Path(options.run) / MODEL)[0]["preprocessing"])
    return loaded.model, loaded.transform(image), prepared


def _build(options: argparse.Namespace) -> nn.Module:
    """The model that the options ask for, merging."""
    import timm

    from .files.saving import load
    from .vit.patch import apply

    arguments: dict[str, Any] = {"img_size": options.image_size} if options.image_size else {}
    if options.weights:
        if options.pretrained:
            raise ValueError("--pretrained, --weights: expected one of them, got both")
        if not Path(options.weights).is_file():
            raise FileNotFoundError(f"--weights: expected a file, got {options.weights}, which is none")
        # As a pretrained file, position embeddings are resized to the image size.
        arguments["pretrained_cfg_overlay"] = {"file": options.weights}
    model = timm.create_model(options.model, pretrained=options.pretrained or bool(options.weights), **arguments)
    if options.checkpoint:
        load(model, options.checkpoint)
        if getattr(model, "fpet_config", None) is not None and model.fpet_config.layers:
            if options.layer or options.similarity:
                raise ValueError(
                    f"--layer, --similarity: expected neither, as {options.checkpoint} merges at "
                    f"{list(model.fpet_config.layers)} by {model.fpet_config.similarity} similarity"
                )
            return model
    inner: Any = model
    layers = options.layer or (len(getattr(inner, "blocks", ())) // 2,)
    return apply(model, layers, similarity=options.similarity or "cosine")


def _lines(report: dict[str, Any]) -> list[str]:
    height, width = report["grid"]
    sizes = report["group_sizes"]
    cells = [(str(size), str(count)) for size, count in sizes.items()]
    widths = [max(map(len, cell)) for cell in cells]
    lines = [f"{height}×{width} patches in {report['groups']} groups, the largest of {report['largest_group']}"]
    for name, i in (("patches", 0), ("groups", 1)):
        lines.append(f"  {name:<8}" + "".join(f"  {cell[i]:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    for merge in report["merges"]:
        mean, low, others = (merge[name] for name in ("mean_similarity", "min_similarity", "mean_of_all_pairs"))
        lines.append(
            f"  layer {merge['layer']}: {merge['tokens']} tokens → {merge['left']}; {report['similarity']} similarity "
            f"of merged pairs {mean:.3f}, lowest {low:.3f}, of all pairs {others:.3f}"
        )
    return lines
