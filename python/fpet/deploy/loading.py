"""What the commands of this room open: a run or a model file, with what its header says, and images to try it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import image_files, read_image
from ..data.preprocessing import Preprocessing
from ..files.loading import load_model
from ..files.modelfile import read_file
from ..train.build import finished, load_run
from ..train.config import Config
from ..train.folder import MODEL
from ..train.inputs import load_data

__all__ = ["Tuned", "open_tuned", "sample_images"]


class Tuned(NamedTuple):
    """What is needed to use a tuned model.

    Attributes:
        model: in evaluation mode. transform: from a PIL image to a tensor (3, H, W). class_names: by label; numbers where the
            data had no names. preprocessing: what ``transform`` does. metadata: of the file; config: of the run, or None.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor]
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    metadata: dict[str, Any]
    config: Config | None

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.config is not None and self.config.multi_label


def open_tuned(place: str | Path, *, weights: str | None = None, device: torch.device | str = "cpu") -> Tuned:
    """A run's folder by :func:`fpet.load_run`, a file by :func:`fpet.load_model`.

    Args:
        weights: file of the backbone's weights, where it is not where the run or timm finds it.

    Raises:
        FileNotFoundError: no such place, or no finished run. ValueError: a damaged file, or another backbone.
    """
    path, config = Path(place), None
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected the folder of a run, or a model file")
    if path.is_dir():
        loaded, file = load_run(path, weights=weights), path / MODEL
        config = finished(path)
    else:
        loaded, file = load_model(path, weights), path
    header, _ = read_file(file)
    known = header.get("preprocessing")
    how = Preprocessing.of(loaded.model) if known is None else Preprocessing.from_dict(known)
    names = loaded.class_names or tuple(map(str, range(header["num_classes"])))
    return Tuned(loaded.model.to(device), loaded.transform, names, how, dict(loaded.metadata), config)


def sample_images(tuned: Tuned, places: Sequence[str] | None, count: int) -> Tensor:
    """(K, 3, H, W), K at most ``count``: the first images of ``places``, or of the test images of the run.

    Raises:
        FileNotFoundError, ValueError: there are no such images, and which option names others.
    """
    if places is not None:
        return torch.stack([tuned.transform(read_image(file)) for file in image_files(places)[:count]])
    if tuned.config is None:
        raise ValueError("--images: a model file does not say where its images are; name some")
    try:
        test = load_data(tuned.config).test
    except (OSError, ValueError) as error:
        raise ValueError(f"--images: the run's test images are not to be had ({error}); name some") from error
    return torch.stack([test[i][0] for i in range(min(count, len(test)))])
