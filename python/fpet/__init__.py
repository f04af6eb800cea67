"""FPET: faster parameter-efficient tuning by merging tokens, drop-in for timm's vision transformers.

>>> model = timm.create_model("vit_base_patch16_224", pretrained=True)
>>> fpet.apply(model, layer=6)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpet_kernels.version import __version__ as __version__

    from .adapters import AdapterConfig, add_adapters, fold, register_method, remove_adapters
    from .adapters.freezing import ParameterCount, count_parameters, freeze
    from .comparators import register_reduction
    from .files.loading import LoadedModel, load_model
    from .files.published import import_authors, import_petl_vit
    from .files.saving import load, save
    from .layers.refinement import KeyRefinement
    from .train.build import load_run
    from .visualization import Visualization, visualize
    from .vit.config import MergeConfig
    from .vit.models import MergedFeatures, merged_features
    from .vit.patch import apply, merged, remove

__all__ = [
    "AdapterConfig",
    "KeyRefinement",
    "LoadedModel",
    "MergeConfig",
    "MergedFeatures",
    "ParameterCount",
    "Visualization",
    "add_adapters",
    "apply",
    "count_parameters",
    "fold",
    "freeze",
    "import_authors",
    "import_petl_vit",
    "load",
    "load_model",
    "load_run",
    "merged",
    "merged_features",
    "register_method",
    "register_reduction",
    "remove",
    "remove_adapters",
    "save",
    "visualize",
]

_ROOMS = {
    ".adapters": (
        "AdapterConfig",
        "add_adapters",
        "fold",
        "register_method",
        "remove_adapters",
    ),
    ".adapters.freezing": (
        "ParameterCount",
        "count_parameters",
        "freeze",
    ),
    ".comparators": ("register_reduction",),
    ".files.published": (
        "import_authors",
        "import_petl_vit",
    ),
    ".files.loading": (
        "LoadedModel",
        "load_model",
    ),
    ".files.saving": (
        "load",
        "save",
    ),
    ".layers.refinement": ("KeyRefinement",),
    ".train.build": ("load_run",),
    ".visualization": (
        "Visualization",
        "visualize",
    ),
    ".vit.models": (
        "MergeConfig",
        "MergedFeatures",
        "merged_features",
    ),
    ".vit.patch": (
        "apply",
        "merged",
        "remove",
    ),
}
_SUBMODULES = (
    "adapters", "comparators", "data", "files", "huggingface", "layers", "measure", "retrieval", "serving", "tables", "train",
    "vit",
)  # fmt: skip
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, when it is: torch and timm take seconds, which ``fpet --help`` does not have to wait for."""
    if name == "__version__":
        value: Any = importlib.import_module("fpet_kernels.version").__version__
    elif name in _ROOM_OF:
        value = getattr(importlib.import_module(_ROOM_OF[name], __name__), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
