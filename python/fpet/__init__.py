"""FPET: faster parameter-efficient tuning by merging tokens, drop-in for timm's vision transformers.

>>> model = timm.create_model("vit_base_patch16_224", pretrained=True)
>>> fpet.apply(model, layer=6)
"""

from .adapters import AdapterConfig, add_adapters, fold, remove_adapters
from .adapters.freezing import ParameterCount, count_parameters, freeze
from .files.saving import import_authors, import_petl_vit, load, save
from .layers.refinement import KeyRefinement
from .visualization import Visualization, visualize
from .vit.config import MergeConfig
from .vit.models import MergedFeatures, merged_features
from .vit.patch import apply, merged, remove

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
