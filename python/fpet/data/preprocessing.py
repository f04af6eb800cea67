"""What is done to an image before a model sees it: :class:`Preprocessing`, as timm's configuration of the model has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision.transforms import Compose

from .images import NORMALIZATIONS, to_rgb

__all__ = ["Preprocessing", "input_channels"]


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input, in evaluation.

    Attributes:
        size: (height, width) in pixels. crop_pct: the part of the resized image's side that is kept. crop_mode: "center",
            "squash" or "border". interpolation: "bicubic", "bilinear" and so on. mean, std: per channel, of values in [0, 1].
        channels: of the input.
    """

    size: tuple[int, int]
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: int = 3

    @classmethod
    def of(cls, model: Any) -> Preprocessing:
        """What timm knows about the model; its size is that which the model was built for."""
        known = resolve_model_data_config(model)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or known["input_size"][1:]
        channels = input_channels(model) or int(known["input_size"][0])
        mean, std = ([float(v) for v in known[name]] for name in ("mean", "std"))
        if len(mean) != channels:  # timm makes such a model of one for RGB
            mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
        return cls(
            size=(int(size[0]), int(size[1])), crop_pct=float(known["crop_pct"]), crop_mode=str(known["crop_mode"]),
            interpolation=str(known["interpolation"]), mean=tuple(mean), std=tuple(std), channels=channels,
        )  # fmt: skip

    @classmethod
    def squashed(cls, size: int, normalization: str = "none") -> Preprocessing:
        """That of :func:`fpet.data.image_transform`: the whole image as a square, of whatever aspect ratio it was."""
        mean, std = NORMALIZATIONS[normalization] or ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        return cls((size, size), crop_pct=1.0, crop_mode="squash", interpolation="bicubic", mean=mean, std=std)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From what :meth:`asdict` made, JSON's lists in place of tuples included.

        Raises:
            ValueError: a field that there is not, or one missing.
        """
        try:
            fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"preprocessing: expected the fields of Preprocessing, got {dict(values)!r}: {error}") from error

    def asdict(self) -> dict[str, Any]:
        """Its fields by name, as JSON can hold them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def transform(self, *, training: bool = False, **augmentation: Any) -> Any:
        """From a PIL image of any mode to a tensor (channels, height, width), by timm's ``create_transform``.

        Args:
            training: with random crops and flips. augmentation: more of create_transform's arguments, such as
                ``auto_augment="rand-m9-mstd0.5"`` or ``re_prob=0.25``; the defaults are timm's.
        """
        found = create_transform(
            input_size=(self.channels, *self.size), is_training=training, interpolation=self.interpolation, mean=self.mean,
            std=self.std, crop_pct=self.crop_pct, crop_mode=self.crop_mode, **augmentation,
        )  # fmt: skip
        return Compose([_Channels(self.channels), found])


class _Channels:
    """A PIL image with as many channels as the model wants: 3, read as all commands do, or 1, grey."""

    def __init__(self, channels: int) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, which images have, got {channels}")
        self.channels = channels

    def __call__(self, image: Any) -> Any:
        return to_rgb(image) if self.channels == 3 else to_rgb(image).convert("L")


def input_channels(model: Any) -> int | None:
    """Of the first convolution behind the images, or None where there is none."""
    embed = getattr(model, "patch_embed", None)
    return None if embed is None else next((m.in_channels for m in embed.modules() if isinstance(m, nn.Conv2d)), None)
