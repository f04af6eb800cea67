"""One reader for all image files: every mode is as bright as 8-bit RGB, upright, and a damaged file is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpet.data import UnreadableImage, read_image, to_rgb

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))


def written(path: Path, image: Image.Image, **options: object) -> np.ndarray:
    image.save(path, **options)
    found = read_image(path)
    assert found.mode == "RGB"
    return np.asarray(found).astype(float)


def grey(dtype: str, top: float) -> Image.Image:
    return Image.fromarray((RAMP * top).astype(dtype))


@pytest.mark.parametrize(
    ("name", "dtype", "top"),
    [
        ("8.png", "uint8", 255), ("16.png", "uint16", 65535), ("16.tif", "uint16", 65535), ("32.tif", "int32", 65535),
        ("unit.tif", "float32", 1.0), ("byte.tif", "float32", 255.0), ("word.tif", "float32", 65535.0),
    ],
)  # fmt: skip
def test_every_depth_is_as_bright_as_eight_bits(tmp_path: Path, name: str, dtype: str, top: float) -> None:
    found = written(tmp_path / name, grey(dtype, top))
    np.testing.assert_allclose(found, np.repeat((RAMP * 255)[..., None], 3, axis=2), atol=1.01)


def test_big_endian_sixteen_bits() -> None:
    image = Image.fromarray((RAMP * 65535).astype(">u2"))
    np.testing.assert_allclose(np.asarray(to_rgb(image))[..., 1], RAMP * 255, atol=1.01)


@pytest.mark.parametrize("values", [np.array([[-1.0, 0.5]]), np.array([[0.0, 1e6]]), np.array([[0.0, np.nan]])])
def test_values_of_no_known_range_are_refused_by_name(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype("float32")).save(tmp_path / "odd.tif")
    with pytest.raises(UnreadableImage, match=r"odd\.tif.*expected float values in \[0, 1\]"):
        read_image(tmp_path / "odd.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparent_pixels_are_white_whatever_lies_under_them(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    options = {}
    if mode == "P":
        image = image.quantize(8)
    elif mode in ("RGB", "L"):  # one colour of the file is transparent
        image = Image.new(mode, (4, 2), "black")
        image.paste(255, (1, 0, 4, 2)) if mode == "L" else image.paste((200, 0, 0), (1, 0, 4, 2))
        options = {"transparency": 0 if mode == "L" else (0, 0, 0)}
    else:
        image = image.convert(mode)
    found = written(tmp_path / f"{mode}.png", image, **options)
    assert (found[0, 0] == 255).all(), "transparent"
    expected = {"LA": (60, 60, 60), "L": (255, 255, 255)}.get(mode, (200, 0, 0))
    np.testing.assert_allclose(found[1, 2], expected, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """A picture whose corner is red, stored turned or mirrored, is shown with the corner where it was."""
    upright = Image.new("RGB", (6, 4), "white")
    upright.paste((255, 0, 0), (0, 0, 3, 2))
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(written(tmp_path / "turned.png", stored, exif=exif), np.asarray(upright))


def test_cmyk_palette_bilevel_lab_and_animations(tmp_path: Path) -> None:
    assert np.abs(written(tmp_path / "cmyk.tif", Image.new("CMYK", (3, 2), (0, 255, 255, 0))) - (255, 0, 0)).max() <= 1
    assert (
        np.abs(written(tmp_path / "palette.png", Image.new("RGB", (3, 2), (9, 200, 30)).quantize(4)) - (9, 200, 30)).max() <= 1
    )
    assert (written(tmp_path / "one.png", Image.new("1", (3, 2), 1)) == 255).all()
    assert np.abs(np.asarray(to_rgb(Image.new("LAB", (3, 2), (255, 128, 128)))).astype(int) - 255).max() <= 2
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    assert np.abs(written(tmp_path / "two.gif", frames[0], save_all=True, append_images=frames[1:]) - (255, 0, 0)).max() <= 1


def test_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for name, content in (("cut.png", whole[: len(whole) // 2]), ("text.png", b"no image"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableImage, match=f"{name}: can't be read as an image: ."):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImage, match=r"whole\.png: can't be read as an image: .*decompression bomb"):
        read_image(tmp_path / "whole.png")
