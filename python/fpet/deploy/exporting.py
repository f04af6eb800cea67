"""One file of a model for another runtime, checked against the model it was made from."""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpet_kernels.decompositions import inference_decompositions

from ..adapters import fold
from ..measure.timing import take_turns
from .loading import open_tuned, sample_images

__all__ = ["FORMATS", "Exported", "add_arguments", "export", "run", "runner"]

FORMATS = {
    "torch": ("exported.pt2", "torch.export's program; runs where PyTorch and fpet_kernels are"),
    "aoti": ("package.pt2", "AOTInductor's package, compiled for this machine; needs a C++ compiler to make"),
    "onnx": ("model.onnx", "standard operators only; runs in onnxruntime"),
}
"""Name of the file in a run's folder, and what it is."""

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest output, by dtype: how far rounding may move an output before the file is refused."""

LATENCY_SECONDS = 2.0


class Exported(NamedTuple):
    """What :func:`export` returns.

    Attributes:
        path, metadata: of the two files. error: largest difference of an output to the eager model's, over the largest output.
        agreement: share of the images whose best class is the eager model's. folded: whether adapters were folded in.
        eager_ms, exported_ms: median latency of one image, in turns.
    """

    path: Path
    metadata: Path
    error: float
    agreement: float
    folded: bool
    eager_ms: float
    exported_ms: float


def export(
    model: nn.Module,
    path: str | Path,
    *,
    format: str,
    images: Tensor,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Writes ``model`` as one file of ``format``, and a JSON file with ``metadata`` beside it.

    Adapters that are linear are folded into the weights. The file takes batches of any size. It is loaded again and compared
    with the model on ``images``, one by one and five at a time, before it gets its name.

    Args:
        model: on the CPU, a classifier or any model from images to one tensor. It is left as it was.
        format: a key of :data:`FORMATS`. images: (B, 3, H, W), at least one, as the model takes them; real ones, as noise
            says nothing about near ties. metadata: what a user of the file needs, such as class names and preprocessing.

    Raises:
        FileExistsError: ``path`` is there and ``overwrite`` is not set. ImportError: the format needs a missing package.
        RuntimeError: the file computes something else than the model; it is then not kept. ValueError: an argument.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images: expected (B, 3, H, W) with at least one image, got shape {tuple(images.shape)}")
    beside = path.with_suffix(path.suffix + ".json")
    for file in (path, beside):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists; remove it, choose another name, or allow to overwrite it")
    _require(format)
    path.parent.mkdir(parents=True, exist_ok=True)

    exportable = copy.deepcopy(model).eval().requires_grad_(False)
    folded = False
    with suppress(ValueError):  # no adapters, or such as are not linear
        exportable, folded = fold(exportable), True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = {0: torch.export.Dim("batch", min=1)}
        program = torch.export.export(exportable, (_repeated(images, 2),), dynamic_shapes=(batch,))
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
            made = Path(folder) / path.name
            _write(program, made, format)
            run = runner(made, format)
            eager = _eager(model)
            error, agreement = _compare(run, eager, images)
            limit = TOLERANCE.get(images.dtype, 1e-3)
            if not error <= limit:
                raise RuntimeError(
                    f"the exported model differs from the eager one by {error:.2g} of the largest output, where rounding "
                    f"explains {limit:g}; nothing was written"
                )
            one = images[:1]
            taken = take_turns({"eager": lambda: eager(one), "exported": lambda: run(one)}, one.device, LATENCY_SECONDS)
            eager_ms, exported_ms = (1e3 * statistics.median(taken[name]) for name in ("eager", "exported"))
            found = Exported(path, beside, error, agreement, folded, eager_ms, exported_ms)
            told = {
                **(metadata or {}),
                "format": format,
                "input": {"shape": ["batch", *images.shape[1:]], "dtype": str(images.dtype).removeprefix("torch.")},
                "checked": {"images": len(images), "largest_relative_error": error, "same_class": agreement},
                "latency_ms": {"eager": eager_ms, "exported": exported_ms, "threads": torch.get_num_threads()},
                "folded": folded,
                "torch": torch.__version__,
            }
            described = Path(folder) / beside.name
            described.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(described, beside)
            os.replace(made, path)
    return found


def runner(path: str | Path, format: str) -> Callable[[Tensor], Tensor]:
    """A function from images to outputs that runs a file of :func:`export`."""
    if format == "torch":
        module: Any = torch.export.load(str(path)).module()
        return lambda images: module(images)
    if format == "aoti":
        package: Any = torch._inductor.aoti_load_package(str(path))
        return lambda images: package(images)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _require(format: str) -> None:
    """Raises ImportError before any work where a package is missing."""
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            try:
                __import__(name)
            except ImportError as error:
                raise ImportError(f"format 'onnx' needs the package {name}: pip install onnx onnxscript onnxruntime") from error


def _write(program: torch.export.ExportedProgram, path: Path, format: str) -> None:
    if format == "torch":
        torch.export.save(program, str(path))
    elif format == "aoti":
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    else:
        plain = program.run_decompositions(inference_decompositions())
        with redirect_stdout(StringIO()):  # it reports every step
            made: Any = torch.onnx.export(plain, dynamo=True, input_names=["images"], output_names=["outputs"])
        made.save(str(path))


def _eager(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        training = model.training
        try:
            return model.eval()(images)  # type: ignore[no-any-return]
        finally:
            model.train(training)

    return run


def _repeated(images: Tensor, count: int) -> Tensor:
    return images[torch.arange(count) % len(images)].contiguous()


def _compare(run: Callable[[Tensor], Tensor], eager: Callable[[Tensor], Tensor], images: Tensor) -> tuple[float, float]:
    """(largest difference over the largest output, share of equal best classes), for batches of one and of five."""
    expected = torch.cat([eager(image[None]) for image in images])
    found = torch.cat([run(image[None]) for image in images])
    five = _repeated(images, 5)
    pairs = [(found, expected), (run(five), eager(five))]
    if any(a.shape != b.shape for a, b in pairs):
        raise RuntimeError(
            f"the exported model returns shape {tuple(found.shape)} where the eager one has {tuple(expected.shape)}"
        )
    error = max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)) for a, b in pairs)
    return error, float((found.argmax(-1) == expected.argmax(-1)).double().mean())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``fpet export RUN``."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a finished run, or the model file of one")
    told = "; ".join(f"{name}: {what}" for name, (_, what) in FORMATS.items())
    parser.add_argument("--format", choices=tuple(FORMATS), default="torch", help=f"{told} (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="default: in the run's folder, named after the format")
    parser.add_argument(
        "--images", nargs="+", metavar="IMAGE|FOLDER", help="images to compare on (default: the run's test images)"
    )
    parser.add_argument("--count", type=int, default=16, help="how many of them (default: %(default)s)")
    parser.add_argument("--weights", help="file of the backbone's weights, where it is not where the run found it")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(options: argparse.Namespace) -> int:
    """Prints where the file is, and how it compares."""
    if options.count < 1:
        raise ValueError(f"--count: expected at least 1, got {options.count}")
    place = Path(options.run_folder)
    loaded = open_tuned(place, weights=options.weights)
    out = Path(options.out) if options.out else (place if place.is_dir() else place.parent) / FORMATS[options.format][0]
    images = sample_images(loaded, options.images, options.count)
    found = export(
        loaded.model, out, format=options.format, images=images, overwrite=options.overwrite,
        metadata={
            "class_names": loaded.class_names, "multi_label": loaded.multi_label, "metadata": loaded.metadata,
            "preprocessing": loaded.preprocessing.asdict(),
        },
    )  # fmt: skip
    folded = "; adapters are folded in" if found.folded else ""
    print(
        f"{found.path} and {found.metadata.name}{folded}\n"
        f"compared on {len(images)} images: largest difference {found.error:.1e} of the largest output, "
        f"{100 * found.agreement:.0f} % the same class\n"
        f"one image, {torch.get_num_threads()} threads: {found.eager_ms:.1f} ms eager, {found.exported_ms:.1f} ms exported"
    )
    return 0
