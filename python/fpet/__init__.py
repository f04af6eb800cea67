"""FPET: faster parameter-efficient tuning by merging tokens, drop-in for timm's vision transformers.

>>> model = timm.create_model("vit_base_patch16_224", pretrained=True)
>>> fpet.apply(model, layer=6)
"""

from .adapters import AdapterConfig, add_adapters, fold, remove_adapters
from .freeze import ParameterCount, count_parameters, freeze
from .models import MergeConfig, MergedFeatures, merged_features
from .patch import apply, merged, remove
from .refinement import KeyRefinement
from .saving import import_authors, import_petl_vit, load, save
from .visualize import Visualization, visualize

__all__ = [
    "AdapterConfig",
    "KeyRefinement",
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
    "merged",
    "merged_features",
    "remove",
    "remove_adapters",
    "save",
    "visualize",
]
